"""What containers really have, next to what the policy says: the demo's `--check`.

`Expected` comes from the policy alone, by the same resolver as every start; `Seen` from the kernel's cgroup files,
from Docker, and from a cell that ran inside. `compare` is pure, so that a difference can be tested without a Hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ds01spawner.containers import aime
from ds01spawner.containers.cgroup_files import CgroupFacts
from ds01spawner.containers.facts import ContainerFacts
from ds01spawner.model import Allocation, GpuAsk, GpuKind, Limits, Unit

PAGE = 65_536
"""Bytes that the kernel may round a memory limit down by (the largest page size in use)."""

CORES_TOLERANCE = 0.001

CELL = """
import grp, json, os, pwd, socket, sys

def status(name):
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name + ":"))

def reaches(address):
    try:
        socket.create_connection(tuple(address), timeout=2).close()
    except OSError:
        return False
    return True

def writable(folder):
    probe = os.path.join(folder, ".ds01-check")
    try:
        open(probe, "w").close()
        os.remove(probe)
    except OSError:
        return False
    return True

account = pwd.getpwuid(os.getuid())
shm = os.statvfs("/dev/shm")
units = "/dev/ds01"
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(), "account": account.pw_name,
    "home": os.environ.get("HOME"), "passwd_home": account.pw_dir, "cwd": os.getcwd(), "python": sys.executable,
    "capabilities": int(status("CapEff"), 16), "no_new_privileges": status("NoNewPrivs") == "1",
    "shm": shm.f_blocks * shm.f_frsize, "visible": os.environ.get("NVIDIA_VISIBLE_DEVICES"),
    "units": sorted(os.listdir(units)) if os.path.isdir(units) else [],
    "nvidia": sorted(name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()),
    "writable": {folder: writable(folder) for folder in FOLDERS},
    "reaches": {name: reaches(address) for name, address in ADDRESSES.items()},
}))
"""


def cell(addresses: Mapping[str, tuple[str, int]], folders: tuple[str, ...]) -> str:
    """The code to run inside: it prints one JSON object.

    Args:
        addresses: TCP addresses to try, by name. folders: where to try to write.
    """
    return f"ADDRESSES = {dict(addresses)!r}\nFOLDERS = {folders!r}\n{CELL}"


@dataclass(frozen=True)
class Expected:
    """What the policy gives.

    Attributes:
        ask: the GPU part of the chosen size. image: reference that the profile names.
        cgroup_root, network, workspaces, homes: of the installation. simulated: the box is simulated.
        reachable: by name of the address that the cell tries, whether the network may let it through.
    """

    limits: Limits
    ask: GpuAsk
    image: str
    cgroup_root: str
    network: str
    workspaces: Path
    homes: Path
    uid_range: tuple[int, int]
    simulated: bool
    reachable: Mapping[str, bool]


@dataclass(frozen=True)
class Seen:
    """What there is.

    Attributes:
        inside: what the cell printed. own, parent: cgroup of the container, of the user.
        units: the units of the allocation's leases. others: units that other servers of the check have.
    """

    container: ContainerFacts
    own: CgroupFacts
    parent: CgroupFacts
    inside: Mapping[str, Any]
    allocation: Allocation
    units: tuple[Unit, ...]
    others: frozenset[str]


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    expected: str
    found: str
    ok: bool


def parse_cell(printed: str) -> dict[str, Any]:
    """The JSON object that the cell printed."""
    found: dict[str, Any] = json.loads(printed)
    return found


def compare(expected: Expected, seen: Seen) -> list[Row]:
    """Every comparison of one server, in the order of the table."""
    return [
        *_identity(expected, seen),
        *_resources(expected, seen),
        *_together(expected, seen),
        *_gpus(expected, seen),
        *_labels(expected, seen),
        *_mounts(expected, seen),
        *_network(expected, seen),
    ]


# ------------------------------------------------------------------------------------------------ parts


def _identity(expected: Expected, seen: Seen) -> list[Row]:
    uid, inside = seen.allocation.uid, seen.inside
    account = aime.account_name(expected.limits.user, uid)
    low, high = expected.uid_range
    return [
        _same("container", aime.container_name("", uid), seen.container.name),
        _same("image", expected.image, seen.container.labels.get(aime.LABEL_IMAGE, "")),
        Row("user id", f"{low}-{high}, not root", f"{inside['uid']}:{inside['gid']}", low <= inside["uid"] <= high),
        _same("user id in the ledger", uid, inside["uid"]),
        _same("root's group", False, 0 in [inside["gid"], *inside["groups"]]),
        _same("account", account, inside["account"]),
        _same("HOME", f"/home/{account}", inside["home"]),
        _same("working folder", "/workspace", inside["cwd"]),
        _same("capabilities", 0, inside["capabilities"]),
        _same("no new privileges", True, inside["no_new_privileges"]),
    ]


def _resources(expected: Expected, seen: Seen) -> list[Row]:
    limits, own = expected.limits, seen.own
    memory = limits["memory"]
    rows = [
        _cores("CPU cores", limits["max_cpus"], own.cpu_quota, limits.source("max_cpus")),
        _bytes("memory", memory, own.memory_max, limits.source("memory")),
        _number("processes", limits["pids_limit"], own.tasks_max, limits.source("pids_limit")),
        _bytes("/dev/shm", limits["shm_size"], seen.inside["shm"], limits.source("shm_size")),
    ]
    if own.memory_swap_max is not None:  # a kernel without swap accounting tells nothing and enforces nothing
        rows.insert(2, _bytes("memory and swap", limits["memory_swap"] or memory, own.memory_swap_max, ""))
    return rows


def _together(expected: Expected, seen: Seen) -> list[Row]:
    limits, parent = expected.limits, seen.parent
    path = seen.own.paths["memory"]
    top = f"/{expected.cgroup_root}/{limits.group}/{limits.user}"
    slices = f"{expected.cgroup_root}-{limits.group}-{limits.user}.slice"
    cpu, memory, tasks = "aggregate.cpu_quota", "aggregate.memory_max", "aggregate.tasks_max"
    return [
        Row("cgroup parent", f"{top} or {slices}", str(PurePosixPath(path).parent), top in path or slices in path),
        _cores("all servers: CPU cores", limits[cpu], parent.cpu_quota, limits.source(cpu)),
        _bytes("all servers: memory", limits[memory], parent.memory_max, limits.source(memory)),
        _number("all servers: processes", limits[tasks], parent.tasks_max, limits.source(tasks)),
    ]


def _gpus(expected: Expected, seen: Seen) -> list[Row]:
    ask, units = expected.ask, seen.units
    held = {unit.uuid for unit in units}
    told = ", ".join(f"{unit.label} {unit.mig_profile or unit.model}" for unit in units) or "none"
    rows = [
        Row("GPU units", _asked(ask), told, len(units) == ask.count and all(_fits(ask, unit) for unit in units)),
        _same("units of others", "none", ", ".join(sorted(held & seen.others)) or "none"),
    ]
    if expected.simulated:
        rows.append(_same("NVIDIA_VISIBLE_DEVICES", "void", seen.inside["visible"]))
        rows.append(_same("devices inside", sorted(held), seen.inside["units"]))
    else:
        wanted = len({unit.gpu_uuid for unit in units})
        rows.append(_same("GPU devices inside", wanted, len(seen.inside["nvidia"])))
    return rows


def _asked(ask: GpuAsk) -> str:
    if ask.kind is GpuKind.NONE:
        return "none"
    return f"{ask.count} x {ask.mig_profile or {'full': 'a whole GPU'}.get(ask.kind.value, ask.kind.value)}"


def _fits(ask: GpuAsk, unit: Unit) -> bool:
    if ask.kind is GpuKind.FULL:
        return unit.whole
    if ask.mig_profile is not None and not ask.allow_larger:
        return unit.mig_profile == ask.mig_profile
    return ask.min_memory is None or unit.memory_bytes >= ask.min_memory


def _labels(expected: Expected, seen: Seen) -> list[Row]:
    labels, user = seen.container.labels, expected.limits.user
    broken = sorted(key for key, value in labels.items() if "," in value)
    return [
        _same("label aime.mlc", user, labels.get("aime.mlc")),
        _same("label aime.mlc.USER", user, labels.get("aime.mlc.USER")),
        _same("label aime.mlc.NAME", aime.DEFAULT_NAME, labels.get("aime.mlc.NAME")),
        _same("label ds01.token", str(seen.allocation.token), labels.get(aime.LABEL_TOKEN)),
        _same("labels with a comma", "none", ", ".join(broken) or "none"),
    ]


def _mounts(expected: Expected, seen: Seen) -> list[Row]:
    uid = seen.allocation.uid
    mounted = {mount.target: mount for mount in seen.container.mounts}
    workspace, home = mounted.get("/workspace"), mounted.get(seen.inside["home"])
    rows = [
        _same("/workspace", f"{expected.workspaces / str(uid)}", workspace.source if workspace else "not mounted"),
        _same("/workspace can be written", True, seen.inside["writable"]["/workspace"]),
        _same("HOME lies in", str(expected.homes), str(Path(home.source).parent) if home else "not mounted"),
    ]
    for mount in expected.limits["mounts"]:
        found = mounted.get(mount.target)
        told = f"{found.source} {_mode(found.read_only)}" if found else "not mounted"
        rows += [
            _same(mount.target, f"{mount.host} {_mode(mount.read_only)}", told),
            _same(f"{mount.target} can be written", not mount.read_only, seen.inside["writable"].get(mount.target)),
        ]
    return rows


def _mode(read_only: bool) -> str:
    return "ro" if read_only else "rw"


def _network(expected: Expected, seen: Seen) -> list[Row]:
    rows = [_same("networks", expected.network, ", ".join(seen.container.networks))]
    words = {True: "reached", False: "not reached"}
    for name, may in expected.reachable.items():
        rows.append(_same(name, words[may], words[bool(seen.inside["reaches"].get(name))]))
    return rows


# ------------------------------------------------------------------------------------------------ values


def _same(what: str, expected: object, found: object) -> Row:
    return Row(what, _told(expected), _told(found), expected == found)


def _told(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _cores(what: str, wanted: float | None, found: float | None, source: str) -> Row:
    ok = wanted == found if wanted is None or found is None else abs(wanted - found) <= CORES_TOLERANCE
    return Row(what, _limit(wanted, source), _limit(found), ok)


def _bytes(what: str, wanted: int | None, found: int | None, source: str) -> Row:
    ok = wanted == found if wanted is None or found is None else 0 <= wanted - found < PAGE
    return Row(what, _limit(wanted, source), _limit(found), ok)


def _number(what: str, wanted: int | None, found: int | None, source: str) -> Row:
    return Row(what, _limit(wanted, source), _limit(found), wanted == found)


def _limit(value: float | None, source: str = "") -> str:
    told = "no limit" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return f"{told} ({source})" if source else told
