"""The ledger's tables, as SQLAlchemy Core sees them.

The schema itself is made by the migrations; a test compares both. Two partial unique indexes carry design
point 1: one live lease per unit, one live allocation per server. The database refuses what the code gets wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ColumnElement,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    literal_column,
    text,
)
from sqlalchemy.types import Boolean, TypeDecorator, TypeEngine

from ds01spawner.model import plain

HEAD = "0001"
"""Newest migration this code knows (a test compares it with the migrations folder)."""

LIVE_SQL = "state IN ('reserved', 'active', 'held')"
"""What live means, word for word as in the partial indexes: SQLite uses such an index only for the same words."""

STATES_SQL = "state IN ('reserved', 'active', 'held', 'released')"


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime; stored as UTC. A naive one is refused: it would mean a different time elsewhere.

    On SQLite it is ISO text with microseconds and offset: exact, ordered as text, and read at C speed.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"the ledger needs aware datetimes, got {value!r}")
        utc = value.astimezone(timezone.utc)
        return utc.isoformat(timespec="microseconds") if dialect.name == "sqlite" else utc

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], datetime | None]:
        return _from_iso if dialect.name == "sqlite" else _from_aware


def _from_iso(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)


def _from_aware(value: datetime | None) -> datetime | None:
    return None if value is None else value.astimezone(timezone.utc)


class JsonText(TypeDecorator[Any]):
    """Plain data as ASCII JSON in a text column: what any database stores, lone surrogates and NUL included."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(plain(value), separators=(",", ":"), default=str)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


metadata = MetaData()

_Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up by itself only in INTEGER columns


def _table(name: str, *parts: Any, numbered: bool = True) -> Table:
    """A table; numbered ones have an id that is never used twice, not even after a DELETE."""
    key = (Column("id", _Id, primary_key=True, autoincrement=True),) if numbered else ()
    return Table(name, metadata, *key, *parts, sqlite_autoincrement=numbered)


def _need(name: str, kind: Any, *parts: Any) -> Column[Any]:
    return Column(name, kind, *parts, nullable=False)


def _where(condition: str) -> Mapping[str, Any]:
    """Arguments that make an index partial on both databases."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


meta = _table(
    "meta",
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
    _need("instance", Text),
    _need("token", BigInteger),
    _need("created_at", UtcDateTime),
    numbered=False,
)
"""One row: this installation's uuid and the highest token ever given."""

USAGE_HEADS = ("id", "owner", "group_name", "server_name", "state", "reserved_at", "held_until")
USAGE_UNITS = ("allocation_id", "unit_uuid", "share", "state")
"""What quotas are counted from. An index holds exactly these, so that counting reads no long row."""

allocations = _table(
    "allocations",
    _need("token", BigInteger),
    _need("owner", Text),
    Column("group_name", Text),
    _need("groups", JsonText),
    _need("server_name", Text),
    _need("state", Text, CheckConstraint(STATES_SQL)),
    _need("uid", BigInteger),
    _need("image", Text),
    Column("container_id", Text),
    Column("container_name", Text),
    Column("container_token", BigInteger),
    Column("spec_hash", Text),
    _need("created_at", UtcDateTime),
    _need("reserved_at", UtcDateTime),
    Column("activated_at", UtcDateTime),
    Column("first_started_at", UtcDateTime),
    Column("stopped_at", UtcDateTime),
    Column("held_until", UtcDateTime),
    Column("released_at", UtcDateTime),
    _need("reason", Text),
    _need("request", JsonText),
    _need("limits", JsonText),
    Index("uq_allocations_live_server", "owner", "server_name", unique=True, **_where(LIVE_SQL)),
    Index("uq_allocations_live_container", "container_id", unique=True, **_where(LIVE_SQL)),
    Index("uq_allocations_token", "token", unique=True),
    Index("ix_allocations_usage", *USAGE_HEADS, **_where(LIVE_SQL)),
    Index("ix_allocations_container", "container_id"),
)

