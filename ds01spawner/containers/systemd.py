"""Cgroup parents under Docker's systemd driver: transient slices, made and limited over D-Bus.

`StartTransientUnit` and `SetUnitProperties` of org.freedesktop.systemd1 (man org.freedesktop.systemd1), called
through `busctl`, which every systemd brings along. No unit file is written and nothing calls for a
daemon-reload, which would make running GPU containers lose their devices. Transient slices are gone after a
reboot; `ensure` makes them again before the next start.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ds01spawner.errors import Code, HostError

from .cgroup_files import CgroupFacts, Mounts, in_use, read_cgroup
from .cgroup_parents import Aggregate, CgroupParents
from .cgroupfs import check_memory, lower_quotas, quota_notes, restore_quotas
from .slices import slice_name

INFINITY = (1 << 64) - 1
"""How systemd writes "no limit"."""

_SETTLE = 3.0
"""Seconds that systemd gets to write the kernel's files after it has accepted new properties."""

_CALL_TIMEOUT = 10
"""Seconds that one D-Bus call may take."""

_MANAGER = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")

BusCall = Callable[[Sequence[str]], Any]
"""Takes the arguments of `busctl call`, gives the decoded reply, raises HostError."""


def busctl(arguments: Sequence[str]) -> Any:
    """One call on the system bus.

    Returns:
        The reply's arguments as busctl decodes them, [] for none.

    Raises:
        HostError: no busctl, no bus, or systemd said no (its words are in the message).
    """
    command = ["busctl", "--system", "--json=short", f"--timeout={_CALL_TIMEOUT}", "call", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CALL_TIMEOUT + 5, check=False)
    except FileNotFoundError as error:
        raise _failed("busctl is not installed, though Docker uses the systemd cgroup driver") from error
    except subprocess.TimeoutExpired as error:
        raise _failed("systemd did not answer in time") from error
    if done.returncode != 0:
        raise _failed(f"systemd said: {done.stderr.strip() or done.returncode}")
    return json.loads(done.stdout)["data"] if done.stdout.strip() else []


