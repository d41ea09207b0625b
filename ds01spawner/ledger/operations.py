"""One hand at a time (design, point 11): the operation rows, their heartbeats, and taking over from the dead."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from ds01spawner.errors import Busy, LedgerError

from .database import Database, utcnow
from .part import Part
from .records import OperationRow, checked_name, subject_of, tidy
from .tables import allocations, operations

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
STALE_AFTER = timedelta(seconds=60)


@dataclass(frozen=True)
class Process:
    """Identity of a process that outlives its pid: `name` is host:pid:start, `kernel` is boot id/pid namespace."""

    name: str
    kernel: str

    @classmethod
    def current(cls) -> Process:
        """The running process."""
        pid = os.getpid()
        return cls(f"{socket.gethostname()}:{pid}:{_start_of(pid)}", _kernel())

    def gone(self) -> bool:
        """True only if it provably ended: same kernel and pid namespace as ours, and no such process."""
        if self.kernel != _kernel():
            return False
        _host, pid, start = self.name.rsplit(":", 2)
        return _start_of(int(pid)) != start


def _kernel() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"


def _start_of(pid: int) -> str:
    """Start time of a process in clock ticks since boot (proc(5), field 22); "" if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    state, *rest = stat.rpartition(")")[2].split()  # the name before it may contain anything
    return "" if state in "ZX" else rest[18]


class Operation:
    """A held operation row. Ask `check()` before each step that cannot be undone."""

    def __init__(self, allocation_id: int, what: str, who: str, since: datetime) -> None:
        self.allocation_id = allocation_id
        self.what = what
        self.who = who
        self.since = since
        self.nonce = uuid4().hex
        self.lost = False

    def check(self) -> None:
        """Raise Busy if another process took this operation over (our heartbeat had stopped for a minute)."""
        if self.lost:
            raise Busy(
                f"The operation '{self.what}' was taken over by another process after its heartbeat had stopped.",
                facts={"what": self.what, "who": self.who, "since": self.since.isoformat()},
            )


