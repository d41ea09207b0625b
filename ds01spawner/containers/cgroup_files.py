"""The kernel's cgroup files: where they are mounted, what they say, what a container really has.

Two layouts behind one set of names: version 1 (a tree per controller) and version 2 (one tree). Sizes in
bytes, CPU in cores and seconds, None = no limit. Source: kernel documentation, admin-guide/cgroup-v1 and
admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ds01spawner.errors import Code, HostError

CONTROLLERS = ("cpu", "memory", "pids")
"""The controllers whose limits a user's parent carries."""

PERIOD_US = 100_000
"""Accounting period of CPU quotas in microseconds; the kernel's, Docker's and systemd's default."""

_NO_LIMIT_V1 = 1 << 62
"""Version 1 writes "no memory limit" as the largest page-aligned number, just below 2**63."""

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mounts:
    """Where the cgroup trees are.

    Attributes:
        version: 1 or 2.
        trees: folder by controller name (version 1; all that are mounted, `unified` for the tree of version 2 beside
            them), or the one folder under the key "" (version 2).
    """

    version: int
    trees: Mapping[str, Path]

    def folder(self, controller: str, path: str) -> Path:
        """Folder of the cgroup `path` (absolute, as in /proc/PID/cgroup) in the controller's tree.

        Raises:
            HostError: the controller has no tree (not in the kernel, or switched off at boot).
        """
        key = controller if self.version == 1 else ""
        if key not in self.trees:
            raise HostError(
                f"The cgroup controller {controller!r} is not mounted. Enable it on the kernel's command line "
                f"(memory: cgroup_enable=memory) and reboot.",
                code=Code.LIMITS_NOT_ENFORCED,
                facts={"controller": controller},
            )
        return self.trees[key] / path.lstrip("/")


def find_mounts(version: int, mountinfo: Path = Path("/proc/self/mountinfo")) -> Mounts:
    """The cgroup trees that this process sees.

    Args:
        version: what Docker says it uses (`docker info`, Cgroup Version); on a hybrid machine that is 1.
        mountinfo: file in the form of proc_pid_mountinfo(5).

    Raises:
        HostError: no such tree is mounted.
    """
    trees: dict[str, Path] = {}
    for line in mountinfo.read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        root, point = left.split(" ")[3:5]
        # A folder bound elsewhere shows a part of the tree only: paths of /proc/PID/cgroup do not fit it.
        if root != "/":
            continue
        folder = Path(_ESCAPE.sub(lambda match: chr(int(match[1], 8)), point))
        if kind == "cgroup2":
            trees.setdefault("" if version == 2 else "unified", folder)
        elif kind == "cgroup" and version == 1:
            for name in options.split(","):
                if name not in ("rw", "ro"):
                    trees.setdefault(name, folder)
    if not trees.keys() - {"unified"}:
        raise HostError(
            f"No cgroup version {version} tree is mounted, though Docker uses it. Run this on the Docker host itself, "
            "with the host's /sys/fs/cgroup.",
            facts={"version": version},
        )
    return Mounts(version, trees)


