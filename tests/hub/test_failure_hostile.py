"""Hostile input at the REST door of a real Hub: each a clear refusal, and nothing changes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from stub_hub import AWKWARD, StubHub

pytestmark = [pytest.mark.docker, pytest.mark.hub]

DEEP: Any = "x"
for _ in range(400):
    DEEP = [DEEP]

OPTIONS: list[dict[str, Any]] = [
    {"profile": 5},
    {"profile": ["cpu", "small"]},
    {"profile": {"$gt": ""}},
    {"profile": "x" * 100_000},
    {"profile": "../../etc/passwd"},
    {"profile": "small\x00"},
    {"profile": "small\n"},
    {"profile": "\ud800"},
    {"profile": "ｓmall"},
    {"profile": "silent", "size": "s'; DROP TABLE leases; --"},
    {"size": {"s": 1}},
    {"profile": "small", "gpus": -1},
    {"profile": "small", "gpus": 10**9},
    {"profile": "small", "gpus": 10**400},
    {"profile": "small", "gpus": "all"},
    {"profile": "small", "gpus": 1.5},
    {"profile": "small", "gpus": True},
    {"profile": "small", "gpus": "1e3"},
    {"profile": "small", "gpus": 2},
    {"profile": "small", "gpu_kind": "full"},
    {"profile": "small", "gpu_kind": "all"},
    {"profile": "small", "mig_profile": "7g.40gb"},
    {"profile": "small", "mig_profile": "1g.5gb; reboot"},
    {"profile": "cpu", "gpus": 1},
    {"cpus": 1e308},
    {"cpus": "NaN"},
    {"cpus": float("nan")},
    {"cpus": -1},
    {"cpus": 0},
    {"memory": "-1g"},
    {"memory": "1e9"},
    {"memory": 1},
    {"memory": "9" * 60},
    {"image": "alpine:latest"},
    {"image": "-v /:/host"},
    {"image": "../../x"},
    {"image": "sha256:" + "a" * 64},
    {"image": "registry.example:5000/x/y@sha256:" + "a" * 64},
    {"image": ["a", "b"]},
    {"project": "../.."},
    {"project": "/etc"},
    {"project": "a/../../b"},
    {"project": "a\nb"},
    {"project": "a/" * 200},
    {"fresh": "perhaps"},
    {"volumes": {"/": "/host"}},
    {"mounts": [{"Source": "/", "Target": "/host"}]},
    {"privileged": True},
    {"extra_host_config": {"privileged": True}},
    {"devices": ["/dev/sda"]},
    {"device_requests": [{"Count": -1}]},
    {"cap_add": ["ALL"]},
    {"network_mode": "host"},
    {"network_name": "host"},
    {"runtime": "nvidia"},
    {"security_opt": ["seccomp=unconfined"]},
    {"user": "root"},
    {"uid": 0},
    {"owner": "bob"},
    {"server_name": "other"},
    {"cmd": ["sh"]},
    {"env": {"NVIDIA_VISIBLE_DEVICES": "all"}},
    {"environment": {"LD_PRELOAD": "/workspace/x.so"}},
    {"__class__": "x"},
    {"": 1},
    {"x" * 5000: 1},
    {f"key{n}": n for n in range(5000)},
    {"profile": DEEP},
    {"profile": "no-such"},
    {"profile": "whole"},
]


def state(stub: StubHub) -> tuple[Any, ...]:
    """All that may not change: usage, containers, uids given, images."""
    ledger = stub.runtime.ledger
    usage = ledger.usage()
    containers = sorted((c.id, c.state, c.started) for c in stub.containers())
    return usage, containers, ledger.images_of("alice"), ledger.allocations(live=True)


def test_failure_of_hostile_options_each_is_refused_and_changes_nothing(stub: StubHub) -> None:
    """Fails if one of them gets past `SpawnRequest.parse`, `choose`, `choose_image` or `admission.check`."""
    stub.spawn("bob", {"profile": "small"})
    stub.add_user("alice")
    before = state(stub)
    for options in OPTIONS:
        body = json.dumps({"user_options": options})  # NaN and lone surrogates included
        answer = stub.api("POST", "users/alice/server", data=body)
        shown = repr(options)[:100]
        assert 400 <= answer.status_code < 500, f"{shown}: {answer.status_code} {answer.text}"
        message = answer.json()["message"]
        assert message.endswith((".", "?")) and len(message) < 1000, f"{shown}: {message!r}"
        assert "Traceback" not in message and "Exception" not in message, message
        assert state(stub) == before, shown
    rows = stub.runtime.ledger.requests(user="alice", outcome="refused", limit=1000)
    assert len(rows) >= len(OPTIONS)
    assert max(len(str(row.request)) for row in rows) < 10_000


def test_failure_of_bodies_that_are_no_options(stub: StubHub) -> None:
    """The Hub's own checks and ours together: nothing but an object of fields starts anything."""
    stub.add_user("alice")
    before = state(stub)
    for body in (
        b"[]",
        b'"cpu"',
        b"5",
        b'{"user_options": []}',
        b'{"user_options": "x"}',
        b"{",
        b"\xff\xfe",
        b"[[[[" * 9000,
    ):
        answer = stub.api("POST", "users/alice/server", data=body)
        assert 400 <= answer.status_code < 600, body[:30]
        assert state(stub) == before, body[:30]


