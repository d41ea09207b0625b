"""The GPUs of this machine through NVML, by UUID, in PCI order, with the reason where one may not be used.

One GPU's failure is that GPU's problem; a failure of the library is an InventoryError. A GPU that was seen once
stays in the picture when it stops answering (with its units and a problem), because unknown is not free and
because everybody's labels would move. Handles are kept over reads (looking them up can take seconds under load)
and looked up anew after an error. Only the watcher has one of these.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pynvml

from ds01spawner.errors import InventoryError
from ds01spawner.model import Gpu, Inventory, Unit, mark

from .nvml_board import (
    Board,
    Handle,
    Instance,
    health,
    instance_health,
    links,
    mig_mode,
    minor_number,
    open_board,
    pci_order,
    placed_at,
    running,
    still_there,
    walk,
)
from .source import GpuProcess, InventorySource

WALK_EVERY_S = 60.0
"""How long a list of MIG instances is used before the index is walked again; what ends is seen at once."""

_BROKEN_LIBRARY = (
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
)
"""Errors that say nothing about one GPU and everything about the installation."""


@dataclass(frozen=True)
class _Walked:
    """MIG instances of one GPU with the time (monotonic) of the walk."""

    instances: tuple[Instance, ...]
    at: float


def nvml_has_devices() -> bool:
    """True if NVML works and sees a GPU; False if the machine has no NVML, or no GPU.

    Raises:
        InventoryError: NVML is installed but does not work, which is not the same as no GPU.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return False
        raise _unusable(error) from error
    try:
        return int(pynvml.nvmlDeviceGetCount()) > 0
    except pynvml.NVMLError as error:
        raise _unusable(error) from error
    finally:
        _shut_down()


def _unusable(error: pynvml.NVMLError) -> InventoryError:
    hint = {
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "The driver was updated: reload it, or restart the machine.",
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "The driver is not loaded; see `nvidia-smi` and `dmesg`.",
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "libnvidia-ml.so.1 is missing: install the NVIDIA driver.",
    }.get(error.value, "See what `nvidia-smi` says.")
    return InventoryError(
        f"NVML does not work: {error}. {hint} If this machine has no GPU, set inventory: none.",
        facts={"nvml_error": int(error.value)},
    )


def _reason(error: pynvml.NVMLError) -> str:
    """One GPU's problem in a few words."""
    if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
        return "lost: the GPU has fallen off the bus; restart the machine"
    if error.value == pynvml.NVML_ERROR_RESET_REQUIRED:
        return "reset: the GPU must be reset before it works again"
    return f"lost: NVML says {error}"


def _shut_down() -> None:
    # An error means that it was not up, or is beyond help; the next nvmlInit tells.
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()


