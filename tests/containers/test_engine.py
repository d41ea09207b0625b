"""The edge to Docker: what its answers mean, how its failures are told, and the real engine."""

from __future__ import annotations

import gc
import itertools
import json
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from ds01spawner.containers import cdi
from ds01spawner.containers.engine import Engine, EngineConflict, EngineNotFound, EngineUnreachable
from ds01spawner.containers.facts import container_facts, engine_info, image_facts, parse_env, parse_time
from ds01spawner.containers.pulling import PullMeter, PullProgress
from ds01spawner.errors import Code, EngineError

# --------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-23T12:25:15.058763123Z", (2026, 11, 23, 12, 25, 15, 58763)),
        ("2026-11-23T12:25:15.999999999Z", (2026, 11, 23, 12, 25, 15, 999999)),
        ("2026-11-23T12:25:15.5Z", (2026, 11, 23, 12, 25, 15, 500000)),
        ("2026-11-23T12:25:15Z", (2026, 11, 23, 12, 25, 15, 0)),
        ("2026-11-23T12:25:15.123456789+01:00", (2026, 11, 23, 11, 25, 15, 123456)),
        ("2026-11-23T00:25:15.1-05:30", (2026, 11, 23, 5, 55, 15, 100000)),
    ],
)
def test_b6_nine_digits_of_a_second_are_understood(text: str, expected: tuple[int, ...]) -> None:
    assert parse_time(text) == datetime(*expected, tzinfo=timezone.utc)  # type: ignore[arg-type,misc]


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00Z", "", None])
def test_never_is_none(text: str | None) -> None:
    assert parse_time(text) is None


@pytest.mark.parametrize("text", ["yesterday", "2026-11-23", "2026-13-23T12:25:15Z", "12:25:15"])
def test_b6_what_is_no_time_is_an_error_and_not_swallowed(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_time(text)


def test_environment_lines() -> None:
    assert parse_env(["A=1", "B", "C=x=y", "A=2"]) == {"A": "2", "B": "", "C": "x=y"}
    assert parse_env(None) == {}


# --------------------------------------------------------------------------- answers

STATE = {"Status": "exited", "Running": False, "StartedAt": "2026-01-02T03:04:05.123456789Z"}


def answer(**host: Any) -> dict[str, Any]:
    return {
        "Id": "a" * 64,
        "Name": "/lab._.70000",
        "Image": "sha256:1",
        "Created": "2026-01-02T03:04:05.123456789Z",
        "State": {**STATE, "FinishedAt": "0001-01-01T00:00:00Z", "ExitCode": 137, "OOMKilled": True},
        "Config": {"Image": "img:1", "Labels": None, "Env": ["A=1"], "Cmd": None},
        "HostConfig": host,
        "Mounts": [{"Type": "bind", "Source": "/a", "Destination": "/b", "RW": False}],
        "NetworkSettings": {"Networks": {"n": {"IPAddress": "172.31.0.2"}, "m": None}},
    }


def test_a_container_as_inspected() -> None:
    facts = container_facts(
        answer(
            DeviceRequests=[{"Driver": "", "Count": -1, "DeviceIDs": None, "Capabilities": [["gpu"]]}],
            Devices=[{"PathOnHost": "/dev/x"}],
            RestartPolicy={"Name": "no"},
            PidsLimit=None,
        )
    )
    assert facts.name == "lab._.70000" and facts.oom_killed and facts.exit_code == 137
    assert facts.finished is None and facts.started is not None
    assert facts.device_requests[0].count == -1 and facts.device_requests[0].capabilities == {"gpu"}
    assert facts.devices[0].container == "/dev/x"
    assert facts.restart == "" and facts.pids_limit == 0
    assert facts.mounts[0].read_only and facts.networks == {"n": "172.31.0.2", "m": ""}
    assert not facts.may_run and not facts.unreadable


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"Id": "x"},
        {"Id": "x", "Config": {}, "HostConfig": {}, "State": {}},
        {**answer(), "State": {"Status": "running"}},
        {**answer(), "Created": "today"},
        {**answer(), "HostConfig": {"Devices": [{}]}},
        {**answer(), "HostConfig": {"DeviceRequests": [{"Count": "many"}]}},
        {**answer(), "HostConfig": None},
        {**answer(), "Name": None},
    ],
)
def test_an_answer_that_makes_no_sense_is_marked_and_not_trusted(broken: dict[str, Any]) -> None:
    facts = container_facts(broken)
    assert facts.unreadable
    assert facts.may_run


