"""Starts on a state that is not as the Hub thinks: tokens, lost servers, changed settings, missing folders, no memory.

Each test says what it fails without.
"""

from __future__ import annotations

import json
import sqlite3

import docker
import pytest
import requests
from stub_hub import StubHub

from ds01spawner.containers import aime
from ds01spawner.containers.engine import ContainerFacts
from ds01spawner.containers.spec import api_token
from ds01spawner.servers import operation, strip

pytestmark = [pytest.mark.docker, pytest.mark.hub]


def container(stub: StubHub, user: str, server: str = "") -> ContainerFacts:
    """The container of a server that must have one."""
    found = stub.container(user, server)
    assert found is not None
    return found


def owner_of(stub: StubHub, token: str | None) -> str | None:
    """Whom the Hub takes the bearer of a token for; None = nobody."""
    url = f"{stub.plan.url}/hub/api/user"
    answer = requests.get(url, headers={"Authorization": f"token {token}"}, timeout=10)
    return str(answer.json()["name"]) if answer.ok else None


def inside(stub: StubHub, user: str, script: str) -> str:
    """What a shell as root prints inside a user's container."""
    client = docker.APIClient()
    try:
        made = client.exec_create(container(stub, user).id, ["sh", "-c", script], user="root")
        return str(client.exec_start(made["Id"]).decode())
    finally:
        client.close()


# --------------------------------------------------------------------------- tokens


def test_failure_of_a_token_container_that_is_used_again_has_a_living_one(stub: StubHub) -> None:
    """Fails if the Hub revokes the token of a container that waits for its next start (`will_resume`)."""
    stub.spawn("alice", {"profile": "cpu"})
    first = container(stub, "alice")
    stub.halt("alice")
    assert owner_of(stub, api_token(first)) == "alice"
    stub.spawn("alice", {"profile": "cpu"})
    again = container(stub, "alice")
    assert again.id == first.id and api_token(again) == api_token(first)
    assert owner_of(stub, api_token(again)) == "alice"


def test_failure_of_a_token_that_was_revoked_makes_a_new_container(stub: StubHub) -> None:
    """Fails without `token_lives`: the Hub would bring a revoked token back to life."""
    stub.spawn("alice", {"profile": "cpu"})
    first = container(stub, "alice")
    stub.halt("alice")
    for token in stub.api("GET", "users/alice/tokens").json()["api_tokens"]:
        assert stub.api("DELETE", f"users/alice/tokens/{token['id']}").status_code == 204
    assert owner_of(stub, api_token(first)) is None
    stub.spawn("alice", {"profile": "cpu"})
    second = container(stub, "alice")
    assert second.id != first.id and api_token(second) != api_token(first)
    assert owner_of(stub, api_token(second)) == "alice" and owner_of(stub, api_token(first)) is None


def test_failure_of_a_token_stripped_container_carries_none_and_the_hub_forgets_it(stub: StubHub) -> None:
    """Fails if `without_devices` copies the token, or if old tokens of a server outlive its new container."""
    stub.change_limits(defaults={"gpu_hold_after_stop": "1h"})
    stub.spawn("alice", {"profile": "small"})
    held = api_token(container(stub, "alice"))
    stub.halt("alice")
    assert owner_of(stub, held) == "alice", "the very container can go on"
    allocation, facts = stub.allocation("alice"), container(stub, "alice")
    assert allocation is not None
    with operation(stub.runtime, allocation, "strip"):  # what the watcher does at the end of the hold
        strip(stub.runtime, allocation, facts)
    bare = container(stub, "alice")
    assert bare.id != facts.id and api_token(bare) is None and held not in json.dumps(dict(bare.env))
    stub.spawn("alice", {"profile": "small"})
    second = container(stub, "alice")
    assert second.id != bare.id and owner_of(stub, api_token(second)) == "alice"
    assert owner_of(stub, held) is None


def test_failure_of_a_start_revokes_the_token_that_it_made(stub: StubHub) -> None:
    """Fails if `will_resume` says yes for a start that failed: each failure would leave a living token."""
    stub.add_user("alice")
    before = stub.api("GET", "users/alice/tokens").json()["api_tokens"]
    with stub.fault("finish", "before", "bug"):
        assert stub.ask("alice", {"profile": "small"}).status_code == 500
    stub.finished("alice")
    assert len(stub.api("GET", "users/alice/tokens").json()["api_tokens"]) == len(before)


