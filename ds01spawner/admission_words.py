"""The sentences of admission: every "no" says what is held, what the limit is and whose, and what to do next.

Pure. Amounts in sentences are rounded for people, those in facts are base units. Nobody else is ever named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from .errors import Alternative, Code, Refusal
from .gpu.mig import GIB, parse_name
from .model import (
    DEFAULT_SERVER,
    Admission,
    GpuAsk,
    GpuKind,
    Holding,
    Limit,
    Limits,
    Snapshot,
    State,
    Unit,
    Usage,
)
from .policy.schema import Profile, ProfileSize


def amount(number: float) -> str:
    """At most two decimals, no trailing zeros: 1, 0.5, 0.14."""
    return f"{number:.2f}".rstrip("0").rstrip(".") or "0"


def clock(at: datetime) -> str:
    """A time of day in UTC, as everywhere in messages: "14:20 UTC"."""
    return f"{at.astimezone(timezone.utc):%H:%M} UTC"


def asked_text(ask: GpuAsk) -> str:
    """What was asked for: "2 whole GPUs", "a 1g.5gb MIG instance", "a GPU"."""
    if ask.mig_profile:
        return f"a {ask.mig_profile} MIG instance" + (" or a larger one" if ask.allow_larger else "")
    if ask.kind is GpuKind.MIG:
        text = "a MIG instance"
    elif ask.count > 1:
        text = f"{ask.count} whole GPUs"
    else:
        text = "a whole GPU" if ask.kind is GpuKind.FULL else "a GPU"
    return text + (f" with at least {amount(ask.min_memory / GIB)} GB" if ask.min_memory else "")


def held_text(usage: Usage, user: str) -> str:
    """What the user's other servers hold: "server main (1 GPU), server ml (0.14 GPU, stopped, held until …)"."""
    parts = []
    for holding in usage.holdings:
        if holding.user != user or not holding.units:
            continue
        note = f"{amount(sum(holding.units.values()))} GPU"
        if holding.state is State.HELD:
            note += ", stopped" + (f", held until {clock(holding.until)}" if holding.until else "")
        parts.append(f"server {holding.server_name or DEFAULT_SERVER} ({note})")
    return ", ".join(parts)


def _free_up(usage: Usage, user: str) -> str:
    held = held_text(usage, user)
    if not held:
        return ""
    waiting = any(h.user == user and h.units and h.state is State.HELD for h in usage.holdings)
    wait = ", or wait until the hold of a stopped one ends" if waiting else ""
    return f" You hold: {held}. Stop what you can do without{wait}."


def several_instances(ask: GpuAsk) -> Refusal:
    """CUDA sees one MIG instance per process: several are never what somebody wants."""
    return Refusal(
        Code.BAD_REQUEST,
        f"A program sees one MIG instance at a time, so {ask.count} of them give no more than one. "
        "Ask for one larger MIG instance, or for whole GPUs.",
        facts={"asked": ask.count, "mig_profile": ask.mig_profile},
    )


def stale(snapshot: Snapshot | None, now: datetime) -> Refusal:
    """Nobody knows what is free: fail closed."""
    age = None if snapshot is None else round((now - snapshot.at).total_seconds(), 3)
    return Refusal(
        Code.INVENTORY_STALE,
        "What is free on this server is not known right now, so no GPU can be given. Try again in a minute; "
        "if it stays like this, tell the admin that the ds01 watcher gives no news.",
        facts={"age_s": age},
    )


def full_not_allowed(ask: GpuAsk, limits: Limits, *, mig: bool) -> Refusal:
    """Only whole GPUs would do."""
    source = limits.source("allow_full_gpu") if "allow_full_gpu" in limits.values else "built-in"
    if ask.count > 1 and ask.kind is not GpuKind.FULL:
        why = f"{ask.count} GPUs must be whole ones (a program cannot join MIG instances)"
    elif ask.kind is GpuKind.FULL:
        why = f"You asked for {asked_text(ask)}"
    elif mig:
        why = f"Only a whole GPU of this server is {asked_text(ask)}"
    else:
        why = "This server has whole GPUs only"
    hint = "Ask for one MIG instance instead" if mig else "Ask the admin if you need one, or start without a GPU"
    return Refusal(
        Code.FULL_NOT_ALLOWED,
        f"{why}, and you may not have a whole GPU ({source}). {hint}.",
        facts={"asked": ask.count, "kind": ask.kind.value, "limit": False, "source": source},
    )