class NvmlInventory(InventorySource):
    """See the module. `clock` is a monotonic clock in seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._up = False
        self._driver: str | None = None
        self._count = 0
        self._boards: dict[int, Board] = {}
        self._walks: dict[str, _Walked] = {}
        self._links: tuple[frozenset[str], dict[str, dict[str, int]]] = (frozenset(), {})
        self._seen: dict[str, Gpu] = {}
        self._handles: dict[str, Handle] = {}

    def read(self) -> Inventory:
        with self._lock:
            try:
                return self._read()
            except pynvml.NVMLError as error:
                self._forget_all()
                raise _unusable(error) from error

    def processes(self) -> tuple[GpuProcess, ...]:
        with self._lock:
            if not self._up:
                self.read()
            found = []
            for uuid, handle in self._handles.items():
                try:
                    rows = running(handle)
                except pynvml.NVMLError as error:
                    if error.value in _BROKEN_LIBRARY:
                        self._forget_all()
                        raise _unusable(error) from error
                    continue  # the next read finds the same and gives the unit a problem
                found += [GpuProcess(uuid, pid, memory) for pid, memory in rows]
            return tuple(found)

    def close(self) -> None:
        with self._lock:
            self._forget_all()

    def _forget_all(self) -> None:
        """Drop handles and library; what was seen stays known."""
        self._boards.clear()
        self._walks.clear()
        self._handles.clear()
        self._links = (frozenset(), {})
        if self._up:
            self._up = False
            _shut_down()

    # ----------------------------------------------------------------------- reading

    def _read(self) -> Inventory:
        if not self._up:
            pynvml.nvmlInit()
            self._up = True
            self._driver = str(pynvml.nvmlSystemGetDriverVersion())
        self._handles.clear()
        found: dict[str, Gpu] = {}
        nameless: list[str] = []
        count = int(pynvml.nvmlDeviceGetCount())
        if count != self._count:
            self._boards.clear()  # NVML's indices have moved
        self._count = count
        for index in range(count):
            self._read_one(index, found, nameless)
        return self._complete(found, nameless)

    def _read_one(self, index: int, found: dict[str, Gpu], nameless: list[str]) -> None:
        """Add the GPU with NVML's index to `found` by bus id; if it cannot be named, its reason to `nameless`."""
        bus_id = self._boards[index].pci_bus_id if index in self._boards else None
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index) if bus_id is None else self._boards[index].handle
            bus_id = str(pynvml.nvmlDeviceGetPciInfo(handle).busId).upper()
            board = self._board(index, handle, bus_id)
            found[bus_id] = self._gpu(board)
        except pynvml.NVMLError as error:
            if error.value in _BROKEN_LIBRARY:
                raise
            self._boards.pop(index, None)
            if bus_id is None:
                nameless.append(_reason(error))
            else:
                found[bus_id] = self._failed(bus_id, _reason(error))

    def _board(self, index: int, handle: Handle, bus_id: str) -> Board:
        """The cached board, or a new one if there is none or the handle now means another GPU."""
        known = self._boards.get(index)
        if known is None or known.pci_bus_id != bus_id or pynvml.nvmlDeviceGetUUID(handle) != known.uuid:
            known = open_board(handle, bus_id)
            self._boards[index] = known
            self._walks.pop(known.uuid, None)
        return known

    def _gpu(self, board: Board) -> Gpu:
        mig, _ = mig_mode(board)
        problem = health(board)
        if mig:
            units = tuple(self._checked(i.unit, i.handle, instance_health(i)) for i in self._instances(board))
        else:
            self._walks.pop(board.uuid, None)
            whole = Unit(board.uuid, board.uuid, 0, board.model, board.memory_bytes)
            units = (self._checked(whole, board.handle, None),)
        return Gpu(
            uuid=board.uuid,
            index=0,
            pci_bus_id=board.pci_bus_id,
            model=board.model,
            memory_bytes=board.memory_bytes,
            mig_enabled=mig,
            units=units if problem is None else mark(units, problem),
            compute_slices=board.compute_slices if mig else 1,
            memory_slices=board.memory_slices if mig else 1,
            compute_capability=board.compute_capability,
            problem=problem,
            minor=minor_number(board),
        )

    def _checked(self, unit: Unit, handle: Handle, problem: str | None) -> Unit:
        """`unit` with its problem. One whose processes cannot be listed may be in use by anybody."""
        self._handles[unit.uuid] = handle
        if problem is None:
            try:
                running(handle)
            except pynvml.NVMLError as error:
                problem = f"blind: its processes cannot be listed ({error})"
        return replace(unit, problem=problem)

    def _instances(self, board: Board) -> tuple[Instance, ...]:
        known = self._walks.get(board.uuid)
        if known is None or self._clock() - known.at >= WALK_EVERY_S or not still_there(known.instances):
            known = _Walked(walk(board), self._clock())
            self._walks[board.uuid] = known
        return known.instances

    # ----------------------------------------------------------------------- the whole box

    def _failed(self, bus_id: str, reason: str) -> Gpu:
        """A GPU that answers with an error: as it was seen last, else without units."""
        known = self._seen.get(bus_id)
        if known is None:
            return Gpu(f"unreadable-{bus_id}", 0, bus_id, "unknown", 0, False, (), problem=reason)
        self._walks.pop(known.uuid, None)
        for unit in known.units:
            self._handles.pop(unit.uuid, None)
        healthy = tuple(replace(unit, problem=None) for unit in known.units)
        return replace(known, problem=reason, units=mark(healthy, reason))

    def _complete(self, found: dict[str, Gpu], nameless: list[str]) -> Inventory:
        """All GPUs in PCI order: those found, those that were there before, and those that never told their name."""
        for bus_id in self._seen.keys() - found.keys():
            reason = nameless.pop(0) if nameless else "lost: the driver no longer lists the GPU"
            found[bus_id] = self._failed(bus_id, reason)
        ordered = [found[bus_id] for bus_id in sorted(found, key=pci_order)]
        closeness = self._closeness()
        gpus = [
            replace(
                gpu,
                index=index,
                links=closeness.get(gpu.uuid, {}),
                units=tuple(placed_at(unit, index, gpu.problem) for unit in gpu.units),
            )
            for index, gpu in enumerate(ordered)
        ]
        self._seen = {gpu.pci_bus_id: gpu for gpu in gpus if gpu.model != "unknown"}
        for place, reason in enumerate(nameless):
            gpus.append(Gpu(f"unreadable-{place}", len(gpus), "", "unknown", 0, False, (), problem=reason))
        return Inventory(tuple(gpus), "nvml", self._driver)

    def _closeness(self) -> dict[str, dict[str, int]]:
        """Links between the GPUs that answer; asked again only when others answer."""
        uuids = frozenset(board.uuid for board in self._boards.values())
        if uuids != self._links[0]:
            self._links = (uuids, links(list(self._boards.values())))
        return self._links[1]