# --------------------------------------------------------------------------- what the Hub lost


def test_failure_of_the_hubs_memory_stops_first_what_runs_behind_its_back(stub: StubHub) -> None:
    """Fails if `_require_own` takes a running container over silently, or if a second one is started beside it."""
    stub.spawn("alice", {"profile": "small"})
    before = container(stub, "alice")
    stub.end()
    with sqlite3.connect(stub.plan.resolved().state_dir / "jupyterhub.sqlite") as database:
        database.execute("UPDATE spawners SET server_id = NULL, state = '{}'")
    stub.start()
    assert stub.server("alice") is None and container(stub, "alice").running
    stub.spawn("alice", {"profile": "small"})
    after = container(stub, "alice")
    assert after.running and after.started != before.started
    assert [c.name for c in stub.containers()] == [after.name]
    assert len(stub.runtime.ledger.usage().taken()) == 1
    stub.halt("alice")
    assert not stub.runtime.ledger.usage().taken()


def test_failure_of_an_active_allocation_whose_container_is_gone(stub: StubHub) -> None:
    """Fails if `poll` says "running" for ever, or the next start trips over the old row."""
    stub.spawn("alice", {"profile": "small"})
    stub.runtime.engine.remove(container(stub, "alice").id, force=True)
    stub.finished("alice")
    stub.clean()
    stub.spawn("alice", {"profile": "small"})


@pytest.mark.parametrize("kind", ["bug", "docker"])
def test_failure_of_a_look_at_a_container_is_no_evidence(stub: StubHub, kind: str) -> None:
    """Fails if `poll` lets any exception out: the Hub would take the server for dead and forget it."""
    stub.spawn("alice", {"profile": "small"})
    before = stub.logged("assuming that it still runs")
    with stub.fault("inspect_facts", "before", kind):
        stub.wait(lambda: stub.logged("assuming that it still runs") > before, "a poll failed")
        stub.end()
        stub.start()
    stub.wait(lambda: (stub.server("alice") or {}).get("ready"), "still there")
    assert container(stub, "alice").running


def test_failure_of_settling_leaves_the_lease_to_the_watcher(stub: StubHub) -> None:
    """Fails if a stop whose units cannot be given back now hangs, or frees them although a container names them."""
    stub.spawn("alice", {"profile": "small"})
    with stub.fault("remove", "before", "docker"):
        stub.halt("alice")
    allocation, facts = stub.allocation("alice"), container(stub, "alice")
    assert allocation is not None and allocation.leases and allocation.state.value == "held"
    assert not facts.may_run
    assert allocation.held_until is not None, "the watcher ends this hold at its next pass"
    stub.spawn("alice", {"profile": "small"})


def test_failure_of_deletion_of_servers_and_users_leaves_nothing(stub: StubHub) -> None:
    """Fails without `delete_forever`, or if it forgets the private tag."""
    stub.spawn("carol", {"profile": "small"}, "lab")
    stub.spawn("carol", {"profile": "cpu"})
    private = container(stub, "carol").image_ref
    stub.halt("carol", "lab")
    assert stub.api("DELETE", "users/carol/servers/lab", json={"remove": True}).status_code == 204
    assert [a.server_name for a in stub.runtime.ledger.allocations()] == [""]
    assert stub.api("DELETE", "users/carol").status_code == 204
    stub.clean()
    assert stub.runtime.engine.image_facts(private) is None


