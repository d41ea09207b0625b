"""The ledger's file or server: connections, transactions, locks, and errors a person can act on.

Every write is one transaction that sees all earlier ones: `BEGIN IMMEDIATE` on SQLite, an advisory lock on
PostgreSQL. On SQLite the processes also queue at a lock file, because SQLite's own waiting (sleeps of up to
100 ms) starves callers under load; it only keeps waits short, what is correct does not depend on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Engine, create_engine, event, exc, func, insert, inspect, select, text
from sqlalchemy.engine import URL, make_url

from ds01spawner.errors import LedgerError

from .tables import HEAD, meta

WAIT_SECONDS = 30.0
"""How long a writer waits for its turn before it gives up with a LedgerError."""

MIGRATIONS = Path(__file__).with_name("migrations")

_ADVISORY_KEY = 0x64733031  # "ds01": the same number in every process; advisory locks are per database
_WRITE, _QUICK = "write", "quick"  # values of the execution option that says how a transaction begins
_WAL_LIMIT = 8 * 1024 * 1024  # bytes kept of the write-ahead log after a checkpoint
_VERSION = text("SELECT version_num FROM alembic_version")


def utcnow() -> datetime:
    """The wall clock, aware, in UTC."""
    return datetime.now(timezone.utc)


class Database:
    """One open ledger database. Thread-safe; not to be carried into a forked child.

    Args:
        url: SQLAlchemy URL; `sqlite:////path/of/a.file` or `postgresql://…`.
        clock: the wall clock as a value.

    Raises:
        LedgerError: the database cannot be opened, is damaged, or is newer than this program.
    """

    def __init__(self, url: str, clock: Callable[[], datetime] = utcnow) -> None:
        self.clock = clock
        self._url = _checked_url(url)
        self._place = self._url.render_as_string(hide_password=True)
        self._pid = os.getpid()
        self._closed = False
        self._turn = threading.Lock()
        self._writer: int | None = None  # thread that has the turn
        self._lock_file = _open_lock(_checked_file(self._url)) if self.sqlite else None
        self._engine = _engine(self._url)
        try:
            self.instance = self._prepare()
        except BaseException:
            self.close()
            raise

    @property
    def sqlite(self) -> bool:
        """True on SQLite, False on PostgreSQL."""
        return self._url.get_backend_name() == "sqlite"

    def close(self) -> None:
        """Close every connection. Later calls raise LedgerError; closing twice is harmless."""
        self._closed = True
        self._engine.dispose()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    # ----------------------------------------------------------------- transactions

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction: one consistent view that waits for no writer.

        Raises:
            LedgerError: the database does not answer.
        """
        self._refuse_misuse()
        with self._errors(), self._engine.connect() as connection, connection.begin():
            if not self.sqlite:
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
            yield connection

    @contextlib.contextmanager
    def write(self, *, durable: bool = True) -> Iterator[Connection]:
        """The one write transaction: nobody else writes meanwhile; any exception rolls everything back.

        Args:
            durable: False for what is worthless after a power cut (snapshot, heartbeats): committed, but not
                waited for until it is on the disk.

        Raises:
            LedgerError: no turn within 30 s, a write inside a write, or the database does not answer.
        """
        self._refuse_misuse()
        with self._my_turn(), self._errors(), self._engine.connect() as plain:
            connection = plain.execution_options(ds01=_WRITE if durable else _QUICK)
            with connection.begin():
                if not self.sqlite:
                    if not durable:
                        connection.execute(text("SET LOCAL synchronous_commit = off"))
                    connection.execute(select(func.pg_advisory_xact_lock(_ADVISORY_KEY)))
                yield connection

    def _refuse_misuse(self) -> None:
        if self._closed:
            raise LedgerError("The ledger was closed; open it again with Ledger.open.")
        if os.getpid() != self._pid:
            raise LedgerError("The ledger was opened before a fork; each process must call Ledger.open itself.")
        if self._writer == threading.get_ident():
            # Rolling back would undo, or waiting would deadlock: whoever decides must not use the ledger.
            raise LedgerError("The ledger was used inside one of its own write transactions; decide on values only.")

    @contextlib.contextmanager
    def _my_turn(self) -> Iterator[None]:
        deadline = time.monotonic() + WAIT_SECONDS
        if not self._turn.acquire(timeout=WAIT_SECONDS):
            raise self._too_busy()
        try:
            self._writer = threading.get_ident()
            self._lock_processes(deadline)
            try:
                yield
            finally:
                if self._lock_file is not None:
                    fcntl.flock(self._lock_file, fcntl.LOCK_UN)
        finally:
            self._writer = None
            self._turn.release()

    def _lock_processes(self, deadline: float) -> None:
        """Take the lock file. Polled, because a blocking flock has no timeout; the kernel frees it on death."""
        pause = 0.0005
        while self._lock_file is not None and not _try_lock(self._lock_file):
            if time.monotonic() > deadline:
                raise self._too_busy()
            time.sleep(pause)
            pause = min(pause * 1.5, 0.004)

    def _too_busy(self) -> LedgerError:
        return LedgerError(
            f"The ledger at {self._place} was locked by another process for {WAIT_SECONDS:.0f} s. "
            "Try again; if it stays so, look for a stopped ds01 process or an open database shell."
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the database's errors into sentences without SQL."""
        try:
            yield
        except (exc.SQLAlchemyError, sqlite3.Error) as error:
            cause = getattr(error, "orig", None) or error
            raise LedgerError(f"The ledger at {self._place} {_diagnosis(cause)}") from error

    # ----------------------------------------------------------------- schema

    def _prepare(self) -> str:
        """Bring the schema up to date and return the instance uuid."""
        if self.sqlite:
            self._use_wal()
        with self.read() as connection:
            if self._revision(connection) == HEAD:
                found = connection.scalar(select(meta.c.instance))
                if found is not None:
                    return str(found)
        with self.write() as connection:  # several processes may arrive here: the second finds it done
            revision = self._revision(connection)
            if revision != HEAD:
                self._migrate(connection, revision)
            found = connection.scalar(select(meta.c.instance))
            if found is None:
                found = str(uuid4())
                connection.execute(insert(meta).values(id=1, instance=found, token=0, created_at=self.clock()))
            return str(found)

    def _use_wal(self) -> None:
        """Switch the file to WAL once (it stays so). Under the turn: the switch does not wait for others."""
        if self._journal("PRAGMA journal_mode") == "wal":
            return
        with self._my_turn():
            mode = self._journal("PRAGMA journal_mode = WAL")
        if mode != "wal":
            raise LedgerError(
                f"The ledger at {self._place} cannot use SQLite's WAL mode (network file system?). "
                "Put state_dir on a local disk, or use PostgreSQL."
            )

    def _journal(self, pragma: str) -> str:
        """The journal mode, asked or set outside any transaction."""
        with self._errors(), contextlib.closing(self._engine.raw_connection()) as raw:
            cursor = raw.cursor()
            cursor.execute(pragma)
            (mode,) = cursor.fetchone() or ("",)
            cursor.close()
        return str(mode)

    @staticmethod
    def _revision(connection: Connection) -> str | None:
        """The schema's revision; None for an empty database."""
        if not inspect(connection).has_table("alembic_version"):
            return None
        found = connection.scalar(_VERSION)
        return None if found is None else str(found)

    def _migrate(self, connection: Connection, revision: str | None) -> None:
        from alembic import command  # heavy, and needed once per installation and upgrade only
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if revision is not None and revision not in known:
            raise LedgerError(
                f"The ledger at {self._place} has schema {revision}, newer than this program knows ({HEAD}). "
                "Install the ds01spawner version that wrote it, or restore a backup from before the upgrade.",
                facts={"schema": revision, "known": HEAD},
            )
        command.upgrade(config, "head")


# --------------------------------------------------------------------- opening


def _checked_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except exc.ArgumentError as error:
        raise LedgerError(
            "ledger_url is not a database URL; write sqlite:////path/ledger.sqlite or postgresql://…"
        ) from error
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        # SQLAlchemy 2.1 changed what a bare `postgresql://` means; we ship psycopg2.
        return parsed.set(drivername="postgresql+psycopg2") if parsed.drivername == "postgresql" else parsed
    if backend != "sqlite":
        raise LedgerError(f"The ledger knows SQLite and PostgreSQL, not {backend}; change ledger_url.")
    if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
        raise LedgerError("The ledger needs a file that several processes share: sqlite:////path/ledger.sqlite")
    return parsed


def _checked_file(url: URL) -> Path:
    """Make the database file (0600) and its folder (0700); refuse a folder in which everybody may write."""
    path = Path(str(url.database)).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = path.parent.stat()
        if folder.st_mode & stat.S_IWOTH:
            raise LedgerError(
                f"Everybody may write in {path.parent}, so anybody could replace the ledger: "
                f"chmod o-w {path.parent}, or choose another state_dir."
            )
        # SQLite gives its -wal and -shm files the mode of this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise LedgerError(
            f"The ledger at {path} cannot be opened: {error.strerror}. It belongs to the user the Hub runs as "
            "(normally root); run this command as that user, or correct state_dir."
        ) from error
    return path


