"""`--check` notices every single difference: one thing is changed at a time in what was seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from deploy.check import Expected, Seen, cell, compare, parse_cell
from deploy.instance import write_policy
from ds01spawner.containers.cgroup_files import CgroupFacts
from ds01spawner.containers.facts import ContainerFacts, MountPoint
from ds01spawner.model import Allocation, Gpu, Inventory, Lease, State, Unit
from ds01spawner.policy.load import read_policy
from ds01spawner.policy.resolve import resolve

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
STATE = Path("/srv/demo")
UID = 70_001


def unit(uuid: str, mig: str | None) -> Unit:
    return Unit(uuid, "GPU-0", 0, "A100", 5 << 30, mig_profile=mig, mig_index=0 if mig else None)


SMALL, WHOLE = unit("MIG-a", "1g.5gb"), unit("GPU-b", None)


@pytest.fixture
def expected(tmp_path: Path) -> Expected:
    folder = tmp_path / "policy"
    write_policy(folder, STATE, "demo:1", None)
    loaded = read_policy(folder)
    assert loaded.policy is not None and loaded.problems == ()
    profile = loaded.policy.profiles["small"]
    return Expected(
        limits=resolve(loaded.policy, "student1", at=NOW, has_mig=True),
        ask=profile.sizes["standard"].gpu.ask(),
        image="demo:1",
        cgroup_root="ds01demo1",
        network="ds01-12345678",
        workspaces=STATE / "workspaces",
        homes=STATE / "homes",
        uid_range=(70_000, 70_199),
        simulated=True,
        reachable={"the Hub": True, "another user's server": False},
    )


def equal() -> Seen:
    """What must be seen for the demo policy's `student1` with the small profile."""
    limits = CgroupFacts(
        paths={"memory": "/ds01demo1/students/student1/abc"}, cpu_quota=1.0, memory_max=1 << 30, tasks_max=256
    )
    inside: dict[str, Any] = {
        "uid": UID,
        "gid": UID,
        "groups": [UID],
        "account": "student1",
        "home": "/home/student1",
        "cwd": "/workspace",
        "capabilities": 0,
        "no_new_privileges": True,
        "shm": 128 << 20,
        "visible": "void",
        "units": ["MIG-a"],
        "nvidia": [],
        "writable": {"/workspace": True, "/data": False, "/models": False},
        "reaches": {"the Hub": True, "another user's server": False},
    }
    labels = {
        "aime.mlc": "student1",
        "aime.mlc.USER": "student1",
        "aime.mlc.NAME": "main",
        "ds01.token": "7",
        "ds01.image": "demo:1",
    }
    mounts = (
        MountPoint("bind", f"{STATE}/workspaces/{UID}", "/workspace"),
        MountPoint("bind", f"{STATE}/homes/{UID}", "/home/student1"),
        MountPoint("bind", f"{STATE}/shared/data", "/data", True),
        MountPoint("bind", f"{STATE}/shared/models", "/models", True),
    )
    container = ContainerFacts(
        "id", name=f"main._.{UID}", labels=labels, mounts=mounts, networks={"ds01-12345678": "172.20.0.2"}
    )
    allocation = Allocation(
        1,
        7,
        "student1",
        "students",
        ("students",),
        "",
        State.ACTIVE,
        UID,
        {},
        {},
        (Lease("MIG-a", 0.14, State.ACTIVE),),
    )
    parent = CgroupFacts(cpu_quota=1.5, memory_max=2 << 30, tasks_max=400)
    return Seen(container, limits, parent, inside, allocation, (SMALL,), frozenset({"GPU-b"}))


def inside(**changed: Any) -> Callable[[Seen], Seen]:
    return lambda seen: replace(seen, inside={**seen.inside, **changed})


def own(**changed: Any) -> Callable[[Seen], Seen]:
    return lambda seen: replace(seen, own=replace(seen.own, **changed))


def parent(**changed: Any) -> Callable[[Seen], Seen]:
    return lambda seen: replace(seen, parent=replace(seen.parent, **changed))


def label(**changed: str) -> Callable[[Seen], Seen]:
    named = {key.replace("__", "."): value for key, value in changed.items()}
    return lambda seen: replace(seen, container=replace(seen.container, labels={**seen.container.labels, **named}))


def container(**changed: Any) -> Callable[[Seen], Seen]:
    return lambda seen: replace(seen, container=replace(seen.container, **changed))


def unmount(target: str) -> Callable[[Seen], Seen]:
    return lambda seen: replace(
        seen,
        container=replace(seen.container, mounts=tuple(m for m in seen.container.mounts if m.target != target)),
    )


def test_compare_finds_everything_equal(expected: Expected) -> None:
    rows = compare(expected, equal())
    assert [row for row in rows if not row.ok] == []
    assert len(rows) > 30


