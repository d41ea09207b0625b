"""Numbers as people write them: what is read, what is refused, and that text reads back."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds01spawner.policy.quantity import (
    format_duration,
    format_number,
    format_size,
    parse_cores,
    parse_count,
    parse_duration,
    parse_number,
    parse_size,
)

SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
PARSERS = (parse_duration, parse_size, parse_cores, parse_number, parse_count)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1w 2d", 777600),
        ("1h30m", 5400),
        (" 2 H ", 7200),
        ("1d12h", 129600),
        ("1 d 12 h", 129600),
        ("1.5h", 5400),
        (".5h", 1800),
        ("90", 90),
        ("1e3", 1000),
        ("0h", 0),
        ("0", 0),
        ("1d 0h 5m", 86700),
    ],
)
def test_durations_that_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "90m30",
        "30m1h",
        "1h1h",
        "1,5h",
        "soon",
        "",
        " ",
        "h",
        "1 2h",
        "-5m",
        "+5m",
        "5 fortnights",
        "2 hours",
        "1h-30m",
        "1_000",
        "0x10",
        "007",
        "1:30",
        "inf",
        "nan",
        ".inf",
        "infinity",
        "1e400",
        "200000w",
        "٣h",  # an Arabic digit
        "1h" * 500,
    ],
)
def test_durations_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_duration(text)


@pytest.mark.parametrize("word", ["null", "unlimited", "never", "indefinite", "NEVER", " Unlimited ", None])
def test_words_for_no_limit(word: str | None) -> None:
    assert [parse(word) for parse in PARSERS] == [None] * len(PARSERS)


@pytest.mark.parametrize(
    "value",
    [True, False, math.nan, math.inf, -math.inf, Decimal("NaN"), -1, -0.5, "-1", "true", "no", [], {}, b"1", object()],
    ids=repr,
)
def test_what_is_no_number_anywhere(value: object) -> None:
    for parse in PARSERS:
        with pytest.raises(ValueError, match=r"\w"):
            parse(value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("32g", 32 << 30),
        ("32G", 32 << 30),
        ("32 GB", 32 << 30),
        ("32gib", 32 << 30),
        ("1.5t", 3 << 39),
        ("512b", 512),
        ("0", 0),
        ("1e3", 1000),
        (1024, 1024),
        ("1.1g", 1181116006),
    ],
)
def test_sizes_that_are_read(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["lots", "1.5", 0.5, "10x", "g", "1,5g", "32 g b", "1e3g", "9e18t", "12p", "50%"])
def test_sizes_that_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_size(text)


def test_a_decimal_comma_is_explained() -> None:
    with pytest.raises(ValueError, match="not a comma"):
        parse_duration("1,5h")


def test_cores_in_percent_and_numbers() -> None:
    assert [parse_cores(value) for value in ("2400%", "50 %", 8, "0.5")] == [24.0, 0.5, 8.0, 0.5]


def test_counts_are_whole() -> None:
    assert [parse_count(value) for value in (3, "3", 2.0, "2.0")] == [3, 3, 2, 2]
    with pytest.raises(ValueError, match="whole"):
        parse_count(0.5)


@given(st.integers(0, 10**8))
def test_a_bare_number_is_seconds_or_hours(number: int) -> None:
    assert parse_duration(number) == parse_duration(str(number)) == number
    if number <= 36525 * 24:
        assert parse_duration(number, hours=True) == parse_duration(f"{number}h") == number * 3600


@given(st.lists(st.sampled_from("wdhms"), min_size=1, max_size=5), st.integers(0, 40), st.booleans())
def test_units_are_accepted_in_falling_order_only(units: list[str], count: int, blanks: bool) -> None:
    text = (" " if blanks else "").join(f"{count}{unit}" for unit in units)
    falling = all("wdhms".index(one) < "wdhms".index(two) for one, two in itertools.pairwise(units))
    if falling:
        assert parse_duration(text) == sum(count * SECONDS[unit] for unit in units) == parse_duration(text.upper())
    else:
        with pytest.raises(ValueError, match="largest unit first"):
            parse_duration(text)


@given(st.integers(0, 36525 * 86400))
def test_formatted_durations_read_back_to_two_units(seconds: int) -> None:
    text = format_duration(seconds)
    back = parse_duration(text)
    assert back is not None and len(text.split()) <= 2
    smallest = SECONDS[text[-1]]
    assert back <= seconds
    # What is lost is what did not fit into two units: less than one of the second unit.
    assert seconds - back < (smallest if len(text.split()) == 2 else 60 * 60 * 24 * 7)
    assert format_duration(back) == text


@given(st.integers(0, 2**63 - 1))
def test_a_size_in_bytes_is_exact(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == size
    assert format_size(size).split()[1] in {"B", "KiB", "MiB", "GiB", "TiB"}


@given(st.one_of(st.text(max_size=20), st.floats(), st.integers(), st.booleans(), st.none()))
def test_any_value_is_a_quantity_or_refused_with_a_sentence(value: object) -> None:
    for parse in PARSERS:
        try:
            result = parse(value)
        except ValueError as error:
            assert len(str(error)) < 250
        else:
            assert result is None or (result >= 0 and math.isfinite(result))


def test_texts_for_people() -> None:
    assert [format_duration(value) for value in (None, 0, 0.5, 59, 90000, 5400, 86400)] == [
        "no limit",
        "0s",
        "0.5s",
        "59s",
        "1d 1h",
        "1h 30m",
        "1d",
    ]
    assert [format_size(value) for value in (None, 0, 512, 64 << 30, 3 << 29)] == [
        "no limit",
        "0 B",
        "512 B",
        "64 GiB",
        "1.5 GiB",
    ]
    assert [format_number(value) for value in (None, 0.0, 2.0, 1 / 7)] == ["no limit", "0", "2", "0.143"]
    for wrong in (-1, math.inf):
        with pytest.raises(ValueError, match="not a duration"):
            format_duration(wrong)
