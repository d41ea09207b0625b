"""Cgroup parents: one contract for three backends, then the kernel's own words with real containers."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ds01spawner.containers import cgroupfs
from ds01spawner.containers.cgroup_files import Mounts, find_mounts, paths_of_pid, pinned_memory, read_cgroup
from ds01spawner.containers.cgroupfs import CgroupfsV1, CgroupfsV2
from ds01spawner.containers.cgroups import Aggregate, CgroupFacts, CgroupParents, open_cgroups, read_limits
from ds01spawner.containers.engine import Engine
from ds01spawner.containers.systemd import INFINITY, SystemdParents, busctl
from ds01spawner.errors import Code, HostError, Refusal
from ds01spawner.model import Limit, Limits

GB, MB = 1 << 30, 1 << 20
FULL = Aggregate(cpu_quota=1.5, memory_max=4 * GB, memory_high=3 * GB, tasks_max=512)


# --------------------------------------------------------------------------- stand-ins


class Tree2:
    """A folder that behaves like a cgroup2 mount: new cgroups have the files of the controllers handed on to them."""

    FILES: ClassVar[dict[str, dict[str, str]]] = {
        "cpu": {"cpu.max": "max 100000"},
        "memory": {"memory.max": "max", "memory.high": "max", "memory.current": "0", "memory.stat": "active_file 0\n"},
        "pids": {"pids.max": "max", "pids.current": "0"},
    }

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch, controllers: str = "cpuset cpu memory pids") -> None:
        self.top = top
        self._fill(top, controllers)
        plain = cgroupfs.make_folder

        def make(folder: Path) -> None:
            new = not folder.exists()
            plain(folder)
            if new and folder.is_dir():
                self._fill(folder, (folder.parent / "cgroup.subtree_control").read_text().replace("+", ""))

        monkeypatch.setattr(cgroupfs, "make_folder", make)
        monkeypatch.setattr(cgroupfs, "write", self._write)
        rmdir = Path.rmdir

        def remove(folder: Path) -> None:  # the kernel's own files do not keep a cgroup from being removed
            if top in folder.parents and folder.exists() and not any(item.is_dir() for item in folder.iterdir()):
                for item in folder.iterdir():
                    item.unlink()
            rmdir(folder)

        monkeypatch.setattr(Path, "rmdir", remove)

    def _fill(self, folder: Path, controllers: str) -> None:
        (folder / "cgroup.controllers").write_text(controllers)
        (folder / "cgroup.subtree_control").write_text("")
        (folder / "cgroup.procs").write_text("")
        for name in controllers.split():
            for file, text in self.FILES.get(name, {}).items():
                (folder / file).write_text(text)

    def _write(self, file: Path, text: str) -> None:
        if file.name == "cgroup.subtree_control":  # the kernel adds to what is on
            text = f"{file.read_text()} {text.removeprefix('+')}".strip()
        if not file.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file", str(file))
        file.write_text(text)


@dataclass
class Bus:
    """A systemd that keeps slices in a Tree2, and records what it was asked."""

    tree: Path
    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[list[str]] = field(default_factory=list)
    deaf: bool = False
    """Accepts properties without writing the kernel's files."""

    def __call__(self, arguments: Sequence[str]) -> Any:
        words = list(arguments)
        self.calls.append(words)
        method = words[3]
        if method == "GetAll":
            state = {"ActiveState": "inactive", "ControlGroup": ""} | self._by_label(words[1].rsplit("/", 1)[1])
            return [{key: {"type": "?", "data": value} for key, value in state.items()}]
        name = words[5]
        if method == "StartTransientUnit":
            assert words[4] == "ssa(sv)a(sa(sv))"
            assert words[-1] == "0"
            path = self.path(name)
            folder = self.tree / path.lstrip("/")
            if not folder.exists():
                folder.mkdir(parents=True)
                Tree2._fill(self, folder, "cpu memory pids")  # type: ignore[arg-type]
            self.units[name] = {"ActiveState": "active", "ControlGroup": path}
            self._set(name, words[7:-1])
            return ["/org/freedesktop/systemd1/job/1"]
        if method == "SetUnitProperties":
            assert words[4] == "sba(sv)"
            assert words[6] == "true", "runtime only: no unit files"
            self._set(name, words[7:])
            return []
        assert method == "StopUnit", method
        self.units.pop(name)
        shutil.rmtree(self.tree / self.path(name).lstrip("/"))
        return ["/org/freedesktop/systemd1/job/2"]

    FILES: ClassVar[dict[str, dict[str, str]]] = Tree2.FILES

    def path(self, name: str) -> str:
        parts = name.removesuffix(".slice").split("-")
        return "/" + "/".join("-".join(parts[: n + 1]) + ".slice" for n in range(len(parts)))

    def _by_label(self, label: str) -> dict[str, Any]:
        text, place = "", 0
        while place < len(label):
            if label[place] == "_":
                text += chr(int(label[place + 1 : place + 3], 16))
                place += 3
            else:
                text += label[place]
                place += 1
        return self.units.get(text, {})

    def _set(self, name: str, words: list[str]) -> None:
        count, rest = int(words[0]), words[1:]
        assert len(rest) == 3 * count
        values = {rest[i]: rest[i + 2] for i in range(0, len(rest), 3)}
        self.units[name] |= {key: int(value) for key, value in values.items() if value.isdigit()}
        if self.deaf:
            return
        folder = self.tree / self.path(name).lstrip("/")
        for key, file in (("MemoryMax", "memory.max"), ("MemoryHigh", "memory.high"), ("TasksMax", "pids.max")):
            (folder / file).write_text("max" if int(values[key]) == INFINITY else values[key])
        quota = int(values["CPUQuotaPerSecUSec"])
        (folder / "cpu.max").write_text("max 100000" if quota == INFINITY else f"{quota // 10} 100000")


