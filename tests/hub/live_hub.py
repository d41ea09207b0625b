"""A real Hub with real containers for tests: started, killed and restarted at will, with its own everything."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import docker
import requests
import yaml

from deploy import instance
from deploy.instance import DEMO_ENV, ROOT, Plan
from ds01spawner.containers.facts import ContainerFacts
from ds01spawner.model import Allocation
from ds01spawner.runtime import Runtime

TOKEN = "test-token-of-the-test-service-only"
TIMEOUT_S = 90

CONFIG = f"""
import os
from pathlib import Path
source = Path({str(ROOT)!r}, "deploy", "hub_config.py")
exec(compile(source.read_text(), str(source), "exec"))
c.JupyterHub.services.append({{"name": "tester", "api_token": {TOKEN!r}}})
c.JupyterHub.load_roles.append({{
    "name": "tester",
    "services": ["tester"],
    "scopes": ["admin:users", "admin:servers", "admin:server_state", "list:users", "admin:groups", "tokens"],
}})
c.Spawner.poll_interval = 2
c.DS01Spawner.http_timeout = 40
extra = Path(os.environ[{DEMO_ENV!r}]).parent / "extra_config.py"
if extra.exists():
    exec(compile(extra.read_text(), str(extra), "exec"))
"""


def server_path(user: str, server: str = "") -> str:
    """A server's place in the REST API, whatever characters its names have."""
    name = quote(user, safe="")
    return f"users/{name}/servers/{quote(server, safe='')}" if server else f"users/{name}/server"


