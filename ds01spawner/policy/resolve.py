"""Policy + user + moment → `Limits`, each value with its source. Pure: no clock, no file.

Order: built-in → defaults → group → user override → grants in force, key by key. A user's group is the one with the
highest priority among those that name them; an override never changes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime, timezone
from typing import Any

from ds01spawner.model import Limit, Limits, Mount

from .checks import group_priority
from .fields import canonical_names, canonical_values
from .grants import Grant
from .layers import Aggregate, Group, Layer, Lifecycle, Quantities, built_ins
from .quantity import format_number, format_size
from .schema import Policy, Profile

BUILT_IN = "built-in"
DEFAULTS = "defaults"
OVERRIDE = "override"

DEFAULT_SHARE = 1.0
"""Summed share that a user may hold if no layer sets any of the two GPU caps."""

_SHARE, _COUNT = "max_gpu_equivalents", "max_mig_instances"
_AGGREGATE = "aggregate."

LIMIT_KEYS = (
    *(key for key in canonical_names(Quantities) if key != "aggregate"),
    "mounts",
    *(_AGGREGATE + key for key in canonical_names(Aggregate)),
)
"""Every key of `Limits.values`, in the order in which documents show them."""


@dataclass(frozen=True)
class _Layer:
    """One layer that applies to the user: its source word and the section of the file."""

    source: str
    section: Layer


def resolve(
    policy: Policy,
    user: str,
    *,
    at: datetime,
    hub_groups: Collection[str] = (),
    unix_groups: Collection[str] = (),
    member_of: Collection[str] = (),
    has_mig: bool = False,
) -> Limits:
    """What `user` may have at one moment.

    Args:
        user: account name, exactly as the Hub has it.
        at: aware time; the UTC day decides which overrides and grants count (their last day does).
        hub_groups, unix_groups: what groups of the policy refer to by `hub_groups:` and `unix_groups:`.
        member_of: groups of the policy to assume that the user is listed in (previews only).
        has_mig: the box has MIG units (then whole GPUs are not allowed unless some layer says so).

    Raises:
        ValueError: `at` has no time zone.
    """
    if at.tzinfo is None:
        raise ValueError("resolve needs an aware time: without a zone the last day of a grant is ambiguous")
    day = at.astimezone(timezone.utc).date()
    groups, notes = naming_groups(policy, user, hub_groups=hub_groups, unix_groups=unix_groups, member_of=member_of)
    if not groups and policy.default_group is not None:
        groups = (policy.default_group,)
    group = groups[0] if groups else None
    layers, override_notes = _layers(policy, user, group, day)
    values = _layered(layers)
    _fill(values, has_mig=has_mig)
    grant_notes = _grants(values, policy.limits.grants, user, group, day)
    _raise_gpu_limit(values)
    _raise_swap(values)
    _clamp_cpus(values)
    values["mounts"] = _mounts(layers)
    values = {key: values[key] for key in LIMIT_KEYS}
    return Limits(
        user=user,
        group=group,
        groups=groups,
        values=values,
        policies=_policies(policy, layers),
        group_total_gpu=_group_total(policy.groups.get(group) if group is not None else None, group),
        notes=(*notes, *override_notes, *grant_notes),
    )


def naming_groups(
    policy: Policy,
    user: str,
    *,
    hub_groups: Collection[str] = (),
    unix_groups: Collection[str] = (),
    member_of: Collection[str] = (),
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Groups that name the user, the one that counts first, and notes about ties. The default group is not added."""
    found = [
        (-group_priority(policy.limits, group), position, name)
        for position, (name, group) in enumerate(policy.groups.items())
        if user in policy.members.get(name, frozenset())
        or name in member_of
        or not set(group.hub_groups).isdisjoint(hub_groups)
        or not set(group.unix_groups).isdisjoint(unix_groups)
    ]
    found.sort()
    names = tuple(name for _, _, name in found)
    tied = [name for priority, _, name in found if priority == found[0][0]]
    if len(tied) > 1:
        return names, (f"groups {', '.join(tied)} have the same priority; {tied[0]} counts, it is first in the file",)
    return names, ()