@pytest.mark.parametrize("label", ["token", "user"])
def test_failure_of_a_container_that_the_ledger_does_not_know_is_left_alone(stub: StubHub, label: str) -> None:
    """Fails if a ledger from a backup stops a newer server, or mixes up two users' containers of one uid."""
    stub.spawn("alice", {"profile": "cpu"})
    known = container(stub, "alice")
    stub.halt("alice")
    stub.sweep()
    changed = {aime.LABEL_TOKEN: "999999"} if label == "token" else {aime.LABEL_USER: "bob"}
    body = {
        "Image": stub.plan.image,
        "Cmd": ["sleep", "60"],
        "Labels": {**known.labels, **changed},
        "HostConfig": {"NetworkMode": "none"},
    }
    engine = stub.runtime.engine
    strange = engine.create(known.name, body)
    engine.start(strange)
    answer = stub.ask("alice", {"profile": "cpu"})
    assert answer.status_code == 409, answer.text
    wanted = "records do not know it" if label == "token" else "belongs to another user"
    assert wanted in answer.json()["message"]
    stub.finished("alice")
    facts = engine.inspect_facts(strange)
    assert facts is not None and facts.running
    assert not stub.runtime.ledger.allocations()
    engine.remove(strange, force=True)


# --------------------------------------------------------------------------- what changed since


def test_failure_of_old_hub_addresses_makes_a_new_container_and_a_restart_alone_does_not(stub: StubHub) -> None:
    """Fails if the Hub's variables are left out of the specification's hash, or change with every Hub process."""
    stub.spawn("alice", {"profile": "cpu"})
    first = container(stub, "alice")
    inside(stub, "alice", "mkdir -p /opt/mine && echo precious > /opt/mine/file")
    stub.halt("alice")
    stub.end()
    stub.start()
    stub.spawn("alice", {"profile": "cpu"})
    assert container(stub, "alice").id == first.id
    stub.halt("alice")
    stub.end()
    port = stub.plan.settings["hub_port"]
    stub.plan.settings["hub_port"] = port - 1 if port > 60000 else port + 1
    stub.plan.save()
    stub.start()
    stub.spawn("alice", {"profile": "cpu"})
    second = container(stub, "alice")
    assert second.id != first.id
    assert f":{stub.plan.settings['hub_port']}/" in second.env["JUPYTERHUB_API_URL"]
    assert inside(stub, "alice", "cat /opt/mine/file").strip() == "precious"


# --------------------------------------------------------------------------- the machine and the policy


@pytest.mark.parametrize(("key", "value"), [("max_cpus", 0), ("memory", "0"), ("pids_limit", 0)])
def test_failure_of_a_limit_of_nothing_is_refused(stub: StubHub, key: str, value: object) -> None:
    """Fails without `require_limits`: Docker reads 0 as "no limit"."""
    stub.change_limits(defaults={key: value})
    stub.add_user("alice")
    answer = stub.ask("alice", {"profile": "cpu"})
    assert answer.status_code == 403 and f"{key} is 0" in answer.json()["message"], answer.text
    assert "defaults" in answer.json()["message"]
    stub.clean()


def test_failure_of_a_missing_folder_of_the_policy_names_it(stub: StubHub) -> None:
    """Fails without `require_folders`: Docker would refuse half-way, after the old container was replaced."""
    gone = f"{stub.plan.state}/shared/not-there"
    stub.change_limits(defaults={"mounts": [f"{gone}:/data:ro"]})
    stub.add_user("alice")
    answer = stub.ask("alice", {"profile": "small"})
    assert answer.status_code == 503 and gone in answer.json()["message"], answer.text
    stub.clean()


def test_failure_of_a_users_full_memory_is_a_sentence(stub: StubHub) -> None:
    """Fails without `parent_full`: the person would read runc's "cannot start a stopped process"."""
    stub.change_limits(students={"aggregate": {"memory_max": "64m"}}, defaults={"memory": "64m"})
    stub.spawn("alice", {"profile": "cpu"})
    parent = container(stub, "alice").cgroup_parent
    stub.halt("alice")
    engine = stub.runtime.engine
    # Pages of a file in memory, in a process that is too small to be worth a kill.
    fill = ["sh", "-c", "head -c 61m /dev/zero > /dev/shm/x; sleep 60"]
    host = {"CgroupParent": parent, "NetworkMode": "none", "ShmSize": 80 * 2**20}
    filler = engine.create("dstest-hard-filler", {"Image": stub.plan.image, "Cmd": fill, "HostConfig": host})
    try:
        engine.start(filler)
        used = stub.runtime.cgroups.facts
        stub.wait(lambda: (used("students", "alice").memory_used or 0) > 60 * 2**20, "the memory is full")
        answer = stub.ask("alice", {"profile": "small"})
        message = answer.json()["message"]
        assert answer.status_code == 409 and "64 MiB of memory that you have (group students)" in message, answer.text
        stub.finished("alice")
        assert not stub.runtime.ledger.usage().taken()
    finally:
        engine.remove(filler, force=True)