# --------------------------------------------------------------------------- the contract


def remove_tree(mounts: Mounts, root: str) -> None:
    """Remove a whole tree of empty cgroups (version 1)."""
    for folder in mounts.trees.values():
        for parent, _, _ in os.walk(folder / root, topdown=False):
            Path(parent).rmdir()


@pytest.fixture
def root_name() -> str:
    return f"dstest_host_{os.getpid()}"


@pytest.fixture
def v1(root_name: str, require: Callable[[str, str | None], None]) -> Iterator[CgroupfsV1]:
    """The machine's own cgroups of version 1."""
    if os.geteuid() != 0 or " - cgroup " not in Path("/proc/self/mountinfo").read_text():
        pytest.skip("needs root and cgroup version 1")
    parents = CgroupfsV1(root_name, find_mounts(1))
    yield parents
    remove_tree(parents.mounts, root_name)


@pytest.fixture
def v2(tmp_path: Path, root_name: str, monkeypatch: pytest.MonkeyPatch) -> CgroupfsV2:
    top = tmp_path / "cgroup2"
    top.mkdir()
    Tree2(top, monkeypatch)
    return CgroupfsV2(root_name, Mounts(2, {"": top}))


@pytest.fixture
def bus(tmp_path: Path) -> Bus:
    (tmp_path / "tree").mkdir()
    return Bus(tmp_path / "tree")


@pytest.fixture
def systemd(bus: Bus, root_name: str) -> SystemdParents:
    return SystemdParents(root_name, Mounts(2, {"": bus.tree}), call=bus, settle=0.05)


@pytest.fixture(params=["v1", "v2", "systemd"])
def parents(request: pytest.FixtureRequest) -> CgroupParents:
    made: CgroupParents = request.getfixturevalue(request.param)
    return made


