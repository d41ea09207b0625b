"""Which units the box had and has no more, which came back, and which GPUs were cut anew. Pure.

"Not seen yet" is not "gone" (a driver comes up late, a read fails): a unit counts as missing after it was absent from
several fresh pictures over a minute. MIG instances do not survive a reboot, so after one they are missing at once.
A lease is void only where the unit provably ended: its GPU is there and well, and does not have it any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from ds01spawner.model import Gpu, Snapshot, Unit, plain

from .findings import Finding, Severity, What

ABSENT_TIMES = 3
"""Fresh pictures in a row from which a unit must be absent …"""
ABSENT_FOR = timedelta(seconds=60)
"""… over at least this long, before it counts as missing."""
BOX = "box"


@dataclass(frozen=True)
class KnownUnit:
    """A unit that the box has or had. missing: an admin was told that it is not there."""

    uuid: str
    gpu_uuid: str
    label: str
    mig_profile: str | None = None
    start: int | None = None
    missing: bool = False

    @property
    def words(self) -> str:
        """For people: `3g.20gb (2.0, MIG-…)`."""
        return f"{self.mig_profile or 'whole GPU'} ({self.label}, {self.uuid})"


@dataclass(frozen=True)
class KnownBox:
    """What is remembered of the box from pass to pass and over restarts. mig: by GPU, whether MIG was on."""

    boot_id: str
    driver: str | None = None
    units: tuple[KnownUnit, ...] = ()
    mig: Mapping[str, bool] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the ledger; `from_dict` reads it back."""
        data: dict[str, Any] = plain(self)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KnownBox:
        """What `as_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: it did not write that.
        """
        units = tuple(KnownUnit(**unit) for unit in data["units"])
        return cls(str(data["boot_id"]), data["driver"], units, dict(data["mig"]))


@dataclass(frozen=True)
class Absence:
    """Since when a unit has been absent, in how many pictures, and the time of the last one."""

    since: datetime
    times: int
    last: datetime

    def again(self, at: datetime) -> Absence:
        """One more picture without it; the same picture does not count twice."""
        return self if at <= self.last else Absence(self.since, self.times + 1, at)

    @property
    def proven(self) -> bool:
        """True if it lasted."""
        return self.times >= ABSENT_TIMES and self.last - self.since >= ABSENT_FOR


@dataclass(frozen=True)
class BoxNews:
    """What a fresh picture says, compared with what was known.

    Attributes:
        known: to remember. absences: to hand in with the next picture.
        gone: units that provably ended; leases on them are void.
    """

    known: KnownBox
    findings: tuple[Finding, ...] = ()
    absences: Mapping[str, Absence] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()


def compare(
    known: KnownBox | None, snapshot: Snapshot, absences: Mapping[str, Absence], leased: Collection[str] = ()
) -> BoxNews:
    """What changed between what was known and a fresh picture.

    Args:
        known: None at the very first look. snapshot: fresh. absences: of the pass before.
        leased: units that a live lease names; they are remembered as long as one does.
    """
    inventory = snapshot.inventory
    gpus = {gpu.uuid: gpu for gpu in inventory.gpus}
    present = {unit.uuid: unit for unit in inventory.units if not _lost(unit)}
    now_known = {unit.uuid: _known(unit) for unit in inventory.units}
    if known is None:
        return BoxNews(KnownBox(snapshot.boot_id, inventory.driver, tuple(now_known.values()), _modes(gpus)))
    rebooted = known.boot_id != snapshot.boot_id
    news: list[KnownUnit] = []
    back: list[KnownUnit] = []
    kept: dict[str, KnownUnit] = {}
    gone: set[str] = set()
    still: dict[str, Absence] = {}
    for unit in known.units:
        if unit.uuid in present and not _remade(unit, present[unit.uuid]):
            if unit.missing:
                back.append(unit)
            continue
        absence = absences.get(unit.uuid)
        absence = Absence(snapshot.at, 1, snapshot.at) if absence is None else absence.again(snapshot.at)
        still[unit.uuid] = absence
        proven = unit.missing or absence.proven or (rebooted and unit.mig_profile is not None)
        if proven and not unit.missing:
            news.append(unit)
        if proven and _ended(unit, gpus):
            gone.add(unit.uuid)
        if unit.uuid not in gone or unit.uuid in leased:
            kept[unit.uuid] = replace(unit, missing=proven)
    units = tuple((now_known | kept).values())
    findings = (*_of_boot(known, snapshot), *_of_modes(known, gpus), *_of_units(news, back, rebooted, gpus))
    memory = KnownBox(snapshot.boot_id, inventory.driver, units, dict(known.mig) | _modes(gpus))
    return BoxNews(memory, findings, still, frozenset(gone))


