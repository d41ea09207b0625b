"""A container that was just started: does it run, is it what was meant, where does it answer; and if not, why."""

from __future__ import annotations

import re

from .containers.engine import ContainerFacts
from .containers.host import Folder, verify_mounted
from .containers.spec import named_units
from .errors import Code, EngineError, HostError, Refusal
from .model import Admission, Limits
from .policy.quantity import format_size
from .runtime import Runtime

LAST_LINES = 20
LAST_WORDS = 2000
"""Lines and characters of a dead container's log that go into the sentence for its owner."""
FULL = 0.9
"""Part of a limit from which on it is what stopped the container; caches that could be dropped count as well."""
SIGKILLED = 137
_FULL = ("oom", "cannot start a stopped process", "resource temporarily unavailable", "cannot allocate memory")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def require_running(runtime: Runtime, container: str) -> ContainerFacts:
    """The container, if it runs.

    Raises:
        EngineError: it has ended (with its last words), or Docker does not answer.
    """
    facts = runtime.engine.inspect_facts(container)
    if facts is None:
        raise EngineError("The container vanished while it was being started. Please try again.", code=Code.INTERNAL)
    if not facts.running:
        why = "; it ran out of memory" if facts.oom_killed else ""
        raise EngineError(
            f"The container ended at once (exit code {facts.exit_code}{why}). {last_words(runtime, container)}",
            code=Code.INTERNAL,
            facts={"exit_code": facts.exit_code, "out_of_memory": facts.oom_killed},
        )
    return facts


def last_words(runtime: Runtime, container: str) -> str:
    """The end of a container's log in a sentence; never an error."""
    try:
        text = _CONTROL.sub("", runtime.engine.logs(container, lines=LAST_LINES)).strip()[-LAST_WORDS:]
    except EngineError:
        text = ""
    return f"Its last words: {text}" if text else "It said nothing."


def parent_full(runtime: Runtime, limits: Limits, error: EngineError) -> Refusal | None:
    """The sentence for a container that could not begin because its owner's memory or processes are used up.

    The user's cgroup parent counts all their containers. What is over its limits when the next one begins ends that
    one's first process, and runc tells of an init that was OOM-killed, of a process that had stopped already, or of a
    fork that failed. None if the parent is not full, or if `error` is another story.
    """
    told = error.message.lower()
    killed = error.facts.get("exit_code") == SIGKILLED or error.facts.get("out_of_memory")
    if not killed and not any(hint in told for hint in _FULL):
        return None
    now = runtime.cgroups.facts(limits.group, limits.user)
    for key, used, most in (
        ("aggregate.memory_max", now.memory_used, now.memory_max),
        ("aggregate.tasks_max", now.tasks, now.tasks_max),
    ):
        limit = limits.values.get(key)
        if limit is None or limit.value is None or used is None or not most or used < FULL * most:
            continue
        what = "memory" if key == "aggregate.memory_max" else "processes"
        amount = format_size(int(limit.value)) if what == "memory" else str(limit.value)
        return Refusal(
            Code.USER_QUOTA,
            f"Your servers together already use the {amount} of {what} that you have ({limit.source}), so another one "
            "cannot start. Stop one of them, or free something in it.",
            facts={"resource": what, "used": used, "limit": limit.value, "source": limit.source},
        )
    return None


def address_of(runtime: Runtime, facts: ContainerFacts) -> str:
    """Where the server in that container answers.

    Raises:
        EngineError: network_not_enforced, it is not on the installation's network.
    """
    if runtime.settings.network_mode == "host":
        return "127.0.0.1"
    address = facts.networks.get(runtime.network, "")
    if not address:
        raise EngineError(
            f"The container got no address on the network {runtime.network}. Please tell the admin.",
            code=Code.NETWORK_NOT_ENFORCED,
        )
    return address


def verify(runtime: Runtime, facts: ContainerFacts, admission: Admission, folders: dict[str, Folder]) -> None:
    """Devices and folders are the ones that were meant (design, data flow), whoever swapped paths meanwhile.

    Args:
        folders: by mount point.

    Raises:
        HostError: device_mismatch or storage_refused. EngineError: it has ended meanwhile.
    """
    wanted = {unit.uuid for unit in admission.units}
    found = named_units(facts)
    if found != wanted or any(request.count for request in facts.device_requests):
        raise HostError(
            "The container did not get exactly the GPUs that were reserved for it, so it was stopped again. "
            "Please tell the admin.",
            code=Code.DEVICE_MISMATCH,
            facts={"reserved": sorted(wanted), "found": sorted(found)},
        )
    try:
        for target, folder in folders.items():
            verify_mounted(facts.pid, target, folder)
    except HostError:
        require_running(runtime, facts.id)  # one that ended in between has nothing mounted, and its own story
        raise
