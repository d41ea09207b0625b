"""One parser for every door: what is accepted, and that nothing hostile is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from form_scene import GIB, profiles
from hypothesis import given
from hypothesis import strategies as st

from ds01spawner.errors import Code, Refusal
from ds01spawner.form.choice import choose
from ds01spawner.form.request import SpawnRequest, options_from_form, options_from_query
from ds01spawner.form.view import exact_size
from ds01spawner.model import GpuAsk, GpuKind, Request


def parse(options: Any) -> Request:
    return SpawnRequest.parse(options, server_name="lab", door="rest")


def refused(options: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse(options)
    assert caught.value.code is Code.BAD_REQUEST
    return caught.value


@pytest.mark.parametrize(
    "options", [None, {}, {"__jupyterhub_x": {"a": 1}}, {"profile": None, "gpus": None, "image": None}]
)
def test_nothing_asked_is_the_default_request(options: Any) -> None:
    assert parse(options) == Request(server_name="lab", door="rest")


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"profile": "pytorch"}, "profile", "pytorch"),
        ({"profile": ["pytorch"]}, "profile", "pytorch"),
        ({"size": "small"}, "size", "small"),
        ({"image": "lab/rstudio:4"}, "image", "lab/rstudio:4"),
        ({"image": "ds01-70001/lab._.70001:2"}, "image", "ds01-70001/lab._.70001:2"),
        ({"image": "aimehub/pytorch@sha256:" + "a" * 64}, "image", "aimehub/pytorch@sha256:" + "a" * 64),
        ({"cpus": 0.5}, "cpus", 0.5),
        ({"cpus": "2"}, "cpus", 2.0),
        ({"cpus": 4}, "cpus", 4.0),
        ({"memory": "16g"}, "memory", 16 * GIB),
        ({"memory": "16 GiB"}, "memory", 16 * GIB),
        ({"memory": ["512m"]}, "memory", 512 * 2**20),
        ({"memory": 2**30}, "memory", 2**30),
        ({"project": "thesis"}, "project", "thesis"),
        ({"project": "thesis/run_1.2"}, "project", "thesis/run_1.2"),
    ],
)
def test_plain_values_are_read(options: dict[str, Any], field: str, value: object) -> None:
    assert getattr(parse(options), field) == value


@pytest.mark.parametrize(
    ("options", "ask"),
    [
        ({"gpus": 0}, GpuAsk()),
        ({"gpus": "0"}, GpuAsk()),
        ({"gpu_kind": "none"}, GpuAsk()),
        ({"gpus": 2}, GpuAsk(2, GpuKind.ANY)),
        ({"gpus": ["2"]}, GpuAsk(2, GpuKind.ANY)),
        ({"gpu_kind": "full"}, GpuAsk(1, GpuKind.FULL)),
        ({"mig_profile": "1g.5gb"}, GpuAsk(1, GpuKind.MIG, "1g.5gb")),
        ({"mig_profile": "1g.24gb+me.all"}, GpuAsk(1, GpuKind.MIG, "1g.24gb+me.all")),
        ({"mig_profile": "1c.3g.20gb", "gpus": 1, "gpu_kind": "mig"}, GpuAsk(1, GpuKind.MIG, "1c.3g.20gb")),
    ],
)
def test_the_gpu_part_is_read(options: dict[str, Any], ask: GpuAsk) -> None:
    assert parse(options).gpu == ask


HOSTILE_NUMBERS = [
    -1,
    65,
    10**9,
    10**400,
    1.0,
    1.5,
    float("nan"),
    float("inf"),
    True,
    False,
    "all",
    "-1",
    "1.0",
    "1e3",
    "",
    " 1",
    "+1",
    "１",
    "٣",
    "0x1",
    "1\n",
    "1\x00",
    {},
    {"a": 1},
    [],
    [1, 2],
    ["1", "2"],
    [[1]],
    b"1",
]
HOSTILE_TEXTS = [
    "",
    " ",
    "x" * 10_000,
    "a\x00b",
    "a\nb",
    "a\n",
    "ａbc",
    "раskage",
    "<script>alert(1)</script>",
    "a b",
    "'",
    '"',
    "../../etc",
    "..",
    "/etc",
    "-rf",
    "--privileged",
    "$(id)",
    "a;b",
    "%2e%2e",
    "a\\b",
    5,
    1.5,
    True,
    {},
    {"a": "b"},
    ["a", "b"],
    [["a"]],
    b"a",
]


@pytest.mark.parametrize("value", HOSTILE_NUMBERS, ids=ascii)
def test_hostile_gpu_counts_are_refused(value: Any) -> None:
    assert "gpus" in refused({"gpus": value}).message


@pytest.mark.parametrize("field", ["profile", "size", "image", "mig_profile", "gpu_kind", "project"])
@pytest.mark.parametrize("value", HOSTILE_TEXTS, ids=lambda value: ascii(value)[:20])
def test_hostile_texts_are_refused(field: str, value: Any) -> None:
    refusal = refused({field: value})
    assert field in refusal.message
    assert refusal.message.isprintable()
    assert len(refusal.message) < 250


@pytest.mark.parametrize(
    "value",
    [0, -1, 0.0, 5000, float("nan"), float("inf"), True, "all", "-1", "1e3", "", "8%", "٣", {}, [], "1" * 99, b"1"],
    ids=ascii,
)
def test_hostile_cores_are_refused(value: Any) -> None:
    assert "cpus" in refused({"cpus": value}).message


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        32,
        "32",
        "unlimited",
        "never",
        "null",
        "-16g",
        "16gg",
        "1e9g",
        "016g",
        "0g",
        "1.5",
        1.5e10,
        True,
        "9999999t",
        "16g\n",
        "١٦g",
        "",
        {},
        [],
        "1" * 99,
        2**60,
    ],
    ids=ascii,
)
def test_hostile_memory_is_refused(value: Any) -> None:
    assert "memory" in refused({"memory": value}).message


@pytest.mark.parametrize(
    "value",
    ["a/../b", "a//b", "a/", "/a", "./a", ".ssh", "a/.git", "a/-rf", "~", "a\\b", "a:b", "a,b", "C:", "a" * 300],
)
def test_project_folders_stay_below_the_workspace(value: str) -> None:
    assert "project" in refused({"project": value}).message


@pytest.mark.parametrize(
    "options",
    [
        {"gpu_kind": "none", "gpus": 1},
        {"gpu_kind": "none", "mig_profile": "1g.5gb"},
        {"gpu_kind": "full", "mig_profile": "1g.5gb"},
        {"gpus": 0, "mig_profile": "1g.5gb"},
        {"gpus": 0, "gpu_kind": "full"},
    ],
)
def test_contradictions_are_refused(options: dict[str, Any]) -> None:
    assert "contradict" in refused(options).message


def test_unknown_fields_are_refused_with_a_hint() -> None:
    assert "did you mean memory?" in refused({"memroy": "4g"}).message
    assert "known fields: profile" in refused({"volumes": ["/:/host"]}).message
    assert "__jupyterhub" not in refused({"x": 1, "__jupyterhub_a": 2}).message


@pytest.mark.parametrize("options", [[], ["profile"], "profile", 5, True, b"{}", [("profile", "a")]])
def test_only_objects_are_options(options: Any) -> None:
    refused(options)


@pytest.mark.parametrize("options", [{5: "x"}, {None: 1}, {("a",): 1}, {f"k{i}": i for i in range(100_000)}])
def test_odd_keys_are_refused(options: Any) -> None:
    assert len(refused(options).message) < 250


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(list(SpawnRequest.model_fields)) | st.text(max_size=12), json_values, max_size=4)
)
def test_anything_at_all_is_a_sane_request_or_a_refusal(options: dict[str, Any]) -> None:
    try:
        request = parse(options)
    except Refusal as refusal:
        assert refusal.code is Code.BAD_REQUEST
        assert refusal.message.isprintable()
        json.dumps(refusal.as_dict())
        return
    for text in (request.profile, request.size, request.image, request.project):
        assert text is None or (text.isascii() and text.isprintable() and text[0] not in "-./ ")
    assert request.gpu is None or 0 <= request.gpu.count <= 64
    assert request.cpus is None or 0 < request.cpus <= 4096
    assert request.memory is None or 2**27 <= request.memory <= 2**50
    assert ".." not in (request.project or "").split("/")


# --------------------------------------------------------------------------- form and query


def test_the_form_becomes_options() -> None:
    form = {
        "choice": ["pytorch/small"],
        "profile": ["r"],
        "size": ["cpu"],
        "image:pytorch": ["lab/x:1"],
        "image:r": ["lab/r:2"],
        "project": [" thesis "],
        "cpus": [""],
        "memory": ["4g"],
        "_xsrf": ["2|abc"],
        "something": ["else"],
    }
    expected = {"profile": "pytorch", "size": "small", "image": "lab/x:1", "project": "thesis", "memory": "4g"}
    assert options_from_form(form) == expected


def test_the_form_without_a_card_sends_the_preselected_one() -> None:
    assert options_from_form({"profile": ["r"], "size": ["cpu"]}) == {"profile": "r", "size": "cpu"}
    assert options_from_form({"profile": ["r"], "size": ["cpu"], "choice": ["pytorch"]}) == {"profile": "pytorch"}
    assert options_from_form({"_xsrf": ["2|abc"]}) == {}


@pytest.mark.parametrize("form", [{"choice": ["a/b", "c/d"]}, {"gpus": ["1", "2"]}, {"choice": ["a/b/c"]}])
def test_a_doubtful_form_is_refused_not_guessed(form: dict[str, list[str]]) -> None:
    refused(options_from_form(form))


def test_a_link_keeps_unknown_fields_so_that_they_are_refused() -> None:
    assert parse(options_from_query({"profile": ["r"], "gpus": ["1"]})).profile == "r"
    assert parse(options_from_query({"opt-profile": ["r"]})).profile == "r", "as JupyterHub 5 hands them over"
    refused(options_from_query({"profil": ["r"]}))
    refused(options_from_query({"profile": ["r"], "opt-profile": ["pytorch"]}))
    refused(options_from_query({"gpus": ["1", "2"]}))


# --------------------------------------------------------------------------- choosing


def chosen(options: dict[str, Any]) -> tuple[str, str]:
    profile, size = choose(parse(options), profiles())
    return profile.name, next(key for key, item in profile.sizes.items() if item is size)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("pytorch", "small")),
        ({"profile": "r"}, ("r", "cpu")),
        ({"profile": "pytorch", "size": "cpu"}, ("pytorch", "cpu")),
        ({"size": "whole"}, ("pytorch", "whole")),
        ({"size": "small", "gpus": 0}, ("pytorch", "small")),
        ({"size": "small", "gpus": 1}, ("pytorch", "small")),
        ({"size": "small", "cpus": 4, "memory": "16g"}, ("pytorch", "small")),
    ],
)
def test_choose_finds_profile_and_size(options: dict[str, Any], expected: tuple[str, str]) -> None:
    assert chosen(options) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"profile": "secret"},
        {"profile": "r", "size": "small"},
        {"size": "huge"},
        {"profile": "r", "gpus": 1},
        {"size": "small", "gpus": 2},
        {"size": "small", "gpu_kind": "full"},
        {"size": "small", "mig_profile": "3g.20gb"},
        {"size": "whole", "mig_profile": "1g.5gb"},
        {"size": "small", "cpus": 5},
        {"size": "small", "memory": "17g"},
    ],
)
def test_choose_refuses_what_is_not_on_the_menu(options: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        chosen(options)
    assert caught.value.code is Code.NOT_IN_PROFILE
    json.dumps(caught.value.as_dict())


def test_choose_offers_what_there_is_instead() -> None:
    with pytest.raises(Refusal) as caught:
        chosen({"profile": "secret"})
    assert [dict(a.options) for a in caught.value.alternatives] == [{"profile": "pytorch"}, {"profile": "r"}]
    for alternative in caught.value.alternatives:
        chosen(dict(alternative.options))
    with pytest.raises(Refusal) as caught:
        choose(parse({}), ())
    assert caught.value.code is Code.NOT_IN_PROFILE


@given(st.integers(min_value=2**27, max_value=2**50))
def test_a_size_written_into_the_form_reads_back(size: int) -> None:
    assert parse({"memory": exact_size(size)}).memory == size


# --------------------------------------------------------------------------- begin anew


@pytest.mark.parametrize(
    ("value", "fresh"), [(True, True), (False, False), ("true", True), (["true"], True), (None, False)]
)
def test_fresh_is_yes_or_no(value: Any, fresh: bool) -> None:
    assert SpawnRequest.parse({"fresh": value}, server_name="", door="rest").fresh is fresh


@pytest.mark.parametrize("value", [1, 0, "yes", "True", "", [], ["true", "true"], {}])
def test_fresh_is_nothing_else(value: Any) -> None:
    with pytest.raises(Refusal) as caught:
        SpawnRequest.parse({"fresh": value}, server_name="", door="rest")
    assert caught.value.code is Code.BAD_REQUEST
    assert "fresh must be true or false" in caught.value.message


def test_the_image_selector_may_ask_for_a_fresh_start() -> None:
    sent = {"choice": ["p/s"], "image:p": ["@fresh"], "image:q": ["lab/x:1"]}
    assert options_from_form(sent) == {"profile": "p", "size": "s", "fresh": True}
    with pytest.raises(Refusal):
        SpawnRequest.parse({"image": "@fresh"}, server_name="", door="rest")
