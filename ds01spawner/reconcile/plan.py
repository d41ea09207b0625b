"""What is not as it should be, and what to do about it: values in, findings out. Pure.

By evidence only (design, points 1, 4, 5 and 11). What another hand is at is left alone. A container is stopped only if
its token is older than the current one, or if it was started although its server is held and we were looking. A token
that this ledger never gave may be from after a backup that was restored: such a container is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from ds01spawner.containers import aime
from ds01spawner.containers.facts import ContainerFacts
from ds01spawner.containers.spec import named_units
from ds01spawner.ledger.records import OperationRow, people_name
from ds01spawner.model import Allocation, State

from .evidence import Evidence, Origin
from .findings import Action, Finding, Severity, What

RESERVED_GRACE = timedelta(minutes=2)
"""A start holds its operation row; only a reserved row that nobody has worked on for this long is a leftover."""
ENDED_GRACE = timedelta(minutes=2)
"""The Hub settles an ended server within its poll interval; after this long it is not there to do it."""
CREATED_GRACE = timedelta(minutes=2)
"""How long a container may be there before its first start."""
SKEW = timedelta(seconds=5)
"""Most by which times of Docker and the ledger on one machine are taken to differ."""
NO_PICTURE = "there is no fresh picture of the GPUs, and without it nothing is freed or stopped"
_ALWAYS = (Action.NOTHING, Action.RAISE_COUNTER)
"""What needs no fresh picture: it neither frees nor stops anything."""


@dataclass(frozen=True)
class _View:
    """The evidence, looked up in the ways that the rules need."""

    evidence: Evidence
    by_id: Mapping[str, ContainerFacts]
    live: Mapping[int, Allocation]
    busy: frozenset[int]
    dead: Mapping[int, OperationRow]
    holder: Mapping[str, Allocation]
    strays: tuple[ContainerFacts, ...]

    @classmethod
    def of(cls, evidence: Evidence) -> _View:
        bound = {a.container_id for a in evidence.allocations}
        ours = (c for c in evidence.facts if aime.is_ours(c.labels, evidence.instance))
        return cls(
            evidence=evidence,
            by_id={c.id: c for c in evidence.facts},
            live={a.id: a for a in evidence.allocations},
            busy=frozenset(o.allocation_id for o in evidence.operations if not o.stale),
            dead={o.allocation_id: o for o in evidence.operations if o.stale},
            holder={lease.unit_uuid: a for a in evidence.allocations for lease in a.leases},
            strays=tuple(c for c in ours if c.id not in bound and c.state != "removing"),
        )

    @property
    def now(self) -> datetime:
        return self.evidence.now

    def ours(self, container: ContainerFacts) -> bool:
        """True if the labels say that this installation made it."""
        return aime.is_ours(container.labels, self.evidence.instance)

    def token(self, container: ContainerFacts) -> int | None:
        """The token that the labels tell."""
        return aime.token_of(container.labels, self.evidence.instance)

    def origin(self, container: ContainerFacts) -> Origin | None:
        """Where its token comes from, if that can be: the same server, and made after the token was given.

        A ledger that was restored gives numbers anew that older containers carry already.
        """
        token = self.token(container)
        origin = self.evidence.origins.get(token) if token is not None else None
        if origin is None or container.created is None or container.created < origin.given_at - SKEW:
            return None
        owner = origin.allocation
        told = (container.labels.get(aime.LABEL_USER), container.labels.get(aime.LABEL_NAME))
        return origin if told == (aime.clean(owner.user), aime.short_name(owner.server_name)) else None


def plan(evidence: Evidence) -> tuple[Finding, ...]:
    """Everything that is wrong, allocations first; what may not be done now says why in `waits`."""
    view = _View.of(evidence)
    found = [f for a in evidence.allocations if a.id not in view.busy for f in _of_allocation(a, view)]
    found += [f for container in view.strays for f in _of_stray(container, view)]
    if evidence.fresh:
        return tuple(found)
    return tuple(f if f.action in _ALWAYS else replace(f, waits=NO_PICTURE) for f in found)


def server_of(allocation: Allocation) -> str:
    """How findings name a server."""
    return f"{allocation.user}/{people_name(allocation.server_name)}"


# --------------------------------------------------------------------------- allocations


def _of_allocation(allocation: Allocation, view: _View) -> Iterator[Finding]:
    if allocation.state is State.RESERVED:
        yield from _of_reserved(allocation, view)
        return
    container = view.by_id.get(allocation.container_id or "")
    if container is None:
        yield _of_vanished(allocation, view)
    elif container.unreadable:
        said = f"Docker's answer about {container.name} cannot be read ({container.unreadable})"
        yield _about(allocation, What.UNREADABLE, said, container=container, severity=Severity.ALERT)
    elif not view.ours(container) or view.token(container) != allocation.container_token:
        yield _about(
            allocation,
            What.MISLABELLED,
            f"its container {container.name} does not carry the token {allocation.container_token} of this "
            "installation that the ledger knows; it is left alone",
            container=container,
            severity=Severity.ALERT,
            remedy=_restored(container),
        )
    elif container.may_run:
        yield from _of_running(allocation, container, view)
    elif allocation.state is State.ACTIVE:
        yield from _of_ended(allocation, container, view)
    else:
        yield from _of_held(allocation, container, view)


def _of_reserved(allocation: Allocation, view: _View) -> Iterator[Finding]:
    """A start whose process died. A row that a dead process held since this very reservation proves it at once."""
    unbound = _unwritten(allocation, view)
    if unbound is not None and unbound.may_run:
        yield _of_unwritten(allocation, unbound)
        return
    reserved = allocation.reserved_at or allocation.created_at or view.now
    dead = view.dead.get(allocation.id)
    # The start of a server that has an allocation takes the row a moment before it reserves.
    proven = dead is not None and dead.what == "start" and dead.since >= reserved - SKEW
    if proven or view.now - reserved >= RESERVED_GRACE:
        why = "the process that did it is gone" if proven else "nobody has been working on it since"
        said = f"its start of {reserved:%H:%M:%S} UTC did not end; {why}"
        yield _about(allocation, What.START_DIED, said, Action.TAKE_BACK)


def _of_vanished(allocation: Allocation, view: _View) -> Finding:
    """No container. One that carries the newest token finished a replacement (`servers.strip`) that died half-way."""
    heir = _unwritten(allocation, view)
    if heir is None:
        return _about(allocation, What.CONTAINER_GONE, "its container is gone", Action.RELEASE)
    replacing = allocation.state is State.HELD and allocation.token != allocation.container_token
    if heir.may_run or not replacing or not named_units(heir) <= _leased(allocation):
        return _of_unwritten(allocation, heir)
    said = f"container {heir.name} was made in the old one's place and not written down"
    return _about(allocation, What.HALF_REPLACED, said, Action.BIND, container=heir)


def _unwritten(allocation: Allocation, view: _View) -> ContainerFacts | None:
    """The container that carries the newest token and is not bound: made, and the ledger never heard that it was."""
    for container in view.strays:
        origin = view.origin(container)
        if origin is not None and origin.allocation.id == allocation.id and view.token(container) == allocation.token:
            return container
    return None


def _of_unwritten(allocation: Allocation, container: ContainerFacts) -> Finding:
    """It is written down before its first start; so where it runs or ran, this ledger is older than that."""
    said = f"container {container.name} carries its newest token, but the ledger does not know it; it is left alone"
    return _about(allocation, What.UNWRITTEN, said, container=container, severity=Severity.ALERT,
                  remedy=_restored(container))  # fmt: skip


def _of_running(allocation: Allocation, container: ContainerFacts, view: _View) -> Iterator[Finding]:
    if allocation.state is State.HELD:
        yield _of_awakened(allocation, container, view)
        return
    foreign = named_units(container) - _leased(allocation)
    newer = [view.holder[u] for u in sorted(foreign) if u in view.holder and view.holder[u].token > allocation.token]
    if newer:
        said = f"container {container.name} names a GPU that {server_of(newer[0])} was given later"
        yield _about(allocation, What.UNIT_SHARED, said, Action.STOP, container=container, severity=Severity.ALERT)
    gone = sorted(_leased(allocation) & view.evidence.gone)
    if gone:
        yield _about(
            allocation,
            What.UNIT_GONE,
            f"it runs, but its GPU {', '.join(gone)} does not exist any more",
            container=container,
            severity=Severity.ALERT,
            remedy="Ask the user to restart the server; until it is stopped, the new units of that GPU are not given.",
            units=tuple(gone),
        )


def _of_awakened(allocation: Allocation, container: ContainerFacts, view: _View) -> Finding:
    """A held server's container runs (design, point 1). Stopped if the stop is newer than this run, or if it was
    started while we looked. Else a Hub may have started it of which a restored ledger does not know."""
    since, started, stopped = view.evidence.watching_since, container.started, allocation.stopped_at
    said = f"container {container.name} runs although the server is stopped"
    if started is not None and stopped is not None and started < stopped:
        said = f"{said} since {stopped:%H:%M:%S} UTC"
        return _about(allocation, What.STOP_PENDING, said, Action.STOP, container=container)
    if since is not None and started is not None and since <= started <= view.now + SKEW:
        said = f"{said}: somebody started it in Docker"
        return _about(allocation, What.STARTED_BEHIND, said, Action.STOP, container=container)
    return _about(
        allocation,
        What.STARTED_UNSEEN,
        f"{said}; it was started while nobody was watching, by hand or by a Hub of which this ledger does not know",
        container=container,
        severity=Severity.ALERT,
        remedy=f"{_restored(container)} Else: docker stop {container.name}",
    )


def _of_ended(allocation: Allocation, container: ContainerFacts, view: _View) -> Iterator[Finding]:
    booted, started = view.evidence.booted_at, container.started
    if booted is not None and started is not None and started < booted:
        said = "the machine was restarted while it ran"
        yield _about(allocation, What.MACHINE_REBOOTED, said, Action.HOLD, container=container)
        return
    times = [t for t in (container.finished, allocation.activated_at) if t is not None]
    if not times or view.now - max(times) >= ENDED_GRACE:
        memory = ", out of memory" if container.oom_killed else ""
        said = f"its container ended with exit code {container.exit_code}{memory} while no Hub was looking"
        yield _about(allocation, What.CONTAINER_ENDED, said, Action.HOLD, container=container)


def _of_held(allocation: Allocation, container: ContainerFacts, view: _View) -> Iterator[Finding]:
    leased, until = _leased(allocation), allocation.held_until
    gone = sorted(leased & view.evidence.gone)
    if gone:
        said = f"its GPU {', '.join(gone)} does not exist any more, so that what it held is void"
        yield _about(allocation, What.UNIT_GONE, said, Action.STRIP, container=container, units=tuple(gone))
    elif leased and until is not None and until <= view.now:
        said = f"the hold of its GPU ended at {until:%H:%M:%S} UTC"
        yield _about(allocation, What.HOLD_ENDED, said, Action.STRIP, container=container)
    elif named_units(container) - leased:
        units = tuple(sorted(named_units(container) - leased))
        said = f"its stopped container still names {', '.join(units)}, which it does not hold any more"
        yield _about(allocation, What.NAMES_RELEASED, said, Action.STRIP, container=container, units=units)
    elif leased and until is None and allocation.id in view.evidence.hold_limits:
        said = "its GPU is held without an end, although the policy gives one"
        yield _about(allocation, What.HOLD_ENDLESS, said, Action.LIMIT_HOLD, container=container)


# --------------------------------------------------------------------------- containers without a live allocation


def _of_stray(container: ContainerFacts, view: _View) -> Iterator[Finding]:
    token, origin = view.token(container), view.origin(container)
    if origin is None:
        yield _of_unknown(container, token, view)
        return
    owner = view.live.get(origin.allocation.id, origin.allocation)
    if owner.id in view.busy or _belongs(token, owner, view):
        return
    if owner.state is not State.RELEASED and token == owner.container_token:
        said = f"it carries the token of {server_of(owner)}, which has another container: a copy"
        yield _stray(container, owner, What.COPIED, said, severity=Severity.ALERT, remedy=_remove(container))
        return
    now = "which is given back" if owner.state is State.RELEASED else "which has a newer one"
    said = f"its token {token} is an old one of {server_of(owner)}, {now}"
    if container.may_run:
        yield _stray(container, owner, What.OUTDATED, f"it runs, but {said}", Action.STOP)
    elif container.state == "created" and container.started is None:
        if container.created is not None and view.now - container.created >= CREATED_GRACE:
            yield _stray(container, owner, What.NEVER_STARTED, f"it was never started, and {said}", Action.REMOVE)
    else:
        yield _stray(container, owner, What.ORPHAN, said, severity=Severity.ALERT, remedy=_remove(container))


def _belongs(token: int | None, owner: Allocation, view: _View) -> bool:
    """True if the allocation's own rule deals with it: the newest token, and no container that is bound to it."""
    bound = owner.container_token == owner.token and owner.container_id in view.by_id
    return owner.state is not State.RELEASED and token == owner.token and not bound


