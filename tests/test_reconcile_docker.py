"""The reconciler on a real Docker: replaced, stopped and taken back for real, and what it never touches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reconcile_docker import DockerWorld
from reconcile_scene import MIG_1G, MIG_2G, WHOLE
from tiny_image import TINY_TAG, ensure_tiny

from ds01spawner.containers.engine import Engine
from ds01spawner.containers.spec import named_units
from ds01spawner.errors import EngineError
from ds01spawner.model import State, plain
from ds01spawner.reconcile.findings import Report

pytestmark = pytest.mark.docker

Make = Callable[[str], DockerWorld]


@pytest.fixture
def worlds(
    tmp_path: Path, require: Callable[[str, str | None], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Make]:
    """Makes installations of that name; everything of them is removed at the end."""
    # These worlds turn their clocks ahead: without it, further than a machine may be up.
    monkeypatch.setattr("ds01spawner.reconcile.gather.time.clock_gettime", lambda _clock: 1e7)
    made: list[DockerWorld] = []

    def make(name: str) -> DockerWorld:
        (tmp_path / name).mkdir(mode=0o700)
        world = DockerWorld(tmp_path / name)
        made.append(world)
        require("busybox", ensure_tiny(world.engine))
        return world

    yield make
    for world in made:
        world.clear()


@pytest.fixture
def world(worlds: Make) -> DockerWorld:
    """One installation."""
    return worlds("one")


def done(report: Report) -> list[str]:
    assert not report.failed, [o.detail for o in report.failed]
    return sorted(outcome.finding.what.value for outcome in report.done)


def put(world: DockerWorld, container: str, text: str) -> None:
    """Write /opt/user/note inside a running container."""
    client = world.engine.client
    made = client.exec_create(container, ["sh", "-c", f"echo {text} > /opt/user/note"])
    client.exec_start(made["Id"])


def test_reconcile_docker_hold_that_ends_keeps_the_files_and_names_no_device(world: DockerWorld) -> None:
    row = world.start("alice", WHOLE)
    before = world.facts(row)
    assert named_units(before) == {WHOLE}
    put(world, before.id, "precious")
    world.hold(row, minutes=10)
    assert not done(world.pass_())
    world.turn(minutes=10)
    assert done(world.pass_()) == ["hold_ended"]
    after = world.facts(row)
    assert after.id != before.id and after.name == before.name and not after.running
    assert not named_units(after) and world.again(row).state is State.HELD
    assert not world.ledger.usage().taken()
    assert world.engine.inspect_facts(before.id) is None
    world.engine.start(after.id)
    client = world.engine.client
    made = client.exec_create(after.id, ["cat", "/opt/user/note"])
    assert client.exec_start(made["Id"]) == b"precious\n"
    assert [image.owner for image in world.ledger.images_of("alice")] == ["alice"]


def test_reconcile_docker_failed_replacement_keeps_the_unit(
    world: DockerWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = world.start("alice", WHOLE)
    world.hold(row, minutes=-1)

    def refuse(*_arguments: object) -> str:
        raise EngineError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(world.engine, "create", refuse)
        report = world.pass_()
        assert ["no space left" in o.detail for o in report.failed] == [True]
        assert world.ledger.usage().taken() == {WHOLE}
    # The container is gone by now and its changes are saved: nothing names the unit.
    assert done(world.pass_()) == ["container_gone"] and not world.ledger.usage().taken()


@pytest.mark.parametrize("point", ["created", "bound", "started"])
def test_reconcile_docker_failure_of_a_start_leaves_nothing(world: DockerWorld, point: str) -> None:
    row = world.reserve("alice", WHOLE)
    made = world.create(row, WHOLE)
    if point != "created":
        world.bind(row, made)
    if point == "started":
        world.engine.start(made)
    tags = world.engine.image_facts(world.engine.inspect_facts(made).image_ref).tags
    world.turn(minutes=3)
    assert done(world.pass_()) == ["start_died"]
    assert not world.ours() and not world.ledger.usage().taken() and not world.ledger.allocations()
    left = world.engine.image_facts(TINY_TAG).tags
    assert TINY_TAG in left and not [tag for tag in left if world.mark in tag and tag in tags]


def test_reconcile_docker_start_behind_our_back_is_stopped(world: DockerWorld) -> None:
    held, empty = world.start("held", WHOLE), world.start("empty")
    world.hold(held, hours=1)
    world.hold(empty)
    assert not world.pass_().outcomes
    world.engine.start(held.container_id or "")
    world.engine.start(empty.container_id or "")
    began = time.monotonic()
    assert done(world.pass_()) == ["started_behind", "started_behind"]
    assert time.monotonic() - began < 5 and not world.running()
    assert world.ledger.usage().taken() == {WHOLE}


def test_reconcile_docker_container_that_is_gone_or_ended(world: DockerWorld) -> None:
    gone, ended = world.start("gone", WHOLE), world.start("ended", MIG_1G)
    world.engine.remove(gone.container_id or "", force=True)
    world.engine.kill(ended.container_id or "")
    world.turn(minutes=3)
    assert done(world.pass_()) == ["container_ended", "container_gone"]
    assert world.ledger.usage().taken() == {MIG_1G}
    assert "137" in world.again(ended).reason


def test_reconcile_docker_two_installations_never_touch_each_other(worlds: Make) -> None:
    """Each of the two has something of every kind that is repaired; the other sees foreign containers only."""
    one, two = worlds("one"), worlds("two")
    for world in (one, two):
        world.start("active", WHOLE)
        over = world.start("over", MIG_1G)
        world.hold(over, minutes=-1)
        world.create(world.reserve("died", MIG_2G), MIG_2G)
        old = world.start("old")
        world.ledger.release(old.id, "test")
        world.turn(minutes=3)
        assert len(world.ours()) == 4
    theirs = plain(two.ledger.allocations(live=False)), plain(tuple(two.ours().values()))
    assert done(one.pass_()) == ["hold_ended", "outdated", "start_died"]
    assert (plain(two.ledger.allocations(live=False)), plain(tuple(two.ours().values()))) == theirs
    assert not [f for f in one.pass_().alerts if two.mark in f.subject]
    own = plain(tuple(one.ours().values()))
    assert done(two.pass_()) == ["hold_ended", "outdated", "start_died"]
    assert plain(tuple(one.ours().values())) == own
    assert len(one.running()) == len(two.running()) == 1


def test_reconcile_docker_restored_older_ledger_stops_nobody(world: DockerWorld) -> None:
    held = world.start("held", MIG_1G)
    world.hold(held, hours=1)
    world.pass_()
    backup = world.folder / "backup.sqlite"
    world.backup(backup)
    world.reserve("held", MIG_1G)
    world.engine.start(held.container_id)
    world.ledger.activate(held.id)
    newer = world.start("newer", WHOLE)
    running = world.running()
    assert running == {held.container_id, newer.container_id}
    last = world.ledger.last_token()
    world.runtime.ledger.close()
    world.open(backup)
    for minutes in (0, 5, 90):
        world.turn(minutes=minutes)
        report = world.pass_()
        assert world.running() == running and not [o for o in report.done if o.finding.action.value == "stop"]
        assert {f.what.value for f in report.alerts} == {"unknown", "started_unseen"}
    assert world.ledger.last_token() >= last
    assert world.ledger.usage().taken() == {MIG_1G}, "what may be in use is not freed"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # docker-py leaves the socket open
def test_reconcile_docker_away_changes_nothing(world: DockerWorld, tmp_path: Path) -> None:
    row = world.start("alice", WHOLE)
    world.hold(row, minutes=-1)
    before = plain(world.ledger.allocations(live=False)), plain(tuple(world.ours().values()))
    real = world.engine
    world.runtime.engine = Engine(f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(EngineError, match="does not answer"):
        world.pass_()
    gc.collect()
    world.runtime.engine = real
    assert (plain(world.ledger.allocations(live=False)), plain(tuple(world.ours().values()))) == before
