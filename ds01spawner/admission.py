"""May this request run now, and with which units? Pure: values in, an Admission or a Refusal out.

The order of the rules is part of the contract (policy vectors): full_not_allowed, container_cap, user_count,
user_quota, group_quota, no_gpu. Before them stand what makes the question meaningless (the profile does not offer
it; the picture of the machine is too old), after them the number of servers. What a user holds counts whether the
server runs or not: a stopped container keeps its units until its hold ends.

A share cap is judged by what would really be given: the smallest unit of the box that answers the request decides
whether the cap can be met at all, and only units within what is left are chosen from. So a whole GPU that no
longer fits into a quota does not stand in the way of the MIG instance that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from . import admission_words as words
from .errors import Alternative, Code, Refusal
from .gpu.mig import geometry_of
from .gpu.placement import (
    TOLERANCE,
    Candidate,
    GpuState,
    candidate_of,
    fits,
    gpu_states,
    in_pool,
    place,
    within,
)
from .model import (
    Admission,
    Gpu,
    GpuAsk,
    GpuKind,
    Limit,
    Limits,
    Mount,
    Request,
    Resources,
    Snapshot,
    Unit,
    Usage,
)
from .policy.schema import Profile, ProfileSize

MAX_ALTERNATIVES = 4
"""More would make a sentence that nobody reads."""

SHARE_CAPS = ("max_gpu_equivalents", "aggregate.gpu_limit")
"""Limits on the summed share of one user; all of them hold."""

_UNKNOWN_SHARE = 0.001
"""Stands for the share of a MIG profile that nobody knows: enough to say no where nothing is left."""


def check(
    request: Request,
    profile: Profile,
    size: ProfileSize,
    image: str,
    limits: Limits,
    usage: Usage,
    snapshot: Snapshot | None,
    now: datetime,
) -> Admission:
    """Grant `request` or say why not.

    Args:
        profile, size: what the request means among the offered ones. image: its image, already checked.
        usage: everything held now; `own` is what this very server holds, and is kept where it fits.
        snapshot: the box as the watcher saw it; None = never. Not looked at where no GPU is asked for.

    Raises:
        Refusal: with facts in base units, and with alternatives that would be granted now.
    """
    case = _Case(profile, image, limits, usage, snapshot, now)
    try:
        return case.decide(request, size)
    except Refusal as refusal:
        alternatives = case.alternatives(request, size)
        raise Refusal(refusal.code, refusal.message, facts=refusal.facts, alternatives=alternatives) from None


def choose_units(
    ask: GpuAsk, limits: Limits, usage: Usage, snapshot: Snapshot | None, now: datetime
) -> tuple[Unit, ...]:
    """The GPU part of `check`: the units for `ask`, in PCI order.

    Raises:
        Refusal: without alternatives.
    """
    if ask.count < 1 or ask.kind is GpuKind.NONE:
        return ()
    if ask.kind is GpuKind.MIG and ask.count > 1:
        raise words.several_instances(ask)
    if snapshot is None or snapshot.stale(now):
        raise words.stale(snapshot, now)
    scene = _Scene(ask, limits, usage, snapshot, now)
    _check_full(scene)
    _check_counts(scene)
    _check_shares(scene)
    return _choose(scene)


@dataclass(frozen=True)
class _Scene:
    """One GPU request against one state of the box."""

    ask: GpuAsk
    limits: Limits
    usage: Usage
    snapshot: Snapshot
    now: datetime

    @property
    def allow_full(self) -> bool:
        return bool(_value(self.limits, "allow_full_gpu"))

    @property
    def pool(self) -> tuple[str, ...] | None:
        names = _value(self.limits, "gpu_pool")
        return None if names is None else tuple(str(name) for name in names)

    def units(self) -> Iterator[tuple[Gpu, Unit]]:
        """Every unit of the pool, free or not, healthy or not."""
        for gpu in self.snapshot.inventory.gpus:
            for unit in gpu.units:
                if in_pool(gpu, unit, self.pool):
                    yield gpu, unit

    def suitable(self, *, allow_full: bool | None = None) -> list[Candidate]:
        """Every unit of the pool that could answer the ask, free or not, healthy or not."""
        full = self.allow_full if allow_full is None else allow_full
        found = (candidate_of(unit) for _, unit in self.units())
        return [candidate for candidate in found if fits(self.ask, candidate, allow_full=full)]

    def states(self) -> tuple[GpuState, ...]:
        """What is free: not leased to others, not held from outside, healthy, in the pool."""
        taken = self.usage.taken() | frozenset(self.snapshot.external_by_unit())
        return gpu_states(self.snapshot.inventory, taken, pool=self.pool)

    def least_share(self) -> float:
        """Share of the smallest answer that this box could ever give."""
        found = [candidate.share for candidate in self.suitable()]
        if found:
            return min(found) * self.ask.count
        if self.ask.kind is not GpuKind.MIG and self.allow_full:
            return float(self.ask.count)
        return _known_share(self.ask, self.snapshot) or _UNKNOWN_SHARE


# --------------------------------------------------------------------------- the rules, in their order


def _check_full(scene: _Scene) -> None:
    """full_not_allowed: only a whole GPU would do, and this user may have none."""
    if scene.allow_full:
        return
    ask = scene.ask
    needs_whole = ask.kind is GpuKind.FULL or ask.count > 1
    if not needs_whole and ask.kind is GpuKind.ANY:
        needs_whole = not scene.suitable() and bool(scene.suitable(allow_full=True))
    if needs_whole:
        raise words.full_not_allowed(ask, scene.limits, mig=any(not unit.whole for _, unit in scene.units()))


def _check_counts(scene: _Scene) -> None:
    """container_cap and user_count: numbers of units, whatever their size."""
    ask, limits = scene.ask, scene.limits
    cap = _value(limits, "max_gpu_slots_per_container")
    if cap is not None and ask.count > cap:
        raise words.container_cap(ask, limits)
    most = _value(limits, "max_mig_instances")
    held = scene.usage.units_of(limits.user)
    if most is not None and held + ask.count > most:
        raise words.user_count(ask, limits, scene.usage, held)


def _check_shares(scene: _Scene) -> None:
    """user_quota and group_quota, by the smallest answer that there could be."""
    least = scene.least_share()
    for cap in _caps(scene):
        if least > cap.left + TOLERANCE:
            raise cap.refusal(scene, least)


def _choose(scene: _Scene) -> tuple[Unit, ...]:
    """The units, within what is left of every cap; no_gpu if none is free, a quota if only larger ones are."""
    states = scene.states()
    caps = _caps(scene)
    own = frozenset(scene.usage.own.units) if scene.usage.own else frozenset()

    def try_within(left: float | None) -> tuple[Candidate, ...] | None:
        return place(scene.ask, within(states, left), allow_full=scene.allow_full, prefer=own)

    chosen = try_within(min((cap.left for cap in caps), default=None))
    if chosen is not None:
        return _units(chosen, scene.snapshot)
    unbounded = try_within(None)
    if unbounded is not None:
        share = sum(candidate.share for candidate in unbounded)
        for cap in caps:
            if try_within(cap.left) is None:
                raise cap.refusal(scene, share)
    raise _no_gpu(scene, states)


@dataclass(frozen=True)
class _Cap:
    """One limit on a summed share: of the user (`code` user_quota) or of the group (group_quota)."""

    code: Code
    limit: Limit
    held: float

    @property
    def left(self) -> float:
        return float(self.limit.value) - self.held

    def refusal(self, scene: _Scene, asked: float) -> Refusal:
        if self.code is Code.USER_QUOTA:
            return words.user_quota(self.limit, self.held, asked, scene.limits, scene.usage)
        return words.group_quota(self.limit, self.held, asked, scene.limits)


def _caps(scene: _Scene) -> tuple[_Cap, ...]:
    """The share caps that are set, the user's before the group's."""
    limits, usage = scene.limits, scene.usage
    user = [limits.values[key] for key in SHARE_CAPS if _value(limits, key) is not None]
    caps = [_Cap(Code.USER_QUOTA, limit, usage.share_of(limits.user)) for limit in user]
    if limits.group_total_gpu.value is not None:
        caps.append(_Cap(Code.GROUP_QUOTA, limits.group_total_gpu, usage.share_of_group(limits.group)))
    return tuple(caps)


def _no_gpu(scene: _Scene, states: Iterable[GpuState]) -> Refusal:
    suitable = [candidate.uuid or "" for candidate in scene.suitable()]
    free = [
        candidate.uuid
        for state in states
        for candidate in state.candidates
        if fits(scene.ask, candidate, allow_full=scene.allow_full)
    ]
    return words.no_gpu(
        words.Scarcity(
            ask=scene.ask,
            suitable=frozenset(suitable),
            free=len(free),
            leased=frozenset(scene.usage.taken()),
            external=frozenset(scene.snapshot.external_by_unit()),
            box=tuple(unit for _, unit in scene.units() if scene.allow_full or not unit.whole),
            holdings=scene.usage.holdings,
            now=scene.now,
        )
    )


def _units(chosen: Iterable[Candidate], snapshot: Snapshot) -> tuple[Unit, ...]:
    found = [snapshot.inventory.unit(candidate.uuid or "") for candidate in chosen]
    return tuple(unit for unit in found if unit is not None)


def _known_share(ask: GpuAsk, snapshot: Snapshot) -> float | None:
    """The share that the asked MIG profile would have on a GPU of this box."""
    for gpu in snapshot.inventory.gpus:
        geometry = geometry_of(gpu.model)
        profile = geometry.profile(ask.mig_profile or "") if geometry else None
        if geometry is not None and profile is not None:
            return max(profile.compute_slices / geometry.compute_slices, profile.memory_slices / geometry.memory_slices)
    return None


# --------------------------------------------------------------------------- the whole request


@dataclass(frozen=True)
class _Case:
    """Everything of `check` that stays the same for the request and for what could be had instead."""

    profile: Profile
    image: str
    limits: Limits
    usage: Usage
    snapshot: Snapshot | None
    now: datetime

    @property
    def servers_left(self) -> bool:
        """The user may start one more server."""
        most = _value(self.limits, "max_containers_per_user")
        return most is None or self.usage.servers_of(self.limits.user) + 1 <= most

    def decide(self, request: Request, size: ProfileSize) -> Admission:
        """The answer to one request, without alternatives in a refusal."""
        ask = effective_ask(request.gpu, size)
        units = choose_units(ask, self.limits, self.usage, self.snapshot, self.now)
        if not self.servers_left:
            raise words.too_many_servers(self.limits, self.usage)
        resources, notes = _resources(request, size, self.limits)
        return Admission(
            request=request,
            limits=self.limits,
            image=self.image,
            units=units,
            resources=resources,
            mounts=_mounts(self.limits, self.profile),
            notes=(*words.unit_notes(ask, units, bool(_value(self.limits, "allow_full_gpu"))), *notes),
        )

    def alternatives(self, request: Request, size: ProfileSize) -> tuple[Alternative, ...]:
        """What the same profile would give now: other units of this size, other sizes, and last no GPU at all."""
        if not self.servers_left:
            return ()
        keys = {id(item): key for key, item in self.profile.sizes.items()}
        tries: list[tuple[ProfileSize, GpuAsk | None]]
        tries = [(size, ask) for ask in _smaller_asks(size, request.gpu, self.snapshot)]
        tries += [(item, None) for item in self.profile.sizes.values() if item is not size]
        if all(_wants_gpu(item, ask) for item, ask in tries):
            tries.append((size, GpuAsk()))
        found: dict[tuple[str, ...], Alternative] = {}
        plain: list[Alternative] = []
        for item, ask in tries:
            key = keys.get(id(item), request.size or "")
            granted = self._try(replace(request, size=key, gpu=ask, cpus=None, memory=None), item)
            if granted is None:
                continue
            text = words.alternative(self.profile, key, item, ask, granted, self.usage, self.snapshot)
            if granted.units:
                found.setdefault((key, *(unit.mig_profile or "whole" for unit in granted.units)), text)
            else:
                plain.append(text)
        return (*list(found.values())[: MAX_ALTERNATIVES - 1], *plain[:1])

    def _try(self, request: Request, size: ProfileSize) -> Admission | None:
        try:
            return self.decide(request, size)
        except Refusal:
            return None


def _wants_gpu(size: ProfileSize, ask: GpuAsk | None) -> bool:
    return (size.gpu.ask() if ask is None else ask).count > 0


def effective_ask(wanted: GpuAsk | None, size: ProfileSize) -> GpuAsk:
    """What a request asks for on a size that offers something: the wish narrows the offer and never widens it.

    Raises:
        Refusal: NOT_IN_PROFILE, the wish goes beyond the size.
    """
    offer = size.gpu.ask()
    if wanted is None:
        return offer
    if wanted.count < 1 or wanted.kind is GpuKind.NONE:
        return GpuAsk()
    if wanted.kind is GpuKind.ANY and wanted.mig_profile:
        wanted = replace(wanted, kind=GpuKind.MIG)
    beyond = words.beyond(wanted, offer)
    if beyond:
        facts = {"asked": wanted.count, "kind": wanted.kind.value, "mig_profile": wanted.mig_profile}
        raise Refusal(Code.NOT_IN_PROFILE, f"This size {beyond}. Choose another size.", facts=facts)
    kind = offer.kind if wanted.kind is GpuKind.ANY else wanted.kind
    named = wanted.mig_profile or (offer.mig_profile if kind is GpuKind.MIG else None)
    floors = [floor for floor in (wanted.min_memory, offer.min_memory) if floor is not None]
    if wanted.mig_profile and wanted.mig_profile != offer.mig_profile:
        floors = []  # the user named a unit of the offer's kind: its memory is known and wanted
    return GpuAsk(wanted.count, kind, named, max(floors, default=None), offer.allow_larger)


def _resources(request: Request, size: ProfileSize, limits: Limits) -> tuple[Resources, tuple[str, ...]]:
    """CPU, memory and the rest: the least of what was asked, what the size gives and what the limits allow."""
    notes = []
    cpus, note = _least(request.cpus, size.cpus, limits, "max_cpus")
    notes.append(words.clamped("CPU cores", note, cpus, limits, "max_cpus"))
    memory, note = _least(request.memory, size.memory, limits, "memory")
    notes.append(words.clamped("memory", note, memory, limits, "memory"))
    shm, note = _least(None, size.shm_size, limits, "shm_size")
    notes.append(words.clamped("shared memory", note, shm, limits, "shm_size"))
    pids = _value(limits, "pids_limit")
    resources = Resources(
        cpus=cpus,
        memory=None if memory is None else int(memory),
        memory_swap=_swap(memory, limits),
        shm_size=None if shm is None else int(shm),
        pids_limit=None if pids is None else int(pids),
    )
    return resources, tuple(note for note in notes if note)


def _least(wanted: float | None, offered: float | None, limits: Limits, key: str) -> tuple[float | None, float | None]:
    """The value that holds, and the wish where the limit cut it (else None)."""
    wish = wanted if wanted is not None else offered
    cap = _value(limits, key)
    if cap is None or (wish is not None and wish <= cap):
        return wish, None
    return float(cap) if isinstance(cap, float) else cap, wish


def _swap(memory: float | None, limits: Limits) -> int | None:
    """Memory plus swap, as Docker counts it. Who takes less memory than the limit keeps the same amount of swap."""
    cap = _value(limits, "memory_swap")
    if memory is None or cap is None:
        return None
    most = _value(limits, "memory")
    extra = 0 if most is None else max(0, int(cap) - int(most))
    return int(memory) + extra


def _mounts(limits: Limits, profile: Profile) -> tuple[Mount, ...]:
    """The policy's mounts; where two have the same target, the profile's replaces the general one."""
    by_target: dict[str, Mount] = {}
    for mount in (*(_value(limits, "mounts") or ()), *profile.mount_values):
        by_target[mount.target] = mount
    return tuple(by_target.values())


def _value(limits: Limits, key: str) -> Any:
    """The value of a limit; a key that the resolver does not know is no limit."""
    limit = limits.values.get(key)
    return None if limit is None else limit.value


# --------------------------------------------------------------------------- what would be granted instead


def _smaller_asks(size: ProfileSize, wanted: GpuAsk | None, snapshot: Snapshot | None) -> list[GpuAsk]:
    """Other GPU wishes that the size covers: fewer whole GPUs, each MIG profile of the box, large ones first."""
    offer = size.gpu.ask()
    if snapshot is None or offer.count < 1 or offer.mig_profile:
        return []
    count = wanted.count if wanted is not None else offer.count
    asks = [GpuAsk(fewer, offer.kind) for fewer in range(count - 1, 0, -1) if offer.kind is not GpuKind.MIG]
    if offer.kind is GpuKind.FULL:
        return asks
    units = sorted((u.share, u.mig_profile) for u in snapshot.inventory.units if u.mig_profile is not None)
    names = list(dict.fromkeys(name for _, name in reversed(units)))
    return asks + [GpuAsk(1, GpuKind.MIG, name) for name in names]
