"""Cgroup parents under Docker's cgroupfs driver: `/<root>/<group>/<user>`, written straight to the kernel's files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ds01spawner.errors import Code, HostError

from .cgroup_files import CONTROLLERS, PERIOD_US, pinned_memory
from .cgroup_parents import Aggregate, CgroupParents, in_turn
from .slices import cgroup_path

_SMALLEST_QUOTA_US = 1000
"""The kernel refuses CPU quotas below a millisecond per period."""


class CgroupfsParents(CgroupParents):
    """What both versions share: names, folders, removal."""

    def name(self, group: str | None, user: str) -> str:
        return cgroup_path(self.root, group, user)

    def cgroup(self, group: str | None, user: str) -> str:
        return cgroup_path(self.root, group, user)

    def _levels(self, group: str | None, user: str) -> tuple[str, str, str]:
        """Paths of root, group and user, top down."""
        return f"/{self.root}", cgroup_path(self.root, group), cgroup_path(self.root, group, user)

    def remove(self, group: str | None, user: str) -> bool:
        with self._lock:
            removed = [self._remove_from(name, group, user) for name in self.mounts.trees]
        return all(removed)

    def _remove_from(self, controller: str, group: str | None, user: str) -> bool:
        """Remove the user's folder, and the levels above as far as nobody else is in them."""
        root, group_level, user_level = (self.mounts.folder(controller, path) for path in self._levels(group, user))
        try:
            user_level.rmdir()
        except FileNotFoundError:
            pass
        except OSError:  # EBUSY, ENOTEMPTY: containers below, or processes in it
            return False
        with suppress(OSError):
            group_level.rmdir()
            root.rmdir()
        return True


class CgroupfsV1(CgroupfsParents):
    """Version 1: the same path in the trees of cpu, memory and pids."""

    def _trees(self) -> tuple[str, ...]:
        """The trees that carry limits. Docker makes the same path in all others."""
        return tuple(name for name in CONTROLLERS if name in self.mounts.trees)

    def _create(self, group: str | None, user: str, wanted: Aggregate) -> None:
        # Without limits the parent is made as well wherever it can be: then everybody's containers lie alike.
        for name in dict.fromkeys((*wanted.controllers, *self._trees())):
            for level in self._levels(group, user):
                folder = self.mounts.folder(name, level)
                make_folder(folder)
                if name == "memory":
                    _count_below(folder)

    def _apply(self, group: str | None, user: str, wanted: Aggregate) -> Sequence[str]:
        path, trees = self.cgroup(group, user), self._trees()
        folder = {name: self.mounts.folder(name, path) for name in trees}
        steps: dict[str, Callable[[], Sequence[str]]] = {
            "pids": lambda: set_value(folder["pids"] / "pids.max", wanted.tasks_max, none="max"),
            "cpu": lambda: set_quota_v1(folder["cpu"], wanted.cpu_quota),
            "memory": lambda: set_memory_max(
                folder["memory"], "memory.limit_in_bytes", wanted.memory_max, user=user, none="-1", version=1
            ),
        }
        return in_turn(*(steps[name] for name in trees))


class CgroupfsV2(CgroupfsParents):
    """Version 2: one tree, in which the controllers are switched on level by level."""

    def _create(self, group: str | None, user: str, wanted: Aggregate) -> None:
        above = self.mounts.folder("", "/")
        for level in self._levels(group, user):
            _switch_on(above, wanted.controllers)
            above = self.mounts.folder("", level)
            make_folder(above)

    def _apply(self, group: str | None, user: str, wanted: Aggregate) -> Sequence[str]:
        folder = self.mounts.folder("", self.cgroup(group, user))
        quota = None if wanted.cpu_quota is None else f"{round(wanted.cpu_quota * PERIOD_US)} {PERIOD_US}"
        return in_turn(
            lambda: set_value(folder / "pids.max", wanted.tasks_max, none="max"),
            lambda: set_value(folder / "cpu.max", quota, none=f"max {PERIOD_US}"),
            lambda: set_value(folder / "memory.high", wanted.memory_high, none="max"),
            lambda: set_memory_max(folder, "memory.max", wanted.memory_max, user=user, none="max", version=2),
        )


# --------------------------------------------------------------------------- steps on single folders


def make_folder(folder: Path) -> None:
    """Make one cgroup if it is not there.

    Raises:
        HostError: the kernel or a file of that name is in the way.
    """
    with suppress(FileExistsError):
        try:
            folder.mkdir(mode=0o755)
        except FileExistsError:
            raise
        except OSError as error:
            raise _failed(folder, "cannot be made", error) from error
    if not folder.is_dir():
        raise HostError(f"The cgroup {folder} cannot be made: a file of that name is there.")


def set_value(file: Path, value: int | str | None, *, none: str) -> tuple[()]:
    """Write a limit unless it is already there; a missing file matters only if there is something to limit.

    Returns:
        No notes.

    Raises:
        HostError: names the file and the errno.
    """
    text = none if value is None else str(value)
    try:
        if file.read_text().strip() != text:
            write(file, text)
    except FileNotFoundError as error:
        if value is not None:
            raise _failed(file, "is not there, the controller is off", error) from error
    return ()