class TestContract:
    """What every backend promises."""

    def test_all_limits_are_in_force_and_read_back(self, parents: CgroupParents) -> None:
        made = parents.ensure("phd-student", "a.b@c", FULL)
        assert made.path == parents.name("phd-student", "a.b@c")
        facts = parents.facts("phd-student", "a.b@c")
        assert (facts.cpu_quota, facts.memory_max, facts.tasks_max) == (1.5, 4 * GB, 512)
        if parents.mounts.version == 2:
            assert facts.memory_high == 3 * GB
            assert made.notes == ()
        else:
            assert "memory_high has no effect" in made.notes[0]
        assert parents.differences("phd-student", "a.b@c", FULL) == []

    def test_again_raised_lowered_and_removed(self, parents: CgroupParents) -> None:
        for aggregate in (
            FULL,
            FULL,
            Aggregate(3.0, 8 * GB, None, 1024),
            Aggregate(0.25, 64 * MB, None, 20),
            Aggregate(),
            Aggregate(tasks_max=7),
            Aggregate(cpu_quota=0.333333),
        ):
            parents.ensure("g", "u", aggregate)
            facts = parents.facts("g", "u")
            assert facts.memory_max == aggregate.memory_max
            assert facts.tasks_max == aggregate.tasks_max
            wanted = aggregate.cpu_quota
            assert facts.cpu_quota == (None if wanted is None else pytest.approx(wanted, abs=1e-3))

    def test_no_limits_at_all_still_makes_the_parent(self, parents: CgroupParents) -> None:
        assert parents.ensure(None, "u", Aggregate()).notes == ()
        facts = parents.facts(None, "u")
        assert (facts.cpu_quota, facts.memory_max, facts.tasks_max) == (None, None, None)

    def test_more_tasks_than_pids_exist_is_no_limit(self, parents: CgroupParents) -> None:
        parents.ensure("g", "u", Aggregate(tasks_max=10**9))
        assert parents.facts("g", "u").tasks_max is None

    def test_users_and_groups_have_their_own(self, parents: CgroupParents) -> None:
        pairs = [("g", "a.b"), ("g", "a-b"), ("g", "a_b"), ("g", "a@b"), ("g", ".."), ("g", "cpu.max"), ("g", "tasks"),
                 ("..", "u"), (None, "u"), ("no_group", "u"), ("phd", "x"), ("phd-x", "x")]  # fmt: skip
        for number, (group, user) in enumerate(pairs):
            parents.ensure(group, user, Aggregate(tasks_max=100 + number))
        for number, (group, user) in enumerate(pairs):
            assert parents.facts(group, user).tasks_max == 100 + number
        cgroups = [parents.cgroup(group, user) for group, user in pairs]
        assert len(set(cgroups)) == len(pairs)
        assert not [(a, b) for a in cgroups for b in cgroups if b.startswith(f"{a}/")], "none nests below another"

    @pytest.mark.parametrize("user", ["", "a/b", "../../etc", "x\0y", "ü" * 100])
    def test_names_that_cannot_be_are_refused_before_anything_happens(self, parents: CgroupParents, user: str) -> None:
        with pytest.raises(Refusal) as caught:
            parents.ensure("g", user, FULL)
        assert caught.value.code is Code.BAD_NAME

    def test_removed_when_unused(self, parents: CgroupParents) -> None:
        parents.ensure("g", "u", FULL)
        parents.ensure("g", "w", FULL)
        assert parents.remove("g", "u")
        assert parents.facts("g", "u").memory_max is None
        assert parents.facts("g", "w").memory_max == 4 * GB
        assert parents.remove("g", "w")
        assert parents.remove("g", "never-made")


def test_aggregate_of_a_users_limits() -> None:
    values = {"aggregate.cpu_quota": Limit(24.0, "group g"), "aggregate.memory_max": Limit(GB, "defaults"),
              "aggregate.gpu_limit": Limit(2.0, "g"), "memory": Limit(5, "x")}  # fmt: skip
    assert Aggregate.of(Limits("u", "g", ("g",), values)) == Aggregate(24.0, GB, None, None)


# --------------------------------------------------------------------------- failure