def _open_lock(path: Path) -> int:
    lock = path.with_name(path.name + "-lock")
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise LedgerError(f"The ledger's lock {lock} cannot be opened: {error.strerror}.") from error


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, pool_size=5, max_overflow=64, connect_args={"timeout": WAIT_SECONDS})
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        engine = create_engine(
            url,
            pool_size=5,
            max_overflow=15,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 10, "application_name": "ds01"},
        )
    except ImportError as error:
        raise LedgerError("PostgreSQL needs its driver: pip install 'ds01spawner[postgresql]'.") from error
    event.listen(engine, "connect", _set_up_postgresql)
    return engine


def _set_up_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    # The driver must not begin or commit by itself (it would begin late and DEFERRED): `_begin_sqlite` does.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    how = connection.get_execution_options().get("ds01")
    if how is None:
        connection.exec_driver_sql("BEGIN")
        return
    if connection.info.get("ds01") != how:  # the pool hands connections on as they are
        # FULL: a committed lease survives a power cut.
        connection.exec_driver_sql("PRAGMA synchronous = FULL" if how == _WRITE else "PRAGMA synchronous = NORMAL")
        connection.info["ds01"] = how
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _set_up_postgresql(connection: Any, _record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{WAIT_SECONDS:.0f}s'")
        # What is read after the advisory lock must be newer than it, whatever the server's default is.
        cursor.execute("SET default_transaction_isolation = 'read committed'")
        cursor.execute("SET idle_in_transaction_session_timeout = '120s'")
    connection.commit()


def _diagnosis(cause: BaseException) -> str:
    """What is wrong and what to do, from the driver's words (never the statement)."""
    words = str(cause).lower()
    for needles, sentence in _REMEDIES:
        if any(needle in words for needle in needles):
            return sentence
    kind = type(cause).__name__
    first = str(cause).strip().splitlines()[0][:200] if str(cause).strip() else kind
    return f"could not be used ({kind}: {first}). Nothing was changed; see the Hub's log."


_REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("not a database", "malformed", "corrupt"),
        "is damaged. Nothing was changed. Keep the file for inspection and restore the newest backup.",
    ),
    (
        ("database is locked", "lock timeout", "database table is locked"),
        "stayed locked by another process. Try again; if it stays so, look for an open database shell.",
    ),
    (("disk is full", "no space left"), "cannot be written: the disk is full. Free space, then try again."),
    (("readonly", "read-only"), "is read-only for this user. Run as the user the Hub runs as (normally root)."),
    (("unable to open", "disk i/o"), "cannot be read from its disk. Check the disk, the folder and their permissions."),
    (
        (
            "connection refused",
            "could not connect",
            "could not translate",
            "server closed",
            "terminat",
            "timeout expired",
        ),
        "does not answer. Check that the PostgreSQL server runs and that ledger_url names it.",
    ),
    (
        ("authentication failed", "no password supplied", 'role "', "does not exist"),
        "refused us. Check user, password and database name in ledger_url.",
    ),
    (("queuepool limit",), "is used by too many threads at once. Try again."),
)
