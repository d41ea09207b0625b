"""The policy files as models, and `Policy`: everything that was read from them, frozen.

`resource-limits.yaml` is `LimitsFile`, `profiles.yaml` is `ProfilesFile`, `external.yaml` is `ExternalFile`.
What one file alone can tell is checked here; what needs several keys with their places is in `checks`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BeforeValidator, PlainValidator, WithJsonSchema, model_validator

from ds01spawner.errors import Problem
from ds01spawner.model import GpuAsk, GpuKind, Mount

from .fields import EMPTY_LIST, EMPTY_MAP, Anything, Cores, Flag, Kind, Name, Section, Size, Text, setting
from .grants import Grant
from .layers import ContainerType, Group, Layer, Lifecycle, Names, Override
from .mounts import MountList
from .quantity import parse_count

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MIG_PROFILE = re.compile(r"(?:[0-9]+c\.)?[0-9]+g\.[0-9]+gb(?:[+-][a-z.]+)*")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OWN_ENV = re.compile(r"(?:JUPYTERHUB_|JPY_|NVIDIA_|DS01_).*|CUDA_VISIBLE_DEVICES|HOME|USER|PYTHONUSERBASE")

# --------------------------------------------------------------------------- resource-limits.yaml


class LimitsFile(Section):
    """`resource-limits.yaml`: who may have how much. Order: defaults → group → user override → grants in force."""

    defaults: Annotated[Layer, EMPTY_MAP] = setting("The lowest layer, for everybody.", factory=Layer)
    default_group: Name | None = setting(
        "Group of everybody who is in no other. Without it only people named by some group may log in."
    )
    groups: Annotated[dict[Name, Annotated[Group, EMPTY_MAP]], EMPTY_MAP] = setting("Groups by name.", factory=dict)
    user_overrides: Annotated[dict[Name, Annotated[Override, EMPTY_MAP]], EMPTY_MAP] = setting(
        "Layers of single users, by account name.", factory=dict
    )
    grants: Annotated[tuple[Grant, ...], EMPTY_LIST] = setting("Time-boxed additions, in order.", factory=tuple)
    policies: Annotated[Lifecycle, EMPTY_MAP] = setting("Idle and runtime rules for everybody.", factory=Lifecycle)
    container_types: Annotated[dict[Name, Annotated[ContainerType, EMPTY_MAP]], EMPTY_MAP] = setting(
        "Rules by type of container.", factory=dict
    )
    show_holders: Literal["names", "groups", "none"] = setting(
        "What users see of who holds the GPUs that they wait for.", default="names"
    )
    enforcement: Anything = setting("Old section.", no_effect="limits are always enforced, or the start is refused")
    access_control: Anything = setting("Old section.", no_effect="who may log in follows the groups and default_group")
    bare_metal_access: Anything = setting("Old section.", no_effect="host accounts are the operator's own business")
    monitoring: Anything = setting("Old section.", no_effect="what watches the box is set up outside of the policy")
    gpu_allocation: Anything = setting("Old section.", no_effect="GPUs are chosen by placement; see gpu_pool")
    advanced: Anything = setting("Old section.", no_effect="nothing here reads it")
    wizard: Anything = setting("Old section.", no_effect="the form follows profiles.yaml")


# --------------------------------------------------------------------------- profiles.yaml


def _key(value: object) -> str:
    if not isinstance(value, str) or _KEY.fullmatch(value) is None:
        raise ValueError(f'"{value}" is not a key: 1-64 letters, digits, dots, hyphens and underscores')
    return value


Key = Annotated[str, PlainValidator(_key), WithJsonSchema({"type": "string", "pattern": f"^{_KEY.pattern}$"})]


def _mig_profile(value: object) -> str | None:
    if value is None:
        return None
    text = value.strip().lower() if isinstance(value, str) else ""
    if _MIG_PROFILE.fullmatch(text) is None:
        raise ValueError(f'"{value}" is not a MIG profile such as 1g.5gb or 3g.40gb')
    return text


MigProfile = Annotated[
    str | None,
    PlainValidator(_mig_profile),
    WithJsonSchema({"type": ["string", "null"], "examples": ["1g.5gb"]}),
    Kind("MIG profile"),
]


def _units(value: object) -> int:
    count = parse_count(value)
    if count is None or count > 64:
        raise ValueError(f'"{value}" is not a number of GPUs between 0 and 64')
    return count


Units = Annotated[
    int, PlainValidator(_units), WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 64}), Kind("0 to 64")
]


class SizeGpu(Section):
    """GPUs of one size of a profile."""

    count: Units | None = setting("Number of units; absent: 1, or 0 with kind: none.")
    kind: Literal["none", "any", "mig", "full"] | None = setting(
        "any: a whole GPU where allowed, else the smallest free MIG unit; absent: any, mig with mig_profile, else none."
    )
    mig_profile: MigProfile = setting("Exactly this MIG profile.")
    min_memory: Size = setting("Smallest GPU memory that will do.", unit="bytes")
    allow_larger: Flag = setting("A larger MIG profile may stand in.", default=False)

    @model_validator(mode="after")
    def _fits_together(self) -> SizeGpu:
        kind = self.chosen_kind
        if kind is GpuKind.NONE and (self.count or self.mig_profile or self.min_memory):
            raise ValueError("kind: none has no count, mig_profile or min_memory")
        if self.count == 0 and kind is not GpuKind.NONE:
            raise ValueError(f"count: 0 contradicts kind: {kind.value}")
        if kind in (GpuKind.FULL, GpuKind.ANY) and self.mig_profile:
            raise ValueError(f"mig_profile needs kind: mig, not {kind.value}")
        if kind is GpuKind.MIG and (self.count or 1) > 1:
            raise ValueError("a container uses one MIG instance at most (CUDA sees only one); write count: 1")
        return self

    @property
    def chosen_kind(self) -> GpuKind:
        """The kind, written or implied."""
        if self.kind is not None:
            return GpuKind(self.kind)
        if self.mig_profile:
            return GpuKind.MIG
        return GpuKind.ANY if self.count or self.min_memory else GpuKind.NONE

    def ask(self) -> GpuAsk:
        """The GPU part of a request for this size."""
        if self.chosen_kind is GpuKind.NONE:
            return GpuAsk()
        count = 1 if self.count is None else self.count
        return GpuAsk(count, self.chosen_kind, self.mig_profile, self.min_memory, self.allow_larger)


class ProfileSize(Section):
    """One size preset on a profile's card. What is absent is taken from the user's limits."""

    title: Text = setting("Short name in plain words.", default="")
    description: Text = setting("What it is right for.", default="")
    cpus: Cores = setting("CPU cores; absent or null: the user's limit.", unit="cores")
    memory: Size = setting("Memory; absent or null: the user's limit.", unit="bytes")
    shm_size: Size = setting("Size of /dev/shm; absent or null: the user's limit.", unit="bytes")
    gpu: Annotated[SizeGpu, EMPTY_MAP] = setting("Which GPU units; absent: none.", factory=SizeGpu)
    default: Flag = setting("Preselected size of the profile.", default=False)


def _environment(value: object) -> dict[str, str]:
    """Variables with the text that was written; names that ds01 sets itself are refused."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("env is a mapping of names to texts")
    for name, text in value.items():
        if not isinstance(name, str) or _ENV_NAME.fullmatch(name) is None:
            raise ValueError(f'"{name}" is not the name of an environment variable')
        if _OWN_ENV.fullmatch(name):
            raise ValueError(f"{name} is set by ds01 itself and cannot be given in a profile")
        if not isinstance(text, str) or "\x00" in text:
            raise ValueError(f"{name} needs a text")
    return dict(value)


