"""Numbers as people write them in policy files: durations, sizes, cores, counts, shares; and back to text.

Base units are seconds, bytes, cores and shares. `None` stands for "no limit", written as null or as one of the
words `NO_LIMIT`. Everything else that is not a plain number with a known unit is refused with a sentence:
guessing here would turn a typo into an unlimited quota.

Rules of the grammar (checked by the shared vectors, sections durations_h, strings and sizes):

- A number is decimal, with a point, without sign, without digit groups and without leading zeros. YAML 1.1 and
  1.2 disagree about `010`, `1_000` and `1:30`, so none of them is read at all. `1e3` is 1000 for both.
- Blanks around number and unit, and upper or lower case, do not matter.
- 0 is zero, never "no limit". true and false are no numbers.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

NO_LIMIT = frozenset({"null", "unlimited", "never", "indefinite"})
"""Words for "no limit", in any case."""

MAX_DURATION = 36525 * 86400
"""Longest duration in seconds (100 years): anything longer is a slip, or `never`."""

MAX_SIZE = 2**63 - 1
"""Largest size in bytes: what Docker's API and the kernel take."""

MAX_NUMBER = 10**9
"""Largest count, share or number of cores."""

_SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
_DIGITS = r"(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(_DIGITS + r"(?:[eE][+]?-?[0-9]{1,3})?")
_PART = re.compile(rf"({_DIGITS})\s*([wdhms])\s*")
_SIZE = re.compile(rf"({_DIGITS})\s*(?:([kmgt])(?:i?b)?|b)")
_PERCENT = re.compile(rf"({_DIGITS})\s*%")
_BYTES = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_duration(value: object, *, hours: bool = False) -> float | None:
    """Seconds of a duration.

    Args:
        value: a number, or text such as `90`, `1.5h`, `1d 12h` (largest unit first, each unit once), or no limit.
        hours: a bare number is hours (keys that end in `_h`) instead of seconds.

    Returns:
        Seconds; None = no limit.

    Raises:
        ValueError: a sentence that says what is wrong and what would be right.
    """
    text = _normal(value)
    if text is None:
        return None
    number = _number(text)
    seconds = _combined(text, value) if number is None else number * (3600 if hours else 1)
    if seconds > MAX_DURATION:
        raise ValueError(f"{_shown(value)} is longer than 100 years; write never for no limit")
    return float(seconds)


def parse_size(value: object) -> int | None:
    """Bytes of a size such as `32g`, `512m`, `1.5GiB` or a number of bytes; None = no limit.

    Units are k, m, g and t with or without a trailing b or ib: binary multiples, as in Docker.

    Raises:
        ValueError: a sentence that says what is wrong and what would be right.
    """
    text = _normal(value)
    if text is None:
        return None
    number = _number(text)
    if number is not None:
        if number != int(number):
            raise ValueError(f"{_shown(value)} is not a whole number of bytes; write the unit, such as {value}g")
        size = int(number)
    else:
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ValueError(f"{_shown(value)} is not a size; write for example 512m, 32g or 1.5t{_comma(text)}")
        size = int(Decimal(match[1]) * _BYTES.get(match[2] or "", 1))
    if size > MAX_SIZE:
        raise ValueError(f"{_shown(value)} is more than any machine has; write unlimited for no limit")
    return size


def parse_cores(value: object) -> float | None:
    """CPU cores from a number, or from systemd's percentage (`2400%` = 24 cores); None = no limit.

    Raises:
        ValueError: a sentence that says what is wrong and what would be right.
    """
    text = _normal(value)
    if text is None:
        return None
    percent = _PERCENT.fullmatch(text)
    if percent is not None:
        return parse_number(str(Decimal(percent[1]) / 100))
    return parse_number(value)


