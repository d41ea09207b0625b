"""Which units a GPU's name means, in all the spellings that Docker and NVIDIA's tools take. Pure.

Whatever cannot be understood means every unit: unparsable is occupied (design, point 5).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ds01spawner.model import Gpu, Inventory

_INDEX = re.compile(r"\d{1,4}")
_MIG_INDEX = re.compile(r"(\d{1,4})[:.](\d{1,4})")
_FULL_GPU = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_OLD_MIG = re.compile(r"MIG-(GPU-[^/]+)/(\d+)/(\d+)", re.IGNORECASE)
_PCI = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-9a-f])", re.IGNORECASE)
_CDI = re.compile(r"([^/=\s]+)/([^/=\s]+)=(\S+)")
_RULE = re.compile(r"([abc])\s+(\d+|\*):(\d+|\*)\s+[rwm]+")
_NODE = re.compile(r"(?:/nvidia|/char/195:)(\d+)$")

NVIDIA_MAJOR = "195"
CONTROL_MINORS = ("254", "255")
"""Minor numbers of nvidia-modeset and nvidiactl: no GPU's."""
CONTROL_NODES = ("nvidiactl", "nvidia-modeset", "nvidia-uvm", "nvidia-uvm-tools")
OTHER_VENDORS = ("amd.com", "intel.com", "habana.ai", "xilinx.com", "google.com")
"""CDI vendors of other hardware. A vendor that is not listed may describe NVIDIA's nodes as well as its own."""
NOT_GPUS = ("gds", "gdrcopy", "mofed", "nvswitch", "imex-channel")
"""Classes of NVIDIA's CDI devices that are no GPUs."""
NOTHING = ("", "none", "void")
DEVICE_MOUNTS = ("/var/run/nvidia-container-devices", "/run/nvidia-container-devices")


@dataclass(frozen=True)
class Meaning:
    """Units that are meant, by uuid. everything: all there are, named or not understood."""

    units: frozenset[str]
    everything: bool = False

    def __or__(self, other: Meaning) -> Meaning:
        return Meaning(self.units | other.units, self.everything or other.everything)


NO_UNIT = Meaning(frozenset())


def every(inventory: Inventory) -> Meaning:
    """All units of the box."""
    return Meaning(frozenset(unit.uuid for unit in inventory.units), everything=True)


def _units(gpus: Iterable[Gpu]) -> Meaning:
    """All units of those GPUs: who names the parent of MIG instances may touch all of them (failure case B4)."""
    return Meaning(frozenset(unit.uuid for gpu in gpus for unit in gpu.units))


def of_device(name: str, inventory: Inventory) -> Meaning:
    """What one device id means: `all`, `none`, index, `gpu:mig` index, UUID (or its beginning), PCI bus id.

    A full UUID of no GPU here means none here. A MIG UUID of no instance here was one before the GPU was cut anew;
    its old device nodes may lead to any instance of today, so it means all of them.
    """
    name = name.strip()
    if name.lower() in NOTHING:
        return NO_UNIT
    if name.lower() == "all":
        return every(inventory)
    exact = frozenset(unit.uuid for unit in inventory.units if unit.uuid.lower() == name.lower())
    if exact:
        return Meaning(exact)
    if "=" in name:
        return of_cdi(name, inventory)
    if _INDEX.fullmatch(name):
        return _or_every(_units(gpu for gpu in inventory.gpus if gpu.index == int(name)), inventory, int(name))
    mig = _MIG_INDEX.fullmatch(name)
    if mig is not None:
        return _of_mig_index(int(mig[1]), int(mig[2]), inventory)
    pci = _PCI.fullmatch(name)
    if pci is not None:
        found = [gpu for gpu in inventory.gpus if _pci(gpu.pci_bus_id) == _pci(name)]
        return _units(found) if found else every(inventory)
    return _of_uuid(name, inventory)


def _or_every(meaning: Meaning, inventory: Inventory, index: int) -> Meaning:
    return meaning if any(gpu.index == index for gpu in inventory.gpus) else every(inventory)


def _of_mig_index(gpu_index: int, mig_index: int, inventory: Inventory) -> Meaning:
    gpu = next((g for g in inventory.gpus if g.index == gpu_index), None)
    if gpu is None:
        return every(inventory)
    found = frozenset(unit.uuid for unit in gpu.units if unit.mig_index == mig_index)
    return Meaning(found) if found else _units([gpu])


