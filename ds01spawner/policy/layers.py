"""The layers of limits: defaults, groups, user overrides and grants, as `resource-limits.yaml` writes them.

Each key is declared once, with help text, base unit and what holds if no layer sets it; documents, editor schemas
and the resolver read it from here. Older spellings are declared next to the key that they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from .fields import (
    EMPTY_MAP,
    Anything,
    AtLeastOne,
    CorePercent,
    Cores,
    Count,
    Day,
    Duration,
    Factor,
    Flag,
    Fraction,
    Hours,
    InDays,
    InHours,
    InMinutes,
    InSeconds,
    Kind,
    Name,
    Percent,
    Section,
    Share,
    Size,
    SystemdCores,
    SystemdCount,
    SystemdSize,
    Text,
    WholeNumber,
    known_of,
    setting,
)
from .mounts import MountList, Pool

GIB = 1 << 30

_NOT_HERE = "ds01 measures disk use with max_container_disk; per-folder quotas belong to the file system"
_NO_RESERVATIONS = "reservations are not implemented"


class Aggregate(Section):
    """What all containers of one user get together, enforced on the user's cgroup parent. systemd's syntax."""

    cpu_quota: SystemdCores = setting(
        "CPU of all containers together, in cores or percent of one.", absent="no limit", unit="cores"
    )
    memory_max: SystemdSize = setting(
        "Memory of all containers together; above it the kernel kills.", absent="no limit", unit="bytes"
    )
    memory_high: SystemdSize = setting(
        "Above this the kernel slows the user down (cgroup v2).", absent="no limit", unit="bytes"
    )
    tasks_max: SystemdCount = setting(
        "Processes and threads of all containers together.", absent="no limit", unit="tasks"
    )
    gpu_limit: Share = setting(
        "Summed GPU share of all containers, besides max_gpu_equivalents.", absent="no limit", unit="share"
    )


class Quantities(Section):
    """Limits with a number or a switch: what layers set and grants change."""

    max_cpus: Cores = setting("CPU cores per container.", built_in=16.0, unit="cores")
    cpus: Cores = setting("Older name of max_cpus.", alias_of="max_cpus")
    memory: Size = setting("Memory per container.", built_in=32 * GIB, unit="bytes")
    memory_swap: Size = setting(
        "Memory and swap together per container; as much as memory means no swap. Raised with memory.",
        absent="as memory",
        unit="bytes",
    )
    shm_size: Size = setting("Size of /dev/shm.", built_in=16 * GIB, unit="bytes")
    pids_limit: Count = setting("Processes and threads per container.", built_in=4096, unit="tasks")
    max_gpu_equivalents: Share = setting(
        "Summed share of all GPU units that a user holds at once: a whole GPU is 1.0, a MIG instance "
        "max(compute slices/total, memory slices/total).",
        absent="1.0; no limit if max_mig_instances is set",
        unit="share",
    )
    max_gpu_slots: Share = setting("Older name of max_gpu_equivalents.", alias_of="max_gpu_equivalents")
    max_gpus_per_user: Share = setting("Older name of max_gpu_equivalents.", alias_of="max_gpu_equivalents")
    max_mig_instances: Count = setting(
        "Number of GPU units (whole or MIG) that a user holds at once.", absent="no limit", unit="units"
    )
    max_gpu_slots_per_container: Count = setting("GPU units per container.", built_in=1, unit="units")
    max_gpus_per_container: Count = setting(
        "Older name of max_gpu_slots_per_container.", alias_of="max_gpu_slots_per_container"
    )
    max_mig_per_container: Count = setting(
        "Older name of max_gpu_slots_per_container.", alias_of="max_gpu_slots_per_container"
    )
    allow_full_gpu: Flag = setting("Whole GPUs may be asked for.", absent="true on a box without MIG units, else false")
    max_containers_per_user: Count = setting(
        "Servers that run at the same time; stopped ones do not count.", built_in=3, unit="servers"
    )
    max_runtime: Duration = setting(
        "Longest run of a server, counted from its first start.", absent="no limit", unit="seconds"
    )
    max_runtime_h: Hours = setting("max_runtime in hours.", alias_of="max_runtime", wins=True)
    idle_timeout: Duration = setting(
        "A server that does nothing for this long is stopped.", absent="no limit", unit="seconds"
    )
    idle_timeout_h: Hours = setting("idle_timeout in hours.", alias_of="idle_timeout", wins=True)
    gpu_idle_timeout: Duration = setting(
        "A GPU that does nothing for this long is taken back.", absent="no limit", unit="seconds"
    )
    gpu_idle_timeout_h: Hours = setting("gpu_idle_timeout in hours.", alias_of="gpu_idle_timeout", wins=True)
    unknown_gpu_idle_timeout: Duration = setting(
        "The same where GPU activity cannot be measured (MIG without DCGM); null = never.",
        absent="never",
        unit="seconds",
    )
    unknown_gpu_idle_timeout_h: Hours = setting(
        "unknown_gpu_idle_timeout in hours.", alias_of="unknown_gpu_idle_timeout", wins=True
    )
    gpu_hold_after_stop: Duration = setting(
        "A stopped server keeps its GPU for this long; null = without end.", built_in=0.0, unit="seconds"
    )
    gpu_hold_after_stop_h: Hours = setting("gpu_hold_after_stop in hours.", alias_of="gpu_hold_after_stop", wins=True)
    container_hold_after_stop: Duration = setting(
        "A stopped container is removed after this long (the files stay); null = never.", absent="never", unit="seconds"
    )
    container_hold_after_stop_h: Hours = setting(
        "container_hold_after_stop in hours.", alias_of="container_hold_after_stop", wins=True
    )
    max_container_disk: Size = setting(
        "What a container may write outside its mounts.", absent="no limit", unit="bytes"
    )
    priority: WholeNumber = setting("Decides which group counts, and who waits shorter. Higher is better.", built_in=10)
    gpu_pool: Pool = setting("GPUs that may be given, by index, UUID or model name; null = all of them.", absent="all")
    aggregate: Annotated[Aggregate, EMPTY_MAP] = setting(
        "Limits on all containers of a user together.", factory=Aggregate
    )


class Lifecycle(Section):
    """Rules of the idle and runtime checks. Values are in the unit that the key's name ends in."""

    mode: Literal["enforce", "observe"] = setting("observe: decide and record, stop nobody.", built_in="enforce")
    gpu_idle_threshold: Percent = setting("GPU activity in % from which it counts as active.", built_in=5.0)
    cpu_idle_threshold: CorePercent = setting("CPU use in % of one core above which it is active.", built_in=2.0)
    network_idle_threshold: Size = setting("Bytes per check above which it is active.", built_in=1 << 20)
    idle_detection_window: AtLeastOne = setting("Idle checks in a row before it counts as idle.", built_in=3)
    grace_period_m: InMinutes = setting("Minutes after a start without idle checks.", built_in=30.0)
    sigterm_grace_s: InSeconds = setting("Seconds between SIGTERM and SIGKILL.", built_in=60.0)
    created_container_timeout_m: InMinutes = setting(
        "Minutes until a container that was never started is removed.", built_in=30.0
    )
    keepalive_max_duration_h: InHours = setting("Hours that a .keep-alive file counts.", built_in=24.0)
    high_demand_threshold: Fraction = setting("Share of GPUs in use from which it is high demand.", built_in=0.8)
    high_demand_idle_reduction: Fraction = setting("Idle timeouts times this at high demand.", built_in=0.5)
    high_demand_floor_m: InMinutes = setting("Minutes below which no timeout shrinks.", built_in=30.0)
    warn_at: Fraction = setting("First idle warning, as part of the timeout.", built_in=0.8)
    final_at: Fraction = setting("Final idle warning, as part of the timeout.", built_in=0.95)
    runtime_warn_at: Fraction = setting("First runtime warning, as part of max_runtime.", built_in=0.75)
    runtime_final_at: Fraction = setting("Final runtime warning, as part of max_runtime.", built_in=0.9)
    warn_lead_min_m: InMinutes = setting("Minutes that the final warning comes before a stop, at least.", built_in=10.0)
    restart_gap_m: InMinutes = setting("A stop up to this many minutes does not reset the runtime.", built_in=10.0)
    cpu_extension_factor: Factor = setting(
        "CPU activity alone extends the GPU idle timeout at most by this factor.", built_in=2.0
    )
    extension_budget_h: InHours = setting("Hours by which an owner may extend one server in all.", built_in=72.0)
    on_gpu_idle: Literal["release", "stop"] = setting(
        "release: restart without the GPU; stop: end the server.", built_in="release"
    )
    gpu_hold_after_crash_m: InMinutes = setting("Minutes that a crashed server keeps its GPU.", built_in=15.0)
    committed_image_keep_d: InDays = setting("Days that a removed container's saved image is kept.", built_in=90.0)
    gpu_hold_after_manual_stop_m: Anything = setting("Old key.", no_effect="use gpu_hold_after_stop")
    auto_stop_idle: Anything = setting("Old key.", no_effect="use idle_timeout, and mode: observe to switch stops off")
    checkpoint_warning: Anything = setting("Old key.", no_effect="warnings are always given; see warn_at and final_at")
    require_workspace_mount: Anything = setting("Old key.", no_effect="the workspace is always mounted")
    enforce_storage_quotas: Anything = setting("Old key.", no_effect=_NOT_HERE)
    graceful_errors: Anything = setting("Old key.", no_effect="refusals always say why and what to do")
    suggest_alternatives: Anything = setting("Old key.", no_effect="refusals always name alternatives")

    @model_validator(mode="after")
    def _in_order(self) -> Lifecycle:
        for first, last in (("warn_at", "final_at"), ("runtime_warn_at", "runtime_final_at")):
            both = {first, last} <= self.model_fields_set
            if both and getattr(self, first) >= getattr(self, last):
                raise ValueError(f"{first} must be smaller than {last}")
        return self


