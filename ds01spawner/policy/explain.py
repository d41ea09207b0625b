"""Schema errors as problems for people: with line and column, and a guess at what was meant."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ds01spawner.errors import Problem

from .fields import known_of
from .grants import Grant
from .layers import Group, Lifecycle, Override
from .schema import LimitsFile, Profile, ProfileSize, SizeGpu
from .yamltree import Node, Path

Model = TypeVar("Model", bound=BaseModel)

_KINDS = {
    "model_type": "a section of keys is expected here",
    "model_attributes_type": "a section of keys is expected here",
    "dict_type": "a section of keys is expected here",
    "mapping_type": "a section of keys is expected here",
    "tuple_type": "a list is expected here",
    "list_type": "a list is expected here",
}

_HOMES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("defaults, a group or a user override", Override),
    ("policies", Lifecycle),
    ("a group", Group),
    ("a grant", Grant),
    ("the top level of resource-limits.yaml", LimitsFile),
    ("a profile of profiles.yaml", Profile),
    ("a size of a profile", ProfileSize),
    ("the gpu section of a size", SizeGpu),
)


def validate(model: type[Model], tree: Node, file: str) -> tuple[Model | None, tuple[Problem, ...]]:
    """Read a file's tree as `model`.

    Returns:
        The model, or None where there are errors; and the problems in the order of the file: all errors, or the
        warnings about keys without effect and keys written in two spellings.
    """
    try:
        result = model.model_validate(tree.data())
    except ValidationError as error:
        problems = [_problem(model, tree, file, detail) for detail in error.errors(include_url=False)]
        return None, in_order(problems)
    return result, in_order(list(_warnings(result, tree, file)))


def at(tree: Node, file: str, path: Path, message: str, hint: str = "", *, warning: bool = False) -> Problem:
    """A problem with the key at `path`."""
    place = tree.place_of(path, key=True)
    return Problem(file, message, place.line, place.column, hint, warning)


def in_order(problems: list[Problem]) -> tuple[Problem, ...]:
    """Problems by place, without repetitions; of several at one place the one with a hint comes first."""
    return tuple(sorted(dict.fromkeys(problems), key=lambda p: (p.file, p.line or 0, p.column or 0, not p.hint)))


def closest(word: str, known: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    """`did you mean …?`, or "" where nothing is close."""
    found = get_close_matches(word.lower(), [str(name) for name in known], n=1, cutoff=0.7)
    return f"did you mean {found[0]}?" if found else ""


def _problem(model: type[BaseModel], tree: Node, file: str, detail: ErrorDetails) -> Problem:
    """One pydantic error as a problem."""
    path: Path = tuple(part for part in detail["loc"] if part != "[key]")
    kind, name = detail["type"], str(path[-1]) if path else "the file"
    about_key = kind == "extra_forbidden" or "[key]" in detail["loc"]
    place = tree.place_of(path, key=about_key)
    hint = ""
    if kind == "extra_forbidden":
        owner = _model_at(model, path[:-1])
        message = f'unknown key "{name}"'
        hint = _meant(name, owner) if owner is not None else ""
    elif kind == "missing":
        message = f'the key "{name}" is missing'
    elif kind in ("literal_error", "enum"):
        expected = str(detail.get("ctx", {}).get("expected", ""))
        message = f'{name}: "{detail["input"]}" is not one of {expected}'
        hint = closest(str(detail["input"]), [word.strip("' ") for word in expected.replace(" or ", ",").split(",")])
    elif kind in _KINDS:
        message = f"{name}: {_KINDS[kind]}"
    else:
        error = detail.get("ctx", {}).get("error")
        message = f"{name}: {error}" if error is not None else f"{name}: {detail['msg']}"
    return Problem(file, message, place.line, place.column, hint)


def _meant(name: str, owner: type[BaseModel]) -> str:
    """A guess at what an unknown key should have been: a near spelling, or the right place for it."""
    if name in ("<<", "merge"):
        return "write << without quotes"
    near = closest(name, [key for key, info in owner.model_fields.items() if not known_of(info).get("no_effect")])
    if near:
        return near
    home = next((where for where, model in _HOMES if name in model.model_fields and model is not owner), None)
    return f"it belongs into {home}" if home else ""


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model of the section at `path`, found along the type annotations; None where there is none."""
    current: Any = model
    for part in path:
        fields = getattr(_plain(current), "model_fields", None)
        if fields is not None:
            info = fields.get(str(part))
            if info is None:
                return None
            current = info.annotation
        else:
            arguments = [arg for arg in get_args(_plain(current)) if arg is not Ellipsis]
            if not arguments:
                return None
            current = arguments[-1]
    found = _plain(current)
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _plain(annotation: Any) -> Any:
    """An annotation without Annotated and without `| None`."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
        else:
            return annotation


def _sections(value: object, path: Path = ()) -> Iterator[tuple[Path, BaseModel]]:
    """Every section that the file writes, with its path."""
    if isinstance(value, BaseModel):
        yield path, value
        for name in value.model_fields_set:
            yield from _sections(getattr(value, name), (*path, name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _sections(item, (*path, key))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _sections(item, (*path, index))


def _warnings(model: BaseModel, tree: Node, file: str) -> Iterator[Problem]:
    """Keys that do nothing here, and keys that are written in two spellings."""
    for path, section in _sections(model):
        written: dict[str, str] = {}
        for name, info in type(section).model_fields.items():
            if name not in section.model_fields_set:
                continue
            known = known_of(info)
            if known.get("no_effect"):
                message = f'the key "{name}" has no effect here'
                yield at(tree, file, (*path, name), message, str(known["no_effect"]), warning=True)
                continue
            key = str(known.get("alias_of") or name)
            other = written.setdefault(key, name)
            if other != name:
                winner, loser = (name, other) if known.get("wins") else (other, name)
                message = f'"{loser}" is ignored: "{winner}" says the same and counts'
                yield at(tree, file, (*path, loser), message, "keep one of the two", warning=True)
