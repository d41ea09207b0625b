"""Ledger against Docker: repair what a crash left behind, by evidence only (design, points 4, 5 and 11).

Runs in the watcher. What Docker does not answer is not touched; a row that another hand is working on is skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from .containers import aime
from .containers.engine import ContainerFacts
from .errors import Busy, Ds01Error
from .model import Allocation, State
from .runtime import Runtime
from .servers import strip

log = logging.getLogger("ds01.reconcile")

RESERVED_GRACE = timedelta(minutes=2)
"""A start writes its row before anything else; only a reserved row that nobody works on for this long is a leftover."""


@dataclass
class Report:
    """What was found and done, one sentence each."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def run(runtime: Runtime) -> Report:
    """One pass over all live allocations.

    Raises:
        EngineError, LedgerError: without both truths nothing is done.
    """
    report = Report()
    # Containers first: an allocation is written before its container, so none of these can be unknown to the ledger.
    facts = {container.id: container for container in runtime.engine.list_facts()}
    for allocation in runtime.ledger.allocations(live=True):
        try:
            with runtime.ledger.operation(allocation.id, "reconcile", runtime.who):
                current = runtime.ledger.get(allocation.id)
                if current is not None and current.state is not State.RELEASED:
                    _repair(runtime, current, facts, report)
        except Busy:
            continue
        except Ds01Error as error:
            report.failed.append(f"{_name(allocation)}: {error.message}")
    for line in report.done:
        log.info("%s", line)
    for line in report.failed:
        log.warning("%s", line)
    return report


def _repair(runtime: Runtime, allocation: Allocation, facts: Mapping[str, ContainerFacts], report: Report) -> None:
    container = facts.get(allocation.container_id or "")
    if allocation.state is State.RESERVED:
        _leftover(runtime, allocation, facts, report)
    elif container is None:
        if runtime.engine.inspect_facts(allocation.container_id or "-") is None:
            runtime.ledger.release(allocation.id, "its container is gone", actor=runtime.who)
            report.done.append(f"{_name(allocation)}: its container is gone; what it held is free")
    elif allocation.state is State.HELD and allocation.leases and not container.may_run:
        if allocation.held_until is not None and allocation.held_until <= runtime.now():
            strip(runtime, allocation, container)
            report.done.append(f"{_name(allocation)}: the hold of its GPU ended")
    elif allocation.state is State.ACTIVE and not container.may_run and _old(runtime, container):
        # The Hub settles an ended server within its poll interval; this is for a Hub that is not there.
        runtime.ledger.hold(allocation.id, until=runtime.now(), reason="its container ended", actor=runtime.who)
        report.done.append(f"{_name(allocation)}: its container ended while nobody looked")


def _old(runtime: Runtime, container: ContainerFacts) -> bool:
    return container.finished is not None and runtime.now() - container.finished > RESERVED_GRACE


def _leftover(runtime: Runtime, allocation: Allocation, facts: Mapping[str, ContainerFacts], report: Report) -> None:
    """A reserved row without a working hand: its start died. Take back what the start had made, by its token."""
    if allocation.created_at is not None and runtime.now() - allocation.created_at < RESERVED_GRACE:
        return
    instance = runtime.ledger.instance
    mine = [c for c in facts.values() if aime.token_of(c.labels, instance) == allocation.token]
    known = [c for c in mine if c.id == allocation.container_id and allocation.activated_at is not None]
    for container in mine:
        if container in known:
            if container.may_run:
                runtime.engine.stop(container.id)
        else:
            runtime.engine.remove(container.id, force=True)
    if known:
        runtime.ledger.rollback(allocation.id, "its start died", actor=runtime.who)
    else:
        runtime.ledger.release(allocation.id, "its start died", actor=runtime.who)
    report.done.append(f"{_name(allocation)}: a start that died was taken back")


def _name(allocation: Allocation) -> str:
    return f"{allocation.user}/{allocation.server_name or aime.DEFAULT_NAME}"
