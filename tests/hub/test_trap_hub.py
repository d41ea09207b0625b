"""The traps of JupyterHub and DockerSpawner, tried on a real Hub with real containers; T8 is in test_failure_docker.py.

Each test says what it fails without.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import pytest
import requests
from stub_hub import COMMAND, STUB, StubHub

from deploy.client import ClientFailed, Person
from deploy.forms import text_of
from ds01spawner.containers.engine import ContainerFacts
from ds01spawner.containers.spec import named_units

pytestmark = [pytest.mark.docker, pytest.mark.hub]

HOG = STUB.replace(
    "http.server.Thr", "import threading\nthreading.Timer(1.5, lambda: bytearray(10**9)).start()\nhttp.server.Thr"
)


def person(stub: StubHub) -> Person:
    """student1, logged in."""
    found = Person(stub.plan.url, "student1", stub.plan.passwords["student1"])
    found.log_in()
    return found


def container(stub: StubHub, user: str, server: str = "") -> ContainerFacts:
    """The container of a server that must have one."""
    found = stub.container(user, server)
    assert found is not None
    return found


def units(stub: StubHub, user: str, server: str = "") -> set[str]:
    """What the ledger says that a server holds."""
    allocation = stub.allocation(user, server)
    return {lease.unit_uuid for lease in allocation.leases} if allocation else set()


def test_trap_t01_pull_and_stop_of_others_hold_up_nobody(stub: StubHub) -> None:
    """Fails with DockerSpawner's single thread (`DS01Spawner.executor`, the pools of `Runtime`)."""
    stub.spawn("bob", {"profile": "cpu"})
    with stub.fault("pull", "before", "wait"), stub.fault("stop", "before", "wait"):
        stub.ask_aside("alice", {"profile": "absent"})
        stub.reached("pull")
        stub.api("DELETE", "users/bob/server")
        stub.reached("stop")
        began = time.monotonic()
        stub.spawn("carol", {"profile": "small"})
        assert time.monotonic() - began < 6
    stub.finished("alice")
    stub.finished("bob")


def test_trap_t02_limits_are_those_of_the_start_and_not_of_the_open_page(stub: StubHub) -> None:
    """Fails if limits are resolved when the Spawner object is made (DockerSpawner's `mem_limit` callables)."""
    student = person(stub)
    student.spawn_form()
    stub.change_limits(defaults={"memory": "160m"})
    stub.spawn("student1", {"profile": "cpu"})
    assert container(stub, "student1").memory == 160 * 2**20


def test_trap_t03_container_that_is_used_again_names_only_what_it_holds_now(stub: StubHub) -> None:
    """Fails without `decide_reuse` and `strip`: the old container would come back with the GPU that rita has now."""
    stub.spawn("rich", {"profile": "whole"})
    first = units(stub, "rich")
    stub.halt("rich")
    assert named_units(container(stub, "rich")) == set(), "the stopped one names nothing any more"
    stub.spawn("rita", {"profile": "whole"}, "one")
    stub.spawn("rita", {"profile": "whole"}, "two")
    assert first < units(stub, "rita", "one") | units(stub, "rita", "two"), "the box has two whole GPUs"
    assert stub.ask("rich", {"profile": "whole"}).status_code == 409
    stub.spawn("rich", {"profile": "small"})
    assert named_units(container(stub, "rich")) == units(stub, "rich") and not first & units(stub, "rich")


def test_trap_t04_end_by_memory_is_told_and_the_container_stays(stub: StubHub) -> None:
    """Fails with `auto_remove`: no exit code, no "out of memory", no container to look at."""
    stub.change_profiles(cpu={"command": ["python3", "-c", HOG]})
    stub.spawn("alice", {"profile": "cpu"})
    stub.finished("alice")
    assert stub.logged("the container ended with exit code 137, out of memory")
    assert container(stub, "alice").oom_killed


