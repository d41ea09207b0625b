"""Changing allocations: reserve, then one method per step of their life. Illegal steps are refused.

State by step (design, Words):

    reserve            (none), reserved, active, held → reserved
    renew_token, bind  reserved, active, held         → unchanged
    activate           reserved                       → active
    hold               active, held                   → held
    drop_leases        active, held                   → held, without units
    rollback           reserved                       → held or released
    release            any                            → released

There is no step from held to active past `reserve`: that is the only door at which quotas are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, exc, insert, select, update

from ds01spawner.errors import LedgerError, UnitTaken
from ds01spawner.model import LIVE, Admission, Allocation, State, Unit, Usage

from .holdings import by_id, live_allocation, one, usage_of
from .operations import Operations
from .part import SYSTEM
from .records import Claim, checked_name, people_name, subject_of, tidy
from .tables import allocations, leases, live, meta, tokens

RESTART_GRACE = timedelta(minutes=10)
"""A stop of up to this long does not restart the runtime clock: restarting must not outrun max_runtime."""

_ANY_LIVE = frozenset(LIVE)

# Statements of every start, made once (SQLAlchemy spends longer on building them than SQLite on running them).
_INSERT, _GIVE, _LEASE = insert(allocations), insert(tokens), insert(leases)
_UPDATE = update(allocations).where(allocations.c.id == bindparam("wanted_id"))
_MOVE = update(leases).where(leases.c.allocation_id == bindparam("wanted_id"), live(leases))
_TOKEN = select(meta.c.token)
_NEXT_TOKEN = update(meta).values(token=meta.c.token + 1)


class Allocations(Operations):
    """The life of allocations. Every method is one transaction with its audit row, and returns the new state."""

    def reserve(self, claim: Claim, decide: Callable[[Usage], Admission]) -> Allocation:
        """Count, decide and write in one transaction that no other door can slip into.

        A live allocation of the same server is used again with its token; units that it no longer needs stay
        live until `activate`, because its old container still names them.

        Args:
            claim: who asks for which server.
            decide: pure; gets what everybody holds now, returns what to grant. Whatever it raises undoes all.

        Raises:
            Whatever `decide` raises (Refusal): nothing changed.
            UnitTaken: `decide` chose a unit that another server holds.
            Busy: another process is at work on this very server.
            LedgerError: the ledger does not answer, or the name cannot be stored.
        """
        checked_name("user name", claim.user)
        checked_name("server name", claim.server_name, empty=True)
        with self._db.write() as connection:
            usage = usage_of(connection, (claim.user, claim.server_name))
            before = live_allocation(connection, claim.user, claim.server_name) if usage.own else None
            if before is not None:
                self._refuse_if_busy(connection, before.id, allow_own_process=True)
            admission = decide(usage)
            units = _distinct(admission.units)
            _refuse_taken(units, usage)
            if before is None:
                number = self._insert(connection, claim, admission)
            else:
                number = self._reuse(connection, before, claim, admission)
            self._lease(connection, number, units, before)
            after = _must(connection, number)
            door = f"start by {admission.request.door}"
            self._note_change(connection, claim.user, "allocation.reserve", door, before, after)
            return after

    def renew_token(self, allocation_id: int, *, actor: str = SYSTEM) -> int:
        """Give a live allocation a new token, before a NEW container is created for it; returns the token."""
        with self._db.write() as connection:
            before = _in_state(connection, allocation_id, "renew_token", _ANY_LIVE)
            token = self._new_token(connection, allocation_id)
            self._change(connection, before, "allocation.renew_token", "a new container", actor, {"token": token})
            return token

    def bind(
        self,
        allocation_id: int,
        *,
        container_id: str,
        container_name: str,
        image: str,
        spec_hash: str,
        actor: str = SYSTEM,
    ) -> Allocation:
        """Write down which container belongs to a live allocation: after its creation, before its start.

        Raises:
            LedgerError: not live, or another live allocation has that container.
        """
        values: dict[str, Any] = {
            "container_id": checked_name("container id", container_id),
            "container_name": checked_name("container name", container_name, longest=1000),
            "image": checked_name("image", image, empty=True, longest=1000),
            "spec_hash": spec_hash,
        }
        with self._db.write() as connection:
            before = _in_state(connection, allocation_id, "bind", _ANY_LIVE)
            other = one(connection, and_(allocations.c.container_id == container_id, live(allocations)))
            if other is not None and other.id != allocation_id:
                raise LedgerError(f"Container {container_name} already belongs to allocation {other.id}.")
            values |= {"container_token": before.token}
            return self._change(connection, before, "allocation.bind", "container created", actor, values)

    def activate(self, allocation_id: int, *, actor: str = SYSTEM) -> Allocation:
        """Reserved → active: the container runs and its devices were verified.

        Units that the last admission did not name are released here. The runtime clock goes on after a stop of
        up to ten minutes and starts anew after a longer one.

        Raises:
            LedgerError: not reserved, or no container was bound for the current token.
        """
        with self._db.write() as connection:
            before = _in_state(connection, allocation_id, "activate", {State.RESERVED})
            if before.container_id is None or before.container_token != before.token:
                raise LedgerError(f"Allocation {allocation_id} has no container bound for token {before.token}.")
            now = self._now()
            self._release_leases(connection, allocation_id, leases.c.wanted.is_(False))
            self._move_leases(connection, allocation_id, State.ACTIVE)
            values = {
                "state": State.ACTIVE.value,
                "activated_at": now,
                "first_started_at": _runtime_start(before, now),
                "stopped_at": None,
                "held_until": None,
                "reason": "",
            }
            return self._change(connection, before, "allocation.activate", "running", actor, values)

    def hold(self, allocation_id: int, *, until: datetime | None, reason: str, actor: str = SYSTEM) -> Allocation:
        """The container stopped: keep its units until `until` (None = no end known), so it can start again.

        Called again while held it only changes the end. A failed start is no stop: holding what it reserved as
        well would let a user collect units by failing. It goes by `rollback` or `release`.

        Raises:
            LedgerError: neither active nor held.
        """
        with self._db.write() as connection:
            before = _in_state(connection, allocation_id, "hold", {State.ACTIVE, State.HELD})
            self._move_leases(connection, allocation_id, State.HELD)
            values = _stopped(before, self._now()) | {"held_until": until, "reason": tidy(reason)}
            return self._change(connection, before, "allocation.hold", reason, actor, values)

    def drop_leases(self, allocation_id: int, reason: str, *, actor: str = SYSTEM) -> Allocation:
        """Release all units of a stopped server; it stays held with its container, token and image, but no unit.

        Only after its container was replaced by one that names no device (design, point 1).

        Raises:
            LedgerError: neither active nor held; a reserved one is about to start and keeps its units.
        """
        with self._db.write() as connection:
            before = _in_state(connection, allocation_id, "drop_leases", {State.ACTIVE, State.HELD})
            self._release_leases(connection, allocation_id)
            values = _stopped(before, self._now()) | {"held_until": None, "reason": tidy(reason)}
            return self._change(connection, before, "allocation.drop_leases", reason, actor, values)

    def rollback(self, allocation_id: int, reason: str, *, actor: str = SYSTEM) -> Allocation:
        """Undo the last `reserve` after a failed start, once the container it made is gone.

        An allocation that never ran is released. Another one is held as before: units that only the failed
        start wanted are released, the others are wanted again, and the old container's token is current. If the
        old container is gone as well there is nothing to go back to: `release` instead.

        Raises:
            LedgerError: not reserved.
        """
        with self._db.write() as connection:
            before = _in_state(connection, allocation_id, "rollback", {State.RESERVED})
            if before.activated_at is None:
                return self._release(connection, before, "allocation.rollback", reason, actor)
            self._release_leases(connection, allocation_id, leases.c.state == State.RESERVED.value)
            self._move_leases(connection, allocation_id, State.HELD)
            values = _stopped(before, self._now()) | {"reason": tidy(reason)}
            return self._change(connection, before, "allocation.rollback", reason, actor, values)

    def release(self, allocation_id: int, reason: str, *, actor: str = SYSTEM) -> Allocation:
        """End an allocation and all its leases, once its container is gone. Doing it twice changes nothing."""
        with self._db.write() as connection:
            before = _must(connection, allocation_id)
            if before.state is State.RELEASED:
                return before
            return self._release(connection, before, "allocation.release", reason, actor)

    def raise_token_counter(self, seen: int, reason: str, *, actor: str = SYSTEM) -> None:
        """Make sure that no token up to `seen` is given again: after a backup of this ledger was restored,
        containers with newer tokens may exist."""
        with self._db.write() as connection:
            last = int(connection.scalar(select(meta.c.token)) or 0)
            if seen > last:
                connection.execute(update(meta).values(token=seen))
                self._note(connection, actor, "ledger.raise_token", "ledger", reason, {"token": last}, {"token": seen})

    # ----------------------------------------------------------------- inside one transaction

    def _new_token(self, connection: Connection, allocation_id: int | None) -> int:
        connection.execute(_NEXT_TOKEN)
        token = int(connection.scalar(_TOKEN) or 0)
        if allocation_id is not None:
            self._give_token(connection, token, allocation_id)
        return token

    def _give_token(self, connection: Connection, token: int, allocation_id: int) -> None:
        connection.execute(_GIVE, {"token": token, "allocation_id": allocation_id, "given_at": self._now()})

    def _insert(self, connection: Connection, claim: Claim, admission: Admission) -> int:
        token = self._new_token(connection, None)
        now = self._now()
        values = _asked(claim, admission, now) | {
            "token": token,
            "owner": claim.user,
            "server_name": claim.server_name,
            "image": admission.image,
            "created_at": now,
        }
        key = connection.execute(_INSERT, values).inserted_primary_key
        if key is None:
            raise LedgerError("The ledger's database did not give a new row its number.")
        self._give_token(connection, token, int(key[0]))
        return int(key[0])

    def _reuse(self, connection: Connection, before: Allocation, claim: Claim, admission: Admission) -> int:
        # A start that died between renew_token and bind left a token that no container carries.
        values = _asked(claim, admission, self._now()) | {"token": _settled_token(before)}
        connection.execute(_UPDATE, {"wanted_id": before.id, **values})
        return before.id

    def _lease(
        self, connection: Connection, allocation_id: int, units: Mapping[str, Unit], before: Allocation | None
    ) -> None:
        """Make the wanted leases exactly `units`; keep the others, unwanted, for the old container."""
        kept = {lease.unit_uuid: lease.wanted for lease in before.leases} if before else {}
        mine = and_(leases.c.allocation_id == allocation_id, live(leases))
        for uuid, wanted in kept.items():
            if wanted != (uuid in units):
                changed = update(leases).where(mine, leases.c.unit_uuid == uuid).values(wanted=uuid in units)
                connection.execute(changed)
        now = self._now()
        rows = [
            {
                "allocation_id": allocation_id,
                "unit_uuid": checked_name("unit", unit.uuid),
                "share": unit.share,
                "state": State.RESERVED.value,
                "label": unit.label,
                "mig_profile": unit.mig_profile,
                "wanted": True,
                "since": now,
            }
            for unit in units.values()
            if unit.uuid not in kept
        ]
        if not rows:
            return
        try:
            connection.execute(_LEASE, rows)
        except exc.IntegrityError as error:
            raise UnitTaken(
                "One of the chosen GPU units was given to another server. Please try again.",
                facts={"units": [row["unit_uuid"] for row in rows]},
            ) from error

    def _move_leases(self, connection: Connection, allocation_id: int, state: State) -> None:
        connection.execute(_MOVE, {"wanted_id": allocation_id, "state": state.value, "wanted": True})

    def _release_leases(self, connection: Connection, allocation_id: int, *only: ColumnElement[bool]) -> None:
        values = {"wanted_id": allocation_id, "state": State.RELEASED.value, "released_at": self._now()}
        connection.execute(_MOVE.where(*only) if only else _MOVE, values)

    def _release(self, connection: Connection, before: Allocation, action: str, reason: str, actor: str) -> Allocation:
        now = self._now()
        self._release_leases(connection, before.id)
        values: dict[str, Any] = {"state": State.RELEASED.value, "released_at": now, "reason": tidy(reason)}
        if before.state is State.ACTIVE:
            values["stopped_at"] = now
        return self._change(connection, before, action, reason, actor, values)

    def _change(
        self,
        connection: Connection,
        before: Allocation,
        action: str,
        reason: str,
        actor: str,
        values: Mapping[str, Any],
    ) -> Allocation:
        connection.execute(_UPDATE, {"wanted_id": before.id, **values})
        after = _must(connection, before.id)
        self._note_change(connection, actor, action, reason, before, after)
        return after

    def _note_change(
        self,
        connection: Connection,
        actor: str,
        action: str,
        reason: str,
        before: Allocation | None,
        after: Allocation,
    ) -> None:
        old = _facts(before) if before else {}
        new = _facts(after)
        changed = {key for key, value in new.items() if old.get(key) != value} | {"state"}
        self._note(
            connection,
            actor,
            action,
            subject_of(after.user, after.server_name),
            reason,
            {key: old[key] for key in old if key in changed} if before else None,
            {key: new[key] for key in new if key in changed},
            allocation_id=after.id,
        )


# --------------------------------------------------------------------- rules on values


def _must(connection: Connection, allocation_id: int) -> Allocation:
    found = by_id(connection, allocation_id)
    if found is None:
        raise LedgerError(f"There is no allocation {allocation_id}.")
    return found


def _in_state(connection: Connection, allocation_id: int, step: str, states: Collection[State]) -> Allocation:
    found = _must(connection, allocation_id)
    if found.state not in states:
        wanted = " or ".join(state.value for state in LIVE if state in states)
        raise LedgerError(
            f"{step} needs an allocation that is {wanted}; {subject_of(found.user, people_name(found.server_name))} "
            f"(allocation {found.id}) is {found.state.value}. Read it again before you go on.",
            facts={"allocation": found.id, "state": found.state.value},
        )
    return found


def _distinct(units: Collection[Unit]) -> dict[str, Unit]:
    found = {unit.uuid: unit for unit in units}
    if len(found) != len(units):
        raise LedgerError("The same GPU unit was chosen twice for one server; nothing was reserved.")
    return found


def _refuse_taken(units: Collection[str], usage: Usage) -> None:
    taken = sorted(usage.taken().intersection(units))
    if taken:
        raise UnitTaken(
            f"The chosen GPU {'units' if len(taken) > 1 else 'unit'} {', '.join(taken)} already belong to another "
            "server. Please try again.",
            facts={"units": taken},
        )


def _asked(claim: Claim, admission: Admission, now: datetime) -> dict[str, Any]:
    """What every reserve writes, on a new allocation and on a used one."""
    return {
        "group_name": claim.group,
        "groups": claim.groups,
        "state": State.RESERVED.value,
        "uid": claim.uid,
        "request": admission.request,
        "limits": admission.limits,
        "reserved_at": now,
        "reason": "",
    }


def _settled_token(allocation: Allocation) -> int:
    """The token that the existing container carries; the allocation's own where there is no container."""
    return allocation.token if allocation.container_token is None else allocation.container_token


def _stopped(before: Allocation, now: datetime) -> dict[str, Any]:
    """Values of an allocation that is not running: the first stop counts, failed starts after it do not."""
    running = before.state is State.ACTIVE or before.stopped_at is None
    return {
        "state": State.HELD.value,
        "token": _settled_token(before) if before.state is State.RESERVED else before.token,
        "stopped_at": now if running else before.stopped_at,
    }


def _runtime_start(before: Allocation, now: datetime) -> datetime:
    if before.first_started_at is None:
        return now
    paused = before.stopped_at is not None and now - before.stopped_at > RESTART_GRACE
    return now if paused else before.first_started_at


def _facts(allocation: Allocation) -> dict[str, Any]:
    """What audit rows tell of an allocation."""
    return {
        "state": allocation.state.value,
        "token": allocation.token,
        "units": [lease.unit_uuid for lease in allocation.leases],
        "wanted": [lease.unit_uuid for lease in allocation.leases if lease.wanted],
        "container": allocation.container_id,
        "container_name": allocation.container_name,
        "image": allocation.image,
        "spec_hash": allocation.spec_hash,
        "group": allocation.group,
        "uid": allocation.uid,
        "held_until": allocation.held_until,
        "stopped_at": allocation.stopped_at,
    }