class TestFailure:
    def test_missing_controller_that_a_limit_needs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        top = tmp_path / "top"
        top.mkdir()
        Tree2(top, monkeypatch, controllers="cpu pids")
        parents = CgroupfsV2("ds01", Mounts(2, {"": top}))
        parents.ensure("g", "u", Aggregate(cpu_quota=1.0, tasks_max=5))
        with pytest.raises(HostError, match="has no controller memory") as caught:
            parents.ensure("g", "u", FULL)
        assert caught.value.code is Code.LIMITS_NOT_ENFORCED

    def test_missing_tree_of_version_1(self, tmp_path: Path) -> None:
        (tmp_path / "pids").mkdir()
        with pytest.raises(HostError, match="'cpu' is not mounted"):
            CgroupfsV1("ds01", Mounts(1, {"pids": tmp_path / "pids"})).ensure("g", "u", FULL)

    def test_refused_write_names_file_and_errno(self, v2: CgroupfsV2, monkeypatch: pytest.MonkeyPatch) -> None:
        v2.ensure("g", "u", Aggregate())
        plain = cgroupfs.write

        def refuse(file: Path, text: str) -> None:
            if file.name == "memory.max":
                raise cgroupfs._failed(file, "does not take it", OSError(errno.EBUSY, "Device or resource busy"))
            plain(file, text)

        monkeypatch.setattr(cgroupfs, "write", refuse)
        with pytest.raises(HostError, match=r"memory\.max does not take it.*EBUSY") as caught:
            v2.ensure("g", "u", FULL)
        assert caught.value.facts["errno"] == errno.EBUSY
        assert caught.value.facts["file"].endswith("memory.max")
        assert v2.facts("g", "u").tasks_max == 512, "what can be applied is applied"
        assert v2.facts("g", "u").cpu_quota == 1.5

    def test_value_that_did_not_stick_refuses_the_start(self, v2: CgroupfsV2, monkeypatch: pytest.MonkeyPatch) -> None:
        v2.ensure("g", "u", Aggregate())
        monkeypatch.setattr(cgroupfs, "write", lambda file, text: None)
        with pytest.raises(HostError, match=r"cpu_quota is no limit instead of 1\.5; memory_max is no limit"):
            v2.ensure("g", "u", FULL)

    def test_memory_limit_below_what_is_pinned_kills_nobody(self, v2: CgroupfsV2) -> None:
        v2.ensure("g", "u", FULL)
        folder = v2.mounts.folder("memory", v2.cgroup("g", "u"))
        (folder / "memory.current").write_text(str(2 * GB))
        (folder / "memory.stat").write_text(f"anon {GB}\nactive_file {GB // 2}\ninactive_file {GB // 2}\n")
        assert pinned_memory(folder, 2) == GB
        with pytest.raises(HostError, match=r"running containers of u use 1073741824 bytes.*Stop one"):
            v2.ensure("g", "u", Aggregate(memory_max=GB - 1))
        assert v2.facts("g", "u").memory_max == 4 * GB, "the old limit holds"
        v2.ensure("g", "u", Aggregate(memory_max=GB))

    def test_folder_where_a_file_is(self, tmp_path: Path) -> None:
        (tmp_path / "x").touch()
        with pytest.raises(HostError, match="a file of that name"):
            cgroupfs.make_folder(tmp_path / "x")
        with pytest.raises(HostError, match=r"cannot be made.*ENOENT"):
            cgroupfs.make_folder(tmp_path / "y" / "z")

    def test_kernels_that_do_not_count_children_are_told_to(self, tmp_path: Path) -> None:
        (tmp_path / "memory.use_hierarchy").write_text("0\n")
        cgroupfs._count_below(tmp_path)
        assert (tmp_path / "memory.use_hierarchy").read_text() == "1"


