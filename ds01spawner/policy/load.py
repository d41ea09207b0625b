"""Policy files → `Policy`, with problems by file, line and column; and the store that keeps the last good version.

Files of a policy folder: `resource-limits.yaml` (required), `profiles.yaml`, `external.yaml`, `groups/<group>.members`.
All texts together are one bundle (canonical JSON) with one hash: what is stored in the ledger, so that every process
uses the same version and a restart keeps it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from ds01spawner.errors import PolicyInvalid, Problem

from .checks import check_external, check_limits, check_profiles
from .explain import Model, closest, in_order, validate
from .fields import read_name
from .schema import ExternalFile, LimitsFile, Policy, ProfilesFile
from .yamltree import MAX_BYTES, Node, TreeError, parse

log = logging.getLogger("ds01.policy")

LIMITS = "resource-limits.yaml"
PROFILES = "profiles.yaml"
EXTERNAL = "external.yaml"
GROUPS = "groups"
MEMBERS = ".members"

_FOREIGN = {
    "user-overrides.yaml": f"write its entries below user_overrides in {LIMITS}",
    "group-overrides.txt": f"write its entries below members in {LIMITS} or in groups/<group>.members",
    "lifecycle-exemptions.yaml": f"write idle_timeout: never with an until below user_overrides in {LIMITS}",
}

_COMMENT = re.compile(r"(?:^|\s)#.*")

_RACY_NS = 2_000_000_000
"""A file changed so recently may change again within one tick of its file system's clock: read it again."""


@dataclass(frozen=True)
class Loaded:
    """What reading a folder gave.

    Attributes:
        policy: None if there is any error. problems: errors and warnings by place.
        text: canonical JSON bundle of all texts. hash: SHA-256 of it.
    """

    policy: Policy | None
    problems: tuple[Problem, ...]
    text: str
    hash: str

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems for which the files are refused."""
        return tuple(problem for problem in self.problems if not problem.warning)


class VersionStore(Protocol):
    """Where the last good version survives a restart (the ledger)."""

    def save_policy(self, hash: str, text: str) -> None:  # noqa: A002  # the word of the contract
        """Remember a version that was put into force."""

    def last_policy(self) -> tuple[str, str] | None:
        """(hash, text) of the version that was put into force last."""


class MemoryVersions:
    """A `VersionStore` for tests and for commands that have no ledger."""

    def __init__(self, last: tuple[str, str] | None = None) -> None:
        self._last = last

    def save_policy(self, hash: str, text: str) -> None:  # noqa: A002
        """Remember a version."""
        self._last = (hash, text)

    def last_policy(self) -> tuple[str, str] | None:
        """The version remembered last."""
        return self._last


# --------------------------------------------------------------------------- reading


def read_policy(folder: Path) -> Loaded:
    """Read and check a policy folder. Never raises for what stands in the files."""
    texts, problems = _read_texts(folder)
    return _load(texts, problems, str(folder))


def policy_from_text(text: str) -> Policy:
    """The policy of a stored bundle.

    Raises:
        PolicyInvalid: the bundle is damaged, or was written for another version of this program.
    """
    try:
        texts = json.loads(text)
        if not isinstance(texts, dict) or not all(isinstance(part, str) for part in texts.values()):
            raise ValueError("not a mapping of file names to texts")
    except ValueError as error:
        raise PolicyInvalid([Problem("stored policy", f"damaged: {error}")]) from error
    loaded = _load(texts, [], "stored policy")
    if loaded.policy is None:
        raise PolicyInvalid(loaded.problems)
    return loaded.policy


def _load(texts: Mapping[str, str], problems: list[Problem], folder: str) -> Loaded:
    """Bundle → policy. `problems` are those found while reading."""
    bundle = json.dumps(texts, sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(bundle.encode()).hexdigest()
    found = list(problems)

    limits = profiles = external = None
    if LIMITS in texts:
        limits, tree = _model(LimitsFile, texts[LIMITS], f"{folder}/{LIMITS}", found)
        members = _members(limits, texts, folder, found)
        if limits is not None and tree is not None:
            found.extend(check_limits(limits, members, tree, f"{folder}/{LIMITS}"))
    else:
        members = {}
    if PROFILES in texts:
        profiles, tree = _model(ProfilesFile, texts[PROFILES], f"{folder}/{PROFILES}", found)
        if profiles is not None and tree is not None:
            found.extend(check_profiles(profiles, limits, tree, f"{folder}/{PROFILES}"))
    elif LIMITS in texts:
        found.append(Problem(f"{folder}/{PROFILES}", "there is no such file: nothing can be started", warning=True))
    if EXTERNAL in texts:
        external, tree = _model(ExternalFile, texts[EXTERNAL], f"{folder}/{EXTERNAL}", found)
        if external is not None and tree is not None:
            found.extend(check_external(external, tree, f"{folder}/{EXTERNAL}"))
    ordered = in_order(found)
    if limits is None or any(not problem.warning for problem in ordered):
        return Loaded(None, ordered, bundle, digest)
    policy = Policy(
        limits=limits,
        members=members,
        profiles=dict(profiles.profiles) if profiles else {},
        external=external.external if external else (),
        hash=digest,
        text=bundle,
        warnings=ordered,
    )
    return Loaded(policy, ordered, bundle, digest)


def _model(model: type[Model], text: str, file: str, found: list[Problem]) -> tuple[Model | None, Node | None]:
    """One file's text as its model and tree; problems are added to `found`."""
    try:
        tree = parse(text, file)
    except TreeError as error:
        found.extend(error.problems)
        return None, None
    # Keys that start with x- are a place for anchors, as in Docker's compose files.
    for key in [key for key in tree.entries if key.startswith("x-")]:
        del tree.entries[key]
    result, problems = validate(model, tree, file)
    found.extend(problems)
    return result, tree


