"""The watcher process: observes GPUs and containers and writes the snapshot that everybody else reads.

The only process that opens NVML and follows Docker events. Started by the Hub as a managed service
(`python -m ds01spawner.watcher`), it exits when its Hub is gone, and a lock keeps a second one from starting.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from . import reconcile
from .containers import occupancy
from .containers.engine import ContainerFacts
from .containers.host import boot_id, container_of_pid
from .errors import Ds01Error, EngineError, InventoryError
from .gpu.inventory import open_inventory
from .gpu.source import GpuProcess, InventorySource
from .model import External, Inventory, Snapshot
from .runtime import Runtime
from .settings import load_settings

log = logging.getLogger("ds01.watcher")

SNAPSHOT_EVERY_S = 5.0
"""Cadence of the snapshot; a third of the age at which it stops being evidence (design, Processes)."""
RECONCILE_EVERY_S = 60.0


class Watcher:
    """Observe, reconcile; one pass at a time, time and sources as values so that tests drive it."""

    def __init__(self, runtime: Runtime, inventory: InventorySource) -> None:
        self._runtime = runtime
        self._inventory = inventory
        self._complaints: set[str] = set()

    def observe(self) -> Snapshot:
        """Look at GPUs, containers and processes, write the snapshot and return it.

        Raises:
            InventoryError, EngineError: without both there is no evidence, so nothing is written and the last
                snapshot grows stale, which refuses new GPU requests (design, point 3).
        """
        runtime = self._runtime
        inventory = self._inventory.read()
        processes = self._inventory.processes()
        facts = runtime.engine.list_facts()
        external = self._external(inventory, processes, facts)
        snapshot = Snapshot(runtime.now(), inventory, external, boot_id(), occupancy.notes(facts))
        runtime.ledger.write_snapshot(snapshot)
        return snapshot

    def _external(
        self, inventory: Inventory, processes: Sequence[GpuProcess], facts: Sequence[ContainerFacts]
    ) -> tuple[External, ...]:
        runtime = self._runtime
        located = [occupancy.LocatedProcess(p.unit_uuid, p.pid, container_of_pid(p.pid)) for p in processes]
        allocations = runtime.ledger.allocations(live=True)
        return self._inventory.external() + occupancy.external(
            facts,
            inventory,
            located,
            instance=runtime.ledger.instance,
            live={a.token: frozenset(lease.unit_uuid for lease in a.leases) for a in allocations},
            rules=runtime.policies.current().external,
            default_runtime=runtime.info.default_runtime,
            now=runtime.now(),
        )

    def attempt(self, what: str, action: Callable[[], object]) -> bool:
        """Run `action`; tell a failure once and its end once, and go on (missing evidence stops nothing)."""
        try:
            action()
        except (EngineError, InventoryError, Ds01Error) as error:
            complaint = f"{what}: {error.message}"
            if complaint not in self._complaints:
                log.warning("%s", complaint)
            self._complaints = {c for c in self._complaints if not c.startswith(f"{what}:")} | {complaint}
            return False
        ended = {c for c in self._complaints if c.startswith(f"{what}:")}
        if ended:
            log.info("%s: works again", what)
            self._complaints -= ended
        return True

    def run(self, wake: threading.Event, alive: Callable[[], bool], stop: threading.Event) -> None:
        """Until `stop` is set or `alive` says no: a snapshot every 5 s and on every event, reconcile every minute."""
        next_reconcile = 0.0
        while not stop.is_set() and alive():
            seen = self.attempt("observe", self.observe)
            if seen and time.monotonic() >= next_reconcile:
                self.attempt("reconcile", lambda: reconcile.run(self._runtime))
                next_reconcile = time.monotonic() + RECONCILE_EVERY_S
            wake.wait(SNAPSHOT_EVERY_S)
            wake.clear()


def follow_events(runtime: Runtime, wake: threading.Event, stop: threading.Event) -> None:
    """Wake the watcher on container events. Events only wake; the list is the evidence (they can be lost)."""
    while not stop.is_set():
        try:
            for event in runtime.engine.events():
                if stop.is_set():
                    return
                if event.action in ("create", "start", "die", "destroy", "rename", "update"):
                    wake.set()
        except EngineError:
            stop.wait(2.0)


def lock(path: Path) -> int:
    """Take the watcher's lock or exit: two observers would overwrite each other's snapshot.

    Returns:
        The open file descriptor; the lock lasts as long as it is open.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        log.error("another watcher of this installation runs already (%s is locked)", path)
        raise SystemExit(1) from None
    return handle


def main() -> None:
    """Entry point of `python -m ds01spawner.watcher`."""
    logging.basicConfig(level=logging.INFO, format="[%(levelname).1s %(asctime)s ds01.watcher] %(message)s")
    settings = load_settings()
    # Taken before anything else is opened, so that a second one leaves no trace.
    handle = lock(settings.state_dir / "watcher.lock")
    stop, wake = threading.Event(), threading.Event()

    def ended(_signum: int, _frame: FrameType | None) -> None:
        stop.set()
        wake.set()

    signal.signal(signal.SIGTERM, ended)
    signal.signal(signal.SIGINT, ended)
    parent = os.getppid()
    runtime = Runtime.open(role="watcher", settings=settings)
    try:
        watcher = Watcher(runtime, open_inventory(settings.inventory))
        events = threading.Thread(target=follow_events, args=(runtime, wake, stop), daemon=True)
        events.start()
        log.info("watching (GPU source: %s)", settings.inventory)
        watcher.run(wake, lambda: os.getppid() == parent, stop)
    except Ds01Error as error:
        log.error("%s", error.message)
        sys.exit(error.exit_code)
    finally:
        stop.set()
        runtime.close()
        os.close(handle)


if __name__ == "__main__":
    main()
