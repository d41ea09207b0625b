"""A cgroup parent per user, with the limits that bound the sum of all their containers.

The parent exists and is limited before the container is created: a parent that Docker or systemd makes on
the way has no limits at all. What was written is read back from the kernel; a configured limit that is not in
force refuses the start (`limits_not_enforced`). Backends: `cgroupfs.CgroupfsV1`, `cgroupfs.CgroupfsV2`,
`systemd.SystemdParents`; `cgroups.open_cgroups` chooses by what Docker says.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds01spawner.errors import Code, HostError
from ds01spawner.model import Limits

from .cgroup_files import CgroupFacts, Mounts, read_cgroup

PIDS_MAX = 4_194_304
"""PID_MAX_LIMIT of 64-bit kernels: pids.max refuses more, and more could not be reached anyway."""

_CPU_TOLERANCE = 0.001
"""Cores by which a quota may differ after rounding to microseconds per period."""

_LARGEST_PAGE = 65_536
"""Memory limits are rounded down to whole pages; the largest in use (arm64) are this many bytes."""


@dataclass(frozen=True)
class Aggregate:
    """What all containers of one user together may use. None = no limit.

    Attributes:
        cpu_quota: cores. memory_max: bytes, hard. memory_high: bytes, above which the kernel slows them down.
        tasks_max: processes and threads.
    """

    cpu_quota: float | None = None
    memory_max: int | None = None
    memory_high: int | None = None
    tasks_max: int | None = None

    @classmethod
    def of(cls, limits: Limits) -> Aggregate:
        """The `aggregate:` part of a user's limits that the kernel enforces (gpu_limit is the ledger's)."""
        names = ("cpu_quota", "memory_max", "memory_high", "tasks_max")
        found = {name: limits.values.get(f"aggregate.{name}") for name in names}
        return cls(**{name: limit.value for name, limit in found.items() if limit is not None})

    @property
    def enforceable(self) -> Aggregate:
        """The same with limits that the kernel cannot reach (more tasks than it has pids) taken as none."""
        beyond = self.tasks_max is not None and self.tasks_max > PIDS_MAX
        return Aggregate(self.cpu_quota, self.memory_max, self.memory_high, None if beyond else self.tasks_max)

    @property
    def controllers(self) -> tuple[str, ...]:
        """The cgroup controllers that these limits need."""
        needed = {
            "cpu": self.cpu_quota,
            "memory": self.memory_max if self.memory_max is not None else self.memory_high,
            "pids": self.tasks_max,
        }
        return tuple(name for name, value in needed.items() if value is not None)


@dataclass(frozen=True)
class CgroupParent:
    """A parent that is ready.

    Attributes:
        path: for HostConfig.CgroupParent (`/ds01/students/alice`, or the slice's name).
        notes: sentences for the admin and the user: what this kernel cannot do, what else was lowered.
    """

    path: str
    notes: tuple[str, ...] = ()


class CgroupParents(ABC):
    """Makes and limits parents. One object per process; thread-safe.

    Args:
        root: top of the tree (`Settings.cgroup_root`).
        mounts: the kernel's trees.
    """

    def __init__(self, root: str, mounts: Mounts) -> None:
        self.root = root
        self.mounts = mounts
        self._lock = threading.Lock()

    @abstractmethod
    def name(self, group: str | None, user: str) -> str:
        """What HostConfig.CgroupParent must be; nothing needs to exist for that.

        Raises:
            Refusal: `bad_name`: group or user cannot be part of a name.
        """

    @abstractmethod
    def cgroup(self, group: str | None, user: str) -> str:
        """The parent's path as in /proc/PID/cgroup."""

    @abstractmethod
    def _create(self, group: str | None, user: str, wanted: Aggregate) -> None:
        """Make the parent if it is not there."""

    @abstractmethod
    def _apply(self, group: str | None, user: str, wanted: Aggregate) -> Sequence[str]:
        """Set the limits and return notes; whatever could not be set may be left to the read-back."""

    @abstractmethod
    def remove(self, group: str | None, user: str) -> bool:
        """Remove an unused parent; False if it is in use. For clean-up after tests and demos only.

        Never while the user could be starting something: Docker would make the missing parent without limits.
        """

    def ensure(self, group: str | None, user: str, aggregate: Aggregate) -> CgroupParent:
        """Make the user's parent and put exactly `aggregate` in force; repeatable.

        Raises:
            Refusal: `bad_name`.
            HostError: `limits_not_enforced`: a configured limit is not in force; says which file and why.
        """
        name, wanted = self.name(group, user), aggregate.enforceable
        with self._lock:
            self._create(group, user, wanted)
            notes = tuple(self._apply(group, user, wanted))
            problems = self.differences(group, user, wanted)
        if problems:
            raise HostError(
                f"The limits of {user} are not in force on the cgroup {name}: {'; '.join(problems)}. "
                "Nothing was started.",
                code=Code.LIMITS_NOT_ENFORCED,
                facts={"cgroup": name, "problems": problems},
            )
        if aggregate.memory_high is not None and self.mounts.version == 1:
            notes += (
                "aggregate.memory_high has no effect on this machine: cgroup version 1 has no such limit. "
                "memory_max is enforced; boot with systemd.unified_cgroup_hierarchy=1 to get both.",
            )
        return CgroupParent(name, notes)

    def facts(self, group: str | None, user: str) -> CgroupFacts:
        """What the kernel enforces and counts on the user's parent now."""
        return read_cgroup(self.cgroup(group, user), self.mounts)

    def differences(self, group: str | None, user: str, aggregate: Aggregate) -> list[str]:
        """Limits that the kernel does not enforce as `aggregate` says, one sentence each; [] = all in force."""
        facts, wanted = self.facts(group, user), aggregate.enforceable
        checks = [
            ("cpu_quota", wanted.cpu_quota, facts.cpu_quota, _CPU_TOLERANCE),
            ("memory_max", wanted.memory_max, facts.memory_max, _LARGEST_PAGE),
            ("tasks_max", wanted.tasks_max, facts.tasks_max, 0),
        ]
        if self.mounts.version == 2:
            checks.append(("memory_high", wanted.memory_high, facts.memory_high, _LARGEST_PAGE))
        return [
            f"{key} is {_told(found)} instead of {_told(want)}"
            for key, want, found, tolerance in checks
            if not _same(want, found, tolerance)
        ]


def in_turn(*steps: Callable[[], Sequence[str]]) -> tuple[str, ...]:
    """Run every step, also after one has failed, so that each limit that can be set is set; gather the notes.

    Raises:
        HostError: the first failure, with what else failed in its facts.
    """
    notes: list[str] = []
    failures: list[HostError] = []
    for step in steps:
        try:
            notes += step()
        except HostError as error:
            failures.append(error)
    if failures:
        failures[0].facts["failures"] = [failure.message for failure in failures]
        raise failures[0]
    return tuple(notes)


def _same(wanted: float | None, found: float | None, tolerance: float) -> bool:
    if wanted is None or found is None:
        return wanted is found
    return abs(wanted - found) <= tolerance


def _told(value: float | None) -> str:
    return "no limit" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
