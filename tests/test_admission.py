"""Admission: each rule with its sentence, facts and alternatives; and what no request may ever get."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds01spawner import admission
from ds01spawner.errors import Code, Refusal
from ds01spawner.gpu.mig import GIB
from ds01spawner.gpu.simulated import SimulatedGpu, SimulatedUnit, build
from ds01spawner.model import (
    Admission,
    External,
    GpuAsk,
    GpuKind,
    Holding,
    Inventory,
    Limit,
    Limits,
    Mount,
    Request,
    Snapshot,
    State,
    Usage,
)
from ds01spawner.policy.schema import Profile

NOW = datetime(2026, 11, 23, 14, 0, tzinfo=timezone.utc)
DEMO = ([], [], ["1g.5gb"] * 7, ["3g.20gb", "2g.10gb", "1g.5gb", "1g.5gb"])
BASE: dict[str, Any] = {
    "max_cpus": 8,
    "memory": 32 * GIB,
    "memory_swap": 32 * GIB,
    "shm_size": 16 * GIB,
    "pids_limit": 4096,
    "max_gpu_equivalents": 2.0,
    "max_mig_instances": None,
    "max_gpu_slots_per_container": 2,
    "max_containers_per_user": 3,
    "allow_full_gpu": True,
    "gpu_pool": None,
    "mounts": (),
    "aggregate.gpu_limit": None,
}
PROFILE = Profile.model_validate(
    {
        "name": "pytorch",
        "image": "pytorch:1",
        "sizes": {
            "small": {"title": "Small GPU", "gpu": {"kind": "mig", "min_memory": "4g"}, "cpus": 4, "memory": "16g"},
            "any": {"title": "A GPU", "gpu": {"kind": "any"}},
            "whole": {"title": "Whole GPU", "gpu": {"kind": "full"}},
            "two": {"title": "Two GPUs", "gpu": {"kind": "full", "count": 2}},
            "one5": {"title": "5 GB", "gpu": {"mig_profile": "1g.5gb", "allow_larger": True}},
            "exact": {"title": "Exactly 2g", "gpu": {"mig_profile": "2g.10gb"}},
            "cpu": {"title": "Without GPU", "cpus": 2, "memory": "8g"},
        },
    }
)


def box_of(*layout: Sequence[str]) -> Inventory:
    return build([SimulatedGpu("A100-40GB", tuple(SimulatedUnit(n) for n in names)) for names in layout], salt="t")


def uuid(box: Inventory, label: str) -> str:
    return next(unit.uuid for unit in box.units if unit.label == label)


def holding(box: Inventory, user: str, *labels: str, group: str = "lab", server: str = "x", **more: Any) -> Holding:
    shares = {uuid(box, label): box.unit(uuid(box, label)).share for label in labels}  # type: ignore[union-attr]
    return Holding(user, group, server, more.pop("state", State.ACTIVE), shares, **more)


def limits_of(user: str = "ann", group_total: float | None = None, **changes: Any) -> Limits:
    values = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    return Limits(
        user,
        "lab",
        ("lab",),
        {key: Limit(value, "group lab") for key, value in values.items()},
        group_total_gpu=Limit(group_total, "group lab"),
    )


def ask(
    size: str = "any",
    *,
    box: Inventory | None = None,
    limits: Limits | None = None,
    held: Sequence[Holding] = (),
    own: Holding | None = None,
    external: Mapping[str, str] | None = None,
    at: datetime | None = None,
    profile: Profile = PROFILE,
    **request: Any,
) -> Admission:
    inventory = box or box_of(*DEMO)
    foreign = tuple(External(uuid(inventory, label), "process", who, "test") for label, who in (external or {}).items())
    return admission.check(
        Request(size=size, **request),
        profile,
        profile.sizes[size],
        "pytorch:1",
        limits or limits_of(),
        Usage(tuple(held), own),
        Snapshot(at or NOW, inventory, foreign),
        NOW,
    )


def refused(*arguments: Any, **options: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        ask(*arguments, **options)
    json.dumps(caught.value.as_dict())  # what REST, audit rows and --json do with it
    return caught.value


def labels(granted: Admission) -> list[str]:
    return [unit.label for unit in granted.units]


# --------------------------------------------------------------------------- each refusal


def test_full_not_allowed_for_a_whole_gpu() -> None:
    no = refused("whole", limits=limits_of(allow_full_gpu=False))
    assert no.code is Code.FULL_NOT_ALLOWED
    assert no.facts["source"] == "group lab" and "(group lab)" in no.message
    assert {"profile": "pytorch", "size": "small"} in [dict(a.options) for a in no.alternatives]


def test_full_not_allowed_comes_before_every_other_reason() -> None:
    box = box_of([], [])
    strict = limits_of(allow_full_gpu=False, max_gpu_slots_per_container=1, max_mig_instances=0, max_gpu_equivalents=0)
    assert refused("two", box=box, limits=strict).code is Code.FULL_NOT_ALLOWED
    assert refused("any", box=box, limits=strict).code is Code.FULL_NOT_ALLOWED


def test_container_cap_tells_the_cap() -> None:
    no = refused("two", limits=limits_of(max_gpu_slots_per_container=1))
    assert no.code is Code.CONTAINER_CAP
    assert (no.facts["asked"], no.facts["limit"]) == (2, 1)


def test_user_count_counts_stopped_servers_that_hold() -> None:
    box = box_of(*DEMO)
    until = NOW + timedelta(minutes=20)
    held = [
        holding(box, "ann", "2.0", server=""),
        holding(box, "ann", "2.1", server="ml", state=State.HELD, until=until),
        holding(box, "bob", "2.2"),
    ]
    no = refused("small", box=box, held=held, limits=limits_of(max_mig_instances=2))
    assert no.code is Code.USER_COUNT
    assert (no.facts["held"], no.facts["asked"], no.facts["limit"]) == (2, 1, 2)
    assert "server main (0.14 GPU)" in no.message
    assert "server ml (0.14 GPU, stopped, held until 14:20 UTC)" in no.message
    assert "bob" not in no.sentence()


def test_user_quota_is_about_shares() -> None:
    box = box_of(*DEMO)
    held = [holding(box, "ann", "0"), holding(box, "ann", "1", server="y")]
    no = refused("small", box=box, held=held)
    assert no.code is Code.USER_QUOTA
    assert no.facts == {"held": 2.0, "asked": pytest.approx(1 / 7), "limit": 2.0, "source": "group lab"}
    assert [dict(a.options) for a in no.alternatives] == [{"profile": "pytorch", "size": "cpu"}]


def test_user_quota_is_also_the_aggregate_gpu_limit() -> None:
    no = refused("whole", limits=limits_of(aggregate__gpu_limit=0.5))
    assert no.code is Code.USER_QUOTA and no.facts["limit"] == 0.5
    no = refused("whole", limits=limits_of(aggregate__gpu_limit=4.0, max_gpu_equivalents=0.5))
    assert no.facts["limit"] == 0.5


def test_user_quota_of_zero_is_no_gpu_at_all() -> None:
    for size in ("any", "small", "one5", "whole"):
        assert refused(size, limits=limits_of(max_gpu_equivalents=0)).code is Code.USER_QUOTA


def test_user_quota_where_only_larger_units_are_free() -> None:
    box = box_of(["3g.20gb", "1g.5gb"])
    held = [holding(box, "bob", "0.1")]
    assert refused("small", box=box, held=held, limits=limits_of(max_gpu_equivalents=0.3)).code is Code.USER_QUOTA
    assert labels(ask("small", box=box, held=held, limits=limits_of(max_gpu_equivalents=0.5))) == ["0.0"]


def test_group_quota_after_user_quota() -> None:
    box = box_of(*DEMO)
    held = [holding(box, "bob", "0"), holding(box, "cem", "1"), holding(box, "eve", "2.0", group="other")]
    no = refused("small", box=box, held=held, limits=limits_of(group_total=2.0))
    assert no.code is Code.GROUP_QUOTA
    assert (no.facts["held"], no.facts["group"]) == (2.0, "lab")
    assert "bob" not in no.sentence() and "cem" not in no.sentence()
    both = limits_of(group_total=2.0, max_gpu_equivalents=0.1)
    assert refused("small", box=box, held=held, limits=both).code is Code.USER_QUOTA


def test_group_quota_where_only_larger_units_are_free() -> None:
    box = box_of(["3g.20gb", "1g.5gb"])
    held = [holding(box, "bob", "0.1")]
    no = refused("small", box=box, held=held, limits=limits_of(group_total=0.6))
    assert no.code is Code.GROUP_QUOTA and no.facts["asked"] == 0.5


def test_no_gpu_tells_why_and_when_but_not_who() -> None:
    box = box_of([], [], [], [])
    until = NOW + timedelta(minutes=20)
    held = [holding(box, "bob", "0"), holding(box, "cem", "1", state=State.HELD, until=until)]
    no = refused("whole", box=box, held=held, external={"2": "pid 1 (python)", "3": "exporter"})
    assert no.code is Code.NO_GPU
    assert no.facts == {
        "asked": 1,
        "suitable": 4,
        "free": 0,
        "leased": 2,
        "external": 2,
        "unhealthy": 0,
        "next_free": until.isoformat(),
    }
    assert "expected free at 14:20 UTC" in no.message
    assert not any(name in no.sentence() for name in ("bob", "cem", "python", "exporter"))


def test_no_gpu_of_that_kind_on_this_box() -> None:
    no = refused("exact", box=box_of(["1g.5gb"]))
    assert no.code is Code.NO_GPU
    assert "1 × 1g.5gb MIG instance" in no.message
    assert refused("any", box=box_of()).message.count("no GPU that you may have") == 1


def test_no_gpu_says_how_many_of_several_are_free() -> None:
    box = box_of([], [])
    no = refused("two", box=box, held=[holding(box, "bob", "0")])
    assert no.code is Code.NO_GPU and no.facts["free"] == 1
    assert "only 1 of them free" in no.message
    assert {"profile": "pytorch", "size": "two", "gpus": 1} in [dict(a.options) for a in no.alternatives]


def test_no_gpu_among_unhealthy_ones() -> None:
    sick = [SimulatedGpu("A100-40GB", whole=SimulatedUnit(problem="lost: test"))]
    no = refused("whole", box=build(sick, salt="t"))
    assert no.facts["unhealthy"] == 1 and "out of order" in no.message


def test_too_many_servers_counts_running_ones_only() -> None:
    running = [Holding("ann", "lab", name, State.ACTIVE, {}) for name in ("a", "b")]
    stopped = [Holding("ann", "lab", name, State.HELD, {}) for name in ("c", "d")]
    others = [Holding("bob", "lab", "e", State.ACTIVE, {})]
    assert ask("cpu", held=[*running, *stopped, *others]).units == ()
    starting = Holding("ann", "lab", "f", State.RESERVED, {})
    no = refused("cpu", held=[*running, starting])
    assert no.code is Code.TOO_MANY_SERVERS and no.facts["held"] == 3 and no.alternatives == ()
    assert ask("cpu", held=[*running, starting], limits=limits_of(max_containers_per_user=None))
    assert refused("cpu", limits=limits_of(max_containers_per_user=0)).alternatives == ()


@pytest.mark.parametrize("age", [16, 3600, -6])
def test_inventory_stale_refuses_gpus_and_nothing_else(age: int) -> None:
    at = NOW - timedelta(seconds=age)
    no = refused("whole", at=at)
    assert no.code is Code.INVENTORY_STALE and no.http_status == 503
    assert [dict(a.options)["size"] for a in no.alternatives] == ["cpu"]
    assert ask("cpu", at=at).units == ()
    assert ask("whole", at=at, gpu=GpuAsk()).units == ()


def test_inventory_stale_before_there_was_any_snapshot() -> None:
    size = PROFILE.sizes["whole"]
    with pytest.raises(Refusal) as caught:
        admission.check(Request(), PROFILE, size, "i", limits_of(), Usage(), None, NOW)
    assert caught.value.code is Code.INVENTORY_STALE
    assert admission.check(Request(), PROFILE, PROFILE.sizes["cpu"], "i", limits_of(), Usage(), None, NOW)


@pytest.mark.parametrize(
    ("size", "wish"),
    [
        ("cpu", GpuAsk(1, GpuKind.ANY)),
        ("whole", GpuAsk(2, GpuKind.ANY)),
        ("whole", GpuAsk(1, GpuKind.MIG)),
        ("small", GpuAsk(1, GpuKind.FULL)),
        ("one5", GpuAsk(1, GpuKind.MIG, "3g.20gb")),
        ("whole", GpuAsk(1, GpuKind.ANY, "1g.5gb")),
    ],
)
def test_not_in_profile_for_wishes_beyond_the_size(size: str, wish: GpuAsk) -> None:
    assert refused(size, gpu=wish).code is Code.NOT_IN_PROFILE


def test_several_mig_instances_are_a_bad_request() -> None:
    profile = PROFILE.model_copy(
        update={
            "sizes": {
                "wide": Profile.model_validate(
                    {"image": "i", "sizes": {"wide": {"gpu": {"kind": "any", "count": 3}}}}
                ).sizes["wide"]
            }
        }
    )
    no = refused("wide", profile=profile, gpu=GpuAsk(2, GpuKind.MIG, "1g.5gb"))
    assert no.code is Code.BAD_REQUEST and "one larger MIG instance" in no.message


# --------------------------------------------------------------------------- what is granted


def test_wishes_narrow_the_size() -> None:
    assert labels(ask("any", gpu=GpuAsk(1, GpuKind.MIG, "2g.10gb"))) == ["3.1"]
    assert labels(ask("any", gpu=GpuAsk(1, GpuKind.FULL))) == ["0"]
    assert labels(ask("two", gpu=GpuAsk(1, GpuKind.ANY))) == ["0"], "no kind named: the size's own"
    assert labels(ask("small", gpu=GpuAsk(1, GpuKind.ANY))) == ["2.0"]
    assert labels(ask("one5", gpu=GpuAsk(1, GpuKind.MIG))) == ["2.0"]
    assert labels(ask("whole", gpu=GpuAsk())) == []


def test_a_whole_gpu_over_quota_does_not_stand_in_the_way_of_a_mig_instance() -> None:
    box = box_of(*DEMO)
    granted = ask("any", box=box, held=[holding(box, "ann", "0")], limits=limits_of(max_gpu_equivalents=1.5))
    assert labels(granted) == ["2.0"]
    assert "MIG instance" in granted.notes[0]


def test_a_larger_instance_comes_with_a_note() -> None:
    box = box_of(["2g.10gb", "1g.5gb"])
    granted = ask("one5", box=box, held=[holding(box, "bob", "0.1")])
    assert labels(granted) == ["0.0"]
    assert granted.notes == ("No 1g.5gb is free; you get the next larger one, 2g.10gb.",)


def test_what_this_server_holds_is_kept_and_not_counted_twice() -> None:
    box = box_of(*DEMO)
    own = holding(box, "ann", "1", "0")
    limits = limits_of(max_mig_instances=2, group_total=2.0, max_containers_per_user=1)
    assert labels(ask("two", box=box, own=own, limits=limits)) == ["0", "1"]
    assert labels(ask("whole", box=box, own=holding(box, "ann", "1"), limits=limits)) == ["1"]
    assert labels(ask("whole", box=box, own=holding(box, "ann", "1"), external={"1": "thief"})) == ["0"]


def test_pool_restricts_what_is_given() -> None:
    limits = limits_of(gpu_pool=("1", "3"))
    assert labels(ask("whole", limits=limits)) == ["1"]
    assert labels(ask("small", limits=limits)) == ["3.2"]
    only_whole = limits_of(gpu_pool=("0",), allow_full_gpu=False)
    assert refused("any", limits=only_whole).code is Code.FULL_NOT_ALLOWED


def test_resources_are_the_least_of_wish_size_and_limit() -> None:
    cpu = ask("cpu").resources
    assert (cpu.cpus, cpu.memory, cpu.shm_size, cpu.pids_limit) == (2.0, 8 * GIB, 16 * GIB, 4096)
    less = ask("cpu", cpus=1.0, memory=GIB).resources
    assert (less.cpus, less.memory) == (1.0, GIB)
    rest = ask("any")
    assert (rest.resources.cpus, rest.resources.memory) == (8, 32 * GIB) and rest.notes == ()
    cut = ask("any", cpus=64.0, memory=64 * GIB)
    assert (cut.resources.cpus, cut.resources.memory) == (8, 32 * GIB)
    assert cut.notes == (
        "You get 8 CPU cores instead of 64 (group lab).",
        "You get 32 GB memory instead of 64 GB (group lab).",
    )
    free = ask("any", limits=limits_of(max_cpus=None, memory=None, shm_size=None, pids_limit=None)).resources
    assert (free.cpus, free.memory, free.memory_swap, free.shm_size, free.pids_limit) == (None,) * 5


@pytest.mark.parametrize(
    ("memory", "swap", "wanted", "expected"),
    [
        (32, 32, 16, 16),
        (32, 40, 16, 24),
        (32, 40, None, 40),
        (32, None, 16, None),
        (None, 40, 16, 16),
        (32, 8, 32, 32),
    ],
)
def test_swap_is_never_below_memory(
    memory: int | None, swap: int | None, wanted: int | None, expected: int | None
) -> None:
    limits = limits_of(memory=memory and memory * GIB, memory_swap=swap and swap * GIB)
    granted = ask("any", limits=limits, memory=wanted and wanted * GIB).resources
    assert granted.memory_swap == (expected and expected * GIB)
    assert granted.memory_swap is None or granted.memory is None or granted.memory_swap >= granted.memory


def test_mounts_of_the_profile_replace_general_ones_of_the_same_target() -> None:
    profile = Profile.model_validate(
        {
            "name": "p",
            "image": "i",
            "sizes": {"cpu": {}},
            "mounts": [{"host": "/srv/mine", "target": "/data", "mode": "ro"}],
        }
    )
    general = (Mount("/srv/data", "/data"), Mount("/srv/models", "/models"))
    granted = ask("cpu", profile=profile, limits=limits_of(mounts=general))
    assert granted.mounts == (Mount("/srv/mine", "/data"), Mount("/srv/models", "/models"))


def test_alternatives_would_be_granted() -> None:
    box = box_of(*DEMO)
    no = refused("two", box=box, held=[holding(box, "bob", "0"), holding(box, "cem", "1")])
    assert 1 <= len(no.alternatives) <= admission.MAX_ALTERNATIVES
    assert dict(no.alternatives[-1].options) == {"profile": "pytorch", "size": "cpu"}
    assert "free now" in no.alternatives[0].text
    for alternative in no.alternatives:
        wish = GpuAsk(alternative.options["gpus"], GpuKind.ANY) if "gpus" in alternative.options else None
        assert ask(
            alternative.options["size"], box=box, gpu=wish, held=[holding(box, "bob", "0"), holding(box, "cem", "1")]
        )


def test_alternatives_without_a_cpu_size_offer_the_same_size_without_gpu() -> None:
    profile = Profile.model_validate(
        {"name": "p", "image": "i", "sizes": {"g": {"title": "GPU", "gpu": {"kind": "full"}}}}
    )
    no = refused("g", profile=profile, box=box_of(["1g.5gb"]))
    assert [(a.text, dict(a.options)) for a in no.alternatives] == [
        ("GPU, but without a GPU", {"profile": "p", "size": "g", "gpus": 0})
    ]


# --------------------------------------------------------------------------- properties

LAYOUT = st.lists(
    st.sampled_from([[], ["1g.5gb"] * 7, ["3g.20gb", "2g.10gb", "1g.5gb"], ["1g.10gb"] * 4, ["3g.20gb", "3g.20gb"]]),
    max_size=3,
)
CAP = st.sampled_from([None, 0, 1, 2, 3])
SHARE = st.sampled_from([None, 0.0, 0.25, 0.5, 1.0, 2.0])
LIMITS = st.builds(
    limits_of,
    max_gpu_equivalents=SHARE,
    aggregate__gpu_limit=SHARE,
    max_mig_instances=CAP,
    max_gpu_slots_per_container=CAP,
    max_containers_per_user=CAP,
    allow_full_gpu=st.booleans(),
    group_total=SHARE,
    gpu_pool=st.sampled_from([None, (), ("0",), ("1", "2")]),
)


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    """A box with leases, foreign holders and unhealthy units, and one request."""
    layout = draw(LAYOUT)
    gpus = [
        SimulatedGpu(
            "A100-40GB",
            tuple(SimulatedUnit(n, problem=draw(st.sampled_from([None, None, None, "sick"]))) for n in names),
            whole=SimulatedUnit(problem=draw(st.sampled_from([None, None, None, "sick"]))),
        )
        for names in layout
    ]
    box = build(gpus, salt="t")
    held: list[Holding] = []
    own: dict[str, float] = {}
    external: list[External] = []
    for unit in box.units:
        who = draw(st.sampled_from(["free", "free", "ann", "bob", "eve", "own", "external"]))
        if who == "external":
            external.append(External(unit.uuid, "process", "pid 1", "test"))
        elif who == "own":
            own[unit.uuid] = unit.share
        elif who != "free":
            state = draw(st.sampled_from([State.ACTIVE, State.HELD, State.RESERVED]))
            held.append(Holding(who, "other" if who == "eve" else "lab", unit.label, state, {unit.uuid: unit.share}))
    return {
        "box": box,
        "usage": Usage(tuple(held), Holding("ann", "lab", "", State.HELD, own) if own else None),
        "snapshot": Snapshot(NOW, box, tuple(external)),
        "limits": draw(LIMITS),
        "size": draw(st.sampled_from(list(PROFILE.sizes))),
    }


@settings(max_examples=300, deadline=None)
@given(situations())
def test_property_nothing_forbidden_is_ever_granted(case: dict[str, Any]) -> None:
    box, usage, snapshot, limits = case["box"], case["usage"], case["snapshot"], case["limits"]
    size = PROFILE.sizes[case["size"]]
    offer = size.gpu.ask()
    try:
        granted = admission.check(Request(), PROFILE, size, "i", limits, usage, snapshot, NOW)
    except Refusal as refusal:
        _reason_holds(refusal, offer, limits, usage, snapshot)
        return
    units = granted.units
    uuids = {unit.uuid for unit in units}
    share = sum(unit.share for unit in units)
    assert len(uuids) == len(units) == offer.count
    assert not uuids & usage.taken()
    assert not uuids & set(snapshot.external_by_unit())
    assert all(unit.problem is None for unit in units)
    assert all(box.unit(unit.uuid) == unit for unit in units)
    assert limits["allow_full_gpu"] or not any(unit.whole for unit in units)
    assert len(units) == 1 or all(unit.whole for unit in units)
    if limits["max_containers_per_user"] is not None:
        assert usage.servers_of("ann") + 1 <= limits["max_containers_per_user"]
    if not units:
        return
    assert limits["max_gpu_slots_per_container"] is None or len(units) <= limits["max_gpu_slots_per_container"]
    assert limits["max_mig_instances"] is None or usage.units_of("ann") + len(units) <= limits["max_mig_instances"]
    for key in ("max_gpu_equivalents", "aggregate.gpu_limit"):
        assert limits[key] is None or usage.share_of("ann") + share <= limits[key] + 1e-6
    total = limits.group_total_gpu.value
    assert total is None or usage.share_of_group("lab") + share <= total + 1e-6
    pool = limits["gpu_pool"]
    assert pool is None or all(str(unit.gpu_index) in pool for unit in units)


def _reason_holds(refusal: Refusal, offer: GpuAsk, limits: Limits, usage: Usage, snapshot: Snapshot) -> None:
    """The cap that a refusal names is really reached, or the box has too little."""
    facts, code = refusal.facts, refusal.code
    if code is Code.FULL_NOT_ALLOWED:
        assert not limits["allow_full_gpu"] and offer.kind is not GpuKind.MIG
    elif code is Code.CONTAINER_CAP:
        assert offer.count > limits["max_gpu_slots_per_container"]
    elif code is Code.USER_COUNT:
        assert usage.units_of("ann") + offer.count > limits["max_mig_instances"]
    elif code is Code.USER_QUOTA:
        caps = [limits[key] for key in ("max_gpu_equivalents", "aggregate.gpu_limit") if limits[key] is not None]
        assert facts["limit"] in caps and usage.share_of("ann") + facts["asked"] > facts["limit"]
    elif code is Code.GROUP_QUOTA:
        assert usage.share_of_group("lab") + facts["asked"] > limits.group_total_gpu.value
    elif code is Code.TOO_MANY_SERVERS:
        assert usage.servers_of("ann") >= limits["max_containers_per_user"]
    else:
        assert code is Code.NO_GPU
        busy = usage.taken() | set(snapshot.external_by_unit())
        pool = limits["gpu_pool"]
        free = [
            unit
            for unit in snapshot.inventory.units
            if unit.uuid not in busy
            and unit.problem is None
            and (pool is None or str(unit.gpu_index) in pool)
            and (offer.kind is not GpuKind.MIG or not unit.whole)
            and (offer.kind is not GpuKind.FULL or unit.whole)
            and (limits["allow_full_gpu"] or not unit.whole)
            and (offer.mig_profile is None or offer.allow_larger or unit.mig_profile == offer.mig_profile)
        ]
        assert len(free) < offer.count


@settings(deadline=None)
@given(situations())
def test_property_alternatives_are_granted_as_they_are_offered(case: dict[str, Any]) -> None:
    size = PROFILE.sizes[case["size"]]
    context = (case["limits"], case["usage"], case["snapshot"], NOW)
    try:
        admission.check(Request(), PROFILE, size, "i", *context)
    except Refusal as refusal:
        assert refusal.message.rstrip(".") and refusal.sentence()
        for alternative in refusal.alternatives:
            options = alternative.options
            wish = None
            if "gpus" in options:
                name = options.get("mig_profile")
                wish = GpuAsk(options["gpus"], GpuKind.MIG if name else GpuKind.ANY, name)
            other = PROFILE.sizes[options["size"]]
            assert admission.check(Request(gpu=wish), PROFILE, other, "i", *context)
