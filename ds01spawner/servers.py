"""What becomes of a server's container after its start: observed, stopped, settled, forgotten.

Both the spawner and the watcher end servers; whoever does holds the allocation's operation row (design, point 11).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from .containers import aime
from .containers.engine import ContainerFacts, EngineNotFound
from .containers.spec import without_devices
from .errors import Busy, Code, Ds01Error, EngineError
from .keep import keep_changes
from .model import Allocation, State
from .runtime import Runtime

log = logging.getLogger("ds01.servers")

DEFAULT_GRACE_S = 10
"""Seconds between SIGTERM and SIGKILL where no allocation says more."""
PATIENCE_S = 30.0
"""How long one hand waits for another that is at work on the same container."""


@dataclass(frozen=True)
class Observation:
    """Whether a server's container runs, and if not, how it ended.

    Attributes:
        facts: the container; None when it is gone.
    """

    running: bool
    facts: ContainerFacts | None = None

    def summary(self) -> int | str:
        """What `Spawner.poll` returns of an ended server: 0 when its container is gone, else a sentence."""
        if self.facts is None:
            return 0
        why = ", out of memory" if self.facts.oom_killed else ""
        return f"the container ended with exit code {self.facts.exit_code or 0}{why}"


@dataclass(frozen=True)
class Ended:
    """Why a server is not running. `own_stop`: somebody asked for it; otherwise it ended by itself."""

    reason: str
    own_stop: bool


def observe(runtime: Runtime, user: str, server_name: str, container: str) -> Observation:
    """The state of a server's container.

    Args:
        container: the Hub's own memory of it. "" where the Hub has none (it was killed before it could save any):
            then the container of an active allocation counts.

    Raises:
        EngineError, LedgerError: no answer; nothing is known then.
    """
    if not container:
        allocation = runtime.ledger.find(user, server_name)
        if allocation is None or allocation.state is not State.ACTIVE or not allocation.container_id:
            return Observation(False)
        container = allocation.container_id
    facts = runtime.engine.inspect_facts(container)
    return Observation(facts is not None and facts.may_run, facts)


def address(runtime: Runtime, container: str) -> str:
    """Where a running container answers; "" if it is gone or has no address.

    Raises:
        EngineError: Docker does not answer.
    """
    if runtime.settings.network_mode == "host":
        return "127.0.0.1"
    facts = runtime.engine.inspect_facts(container) if container else None
    return facts.networks.get(runtime.network, "") if facts is not None else ""


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


def end(runtime: Runtime, user: str, server_name: str, container: str, *, now: bool = False) -> bool:
    """Stop a server because somebody asked for it, and give back what it held (see `give_back`).

    SIGTERM, then SIGKILL after the policy's `sigterm_grace_s`, or at once with `now`.

    Args:
        container: as the Hub remembers it, "" if it does not. A foreign container is never touched.

    Returns:
        As `give_back`.

    Raises:
        EngineError: Docker did not answer or could not stop it. Busy: another hand did not finish in time.
    """
    allocation = runtime.ledger.find(user, server_name)
    if allocation is None:
        _stop_own(runtime, container, 0 if now else DEFAULT_GRACE_S)
        return False
    with operation(runtime, allocation, "stop") as allocation:
        grace = 0 if now else grace_seconds(allocation)
        for each in {container, allocation.container_id or ""}:
            _stop_own(runtime, each, grace)
        try:
            return give_back(runtime, allocation, Ended("stopped", own_stop=True), container)
        except Ds01Error as error:
            # It has stopped, which is what was asked for. What it held stays held until the watcher can give it back.
            log.warning("%s/%s: what it held stays held for now: %s", user, server_name, error.message)
            return True


def _stop_own(runtime: Runtime, container: str, grace: int) -> None:
    facts = runtime.engine.inspect_facts(container) if container else None
    if facts is not None and facts.may_run and aime.is_ours(facts.labels, runtime.ledger.instance):
        with suppress(EngineNotFound):
            runtime.engine.stop(facts.id, timeout=grace)


def postpone(runtime: Runtime, user: str, server_name: str, reason: str) -> None:
    """Write down that a server is not to run although Docker could not be told: a container that runs without an
    active allocation is stopped by the watcher as soon as Docker answers (design, point 1).

    Raises:
        LedgerError.
    """
    allocation = runtime.ledger.find(user, server_name)
    if allocation is not None and allocation.state is State.ACTIVE:
        until = _hold_until(runtime, allocation, hold_seconds(allocation, own_stop=True))
        runtime.ledger.hold(allocation.id, until=until, reason=reason, actor=runtime.who)


def settle(runtime: Runtime, user: str, server_name: str, ended: Ended, container: str = "") -> bool:
    """Give back what a server held that ended by itself; see `give_back`.

    Raises:
        EngineError: it still runs, or could not be replaced; then its units stay held. Busy.
    """
    allocation = runtime.ledger.find(user, server_name)
    if allocation is None:
        return False
    with operation(runtime, allocation, "settle") as allocation:
        return give_back(runtime, allocation, ended, container)


def give_back(runtime: Runtime, allocation: Allocation, ended: Ended, container: str = "") -> bool:
    """Give back what a stopped server held: at once, or after the hold that its owner's limits grant.

    Its container stays, so that files outside the mounts stay; but a released unit is named by no container
    (design, point 1): it is replaced by a stopped one without devices first. The caller holds the operation row.

    Args:
        container: the one that ran; "" = the allocation's.

    Returns:
        True if that very container can be started again, with the Hub token in it.

    Raises:
        EngineError: it still runs, or could not be replaced; then its units stay held.
    """
    if allocation.state is State.RELEASED:
        return False
    facts = _own_container(runtime, allocation)
    if facts is None:
        runtime.ledger.release(allocation.id, f"{ended.reason}; its container is gone", actor=runtime.who)
        return False
    if facts.may_run:
        raise EngineError(f"Container {facts.name} still runs; what it holds stays held.", code=Code.BUSY)
    if allocation.state is State.RESERVED:
        # A start that died on an allocation whose server had run before.
        allocation = runtime.ledger.rollback(allocation.id, ended.reason, actor=runtime.who)
        if allocation.state is State.RELEASED:
            return False
    hold = hold_seconds(allocation, own_stop=ended.own_stop)
    endless = bool(allocation.leases) and allocation.held_until is None and hold is not None
    if allocation.state is not State.HELD or endless:  # noticing an end twice must not lengthen a hold
        until = _hold_until(runtime, allocation, hold)
        allocation = runtime.ledger.hold(allocation.id, until=until, reason=ended.reason, actor=runtime.who)
    if allocation.leases and hold is not None and hold <= 0:
        strip(runtime, allocation, facts)
        return False
    return not container or facts.id == container


def _hold_until(runtime: Runtime, allocation: Allocation, hold: float | None) -> datetime | None:
    """When a hold of that many seconds ends that begins now; None = no end, or nothing to hold."""
    return None if hold is None or not allocation.leases else runtime.now() + timedelta(seconds=hold)


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
    body = without_devices(facts, kept.image.ref if kept else "")
    body["Labels"] |= {aime.LABEL_TOKEN: str(token)}
    if kept is not None:
        runtime.engine.tag(kept.image.image_id, facts.image_ref)
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
    if kept is not None:
        kept.tidy(runtime)


def forget(runtime: Runtime, user: str, server_name: str) -> None:
    """Remove the container of a deleted server and release what it held; folders and saved images stay."""
    allocation = runtime.ledger.find(user, server_name)
    if allocation is None:
        return
    with operation(runtime, allocation, "remove") as allocation:
        facts = _own_container(runtime, allocation)
        if facts is not None:
            runtime.engine.remove(facts.id, force=True)
            untag(runtime, facts)
        runtime.ledger.release(allocation.id, "the server was deleted", actor=runtime.who)


def untag(runtime: Runtime, facts: ContainerFacts) -> None:
    """Take a removed container's private tag off its image. Saved images have tags of their own and stay."""
    if facts.image_ref.rpartition(":")[2] == facts.name:
        with suppress(EngineError):
            runtime.engine.remove_image(facts.image_ref)


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