Environment = Annotated[
    dict[str, str],
    PlainValidator(_environment),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}),
    Kind("names and texts"),
]


Texts = Annotated[
    tuple[Text, ...],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value or []),
    Kind("list of texts"),
]


class Profile(Section):
    """One entry of the spawn form: an image with sizes.

    `image` names it directly; `framework` (and `version`) choose the newest fitting row of the AIME catalogue.
    """

    name: Text = setting("The key of the profile; may be left out.", default="")
    title: Text = setting("Name on the card.", default="")
    description: Text = setting("One sentence in plain words.", default="")
    image: Text | None = setting("Image reference.")
    framework: Text | None = setting("Framework of the AIME catalogue, such as Pytorch, instead of image.")
    version: Text | None = setting("Its version as the catalogue writes it; absent: the newest for this box.")
    images: Texts = setting("Further images that users may choose: references, patterns with *, digests.", default=())
    default: Flag = setting("Preselected on the form.", default=False)
    groups: Names | None = setting("Groups that are offered it; absent: everybody.")
    sizes: Annotated[dict[Key, Annotated[ProfileSize, EMPTY_MAP]], EMPTY_MAP] = setting(
        "Size presets; absent: one without GPU.", factory=dict
    )
    mounts: MountList = setting("Host folders to mount, besides those of the user's layers.", factory=tuple)
    env: Environment = setting("Environment variables.", factory=dict)
    command: Texts | None = setting("Command instead of the image's own single-user server.")
    default_url: Text | None = setting("Page to open, such as /lab.")

    @model_validator(mode="after")
    def _one_image(self) -> Profile:
        if bool(self.image) == bool(self.framework):
            raise ValueError("a profile names either an image or a framework")
        if self.version and not self.framework:
            raise ValueError("version belongs to framework; an image carries its version in its tag")
        return self

    @property
    def default_size(self) -> str:
        """Key of the preselected size: the one marked so, else the first."""
        return next((key for key, size in self.sizes.items() if size.default), next(iter(self.sizes)))

    @property
    def mount_values(self) -> tuple[Mount, ...]:
        """The mounts as the values that travel."""
        return tuple(entry.mount for entry in self.mounts)


