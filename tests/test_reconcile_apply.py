"""What the reconciler does, on a real ledger: repairs, what it leaves, races, failures, alerts that are told once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from reconcile_scene import BOX, MIG_1G, MIG_2G, WHOLE, box, container
from reconcile_world import World

from ds01spawner.errors import EngineError
from ds01spawner.ledger.store import Ledger
from ds01spawner.model import State, plain
from ds01spawner.reconcile import apply
from ds01spawner.reconcile.alerts import open_alerts
from ds01spawner.reconcile.findings import Report
from ds01spawner.reconcile.plan import plan


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """An installation with nothing in it."""
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def stripped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Containers that were replaced by one without devices (what that takes is tested on a real Docker)."""
    done: list[str] = []

    def strip(runtime: object, allocation: object, facts: object) -> None:
        runtime.engine._do("strip", facts.id)  # type: ignore[attr-defined]
        done.append(facts.id)  # type: ignore[attr-defined]
        runtime.engine.change(facts.id, devices=())  # type: ignore[attr-defined]
        runtime.ledger.drop_leases(allocation.id, "test")  # type: ignore[attr-defined]

    monkeypatch.setattr(apply, "strip", strip)
    return done


def done(report: Report) -> list[str]:
    return [outcome.finding.what.value for outcome in report.done]


def taken(world: World) -> frozenset[str]:
    return world.ledger.usage().taken()


# --------------------------------------------------------------------------- starts that died


@pytest.mark.parametrize("point", ["reserved", "created", "bound", "started"])
def test_reconcile_failure_of_a_first_start_at_any_point_leaves_nothing(world: World, point: str) -> None:
    row = world.reserve("alice", WHOLE)
    if point != "reserved":
        made = world.create(row, WHOLE)
        if point != "created":
            world.bind(row, made)
        if point == "started":
            world.engine.run(made)
    assert not world.pass_().done, "its hand may be about to take it back"
    world.turn(minutes=2)
    assert done(world.pass_()) == ["start_died"]
    assert world.again(row).state is State.RELEASED
    assert not taken(world) and not world.engine.found
    assert not world.pass_().outcomes


def test_reconcile_failure_of_a_start_that_used_its_container_again_holds_it_as_before(world: World) -> None:
    row = world.start("alice", WHOLE)
    world.hold(row, hours=5)
    world.turn(minutes=30)
    again = world.reserve("alice", WHOLE)
    world.engine.run(again.container_id or "")
    world.turn(minutes=3)
    assert done(world.pass_()) == ["start_died"]
    after = world.again(row)
    assert (after.state, after.container_id, after.token) == (State.HELD, row.container_id, row.token)
    assert not world.engine.found[row.container_id or ""].running
    assert taken(world) == {WHOLE} and after.held_until is not None


def test_reconcile_failure_of_a_start_with_other_units_gives_back_only_those(world: World) -> None:
    row = world.start("alice", MIG_1G)
    world.hold(row, hours=5)
    world.reserve("alice", MIG_2G)
    world.turn(minutes=3)
    assert taken(world) == {MIG_1G, MIG_2G}
    assert done(world.pass_()) == ["start_died"]
    assert taken(world) == {MIG_1G} and row.container_id in world.engine.found


def test_reconcile_failure_of_a_start_that_had_replaced_its_container(world: World) -> None:
    row = world.start("alice", MIG_1G)
    world.hold(row, hours=5)
    again = world.reserve("alice", MIG_2G)
    world.engine.found.clear()
    made = world.create(again, MIG_2G)
    world.bind(again, made)
    world.engine.run(made)
    world.turn(minutes=3)
    assert done(world.pass_()) == ["start_died"]
    assert world.again(row).state is State.RELEASED and not taken(world) and not world.engine.found


def test_reconcile_takes_back_at_once_what_a_dead_process_was_at(world: World) -> None:
    row = world.reserve("alice", WHOLE)
    with closing(Ledger.open(f"sqlite:///{world.folder}/ledger.sqlite", clock=world.clock)) as hub:
        held = hub.operation(row.id, "start", "hub")
        held.__enter__()
        world.turn(seconds=59)
        assert not world.pass_().outcomes
        world.turn(seconds=2)  # no heartbeat for more than a minute
        assert done(world.pass_()) == ["start_died"]
        held.__exit__(None, None, None)
    assert not taken(world)