def test_trap_t05_leases_end_although_nobody_calls_stop(stub: StubHub) -> None:
    """Fails if leases are given back in stop() only: the Hub does not call it for a server that died."""
    stub.change_limits(defaults={"policies": {"gpu_hold_after_crash_m": 0, "sigterm_grace_s": 1}})
    stub.spawn("alice", {"profile": "small"})
    stub.runtime.engine.kill(container(stub, "alice").id)
    stub.finished("alice")
    assert not stub.runtime.ledger.usage().taken()
    assert named_units(container(stub, "alice")) == set()


def test_trap_t09_end_of_the_hub_stops_nobody(stub: StubHub) -> None:
    """Fails without `cleanup_servers = False`."""
    stub.spawn("alice", {"profile": "small"})
    before = container(stub, "alice")
    stub.end()
    assert container(stub, "alice").running
    stub.start()
    stub.wait(lambda: (stub.server("alice") or {}).get("ready"), "the server is taken over")
    assert container(stub, "alice").id == before.id
    stub.halt("alice")
    assert not stub.runtime.ledger.usage().taken()


def test_trap_t10_every_door_is_judged_and_stale_options_too(stub: StubHub) -> None:
    """Fails if options are judged at the form or at REST instead of in `Launch.admit`."""
    stub.add_user("student1")
    assert stub.ask("student1", {"profile": "whole"}).status_code == 403
    stale = stub.api("POST", "users/student1/server")  # the Hub stored what was refused, and asks for it again
    assert stale.status_code == 403 and "whole" in stale.json()["message"]
    student = person(stub)
    query = urlencode({"opt-profile": "whole"})
    page = student.session.get(f"{stub.plan.url}/hub/spawn/student1?{query}", timeout=30)
    assert "no profile 'whole'" in text_of(page.text), page.text[:2000]
    with pytest.raises((ClientFailed, KeyError)):
        student.start(choice="whole/s")
    assert not stub.containers()
    stub.spawn("carol")  # nothing asked is a valid request: the default
    doors = [row.door for row in stub.runtime.ledger.requests(user="student1")]
    assert {"rest", "query"} <= set(doors)


def test_trap_a_link_on_another_page_starts_nothing(stub: StubHub) -> None:
    """Fails without the look at Sec-Fetch-Site in `DS01Spawner.options_from_query`."""
    student = person(stub)
    query = urlencode({"opt-profile": "cpu"})
    page = student.session.get(
        f"{stub.plan.url}/hub/spawn/student1?{query}", headers={"Sec-Fetch-Site": "cross-site"}, timeout=30
    )
    assert page.status_code == 403
    assert "A link on another page asked for this start" in text_of(page.text)
    assert stub.server("student1") is None


def test_trap_t11_options_are_not_called_unhandled(stub: StubHub) -> None:
    """Fails without a default `apply_user_options`."""
    stub.spawn("alice", {"profile": "cpu"})
    assert not stub.logged("Received unhandled user_options")


def test_trap_t12_refusal_is_one_sentence_at_every_door(stub: StubHub) -> None:
    """Fails without `jupyterhub_message` in `spawn_error`: the pages would print `SpawnException(reason=…)`."""
    stub.change_limits(defaults={"max_containers_per_user": 1})
    stub.spawn("student1", {"profile": "cpu"}, "one")
    refused = stub.ask("student1", {"profile": "cpu"}, "two")
    assert refused.status_code == 409
    sentence = refused.json()["message"]
    assert "1" in sentence and "Exception" not in sentence
    (failed,) = [event for event in stub.progress("student1", "two") if event.get("failed")]
    assert sentence in failed["message"] and "SpawnException" not in failed["message"]
    student = person(stub)
    page, form = student.spawn_form()
    answer = student._submit(page, form.action or page.url, form.filled())
    shown = text_of(answer.text)
    assert sentence.split(".")[0] in shown and "SpawnException" not in shown, shown[:2000]


