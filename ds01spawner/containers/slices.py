"""Names of cgroup parents: pure, without a look at the machine.

A name part (group, user) is written as `systemd-escape` writes it, under both cgroup drivers, so that two
names never share a parent and none nests below another: in a slice name a raw hyphen would (`a-b.slice` lies
in `a.slice`, systemd.slice(5)), in a path a raw `..` would.
"""

from __future__ import annotations

import re

from ds01spawner.errors import Code, Refusal

NO_GROUP = r"\x6eo_group"
"""Part that stands for "in no group". No group can be named so: `escape` never escapes an `n`."""

_PLAIN = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:_.")
_LONGEST = 255
"""Bytes of a file name (NAME_MAX) and of a unit name (UNIT_NAME_MAX less the end)."""

_KERNEL_FILE = re.compile(
    r"(tasks|notify_on_release|release_agent|[0-9a-f]{64})\Z"
    r"|(blkio|cgroup|cpu|cpuacct|cpuset|debug|devices|dmem|freezer|hugetlb|io|irq|memory|misc|net_cls|net_prio"
    r"|perf_event|pids|rdma)\."
)


def escape(part: str) -> str:
    r"""`part` as `systemd-escape` writes it: `j.roe@x` becomes `j.roe\x40x`, a leading dot `\x2e`.

    Bytes of the UTF-8 form that are not ASCII letters, digits, `:`, `_` or an inner `.` become `\xNN`.

    Raises:
        Refusal: `bad_name` for the empty name, for NUL, for names that are not UTF-8, and for `/`, which
            systemd-escape would turn into a nesting hyphen.
    """
    try:
        raw = part.encode()
    except UnicodeEncodeError:
        raise _bad(part, "it is not valid UTF-8") from None
    if not raw:
        raise _bad(part, "it is empty")
    if b"/" in raw or b"\0" in raw:
        raise _bad(part, "it contains a slash or a NUL")
    return "".join(
        chr(byte) if byte in _PLAIN and not (byte == 0x2E and place == 0) else f"\\x{byte:02x}"
        for place, byte in enumerate(raw)
    )


def slice_name(root: str, group: str | None, user: str | None = None) -> str:
    r"""Name of the user's slice, `ds01-phd\x2dstudent-alice.slice` (of the group's without a user)."""
    parts = [root, _group_part(group)] + ([] if user is None else [escape(user)])
    name = "-".join(parts) + ".slice"
    _check_length(name, user if user is not None else group or "")
    return name


def cgroup_path(root: str, group: str | None, user: str | None = None) -> str:
    r"""Path of the user's parent below the cgroup mounts, `/ds01/phd\x2dstudent/alice` (of the group's without a user).

    A part that the kernel could take for one of its own files (`cpu.max`, `tasks`), or a reader for a
    container id (64 hexadecimal digits), gets its first character escaped too: a folder cannot be made where
    a file is, and a Hub name must not pass for a container.
    """
    parts = [root, _file_part(_group_part(group))] + ([] if user is None else [_file_part(escape(user))])
    for part in parts:
        _check_length(part, user if user is not None else group or "")
    return "/" + "/".join(parts)


def _group_part(group: str | None) -> str:
    return NO_GROUP if group is None else escape(group)


def _file_part(part: str) -> str:
    return f"\\x{ord(part[0]):02x}{part[1:]}" if _KERNEL_FILE.match(part) else part


def _check_length(name: str, part: str) -> None:
    if len(name) > _LONGEST:
        raise _bad(part, f"escaped it is {len(name)} characters long, {_LONGEST} fit")


def _bad(part: str, why: str) -> Refusal:
    return Refusal(Code.BAD_NAME, f"{part[:80]!r} cannot name a cgroup parent: {why}.", facts={"name": part[:80]})
