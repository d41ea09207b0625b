"""Which units answer a request: pure, deterministic, the same for every door.

`place(ask, gpus)` sees GPUs as occupancy masks with candidates. Today every candidate is a unit that exists; a
later allocator that cuts idle GPUs adds candidates without a uuid, and nothing here changes: a candidate that is
only possible is ruled out by every choice that overlaps it, one that exists by nothing but itself.

Rules, in this order: units the server held before; the exact MIG profile, then the smallest sufficient larger one
where the profile on the form allows it; the smallest sufficient unit; the choice after which most of what others
may ask for is still possible (for a whole GPU: the one whose loss breaks the fewest links between free GPUs); PCI
order, numerically. Several GPUs are whole GPUs, by the best set of links, as NVIDIA/go-gpuallocator scores it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations

from ds01spawner.model import Gpu, GpuAsk, GpuKind, Inventory, Unit

from .mig import GIB, mask, parse_name, sufficient

TOLERANCE = 1e-6
"""Two shares that differ by less are equal."""

EXACT_SET_LIMIT = 8
"""Up to so many free GPUs every set is compared; above, sets grow greedily from each GPU."""

_WHOLE_RESERVE = 1.06
"""The memory in a GPU's name is up to so many times what NVML calls usable (80 GB: 79.6 GiB; ECC takes more)."""


@dataclass(frozen=True)
class Candidate:
    """One thing that could be handed out: an existing unit (uuid), or an instance that could be made (uuid None).

    Attributes:
        start, size: memory slices that it covers; start is -1 where unknown (then it overlaps nothing).
        share: what it costs. order: position for people (MIG index, 0 for a whole GPU).
    """

    gpu_uuid: str
    mig_profile: str | None
    start: int
    size: int
    share: float
    uuid: str | None
    memory_bytes: int = 0
    order: int = 0

    @property
    def mask(self) -> int:
        """The memory slices as bits; 0 where unknown."""
        return 0 if self.start < 0 else mask(self.start, self.size)

    @property
    def nominal_memory(self) -> int:
        """Bytes as people name the unit: a 1g.5gb has 5 GiB, although 4.75 are usable."""
        name = parse_name(self.mig_profile) if self.mig_profile else None
        if name is not None:
            return max(self.memory_bytes, name.memory_gb * GIB)
        return int(self.memory_bytes * _WHOLE_RESERVE)


@dataclass(frozen=True)
class GpuState:
    """One GPU as placement sees it.

    Attributes:
        occupied: memory slices that may not be used, as bits (leased, external or unhealthy units).
        candidates: what is free on it. links: closeness to other GPUs by uuid.
    """

    uuid: str
    index: int
    model: str
    candidates: tuple[Candidate, ...]
    occupied: int = 0
    compute_slices: int = 1
    memory_slices: int = 1
    links: Mapping[str, int] = field(default_factory=dict)


def candidate_of(unit: Unit) -> Candidate:
    """`unit` as a candidate."""
    return Candidate(
        gpu_uuid=unit.gpu_uuid,
        mig_profile=unit.mig_profile,
        start=0 if unit.whole else -1 if unit.start is None else unit.start,
        size=unit.memory_slices,
        share=unit.share,
        uuid=unit.uuid,
        memory_bytes=unit.memory_bytes,
        order=unit.mig_index or 0,
    )


def gpu_states(
    inventory: Inventory, taken: Collection[str], *, pool: Collection[str] | None = None
) -> tuple[GpuState, ...]:
    """The GPUs of `inventory` with what is free on them.

    Args:
        taken: uuids of units that are leased or that something outside holds; the uuid of a GPU that is cut takes
            all its instances.
        pool: names of the GPUs that may be given (uuid, index, model or PCI bus id; also the uuid or label of one
            unit); None = all.
    """
    states = []
    for gpu in inventory.gpus:
        free = []
        occupied = 0
        for unit in gpu.units:
            candidate = candidate_of(unit)
            blocked = unit.problem or gpu.problem or unit.uuid in taken or gpu.uuid in taken
            if blocked:
                occupied |= candidate.mask
            elif in_pool(gpu, unit, pool):
                free.append(candidate)
        states.append(
            GpuState(
                uuid=gpu.uuid,
                index=gpu.index,
                model=gpu.model,
                candidates=tuple(free),
                occupied=occupied,
                compute_slices=gpu.compute_slices,
                memory_slices=gpu.memory_slices,
                links=gpu.links,
            )
        )
    return tuple(states)


