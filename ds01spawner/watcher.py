"""The watcher process: observes GPUs and containers, writes the snapshot that everybody else reads, and reconciles.

The only process that opens NVML and follows Docker events. Started by the Hub as a managed service
(`python -m ds01spawner.watcher`), it ends when its Hub is gone, and a lock keeps a second one from starting.

| thread | does |
|---|---|
| main | a snapshot every 5 s, and soon after an event |
| events | follows Docker; events only wake the others |
| reconcile | a pass every minute and after events of our own containers; the network rules every minute |
| repair | what may take minutes: saving what a container changed before its GPU is given back |
| warden | ends the process when the Hub is gone or a signal came, even if Docker or NVML hangs |
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from .containers import aime, occupancy
from .containers.engine import ContainerFacts, EngineEvent
from .containers.host import boot_id, container_of_pid
from .errors import Busy, Ds01Error
from .gpu.inventory import open_inventory
from .gpu.source import GpuProcess, InventorySource, NoInventory
from .model import External, Inventory, Snapshot
from .reconcile.evidence import Evidence
from .reconcile.findings import Finding
from .reconcile.isolation import guard_isolation
from .reconcile.reconciler import Reconciler
from .runtime import Runtime
from .settings import load_settings

log = logging.getLogger("ds01.watcher")

SNAPSHOT_EVERY_S = 5.0
"""Cadence of the snapshot; a third of the age at which it stops being evidence (design, Processes)."""
RECONCILE_EVERY_S = 60.0
REOPEN_EVERY_S = 60.0
"""How often `auto` looks again for GPUs on a box where it found none: a driver may come up late."""
DEBOUNCE_S = 0.2
"""Events come in bursts: so long after the first one, all are looked at together …"""
SPACING_S = 1.0
"""… and never more often than this."""
SUMMARY_EVERY_S = 60.0
"""The line about the box is written when it has changed, at most this often."""
LOCK_PATIENCE_S = 10.0
"""How long a new watcher waits for an old one that has not noticed yet that its Hub is gone."""
WARDEN_EVERY_S = 0.25
EXIT_S = 1.0
"""How long the threads have to end by themselves."""
EVENTS = ("create", "start", "die", "destroy", "rename", "update", "pause", "unpause")
"""What may change who holds what."""


@dataclass
class Signals:
    """What the threads tell each other.

    Attributes:
        stop: end. look: take a snapshot now. check: reconcile now.
        asked: a signal asked for the end. Its handler does no more than this: it may have interrupted whoever holds
            the lock inside an Event.
    """

    asked: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    look: threading.Event = field(default_factory=threading.Event)
    check: threading.Event = field(default_factory=threading.Event)

    def end(self) -> None:
        """Wake everybody to end."""
        self.stop.set()
        self.look.set()
        self.check.set()


class Complaints:
    """Tells a failure once, and once that it is over: missing evidence stops nothing, so it may last."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._open: dict[str, str] = {}

    def attempt(self, what: str, action: Callable[[], object]) -> bool:
        """Run `action` and say whether it worked. No exception comes out: every thread must go on."""
        try:
            action()
        except Ds01Error as error:
            if self._new(what, error.message):
                log.warning("%s: %s", what, error.message)
            return False
        except Exception as error:
            if self._new(what, repr(error)):
                log.exception("%s: unexpected failure", what)
            return False
        if self._open.pop(what, None) is not None:
            log.info("%s: works again", what)
        return True

    def _new(self, what: str, message: str) -> bool:
        # What fails because everything is being closed is no news.
        new = self._open.get(what) != message and not self._stop.is_set()
        self._open[what] = message
        return new


