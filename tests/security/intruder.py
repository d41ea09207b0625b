"""What the tests of this folder attack with: a lab with a victim, and a foothold inside a user's real container."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import docker
import requests
import yaml
from live_hub import LiveHub
from stub_hub import COMMAND

EVIL_IMAGE = "dstest-sec-evil:1"
"""An image whose author means no good; `docker build` makes it from the demo's."""

MEMORY = 192 * 2**20
PIDS = 64
SHM = 16 * 2**20

STUDENTS = ["alice", "mallory", "greedy", "student1", "-x.y+z@uni.example"]
LIMITS = {
    "defaults": {
        "max_cpus": 0.5,
        "memory": MEMORY,
        "shm_size": SHM,
        "pids_limit": PIDS,
        "max_mig_instances": 1,
        "allow_full_gpu": False,
        "max_containers_per_user": 3,
        "policies": {"sigterm_grace_s": 1},
    },
    "groups": {"students": {"members": STUDENTS, "priority": 10}},
}

EVIL = """
FROM {base}
LABEL ds01.managed=true ds01.interface=hub ds01.instance={instance} ds01.token=1 ds01.user=alice ds01.probe=true
LABEL aime.mlc=alice aime.mlc.USER=alice aime.mlc.NAME=main
LABEL note="x,aime.mlc.USER=alice" broken="one,two"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=all DS01_GPUS=everything JUPYTERHUB_USER=alice HOME=/root
USER root
VOLUME /opt/planted
HEALTHCHECK --interval=1s CMD touch /tmp/health
ONBUILD RUN false
ENTRYPOINT ["/bin/sh", "-c", "id > /tmp/entry; exec \\"$0\\" \\"$@\\""]
"""


def profiles(image: str) -> dict[str, object]:
    """Cards with the stub; `any` offers every image there is, the worst that a policy can say."""
    small = {"s": {"gpu": {"mig_profile": "1g.5gb"}}}
    return {
        "cpu": {"image": image, "command": COMMAND, "default": True, "sizes": {"s": {}}},
        "small": {"image": image, "command": COMMAND, "sizes": small},
        "any": {"image": image, "command": COMMAND, "images": ["*"], "sizes": {"s": {}}},
        "evil": {"image": EVIL_IMAGE, "command": COMMAND, "sizes": {"s": {}}},
        "silent": {"image": image, "command": ["sleep", "1000"], "sizes": {"s": {}}},
    }


@dataclass(frozen=True)
class Foothold:
    """A program of a user's inside their own container."""

    client: docker.APIClient
    container: str
    uid: int

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Exit code and output of a command, as the user, with no rights beyond those of the container's processes."""
        user = f"{self.uid}:{self.uid}"
        made = self.client.exec_create(self.container, list(command), user=user, environment=dict(environment or {}))
        output = self.client.exec_start(made["Id"]).decode(errors="replace")
        return int(self.client.exec_inspect(made["Id"])["ExitCode"] or 0), output

    def python(self, code: str) -> Any:
        """What a Python program prints as JSON in its last line."""
        status, output = self.run("python3", "-c", code)
        assert status == 0, output
        return json.loads(output.splitlines()[-1])

    def outcomes(self, prelude: str, tries: Mapping[str, str]) -> dict[str, str]:
        """What became of each try (a Python expression): an errno's name, or `OK …` with its value."""
        code = OUTCOMES.replace("PRELUDE", prelude).replace("TRIES", repr(dict(tries)))
        found: dict[str, str] = self.python(code)
        return found


OUTCOMES = """
import ctypes, errno, json, os, socket, stat
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def write(path, text):
    with open(path, "w") as file:
        file.write(text)
PRELUDE
found = {}
for name, expression in TRIES.items():
    try:
        found[name] = f"OK {eval(expression)!r}"[:300]
    except OSError as error:
        found[name] = errno.errorcode.get(error.errno, "") if error.errno else type(error).__name__
print(json.dumps(found))
"""


class Lab:
    """The Hub, its policy, and ways into it."""

    def __init__(self, hub: LiveHub, client: docker.APIClient) -> None:
        self.hub = hub
        self.client = client

    def inside(self, user: str, server: str = "") -> Foothold:
        """A foothold in the running container of a server; started if it does not run."""
        facts = self.hub.container(user, server)
        if facts is None or not facts.running:
            self.hub.spawn(user, {"profile": "cpu"}, server)
            facts = self.hub.container(user, server)
        allocation = self.hub.allocation(user, server)
        assert facts is not None and allocation is not None and allocation.uid is not None
        return Foothold(self.client, facts.id, allocation.uid)

    def token(self, user: str) -> str:
        """A token with everything that the user may do."""
        self.hub.add_user(user)
        answer = self.hub.api("POST", f"users/{user}/tokens", json={"note": "test"})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["token"])

    def as_user(self, token: str, method: str, path: str, **arguments: Any) -> requests.Response:
        """One question to the Hub's REST API with somebody's own token."""
        headers = {"Authorization": f"token {token}"}
        url = f"{self.hub.plan.url}/hub/api/{path}"
        return requests.request(method, url, headers=headers, timeout=90, **arguments)

    def evil_image(self) -> str:
        """Build the image whose author means no good."""
        text = EVIL.format(base=self.hub.plan.image, instance=self.hub.runtime.ledger.instance)
        lines = list(
            self.client.build(
                fileobj=io.BytesIO(text.encode()), tag=EVIL_IMAGE, network_mode="none", decode=True, rm=True
            )
        )
        assert not [line for line in lines if "error" in line], lines
        return EVIL_IMAGE

    def stop_all(self, user: str) -> None:
        """Stop what runs of a user and delete their named servers."""
        for server in list(self.hub.api("GET", f"users/{user}").json().get("servers") or {}):
            self.hub.halt(user, server)

    def settled(self, user: str, seconds: float = 30) -> None:
        """Wait until nothing of a user is pending."""
        deadline = time.monotonic() + seconds
        while any(s["pending"] for s in self.hub.api("GET", f"users/{user}").json()["servers"].values()):
            assert time.monotonic() < deadline, self.hub.tail()
            time.sleep(0.2)


@contextlib.contextmanager
def lab_of(image: str, live_hub: Callable[..., AbstractContextManager[LiveHub]]) -> Iterator[Lab]:
    """A lab that runs; everything of it is removed at the end."""

    def prepare(hub: LiveHub) -> None:
        for name, content in (("resource-limits", LIMITS), ("profiles", {"profiles": profiles(image)})):
            (hub.policy / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    client = docker.APIClient(timeout=60)
    try:
        with live_hub(image, prepare=prepare) as hub:
            yield Lab(hub, client)
    finally:
        with contextlib.suppress(docker.errors.APIError):
            client.remove_image(EVIL_IMAGE, force=True)
        client.close()