def in_pool(gpu: Gpu, unit: Unit, pool: Collection[str] | None) -> bool:
    """True if `pool` names the unit or its GPU; a model may be given in part ("a100")."""
    if pool is None:
        return True
    exact = {gpu.uuid.lower(), str(gpu.index), gpu.pci_bus_id.lower(), unit.uuid.lower(), unit.label}
    wanted = {str(name).strip().lower() for name in pool}
    return bool(exact & wanted) or any(name in gpu.model.lower() for name in wanted if any(c.isalpha() for c in name))


def within(gpus: Iterable[GpuState], share: float | None) -> tuple[GpuState, ...]:
    """`gpus` without the candidates that cost more than `share` (None = no limit)."""
    if share is None:
        return tuple(gpus)
    return tuple(
        replace(gpu, candidates=tuple(c for c in gpu.candidates if c.share <= share + TOLERANCE)) for gpu in gpus
    )


def fits(ask: GpuAsk, candidate: Candidate, *, allow_full: bool) -> bool:
    """True if `candidate` may answer `ask`, free or not, alone or as one of several."""
    whole = candidate.mig_profile is None
    if ask.min_memory is not None and candidate.nominal_memory < ask.min_memory:
        return False
    if ask.kind is GpuKind.NONE or ask.count < 1:
        return False
    if whole:
        return allow_full and ask.kind in (GpuKind.ANY, GpuKind.FULL) and ask.mig_profile is None
    if ask.kind is GpuKind.FULL or ask.count > 1:
        # CUDA sees one MIG instance per process: several of them never make up for several GPUs.
        return False
    if ask.mig_profile is None or candidate.mig_profile == ask.mig_profile:
        return True
    return ask.allow_larger and sufficient(candidate.mig_profile or "", ask.mig_profile)


def place(
    ask: GpuAsk, gpus: Sequence[GpuState], *, allow_full: bool, prefer: Collection[str] = ()
) -> tuple[Candidate, ...] | None:
    """The units that answer `ask`, in PCI order; None if it cannot be met now. Nothing asked: an empty answer.

    Args:
        gpus: all GPUs of the box with what is free on them. allow_full: whole GPUs may be given.
        prefer: units that the same server holds; where they fit, they are kept.
    """
    if ask.kind is GpuKind.NONE or ask.count < 1:
        return ()
    if ask.count > 1:
        return _place_set(ask, gpus, allow_full, prefer)
    free = [
        (gpu, candidate) for gpu in gpus for candidate in gpu.candidates if fits(ask, candidate, allow_full=allow_full)
    ]
    if not free:
        return None
    lonely = _link_loss(gpus)
    names = {candidate.mig_profile for gpu in gpus for candidate in gpu.candidates}

    def rank(item: tuple[GpuState, Candidate]) -> tuple[object, ...]:
        gpu, candidate = item
        whole = candidate.mig_profile is None
        return (
            candidate.uuid not in prefer,
            not whole,
            ask.mig_profile is not None and candidate.mig_profile != ask.mig_profile,
            round(candidate.share, 6),
            round(candidate.memory_bytes / GIB),
            candidate.uuid is None,
            lonely[gpu.uuid] if whole else 0,
            0 if whole else fragmentation_growth(gpu, candidate, names),
            gpu.index,
            candidate.order,
            candidate.start,
        )

    return (min(free, key=rank)[1],)


def fragmentation_growth(gpu: GpuState, chosen: Candidate, names: Collection[str | None]) -> int:
    """By how many memory slices the part of `gpu` grows that requests for `names` cannot use, if `chosen` is taken.

    Fragmentation-aware placement (FGD, ATC'23) on MIG masks with all profiles equally likely: for each profile, count
    the free slices that no candidate of it covers. Units that exist and have the same profile all come out equal.
    """
    free = mask(0, gpu.memory_slices) & ~gpu.occupied
    after = tuple(other for other in gpu.candidates if not _excludes(chosen, other))
    return _unusable(after, free & ~chosen.mask, names) - _unusable(gpu.candidates, free, names)


