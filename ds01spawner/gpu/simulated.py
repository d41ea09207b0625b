"""A simulated box from a YAML file, for machines without GPUs: demo, tests, `ds01-admin place --inventory`.

    driver: "580.95.05"                      # optional
    gpus:
      - {model: A100-40GB}                   # MIG off: one whole GPU
      - model: A100-40GB
        mig: [3g.20gb, 2g.10gb, 1g.5gb]      # in this order; a layout the hardware refuses is an error
      - model: A100-40GB
        problem: "lost: simulated"           # optional: also uuid, memory_mib, processes, external
        mig:                                 # an instance can have them too, and a start
          - {profile: 1g.5gb, start: 6, processes: [{pid: 4711, memory_mib: 512}]}
          - {profile: 1g.5gb, external: exporter}
    nvlinks: [[0, 1, 12]]                    # optional: GPU, GPU, number of links

UUIDs derive from the file's path and the position in it (and an instance's from its MIG profile and start, as in
real life), so that they are the same after a restart and differ between two boxes on one Docker.
"""

from __future__ import annotations

import threading
import uuid as uuids
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ds01spawner.errors import InventoryError
from ds01spawner.model import External, Gpu, Inventory, Unit

from .mig import GEOMETRIES, MIB, Geometry, fit, geometry_of, mask
from .source import GpuProcess, InventorySource

_NAMESPACE = uuids.UUID("5d9f3a0e-2f0b-5c39-9a5e-0d501d501d50")
_SAME_CPU = 20
"""Closeness of two simulated GPUs without NVLink (scale as in `model.Gpu.links`)."""


@dataclass(frozen=True)
class SimulatedUnit:
    """What a file says of one MIG instance, or of a whole GPU (profile None)."""

    profile: str | None = None
    start: int | None = None
    uuid: str | None = None
    problem: str | None = None
    processes: tuple[tuple[int, int | None], ...] = ()
    external: str | None = None
    line: int = 0


@dataclass(frozen=True)
class SimulatedGpu:
    """What a file says of one GPU. `units`: its MIG instances; empty for a whole GPU, described by `whole`."""

    model: str
    units: tuple[SimulatedUnit, ...] = ()
    whole: SimulatedUnit = field(default_factory=SimulatedUnit)
    memory_mib: int | None = None
    line: int = 0


