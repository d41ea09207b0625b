"""Accounts: the host's own (looked up only when configured), and how a container's passwd and group name the user.

A container runs under a numeric uid:gid. Shells, ssh and AIME's tools want a name for it, so the image's
/etc/passwd and /etc/group plus one line are mounted over the image's own. The files lie root-owned below the
state folder and carry no rights: who the user is on the host is decided by the numbers alone.
"""

from __future__ import annotations

import grp
import io
import os
import pwd
import re
import tarfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import docker
import docker.errors
import requests

from ds01spawner.errors import Code, EngineError, HostError, Problem, Refusal

from .aime import LABEL_PROBE, PROBE_LABELS

FIRST_UID = 1000
"""Below are system accounts (UID_MIN of login.defs(5) on Debian and Ubuntu)."""
NOBODY = 65534
SHELL = "/bin/bash"

_INVALID_UIDS = (NOBODY, 65535, (1 << 32) - 1)
"""nobody, and the two values that mean "no uid" to system calls (chown(2))."""
_MAX_FILE = 1 << 20
"""Bytes of an image's passwd that are read at most."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,254}")
_HOME = re.compile(r"/[^:\n\0]*")
_BARE_PASSWD = "root:x:0:0:root:/root:/bin/sh\n"  # noqa: S105 - an account line, not a secret
_BARE_GROUP = "root:x:0:\n"


@dataclass(frozen=True)
class Group:
    """A Unix group."""

    name: str
    gid: int


@dataclass(frozen=True)
class Account:
    """Who a user is inside their containers.

    Attributes:
        name: account name. home: path inside the container.
        groups: further groups, for `--group-add` by number and for the group file.
    """

    name: str
    uid: int
    gid: int
    home: str
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class AccountFiles:
    """Host paths to mount read-only over /etc/passwd and /etc/group."""

    passwd: Path
    group: Path


# --------------------------------------------------------------------------- texts (pure)


def account_texts(passwd: str, group: str, account: Account) -> tuple[str, str]:
    """The image's passwd and group texts with the user in them.

    Lines of the image that have the user's uid or name are replaced (24.04's `ubuntu` has uid 1000), and no
    group of the image keeps their name among its members: it meant somebody else. A group of the image that has
    the user's gid stays; one that has the name but another gid keeps the name.

    Raises:
        Refusal: `bad_name`: the name or the home would break the files, or the account would be root.
    """
    _check(account)
    users = [line for line in _lines(passwd, 7) if line[0] != account.name and line[2] != str(account.uid)]
    users.append([account.name, "x", str(account.uid), str(account.gid), account.name, account.home, SHELL])
    replaced = {line[0] for line in _lines(passwd, 7) if line[2] == str(account.uid)} | {account.name}
    groups = [
        [*line[:3], ",".join(name for name in line[3].split(",") if name and name not in replaced)]
        for line in _lines(group, 4)
    ]
    _join(groups, Group(account.name, account.gid), member=None)
    for extra in account.groups:
        _join(groups, extra, member=account.name)
    return _text(users), _text(groups)


def _join(groups: list[list[str]], wanted: Group, member: str | None) -> None:
    """Make sure that a group of that gid is there, under that name if it is free, with the member in it."""
    line = next((line for line in groups if line[2] == str(wanted.gid)), None)
    if line is None:
        taken = {line[0] for line in groups}
        free = wanted.name if wanted.name not in taken and _NAME.fullmatch(wanted.name) else f"g{wanted.gid}"
        line = [free, "x", str(wanted.gid), ""]
        groups.append(line)
    if member is not None:
        line[3] = ",".join([*filter(None, line[3].split(",")), member])


def _lines(text: str, fields: int) -> list[list[str]]:
    """Lines that are complete and whose id is a number; others (NIS `+`, comments) mean nothing in a container."""
    split = (line.split(":") for line in text.splitlines())
    return [line for line in split if len(line) == fields and line[2].isdigit() and line[0]]


def _text(lines: Iterable[Sequence[str]]) -> str:
    return "".join(":".join(line) + "\n" for line in lines)


def _check(account: Account) -> None:
    if account.uid == 0 or account.name == "root":
        raise Refusal(Code.BAD_NAME, "No container runs as root here.", facts={"account": account.name})
    if not _NAME.fullmatch(account.name) or not _HOME.fullmatch(account.home):
        raise Refusal(
            Code.BAD_NAME,
            f"{account.name[:80]!r} (home {account.home[:200]!r}) cannot be an account inside a container: use "
            "letters, digits and _ . @ + - for the name and a plain absolute path for the home.",
            facts={"account": account.name[:80]},
        )


# --------------------------------------------------------------------------- files


class AccountWriter:
    """Makes passwd and group files for containers. One object per process; thread-safe.

    Args:
        state_dir: the installation's root-owned folder (`Settings.state_dir`).
    """

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "accounts"
        self._lock = threading.Lock()

    def write(self, client: docker.APIClient, image_id: str, account: Account) -> AccountFiles:
        """The files for `account` in containers of an image; what is there already is not written again.

        Args:
            image_id: `sha256:…`, never a tag: a tag's accounts may change.

        Raises:
            Refusal: `bad_name`, as `account_texts`.
            EngineError: the image is gone, or Docker does not answer.
            HostError: `storage_refused`: the files cannot be written.
        """
        key = re.sub(r"[^0-9a-z]", "", image_id.removeprefix("sha256:"))[:64]
        if not key:
            raise HostError(f"{image_id!r} is not an image id.", code=Code.INTERNAL)
        base = self._folder / "images" / key
        target = self._folder / str(account.uid) / key
        with self._lock:
            texts = self._image_texts(client, image_id, base)
            files = AccountFiles(target / "passwd", target / "group")
            for file, text in zip((files.passwd, files.group), account_texts(*texts, account), strict=True):
                _write(file, text)
        return files

    def _image_texts(self, client: docker.APIClient, image_id: str, cache: Path) -> tuple[str, str]:
        """The image's own texts, asked from Docker once per image."""
        passwd, group = cache / "passwd", cache / "group"
        with suppress(FileNotFoundError):
            return passwd.read_text(), group.read_text()
        texts = read_image_accounts(client, image_id)
        _write(group, texts[1])
        _write(passwd, texts[0])
        return texts


