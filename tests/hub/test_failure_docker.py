"""Docker goes away under a real Hub: running servers live on, nobody is forgotten, nothing new starts on hope."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from docker_door import DockerDoor
from stub_hub import StubHub, stub_hub

from ds01spawner.reconcile.reconciler import Reconciler
from ds01spawner.runtime import utc_now

pytestmark = [pytest.mark.docker, pytest.mark.hub]

QUICK = """
import ds01spawner.spawner
ds01spawner.spawner.STOP_PATIENCE_S = 3
ds01spawner.spawner.STOP_RETRY_S = 0.5
"""


@pytest.fixture(scope="module")
def door() -> Iterator[DockerDoor]:
    """The way from this module's Hub to Docker; the test itself goes to Docker directly."""
    with tempfile.TemporaryDirectory(prefix="ds01-door-") as folder:
        door = DockerDoor(Path(folder) / "docker.sock")
        door.open()
        yield door
        door.shut()


@pytest.fixture(scope="module")
def _shared(door: DockerDoor, demo_image: str) -> Iterator[StubHub]:
    with stub_hub(demo_image, extra_config=QUICK, environment=door.environment) as hub:
        yield hub


@pytest.fixture
def hub(_shared: StubHub, door: DockerDoor) -> Iterator[StubHub]:
    """The module's Hub, swept; Docker is there when the test is over."""
    _shared.sweep()
    yield _shared
    door.shut()
    door.open()


def reconcile(hub: StubHub, *, later: timedelta = timedelta(0)) -> None:
    """One pass of the reconciler as the watcher does it, `later` than now."""
    hub.wait(lambda: fresh(hub), "the watcher sees Docker again")
    hub.runtime.now = lambda: utc_now() + later
    snapshot = hub.runtime.ledger.read_snapshot()
    assert snapshot is not None
    try:
        Reconciler(hub.runtime, lambda: replace(snapshot, at=hub.runtime.now()), utc_now()).run()
    finally:
        hub.runtime.now = utc_now


def fresh(hub: StubHub) -> bool:
    """The watcher's picture is fresh."""
    snapshot = hub.runtime.ledger.read_snapshot()
    return snapshot is not None and utc_now() - snapshot.at < timedelta(seconds=6)


def test_failure_of_docker_leaves_running_servers_and_refuses_new_ones(hub: StubHub, door: DockerDoor) -> None:
    """Fails if `poll` raises or says "not running" without evidence, or if a start goes on without Docker."""
    hub.spawn("alice", {"profile": "small"})
    before = hub.container("alice")
    door.shut()
    hub.add_user("bob")
    answer = hub.ask("bob", {"profile": "cpu"})
    assert answer.status_code == 503, answer.text
    assert "Docker does not answer" in answer.json()["message"]
    hub.wait(lambda: hub.logged("assuming that it still runs") >= 2, "the Hub polled in vain")
    assert (hub.server("alice") or {})["ready"]
    door.open()
    hub.finished("bob")
    after = hub.container("alice")
    assert before is not None and after is not None and after.running and after.id == before.id
    assert [a.user for a in hub.runtime.ledger.allocations()] == ["alice"]
    hub.halt("alice")
    assert not hub.runtime.ledger.usage().taken()


def test_failure_of_docker_in_the_middle_of_a_start_is_repaired_by_one_pass(hub: StubHub, door: DockerDoor) -> None:
    """Fails if the undo raises over the first error, or frees units while it cannot see whether they are named."""
    hub.add_user("alice")
    with hub.fault("start", "before", "wait"):
        asked = hub.ask_aside("alice", {"profile": "small"})
        hub.reached("start")
        door.shut()
    answer = asked.result()
    assert answer.status_code == 503 and "Docker does not answer" in answer.json()["message"], answer.text
    hub.finished("alice")
    left = hub.allocation("alice")
    assert left is not None and left.state.value == "reserved" and left.leases, "not freed on hope"
    door.open()
    reconcile(hub, later=timedelta(minutes=3))
    hub.clean()


def test_failure_of_docker_during_a_stop_waits_for_it(hub: StubHub, door: DockerDoor) -> None:
    """Fails if stop() gives up at once: the Hub would forget a server that runs."""
    hub.spawn("alice", {"profile": "small"})
    door.shut()
    hub.api("DELETE", "users/alice/server")
    time.sleep(1)
    assert hub.server("alice") is not None
    door.open()
    hub.finished("alice")
    facts = hub.container("alice")
    assert facts is not None and not facts.may_run
    assert not hub.runtime.ledger.usage().taken()


def test_failure_of_docker_for_longer_than_a_stop_waits_is_ended_by_the_watcher(hub: StubHub, door: DockerDoor) -> None:
    """Fails without `servers.postpone`: the server would run on with its GPU, and nobody would know."""
    hub.spawn("alice", {"profile": "small"})
    door.shut()
    hub.api("DELETE", "users/alice/server")
    hub.finished("alice")
    allocation, facts = hub.allocation("alice"), hub.container("alice")
    assert allocation is not None and allocation.state.value == "held" and allocation.leases
    assert facts is not None and facts.running
    door.open()
    reconcile(hub)
    reconcile(hub)
    facts = hub.container("alice")
    assert facts is not None and not facts.running
    assert not hub.runtime.ledger.usage().taken()


def test_failure_of_docker_during_a_deletion_waits_for_it(hub: StubHub, door: DockerDoor) -> None:
    """Fails if `delete_forever` raises at once: the Hub deletes the server all the same, and its container stays."""
    hub.spawn("alice", {"profile": "small"}, "lab")
    hub.halt("alice", "lab")
    door.shut()
    with ThreadPoolExecutor(1) as pool:
        deleted = pool.submit(hub.api, "DELETE", "users/alice/servers/lab", json={"remove": True})
        time.sleep(1)
        door.open()
        assert deleted.result().status_code == 204
    hub.clean()


def test_trap_t08_hub_restart_without_docker_forgets_nobody(hub: StubHub, door: DockerDoor) -> None:
    """Fails if `poll` or `get_url` lets an error out: the Hub reads that as "not running" and drops the server."""
    hub.spawn("alice", {"profile": "small"})
    before = hub.container("alice")
    door.shut()
    hub.end()
    hub.start()
    hub.wait(lambda: (hub.server("alice") or {}).get("ready"), "the server is still known")
    door.open()
    after = hub.container("alice")
    assert before is not None and after is not None and after.id == before.id and after.running
    hub.halt("alice")
    assert not hub.runtime.ledger.usage().taken()
