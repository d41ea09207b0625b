"""Doing what the plan says: under the operation row of each allocation, and only if it is still so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from types import MappingProxyType

from ds01spawner.containers import aime
from ds01spawner.containers.facts import ContainerFacts
from ds01spawner.containers.spec import named_units
from ds01spawner.errors import Busy, Ds01Error, EngineError
from ds01spawner.ledger.records import subject_of
from ds01spawner.model import Allocation
from ds01spawner.runtime import Runtime
from ds01spawner.servers import Ended, give_back, strip, untag

from .evidence import Evidence, Origin
from .findings import Action, Finding, Outcome, Result, What
from .plan import plan

STOP_SECONDS = 2
"""Between SIGTERM and SIGKILL for a container that should not run at all."""
TAKE_BACK_SECONDS = 5
"""The same for one that a dead start had started again."""

Look = Callable[[], Evidence]
"""Gathers the evidence anew."""


class NotSo(Exception):
    """What was found is no longer so."""


@dataclass(frozen=True)
class _Case:
    """One finding that holds, with everything that an action needs. Only made while the operation row is held."""

    runtime: Runtime
    finding: Finding
    evidence: Evidence

    @property
    def allocation(self) -> Allocation:
        """The allocation that it concerns, as it is now."""
        live = {a.id: a for a in self.evidence.allocations}
        found = live.get(self.finding.allocation_id or 0) or self.runtime.ledger.get(self.finding.allocation_id or 0)
        if found is None:
            raise NotSo("there is no such allocation")
        return found

    @property
    def container(self) -> ContainerFacts:
        """The container that it concerns, as it is now."""
        return next(c for c in self.evidence.facts if c.id == self.finding.container_id)

    def audit(self, action: str) -> None:
        """One row for a change that the ledger does not see itself."""
        a, c = self.allocation, self.container
        self.runtime.ledger.audit(
            self.runtime.who,
            action,
            subject_of(a.user, a.server_name),
            self.finding.evidence,
            after={"container": c.id, "container_name": c.name, "units": list(self.finding.units)},
            allocation_id=a.id,
        )


def apply(runtime: Runtime, findings: Iterable[Finding], seen: Evidence, look: Look) -> tuple[Outcome, ...]:
    """Do what `findings` ask for; one outcome each.

    Args:
        seen: the evidence that they were concluded from. look: gathers it anew, for each of them again.
    """
    return tuple(_outcome(runtime, finding, seen, look) for finding in findings)


def _outcome(runtime: Runtime, finding: Finding, seen: Evidence, look: Look) -> Outcome:
    if finding.action is Action.NOTHING:
        return Outcome(finding, Result.TOLD)
    if finding.waits:
        return Outcome(finding, Result.SKIPPED, finding.waits)
    try:
        return Outcome(finding, Result.DONE, _act(runtime, finding, seen, look))
    except Busy as error:
        return Outcome(finding, Result.SKIPPED, error.message)
    except NotSo as error:
        return Outcome(finding, Result.SKIPPED, str(error) or "it is no longer so")
    except Ds01Error as error:
        return Outcome(finding, Result.FAILED, error.message)


def _act(runtime: Runtime, finding: Finding, seen: Evidence, look: Look) -> str:
    number = finding.allocation_id
    with ExitStack() as held:
        if number is not None:
            held.enter_context(runtime.ledger.operation(number, "reconcile", runtime.who))
        runtime.engine.forget(finding.container_id or "-")
        evidence = _with_our_row(look(), seen, number)
        now = next((f for f in plan(evidence) if f.key == finding.key and f.action is finding.action), None)
        if now is None or not now.acting:
            raise NotSo(now.waits if now else "")
        return _ACTIONS[now.action](_Case(runtime, now, evidence))


def _with_our_row(evidence: Evidence, seen: Evidence, number: int | None) -> Evidence:
    """The evidence without our own operation row, and with that of the dead hand whose place it took."""
    others = [o for o in evidence.operations if o.allocation_id != number]
    taken = [o for o in seen.operations if o.allocation_id == number and o.stale]
    return replace(evidence, operations=(*others, *taken))


# --------------------------------------------------------------------------- one function per action


def _stop(case: _Case) -> str:
    case.runtime.engine.stop(case.container.id, timeout=STOP_SECONDS)
    case.audit("container.stop")
    return "stopped"


def _remove(case: _Case) -> str:
    case.runtime.engine.remove(case.container.id)
    untag(case.runtime, case.container)
    case.audit("container.remove")
    return "removed"


def _take_back(case: _Case) -> str:
    """Undo a start: what it made is removed, what was there before is stopped and held as before."""
    runtime, evidence, allocation = case.runtime, case.evidence, case.allocation
    kept = False
    for container in evidence.facts:
        token = aime.token_of(container.labels, evidence.instance)
        origin = evidence.origins.get(token) if token is not None else None
        of_start = origin is not None and origin.allocation.id == allocation.id and token == allocation.token
        if origin is not None and of_start and _made_since_reservation(allocation, origin):
            runtime.engine.remove(container.id, force=True)
            untag(runtime, container)
        elif container.id == allocation.container_id:
            kept = True
            if of_start and container.may_run:
                runtime.engine.stop(container.id, timeout=TAKE_BACK_SECONDS)
    if kept:
        runtime.ledger.rollback(allocation.id, "its start died", actor=runtime.who)
        return "taken back; its container is held as before"
    runtime.ledger.release(allocation.id, "its start died", actor=runtime.who)
    return "taken back; nothing of it is left"


def _made_since_reservation(allocation: Allocation, origin: Origin) -> bool:
    """True if a container with this token was made by the last start: by the ledger's own times, which are one clock.
    One that was there before (it ran, or it is the stand-in of one that ran) has files that its owner wants."""
    if allocation.activated_at is None or allocation.reserved_at is None:
        return allocation.activated_at is None
    return origin.given_at > allocation.reserved_at


def _hold(case: _Case) -> str:
    """As the spawner settles a server that ended by itself."""
    runtime, allocation = case.runtime, case.allocation
    give_back(runtime, allocation, Ended(case.finding.evidence, own_stop=False))
    after = runtime.ledger.get(allocation.id)
    until = after.held_until if after is not None else None
    return f"held until {until:%H:%M:%S} UTC" if until else "held without a GPU"


def _release(case: _Case) -> str:
    allocation, engine = case.allocation, case.runtime.engine
    if allocation.container_id and engine.inspect_facts(allocation.container_id) is not None:
        raise NotSo
    case.runtime.ledger.release(allocation.id, case.finding.evidence, actor=case.runtime.who)
    return "what it held is free"


def _strip(case: _Case) -> str:
    runtime, allocation, container = case.runtime, case.allocation, case.container
    if case.finding.what is What.UNIT_GONE:
        case.audit("lease.void")
    try:
        strip(runtime, allocation, container)
    except EngineError as error:
        raise EngineError(
            f"{error.message} Its GPU stays held until its container {container.name} names it no more.",
            code=error.code,
        ) from error
    return "replaced by a stopped container without a GPU; the GPU is free"


def _bind(case: _Case) -> str:
    runtime, allocation, container = case.runtime, case.allocation, case.container
    runtime.ledger.bind(
        allocation.id,
        container_id=container.id,
        container_name=container.name,
        image=container.image_ref,
        spec_hash="",
        actor=runtime.who,
    )
    if named_units(container):
        return "written down"
    runtime.ledger.drop_leases(allocation.id, "its container names no device any more", actor=runtime.who)
    return "written down; its GPU is free"


def _limit_hold(case: _Case) -> str:
    runtime, allocation = case.runtime, case.allocation
    start = allocation.stopped_at or case.evidence.now
    until = start + timedelta(seconds=case.evidence.hold_limits[allocation.id])
    runtime.ledger.hold(allocation.id, until=until, reason=allocation.reason, actor=runtime.who)
    return f"held until {until:%Y-%m-%d %H:%M:%S} UTC"


def _raise_counter(case: _Case) -> str:
    token = case.finding.token or 0
    reason = f"container {case.finding.subject} carries token {token}, which this ledger did not give"
    case.runtime.ledger.raise_token_counter(token, reason, actor=case.runtime.who)
    return f"tokens go on after {token}"


_ACTIONS: Mapping[Action, Callable[[_Case], str]] = MappingProxyType(
    {
        Action.STOP: _stop,
        Action.REMOVE: _remove,
        Action.TAKE_BACK: _take_back,
        Action.HOLD: _hold,
        Action.RELEASE: _release,
        Action.STRIP: _strip,
        Action.BIND: _bind,
        Action.LIMIT_HOLD: _limit_hold,
        Action.RAISE_COUNTER: _raise_counter,
    }
)
