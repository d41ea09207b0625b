"""Request rows, policies, the snapshot, uids, images, and the audit trail."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from ledger_world import Clock, running, unit
from sqlalchemy import text, update

from ds01spawner.errors import Code, LedgerError
from ds01spawner.ledger import tables
from ds01spawner.ledger.store import ImageRecord, Ledger, RequestRecord
from ds01spawner.model import External, Gpu, Inventory, Snapshot, State


def a_snapshot(at: datetime) -> Snapshot:
    units = tuple(unit(number) for number in range(7))
    gpu = Gpu("GPU-0", 0, "00000000:3B:00.0", "A100", 40 << 30, True, units, 7, 8, (8, 0), {"GPU-1": 100}, "lost")
    other = External("MIG-1", "container", "jupyter-old", "--gpus all", "image", "- name: x")
    return Snapshot(at, Inventory((gpu,), "nvml", "550.1"), (other,), "boot", ("note ä",))


# --------------------------------------------------------------------- requests


def test_request_rows_are_complete_and_come_back(ledger: Ledger, clock: Clock) -> None:
    made = running(ledger, unit(1))
    usage = ledger.usage()
    number = ledger.record_request(
        RequestRecord(
            user="alice",
            server_name="train",
            door="rest",
            outcome="refused",
            request={"profile": "torch", "gpu": {"count": 2}},
            group="researchers",
            groups=("researchers", "all"),
            usage=usage,
            policy_hash="p1",
            inventory_hash="i1",
            code="user_count",
            message="You hold 1 of 1.",
            allocation_id=made.id,
        )
    )
    (row,) = ledger.requests()
    assert row.id == number
    assert row.at == clock.now
    assert (row.user, row.server_name, row.door, row.outcome) == ("alice", "train", "rest", "refused")
    assert (row.group, row.groups, row.allocation_id) == ("researchers", ("researchers", "all"), made.id)
    assert row.request == {"profile": "torch", "gpu": {"count": 2}}
    assert (row.policy_hash, row.inventory_hash, row.code, row.message) == (
        "p1",
        "i1",
        "user_count",
        "You hold 1 of 1.",
    )
    assert isinstance(row.usage, dict)
    (holding,) = row.usage["holdings"]
    assert (holding["user"], holding["state"], holding["units"]) == ("alice", "active", {"MIG-1": 1 / 7})


def test_request_filters_and_pages(ledger: Ledger, clock: Clock) -> None:
    for number in range(5):
        outcome = "granted" if number % 2 else "refused"
        ledger.record_request(RequestRecord(f"user{number % 2}", "", "form", outcome, {"n": number}))
        clock.turn(hours=1)
    begun = clock.now - timedelta(hours=5)

    def numbers(**filters: object) -> list[int]:
        return [row.request["n"] for row in ledger.requests(**filters)]  # type: ignore[arg-type]

    assert numbers() == [0, 1, 2, 3, 4]
    assert numbers(user="user1") == [1, 3]
    assert numbers(outcome="refused") == [0, 2, 4]
    assert numbers(since=begun + timedelta(hours=1), until=begun + timedelta(hours=3)) == [1, 2]
    first = ledger.requests(limit=2)
    assert numbers(after_id=first[-1].id, limit=2) == [2, 3]


def test_last_choice_is_the_last_granted_one_of_that_server(ledger: Ledger) -> None:
    assert ledger.last_choice("alice", "") is None
    for outcome, size in (("granted", "small"), ("granted", "large"), ("refused", "huge"), ("failed", "odd")):
        ledger.record_request(RequestRecord("alice", "", "form", outcome, {"size": size}))
    ledger.record_request(RequestRecord("alice", "other", "form", "granted", {"size": "tiny"}))
    ledger.record_request(RequestRecord("bob", "", "form", "granted", {"size": "none"}))
    assert ledger.last_choice("alice", "") == {"size": "large"}


def test_request_of_an_unstorable_user_is_refused(ledger: Ledger) -> None:
    with pytest.raises(LedgerError) as caught:
        ledger.record_request(RequestRecord("a\0", "", "form", "refused"))
    assert caught.value.code is Code.BAD_NAME
    ledger.record_request(RequestRecord("alice", "", "rest", "refused", {"profile": "\0\ud800"}, message="\0"))
    assert ledger.requests()[0].request == {"profile": "\0\ud800"}


# --------------------------------------------------------------------- policies


def test_last_policy_is_the_last_one_saved(ledger: Ledger, clock: Clock) -> None:
    assert ledger.last_policy() is None
    ledger.save_policy("a", "text a")
    ledger.save_policy("b", "text b ä")
    assert ledger.last_policy() == ("b", "text b ä")
    ledger.save_policy("a", "text a")  # the admin took the edit back
    assert ledger.last_policy() == ("a", "text a")
    assert ledger.policy_text("b") == "text b ä"
    assert ledger.policy_text("c") is None
    changes = [(row.before, row.after) for row in reversed(ledger.audit_rows(action="policy.in_force"))]
    assert changes == [({"hash": None}, {"hash": "a"}), ({"hash": "a"}, {"hash": "b"}), ({"hash": "b"}, {"hash": "a"})]


def test_saving_the_policy_in_force_writes_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.save_policy("a", "text")
    monkeypatch.setattr(ledger._db, "write", None)
    ledger.save_policy("a", "text")


# --------------------------------------------------------------------- snapshot


def test_snapshot_comes_back_as_it_was(ledger: Ledger, clock: Clock) -> None:
    assert ledger.read_snapshot() is None
    ledger.write_snapshot(a_snapshot(clock.now - timedelta(seconds=5)))
    ledger.write_snapshot(a_snapshot(clock.now))
    found = ledger.read_snapshot()
    assert found == a_snapshot(clock.now)
    assert found is not None
    assert found.inventory.fingerprint == a_snapshot(clock.now).inventory.fingerprint
    assert not found.stale(clock.now)


@pytest.mark.parametrize(
    "damage",
    [
        {"body": "{"},
        {"body": "{}"},
        {"body": "[]"},
        {"body": '{"at": "yesterday", "inventory": null}'},
        {"format": "another layout"},
    ],
)
def test_a_snapshot_that_cannot_be_read_is_no_evidence(ledger: Ledger, clock: Clock, damage: dict[str, str]) -> None:
    ledger.write_snapshot(a_snapshot(clock.now))
    with ledger._db.write() as connection:
        connection.execute(update(tables.snapshots).values(damage))
    assert ledger.read_snapshot() is None
    ledger.write_snapshot(a_snapshot(clock.now))
    assert ledger.read_snapshot() is not None


def test_snapshots_do_not_bloat_the_log(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(f"sqlite:///{path}") as ledger:
        for _ in range(1500):  # two hours of them
            ledger.write_snapshot(a_snapshot(clock.now))
        wal = path.with_name("ledger.sqlite-wal").stat().st_size
        assert wal < 8 << 20
        assert path.stat().st_size < 1 << 20


# --------------------------------------------------------------------- uids


def test_a_uid_is_given_once_and_kept(ledger: Ledger) -> None:
    assert ledger.uid_of("alice", (70000, 70002), lambda uid: uid == 70000) == 70001
    assert ledger.uid_of("alice", (80000, 80002), lambda _uid: True) == 70001
    assert ledger.uid_of("Alice", (70000, 70002), lambda _uid: False) == 70002
    assert [row.after for row in ledger.audit_rows(action="uid.give")] == [{"uid": 70002}, {"uid": 70001}]


def test_gaps_are_used_before_the_range_is_called_full(ledger: Ledger) -> None:
    assert ledger.uid_of("a", (10, 12), lambda uid: uid < 12) == 12
    assert ledger.uid_of("b", (10, 12), lambda _uid: False) == 10
    assert ledger.uid_of("c", (10, 12), lambda _uid: False) == 11
    with pytest.raises(LedgerError, match=r"No uid is left in 10-12 for d\. Widen uid_range"):
        ledger.uid_of("d", (10, 12), lambda _uid: False)
    with pytest.raises(LedgerError, match="No uid is left"):
        ledger.uid_of("e", (20, 25), lambda _uid: True)


def test_race_for_uids_gives_each_user_another_one(ledger: Ledger) -> None:
    found: dict[str, set[int]] = {}
    start = threading.Barrier(8)

    def ask(user: str) -> None:
        start.wait()
        found.setdefault(user, set()).add(ledger.uid_of(user, (70000, 70010), lambda _uid: False))

    threads = [threading.Thread(target=ask, args=(f"user{number % 4}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(uid for uids in found.values() for uid in uids) == [70000, 70001, 70002, 70003]


# --------------------------------------------------------------------- images


def an_image(owner: str = "alice", ref: str = "ds01/alice:main", **changes: object) -> ImageRecord:
    values = {"image_id": "sha256:1", "base_image": "torch:2", "server_name": "main", "size": 100, "layers": 3}
    return ImageRecord(owner, ref, **(values | changes))  # type: ignore[arg-type]


def test_images_are_remembered_and_updated(ledger: Ledger, clock: Clock) -> None:
    first = ledger.remember_image(an_image())
    assert (first.created_at, first.last_used_at, first.removed_at) == (clock.now, clock.now, None)
    clock.turn(hours=1)
    again = ledger.remember_image(an_image(image_id="sha256:2", layers=4))
    assert (again.id, again.image_id, again.layers) == (first.id, "sha256:2", 4)
    private = ledger.remember_image(an_image(ref="ds01/alice:mine", kind="private", image_id="sha256:3"))
    assert ledger.images_of("alice") == (private, again)
    clock.turn(hours=1)
    ledger.touch_image("ds01/alice:main")
    assert [image.ref for image in ledger.images_of("alice")] == ["ds01/alice:main", "ds01/alice:mine"]
    assert ledger.images_of("Alice") == ()


def test_an_image_of_another_user_is_left_alone(ledger: Ledger) -> None:
    ledger.remember_image(an_image())
    with pytest.raises(LedgerError, match="belongs to another user"):
        ledger.remember_image(an_image(owner="bob"))
    found = ledger.find_image("ds01/alice:main")
    assert found is not None
    assert found.owner == "alice"
    assert ledger.find_image("sha256:1") == found
    assert ledger.find_image("sha256:9") is None


def test_an_image_id_belongs_to_who_made_it_first(ledger: Ledger) -> None:
    first = ledger.remember_image(an_image())
    ledger.remember_image(an_image(owner="bob", ref="ds01/bob:main"))
    assert ledger.find_image("sha256:1") == first


def test_a_forgotten_image_is_history(ledger: Ledger, clock: Clock) -> None:
    ledger.remember_image(an_image())
    ledger.forget_image("ds01/alice:main", "removed by its owner", actor="alice")
    ledger.forget_image("ds01/alice:main", "again")
    assert ledger.images_of("alice") == ()
    assert ledger.find_image("ds01/alice:main") is None
    assert ledger.images_of("alice", removed=True)[0].removed_at == clock.now
    assert ledger.remember_image(an_image(owner="bob")).owner == "bob"
    assert len(ledger.audit_rows(action="image.forget")) == 1


# --------------------------------------------------------------------- audit


def test_audit_filters_and_pages(ledger: Ledger, clock: Clock) -> None:
    begun = clock.now
    for number in range(6):
        ledger.audit(f"actor{number % 2}", f"kind{number % 3}.x", f"s{number}", "why", {"n": number}, {"n": number + 1})
        clock.turn(hours=1)

    def subjects(**filters: object) -> list[str]:
        return [row.subject for row in ledger.audit_rows(**filters)]  # type: ignore[arg-type]

    assert subjects() == ["s5", "s4", "s3", "s2", "s1", "s0"]
    assert subjects(actor="actor1") == ["s5", "s3", "s1"]
    assert subjects(action="kind1.x") == subjects(action="kind1.") == ["s4", "s1"]
    assert subjects(action="kind_.") == []
    assert subjects(subject="s2") == ["s2"]
    assert subjects(since=begun + timedelta(hours=2), until=begun + timedelta(hours=4)) == ["s3", "s2"]
    page = ledger.audit_rows(limit=2)
    assert subjects(before_id=page[-1].id, limit=2) == ["s3", "s2"]
    row = page[0]
    assert (row.actor, row.reason, row.before, row.after) == ("actor1", "why", {"n": 5}, {"n": 6})
    assert row.at == begun + timedelta(hours=5)


@pytest.mark.parametrize("sql", ["UPDATE audit SET actor = 'x'", "DELETE FROM audit"])
def test_audit_is_append_only_in_the_database_itself(ledger: Ledger, sql: str) -> None:
    ledger.audit("alice", "x", "y")
    before = ledger.audit_rows()
    with pytest.raises(LedgerError), ledger._db.write() as connection:
        connection.execute(text(sql))
    assert ledger.audit_rows() == before


def test_times_are_utc_whatever_zone_they_came_in(ledger: Ledger, clock: Clock) -> None:
    clock.now = datetime(2026, 7, 1, 14, 30, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    made = running(ledger)
    assert made.created_at == clock.now
    assert made.created_at is not None
    assert made.created_at.utcoffset() == timedelta(0)
    until = datetime(2026, 7, 2, tzinfo=timezone(timedelta(hours=-8)))
    got = ledger.hold(made.id, until=until, reason="")
    assert (got.held_until, got.state) == (until, State.HELD)
    with pytest.raises(LedgerError):
        ledger.hold(made.id, until=datetime(2026, 7, 3), reason="")  # noqa: DTZ001 (naive on purpose)
    assert ledger.get(made.id) == got
