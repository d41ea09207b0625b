"""Progress for many and late readers (trap T19), and the line of starts whose places always come back."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from ds01spawner.progress import ANSWER, CREATE, IMAGE, QUEUE, QUOTA, READY, STAGES, ProgressLog, StartQueue


async def read(log: ProgressLog) -> list[dict[str, Any]]:
    """Everything that one reader gets."""
    return [event async for event in log.read()]


async def settle() -> None:
    """Let everything that is due happen."""
    for _ in range(10):
        await asyncio.sleep(0)


def messages(events: list[dict[str, Any]]) -> list[str]:
    """What the events say."""
    return [event["message"] for event in events]


async def test_progress_late_and_early_readers_get_the_same() -> None:
    log = ProgressLog(asyncio.get_running_loop())
    early = asyncio.ensure_future(read(log))
    await settle()
    log.add(QUOTA, "one")
    log.add(IMAGE, "two")
    await settle()
    late = asyncio.ensure_future(read(log))
    log.add(CREATE, "three")
    log.close()
    assert messages(await early) == messages(await late) == messages(await read(log)) == ["one", "two", "three"]


async def test_progress_percentages_rise_by_stage_and_stay_below_ready() -> None:
    log = ProgressLog(asyncio.get_running_loop())
    for stage in STAGES:
        log.add(stage, f"{stage.name} begins")
        for fraction in (0.0, 0.5, 1.0, 7.0):
            log.add(stage, f"{stage.name} {fraction}", fraction=fraction)
    log.add(READY, "ready")
    log.close()
    percents = [event["progress"] for event in await read(log)]
    assert percents == sorted(percents) and percents[-1] == READY.percent < 100


async def test_progress_figures_replace_each_other_for_late_readers_and_reach_those_who_look() -> None:
    """A pull of an hour is one line for who comes late, not thousands."""
    log = ProgressLog(asyncio.get_running_loop())
    log.add(IMAGE, "Fetching")
    seen: list[str] = []

    async def follow() -> None:
        async for event in log.read():
            seen.append(event["message"])  # noqa: PERF401 - looked at while it grows

    reader = asyncio.ensure_future(follow())
    for done in range(5):
        log.add(IMAGE, f"{done} of 5", fraction=done / 5)
        await settle()
    assert seen == ["Fetching", *(f"{n} of 5" for n in range(5))]
    log.add(QUEUE, "in line")
    log.add(IMAGE, "again", fraction=0.1)
    log.close()
    await reader
    assert messages(await read(log)) == ["Fetching", "4 of 5", "in line", "again"]
    assert seen[-2:] == ["in line", "again"]


async def test_progress_same_event_twice_is_one_and_nothing_comes_after_the_end() -> None:
    log = ProgressLog(asyncio.get_running_loop())
    log.add(QUOTA, "same")
    log.add(QUOTA, "same")
    log.close()
    log.add(READY, "too late")
    assert messages(await read(log)) == ["same"]


async def test_progress_from_threads_while_many_read() -> None:
    log = ProgressLog(asyncio.get_running_loop())
    readers = [asyncio.ensure_future(read(log)) for _ in range(5)]

    def work(name: str) -> None:
        for number in range(50):
            log.add(CREATE, f"{name} {number}")

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    log.close()
    found = [messages(await reader) for reader in readers]
    assert all(each == found[0] for each in found) and len(found[0]) == 150


async def test_progress_html_is_escaped() -> None:
    log = ProgressLog(asyncio.get_running_loop())
    log.add(ANSWER, "<script>alert(1)</script>")
    log.close()
    (event,) = await read(log)
    assert "<script>" not in event["html_message"] and 'data-ds01-stage="first answer"' in event["html_message"]


def test_progress_of_a_hub_that_has_ended_disturbs_nobody() -> None:
    """Fails if a step of a start that is being taken back dies of a closed event loop."""
    loop = asyncio.new_event_loop()
    log = ProgressLog(loop)
    loop.close()
    log.add(QUOTA, "nobody hears")
    log.close()


async def test_progress_log_is_used_once_something_was_said_or_it_ended() -> None:
    loop = asyncio.get_running_loop()
    fresh, said, ended = ProgressLog(loop), ProgressLog(loop), ProgressLog(loop)
    said.add(QUOTA, "x")
    ended.close()
    await settle()
    assert (fresh.used, said.used, ended.used) == (False, True, True)


# --------------------------------------------------------------------------- the line of starts


async def test_progress_line_is_first_come_first_served_and_tells_the_place() -> None:
    queue, order = StartQueue(2), []
    leave = asyncio.Event()
    logs = [ProgressLog(asyncio.get_running_loop()) for _ in range(5)]

    async def start(number: int) -> None:
        async with queue.slot(logs[number]):
            order.append(number)
            await leave.wait()

    tasks = [asyncio.ensure_future(start(number)) for number in range(5)]
    await settle()
    assert order == [0, 1]
    leave.set()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]
    for log in logs:
        log.close()
    assert [messages(await read(log))[:1] for log in logs[2:]] == [
        [f"Many servers are starting now; yours is number {place} in line."] for place in (1, 2, 3)
    ]


@pytest.mark.parametrize("cancelled", [[0], [1], [2], [0, 2], [1, 2], [0, 1, 2]])
async def test_progress_places_come_back_whoever_is_cancelled(cancelled: list[int]) -> None:
    """Fails without the clean-up in `StartQueue.enter` or the `finally` of `StartQueue.slot`."""
    queue = StartQueue(1)

    async def start() -> None:
        async with queue.slot():
            await asyncio.sleep(60)

    tasks = [asyncio.ensure_future(start()) for _ in range(3)]
    await settle()
    for number in cancelled:
        tasks[number].cancel()
    await settle()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait_for(queue.enter(), 2)


async def test_progress_place_given_at_the_moment_of_the_cancellation_goes_on() -> None:
    """Fails if a cancelled start keeps the place that it was just handed."""
    queue = StartQueue(1)
    await queue.enter()
    waiting = asyncio.ensure_future(queue.enter())
    await settle()
    queue.leave()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    if not waiting.cancelled():
        queue.leave()
    await asyncio.wait_for(queue.enter(), 2)
