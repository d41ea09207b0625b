"""One Spawner object through failures, cancellations and second starts, without a Hub.

The steps of a start are stand-ins that fail or wait when told to; all of `DS01Spawner` is real.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from tornado import web

from ds01spawner import spawner as module
from ds01spawner.errors import EngineError
from ds01spawner.progress import QUOTA, StartQueue
from ds01spawner.servers import Observation
from ds01spawner.spawner import DS01Spawner


class Steps:
    """A stand-in for `Launch`: tells which steps ran, fails or waits at one of them."""

    def __init__(self) -> None:
        self.fail_at = ""
        self.wait_at = ""
        self.error: Exception = EngineError("no")
        self.go_on = threading.Event()
        self.undo_may_end = threading.Event()
        self.undo_may_end.set()
        self.ran: list[str] = []
        self.taken_back = 0
        self.launches = 0

    def __call__(self, _runtime: Any, _person: Any, _server: str, report: Any) -> Any:
        self.launches += 1
        self.ran.clear()
        self.go_on.clear()
        report(QUOTA, f"start {self.launches}")
        step = {name: self._step(name) for name in ("admit", "fetch_image", "create", "finish", "require_running")}
        return SimpleNamespace(
            **step,
            start=self._step("start", "127.0.0.1"),
            disk_note=lambda: "",
            never_answered=lambda seconds: EngineError(f"silent for {seconds}"),
            take_back=self._take_back,
            current=None,
            api_token=None,
            container_id=f"container-{self.launches}",
            container_name="main._.70000",
            once=(),
        )

    def _step(self, name: str, result: Any = None) -> Any:
        def run(*_: Any) -> Any:
            self.ran.append(name)
            if name == self.wait_at:
                assert self.go_on.wait(10)
            if name == self.fail_at:
                raise self.error
            return result

        return run

    async def reach(self, name: str) -> None:
        """Wait until that step runs."""
        deadline = time.monotonic() + 10
        while name not in self.ran:
            assert time.monotonic() < deadline, f"{name} was never reached: {self.ran}"
            await asyncio.sleep(0.01)

    def _take_back(self, _error: BaseException) -> None:
        self.go_on.set()
        assert self.undo_may_end.wait(10)
        self.taken_back += 1


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """What the next starts do; the server answers at once."""
    found = Steps()

    async def answer(*_: Any) -> bool:
        return True

    monkeypatch.setattr(module, "Launch", found)
    monkeypatch.setattr(module, "answers", answer)
    return found


@pytest.fixture
def one(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> Iterator[DS01Spawner]:
    """A spawner of a user, whose runtime is threads only."""
    with ThreadPoolExecutor(4) as threads:
        runtime = SimpleNamespace(
            threads=threads, pulls=threads, ends=threads, admissions=threads, starts=StartQueue(1), ledger=None
        )
        monkeypatch.setattr(DS01Spawner, "runtime", property(lambda _: runtime))
        monkeypatch.setattr(DS01Spawner, "_hub_side", lambda _: None)
        monkeypatch.setattr(DS01Spawner, "_settle_token", lambda *_: None)
        monkeypatch.setattr(DS01Spawner, "_log_name", "alice")
        made = DS01Spawner()
        made.user = SimpleNamespace(name="alice", groups=[], admin=False, settings={}, db=None)
        made.user_options = {}
        yield made


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What Docker says of the container, and what was settled."""
    found = SimpleNamespace(running=True, settled=[])
    monkeypatch.setattr(module.servers, "observe", lambda *_: Observation(found.running))
    monkeypatch.setattr(module.servers, "settle", lambda *args: found.settled.append(args[2:]) or False)
    return found


async def messages(spawner: DS01Spawner) -> list[str]:
    """What a page that opens now reads."""
    return [event["message"] async for event in spawner.progress()]


async def test_trap_t17_second_start_on_the_same_object_begins_anew(one: DS01Spawner, steps: Steps) -> None:
    """Fails if start() keeps the log, the container or the end of the start before."""
    steps.fail_at = "start"
    with pytest.raises(web.HTTPError):
        await one.start()
    assert one.object_id == "" and steps.taken_back == 1 and one._launch is None
    first = one._log
    steps.fail_at = ""
    one._ended = True
    assert await one.start() == ("127.0.0.1", one.port)
    assert one.object_id == "container-2" and not one._ended and one.will_resume
    told = await messages(one)
    assert "start 2" in told and "start 1" not in told and one._log is not first


async def test_trap_t19_reader_who_comes_before_the_start_is_not_sent_away(one: DS01Spawner, steps: Steps) -> None:
    """Fails if progress() ends when there is no start yet: the Hub drops everything after the generator's end."""
    early = asyncio.ensure_future(messages(one))
    await asyncio.sleep(0.05)
    assert not early.done()
    await one.start()
    assert (await early)[0] == "start 1"


