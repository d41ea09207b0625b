"""One card of the spawn form: what a profile's size would give this user, and whether it can start now. Pure.

Whether a card can start is never worked out here: every card asks `admission.check`, the function that the start
itself asks, so that the form and the start cannot disagree. Three questions are put to it per card: may this user
ever have it (empty machine, nothing held), can it start now, and which units would do (to count the free ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from ds01spawner import admission
from ds01spawner.admission_words import amount, unit_notes
from ds01spawner.errors import Code, Refusal
from ds01spawner.gpu.placement import in_pool
from ds01spawner.model import (
    Admission,
    GpuAsk,
    GpuKind,
    Holding,
    Limits,
    Request,
    Resources,
    Snapshot,
    State,
    Unit,
    Usage,
)
from ds01spawner.policy.schema import Profile, ProfileSize

from .choice import size_key
from .words import (
    badge_text,
    cores_text,
    gives_text,
    instead_text,
    memory_of,
    plain_title,
    reason_text,
    sentence,
    size_text,
    sized,
    wait_text,
)

_WAIT_AND_SEE = frozenset({Code.NO_GPU, Code.INVENTORY_STALE, Code.IMAGE_MISSING})
"""Refusals that an otherwise entitled user may meet even on an empty machine; every other one hides the card."""

_QUOTA_TELLS = frozenset({Code.USER_COUNT, Code.USER_QUOTA, Code.GROUP_QUOTA, Code.TOO_MANY_SERVERS})
"""Refusals that say themselves from whose quota a card would take what."""


@dataclass(frozen=True)
class Fact:
    """One line of what a card gives or of what is left: label, value, and whose rule it is (may be "")."""

    label: str
    value: str
    source: str = ""


@dataclass(frozen=True)
class Meter:
    """Units that would do for a card: `free` of `total` (healthy ones) can be had now, quotas left aside."""

    free: int
    total: int


@dataclass(frozen=True)
class Card:
    """One choice on the form.

    Attributes:
        value: `profile/size`, what the radio button sends.
        name: what it is called. memory: of its GPU, as it usually is ("5 GB"; "" without one). tagline: plain words.
        gives: GPU and memory in a few words. takes: from whose quota, or "".
        details: the exact values, for the disclosure.
        meter: free units; None without a GPU or when the machine's state is unknown.
        available: it can start now; reason and when say why not and until when (plain text, may be "").
        refused: the sentence of the refusal, of which `reason` is the short form for the card's face.
        badge: the same in three words, or how many units are free.
        whole: it would take a whole GPU. checked: preselected; exactly one card of a form is.
        notes: what admission adds to a yes ("CPU clamped to …").
    """

    value: str
    profile: str
    size: str
    name: str
    memory: str
    tagline: str
    gives: str
    takes: str
    details: tuple[Fact, ...]
    available: bool
    badge: str
    code: Code | None = None
    refused: str = ""
    reason: str = ""
    when: str = ""
    meter: Meter | None = None
    whole: bool = False
    share: float = 0.0
    checked: bool = False
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its name with the memory: "Small GPU, 5 GB"."""
        return sized(self.name, self.memory)


@dataclass(frozen=True)
class Scene:
    """What every card is judged against."""

    server_name: str
    limits: Limits
    usage: Usage
    snapshot: Snapshot
    now: datetime

    def ask(
        self,
        profile: Profile,
        size: ProfileSize,
        image: str,
        *,
        usage: Usage | None = None,
        snapshot: Snapshot | None = None,
        gpu: GpuAsk | None = None,
    ) -> Admission | Refusal:
        """The answer of the real admission, as a value. Dry run: it changes nothing."""
        request = Request(server_name=self.server_name, profile=profile.name, size=size_key(profile, size), gpu=gpu)
        usage = self.usage if usage is None else usage
        snapshot = self.snapshot if snapshot is None else snapshot
        try:
            return admission.check(request, profile, size, image, self.limits, usage, snapshot, self.now)
        except Refusal as refusal:
            return refusal

    @property
    def pool(self) -> tuple[str, ...] | None:
        """Names of the GPUs that the user may be given; None = all."""
        return self.limits["gpu_pool"] if "gpu_pool" in self.limits.values else None

    @property
    def idle(self) -> Snapshot:
        """The same machine, seen just now, with nobody from outside on it."""
        return replace(self.snapshot, at=self.now, external=())


