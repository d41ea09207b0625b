"""The values that travel between the rooms: frozen, without behaviour that touches the world.

Units everywhere: bytes, seconds, cores, shares (1.0 = one whole GPU); None = no limit. Times are aware UTC
datetimes. Words as in docs/architecture.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import Enum
from typing import Any

SNAPSHOT_MAX_AGE = timedelta(seconds=15)
"""A snapshot older than this is no evidence (design, Processes)."""

DEFAULT_SERVER = "main"
"""What the Hub's unnamed default server is called in container names, on pages and on the command line."""


# --------------------------------------------------------------------------- GPUs


@dataclass(frozen=True)
class Unit:
    """One thing that can be handed out: a whole GPU (MIG off) or one MIG instance.

    Attributes:
        uuid: identity (`GPU-…` or `MIG-…`); indices are for people only.
        gpu_uuid: the parent GPU (equal to `uuid` for a whole GPU).
        gpu_index: the parent's position by PCI order, from 0.
        mig_index: position among the parent's instances, from 0; None for a whole GPU.
        memory_bytes: usable memory of the unit.
        compute_slices, memory_slices: slices of the unit; gpu_compute_slices, gpu_memory_slices: of its GPU.
        mig_profile: NVIDIA's name such as `1g.5gb`; None for a whole GPU.
        start: first memory slice that it occupies (None where unknown or whole).
        gi_id, ci_id: GPU and compute instance ids (None for a whole GPU).
        problem: why it may not be handed out ("lost: …", "xid 79 …"); None = healthy.
    """

    uuid: str
    gpu_uuid: str
    gpu_index: int
    model: str
    memory_bytes: int
    compute_slices: int = 1
    memory_slices: int = 1
    gpu_compute_slices: int = 1
    gpu_memory_slices: int = 1
    mig_index: int | None = None
    mig_profile: str | None = None
    start: int | None = None
    gi_id: int | None = None
    ci_id: int | None = None
    problem: str | None = None

    @property
    def whole(self) -> bool:
        """True for a GPU with MIG off."""
        return self.mig_profile is None

    @property
    def share(self) -> float:
        """What the unit costs: 1.0 for a whole GPU, else max(compute/total, memory/total) (facts: MIG geometry)."""
        if self.whole:
            return 1.0
        return max(self.compute_slices / self.gpu_compute_slices, self.memory_slices / self.gpu_memory_slices)

    @property
    def label(self) -> str:
        """Short name for people: `2` (whole GPU 2) or `3.0` (first MIG instance of GPU 3). Never an identity."""
        return str(self.gpu_index) if self.mig_index is None else f"{self.gpu_index}.{self.mig_index}"


@dataclass(frozen=True)
class Gpu:
    """One physical GPU with its units.

    Attributes:
        index: position by PCI order, from 0. pci_bus_id: e.g. `00000000:3B:00.0`.
        compute_capability: (major, minor), used to choose catalogue images; None where unknown.
        minor: number of its device node `/dev/nvidia<minor>`, which need not be the index; None where unknown.
        compute_slices, memory_slices: totals when MIG is on (7 and 8 on A100/H100; 4 and 4 on A30; 1 and 1 when off).
        units: the whole GPU as one unit (MIG off), or its instances (possibly none yet).
        links: closeness to other GPUs by uuid, higher is closer (10 cross-CPU … 100·n NVLinks).
        problem: why nothing of it may be handed out; None = healthy.
    """

    uuid: str
    index: int
    pci_bus_id: str
    model: str
    memory_bytes: int
    mig_enabled: bool
    units: tuple[Unit, ...]
    compute_slices: int = 1
    memory_slices: int = 1
    compute_capability: tuple[int, int] | None = None
    links: Mapping[str, int] = field(default_factory=dict)
    problem: str | None = None
    minor: int | None = None


