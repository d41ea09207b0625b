"""The vectors' section `slice_user`: name parts of cgroup parents, by systemd's escaping."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ds01spawner.containers.slices import NO_GROUP, cgroup_path, escape, slice_name
from ds01spawner.errors import Code, Refusal

FOLDER = Path(os.environ.get("DS01_VECTORS") or Path(__file__).parent / "vectors")
CASES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "policy.yaml").read_text())["slice_user"]

names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_vector_slice_user(case: dict[str, Any]) -> None:
    given_name, expected = case["input"], case["expect"]
    if expected == "error":
        with pytest.raises(Refusal) as caught:
            escape(given_name)
        assert caught.value.code is Code.BAD_NAME
    elif expected == "distinct":
        assert len({escape(name) for name in given_name}) == len(given_name)
        assert len({cgroup_path("ds01", "g", name) for name in given_name}) == len(given_name)
    else:
        assert escape(given_name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".", r"\x2e"),
        ("..", r"\x2e."),
        (".hidden", r"\x2ehidden"),
        ("a.b", "a.b"),
        ("a\\b", r"a\x5cb"),
        ("a b", r"a\x20b"),
        ("ü", r"\xc3\xbc"),
        ("x:y_z", "x:y_z"),
        ("\n", r"\x0a"),
    ],
)
def test_escape_is_systemds(name: str, expected: str) -> None:
    assert escape(name) == expected


@pytest.mark.parametrize("name", ["", "a/b", "/", "a\0b", "\udcff"])
def test_escape_refuses_what_cannot_be_one_part(name: str) -> None:
    with pytest.raises(Refusal, match="cannot name a cgroup parent"):
        escape(name)


@pytest.mark.skipif(shutil.which("systemd-escape") is None, reason="no systemd-escape to compare with")
def test_escape_equals_the_real_tool() -> None:
    samples = ["a-b", "j.roe@uni.example", "..", ".x", "ü-ö", "a b\tc", "\\x2d", "70123@x", "a:b_c", "日本", "~", "%n"]
    real = subprocess.run(["systemd-escape", "--", *samples], capture_output=True, text=True, check=True)
    assert [escape(sample) for sample in samples] == real.stdout.rstrip("\n").split(" ")


@given(names, names)
def test_different_names_never_share_or_nest(one: str, two: str) -> None:
    if one == two:
        return
    first, second = escape(one), escape(two)
    assert first != second
    assert "-" not in first
    assert "/" not in first
    assert first not in (".", "..")
    assert cgroup_path("ds01", one, "u") != cgroup_path("ds01", two, "u")
    assert slice_name("ds01", one, two) != slice_name("ds01", two, one)
    assert slice_name("ds01", one, two).count("-") == 2


@given(names)
def test_no_group_can_be_named_like_no_group(name: str) -> None:
    assert escape(name) != NO_GROUP
    assert cgroup_path("ds01", name, "u") != cgroup_path("ds01", None, "u")
    assert slice_name("ds01", name, "u") != slice_name("ds01", None, "u")


@pytest.mark.parametrize(
    "name",
    ["tasks", "cpu.max", "memory.max", "cgroup.procs", "pids.max", "notify_on_release", "release_agent", "io.stat",
     "cpuset.cpus", "hugetlb.2MB.max", "cpu.cfs_quota_us", "f" * 64],
)  # fmt: skip
def test_path_never_collides_with_a_kernel_file_or_a_container_id(name: str) -> None:
    last = cgroup_path("ds01", "g", name).rsplit("/", 1)[1]
    assert last.startswith("\\x")
    assert last[4:] == name[1:]
    assert cgroup_path("ds01", name, "u").split("/")[2] == last


@pytest.mark.parametrize("name", ["cpus", "tasks2", "cpu", "memory", "f" * 63])
def test_path_leaves_other_names_alone(name: str) -> None:
    assert cgroup_path("ds01", "g", name) == f"/ds01/g/{name}"


def test_names_as_the_drivers_take_them() -> None:
    assert cgroup_path("ds01", "phd-student", "a.b@c") == r"/ds01/phd\x2dstudent/a.b\x40c"
    assert slice_name("ds01", "phd-student", "a.b@c") == r"ds01-phd\x2dstudent-a.b\x40c.slice"
    assert slice_name("ds01", None, "alice") == r"ds01-\x6eo_group-alice.slice"
    assert slice_name("ds01", "g") == "ds01-g.slice"


def test_too_long_names_are_refused_not_cut() -> None:
    assert len(cgroup_path("ds01", "g", "ü" * 31)) > 0
    with pytest.raises(Refusal, match="255 fit"):
        cgroup_path("ds01", "g", "ü" * 32)
    with pytest.raises(Refusal, match="255 fit"):
        slice_name("ds01", "g" * 200, "u" * 50)