def parse_number(value: object) -> float | None:
    """A number that is not negative (a numeric string is one, a bool is none); None = no limit.

    Raises:
        ValueError: a sentence that says what is wrong and what would be right.
    """
    text = _normal(value)
    if text is None:
        return None
    number = _number(text)
    if number is None:
        raise ValueError(f"{_shown(value)} is not a number; write for example 2 or 0.5{_comma(text)}")
    if number > MAX_NUMBER:
        raise ValueError(f"{_shown(value)} is too large; write unlimited for no limit")
    return float(number)


def parse_count(value: object) -> int | None:
    """A whole number that is not negative; None = no limit.

    Raises:
        ValueError: a sentence that says what is wrong and what would be right.
    """
    number = parse_number(value)
    if number is None:
        return None
    if number != int(number):
        raise ValueError(f"{_shown(value)} is not a whole number")
    return int(number)


def format_duration(seconds: float | None) -> str:
    """Seconds as text for people: the two largest units that are not zero (`1d 1h`); "no limit" for None.

    The text reads back with `parse_duration`. Parts of a second are shown below one minute only.

    Raises:
        ValueError: `seconds` is negative or not finite.
    """
    if seconds is None:
        return "no limit"
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{seconds} is not a duration")
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    rest = int(seconds)
    parts: list[str] = []
    for unit, size in _SECONDS.items():
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])


def format_size(size: int | None) -> str:
    """Bytes as text for people (`64 GiB`, `1.5 GiB`, `512 B`); "no limit" for None.

    Raises:
        ValueError: `size` is negative.
    """
    if size is None:
        return "no limit"
    if size < 0:
        raise ValueError(f"{size} is not a size")
    amount, unit = float(size), "B"
    for name in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, name
    return f"{amount:.2f}".rstrip("0").rstrip(".") + f" {unit}"


def format_number(number: float | None) -> str:
    """A count, share or number of cores as text for people: at most three decimals; "no limit" for None."""
    if number is None:
        return "no limit"
    return f"{number:.3f}".rstrip("0").rstrip(".") if number % 1 else str(int(number))


def _normal(value: object) -> str | None:
    """`value` as trimmed lower-case text; None for no limit. Refuses what can be no quantity at all."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, str)):
        raise ValueError(f"{_shown(value)} is not a number")
    if isinstance(value, (float, Decimal)) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number; write unlimited for no limit")
    text = str(value).strip().lower()
    if text in NO_LIMIT:
        return None
    if not text:
        raise ValueError("an empty text is not a value; write null for no limit")
    if text.startswith("-"):
        raise ValueError(f"{_shown(value)} is negative; write null for no limit and 0 for none at all")
    if re.fullmatch(r"\+?\.?(?:inf(?:inity)?|nan)", text):
        raise ValueError(f"{_shown(value)} is not a finite number; write unlimited for no limit")
    return text


def _number(text: str) -> Decimal | None:
    """The number that `text` is, or None where it is not a plain number."""
    if _NUMBER.fullmatch(text) is None:
        return None
    return Decimal(text)


def _combined(text: str, value: object) -> Decimal:
    """Seconds of number-unit pairs, largest unit first."""
    seconds, smallest, position = Decimal(0), MAX_DURATION, 0
    while position < len(text):
        match = _PART.match(text, position)
        if match is None:
            raise ValueError(
                f"{_shown(value)} is not a duration; write for example 90s, 1.5h, 1d 12h, 2w or never{_comma(text)}"
            )
        unit = _SECONDS[match[2]]
        if unit >= smallest:
            raise ValueError(f"{_shown(value)}: write the largest unit first and each unit once, such as 1d 12h")
        seconds, smallest, position = seconds + Decimal(match[1]) * unit, unit, match.end()
    return seconds


def _comma(text: str) -> str:
    return " (with a decimal point, not a comma)" if re.search(r"[0-9],[0-9]", text) else ""


def _shown(value: object) -> str:
    """`value` for an error sentence, cut so that a pasted file does not fill the terminal."""
    text = value if isinstance(value, str) else repr(value)
    return f'"{text[:60]}…"' if len(text) > 60 else f'"{text}"'