def _excludes(chosen: Candidate, other: Candidate) -> bool:
    """Taking `chosen` ends `other`. Two that exist lie side by side, or share an instance on purpose."""
    if other is chosen:
        return True
    return bool(other.mask & chosen.mask) and (other.uuid is None or chosen.uuid is None)


def _unusable(candidates: Sequence[Candidate], free: int, names: Collection[str | None]) -> int:
    covered: dict[str | None, int] = {}
    for candidate in candidates:
        covered[candidate.mig_profile] = covered.get(candidate.mig_profile, 0) | candidate.mask
    return sum((free & ~covered.get(name, 0)).bit_count() for name in names)


# --------------------------------------------------------------------------- several GPUs


def _whole_free(gpus: Iterable[GpuState]) -> list[tuple[GpuState, Candidate]]:
    return [(gpu, candidate) for gpu in gpus for candidate in gpu.candidates if candidate.mig_profile is None]


def _link_loss(gpus: Sequence[GpuState]) -> dict[str, int]:
    """For each GPU the summed closeness to the free whole GPUs: what a later set loses if it goes."""
    free = [gpu.uuid for gpu, _ in _whole_free(gpus)]
    return {gpu.uuid: sum(gpu.links.get(other, 0) for other in free if other != gpu.uuid) for gpu in gpus}


def _place_set(
    ask: GpuAsk, gpus: Sequence[GpuState], allow_full: bool, prefer: Collection[str]
) -> tuple[Candidate, ...] | None:
    free = [item for item in _whole_free(gpus) if fits(ask, item[1], allow_full=allow_full)]
    free.sort(key=lambda item: item[0].index)
    if len(free) < ask.count:
        return None
    links = [[_closeness(one, other) for other, _ in free] for one, _ in free]
    if len(free) <= EXACT_SET_LIMIT:
        sets: Iterable[tuple[int, ...]] = combinations(range(len(free)), ask.count)
        rest = _partition_score(links, ask.count)
    else:
        sets = _greedy_sets(links, ask.count)
        rest = None

    def rank(chosen: tuple[int, ...]) -> tuple[object, ...]:
        own = _set_score(links, chosen)
        left = 0 if rest is None else rest(chosen)
        return (
            -sum(free[place][1].uuid in prefer for place in chosen),
            len({free[place][0].model for place in chosen}),
            sum(round(free[place][1].memory_bytes / GIB) for place in chosen),
            -(own + left),
            -own,
            chosen,
        )

    best = min(sets, key=rank)
    return tuple(free[place][1] for place in best)


def _closeness(one: GpuState, other: GpuState) -> int:
    return one.links.get(other.uuid, other.links.get(one.uuid, 0))


def _set_score(links: Sequence[Sequence[int]], chosen: Sequence[int]) -> int:
    return sum(links[one][other] for one, other in combinations(chosen, 2))


def _partition_score(links: Sequence[Sequence[int]], size: int) -> Callable[[Sequence[int]], int]:
    """For a chosen set: the best summed closeness when the other GPUs are cut into sets of `size`."""

    @cache
    def best(left: frozenset[int]) -> int:
        if len(left) <= size:
            return _set_score(links, sorted(left))
        groups = combinations(sorted(left), size)
        return max(_set_score(links, group) + best(left - frozenset(group)) for group in groups)

    return lambda chosen: best(frozenset(range(len(links))) - frozenset(chosen))


def _greedy_sets(links: Sequence[Sequence[int]], size: int) -> list[tuple[int, ...]]:
    """One set per first GPU, grown by the GPU that is closest to those in it, then to those that are left."""
    sets = []
    for first in range(len(links)):
        chosen = [first]
        while len(chosen) < size:
            left = [place for place in range(len(links)) if place not in chosen]
            chosen.append(max(left, key=lambda place: _attraction(links[place], chosen, left, place)))
        sets.append(tuple(sorted(chosen)))
    return sets


def _attraction(row: Sequence[int], chosen: Sequence[int], left: Sequence[int], place: int) -> tuple[int, int, int]:
    return sum(row[other] for other in chosen), sum(row[other] for other in left if other != place), -place
