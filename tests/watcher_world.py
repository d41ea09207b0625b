"""A watcher in a process of its own, started as the Hub starts it, for tests that look at it from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ds01spawner.settings import SETTINGS_ENV, Settings

ROOT = Path(__file__).resolve().parent.parent
LIMITS = "defaults: {max_mig_instances: 1}\ngroups:\n  researchers: {members: [alice]}\n"
PROFILES = (
    "profiles:\n  tiny: {title: Tiny, image: 'dstest-tiny:2', sizes: {cpu: {title: No GPU, gpu: {kind: none}}}}\n"
)
BOX = "gpus:\n  - {model: A100-40GB}\n  - {model: A100-40GB, mig: [3g.20gb, 2g.10gb, 1g.5gb]}\n"
PARENT = "import subprocess, sys, time\np = subprocess.Popen(sys.argv[1:])\nprint(p.pid, flush=True)\ntime.sleep(600)\n"


def write_policy(folder: Path) -> None:
    """The smallest policy that is valid."""
    (folder / "resource-limits.yaml").write_text(LIMITS)
    (folder / "profiles.yaml").write_text(PROFILES)


def installed(folder: Path, **fields: object) -> Settings:
    """Settings of an installation in `folder`, saved, with a policy and a simulated box."""
    write_policy(folder)
    (folder / "box.yaml").write_text(BOX)
    values = {"state_dir": folder, "config_dir": folder, "inventory": str(folder / "box.yaml")}
    settings = Settings.model_validate({"unsafe_no_isolation": True, **values, **fields})
    settings.save()
    return settings


@dataclass
class WatcherProcess:
    """A running watcher. pid: its process, which is not `process` where that is its parent. log: what it writes."""

    process: subprocess.Popen[str]
    pid: int
    log: Path

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text()

    def lines(self, word: str) -> list[str]:
        """Lines with that word."""
        return [line for line in self.text().splitlines() if word in line]

    def alive(self) -> bool:
        """True while the process is there and no zombie."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        return state not in "ZX"


def wait(condition: Callable[[], object], what: str, timeout: float = 20) -> float:
    """Until `condition()` is true; how many seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout, f"not within {timeout} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began


@contextmanager
def watcher(
    settings: Settings,
    *,
    below: bool = False,
    env: Mapping[str, str] | None = None,
    name: str = "watcher",
    **constants: float,
) -> Iterator[WatcherProcess]:
    """A watcher, ended at the end.

    Args:
        below: as the child of another process, which is `process` then. constants: of its module, for quick tests.
    """
    log = settings.state_dir / f"{name}.log"
    environment = os.environ | {SETTINGS_ENV: str(settings.state_dir / "settings.json")} | dict(env or {})
    command = [sys.executable, "-m", "ds01spawner.watcher"]
    if constants:
        code = "".join(f"w.{key} = {value}\n" for key, value in constants.items())
        command = [sys.executable, "-c", f"import ds01spawner.watcher as w\n{code}w.main()"]
    if below:
        command = [sys.executable, "-c", PARENT, *command]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if below else output,
            stderr=output,
            text=True,
        )
    pid = int(process.stdout.readline()) if below and process.stdout else process.pid
    running = WatcherProcess(process, pid, log)
    try:
        yield running
    finally:
        if process.stdout:
            process.stdout.close()
        for each in {pid, process.pid}:
            if running.alive() or (each == process.pid and process.poll() is None):
                os.kill(each, signal.SIGKILL)
        process.wait(10)
