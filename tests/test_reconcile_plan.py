"""The rules of the reconciler, one case each: values in, findings out."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reconcile_scene import (
    INSTANCE,
    MIG_1G,
    MIG_2G,
    MIG_3G,
    NOW,
    OTHER,
    WHOLE,
    ago,
    allocation,
    container,
    evidence,
    never_started,
    operation,
    origin,
    picture,
    told,
)

from ds01spawner.containers import aime
from ds01spawner.containers.facts import ContainerFacts
from ds01spawner.model import Allocation, State
from ds01spawner.reconcile.evidence import Evidence
from ds01spawner.reconcile.findings import Action, Finding, Severity
from ds01spawner.reconcile.plan import plan


def only(found: tuple[Finding, ...]) -> Finding:
    assert len(found) == 1, told(found)
    return found[0]


def test_reconcile_plan_finds_nothing_where_all_is_well() -> None:
    active = allocation(State.ACTIVE, WHOLE)
    held = allocation(State.HELD, MIG_1G, number=2, token=6, container="c2", held_until=ago(minutes=-5))
    settled = allocation(State.HELD, number=3, token=7, container="c3")
    facts = [
        container(5, WHOLE),
        container(6, MIG_1G, number="c2", runs=False),
        container(7, number="c3", runs=False),
        ContainerFacts(id="foreign", name="somebody", state="running", running=True, privileged=True),
    ]
    assert plan(evidence([active, held, settled], facts)) == ()


# --------------------------------------------------------------------------- starts that died


def reserved(**more: object) -> Allocation:
    return allocation(State.RESERVED, WHOLE, **({"container": None, "activated_at": None} | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("age_s", "rows", "found"),
    [
        (10, (), False),  # the moment between the row of the reservation and that of the operation
        (119, (), False),
        (121, (), True),
        (10, (operation(stale=True, since=ago(seconds=9)),), True),  # its own hand is dead
        (10, (operation(stale=True, since=ago(seconds=11)),), True),  # the same: taken just before the reservation
        (10, (operation(stale=True, since=ago(seconds=60)),), False),  # somebody died before this start began
        (10, (operation(stale=True, since=ago(seconds=9), what="commit"),), False),
        (9999, (operation(),), False),  # a pull may last for hours
        (-30, (), False),  # the clock was set back
    ],
)
def test_reconcile_plan_takes_back_a_start_that_died(age_s: float, rows: tuple[object, ...], found: bool) -> None:
    row = reserved(reserved_at=ago(seconds=age_s), created_at=ago(days=300))
    result = told(plan(evidence([row], [], *rows)))  # type: ignore[arg-type]
    assert result == ([("start_died", Action.TAKE_BACK)] if found else [])


def test_reconcile_plan_counts_the_grace_of_a_used_allocation_from_its_last_reservation() -> None:
    row = reserved(created_at=ago(days=30), activated_at=ago(days=29), reserved_at=ago(seconds=20), container="c1")
    assert plan(evidence([row], [container(5, runs=False)])) == ()


def test_reconcile_plan_leaves_a_running_container_that_only_a_newer_ledger_can_know() -> None:
    """Bound before its first start: unbound and running means that the ledger is older than the start."""
    row = reserved(token=6)
    running = container(6, WHOLE)
    found = only(plan(evidence([row], [running], origins={6: origin(row)})))
    assert (found.what.value, found.action, found.severity) == ("unwritten", Action.NOTHING, Severity.ALERT)
    created = never_started(running, minutes=50)
    assert told(plan(evidence([row], [created], origins={6: origin(row)}))) == [("start_died", Action.TAKE_BACK)]


# --------------------------------------------------------------------------- ended, gone, replaced


@pytest.mark.parametrize(
    ("finished", "activated", "booted", "found"),
    [
        (ago(minutes=3), ago(hours=1), ago(days=1), "container_ended"),
        (ago(seconds=30), ago(hours=1), ago(days=1), None),  # the Hub settles it
        (ago(days=2), ago(seconds=10), ago(days=3), None),  # listed just before it was started again
        (ago(seconds=30), ago(hours=1), ago(seconds=50), "machine_rebooted"),
        (ago(minutes=59), ago(hours=1), ago(minutes=58), "machine_rebooted"),
    ],
)
def test_reconcile_plan_settles_an_ended_server(
    finished: object, activated: object, booted: object, found: str | None
) -> None:
    row = allocation(State.ACTIVE, WHOLE, activated_at=activated)
    ended = container(5, WHOLE, runs=False, finished=finished)
    result = told(plan(evidence([row], [ended], booted_at=booted)))
    assert result == ([(found, Action.HOLD)] if found else [])


@pytest.mark.parametrize("state", [State.ACTIVE, State.HELD])
def test_reconcile_plan_releases_what_has_no_container(state: State) -> None:
    assert told(plan(evidence([allocation(state, WHOLE)]))) == [("container_gone", Action.RELEASE)]


def test_reconcile_plan_finishes_a_replacement_that_died_half_way() -> None:
    row = allocation(State.HELD, WHOLE, token=6, container="gone", container_token=5, held_until=ago(minutes=1))
    stand_in = never_started(container(6, number="c6"), minutes=3)
    view = evidence([row], [stand_in], origins={6: origin(row)})
    found = only(plan(view))
    assert (found.what.value, found.action, found.container_id) == ("half_replaced", Action.BIND, "c6")
    for odd in (
        replace(stand_in, state="running", running=True, started=ago(minutes=1)),
        never_started(container(6, MIG_3G, number="c6"), minutes=3),
    ):
        assert told(plan(replace(view, facts=(odd,)))) == [("unwritten", Action.NOTHING)]
    copy = never_started(container(5, number="c6"), minutes=3)
    bound = allocation(State.HELD, WHOLE, container="gone")
    assert told(plan(evidence([bound], [copy], origins={5: origin(bound)}))) == [("unwritten", Action.NOTHING)]


# --------------------------------------------------------------------------- held


def test_reconcile_plan_strips_when_the_hold_ended() -> None:
    row = allocation(State.HELD, WHOLE, held_until=ago(seconds=1))
    stopped = container(5, WHOLE, runs=False)
    assert told(plan(evidence([row], [stopped]))) == [("hold_ended", Action.STRIP)]
    later = replace(row, held_until=NOW + timedelta(seconds=1))
    assert plan(evidence([later], [stopped])) == ()


def test_reconcile_plan_strips_a_container_that_names_what_is_released() -> None:
    row = allocation(State.HELD)
    found = only(plan(evidence([row], [container(5, MIG_1G, runs=False)])))
    assert (found.what.value, found.action, found.units) == ("names_released", Action.STRIP, (MIG_1G,))


def test_reconcile_plan_gives_an_endless_hold_its_end_where_the_policy_has_one() -> None:
    row = allocation(State.HELD, WHOLE, held_until=None)
    stopped = container(5, WHOLE, runs=False)
    assert plan(evidence([row], [stopped])) == ()
    assert told(plan(evidence([row], [stopped], hold_limits={1: 900.0}))) == [("hold_endless", Action.LIMIT_HOLD)]


# --------------------------------------------------------------------------- started behind our back


@pytest.mark.parametrize(
    ("started", "stopped", "since", "found"),
    [
        (ago(seconds=2), ago(minutes=30), ago(minutes=10), ("started_behind", Action.STOP)),
        (ago(minutes=20), ago(minutes=30), ago(minutes=10), ("started_unseen", Action.NOTHING)),
        (ago(seconds=2), ago(minutes=30), None, ("started_unseen", Action.NOTHING)),
        (ago(minutes=-5), ago(minutes=30), ago(minutes=10), ("started_unseen", Action.NOTHING)),
        (ago(minutes=45), ago(minutes=30), ago(minutes=10), ("stop_pending", Action.STOP)),
        (ago(minutes=45), ago(minutes=30), None, ("stop_pending", Action.STOP)),
    ],
)
@pytest.mark.parametrize("units", [(), (WHOLE,)])
def test_reconcile_plan_stops_what_runs_although_it_is_held(
    started: object, stopped: object, since: object, found: object, units: tuple[str, ...]
) -> None:
    """Unless it was started while nobody looked: then a Hub may have done it of which a restored ledger knows not."""
    row = allocation(State.HELD, *units, stopped_at=stopped, held_until=ago(minutes=-5) if units else None)
    view = evidence([row], [container(5, *units, started=started)], watching_since=since)
    assert told(plan(view)) == [found]


# --------------------------------------------------------------------------- old, unknown and copied containers


def test_reconcile_plan_stops_a_container_with_an_older_token() -> None:
    row = allocation(State.ACTIVE, WHOLE, token=9)
    old = container(5, WHOLE, number="old")
    view = evidence([row], [container(9, WHOLE), old], origins={5: origin(row)})
    found = only(plan(view))
    assert (found.what.value, found.action, found.container_id, found.allocation_id) == (
        "outdated",
        Action.STOP,
        "old",
        1,
    )


def test_reconcile_plan_stops_a_running_container_of_a_released_server() -> None:
    row = allocation(State.RELEASED)
    found = only(plan(evidence([], [container(5, WHOLE)], origins={5: origin(row)})))
    assert (found.what.value, found.action) == ("outdated", Action.STOP)


@pytest.mark.parametrize(
    ("last_token", "action"), [(4, Action.RAISE_COUNTER), (5, Action.NOTHING), (100, Action.NOTHING)]
)
def test_reconcile_plan_never_touches_a_token_that_this_ledger_did_not_give(last_token: int, action: Action) -> None:
    found = only(plan(evidence([], [container(5, WHOLE)], last_token=last_token)))
    assert (found.what.value, found.action, found.severity, found.token) == ("unknown", action, Severity.ALERT, 5)


def test_reconcile_plan_does_not_take_a_number_that_was_given_twice_for_its_own() -> None:
    """After a backup was restored the counter gives numbers anew that older containers carry."""
    mine = allocation(State.RELEASED, user="bob")
    assert told(plan(evidence([], [container(5, WHOLE)], origins={5: origin(mine)}))) == [("unknown", Action.NOTHING)]
    later = origin(allocation(State.RELEASED), at=ago(minutes=5))
    assert told(plan(evidence([], [container(5, WHOLE)], origins={5: later}))) == [("unknown", Action.NOTHING)]
    nearly = origin(allocation(State.RELEASED), at=ago(minutes=60, seconds=-3))
    assert told(plan(evidence([], [container(5, WHOLE)], origins={5: nearly}))) == [("outdated", Action.STOP)]


def test_reconcile_plan_tells_of_a_container_without_a_readable_token() -> None:
    found = only(plan(evidence([], [container(None, WHOLE)])))
    assert (found.what.value, found.action, found.severity) == ("unknown", Action.NOTHING, Severity.ALERT)


def test_reconcile_plan_removes_only_what_was_never_started() -> None:
    row = allocation(State.RELEASED)
    view = evidence(origins={5: origin(row)})
    old = never_started(container(5, WHOLE), minutes=3)
    assert told(plan(replace(view, facts=(old,)))) == [("never_started", Action.REMOVE)]
    young = replace(never_started(container(5), minutes=1), created=ago(minutes=1))
    assert plan(replace(view, facts=(young,))) == ()
    ended = only(plan(replace(view, facts=(container(5, WHOLE, runs=False),))))
    assert (ended.what.value, ended.action, ended.severity) == ("orphan", Action.NOTHING, Severity.ALERT)
    assert "docker rm -f main._.70000" in ended.remedy


def test_reconcile_plan_tells_of_a_copy_and_leaves_it() -> None:
    row = allocation(State.ACTIVE, WHOLE)
    view = evidence([row], [container(5, WHOLE), container(5, WHOLE, number="copy")], origins={5: origin(row)})
    found = only(plan(view))
    assert (found.what.value, found.action, found.container_id) == ("copied", Action.NOTHING, "copy")


def test_reconcile_plan_leaves_a_bound_container_with_another_token() -> None:
    row = allocation(State.HELD, WHOLE, token=5, held_until=ago(minutes=1))
    for odd in (container(6, WHOLE, runs=False), container(5, WHOLE, instance=OTHER, runs=False)):
        found = only(plan(evidence([row], [odd])))
        assert (found.what.value, found.action) == ("mislabelled", Action.NOTHING)
    broken = ContainerFacts(id="c1", name="main._.70000", unreadable="KeyError: 'State'")
    assert told(plan(evidence([row], [broken]))) == [("unreadable", Action.NOTHING)]


def test_reconcile_plan_stops_the_older_of_two_that_name_one_unit() -> None:
    older = allocation(State.ACTIVE, WHOLE, number=1, token=5)
    newer = allocation(State.ACTIVE, MIG_1G, number=2, token=9, container="c2", user="bob")
    twice = [container(5, WHOLE, MIG_1G), container(9, MIG_1G, number="c2", user="bob")]
    found = only(plan(evidence([older, newer], twice)))
    assert (found.what.value, found.action, found.container_id) == ("unit_shared", Action.STOP, "c1")
    swapped = [container(5, WHOLE), container(9, MIG_1G, WHOLE, number="c2", user="bob")]
    assert plan(evidence([older, newer], swapped)) == ()


# --------------------------------------------------------------------------- units that ended


def test_reconcile_plan_voids_a_lease_on_a_unit_that_ended() -> None:
    held = allocation(State.HELD, MIG_1G, held_until=NOW + timedelta(hours=1))
    stopped = container(5, MIG_1G, runs=False)
    found = only(plan(evidence([held], [stopped], gone=frozenset({MIG_1G}))))
    assert (found.what.value, found.action, found.units) == ("unit_gone", Action.STRIP, (MIG_1G,))
    assert plan(evidence([held], [stopped], gone=frozenset({MIG_2G}))) == ()


def test_reconcile_plan_never_stops_a_server_whose_unit_ended() -> None:
    active = allocation(State.ACTIVE, MIG_1G)
    found = only(plan(evidence([active], [container(5, MIG_1G)], gone=frozenset({MIG_1G}))))
    assert (found.what.value, found.action, found.severity) == ("unit_gone", Action.NOTHING, Severity.ALERT)


# --------------------------------------------------------------------------- in general


def test_reconcile_plan_leaves_alone_what_another_hand_is_at() -> None:
    held = allocation(State.HELD, WHOLE, held_until=ago(minutes=1))
    stray = never_started(container(4, number="old"), minutes=30)
    view = evidence(
        [held], [container(5, WHOLE, runs=False), stray], operation(what="commit"), origins={4: origin(held)}
    )
    assert plan(view) == ()
    assert len(plan(replace(view, operations=()))) == 2


def test_reconcile_plan_never_touches_another_installation() -> None:
    foreign = [
        container(5, WHOLE, instance=OTHER),
        container(6, MIG_1G, number="c2", runs=False, instance=OTHER),
        never_started(container(7, number="c3", instance=OTHER), days=3),
    ]
    row = allocation(State.RELEASED)
    assert plan(evidence([], foreign, origins={5: origin(row), 6: origin(row), 7: origin(row)})) == ()


def busy_world() -> Evidence:
    """Something of nearly every kind at once."""
    rows = [
        reserved(number=1, user="u1"),
        allocation(State.ACTIVE, WHOLE, number=2, token=12, container="c2", user="u2"),
        allocation(State.HELD, MIG_1G, number=3, token=13, container="c3", user="u3", held_until=ago(minutes=1)),
        allocation(State.HELD, MIG_2G, number=4, token=14, container="c4", user="u4", held_until=ago(minutes=-9)),
        allocation(State.ACTIVE, MIG_3G, number=5, token=15, container="c5", user="u5"),
    ]
    facts = [
        container(13, MIG_1G, number="c3", user="u3", runs=False),
        container(14, MIG_2G, number="c4", user="u4", started=ago(seconds=3)),
        container(15, MIG_3G, number="c5", user="u5", runs=False),
        container(1, number="c6"),
        never_started(container(2, number="c7"), minutes=9),
        container(999, WHOLE, number="c8"),
    ]
    gone = allocation(State.RELEASED, number=9)
    return evidence(rows, facts, origins={1: origin(gone), 2: origin(gone)})


def test_reconcile_plan_frees_and_stops_nothing_without_a_fresh_picture() -> None:
    view = busy_world()
    assert {f.action for f in plan(view)} >= {
        Action.STOP,
        Action.STRIP,
        Action.RELEASE,
        Action.TAKE_BACK,
        Action.REMOVE,
    }
    for snapshot in (None, picture(at=ago(seconds=16))):
        found = plan(replace(view, snapshot=snapshot))
        assert {f.key for f in found} == {f.key for f in plan(view)}
        assert {f.action for f in found if f.acting} == {Action.RAISE_COUNTER}
        assert all("fresh picture" in f.waits for f in found if f.action is Action.STOP)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.data())
def test_reconcile_plan_stops_only_by_proof(data: st.DataObject) -> None:
    """Whatever the ledger and Docker say: a container is stopped, removed or stripped only if its labels are of this
    installation, its token was given by this ledger to that very server, and no other hand is at it."""
    states = [State.RESERVED, State.ACTIVE, State.HELD]
    moments = [ago(days=2), ago(hours=1), ago(minutes=20), ago(minutes=1), None]
    rows = []
    for number in (1, 2):
        if data.draw(st.booleans()):
            token = data.draw(st.integers(1, 8))
            rows.append(
                allocation(
                    data.draw(st.sampled_from(states)),
                    *data.draw(st.sets(st.sampled_from([WHOLE, MIG_1G]), max_size=1)),
                    number=number,
                    token=token,
                    container=data.draw(st.sampled_from(["a", "b", None])),
                    container_token=data.draw(st.sampled_from([token, 1])),
                    user=f"u{number}",
                    held_until=data.draw(st.sampled_from(moments)),
                    reserved_at=data.draw(st.sampled_from(moments)),
                )
            )
    if len({row.container_id for row in rows}) < len(rows):
        rows = rows[:1]
    facts = [
        container(
            data.draw(st.sampled_from([None, *range(1, 9)])),
            *data.draw(st.sets(st.sampled_from([WHOLE, MIG_1G]), max_size=1)),
            number=number,
            runs=data.draw(st.booleans()),
            user=data.draw(st.sampled_from(["u1", "u2"])),
            instance=data.draw(st.sampled_from([INSTANCE, OTHER])),
            created=data.draw(st.sampled_from(moments)),
            started=data.draw(st.sampled_from(moments)),
        )
        for number in data.draw(st.sets(st.sampled_from(["a", "b", "c"])))
    ]
    owners = [*rows, allocation(State.RELEASED, number=8, user="u1"), allocation(State.RELEASED, number=9, user="u2")]
    origins = {
        token: origin(data.draw(st.sampled_from(owners)), at=data.draw(st.sampled_from(moments[:-1])))
        for token in data.draw(st.sets(st.integers(1, 8)))
    }
    busy = [operation(number, stale=data.draw(st.booleans())) for number in data.draw(st.sets(st.sampled_from([1, 2])))]
    view = evidence(rows, facts, *busy, origins=origins, watching_since=data.draw(st.sampled_from(moments)))
    by_id = {c.id: c for c in facts}
    bound = {row.container_id: row for row in rows}
    for found in plan(view):
        if found.action not in (Action.STOP, Action.REMOVE, Action.STRIP):
            continue
        subject = by_id[found.container_id]
        token = aime.token_of(subject.labels, INSTANCE)
        assert aime.is_ours(subject.labels, INSTANCE)
        assert found.allocation_id not in {row.allocation_id for row in busy if not row.stale}
        row = bound.get(subject.id)
        if row is not None:
            assert token == row.container_token and row.state is not State.RESERVED
        else:
            assert found.action is not Action.STRIP
            assert token in origins and origins[token].allocation.user == subject.labels[aime.LABEL_USER]
        if found.action is Action.STOP and row is not None and row.state is State.HELD:
            since = view.watching_since
            newer = row.stopped_at is not None and subject.started is not None and subject.started < row.stopped_at
            assert newer or (since is not None and subject.started is not None and subject.started >= since)
        if found.action is not Action.STOP:
            assert not subject.may_run
