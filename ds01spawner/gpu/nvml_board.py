"""One GPU through NVML: what never changes about it, its health, its MIG instances, its links.

Every function takes handles and answers values; pynvml's errors pass through, except where an answer that is not
to be had has a meaning of its own. `nvml.py` decides what an error means for the box.

What is asked by enum is never assumed by id (A100 and GB200 number their profiles differently). What needs
privileges (placements, GPU instances) is preferred where it is allowed and replaced by known geometry where not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_uint
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pynvml

from ds01spawner.model import Unit

from .mig import MIB, geometry_of, totals

Handle = Any
"""An NVML device handle (an opaque pointer)."""

T = TypeVar("T")

NOT_THERE = (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT)
"""How NVML answers for a hole in the MIG index, and for a handle whose instance is gone."""

SILENT = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_DEPRECATED,
)
"""The GPU, the driver or our rights do not let NVML answer; this says nothing about the GPU's health."""

_MIG_NAME = re.compile(r"(?:\d+c\.)?\d+g\.\d+gb(?:[+-][a-z.]+)*")
_CLOSENESS: Mapping[int, int] = {
    pynvml.NVML_TOPOLOGY_INTERNAL: 60,
    pynvml.NVML_TOPOLOGY_SINGLE: 50,
    pynvml.NVML_TOPOLOGY_MULTIPLE: 40,
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: 30,
    pynvml.NVML_TOPOLOGY_NODE: 20,
    pynvml.NVML_TOPOLOGY_SYSTEM: 10,
}
"""Closeness by common ancestor, as NVIDIA/go-gpuallocator scores it."""

_NVLINK = 100
"""Closeness of one NVLink."""


@dataclass(frozen=True)
class ProfileShape:
    """A MIG profile as NVML tells it. `name` may be "" on old drivers; `memory_slices` None without privileges."""

    name: str
    compute_slices: int
    memory_slices: int | None


@dataclass(frozen=True)
class Board:
    """What never changes about a GPU while its handle is valid.

    Attributes:
        compute_slices, memory_slices: totals for MIG. shapes: MIG profiles by NVML's id.
    """

    handle: Handle
    uuid: str
    pci_bus_id: str
    model: str
    memory_bytes: int
    compute_capability: tuple[int, int] | None
    compute_slices: int
    memory_slices: int
    shapes: Mapping[int, ProfileShape]


@dataclass(frozen=True)
class Instance:
    """One MIG instance with its handle."""

    handle: Handle
    unit: Unit


def ask(default: T, function: Callable[..., Any], *arguments: Any) -> Any | T:
    """`function(*arguments)`, or `default` where NVML cannot tell."""
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        if error.value in SILENT:
            return default
        raise


def pci_order(bus_id: str) -> tuple[int, ...]:
    """A key that orders PCI bus ids by number ("…:0A:…" before "…:10:…", whatever the case or width)."""
    return tuple(int(part, 16) for part in re.split(r"[:.]", bus_id))


