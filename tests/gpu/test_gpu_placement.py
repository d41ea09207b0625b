"""Placement: which units answer a request, and that the choice is the same every time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds01spawner.gpu.mig import GEOMETRIES, GIB
from ds01spawner.gpu.placement import (
    Candidate,
    GpuState,
    fragmentation_growth,
    gpu_states,
    in_pool,
    place,
    within,
)
from ds01spawner.gpu.simulated import SimulatedGpu, SimulatedUnit, build
from ds01spawner.model import GpuAsk, GpuKind, Inventory

ANY1, FULL1, MIG1 = GpuAsk(1, GpuKind.ANY), GpuAsk(1, GpuKind.FULL), GpuAsk(1, GpuKind.MIG)


def box_of(*layout: Sequence[str], model: str = "A100-40GB", nvlinks: Sequence[tuple[int, int, int]] = ()) -> Inventory:
    gpus = [SimulatedGpu(model, tuple(SimulatedUnit(name) for name in profiles)) for profiles in layout]
    return build(gpus, salt="test", nvlinks=nvlinks)


def labels(box: Inventory, chosen: tuple[Candidate, ...] | None) -> list[str] | None:
    if chosen is None:
        return None
    units = [box.unit(candidate.uuid or "") for candidate in chosen]
    return [unit.label for unit in units if unit is not None]


def uuid(box: Inventory, label: str) -> str:
    return next(unit.uuid for unit in box.units if unit.label == label)


def placed(
    box: Inventory,
    ask: GpuAsk,
    *,
    taken: Sequence[str] = (),
    allow_full: bool = True,
    prefer: Sequence[str] = (),
    pool: Sequence[str] | None = None,
) -> list[str] | None:
    states = gpu_states(box, {uuid(box, label) for label in taken}, pool=pool)
    return labels(box, place(ask, states, allow_full=allow_full, prefer={uuid(box, label) for label in prefer}))


# --------------------------------------------------------------------------- one unit


def test_nothing_asked_is_an_empty_answer() -> None:
    assert placed(box_of([]), GpuAsk()) == []
    assert placed(box_of(), ANY1) is None


def test_any_is_a_whole_gpu_where_allowed_else_the_smallest_mig_unit() -> None:
    box = box_of(["3g.20gb", "2g.10gb", "1g.5gb"], [])
    assert placed(box, ANY1) == ["1"]
    assert placed(box, ANY1, taken=["1"]) == ["0.2"]
    assert placed(box, ANY1, allow_full=False) == ["0.2"]
    assert placed(box, ANY1, allow_full=False, taken=["0.2"]) == ["0.1"]


def test_a_mig_request_never_gets_a_whole_gpu_and_a_full_one_never_mig() -> None:
    assert placed(box_of([]), MIG1) is None
    assert placed(box_of([]), replace(MIG1, mig_profile="1g.5gb", allow_larger=True)) is None
    assert placed(box_of(["7g.40gb"]), FULL1) is None
    assert placed(box_of([]), FULL1, allow_full=False) is None


def test_the_exact_profile_first_and_a_larger_one_only_if_allowed() -> None:
    box = box_of(["3g.20gb", "2g.10gb", "1g.5gb"])
    exact = GpuAsk(1, GpuKind.MIG, "1g.5gb")
    assert placed(box, exact) == ["0.2"]
    assert placed(box, exact, taken=["0.2"]) is None
    assert placed(box, replace(exact, allow_larger=True)) == ["0.2"]
    assert placed(box, replace(exact, allow_larger=True), taken=["0.2"]) == ["0.1"]
    assert placed(box, replace(exact, allow_larger=True), taken=["0.2", "0.1"]) == ["0.0"]
    assert placed(box, GpuAsk(1, GpuKind.MIG, "2g.10gb", None, True), taken=["0.1"]) == ["0.0"]


def test_of_two_larger_profiles_the_cheaper_one() -> None:
    box = box_of(["2g.10gb", "1g.10gb"])
    assert placed(box, GpuAsk(1, GpuKind.MIG, "1g.5gb", None, True)) == ["0.1"]


def test_minimum_memory_is_meant_as_people_name_it() -> None:
    box = box_of(["3g.20gb", "2g.10gb", "1g.5gb"], [])
    assert placed(box, GpuAsk(1, GpuKind.MIG, None, 5 * GIB)) == ["0.2"], "4.75 GiB usable, sold as 5"
    assert placed(box, GpuAsk(1, GpuKind.MIG, None, 5 * GIB + 1)) == ["0.1"]
    assert placed(box, GpuAsk(1, GpuKind.MIG, None, 18 * GIB)) == ["0.0"]
    assert placed(box, GpuAsk(1, GpuKind.MIG, None, 21 * GIB)) is None
    assert placed(box, GpuAsk(1, GpuKind.ANY, None, 21 * GIB)) == ["1"]
    assert placed(box_of([], model="H100-80GB"), GpuAsk(1, GpuKind.FULL, None, 80 * GIB)) == ["0"]
    assert placed(box_of([], model="A100-40GB"), GpuAsk(1, GpuKind.FULL, None, 48 * GIB)) is None


def test_the_smallest_whole_gpu_that_suffices() -> None:
    box = build([SimulatedGpu("H100-80GB"), SimulatedGpu("A100-40GB"), SimulatedGpu("H100-80GB")], salt="test")
    assert placed(box, FULL1) == ["1"]
    assert placed(box, replace(FULL1, min_memory=60 * GIB)) == ["0"]


def test_ties_go_by_pci_order_numerically() -> None:
    box = box_of(*[["1g.5gb"] * 7 for _ in range(11)])
    taken = [f"{gpu}.{instance}" for gpu in range(11) for instance in range(7) if gpu not in (2, 10)]
    assert placed(box, MIG1, taken=taken) == ["2.0"]
    assert placed(box, MIG1, taken=[*taken, *(f"2.{n}" for n in range(7)), "10.0"]) == ["10.1"]


def test_what_the_server_held_before_wins_where_it_fits() -> None:
    box = box_of([], [], ["1g.5gb", "1g.5gb"])
    assert placed(box, ANY1, prefer=["1"]) == ["1"]
    assert placed(box, ANY1, prefer=["2.1"]) == ["2.1"]
    assert placed(box, MIG1, prefer=["1", "2.1"]) == ["2.1"]
    assert placed(box, FULL1, prefer=["2.1"]) == ["0"]
    assert placed(box, GpuAsk(2, GpuKind.ANY), prefer=["1"]) == ["0", "1"]
    assert placed(box_of([], [], []), GpuAsk(2, GpuKind.FULL), prefer=["2"]) == ["0", "2"]


def test_unhealthy_units_are_never_given() -> None:
    sick = SimulatedUnit(problem="lost: test")
    box = build([SimulatedGpu("L40S", whole=sick), SimulatedGpu("L40S")], salt="test")
    assert placed(box, ANY1) == ["1"]
    assert placed(box, GpuAsk(2, GpuKind.ANY)) is None
    cut = build(
        [SimulatedGpu("A100-40GB", (SimulatedUnit("1g.5gb", problem="ecc: test"), SimulatedUnit("1g.5gb")))], salt="t"
    )
    assert placed(cut, MIG1) == ["0.1"]


def test_a_taken_parent_takes_its_instances() -> None:
    box = box_of(["1g.5gb", "1g.5gb"], ["1g.5gb"])
    states = gpu_states(box, {box.gpus[0].uuid})
    assert labels(box, place(MIG1, states, allow_full=False)) == ["1.0"]
    assert states[0].occupied == (1 << box.units[0].start) | (1 << box.units[1].start)  # type: ignore[operator]


def test_pool_names_gpus_by_index_uuid_model_or_bus() -> None:
    box = build(
        [SimulatedGpu("L40S"), SimulatedGpu("H100-80GB"), SimulatedGpu("A100-40GB", (SimulatedUnit("1g.5gb"),))],
        salt="t",
    )
    gpus = box.gpus
    for name in ("1", gpus[1].uuid, gpus[1].uuid.upper(), gpus[1].pci_bus_id, "h100", "H100-80GB"):
        assert placed(box, ANY1, pool=[name]) == ["1"], name
    assert placed(box, ANY1, pool=["2.0"]) == placed(box, ANY1, pool=[box.units[2].uuid]) == ["2.0"]
    assert placed(box, ANY1, pool=[]) is None
    assert placed(box, ANY1, pool=["10", "tpu"]) is None
    assert not in_pool(gpus[0], gpus[0].units[0], ["40"]), "a number is an index, never a part of a model's name"


# --------------------------------------------------------------------------- several GPUs


def test_several_gpus_are_whole_ones_never_mig() -> None:
    box = box_of([], ["1g.5gb"] * 7, [])
    assert placed(box, GpuAsk(2, GpuKind.ANY)) == ["0", "2"]
    assert placed(box, GpuAsk(3, GpuKind.ANY)) is None
    assert placed(box, GpuAsk(2, GpuKind.MIG)) is None
    assert placed(box, GpuAsk(2, GpuKind.MIG, "1g.5gb")) is None
    assert placed(box, GpuAsk(2, GpuKind.ANY), allow_full=False) is None


def test_links_decide_between_sets() -> None:
    box = box_of([], [], [], [], nvlinks=[(0, 2, 4), (1, 3, 4)])
    assert placed(box, GpuAsk(2, GpuKind.FULL)) == ["0", "2"]
    assert placed(box, GpuAsk(2, GpuKind.FULL), taken=["0"]) == ["1", "3"]
    assert placed(box, GpuAsk(3, GpuKind.FULL)) == ["0", "1", "2"]


def test_links_of_those_who_stay_count_too() -> None:
    # 1-2 is the best pair, but taking it leaves 0 and 3 without any link: 0-1 and 2-3 together are better.
    box = box_of([], [], [], [], nvlinks=[(1, 2, 5), (0, 1, 4), (2, 3, 4)])
    assert placed(box, GpuAsk(2, GpuKind.FULL)) == ["0", "1"]


def test_a_single_gpu_leaves_the_linked_pairs_whole() -> None:
    box = box_of([], [], [], nvlinks=[(0, 1, 4)])
    assert placed(box, FULL1) == ["2"]
    assert placed(box, FULL1, taken=["2"]) == ["0"]
    assert placed(box, FULL1, taken=["0"]) == ["1"], "its partner is gone: no pair is lost with it, and it comes first"


def test_sets_of_one_model_before_better_links() -> None:
    gpus = [SimulatedGpu("H100-80GB"), SimulatedGpu("A100-80GB"), SimulatedGpu("H100-80GB")]
    box = build(gpus, salt="t", nvlinks=[(0, 1, 4)])
    assert placed(box, GpuAsk(2, GpuKind.FULL)) == ["0", "2"]


def test_many_gpus_are_grown_greedily_and_by_links() -> None:
    islands = [(a, b, 4) for start in (0, 4, 8, 12) for a, b in combinations(range(start, start + 4), 2)]
    box = box_of(*[[]] * 16, nvlinks=islands)
    assert placed(box, GpuAsk(4, GpuKind.FULL), taken=["1"]) == ["4", "5", "6", "7"]
    assert placed(box, GpuAsk(16, GpuKind.FULL)) == [str(n) for n in range(16)]
    assert placed(box, GpuAsk(8, GpuKind.FULL), taken=["0", "4"]) == ["8", "9", "10", "11", "12", "13", "14", "15"]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(2, 4), st.randoms(use_true_random=False))
def test_small_sets_have_the_best_partition(count: int, size: int, chance: random.Random) -> None:
    links = [(a, b, chance.choice([0, 0, 1, 2, 4])) for a, b in combinations(range(count), 2)]
    box = box_of(*[[]] * count, nvlinks=links)
    chosen = placed(box, GpuAsk(size, GpuKind.FULL))
    if size > count:
        assert chosen is None
        return
    scores = {frozenset((a, b)): 20 + 100 * n for a, b, n in links}

    def score(group: Sequence[int]) -> int:
        return sum(scores[frozenset(pair)] for pair in combinations(group, 2))

    def best(left: frozenset[int]) -> int:
        if len(left) <= size:
            return score(sorted(left))
        return max(score(g) + best(left - frozenset(g)) for g in combinations(sorted(left), size))

    everything = frozenset(range(count))
    assert chosen is not None
    mine = tuple(int(label) for label in chosen)
    assert score(mine) + best(everything - frozenset(mine)) == best(everything)


# --------------------------------------------------------------------------- the seam for dynamic MIG


def idle_a100(index: int = 0, occupied: int = 0) -> GpuState:
    """A GPU that could be cut: every placement that does not touch `occupied` is a candidate without a uuid."""
    geometry = GEOMETRIES["A100-40GB"]
    possible = [
        Candidate(
            gpu_uuid=f"GPU-{index}",
            mig_profile=profile.name,
            start=start,
            size=profile.memory_slices,
            share=max(profile.compute_slices / 7, profile.memory_slices / 8),
            uuid=None,
            memory_bytes=profile.memory_bytes,
        )
        for profile in geometry.profiles
        for start in profile.starts
        if "+" not in profile.name
    ]
    free = tuple(candidate for candidate in possible if not candidate.mask & occupied)
    return GpuState(f"GPU-{index}", index, "A100-40GB", free, occupied, 7, 8)


@pytest.mark.parametrize(("profile", "start"), [("1g.5gb", 6), ("2g.10gb", 4), ("3g.20gb", 4), ("4g.20gb", 0)])
def test_possible_instances_go_where_most_remains_possible(profile: str, start: int) -> None:
    chosen = place(GpuAsk(1, GpuKind.MIG, profile), [idle_a100()], allow_full=False)
    assert chosen is not None and chosen[0].start == start


def test_possible_instances_pack_the_gpu_that_is_cut_already() -> None:
    busy, idle = idle_a100(1, occupied=0b11110000), idle_a100(0)
    chosen = place(GpuAsk(1, GpuKind.MIG, "1g.5gb"), [idle, busy], allow_full=False)
    assert chosen is not None and chosen[0].gpu_uuid == "GPU-1"


def test_an_instance_that_exists_before_one_that_is_only_possible() -> None:
    state = idle_a100()
    existing = replace(state.candidates[0], uuid="MIG-there", start=0)
    chosen = place(
        GpuAsk(1, GpuKind.MIG, existing.mig_profile),
        [replace(state, candidates=(*state.candidates, existing))],
        allow_full=False,
    )
    assert chosen == (existing,)


def test_existing_units_of_one_profile_are_all_equal() -> None:
    box = box_of(["1g.5gb"] * 7, ["3g.20gb", "2g.10gb", "1g.5gb"])
    names = {unit.mig_profile for unit in box.units}
    growths = {
        fragmentation_growth(state, candidate, names)
        for state in gpu_states(box, {box.units[0].uuid})
        for candidate in state.candidates
        if candidate.mig_profile == "1g.5gb"
    }
    assert len(growths) == 1


# --------------------------------------------------------------------------- properties

LAYOUTS = st.sampled_from(
    [
        [],
        ["1g.5gb"] * 7,
        ["3g.20gb", "3g.20gb"],
        ["3g.20gb", "2g.10gb", "1g.5gb", "1g.5gb"],
        ["4g.20gb", "2g.10gb", "1g.5gb"],
        ["1g.10gb"] * 4,
        ["7g.40gb"],
    ]
)
PROFILES = st.sampled_from([None, "1g.5gb", "1g.10gb", "2g.10gb", "3g.20gb", "7g.40gb", "1g.6gb"])
ASKS = st.builds(
    GpuAsk,
    count=st.integers(1, 3),
    kind=st.sampled_from([GpuKind.ANY, GpuKind.MIG, GpuKind.FULL]),
    mig_profile=PROFILES,
    min_memory=st.sampled_from([None, 4 * GIB, 10 * GIB, 30 * GIB]),
    allow_larger=st.booleans(),
)


@settings(deadline=None)
@given(st.lists(LAYOUTS, max_size=4), ASKS, st.booleans(), st.floats(0, 3), st.randoms(use_true_random=False))
def test_placement_keeps_its_promises(
    layout: list[list[str]], ask: GpuAsk, allow_full: bool, budget: float, chance: random.Random
) -> None:
    box = box_of(*layout)
    taken = {unit.uuid for unit in box.units if chance.random() < 0.4}
    states = within(gpu_states(box, taken), budget)
    chosen = place(ask, states, allow_full=allow_full)
    if chosen is None:
        free = [c for state in states for c in state.candidates if c.mig_profile is None]
        if allow_full and ask.kind is not GpuKind.MIG and ask.mig_profile is None and not ask.min_memory:
            assert len(free) < ask.count
        return
    assert len(chosen) == ask.count == len({candidate.uuid for candidate in chosen})
    assert not taken & {candidate.uuid for candidate in chosen}
    assert all(candidate.share <= budget + 1e-6 for candidate in chosen)
    if ask.count > 1:
        assert all(candidate.mig_profile is None for candidate in chosen)
    if not allow_full or ask.kind is GpuKind.MIG:
        assert all(candidate.mig_profile is not None for candidate in chosen)
    if ask.mig_profile and not ask.allow_larger:
        assert {candidate.mig_profile for candidate in chosen} == {ask.mig_profile}
    if ask.min_memory:
        assert all(candidate.nominal_memory >= ask.min_memory for candidate in chosen)
    shuffled = list(states)
    chance.shuffle(shuffled)
    assert place(ask, shuffled, allow_full=allow_full) == chosen, "the order of the input decides nothing"