class Operations(Part):
    """Operation rows of the ledger."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._me = Process.current()
        # CLOCK_MONOTONIC is the same in all processes of a boot and knows no steps. A caller that brings its
        # own clock brings the passing of time with it.
        self._elapsed: Callable[[], float] = (
            time.monotonic if database.clock is utcnow else lambda: database.clock().timestamp()
        )
        self._heart = _Heart(self._beat)

    @contextlib.contextmanager
    def operation(self, allocation_id: int, what: str, who: str) -> Iterator[Operation]:
        """Hold the operation row of an allocation while its container is created, stopped, removed …

        Read the allocation again after entering: another hand may just have changed it.

        Args:
            what: the verb for people ("start", "stop", "commit"). who: on whose behalf ("alice", "watcher").

        Raises:
            Busy: somebody else is at it; facts name what, who and since when.
            LedgerError: no such allocation, or the ledger does not answer.
        """
        mine = self._claim(allocation_id, checked_name("operation", what), who)
        self._heart.add(mine)
        try:
            yield mine
        finally:
            self._heart.remove(mine)
            self._end(mine)

    def operations(self) -> tuple[OperationRow, ...]:
        """All operation rows, stale ones included, oldest first."""
        with self._db.read() as connection:
            rows = connection.execute(select(operations).order_by(operations.c.since)).mappings().all()
        return tuple(self._row(row) for row in rows)

    def _claim(self, allocation_id: int, what: str, who: str) -> Operation:
        now = self._now()
        mine = Operation(allocation_id, what, tidy(who, 600), now)
        with self._db.write() as connection:
            subject = _subject(connection, allocation_id)
            found = self._refuse_if_busy(connection, allocation_id)
            if found is not None:
                connection.execute(delete(operations).where(operations.c.nonce == found["nonce"]))
                self._note(
                    connection,
                    mine.who,
                    "operation.takeover",
                    subject,
                    f"the heartbeat of '{found['what']}' by {found['who']} had stopped",
                    before={"what": found["what"], "who": found["who"], "process": found["process"]},
                    after={"what": what, "who": mine.who, "process": self._me.name},
                    allocation_id=allocation_id,
                )
            connection.execute(
                insert(operations).values(
                    allocation_id=allocation_id,
                    nonce=mine.nonce,
                    what=what,
                    who=mine.who,
                    process=self._me.name,
                    boot_id=self._me.kernel,
                    since=now,
                    beat_at=now,
                    beat_elapsed=self._elapsed(),
                )
            )
        return mine

    def _refuse_if_busy(
        self, connection: Connection, allocation_id: int, *, allow_own_process: bool = False
    ) -> RowMapping | None:
        """The dead holder's row, if any; Busy if a living hand holds it."""
        query = select(operations).where(operations.c.allocation_id == allocation_id)
        found = connection.execute(query).mappings().first()
        if found is None or self._stale(found):
            return found
        if allow_own_process and (found["process"], found["boot_id"]) == (self._me.name, self._me.kernel):
            return None
        raise Busy(
            f"'{found['what']}' by {found['who']} has been running for this server since "
            f"{found['since']:%H:%M:%S} UTC. Try again when it has ended.",
            facts={
                "what": found["what"],
                "who": found["who"],
                "process": found["process"],
                "since": found["since"].isoformat(),
            },
        )

    def _stale(self, row: RowMapping) -> bool:
        holder = Process(row["process"], row["boot_id"])
        if holder.gone():
            return True
        if holder.kernel.partition("/")[0] == self._me.kernel.partition("/")[0]:
            age = self._elapsed() - float(row["beat_elapsed"])
            return age > STALE_AFTER.total_seconds()
        # Another boot or machine: only the wall clock is shared. Far in the future is as wrong as far in the past.
        beat: datetime = row["beat_at"]
        return abs(self._now() - beat) > STALE_AFTER

    def _row(self, row: RowMapping) -> OperationRow:
        return OperationRow(
            allocation_id=row["allocation_id"],
            what=row["what"],
            who=row["who"],
            process=row["process"],
            since=row["since"],
            beat_at=row["beat_at"],
            stale=self._stale(row),
        )

    def _beat(self, held: list[Operation]) -> None:
        """Renew the heartbeats of `held`; mark those whose row another process has taken."""
        ours = [item.nonce for item in held]
        with self._db.write(durable=False) as connection:
            condition = operations.c.nonce.in_(ours)
            alive = set(connection.scalars(select(operations.c.nonce).where(condition)))
            beat = {"beat_at": self._now(), "beat_elapsed": self._elapsed()}
            connection.execute(update(operations).where(condition).values(beat))
        for item in held:
            item.lost = item.lost or item.nonce not in alive

    def _end(self, mine: Operation) -> None:
        try:
            with self._db.write() as connection:
                connection.execute(delete(operations).where(operations.c.nonce == mine.nonce))
        except LedgerError as error:
            # What was done is done, and its own error matters more; the row goes stale within a minute.
            log.warning("The operation row of allocation %d stays until it is stale: %s", mine.allocation_id, error)

    def _close_operations(self) -> None:
        self._heart.stop()


class _Heart:
    """One thread per ledger that renews all heartbeats of this process; started with the first operation."""

    def __init__(self, beat: Callable[[list[Operation]], None]) -> None:
        self._beat = beat
        self._held: dict[str, Operation] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, operation: Operation) -> None:
        with self._lock:
            self._held[operation.nonce] = operation
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._run, name="ds01-heartbeat", daemon=True)
                self._thread.start()

    def remove(self, operation: Operation) -> None:
        with self._lock:
            self._held.pop(operation.nonce, None)

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with self._lock:
                held = list(self._held.values())
            if not held:
                continue
            try:
                self._beat(held)
            except LedgerError as error:
                log.warning("Heartbeats could not be renewed, next try in %.0f s: %s", BEAT_SECONDS, error)


def _subject(connection: Connection, allocation_id: int) -> str:
    query = select(allocations.c.owner, allocations.c.server_name).where(allocations.c.id == allocation_id)
    found: Any = connection.execute(query).first()
    if found is None:
        raise LedgerError(f"There is no allocation {allocation_id}.")
    return subject_of(found[0], found[1])
