"""What users may send us, whichever door it comes through: one parser, one choice of profile.

The form, `GET /hub/spawn?opt-…`, the REST body, the command line and stale options in the Hub's own database
all end in `SpawnRequest.parse`. It checks the shape only (types, ranges, characters); what a user may have is
decided by `choose` (against the offered profiles) and by `admission.check` (against quotas and the machine).
Everything that arrives here is hostile until proven otherwise: unknown fields are refused, not ignored.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ds01spawner.errors import Code, Refusal
from ds01spawner.model import GpuAsk, GpuKind, Request
from ds01spawner.policy.quantity import format_size, parse_size

MAX_GPUS = 64
"""Most GPU units one request may name. Far above any single server; it only stops nonsense."""

MAX_CORES = 4096.0
MIN_MEMORY = 128 * 2**20
"""Less than this does not even start a notebook server; it is nearly always a forgotten unit ("32" for "32g")."""
MAX_MEMORY = 2**50
MAX_FIELDS = 32
MAX_TEXT = 256
IMAGE_FIELD = "image:"
"""Prefix of the form's image selectors, one per profile: an image never travels with the wrong profile."""
FRESH_CHOICE = "@fresh"
"""What such a selector sends for the field `fresh`; no image reference begins like that."""

RESERVED_PREFIX = "__jupyterhub_"
"""Keys that JupyterHub keeps for itself in `user_options` since 6.1."""

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}")
_MIG_PROFILE = re.compile(r"(?:[1-9]c\.)?[1-9][0-9]?g\.[1-9][0-9]{0,3}gb(?:[+-][a-z]{1,8}(?:\.[a-z]{1,8})?){0,3}")
_COUNT = re.compile(r"[0-9]{1,3}")
_CORES = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,3})?")
_SIZE = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,3})? ?(?:[kmgtKMGT](?:i?[bB])?|[bB])?")
_SIZE_WANTED = 'a size such as "16g" or "512m"'
_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