def may_log_in(
    policy: Policy, user: str, *, hub_groups: Collection[str] = (), unix_groups: Collection[str] = ()
) -> bool:
    """True if some group names the user, or if there is a default group for everybody who authenticates."""
    if policy.default_group is not None:
        return True
    return bool(naming_groups(policy, user, hub_groups=hub_groups, unix_groups=unix_groups)[0])


def offered_profiles(policy: Policy, limits: Limits) -> tuple[Profile, ...]:
    """Profiles for the user, in the order of the file: those for everybody, and those for one of the user's groups."""
    return tuple(
        profile
        for profile in policy.profiles.values()
        if profile.groups is None or not set(profile.groups).isdisjoint(limits.groups)
    )


# --------------------------------------------------------------------------- layers


def _layers(policy: Policy, user: str, group: str | None, day: date) -> tuple[list[_Layer], tuple[str, ...]]:
    """The layers that apply, lowest first, and a note if the user's override has ended."""
    layers = [_Layer(DEFAULTS, policy.limits.defaults)]
    if group is not None:
        layers.append(_Layer(f"group {group}", policy.groups[group]))
    override = policy.limits.user_overrides.get(user)
    if override is None:
        return layers, ()
    if not override.in_force(day):
        return layers, (f"the override of {user} ended on {override.until} and is ignored",)
    return [*layers, _Layer(OVERRIDE, override)], ()


def _flat(section: Quantities) -> Iterator[tuple[str, Any]]:
    """Canonical key → value of one layer, aggregate keys with their prefix."""
    known = canonical_names(Quantities)
    for key, value in canonical_values(section).items():
        if key == "aggregate":
            for inner, limit in canonical_values(section.aggregate).items():
                yield _AGGREGATE + inner, limit
        elif key in known:
            yield key, value


def _layered(layers: list[_Layer]) -> dict[str, Limit]:
    """The highest layer that sets a key decides it."""
    values: dict[str, Limit] = {}
    for layer in layers:
        for key, value in _flat(layer.section):
            values[key] = Limit(value, layer.source)
    return values


def _fill(values: dict[str, Limit], *, has_mig: bool) -> None:
    """What holds for the keys that no layer sets."""
    share_set, count_set = _SHARE in values, _COUNT in values
    if not share_set:
        note = "no limit, because max_mig_instances is set" if count_set else ""
        values[_SHARE] = Limit(None if count_set else DEFAULT_SHARE, BUILT_IN, note)
    if not count_set:
        values[_COUNT] = Limit(None, BUILT_IN)
    if "allow_full_gpu" not in values:
        note = "this box has MIG units" if has_mig else "this box has no MIG units"
        values["allow_full_gpu"] = Limit(not has_mig, BUILT_IN, note)
    for key, value in built_ins(Quantities).items():
        if key not in ("aggregate", "memory_swap"):
            values.setdefault(key, Limit(value, BUILT_IN))
    for key in canonical_names(Aggregate):
        values.setdefault(_AGGREGATE + key, Limit(None, BUILT_IN))


def _grants(
    values: dict[str, Limit], grants: tuple[Grant, ...], user: str, group: str | None, day: date
) -> tuple[str, ...]:
    """Apply the grants that concern the user, in the order of the file."""
    notes: list[str] = []
    swap_known = "memory_swap" in values
    for grant in grants:
        if not grant.concerns(user, group):
            continue
        if not grant.in_force(day):
            notes.append(f"the grant of {', '.join(grant.changes())} ended on {grant.until} and is ignored")
            continue
        source = f"grant until {grant.until}"
        for key, change in grant.changes().items():
            # Swap that no layer sets is as much as memory: that is what a grant of swap adds to.
            below = values["memory"] if key == "memory_swap" and not swap_known else values[key]
            if change.adds and below.value is None:
                notes.append(f"the {source} adds to {key}, which has no limit")
                continue
            note = f"{_text(key, below.value)} + {_text(key, change.value)}" if change.adds else ""
            values[key] = Limit(change.apply(below.value), source, note)
            swap_known = swap_known or key == "memory_swap"
            if key == _COUNT and values[_SHARE].source == BUILT_IN:
                values[_SHARE] = Limit(None, BUILT_IN, "no limit, because max_mig_instances is set")
    return tuple(notes)