def read_image_accounts(client: docker.APIClient, image_id: str) -> tuple[str, str]:
    """/etc/passwd and /etc/group of an image, read from a container that is never started.

    Raises:
        EngineError: the image is gone, or Docker does not answer.
    """
    try:
        # `void`: an image with NVIDIA_VISIBLE_DEVICES=all would look as if this container held every GPU.
        probe = client.create_container(
            image_id,
            command=["true"],
            environment={"NVIDIA_VISIBLE_DEVICES": "void"},
            labels={**PROBE_LABELS, LABEL_PROBE: "accounts"},
            host_config=client.create_host_config(network_mode="none"),
        )["Id"]
        try:
            passwd = _read_file(client, probe, "/etc/passwd") or _BARE_PASSWD
            return passwd, _read_file(client, probe, "/etc/group") or _BARE_GROUP
        finally:
            client.remove_container(probe, force=True, v=True)
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise EngineError(f"The accounts of the image {image_id[:19]} cannot be read: {error}") from error


def _read_file(client: docker.APIClient, container: str, path: str) -> str | None:
    """A text file of a container; None if it is not there, not a plain file, or too large to be true."""
    try:
        chunks, status = client.get_archive(container, path)
    except docker.errors.NotFound:
        return None
    if status.get("size", 0) > _MAX_FILE:
        chunks.close()
        return None
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
        member = archive.next()
        file = archive.extractfile(member) if member is not None and member.isfile() else None
        return None if file is None else file.read().decode(errors="replace")


def _write(file: Path, text: str) -> None:
    """Write a root-owned 0644 file atomically; running containers keep the one that they have mounted."""
    with suppress(OSError):
        if file.read_text() == text:
            return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f"{file.name}.{os.getpid()}.new")
        draft.write_text(text)
        draft.chmod(0o644)
        draft.replace(file)
    except OSError as error:
        raise HostError(
            f"{file} cannot be written: {error.strerror}.", code=Code.STORAGE_REFUSED, facts={"path": str(file)}
        ) from error