class TestSystemd:
    def test_settled_slice_costs_no_change(self, systemd: SystemdParents, bus: Bus) -> None:
        systemd.ensure("g", "u", FULL)
        bus.calls.clear()
        systemd.ensure("g", "u", FULL)
        assert [words[3] for words in bus.calls] == ["GetAll"]

    def test_calls_as_systemd_takes_them(self, systemd: SystemdParents, bus: Bus, root_name: str) -> None:
        systemd.ensure("phd-student", "u", Aggregate(cpu_quota=24.0, memory_max=GB))
        manager = ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"]
        made = next(words for words in bus.calls if words[3] == "StartTransientUnit")
        assert made == [
            *manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", rf"{root_name}-phd\x2dstudent-u.slice", "replace", "5",
            "Description", "s", "ds01: all containers of u",
            "CPUQuotaPerSecUSec", "t", "24000000", "MemoryMax", "t", str(GB), "MemoryHigh", "t", str(INFINITY),
            "TasksMax", "t", str(INFINITY), "0",
        ]  # fmt: skip
        assert not any("Reload" in word for words in bus.calls for word in words)

    def test_slice_that_docker_made_without_limits_gets_them(self, systemd: SystemdParents, bus: Bus) -> None:
        systemd.ensure("g", "u", Aggregate())
        bus.units[systemd.name("g", "u")].pop("MemoryMax")
        systemd.ensure("g", "u", FULL)
        assert systemd.facts("g", "u").memory_max == 4 * GB

    def test_limits_written_behind_systemds_back_are_told_to_it(self, systemd: SystemdParents, bus: Bus) -> None:
        systemd.ensure("g", "u", FULL)
        bus.units[systemd.name("g", "u")]["MemoryMax"] = INFINITY
        systemd.ensure("g", "u", FULL)
        assert bus.units[systemd.name("g", "u")]["MemoryMax"] == 4 * GB

    def test_accepted_but_not_in_force_refuses_the_start(self, systemd: SystemdParents, bus: Bus) -> None:
        bus.deaf = True
        with pytest.raises(HostError, match=r"not in force on the cgroup .*memory_max is no limit") as caught:
            systemd.ensure("g", "u", FULL)
        assert caught.value.code is Code.LIMITS_NOT_ENFORCED

    def test_slice_in_use_is_not_stopped(self, systemd: SystemdParents, bus: Bus) -> None:
        systemd.ensure("g", "u", FULL)
        folder = bus.tree / systemd.cgroup("g", "u").lstrip("/")
        (folder / "docker-x.scope").mkdir()
        assert not systemd.remove("g", "u")
        assert systemd.facts("g", "u").memory_max == 4 * GB

    def test_no_busctl_and_no_bus(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(HostError, match="busctl is not installed"):
            busctl(["x"])
        tool = tmp_path / "busctl"
        tool.write_text("#!/bin/sh\necho 'Failed to connect to bus: No such file' >&2\nexit 1\n")
        tool.chmod(0o755)
        with pytest.raises(HostError, match="Failed to connect to bus"):
            busctl(["x"])
        tool.write_text('#!/bin/sh\necho \'{"type":"s","data":["ok"]}\'\n')
        assert busctl(["x"]) == ["ok"]


# --------------------------------------------------------------------------- reading


class TestMounts:
    LINES = (
        "25 1 0:22 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "26 1 0:23 / /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory\n"
        "27 1 0:24 /docker/abc /elsewhere/pids rw - cgroup cgroup rw,pids\n"
        "28 1 0:24 / /sys/fs/cg\\040roup/pids rw - cgroup cgroup rw,pids\n"
        "29 1 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "30 1 0:26 / / rw - ext4 /dev/vda rw\n"
    )

    def test_both_versions_are_found(self, tmp_path: Path) -> None:
        (tmp_path / "mountinfo").write_text(self.LINES)
        assert find_mounts(2, tmp_path / "mountinfo").trees == {"": Path("/sys/fs/cgroup/unified")}
        trees = find_mounts(1, tmp_path / "mountinfo").trees
        assert trees == {
            "cpu": Path("/sys/fs/cgroup/cpu,cpuacct"),
            "cpuacct": Path("/sys/fs/cgroup/cpu,cpuacct"),
            "memory": Path("/sys/fs/cgroup/memory"),
            "pids": Path("/sys/fs/cg roup/pids"),
            "unified": Path("/sys/fs/cgroup/unified"),
        }

    def test_none_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "mountinfo").write_text(self.LINES.splitlines()[-1] + "\n")
        with pytest.raises(HostError, match="No cgroup version 2 tree"):
            find_mounts(2, tmp_path / "mountinfo")

    def test_paths_of_a_process(self, tmp_path: Path) -> None:
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / "cgroup").write_text("4:memory:/a\n3:cpu,cpuacct:/b\n2:pids:/c:d\n0::/e\n")
        assert paths_of_pid(7, Mounts(1, {}), tmp_path) == {
            "memory": "/a",
            "cpu": "/b",
            "cpuacct": "/b",
            "pids": "/c:d",
        }
        assert paths_of_pid(7, Mounts(2, {}), tmp_path)["memory"] == "/e"
        with pytest.raises(HostError, match="has ended"):
            paths_of_pid(8, Mounts(2, {}), tmp_path)

    def test_counters_of_version_2(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        folder.mkdir()
        for name, text in {
            "cpu.max": "150000 100000", "memory.max": "1000", "memory.swap.max": "500", "memory.high": "max",
            "pids.max": "5", "cpu.stat": "usage_usec 2500000\nuser_usec 1\n", "memory.current": "10",
            "memory.peak": "20", "pids.current": "3",
        }.items():  # fmt: skip
            (folder / name).write_text(text + "\n")
        facts = read_cgroup("/a", Mounts(2, {"": tmp_path}))
        assert (facts.cpu_quota, facts.memory_max, facts.memory_swap_max, facts.memory_high) == (1.5, 1000, 1500, None)
        assert (facts.tasks_max, facts.cpu_used, facts.memory_used, facts.memory_peak, facts.tasks) == (
            5,
            2.5,
            10,
            20,
            3,
        )


def test_driver_decides_the_backend() -> None:
    version = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
    assert isinstance(open_cgroups("cgroupfs", version, "ds01"), CgroupfsV1 if version == 1 else CgroupfsV2)
    assert isinstance(open_cgroups("systemd", version, "ds01"), SystemdParents)
    with pytest.raises(HostError, match="it can limit nobody"):
        open_cgroups("none", version, "ds01")


# --------------------------------------------------------------------------- real containers


def until(read: Callable[[], CgroupFacts], enough: Callable[[CgroupFacts], bool]) -> CgroupFacts:
    """Read until it is enough, for at most 10 s; what was read last."""
    deadline = time.monotonic() + 10
    while not enough(facts := read()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return facts


@pytest.mark.docker
class TestRealContainers:
    """Version 1 where the machine has it; the sum of two containers is what counts."""

    @pytest.fixture
    def parents(self, engine: Engine, root_name: str) -> Iterator[CgroupParents]:
        info = engine.client.info()
        driver, version = info["CgroupDriver"], int(info.get("CgroupVersion", "1"))
        made = open_cgroups(driver, version, root_name)
        yield made
        removed = [made.remove("g", user) for user in ("u", "w")]
        assert removed == [True, True], "nothing is left in them"

    @pytest.fixture
    def start(self, engine: Engine, parents: CgroupParents, tiny_image: str) -> Iterator[Callable[..., int]]:
        """Starts a container below the user's parent and returns its pid."""
        client, made = engine.client, []

        def run(command: str, user: str = "u", **host: Any) -> int:
            config = client.create_host_config(cgroup_parent=parents.name("g", user), network_mode="none", **host)
            body = client.create_container_config(tiny_image, ["sh", "-c", command], host_config=config)
            made.append(client.create_container_from_config(body, f"dstest-host-cg{len(made)}-{os.getpid()}")["Id"])
            client.start(made[-1])
            return int(client.inspect_container(made[-1])["State"]["Pid"])

        yield run
        for container in made:
            client.remove_container(container, force=True)

    def test_container_lies_below_the_parent_and_has_its_own_limits(
        self, parents: CgroupParents, start: Callable[..., int]
    ) -> None:
        parents.ensure("g", "u", FULL)
        pid = start("sleep 60", mem_limit=256 * MB, memswap_limit=512 * MB, nano_cpus=500_000_000, pids_limit=50)
        facts = read_limits(pid, parents.mounts)
        assert facts.paths["memory"].startswith(parents.cgroup("g", "u") + "/")
        assert (facts.cpu_quota, facts.memory_max, facts.tasks_max) == (0.5, 256 * MB, 50)
        if Path("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists():
            assert facts.memory_swap_max == 512 * MB
        assert facts.tasks is not None
        assert 1 <= facts.tasks <= 3
        assert parents.facts("g", "u").tasks_max == 512, "Docker left the parent alone"
        assert not parents.remove("g", "u"), "in use"

    def test_two_containers_together_stay_within_the_users_cpu(
        self, parents: CgroupParents, start: Callable[..., int]
    ) -> None:
        parents.ensure("g", "u", Aggregate(cpu_quota=0.4))
        for _ in range(2):
            start("while :; do :; done")
        time.sleep(0.3)
        before, began = parents.facts("g", "u").cpu_used, time.monotonic()
        time.sleep(1.5)
        after, took = parents.facts("g", "u").cpu_used, time.monotonic() - began
        assert before is not None
        assert after is not None
        print(f"two busy containers: {(after - before) / took:.3f} cores of 0.4")
        assert 0.2 < (after - before) / took < 0.5

    def test_two_containers_together_stay_within_the_users_memory(
        self, parents: CgroupParents, start: Callable[..., int]
    ) -> None:
        parents.ensure("g", "u", Aggregate(memory_max=64 * MB))
        # Both are started before they grow: a start in a full parent ends in an OOM kill of Docker's own init.
        for _ in range(2):
            start("sleep 0.7; dd if=/dev/zero of=/dev/shm/x bs=1M count=50; sleep 60", shm_size=60 * MB)
        facts = until(lambda: parents.facts("g", "u"), lambda facts: (facts.memory_peak or 0) > 60 * MB)
        print(f"two hungry containers: peak {facts.memory_peak} of {64 * MB} bytes")
        assert facts.memory_peak is not None
        assert 60 * MB < facts.memory_peak <= 64 * MB

    def test_two_containers_together_stay_within_the_users_tasks(
        self, parents: CgroupParents, start: Callable[..., int]
    ) -> None:
        parents.ensure("g", "w", Aggregate(tasks_max=40))
        for _ in range(2):
            start("sleep 0.5; for i in $(busybox seq 30); do sleep 60 & done; sleep 60", "w")
        until(lambda: parents.facts("g", "w"), lambda facts: (facts.tasks or 0) > 30)
        time.sleep(0.3)
        assert parents.facts("g", "w").tasks in range(30, 41)

    def test_lowering_below_running_containers(self, parents: CgroupParents, start: Callable[..., int]) -> None:
        if not isinstance(parents, CgroupfsV1):
            pytest.skip("version 1 only")
        parents.ensure("g", "u", Aggregate(cpu_quota=2.0, memory_max=GB))
        pid = start("dd if=/dev/zero of=/dev/shm/x bs=1M count=50; sleep 60", nano_cpus=1_500_000_000, shm_size=60 * MB)
        made = parents.ensure("g", "u", Aggregate(cpu_quota=0.5, memory_max=GB))
        assert "1 running container(s)" in made.notes[0]
        assert read_limits(pid, parents.mounts).cpu_quota == 0.5
        until(lambda: read_limits(pid, parents.mounts), lambda facts: (facts.memory_used or 0) > 50 * MB)
        with pytest.raises(HostError, match="Stop one of them"):
            parents.ensure("g", "u", Aggregate(cpu_quota=0.6, memory_max=20 * MB))
        assert parents.facts("g", "u").cpu_quota == 0.6, "what can be applied is applied"
        assert parents.facts("g", "u").memory_max == GB
        os.kill(pid, 0)

    def test_failed_lowering_gives_children_their_quota_back(
        self, v1: CgroupfsV1, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        v1.ensure("g", "u", Aggregate(cpu_quota=2.0))
        folder = v1.mounts.folder("cpu", v1.cgroup("g", "u"))
        for child in (folder / "a", folder / "a" / "b"):
            child.mkdir()
            (child / "cpu.cfs_quota_us").write_text("150000")
        with pytest.raises(HostError, match=r"cfs_quota_us does not take '10'.*EINVAL"):
            v1.ensure("g", "u", Aggregate(cpu_quota=0.0001))
        assert (folder / "a" / "b" / "cpu.cfs_quota_us").read_text() == "150000\n"
        assert (folder / "a" / "cpu.cfs_quota_us").read_text() == "150000\n"

    def test_race_of_starts_of_one_user(self, v1: CgroupfsV1) -> None:
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda _: v1.ensure("g", "u", FULL).path, range(32)))
        assert len(set(made)) == 1
        assert v1.differences("g", "u", FULL) == []
