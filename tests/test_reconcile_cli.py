"""`ds01-admin reconcile`: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from reconcile_scene import MIG_1G, WHOLE, container
from reconcile_world import World

from ds01spawner.cli import reconcile_commands
from ds01spawner.cli.admin import main
from ds01spawner.model import State
from ds01spawner.runtime import Runtime
from ds01spawner.settings import SETTINGS_ENV


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """An installation whose watcher has just looked."""
    made = World(tmp_path)
    made.runtime.settings.save()
    monkeypatch.setenv(SETTINGS_ENV, str(tmp_path / "settings.json"))

    def opened(*, role: str, settings: object) -> Runtime:
        assert role == "admin"
        return made.runtime

    monkeypatch.setattr(reconcile_commands.Runtime, "open", opened)
    monkeypatch.setattr(made.runtime, "close", lambda: None)
    picture = made.picture()
    assert picture is not None
    made.ledger.write_snapshot(picture)
    yield made
    made.ledger.close()


def call(*words: str) -> Result:
    return CliRunner().invoke(main, ["reconcile", *words])


def test_cli_reconcile_where_all_is_well(world: World) -> None:
    world.start("alice", WHOLE)
    result = call()
    assert result.exit_code == 0
    assert result.output == "All is as it should be: 1 servers and 1 containers were compared.\n"


def test_cli_reconcile_says_what_it_would_do_and_does_it(world: World) -> None:
    gone = world.start("alice", WHOLE)
    world.engine.found.clear()
    world.engine.found["odd"] = container(99, MIG_1G, number="odd", instance=world.ledger.instance)
    dry = call("--dry-run")
    assert dry.exit_code == 0
    assert "alice/main  its container is gone" in dry.output and "→ would be given back" in dry.output
    assert "tokens would go on after it" in dry.output and "docker rm -f" in dry.output
    assert world.again(gone).state is State.ACTIVE and world.ledger.last_token() == 2
    real = call()
    assert real.exit_code == 0 and "→ what it held is free" in real.output and "2 done" in real.output
    assert world.again(gone).state is State.RELEASED and world.ledger.last_token() == 99
    assert "→ nothing is done about it" in call().output


def test_cli_reconcile_json(world: World) -> None:
    world.start("alice", WHOLE)
    world.engine.found.clear()
    report = json.loads(call("--dry-run", "--json").output)
    assert report["dry_run"] is True and report["notes"] == []
    assert report["counts"] == {"containers": 0, "allocations": 1, "done": 0, "skipped": 1, "failed": 0, "told": 0}
    (found,) = report["findings"]
    assert (found["what"], found["action"], found["severity"], found["result"]) == (
        "container_gone",
        "release",
        "warning",
        "skipped",
    )
    assert found["subject"] == "alice/main" and found["allocation_id"] == 1


def test_cli_reconcile_does_nothing_without_a_fresh_picture(world: World) -> None:
    world.start("alice", WHOLE)
    world.engine.found.clear()
    world.turn(seconds=20)
    result = call()
    assert result.exit_code == 0 and result.output.startswith("Limited: there is no fresh picture")
    assert "skipped: there is no fresh picture" in result.output
    assert world.ledger.usage().taken() == {WHOLE}


def test_cli_reconcile_exit_code_of_a_failed_repair(world: World) -> None:
    row = world.start("alice")
    world.ledger.release(row.id, "test")
    world.engine.fails["stop"] = "no permission"
    result = call()
    assert result.exit_code == 1 and "failed: no permission" in result.output
    assert call("--json").exit_code == 1


def test_cli_reconcile_failure_of_docker_is_a_sentence(world: World) -> None:
    world.engine.fails["list"] = "Docker does not answer"
    result = call()
    assert result.exit_code == 33 and "Docker does not answer" in result.output
    report = json.loads(call("--json").output)
    assert report["error"]["code"] == "engine_unavailable"


def test_cli_reconcile_makes_no_ledger_where_there_is_none(world: World, tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").rename(tmp_path / "elsewhere")
    result = call()
    assert result.exit_code == 32 and "no ledger" in result.output
    assert not (tmp_path / "ledger.sqlite").exists()
