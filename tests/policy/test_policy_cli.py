"""`ds01-admin config check` and `ds01-admin limits`: what people and programs get to read, and exit codes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ds01spawner.cli import admin
from ds01spawner.settings import SETTINGS_ENV, Settings

LIMITS = """\
defaults: {memory: 32g, max_cpus: 32, max_gpu_equivalents: 1}
groups:
  students:
    members: [ann]
    hub_groups: [course]
    aggregate: {cpu_quota: "2400%"}
    policies: {grace_period_m: 5}
  staff: {members: [bob], unix_groups: [root], priority: 50, mounts: ["/srv/data:/data"]}
user_overrides: {ann: {memory: 64g, until: 2026-11-30}}
grants: [{user: ann, max_gpu_equivalents: "+1.0", until: 2026-11-20, by: bob, reason: demo}]
"""
PROFILES = "profiles:\n  lab: {image: lab}\n  big: {image: lab, groups: [staff]}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy folder; no installation."""
    monkeypatch.delenv(SETTINGS_ENV, raising=False)
    monkeypatch.setattr("ds01spawner.cli.installation.DEFAULT_STATE_DIR", tmp_path / "nothing")
    config = tmp_path / "config"
    config.mkdir()
    (config / "resource-limits.yaml").write_text(LIMITS)
    (config / "profiles.yaml").write_text(PROFILES)
    return config


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(admin.main, [str(argument) for argument in arguments])