def _shown(value: object) -> str:
    """`value` for a sentence: short, ASCII, without control characters (what it holds is not ours)."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        text = ascii(value if not isinstance(value, str) else value[:40])
        return text if len(text) <= 48 else text[:44] + " …'"
    return "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else "something else"


def _single(value: object) -> object:
    """The one value of a list of one (query strings arrive as lists); anything else unchanged."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _text(value: object, pattern: re.Pattern[str], wanted: str) -> str:
    """`value` if it is a string that matches `pattern` completely; ValueError with a sentence otherwise."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isascii() or not pattern.fullmatch(value):
        raise ValueError(f"must be {wanted}, not {_shown(value)}")
    return value


class SpawnRequest(BaseModel):
    """The shape of `user_options`: every field optional, every other field refused.

    `gpus`, `gpu_kind` and `mig_profile` only refine what the chosen size offers; they never widen it (`choose`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    profile: str | None = Field(None, description="Key of a profile; default: the policy's default profile.")
    size: str | None = Field(None, description="Key of one of the profile's sizes; default: the profile's default.")
    image: str | None = Field(None, description="Image reference among those the profile offers, or an own saved one.")
    gpus: int | None = Field(None, description=f"GPU units, 0 to {MAX_GPUS}; default: what the size gives.")
    gpu_kind: GpuKind | None = Field(None, description="none, any, mig or full; default: what the size gives.")
    mig_profile: str | None = Field(None, description="NVIDIA's name of a MIG size, such as 1g.5gb.")
    cpus: float | None = Field(None, description="Cores, to take fewer than the size gives.")
    memory: int | None = Field(None, description='Memory as a size text such as "16g", to take less than given.')
    project: str | None = Field(None, description="Folder below the workspace that becomes /workspace.")
    fresh: bool = Field(
        False, description="Begin from the image itself; what this server had changed is saved and listed, not used."
    )

    @field_validator("profile", "size", mode="before")
    @classmethod
    def _key(cls, value: object) -> object:
        return None if value is None else _text(value, _KEY, "a plain name (letters, digits, . _ -)")

    @field_validator("image", mode="before")
    @classmethod
    def _image(cls, value: object) -> object:
        return None if value is None else _text(value, _IMAGE, "an image reference such as aimehub/pytorch:latest")

    @field_validator("gpus", mode="before")
    @classmethod
    def _count(cls, value: object) -> object:
        if isinstance(value, str) and value.isascii() and _COUNT.fullmatch(value):
            value = int(value)
        if value is not None and (type(value) is not int or not 0 <= value <= MAX_GPUS):
            raise ValueError(f"must be a whole number from 0 to {MAX_GPUS}, not {_shown(value)}")
        return value

    @field_validator("gpu_kind", mode="before")
    @classmethod
    def _kind(cls, value: object) -> object:
        kinds = [kind.value for kind in GpuKind]
        if value is not None and (not isinstance(value, str) or value not in kinds):
            raise ValueError(f"must be one of {', '.join(kinds)}, not {_shown(value)}")
        return None if value is None else GpuKind(value)

    @field_validator("mig_profile", mode="before")
    @classmethod
    def _mig(cls, value: object) -> object:
        return None if value is None else _text(value, _MIG_PROFILE, "NVIDIA's name of a MIG size, such as 1g.5gb")

    @field_validator("cpus", mode="before")
    @classmethod
    def _cores(cls, value: object) -> object:
        if isinstance(value, str) and value.isascii() and _CORES.fullmatch(value):
            value = float(value)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value <= MAX_CORES:  # type: ignore[arg-type,operator]
            raise ValueError(f"must be a number of cores above 0, such as 4 or 0.5, not {_shown(value)}")
        return float(value)  # type: ignore[arg-type]

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> object:
        if value is None:
            return None
        if type(value) is not int:
            text = _text(value, _SIZE, _SIZE_WANTED)
            try:
                size = parse_size(text)
            except ValueError:  # leading zeros, half bytes: the same sentence for every slip
                raise ValueError(f"must be {_SIZE_WANTED}, not {_shown(value)}") from None
        else:
            size = value
        if size is None or not MIN_MEMORY <= size <= MAX_MEMORY:
            raise ValueError(f'must be at least {format_size(MIN_MEMORY)}, written like "16g", not {_shown(value)}')
        return size

    @field_validator("project", mode="before")
    @classmethod
    def _folder(cls, value: object) -> object:
        if value is None:
            return None
        wanted = "a folder below your workspace, such as thesis/run1 (letters, digits, . _ - and /)"
        if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isascii():
            raise ValueError(f"must be {wanted}, not {_shown(value)}")
        for part in value.split("/"):
            if not _FOLDER.fullmatch(part):
                raise ValueError(f"must be {wanted}, not {_shown(value)}")
        return value

    @field_validator("fresh", mode="before")
    @classmethod
    def _yes_or_no(cls, value: object) -> object:
        if isinstance(value, str) and value in ("true", "false"):
            return value == "true"
        if type(value) is not bool:
            raise ValueError(f"must be true or false, not {_shown(value)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SpawnRequest:
        if self.gpu_kind is GpuKind.NONE and (self.gpus or self.mig_profile):
            raise ValueError("gpu_kind: none contradicts gpus or mig_profile; leave one of them out")
        if self.mig_profile and self.gpu_kind not in (None, GpuKind.MIG):
            raise ValueError(f"mig_profile contradicts gpu_kind: {self.gpu_kind and self.gpu_kind.value}")
        if self.gpus == 0 and (self.mig_profile or self.gpu_kind not in (None, GpuKind.NONE)):
            raise ValueError("gpus: 0 contradicts gpu_kind or mig_profile; leave one of them out")
        return self

    @property
    def gpu(self) -> GpuAsk | None:
        """The GPU part, None if none of its fields was given."""
        if self.gpus is None and self.gpu_kind is None and self.mig_profile is None:
            return None
        if self.gpus == 0 or self.gpu_kind is GpuKind.NONE:
            return GpuAsk()
        kind = self.gpu_kind or (GpuKind.MIG if self.mig_profile else GpuKind.ANY)
        return GpuAsk(count=1 if self.gpus is None else self.gpus, kind=kind, mig_profile=self.mig_profile)

    @staticmethod
    def parse(user_options: Mapping[str, Any] | None, *, server_name: str, door: str) -> Request:
        """`user_options` as a checked Request.

        Args:
            user_options: what the Hub has for this start; None and `{}` ask for the defaults. Values are plain
                JSON values or lists of one string (query strings); a null is as good as absent.
            server_name: the Hub's name of the server ("" = default server); not taken from the options.
            door: form, query, rest, cli or admin; kept for the request row.

        Raises:
            Refusal: BAD_REQUEST, with a sentence that names the field.
        """
        fields = _plain_fields(user_options)
        try:
            asked = SpawnRequest.model_validate(fields)
        except ValidationError as error:
            raise _bad_request(error) from None
        return Request(
            server_name=server_name,
            profile=asked.profile,
            size=asked.size,
            image=asked.image,
            gpu=asked.gpu,
            cpus=asked.cpus,
            memory=asked.memory,
            project=asked.project,
            fresh=asked.fresh,
            door=door,
        )


def _plain_fields(user_options: object) -> dict[str, object]:
    """The fields of `user_options` with lists of one unpacked; nulls and the Hub's reserved keys left out."""
    if user_options is None:
        return {}
    if not isinstance(user_options, Mapping):
        raise Refusal(Code.BAD_REQUEST, "The options of a server must be an object of named fields.")
    own = [key for key in user_options if not (isinstance(key, str) and key.startswith(RESERVED_PREFIX))]
    if len(own) > MAX_FIELDS:
        raise Refusal(Code.BAD_REQUEST, f"The options of a server have too many fields ({len(own)}).")
    for key in own:
        if not isinstance(key, str) or key not in SpawnRequest.model_fields:
            raise _unknown_field(key)
    return {key: value for key in own if (value := _single(user_options[key])) is not None}


def _unknown_field(key: object) -> Refusal:
    known = list(SpawnRequest.model_fields)
    near = difflib.get_close_matches(key[:MAX_TEXT], known, n=1) if isinstance(key, str) else []
    hint = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(known)}."
    return Refusal(
        Code.BAD_REQUEST, f"There is no field {_shown(key)} in the options of a server; {hint}", facts={"known": known}
    )


def _bad_request(error: ValidationError) -> Refusal:
    """The first finding as a sentence that names its field."""
    first = error.errors(include_url=False, include_input=False)[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    if not first["loc"]:
        return Refusal(Code.BAD_REQUEST, f"The options contradict each other: {message}.")
    field = str(first["loc"][0])
    return Refusal(Code.BAD_REQUEST, f"The field {field} {message}.", facts={"field": field})


# --------------------------------------------------------------------------- the HTML form


def options_from_form(formdata: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The HTML form's fields as `user_options`.

    `choice` ("profile/size", one radio button) is split, and of the image selectors (`image:<profile>`) the chosen
    profile's counts, where `FRESH_CHOICE` stands for `fresh`. Fields that are not ours (`_xsrf`) are ignored and empty
    ones dropped. A field sent twice stays a list, so that `SpawnRequest.parse` refuses it instead of guessing. Plain
    `profile` and `size` fields (hidden: the preselected card) count only without a `choice`: browsers do not send a
    card that is greyed out.
    """
    options: dict[str, Any] = {}
    for name in SpawnRequest.model_fields:
        _take(options, name, formdata.get(name, ()))
    choice = [value for value in formdata.get("choice", ()) if value != ""]
    if len(choice) == 1 and isinstance(choice[0], str):
        profile, _, size = choice[0].partition("/")
        options.pop("size", None)
        options |= {"profile": profile, "size": size} if size else {"profile": profile}
        _take(options, "image", formdata.get(f"{IMAGE_FIELD}{profile}", ()))
        if options.get("image") == FRESH_CHOICE:
            del options["image"]
            options["fresh"] = True
    elif choice:
        options["profile"] = choice
    return options


def _take(options: dict[str, Any], name: str, values: Sequence[Any]) -> None:
    filled = [value.strip(" ") if isinstance(value, str) else value for value in values]
    filled = [value for value in filled if value != ""]
    if filled:
        options[name] = filled[0] if len(filled) == 1 else filled


def options_from_query(query: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The arguments of `GET /hub/spawn?opt-…` as `user_options`.

    JupyterHub 6 takes the prefix off, 5 leaves it on. Unlike a form, a link has no fields that are not ours: unknown
    ones are kept, so that they are refused.
    """
    found: dict[str, list[Any]] = {}
    for name, values in query.items():
        found.setdefault(name.removeprefix("opt-"), []).extend(values)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}
