"""A live Hub for faults: its servers are a tiny HTTP server, and single steps of a start can be made to fail or wait.

The Hub, its proxy, the watcher, the ledger, Docker and the containers are real. What is not: the program in the
container (it answers like a notebook server within a fraction of a second), and the fault that a test orders.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
import yaml
from live_hub import TOKEN, LiveHub, live_hub, server_path

from deploy.instance import Plan
from ds01spawner.servers import operation

STUB = """
import os, http.server
class Stub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("X-JupyterHub-Version", "6.1.1")
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("", 8888), Stub).serve_forever()
"""
COMMAND = ["python3", "-c", STUB]

FAULTS = """
import json
import time
from pathlib import Path
from ds01spawner.containers.engine import Engine
from ds01spawner.errors import EngineError
from ds01spawner.launch import Launch
from ds01spawner.ledger.store import Ledger

FOLDER = Path({folder!r})

def order(name, when):
    file = FOLDER / f"{{name}}.{{when}}"
    if not file.exists():
        return
    (FOLDER / f"{{name}}.{{when}}.reached").touch()
    kind = file.read_text()
    if kind == "wait":
        while file.exists():
            time.sleep(0.02)
    elif kind == "bug":
        raise KeyError("an inner detail")
    elif kind == "docker":
        raise EngineError("Docker does not answer (ordered by the test).")

def faulty(owner, name):
    original = getattr(owner, name)
    def wrapped(self, *arguments, **named):
        order(name, "before")
        result = original(self, *arguments, **named)
        order(name, "after")
        return result
    setattr(owner, name, wrapped)

for owner, names in ((Engine, ("create", "start", "stop", "pull", "image_facts", "remove", "inspect_facts")),
                     (Ledger, ("reserve", "bind", "activate", "record_request", "usage")),
                     (Launch, ("admit", "finish"))):
    for name in names:
        faulty(owner, name)

def settings(spawner):
    for file in FOLDER.glob("*.setting"):
        setattr(spawner, file.stem, json.loads(file.read_text()))