class SystemdParents(CgroupParents):
    """Slices `<root>-<group>-<user>.slice`; systemd makes those above them, without limits.

    Args:
        call: one D-Bus call; tests put a recorded bus here.
        settle: seconds to wait for the kernel's files.
    """

    def __init__(self, root: str, mounts: Mounts, *, call: BusCall = busctl, settle: float = _SETTLE) -> None:
        super().__init__(root, mounts)
        self._call = call
        self._settle = settle
        self._cgroups: dict[str, str] = {}  # where slices lie, once known: their names decide it

    def name(self, group: str | None, user: str) -> str:
        return slice_name(self.root, group, user)

    def cgroup(self, group: str | None, user: str) -> str:
        """Where systemd put the slice; "" if it has never been active."""
        name = self.name(group, user)
        if name not in self._cgroups:
            self._state(name)
        return self._cgroups.get(name, "")

    def facts(self, group: str | None, user: str) -> CgroupFacts:
        path = self.cgroup(group, user)
        return read_cgroup(path, self.mounts) if path else CgroupFacts()

    def _create(self, group: str | None, user: str, wanted: Aggregate) -> None:
        """Nothing: `_apply` sees from one and the same answer whether the slice is there and what it has."""

    def _apply(self, group: str | None, user: str, wanted: Aggregate) -> Sequence[str]:
        name = self.name(group, user)
        state = self._state(name)
        if state.get("ActiveState") != "active":
            state = self._start(name, user, wanted)
        path = str(state.get("ControlGroup", ""))
        if not path:
            raise _failed(f"the slice {name} did not become active")
        if _has(state, wanted) and not self.differences(group, user, wanted):
            return ()
        self._check_memory(path, wanted, user)
        notes = self._set(name, path, wanted)
        self._wait(lambda: not self.differences(group, user, wanted))
        return notes

    def _start(self, name: str, user: str, wanted: Aggregate) -> Mapping[str, Any]:
        """Start the slice with its limits and wait for it; returns its state."""
        limits = _limits(wanted, ["Description", "s", f"ds01: all containers of {user}"])
        try:
            self._manager("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "replace", *limits, "0")
        except HostError:
            # Made by somebody else in between (Docker makes missing slices): then the limits are set on that one.
            if self._state(name).get("ActiveState") not in ("active", "activating"):
                raise
        self._wait(lambda: self._state(name).get("ActiveState") == "active")
        return self._state(name)

    def _check_memory(self, path: str, wanted: Aggregate, user: str) -> None:
        if "memory" in self.mounts.trees or self.mounts.version == 2:
            check_memory(self.mounts.folder("memory", path), wanted.memory_max, self.mounts.version, user)

    def _set(self, name: str, path: str, wanted: Aggregate) -> Sequence[str]:
        """Set all limits; on version 1 the containers' CPU quotas first, as systemd does not."""
        set_all = partial(self._manager, "SetUnitProperties", "sba(sv)", name, "true", *_limits(wanted, []))
        if self.mounts.version == 2 or wanted.cpu_quota is None or "cpu" not in self.mounts.trees:
            set_all()
            return ()
        lowered = lower_quotas(self.mounts.folder("cpu", path), wanted.cpu_quota)
        try:
            set_all()
        except HostError:
            restore_quotas(lowered)
            raise
        return quota_notes(lowered, wanted.cpu_quota)

    def remove(self, group: str | None, user: str) -> bool:
        name = self.name(group, user)
        with self._lock:
            path = self._state(name).get("ControlGroup", "")
            if path and in_use(path, self.mounts):  # stopping a slice stops what runs in it
                return False
            if path:
                self._manager("StopUnit", "ss", name, "fail")
            return True

    def _state(self, name: str) -> Mapping[str, Any]:
        """All properties of a slice by name; those of a unit that does not exist say `inactive`."""
        unit = f"/org/freedesktop/systemd1/unit/{_label(name)}"
        reply = self._call([_MANAGER[0], unit, "org.freedesktop.DBus.Properties", "GetAll", "s", ""])
        state = {key: value["data"] for key, value in reply[0].items()}
        if state.get("ControlGroup"):
            self._cgroups[name] = state["ControlGroup"]
        return state

    def _manager(self, method: str, signature: str, *arguments: str) -> Any:
        return self._call([*_MANAGER, method, signature, *arguments])

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Give systemd its time; what is not there then is found by the caller's read-back."""
        end = time.monotonic() + self._settle
        while not ready() and time.monotonic() < end:
            time.sleep(0.02)


def _limits(wanted: Aggregate, first: Sequence[str]) -> list[str]:
    """The array `a(sv)` of limits as busctl takes it: count, then name, type, value of each. None = infinity."""
    values = _properties(wanted)
    pairs = [word for name, value in values.items() for word in (name, "t", str(value))]
    return [str(len(values) + len(first) // 3), *first, *pairs]


def _properties(wanted: Aggregate) -> dict[str, int]:
    """Property names and values (CPU: microseconds per second)."""
    quota = None if wanted.cpu_quota is None else round(wanted.cpu_quota * 1_000_000)
    values = {
        "CPUQuotaPerSecUSec": quota,
        "MemoryMax": wanted.memory_max,
        "MemoryHigh": wanted.memory_high,
        "TasksMax": wanted.tasks_max,
    }
    return {name: INFINITY if value is None else value for name, value in values.items()}


def _has(state: Mapping[str, Any], wanted: Aggregate) -> bool:
    """True if systemd itself holds these limits (it writes what it holds again whenever it likes)."""
    return all(state.get(name) == value for name, value in _properties(wanted).items())


def _label(name: str) -> str:
    """`name` as part of an object path: everything but letters and digits as `_xx` (sd_bus_path_encode)."""
    return "".join(
        char if char.isascii() and char.isalnum() and not (place == 0 and char.isdigit()) else f"_{ord(char):02x}"
        for place, char in enumerate(name)
    )


def _failed(why: str) -> HostError:
    return HostError(
        f"The limits of a user's containers cannot be set: {why}. Nothing was started; run as root on the host, with "
        "its /run/dbus/system_bus_socket.",
        code=Code.LIMITS_NOT_ENFORCED,
        facts={"problem": why},
    )
