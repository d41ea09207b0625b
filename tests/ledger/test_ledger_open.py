"""Opening: migrations, several processes at once, permissions, damage, and what is refused."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from ledger_world import running, unit
from sqlalchemy import text

from ds01spawner.errors import Code, LedgerError
from ds01spawner.ledger import database, tables
from ds01spawner.ledger.store import Ledger

OPENER = """
import sys
from ds01spawner.ledger.store import Ledger
print("ready", flush=True)
sys.stdin.readline()
with Ledger.open(sys.argv[1]) as ledger:
    print(ledger.instance, len(ledger.allocations()))
"""


def test_migrations_make_the_tables_the_code_expects(ledger: Ledger) -> None:
    with ledger._db.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
        assert context.get_current_revision() == tables.HEAD


def test_migrations_partial_indexes_say_live_in_the_same_words(tmp_path: Path) -> None:
    # PostgreSQL rewrites the condition; there the index is shown at work by the other tests.
    with Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite") as ledger, ledger._db.read() as connection:
        query = text("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql LIKE '%WHERE%'")
        found = {name: sql.partition("WHERE ")[2] for name, sql in connection.execute(query)}
    live = {"uq_allocations_live_server", "uq_allocations_live_container", "uq_leases_live_unit"}
    assert {name for name, condition in found.items() if condition == tables.LIVE_SQL} >= live


def test_the_newest_migration_is_the_one_the_code_names() -> None:
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [tables.HEAD]


def test_opening_again_changes_nothing_and_needs_no_writer(ledger: Ledger, ledger_url: str) -> None:
    made = running(ledger, unit(1))
    with ledger._db.write(), Ledger.open(ledger_url) as other:
        assert other.instance == ledger.instance
        assert other.allocations() == (made,)


def test_restart_with_a_newer_schema_is_refused(ledger: Ledger, ledger_url: str) -> None:
    with ledger._db.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0999'"))
    with pytest.raises(LedgerError, match=r"schema 0999, newer than this program knows .*backup") as caught:
        Ledger.open(ledger_url)
    assert caught.value.code is Code.LEDGER_UNAVAILABLE
    with ledger._db.read() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "0999"


def test_a_failed_migration_leaves_nothing(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("power cut")

    from alembic import command

    real = command.upgrade

    def half(config: Config, revision: str) -> None:
        real(config, revision)
        broken()

    with monkeypatch.context() as patch:
        patch.setattr(command, "upgrade", half)
        with pytest.raises(RuntimeError, match="power cut"):
            Ledger.open(ledger_url)
    with Ledger.open(ledger_url) as ledger:
        assert running(ledger, unit(1)).token == 1


def test_race_of_eight_processes_opening_a_new_ledger(ledger_url: str) -> None:
    command = [sys.executable, "-W", "error", "-c", OPENER, ledger_url]
    openers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write("go\n")
        opener.stdin.flush()
    told = [opener.communicate(timeout=60) for opener in openers]
    assert [error for _, error in told] == [""] * 8
    assert len({instance for instance, _ in told}) == 1
    with Ledger.open(ledger_url) as ledger:
        assert {line for line, _ in told} == {f"{ledger.instance} 0\n"}


def test_only_its_owner_may_read_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with Ledger.open(f"sqlite:///{folder}/ledger.sqlite") as ledger:
        running(ledger)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == dict.fromkeys(
            ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "ledger.sqlite-lock"), 0o600
        )
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "ledger.sqlite").chmod(0o644)
    with Ledger.open(f"sqlite:///{folder}/ledger.sqlite"):
        assert stat.S_IMODE((folder / "ledger.sqlite").stat().st_mode) == 0o600


def test_a_folder_in_which_everybody_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(LedgerError, match="Everybody may write"):
        Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite")


def test_every_lease_is_on_the_disk_before_it_is_given(tmp_path: Path) -> None:
    with Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite") as ledger:
        for durable, level in ((False, 1), (True, 2), (False, 1), (True, 2)):
            with ledger._db.write(durable=durable) as connection:
                assert connection.scalar(text("PRAGMA synchronous")) == level
                assert connection.scalar(text("PRAGMA foreign_keys")) == 1
        with ledger._db.read() as connection:
            assert connection.scalar(text("PRAGMA journal_mode")) == "wal"


def test_a_write_begins_immediate_and_a_read_waits_for_nobody(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(f"sqlite:///{path}") as ledger, ledger._db.write():
        other = sqlite3.connect(path, timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        assert other.execute("SELECT count(*) FROM leases").fetchone() == (0,)
        other.close()


DAMAGE = {
    "not a database": b"this is no database at all, only some text that somebody wrote over it" * 100,
    "cut header": b"SQLite format 3\0" + bytes(50),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_failure_a_damaged_file_is_named_with_a_remedy(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(DAMAGE[damage])
    with pytest.raises(LedgerError, match=r"is damaged\. .*backup") as caught:
        Ledger.open(f"sqlite:///{path}")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == DAMAGE[damage]


def test_failure_damage_met_later_is_a_ledger_error_too(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(f"sqlite:///{path}") as ledger:
        running(ledger, unit(1))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    with pytest.raises(LedgerError, match="damaged"), Ledger.open(f"sqlite:///{path}") as ledger:
        ledger.allocations()


def test_failure_a_locked_ledger_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "WAIT_SECONDS", 0.1)
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(f"sqlite:///{path}") as ledger:
        shell = sqlite3.connect(path, isolation_level=None)
        shell.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="stayed locked by another process"):
            running(ledger)
        shell.close()
        with (
            Ledger.open(f"sqlite:///{path}") as other,
            other._db.write(),
            pytest.raises(LedgerError, match=r"locked by another process for 0 s"),
        ):
            running(ledger)
        running(ledger)


def test_failure_a_thread_that_gets_no_turn_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "WAIT_SECONDS", 0.1)
    with Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite") as ledger:
        errors: list[LedgerError] = []

        def write() -> None:
            try:
                ledger.audit("a", "b", "c")
            except LedgerError as error:
                errors.append(error)

        with ledger._db.write():
            thread = threading.Thread(target=write)
            thread.start()
            thread.join()
        assert "Try again" in str(errors[0])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "not a database URL"),
        ("mysql://host/db", "not mysql"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("postgresql://nobody:x@127.0.0.1:1/none", "does not answer"),
    ],
)
def test_urls_that_cannot_work_are_refused_with_a_sentence(url: str, words: str) -> None:
    with pytest.raises(LedgerError, match=words) as caught:
        Ledger.open(url)
    assert ":x@" not in str(caught.value)


def test_failure_an_unreadable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"cannot be opened: .*state_dir"):
        Ledger.open(f"sqlite:///{tmp_path}/file/ledger.sqlite")
    (tmp_path / "ledger.sqlite-lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LedgerError, match="lock"):
        Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite")


def test_a_closed_ledger_says_so(ledger: Ledger) -> None:
    ledger.close()
    ledger.close()
    for call in (ledger.usage, lambda: ledger.audit("a", "b", "c")):
        with pytest.raises(LedgerError, match="was closed"):
            call()


def test_a_ledger_carried_into_a_child_is_refused(ledger: Ledger) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ledger.usage()
        except LedgerError as error:
            code = 0 if "before a fork" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("database or disk is full", "Free space"),
        ("attempt to write a readonly database", "Run as the user"),
        ("disk I/O error", "Check the disk"),
        ("canceling statement due to lock timeout", "Try again"),
        ("server closed the connection unexpectedly", "PostgreSQL server runs"),
        ('FATAL:  password authentication failed for user "x"', "ledger_url"),
        ("something nobody expected\nLINE 1: SELECT secret", "something nobody expected"),
        ("", "Exception"),
    ],
)
def test_every_cause_becomes_a_sentence_with_a_remedy(cause: str, words: str) -> None:
    sentence = database._diagnosis(Exception(cause))
    assert words in sentence
    assert "SELECT" not in sentence


def test_postgres_is_covered_or_said_not_to_be() -> None:
    if not os.environ.get("DS01_TEST_POSTGRES"):
        pytest.skip("DS01_TEST_POSTGRES names no database: the ledger was tested on SQLite only")
