"""Types of single values in policy files, and `setting`, which declares a key with what is known about it.

A value reaches these types as the text that stood in the file (or None for null): see `yamltree`. Plain Python
values are taken as well. Each type says in its JSON Schema what an editor may offer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic.fields import FieldInfo

from .quantity import NO_LIMIT, parse_cores, parse_count, parse_duration, parse_number, parse_size

_TRUE = frozenset({"true", "yes", "on"})
_FALSE = frozenset({"false", "no", "off"})
_NAME = re.compile(r"[^\s/\x00-\x1f\x7f](?:[^/\x00-\x1f\x7f]{0,253}[^\s/\x00-\x1f\x7f])?")


@dataclass(frozen=True)
class Kind:
    """Marks a type with what documents call it."""

    text: str


class Section(BaseModel):
    """A mapping of the policy files: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def setting(
    description: str,
    *,
    default: Any = None,
    factory: Callable[[], Any] | None = None,
    built_in: Any = None,
    absent: str = "",
    unit: str = "",
    alias_of: str = "",
    wins: bool = False,
    no_effect: str = "",
) -> Any:
    """Declare a key.

    Args:
        description: help text for documents and editors.
        default: the attribute's value where the key is absent. factory: makes it instead.
        built_in: what holds if no layer sets the key, in base units. absent: the same in words, where it depends.
        unit: base unit that `Limits` and `--json` give the value in.
        alias_of: the canonical key that this one is another spelling of. wins: it beats the canonical spelling.
        no_effect: why the key is accepted but does nothing.
    """
    known = {
        "built_in": built_in,
        "absent": absent,
        "unit": unit,
        "alias_of": alias_of,
        "wins": wins,
        "no_effect": no_effect,
    }
    extra: dict[str, Any] = {"ds01": known}
    if alias_of or no_effect:
        extra["deprecated"] = not wins
    if factory is not None:
        return Field(default_factory=factory, description=description, json_schema_extra=extra)
    return Field(default, description=description, json_schema_extra=extra)


def known_of(info: FieldInfo) -> Mapping[str, Any]:
    """What `setting` was told about a field; empty for fields declared otherwise."""
    extra = info.json_schema_extra
    found = extra.get("ds01", {}) if isinstance(extra, dict) else {}
    return found if isinstance(found, dict) else {}


