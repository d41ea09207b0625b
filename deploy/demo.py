"""The demo: sets an installation of its own up, runs its Hub, and takes all of it away again.

Run by the shell script beside it, which makes the environment (`DS01_DEMO_IMAGE`: the image to start).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import docker
import requests
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from . import instance
from .image import LOGS, ensure_image
from .instance import DEMO_ENV, ROOT, Plan
from .main_job import CheckFailed, MainJob
from .surroundings import NothingFree

PORT = 8000
SECONDS_TO_COME_UP = 90
KEPT_LOGS = 5

_LEVEL = re.compile(r"^\[(?P<level>[DIWEC]) \S+ \S+ (?P<name>\S+)(?: \S+)?\] (?P<text>.*)")
_EVENTS = re.compile(r"User logged (in|out)|seconds to (start|stop)|[Ff]ailed|[Rr]efused")
"""Lines of the Hub's log that tell what people do; everything else is in the file."""
_EXPECTED = re.compile(r"without SSL|Received signal SIGTERM|_xsrf|XSRF")
"""Warnings that are as they must be on a demo: no TLS on 127.0.0.1, our own way of ending the Hub."""


class DemoFailed(Exception):
    """The demo cannot go on; the message says why and where to look."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: end cleanly."""


def interesting(line: str) -> str | None:
    """What of a log line is shown on the terminal: people's doings, warnings and errors; None for the rest."""
    match = _LEVEL.match(line)
    if match is None:
        return None
    if match["level"] in "WEC":
        if _EXPECTED.search(match["text"]):
            return None
        return f"{'warning' if match['level'] == 'W' else 'error'}: {match['text']}"
    return match["text"] if match["level"] == "I" and _EVENTS.search(match["text"]) else None


# ------------------------------------------------------------------------------------------------ the Hub


@contextlib.contextmanager
def running_hub(plan: Plan, log: Path, console: Console) -> Iterator[None]:
    """The demo's Hub, up and answering, for as long as the block lasts.

    Raises:
        DemoFailed: it ended or does not answer.
    """
    environment = os.environ | {
        DEMO_ENV: str(plan.file),
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",  # the Hub's proxy is beside us
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "jupyterhub", "-f", str(ROOT / "deploy" / "hub_config.py")]
    # A session of its own: Ctrl-C is ours to handle, in order.
    hub = subprocess.Popen(
        command,
        cwd=plan.state,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    reader = threading.Thread(target=_copy_log, args=(hub, log, console), daemon=True)
    reader.start()
    try:
        _wait_until_up(plan, hub, log)
        yield
    finally:
        # The Hub first: it ends its proxy and services itself, and calls their end an error if somebody else does it.
        hub.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            hub.wait(timeout=10)
        instance.end_processes(plan.state)
        hub.wait(timeout=10)
        reader.join(timeout=5)


def _copy_log(hub: subprocess.Popen[str], log: Path, console: Console) -> None:
    if hub.stdout is None:
        return
    with log.open("w") as output:
        for line in hub.stdout:
            output.write(line)
            output.flush()
            shown = interesting(line.rstrip("\n"))
            if shown is not None:
                console.print(f"  {shown}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _wait_until_up(plan: Plan, hub: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_COME_UP
    while time.monotonic() < deadline:
        if hub.poll() is not None:
            time.sleep(0.5)  # the reader writes the last lines
            raise DemoFailed(f"the Hub ended with exit status {hub.returncode}\n{_tail(log)}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{plan.url}/hub/health", timeout=2).ok and instance.box_is_known(plan):
                return
        time.sleep(0.2)
    raise DemoFailed(f"the Hub and its watcher were not up within {SECONDS_TO_COME_UP} s\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join([f"(whole log: {log})", *lines[-30:]])


def _new_log() -> Path:
    """A file for this run's log; the newest few are kept."""
    LOGS.mkdir(exist_ok=True)
    old = sorted(LOGS.glob("hub-*.log"), key=lambda path: path.stat().st_mtime)
    for path in old[: -KEPT_LOGS + 1]:
        path.unlink()
    return LOGS / f"hub-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


# ------------------------------------------------------------------------------------------------ for people


def _welcome(plan: Plan, log: Path) -> Panel:
    accounts = Table("account", "password", "may have", box=None, padding=(0, 2))
    may_have = {
        "student1": "one small GPU",
        "researcher1": "two GPUs, whole ones too",
        "admin": "four GPUs; administers the Hub",
    }
    for name, password in plan.passwords.items():
        accounts.add_row(name, password, may_have.get(name, ""))
    box = "this machine's own" if plan.settings["inventory"] == "nvml" else "simulated (4 GPUs; no real one was found)"
    text = Table.grid(padding=(0, 1))
    text.add_row(f"[bold]Open {plan.url}[/] and log in:")
    text.add_row("")
    text.add_row(accounts)
    text.add_row("")
    text.add_row(f"GPUs: {box}")
    text.add_row(f"Commands: DS01_SETTINGS={plan.resolved().state_dir}/settings.json .venv/bin/ds01-admin gpus")
    text.add_row(f"Policy: {plan.settings['config_dir']} (edit it; it holds from the next start of a server on)")
    text.add_row(f"Log: {log}")
    text.add_row("[bold]Ctrl-C[/] ends the demo and removes everything that it made.")
    return Panel(text, title="ds01spawner demo", expand=False)


def _say(console: Console, text: str) -> None:
    console.print(f"· {text}", markup=False, highlight=False, soft_wrap=True)


def _end_on_signals() -> None:
    def end(_number: int, _frame: FrameType | None) -> None:
        # Only the first counts: a second Ctrl-C must not leave half of the clean-up undone.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise Interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def serve(plan: Plan, console: Console, log: Path) -> int:
    """Run the Hub until Ctrl-C."""
    with running_hub(plan, log, console):
        console.print(_welcome(plan, log))
        while True:
            time.sleep(3600)


def check(plan: Plan, console: Console, log: Path) -> int:
    """Do the main job once; 0 if everything equals the policy."""
    with running_hub(plan, log, console):
        equal = MainJob(plan, console, lambda text: _say(console, text)).run()
    if equal:
        console.print("[bold green]✓ all of it equals the policy[/]")
        return 0
    console.print(f"[bold red]✗ there are differences[/] (the Hub's log: {log})")
    return 1


def main() -> int:
    """Run what the arguments ask for; the exit status."""
    parser = argparse.ArgumentParser(prog="./deploy/demo", description="A real JupyterHub with real containers.")
    parser.add_argument("--check", action="store_true", help="do the main job without a person and compare")
    parser.add_argument("--port", type=int, default=PORT, help=f"port of the page; default {PORT}")
    given = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    _end_on_signals()
    log = _new_log()
    client = docker.APIClient(timeout=120)
    try:
        image = os.environ.get("DS01_DEMO_IMAGE") or ensure_image()
        with instance.prepared(client, port=given.port, image=image) as plan:
            if plan.port != given.port:
                _say(console, f"port {given.port} is in use: taking {plan.port}")
            return (check if given.check else serve)(plan, console, log)
    except Interrupted:
        _say(console, "ended; everything that the demo made was removed")
        return 0 if not given.check else 130
    except (CheckFailed, DemoFailed, NothingFree) as error:
        console.print(f"✗ {error}", style="red", markup=False, soft_wrap=True)
        console.print(f"The Hub's log: {log}", style="dim", markup=False, soft_wrap=True)
        return 1
    finally:
        client.close()


if __name__ == "__main__":
    sys.exit(main())
