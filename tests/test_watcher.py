"""The watcher's parts in one process: pictures, complaints, sources that come late, threads that do not wait."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from reconcile_scene import BOX, MIG_1G, NOW, WHOLE, container
from reconcile_world import World
from watcher_world import write_policy

from ds01spawner import watcher
from ds01spawner.containers.engine import EngineEvent
from ds01spawner.containers.facts import EngineInfo
from ds01spawner.errors import Busy, EngineError, InventoryError, PolicyInvalid
from ds01spawner.gpu.source import GpuProcess, InventorySource, NoInventory
from ds01spawner.model import Inventory
from ds01spawner.reconcile.findings import Report
from ds01spawner.watcher import Complaints, GpuSource, Observer, Signals, Watcher, guard_process, lock


class Gpus(InventorySource):
    """A source of values."""

    def __init__(self, inventory: Inventory = BOX) -> None:
        self.inventory = inventory
        self.closed = 0
        self.fails = ""

    def read(self) -> Inventory:
        if self.fails:
            raise InventoryError(self.fails)
        return self.inventory

    def processes(self) -> tuple[GpuProcess, ...]:
        return ()

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def gpus() -> Gpus:
    return Gpus()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    write_policy(tmp_path)
    made.runtime._info = EngineInfo("20.10", (1, 41), "cgroupfs", 1)
    yield made
    made.close()


@pytest.fixture
def observer(world: World, gpus: Gpus) -> Observer:
    return Observer(world.runtime, GpuSource("nvml", opened=lambda _setting: gpus))


# --------------------------------------------------------------------------- pictures


def test_watcher_picture_has_the_box_and_who_else_holds_it(world: World, observer: Observer) -> None:
    world.start("alice", WHOLE)
    other = container(1, MIG_1G, number="x", instance="ffffffff-1111-4222-8333-444444444444")
    world.engine.found["x"] = replace(other, name="foreign")
    snapshot = observer.observe()
    assert snapshot == world.ledger.read_snapshot() == observer.snapshot
    assert snapshot.inventory == BOX and snapshot.at == world.now and snapshot.boot_id
    assert [(e.unit_uuid, e.holder) for e in snapshot.external] == [(MIG_1G, "foreign")]


def test_watcher_picture_is_as_old_as_its_beginning(world: World, observer: Observer) -> None:
    """A look that lasted for twenty seconds is no evidence at its end."""
    world.engine.before = [lambda: world.turn(seconds=20)]
    snapshot = observer.observe()
    assert snapshot.at == NOW and snapshot.stale(world.now)


@pytest.mark.parametrize("broken", ["gpus", "docker", "policy"])
def test_watcher_without_evidence_writes_no_picture(
    world: World, observer: Observer, gpus: Gpus, broken: str, tmp_path: Path
) -> None:
    if broken == "gpus":
        gpus.fails = "the driver does not answer"
    if broken == "docker":
        world.engine.fails["list"] = "no answer"
    if broken == "policy":
        (tmp_path / "profiles.yaml").write_text("profiles: [")
    with pytest.raises((InventoryError, EngineError, PolicyInvalid)):
        observer.observe()
    assert world.ledger.read_snapshot() is None


def test_watcher_summary_is_written_when_it_changed_and_once_a_minute(
    world: World, observer: Observer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    clock = [1000.0]
    monkeypatch.setattr("ds01spawner.watcher.time.monotonic", lambda: clock[0])
    for users in ((), (), ("alice",), ("bob",), ()):
        for user in users:
            world.start(user, WHOLE if user == "alice" else MIG_1G)
        observer.observe()
        clock[0] += 25
    lines = [r.getMessage() for r in caplog.records if r.name == "ds01.watcher"]
    assert [line.split(" leased")[0][-1] for line in lines] == ["0", "2"], lines


# --------------------------------------------------------------------------- sources that come late


def test_watcher_source_is_opened_again_after_it_could_not_be() -> None:
    answers: list[InventorySource | str] = ["no driver", "no driver", Gpus()]

    def opened(setting: str) -> InventorySource:
        assert setting == "auto"
        answer = answers.pop(0)
        if isinstance(answer, str):
            raise InventoryError(answer)
        return answer

    source = GpuSource("auto", opened=opened)
    for _ in range(2):
        with pytest.raises(InventoryError):
            source.get()
    assert source.get() is source.get() and not answers


def test_watcher_source_auto_looks_again_for_gpus_that_come_late() -> None:
    now = [0.0]
    late: list[InventorySource] = [NoInventory(), NoInventory(), Gpus()]
    source = GpuSource("auto", opened=lambda _setting: late.pop(0), clock=lambda: now[0])
    assert isinstance(source.get(), NoInventory)
    now[0] = 59
    assert len(late) == 2 and isinstance(source.get(), NoInventory) and len(late) == 2
    now[0] = 60
    assert isinstance(source.get(), NoInventory) and len(late) == 1
    now[0] = 120
    assert isinstance(source.get(), Gpus)
    now[0] = 999
    found = source.get()
    assert isinstance(found, Gpus)
    source.close()
    assert found.closed == 1
    none = GpuSource("none", opened=lambda _setting: NoInventory(), clock=lambda: now[0])
    assert none.get() is none.get()


# --------------------------------------------------------------------------- complaints


def test_watcher_complaints_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stop = threading.Event()
    complaints = Complaints(stop)
    answers: list[Exception | None] = [
        *[EngineError("no answer")] * 3,
        EngineError("another"),
        None,
        None,
        *[ValueError("bug")] * 2,
        None,
    ]

    def action() -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    worked = [complaints.attempt("observe", action) for _ in range(len(answers))]
    assert worked == [False] * 4 + [True] * 2 + [False] * 2 + [True]
    said = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert said == [
        ("WARNING", "observe: no answer"),
        ("WARNING", "observe: another"),
        ("INFO", "observe: works again"),
        ("ERROR", "observe: unexpected failure"),
        ("INFO", "observe: works again"),
    ]
    assert caplog.records[3].exc_info, "a bug comes with its traceback"
    stop.set()
    answers.append(EngineError("closed"))
    complaints.attempt("observe", action)
    assert len(caplog.records) == 5, "what fails because all is being closed is no news"


# --------------------------------------------------------------------------- the threads


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything happens thirty times as often."""
    for name, value in {"SNAPSHOT_EVERY_S": 0.1, "SPACING_S": 0.05, "DEBOUNCE_S": 0.02, "EXIT_S": 0.4}.items():
        monkeypatch.setattr(watcher, name, value)