def _read_texts(folder: Path) -> tuple[dict[str, str], list[Problem]]:
    """The texts of all policy files by their path below `folder`."""
    texts: dict[str, str] = {}
    problems: list[Problem] = []
    if not folder.is_dir():
        return texts, [Problem(str(folder), "there is no such folder", hint="say which folder has the policy files")]
    for file in [LIMITS, PROFILES, EXTERNAL, *_member_files(folder, problems)]:
        path = folder / file
        try:
            texts[file] = _read_text(path, problems)
        except FileNotFoundError:
            if file == LIMITS:
                problems.append(Problem(str(path), "there is no such file", hint="every policy needs it"))
        except OSError as error:
            problems.append(Problem(str(path), f"cannot be read: {error.strerror or error}"))
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            line, column = before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1) + 1
            problems.append(Problem(str(path), "this is not UTF-8 text", line, column))
    for file, hint in _FOREIGN.items():
        if (folder / file).exists():
            problems.append(Problem(str(folder / file), "this file is not read here", hint=hint, warning=True))
    return texts, problems


def _member_files(folder: Path, problems: list[Problem]) -> list[str]:
    try:
        names = sorted(path.name for path in (folder / GROUPS).iterdir() if path.name.endswith(MEMBERS))
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(Problem(str(folder / GROUPS), f"cannot be read: {error.strerror or error}"))
        return []
    return [f"{GROUPS}/{name}" for name in names]


def _read_text(path: Path, problems: list[Problem]) -> str:
    """A regular file's text; a FIFO or device would block or never end, so it is refused."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:  # noqa: PTH123  # from a descriptor, there is no path form
        facts = os.fstat(stream.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(0, "it is not a regular file")
        if facts.st_mode & stat.S_IWOTH:
            hint = f"chmod o-w {path}: who writes it decides who gets the GPUs"
            problems.append(Problem(str(path), "everybody may write this file", hint=hint, warning=True))
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(0, f"it is larger than {MAX_BYTES >> 10} KiB")
    return content.decode("utf-8-sig")


def _members(
    limits: LimitsFile | None, texts: Mapping[str, str], folder: str, found: list[Problem]
) -> dict[str, frozenset[str]]:
    """Group → names, from the limits file and from `groups/<group>.members`."""
    groups = limits.groups if limits is not None else {}
    members = {name: set(group.members) for name, group in groups.items()}
    for file, text in texts.items():
        if not file.endswith(MEMBERS):
            continue
        place = f"{folder}/{file}"
        group = file[len(GROUPS) + 1 : -len(MEMBERS)]
        names = _member_names(text, place, found)
        if group in members:
            members[group].update(names)
        elif limits is not None:
            hint = closest(group, groups) or f"add the group to {LIMITS}, or remove the file"
            found.append(Problem(place, f'there is no group "{group}": the file is ignored', 1, 1, hint, warning=True))
    return {group: frozenset(names) for group, names in members.items()}


def _member_names(text: str, file: str, found: list[Problem]) -> list[str]:
    """Names of a members file: one a line, `#` starts a comment at the start of a line or after a blank."""
    names: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        written = _COMMENT.sub("", line)
        name = written.strip()
        if not name:
            continue
        column = written.index(name) + 1
        try:
            if any(character.isspace() or character in ",;" for character in name):
                raise ValueError(f'"{name[:60]}" is not one name; write one name on each line')
            read_name(name)
        except ValueError as error:
            found.append(Problem(file, str(error), number, column))
            continue
        if name in names:
            message = f'"{name}" is listed twice'
            found.append(Problem(file, message, number, column, f"first in line {names[name]}", warning=True))
        names.setdefault(name, number)
    return list(names)


# --------------------------------------------------------------------------- the version in force


class PolicyStore:
    """The policy in force: the newest version of the files that was good as a whole.

    Files are looked at on every call of `current` and read again when they changed, so that an edit takes effect at
    the next start. Empty, half-written and wrong files change nothing; `problems` says what is wrong with them.
    Safe for use by several threads.
    """

    def __init__(self, folder: Path, versions: VersionStore) -> None:
        self._folder = folder
        self._versions = versions
        self._lock = threading.Lock()
        self._policy: Policy | None = None
        self._problems: tuple[Problem, ...] = ()
        self._seen: _Signature | None = None

    def current(self) -> Policy:
        """The policy in force.

        Raises:
            PolicyInvalid: the files are wrong and there never was a good version.
        """
        with self._lock:
            signature = _signature(self._folder)
            if self._policy is None or signature != self._seen or signature.recent():
                self._read(signature)
            if self._policy is None:
                raise PolicyInvalid(self._problems)
            return self._policy

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Findings about the files as they were at the last call of `current`; empty before the first."""
        return self._problems

    @property
    def hash(self) -> str:
        """Hash of the version in force; "" if there is none."""
        return self._policy.hash if self._policy is not None else ""

    def _read(self, signature: _Signature) -> None:
        """Read the files and put them into force if they are good as a whole."""
        loaded = read_policy(self._folder)
        if _signature(self._folder) != signature:
            # Somebody is writing: what was read may be half of two versions. Look again at the next call.
            self._seen = None
            if self._policy is not None:
                return
        else:
            self._seen = signature
        last = self._policy or self._restored()
        problems = loaded.problems
        if loaded.policy is not None and last is not None:
            doubts = _lost(last, loaded.policy, self._folder)
            cut = _cut_short(last.text, loaded.text) if signature.recent() and not doubts else []
            if cut:
                # Half of a file may well be valid YAML. Somebody who removed its end is obeyed a moment later.
                self._seen = None
                doubts = [_being_written(self._folder / file) for file in cut]
            if doubts:
                loaded = replace(loaded, policy=None)
            problems = in_order([*problems, *doubts])
        changed = loaded.policy is not None and (last is None or loaded.hash != last.hash)
        if changed:
            self._versions.save_policy(loaded.hash, loaded.text)
        if problems != self._problems:
            _tell(problems, kept=loaded.policy is None and last is not None)
        self._policy, self._problems = loaded.policy if changed else last, problems

    def _restored(self) -> Policy | None:
        """The version that was in force before this process started."""
        stored = self._versions.last_policy()
        if stored is None:
            return None
        try:
            return policy_from_text(stored[1])
        except PolicyInvalid:
            return None  # written for another version of this program: as good as none


