"""The reconciler beside a real Hub: what somebody does in Docker behind its back, and a ledger from a backup."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from live_hub import LiveHub
from stub_hub import StubHub, stub_hub

from ds01spawner.containers.spec import named_units
from ds01spawner.settings import SETTINGS_ENV

pytestmark = [pytest.mark.docker, pytest.mark.hub]


QUICK = """
from jupyterhub.services.service import _ServiceSpawner
_ServiceSpawner.poll_interval = 1
"""
"""The Hub looks every second whether its services live, instead of every thirty."""


@pytest.fixture(scope="module")
def _shared(demo_image: str) -> Iterator[StubHub]:
    with stub_hub(demo_image, extra_config=QUICK) as running:
        yield running


@pytest.fixture
def hub(_shared: StubHub) -> StubHub:
    """The module's own Hub, whose ledger it may exchange; swept."""
    _shared.sweep()
    return _shared


def admin(hub: LiveHub, *words: str) -> subprocess.CompletedProcess[str]:
    """`ds01-admin …` for this installation."""
    settings = hub.plan.resolved().state_dir / "settings.json"
    return subprocess.run(
        [sys.executable, "-m", "ds01spawner.cli.admin", *words],
        env=os.environ | {SETTINGS_ENV: str(settings)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def settled(hub: LiveHub) -> dict[str, object]:
    """What `ds01-admin reconcile --dry-run --json` says."""
    done = admin(hub, "reconcile", "--dry-run", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_reconcile_hub_docker_start_behind_its_back_is_stopped_at_once(hub: StubHub) -> None:
    hub.spawn("alice", {"profile": "small"})
    assert settled(hub)["findings"] == [], "a running server is no finding"
    hub.halt("alice")
    stopped = hub.container("alice")
    assert stopped is not None and not named_units(stopped)
    hub.runtime.engine.start(stopped.id)
    began = time.monotonic()
    hub.wait(lambda: not runs(hub, "alice"), "it is stopped", 10)
    assert time.monotonic() - began < 5
    hub.wait(lambda: hub.runtime.ledger.audit_rows(action="container.stop"), "it is written down", 5)
    hub.spawn("alice", {"profile": "small"})
    assert runs(hub, "alice")


def test_reconcile_hub_container_removed_behind_its_back_frees_what_it_held(hub: StubHub) -> None:
    hub.spawn("alice", {"profile": "small"})
    facts = hub.container("alice")
    assert facts is not None and hub.runtime.ledger.usage().taken()
    hub.runtime.engine.remove(facts.id, force=True)
    hub.wait(lambda: not hub.runtime.ledger.usage().taken(), "its unit is free", 20)
    hub.finished("alice")
    hub.clean()
    hub.spawn("alice", {"profile": "small"})


def test_reconcile_hub_killed_watcher_is_there_again_and_nobody_is_stopped(hub: StubHub) -> None:
    hub.spawn("alice", {"profile": "small"})
    lock = hub.plan.resolved().state_dir / "watcher.lock"
    first = int(lock.read_text())
    os.kill(first, signal.SIGKILL)
    hub.wait(lambda: lock.read_text().strip() not in ("", str(first)), "the Hub started another", 60)
    at = hub.runtime.now()
    hub.wait(lambda: (s := hub.runtime.ledger.read_snapshot()) and s.at > at, "it looks", 20)
    assert runs(hub, "alice") and settled(hub)["findings"] == []


def test_reconcile_hub_restored_older_ledger_stops_nobody(hub: StubHub) -> None:
    """A server that was stopped at the time of the backup runs by now, and so does one that was not there yet."""
    hub.spawn("alice", {"profile": "cpu"})
    hub.halt("alice")
    ledger = hub.plan.resolved().state_dir / "ledger.sqlite"
    backup = hub.plan.state / "backup.sqlite"
    with closing(sqlite3.connect(ledger)) as source, closing(sqlite3.connect(backup)) as copy:
        source.backup(copy)
    hub.spawn("alice", {"profile": "cpu"})
    hub.spawn("bob", {"profile": "small"})
    before = {c.id for c in hub.containers() if c.running}
    assert len(before) == 2
    last = hub.runtime.ledger.last_token()
    hub.end()
    exchange_ledger(hub, backup, ledger)
    hub.start()
    hub.wait(lambda: {"unknown", "started_unseen"} <= alerts(hub), "the watcher tells of both")
    time.sleep(2)
    assert {c.id for c in hub.containers() if c.running} == before
    assert hub.runtime.ledger.last_token() >= last, "no token is given twice"
    snapshot = hub.runtime.ledger.read_snapshot()
    assert snapshot is not None and any("not of a live allocation" in e.why for e in snapshot.external)
    said = admin(hub, "reconcile").stdout
    assert "restored from a backup" in said and "docker rm -f" in said
    assert {c.id for c in hub.containers() if c.running} == before


def exchange_ledger(hub: StubHub, backup: Path, ledger: Path) -> None:
    """Restore a backup while no Hub runs, as an admin does it."""
    hub.runtime.close()
    hub._runtime = None
    for left in ledger.parent.glob(f"{ledger.name}-*"):
        left.unlink()
    shutil.copy(backup, ledger)


def runs(hub: StubHub, user: str) -> bool:
    """True while the container of the user's server runs."""
    facts = hub.container(user)
    return facts is not None and facts.running


def alerts(hub: StubHub) -> set[str]:
    """Kinds of the alerts that were raised."""
    return {str((row.after or {}).get("what")) for row in hub.runtime.ledger.audit_rows(action="alert.raised")}