def limits(folder: Path, *arguments: str) -> Any:
    result = run("limits", *arguments, "--config", folder, "--inventory", "none", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_cli_check_of_a_valid_folder(folder: Path) -> None:
    result = run("config", "check", folder)
    assert result.exit_code == 0
    assert f"{folder}: valid (2 groups, 2 people, 2 profiles; " in result.stdout
    data = json.loads(run("config", "check", folder, "--json").stdout)
    assert (data["valid"], data["problems"], len(data["hash"])) == (True, [], 64)


def test_cli_check_shows_every_problem_with_its_place(folder: Path) -> None:
    (folder / "resource-limits.yaml").write_text("defaults: {max_cpu: 8, max_tasks: 4}\ngroups: {g: {memory: x}}\n")
    result = run("config", "check", folder)
    assert result.exit_code == 31
    lines = result.stdout.splitlines()
    assert lines[0] == f'{folder}/resource-limits.yaml:1:12: error: unknown key "max_cpu" (did you mean max_cpus?)'
    assert lines[1].startswith(f'{folder}/resource-limits.yaml:2:22: error: memory: "x" is not a size')
    assert "not valid, 2 errors" in lines[-1]
    as_json = run("config", "check", folder, "--json")
    data = json.loads(as_json.stdout)
    assert as_json.exit_code == 31 and not data["valid"] and data["hash"] is None
    assert data["problems"][0] == {
        "severity": "error",
        "file": f"{folder}/resource-limits.yaml",
        "line": 1,
        "column": 12,
        "message": 'unknown key "max_cpu"',
        "hint": "did you mean max_cpus?",
    }


def test_cli_warnings_are_shown_and_leave_the_exit_code_alone(folder: Path) -> None:
    (folder / "resource-limits.yaml").write_text("defaults: {max_tasks: 4}\ngroups: {staff: {}}\n")
    result = run("config", "check", folder)
    assert result.exit_code == 0
    assert "warning: the key" in result.stdout and "1 warning;" in result.stdout


def test_cli_limits_as_json_in_base_units_with_sources(folder: Path) -> None:
    data = limits(folder, "ann", "--at", "2026-11-20")
    assert (data["user"], data["group"], data["groups"]) == ("ann", "students", ["students"])
    assert data["limits"]["memory"] == {"value": 64 << 30, "source": "override", "note": ""}
    assert data["limits"]["memory_swap"]["value"] == 64 << 30
    assert data["limits"]["max_cpus"]["value"] == 24 and "clamped" in data["limits"]["max_cpus"]["note"]
    assert data["limits"]["max_gpu_equivalents"] == {
        "value": 2.0,
        "source": "grant until 2026-11-20",
        "note": "1 + 1",
    }
    assert data["limits"]["max_runtime"] == {"value": None, "source": "built-in", "note": ""}
    assert data["limits"]["group_total.max_gpu_equivalents"]["value"] is None
    assert data["policies"]["grace_period_m"] == {"value": 5.0, "source": "group students", "note": ""}
    assert (data["profiles"], data["notes"], data["may_log_in"]) == (["lab"], [], True)


def test_cli_limits_at_a_day(folder: Path) -> None:
    later = limits(folder, "ann", "--at", "2026-12-01")
    assert later["limits"]["memory"] == {"value": 32 << 30, "source": "defaults", "note": ""}
    assert len(later["notes"]) == 2
    assert run("limits", "ann", "--config", folder, "--at", "soon").exit_code == 2


def test_cli_groups_stand_for_hub_unix_and_policy_groups(folder: Path) -> None:
    assert limits(folder, "eve")["group"] is None and not limits(folder, "eve")["may_log_in"]
    assert limits(folder, "eve", "--group", "course")["group"] == "students"
    assert limits(folder, "eve", "--group", "root")["group"] == "staff"
    both = limits(folder, "eve", "--group", "students", "--group", "staff")
    assert (both["group"], both["groups"], both["may_log_in"]) == ("staff", ["staff", "students"], True)
    assert both["limits"]["mounts"]["value"] == [{"host": "/srv/data", "target": "/data", "read_only": True}]
    unknown = limits(folder, "ann", "--group", "nobody")
    assert 'the policy does not mention the group "nobody"' in unknown["notes"]


def test_cli_limits_for_people(folder: Path) -> None:
    text = run("limits", "ann", "--config", folder, "--inventory", "none", "--at", "2026-11-20").stdout
    assert "ann · group students · 2026-11-20 12:00 UTC" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert "64 GiB" in rows["memory"] and "override" in rows["memory"]
    assert "24 cores" in rows["max_cpus"] and "no limit" in rows["max_runtime"]
    assert "group_total.max_gpu_equivalents" in rows and "grace_period_m" in rows
    assert "Profiles  lab" in text
    assert "may not log in" in run("limits", "eve", "--config", folder, "--inventory", "none").stdout


def test_cli_wrong_policy_is_told_with_its_exit_code(folder: Path) -> None:
    (folder / "resource-limits.yaml").write_text("defaults: {max_cpu: 8}\n")
    result = run("limits", "ann", "--config", folder, "--json")
    assert result.exit_code == 31
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "policy_invalid" and "1:12" in error["facts"]["problems"][0]
    plain = run("limits", "ann", "--config", folder)
    assert plain.exit_code == 31 and "resource-limits.yaml:1:12" in plain.stderr


def test_cli_folder_of_the_installation_then_the_current_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert json.loads(run("config", "check", "--json").stdout)["folder"] == "config"
    elsewhere = folder.parent / "etc"
    folder.rename(elsewhere)
    path = Settings(config_dir=elsewhere, state_dir=folder.parent / "state", inventory="none").save()  # type: ignore[call-arg]
    monkeypatch.setenv(SETTINGS_ENV, str(path))
    assert json.loads(run("config", "check", "--json").stdout)["folder"] == str(elsewhere)
    path.write_text("{}x")
    assert run("config", "check").exit_code == 32


def test_cli_mig_units_of_the_box_decide_whole_gpus(folder: Path) -> None:
    box = folder.parent / "box.yaml"
    box.write_text("gpus:\n  - {model: A100-40GB, mig: [1g.5gb, 1g.5gb]}\n")
    result = run("limits", "ann", "--config", folder, "--inventory", box, "--json")
    data = json.loads(result.stdout)
    assert data["limits"]["allow_full_gpu"] == {"value": False, "source": "built-in", "note": "this box has MIG units"}
    unread = json.loads(run("limits", "ann", "--config", folder, "--inventory", "/nowhere.yaml", "--json").stdout)
    assert unread["limits"]["allow_full_gpu"]["value"] is True
    assert "cannot be read" in unread["notes"][-1]


def test_cli_a_part_that_cannot_be_imported_does_not_break_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "COMMANDS", {**admin.COMMANDS, "gpus": "ds01spawner.cli.not_there:gpus"})
    assert run("gpus").exit_code == 2
    assert run("--help").exit_code == 0
    assert run("config", "check", folder).exit_code == 0


def test_cli_as_installed_on_a_terminal(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ds01spawner.cli.admin",
        "limits",
        "ann",
        "--config",
        str(folder),
        "--inventory",
        "none",
    ]
    primary, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    done = subprocess.run(command, stdout=secondary, stderr=subprocess.PIPE, env=environment, timeout=60)
    os.close(secondary)
    shown = b""
    while True:
        try:
            part = os.read(primary, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(primary)
    assert done.returncode == 0, done.stderr
    assert b"\x1b[" in shown and b"max_gpu_equivalents" in shown