def set_memory_max(folder: Path, name: str, limit: int | None, *, user: str, none: str, version: int) -> tuple[()]:
    """Set the hard memory limit unless running containers prevent it (see `check_memory`)."""
    check_memory(folder, limit, version, user)
    return set_value(folder / name, limit, none=none)


def write(file: Path, text: str) -> None:
    """Write to a kernel file, never making one.

    Raises:
        FileNotFoundError: no such file.
        HostError: any other failure; names the file and the errno.
    """
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _failed(file, f"does not take {text!r}", error) from error


def check_memory(folder: Path, limit: int | None, version: int, user: str) -> None:
    """Refuse a memory limit below what running containers cannot give back: version 2 would kill their processes.

    Raises:
        HostError: says how much is in use, and what to do.
    """
    pinned = 0 if limit is None else pinned_memory(folder, version)
    if limit is not None and pinned > limit:
        raise HostError(
            f"The running containers of {user} use {pinned} bytes of memory, more than their limit of now {limit} "
            f"bytes ({folder}). Stop one of them, then start again.",
            code=Code.LIMITS_NOT_ENFORCED,
            facts={"file": str(folder), "errno": errno.EBUSY, "memory_used": pinned, "memory_max": limit},
        )


def set_quota_v1(folder: Path, cores: float | None) -> Sequence[str]:
    """Set a CPU quota on version 1, where no child's quota may exceed its parent's.

    When lowering, children above it are lowered first, deepest first, to the same quota; if the parent's write
    then fails they get their old ones back. A later raise does not lift them: they get what Docker's own
    record says at their next `docker update` or start.

    Returns:
        A note when children were lowered.
    """
    quota_file, period_file = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
    try:
        if int(period_file.read_text()) != PERIOD_US:
            write(quota_file, "-1")
            write(period_file, str(PERIOD_US))
    except FileNotFoundError as error:
        if cores is None:
            return ()
        raise _failed(period_file, "is not there, the controller is off", error) from error
    if cores is None:
        set_value(quota_file, None, none="-1")
        return ()
    lowered = lower_quotas(folder, cores)
    try:
        set_value(quota_file, round(cores * PERIOD_US), none="-1")
    except HostError:
        restore_quotas(lowered)
        raise
    return quota_notes(lowered, cores)


def lower_quotas(folder: Path, cores: float) -> list[tuple[Path, str]]:
    """Lower every CPU quota below `folder` (version 1) to at most `cores`, deepest first.

    Returns:
        What was changed: (file, old value), in the order in which it was done.
    """
    changed: list[tuple[Path, str]] = []
    for parent, _, _ in os.walk(folder, topdown=False):
        child = Path(parent)
        if child == folder:
            continue
        with suppress(FileNotFoundError):  # the container ended in between
            quota, period = (
                int((child / "cpu.cfs_quota_us").read_text()),
                int((child / "cpu.cfs_period_us").read_text()),
            )
            if quota > cores * period:
                file = child / "cpu.cfs_quota_us"
                write(file, str(max(_SMALLEST_QUOTA_US, int(cores * period))))
                changed.append((file, str(quota)))
    return changed


def restore_quotas(lowered: Sequence[tuple[Path, str]]) -> None:
    """Undo `lower_quotas`, as far as the containers are still there."""
    for file, old in reversed(lowered):
        with suppress(FileNotFoundError):
            write(file, old)


def quota_notes(lowered: Sequence[tuple[Path, str]], cores: float) -> Sequence[str]:
    """The sentence that tells of lowered children."""
    if not lowered:
        return ()
    return (
        f"The user's CPU limit was lowered to {cores:g} cores; {len(lowered)} running container(s) that had more "
        "were lowered with it and keep that until their next start.",
    )


def _count_below(folder: Path) -> None:
    """Kernels before 5.11 count children in a memory cgroup only if told so, while there are none yet."""
    file = folder / "memory.use_hierarchy"
    with suppress(FileNotFoundError):
        if file.read_text().strip() == "0":
            write(file, "1")


def _switch_on(folder: Path, needed: Sequence[str]) -> None:
    """Hand the controllers on to the children of `folder` (version 2).

    Raises:
        HostError: a controller that a limit needs is not there, or cannot be handed on.
    """
    try:
        there = (folder / "cgroup.controllers").read_text().split()
        on = (folder / "cgroup.subtree_control").read_text().split()
    except OSError as error:
        raise _failed(folder, "is not a cgroup of version 2", error) from error
    missing = [name for name in needed if name not in there]
    if missing:
        raise HostError(
            f"The cgroup {folder} has no controller {', '.join(missing)}, which the limits need. Enable it on the "
            "kernel's command line, or hand it on from the cgroup above.",
            facts={"file": str(folder / "cgroup.controllers"), "controllers": missing},
        )
    for name in CONTROLLERS:
        if name in there and name not in on and f"+{name}" not in on:
            try:
                write(folder / "cgroup.subtree_control", f"+{name}")
            except HostError:
                if name in needed:
                    raise


def _failed(file: Path, what: str, error: OSError) -> HostError:
    code = errno.errorcode.get(error.errno or 0, str(error.errno))
    return HostError(
        f"The cgroup file {file} {what}: {error.strerror} ({code}). Nothing was started; run as root on the host, with "
        "its /sys/fs/cgroup writable.",
        code=Code.LIMITS_NOT_ENFORCED,
        facts={"file": str(file), "errno": error.errno},
    )