def make_card(scene: Scene, profile: Profile, size: ProfileSize, image: str | None, missing: str) -> Card | None:
    """One card, None if this user may never have it."""
    reference = image or "unknown"
    ever = scene.ask(profile, size, reference, usage=Usage(), snapshot=scene.idle)
    if isinstance(ever, Refusal) and ever.code not in _WAIT_AND_SEE:
        return None
    bare = scene.ask(profile, size, reference, usage=Usage(), snapshot=scene.idle, gpu=GpuAsk())
    answer: Admission | Refusal = scene.ask(profile, size, reference)
    if missing:
        answer = Refusal(Code.IMAGE_MISSING, missing)
    code = answer.code if isinstance(answer, Refusal) else None
    resources = bare.resources if isinstance(bare, Admission) else None
    units = _units_that_do(scene, profile, size, reference)
    typical = ever.units if isinstance(ever, Admission) else ()
    granted = answer.units if isinstance(answer, Admission) else typical
    ask = size.gpu.ask()
    title, _, tagline = (size.title or plain_title(ask, typical)).partition(": ")
    key = size_key(profile, size)
    meter = _meter(scene, units) if _wants_gpu(size) and not scene.snapshot.stale(scene.now) else None
    return Card(
        value=f"{profile.name}/{key}",
        profile=profile.name,
        size=key,
        name=title,
        memory=memory_of(typical),
        tagline=sentence(size.description or tagline),
        gives=gives_text(ask, granted, resources.memory if resources else None),
        takes="" if code in _QUOTA_TELLS else _takes(scene.limits, granted),
        details=(
            *_details(scene, resources, size, granted, units, image),
            *([Fact("Why not now", answer.message)] if isinstance(answer, Refusal) and code is Code.NO_GPU else []),
        ),
        available=code is None,
        badge=badge_text(code, meter.free if meter else None, meter.total if meter else None),
        code=code,
        refused=answer.message if isinstance(answer, Refusal) else "",
        reason=reason_text(answer) if isinstance(answer, Refusal) else "",
        when="" if code is None else _when(scene, code, units),
        meter=meter,
        whole=any(unit.whole for unit in granted) or ask.kind is GpuKind.FULL,
        share=sum(unit.share for unit in granted),
        notes=_notes(ask, answer, typical) if isinstance(answer, Admission) else (),
    )


def _wants_gpu(size: ProfileSize) -> bool:
    return size.gpu.ask().count > 0


def _units_that_do(scene: Scene, profile: Profile, size: ProfileSize, image: str) -> tuple[Unit, ...]:
    """The healthy units of the machine that admission would take for this card, free or not.

    Units that look alike are tried together: the machine is shown to admission with only these in it. For several
    GPUs all whole ones are alike, because a set may mix models.
    """
    if not _wants_gpu(size):
        return ()
    several = size.gpu.ask().count > 1
    alike: dict[tuple[str, str | None, int], list[Unit]] = {}
    for gpu in scene.snapshot.inventory.gpus:
        for unit in gpu.units:
            if unit.problem is None and gpu.problem is None and in_pool(gpu, unit, scene.pool):
                kind = ("", None, 0) if several and unit.whole else (unit.model, unit.mig_profile, unit.memory_bytes)
                alike.setdefault(kind, []).append(unit)
    found: list[Unit] = []
    for units in alike.values():
        only = _with_units(scene.idle, frozenset(unit.uuid for unit in units))
        if isinstance(scene.ask(profile, size, image, usage=Usage(), snapshot=only), Admission):
            found.extend(units)
    return tuple(found)


def _with_units(snapshot: Snapshot, keep: frozenset[str]) -> Snapshot:
    """`snapshot` with no other units than `keep`."""
    gpus = tuple(
        replace(gpu, units=tuple(unit for unit in gpu.units if unit.uuid in keep)) for gpu in snapshot.inventory.gpus
    )
    return replace(snapshot, inventory=replace(snapshot.inventory, gpus=gpus))


def _meter(scene: Scene, units: Sequence[Unit]) -> Meter:
    busy = scene.usage.taken() | frozenset(scene.snapshot.external_by_unit())
    return Meter(free=sum(unit.uuid not in busy for unit in units), total=len(units))


