"""Starts that fail at every point, on a real Hub with real containers: nothing is left, and a person is told why."""

from __future__ import annotations

import signal
import time

import pytest
from stub_hub import STARTS, StubHub

pytestmark = [pytest.mark.docker, pytest.mark.hub]

POINTS = [
    ("reserve", "after"),
    ("image_facts", "before"),
    ("create", "before"),
    ("create", "after"),
    ("bind", "after"),
    ("start", "before"),
    ("start", "after"),
    ("activate", "after"),
    ("finish", "before"),
]


@pytest.mark.parametrize(("step", "when"), POINTS)
@pytest.mark.parametrize("kind", ["bug", "docker"])
def test_failure_at_each_step_leaves_nothing_and_says_one_sentence(
    stub: StubHub, step: str, when: str, kind: str
) -> None:
    """Fails without `DS01Spawner._take_back` (leftovers) and without `_tell` (the inner detail shows)."""
    stub.add_user("alice")
    with stub.fault(step, when, kind):
        answer = stub.ask("alice", {"profile": "small"})
    assert answer.status_code >= 500, answer.text
    message = answer.json()["message"]
    assert "ordered by the test" in message if kind == "docker" else "wrong inside the Hub" in message, message
    assert "inner detail" not in answer.text and "Traceback" not in answer.text
    stub.finished("alice")
    stub.clean()
    if kind == "bug" and step == "bind":
        stub.spawn("alice", {"profile": "small"})  # and the way is free


def test_failure_of_a_bug_is_in_the_log_with_its_story(stub: StubHub) -> None:
    """Fails without the log line in `DS01Spawner._tell`."""
    stub.add_user("alice")
    before = stub.logged("KeyError: 'an inner detail'")
    with stub.fault("create", "before", "bug"):
        stub.ask("alice", {"profile": "cpu"})
    assert stub.logged("KeyError: 'an inner detail'") > before


def waits(stub: StubHub, user: str, profile: str, step: str, when: str = "before") -> None:
    """Ask for a start and return when it waits at `step` (in a `fault(…, "wait")` block)."""
    stub.ask_aside(user, {"profile": profile})
    stub.reached(step, when)


@pytest.mark.parametrize("step", ["image_facts", "create", "start", "finish"])
def test_trap_t06_failure_by_delete_while_pending_at_each_step(stub: StubHub, step: str) -> None:
    """Fails without the `except BaseException` of start(): stop() is never called for a start that was cancelled."""
    with stub.fault(step, "before", "wait"):
        waits(stub, "alice", "small", step)
        began = time.monotonic()
        assert stub.api("DELETE", "users/alice/server").status_code in (202, 204)
        assert time.monotonic() - began < 12, "the Hub's DELETE came back"
    stub.finished("alice")
    stub.clean()
    stub.spawn("alice", {"profile": "small"})


def test_failure_by_delete_while_it_waits_for_a_slot_gives_the_place_back(stub: StubHub) -> None:
    """Fails without the `finally` of `StartQueue.slot` and the clean-up of `StartQueue.enter`: later starts hang."""
    with stub.fault("create", "before", "wait"):
        names = ["alice", "bob", "carol", "zoe"]
        for name in names:
            stub.ask_aside(name, {"profile": "cpu"})
        stub.reached("create")
        stub.wait(lambda: any("in line" in e["message"] for n in names for e in stub.peek(n)), "somebody is in line")
        for name in names:
            assert stub.api("DELETE", f"users/{name}/server").status_code in (202, 204)
    for name in names:
        stub.finished(name)
    stub.clean()
    with stub.fault("create", "before", "wait"):  # and all places can be had at once
        for name in names[:STARTS]:
            stub.ask_aside(name, {"profile": "cpu"})
        stub.wait(
            lambda: all("Preparing" in " ".join(e["message"] for e in stub.peek(n)) for n in names[:STARTS]),
            "all are in",
        )


def test_trap_t06_failure_by_start_timeout_at_a_step_that_hangs(stub: StubHub) -> None:
    """Fails without the `except BaseException` of start(): the timeout arrives as a cancellation (trap T6)."""
    with stub.fault("start", "before", "wait"), stub.setting("start_timeout", 2):
        waits(stub, "bob", "small", "start")
        time.sleep(3)
    stub.finished("bob")
    stub.clean()


def test_failure_of_a_server_that_never_answers_tells_its_last_words(stub: StubHub) -> None:
    """Fails without the deadline of `_first_answer` (the Hub's own timeout knows no last words)."""
    stub.add_user("alice")
    answer = stub.ask("alice", {"profile": "silent"})
    assert answer.status_code == 500
    assert "did not answer within 6 seconds. Its last words: I am waiting" in answer.json()["message"]
    stub.finished("alice")
    stub.clean()


def test_failure_of_a_container_that_ends_at_once_is_told_at_once(stub: StubHub) -> None:
    """Fails without `require_running` in start() and `_first_answer`: the person would wait for `http_timeout`."""
    stub.add_user("alice")
    began = time.monotonic()
    answer = stub.ask("alice", {"profile": "dies"})
    assert answer.status_code == 500, answer.text
    assert "exit code 3" in answer.json()["message"] and "no such module" in answer.json()["message"]
    assert time.monotonic() - began < 5
    stub.finished("alice")
    stub.clean()