def container_cap(ask: GpuAsk, limits: Limits) -> Refusal:
    """More units than one server may have."""
    limit = limits.values["max_gpu_slots_per_container"]
    return Refusal(
        Code.CONTAINER_CAP,
        f"You asked for {ask.count} GPUs, and one server of yours may have at most {amount(limit.value)} "
        f"({limit.source}). Ask for fewer.",
        facts={"asked": ask.count, "limit": limit.value, "source": limit.source},
    )


def user_count(ask: GpuAsk, limits: Limits, usage: Usage, held: int) -> Refusal:
    """More units than the user may hold at once."""
    limit = limits.values["max_mig_instances"]
    return Refusal(
        Code.USER_COUNT,
        f"You hold {held} GPU {'unit' if held == 1 else 'units'} and may hold {amount(limit.value)} at once "
        f"({limit.source}); this server would need {ask.count} more.{_free_up(usage, limits.user)}",
        facts={"held": held, "asked": ask.count, "limit": limit.value, "source": limit.source},
    )


def user_quota(limit: Limit, held: float, asked: float, limits: Limits, usage: Usage) -> Refusal:
    """A larger share than the user may hold at once."""
    return Refusal(
        Code.USER_QUOTA,
        f"You hold {amount(held)} GPU of the {amount(limit.value)} that you may hold at once ({limit.source}); "
        f"this server would need {amount(asked)} more.{_free_up(usage, limits.user)}",
        facts={"held": held, "asked": asked, "limit": limit.value, "source": limit.source},
    )


def group_quota(limit: Limit, held: float, asked: float, limits: Limits) -> Refusal:
    """A larger share than the user's group may hold together."""
    return Refusal(
        Code.GROUP_QUOTA,
        f"Your group {limits.group} together holds {amount(held)} GPU of its {amount(limit.value)} ({limit.source}); "
        f"this server would need {amount(asked)} more. Try again when somebody of your group has stopped a server.",
        facts={"held": held, "asked": asked, "limit": limit.value, "source": limit.source, "group": limits.group},
    )


def too_many_servers(limits: Limits, usage: Usage) -> Refusal:
    """As many servers as the user may run."""
    limit = limits.values["max_containers_per_user"]
    held = usage.servers_of(limits.user)
    return Refusal(
        Code.TOO_MANY_SERVERS,
        f"You run {held} {'server' if held == 1 else 'servers'} and may run {amount(limit.value)} at a time "
        f"({limit.source}). Stop one of them first; its files stay.",
        facts={"held": held, "asked": 1, "limit": limit.value, "source": limit.source},
    )


@dataclass(frozen=True)
class Scarcity:
    """Why no unit is free: `suitable` could answer, of these `free` are; `box` is what the user could have at all."""

    ask: GpuAsk
    suitable: frozenset[str]
    free: int
    leased: frozenset[str]
    external: frozenset[str]
    box: tuple[Unit, ...]
    holdings: tuple[Holding, ...]
    now: datetime


def no_gpu(scarcity: Scarcity) -> Refusal:
    """Nothing that would do is free, or the box has nothing that would do."""
    suitable, ask = scarcity.suitable, scarcity.ask
    leased = len(suitable & scarcity.leased)
    external = len((suitable & scarcity.external) - scarcity.leased)
    broken = len(suitable) - leased - external - scarcity.free
    facts: dict[str, int | str | None] = {
        "asked": ask.count,
        "suitable": len(suitable),
        "free": scarcity.free,
        "leased": leased,
        "external": external,
        "unhealthy": broken,
        "next_free": None,
    }
    if len(suitable) < ask.count:
        return Refusal(
            Code.NO_GPU,
            f"You asked for {asked_text(ask)}. {_box_text(scarcity.box)} Ask for one of these.",
            facts=facts,
        )
    reasons = [
        text
        for number, text in (
            (leased, f"{leased} in use or kept for a server that stopped a short while ago"),
            (external, f"{external} used by something outside this service"),
            (broken, f"{broken} out of order"),
        )
        if number
    ]
    ends = [h.until for h in scarcity.holdings if h.until and h.until > scarcity.now and suitable & h.units.keys()]
    when = "Try again later."
    if ends:
        facts["next_free"] = min(ends).isoformat()
        when = f"The next one is expected free at {clock(min(ends))}."
    have = "none is free" if not scarcity.free else f"only {scarcity.free} of them free"
    return Refusal(
        Code.NO_GPU,
        f"You asked for {asked_text(ask)}; of the {len(suitable)} that would do {have}: {', '.join(reasons)}. {when}",
        facts=facts,
    )


