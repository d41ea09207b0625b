"""Folders that cannot be swapped any more: one that was checked, bound to a path that only root can change.

Docker mounts by path, and follows links in it. A project folder lies in a tree that its owner can change at any
moment: whoever puts a link in its place after our check and before Docker's mount has the host's `/` in a container,
and keeps it for good by handing a descriptor to another container. Comparing afterwards comes too late for that. So
Docker is given a path below `/run` on which the checked folder itself, by its descriptor, was bound.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ds01spawner.errors import Code, HostError

PINS = Path("/run/ds01/pins")
"""Root's alone, and gone after a reboot: a start binds anew."""
KEPT = 16
"""Pins of one user that stay. A running container has a mount of its own and needs none."""

_MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_PRIVATE = 0x2, 0x4, 0x20, 0x1000, 0x40000  # sys/mount.h
_MNT_DETACH, _UMOUNT_NOFOLLOW = 0x2, 0x8
_OPEN = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def pin(folder: int, uid: int, name: str, *, pins: Path = PINS) -> Path:
    """Bind the open folder `folder` to a path of its own, without setuid programs and devices; returns that path.

    The same folder under the same name has the same path every time.

    Args:
        folder: descriptor of what was checked. uid: whose it is. name: what tells it from others of that user.
        pins: parent of all; made root-owned.

    Raises:
        HostError: `storage_refused`: the kernel refuses the mount, or the parent is not root's.
    """
    target = pins / str(uid) / hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    try:
        with _alone(target.parent, pins):
            _sweep(target)
            target.mkdir(mode=0o700, exist_ok=True)
            if _same(folder, target):
                return target
            _detach(target)
            _mount(f"/proc/self/fd/{folder}", target, _MS_BIND)
            _mount(None, target, _MS_PRIVATE)
            _mount(None, target, _MS_REMOUNT | _MS_BIND | _MS_NOSUID | _MS_NODEV)
            if not _same(folder, target):
                raise OSError(0, "another folder appeared there")
    except OSError as error:
        raise HostError(
            f"Storage refused: the project folder cannot be bound to {target} ({error.strerror}). The Hub must run as "
            "root on the Docker host, in its mount namespace. Servers of the whole workspace start without this.",
            code=Code.STORAGE_REFUSED,
            facts={"path": str(target)},
        ) from error
    return target


def unpin_all(uids: range, *, pins: Path = PINS) -> None:
    """Take away the pins of those users; a running container keeps its mount. For clean-up after tests and demos."""
    with suppress(FileNotFoundError):
        for owner in pins.iterdir():
            if owner.name.isdigit() and int(owner.name) in uids:
                for place in owner.iterdir():
                    _remove(place)
                with suppress(OSError):
                    owner.rmdir()


@contextmanager
def _alone(parent: Path, pins: Path) -> Iterator[None]:
    """Nobody else works on this user's pins meanwhile; `parent` is there, and root's alone all the way."""
    for folder in (pins.parent, pins, parent):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid != 0 or found.st_mode & 0o022:
            raise OSError(0, f"{folder} could be changed by others than root")
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(target: Path) -> None:
    """Take away all others when there are many: the mount table grows with them, and every start copies it."""
    others = [place for place in target.parent.iterdir() if place != target]
    if len(others) >= KEPT:
        for place in others:
            _remove(place)


def _remove(place: Path) -> None:
    _detach(place)
    with suppress(OSError):
        place.rmdir()


def _same(folder: int, target: Path) -> bool:
    """True if `target` is a mount of that very folder."""
    descriptor = os.open(target, _OPEN)
    try:
        wanted, found = os.fstat(folder), os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return (wanted.st_dev, wanted.st_ino) == (found.st_dev, found.st_ino)


def _detach(target: Path) -> None:
    """Unmount everything at `target`; nothing mounted there is no error."""
    while _libc().umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        pass


def _mount(source: str | None, target: Path, flags: int) -> None:
    """mount(2). A source in /proc/self/fd is the open folder itself, wherever its name leads by now."""
    encoded = None if source is None else os.fsencode(source)
    if _libc().mount(encoded, os.fsencode(target), None, ctypes.c_ulong(flags), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