def test_failure_of_a_reused_container_keeps_it_and_its_files(stub: StubHub) -> None:
    """Fails if `undo` removes what this start did not make, or forgets to stop it."""
    stub.spawn("alice", {"profile": "cpu"})
    first = stub.container("alice")
    stub.halt("alice")
    with stub.fault("finish", "before", "bug"):
        assert stub.ask("alice", {"profile": "cpu"}).status_code == 500
    stub.finished("alice")
    after, allocation = stub.container("alice"), stub.allocation("alice")
    assert first is not None and after is not None and allocation is not None
    assert after.id == first.id and not after.running
    assert allocation.state.value == "held" and allocation.token == allocation.container_token
    stub.spawn("alice", {"profile": "cpu"})
    again = stub.container("alice")
    assert again is not None and again.id == first.id


def test_failure_does_not_lengthen_a_hold(stub: StubHub) -> None:
    """Fails if `undo` sets a new end: failing on purpose would keep a GPU for ever."""
    stub.change_limits(defaults={"gpu_hold_after_stop": "1h"})
    stub.spawn("alice", {"profile": "small"})
    stub.halt("alice")
    before = stub.allocation("alice")
    assert before is not None and before.held_until is not None and before.leases
    for step, when in (("image_facts", "before"), ("activate", "after")):
        with stub.fault(step, when, "bug"):
            assert stub.ask("alice", {"profile": "small"}).status_code == 500
        stub.finished("alice")
        after = stub.allocation("alice")
        assert after is not None and after.held_until == before.held_until and after.leases, (step, after)


def test_failure_after_the_old_container_was_replaced_leaves_its_files_in_the_list(stub: StubHub) -> None:
    """Fails if a failed re-creation releases nothing (the old container is gone), or loses what was saved."""
    stub.spawn("rich", {"profile": "small"})
    first = stub.container("rich")
    assert first is not None
    inside(stub, first.id, "mkdir -p /opt/mine && echo precious > /opt/mine/file")
    stub.halt("rich")
    with stub.fault("start", "before", "docker"):
        assert stub.ask("rich", {"profile": "whole"}).status_code == 503
    stub.finished("rich")
    stub.clean()
    assert len(stub.runtime.ledger.images_of("rich")) == 1
    stub.spawn("rich", {"profile": "whole"})
    again = stub.container("rich")
    assert again is not None and inside(stub, again.id, "cat /opt/mine/file").strip() == "precious"


def inside(stub: StubHub, container: str, script: str) -> str:
    """What a shell as root prints inside."""
    client = stub.runtime.engine.client
    made = client.exec_create(container, ["sh", "-c", script], user="root")
    return str(client.exec_start(made["Id"]).decode())


def test_failure_of_the_ledger_for_the_row_undoes_the_start(stub: StubHub) -> None:
    """Fails if a granted request may go on without its row (every request is one)."""
    stub.add_user("alice")
    with stub.fault("record_request", "before", "docker"):
        assert stub.ask("alice", {"profile": "small"}).status_code == 503
    stub.finished("alice")
    stub.clean()


def test_trap_t07_failure_of_the_hub_killed_in_the_middle_of_a_first_start(stub: StubHub) -> None:
    """Fails without the operation row and the token on the container: nobody could tell whose it is."""
    for step, when in (("create", "after"), ("start", "before")):
        with stub.fault(step, when, "wait"):
            waits(stub, "alice", "small", step, when)
            stub.end(signal.SIGKILL)
            stub.no_faults()
        stub.start()
        stub.finished("alice")
        stub.clean(timeout=40)


def test_trap_t07_failure_of_the_hub_ended_in_the_middle_of_a_start(stub: StubHub) -> None:
    """Fails if the undo is a task of the event loop: the Hub cancels those when it is told to end."""
    with stub.fault("create", "after", "wait"):
        waits(stub, "alice", "small", "create", "after")
        assert stub.process is not None
        ended = stub.logged("...done")
        stub.process.terminate()
        stub.wait(lambda: stub.logged("...done") > ended, "the Hub has cleaned up")
        time.sleep(1)  # now it cancels what is pending
        stub.no_faults()
        stub.process.wait(20)
    stub.clean(timeout=5)  # no watcher is there to help
    stub.end()
    stub.start()
    stub.finished("alice")
    stub.clean()


def test_trap_t07_failure_of_the_hub_killed_while_the_server_boots_goes_on_with_it(stub: StubHub) -> None:
    """Fails without the look into the ledger in `poll` and without `get_url`: the Hub has no state of it."""
    with stub.fault("finish", "before", "wait"):
        waits(stub, "alice", "small", "finish")
        before = stub.container("alice")
        stub.end(signal.SIGKILL)
        stub.no_faults()
    stub.start()
    stub.wait(lambda: (stub.server("alice") or {}).get("ready"), "the Hub has taken the server over")
    after = stub.container("alice")
    assert before is not None and after is not None and after.id == before.id and after.running
    assert stub.api("GET", "users/alice").json()["servers"][""]["state"]["object_id"] == before.id
    stub.halt("alice")
    assert not stub.runtime.ledger.usage().taken()