CHANGES: list[tuple[str, Callable[[Seen], Seen]]] = [
    ("container", container(name="lab._.70001")),
    ("image", label(ds01__image="other:1")),
    ("user id", inside(uid=0)),
    ("user id in the ledger", inside(uid=70_002)),
    ("root's group", inside(groups=[UID, 0])),
    ("account", inside(account="nobody")),
    ("HOME", inside(home="/root")),
    ("working folder", inside(cwd="/")),
    ("capabilities", inside(capabilities=1 << 13)),
    ("no new privileges", inside(no_new_privileges=False)),
    ("CPU cores", own(cpu_quota=None)),
    ("CPU cores", own(cpu_quota=1.1)),
    ("memory", own(memory_max=(1 << 30) + 4096)),
    ("memory and swap", own(memory_swap_max=2 << 30)),
    ("processes", own(tasks_max=None)),
    ("/dev/shm", inside(shm=64 << 20)),
    ("cgroup parent", own(paths={"memory": "/docker/abc"})),
    ("all servers: CPU cores", parent(cpu_quota=None)),
    ("all servers: memory", parent(memory_max=None)),
    ("all servers: processes", parent(tasks_max=401)),
    ("GPU units", lambda seen: replace(seen, units=())),
    ("GPU units", lambda seen: replace(seen, units=(WHOLE,))),
    ("GPU units", lambda seen: replace(seen, units=(unit("MIG-a", "2g.10gb"),))),
    ("units of others", lambda seen: replace(seen, others=frozenset({"MIG-a"}))),
    ("NVIDIA_VISIBLE_DEVICES", inside(visible="all")),
    ("devices inside", inside(units=["GPU-b", "MIG-a"])),
    ("label aime.mlc", label(aime__mlc="x")),
    ("label aime.mlc.USER", label(aime__mlc__USER="x")),
    ("label aime.mlc.NAME", label(aime__mlc__NAME="x")),
    ("label ds01.token", label(ds01__token="6")),
    ("labels with a comma", label(maintainer="a, b")),
    ("/workspace", unmount("/workspace")),
    ("/workspace can be written", inside(writable={"/workspace": False, "/data": False, "/models": False})),
    ("HOME lies in", unmount("/home/student1")),
    ("/data", unmount("/data")),
    ("/data can be written", inside(writable={"/workspace": True, "/data": True, "/models": False})),
    ("networks", container(networks={"ds01-12345678": "x", "bridge": "y"})),
    ("the Hub", inside(reaches={"the Hub": False, "another user's server": False})),
    ("another user's server", inside(reaches={"the Hub": True, "another user's server": True})),
]


@pytest.mark.parametrize(("what", "change"), CHANGES, ids=[f"{n}-{what}" for n, (what, _) in enumerate(CHANGES)])
def test_compare_notices(expected: Expected, what: str, change: Callable[[Seen], Seen]) -> None:
    wrong = [row.what for row in compare(expected, change(equal())) if not row.ok]
    assert what in wrong


def test_compare_on_real_gpus_counts_device_nodes(expected: Expected) -> None:
    real = replace(expected, simulated=False)
    seen = replace(equal(), inside={**equal().inside, "nvidia": ["nvidia0"], "units": []})
    assert all(row.ok for row in compare(real, seen))
    more = replace(seen, inside={**seen.inside, "nvidia": ["nvidia0", "nvidia1"]})
    assert [row.what for row in compare(real, more) if not row.ok] == ["GPU devices inside"]


def test_cell_is_python_and_its_answer_is_read() -> None:
    compile(cell({"the Hub": ("10.0.0.1", 80)}, ("/workspace",)), "cell", "exec")
    assert parse_cell('{"uid": 5}\n') == {"uid": 5}


# ------------------------------------------------------------------------------------------------ the demo's policy


def box(*units: Unit) -> Inventory:
    return Inventory((Gpu("GPU-0", 0, "0", "A100", 40 << 30, any(u.mig_profile for u in units), units),), "nvml")


@pytest.mark.parametrize(
    ("gpus", "profiles", "mig"),
    [
        (None, ["small", "medium", "whole", "cpu"], "1g.5gb"),
        (box(WHOLE), ["whole", "cpu"], None),
        (box(SMALL, replace(unit("MIG-y", "3g.20gb"), memory_bytes=20 << 30)), ["small", "medium", "cpu"], "1g.5gb"),
        (box(WHOLE, unit("MIG-x", "1g.10gb"), unit("MIG-y", "1g.10gb")), ["small", "whole", "cpu"], "1g.10gb"),
    ],
    ids=["simulated", "whole", "all-cut", "cut-alike"],
)
def test_demo_policy_fits_the_box(tmp_path: Path, gpus: Inventory | None, profiles: list[str], mig: str | None) -> None:
    write_policy(tmp_path / "policy", STATE, "demo:1", gpus)
    loaded = read_policy(tmp_path / "policy")
    assert loaded.policy is not None and loaded.problems == ()
    assert list(loaded.policy.profiles) == profiles
    if mig is not None:
        assert loaded.policy.profiles["small"].sizes["standard"].gpu.mig_profile == mig