IMPLICIT_SIZE = {"standard": {"title": "Standard"}}
"""The size of a profile that names none: the user's own CPU and memory limits, no GPU."""


def _with_keys(value: object) -> object:
    """Give each profile its key as name, and the implicit size where it has none."""
    if not isinstance(value, Mapping):
        return {} if value is None else value
    return {
        key: {**entry, "name": key, "sizes": entry.get("sizes") or IMPLICIT_SIZE}
        if isinstance(entry, Mapping)
        else entry
        for key, entry in value.items()
    }


class ProfilesFile(Section):
    """`profiles.yaml`: what can be started."""

    profiles: Annotated[dict[Key, Profile], BeforeValidator(_with_keys)] = setting("Profiles by key.", default=...)


# --------------------------------------------------------------------------- external.yaml


def _pattern(value: object) -> str:
    """A container name or image pattern; one that fits everything would switch the protection off."""
    text = value.strip() if isinstance(value, str) else ""
    if not text or not text.strip("*?"):
        raise ValueError(f'"{value if value is not None else ""}" fits every image; name the one that is meant')
    return text


Pattern = Annotated[str, PlainValidator(_pattern), WithJsonSchema({"type": "string", "minLength": 1}), Kind("pattern")]


class ExternalRule(Section):
    """A container of others that may see GPUs without holding them, by its name and its image together."""

    name: Name = setting("Name of the container, exactly.", default=...)
    image: Pattern = setting("Its image; * and ? stand for any characters.", default=...)
    reason: Text = setting("Why it holds nothing.", default="")


class ExternalFile(Section):
    """`external.yaml`: containers of others (monitoring exporters) that see GPUs without holding them."""

    external: Annotated[tuple[ExternalRule, ...], EMPTY_LIST] = setting("The rules.", default=...)


# --------------------------------------------------------------------------- everything together


@dataclass(frozen=True)
class Policy:
    """Everything that was read from the policy files. Made by `load`; never changed.

    Attributes:
        limits: `resource-limits.yaml`. members: group → names from the file and from `groups/<group>.members`.
        profiles: in the order of the file. external: rules of `external.yaml`.
        hash: of all the texts together. text: the texts as one canonical JSON bundle (`load.policy_from_text`).
        warnings: findings that leave the policy valid.
    """

    limits: LimitsFile
    members: Mapping[str, frozenset[str]]
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    external: tuple[ExternalRule, ...] = ()
    hash: str = ""
    text: str = ""
    warnings: tuple[Problem, ...] = ()

    @property
    def groups(self) -> Mapping[str, Group]:
        """Groups in the order of the file."""
        return self.limits.groups

    @property
    def default_group(self) -> str | None:
        """Group of everybody who is in no other."""
        return self.limits.default_group

    @property
    def show_holders(self) -> str:
        """`names`, `groups` or `none`."""
        return self.limits.show_holders

    def profile(self, key: str | None) -> Profile | None:
        """The profile of that key; for None the default one (marked so, else the first); None if there is none."""
        if key is not None:
            return self.profiles.get(key)
        marked = (profile for profile in self.profiles.values() if profile.default)
        return next(marked, next(iter(self.profiles.values()), None))
