"""The watcher as a process: its life, its lock, its end, and how soon it sees what happens on a real Docker."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from reconcile_docker import DockerWorld
from tiny_image import TINY_TAG, ensure_tiny
from watcher_world import installed, wait, watcher

from ds01spawner.containers.network import bridge_name, remove_rules, verify_rules
from ds01spawner.containers.spec import SIMULATED_FOLDER
from ds01spawner.gpu.simulated import SimulatedInventory
from ds01spawner.ledger.store import Ledger, utcnow
from ds01spawner.model import Snapshot
from ds01spawner.settings import Settings

pytestmark = pytest.mark.docker


def newest(settings: Settings) -> Snapshot | None:
    """The snapshot in the ledger."""
    with closing(Ledger.open(settings.url)) as ledger:
        return ledger.read_snapshot()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An installation that nobody watches yet."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    return installed(folder)


def test_watcher_lifecycle_writes_snapshots_and_ends_cleanly(settings: Settings) -> None:
    with watcher(settings, SNAPSHOT_EVERY_S=0.5) as running:
        wait(lambda: running.lines("one look takes"), "the first snapshot")
        first = newest(settings)
        assert first is not None and len(first.inventory.units) == 4 and not first.stale(utcnow())
        wait(lambda: newest(settings) != first, "the next snapshot", 7)
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(5) == 0
        assert time.monotonic() - began < 2
        lines = running.text().splitlines()
        assert len(lines) == 2 and "watching installation" in lines[0] and "2 GPUs (simulated)" in lines[1], lines


def test_watcher_failure_of_its_hub_ends_it(settings: Settings) -> None:
    with watcher(settings, below=True) as running:
        wait(lambda: running.lines("one look takes"), "the first snapshot")
        running.process.kill()
        running.process.wait(5)
        assert wait(lambda: not running.alive(), "the watcher's end", 5) < 3
        assert running.lines("the Hub is gone")
    with watcher(settings) as again:
        wait(lambda: again.lines("watching"), "the lock is free")


def test_watcher_lock_keeps_a_second_one_from_starting(settings: Settings) -> None:
    with watcher(settings) as first:
        wait(lambda: first.lines("one look takes"), "the first snapshot")
        with watcher(settings, name="second", LOCK_PATIENCE_S=0.3) as second:
            assert second.process.wait(15) == 24
            (line,) = second.text().splitlines()
            assert f"process {first.pid} holds" in line and "watcher.lock" in line
        assert first.alive()


def test_watcher_waits_for_an_old_one_that_ends(settings: Settings) -> None:
    """A Hub that is restarted at once must not be without a watcher until it looks at its services again."""
    with watcher(settings) as old:
        wait(lambda: old.lines("watching"), "the old one has the lock")
        with watcher(settings, name="new") as new:
            time.sleep(0.7)
            assert new.alive() and not new.text()
            old.process.send_signal(signal.SIGTERM)
            assert wait(lambda: new.lines("watching"), "the new one has the lock") < 3


def test_watcher_ends_although_docker_hangs(settings: Settings, tmp_path: Path) -> None:
    """A socket that takes the connection and never answers: what is called in Docker does not come back."""
    import socket

    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf.sock"))
        deaf.listen(64)
        with watcher(settings, env={"DOCKER_HOST": f"unix://{tmp_path}/deaf.sock"}) as running:
            wait(lambda: running.lines("watching"), "it runs")
            time.sleep(0.5)
            began = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(5) == 0
            assert time.monotonic() - began < 2


def test_watcher_failure_of_nvml_and_docker_is_said_once(settings: Settings, tmp_path: Path) -> None:
    broken = installed(settings.state_dir, inventory="nvml")
    with watcher(broken, env={"DOCKER_HOST": f"unix://{tmp_path}/nobody.sock"}, SNAPSHOT_EVERY_S=0.2) as running:
        wait(lambda: running.lines("observe:") and running.lines("events:"), "the complaints")
        time.sleep(3)
        assert running.alive()
        assert len(running.lines("observe:")) == 1 and "NVML does not work" in running.lines("observe:")[0]
        assert len(running.lines("events:")) == 1 and "Is the daemon running" in running.lines("events:")[0]
        assert len(running.text().splitlines()) <= 4, running.text()
    assert newest(broken) is None, "no evidence, no snapshot"


def test_watcher_settings_that_are_missing_end_it_with_a_sentence(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    with watcher(settings) as running:
        assert running.process.wait(10) == 32
        assert "No settings at" in running.text() and "Traceback" not in running.text()


def test_watcher_puts_network_rules_back(settings: Settings) -> None:
    """As after `firewall-cmd --reload` or `iptables -F`: both families, within the time of one pass."""
    closed = installed(settings.state_dir, unsafe_no_isolation=False, subnet="172.29.254.0/24")
    with closing(Ledger.open(closed.url)) as ledger:
        bridge = bridge_name(ledger.instance)
    ports = (closed.hub_port, closed.service_port)
    try:
        with watcher(closed, RECONCILE_EVERY_S=0.5) as running:
            wait(lambda: not verify_rules(bridge, closed.gateway, ports), "the rules are there")
            remove_rules(bridge)
            wait(lambda: not verify_rules(bridge, closed.gateway, ports), "the rules are there again", 10)
            wait(lambda: len(running.lines("rules were put back")) >= 2, "it is told", 5)
    finally:
        remove_rules(bridge)


# --------------------------------------------------------------------------- on a real Docker


@pytest.fixture
def world(settings: Settings, require: Callable[[str, str | None], None]) -> Iterator[DockerWorld]:
    """The same installation, as its Hub would use it."""
    made = DockerWorld(settings.state_dir)
    require("busybox", ensure_tiny(made.engine))
    yield made
    made.clear()


def test_watcher_sees_a_foreign_container_soon_and_stops_a_docker_start(world: DockerWorld, settings: Settings) -> None:
    row = world.start("alice")
    world.hold(row)
    unit = SimulatedInventory(Path(settings.inventory)).read().units[0].uuid
    node = {"PathOnHost": "/dev/null", "PathInContainer": SIMULATED_FOLDER + unit, "CgroupPermissions": "rw"}
    host = {"NetworkMode": "none", "Devices": [node], "Init": True}
    foreign = ""
    try:
        with watcher(settings) as running:
            wait(lambda: world.ledger.read_snapshot(), "the first snapshot")
            time.sleep(1.5)  # the first pass is over
            body = {"Image": TINY_TAG, "Cmd": ["sleep", "60"], "HostConfig": host}
            foreign = world.engine.create(f"dstest-foreign-{world.mark}", body)
            world.engine.start(foreign)
            seen = wait(lambda: f"dstest-foreign-{world.mark}" in holders(world), "the foreign container is seen", 5)
            world.engine.start(row.container_id or "")
            stopped = wait(lambda: not world.facts(row).running, "the container is stopped", 5)
            print(f"seen after {seen:.2f} s, stopped after {stopped:.2f} s")
            assert seen < 3
            wait(lambda: running.lines("somebody started it in Docker"), "it is told", 5)
            world.engine.remove(foreign, force=True)
            wait(lambda: f"dstest-foreign-{world.mark}" not in holders(world), "it is seen to be gone", 5)
    finally:
        if foreign:
            world.engine.remove(foreign, force=True)


def holders(world: DockerWorld) -> set[str]:
    """Who holds units from outside."""
    snapshot = world.ledger.read_snapshot()
    return {external.holder for external in snapshot.external} if snapshot else set()