class Running:
    """A watcher's threads, with a Docker whose events the test sends."""

    def __init__(self, world: World, observer: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.signals = world, Signals()
        self.events: queue.Queue[EngineEvent | Exception] = queue.Queue()
        self.looks = 0
        self.passes = 0
        monkeypatch.setattr(world.engine, "events", self.follow)
        inner = observer.observe

        def observe() -> object:
            self.looks += 1
            return inner()

        monkeypatch.setattr(observer, "observe", observe)
        self.watcher = Watcher(world.runtime, observer, self.signals)
        run = self.watcher._reconciler.run

        def counted(**options: object) -> Report:
            self.passes += 1
            return run(**options)  # type: ignore[arg-type]

        monkeypatch.setattr(self.watcher._reconciler, "run", counted)
        self.thread = threading.Thread(target=self.watcher.run)

    def follow(self, since: float | None = None) -> Iterator[EngineEvent]:
        while not self.signals.stop.is_set():
            try:
                event = self.events.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(event, Exception):
                raise event
            yield event

    def event(self, action: str, *, ours: bool = False) -> None:
        labels = {"ds01.instance": self.world.ledger.instance} if ours else {}
        self.events.put(EngineEvent("container", action, "x", 1.0, labels))

    def wait(self, condition: object, what: str) -> None:
        deadline = time.monotonic() + 5
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < deadline, f"not: {what}"
            time.sleep(0.01)


@pytest.fixture
def running(world: World, observer: Observer, monkeypatch: pytest.MonkeyPatch, quick: None) -> Iterator[Running]:
    made = Running(world, observer, monkeypatch)
    yield made
    made.signals.end()
    made.thread.join(5)
    assert not made.thread.is_alive()


def test_watcher_looks_and_reconciles_by_itself(running: Running) -> None:
    running.thread.start()
    running.wait(lambda: running.looks > 3 and running.passes == 1, "looks, and one pass at the start")
    assert running.world.ledger.audit_rows(action="box.layout"), "the pass had a picture"


def test_watcher_slow_reconcile_delays_no_picture(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    release, began = threading.Event(), threading.Event()

    def slow(**_options: object) -> Report:
        began.set()
        release.wait(5)
        return Report()

    monkeypatch.setattr(running.watcher._reconciler, "run", slow)
    running.thread.start()
    running.wait(began.is_set, "the pass began")
    looks = running.looks
    running.wait(lambda: running.looks > looks + 4, "looks go on")
    release.set()


def test_watcher_slow_repair_delays_no_pass(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    world, release, began = running.world, threading.Event(), threading.Event()
    world.hold(world.start("over", WHOLE), minutes=-1)
    back = world.start("behind", MIG_1G)
    world.hold(back, hours=1)

    def slow(*_arguments: object) -> None:
        began.set()
        release.wait(5)

    monkeypatch.setattr("ds01spawner.reconcile.apply.strip", slow)
    running.thread.start()
    running.wait(began.is_set, "the repair began")
    world.turn(seconds=1)
    world.engine.run(back.container_id or "")
    running.event("start", ours=True)
    running.wait(lambda: not world.engine.found[back.container_id or ""].running, "it is stopped meanwhile")
    assert not release.is_set()
    release.set()


def test_watcher_events_wake_it(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "SNAPSHOT_EVERY_S", 60.0)
    running.thread.start()
    running.wait(lambda: running.passes == 1 and running.looks >= 1, "the start")
    running.wait(lambda: not running.signals.look.is_set(), "all quiet")
    looks, passes = running.looks, running.passes
    running.event("exec_start: sh")
    running.event("top")
    time.sleep(0.3)
    assert (running.looks, running.passes) == (looks, passes), "what changes nothing wakes nobody"
    for _ in range(20):
        running.event("start")
    running.wait(lambda: running.looks > looks, "a look")
    time.sleep(0.2)
    assert running.looks - looks <= 3, "a burst is one look, or two"
    assert running.passes == passes, "foreign containers need no pass"
    running.event("start", ours=True)
    running.wait(lambda: running.passes > passes, "a pass")


def test_watcher_goes_on_when_events_break_off(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    running.thread.start()
    for _ in range(3):
        running.events.put(EngineError("Docker went away"))
    running.wait(running.events.empty, "all were taken")
    running.event("start", ours=True)
    running.wait(lambda: running.passes > 1, "events are followed again")
    assert len([r for r in caplog.records if "Docker went away" in r.getMessage()]) == 1


def test_watcher_goes_on_after_a_bug_in_a_pass(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_options: object) -> Report:
        running.passes += 1
        raise ZeroDivisionError

    monkeypatch.setattr(running.watcher._reconciler, "run", broken)
    running.thread.start()
    running.wait(lambda: running.passes == 1, "the first pass")
    running.event("start", ours=True)
    running.wait(lambda: running.passes == 2, "the next pass")


# --------------------------------------------------------------------------- the end, the lock


@pytest.mark.parametrize("cause", ["signal", "hub"])
def test_watcher_warden_ends_the_process(monkeypatch: pytest.MonkeyPatch, cause: str) -> None:
    monkeypatch.setattr(watcher, "EXIT_S", 0.05)
    signals, left = Signals(), []
    alive = [True]
    warden = threading.Thread(target=guard_process, args=(signals, lambda: alive[0], left.append))
    warden.start()
    time.sleep(0.4)
    assert warden.is_alive() and not signals.stop.is_set()
    if cause == "signal":
        signals.asked = True
    else:
        alive[0] = False
    warden.join(3)
    assert signals.stop.is_set() and signals.look.is_set() and signals.check.is_set()
    assert left == [0], "the process is left even if a thread hangs"


def test_watcher_lock_tells_who_holds_it(tmp_path: Path) -> None:

    first = lock(tmp_path / "watcher.lock", 0)
    began = time.monotonic()
    with pytest.raises(Busy, match=rf"process {os.getpid()} holds .*watcher.lock") as error:
        lock(tmp_path / "watcher.lock", 0.3)
    assert 0.3 <= time.monotonic() - began < 2 and error.value.exit_code == 24
    os.close(first)
    os.close(lock(tmp_path / "watcher.lock", 0))
