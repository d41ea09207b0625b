"""Through the Hub's doors with a student's account: other people's things, more than the policy gives, odd names."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from intruder import LIMITS, Foothold, Lab

from ds01spawner.containers import aime
from ds01spawner.containers.accounts import Account, account_texts
from ds01spawner.containers.slices import cgroup_path, slice_name
from ds01spawner.ledger.store import Ledger

pytestmark = [pytest.mark.docker, pytest.mark.hub]

AWKWARD = [
    "a.b", "a-b", "a_b", "ab", "A", "a", "x@y", "x@z", "x", "-a", "--", "日本", "é", "e\u0301", "o'neil <b>", "a b",
    "a,b", "a;b", "a=b", "root", "daemon", "70000", "main", "..x", "$(id)", "`id`", "%2e%2e", "a%00b", "\u202egnp",
    "x" * 32, "x" * 33, "x" * 60, "cgroup.procs", "ubuntu", "a-70000", "a:b", "a\\b", "*", "user\ttab", "😀",
]  # fmt: skip


# --------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def alice(lab: Lab) -> Foothold:
    """The victim, with a running server."""
    return lab.inside("alice")


@pytest.fixture(scope="module")
def mallory(lab: Lab) -> Foothold:
    """The attacker, with a running server."""
    return lab.inside("mallory")


OTHERS = [
    ("GET", "users", None),
    ("GET", "users/alice", None),
    ("GET", "users/alice/servers/", None),
    ("GET", "users/alice/server/progress", None),
    ("GET", "users/alice/tokens", None),
    ("POST", "users/alice/tokens", {}),
    ("POST", "users/alice/activity", {"last_activity": "2030-01-01T00:00:00Z"}),
    ("POST", "users/alice/server", {"profile": "cpu"}),
    ("POST", "users/alice/servers/mine", {"profile": "cpu"}),
    ("PUT", "users/alice/servers/mine", {"user_options": {"profile": "cpu"}}),
    ("PATCH", "users/alice/servers/", {"user_options": {"profile": "cpu"}}),
    ("DELETE", "users/alice/server", None),
    ("DELETE", "users/alice", None),
    ("PATCH", "users/mallory", {"admin": True}),
    ("POST", "users/mallory2", None),
    ("POST", "users/mallory/tokens", {"scopes": ["admin:users"]}),
    ("POST", "users/mallory/tokens", {"roles": ["admin"]}),
    ("GET", "groups", None),
    ("POST", "groups/admins/users", {"users": ["mallory"]}),
    ("GET", "services", None),
    ("GET", "proxy", None),
    ("GET", "info", None),
    ("POST", "shutdown", {}),
]
"""Questions that no token of mallory's may have answered."""


@pytest.mark.parametrize("kind", ["of the container", "of the user"])
def test_isolation_a_token_is_of_no_use_for_anybody_else(
    lab: Lab, alice: Foothold, mallory: Foothold, kind: str
) -> None:
    token = _token_inside(lab, "mallory") if kind == "of the container" else lab.token("mallory")
    assert lab.as_user(token, "GET", "user").json()["name"] == "mallory", "it is a living token"
    given = {
        f"{method} {path}": answer.status_code
        for method, path, body in OTHERS
        if (answer := lab.as_user(token, method, path, json=body)).status_code not in (400, 403, 404)
    }
    assert given == {}
    if kind == "of the container":
        for path in ("users/mallory/tokens", "users/mallory/server", "users/mallory/servers/more"):
            assert lab.as_user(token, "POST", path, json={}).status_code == 403, "not even for its owner"
    facts = lab.hub.container("alice")
    assert facts is not None and facts.running


def _token_inside(lab: Lab, user: str) -> str:
    return lab.inside(user).run("sh", "-c", "echo $JUPYTERHUB_API_TOKEN")[1].strip()


# --------------------------------------------------------------------------- options