def open_board(handle: Handle, bus_id: str) -> Board:
    """Ask everything that does not change."""
    model = str(pynvml.nvmlDeviceGetName(handle))
    memory_info = ask(None, pynvml.nvmlDeviceGetMemoryInfo, handle)
    geometry = geometry_of(model)
    shapes = _shapes(handle)
    compute, memory = _totals(handle, model, shapes)
    capability = ask(None, pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return Board(
        handle=handle,
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        pci_bus_id=bus_id,
        model=model,
        memory_bytes=int(memory_info.total) if memory_info else geometry.memory_bytes if geometry else 0,
        compute_capability=None if capability is None else (int(capability[0]), int(capability[1])),
        compute_slices=compute,
        memory_slices=memory,
        shapes=shapes,
    )


def _shapes(handle: Handle) -> dict[int, ProfileShape]:
    """All MIG profiles of the GPU by id; empty where it has no MIG. Works with MIG off."""
    shapes = {}
    for profile in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        info = _profile_info(handle, profile)
        if info is not None:
            found = _MIG_NAME.search(str(getattr(info, "name", "")))
            sizes = [size for _, size in _placements(handle, int(info.id))]
            shapes[int(info.id)] = ProfileShape(
                found.group() if found else "", int(info.sliceCount), max(sizes, default=None)
            )
    return shapes


def _profile_info(handle: Handle, profile: int) -> Any | None:
    """A MIG profile by enum, with its name where the driver knows version 2 of the answer; None if there is none."""

    def asked(version: int) -> Any | None:
        try:
            return ask(None, pynvml.nvmlDeviceGetGpuInstanceProfileInfo, handle, profile, version)
        except pynvml.NVMLError as error:
            if error.value in NOT_THERE:
                return None
            raise

    return asked(2) or asked(1)


def _placements(handle: Handle, profile_id: int) -> list[tuple[int, int]]:
    """(start, size) in memory slices of every placement of a profile; empty without privileges."""
    count = c_uint(0)
    try:
        pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(handle, profile_id, None, byref(count))
        placements = (pynvml.c_nvmlGpuInstancePlacement_t * max(1, count.value))()
        pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(handle, profile_id, placements, byref(count))
    except pynvml.NVMLError as error:
        if error.value in SILENT or error.value in NOT_THERE:
            return []
        raise
    return [(int(place.start), int(place.size)) for place in placements[: count.value]]


def _totals(handle: Handle, model: str, shapes: Mapping[int, ProfileShape]) -> tuple[int, int]:
    """(compute, memory) slices of the GPU: as NVML tells, else as known for the model, else by its largest profile."""
    compute = max((shape.compute_slices for shape in shapes.values()), default=0)
    ends = [start + size for profile in shapes for start, size in _placements(handle, profile)]
    if compute and ends:
        return compute, max(ends)
    known = geometry_of(model)
    if known is not None and known.profiles:
        return known.compute_slices, known.memory_slices
    return totals(compute)


# --------------------------------------------------------------------------- health


def health(board: Board) -> str | None:
    """Why nothing of the GPU may be handed out, or None. A GPU that answers with an error raises it."""
    ask(None, pynvml.nvmlDeviceGetMemoryInfo, board.handle)  # a lost GPU fails here, also if nothing below is supported
    rows = ask(None, pynvml.nvmlDeviceGetRemappedRows, board.handle)
    if rows is not None and rows[3]:
        return "ecc: remapping a memory row failed; the GPU needs service"
    if rows is not None and rows[2]:
        return "ecc: a memory row waits to be remapped; reset the GPU"
    if ask(0, pynvml.nvmlDeviceGetRetiredPagesPendingStatus, board.handle):
        return "ecc: a memory page waits to be retired; reset the GPU"
    errors = ask(
        0,
        pynvml.nvmlDeviceGetTotalEccErrors,
        board.handle,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        pynvml.NVML_VOLATILE_ECC,
    )
    if errors:
        return f"ecc: {errors} uncorrected memory errors since the driver was loaded; reset the GPU"
    current, pending = mig_mode(board)
    if current != pending:
        return f"mig: mode {'on' if pending else 'off'} waits for a reset of the GPU"
    return None


def mig_mode(board: Board) -> tuple[bool, bool]:
    """MIG mode now and after the next reset; both off where the GPU has no MIG."""
    current, pending = ask([0, 0], pynvml.nvmlDeviceGetMigMode, board.handle)
    return bool(current), bool(pending)


def minor_number(board: Board) -> int | None:
    """Number of the GPU's device node now (a change of MIG mode may renumber them); None where it is not told."""
    number = ask(None, pynvml.nvmlDeviceGetMinorNumber, board.handle)
    return None if number is None else int(number)


def instance_health(instance: Instance) -> str | None:
    """Why the instance may not be handed out, or None. Only uncorrected SRAM errors are told per instance."""
    errors = ask(
        0,
        pynvml.nvmlDeviceGetMemoryErrorCounter,
        instance.handle,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        pynvml.NVML_VOLATILE_ECC,
        pynvml.NVML_MEMORY_LOCATION_SRAM,
    )
    return f"ecc: {errors} uncorrected errors in this instance; re-create it" if errors else None


# --------------------------------------------------------------------------- MIG instances


def walk(board: Board) -> tuple[Instance, ...]:
    """All MIG instances of the GPU. The index has holes where instances were destroyed."""
    indices = range(ask(0, pynvml.nvmlDeviceGetMaxMigDeviceCount, board.handle))
    found = (_instance_at(board, index) for index in indices)
    return tuple(instance for instance in found if instance is not None)


def _instance_at(board: Board, index: int) -> Instance | None:
    try:
        handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(board.handle, index)
        return Instance(handle, _unit(board, handle, index))
    except pynvml.NVMLError as error:
        if error.value in NOT_THERE:
            return None
        raise


def _unit(board: Board, handle: Handle, index: int) -> Unit:
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    attributes = pynvml.nvmlDeviceGetAttributes(handle)
    gi_id = int(pynvml.nvmlDeviceGetGpuInstanceId(handle))
    ci_id = int(pynvml.nvmlDeviceGetComputeInstanceId(handle))
    slices, own_slices = int(attributes.gpuInstanceSliceCount), int(attributes.computeInstanceSliceCount)
    shape, start, size = _placed(board, gi_id)
    name = _name(handle, shape, slices, own_slices)
    if size is None:
        size = _memory_slices(board, name, int(attributes.memorySizeMB))
    return Unit(
        uuid=uuid,
        gpu_uuid=board.uuid,
        gpu_index=0,
        model=board.model,
        memory_bytes=int(attributes.memorySizeMB) * MIB,
        compute_slices=own_slices or slices,
        memory_slices=size,
        gpu_compute_slices=board.compute_slices,
        gpu_memory_slices=board.memory_slices,
        mig_index=index,
        mig_profile=name or _computed_name(board, slices, own_slices, size),
        start=start,
        gi_id=gi_id,
        ci_id=ci_id,
    )


def _placed(board: Board, gi_id: int) -> tuple[ProfileShape | None, int | None, int | None]:
    """Profile, first memory slice and memory slices of a GPU instance; Nones where we may not ask."""
    gpu_instance = ask(None, pynvml.nvmlDeviceGetGpuInstanceById, board.handle, gi_id)
    info = None if gpu_instance is None else ask(None, pynvml.nvmlGpuInstanceGetInfo, gpu_instance)
    if info is None:
        return None, None, None
    return board.shapes.get(int(info.profileId)), int(info.placement.start), int(info.placement.size)


def _name(handle: Handle, shape: ProfileShape | None, slices: int, own_slices: int) -> str:
    """NVIDIA's name of the MIG profile: as the device calls itself, else as its GPU instance's profile is called."""
    found = _MIG_NAME.search(str(ask("", pynvml.nvmlDeviceGetName, handle)))
    if found:
        return found.group()
    if shape is None or not shape.name:
        return ""
    return shape.name if own_slices in (0, slices) else f"{own_slices}c.{shape.name}"


def _computed_name(board: Board, slices: int, own_slices: int, memory_slices: int) -> str:
    """The name as nvidia-smi would make it: memory as a fraction of the GPU's, rounded to GB."""
    total_gb = -(-board.memory_bytes // 1024**3)
    memory_gb = round(total_gb * memory_slices / board.memory_slices)
    prefix = "" if own_slices in (0, slices) else f"{own_slices}c."
    return f"{prefix}{slices}g.{memory_gb}gb"


def _memory_slices(board: Board, name: str, memory_mib: int) -> int:
    """Memory slices where the placement is not told: as known for the profile, else by size."""
    geometry = geometry_of(board.model)
    known = geometry.profile(re.sub(r"^\d+c\.", "", name)) if geometry else None
    if known is not None:
        return known.memory_slices
    if not board.memory_bytes:
        return board.memory_slices  # nobody may see the GPU's size: charge for all of it rather than too little
    fraction = memory_mib * MIB * board.memory_slices / board.memory_bytes
    return min(board.memory_slices, max(1, -int(-(fraction - 0.01) // 1)))


def still_there(instances: Sequence[Instance]) -> bool:
    """False if a cached handle no longer means the instance that it meant (handles may be reused)."""
    return all(_uuid(instance.handle) == instance.unit.uuid for instance in instances)


def _uuid(handle: Handle) -> str | None:
    try:
        return str(pynvml.nvmlDeviceGetUUID(handle))
    except pynvml.NVMLError as error:
        if error.value in NOT_THERE:
            return None
        raise


def placed_at(unit: Unit, gpu_index: int, problem: str | None) -> Unit:
    """`unit` with its GPU's position, and with `problem` if it has none of its own."""
    return replace(unit, gpu_index=gpu_index, problem=unit.problem or problem)


# --------------------------------------------------------------------------- processes and links


def running(handle: Handle) -> tuple[tuple[int, int | None], ...]:
    """(pid, bytes or None) of every process that uses the device, graphics included. Nothing where not supported."""
    found: dict[int, int | None] = {}
    for newest, older in (
        (pynvml.nvmlDeviceGetComputeRunningProcesses_v3, pynvml.nvmlDeviceGetComputeRunningProcesses_v2),
        (pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, pynvml.nvmlDeviceGetGraphicsRunningProcesses_v2),
    ):
        for process in _processes(handle, newest, older):
            memory = process.usedGpuMemory
            found[int(process.pid)] = found.get(int(process.pid)) or (None if memory is None else int(memory))
    return tuple(sorted(found.items()))


def _processes(handle: Handle, newest: Callable[[Handle], Any], older: Callable[[Handle], Any]) -> Any:
    try:
        return newest(handle)
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            return ask((), older, handle)
        if error.value == pynvml.NVML_ERROR_NOT_SUPPORTED:
            return ()
        raise


def links(boards: Sequence[Board]) -> dict[str, dict[str, int]]:
    """Closeness of every two GPUs by uuid: common PCI ancestor plus NVLinks. What cannot be told counts nothing."""
    nvlinks = {board.uuid: _nvlinks(board) for board in boards}
    found: dict[str, dict[str, int]] = {board.uuid: {} for board in boards}
    for place, one in enumerate(boards):
        for other in boards[place + 1 :]:
            direct = nvlinks[one.uuid].get(other.pci_bus_id, 0)
            switched = min(nvlinks[one.uuid].get("", 0), nvlinks[other.uuid].get("", 0))
            score = _ancestor(one, other) + _NVLINK * (direct + switched)
            found[one.uuid][other.uuid] = found[other.uuid][one.uuid] = score
    return found


def _ancestor(one: Board, other: Board) -> int:
    try:
        level = pynvml.nvmlDeviceGetTopologyCommonAncestor(one.handle, other.handle)
    except pynvml.NVMLError:
        return 0
    return _CLOSENESS.get(int(level), 0)


def _nvlinks(board: Board) -> dict[str, int]:
    """Active NVLinks by the PCI bus id at the other end; those to an NVSwitch under ""."""
    counts: dict[str, int] = {}
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if not pynvml.nvmlDeviceGetNvLinkState(board.handle, link):
                continue
            kind = ask(None, pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, board.handle, link)
            switch = kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
            end = "" if switch else str(pynvml.nvmlDeviceGetNvLinkRemotePciInfo(board.handle, link).busId)
        except pynvml.NVMLError:
            break  # NVML answers so for the first link that the GPU does not have; links are only a preference
        counts[end] = counts.get(end, 0) + 1
    return counts