# --------------------------------------------------------------------------- the host's accounts


def unix_account(name: str, *, home: str | None = None) -> Account:
    """The host's account of that exact name. Only to be asked when `Settings.unix_accounts` is on.

    Args:
        name: Hub user. home: path inside the container; default: the account's own.

    Raises:
        Refusal: `not_allowed`: no such account, another spelling of one, or one that may not run containers
            (root, system accounts below uid 1000, nobody).
    """
    try:
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError):  # ValueError: a NUL in the name
        raise _not_allowed(name, "there is no such Unix account on this server") from None
    if entry.pw_name != name:
        # Directory services may ignore case: two Hub users would be one account, with one's files in both hands.
        raise _not_allowed(name, f"the Unix account is spelled {entry.pw_name!r}; log in with that name")
    if entry.pw_uid < FIRST_UID or entry.pw_uid in _INVALID_UIDS:
        raise _not_allowed(name, f"uid {entry.pw_uid} is a system account")
    gid = entry.pw_gid or entry.pw_uid
    # A further system group's number opens files and devices through the mounts (disk, docker, shadow): left out.
    groups = tuple(
        group
        for group in unix_groups(name)
        if group.gid >= FIRST_UID and group.gid not in _INVALID_UIDS and group.gid != gid
    )
    return Account(name, entry.pw_uid, gid, home or entry.pw_dir, groups)


def unix_groups(name: str) -> tuple[Group, ...]:
    """All groups of a Unix account, its primary one first; () if there is no such account. For the policy."""
    try:
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError):
        return ()
    gids = dict.fromkeys((entry.pw_gid, *os.getgrouplist(name, entry.pw_gid)))
    return tuple(Group(_group_name(gid), gid) for gid in gids)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"g{gid}"


def uid_taken(uid: int) -> bool:
    """True if the host knows an account or a group of that number: it must not be given to a Hub user."""
    for lookup in (pwd.getpwuid, grp.getgrgid):
        with suppress(KeyError):
            lookup(uid)
            return True
    return False


def uid_problems(
    uid_range: tuple[int, int],
    *,
    files: Sequence[Path] = (Path("/etc/subuid"), Path("/etc/subgid")),
    accounts: Callable[[], Iterable[pwd.struct_passwd]] = pwd.getpwall,
) -> tuple[Problem, ...]:
    """What speaks against a range of uids for Hub users: subordinate ids, existing accounts, special numbers.

    Args:
        uid_range: first and last uid, both given out.
        files: subordinate ids, in the form of subuid(5); a uid in one of them belongs to some user's containers.
        accounts: the host's accounts.
    """
    low, high = uid_range
    problems: list[Problem] = []
    hint = "choose another uid_range"
    if not FIRST_UID <= low <= high or any(low <= uid <= high for uid in _INVALID_UIDS):
        problems.append(
            Problem("uid_range", f"{low}-{high} must start at {FIRST_UID} or above and not contain {NOBODY}", hint=hint)
        )
    for file in files:
        with suppress(FileNotFoundError):
            problems += _overlaps(file, low, high, hint)
    problems += [
        Problem("/etc/passwd", f"uid {entry.pw_uid} in uid_range {low}-{high} belongs to {entry.pw_name}", hint=hint)
        for entry in accounts()
        if low <= entry.pw_uid <= high
    ]
    return tuple(problems)


def _overlaps(file: Path, low: int, high: int, hint: str) -> list[Problem]:
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        owner, *numbers = line.strip().split(":")
        if len(numbers) != 2 or not all(word.isdigit() for word in numbers):
            continue
        first, count = int(numbers[0]), int(numbers[1])
        if count and first <= high and low < first + count:
            last = first + count - 1
            message = f"{first}-{last}, subordinate ids of {owner}, overlap uid_range {low}-{high}"
            found.append(Problem(str(file), message, line=number, hint=hint))
    return found


def _not_allowed(name: str, why: str) -> Refusal:
    return Refusal(
        Code.NOT_ALLOWED, f"{name[:80]!r} cannot have containers here: {why}.", facts={"user": name[:80], "why": why}
    )
