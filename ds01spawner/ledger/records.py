"""The values that the ledger takes and gives beyond those of `model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from ds01spawner.errors import Code, LedgerError
from ds01spawner.model import DEFAULT_SERVER, Usage

NAME_LENGTH = 255
"""Longest user or server name in characters (JupyterHub's own columns end there too)."""


@dataclass(frozen=True)
class Claim:
    """Who asks for what name. `group` decides the limits; `groups` are all that named the user; `uid` owns files."""

    user: str
    server_name: str
    group: str | None
    groups: tuple[str, ...]
    uid: int


@dataclass(frozen=True)
class RequestRecord:
    """One request, granted or refused, complete enough to be replayed.

    Attributes:
        door: form, query, rest, cli, admin.
        request: what was asked, as user_options-like plain data (`last_choice` gives it back as it is).
        usage: what was held when it was decided; None where it was refused before that was looked at.
        policy_hash, inventory_hash: what was in force; "" where unknown.
        outcome: granted, refused (the rules said no) or failed (something broke).
        code: the error's code; "" when granted. message: the sentence that the user saw.
        at: when; None = now, by the ledger's clock. id: given by the ledger.
    """

    user: str
    server_name: str
    door: str
    outcome: Literal["granted", "refused", "failed"]
    request: Mapping[str, Any] = field(default_factory=dict)
    group: str | None = None
    groups: tuple[str, ...] = ()
    usage: Usage | Mapping[str, Any] | None = None
    policy_hash: str = ""
    inventory_hash: str = ""
    code: str = ""
    message: str = ""
    allocation_id: int | None = None
    at: datetime | None = None
    id: int | None = None


@dataclass(frozen=True)
class AuditRow:
    """One change: who did what to what, why, and what was before and after (the changed fields only)."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    reason: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    allocation_id: int | None


@dataclass(frozen=True)
class OperationRow:
    """A running operation. `process` is host:pid:start; `stale` means that it may be taken over."""

    allocation_id: int
    what: str
    who: str
    process: str
    since: datetime
    beat_at: datetime
    stale: bool


@dataclass(frozen=True)
class ImageRecord:
    """An image made here, usable by its owner only.

    Attributes:
        ref: repository:tag. image_id: `sha256:…`. base_image: what it was made from.
        size: bytes. layers: count, decides re-basing. kind: committed (by a re-creation) or private (by the user).
    """

    owner: str
    ref: str
    image_id: str
    base_image: str
    server_name: str = ""
    size: int = 0
    layers: int = 0
    kind: Literal["committed", "private"] = "committed"
    created_at: datetime | None = None
    last_used_at: datetime | None = None
    removed_at: datetime | None = None
    id: int | None = None


def checked_name(what: str, value: str, *, empty: bool = False, longest: int = NAME_LENGTH) -> str:
    """`value` unchanged, if both databases can store and compare it exactly.

    Raises:
        LedgerError: empty, too long, or with characters that no database stores (code bad_name).
    """
    if not value and not empty:
        raise LedgerError(f"A {what} must not be empty.", code=Code.BAD_NAME)
    if len(value) > longest:
        raise LedgerError(f"A {what} of more than {longest} characters cannot be stored.", code=Code.BAD_NAME)
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise LedgerError(f"The {what} {value!r} has characters that cannot be stored.", code=Code.BAD_NAME)
    return value


def tidy(value: str, longest: int = 4000) -> str:
    """Free text that any database stores: unstorable characters replaced, overlong text cut."""
    return value[:longest].encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def subject_of(user: str, server_name: str) -> str:
    """How audit rows name a server: `alice/` is the default server, `alice/train` a named one."""
    return f"{user}/{server_name}"


def people_name(server_name: str) -> str:
    """A server's name in sentences."""
    return server_name or DEFAULT_SERVER