leases = _table(
    "leases",
    _need("allocation_id", _Id, ForeignKey("allocations.id")),
    _need("unit_uuid", Text),
    _need("share", Float),
    _need("state", Text, CheckConstraint(STATES_SQL)),
    _need("label", Text),
    Column("mig_profile", Text),
    _need("wanted", Boolean),
    _need("since", UtcDateTime),
    Column("released_at", UtcDateTime),
    Index("uq_leases_live_unit", "unit_uuid", unique=True, **_where(LIVE_SQL)),
    Index("ix_leases_usage", *USAGE_UNITS, **_where(LIVE_SQL)),
    Index("ix_leases_allocation", "allocation_id"),
)
"""`wanted` is false for a unit that the newest admission no longer names: it stays live until `activate`."""

tokens = _table(
    "tokens",
    Column("token", BigInteger, primary_key=True, autoincrement=False),
    _need("allocation_id", _Id, ForeignKey("allocations.id")),
    _need("given_at", UtcDateTime),
    numbered=False,
)
"""Every token ever given: the primary key refuses a second use, and an old container finds its allocation."""

operations = _table(
    "operations",
    Column("allocation_id", _Id, ForeignKey("allocations.id"), primary_key=True, autoincrement=False),
    _need("nonce", Text),
    _need("what", Text),
    _need("who", Text),
    _need("process", Text),
    _need("boot_id", Text),
    _need("since", UtcDateTime),
    _need("beat_at", UtcDateTime),
    _need("beat_elapsed", Float),
    numbered=False,
)

requests = _table(
    "requests",
    _need("at", UtcDateTime),
    _need("door", Text),
    _need("owner", Text),
    _need("server_name", Text),
    Column("group_name", Text),
    _need("groups", JsonText),
    _need("request", JsonText),
    Column("usage", JsonText),
    _need("policy_hash", Text),
    _need("inventory_hash", Text),
    _need("outcome", Text),
    _need("code", Text),
    _need("message", Text),
    Column("allocation_id", _Id, ForeignKey("allocations.id")),
    Index("ix_requests_server", "owner", "server_name", "id"),
    Index("ix_requests_at", "at"),
)

audit = _table(
    "audit",
    _need("at", UtcDateTime),
    _need("actor", Text),
    _need("action", Text),
    _need("subject", Text),
    _need("reason", Text),
    Column("before", JsonText),
    Column("after", JsonText),
    Column("allocation_id", _Id),
    Index("ix_audit_subject", "subject", "id"),
    Index("ix_audit_allocation", "allocation_id", "id"),
    Index("ix_audit_at", "at"),
)
"""Append only: triggers refuse UPDATE and DELETE (and TRUNCATE on PostgreSQL)."""

snapshots = _table(
    "snapshots",
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
    _need("at", UtcDateTime),
    _need("format", Text),
    _need("body", Text),
    numbered=False,
)
"""One row: the watcher's newest snapshot."""

policy_versions = _table(
    "policy_versions",
    Column("hash", Text, primary_key=True),
    _need("text", Text),
    _need("first_seen", UtcDateTime),
    _need("in_force_since", UtcDateTime),
    _need("ordinal", BigInteger),
    Index("uq_policy_versions_ordinal", "ordinal", unique=True),
    numbered=False,
)
"""Every policy text that was ever in force; the highest ordinal is the last one."""

uids = _table(
    "uids",
    Column("owner", Text, primary_key=True),
    _need("uid", BigInteger),
    _need("given_at", UtcDateTime),
    Index("uq_uids_uid", "uid", unique=True),
    numbered=False,
)
"""Rows are never deleted: files of a user who left must not become a stranger's."""

images = _table(
    "images",
    _need("owner", Text),
    _need("ref", Text),
    _need("image_id", Text),
    _need("base_image", Text),
    _need("server_name", Text),
    _need("size", BigInteger),
    _need("layers", Integer),
    _need("kind", Text, CheckConstraint("kind IN ('committed', 'private')")),
    _need("created_at", UtcDateTime),
    _need("last_used_at", UtcDateTime),
    Column("removed_at", UtcDateTime),
    Index("uq_images_ref", "ref", unique=True, **_where("removed_at IS NULL")),
    Index("ix_images_owner", "owner"),
    Index("ix_images_image_id", "image_id"),
)


def live(table: Table) -> ColumnElement[bool]:
    """The condition that a row of `allocations` or `leases` is live, in the words of the partial indexes."""
    return literal_column(f"{table.name}.{LIVE_SQL}", Boolean)