class Layer(Quantities):
    """One layer of limits. A key that is absent leaves the decision to the layer below."""

    mounts: MountList = setting("Host folders to mount; a later layer replaces the same target.", factory=tuple)
    policies: Annotated[Lifecycle, EMPTY_MAP] = setting("Idle and runtime rules of this layer.", factory=Lifecycle)
    max_tasks: Anything = setting("Old key.", no_effect="use pids_limit")
    gpu_memory: Anything = setting(
        "Old key.", no_effect="GPU memory follows from the unit; see min_memory in profiles.yaml"
    )
    storage_workspace: Anything = setting("Old key.", no_effect=_NOT_HERE)
    storage_data: Anything = setting("Old key.", no_effect=_NOT_HERE)
    storage_tmp: Anything = setting("Old key.", no_effect=_NOT_HERE)


class GroupTotal(Section):
    """What all members of a group hold together."""

    max_gpu_equivalents: Share = setting("Summed GPU share of the whole group.", absent="no limit", unit="share")
    max_gpu_slots: Share = setting("Older name of max_gpu_equivalents.", alias_of="max_gpu_equivalents")


class DelegationCeiling(Quantities):
    """The most that somebody who manages the group on behalf of the admins may give to one of its members."""


def _names(value: object) -> object:
    """An empty list for null; one text is a list of one."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[Name, ...], BeforeValidator(_names), Kind("list of names")]


class Group(Layer):
    """A group: who is in it, and its layer of limits."""

    description: Text = setting("For people.", default="")
    members: Names = setting("Account names, exactly as the Hub has them; more in groups/<group>.members.", default=())
    hub_groups: Names = setting("Members of these JupyterHub groups are in the group.", default=())
    unix_groups: Names = setting("Members of these Unix groups are in it (unix_accounts only).", default=())
    group_total: Annotated[GroupTotal, EMPTY_MAP] = setting("What the group holds together.", factory=GroupTotal)
    delegation_ceiling: Annotated[DelegationCeiling, EMPTY_MAP] = setting(
        "The most that a delegated manager of this group may give.", factory=DelegationCeiling
    )


class Override(Layer):
    """What one user gets on top of the group; the group itself stays the same."""

    until: Day = setting("Last day on which the override counts (UTC); absent = without end.")
    reason: Text = setting("Why.", default="")
    by: Text = setting("Who decided.", default="")
    reservation_start: Anything = setting("Old key.", no_effect=_NO_RESERVATIONS)
    reservation_end: Anything = setting("Old key.", no_effect=f"{_NO_RESERVATIONS}; use until")
    reserved_gpus: Anything = setting("Old key.", no_effect=f"{_NO_RESERVATIONS}; use gpu_pool")

    def in_force(self, day: date) -> bool:
        """True on `day` and before: the last day counts."""
        return self.until is None or day <= self.until


class ContainerType(Section):
    """Rules for containers of one type, instead of the user's own."""

    idle_timeout: Duration = setting("As in a layer.", unit="seconds")
    idle_timeout_h: Hours = setting("idle_timeout in hours.", alias_of="idle_timeout", wins=True)
    max_runtime: Duration = setting("As in a layer.", unit="seconds")
    max_runtime_h: Hours = setting("max_runtime in hours.", alias_of="max_runtime", wins=True)
    sigterm_grace_s: InSeconds = setting("Seconds between SIGTERM and SIGKILL.", unit="seconds")


def built_ins(section: type[Section]) -> Mapping[str, Any]:
    """Canonical key → what holds if no layer sets it."""
    return {
        name: known_of(info)["built_in"]
        for name, info in section.model_fields.items()
        if known_of(info) and not known_of(info)["alias_of"] and not known_of(info)["no_effect"]
    }