@dataclass(frozen=True)
class CgroupFacts:
    """What the kernel enforces on one cgroup, and what it counts there.

    Attributes:
        paths: path by controller (one and the same under version 2).
        cpu_quota: cores. memory_max, memory_high: bytes. memory_swap_max: memory and swap together, bytes.
        tasks_max: processes and threads.
        cpu_used: CPU seconds since the cgroup was made. memory_used, memory_peak: bytes (peak None where the
            kernel does not tell it). tasks: processes and threads now.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    cpu_quota: float | None = None
    memory_max: int | None = None
    memory_high: int | None = None
    memory_swap_max: int | None = None
    tasks_max: int | None = None
    cpu_used: float | None = None
    memory_used: int | None = None
    memory_peak: int | None = None
    tasks: int | None = None


def paths_of_pid(pid: int, mounts: Mounts, proc: Path = Path("/proc")) -> dict[str, str]:
    """Cgroup path of a process by controller.

    Raises:
        HostError: the process has ended.
    """
    try:
        text = (proc / str(pid) / "cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise HostError(f"Process {pid} has ended: its limits cannot be read.", facts={"pid": pid}) from None
    found: dict[str, str] = {}
    for line in text.splitlines():
        number, names, path = line.split(":", 2)
        if mounts.version == 2 and number == "0":
            found.update(dict.fromkeys((*CONTROLLERS, "cpuacct"), path))
        elif mounts.version == 1 and number != "0":
            found.update(dict.fromkeys(names.split(","), path))
    return found


def read_limits(pid: int, mounts: Mounts, proc: Path = Path("/proc")) -> CgroupFacts:
    """What the kernel enforces on the container whose first process is `pid`.

    Raises:
        HostError: the process has ended, or a controller is not there.
    """
    return read_paths(paths_of_pid(pid, mounts, proc), mounts)


def read_cgroup(path: str, mounts: Mounts) -> CgroupFacts:
    """What the kernel enforces on the cgroup `path` (the same in every tree)."""
    return read_paths(dict.fromkeys((*CONTROLLERS, "cpuacct"), path), mounts)


def read_paths(paths: Mapping[str, str], mounts: Mounts) -> CgroupFacts:
    """Read limits and counters; a file that is not there (controller off, older kernel, root cgroup) reads as None."""
    if mounts.version == 2:
        return _read_v2(mounts.folder("", next(iter(paths.values()), "/")), paths)
    cpu, memory, pids, account = (
        mounts.folder(name, paths[name]) if name in paths and name in mounts.trees else None
        for name in ("cpu", "memory", "pids", "cpuacct")
    )
    quota, period = _number(cpu, "cpu.cfs_quota_us"), _number(cpu, "cpu.cfs_period_us")
    used_ns = _number(account, "cpuacct.usage")
    return CgroupFacts(
        paths=dict(paths),
        cpu_quota=quota / period if quota is not None and quota >= 0 and period else None,
        memory_max=_bounded(_number(memory, "memory.limit_in_bytes")),
        memory_swap_max=_bounded(_number(memory, "memory.memsw.limit_in_bytes")),
        tasks_max=_number(pids, "pids.max"),
        cpu_used=None if used_ns is None else used_ns / 1e9,
        memory_used=_number(memory, "memory.usage_in_bytes"),
        memory_peak=_number(memory, "memory.max_usage_in_bytes"),
        tasks=_number(pids, "pids.current"),
    )


def _read_v2(folder: Path, paths: Mapping[str, str]) -> CgroupFacts:
    quota, _, period = (_text(folder / "cpu.max") or "max 100000").partition(" ")
    memory, swap = _number(folder, "memory.max"), _number(folder, "memory.swap.max")
    used_us = keyed(folder / "cpu.stat").get("usage_usec")
    return CgroupFacts(
        paths=dict(paths),
        cpu_quota=None if quota == "max" else int(quota) / int(period),
        memory_max=memory,
        memory_high=_number(folder, "memory.high"),
        memory_swap_max=None if memory is None or swap is None else memory + swap,
        tasks_max=_number(folder, "pids.max"),
        cpu_used=None if used_us is None else used_us / 1e6,
        memory_used=_number(folder, "memory.current"),
        memory_peak=_number(folder, "memory.peak"),
        tasks=_number(folder, "pids.current"),
    )


def in_use(path: str, mounts: Mounts) -> bool:
    """True if the cgroup `path` holds processes or other cgroups in any tree."""
    folders = {mounts.folder(name, path) for name in mounts.trees}
    return any(
        folder.is_dir() and (any(item.is_dir() for item in folder.iterdir()) or _text(folder / "cgroup.procs"))
        for folder in folders
    )


def pinned_memory(folder: Path, version: int) -> int:
    """Bytes of a cgroup's memory that the kernel cannot simply drop: usage without page cache and freeable slabs.

    A memory limit below this makes the kernel kill processes (version 2) or refuse the limit (version 1).
    """
    usage = _number(folder, "memory.current" if version == 2 else "memory.usage_in_bytes") or 0
    stat = keyed(folder / "memory.stat")
    prefix = "" if version == 2 else "total_"
    names = (f"{prefix}active_file", f"{prefix}inactive_file", "slab_reclaimable")
    return max(0, usage - sum(stat.get(name, 0) for name in names))


def keyed(path: Path) -> dict[str, int]:
    """A flat keyed file (`name number` lines); empty if it is not there."""
    rows = (line.split() for line in (_text(path) or "").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(folder: Path | None, name: str) -> int | None:
    """The number in a one-number file; None for `max` and for a file that is not there."""
    text = None if folder is None else _text(folder / name)
    return int(text) if text not in (None, "", "max") else None


def _bounded(value: int | None) -> int | None:
    return None if value is None or value >= _NO_LIMIT_V1 else value
