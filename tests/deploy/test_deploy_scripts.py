"""The shell library behind the two commands: who stops a dockerd, which Python is taken, what is not done twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARY = ROOT / "deploy" / "lib.sh"


def bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `script` after the library, with the safety switches of the real commands."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f". {LIBRARY}\n{script}"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


def fake_python(folder: Path, name: str, version: str) -> None:
    (folder / name).write_text(f'#!/bin/sh\n[ "{version}" = new ]\n')
    (folder / name).chmod(0o755)


@pytest.fixture
def docker_files(tmp_path: Path) -> str:
    """Shell lines that point the library's Docker files into a folder of the test."""
    return f"DOCKERD_PID={tmp_path}/pid; DOCKERD_USERS={tmp_path}/users; cd {tmp_path}\n"


def test_scripts_python_is_new_enough(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3", "old")
    fake_python(tmp_path, "python3.11", "new")
    tools = f"{tmp_path}:/nowhere"
    assert bash(f"PATH={tools} find_python").stdout.strip() == f"{tmp_path}/python3.11"
    (tmp_path / "python3.11").unlink()
    refused = bash(f"PATH={tools} find_python")
    assert refused.returncode == 1 and "No Python 3.10 or newer" in refused.stderr


def test_scripts_python_can_be_named() -> None:
    assert bash("find_python", DS01_PYTHON=sys.executable).stdout.strip() == sys.executable


def test_scripts_environment_is_made_once(tmp_path: Path) -> None:
    """A second run asks neither pip nor the network; a changed pyproject.toml does."""
    (tmp_path / "pyproject.toml").write_text("one")
    calls = f"""
    ROOT={tmp_path}; VENV={tmp_path}/venv
    pip_install() {{ echo installing; }}
    make_environment {tmp_path}/venv nothing
    make_environment {tmp_path}/venv nothing
    echo two > {tmp_path}/pyproject.toml
    make_environment {tmp_path}/venv nothing
    """
    assert bash(calls, DS01_PYTHON=sys.executable).stdout.split() == ["installing"] * 2


def test_scripts_a_dockerd_that_runs_already_is_not_touched(docker_files: str) -> None:
    script = f"{docker_files} docker_answers() {{ return 0; }}; join_docker_users; ensure_docker; stop_docker_if_ours"
    done = bash(script)
    assert (done.returncode, done.stderr) == (0, "")


def test_scripts_the_last_user_stops_the_dockerd_that_was_started(docker_files: str, tmp_path: Path) -> None:
    shutil.copy("/bin/sleep", tmp_path / "dockerd")
    script = f"""{docker_files}
    ./dockerd 300 & pid=$!
    echo $pid > pid
    join_docker_users
    ( exec 8>&-; join_docker_users; stop_docker_if_ours )
    is_process $pid dockerd && echo kept
    stop_docker_if_ours
    is_process $pid dockerd || echo stopped
    ls
    """
    done = bash(script)
    assert done.stdout.split() == ["kept", "stopped", "dockerd", "users"], done.stderr
    assert "another run uses it" in done.stderr


def test_scripts_another_process_with_that_id_is_not_killed(docker_files: str) -> None:
    script = f"""{docker_files}
    sleep 300 & pid=$!
    echo $pid > pid
    join_docker_users
    stop_docker_if_ours
    kill -0 $pid && echo lives
    kill $pid
    """
    assert bash(script).stdout.split() == ["lives"]


def test_scripts_trust_what_the_machine_trusts(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.touch()
    names = ("PIP_CERT", "NODE_EXTRA_CA_CERTS")
    unset = f"unset REQUESTS_CA_BUNDLE CURL_CA_BUNDLE {' '.join(names)}"
    done = bash(f"{unset}; SSL_CERT_FILE={bundle} use_machine_certificates; echo $PIP_CERT $NODE_EXTRA_CA_CERTS")
    assert done.stdout.split() == [str(bundle)] * 2
    done = bash(f"{unset}; export PIP_CERT=/mine; SSL_CERT_FILE={bundle} use_machine_certificates; echo $PIP_CERT")
    assert done.stdout.split() == ["/mine"]


@pytest.mark.parametrize("command", ["deploy/demo", "tests/run"])
def test_scripts_tell_how_they_are_used(command: str) -> None:
    done = subprocess.run([str(ROOT / command), "--help"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0 and f"./{command}" in done.stdout and not done.stderr