def test_reconcile_race_with_a_start_that_goes_on(world: World) -> None:
    """The row is read again under the operation row: what has become active meanwhile is left alone."""
    row = world.reserve("alice", WHOLE)
    made = world.create(row, WHOLE)
    world.bind(row, made)
    world.engine.run(made)
    world.turn(minutes=3)
    world.engine.before = [lambda: None, lambda: _activate(world, row.id)]
    report = world.pass_()
    assert [o.detail for o in report.skipped] == ["it is no longer so"] and not report.done
    assert world.again(row).state is State.ACTIVE and world.engine.found[made].running


def _activate(world: World, number: int) -> None:
    world.ledger.activate(number)


def test_reconcile_race_with_another_hand_skips(world: World, stripped: list[str]) -> None:
    row = world.start("alice", WHOLE)
    world.hold(row, minutes=-1)
    evidence = world.reconciler.look()
    findings = plan(evidence)
    with (
        closing(Ledger.open(f"sqlite:///{world.folder}/ledger.sqlite", clock=world.clock)) as other,
        other.operation(row.id, "commit", "broker"),
    ):
        outcomes = apply.apply(world.runtime, findings, evidence, world.reconciler.look)
        assert [o.result.value for o in outcomes] == ["skipped"] and "commit" in outcomes[0].detail
    assert not stripped and taken(world) == {WHOLE}


# --------------------------------------------------------------------------- ended, gone, held


def test_reconcile_settles_a_server_that_ended_while_no_hub_was_looking(world: World) -> None:
    row = world.start("alice", WHOLE)
    world.engine.die(row.container_id or "")
    world.turn(seconds=60)
    assert not world.pass_().outcomes, "the Hub has its poll interval"
    world.turn(seconds=61)
    assert done(world.pass_()) == ["container_ended"]
    after = world.again(row)
    assert after.state is State.HELD and after.held_until == world.now + timedelta(minutes=15)
    assert "137" in after.reason and taken(world) == {WHOLE}


