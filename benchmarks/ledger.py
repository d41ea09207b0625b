"""How long the ledger takes: the steps of one start on a full box with a long history.

    python benchmarks/ledger.py [--url URL] [--leases 300] [--audit 100000] [--rounds 300]

Prints the median and the 95th percentile of each step, and of one fsync on the same disk, because every
durable commit on SQLite contains one. Without --url it uses a throwaway SQLite file below --folder.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from ds01spawner.ledger.store import Claim, Ledger, utcnow
from ds01spawner.ledger.tables import audit
from ds01spawner.model import Admission, Inventory, Limit, Limits, Request, Resources, Snapshot, Unit, Usage


def unit(number: int) -> Unit:
    """A made-up 1g.5gb instance."""
    return Unit(
        f"MIG-{number:032d}", f"GPU-{number // 7:032d}", number // 7, "A100", 5 << 30, 1, 1, 7, 8, number % 7, "1g.5gb"
    )


def granting(*units: Unit) -> Callable[[Usage], Admission]:
    """A decision that counts like the real one and then grants `units`."""
    values = {f"limit_{number}": Limit(number, "group researchers") for number in range(25)}
    limits = Limits("user", "researchers", ("researchers",), values)

    def decide(usage: Usage) -> Admission:
        usage.taken(), usage.share_of("user"), usage.share_of_group("researchers"), usage.servers_of("user")
        return Admission(Request(), limits, "image", units, Resources(8.0, 32 << 30, 32 << 30, 8 << 30, 4096))

    return decide


def claim(user: str) -> Claim:
    """Somebody of the one group."""
    return Claim(user, "", "researchers", ("researchers",), 70000)


def fill(ledger: Ledger, leases: int, rows: int) -> None:
    """Make `leases` running servers and `rows` audit rows."""
    for number in range(leases):
        start(ledger, f"holder{number}", unit(number), lambda _step, call: call())
    row = {
        "at": utcnow(),
        "actor": "user",
        "action": "allocation.activate",
        "subject": "user/",
        "reason": "",
        "before": {"state": "reserved"},
        "after": {"state": "active"},
        "allocation_id": 1,
    }
    with ledger._db.write() as connection:
        for _ in range(rows // 1000):
            connection.execute(insert(audit), [row] * 1000)


def start(ledger: Ledger, user: str, wanted: Unit, timed: Callable[[str, Callable[[], Any]], Any]) -> int:
    """One start; each step goes through `timed`."""
    held = timed("reserve", lambda: ledger.reserve(claim(user), granting(wanted)))
    timed(
        "bind",
        lambda: ledger.bind(
            held.id, container_id=f"c{held.token}", container_name="main._.70000", image="image", spec_hash="hash"
        ),
    )
    timed("activate", lambda: ledger.activate(held.id))
    return int(held.id)


def measure(ledger: Ledger, leases: int, rounds: int) -> dict[str, list[float]]:
    """Seconds by step."""
    seconds: dict[str, list[float]] = {}

    def timed(step: str, call: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = call()
        seconds.setdefault(step, []).append(time.perf_counter() - begun)
        return result

    snapshot = Snapshot(utcnow(), Inventory((), "simulated"))
    for number in range(rounds):
        allocation = start(ledger, f"user{number}", unit(leases), timed)
        with ledger.operation(allocation, "stop", "benchmark"):
            pass
        timed("release", lambda: ledger.release(allocation, "stopped"))  # noqa: B023 (called at once)
        timed("usage", ledger.usage)
        timed("find", lambda: ledger.find("holder7", ""))
        timed("snapshot", lambda: ledger.write_snapshot(snapshot))
    return seconds


def fsync_seconds(folder: Path, rounds: int) -> list[float]:
    """One page appended and synced, as often as `rounds`."""
    path, seconds = folder / "fsync", []
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    for number in range(rounds):
        os.pwrite(descriptor, bytes(4096), number * 4096)
        begun = time.perf_counter()
        os.fdatasync(descriptor)
        seconds.append(time.perf_counter() - begun)
    os.close(descriptor)
    path.unlink()
    return seconds


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="SQLAlchemy URL of an EMPTY database; it is left filled")
    parser.add_argument("--folder", default="/var/tmp", help="where the throwaway file lies (a real disk)")
    parser.add_argument("--leases", type=int, default=300)
    parser.add_argument("--audit", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        url = options.url or f"sqlite:///{folder}/ledger.sqlite"
        with Ledger.open(url) as ledger:
            fill(ledger, options.leases, options.audit)
            seconds = measure(ledger, options.leases, options.rounds)
        seconds["(one fsync)"] = fsync_seconds(Path(folder), options.rounds)
    print(f"{options.leases} live leases, {options.audit} audit rows, {options.rounds} rounds, {url.split(':')[0]}")
    print(f"{'step':<12} {'median ms':>10} {'p95 ms':>10}")
    for step, values in seconds.items():
        tail = statistics.quantiles(values, n=20)[-1]
        print(f"{step:<12} {statistics.median(values) * 1e3:>10.2f} {tail * 1e3:>10.2f}")


if __name__ == "__main__":
    main()