def _notes(ask: GpuAsk, answer: Admission, typical: Sequence[Unit]) -> tuple[str, ...]:
    """What admission adds to its yes; what it says of units is said again without NVIDIA's names."""
    of_units = {note for full in (True, False) for note in unit_notes(ask, answer.units, full)}
    others = tuple(note for note in answer.notes if note not in of_units)
    instead = instead_text(typical, answer.units)
    return (instead, *others) if instead else others


def _takes(limits: Limits, granted: Sequence[Unit]) -> str:
    """From whose quota the GPU comes: "Takes 0.14 of your 1 GPU · group students"; "" without a GPU or a cap."""
    shared, counted = limits.values.get("max_gpu_equivalents"), limits.values.get("max_mig_instances")
    if granted and shared is not None and shared.value is not None:
        share = sum(unit.share for unit in granted)
        return f"Takes {_part(share, shared.value, 'GPU')} · {shared.source}"
    if granted and counted is not None and counted.value is not None:
        return f"Takes {_part(len(granted), counted.value, 'GPU unit')} · {counted.source}"
    return ""


def _part(taken: float, cap: float, what: str) -> str:
    if amount(taken) == amount(cap):
        return "all of your GPU quota"
    return f"{amount(taken)} of your {amount(cap)} {what}{'' if cap == 1 else 's'}"


def _details(
    scene: Scene,
    resources: Resources | None,
    size: ProfileSize,
    granted: Sequence[Unit],
    units: Sequence[Unit],
    image: str | None,
) -> tuple[Fact, ...]:
    """The exact values, each with whose rule it is."""
    facts: list[Fact] = []
    if _wants_gpu(size):
        kinds = sorted({unit.mig_profile or "whole GPU" for unit in units})
        facts.append(Fact("GPU units", ", ".join(kinds) or "none on this server", "this profile"))
        models = sorted({unit.model for unit in units})
        facts += [Fact("GPU model", ", ".join(models))] if models else []
        facts += [Fact("GPU memory", memory_of(granted))] if granted else []
        if granted:
            share = sum(unit.share for unit in granted)
            facts.append(Fact("Counts as", f"{amount(share)} of a GPU", _source(scene.limits, "max_gpu_equivalents")))
    if resources is not None:
        cpu_rule = _rule(scene.limits, "max_cpus", resources.cpus, size.cpus)
        memory_rule = _rule(scene.limits, "memory", resources.memory, size.memory)
        facts += [
            Fact("CPU", cores_text(resources.cpus), cpu_rule),
            Fact("Memory", size_text(resources.memory), memory_rule),
            Fact("Shared memory", size_text(resources.shm_size), _source(scene.limits, "shm_size")),
            Fact("Processes", _number(resources.pids_limit), _source(scene.limits, "pids_limit")),
        ]
    facts.append(Fact("Image", image or "not on this server"))
    return tuple(facts)


def _number(value: int | None) -> str:
    return "no limit" if value is None else str(value)


def _source(limits: Limits, key: str) -> str:
    return limits.source(key) if key in limits.values else ""


def _rule(limits: Limits, key: str, given: float | None, wanted: float | None) -> str:
    """Whose rule decided a value: the profile's if it is what the size asks for, else the limit's."""
    return "this profile" if wanted is not None and given == wanted else _source(limits, key)


# --------------------------------------------------------------------------- when


def _when(scene: Scene, code: Code, units: Sequence[Unit]) -> str:
    """How long until the next hold ends that stands in the way, in words; "" if nobody knows."""
    user, group = scene.limits.user, scene.limits.group
    wanted = frozenset(unit.uuid for unit in units)

    def in_the_way(holding: Holding) -> bool:
        if code in (Code.USER_COUNT, Code.USER_QUOTA):
            return holding.user == user
        if code is Code.GROUP_QUOTA:
            return holding.group == group
        return code is Code.NO_GPU and bool(wanted & holding.units.keys())

    ends = [
        h.until
        for h in scene.usage.holdings
        if h.units and h.state is State.HELD and h.until is not None and h.until > scene.now and in_the_way(h)
    ]
    return f"Expected free {wait_text((min(ends) - scene.now).total_seconds())}." if ends else ""