def _pci(text: str) -> tuple[int, ...] | None:
    match = _PCI.fullmatch(text)
    return tuple(int(part or "0", 16) for part in match.groups()) if match else None


def _of_uuid(name: str, inventory: Inventory) -> Meaning:
    lower = name.lower()
    old = _OLD_MIG.fullmatch(name)
    if old is not None:
        gpus = [gpu for gpu in inventory.gpus if gpu.uuid.lower() == old[1].lower()]
        ids = (int(old[2]), int(old[3]))
        exact = frozenset(u.uuid for gpu in gpus for u in gpu.units if (u.gi_id, u.ci_id) == ids)
        if exact:
            return Meaning(exact)
        return _units(gpus) if gpus else every(inventory)
    if lower.startswith("gpu-") and len(lower) > 4:
        # NVIDIA's tools take the beginning of a UUID, too.
        found = [gpu for gpu in inventory.gpus if gpu.uuid.lower().startswith(lower)]
        if found:
            return _units(found)
        return NO_UNIT if _FULL_GPU.fullmatch(name) else every(inventory)
    if lower.startswith("mig-") and len(lower) > 4:
        instances = frozenset(u.uuid for u in inventory.units if not u.whole)
        begun = frozenset(uuid for uuid in instances if uuid.lower().startswith(lower))
        return Meaning(begun or instances)
    return every(inventory)


def of_cdi(name: str, inventory: Inventory) -> Meaning:
    """What a fully qualified CDI name (`vendor/class=device`) means."""
    match = _CDI.fullmatch(name)
    if match is None:
        return every(inventory)
    vendor, kind, device = match.groups()
    if vendor.lower() in OTHER_VENDORS:
        return NO_UNIT
    # nvidia.com, but also management.nvidia.com and runtime.nvidia.com.
    if vendor.lower() == "nvidia.com" or vendor.lower().endswith(".nvidia.com"):
        return NO_UNIT if kind in NOT_GPUS else of_device(device, inventory)
    return every(inventory)


def of_mount(target: str, inventory: Inventory) -> Meaning:
    """What a mount below NVIDIA's device folder asks for; any other mount means nothing."""
    path = posixpath.normpath(target)
    for folder in DEVICE_MOUNTS:
        if path == folder:
            return every(inventory)
        if path.startswith(f"{folder}/"):
            rest = path[len(folder) + 1 :]
            if rest.startswith("cdi/"):
                kind, _, device = rest[len("cdi/") :].rpartition("/")
                return of_cdi(f"{kind}={device}", inventory)
            return of_device(rest, inventory)
    return NO_UNIT


def of_nodes(paths: Iterable[str], inventory: Inventory) -> Meaning:
    """What host device nodes together give access to.

    Control nodes come with every use of a GPU and give none by themselves; alone they are a way of asking that we do
    not understand. A node's number is its minor number and not the index, so an unknown one may be any GPU.
    """
    meaning, control, numbered = NO_UNIT, False, False
    for path in map(posixpath.normpath, paths):
        name = posixpath.basename(path)
        node = _NODE.search(path)
        if path in ("/", "/dev", "/dev/char"):
            return every(inventory)
        if name in CONTROL_NODES or (node is not None and node[1] in CONTROL_MINORS):
            control = True
        elif node is not None:
            numbered = True
            meaning |= of_minor(int(node[1]), inventory)
        elif "/nvidia-caps" in path:
            numbered = True
            meaning |= Meaning(frozenset(unit.uuid for unit in inventory.units if not unit.whole))
        elif "nvidia" in name:
            return every(inventory)
    return every(inventory) if control and not numbered else meaning


def of_minor(minor: int, inventory: Inventory) -> Meaning:
    """The units behind `/dev/nvidia<minor>`."""
    found = [gpu for gpu in inventory.gpus if gpu.minor == minor]
    return _units(found) if found else every(inventory)


def of_rule(rule: str, inventory: Inventory) -> Meaning:
    """What a device cgroup rule (`c 195:* rwm`) opens."""
    match = _RULE.fullmatch(rule.strip())
    if match is None:
        return every(inventory)
    kind, major, minor = match.groups()
    if kind == "b":
        return NO_UNIT
    if kind == "a" or major == "*":
        return every(inventory)
    if major != NVIDIA_MAJOR or minor in CONTROL_MINORS:
        return NO_UNIT
    return every(inventory) if minor == "*" else of_minor(int(minor), inventory)