def test_reconcile_after_a_reboot_calls_nothing_a_crash(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    row = world.start("alice", WHOLE)
    world.pass_()
    world.turn(minutes=5)
    world.engine.die(row.container_id or "", 255)
    world.boot = "22222222-0000-0000-0000-000000000000"
    monkeypatch.setattr("ds01spawner.reconcile.gather.time.clock_gettime", lambda _clock: 60.0)
    world.restart()
    report = world.pass_()
    assert done(report) == ["machine_rebooted"]
    assert "restarted" in world.again(row).reason and taken(world) == {WHOLE}
    assert "rebooted" in [o.finding.what.value for o in report.outcomes]


@pytest.mark.parametrize("held", [False, True])
def test_reconcile_frees_what_has_no_container(world: World, held: bool) -> None:
    row = world.start("alice", WHOLE)
    if held:
        world.hold(row, hours=1)
    world.engine.found.clear()
    assert done(world.pass_()) == ["container_gone"]
    assert not taken(world)


def test_reconcile_frees_nothing_on_a_list_that_misses_a_container(world: World) -> None:
    """Docker is asked for it by name as well before anything is released."""
    row = world.start("alice", WHOLE)
    facts = dict(world.engine.found)

    def lose() -> None:
        world.engine.found.clear()

    world.engine.before = [lose, lose]
    inspect = world.engine.inspect_facts
    world.engine.inspect_facts = lambda name: facts.get(name) or inspect(name)  # type: ignore[method-assign]
    report = world.pass_()
    assert not report.done and report.skipped and taken(world) == {WHOLE}
    assert world.again(row).state is State.ACTIVE


def test_reconcile_ends_a_hold(world: World, stripped: list[str]) -> None:
    row = world.start("alice", WHOLE)
    world.hold(row, minutes=10)
    world.turn(minutes=9)
    assert not world.pass_().outcomes
    world.turn(minutes=1)
    assert done(world.pass_()) == ["hold_ended"]
    assert stripped == [row.container_id] and not taken(world)
    assert not world.pass_().outcomes


def test_reconcile_gives_an_endless_hold_its_end(world: World, stripped: list[str]) -> None:
    row = world.start("alice", WHOLE)
    world.hold(row)
    assert done(world.pass_()) == ["hold_endless"]
    assert world.again(row).held_until == world.now + timedelta(minutes=15)
    world.turn(minutes=15)
    assert done(world.pass_()) == ["hold_ended"]
    assert stripped


def test_reconcile_leaves_an_endless_hold_that_the_policy_allows(world: World) -> None:
    world.hold_after_stop = None
    world.hold(world.start("alice", WHOLE))
    assert not world.pass_().outcomes


def test_reconcile_finishes_a_replacement_that_died_half_way(world: World) -> None:
    row = world.start("alice", WHOLE)
    world.hold(row, minutes=-1)
    world.engine.found.clear()
    made = world.create(row)
    assert done(world.pass_()) == ["half_replaced"]
    after = world.again(row)
    assert (after.container_id, after.leases, after.state) == (made, (), State.HELD)


# --------------------------------------------------------------------------- started behind our back


def test_reconcile_stops_a_docker_start_behind_our_back(world: World) -> None:
    row = world.start("alice", WHOLE)
    world.hold(row, hours=1)
    world.pass_()
    world.turn(minutes=5)
    world.engine.run(row.container_id or "")
    world.turn(seconds=1)
    assert done(world.pass_()) == ["started_behind"]
    assert ("stop", row.container_id) in world.engine.calls
    audit = world.ledger.audit_rows(action="container.stop")[0]
    assert audit.subject == "alice/" and audit.allocation_id == row.id
    assert taken(world) == {WHOLE}


def test_reconcile_stops_what_was_to_stop_when_docker_was_away(world: World) -> None:
    row = world.start("alice", WHOLE)
    world.turn(minutes=5)
    world.ledger.hold(row.id, until=None, reason="stopped while Docker was away")
    world.turn(minutes=5)
    world.restart()
    assert "stop_pending" in done(world.pass_())


def test_reconcile_restored_older_ledger_stops_nobody(world: World, stripped: list[str]) -> None:
    """Every way in which a server may have gone on after the backup was taken."""
    used_again = world.start("used-again", MIG_1G)
    world.hold(used_again, hours=9)
    ended = world.start("ended", MIG_2G)
    starting = world.reserve("starting", WHOLE)
    world.pass_()
    world.turn(seconds=10)
    backup = world.folder / "backup.sqlite"
    world.backup(backup)

    # After the backup: a held one is started again, a new one comes, one is replaced, a pending start succeeds.
    world.turn(minutes=5)
    world.reserve("used-again", MIG_1G)
    world.engine.run(used_again.container_id or "")
    world.ledger.activate(used_again.id)
    world.hold(ended, hours=1)
    del world.engine.found[ended.container_id or ""]
    world.ledger.release(ended.id, "deleted")
    newer = world.start("newer", MIG_2G)
    made = world.create(starting, WHOLE)
    world.bind(starting, made)
    world.engine.run(made)
    world.ledger.activate(starting.id)
    last = world.ledger.last_token()
    running = {key for key, facts in world.engine.found.items() if facts.running}
    assert running == {used_again.container_id, newer.container_id, made}

    world.close()
    world.turn(minutes=1)
    world.open(backup)
    assert world.ledger.get(newer.id) is None and world.again(used_again).state is State.HELD
    world.engine.calls.clear()
    for minutes in (0, 1, 3, 60, 600):
        world.turn(minutes=minutes)
        report = world.pass_()
        assert {key for key, facts in world.engine.found.items() if facts.running} == running
        assert not [call for call in world.engine.calls if call[0] in ("stop", "remove", "strip")]
        assert {"unknown", "started_unseen"} <= {f.what.value for f in report.alerts}
    assert world.ledger.last_token() == last, "no token is given twice"
    assert len({f.subject for f in report.alerts if f.what.value == "unknown"}) == 2


def test_reconcile_old_container_of_a_released_server_is_stopped_and_left(world: World) -> None:
    row = world.start("alice", WHOLE)
    world.ledger.release(row.id, "the test says so")
    assert done(world.pass_()) == ["outdated"]
    report = world.pass_()
    assert [f.what.value for f in report.alerts] == ["orphan"] and world.engine.found


def test_reconcile_removes_a_container_that_was_never_started_and_nobody_owns(world: World) -> None:
    row = world.reserve("alice", WHOLE)
    world.create(row, WHOLE)
    world.ledger.release(row.id, "given up")
    assert not world.pass_().done
    world.turn(minutes=2)
    assert done(world.pass_()) == ["never_started"]
    assert not world.engine.found
    assert world.ledger.audit_rows(action="container.remove")


# --------------------------------------------------------------------------- the box


def test_reconcile_voids_leases_of_instances_that_were_made_anew(world: World, stripped: list[str]) -> None:
    held = world.start("held", MIG_1G)
    world.hold(held, days=9)
    active = world.start("active", MIG_2G)
    world.pass_()
    world.inventory = box("3g.20gb", "3g.20gb")
    alerts: list[str] = []
    for _ in range(6):
        world.turn(seconds=40)
        report = world.pass_()
        alerts += [f.what.value for f in report.alerts if not f.lasting]
    assert alerts == ["units_missing"], "told once"
    assert stripped == [held.container_id] and taken(world) == {MIG_2G}
    assert [row.subject for row in world.ledger.audit_rows(action="lease.void")] == ["held/"]
    assert world.engine.found[active.container_id or ""].running, "a server is never stopped for it"
    assert open_alerts(world.ledger) == {("unit_gone", "active/main", active.container_id)}
    world.hold(active, days=9)
    assert "unit_gone" in done(world.pass_())
    assert not taken(world) and not open_alerts(world.ledger)


def test_reconcile_remembers_the_box_over_restarts(world: World, stripped: list[str]) -> None:
    held = world.start("held", MIG_1G)
    world.hold(held, days=9)
    world.pass_()
    world.restart()
    world.boot, world.inventory = "22222222-0000-0000-0000-000000000000", box(whole=2)
    report = world.pass_()
    assert {"rebooted", "units_missing", "unit_gone"} <= {o.finding.what.value for o in report.outcomes}
    assert stripped == [held.container_id]
    rows = world.ledger.audit_rows(action="box.layout")
    assert len(rows) == 2
    for _ in range(3):
        world.restart()
        assert not world.pass_().outcomes
    assert len(world.ledger.audit_rows(action="box.layout")) == 3, "the last lease on what is gone has ended"


def test_reconcile_memory_of_the_box_that_cannot_be_read_is_made_anew(world: World) -> None:
    world.ledger.audit("test", "box.layout", "box", "odd", None, {"units": "?"})
    assert not world.pass_().outcomes
    assert len(world.ledger.audit_rows(action="box.layout")) == 2


# --------------------------------------------------------------------------- without evidence


def test_reconcile_without_docker_nothing_is_freed_or_stopped(world: World, stripped: list[str]) -> None:
    row = world.start("alice", WHOLE)
    world.hold(row, minutes=-1)
    world.engine.fails["list"] = "Docker does not answer"
    before = plain(world.ledger.allocations(live=False))
    with pytest.raises(EngineError):
        world.pass_()
    assert plain(world.ledger.allocations(live=False)) == before and not world.engine.calls


def test_reconcile_without_a_fresh_picture_nothing_is_freed_or_stopped(world: World, stripped: list[str]) -> None:
    world.hold(world.start("over", WHOLE), minutes=-1)
    world.start("gone", MIG_1G)
    del world.engine.found["c2"]
    back = world.start("behind", MIG_2G)
    world.hold(back, hours=1)
    world.turn(minutes=1)
    world.engine.run(back.container_id or "")
    world.fresh = False
    calls = list(world.engine.calls)
    before = plain(world.ledger.allocations(live=False))
    report = world.pass_()
    assert len(report.skipped) == 3 and not report.done and "fresh picture" in report.notes[0]
    assert plain(world.ledger.allocations(live=False)) == before and world.engine.calls == calls and not stripped
    world.fresh = True
    assert len(world.pass_().done) == 3


def test_reconcile_dry_run_changes_nothing(world: World, stripped: list[str]) -> None:
    world.hold(world.start("over", WHOLE), minutes=-1)
    world.start("gone", MIG_1G)
    del world.engine.found["c2"]
    world.engine.found["odd"] = container(99, number="odd", instance=world.ledger.instance)
    rows, calls = world.ledger.audit_rows(limit=1000), list(world.engine.calls)
    report = world.pass_(dry_run=True)
    assert report.dry_run and len(report.skipped) == 3 and not report.done
    assert world.ledger.audit_rows(limit=1000) == rows and world.engine.calls == calls and not stripped
    assert world.ledger.last_token() == 4
    assert json.loads(json.dumps(plain(report)))["outcomes"][0]["finding"]["what"] == "hold_ended"


# --------------------------------------------------------------------------- failures and alerts


def test_reconcile_retries_a_failed_repair_less_and_less_often(world: World, stripped: list[str]) -> None:
    row = world.start("alice", WHOLE)
    world.hold(row, minutes=-1)
    world.engine.fails["strip"] = "no space left"
    tried = []
    for minute in range(70):
        report = world.pass_()
        if report.failed:
            tried.append(minute)
            assert "no space left" in report.failed[0].detail and "stays held" in report.failed[0].detail
        elif report.skipped:
            assert "again at" in report.skipped[0].detail
        world.turn(minutes=1)
    assert tried == [0, 1, 3, 7, 15, 31, 61]
    assert taken(world) == {WHOLE}
    assert [key[0] for key in open_alerts(world.ledger)] == ["repair_fails"]
    raised = world.ledger.audit_rows(action="alert.raised")
    assert len(raised) == 1 and "no space left" in raised[0].reason
    world.restart()
    assert world.pass_().failed and len(open_alerts(world.ledger)) == 1, "another process knows that it fails"
    world.engine.fails.clear()
    world.turn(minutes=30)
    assert done(world.pass_()) == ["hold_ended"]
    world.pass_()
    assert not open_alerts(world.ledger) and not taken(world)


def test_reconcile_alert_is_told_once_even_over_restarts(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.engine.found["odd"] = container(99, WHOLE, number="odd", instance=world.ledger.instance)
    for _ in range(3):
        world.pass_()
        world.restart()
        world.turn(minutes=1)
    lines = [r for r in caplog.records if r.name == "ds01.alerts"]
    assert len(lines) == 1 and "99" in lines[0].getMessage()
    assert len(world.ledger.audit_rows(action="alert.")) == 1
    assert world.ledger.last_token() == 99
    world.engine.found.clear()
    world.pass_()
    assert [row.action for row in world.ledger.audit_rows(action="alert.")] == ["alert.cleared", "alert.raised"]
    world.engine.found["odd"] = container(99, WHOLE, number="odd", instance=world.ledger.instance)
    world.pass_()
    assert len(world.ledger.audit_rows(action="alert.raised")) == 2, "a new time is news"


def test_reconcile_hands_slow_repairs_on_and_does_the_others_at_once(world: World, stripped: list[str]) -> None:
    over = world.start("over", WHOLE)
    world.hold(over, minutes=-1)
    back = world.start("behind", MIG_2G)
    world.hold(back, hours=1)
    world.turn(minutes=1)
    world.engine.run(back.container_id or "")
    handed: list[object] = []
    report = world.pass_(later=lambda findings, evidence: handed.append((findings, evidence)))
    assert done(report) == ["started_behind"] and not stripped
    assert [o.detail for o in report.skipped] == ["under way"]
    ((findings, evidence),) = handed  # type: ignore[misc]
    outcomes = world.reconciler.finish(findings, evidence)
    assert [o.result.value for o in outcomes] == ["done"] and stripped == [over.container_id]


def test_reconcile_box_of_the_scene_has_every_unit() -> None:
    assert {WHOLE, MIG_1G, MIG_2G} <= {unit.uuid for unit in BOX.units}