def _of_unknown(container: ContainerFacts, token: int | None, view: _View) -> Finding:
    if token is None:
        said = "it says that it is of this installation, but carries no token; what GPU it names counts as taken"
        return Finding(What.UNKNOWN, container.name, said, severity=Severity.ALERT, remedy=_remove(container),
                       container_id=container.id)  # fmt: skip
    newer = token > view.evidence.last_token
    said = f"this ledger did not give it its token {token}; what GPU it names counts as taken"
    return Finding(
        What.UNKNOWN,
        container.name,
        said,
        Action.RAISE_COUNTER if newer else Action.NOTHING,
        Severity.ALERT,
        _restored(container),
        container_id=container.id,
        token=token,
    )


# --------------------------------------------------------------------------- words


def _leased(allocation: Allocation) -> frozenset[str]:
    return frozenset(lease.unit_uuid for lease in allocation.leases)


def _restored(container: ContainerFacts) -> str:
    return (
        "If the ledger was restored from a backup, this is a server from after it: let its owner finish, then "
        f"docker rm -f {container.name}."
    )


def _remove(container: ContainerFacts) -> str:
    return f"If nobody needs its files any more: docker rm -f {container.name}"


def _about(
    allocation: Allocation,
    what: What,
    said: str,
    action: Action = Action.NOTHING,
    *,
    container: ContainerFacts | None = None,
    severity: Severity = Severity.WARNING,
    remedy: str = "",
    units: tuple[str, ...] = (),
) -> Finding:
    return Finding(
        what,
        server_of(allocation),
        said,
        action,
        severity,
        remedy,
        allocation_id=allocation.id,
        container_id=container.id if container else "",
        token=allocation.token,
        units=units,
    )


def _stray(
    container: ContainerFacts,
    owner: Allocation,
    what: What,
    said: str,
    action: Action = Action.NOTHING,
    *,
    severity: Severity = Severity.WARNING,
    remedy: str = "",
) -> Finding:
    return Finding(
        what,
        container.name,
        said,
        action,
        severity,
        remedy,
        allocation_id=owner.id,
        container_id=container.id,
        token=owner.token,
    )
