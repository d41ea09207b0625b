"""One hand at a time: operation rows, heartbeats, taking over from the dead."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from ledger_world import Clock, running
from sqlalchemy import update

from ds01spawner.errors import Busy, Code, LedgerError
from ds01spawner.ledger import operations, tables
from ds01spawner.ledger.operations import Process
from ds01spawner.ledger.store import Ledger, utcnow

HOLDER = """
import sys, time
from ds01spawner.ledger.store import Ledger
ledger = Ledger.open(sys.argv[1])
with ledger.operation(int(sys.argv[2]), "start", "alice"):
    print("holding", flush=True)
    time.sleep(60)
"""


def test_a_second_hand_is_told_what_who_and_since_when(ledger: Ledger, clock: Clock) -> None:
    made = running(ledger)
    with ledger.operation(made.id, "commit", "alice"):
        clock.turn(seconds=30)
        with (
            pytest.raises(Busy, match=r"'commit' by alice .* since 12:00:00 UTC") as caught,
            ledger.operation(made.id, "stop", "watcher"),
        ):
            pytest.fail("two hands")
        facts = caught.value.facts
        assert (facts["what"], facts["who"], facts["since"]) == ("commit", "alice", "2026-03-01T12:00:00+00:00")
        assert caught.value.code is Code.BUSY
        (row,) = ledger.operations()
        assert (row.allocation_id, row.what, row.who, row.stale) == (made.id, "commit", "alice", False)
        assert row.process == Process.current().name
    with ledger.operation(made.id, "stop", "watcher"):
        pass
    assert ledger.operations() == ()


def test_operations_of_different_servers_do_not_meet(ledger: Ledger) -> None:
    first, second = running(ledger), running(ledger, user="bob")
    with ledger.operation(first.id, "start", "alice"), ledger.operation(second.id, "start", "bob"):
        assert [row.who for row in ledger.operations()] == ["alice", "bob"]


def test_the_row_goes_when_the_work_fails(ledger: Ledger) -> None:
    made = running(ledger)
    with pytest.raises(KeyboardInterrupt), ledger.operation(made.id, "start", "alice"):
        raise KeyboardInterrupt
    assert ledger.operations() == ()


def test_an_operation_needs_an_allocation(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="no allocation 7"), ledger.operation(7, "start", "alice"):
        pytest.fail("entered")


def test_a_stale_heartbeat_is_taken_over_and_the_loser_knows(ledger: Ledger, ledger_url: str, clock: Clock) -> None:
    made = running(ledger)
    with Ledger.open(ledger_url, clock=clock) as other, ledger.operation(made.id, "start", "alice") as lost:
        clock.turn(seconds=60)
        with pytest.raises(Busy), other.operation(made.id, "stop", "watcher"):
            pytest.fail("still fresh")
        clock.turn(seconds=1)
        assert ledger.operations()[0].stale
        with other.operation(made.id, "stop", "watcher") as winner:
            lost.check()  # it cannot know before its next beat
            ledger._beat([lost])
            with pytest.raises(Busy, match="taken over"):
                lost.check()
            winner.check()
            assert [row.what for row in ledger.operations()] == ["stop"]
        (told,) = ledger.audit_rows(action="operation.takeover")
        assert (told.actor, told.subject, told.allocation_id) == ("watcher", "alice/", made.id)
        assert told.before is not None
        assert told.before["what"] == "start"
        with ledger.operation(made.id, "commit", "bob"):
            pass


def test_the_loser_does_not_remove_the_winners_row(ledger: Ledger, ledger_url: str, clock: Clock) -> None:
    made = running(ledger)
    with Ledger.open(ledger_url, clock=clock) as other:
        lost = ledger.operation(made.id, "start", "alice")
        lost.__enter__()
        clock.turn(seconds=61)
        with other.operation(made.id, "stop", "watcher"):
            lost.__exit__(None, None, None)
            assert [row.what for row in other.operations()] == ["stop"]


def test_heartbeats_keep_a_long_operation(ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "BEAT_SECONDS", 0.01)
    made = running(ledger)
    with ledger.operation(made.id, "pull", "alice") as mine:
        for _ in range(3):
            clock.turn(seconds=50)
            deadline = time.monotonic() + 5
            while ledger.operations()[0].beat_at != clock.now and time.monotonic() < deadline:
                time.sleep(0.005)
            assert not ledger.operations()[0].stale
        mine.check()


def test_heartbeats_outlive_a_ledger_that_does_not_answer(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = threading.Event()

    def broken(_held: object) -> None:
        failed.set()
        raise LedgerError("gone")

    monkeypatch.setattr(operations, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(ledger._heart, "_beat", broken)
    made = running(ledger)
    with caplog.at_level(logging.WARNING), ledger.operation(made.id, "pull", "alice"):
        assert failed.wait(5)
        failed.clear()
        assert failed.wait(5)
    assert "Heartbeats could not be renewed" in caplog.text


def test_an_end_that_cannot_be_written_hides_no_error(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = running(ledger)
    with pytest.raises(ValueError, match="the real one"), ledger.operation(made.id, "start", "alice"):
        monkeypatch.setattr(ledger._db, "write", lambda **_: (_ for _ in ()).throw(LedgerError("gone")))
        raise ValueError("the real one")
    assert "stays until it is stale" in caplog.text


def test_failure_kill_9_of_the_holder_frees_its_operation_at_once(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger:
        made = running(ledger)
        command = [sys.executable, "-c", HOLDER, ledger_url, str(made.id)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "holding\n"
            with pytest.raises(Busy, match="'start' by alice"), ledger.operation(made.id, "stop", "watcher"):
                pytest.fail("two hands")
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        with ledger.operation(made.id, "stop", "watcher"):
            pass
        assert len(ledger.audit_rows(action="operation.takeover")) == 1


@pytest.mark.parametrize(
    ("kernel", "age", "stale"), [("other/ns", 59, False), ("other/ns", 61, True), ("other/ns", -61, True)]
)
def test_a_holder_on_another_machine_is_judged_by_the_wall_clock(
    ledger: Ledger, clock: Clock, kernel: str, age: int, stale: bool
) -> None:
    made = running(ledger)
    with ledger.operation(made.id, "start", "alice"):
        with ledger._db.write() as connection:
            foreign = {"boot_id": kernel, "process": "far:1:1", "beat_elapsed": 0.0}
            connection.execute(update(tables.operations).values(foreign))
        clock.turn(seconds=age)
        assert ledger.operations()[0].stale is stale


def test_a_process_in_another_pid_namespace_is_not_called_dead() -> None:
    me = Process.current()
    assert not me.gone()
    host, pid, _start = me.name.rsplit(":", 2)
    assert Process(f"{host}:{pid}:1", me.kernel).gone()  # the pid was used again
    assert not Process(f"{host}:{pid}:1", "boot/pid:[1]").gone()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    zombie = Process(f"{host}:{child}:{me.name.rsplit(':', 1)[1]}", me.kernel)
    assert zombie.gone()  # ended, only not yet waited for
    os.waitpid(child, 0)


def test_steps_of_the_real_clock_make_nothing_stale(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger.open(ledger_url) as ledger:
        made = running(ledger)
        with ledger.operation(made.id, "start", "alice"):
            monkeypatch.setattr(ledger._db, "clock", lambda: utcnow() + timedelta(days=1))
            assert not ledger.operations()[0].stale