class LiveHub:
    """One installation whose Hub can be restarted; talks to it as an admin service does."""

    def __init__(self, plan: Plan, environment: Mapping[str, str] | None = None) -> None:
        self.plan = plan
        self.environment = dict(environment or {})
        self.log = plan.state / "hub.log"
        self.config = plan.state / "test_config.py"
        self.config.write_text(CONFIG)
        self.process: subprocess.Popen[bytes] | None = None
        self._runtime: Runtime | None = None

    # ---------------------------------------------------------------- the Hub's process

    def start(self) -> None:
        """Start the Hub and wait until it answers and its watcher has written a snapshot."""
        environment = os.environ | {DEMO_ENV: str(self.plan.file), "PYTHONPATH": str(ROOT)} | self.environment
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterhub", "-f", str(self.config)],
                cwd=self.plan.state,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.wait(self._up, "the Hub answers")

    def _up(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise AssertionError(f"the Hub ended: {self.tail()}")
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.plan.url}/hub/health", timeout=2).ok
        return False

    def end(self, number: int = signal.SIGTERM) -> None:
        """End the Hub (and what it started) with a signal and wait for it."""
        if self.process is not None:
            if number == signal.SIGKILL:
                self.process.kill()
                self.process.wait(20)
            instance.end_processes(self.plan.state)
            self.process.wait(20)
            self.process = None

    def tail(self, lines: int = 40) -> str:
        """The end of the Hub's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # ---------------------------------------------------------------- what is really there

    def logged(self, text: str) -> int:
        """How often the Hub's log has `text`."""
        return self.log.read_text(errors="replace").count(text)

    @property
    def runtime(self) -> Runtime:
        """Ledger and Docker of this installation, seen from outside the Hub."""
        if self._runtime is None:
            self._runtime = Runtime.open(role="test", settings=self.plan.resolved())
        return self._runtime

    def allocation(self, user: str, server: str = "") -> Allocation | None:
        """The live allocation of a server."""
        return self.runtime.ledger.find(user, server)

    def container(self, user: str, server: str = "") -> ContainerFacts | None:
        """The container that the ledger knows for a server."""
        found = self.allocation(user, server)
        return self.runtime.engine.inspect_facts(found.container_id) if found and found.container_id else None

    def containers(self) -> list[ContainerFacts]:
        """All containers of this installation."""
        own = self.runtime.ledger.instance
        return [c for c in self.runtime.engine.list_facts() if c.labels.get("ds01.instance") == own]

    def traces(self, *, but: Collection[str] = ()) -> list[str]:
        """What is left of servers that do not run: containers, live allocations, operation rows, private tags.

        Args:
            but: users who may have something.
        """
        found = [f"container {c.name} ({c.state})" for c in self.containers() if c.labels["ds01.user"] not in but]
        live = [a for a in self.runtime.ledger.allocations(live=True) if a.user not in but]
        found += [f"{a.state.value} {a.user}/{a.server_name} {[u.unit_uuid for u in a.leases]}" for a in live]
        ours = {a.id for a in live}
        found += [f"operation {o.what} by {o.who}" for o in self.runtime.ledger.operations() if o.allocation_id in ours]
        return found

    def close(self) -> None:
        """End the Hub and the test's own connections."""
        self.end()
        if self._runtime is not None:
            self._runtime.close()

    # ---------------------------------------------------------------- the Hub's API

    def api(self, method: str, path: str, **arguments: Any) -> requests.Response:
        """One question to the Hub's REST API as the test's service."""
        headers = {"Authorization": f"token {TOKEN}"} | dict(arguments.pop("headers", {}))
        return requests.request(
            method, f"{self.plan.url}/hub/api/{path}", headers=headers, timeout=TIMEOUT_S, **arguments
        )

    def add_user(self, user: str) -> None:
        """Make a Hub user; no error if there is one."""
        assert self.api("POST", f"users/{quote(user, safe='')}").status_code in (201, 409)

    def ask(self, user: str, options: Mapping[str, Any] | None = None, server: str = "") -> requests.Response:
        """Ask for a start and return at once (201 ready, 202 pending, 4xx refused)."""
        return self.api("POST", server_path(user, server), json=dict(options) if options is not None else None)

    def spawn(self, user: str, options: Mapping[str, Any] | None = None, server: str = "") -> None:
        """Start a server and wait until it answers."""
        self.add_user(user)
        answer = self.ask(user, options, server)
        assert answer.status_code in (201, 202), f"{answer.status_code} {answer.text}\n{self.tail()}"
        self.wait(lambda: self._ready(user, server), f"{user}'s server {server!r} is ready")

    def _ready(self, user: str, server: str) -> bool:
        model = self.server(user, server)
        if model is None:
            raise AssertionError(f"{user}'s start failed:\n{self.tail()}")
        return bool(model["ready"])

    def server(self, user: str, server: str = "") -> dict[str, Any] | None:
        """The Hub's model of a server; None if the Hub has none that is active."""
        servers = self.api("GET", f"users/{quote(user, safe='')}").json().get("servers", {})
        model: dict[str, Any] | None = servers.get(server)
        return model

    def progress(self, user: str, server: str = "") -> list[dict[str, Any]]:
        """All events of the progress stream, until it ends."""
        answer = self.api("GET", f"{server_path(user, server)}/progress")
        return [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data:")]

    def halt(self, user: str, server: str = "") -> None:
        """Stop a server and wait until the Hub has finished."""
        answer = self.api("DELETE", server_path(user, server))
        assert answer.status_code in (202, 204), f"{answer.status_code} {answer.text}"
        self.wait(lambda: self.server(user, server) is None, f"{user}'s server {server!r} is stopped")

    def wait(self, condition: Any, what: str, timeout: float = TIMEOUT_S) -> None:
        """Until `condition()` is true."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{self.tail()}"
            time.sleep(0.2)

    # ---------------------------------------------------------------- policy

    @property
    def policy(self) -> Path:
        """Folder of the policy files."""
        return Path(self.plan.settings["config_dir"])

    def change_limits(self, **groups: Mapping[str, Any]) -> None:
        """Edit groups (or `defaults`) of resource-limits.yaml on disk."""
        self._edit("resource-limits.yaml", lambda c, n: c if n == "defaults" else c["groups"], groups)

    def change_profiles(self, **profiles: Mapping[str, Any]) -> None:
        """Edit or add profiles on disk."""
        self._edit("profiles.yaml", lambda c, _: c["profiles"], profiles)

    def _edit(self, name: str, section: Any, changes: Mapping[str, Mapping[str, Any]]) -> None:
        path = self.policy / name
        content = yaml.safe_load(path.read_text())
        for key, values in changes.items():
            part = section(content, key)
            part[key] = {**part.get(key, {}), **values}
        draft = path.with_suffix(".new")
        draft.write_text(yaml.safe_dump(content, sort_keys=False))
        draft.replace(path)


@contextlib.contextmanager
def live_hub(
    image: str,
    *,
    extra_config: str = "",
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[LiveHub], None] = lambda _hub: None,
    kind: type[LiveHub] | None = None,
) -> Iterator[LiveHub]:
    """An installation with a running Hub; everything of it is removed at the end.

    Args:
        extra_config: runs at the end of the Hub's configuration, in its process. environment: of the Hub, besides ours.
        prepare: called before the Hub starts (another policy, …).
    """
    client = docker.APIClient(timeout=60)
    try:
        # Another run of the tests may look for a free port at the same moment.
        with instance.prepared(client, port=random.randrange(18000, 28000), image=image) as plan:
            (plan.state / "extra_config.py").write_text(extra_config)
            hub = (kind or LiveHub)(plan, environment)
            try:
                prepare(hub)
                hub.start()
                yield hub
            finally:
                hub.close()
    finally:
        client.close()