def _tell(problems: Sequence[Problem], *, kept: bool) -> None:
    """Write new findings to the log, once: the admin who made a slip looks there first."""
    for problem in problems:
        log.log(logging.WARNING if problem.warning else logging.ERROR, "policy: %s", problem)
    if kept:
        log.error("policy: the last good version stays in force until the files are right")


def _cut_short(last: str, new: str) -> list[str]:
    """Files of a bundle whose text is only the beginning of what it was."""
    before, now = json.loads(last), json.loads(new)
    return [
        file
        for file, text in before.items()
        if len(now.get(file, text).rstrip()) < len(text.rstrip()) and text.startswith(now[file].rstrip())
    ]


def _being_written(path: Path) -> Problem:
    message = "the end is missing, and the file was written just now: it may be half-written"
    return Problem(str(path), message, hint="it is looked at again in two seconds", warning=True)


def _lost(last: Policy, new: Policy, folder: Path) -> list[Problem]:
    """Files of the version in force that are gone or emptied now: an accident until somebody says otherwise."""
    before, now = json.loads(last.text), json.loads(new.text)
    problems = []
    for file, text in before.items():
        if file.endswith(MEMBERS) and file[len(GROUPS) + 1 : -len(MEMBERS)] not in new.groups:
            continue
        path = str(folder / file)
        if file not in now:
            hint = "restore it; to empty it on purpose, keep the file with a comment in it"
            problems.append(Problem(path, "the file is gone, and the version in force has it", hint=hint))
        elif text.strip() and not now[file]:
            hint = "to empty it on purpose, write a comment into it"
            problems.append(Problem(path, "the file is empty, and the version in force has names in it", 1, 1, hint))
    return problems


@dataclass(frozen=True)
class _Signature:
    """What a change of the files changes: names, inodes, sizes and times; and when it was taken."""

    files: tuple[tuple[str, int, int, int, int, int], ...]
    newest_ns: int
    taken_ns: int = field(compare=False)

    def recent(self) -> bool:
        """True if a file changed so shortly before that a second change may have left no trace."""
        return abs(self.taken_ns - self.newest_ns) < _RACY_NS


def _signature(folder: Path) -> _Signature:
    entries = []
    for path in sorted([*folder.glob("*.yaml"), *(folder / GROUPS).glob(f"*{MEMBERS}"), folder / GROUPS]):
        try:
            facts = path.stat()
        except OSError:
            continue
        times = (facts.st_mtime_ns, facts.st_ctime_ns)
        entries.append((str(path), facts.st_ino, facts.st_size, facts.st_mode, *times))
    return _Signature(tuple(entries), max((entry[5] for entry in entries), default=0), time.time_ns())