class GpuSource:
    """The source that the settings name, opened when it is first asked and again after it could not be."""

    def __init__(
        self,
        setting: str,
        *,
        opened: Callable[[str], InventorySource] = open_inventory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setting = setting
        self._opened = opened
        self._clock = clock
        self._source: InventorySource | None = None
        self._at = 0.0

    def get(self) -> InventorySource:
        """The open source.

        Raises:
            InventoryError: it cannot be opened now (a driver that does not answer is not "no GPUs").
        """
        hopeful = self._setting == "auto" and isinstance(self._source, NoInventory)
        if self._source is None or (hopeful and self._clock() - self._at >= REOPEN_EVERY_S):
            self._source = self._opened(self._setting)
            self._at = self._clock()
        return self._source

    def close(self) -> None:
        """Close what is open."""
        if self._source is not None:
            self._source.close()


class Observer:
    """Takes the snapshots. `snapshot` is the newest one."""

    def __init__(self, runtime: Runtime, source: GpuSource) -> None:
        self._runtime = runtime
        self._source = source
        self._said = ""
        self._said_at = float("-inf")
        self.snapshot: Snapshot | None = None

    def observe(self) -> Snapshot:
        """Look at GPUs, containers and processes, write the snapshot and return it.

        Raises:
            InventoryError, EngineError: without both there is no evidence, so nothing is written and the last
                snapshot grows stale, which refuses new GPU requests (design, point 3).
        """
        runtime, began = self._runtime, time.monotonic()
        at = runtime.now()  # a look that took long is that old
        source = self._source.get()
        inventory = source.read()
        processes = source.processes()
        # Before the ledger is read: an allocation is written before its container is made.
        facts = runtime.engine.list_facts()
        live = {
            a.token: frozenset(lease.unit_uuid for lease in a.leases) for a in runtime.ledger.allocations(live=True)
        }
        external = source.external() + self._external(inventory, processes, facts, live)
        snapshot = Snapshot(at, inventory, external, boot_id(), occupancy.notes(facts))
        runtime.ledger.write_snapshot(snapshot)
        self.snapshot = snapshot
        self._summarise(snapshot, len(facts), len({u for units in live.values() for u in units}), began)
        return snapshot

    def _external(
        self,
        inventory: Inventory,
        processes: Sequence[GpuProcess],
        facts: Sequence[ContainerFacts],
        live: dict[int, frozenset[str]],
    ) -> tuple[External, ...]:
        runtime = self._runtime
        return occupancy.external(
            facts,
            inventory,
            [occupancy.LocatedProcess(p.unit_uuid, p.pid, container_of_pid(p.pid)) for p in processes],
            instance=runtime.ledger.instance,
            live=live,
            rules=runtime.policies.current().external,
            default_runtime=runtime.info.default_runtime,
            now=runtime.now(),
        )

    def _summarise(self, snapshot: Snapshot, containers: int, leased: int, began: float) -> None:
        """One line about the box when it has changed, at most one a minute."""
        units, now = snapshot.inventory.units, time.monotonic()
        said = (
            f"{len(snapshot.inventory.gpus)} GPUs ({snapshot.inventory.source}) with {len(units)} units: "
            f"{leased} leased, {len(snapshot.external_by_unit())} taken by others, "
            f"{sum(unit.problem is not None for unit in units)} not usable; {containers} containers"
        )
        if said != self._said and now - self._said_at >= SUMMARY_EVERY_S:
            log.info("%s; one look takes %.0f ms", said, 1000 * (now - began))
            self._said, self._said_at = said, now


class Watcher:
    """The threads around an observer and a reconciler."""

    def __init__(self, runtime: Runtime, observer: Observer, signals: Signals) -> None:
        self._runtime = runtime
        self._observer = observer
        self._signals = signals
        self._reconciler = Reconciler(runtime, lambda: observer.snapshot, watching_since=runtime.now())
        self._repairs: queue.Queue[tuple[tuple[Finding, ...], Evidence]] = queue.Queue(maxsize=1)

    def run(self) -> None:
        """Until `stop` is set."""
        threads = [
            threading.Thread(target=target, name=f"ds01-{target.__name__}", daemon=True)
            for target in (self.events, self.reconcile, self.repair)
        ]
        for thread in threads:
            thread.start()
        self.observe()
        deadline = time.monotonic() + EXIT_S / 2
        for thread in threads[1:]:  # who follows events only waits for Docker
            thread.join(max(0.0, deadline - time.monotonic()))

    def observe(self) -> None:
        """The main thread."""
        signals, complaints = self._signals, Complaints(self._signals.stop)
        worked = False
        while not signals.stop.is_set():
            began = time.monotonic()
            works = complaints.attempt("observe", self._observer.observe)
            if works and not worked:
                signals.check.set()  # what had to wait for a picture
            worked = works
            if signals.look.wait(max(0.0, began + SNAPSHOT_EVERY_S - time.monotonic())):
                signals.stop.wait(max(DEBOUNCE_S, began + SPACING_S - time.monotonic()))
                signals.look.clear()

    def reconcile(self) -> None:
        """The thread of the passes."""
        signals, complaints = self._signals, Complaints(self._signals.stop)
        guard_at, pause = 0.0, SNAPSHOT_EVERY_S  # the first picture wakes it earlier
        while not signals.stop.is_set():
            if signals.check.wait(pause):
                signals.stop.wait(DEBOUNCE_S)
                signals.check.clear()
            if signals.stop.is_set():
                return
            began = time.monotonic()
            complaints.attempt("reconcile", lambda: self._reconciler.run(later=self._hand_on))
            if began >= guard_at:
                complaints.attempt("network rules", lambda: guard_isolation(self._runtime))
                guard_at = began + RECONCILE_EVERY_S
            signals.stop.wait(max(0.0, began + SPACING_S - time.monotonic()))
            pause = max(0.0, began + RECONCILE_EVERY_S - time.monotonic())

    def _hand_on(self, findings: tuple[Finding, ...], evidence: Evidence) -> None:
        """To the repair thread; if it is busy, the next pass finds them again."""
        try:
            self._repairs.put_nowait((findings, evidence))
        except queue.Full:
            log.debug("%d repairs wait for the ones under way", len(findings))

    def repair(self) -> None:
        """The thread of the slow repairs."""
        complaints = Complaints(self._signals.stop)
        while not self._signals.stop.is_set():
            try:
                findings, evidence = self._repairs.get(timeout=SPACING_S)
            except queue.Empty:
                continue
            for finding in findings:
                if self._signals.stop.is_set():
                    return
                complaints.attempt("repair", partial(self._reconciler.finish, (finding,), evidence))

    def events(self) -> None:
        """The thread that follows Docker. Events can be lost: the list is the evidence, and every look takes it."""
        signals, complaints = self._signals, Complaints(self._signals.stop)
        last: list[float] = []

        def follow() -> None:
            for event in self._runtime.engine.events(since=last[0] if last else None):
                last[:] = [event.at]
                if signals.stop.is_set():
                    return
                self._wake(event)

        while not signals.stop.is_set():
            complaints.attempt("events", follow)
            signals.look.set()
            signals.stop.wait(2 * SPACING_S)

    def _wake(self, event: EngineEvent) -> None:
        if event.kind == "container" and event.action in EVENTS:
            self._signals.look.set()
            if event.attributes.get(aime.LABEL_INSTANCE) == self._runtime.ledger.instance:
                self._signals.check.set()


# --------------------------------------------------------------------------- the process


def guard_process(signals: Signals, alive: Callable[[], bool], leave: Callable[[int], object] = os._exit) -> None:
    """The warden: ends the watcher when its Hub is gone or a signal came, and makes sure that an end is an end, also
    while the main thread waits for a Docker or a driver that hangs."""
    while not signals.stop.wait(WARDEN_EVERY_S):
        if signals.asked:
            signals.end()
        elif not alive():
            log.info("the Hub is gone; ending")
            signals.end()
    time.sleep(EXIT_S)
    leave(0)


def lock(path: Path, patience: float) -> int:
    """Take the watcher's lock: two observers would overwrite each other's snapshot.

    Args:
        patience: seconds to wait for another one to end.

    Returns:
        The open file descriptor; the lock lasts as long as it is open.

    Raises:
        Busy: another one holds it, and went on doing so.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
                os.close(handle)
                raise Busy(
                    f"Another watcher of this installation runs already (process {holder} holds {path}). There must "
                    "be only one; end that one first if it should not be there.",
                    facts={"pid": holder, "lock": str(path)},
                ) from None
            time.sleep(0.1)
        else:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            return handle


def main() -> None:
    """Entry point of `python -m ds01spawner.watcher`. Exit codes as in `errors`: 24 = there is another one."""
    logging.basicConfig(level=logging.INFO, format="[%(levelname).1s %(asctime)s ds01.watcher] %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    parent, signals = os.getppid(), Signals()

    def ended(_signum: int, _frame: FrameType | None) -> None:
        signals.asked = True

    signal.signal(signal.SIGTERM, ended)
    signal.signal(signal.SIGINT, ended)
    threading.Thread(
        target=guard_process, args=(signals, lambda: os.getppid() == parent), name="ds01-warden", daemon=True
    ).start()
    try:
        settings = load_settings()
        # Taken before anything else is opened, so that a second one leaves no trace.
        handle = lock(settings.state_dir / "watcher.lock", LOCK_PATIENCE_S)
        runtime = Runtime.open(role="watcher", settings=settings)
    except Ds01Error as error:
        log.error("%s", error.message)
        sys.exit(error.exit_code)
    source = GpuSource(settings.inventory)
    try:
        log.info("watching installation %s (GPU source: %s)", runtime.ledger.instance[:8], settings.inventory)
        Watcher(runtime, Observer(runtime, source), signals).run()
    finally:
        signals.end()
        source.close()
        runtime.close()
        os.close(handle)


if __name__ == "__main__":
    main()
