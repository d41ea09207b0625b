"""Taking back a start, whatever point it died at: no container that was not there before, no lease, no pending row.

What cannot be taken back now (Docker is away) stays marked in the ledger, where the reconciler finds it; a unit is
never freed on hope (design, points 1, 4 and 7).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from .containers import aime
from .containers.engine import ContainerFacts, EngineNotFound
from .model import Allocation, State
from .runtime import Runtime
from .servers import Ended, give_back, untag

GRACE_S = 5
"""Seconds between SIGTERM and SIGKILL for a server that never answered."""


@dataclass
class Trail:
    """What one start has done so far.

    Attributes:
        before: the server's allocation as the start found it; None = it had none. allocation: what it reserved.
        container_name: of the server. container: id of what it bound.
        tried: Docker was asked to create a container; made: its id, if the answer came back.
        replaced: the container of an earlier start was removed. started: Docker was told to start `container`.
    """

    before: Allocation | None = None
    allocation: Allocation | None = None
    container_name: str = ""
    container: str = ""
    tried: bool = False
    made: str | None = None
    replaced: bool = False
    started: bool = False


def take_back(runtime: Runtime, trail: Trail, reason: str) -> None:
    """Undo what `trail` tells. The caller holds the operation row.

    Raises:
        EngineError, LedgerError: what is left is the reconciler's.
    """
    if trail.allocation is None:
        return
    allocation = runtime.ledger.get(trail.allocation.id)
    if allocation is None or allocation.state is State.RELEASED:
        return
    _clear(runtime, trail, allocation)
    if trail.made is not None or trail.replaced:
        # The container that the allocation stood for is gone; what it had changed is in its owner's image list.
        runtime.ledger.release(allocation.id, reason, actor=runtime.who)
        return
    if allocation.state is State.RESERVED:
        allocation = runtime.ledger.rollback(allocation.id, reason, actor=runtime.who)
    if allocation.state is State.RELEASED:
        return
    before = trail.before
    if before is not None and before.state is State.HELD:
        # Failing must not lengthen a hold.
        runtime.ledger.hold(allocation.id, until=before.held_until, reason=reason, actor=runtime.who)
    else:
        # The Hub had lost a server that the ledger knew as running: it ends here.
        _stop(runtime, allocation.container_id or "")
        give_back(runtime, allocation, Ended(reason, own_stop=False))


def _clear(runtime: Runtime, trail: Trail, allocation: Allocation) -> None:
    """Leave no container that this start made, and none running that it started."""
    if trail.made is None and trail.started:
        _stop(runtime, trail.container)
        return
    leftover = trail.before is not None and trail.before.state is State.RESERVED
    if not trail.tried and not leftover:
        return  # nothing of this start can be in Docker, which may be away
    facts = _own(runtime, trail)
    if facts is None:
        return
    # A create that was given up may have come through all the same, and a start that died earlier may have left
    # one behind: both carry this allocation's token, and no server ever ran in them.
    token = aime.token_of(facts.labels, runtime.ledger.instance)
    unbound = allocation.container_id != facts.id or allocation.activated_at is None
    if facts.id == trail.made or (token == allocation.token and unbound):
        runtime.engine.remove(facts.id, force=True)
        trail.made = facts.id
        untag(runtime, facts)


def _own(runtime: Runtime, trail: Trail) -> ContainerFacts | None:
    name = trail.made or trail.container_name
    facts = runtime.engine.inspect_facts(name) if name else None
    return facts if facts is not None and aime.is_ours(facts.labels, runtime.ledger.instance) else None


def _stop(runtime: Runtime, container: str) -> None:
    if container:
        with suppress(EngineNotFound):
            runtime.engine.stop(container, timeout=GRACE_S)
