"""Progress of one start, readable by many pages and by those that open late (trap T19)."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One step of a start: its word, and the percentage at which it begins."""

    name: str
    percent: int


QUOTA = Stage("quota", 5)
GPU = Stage("GPU", 10)
IMAGE = Stage("image", 15)
QUEUE = Stage("queue", 55)
CREATE = Stage("create", 60)
START = Stage("start", 75)
ANSWER = Stage("first answer", 85)
READY = Stage("ready", 95)

STAGES = (QUOTA, GPU, IMAGE, QUEUE, CREATE, START, ANSWER)
"""Every stage in order; the pending page shows them as a list."""


class ProgressLog:
    """The events of one start. `add` may be called from any thread; readers get all events from the beginning.

    Readers may come before the first event and after the last one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: list[dict[str, Any]] = []
        self._running: Stage | None = None
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def used(self) -> bool:
        """True once it belongs to a start: another start needs a log of its own."""
        return self._closed or bool(self._events)

    def add(self, stage: Stage, message: str, *, fraction: float | None = None) -> None:
        """Tell that `stage` has come to `message`.

        Args:
            fraction: how much of the stage is done (0..1). Such a message takes the place of the one before it, if
                that was of the same kind: who opens the page late gets the newest figure, not thousands of old ones.
        """
        later = [s.percent for s in (*STAGES, READY) if s.percent > stage.percent]
        width = (min(later) if later else 100) - stage.percent
        event = {
            "progress": int(stage.percent + width * min(max(fraction or 0.0, 0.0), 1.0)),
            "message": message,
            "html_message": f'<span data-ds01-stage="{html.escape(stage.name)}">{html.escape(message)}</span>',
        }
        with suppress(RuntimeError):  # the Hub has ended: nobody reads any more, and what is under way goes on
            self._loop.call_soon_threadsafe(self._append, event, None if fraction is None else stage)

    def close(self) -> None:
        """End every reader once it has read everything. Call on the event loop or from a thread."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._close)

    def _append(self, event: dict[str, Any], running: Stage | None) -> None:
        if self._closed or (self._events and self._events[-1] == event):
            return
        if running is not None and running is self._running:
            self._events[-1] = event
        else:
            self._events.append(event)
        self._running = running
        self._wake()

    def _close(self) -> None:
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def read(self) -> AsyncIterator[dict[str, Any]]:
        """All events, then new ones as they come, until the log is closed."""
        index, last = 0, None
        while True:
            changed = self._changed
            if index and self._events[index - 1] is not last:
                index -= 1  # it was replaced by a newer figure
            while index < len(self._events):
                last = self._events[index]
                index += 1
                yield last
            if self._closed and (not index or self._events[index - 1] is last):
                return
            if changed is self._changed:
                await changed.wait()


LONGEST_SLOT_S = 20.0
"""A Jupyter server boots in a few seconds; what takes longer than this is not waiting for a processor."""


class StartQueue:
    """At most `width` containers start at a time, first come first served; whoever waits knows the place.

    Booting a Jupyter server is CPU-bound: 20 at once on two cores all take 30 s, five at a time are done in 25 s.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._running = 0
        self._waiting: list[asyncio.Event] = []

    @asynccontextmanager
    async def slot(self, log: ProgressLog | None = None, *, longest: float = LONGEST_SLOT_S) -> AsyncIterator[None]:
        """Hold a place for the duration of the block, however it ends, but for no longer than `longest` seconds: a few
        servers that never answer must not keep everybody else from starting."""
        await self.enter(log)
        left = False

        def leave_once() -> None:
            nonlocal left
            if not left:
                left = True
                self.leave()

        timer = asyncio.get_running_loop().call_later(longest, leave_once)
        try:
            yield
        finally:
            timer.cancel()
            leave_once()

    async def enter(self, log: ProgressLog | None = None) -> None:
        """Wait for a place; tell `log` how many are in front."""
        if self._running < self._width and not self._waiting:
            self._running += 1
            return
        turn = asyncio.Event()
        self._waiting.append(turn)
        told = None
        try:
            while not turn.is_set():
                ahead = self._waiting.index(turn)
                if log is not None and ahead != told:
                    log.add(QUEUE, f"Many servers are starting now; yours is number {ahead + 1} in line.")
                    told = ahead
                try:
                    await asyncio.wait_for(turn.wait(), timeout=1.0)
                except (TimeoutError, asyncio.TimeoutError):
                    continue
        except BaseException:
            if turn.is_set():
                self.leave()
            else:
                self._waiting.remove(turn)
            raise

    def leave(self) -> None:
        """Give the place to the next in line."""
        if self._waiting:
            self._waiting.pop(0).set()
        else:
            self._running -= 1
