"""Reading allocations and leases: rows to the values of `model`, and the usage that quotas are counted from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, bindparam, select

from ds01spawner.model import Allocation, Holding, Lease, State, Usage

from .part import Part
from .tables import USAGE_HEADS, USAGE_UNITS, allocations, leases, live, meta, tokens

_BATCH = 500  # ids per query; SQLite takes at most 999 parameters in old versions


class Holdings(Part):
    """Who holds what, read only."""

    def usage(self, *, exclude: tuple[str, str] | None = None) -> Usage:
        """Everything held now.

        Args:
            exclude: (user, server name) whose own holding is given as `own` instead.

        Raises:
            LedgerError: the ledger does not answer.
        """
        with self._db.read() as connection:
            return usage_of(connection, exclude)

    def allocations(self, *, live: bool = True) -> tuple[Allocation, ...]:
        """All live allocations (with `live=False` every one there ever was), oldest first."""
        query = select(allocations).order_by(allocations.c.id)
        with self._db.read() as connection:
            return _load(connection, query.where(_live_allocation) if live else query)

    def find(self, user: str, server_name: str) -> Allocation | None:
        """The live allocation of one server ("" = the default server), or None."""
        with self._db.read() as connection:
            return live_allocation(connection, user, server_name)

    def get(self, allocation_id: int) -> Allocation | None:
        """The allocation of that id, live or released; leases are the live ones. None if there never was one."""
        with self._db.read() as connection:
            return by_id(connection, allocation_id)

    def by_container(self, container_id: str) -> Allocation | None:
        """The live allocation bound to a Docker container id, else the newest released one that was, else None."""
        query = select(allocations).where(allocations.c.container_id == container_id)
        query = query.order_by(_live_allocation.desc(), allocations.c.id.desc()).limit(1)
        with self._db.read() as connection:
            return next(iter(_load(connection, query)), None)

    def by_token(self, token: int) -> Allocation | None:
        """The allocation to which `token` was ever given; its `token` may be newer meanwhile.

        None means that this ledger never gave it: another installation, or a ledger restored from a backup.
        """
        owner = select(tokens.c.allocation_id).where(tokens.c.token == token).scalar_subquery()
        with self._db.read() as connection:
            return one(connection, allocations.c.id == owner)

    def origin(self, token: int) -> tuple[Allocation, datetime] | None:
        """The allocation to which `token` was ever given, and when it was given; None as for `by_token`."""
        given = select(tokens.c.allocation_id, tokens.c.given_at).where(tokens.c.token == token)
        with self._db.read() as connection:
            row = connection.execute(given).first()
            found = by_id(connection, row[0]) if row is not None else None
        return None if row is None or found is None else (found, row[1])

    def last_token(self) -> int:
        """The highest token that was ever given; 0 before the first."""
        with self._db.read() as connection:
            return int(connection.scalar(select(meta.c.token)) or 0)


_live_allocation = live(allocations)
_STATE = {state.value: state for state in State}

# Statements of every start, made once. Ordered in Python: the database would walk through all of history for it.
_LIVE_UNITS = select(*(leases.c[name] for name in USAGE_UNITS[:3])).where(live(leases))
_LIVE_HEADS = select(*(allocations.c[name] for name in USAGE_HEADS)).where(_live_allocation)
_BY_ID = select(allocations).where(allocations.c.id == bindparam("wanted_id"))
_BY_SERVER = select(allocations.c.id).where(
    allocations.c.owner == bindparam("wanted_owner"),
    allocations.c.server_name == bindparam("wanted_server"),
    _live_allocation,
)
_LEASES_BY_ID = (
    select(leases).where(leases.c.allocation_id == bindparam("wanted_id"), live(leases)).order_by(leases.c.id)
)


def usage_of(connection: Connection, own: tuple[str, str] | None) -> Usage:
    """Usage inside the caller's transaction; `own` (user, server name) is set apart."""
    units: dict[int, dict[str, float]] = {}
    for number, uuid, share in connection.execute(_LIVE_UNITS).all():
        units.setdefault(number, {})[uuid] = share
    mine: Holding | None = None
    others: list[Holding] = []
    heads = sorted(connection.execute(_LIVE_HEADS).all(), key=itemgetter(0))
    for number, owner, group, server, state, since, until in heads:
        holding = Holding(owner, group, server, _STATE[state], units.get(number, {}), since, until)
        if own == (owner, server):
            mine = holding
        else:
            others.append(holding)
    return Usage(tuple(others), mine)


def live_allocation(connection: Connection, user: str, server_name: str) -> Allocation | None:
    """The live allocation of one server inside the caller's transaction."""
    number = connection.scalar(_BY_SERVER, {"wanted_owner": user, "wanted_server": server_name})
    return None if number is None else by_id(connection, number)


def by_id(connection: Connection, allocation_id: int) -> Allocation | None:
    """The allocation of that id, live or released, inside the caller's transaction."""
    wanted = {"wanted_id": allocation_id}
    row = connection.execute(_BY_ID, wanted).mappings().first()
    if row is None:
        return None
    return _allocation(row, map(_lease, connection.execute(_LEASES_BY_ID, wanted).mappings()))


def one(connection: Connection, condition: ColumnElement[bool]) -> Allocation | None:
    """The one allocation that meets `condition`, with its live leases."""
    return next(iter(_load(connection, select(allocations).where(condition))), None)


def _load(connection: Connection, query: Select[Any]) -> tuple[Allocation, ...]:
    rows = connection.execute(query).mappings().all()
    held = _leases_of(connection, [row["id"] for row in rows if row["state"] != State.RELEASED.value])
    return tuple(_allocation(row, held.get(row["id"], ())) for row in rows)


def _leases_of(connection: Connection, ids: Sequence[int]) -> dict[int, tuple[Lease, ...]]:
    found: dict[int, tuple[Lease, ...]] = {}
    for start in range(0, len(ids), _BATCH):
        query = select(leases).where(leases.c.allocation_id.in_(ids[start : start + _BATCH]), live(leases))
        for row in connection.execute(query.order_by(leases.c.id)).mappings():
            number = row["allocation_id"]
            found[number] = (*found.get(number, ()), _lease(row))
    return found


def _lease(row: RowMapping) -> Lease:
    return Lease(
        unit_uuid=row["unit_uuid"],
        share=row["share"],
        state=State(row["state"]),
        label=row["label"],
        mig_profile=row["mig_profile"],
        wanted=row["wanted"],
    )


def _allocation(row: RowMapping, held: Iterable[Lease]) -> Allocation:
    return Allocation(
        id=row["id"],
        token=row["token"],
        user=row["owner"],
        group=row["group_name"],
        groups=tuple(row["groups"]),
        server_name=row["server_name"],
        state=State(row["state"]),
        uid=row["uid"],
        request=row["request"],
        limits=row["limits"],
        leases=tuple(held),
        image=row["image"],
        container_id=row["container_id"],
        container_name=row["container_name"],
        container_token=row["container_token"],
        spec_hash=row["spec_hash"],
        created_at=row["created_at"],
        reserved_at=row["reserved_at"],
        activated_at=row["activated_at"],
        first_started_at=row["first_started_at"],
        stopped_at=row["stopped_at"],
        held_until=row["held_until"],
        released_at=row["released_at"],
        reason=row["reason"],
    )