c.DS01Spawner.pre_spawn_hook = settings
c.DockerSpawner.mem_limit = "1G"
c.DS01Spawner.volumes = {{"/": "/host"}}
c.DS01Spawner.image = "somebody/else:1"
c.DockerSpawner.remove = True
c.DS01Spawner.extra_host_config = {{"privileged": True, "cap_add": ["SYS_ADMIN"]}}
c.DS01Spawner.http_timeout = 6
c.DS01Spawner.start_timeout = 60
c.JupyterHub.init_spawners_timeout = 2
c.JupyterHub.tornado_settings = {{"slow_stop_timeout": 0.5}}
c.Spawner.poll_interval = 1
"""

STARTS = 3
"""Places in the line of starts."""

AWKWARD = [
    "o'hara",
    "ünïcödé",
    "名前",
    "a b",
    "root",
    "_apt",
    "$(reboot)",
    "-rf",
    "..a",
    "a+b@c;d",
    'say"hi"',
    "<script>",
    "x" * 120,
]
"""User names that JupyterHub admits."""

LIMITS = {
    "defaults": {
        "max_cpus": 0.5,
        "memory": "192m",
        "shm_size": "16m",
        "pids_limit": 64,
        "max_mig_instances": 1,
        "allow_full_gpu": False,
        "max_containers_per_user": 4,
        "priority": 10,
        "policies": {"sigterm_grace_s": 1},
    },
    "groups": {
        "students": {"members": ["alice", "bob", "carol", "student1", "a-b", "a.b", "dora@uni.example", *AWKWARD]},
        "staff": {"members": ["rich", "rita"], "priority": 50, "max_mig_instances": 2, "allow_full_gpu": True},
        "two": {"members": ["zoe"], "priority": 60, "max_mig_instances": 2},
    },
}


def profiles(image: str) -> dict[str, object]:
    """Cards with the stub; `silent` never answers and `dies` ends at once."""
    small = {"s": {"gpu": {"mig_profile": "1g.5gb"}}}
    return {
        "cpu": {"image": image, "command": COMMAND, "default": True, "sizes": {"s": {}}},
        "small": {"image": image, "command": COMMAND, "sizes": small},
        "whole": {"image": image, "command": COMMAND, "groups": ["staff"], "sizes": {"s": {"gpu": {"kind": "full"}}}},
        "silent": {"image": image, "command": ["sh", "-c", "echo I am waiting; sleep 1000"], "sizes": small},
        "dies": {"image": image, "command": ["sh", "-c", "echo no such module; exit 3"], "sizes": small},
        "absent": {"image": "ds01-test.invalid/absent:1", "command": COMMAND, "sizes": {"s": {}}},
    }


class StubHub(LiveHub):
    """A live Hub with faults to order."""

    def __init__(self, plan: Plan, environment: Mapping[str, str] | None = None) -> None:
        super().__init__(plan, environment)
        self._aside = ThreadPoolExecutor(16)

    def close(self) -> None:
        super().close()
        self._aside.shutdown()

    @property
    def _faults(self) -> Path:
        return self.plan.state / "faults"

    @contextlib.contextmanager
    def fault(self, step: str, when: str = "before", kind: str = "bug") -> Iterator[None]:
        """While in the block: the Hub's `step` fails (bug, docker) or waits (wait) before or after it is done."""
        order = self._faults / f"{step}.{when}"
        order.write_text(kind)
        try:
            yield
        finally:
            order.unlink(missing_ok=True)
            (self._faults / f"{step}.{when}.reached").unlink(missing_ok=True)

    def reached(self, step: str, when: str = "before", timeout: float = 20) -> None:
        """Wait until the ordered fault is reached."""
        mark = self._faults / f"{step}.{when}.reached"
        self.wait(mark.exists, f"{step} is reached", timeout)

    @contextlib.contextmanager
    def setting(self, trait: str, value: object) -> Iterator[None]:
        """While in the block: starts have that value of a spawner's trait."""
        order = self._faults / f"{trait}.setting"
        order.write_text(json.dumps(value))
        try:
            yield
        finally:
            order.unlink(missing_ok=True)

    def ask_aside(self, user: str, options: dict[str, Any], server: str = "") -> Future[requests.Response]:
        """Ask for a start in a thread: the Hub answers a slow one only after ten seconds."""
        self.add_user(user)
        return self._aside.submit(self.ask, user, options, server)

    def peek(self, user: str, server: str = "") -> list[dict[str, Any]]:
        """The events so far of a start that is under way."""
        found: list[dict[str, Any]] = []
        headers = {"Authorization": f"token {TOKEN}"}
        with contextlib.suppress(requests.RequestException):
            url = f"{self.plan.url}/hub/api/{server_path(user, server)}/progress"
            with requests.get(url, headers=headers, stream=True, timeout=0.5) as answer:
                found.extend(json.loads(line[5:]) for line in answer.iter_lines() if line.startswith(b"data:"))
        return found

    def no_faults(self) -> None:
        """Take back every order."""
        for order in self._faults.iterdir():
            order.unlink()

    def set_policy(self) -> None:
        """The policy of these tests, whatever a test made of it."""
        image = self.plan.image
        for name, content in (("resource-limits", LIMITS), ("profiles", {"profiles": profiles(image)})):
            path = self.policy / f"{name}.yaml"
            text = yaml.safe_dump(content, sort_keys=False)
            if path.read_text() != text:
                draft = path.with_suffix(".new")
                draft.write_text(text)
                draft.replace(path)

    def finished(self, user: str, server: str = "", timeout: float = 30) -> None:
        """Wait until the Hub has no start or stop of that server pending, and none that runs."""
        self.wait(lambda: self.server(user, server) is None, f"{user}'s {server!r} is settled", timeout)

    def clean(self, *, but: tuple[str, ...] = (), timeout: float = 20) -> None:
        """Nothing is left: no container, no live allocation, no operation row."""
        deadline = time.monotonic() + timeout
        while left := self.traces(but=but):
            assert time.monotonic() < deadline, f"left behind: {left}\n{self.tail()}"
            time.sleep(0.1)

    def sweep(self) -> None:
        """Between tests: stop and delete what runs, by the Hub's own doors, and forget what is stopped."""
        self.no_faults()
        users = self.api("GET", "users").json()
        running = [(user["name"], server) for user in users for server in user.get("servers") or {}]
        list(self._aside.map(lambda one: self.halt(*one), running))
        engine, ledger = self.runtime.engine, self.runtime.ledger
        for allocation in ledger.allocations(live=True):
            with operation(self.runtime, allocation, "sweep"):
                for container in {allocation.container_id, allocation.container_name} - {None}:
                    engine.remove(str(container), force=True)
                ledger.release(allocation.id, "between tests")
        for container in self.containers():
            engine.remove(container.id, force=True)
        self.set_policy()


@contextlib.contextmanager
def stub_hub(image: str, *, extra_config: str = "", environment: dict[str, str] | None = None) -> Iterator[StubHub]:
    """A running StubHub."""

    def prepare(hub: LiveHub) -> None:
        assert isinstance(hub, StubHub)
        hub.plan.settings["start_concurrency"] = STARTS
        hub.plan.save()
        folder = hub.plan.state / "faults"
        folder.mkdir()
        (hub.plan.state / "extra_config.py").write_text(FAULTS.format(folder=str(folder)) + extra_config)
        hub.set_policy()

    with live_hub(image, environment=environment, prepare=prepare, kind=StubHub) as hub:
        assert isinstance(hub, StubHub)
        yield hub
