"""Who gets what, and from where: layers, groups, overrides, grants and the keys that follow each other."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vectors_support import noon, policy_of

from ds01spawner.model import Limit, Limits, Mount
from ds01spawner.policy.load import LIMITS, policy_from_text
from ds01spawner.policy.resolve import LIMIT_KEYS, may_log_in, offered_profiles, resolve
from ds01spawner.policy.schema import Profile

GIB = 1 << 30
NOW = noon("2027-01-01")
CLASSIC: dict[str, Any] = {
    "defaults": {
        "max_mig_instances": 1,
        "max_cpus": 8,
        "memory": "32g",
        "max_containers_per_user": 3,
        "idle_timeout": "48h",
        "priority": 10,
    },
    "groups": {"researchers": {"members": ["user1", "user2"], "max_mig_instances": 2, "memory": "64g", "priority": 50}},
    "user_overrides": {"user3": {"max_mig_instances": 3, "priority": 100, "reason": "Thesis work"}},
}


def limits_of(data: dict[str, Any], user: str = "u", at: datetime = NOW, **more: Any) -> Limits:
    return resolve(policy_of(data), user, at=at, **more)


def test_the_classic_form() -> None:
    member, stranger, third = (limits_of(CLASSIC, user) for user in ("user1", "nobody", "user3"))
    assert (member.group, member.groups) == ("researchers", ("researchers",))
    assert member.values["memory"] == Limit(64 * GIB, "group researchers")
    assert member.values["max_mig_instances"] == Limit(2, "group researchers")
    assert member.values["idle_timeout"] == Limit(172800.0, "defaults")
    assert (member["max_gpu_equivalents"], member.source("max_gpu_equivalents")) == (None, "built-in")
    assert (stranger.group, stranger["memory"], stranger["priority"]) == (None, 32 * GIB, 10)
    assert third.values["max_mig_instances"] == Limit(3, "override")
    assert third.values["priority"] == Limit(100, "override")


def test_nothing_set_means_the_built_in_values() -> None:
    limits = limits_of({"defaults": {}})
    assert tuple(limits.values) == LIMIT_KEYS
    assert {limit.source for limit in limits.values.values()} == {"built-in"}
    expected = {"max_cpus": 16.0, "memory": 32 * GIB, "memory_swap": 32 * GIB, "shm_size": 16 * GIB}
    expected |= {"pids_limit": 4096, "max_gpu_equivalents": 1.0, "max_gpu_slots_per_container": 1, "priority": 10}
    expected |= {"max_containers_per_user": 3, "gpu_hold_after_stop": 0.0}
    nothing = {"max_mig_instances", "idle_timeout", "max_runtime", "gpu_idle_timeout", "gpu_pool"}
    assert {key: limits[key] for key in expected} == expected
    assert all(limits[key] is None for key in nothing)
    assert limits.group_total_gpu == Limit(None, "built-in")


@pytest.mark.parametrize(
    ("layer", "share", "count"),
    [
        ({}, (1.0, "built-in"), (None, "built-in")),
        ({"max_mig_instances": 2}, (None, "built-in"), (2, "group g")),
        ({"max_gpu_equivalents": 2}, (2.0, "group g"), (None, "built-in")),
        ({"max_gpu_slots": 2, "max_mig_instances": None}, (2.0, "group g"), (None, "group g")),
        ({"max_gpu_equivalents": 0}, (0.0, "group g"), (None, "built-in")),
        ({"max_gpu_equivalents": None}, (None, "group g"), (None, "built-in")),
    ],
)
def test_the_two_gpu_caps(layer: dict[str, Any], share: tuple[Any, str], count: tuple[Any, str]) -> None:
    limits = limits_of({"groups": {"g": {"members": ["u"], **layer}}})
    assert (limits["max_gpu_equivalents"], limits.source("max_gpu_equivalents")) == share
    assert (limits["max_mig_instances"], limits.source("max_mig_instances")) == count


def test_whole_gpus_are_allowed_on_boxes_without_mig_unless_a_layer_decides() -> None:
    for has_mig in (True, False):
        unset = limits_of({"defaults": {}}, has_mig=has_mig)
        assert (unset["allow_full_gpu"], unset.source("allow_full_gpu")) == (not has_mig, "built-in")
        for value in (True, False):
            limits = limits_of({"defaults": {"allow_full_gpu": value}}, has_mig=has_mig)
            assert limits.values["allow_full_gpu"] == Limit(value, "defaults")


# --------------------------------------------------------------------------- keys that follow each other


def test_memory_alone_raises_swap_across_layers() -> None:
    data = {"defaults": {"memory": "8g", "memory_swap": "8g"}, "user_overrides": {"u": {"memory": "64g"}}}
    swap = limits_of(data).values["memory_swap"]
    assert (swap.value, swap.source) == (64 * GIB, "override")
    assert "raised from 8 GiB (defaults)" in swap.note
    unlimited = {"defaults": {"memory": "8g", "memory_swap": "8g"}, "user_overrides": {"u": {"memory": None}}}
    assert limits_of(unlimited)["memory_swap"] is None


def test_swap_set_above_memory_or_lowered_memory_leaves_swap_alone() -> None:
    data = {"defaults": {"memory": "8g", "memory_swap": "16g"}, "user_overrides": {"u": {"memory": "4g"}}}
    assert limits_of(data).values["memory_swap"] == Limit(16 * GIB, "defaults")


def test_a_swap_of_a_later_layer_below_memory_is_raised_not_refused() -> None:
    data = {"defaults": {"memory": "8g"}, "user_overrides": {"u": {"memory_swap": "4g"}}}
    assert limits_of(data)["memory_swap"] == 8 * GIB


@pytest.mark.parametrize("cores", [32, None])
def test_cpus_above_the_aggregate_are_clamped_with_a_note(cores: int | None) -> None:
    data = {
        "defaults": {"max_cpus": cores},
        "groups": {"g": {"members": ["u"], "aggregate": {"cpu_quota": "2400%"}}},
    }
    limit = limits_of(data).values["max_cpus"]
    assert (limit.value, limit.source) == (24.0, "defaults")
    assert "clamped" in limit.note and "group g" in limit.note


def test_aggregate_merges_per_key() -> None:
    data = {
        "defaults": {"aggregate": {"cpu_quota": "800%", "tasks_max": 100}},
        "groups": {"g": {"members": ["u"], "aggregate": {"memory_max": "96G", "tasks_max": "infinity"}}},
        "user_overrides": {"u": {"aggregate": {"gpu_limit": 3}}},
    }
    limits = limits_of(data)
    assert limits.values["aggregate.cpu_quota"] == Limit(8.0, "defaults")
    assert limits.values["aggregate.memory_max"] == Limit(96 * GIB, "group g")
    assert limits.values["aggregate.tasks_max"] == Limit(None, "group g")
    assert limits.values["aggregate.gpu_limit"] == Limit(3.0, "override")


def test_mounts_add_up_and_a_later_layer_replaces_the_same_target() -> None:
    data = {
        "defaults": {"mounts": ["/srv/data:/data", "/srv/models:/models:ro"]},
        "groups": {"g": {"members": ["u"], "mounts": [{"host": "/srv/g", "target": "/data", "mode": "rw"}]}},
    }
    limit = limits_of(data).values["mounts"]
    assert limit.value == (Mount("/srv/g", "/data", read_only=False), Mount("/srv/models", "/models"))
    assert limit.source == "group g"


@pytest.mark.parametrize(
    ("pool", "expected"), [(None, None), ("all", None), ([0, "GPU-1"], ("0", "GPU-1")), ([], ()), (3, ("3",))]
)
def test_gpu_pool(pool: Any, expected: Any) -> None:
    assert limits_of({"defaults": {"gpu_pool": pool}})["gpu_pool"] == expected


def test_group_total() -> None:
    data = {"groups": {"class": {"members": ["u"], "group_total": {"max_gpu_slots": 2}}}}
    assert limits_of(data).group_total_gpu == Limit(2.0, "group class")


def test_policies_merge_per_key_with_their_sources() -> None:
    data = {
        "defaults": {"policies": {"grace_period_m": "1h"}},
        "policies": {"sigterm_grace_s": 90, "grace_period_m": 5, "mode": "observe"},
        "groups": {"g": {"members": ["u"], "policies": {"cpu_idle_threshold": "3%"}}},
        "user_overrides": {"u": {"policies": {"mode": "enforce"}}},
    }
    policies = limits_of(data).policies
    assert policies["grace_period_m"] == Limit(60.0, "defaults")
    assert policies["sigterm_grace_s"] == Limit(90.0, "defaults")
    assert policies["cpu_idle_threshold"] == Limit(3.0, "group g")
    assert policies["mode"] == Limit("enforce", "override")
    assert policies["idle_detection_window"] == Limit(3, "built-in")
    assert "auto_stop_idle" not in policies


# --------------------------------------------------------------------------- groups


def test_the_highest_priority_wins_and_the_file_order_breaks_ties() -> None:
    groups = {
        "low": {"members": ["u", "v"], "priority": 1},
        "first": {"members": ["u"], "priority": 50},
        "second": {"members": ["u", "v"], "priority": 50},
    }
    tied, clear = (limits_of({"groups": groups}, user) for user in ("u", "v"))
    assert tied.groups == ("first", "second", "low")
    assert tied.group == "first" and "same priority" in tied.notes[0]
    assert (clear.group, clear.notes) == ("second", ())


def test_priority_of_a_group_without_one_is_that_of_defaults() -> None:
    groups = {"a": {"members": ["u"], "priority": 20}, "b": {"members": ["u"]}}
    assert limits_of({"defaults": {"priority": 30}, "groups": groups}).group == "b"
    assert limits_of({"groups": groups}).group == "a"


def test_an_override_changes_neither_group_nor_its_other_values() -> None:
    data = {
        "groups": {"a": {"members": ["u"], "memory": "8g"}, "b": {"members": ["u"], "priority": 5, "memory": "1g"}},
        "user_overrides": {"u": {"priority": 0, "pids_limit": 7}},
    }
    limits = limits_of(data)
    assert (limits.group, limits["memory"], limits["priority"], limits["pids_limit"]) == ("a", 8 * GIB, 0, 7)


def test_hub_and_unix_groups_name_people() -> None:
    data = {"groups": {"g": {"hub_groups": ["lab"], "unix_groups": ["staff"]}}}
    assert limits_of(data).group is None
    assert limits_of(data, hub_groups=["lab", "x"]).group == "g"
    assert limits_of(data, unix_groups=["staff"]).group == "g"
    assert limits_of(data, hub_groups=["staff"], unix_groups=["lab"]).group is None
    assert limits_of(data, hub_groups=["g"]).group is None, "a Hub group gives nothing by having the same name"
    assert limits_of(data, member_of=["g"]).group == "g"


@pytest.mark.parametrize("user", ["U", "u ", "u@x", "ü", "007x", "7"])
def test_names_match_exactly(user: str) -> None:
    data = {"groups": {"g": {"members": ["u", "007", "u@X", "ü"]}}}
    assert limits_of(data, user).group == (None if user != "ü" else "g")


def test_who_may_log_in() -> None:
    closed = policy_of({"groups": {"g": {"members": ["u"], "hub_groups": ["h"], "unix_groups": ["x"]}}})
    assert may_log_in(closed, "u") and may_log_in(closed, "v", hub_groups=["h"])
    assert may_log_in(closed, "v", unix_groups=["x"])
    assert not may_log_in(closed, "v") and not may_log_in(closed, "U")
    assert not may_log_in(policy_of(CLASSIC), "user3"), "an override names a user, a group does not"
    assert may_log_in(policy_of({"default_group": "g", "groups": {"g": {}}}), "anybody")


# --------------------------------------------------------------------------- time


def test_the_last_day_counts_in_utc() -> None:
    data = {"user_overrides": {"u": {"pids_limit": 9, "until": "2026-11-30"}}}
    end = datetime(2026, 12, 1, tzinfo=timezone.utc)
    for moment, value in ((end - timedelta(seconds=1), 9), (end, 4096), (end + timedelta(days=400), 4096)):
        assert limits_of(data, at=moment)["pids_limit"] == value
    assert "ended on 2026-11-30" in limits_of(data, at=end).notes[0]
    east = timezone(timedelta(hours=13))
    assert limits_of(data, at=datetime(2026, 12, 1, 5, tzinfo=east))["pids_limit"] == 9, "still November in UTC"
    with pytest.raises(ValueError, match="aware"):
        limits_of(data, at=datetime(2026, 12, 1))  # noqa: DTZ001


def grant(**more: Any) -> dict[str, Any]:
    return {"user": "u", "until": "2027-06-30", "by": "otto", "reason": "demo", **more}


def test_grants_add_or_replace_in_the_order_of_the_file() -> None:
    data = {
        "defaults": {"max_gpu_equivalents": 2, "memory": "8g"},
        "grants": [
            grant(max_gpu_equivalents="+1.0", memory="64g", until="2027-02-01"),
            grant(max_gpu_equivalents="+1.0"),
            grant(user="v", max_gpu_equivalents="+5"),
            grant(max_containers_per_user="+2", until="2026-12-31"),
        ],
    }
    limits = limits_of(data)
    assert limits.values["max_gpu_equivalents"] == Limit(4.0, "grant until 2027-06-30", "3 + 1")
    assert limits.values["memory"] == Limit(64 * GIB, "grant until 2027-02-01")
    assert limits["memory_swap"] == 64 * GIB
    assert limits["max_containers_per_user"] == 3
    assert "max_containers_per_user ended on 2026-12-31" in limits.notes[0]


def test_an_unquoted_plus_adds_as_well() -> None:
    text = "grants:\n  - {user: u, max_containers_per_user: +2, until: 2027-06-30, by: a, reason: b}\n"
    policy = policy_from_text(json.dumps({LIMITS: text}))
    assert resolve(policy, "u", at=NOW)["max_containers_per_user"] == 5


def test_a_grant_for_a_group_goes_to_those_whose_limits_come_from_it() -> None:
    groups = {"a": {"members": ["u"], "priority": 9}, "b": {"members": ["u", "v"]}}
    data = {"groups": groups, "grants": [grant(user=None, group="b", max_runtime_h="+2", aggregate={"tasks_max": 5})]}
    for entry in data["grants"]:
        del entry["user"]
    data["defaults"] = {"max_runtime": "1h"}
    assert limits_of(data, "u")["max_runtime"] == 3 * 3600, "priority 10 of b is above 9"
    groups["a"]["priority"] = 11
    assert limits_of(data, "u")["max_runtime"] == 3600
    assert (limits_of(data, "v")["max_runtime"], limits_of(data, "v")["aggregate.tasks_max"]) == (3 * 3600, 5)


def test_a_grant_adds_nothing_to_no_limit_and_can_lift_one() -> None:
    data = {"defaults": {"max_gpu_equivalents": None}, "grants": [grant(max_gpu_equivalents="+1", memory=None)]}
    limits = limits_of(data)
    assert limits.values["max_gpu_equivalents"] == Limit(None, "defaults")
    assert limits.values["memory"].value is None
    assert "which has no limit" in limits.notes[0]


def test_a_granted_share_is_not_stopped_by_the_aggregate_below() -> None:
    data = {
        "defaults": {"max_gpu_equivalents": 2, "aggregate": {"gpu_limit": 2}},
        "grants": [grant(max_gpu_equivalents="+1")],
    }
    limit = limits_of(data).values["aggregate.gpu_limit"]
    assert (limit.value, limit.source) == (3.0, "grant until 2027-06-30") and "raised from 2" in limit.note


def test_a_granted_count_lifts_the_built_in_share_as_a_layer_would() -> None:
    limits = limits_of({"defaults": {}, "grants": [grant(max_mig_instances=2)]})
    assert (limits["max_gpu_equivalents"], limits["max_mig_instances"]) == (None, 2)
    nothing = limits_of({"defaults": {}, "grants": [grant(max_mig_instances="+2")]})
    assert (nothing["max_gpu_equivalents"], nothing["max_mig_instances"]) == (1.0, None)


def test_a_granted_swap_adds_to_the_swap_that_memory_gives() -> None:
    limits = limits_of({"defaults": {"memory": "8g"}, "grants": [grant(memory_swap="+8g")]})
    assert (limits["memory"], limits["memory_swap"]) == (8 * GIB, 16 * GIB)


# --------------------------------------------------------------------------- profiles


def test_profiles_are_offered_to_their_groups() -> None:
    def profile(name: str, groups: list[str] | None = None) -> Profile:
        return Profile.model_validate({"name": name, "image": "i", "sizes": {"s": {}}, "groups": groups})

    policy = policy_of({"groups": {"a": {"members": ["u"], "priority": 20}, "b": {"members": ["u"]}, "c": {}}})
    profiles = {
        p.name: p for p in (profile("all"), profile("of-a", ["a"]), profile("of-b", ["b"]), profile("c", ["c"]))
    }
    policy = replace(policy, profiles=profiles)
    offered = offered_profiles(policy, resolve(policy, "u", at=NOW))
    assert [p.name for p in offered] == ["all", "of-a", "of-b"]
    assert [p.name for p in offered_profiles(policy, resolve(policy, "x", at=NOW))] == ["all"]


# --------------------------------------------------------------------------- properties of merging

KEYS = {
    "pids_limit": st.none() | st.integers(1, 10**6),
    "max_containers_per_user": st.none() | st.integers(0, 100),
    "max_mig_instances": st.none() | st.integers(0, 100),
    "max_gpu_slots_per_container": st.none() | st.integers(0, 100),
    "shm_size": st.none() | st.integers(0, 2**40),
    "max_runtime": st.none() | st.integers(0, 10**6),
    "allow_full_gpu": st.booleans(),
}
layers = st.fixed_dictionaries({}, optional=KEYS)


@given(layers, layers, layers, st.booleans())
def test_every_key_comes_from_the_highest_layer_that_sets_it(
    defaults: dict[str, Any], group: dict[str, Any], override: dict[str, Any], in_force: bool
) -> None:
    until = "2027-12-31" if in_force else "2026-12-31"
    data = {
        "defaults": defaults,
        "groups": {"g": {"members": ["u"], **group}},
        "user_overrides": {"u": {**override, "until": until}},
    }
    limits = limits_of(data)
    stack = [("override", override if in_force else {}), ("group g", group), ("defaults", defaults)]
    for key in KEYS:
        expected = next(((layer[key], source) for source, layer in stack if key in layer), None)
        if expected is None:
            assert limits.source(key) == "built-in"
        else:
            assert (limits[key], limits.source(key)) == expected
            assert type(limits[key]) is not bool or key == "allow_full_gpu"
    assert limits.group == "g"


@given(st.permutations(["a", "b", "c", "d"]), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_the_group_is_the_first_of_the_highest_priority(order: list[str], priorities: list[int]) -> None:
    by_name = dict(zip(order, priorities, strict=True))
    data = {"groups": {name: {"members": ["u"], "priority": by_name[name]} for name in order}}
    # Dumping sorts keys, so the order of the file is the alphabetical one.
    expected = min(sorted(by_name), key=lambda name: -by_name[name])
    limits = limits_of(data)
    assert limits.group == expected
    assert sorted(limits.groups) == sorted(order)
    assert bool(limits.notes) == (list(by_name.values()).count(by_name[expected]) > 1)


@given(
    st.integers(1, 64), st.none() | st.integers(1, 64), st.none() | st.integers(1, 64), st.none() | st.integers(1, 64)
)
def test_swap_is_never_below_memory(low: int, swap: int | None, high: int | None, top: int | None) -> None:
    defaults = {"memory": f"{low}g"} | ({"memory_swap": f"{max(low, swap)}g"} if swap else {})
    override = ({"memory": f"{high}g"} if high else {}) | ({"memory_swap": f"{max(high or 0, top)}g"} if top else {})
    limits = limits_of({"defaults": defaults, "user_overrides": {"u": override}})
    assert limits["memory_swap"] >= limits["memory"]