@dataclass(frozen=True)
class Inventory:
    """All GPUs of the box in PCI order. `source` is `nvml`, `simulated` or `none`."""

    gpus: tuple[Gpu, ...]
    source: str
    driver: str | None = None

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units, healthy or not, in PCI order."""
        return tuple(unit for gpu in self.gpus for unit in gpu.units)

    @property
    def has_mig(self) -> bool:
        """True if the box has any MIG unit (decides the default of `allow_full_gpu`)."""
        return any(not unit.whole for unit in self.units)

    def unit(self, uuid: str) -> Unit | None:
        """The unit of that uuid, or None."""
        return next((unit for unit in self.units if unit.uuid == uuid), None)

    @property
    def fingerprint(self) -> str:
        """Hash of identity and geometry (not of health): changes when the MIG layout or the driver changes."""
        rows = [[u.uuid, u.gpu_uuid, u.mig_profile, u.start] for u in self.units]
        return hashlib.sha256(json.dumps([self.driver, rows]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class External:
    """A unit that something outside this installation holds or could reach.

    Attributes:
        kind: `container`, `process` or `unreadable` (evidence that could not be parsed occupies).
        holder: container name or `pid 1234 (python)`.
        image: image of the container, "" otherwise.
        why: the evidence ("--gpus all", "privileged", "compute process").
        remedy: what the admin can do, e.g. the line for config/external.yaml that would exempt it; may be "".
    """

    unit_uuid: str
    kind: str
    holder: str
    why: str
    image: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Snapshot:
    """What the box is now, as the watcher saw it. Read by everybody, written by the watcher only."""

    at: datetime
    inventory: Inventory
    external: tuple[External, ...] = ()
    boot_id: str = ""
    notes: tuple[str, ...] = ()

    def stale(self, now: datetime) -> bool:
        """True if it is too old to be evidence. A snapshot from the future (clock step) is no evidence either."""
        return not timedelta(seconds=-5) <= now - self.at <= SNAPSHOT_MAX_AGE

    def external_by_unit(self) -> dict[str, External]:
        """First external holder by unit uuid."""
        found: dict[str, External] = {}
        for item in self.external:
            found.setdefault(item.unit_uuid, item)
        return found


# --------------------------------------------------------------------------- requests and limits


class GpuKind(str, Enum):
    """Which kind of unit a request names."""

    NONE = "none"
    ANY = "any"
    MIG = "mig"
    FULL = "full"


@dataclass(frozen=True)
class GpuAsk:
    """The GPU part of a request.

    Attributes:
        count: units asked for. kind: ANY = a whole GPU if allowed, else the smallest free MIG unit.
        mig_profile: exact NVIDIA profile name wanted, or None.
        min_memory: smallest unit memory in bytes that will do, or None.
        allow_larger: a larger MIG profile may stand in (the profile on the form decides, not the user).
    """

    count: int = 0
    kind: GpuKind = GpuKind.NONE
    mig_profile: str | None = None
    min_memory: int | None = None
    allow_larger: bool = False


@dataclass(frozen=True)
class Request:
    """What the user asked for, parsed and shape-checked, not yet allowed.

    Attributes:
        server_name: Hub server name ("" = default server).
        profile, size: keys of profiles.yaml; None = the default.
        image: image reference chosen among those the profile offers (or the user's own commit); None = the profile's.
        gpu: the GPU part; None = what the profile's size says.
        cpus, memory: wanted less than the limit; None = the limit.
        project: folder below the user's workspace that becomes /workspace; None = the whole workspace.
        fresh: begin from the image itself, leaving aside what this server changed or saved before.
        door: form, query, rest, cli, admin.
    """

    server_name: str = ""
    profile: str | None = None
    size: str | None = None
    image: str | None = None
    gpu: GpuAsk | None = None
    cpus: float | None = None
    memory: int | None = None
    project: str | None = None
    fresh: bool = False
    door: str = "form"


@dataclass(frozen=True)
class Limit:
    """One value with its source: `built-in`, `defaults`, `group researchers`, `override`, `grant until 2026-11-30`.

    `note` tells of a clamp, a raise or an ended entry; may be "".
    """

    value: Any
    source: str
    note: str = ""


@dataclass(frozen=True)
class Mount:
    """A host folder that the policy mounts. Users never choose host paths."""

    host: str
    target: str
    read_only: bool = True


@dataclass(frozen=True)
class Limits:
    """What one user may have at one time.

    `values` by canonical key, in base units; aggregate keys as `aggregate.memory_max`.
    """

    user: str
    group: str | None
    groups: tuple[str, ...]
    values: Mapping[str, Limit]
    policies: Mapping[str, Limit] = field(default_factory=dict)
    group_total_gpu: Limit = Limit(None, "built-in")
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        """The value of `key`; KeyError if the key does not exist."""
        return self.values[key].value

    def source(self, key: str) -> str:
        """Where the value of `key` comes from."""
        return self.values[key].source


# --------------------------------------------------------------------------- what is held


class State(str, Enum):
    """State of an allocation and of its leases: reserved → active → held → released."""

    RESERVED = "reserved"
    ACTIVE = "active"
    HELD = "held"
    RELEASED = "released"


LIVE = (State.RESERVED, State.ACTIVE, State.HELD)


@dataclass(frozen=True)
class Holding:
    """One allocation as quota counting sees it.

    Attributes:
        user, group, server_name: owner. state: a live state, never released.
        units: uuid → share of every live lease (a lease that waits for its old container to be replaced included).
        since: when it was reserved. until: end of a hold, None = unknown or none.
    """

    user: str
    group: str | None
    server_name: str
    state: State
    units: Mapping[str, float]
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True)
class Usage:
    """Everything held now, plus what this very server already holds (`own`), which is not in `holdings`."""

    holdings: tuple[Holding, ...] = ()
    own: Holding | None = None

    def taken(self) -> frozenset[str]:
        """Units that somebody else's live lease names."""
        return frozenset(uuid for h in self.holdings for uuid in h.units)

    def units_of(self, user: str) -> int:
        """Number of units that `user` holds by other servers."""
        return sum(len(h.units) for h in self.holdings if h.user == user)

    def share_of(self, user: str) -> float:
        """Summed share that `user` holds by other servers."""
        return sum(sum(h.units.values()) for h in self.holdings if h.user == user)

    def share_of_group(self, group: str | None) -> float:
        """Summed share that all members of `group` hold by other servers."""
        return sum(sum(h.units.values()) for h in self.holdings if group is not None and h.group == group)

    def servers_of(self, user: str) -> int:
        """Reserved and active allocations of `user`, CPU-only ones included (stopped ones do not count)."""
        return sum(h.user == user and h.state in (State.RESERVED, State.ACTIVE) for h in self.holdings)


@dataclass(frozen=True)
class Resources:
    """What the container itself gets. cpus in cores; sizes in bytes; None = no limit."""

    cpus: float | None
    memory: int | None
    memory_swap: int | None
    shm_size: int | None
    pids_limit: int | None


@dataclass(frozen=True)
class Admission:
    """A "yes": what is granted. `notes` are shown to the user (clamps, a larger unit than asked)."""

    request: Request
    limits: Limits
    image: str
    units: tuple[Unit, ...]
    resources: Resources
    mounts: tuple[Mount, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lease:
    """One unit of one allocation.

    `wanted` is False for a unit that the newest admission no longer names and that stays live until `activate`.
    """

    unit_uuid: str
    share: float
    state: State
    label: str = ""
    mig_profile: str | None = None
    wanted: bool = True


@dataclass(frozen=True)
class Allocation:
    """What one server holds. The ledger's row; the truth about ownership (labels are an echo).

    Attributes:
        token: fencing token; grows over the whole ledger, never used twice.
        container_token: the token that the bound container carries (another one only while it is being replaced).
        spec_hash: hash of what the container was created with (decides reuse, update or re-creation).
        created_at: when the row was made; reserved_at: when it was last reserved (a used allocation is reserved anew).
        first_started_at: start of the runtime clock; held_until: end of a GPU hold (None = no end while held).
    """

    id: int
    token: int
    user: str
    group: str | None
    groups: tuple[str, ...]
    server_name: str
    state: State
    uid: int
    request: Mapping[str, Any]
    limits: Mapping[str, Any]
    leases: tuple[Lease, ...] = ()
    image: str = ""
    container_id: str | None = None
    container_name: str | None = None
    container_token: int | None = None
    spec_hash: str | None = None
    created_at: datetime | None = None
    reserved_at: datetime | None = None
    activated_at: datetime | None = None
    first_started_at: datetime | None = None
    stopped_at: datetime | None = None
    held_until: datetime | None = None
    released_at: datetime | None = None
    reason: str = ""


def plain(value: Any) -> Any:
    """`value` (dataclasses, enums, tuples, datetimes) as JSON-ready plain data."""
    if hasattr(value, "__dataclass_fields__"):
        # Not asdict: it copies deeply first, and cannot copy a read-only mapping.
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    return value


def mark(units: Iterable[Unit], problem: str) -> tuple[Unit, ...]:
    """`units` with `problem` set on those that have none yet."""
    return tuple(unit if unit.problem else replace(unit, problem=problem) for unit in units)
