"""The start path on a real Hub with real containers: what a server gets, keeps and gives back."""

from __future__ import annotations

import docker
import pytest
from live_hub import LiveHub

from ds01spawner.containers.spec import named_units

pytestmark = [pytest.mark.docker, pytest.mark.hub]


def run_inside(container: str, *command: str, user: str | None = None) -> str:
    """Output of a command inside a container, as its own user."""
    client = docker.APIClient()
    try:
        made = client.exec_create(container, list(command), user=user or "")
        return client.exec_start(made["Id"]).decode()
    finally:
        client.close()


def test_lifecycle_start_gives_exactly_the_policy_and_stop_frees_the_unit(hub: LiveHub) -> None:
    hub.spawn("student1", {"profile": "small"})
    allocation, facts = hub.allocation("student1"), hub.container("student1")
    assert allocation is not None and facts is not None
    assert allocation.state.value == "active"
    assert {lease.mig_profile for lease in allocation.leases} == {"1g.5gb"}
    assert named_units(facts) == {lease.unit_uuid for lease in allocation.leases}
    assert facts.memory == facts.memory_swap == 2**30
    assert facts.cpu_quota == 100_000
    assert facts.pids_limit == 256
    assert facts.name == f"main._.{allocation.uid}"
    assert facts.cgroup_parent.endswith("/students/student1")
    assert run_inside(facts.id, "id", "-un").strip() == "student1"
    assert run_inside(facts.id, "sh", "-c", "pwd; ls welcome.ipynb; echo $NVIDIA_VISIBLE_DEVICES").split() == [
        "/workspace",
        "welcome.ipynb",
        "void",
    ]
    hub.halt("student1")
    allocation, facts = hub.allocation("student1"), hub.container("student1")
    assert allocation is not None and not allocation.leases and allocation.state.value == "held"
    assert facts is not None and not facts.running and not named_units(facts)
    assert not hub.runtime.ledger.usage().taken()


def test_lifecycle_cpu_container_is_used_again_and_updated_in_place(hub: LiveHub) -> None:
    hub.spawn("researcher1", {"profile": "cpu"})
    first = hub.container("researcher1")
    assert first is not None
    run_inside(first.id, "sh", "-c", "echo kept > /workspace/file; touch /tmp/mark")
    hub.halt("researcher1")
    hub.spawn("researcher1", {"profile": "cpu"})
    again = hub.container("researcher1")
    assert again is not None and again.id == first.id
    assert run_inside(again.id, "ls", "/tmp/mark").strip() == "/tmp/mark"
    hub.halt("researcher1")
    hub.change_limits(researchers={"memory": "1500m"})
    hub.spawn("researcher1", {"profile": "cpu"})
    changed = hub.container("researcher1")
    assert changed is not None and changed.id == first.id
    assert changed.memory == 1500 * 2**20
    hub.halt("researcher1")


def test_lifecycle_other_units_make_a_new_container_with_the_changes_saved(hub: LiveHub) -> None:
    hub.spawn("admin", {"profile": "small"})
    first = hub.container("admin")
    assert first is not None
    run_inside(first.id, "sh", "-c", "mkdir -p /opt/mine; echo precious > /opt/mine/file", user="root")
    hub.halt("admin")
    hub.spawn("admin", {"profile": "whole"})
    second = hub.container("admin")
    assert second is not None and second.id != first.id
    assert run_inside(second.id, "cat", "/opt/mine/file").strip() == "precious"
    saved = hub.runtime.ledger.images_of("admin")
    assert len(saved) == 1
    image = hub.runtime.engine.image_facts(saved[0].ref)
    assert image is not None
    assert not [name for name in image.env if name.startswith("JUPYTERHUB_")]
    hub.halt("admin")


def test_lifecycle_refusal_is_one_clear_sentence_on_rest(hub: LiveHub) -> None:
    hub.add_user("student1")
    answer = hub.ask("student1", {"profile": "whole"})
    assert answer.status_code == 403, answer.text
    assert "Whole GPU" in answer.json()["message"] or "whole" in answer.json()["message"]
    assert "SpawnException" not in answer.text and "Traceback" not in answer.text
    assert hub.container("student1") is None or not hub.container("student1").running  # type: ignore[union-attr]


def test_lifecycle_container_that_dies_gives_its_unit_back_after_the_crash_hold(hub: LiveHub) -> None:
    hub.spawn("student1", {"profile": "small"})
    facts = hub.container("student1")
    assert facts is not None
    hub.runtime.engine.kill(facts.id)
    hub.wait(lambda: hub.server("student1") is None, "the Hub noticed")
    allocation = hub.allocation("student1")
    assert allocation is not None and allocation.state.value == "held"
    assert allocation.leases and allocation.held_until is not None
    hub.spawn("student1", {"profile": "small"})
    again = hub.container("student1")
    assert again is not None and again.id == facts.id, "the same unit, so the same container"
    hub.halt("student1")


def test_lifecycle_named_servers_and_the_cap(hub: LiveHub) -> None:
    hub.spawn("student1", {"profile": "cpu"})
    hub.spawn("student1", {"profile": "cpu"}, server="train")
    named = hub.container("student1", "train")
    assert named is not None and named.name.startswith("train._.")
    answer = hub.ask("student1", {"profile": "cpu"}, server="third")
    assert answer.status_code == 409, answer.text
    assert "2" in answer.json()["message"]
    hub.halt("student1", "train")
    hub.halt("student1")


def test_restart_of_the_hub_stops_nobody(hub: LiveHub) -> None:
    hub.spawn("student1", {"profile": "small"})
    before = hub.container("student1")
    hub.end()
    hub.start()
    after, model = hub.container("student1"), hub.server("student1")
    assert before is not None and after is not None and after.running and after.id == before.id
    assert model is not None and model["ready"]
    hub.halt("student1")
    assert not hub.runtime.ledger.usage().taken()


def test_failure_of_a_pending_start_deleted_leaves_nothing(hub: LiveHub) -> None:
    hub.add_user("researcher1")
    assert not hub.runtime.ledger.usage().taken()
    hub.change_profiles(
        slow={"image": hub.plan.image, "command": ["sleep", "1000"], "sizes": {"s": {"gpu": {"kind": "full"}}}}
    )
    assert hub.ask("researcher1", {"profile": "slow"}, server="slow").status_code in (201, 202)
    hub.wait(lambda: hub.container("researcher1", "slow") is not None, "the container is there")
    assert hub.api("DELETE", "users/researcher1/servers/slow").status_code in (202, 204)
    hub.wait(lambda: hub.server("researcher1", "slow") is None, "the Hub gave up")
    hub.wait(lambda: not hub.runtime.ledger.usage().taken(), "the unit is free")
    assert not [c for c in hub.containers() if c.running]


def test_lifecycle_refusal_offers_the_cards_that_could_start(hub: LiveHub) -> None:
    hub.add_user("student1")
    hub.change_limits(students={"max_mig_instances": 0})
    try:
        answer = hub.ask("student1", {"profile": "small"})
    finally:
        hub.change_limits(students={"max_mig_instances": 1})
    assert answer.status_code == 409, answer.text
    assert "You could instead take: CPU only" in answer.json()["message"]