def test_trap_t13_pending_page_of_a_named_server_stops_that_server(stub: StubHub) -> None:
    """Fails without our spawn_pending.html: the Hub's own button stops the default server."""
    stub.spawn("student1", {"profile": "cpu"})
    student = person(stub)
    with stub.fault("create", "before", "wait"):
        stub.ask_aside("student1", {"profile": "cpu"}, "lab")
        stub.reached("create")
        page = student.session.get(f"{stub.plan.url}/hub/spawn-pending/student1/lab", timeout=30).text
        assert 'data-server="lab"' in page and "stop_server(user)" not in page
        stub.api("DELETE", "users/student1/servers/lab")
    stub.finished("student1", "lab")
    assert container(stub, "student1").running


def test_trap_t14_rename_is_refused_while_a_container_of_the_old_name_has_files(stub: StubHub) -> None:
    """Fails without `DS01Spawner.rename`: the files would be out of reach under the new name."""
    stub.spawn("bob", {"profile": "cpu"}, "old")
    stub.halt("bob", "old")

    def rename(old: str, new: str) -> requests.Response:
        return stub.api("PATCH", f"users/bob/servers/{old}", json={"name": new})

    answer = rename("old", "new")
    if answer.status_code == 405:
        pytest.skip("this JupyterHub cannot rename servers")
    assert answer.status_code == 409 and "own files" in answer.json()["message"]
    assert rename("old", "main").status_code == 400
    assert stub.api("DELETE", "users/bob/servers/old", json={"remove": True}).status_code == 204
    stub.clean()
    assert stub.ask("bob", {"profile": "whole"}, "never").status_code == 403
    assert rename("never", "new").status_code == 200


def test_trap_t15_names_with_dashes_and_dots_do_not_nest(stub: StubHub) -> None:
    """Fails if a user's cgroup is made from DockerSpawner's escaped name."""
    parents = set()
    for name in ("a-b", "a.b", "dora@uni.example"):
        stub.spawn(name, {"profile": "cpu"})
        parents.add(container(stub, name).cgroup_parent)
    assert len(parents) == 3
    assert {parent.rpartition("/")[0].rpartition("/")[2] for parent in parents} == {"students"}


def test_trap_t16_foreign_container_of_our_name_is_left_alone(stub: StubHub) -> None:
    """Fails if `_require_own` or the conflict of `_create` adopts or removes it."""
    stub.spawn("alice", {"profile": "cpu"})
    name = container(stub, "alice").name
    stub.halt("alice")
    stub.sweep()
    engine = stub.runtime.engine
    foreign = engine.create(
        name, {"Image": stub.plan.image, "Cmd": ["sleep", "9"], "HostConfig": {"NetworkMode": "none"}}
    )
    try:
        answer = stub.ask("alice", {"profile": "small"})
        assert answer.status_code == 409 and "was not made by this Hub" in answer.json()["message"]
        stub.finished("alice")
        engine.remove(foreign)
        with stub.fault("create", "before", "wait"):
            asked = stub.ask_aside("alice", {"profile": "small"})
            stub.reached("create")
            foreign = engine.create(
                name, {"Image": stub.plan.image, "Cmd": ["sleep", "9"], "HostConfig": {"NetworkMode": "none"}}
            )
        assert asked.result().status_code == 409 and "appeared" in asked.result().json()["message"]
        stub.finished("alice")
        facts = engine.inspect_facts(name)
        assert facts is not None and facts.id == foreign
        assert not stub.runtime.ledger.usage().taken()
    finally:
        engine.remove(foreign, force=True)


def test_trap_t17_second_start_knows_nothing_of_the_first(stub: StubHub) -> None:
    """Fails if start() keeps attributes of the start before: its log, its container, its end."""
    stub.add_user("alice")
    with stub.fault("start", "after", "docker"):
        assert stub.ask("alice", {"profile": "small"}).status_code == 503
    with stub.fault("create", "before", "wait"):
        stub.ask_aside("alice", {"profile": "cpu"})
        stub.reached("create")
        messages = [event["message"] for event in stub.peek("alice")]
        assert not [m for m in messages if "Starting the container" in m]
        assert messages.count("Checking your quota") == 1
    stub.wait(lambda: (stub.server("alice") or {}).get("ready"), "the second start is done")
    assert container(stub, "alice").running