def _box_text(units: Sequence[Unit]) -> str:
    if not units:
        return "This server has no GPU that you may have."
    kinds = Counter(f"{unit.mig_profile} MIG instance" if unit.mig_profile else f"whole {unit.model}" for unit in units)
    return f"This server has for you: {', '.join(f'{number} × {kind}' for kind, number in kinds.items())}."


def beyond(wanted: GpuAsk, offer: GpuAsk) -> str:
    """How a wish goes beyond an offer ("gives 1 GPU, not 2"); "" if it does not."""
    if offer.count < 1:
        return "has no GPU"
    if wanted.count > offer.count:
        return f"gives {offer.count} {'GPU' if offer.count == 1 else 'GPUs'}, not {wanted.count}"
    if GpuKind.ANY not in (offer.kind, wanted.kind) and wanted.kind is not offer.kind:
        return "gives whole GPUs only" if offer.kind is GpuKind.FULL else "gives MIG instances only"
    if wanted.mig_profile and offer.mig_profile and wanted.mig_profile != offer.mig_profile:
        return f"gives {offer.mig_profile}, not {wanted.mig_profile}"
    return ""


def unit_notes(ask: GpuAsk, units: Sequence[Unit], allow_full: bool) -> tuple[str, ...]:
    """Where the units are not what the request names first."""
    first = next(iter(units), None)
    if first is None:
        return ()
    if ask.mig_profile and first.mig_profile != ask.mig_profile:
        return (f"No {ask.mig_profile} is free; you get the next larger one, {first.mig_profile}.",)
    if ask.kind is GpuKind.ANY and allow_full and not first.whole:
        return (f"You get a MIG instance ({unit_text(first)}): no whole GPU is free within your quota.",)
    return ()


def clamped(what: str, wish: float | None, given: float | None, limits: Limits, key: str) -> str:
    """The note that a limit cut a wish; "" if it did not."""
    if wish is None or given is None:
        return ""
    shown = [f"{amount(n / GIB)} GB" if what != "CPU cores" else amount(n) for n in (wish, given)]
    return f"You get {shown[1]} {what} instead of {shown[0]} ({limits.source(key)})."


def unit_text(unit: Unit) -> str:
    """A unit as people name it: "1g.5gb, 5 GB" or "whole A100-40GB, 40 GB"."""
    name = parse_name(unit.mig_profile) if unit.mig_profile else None
    memory = name.memory_gb if name else round(unit.memory_bytes / GIB)
    return f"{unit.mig_profile or f'whole {unit.model}'}, {memory} GB"


def alternative(
    profile: Profile,
    key: str,
    size: ProfileSize,
    ask: GpuAsk | None,
    granted: Admission,
    usage: Usage,
    snapshot: Snapshot | None,
) -> Alternative:
    """What would be granted now, as a sentence part and as the `user_options` that ask for it."""
    title = size.title or key
    options: dict[str, object] = {"profile": profile.name, "size": key}
    if ask is None:
        text = title if granted.units else f"{title}, without a GPU"
    elif ask.count < 1:
        options["gpus"] = 0
        text = f"{title}, but without a GPU"
    else:
        options |= {"gpus": ask.count}
        if ask.mig_profile:
            options["mig_profile"] = ask.mig_profile
        text = f"{title} with {asked_text(ask)}"
    free = _free_alike(granted.units, usage, snapshot)
    return Alternative(f"{text}: {free} free now" if free else text, options)


def _free_alike(units: Sequence[Unit], usage: Usage, snapshot: Snapshot | None) -> int:
    """How many units like these are free."""
    if not units or snapshot is None:
        return 0
    busy = usage.taken() | frozenset(snapshot.external_by_unit())
    kinds = {(unit.model, unit.mig_profile) for unit in units}
    return sum(
        (unit.model, unit.mig_profile) in kinds and unit.uuid not in busy and unit.problem is None
        for unit in snapshot.inventory.units
    )