# --------------------------------------------------------------------------- one key follows another


def _raise_gpu_limit(values: dict[str, Limit]) -> None:
    """A granted share raises the aggregate share below it, or the grant would do nothing."""
    share, total = values[_SHARE], values[_AGGREGATE + "gpu_limit"]
    if not share.source.startswith("grant") or total.source.startswith("grant") or total.value is None:
        return
    if share.value is None or share.value > total.value:
        note = f"raised from {format_number(total.value)} ({total.source}) with max_gpu_equivalents"
        values[_AGGREGATE + "gpu_limit"] = Limit(share.value, share.source, note)


def _raise_swap(values: dict[str, Limit]) -> None:
    """Docker refuses memory + swap below memory: swap follows memory where a layer raised memory alone."""
    memory, swap = values["memory"], values.get("memory_swap")
    if swap is None:
        values["memory_swap"] = Limit(memory.value, memory.source, "as much as memory: no swap")
    elif swap.value is not None and (memory.value is None or swap.value < memory.value):
        note = f"raised from {format_size(swap.value)} ({swap.source}) with memory"
        values["memory_swap"] = Limit(memory.value, memory.source, note)


def _clamp_cpus(values: dict[str, Limit]) -> None:
    """A container cannot use more CPU than its user may use in all."""
    cores, total = values["max_cpus"], values[_AGGREGATE + "cpu_quota"]
    if total.value is not None and (cores.value is None or cores.value > total.value):
        note = f"clamped from {format_number(cores.value)} to aggregate.cpu_quota ({total.source})"
        values["max_cpus"] = replace(cores, value=total.value, note="; ".join(filter(None, (cores.note, note))))


# --------------------------------------------------------------------------- what is not a plain value


def _mounts(layers: list[_Layer]) -> Limit:
    """Mounts of all layers; a later layer replaces the same target."""
    mounts: dict[str, Mount] = {}
    source, note = BUILT_IN, ""
    for layer in layers:
        for entry in layer.section.mounts:
            mounts[entry.target] = entry.mount
            note = f"with those of {source}" if source not in (BUILT_IN, layer.source) else note
            source = layer.source
    return Limit(tuple(mounts.values()), source, note)


def _policies(policy: Policy, layers: list[_Layer]) -> Mapping[str, Limit]:
    """Lifecycle rules: built-in → global → defaults → group → override, per key, in the unit of the key's name."""
    values = {key: Limit(value, BUILT_IN) for key, value in built_ins(Lifecycle).items()}
    sections = [(DEFAULTS, policy.limits.policies), *((layer.source, layer.section.policies) for layer in layers)]
    for source, section in sections:
        for key, value in canonical_values(section).items():
            values[key] = Limit(value, source)
    return values


def _group_total(group: Group | None, name: str | None) -> Limit:
    """What the whole group may hold together."""
    values = canonical_values(group.group_total) if group is not None else {}
    return Limit(values[_SHARE], f"group {name}") if _SHARE in values else Limit(None, BUILT_IN)


def _text(key: str, value: object) -> str:
    """A value for a note: sizes in GiB, everything else as it is."""
    sizes = ("memory", "memory_swap", "shm_size", "max_container_disk")
    if isinstance(value, int) and key.removeprefix(_AGGREGATE).startswith(sizes):
        return format_size(value)
    return format_number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
