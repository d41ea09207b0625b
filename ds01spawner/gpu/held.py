"""Who holds what, written down: the list that `ds01-admin place --held` and the policy vectors use.

    - {name: a, user: bo, device: "0", state: running}
    - {name: b, user: null, device: ["1.0", "1.1"], state: exited, stopped_s: 300, gpu_hold_s: 900}

It describes containers that exist, whoever made them. One with a user is charged to that user, one without holds
its units from outside. It says nothing about servers of ours, so it never counts as one. What cannot be read
occupies everything that it might mean: `all`, a GPU that is cut (all its instances), and any name that is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds01spawner.model import External, Holding, Inventory, State, Unit

_STOPPED = ("exited", "dead")
_NOTHING = ("", "none", "void", "null")
_UUID = re.compile(r"(?:GPU|MIG)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CDI = "nvidia.com/gpu="
_KEYS = frozenset({"name", "user", "device", "state", "stopped_s", "gpu_hold_s"})


@dataclass(frozen=True)
class Held:
    """What a list says: holdings charged to users, and units that nobody known holds."""

    holdings: tuple[Holding, ...]
    external: tuple[External, ...]


def read_held(
    entries: Sequence[Mapping[str, Any]], inventory: Inventory, group_of: Callable[[str], str | None]
) -> Held:
    """Read the list.

    Args:
        group_of: the group that a user's holdings count for.

    Raises:
        ValueError: an entry is no mapping or has an unknown key; the sentence names it.
    """
    holdings: list[Holding] = []
    external: list[External] = []
    for place, entry in enumerate(entries, start=1):
        if not isinstance(entry, Mapping):
            raise ValueError(f"entry {place} of the held list must be a mapping such as {{user: bo, device: '0'}}")
        unknown = sorted(str(key) for key in entry if key not in _KEYS)
        if unknown:
            raise ValueError(f"entry {place} of the held list has no key '{unknown[0]}'; known: {sorted(_KEYS)}")
        if not holds(entry):
            continue
        units = named_units(entry.get("device"), inventory)
        name, user = str(entry.get("name") or f"container {place}"), entry.get("user")
        if user is None:
            external += [External(u.uuid, "container", name, f"device {entry.get('device')}") for u in units]
        elif units:
            shares = {unit.uuid: unit.share for unit in units}
            holdings.append(Holding(str(user), group_of(str(user)), name, State.HELD, shares))
    return Held(tuple(holdings), tuple(external))


def holds(entry: Mapping[str, Any]) -> bool:
    """False only if the container is known to be stopped for longer than it may hold (strictly longer)."""
    if str(entry.get("state", "running")).lower() not in _STOPPED:
        return True
    stopped, hold = entry.get("stopped_s"), entry.get("gpu_hold_s")
    if not isinstance(stopped, (int, float)) or not isinstance(hold, (int, float)):
        return True  # unknown is not free, and a hold of null has no end
    return stopped <= hold


def named_units(device: object, inventory: Inventory) -> tuple[Unit, ...]:
    """The units that a device text, number or list names, in PCI order."""
    names = _names(device)
    found: dict[str, Unit] = {}
    for name in names:
        for unit in _units_of(name, inventory):
            found[unit.uuid] = unit
    return tuple(unit for unit in inventory.units if unit.uuid in found)


def _names(device: object) -> list[str]:
    if device is None:
        return []
    if isinstance(device, (list, tuple, set)):
        return [name for item in device for name in _names(item)]
    return [name for part in str(device).split(",") if (name := part.strip()).lower() not in _NOTHING]


def _units_of(name: str, inventory: Inventory) -> tuple[Unit, ...]:
    text = name.removeprefix(_CDI).replace(":", ".")
    direct = tuple(unit for unit in inventory.units if text in (unit.uuid, unit.label))
    if direct:
        return direct
    for gpu in inventory.gpus:
        if text in (gpu.uuid, str(gpu.index)):
            return gpu.units
    if _UUID.fullmatch(name.removeprefix(_CDI)):
        return ()  # a well-formed name of something that is gone (an instance before the GPU was cut anew)
    return inventory.units
