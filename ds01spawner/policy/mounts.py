"""Mounts and GPU pools as policy files write them. Users never choose host paths; the policy does."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, PlainValidator, WithJsonSchema

from ds01spawner.model import Mount

from .fields import EMPTY_LIST, Kind, Section, setting

_CLOSED_HOST = ("/boot", "/dev", "/etc", "/proc", "/run", "/sys", "/var/lib/docker", "/var/run")
"""Nothing in or below these is ever mounted: the Docker socket, devices, secrets."""

_TOO_MUCH_HOST = ("/", "/home", "/opt", "/root", "/usr", "/var", "/var/lib", "/var/lib/ds01")
"""Too much at once; a folder below them may be meant."""

_SYSTEM_TARGET = ("/dev", "/etc", "/proc", "/run", "/sys", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/opt/jupyter")
_USERS_TARGET = ("/home", "/workspace")
"""In a user's own folder they could put a link where the mount is to be, and so choose its place."""
_TAKEN_TARGET = ("/", "/root", "/tmp", "/var")  # noqa: S108  # a path in the container


def _folder(value: object, what: str, below: tuple[str, ...], exactly: tuple[str, ...]) -> str:
    """A clean absolute path, neither in nor below `below` and none of `exactly`."""
    text = value.strip() if isinstance(value, str) else ""
    if not text.startswith("/"):
        raise ValueError(f'the {what} "{value if value is not None else ""}" is not an absolute path')
    if re.search(r"[\x00-\x1f\x7f:,]", text):
        raise ValueError(f'the {what} "{text}" contains a colon, a comma or a control character')
    parts = [part for part in text.split("/") if part]
    if ".." in parts or "." in parts:
        raise ValueError(f'the {what} "{text}" contains . or ..; write the path that is meant')
    path = "/" + "/".join(parts)
    if path in exactly or any(path == top or path.startswith(top + "/") for top in below):
        raise ValueError(f"the {what} {path} may not be mounted; it belongs to the system or to the user")
    return path


def _host_folder(value: object) -> str:
    return _folder(value, "host path", _CLOSED_HOST, _TOO_MUCH_HOST)


def _target_folder(value: object) -> str:
    return _folder(value, "target", _SYSTEM_TARGET + _USERS_TARGET, _TAKEN_TARGET)


def _short_mount(value: object) -> object:
    """Docker's short form `host:target[:ro|rw]` as a mapping."""
    if not isinstance(value, str):
        return value
    parts = value.split(":")
    if len(parts) not in (2, 3):
        raise ValueError(f'"{value}" is not a mount; write host:target:ro, or host, target and mode')
    return dict(zip(("host", "target", "mode"), parts, strict=False))


_PATH = WithJsonSchema({"type": "string", "pattern": "^/"})


class MountEntry(Section):
    """One host folder that the policy mounts into containers. Users never choose host paths."""

    host: Annotated[str, PlainValidator(_host_folder), _PATH, Kind("absolute path")] = setting(
        "Absolute path on the host.", default=...
    )
    target: Annotated[str, PlainValidator(_target_folder), _PATH, Kind("absolute path")] = setting(
        "Path in the container.", default=...
    )
    mode: Literal["ro", "rw"] = setting("ro = read-only, rw = read and write.", default="ro")

    @property
    def mount(self) -> Mount:
        """The value that travels."""
        return Mount(self.host, self.target, read_only=self.mode == "ro")


def _distinct_targets(mounts: tuple[MountEntry, ...]) -> tuple[MountEntry, ...]:
    targets = [mount.target for mount in mounts]
    twice = next((target for target in targets if targets.count(target) > 1), None)
    if twice:
        raise ValueError(f"two mounts have the target {twice}")
    return mounts


MountList = Annotated[
    tuple[Annotated[MountEntry, BeforeValidator(_short_mount)], ...],
    EMPTY_LIST,
    AfterValidator(_distinct_targets),
    Kind("list of mounts"),
]


def _pool(value: object) -> tuple[str, ...] | None:
    """GPUs by index, UUID or model name; null or `unlimited` = all."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("unlimited", "all")):
        return None
    entries = value if isinstance(value, (list, tuple)) else [value]
    pool = tuple(
        str(entry).strip() for entry in entries if isinstance(entry, (str, int)) and not isinstance(entry, bool)
    )
    if len(pool) != len(entries) or not all(pool):
        raise ValueError("gpu_pool is a list of GPU indices, UUIDs or model names, such as [0, 1]")
    return pool


Pool = Annotated[
    tuple[str, ...] | None,
    PlainValidator(_pool),
    WithJsonSchema({"type": ["array", "string", "integer", "null"], "items": {"type": ["string", "integer"]}}),
    Kind("list"),
]