HOSTILE = [
    {"volumes": {"/": "/host"}},
    {"mounts": [{"source": "/", "target": "/host"}]},
    {"devices": ["/dev/sda"]},
    {"privileged": True},
    {"cap_add": ["SYS_ADMIN"]},
    {"security_opt": ["seccomp=unconfined"]},
    {"network": "host"},
    {"network_mode": "host"},
    {"runtime": "nvidia"},
    {"env": {"NVIDIA_VISIBLE_DEVICES": "all"}},
    {"environment": {"NVIDIA_VISIBLE_DEVICES": "all"}},
    {"command": ["sh"]},
    {"cmd": "sh"},
    {"user": "root"},
    {"extra_host_config": {"privileged": True}},
    {"extra_create_kwargs": {"user": "root"}},
    {"labels": {"ds01.user": "alice"}},
    {"name": "main._.70000"},
    {"gpus": -1},
    {"gpus": 10**9},
    {"gpus": "all"},
    {"gpus": True},
    {"gpu_kind": "full"},
    {"cpus": "1e9"},
    {"memory": "9999t"},
    {"pids_limit": -1},
    {"project": "../../etc"},
    {"project": "/"},
    {"profile": {"a": 1}},
    {"profile": ["cpu", "small"]},
    {"profile": "cpu\n"},
    {"size": "../s"},
    {"image": "x --privileged"},
    {"image": "../../x"},
    {"fresh": "yes"},
    {"uid": 0},
    {"": ""},
    {"__class__": "x"},
    {"x" * 300: 1},
    {f"k{i}": i for i in range(5000)},
    {"image": "x" * 2**20},
]


def test_hostile_options_reach_nothing_by_rest_and_by_link(lab: Lab) -> None:
    token = lab.token("greedy")
    before = {c.id for c in lab.hub.containers()}
    for options in HOSTILE:
        answer = lab.as_user(token, "POST", "users/greedy/server", json={"profile": "cpu", **options})
        assert 400 <= answer.status_code < 500, (options, answer.status_code, answer.text)
        assert "Traceback" not in answer.text
    for options in ({"user_options": []}, {"user_options": "x"}, ["x"], "x", 7):
        answer = lab.as_user(token, "POST", "users/greedy/servers/odd", json=options)
        assert 400 <= answer.status_code < 500, (options, answer.status_code)
    # PATCH and PUT write options without a start (Hub 6): what no start would read is not even stored.
    if lab.as_user(token, "PUT", "users/greedy/servers/later", json={"user_options": {"privileged": True}}).ok:
        servers = lab.hub.api("GET", "users/greedy?include_stopped_servers=true").json()["servers"]
        assert servers["later"]["user_options"] == {}
    assert {c.id for c in lab.hub.containers()} == before
    assert lab.hub.allocation("greedy") is None


def test_hostile_server_names_by_rest(lab: Lab) -> None:
    token = lab.token("greedy")
    before = {c.id for c in lab.hub.containers()}
    for name in ("main", "MAIN", "..", "a/b", "ü", "-x", "a b", "x" * 200, "a._.70000", "$(id)", "x\0", "a,b", "a\nb"):
        answer = lab.as_user(token, "POST", f"users/greedy/servers/{quote(name, safe='')}", json={"profile": "cpu"})
        assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.text)
    assert {c.id for c in lab.hub.containers()} == before


# --------------------------------------------------------------------------- names of users


def test_names_of_two_users_share_nothing(tmp_path: Path) -> None:
    """Uid (so folders, container names, image tags), cgroup parents under both drivers, account lines."""
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    try:
        uids = {name: ledger.uid_of(name, (70000, 70999), lambda uid: False) for name in AWKWARD}
        assert uids == {name: ledger.uid_of(name, (70000, 70999), lambda uid: False) for name in AWKWARD}
    finally:
        ledger.close()
    assert len(set(uids.values())) == len(AWKWARD)
    for place in (cgroup_path, slice_name):
        placed = [place("ds01", "students", name) for name in AWKWARD]
        assert len(set(placed)) == len(AWKWARD)
        assert not [(a, b) for a in placed for b in placed if a != b and b.startswith(f"{a.removesuffix('.slice')}/")]
    for name, uid in uids.items():
        account = aime.account_name(name, uid)
        home = f"/home/{account}"
        passwd, group = account_texts("root:x:0:0::/root:/bin/sh\n", "root:x:0:\n", Account(account, uid, uid, home))
        assert [line.split(":")[:4] for line in passwd.splitlines()] == [
            ["root", "x", "0", "0"],
            [account, "x", str(uid), str(uid)],
        ]
        assert len(group.splitlines()) == 2
    accounts = [aime.account_name(name, uid) for name, uid in uids.items()]
    assert len(set(accounts)) == len(AWKWARD)