class LayoutError(ValueError):
    """A GPU cannot be like that; `line` says where (0 = unknown)."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def build(
    gpus: Sequence[SimulatedGpu],
    *,
    salt: str,
    driver: str | None = None,
    nvlinks: Sequence[tuple[int, int, int]] = (),
) -> Inventory:
    """The inventory of a simulated box.

    Args:
        gpus: in PCI order. salt: makes the UUIDs of two boxes differ. nvlinks: (GPU, GPU, number of links).

    Raises:
        LayoutError: unknown model or MIG profile, or instances that do not fit on the GPU together.
    """
    uids = [gpu.whole.uuid or "GPU-" + str(uuids.uuid5(_NAMESPACE, f"{salt}#{at}")) for at, gpu in enumerate(gpus)]
    made = tuple(_gpu(gpu, at, uids, nvlinks) for at, gpu in enumerate(gpus))
    names = [unit.uuid for gpu in made for unit in gpu.units]
    for name in names:
        if names.count(name) > 1:
            raise LayoutError(f"two units have the uuid {name}", 0)
    return Inventory(made, "simulated", driver)


def _gpu(gpu: SimulatedGpu, at: int, uids: Sequence[str], nvlinks: Sequence[tuple[int, int, int]]) -> Gpu:
    geometry = geometry_of(gpu.model)
    if geometry is None and (gpu.memory_mib is None or gpu.units):
        hint = "without MIG, give memory_mib to use another one"
        raise LayoutError(f"unknown model '{gpu.model}'; known: {', '.join(GEOMETRIES)} ({hint})", gpu.line)
    memory = gpu.memory_mib * MIB if gpu.memory_mib is not None else geometry.memory_bytes if geometry else 0
    if gpu.units and geometry is not None:
        units = _instances(gpu, geometry, at, uids[at])
        slices = (geometry.compute_slices, geometry.memory_slices)
    else:
        units = (Unit(uids[at], uids[at], at, gpu.model, memory, problem=gpu.whole.problem),)
        slices = (1, 1)
    links = {uid: _SAME_CPU for uid in uids if uid != uids[at]}
    for one, other, count in nvlinks:
        if at in (one, other):
            links[uids[other if at == one else one]] += 100 * count
    return Gpu(
        uuid=uids[at],
        index=at,
        pci_bus_id=f"{at + 1:08X}:01:00.0",
        model=gpu.model,
        memory_bytes=memory,
        mig_enabled=bool(gpu.units),
        units=units,
        compute_slices=slices[0],
        memory_slices=slices[1],
        compute_capability=geometry.compute_capability if geometry else None,
        links=links,
        problem=gpu.whole.problem,
        minor=at,
    )


def _instances(gpu: SimulatedGpu, geometry: Geometry, at: int, gpu_uuid: str) -> tuple[Unit, ...]:
    starts = _starts(gpu, geometry)
    units = []
    for place, (wanted, start) in enumerate(zip(gpu.units, starts, strict=True)):
        profile = geometry.profile(wanted.profile or "")
        if profile is None:  # _starts refuses it first; this tells the type checker
            raise LayoutError(f"{gpu.model} has no MIG profile '{wanted.profile}'", wanted.line)
        name = str(uuids.uuid5(_NAMESPACE, f"{gpu_uuid}#{profile.name}@{start}"))
        units.append(
            Unit(
                uuid=wanted.uuid or f"MIG-{name}",
                gpu_uuid=gpu_uuid,
                gpu_index=at,
                model=gpu.model,
                memory_bytes=profile.memory_bytes,
                compute_slices=profile.compute_slices,
                memory_slices=profile.memory_slices,
                gpu_compute_slices=geometry.compute_slices,
                gpu_memory_slices=geometry.memory_slices,
                mig_index=place,
                mig_profile=profile.name,
                start=start,
                gi_id=place + 1,
                ci_id=0,
                problem=wanted.problem or gpu.whole.problem,
            )
        )
    return tuple(units)


def _starts(gpu: SimulatedGpu, geometry: Geometry) -> tuple[int, ...]:
    """A start for every instance: the ones that the file names, else any that fit (all or none are named)."""
    names = [unit.profile or "" for unit in gpu.units]
    for unit in gpu.units:
        if geometry.profile(unit.profile or "") is None:
            known = ", ".join(profile.name for profile in geometry.profiles) or "no MIG at all"
            raise LayoutError(f"{gpu.model} has no MIG profile '{unit.profile}'; it has: {known}", unit.line)
    given = [unit.start for unit in gpu.units if unit.start is not None]
    if not given:
        found = fit(geometry, names)
        if found is None:
            raise LayoutError(f"{gpu.model} cannot be cut into {', '.join(names)}: they do not fit together", gpu.line)
        return found
    if len(given) != len(names):
        raise LayoutError("give a start to every MIG instance of a GPU or to none", gpu.line)
    occupied = 0
    for unit, start in zip(gpu.units, given, strict=True):
        profile = geometry.profile(unit.profile or "")
        if profile is None or start not in profile.starts:
            raise LayoutError(f"{unit.profile} cannot start at memory slice {start} on {gpu.model}", unit.line)
        if occupied & mask(start, profile.memory_slices):
            raise LayoutError(f"{unit.profile} at memory slice {start} overlaps another instance", unit.line)
        occupied |= mask(start, profile.memory_slices)
    return tuple(given)


# --------------------------------------------------------------------------- the file


_GPU_KEYS = {"model", "mig", "uuid", "problem", "memory_mib", "processes", "external"}
_UNIT_KEYS = {"profile", "start", "uuid", "problem", "processes", "external"}
_FILE_KEYS = {"gpus", "driver", "nvlinks"}


@dataclass(frozen=True)
class SimulatedBox:
    """What a file says: the inventory and what pretends to use it."""

    inventory: Inventory
    processes: tuple[GpuProcess, ...]
    external: tuple[External, ...]


def read_box(path: Path) -> SimulatedBox:
    """Read a simulated box.

    Raises:
        InventoryError: the file is missing, is no YAML, has unknown keys, or describes what hardware cannot be;
            the message names file and line.
    """
    try:
        text = path.read_text()
        node = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise InventoryError(f"{path}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InventoryError(f"{path}: no valid YAML: {error}") from error
    try:
        top = _mapping(node, _FILE_KEYS, "the file")
        gpus = tuple(_read_gpu(item) for item in _sequence(top.get("gpus"), "gpus", node))
        inventory = build(
            gpus,
            salt=str(path.resolve()),
            driver=None if "driver" not in top else str(_scalar(top["driver"])),
            nvlinks=[_read_link(item, len(gpus)) for item in _sequence(top.get("nvlinks"), "nvlinks")],
        )
    except LayoutError as error:
        where = f"{path}:{error.line}" if error.line else str(path)
        raise InventoryError(f"{where}: {error}.") from error
    return SimulatedBox(inventory, *_users(gpus, inventory))


def _users(gpus: Sequence[SimulatedGpu], box: Inventory) -> tuple[tuple[GpuProcess, ...], tuple[External, ...]]:
    """The pretended processes and foreign holders; those of a GPU that is cut count for each of its instances."""
    processes: list[GpuProcess] = []
    external: list[External] = []
    for gpu, made in zip(gpus, box.gpus, strict=True):
        for place, unit in enumerate(made.units):
            for source in (gpu.whole, *gpu.units[place : place + 1]):
                processes += [GpuProcess(unit.uuid, pid, memory) for pid, memory in source.processes]
                if source.external is not None:
                    external.append(External(unit.uuid, "container", source.external, "the simulated box says so"))
    return tuple(processes), tuple(external)


def _read_gpu(node: yaml.Node) -> SimulatedGpu:
    entry = _mapping(node, _GPU_KEYS, "a GPU")
    line = _line(node)
    if "model" not in entry:
        raise LayoutError("a GPU needs a model", line)
    memory = _scalar(entry["memory_mib"]) if "memory_mib" in entry else None
    if memory is not None and (not isinstance(memory, int) or memory <= 0):
        raise LayoutError("memory_mib must be a positive number of MiB", line)
    return SimulatedGpu(
        model=str(_scalar(entry["model"])),
        units=tuple(_read_instance(item) for item in _sequence(entry.get("mig"), "mig")),
        whole=_read_unit(entry, None, line),
        memory_mib=memory,
        line=line,
    )


def _read_instance(node: yaml.Node) -> SimulatedUnit:
    if isinstance(node, yaml.ScalarNode):
        return SimulatedUnit(profile=str(node.value), line=_line(node))
    entry = _mapping(node, _UNIT_KEYS, "a MIG instance")
    if "profile" not in entry:
        raise LayoutError("a MIG instance needs a profile", _line(node))
    return _read_unit(entry, str(_scalar(entry["profile"])), _line(node))


def _read_unit(entry: Mapping[str, yaml.Node], profile: str | None, line: int) -> SimulatedUnit:
    start = _scalar(entry["start"]) if "start" in entry else None
    if start is not None and (not isinstance(start, int) or isinstance(start, bool)):
        raise LayoutError("start must be the number of a memory slice", line)

    def text(key: str) -> str | None:
        value = _scalar(entry[key]) if key in entry else None
        return None if value is None else str(value)

    processes = tuple(_read_process(item) for item in _sequence(entry.get("processes"), "processes"))
    return SimulatedUnit(profile, start, text("uuid"), text("problem"), processes, text("external"), line)


def _read_process(node: yaml.Node) -> tuple[int, int | None]:
    entry = {"pid": node} if isinstance(node, yaml.ScalarNode) else _mapping(node, {"pid", "memory_mib"}, "a process")
    pid = _scalar(entry["pid"]) if "pid" in entry else None
    memory = _scalar(entry["memory_mib"]) if "memory_mib" in entry else None
    if not isinstance(pid, int) or not isinstance(memory, (int, type(None))):
        raise LayoutError("a process is a pid, or {pid: …, memory_mib: …}", _line(node))
    return pid, None if memory is None else memory * MIB


def _read_link(node: yaml.Node, count: int) -> tuple[int, int, int]:
    values = [_scalar(item) for item in _sequence(node, "a link")]
    if len(values) != 3 or not all(isinstance(value, int) for value in values):
        raise LayoutError("a link is [GPU, GPU, number of NVLinks]", _line(node))
    one, other, links = (int(value) for value in values)
    if one == other or not (0 <= one < count and 0 <= other < count) or links < 0:
        raise LayoutError(f"a link must join two of the GPUs 0..{count - 1}", _line(node))
    return one, other, links


def _line(node: yaml.Node | None) -> int:
    return node.start_mark.line + 1 if node is not None else 0


def _scalar(node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise LayoutError("a single value is expected here", _line(node))
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise LayoutError(f"'{node.value}' is no valid value ({error})", _line(node)) from error
    finally:
        loader.dispose()


def _sequence(node: yaml.Node | None, what: str, missing: yaml.Node | None = None) -> list[yaml.Node]:
    """The items of a list; an absent or null one is empty, unless `missing` says that it must be there."""
    absent = node is None or (isinstance(node, yaml.ScalarNode) and _scalar(node) is None)
    if absent and missing is None:
        return []
    if not isinstance(node, yaml.SequenceNode):
        raise LayoutError(f"'{what}' must be a list", _line(node if node is not None else missing))
    return list(node.value)


def _mapping(node: yaml.Node | None, keys: set[str], what: str) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise LayoutError(f"{what} must be a mapping", _line(node))
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = str(key.value)
        if name not in keys:
            raise LayoutError(f"{what} has no key '{name}'; known: {', '.join(sorted(keys))}", _line(key))
        if name in found:
            raise LayoutError(f"{what} has the key '{name}' twice", _line(key))
        found[name] = value
    return found


# --------------------------------------------------------------------------- the source


class SimulatedInventory(InventorySource):
    """A simulated box that follows its file: an edit shows at the next read, a wrong edit is an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._box: SimulatedBox | None = None

    def _current(self) -> SimulatedBox:
        with self._lock:
            try:
                status = self._path.stat()
            except OSError as error:
                raise InventoryError(f"{self._path}: cannot be read: {error.strerror}.") from error
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if self._box is None or stamp != self._stamp:
                # The stamp is taken before the text: a change in between is read again next time.
                self._box, self._stamp = read_box(self._path), stamp
            return self._box

    def read(self) -> Inventory:
        return self._current().inventory

    def processes(self) -> tuple[GpuProcess, ...]:
        return self._current().processes

    def external(self) -> tuple[External, ...]:
        return self._current().external

    def close(self) -> None:
        pass
