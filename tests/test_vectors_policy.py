"""Every case of the shared vectors about policy, limits, durations and sizes (the contract of these rules)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from vectors_support import case_params, document, fixture_policy, fixture_time, noon, policy_of

from ds01spawner.policy.fields import canonical_values
from ds01spawner.policy.layers import Layer
from ds01spawner.policy.load import LIMITS, policy_from_text
from ds01spawner.policy.quantity import format_duration, parse_duration, parse_number, parse_size
from ds01spawner.policy.resolve import resolve

DOCUMENT = document()
POLICY = fixture_policy(DOCUMENT)
NOW = fixture_time(DOCUMENT)
SIZES = {"memory", "memory_swap", "shm_size", "max_container_disk", "memory_max", "memory_high"}
DURATIONS = {
    "max_runtime",
    "idle_timeout",
    "gpu_idle_timeout",
    "unknown_gpu_idle_timeout",
    "gpu_hold_after_stop",
    "container_hold_after_stop",
}


def base_units(key: str, value: Any) -> Any:
    """An expected value, written as in a policy file, in base units."""
    name = key.removeprefix("aggregate.")
    if name.removesuffix("_h") in DURATIONS:
        return parse_duration(value, hours=name.endswith("_h"))
    if name in SIZES:
        return parse_size(value)
    if name == "cpu_quota" and isinstance(value, str):
        return float(value.rstrip("%")) / 100
    return value


def same(got: Any, expected: Any) -> bool:
    """Equal, with floats within 1e-6, and never a bool for a number."""
    if isinstance(got, bool) or isinstance(expected, bool) or got is None or expected is None:
        return got is expected
    if isinstance(got, (int, float)) and isinstance(expected, (int, float)):
        return abs(got - expected) < 1e-6
    return bool(got == expected)


def value_of(limits: Any, key: str) -> Any:
    """The resolved value of a key as the vectors name it."""
    canonical = key.removesuffix("_h")
    return limits[canonical if canonical in limits.values else key]


@pytest.mark.parametrize(("case", "expect"), case_params("limits"))
def test_vector_limits(case: dict[str, Any], expect: Any) -> None:
    limits = resolve(POLICY, case["user"], at=NOW)
    assert same(value_of(limits, case["key"]), base_units(case["key"], expect))


@pytest.mark.parametrize(("case", "expect"), case_params("at"))
def test_vector_at(case: dict[str, Any], expect: Any) -> None:
    limits = resolve(POLICY, case["user"], at=noon(case["day"]))
    assert same(value_of(limits, case["key"]), base_units(case["key"], expect))


@pytest.mark.parametrize(("case", "expect"), case_params("group"))
def test_vector_group(case: dict[str, Any], expect: Any) -> None:
    assert resolve(POLICY, case["user"], at=NOW).group == expect


@pytest.mark.parametrize(("case", "expect"), case_params("aggregate"))
def test_vector_aggregate(case: dict[str, Any], expect: Any) -> None:
    limits = resolve(POLICY, case["user"], at=NOW)
    assert same(limits[f"aggregate.{case['key']}"], base_units(case["key"], expect))


@pytest.mark.parametrize(("case", "expect"), case_params("policies"))
def test_vector_policies(case: dict[str, Any], expect: Any) -> None:
    assert same(resolve(POLICY, case["user"], at=NOW).policies[case["key"]].value, expect)


@pytest.mark.parametrize(("case", "expect"), case_params("gpu_quota"))
def test_vector_gpu_quota(case: dict[str, Any], expect: Any) -> None:
    document = {"defaults": case}
    if expect == "error":
        with pytest.raises(Exception, match="policy is not valid"):
            policy_of(document)
        return
    layer = canonical_values(policy_of(document).limits.defaults)
    for key, expected in expect.items():
        if expected == "unset":
            assert key not in layer
        else:
            assert same(layer[key], expected)


def read_key(key: str, value: Any) -> Any:
    """A value through a whole file: YAML text → schema → canonical value. "error" where the file is refused."""
    text = yaml.safe_dump({"defaults": {key: value}})
    try:
        policy = policy_from_text(json.dumps({LIMITS: text}))
    except Exception as error:
        assert f"{LIMITS}:" in str(error)
        return "error"
    return canonical_values(policy.limits.defaults)[key.removesuffix("_h")]


def check_value(parse: Any, key: str, value: Any, expect: Any) -> None:
    """The parser alone and the whole file give the same answer."""
    assert same(read_key(key, value), expect)
    if expect == "error":
        with pytest.raises(ValueError, match=r"\w"):
            parse(value)
    else:
        assert same(parse(value), expect)


@pytest.mark.parametrize(("value", "expect"), case_params("durations_h"))
def test_vector_durations_h(value: Any, expect: Any) -> None:
    check_value(lambda given: parse_duration(given, hours=True), "idle_timeout_h", value, expect)


@pytest.mark.parametrize(("value", "expect"), case_params("strings"))
def test_vector_strings(value: Any, expect: Any) -> None:
    check_value(parse_duration, "idle_timeout", value, expect)


@pytest.mark.parametrize(("value", "expect"), case_params("sizes"))
def test_vector_sizes(value: Any, expect: Any) -> None:
    check_value(parse_size, "max_container_disk", value, expect)


@pytest.mark.parametrize(("case", "expect"), case_params("duration_keys"))
def test_vector_duration_keys(case: dict[str, Any], expect: Any) -> None:
    if expect == "error":
        with pytest.raises(Exception, match="policy is not valid"):
            policy_of({"defaults": case})
        return
    values = canonical_values(policy_of({"defaults": case}).limits.defaults)
    assert set(values) <= {key.removesuffix("_h") for key in case} <= set(Layer.model_fields)
    for key in values:
        assert same(values[key], expect)


@pytest.mark.parametrize(("seconds", "expect"), case_params("format"))
def test_vector_format(seconds: Any, expect: str) -> None:
    text = format_duration(seconds)
    assert text == expect
    if seconds is not None and seconds < 60:
        assert parse_number(text.rstrip("s")) == seconds