async def test_trap_t06_cancelled_start_returns_at_once_and_poll_waits_for_its_undo(
    one: DS01Spawner, steps: Steps, docker: SimpleNamespace
) -> None:
    """Fails if start() waits for the undo: the Hub looks again after one second and gives up on a pending spawner."""
    steps.wait_at = "create"
    steps.undo_may_end.clear()
    start = asyncio.ensure_future(one.start())
    await steps.reach("create")
    began = time.monotonic()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert time.monotonic() - began < 0.5 and steps.taken_back == 0
    docker.running = False
    poll = asyncio.ensure_future(one.poll())
    await asyncio.sleep(0.1)
    assert not poll.done(), "the Hub must not hear that all is over yet"
    steps.undo_may_end.set()
    assert await poll == 0 and steps.taken_back == 1
    assert docker.settled == [], "a start that was taken back has nothing to settle"


async def test_failure_undo_goes_on_when_whoever_waits_for_it_is_cancelled(one: DS01Spawner, steps: Steps) -> None:
    """Fails without the thread and the shield around the undo: a second cancellation would leave half of it."""
    steps.fail_at = "create"
    steps.undo_may_end.clear()
    start = asyncio.ensure_future(one.start())
    await steps.reach("create")
    await asyncio.sleep(0.05)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    waiting = asyncio.ensure_future(one.poll())
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    steps.undo_may_end.set()
    await one._undone()
    assert steps.taken_back == 1


async def test_failure_stop_during_a_start_takes_it_back(one: DS01Spawner, steps: Steps) -> None:
    """Fails if stop() looks for a container that is still being made."""
    steps.wait_at = "create"
    steps.error = module.Cancelled("given up")
    steps.fail_at = "create"
    start = asyncio.ensure_future(one.start())
    await steps.reach("create")
    assert await one.poll() is None, "pending is not dead"
    await one.stop()
    assert steps.taken_back >= 1
    with pytest.raises(web.HTTPError):
        await start
    assert one.object_id == "" and not one.will_resume


async def test_failure_places_in_line_come_back_after_every_end(one: DS01Spawner, steps: Steps) -> None:
    """Fails without the `finally` of `StartQueue.slot`; the queue of this test has one place."""
    for step in ("create", "start", "finish"):
        steps.fail_at = step
        with pytest.raises(web.HTTPError):
            await one.start()
    steps.fail_at, steps.wait_at = "", "start"
    start = asyncio.ensure_future(one.start())
    await steps.reach("start")
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    steps.wait_at = ""
    await asyncio.wait_for(one.start(), 5)


@pytest.mark.parametrize(
    "error", [KeyError("inner"), RuntimeError("inner"), OSError(5, "inner"), TimeoutError("inner")]
)
async def test_failure_of_an_unforeseen_kind_is_one_sentence(one: DS01Spawner, steps: Steps, error: Exception) -> None:
    """Fails without the last lines of `_tell`."""
    steps.fail_at, steps.error = "create", error
    with pytest.raises(web.HTTPError) as told:
        await one.start()
    assert "wrong inside the Hub" in vars(told.value)["jupyterhub_message"] and "inner" not in str(told.value)
    assert steps.taken_back == 1


async def test_failure_of_a_running_server_is_settled_once(
    one: DS01Spawner, steps: Steps, docker: SimpleNamespace
) -> None:
    """Fails if each of the Hub's polls settles again, or a server that never started is settled."""
    docker.running = False
    assert await one.poll() == 0 and docker.settled == []
    docker.running = True
    await one.start()
    assert await one.poll() is None and docker.settled == []
    docker.running = False
    assert await one.poll() == 0
    assert await one.poll() == 0
    assert len(docker.settled) == 1 and not one.will_resume


async def test_failure_of_a_stop_is_tried_again_and_then_left_to_the_watcher(
    one: DS01Spawner, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if stop() raises: the Hub would forget the server."""
    postponed: list[str] = []
    tries: list[int] = []

    def end(*_: Any, **__: Any) -> bool:
        tries.append(1)
        raise EngineError("away")

    monkeypatch.setattr(module, "STOP_PATIENCE_S", 0.1)
    monkeypatch.setattr(module, "STOP_RETRY_S", 0.03)
    monkeypatch.setattr(module.servers, "end", end)
    monkeypatch.setattr(module.servers, "postpone", lambda *args: postponed.append(args[-1]))
    await one.start()
    await one.stop()
    assert len(tries) > 1 and postponed == ["stop: away"] and one.will_resume