def test_names_of_users_are_taken_or_refused_and_never_break_the_hub(lab: Lab) -> None:
    for name in [*AWKWARD, "a/b", "..", ".", "", "x" * 300]:
        status = lab.hub.api("POST", f"users/{quote(name, safe='')}").status_code
        assert status in (201, 400, 404, 405, 409), (name, status)
    odd = "-x.y+z@uni.example"
    assert odd in LIMITS["groups"]["students"]["members"]  # type: ignore[index]
    inside = lab.inside(odd)
    facts = lab.hub.container(odd)
    assert facts is not None
    assert facts.name == f"main._.{inside.uid}"
    assert facts.cgroup_parent.endswith(r"/students/\x2dx.y\x2bz\x40uni.example")
    status, told = inside.run("id", "-un")
    assert (status, told.strip()) == (0, aime.account_name(odd, inside.uid))
    lab.stop_all(odd)


# --------------------------------------------------------------------------- more than one's share


@contextlib.contextmanager
def watching(lab: Lab, user: str) -> Iterator[list[int]]:
    """Holds the most containers of a user that ran at the same time, and the most units they held."""
    most, over = [0, 0], threading.Event()

    def look() -> None:
        while not over.is_set():
            live = [a for a in lab.hub.runtime.ledger.allocations(live=True) if a.user == user]
            busy = [a for a in live if a.state.value in ("reserved", "active")]
            most[:] = [max(most[0], len(busy)), max(most[1], sum(len(a.leases) for a in live))]
            time.sleep(0.02)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(("profile", "containers"), [("small", 1), ("cpu", 3)])
def test_race_of_32_starts_at_once_never_passes_the_quota(lab: Lab, profile: str, containers: int) -> None:
    """The quota is counted where it is decided (S13, "lock"): 16 named servers, each asked for twice at a time."""
    token = lab.token("greedy")
    lab.stop_all("greedy")
    names = [f"r{number}" for number in range(16)]

    def ask(name: str) -> int:
        return lab.as_user(token, "POST", f"users/greedy/servers/{name}", json={"profile": profile}).status_code

    with watching(lab, "greedy") as most, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, names * 2))
        lab.settled("greedy")
    running = [c for c in lab.hub.containers() if c.running and c.labels["ds01.user"] == "greedy"]
    assert most[0] <= containers and most[1] <= 1
    assert len(running) == containers, "and everybody gets what they may have"
    assert {status // 100 for status in answers} <= {2, 4}
    lab.stop_all("greedy")


# --------------------------------------------------------------------------- in everybody's way


def test_failure_of_bodies_of_megabytes_and_open_streams_leave_the_hub_in_order(lab: Lab) -> None:
    token = lab.token("greedy")
    lab.stop_all("greedy")
    answer = lab.as_user(token, "POST", "users/greedy/server", json={"image": "x" * (8 * 2**20)})
    assert answer.status_code == 400 and len(answer.content) < 2000, "the answer does not repeat it"
    url = f"{lab.hub.plan.url}/hub/api/users/greedy/server/progress"
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as streams:
        start = pool.submit(lab.as_user, token, "POST", "users/greedy/server", json={"profile": "silent"})
        lab.hub.wait(lambda: lab.hub.container("greedy") is not None, "it is starting")
        for _ in range(40):
            stream = requests.get(url, headers={"Authorization": f"token {token}"}, stream=True, timeout=30)
            streams.enter_context(stream)
            assert stream.status_code == 200
        assert requests.get(f"{lab.hub.plan.url}/hub/health", timeout=5).ok
        assert lab.as_user(token, "DELETE", "users/greedy/server").status_code in (202, 204)
        start.result()
    lab.hub.wait(lambda: lab.hub.server("greedy") is None, "the start is taken back")
    lab.hub.wait(
        lambda: not [c for c in lab.hub.containers() if c.labels["ds01.user"] == "greedy" and c.running], "gone"
    )