def _known(unit: Unit) -> KnownUnit:
    return KnownUnit(unit.uuid, unit.gpu_uuid, unit.label, unit.mig_profile, unit.start)


def _lost(unit: Unit) -> bool:
    """True for a unit that is only still listed: its GPU does not answer any more."""
    return (unit.problem or "").startswith("lost")


def _remade(known: KnownUnit, unit: Unit) -> bool:
    """True if another instance has got its name (ids may be used again)."""
    return known.mig_profile != unit.mig_profile


def _ended(unit: KnownUnit, gpus: Mapping[str, Gpu]) -> bool:
    """True if its GPU is there and well and does not have it. A GPU that is away may come back with it."""
    gpu = gpus.get(unit.gpu_uuid)
    if gpu is None or gpu.problem is not None:
        return False
    return not any(has.uuid == unit.uuid and not _remade(unit, has) for has in gpu.units)


def _modes(gpus: Mapping[str, Gpu]) -> dict[str, bool]:
    return {uuid: gpu.mig_enabled for uuid, gpu in gpus.items() if gpu.problem is None}


# --------------------------------------------------------------------------- what to tell


def _of_boot(known: KnownBox, snapshot: Snapshot) -> list[Finding]:
    if known.boot_id == snapshot.boot_id:
        return []
    said = "the machine was restarted; servers that ran then are stopped, and MIG instances must be made anew"
    return [Finding(What.REBOOTED, BOX, said, severity=Severity.INFO, lasting=False)]


def _of_modes(known: KnownBox, gpus: Mapping[str, Gpu]) -> list[Finding]:
    found = []
    for uuid, mode in _modes(gpus).items():
        if known.mig.get(uuid, mode) != mode:
            said = f"MIG was switched {'on' if mode else 'off'} on GPU {gpus[uuid].index} ({uuid})"
            found.append(Finding(What.MIG_MODE_CHANGED, BOX, said, severity=Severity.ALERT, lasting=False))
    return found


def _of_units(news: list[KnownUnit], back: list[KnownUnit], rebooted: bool, gpus: Mapping[str, Gpu]) -> list[Finding]:
    found = []
    if news:
        why = "not there any more since the machine was restarted" if rebooted else "not there any more"
        remedy = (
            "Make the MIG layout again (nvidia-smi mig, mig-parted) if it was not changed on purpose."
            if all(_ended(unit, gpus) for unit in news)
            else "See what `nvidia-smi` and `dmesg` say of these GPUs."
        )
        listed = ", ".join(unit.words for unit in news)
        found.append(
            Finding(
                What.UNITS_MISSING,
                BOX,
                f"{why}: {listed}",
                severity=Severity.ALERT,
                remedy=remedy,
                units=tuple(unit.uuid for unit in news),
                lasting=False,
            )
        )
    if back:
        said = "there again: " + ", ".join(unit.words for unit in back)
        uuids = tuple(unit.uuid for unit in back)
        found.append(Finding(What.UNITS_BACK, BOX, said, severity=Severity.INFO, units=uuids, lasting=False))
    return found
