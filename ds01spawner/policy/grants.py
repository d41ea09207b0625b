"""Grants: time-boxed additions to somebody's limits, applied after overrides, in the order of the file.

A grant may change every key that a layer's `Quantities` declare. Its fields are made from those declarations, so
that a new limit can be granted without being declared a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import PlainValidator, WithJsonSchema, create_model, model_validator

from .fields import EMPTY_MAP, Day, Name, Section, Text, canonical_values, known_of, setting
from .layers import Aggregate, Quantities


@dataclass(frozen=True)
class Change:
    """What a grant does to one key: adds `value` to what the layers below give, or replaces it."""

    value: Any
    adds: bool = False

    def apply(self, below: Any) -> Any:
        """The new value; adding to "no limit" leaves no limit."""
        if not self.adds:
            return self.value
        return None if below is None else below + self.value


def _change(value: object, *, parse: Callable[[object], Any]) -> Change:
    """`+N` adds, a plain value replaces."""
    text = value.strip() if isinstance(value, str) else ""
    if not text.startswith("+"):
        return Change(parse(value))
    number = parse(text[1:].strip())
    if number is None or isinstance(number, (bool, tuple)):
        raise ValueError(f'"{text}" adds nothing; + is for numbers, write null to lift a limit')
    return Change(number, adds=True)


def _grantable(section: type[Section]) -> dict[str, Any]:
    """Every quantity of `section` as an optional `Change`, read by the same parser as in a layer."""
    fields: dict[str, Any] = {}
    for key, info in section.model_fields.items():
        reader = next((m for m in info.metadata if isinstance(m, PlainValidator)), None)
        if reader is None:
            continue
        schema = next(m.json_schema or {} for m in info.metadata if isinstance(m, WithJsonSchema))
        # "+N" does not match the pattern of the plain value, so editors get the type only.
        loose = {k: v for k, v in schema.items() if k not in ("pattern", "examples")}
        parse = cast("Callable[[object], Any]", reader.func)
        kind = Annotated[Any, PlainValidator(partial(_change, parse=parse)), WithJsonSchema(loose)]
        known = known_of(info)
        declared = setting(info.description or "", alias_of=known["alias_of"], wins=known["wins"], unit=known["unit"])
        fields[key] = (kind, declared)
    return fields


if TYPE_CHECKING:

    class GrantAggregate(Section):
        """Additions to the user's aggregate limits."""
else:
    GrantAggregate = create_model(
        "GrantAggregate",
        __base__=Section,
        __doc__="Additions to the user's aggregate limits.",
        **_grantable(Aggregate),
    )


class GrantBase(Section):
    """A time-boxed addition to somebody's limits, applied after overrides, in the order of the file."""

    user: Name | None = setting("Account that gets it (or: group).")
    group: Name | None = setting("Group whose members get it (or: user).")
    until: Day = setting("Last day on which it counts (UTC).", default=...)
    by: Text = setting("Who granted it.", default="")
    reason: Text = setting("Why.", default="")
    aggregate: Annotated[GrantAggregate, EMPTY_MAP] = setting(
        "Additions to the user's aggregate limits.", factory=GrantAggregate
    )

    @model_validator(mode="after")
    def _for_somebody(self) -> GrantBase:
        if (self.user is None) == (self.group is None):
            raise ValueError("a grant names either a user or a group")
        if not self.changes():
            raise ValueError('a grant names at least one limit, such as max_gpu_equivalents: "+1.0"')
        return self

    def changes(self) -> dict[str, Change]:
        """What it does, by canonical key (`aggregate.memory_max`)."""
        found = {key: value for key, value in canonical_values(self).items() if isinstance(value, Change)}
        return found | {f"aggregate.{key}": value for key, value in canonical_values(self.aggregate).items()}

    def in_force(self, day: date) -> bool:
        """True on `day` and before: the last day counts."""
        return day <= self.until

    def concerns(self, user: str, group: str | None) -> bool:
        """True if it is for this user, or for the group that the user's limits come from."""
        return self.user == user if self.user is not None else self.group == group


if TYPE_CHECKING:

    class Grant(GrantBase):
        """A time-boxed addition to somebody's limits."""
else:
    Grant = create_model("Grant", __base__=GrantBase, __doc__=GrantBase.__doc__, **_grantable(Quantities))
