"""The first schema: allocations, leases, tokens, operations, requests, audit, snapshot, policies, uids, images."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_TIME = sa.DateTime(timezone=True).with_variant(sa.Text, "sqlite")
_LIVE = sa.text("state IN ('reserved', 'active', 'held')")
_STATES = "state IN ('reserved', 'active', 'held', 'released')"


def _number() -> sa.Column[int]:
    return sa.Column("id", _ID, primary_key=True, autoincrement=True)


def _text(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=False) for name in names]


def _index(
    name: str, table: str, columns: list[str], *, unique: bool = False, where: sa.TextClause | None = None
) -> None:
    op.create_index(name, table, columns, unique=unique, sqlite_where=where, postgresql_where=where)


def upgrade() -> None:
    """Make everything from nothing."""
    _meta()
    _allocations()
    _leases()
    _operations()
    _requests()
    _audit()
    _snapshots_and_policies()
    _owners()


def downgrade() -> None:
    """There is no way back to nothing: restore a backup instead."""
    raise RuntimeError("the first schema cannot be undone; restore a backup of the ledger instead")


def _meta() -> None:
    op.create_table(
        "meta",
        sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
        *_text("instance"),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
    )


def _allocations() -> None:
    op.create_table(
        "allocations",
        _number(),
        sa.Column("token", sa.BigInteger, nullable=False),
        *_text("owner"),
        sa.Column("group_name", sa.Text),
        *_text("groups", "server_name"),
        sa.Column("state", sa.Text, sa.CheckConstraint(_STATES), nullable=False),
        sa.Column("uid", sa.BigInteger, nullable=False),
        *_text("image"),
        sa.Column("container_id", sa.Text),
        sa.Column("container_name", sa.Text),
        sa.Column("container_token", sa.BigInteger),
        sa.Column("spec_hash", sa.Text),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("reserved_at", _TIME, nullable=False),
        sa.Column("activated_at", _TIME),
        sa.Column("first_started_at", _TIME),
        sa.Column("stopped_at", _TIME),
        sa.Column("held_until", _TIME),
        sa.Column("released_at", _TIME),
        *_text("reason", "request", "limits"),
        sqlite_autoincrement=True,
    )
    _index("uq_allocations_live_server", "allocations", ["owner", "server_name"], unique=True, where=_LIVE)
    _index("uq_allocations_live_container", "allocations", ["container_id"], unique=True, where=_LIVE)
    _index("uq_allocations_token", "allocations", ["token"], unique=True)
    heads = ["id", "owner", "group_name", "server_name", "state", "reserved_at", "held_until"]
    _index("ix_allocations_usage", "allocations", heads, where=_LIVE)
    _index("ix_allocations_container", "allocations", ["container_id"])
    op.create_table(
        "tokens",
        sa.Column("token", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("allocation_id", _ID, sa.ForeignKey("allocations.id"), nullable=False),
        sa.Column("given_at", _TIME, nullable=False),
    )


def _leases() -> None:
    op.create_table(
        "leases",
        _number(),
        sa.Column("allocation_id", _ID, sa.ForeignKey("allocations.id"), nullable=False),
        *_text("unit_uuid"),
        sa.Column("share", sa.Float, nullable=False),
        sa.Column("state", sa.Text, sa.CheckConstraint(_STATES), nullable=False),
        *_text("label"),
        sa.Column("mig_profile", sa.Text),
        sa.Column("wanted", sa.Boolean, nullable=False),
        sa.Column("since", _TIME, nullable=False),
        sa.Column("released_at", _TIME),
        sqlite_autoincrement=True,
    )
    _index("uq_leases_live_unit", "leases", ["unit_uuid"], unique=True, where=_LIVE)
    _index("ix_leases_usage", "leases", ["allocation_id", "unit_uuid", "share", "state"], where=_LIVE)
    _index("ix_leases_allocation", "leases", ["allocation_id"])


def _operations() -> None:
    op.create_table(
        "operations",
        sa.Column("allocation_id", _ID, sa.ForeignKey("allocations.id"), primary_key=True, autoincrement=False),
        *_text("nonce", "what", "who", "process", "boot_id"),
        sa.Column("since", _TIME, nullable=False),
        sa.Column("beat_at", _TIME, nullable=False),
        sa.Column("beat_elapsed", sa.Float, nullable=False),
    )


def _requests() -> None:
    op.create_table(
        "requests",
        _number(),
        sa.Column("at", _TIME, nullable=False),
        *_text("door", "owner", "server_name"),
        sa.Column("group_name", sa.Text),
        *_text("groups", "request"),
        sa.Column("usage", sa.Text),
        *_text("policy_hash", "inventory_hash", "outcome", "code", "message"),
        sa.Column("allocation_id", _ID, sa.ForeignKey("allocations.id")),
        sqlite_autoincrement=True,
    )
    _index("ix_requests_server", "requests", ["owner", "server_name", "id"])
    _index("ix_requests_at", "requests", ["at"])


def _audit() -> None:
    op.create_table(
        "audit",
        _number(),
        sa.Column("at", _TIME, nullable=False),
        *_text("actor", "action", "subject", "reason"),
        sa.Column("before", sa.Text),
        sa.Column("after", sa.Text),
        sa.Column("allocation_id", _ID),
        sqlite_autoincrement=True,
    )
    _index("ix_audit_subject", "audit", ["subject", "id"])
    _index("ix_audit_allocation", "audit", ["allocation_id", "id"])
    _index("ix_audit_at", "audit", ["at"])
    if op.get_bind().dialect.name == "sqlite":
        _append_only_sqlite()
    else:
        _append_only_postgresql()


def _append_only_sqlite() -> None:
    for verb in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_no_{verb.lower()} BEFORE {verb} ON audit "
            "BEGIN SELECT RAISE(ABORT, 'audit is append only'); END"
        )


def _append_only_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'audit is append only'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()"
    )


def _snapshots_and_policies() -> None:
    op.create_table(
        "snapshots",
        sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
        sa.Column("at", _TIME, nullable=False),
        *_text("format", "body"),
    )
    op.create_table(
        "policy_versions",
        sa.Column("hash", sa.Text, primary_key=True),
        *_text("text"),
        sa.Column("first_seen", _TIME, nullable=False),
        sa.Column("in_force_since", _TIME, nullable=False),
        sa.Column("ordinal", sa.BigInteger, nullable=False),
    )
    _index("uq_policy_versions_ordinal", "policy_versions", ["ordinal"], unique=True)


def _owners() -> None:
    op.create_table(
        "uids",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("uid", sa.BigInteger, nullable=False),
        sa.Column("given_at", _TIME, nullable=False),
    )
    _index("uq_uids_uid", "uids", ["uid"], unique=True)
    op.create_table(
        "images",
        _number(),
        *_text("owner", "ref", "image_id", "base_image", "server_name"),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("layers", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, sa.CheckConstraint("kind IN ('committed', 'private')"), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("last_used_at", _TIME, nullable=False),
        sa.Column("removed_at", _TIME),
        sqlite_autoincrement=True,
    )
    _index("uq_images_ref", "images", ["ref"], unique=True, where=sa.text("removed_at IS NULL"))
    _index("ix_images_owner", "images", ["owner"])
    _index("ix_images_image_id", "images", ["image_id"])