def test_trap_t18_stop_without_a_container_touches_no_other(stub: StubHub) -> None:
    """Fails if an empty container id reaches Docker (there it means the list of all)."""
    stub.spawn("alice", {"profile": "cpu"}, "lab")
    assert stub.ask("alice", {"profile": "whole"}).status_code == 403  # user.stop() of a start without a container
    stub.api("DELETE", "users/alice/server")
    assert container(stub, "alice", "lab").running
    with pytest.raises(ValueError, match="container"):
        stub.runtime.engine.stop("")


def test_trap_t19_late_and_many_readers_see_everything(stub: StubHub) -> None:
    """Fails if progress() gives each event once: a tab that opens late would stay empty."""
    with stub.fault("start", "before", "wait"), ThreadPoolExecutor(2) as pool:
        stub.ask_aside("alice", {"profile": "small"})
        stub.reached("start")
        first, late = stub.peek("alice"), stub.peek("alice")
        assert first == late and len(first) > 5
        assert "Reserved for you: 1g.5gb" in " ".join(event["message"] for event in first)
        readers = [pool.submit(stub.progress, "alice") for _ in range(2)]
        time.sleep(0.5)
        (stub.plan.state / "faults" / "start.before").unlink()
        ends = [reader.result(30) for reader in readers]
    assert ends[0] == ends[1] and ends[0][: len(first)] == first and ends[0][-1].get("ready")
    percents = [event["progress"] for event in ends[0]]
    assert percents == sorted(percents) and percents[-1] == 100


def test_trap_t20_cpu_is_one_quota(stub: StubHub) -> None:
    """Fails with nano_cpus beside the quota: Docker refuses a container with both."""
    stub.spawn("alice", {"profile": "cpu"})
    facts = container(stub, "alice")
    assert (facts.cpu_quota, facts.cpu_period, facts.nano_cpus) == (50_000, 100_000, 0)


def test_trap_t21_servers_of_one_user_at_once_share_one_quota(stub: StubHub) -> None:
    """Fails if check and reservation are two transactions: both servers would pass the check."""
    stub.add_user("alice")
    stub.add_user("zoe")
    asks = [(user, f"{kind}{n}") for user in ("alice", "zoe") for kind in ("x",) for n in range(4)]
    with ThreadPoolExecutor(len(asks)) as pool:
        answers = list(pool.map(lambda ask: stub.ask(ask[0], {"profile": "small"}, ask[1]).status_code, asks))
    granted = [ask for ask, status in zip(asks, answers, strict=True) if status in (201, 202)]
    assert sorted(user for user, _ in granted) == ["alice", "zoe", "zoe"], answers
    held = [unit for user, server in granted for unit in units(stub, user, server)]
    assert len(held) == len(set(held)) == 3
    assert {status for status in answers if status >= 400} == {409}


def test_trap_home_page_reads_the_ledger_beside_the_event_loop(stub: StubHub) -> None:
    """Fails if the template's quota line blocks the Hub: a ledger that is slow for one page would be slow for all."""
    student = person(stub)
    home = text_of(student.session.get(f"{stub.plan.url}/hub/home", timeout=30).text)
    assert "in use 0 of 1" in home and "coroutine" not in home, home[:500]
    with stub.fault("usage", "before", "wait"), ThreadPoolExecutor(1) as pool:
        page = pool.submit(student.session.get, f"{stub.plan.url}/hub/home", timeout=30)
        stub.reached("usage")
        began = time.monotonic()
        assert stub.api("GET", "").status_code == 200
        assert time.monotonic() - began < 2 and not page.done()
        stub.no_faults()
        assert "in use 0 of 1" in text_of(page.result().text)


def test_trap_commands_of_profiles_get_no_word_of_the_user(stub: StubHub) -> None:
    """Fails if options reach the command line or the environment."""
    stub.spawn("alice", {"profile": "cpu"})
    facts = container(stub, "alice")
    assert list(facts.command) == COMMAND
