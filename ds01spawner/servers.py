"""What becomes of a server's container after its start: observed, stopped, settled, forgotten.

Both the spawner and the watcher end servers; whoever does holds the allocation's operation row (design, point 11).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from .containers import aime
from .containers.engine import ContainerFacts
from .containers.spec import without_devices
from .errors import Busy, Code, EngineError
from .keep import keep_changes
from .model import Allocation
from .runtime import Runtime

DEFAULT_GRACE_S = 10
"""Seconds between SIGTERM and SIGKILL where no allocation says more."""
PATIENCE_S = 30.0
"""How long one hand waits for another that is at work on the same container."""


@dataclass(frozen=True)
class Observation:
    """Whether a server's container runs, and if not, how it ended."""

    running: bool
    exit_code: int = 0
    out_of_memory: bool = False
    gone: bool = False

    def summary(self) -> int | str:
        """What `Spawner.poll` returns of an ended server: 0 when its container is gone, else a sentence."""
        if self.gone:
            return 0
        why = ", out of memory" if self.out_of_memory else ""
        return f"the container ended with exit code {self.exit_code}{why}"


@dataclass(frozen=True)
class Ended:
    """Why a server is not running. `own_stop`: somebody asked for it; otherwise it ended by itself."""

    reason: str
    own_stop: bool


def observe(runtime: Runtime, container: str) -> Observation:
    """The state of a container by id or name.

    Raises:
        EngineError: Docker does not answer; nothing is known then.
    """
    facts = runtime.engine.inspect_facts(container)
    if facts is None:
        return Observation(False, gone=True)
    if facts.may_run:
        return Observation(True)
    return Observation(False, facts.exit_code or 0, facts.oom_killed)


@contextmanager
def operation(runtime: Runtime, allocation: Allocation, what: str) -> Iterator[Allocation]:
    """Hold the operation row, waiting for another hand; gives the allocation as it is then.

    Raises:
        Busy: the other hand did not finish in time.
    """
    deadline = time.monotonic() + PATIENCE_S
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(runtime.ledger.operation(allocation.id, what, runtime.who))
                break
            except Busy:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(0.25)
        yield runtime.ledger.get(allocation.id) or allocation


def stop(runtime: Runtime, user: str, server_name: str, container: str, *, now: bool = False) -> None:
    """SIGTERM, then SIGKILL after the policy's `sigterm_grace_s`, or at once with `now`.

    Raises:
        EngineError, Busy.
    """
    allocation = runtime.ledger.find(user, server_name)
    container = container or (allocation.container_id or "" if allocation else "")
    if not container:
        return
    if allocation is None:
        runtime.engine.stop(container, timeout=0 if now else DEFAULT_GRACE_S)
        return
    with operation(runtime, allocation, "stop"):
        runtime.engine.stop(container, timeout=0 if now else grace_seconds(allocation))


def settle(runtime: Runtime, user: str, server_name: str, ended: Ended) -> bool:
    """Give back what a stopped server held: at once, or after the hold that its owner's limits grant.

    Its container stays, so that files outside the mounts stay; but a released unit is named by no container
    (design, point 1): it is replaced by a stopped one without devices first.

    Returns:
        True if the very same container can be started again, with the Hub token in it.

    Raises:
        EngineError: it still runs, or could not be replaced; then its units stay held.
    """
    allocation = runtime.ledger.find(user, server_name)
    if allocation is None:
        return False
    with operation(runtime, allocation, "settle") as allocation:
        if allocation.state.value == "released":
            return False
        facts = _own_container(runtime, allocation)
        if facts is None:
            runtime.ledger.release(allocation.id, f"{ended.reason}; its container is gone", actor=runtime.who)
            return False
        if facts.may_run:
            raise EngineError(f"Container {facts.name} still runs; what it holds stays held.", code=Code.BUSY)
        hold = hold_seconds(allocation, own_stop=ended.own_stop)
        until = None if hold is None else runtime.now() + timedelta(seconds=hold)
        if not allocation.leases:
            until = None
        runtime.ledger.hold(allocation.id, until=until, reason=ended.reason, actor=runtime.who)
        if not allocation.leases or hold is None or hold > 0:
            return True
        strip(runtime, allocation, facts)
        return False


def grace_seconds(allocation: Allocation) -> int:
    """Seconds between SIGTERM and SIGKILL, by the policy at admission."""
    grace: Any = allocation.limits["policies"]["sigterm_grace_s"]["value"]
    return DEFAULT_GRACE_S if grace is None else int(grace)


def hold_seconds(allocation: Allocation, *, own_stop: bool) -> float | None:
    """How long a stopped server keeps its units, by the limits it was admitted with; None = without end."""
    if own_stop:
        value: Any = allocation.limits["values"]["gpu_hold_after_stop"]["value"]
        return None if value is None else float(value)
    minutes: Any = allocation.limits["policies"]["gpu_hold_after_crash_m"]["value"]
    return None if minutes is None else float(minutes) * 60


def strip(runtime: Runtime, allocation: Allocation, facts: ContainerFacts) -> None:
    """Replace a stopped container by one of the same name without devices, then release its units.

    The caller holds the operation row. A crash half-way leaves the units held and no container of the name; the
    reconciler releases them then, and what was saved is in its owner's image list.
    """
    kept = keep_changes(runtime, allocation.user, allocation.server_name, facts, max_size=None)
    token = runtime.ledger.renew_token(allocation.id, actor=runtime.who)
    body = without_devices(facts, kept.ref if kept else "")
    body["Labels"] |= {aime.LABEL_TOKEN: str(token)}
    if kept is not None:
        runtime.engine.tag(kept.image_id, facts.image_ref)
        body["Image"] = facts.image_ref
    runtime.engine.remove(facts.id)
    container = runtime.engine.create(facts.name, body)
    runtime.ledger.bind(
        allocation.id,
        container_id=container,
        container_name=facts.name,
        image=str(body["Image"]),
        spec_hash="",
        actor=runtime.who,
    )
    runtime.ledger.drop_leases(allocation.id, "its container names no device any more", actor=runtime.who)


def forget(runtime: Runtime, user: str, server_name: str) -> None:
    """Remove the container of a deleted server and release what it held; folders and saved images stay."""
    allocation = runtime.ledger.find(user, server_name)
    if allocation is None:
        return
    with operation(runtime, allocation, "remove") as allocation:
        facts = _own_container(runtime, allocation)
        if facts is not None:
            runtime.engine.remove(facts.id, force=True)
        runtime.ledger.release(allocation.id, "the server was deleted", actor=runtime.who)


def has_container(runtime: Runtime, user: str, server_name: str) -> bool:
    """True if the ledger knows a container of that server."""
    allocation = runtime.ledger.find(user, server_name)
    return allocation is not None and allocation.container_id is not None


def _own_container(runtime: Runtime, allocation: Allocation) -> ContainerFacts | None:
    """The container of an allocation, if it is still there and still ours."""
    name = allocation.container_id or allocation.container_name
    facts = runtime.engine.inspect_facts(name) if name else None
    if facts is None or not aime.is_ours(facts.labels, runtime.ledger.instance):
        return None
    return facts
