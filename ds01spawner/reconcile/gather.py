"""Where the evidence comes from: Docker first, then the ledger, then the watcher's picture."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime, timedelta

from ds01spawner.containers import aime
from ds01spawner.containers.facts import ContainerFacts
from ds01spawner.model import Allocation, Snapshot, State
from ds01spawner.runtime import Runtime
from ds01spawner.servers import hold_seconds

from .evidence import Evidence, Origin


def gather(
    runtime: Runtime,
    snapshot: Snapshot | None,
    *,
    gone: frozenset[str] = frozenset(),
    watching_since: datetime | None = None,
) -> Evidence:
    """Everything that a pass may know, read now.

    Args:
        snapshot: the watcher's newest picture, however old. gone, watching_since: see `Evidence`.

    Raises:
        EngineError, LedgerError: one of the truths is missing, so that nothing can be concluded.
    """
    facts = runtime.engine.list_facts()
    allocations = runtime.ledger.allocations(live=True)
    operations = runtime.ledger.operations()
    now = runtime.now()
    return Evidence(
        now=now,
        instance=runtime.ledger.instance,
        facts=facts,
        allocations=allocations,
        operations=operations,
        origins=_origins(runtime, facts, allocations),
        last_token=runtime.ledger.last_token(),
        snapshot=None if snapshot is None or snapshot.stale(now) else snapshot,
        gone=gone,
        booted_at=now - timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME)),
        watching_since=watching_since,
        hold_limits=dict(_hold_limits(allocations)),
    )


def _origins(runtime: Runtime, facts: Iterable[ContainerFacts], allocations: Iterable[Allocation]) -> dict[int, Origin]:
    """By token; not asked for containers that are bound to a running or held server, as nearly all are."""
    settled = {a.container_id: a.container_token for a in allocations if a.state is not State.RESERVED}
    found: dict[int, Origin] = {}
    for container in facts:
        token = aime.token_of(container.labels, runtime.ledger.instance)
        if token is None or token in found or settled.get(container.id) == token:
            continue
        origin = runtime.ledger.origin(token)
        if origin is not None:
            found[token] = Origin(*origin)
    return found


def _hold_limits(allocations: Iterable[Allocation]) -> Iterable[tuple[int, float]]:
    """Seconds that a hold without an end should last. Where the policy lets a hold of either kind be endless, it may
    be meant so."""
    for allocation in allocations:
        if allocation.state is State.HELD and allocation.leases and allocation.held_until is None:
            stop, crash = (hold_seconds(allocation, own_stop=own) for own in (True, False))
            if stop is not None and crash is not None:
                yield allocation.id, crash
