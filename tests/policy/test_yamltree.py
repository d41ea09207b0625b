"""YAML that keeps what was written and where, and that no file can use to hang or to run anything."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ds01spawner.policy import yamltree
from ds01spawner.policy.yamltree import Place, TreeError, parse


def errors(text: str) -> tuple[str, ...]:
    with pytest.raises(TreeError) as caught:
        parse(text, "f.yaml")
    return tuple(str(problem) for problem in caught.value.problems)


def test_scalars_stay_the_text_that_was_written() -> None:
    data = parse(
        "[007, no, 2025-01-01, 1:30, 1_000, 1e3, '~', \"null\", null, ~, , yes]".replace(", ,", ","), "f"
    ).data()
    assert data == ["007", "no", "2025-01-01", "1:30", "1_000", "1e3", "~", "null", None, None, "yes"]


def test_places_of_keys_and_values() -> None:
    tree = parse("a:\n  b: [x, y]\n  c:\n", "f")
    assert tree.place_of(("a", "b", 1)) == Place(2, 10)
    assert tree.place_of(("a", "b"), key=True) == Place(2, 3)
    assert tree.place_of(("a", "c")) == Place(3, 3), "nothing has no place: its key has"
    assert tree.place_of(("a", "zz", "deep")) == Place(2, 3), "what does not exist is where its section is"


def test_anchors_aliases_and_merge_keys() -> None:
    tree = parse("a: &x {k: 1, l: 2}\nb: {<<: *x, l: 3}\nc: {<<: [{m: 4}, *x]}\nd: *x\n'<<': plain", "f")
    data = tree.data()
    assert data["b"] == {"k": "1", "l": "3"}
    assert data["c"] == {"m": "4", "k": "1", "l": "2"}
    assert data["d"] == data["a"]
    assert data["<<"] == "plain", "in quotes it is a key like any other"


def test_a_key_written_twice_names_both_places() -> None:
    assert errors("a: 1\nb:\n  c: 1\n  c: 2\na: 2\n") == (
        'f.yaml:4:3: error: the key "c" is written twice (first written in line 3; keep one of the two)',
        'f.yaml:5:1: error: the key "a" is written twice (first written in line 1; keep one of the two)',
    )


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("", "1:1", "empty"),
        ("# only a comment\n", "1:1", "empty"),
        ("~", "1:1", "empty"),
        ("a: !!python/object/apply:os.system [echo]", "1:4", "tag"),
        ("a: !secret x", "1:4", "tag"),
        ("a: *nobody", "1:4", "not defined"),
        ("a: &a [*a]", "1:8", "stands in"),
        ("a: 1\n---\nb: 2", "2:1", "second document"),
        ("? [a, b]\n: 1", "1:3", "plain word"),
        ("~: 1", "1:1", "plain word"),
        ("a: {<<: 3}", "1:9", "mapping"),
        ("a:\n\tb: 1", "2:1", "tabs"),
        ("a: [1, 2", "", "flow"),
        ("a: 'x", "", "scalar"),
        ("a: b: c", "1:5", "not allowed"),
        ("ok: 1\nbad: \x07", "2:6", "does not allow"),
    ],
)
def test_what_is_no_policy_is_refused_with_its_place(text: str, place: str, word: str) -> None:
    (problem,) = errors(text)
    assert problem.startswith(f"f.yaml:{place}") and word in problem


def test_files_cannot_blow_up_memory_or_stack() -> None:
    started = time.monotonic()
    laughs = "a: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"b{i}: &a{i + 1} [{','.join([f'*a{i}'] * 10)}]\n" for i in range(30)
    )
    assert "repetitions by alias" in errors(laughs)[0]
    assert "nested deeper" in errors("[" * 200_000)[0]
    assert "nested deeper" in errors("{a: " * 200_000)[0]
    nested = "a0: &n0 {x: 1}\n" + "".join(f"a{i + 1}: &n{i + 1} {{x: *n{i}}}\n" for i in range(40))
    assert "nested deeper" in errors(nested)[0]
    assert "larger than" in errors("#" * (yamltree.MAX_BYTES + 1))[0]
    assert time.monotonic() - started < 5


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#,? \n\t0.~%@`<", max_size=60))
def test_every_text_is_a_tree_or_a_problem_with_a_place(text: str) -> None:
    try:
        tree = parse(text, "f")
    except TreeError as error:
        assert all(problem.file == "f" and problem.line and problem.column for problem in error.problems)
    else:
        assert all(node.place.line >= 1 for _, node in tree.walk())


plain_data = st.recursive(
    st.none() | st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcxyz", min_size=1), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text("abcxyz", min_size=1), plain_data, min_size=1, max_size=4))
def test_data_survives_a_round_trip(data: dict[str, object]) -> None:
    assert parse(yaml.safe_dump(data, allow_unicode=True), "f").data() == data


def test_python_and_c_parser_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: &x {k: 1, n: ~}\nb: [*x, 'q', no]\nc:\n"
    fast = parse(text, "f")
    monkeypatch.setattr(yamltree, "_Loader", yaml.SafeLoader)
    slow = parse(text, "f")
    assert fast.data() == slow.data()
    assert [node.place for _, node in fast.walk()] == [node.place for _, node in slow.walk()]
