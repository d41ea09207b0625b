"""Sixteen processes, eight units, kill -9 in between: no unit is ever held twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sqlalchemy import select

from ds01spawner.ledger import tables
from ds01spawner.ledger.store import Ledger

CROWD = Path(__file__).with_name("ledger_crowd.py")
SECONDS = 120 if os.environ.get("DS01_LONG") == "1" else 6


def overlaps(ledger: Ledger) -> int:
    """Pairs of leases of one unit whose times overlap, in the whole history."""
    lease = tables.leases.c
    with ledger._db.read() as connection:
        rows = connection.execute(select(lease.unit_uuid, lease.since, lease.released_at).order_by(lease.id)).all()
    last: dict[str, object] = {}
    count = 0
    for uuid, since, released in rows:
        if uuid in last:
            end = last[uuid]
            count += end is None or since < end  # type: ignore[operator]
        last[uuid] = released
    return count


def test_race_of_16_processes_with_kill_9_gives_no_unit_twice(ledger_url: str, tmp_path: Path) -> None:
    witnesses = tmp_path / "witnesses"
    witnesses.mkdir()
    command = [sys.executable, str(CROWD), ledger_url, str(witnesses), str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 60, check=False)
    assert done.stderr == ""
    counts = json.loads(done.stdout)
    with Ledger.open(ledger_url) as ledger:
        counts["overlapping leases"] = overlaps(ledger)
        with ledger._db.read() as connection:
            tokens = list(connection.scalars(select(tables.allocations.c.token).order_by(tables.allocations.c.id)))
        left = ledger.allocations()
    print(f"race: {counts}")
    assert counts["doubles"] == counts["overlapping leases"] == counts["errors"] == 0
    assert counts["granted"] >= 10
    assert counts["kills"] >= 10
    assert tokens == sorted(set(tokens)), "a token was given twice, or a later allocation got a lower one"
    assert len(left) <= counts["processes"]