def test_an_image_as_inspected() -> None:
    facts = image_facts({"Id": "sha256:1", "RepoTags": None, "Config": None, "RootFS": {"Layers": ["l1"]}, "Size": 5})
    assert (facts.id, facts.tags, facts.layers, facts.size) == ("sha256:1", (), ("l1",), 5)


@pytest.mark.parametrize(
    ("info", "checks"),
    [
        ({"CgroupDriver": "systemd", "CgroupVersion": "2"}, {"cgroup_driver": "systemd", "cgroup_version": 2}),
        ({}, {"cgroup_driver": "cgroupfs", "cgroup_version": 1, "userns_remap": False}),
        ({"SecurityOptions": ["name=seccomp,profile=default", "name=userns"]}, {"userns_remap": True}),
        ({"DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]]}, {"containerd_store": True}),
        ({"Runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}}, {"default_runtime": "runc"}),
        ({"DefaultRuntime": "nvidia", "NCPU": 64, "MemTotal": 2**40}, {"default_runtime": "nvidia", "ncpu": 64}),
    ],
)
def test_the_engine_as_it_tells(info: dict[str, Any], checks: dict[str, Any]) -> None:
    found = engine_info(info, {"Version": "28.2.2", "ApiVersion": "1.50"}, frozenset())
    assert found.api_version == (1, 50)
    for name, value in checks.items():
        assert getattr(found, name) == value


# --------------------------------------------------------------------------- CDI

SPEC = {"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": [{"name": "0"}, {"name": "GPU-1"}, {"name": "0:1"}]}
NAMES = {"nvidia.com/gpu=0", "nvidia.com/gpu=GPU-1", "nvidia.com/gpu=0:1"}


def test_cdi_from_the_engines_own_list() -> None:
    rows = [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}, {"Source": "other", "ID": "x"}, {"Source": "cdi"}]
    info = {"DiscoveredDevices": rows, "CDISpecDirs": ["/nowhere"]}
    assert cdi.discover(info, (1, 50)) == {"nvidia.com/gpu=0"}
    assert cdi.discover(info, (1, 49)) == frozenset(), "an older API does not define the list"
    assert cdi.discover({"DiscoveredDevices": None}, (1, 51)) == frozenset()


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_cdi_from_the_folders_that_the_engine_names(tmp_path: Path, suffix: str) -> None:
    # JSON is YAML, too.
    (tmp_path / f"nvidia.{suffix}").write_text(json.dumps(SPEC))
    (tmp_path / "notes.txt").write_text(json.dumps({**SPEC, "kind": "other/gpu"}))
    assert cdi.discover({"CDISpecDirs": [str(tmp_path), "/nowhere"]}, (1, 46)) == NAMES


def test_cdi_in_yaml_as_nvidia_ctk_writes_it(tmp_path: Path) -> None:
    text = "---\ncdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n- name: '0'\n  containerEdits: {}\n- name: MIG-1\n"
    (tmp_path / "nvidia.yaml").write_text(text)
    assert cdi.read_dirs([str(tmp_path)]) == {"nvidia.com/gpu=0", "nvidia.com/gpu=MIG-1"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "kind: 3", "kind: a/b\ndevices: x", "kind: a/b\ndevices: [1, {}]", "\0"]
)
def test_a_broken_cdi_file_lists_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.json").write_text(text)
    assert cdi.read_dirs([str(tmp_path)]) == frozenset()


def test_without_cdi_no_folder_is_read() -> None:
    assert cdi.spec_dirs({}) == ()
    assert cdi.spec_dirs({"CDISpecDirs": []}) == ()
    assert cdi.spec_dirs({"Features": {"cdi": True}}) == ("/etc/cdi", "/var/run/cdi")


# --------------------------------------------------------------------------- pulls


def test_progress_of_a_pull_is_summed_over_layers() -> None:
    meter = PullMeter()
    events: list[dict[str, Any]] = [
        {"status": "Pulling from library/x", "id": "latest"},
        {"status": "Already exists", "id": "a"},
        {"status": "Pulling fs layer", "id": "b"},
        {"status": "Downloading", "id": "b", "progressDetail": {"current": 10, "total": 100}},
        {"status": "Downloading", "id": "b", "progressDetail": {"current": 10, "total": 100}},
        {"status": "Downloading", "id": "c", "progressDetail": {"current": 50, "total": 50}},
        {"status": "Download complete", "id": "b", "progressDetail": {}},
        {"status": "Extracting", "id": "b", "progressDetail": {"current": 1, "total": 100}},
        {"status": "Pull complete", "id": "b", "progressDetail": {}},
        {"status": "Digest: sha256:1"},
    ]
    seen = [progress for event in events if (progress := meter.feed(event)) is not None]
    assert seen[0] == PullProgress(0, 0, 1, 1)
    assert PullProgress(10, 100, 1, 2) in seen
    assert PullProgress(60, 150, 1, 3) in seen
    assert seen[-1] == PullProgress(150, 150, 2, 3)
    assert all(earlier.done <= later.done for earlier, later in itertools.pairwise(seen))


def test_a_registry_that_tells_no_size() -> None:
    meter = PullMeter()
    meter.feed({"status": "Downloading", "id": "a", "progressDetail": {"current": 7}})
    assert meter.feed({"status": "Downloading", "id": "a", "progressDetail": {"current": 9}}) == PullProgress(
        9, 9, 0, 1
    )


# --------------------------------------------------------------------------- a stand-in for the daemon


class Daemon:
    """A Unix socket that answers every request after the version's with one prepared response."""

    def __init__(self, path: Path, response: bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(8)
        self._response = response
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                request = connection.recv(65536)
                body = json.dumps({"ApiVersion": "1.41", "Version": "20.10"}).encode()
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                connection.sendall(head + body if b"/version" in request else self._response)

    def close(self) -> None:
        self._socket.close()


def http(status: str, text: str) -> bytes:
    body = text.encode()
    kind = "Content-Type: application/json"
    return f"HTTP/1.1 {status}\r\n{kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


@pytest.fixture
def daemon(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    stand_in = Daemon(tmp_path / "d.sock", request.param)
    engine = Engine(f"unix://{tmp_path / 'd.sock'}", timeout=5)
    yield engine
    engine.close()
    stand_in.close()


@pytest.mark.parametrize(
    ("daemon", "kind"),
    [
        (http("404 Not Found", '{"message": "No such container: x"}'), EngineNotFound),
        (http("409 Conflict", '{"message": "name is in use"}'), EngineConflict),
        (http("400 Bad Request", '{"message": "no"}'), EngineError),
        (http("500 Internal Server Error", '{"message": "broken"}'), EngineError),
        (http("200 OK", "not json"), EngineUnreachable),
        (b"", EngineUnreachable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", EngineUnreachable),
    ],
    indirect=["daemon"],
)
def test_failure_of_docker_is_always_an_engine_error(daemon: Engine, kind: type[EngineError]) -> None:
    with pytest.raises(EngineError) as error:
        daemon.create("x", {"Image": "y"})
    assert type(error.value) is kind
    assert "x" in error.value.message
    with pytest.raises(EngineError):
        daemon.list_facts()


@pytest.mark.parametrize("daemon", [http("500 Internal Server Error", '{"message": "broken"}')], indirect=True)
def test_trap_t8_an_error_of_the_daemon_is_not_a_missing_container(daemon: Engine) -> None:
    with pytest.raises(EngineError) as error:
        daemon.inspect_facts("x")
    assert not isinstance(error.value, EngineNotFound)
    assert error.value.code is Code.ENGINE_UNAVAILABLE


@pytest.mark.parametrize("daemon", [http("404 Not Found", '{"message": "No such container: x"}')], indirect=True)
def test_only_not_found_means_none(daemon: Engine) -> None:
    assert daemon.inspect_facts("x") is None
    assert daemon.image_facts("x") is None
    daemon.remove("x")
    assert daemon.remove_image("x") is False
    with pytest.raises(EngineError) as error:
        daemon.pull("reg/none:1")
    assert error.value.code is Code.IMAGE_MISSING


@pytest.mark.parametrize("daemon", [http("200 OK", '{"error": "toomanyrequests: rate limit"}\r\n')], indirect=True)
def test_failure_in_the_middle_of_a_pull(daemon: Engine) -> None:
    with pytest.raises(EngineError, match="rate limit") as error:
        daemon.pull("reg/x:1")
    assert error.value.code is Code.IMAGE_MISSING


@pytest.fixture
def leaky() -> Iterator[None]:
    """docker-py leaves the socket of a failed connection to the garbage collector; that is not our business."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


CALLS: dict[str, Callable[[Engine], object]] = {
    "info": lambda e: e.info(),
    "list": lambda e: e.list_facts(),
    "ping": lambda e: e.ping(),
    "start": lambda e: e.start("x"),
    "events": lambda e: list(e.events()),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("leaky")
def test_failure_without_a_daemon_says_where_to_look(tmp_path: Path, call: str) -> None:
    engine = Engine(f"unix://{tmp_path / 'none.sock'}")
    with pytest.raises(EngineUnreachable, match="Is the daemon running") as error:
        CALLS[call](engine)
    assert error.value.http_status == 503


def test_docker_host_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Daemon(tmp_path / "d.sock", http("200 OK", "[]"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'd.sock'}")
    engine = Engine()
    assert engine.list_facts() == ()
    engine.close()
    stand_in.close()


@pytest.mark.parametrize("call", ["inspect_facts", "start", "stop", "remove", "image_facts", "logs", "wait", "changes"])
def test_trap_t18_an_empty_name_is_never_asked(call: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        getattr(Engine("unix:///nowhere"), call)("")


# --------------------------------------------------------------------------- the real engine


@pytest.fixture
def name(engine: Engine) -> Iterator[str]:
    name = f"dstest-c1-{uuid.uuid4().hex[:8]}"
    yield name
    engine.remove(name, force=True)


def body(image: str, *command: str, **host: Any) -> dict[str, Any]:
    return {"Image": image, "Cmd": list(command) or ["sleep", "60"], "HostConfig": {"Init": True, **host}}


@pytest.mark.docker
def test_life_of_a_container(engine: Engine, tiny_image: str, name: str) -> None:
    container = engine.create(name, body(tiny_image, "sh", "-c", "echo hello; echo oops >&2; sleep 60"))
    assert (facts := engine.inspect_facts(name)) is not None and facts.state == "created" and not facts.may_run
    engine.start(container)
    engine.start(container)
    facts = engine.inspect_facts(name)
    assert facts is not None and facts.running and facts.pid > 0
    assert facts.started is not None and abs((datetime.now(timezone.utc) - facts.started).total_seconds()) < 60
    with pytest.raises(EngineConflict):
        engine.create(name, body(tiny_image))
    for _ in range(50):
        if {"hello", "oops"} <= set(engine.logs(name).split()):
            break
        time.sleep(0.1)
    assert {"hello", "oops"} <= set(engine.logs(name, lines=5).split())
    engine.stop(container, timeout=1)
    engine.stop(container, timeout=1)
    facts = engine.inspect_facts(container)
    assert facts is not None and facts.state == "exited" and facts.finished is not None
    with pytest.raises(EngineConflict):
        engine.kill(container)
    engine.remove(container)
    engine.remove(container)
    assert engine.inspect_facts(name) is None
    with pytest.raises(EngineNotFound):
        engine.start(name)


@pytest.mark.docker
def test_exit_code_and_changes(engine: Engine, tiny_image: str, name: str) -> None:
    engine.create(name, body(tiny_image, "sh", "-c", "echo 12345 > /opt/new; exit 7"))
    engine.start(name)
    assert engine.wait(name, timeout=20) == 7
    assert ("/opt/new", 1) in engine.changes(name)
    assert engine.disk_use(name) == 6


@pytest.mark.docker
def test_limits_change_in_place(engine: Engine, tiny_image: str, name: str) -> None:
    """Up and down, memory and swap together: Docker refuses a memory above the old swap limit."""
    engine.create(name, body(tiny_image, Memory=64 * 2**20, MemorySwap=64 * 2**20, PidsLimit=50))
    for memory in (256 * 2**20, 32 * 2**20):
        update = {"Memory": memory, "MemorySwap": memory, "CpuPeriod": 100_000, "CpuQuota": 50_000, "PidsLimit": 60}
        engine.update(name, update)
        facts = engine.inspect_facts(name)
        assert facts is not None
        assert (facts.memory, facts.memory_swap, facts.cpu_quota, facts.pids_limit) == (memory, memory, 50_000, 60)


@pytest.mark.docker
def test_list_inspects_only_what_changed(
    engine: Engine, tiny_image: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Engine()
    asked: list[str] = []
    inspect = own.inspect_facts
    monkeypatch.setattr(own, "inspect_facts", lambda container: asked.append(container) or inspect(container))

    def state() -> tuple[str, bool]:
        asked.clear()
        (facts,) = [f for f in own.list_facts() if f.id == container]
        return facts.name + " " + facts.state, container in asked

    container = engine.create(name, body(tiny_image))
    assert state() == (f"{name} created", True)
    assert state() == (f"{name} created", False)
    engine.start(container)
    assert state() == (f"{name} running", True)
    assert state() == (f"{name} running", False)
    engine.rename(container, name + "-x")
    assert state() == (f"{name}-x running", True)
    own.forget(container)
    assert state() == (f"{name}-x running", True)
    engine.kill(container)
    engine.wait(container)
    assert state() == (f"{name}-x exited", True)
    engine.remove(container)
    assert all(f.id != container for f in own.list_facts())
    own.close()


@pytest.mark.docker
def test_events_wake(engine: Engine, tiny_image: str, name: str) -> None:
    own = Engine()
    events = own.events(since=time.time() - 1)
    container = engine.create(name, body(tiny_image, "true"))
    engine.start(name)
    seen: list[str] = []
    for event in events:
        if event.id == container:
            assert event.kind == "container" and event.attributes["name"] == name and event.at > 1e9
            seen.append(event.action)
        if "die" in seen:
            break
    events.close()
    own.close()
    assert seen == ["create", "start", "die"]


@pytest.mark.docker
def test_images_and_tags(engine: Engine, tiny_image: str) -> None:
    facts = engine.image_facts(tiny_image)
    assert facts is not None and facts.env["TINY"] == "yes" and facts.cmd == ("sleep", "600") and len(facts.layers) == 1
    private = f"dstest-tiny:c1-{uuid.uuid4().hex[:8]}"
    engine.tag(tiny_image, private)
    tagged = engine.image_facts(private)
    assert tagged is not None and tagged.id == facts.id
    assert engine.remove_image(private) is True
    assert engine.image_facts(private) is None
    assert engine.image_facts(tiny_image) is not None


@pytest.mark.docker
def test_files_are_read_out_of_an_image_without_running_it(engine: Engine, tiny_image: str) -> None:
    assert engine.read_file(tiny_image, "/etc/passwd").startswith(b"root:x:0:0")  # type: ignore[union-attr]
    assert engine.read_file(tiny_image, "/etc/os-release") == b"ID=tiny\n", "through a relative link"
    assert engine.read_file(tiny_image, "/etc/none") is None
    assert engine.read_file(tiny_image, "/etc") is None
    with pytest.raises(EngineError, match="bytes"):
        engine.read_file(tiny_image, "/bin/busybox")
    left = [f.name for f in engine.list_facts() if "ds01.probe" in f.labels and f.state == "created"]
    assert left == []


@pytest.mark.docker
def test_every_thread_has_its_own_client(engine: Engine) -> None:
    clients: list[int] = []
    threads = [threading.Thread(target=lambda: clients.append(id(engine.client))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*clients, id(engine.client)}) == 5
    assert engine.client is engine.client


@pytest.mark.docker
def test_the_engine_tells_what_it_is(engine: Engine) -> None:
    info = engine.info()
    assert info.api_version >= (1, 41) and info.ncpu >= 1 and info.memory > 2**28
    assert info.cgroup_driver in ("cgroupfs", "systemd") and info.root_dir.startswith("/")
