"""The life of allocations: every step, every illegal step, and what each leaves behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import MappingProxyType

import pytest
from ledger_world import Clock, admission, bound, claim, granting, held, running, unit
from sqlalchemy import insert, text, update

from ds01spawner.errors import Busy, Code, LedgerError, Refusal, UnitTaken
from ds01spawner.ledger import tables
from ds01spawner.ledger.store import Claim, Ledger
from ds01spawner.model import Admission, Allocation, Limit, Limits, Request, Resources, State, Usage


def test_reserve_writes_everything_that_was_granted(ledger: Ledger, clock: Clock) -> None:
    got = ledger.reserve(claim("alice", "train"), granting(unit(1), unit(63)))
    assert (got.user, got.server_name, got.group, got.groups, got.uid) == (
        "alice",
        "train",
        "researchers",
        ("researchers",),
        70000,
    )
    assert (got.state, got.token, got.image, got.created_at) == (State.RESERVED, 1, "image:1", clock.now)
    assert got.request["profile"] == "torch"
    assert got.limits["values"]["max_cpus"] == {"value": 8.0, "source": "group researchers", "note": ""}
    small, whole = got.leases
    assert (small.unit_uuid, small.share, small.label, small.mig_profile) == ("MIG-1", 1 / 7, "0.1", "1g.5gb")
    assert (whole.unit_uuid, whole.share, whole.label, whole.mig_profile) == ("GPU-9", 1.0, "9", None)
    assert ledger.find("alice", "train") == ledger.get(got.id) == got
    assert ledger.allocations() == (got,)


def test_reserve_stores_limits_in_read_only_mappings(ledger: Ledger) -> None:
    limits = Limits("alice", None, (), MappingProxyType({"max_cpus": Limit(2, "defaults")}))
    granted = Admission(Request(), limits, "image", (), Resources(None, None, None, None, None))
    assert ledger.reserve(claim(), lambda _usage: granted).limits["values"]["max_cpus"]["value"] == 2


def test_reserve_hands_usage_with_own_holding_apart(ledger: Ledger) -> None:
    mine = running(ledger, unit(1))
    running(ledger, unit(2), unit(3), user="bob")
    ledger.hold(mine.id, until=None, reason="idle")
    seen: list[Usage] = []

    def decide(usage: Usage) -> Admission:
        seen.append(usage)
        return admission(unit(1))

    ledger.reserve(claim(), decide)
    usage = seen[0]
    assert usage.own is not None
    assert usage.own.units == {"MIG-1": 1 / 7}
    assert usage.own.state is State.HELD
    assert usage.taken() == {"MIG-2", "MIG-3"}
    assert usage.share_of("bob") == pytest.approx(2 / 7)
    assert usage.share_of_group("researchers") == pytest.approx(2 / 7)
    assert usage.servers_of("bob") == 1


def test_reserve_changes_nothing_when_the_decision_refuses(ledger: Ledger) -> None:
    before = running(ledger, unit(1))
    rows = len(ledger.audit_rows())

    def refuse(_usage: Usage) -> Admission:
        raise Refusal(Code.NO_GPU, "No GPU is free.")

    with pytest.raises(Refusal, match="No GPU is free"):
        ledger.reserve(claim(), refuse)
    with pytest.raises(KeyboardInterrupt):
        ledger.reserve(claim("bob"), lambda _usage: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ledger.allocations() == (before,)
    assert len(ledger.audit_rows()) == rows
    assert ledger.reserve(claim("bob"), granting()).token == before.token + 1


def test_reserve_refuses_a_unit_that_another_server_holds(ledger: Ledger) -> None:
    running(ledger, unit(1))
    with pytest.raises(UnitTaken, match="MIG-1") as caught:
        ledger.reserve(claim("bob"), granting(unit(2), unit(1)))
    assert caught.value.facts == {"units": ["MIG-1"]}
    assert ledger.find("bob", "") is None


@pytest.mark.parametrize("state", [State.RESERVED, State.ACTIVE, State.HELD])
def test_the_database_refuses_a_second_live_lease_whatever_the_code_does(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    first = running(ledger, unit(1))
    with ledger._db.write() as connection:
        connection.execute(update(tables.leases).values(state=state.value))
    monkeypatch.setattr("ds01spawner.ledger.allocations._refuse_taken", lambda *_: None)
    with pytest.raises(UnitTaken, match="given to another server") as caught:
        ledger.reserve(claim("bob"), granting(unit(1)))
    assert "INSERT" not in str(caught.value)
    assert ledger.find("bob", "") is None
    ledger.release(first.id, "over")
    assert held(ledger.reserve(claim("bob"), granting(unit(1)))) == {"MIG-1"}


def test_the_database_refuses_a_second_live_allocation_of_one_server(ledger: Ledger) -> None:
    first = ledger.reserve(claim(), granting())
    with ledger._db.read() as connection:
        row = dict(connection.execute(tables.allocations.select()).mappings().one())
    row |= {"id": first.id + 1, "token": 99}
    with pytest.raises(LedgerError, match="could not be used"), ledger._db.write() as connection:
        connection.execute(insert(tables.allocations).values(row))
    with pytest.raises(LedgerError), ledger._db.write() as connection:
        connection.execute(update(tables.allocations).values(state="paused"))


def test_reserve_refuses_one_unit_twice(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="twice"):
        ledger.reserve(claim(), granting(unit(1), unit(1)))


def test_reserve_uses_a_live_allocation_again_and_keeps_its_token(ledger: Ledger, clock: Clock) -> None:
    first = running(ledger, unit(1), unit(2))
    ledger.hold(first.id, until=None, reason="stopped")
    clock.turn(minutes=5)
    again = ledger.reserve(Claim("alice", "", "students", ("students", "all"), 70000), granting(unit(2), unit(3)))
    assert (again.id, again.token, again.state) == (first.id, first.token, State.RESERVED)
    assert (again.created_at, again.reserved_at) == (first.created_at, clock.now)
    assert (again.group, again.groups) == ("students", ("students", "all"))
    assert {lease.unit_uuid: lease.wanted for lease in again.leases} == {"MIG-1": False, "MIG-2": True, "MIG-3": True}
    with pytest.raises(UnitTaken):  # the old container still names it
        ledger.reserve(claim("bob"), granting(unit(1)))
    active = ledger.activate(again.id)
    assert held(active) == {"MIG-2", "MIG-3"}
    assert {lease.state for lease in active.leases} == {State.ACTIVE}
    ledger.reserve(claim("bob"), granting(unit(1)))


def test_a_unit_wanted_again_before_activate_stays(ledger: Ledger) -> None:
    first = running(ledger, unit(1))
    ledger.reserve(claim(), granting(unit(2)))
    again = ledger.reserve(claim(), granting(unit(1)))
    assert {lease.unit_uuid: lease.wanted for lease in again.leases} == {"MIG-1": True, "MIG-2": False}
    assert held(ledger.activate(first.id)) == {"MIG-1"}


def test_tokens_grow_and_survive_release_and_reopening(ledger: Ledger, ledger_url: str) -> None:
    first = ledger.reserve(claim(), granting())
    assert ledger.renew_token(first.id) == 2
    ledger.release(first.id, "over")
    with Ledger.open(ledger_url) as other:
        second = other.reserve(claim(), granting())
    assert (second.token, second.id) == (3, first.id + 1)
    found = [ledger.by_token(token) for token in (1, 2, 3, 4)]
    assert [item and item.id for item in found] == [first.id, first.id, second.id, None]


def test_raise_token_counter_after_a_restored_backup(ledger: Ledger) -> None:
    ledger.raise_token_counter(41, "container main._.70000 has it")
    ledger.raise_token_counter(7, "an older one")
    assert ledger.reserve(claim(), granting()).token == 42
    assert [row.after for row in ledger.audit_rows(action="ledger.raise_token")] == [{"token": 41}]


def test_bind_before_start_and_once_per_container(ledger: Ledger) -> None:
    first = ledger.reserve(claim(), granting(unit(1)))
    with pytest.raises(LedgerError, match="no container bound"):
        ledger.activate(first.id)
    got = bound(ledger, first, "c1")
    assert (got.container_id, got.container_name, got.container_token, got.spec_hash) == (
        "c1",
        "main._.70000",
        first.token,
        "hash",
    )
    second = ledger.reserve(claim("bob"), granting())
    with pytest.raises(LedgerError, match="already belongs"):
        bound(ledger, second, "c1")
    assert ledger.by_container("c1") == got
    assert ledger.by_container("c2") is None
    ledger.release(first.id, "over")
    assert bound(ledger, second, "c1") == ledger.by_container("c1")


def test_activate_needs_the_container_of_the_current_token(ledger: Ledger) -> None:
    first = bound(ledger, ledger.reserve(claim(), granting()), "old")
    ledger.renew_token(first.id)
    with pytest.raises(LedgerError, match="no container bound for token 2"):
        ledger.activate(first.id)
    bound(ledger, first, "new")
    assert ledger.activate(first.id).container_token == 2


def test_reserve_after_a_death_between_renew_and_bind_names_the_old_container_again(ledger: Ledger) -> None:
    first = running(ledger)
    ledger.hold(first.id, until=None, reason="stopped")
    ledger.reserve(claim(), granting())
    assert ledger.renew_token(first.id) == 2
    again = ledger.reserve(claim(), granting())  # the old container is started, with the token it carries
    assert (again.token, again.container_token) == (1, 1)
    assert ledger.activate(again.id).token == 1
    assert ledger.renew_token(first.id) == 3


def test_runtime_clock_goes_on_after_a_short_stop_only(ledger: Ledger, clock: Clock) -> None:
    first = running(ledger)
    begun = first.first_started_at
    assert begun == clock.now
    clock.turn(hours=5)
    stopped = ledger.hold(first.id, until=None, reason="restart")
    assert stopped.stopped_at == clock.now
    clock.turn(minutes=10)
    ledger.reserve(claim(), granting())
    short = ledger.activate(first.id)
    assert (short.first_started_at, short.activated_at, short.stopped_at) == (begun, clock.now, None)
    ledger.hold(first.id, until=None, reason="restart")
    clock.turn(minutes=10, seconds=1)
    ledger.reserve(claim(), granting())
    assert ledger.activate(first.id).first_started_at == clock.now


def test_hold_keeps_units_until_a_time_and_counts_no_server(ledger: Ledger, clock: Clock) -> None:
    first = running(ledger, unit(1))
    until = clock.now + timedelta(hours=1)
    got = ledger.hold(first.id, until=until, reason="user stopped it")
    assert (got.state, got.held_until, got.reason) == (State.HELD, until, "user stopped it")
    assert {lease.state for lease in got.leases} == {State.HELD}
    usage = ledger.usage()
    assert (usage.servers_of("alice"), usage.units_of("alice"), usage.holdings[0].until) == (0, 1, until)
    clock.turn(minutes=1)
    longer = ledger.hold(first.id, until=until + timedelta(hours=1), reason="granted")
    assert longer.stopped_at == got.stopped_at
    ledger.reserve(claim(), granting(unit(1)))
    assert ledger.activate(first.id).held_until is None


def test_drop_leases_keeps_the_stopped_server(ledger: Ledger) -> None:
    first = running(ledger, unit(1))
    ledger.hold(first.id, until=None, reason="stopped")
    got = ledger.drop_leases(first.id, "hold ended")
    assert (got.state, got.leases, got.container_id) == (State.HELD, (), first.container_id)
    assert (got.token, got.image, got.spec_hash) == (first.token, "image:1", "hash")
    assert ledger.usage().taken() == frozenset()
    assert ledger.usage().holdings[0].units == {}


def test_drop_leases_refuses_a_server_about_to_start(ledger: Ledger) -> None:
    first = running(ledger, unit(1))
    ledger.hold(first.id, until=None, reason="stopped")
    ledger.reserve(claim(), granting(unit(1)))
    with pytest.raises(LedgerError, match=r"alice/main .* is reserved"):
        ledger.drop_leases(first.id, "hold ended")


def test_rollback_of_a_first_start_releases(ledger: Ledger) -> None:
    first = ledger.reserve(claim(), granting(unit(1)))
    got = ledger.rollback(first.id, "create failed")
    assert (got.state, got.leases, got.reason) == (State.RELEASED, (), "create failed")
    assert ledger.allocations() == ()
    assert ledger.allocations(live=False) == (got,)


def test_rollback_of_a_restart_leads_back_to_the_hold(ledger: Ledger, clock: Clock) -> None:
    first = running(ledger, unit(1), unit(2))
    until = clock.now + timedelta(hours=1)
    before = ledger.hold(first.id, until=until, reason="stopped")
    clock.turn(minutes=3)
    ledger.reserve(claim(), granting(unit(2), unit(3)))
    ledger.renew_token(first.id)
    got = ledger.rollback(first.id, "create failed")
    assert got.leases == before.leases
    assert (got.state, got.stopped_at, got.held_until, got.token) == (State.HELD, before.stopped_at, until, 1)


def test_release_twice_is_harmless(ledger: Ledger) -> None:
    first = running(ledger, unit(1))
    got = ledger.release(first.id, "deleted", actor="bob")
    rows = ledger.audit_rows()
    assert (got.state, got.leases) == (State.RELEASED, ())
    assert got.released_at is not None
    assert ledger.release(first.id, "again") == got
    assert ledger.audit_rows() == rows
    assert rows[0].actor == "bob"


Step = Callable[[Ledger, int], object]
STEPS: dict[str, Step] = {
    "renew_token": lambda ledger, number: ledger.renew_token(number),
    "bind": lambda ledger, number: ledger.bind(number, container_id="c", container_name="n", image="i", spec_hash="h"),
    "activate": lambda ledger, number: ledger.activate(number),
    "hold": lambda ledger, number: ledger.hold(number, until=None, reason=""),
    "drop_leases": lambda ledger, number: ledger.drop_leases(number, ""),
    "rollback": lambda ledger, number: ledger.rollback(number, ""),
    "release": lambda ledger, number: ledger.release(number, ""),
}
LEGAL = {
    State.RESERVED: {"renew_token", "bind", "activate", "rollback", "release"},
    State.ACTIVE: {"renew_token", "bind", "hold", "drop_leases", "release"},
    State.HELD: {"renew_token", "bind", "hold", "drop_leases", "release"},
    State.RELEASED: {"release"},
}


def in_state(ledger: Ledger, state: State) -> Allocation:
    made = bound(ledger, ledger.reserve(claim(), granting(unit(1))))
    if state is not State.RESERVED:
        made = ledger.activate(made.id)
    if state is State.HELD:
        made = ledger.hold(made.id, until=None, reason="")
    if state is State.RELEASED:
        made = ledger.release(made.id, "")
    return made


@pytest.mark.parametrize("state", list(State))
def test_every_step_from_every_state_is_legal_or_refused(ledger: Ledger, state: State) -> None:
    for name, step in STEPS.items():
        before = in_state(ledger, state)
        if name in LEGAL[state]:
            step(ledger, before.id)
        else:
            with pytest.raises(LedgerError, match=f"{name} needs"):
                step(ledger, before.id)
            assert ledger.get(before.id) == before
        with pytest.raises(LedgerError, match="no allocation 4711"):
            step(ledger, 4711)
        ledger.release(before.id, "next")


def test_failure_by_failure_nobody_collects_units(ledger: Ledger) -> None:
    first = running(ledger, unit(1))
    ledger.hold(first.id, until=None, reason="stopped")
    for number in (2, 3, 4):
        ledger.reserve(claim(), granting(unit(number)))
        with pytest.raises(LedgerError, match="hold needs"):
            ledger.hold(first.id, until=None, reason="the start failed")
        assert held(ledger.rollback(first.id, "the start failed")) == {"MIG-1"}


def test_every_change_has_its_audit_row(ledger: Ledger) -> None:
    first = running(ledger, unit(1))
    ledger.hold(first.id, until=None, reason="idle", actor="watcher")
    ledger.drop_leases(first.id, "hold ended", actor="watcher")
    ledger.release(first.id, "deleted")
    rows = ledger.audit_rows(allocation_id=first.id)
    told = [(row.actor, row.action.removeprefix("allocation."), row.reason) for row in reversed(rows)]
    assert told == [
        ("alice", "reserve", "start by form"),
        ("system", "bind", "container created"),
        ("system", "activate", "running"),
        ("watcher", "hold", "idle"),
        ("watcher", "drop_leases", "hold ended"),
        ("system", "release", "deleted"),
    ]
    assert {row.subject for row in rows} == {"alice/"}
    dropped = rows[1]
    assert dropped.before == {"state": "held", "units": ["MIG-1"], "wanted": ["MIG-1"]}
    assert dropped.after == {"state": "held", "units": [], "wanted": []}
    assert rows[-1].before is None


NAMES = [
    "Alice",
    "alice",
    "ALICE",
    "alíce",
    "ali\u0301ce",
    "a'; DROP TABLE leases;--",
    "a%",
    "a_",
    "漢字",
    "💥",
    " ",
    "a/b",
]


def test_owners_are_exact_strings(ledger: Ledger) -> None:
    for number, name in enumerate(NAMES):
        ledger.reserve(claim(name, name), granting(unit(number)))
    for number, name in enumerate(NAMES):
        found = ledger.find(name, name)
        assert found is not None
        assert (found.user, held(found)) == (name, {f"MIG-{number}"})
        assert ledger.usage(exclude=(name, name)).own is not None
    assert ledger.find("aLICE", "aLICE") is None


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "x" * 256])
def test_names_that_cannot_be_stored_are_refused(ledger: Ledger, name: str) -> None:
    with pytest.raises(LedgerError) as caught:
        ledger.reserve(claim(name), granting())
    assert caught.value.code is Code.BAD_NAME
    assert ledger.allocations() == ()


def test_reasons_of_any_kind_are_stored(ledger: Ledger) -> None:
    first = running(ledger)
    assert ledger.release(first.id, "bad\0 \ud800 byte " + "x" * 9999).reason.startswith("bad\ufffd ? byte x")


def test_reserve_waits_for_no_hand_of_another_process(ledger: Ledger, ledger_url: str, clock: Clock) -> None:
    first = running(ledger, unit(1))
    with Ledger.open(ledger_url, clock=clock) as watcher:
        watcher._me = watcher._me.__class__("elsewhere:1:1", "other/kernel")
        with watcher.operation(first.id, "release", "watcher"), pytest.raises(Busy, match="'release' by watcher"):
            ledger.reserve(claim(), granting(unit(1)))
    with ledger.operation(first.id, "start", "alice"):
        ledger.reserve(claim(), granting(unit(1)))


def test_a_decision_that_uses_the_ledger_to_write_is_refused(ledger: Ledger) -> None:
    def decide(_usage: Usage) -> Admission:
        ledger.audit("alice", "x", "y")
        raise AssertionError

    with pytest.raises(LedgerError, match="inside one of its own"):
        ledger.reserve(claim(), decide)


def test_race_of_two_threads_for_the_quota_of_one_user(ledger: Ledger) -> None:
    def decide(number: int) -> Callable[[Usage], Admission]:
        def one_unit_each(usage: Usage) -> Admission:
            count = usage.units_of("alice")
            time.sleep(0.005)  # whoever reads without the lock reads the same count now
            if count >= 1:
                raise Refusal(Code.USER_COUNT, "You hold 1 of 1.")
            return admission(unit(number))

        return one_unit_each

    for _ in range(15):
        outcomes: list[str] = []
        start = threading.Barrier(2)

        def door(number: int, start: threading.Barrier = start, outcomes: list[str] = outcomes) -> None:
            start.wait()
            try:
                ledger.reserve(claim("alice", f"s{number}"), decide(number))
                outcomes.append("granted")
            except Refusal as refusal:
                outcomes.append(refusal.code.value)

        threads = [threading.Thread(target=door, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["granted", "user_count"]
        for allocation in ledger.allocations():
            ledger.release(allocation.id, "next round")


def test_race_of_many_threads_reading_and_writing(ledger: Ledger) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(6):
                made = running(ledger, unit(number), user=f"user{number}")
                assert ledger.find(f"user{number}", "") == made
                ledger.usage()
                ledger.release(made.id, "over")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    tokens = [allocation.token for allocation in ledger.allocations(live=False)]
    assert len(tokens) == len(set(tokens)) == 72


def test_restart_finds_everything_again(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as first:
        made = running(first, unit(1))
        instance, rows = first.instance, first.audit_rows()
    with Ledger.open(ledger_url) as second:
        assert second.instance == instance
        assert second.allocations() == (made,)
        assert second.audit_rows() == rows


def test_usage_does_not_walk_through_history(tmp_path: object) -> None:
    with Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite") as ledger, ledger._db.read() as connection:
        for table, columns in (("allocations", tables.USAGE_HEADS), ("leases", tables.USAGE_UNITS)):
            query = f"EXPLAIN QUERY PLAN SELECT {', '.join(columns)} FROM {table} WHERE {tables.LIVE_SQL}"
            plan = str(connection.execute(text(query)).all())
            assert f"USING COVERING INDEX ix_{table}_usage" in plan