def test_failure_of_disk_is_told_at_the_start_and_refused_at_the_commit(stub: StubHub) -> None:
    """Fails without `disk_note`, or if a container that is too large is thrown away instead of refused."""
    stub.change_limits(defaults={"max_container_disk": "2m"})
    stub.spawn("alice", {"profile": "cpu"})
    first = container(stub, "alice")
    inside(stub, "alice", "head -c 3000000 /dev/urandom > /opt/large")
    stub.halt("alice")
    with stub.fault("finish", "before", "wait"):
        stub.ask_aside("alice", {"profile": "cpu"})
        stub.reached("finish")
        told = " ".join(event["message"] for event in stub.peek("alice"))
    stub.wait(lambda: (stub.server("alice") or {}).get("ready"), "it has started")
    assert "outside your folders; 2 MiB can be kept" in told, told
    stub.halt("alice")
    answer = stub.ask("alice", {"profile": "small"})
    assert answer.status_code == 507 and "outside your folders" in answer.json()["message"], answer.text
    stub.finished("alice")
    assert container(stub, "alice").id == first.id
    assert not stub.runtime.ledger.usage().taken()


def test_failure_of_an_image_that_is_never_to_be_pulled(stub: StubHub) -> None:
    """Fails if `pull_policy` is ignored."""
    stub.add_user("alice")
    with stub.setting("pull_policy", "never"):
        answer = stub.ask("alice", {"profile": "absent"})
    assert answer.status_code == 409 and "never fetched" in answer.json()["message"], answer.text
    stub.clean()


def test_failure_of_settings_without_effect_is_told_once_with_the_right_place(stub: StubHub) -> None:
    """Fails without `overruled`, or if those settings had their effect."""
    stub.spawn("alice", {"profile": "cpu"})
    stub.spawn("bob", {"profile": "cpu"})
    for name in ("DockerSpawner.mem_limit", "DockerSpawner.remove", "DS01Spawner.volumes", "DS01Spawner.image"):
        told = [line for line in stub.log.read_text().splitlines() if f"c.{name} has no effect" in line]
        starts = stub.logged("JupyterHub is now running")
        assert 1 <= len(told) <= starts, (name, told)
    assert "profiles.yaml" in told[0]
    facts = container(stub, "alice")
    assert facts.memory == 192 * 2**20 and not facts.privileged
    assert "/host" not in {mount.target for mount in facts.mounts}
    stub.halt("alice")
    assert container(stub, "alice").state == "exited", "remove=True removes nothing"


def test_failure_of_names_default_server_and_names_within_names(stub: StubHub) -> None:
    """Fails if `main` could be asked for (it is the default server's container), or `lab` beside `jupyterlab` not."""
    stub.add_user("alice")
    answer = stub.ask("alice", {"profile": "cpu"}, "main")
    assert answer.status_code == 400 and "default server" in answer.json()["message"], answer.text
    stub.spawn("alice", {"profile": "cpu"}, "jupyterlab")
    stub.spawn("alice", {"profile": "cpu"}, "lab")
    assert {c.name.partition("._.")[0] for c in stub.containers()} == {"jupyterlab", "lab"}


def test_failure_of_every_kind_is_a_request_row(stub: StubHub) -> None:
    """Fails if a request that the parser or the policy refuses is written nowhere."""
    stub.add_user("alice")
    last = max((row.id or 0 for row in stub.runtime.ledger.requests(limit=1000)), default=0)
    stub.ask("alice", {"gpus": -1})
    stub.ask("alice", {"profile": "whole"})
    stub.ask("alice", {"profile": "absent"})
    rows = stub.runtime.ledger.requests(user="alice", after_id=last)
    assert [(row.outcome, row.code, dict(row.request)) for row in rows] == [
        ("refused", "bad_request", {"gpus": -1}),
        ("refused", "not_in_profile", {"profile": "whole"}),
        ("granted", "", {"profile": "absent"}),
    ]
    assert all(row.group == "students" and row.door == "rest" for row in rows)