def canonical_names(model: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    """Canonical key → its spellings in `model`, the one that wins first; keys without effect are left out."""
    found: dict[str, list[str]] = {}
    for name, info in model.model_fields.items():
        known = known_of(info)
        if known.get("no_effect"):
            continue
        names = found.setdefault(str(known.get("alias_of") or name), [])
        names.insert(0 if known.get("wins") else len(names), name)
    return {key: tuple(names) for key, names in found.items()}


def canonical_values(section: BaseModel) -> dict[str, Any]:
    """Canonical key → value, of the keys that the file sets; of two spellings the one that wins."""
    values: dict[str, Any] = {}
    for key, names in canonical_names(type(section)).items():
        written = next((name for name in names if name in section.model_fields_set), None)
        if written is not None:
            values[key] = getattr(section, written)
    return values


# ------------------------------------------------------------------ readers of one value


def _required(parse: Callable[[object], Any], what: str) -> Callable[[object], Any]:
    """`parse`, but no limit is refused."""

    def read(value: object) -> Any:
        result = parse(value)
        if result is None:
            raise ValueError(f"{what} must be a number; it cannot be without limit")
        return result

    return read


def _bounded(parse: Callable[[object], Any], low: float, high: float) -> Callable[[object], Any]:
    def read(value: object) -> Any:
        result = parse(value)
        if result is None or not low <= result <= high:
            raise ValueError(f'"{value}" is not between {low:g} and {high:g}')
        return result

    return read


def _percent(value: object) -> float | None:
    """`5` and `5%` are 5."""
    text = value.strip() if isinstance(value, str) else value
    return parse_number(text[:-1].strip() if isinstance(text, str) and text.endswith("%") else text)


def _fraction(value: object) -> float | None:
    """`0.8` and `80%` are 0.8."""
    number = _percent(value)
    if number is not None and isinstance(value, str) and value.strip().endswith("%"):
        return number / 100
    return number


def _in_unit(value: object, *, unit: float) -> float | None:
    """A duration under a key that names its unit (`grace_period_m`): bare numbers and the result are in that unit."""
    try:
        return parse_number(value)
    except ValueError:
        seconds = parse_duration(value)
        return None if seconds is None else seconds / unit


def _systemd(parse: Callable[[object], Any]) -> Callable[[object], Any]:
    """As `parse`, and systemd's word infinity is no limit; its percentages of the machine are refused."""

    def read(value: object) -> Any:
        text = value.strip().lower() if isinstance(value, str) else value
        if text == "infinity":
            return None
        if isinstance(text, str) and text.endswith("%") and parse is not parse_cores:
            raise ValueError(f'"{value}" is a share of the machine; write an absolute value')
        return parse(value)

    return read


def read_flag(value: object) -> bool:
    """true, yes, on or false, no, off in any case."""
    if isinstance(value, bool):
        return value
    text = value.strip().lower() if isinstance(value, str) else ""
    if text not in _TRUE | _FALSE:
        raise ValueError(f'"{value}" is neither true nor false')
    return text in _TRUE


def read_day(value: object) -> date:
    """A day, quoted or not: `2026-11-30`."""
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    try:
        return (
            date.fromisoformat(value.strip()) if isinstance(value, str) and len(value.strip()) == 10 else _no_day(value)
        )
    except ValueError:
        return _no_day(value)


def _no_day(value: object) -> date:
    raise ValueError(f'"{value}" is not a day; write year-month-day such as 2026-11-30 (the day counts, in UTC)')


def read_name(value: object) -> str:
    """An account or group name exactly as written: no blanks at its ends, no `/`, no control characters."""
    if not isinstance(value, str):
        raise ValueError("a name is missing here" if value is None else f"{value!r} is not a name; put it in quotes")
    if _NAME.fullmatch(value) is None or value in (".", ".."):
        raise ValueError(f'"{value[:60]}" is not a name: 1-255 characters, no / and no blanks at the ends')
    return value


def _read_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is missing here" if value is None else f"{value!r} is not a text; put it in quotes")
    return value


def _read_anything(value: object) -> Any:
    return value


def _schema(pattern: str, *examples: object, null: bool = True, numbers: bool = True) -> WithJsonSchema:
    kinds = ["string"] + ["number"] * numbers + ["null"] * null
    schema: dict[str, Any] = {"type": kinds if len(kinds) > 1 else kinds[0]}
    if pattern:
        schema["pattern"] = pattern
    if examples:
        schema["examples"] = list(examples)
    return WithJsonSchema(schema)


# Editors check the pattern of texts only; the words for "no limit" are part of each.
_WORDS = "^ *(" + "|".join("".join(f"[{letter.upper()}{letter}]" for letter in word) for word in sorted(NO_LIMIT))
_DURATION_PATTERN = _WORDS + r"|([0-9.]+ *[wdhmsWDHMS]? *)+)$"
_SIZE_PATTERN = _WORDS + r"|[0-9.]+ *([kmgtKMGT]?([iI]?[bB])?)) *$"
_NUMBER_PATTERN = _WORDS + r"|[0-9.]+([eE]\+?[0-9]+)?) *$"
_CORES_PATTERN = _WORDS + r"|infinity|[0-9.]+ *%?) *$"
_flag_schema = WithJsonSchema({"type": "boolean"})

Duration = Annotated[
    float | None, PlainValidator(parse_duration), _schema(_DURATION_PATTERN, "48h", "1d 12h", "never"), Kind("duration")
]
Hours = Annotated[
    float | None,
    PlainValidator(partial(parse_duration, hours=True)),
    _schema(_DURATION_PATTERN, 48, 0.5, None),
    Kind("duration, a bare number is hours"),
]
Size = Annotated[int | None, PlainValidator(parse_size), _schema(_SIZE_PATTERN, "32g", "512m"), Kind("size")]
Cores = Annotated[float | None, PlainValidator(parse_cores), _schema(_CORES_PATTERN, 8, 0.5), Kind("cores")]
Share = Annotated[float | None, PlainValidator(parse_number), _schema(_NUMBER_PATTERN, 1.0, 2.0), Kind("number")]
Count = Annotated[int | None, PlainValidator(parse_count), _schema(_NUMBER_PATTERN, 3), Kind("whole number")]
WholeNumber = Annotated[
    int, PlainValidator(_required(parse_count, "this")), _schema("", 10, null=False), Kind("whole number")
]
AtLeastOne = Annotated[
    int, PlainValidator(_bounded(parse_count, 1, 10**6)), _schema("", 3, null=False), Kind("whole number from 1")
]
Percent = Annotated[float, PlainValidator(_bounded(_percent, 0, 100)), _schema("", 5, null=False), Kind("0 to 100")]
CorePercent = Annotated[
    float, PlainValidator(_bounded(_percent, 0, 10**6)), _schema("", 2.0, null=False), Kind("percent")
]
Fraction = Annotated[
    float, PlainValidator(_bounded(_fraction, 0, 1)), _schema("", 0.8, "80%", null=False), Kind("0 to 1 or percent")
]
Factor = Annotated[
    float, PlainValidator(_bounded(parse_number, 1, 1000)), _schema("", 2, null=False), Kind("number from 1")
]
InSeconds = Annotated[
    float | None, PlainValidator(partial(_in_unit, unit=1)), _schema(_DURATION_PATTERN, 60), Kind("seconds or duration")
]
InMinutes = Annotated[
    float | None,
    PlainValidator(partial(_in_unit, unit=60)),
    _schema(_DURATION_PATTERN, 30),
    Kind("minutes or duration"),
]
InHours = Annotated[
    float | None,
    PlainValidator(partial(_in_unit, unit=3600)),
    _schema(_DURATION_PATTERN, 24),
    Kind("hours or duration"),
]
InDays = Annotated[
    float | None,
    PlainValidator(partial(_in_unit, unit=86400)),
    _schema(_DURATION_PATTERN, 90),
    Kind("days or duration"),
]
SystemdCores = Annotated[
    float | None, PlainValidator(_systemd(parse_cores)), _schema(_CORES_PATTERN, "2400%", 24), Kind("cores or percent")
]
SystemdSize = Annotated[int | None, PlainValidator(_systemd(parse_size)), _schema("", "96G", "infinity"), Kind("size")]
SystemdCount = Annotated[
    int | None, PlainValidator(_systemd(parse_count)), _schema("", 12288, "infinity"), Kind("whole number")
]
Flag = Annotated[bool, PlainValidator(read_flag), _flag_schema, Kind("true or false")]
Day = Annotated[date, PlainValidator(read_day), WithJsonSchema({"type": "string", "format": "date"}), Kind("day")]
Name = Annotated[str, PlainValidator(read_name), WithJsonSchema({"type": ["string", "number"]}), Kind("name")]
Text = Annotated[
    str, PlainValidator(_read_text), WithJsonSchema({"type": ["string", "number", "boolean"]}), Kind("text")
]
Anything = Annotated[Any, PlainValidator(_read_anything), WithJsonSchema({}), Kind("ignored")]

EMPTY_MAP = BeforeValidator(lambda value: {} if value is None else value)
"""`students:` with nothing below it is an empty section, not an error."""

EMPTY_LIST = BeforeValidator(lambda value: [] if value is None else value)
"""The same for lists."""