def test_failure_of_an_image_of_another_user(stub: StubHub) -> None:
    """Fails if a profile's pattern reaches what others saved: by its tag, its id or another of its names."""
    repository = stub.plan.image.partition(":")[0]
    stub.change_profiles(cpu={"images": [f"{repository}:*", "*"]})
    stub.spawn("alice", {"profile": "cpu"})
    facts = stub.container("alice")
    assert facts is not None
    client = stub.runtime.engine.client
    made = client.exec_create(facts.id, ["sh", "-c", "echo secret > /opt/secret"], user="root")
    client.exec_start(made["Id"])
    stub.halt("alice")
    stub.spawn("alice", {"profile": "small"})
    stub.halt("alice")
    (saved,) = stub.runtime.ledger.images_of("alice")
    stub.add_user("bob")
    bare = saved.image_id.removeprefix("sha256:")
    for image in (saved.ref, f"docker.io/library/{saved.ref}", facts.image_ref, saved.image_id, bare, bare[:12]):
        answer = stub.ask("bob", {"profile": "cpu", "image": image})
        assert answer.status_code in (403, 409), f"{image}: {answer.status_code} {answer.text}"
        stub.finished("bob")
    assert not [c for c in stub.containers() if c.labels["ds01.user"] == "bob"]
    stub.spawn("alice", {"profile": "cpu", "image": saved.ref})


@pytest.mark.parametrize(
    "server", ["main", "..", "a b", "UPPER", "a--b", "x" * 300, "é", "lab;rm", "-rf", "%2e%2e", "a%2fb", "a%00b"]
)
def test_failure_of_hostile_server_names(stub: StubHub, server: str) -> None:
    """Fails if a name that Docker or the AIME tools cannot have reaches a container's name."""
    stub.add_user("alice")
    before = state(stub)
    answer = stub.api("POST", f"users/alice/servers/{server}", json={"user_options": {"profile": "cpu"}})
    assert 400 <= answer.status_code < 500, answer.text
    assert state(stub) == before


def test_failure_of_awkward_user_names_nowhere(stub: StubHub) -> None:
    """Fails if a name reaches a path, a cgroup, a label or a command unescaped. Everybody gets a server."""
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda name: stub.spawn(name, {"profile": "cpu"}), AWKWARD))
    uids, parents = set(), set()
    for name in AWKWARD:
        facts = stub.container(name)
        assert facts is not None and facts.running, name
        assert facts.env["JUPYTERHUB_USER"] == name
        uid = int(facts.user.partition(":")[0])
        uids.add(uid)
        parents.add(facts.cgroup_parent)
        sources = {mount.target: mount.source for mount in facts.mounts}
        assert sources["/workspace"] == f"{stub.plan.settings['workspaces']}/{uid}"
    assert len(uids) == len(parents) == len(AWKWARD)
