"""What needs root on the Docker host: users' folders, and what the kernel says of processes and disks.

Folders that are mounted into containers lie below root-owned parents that nobody else can write to, and are
opened component by component as descriptors with O_NOFOLLOW, so that no link that a user planted is followed,
whenever it was planted. Nothing is ever chowned but an empty folder that root owns. Between here and the mount
Docker works with a path again, so that path must be root's: homes and workspaces are (their parents are root's), a
project folder in a workspace is bound to one (`pins`). After the start `verify_mounted` compares device and inode.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ds01spawner.errors import Code, HostError, Refusal

from .pins import PINS, pin

WELCOME = "welcome.ipynb"
"""The notebook that an empty workspace gets."""

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40
"""Links followed in a path of the settings; the kernel's own bound."""
_MAX_DEPTH = 16
"""Components of a project path."""
_NAME_MAX = 255
"""Bytes of a file name."""
_FORBIDDEN = re.compile(r"[:,\\\"'`$*?<>|]")
"""Characters that have a meaning in mount options, shells or tools that people paste the path into."""
_CONTAINER_ID = re.compile(r"(?:[a-z0-9_-]+-)?([0-9a-f]{64})(?:\.scope)?")


# --------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class Folder:
    """A folder that is ready to be mounted.

    Attributes:
        path: for the mount. device, inode: what must be found there after the start (st_dev, st_ino).
        created: it is new. place: where it lies, for people; None = at `path`.
    """

    path: Path
    device: int
    inode: int
    created: bool = False
    place: Path | None = None

    @property
    def shown(self) -> Path:
        """Where it lies, for labels and sentences. Never to be mounted: its owner may have put a link there."""
        return self.place or self.path


def prepare_home(homes: Path, uid: int, gid: int, account: str) -> Folder:
    """The user's HOME, `<homes>/<uid>`, owned by them, 0700; made if it is not there.

    Args:
        homes: parent of all (`Settings.homes`); made root-owned if it is not there.
        account: named in errors.

    Raises:
        HostError: `storage_refused`: the parent is not safe, or the folder belongs to somebody else.
    """
    return _prepare(homes, uid, gid, (), f"the home folder of {account}")


def prepare_workspace(workspaces: Path, uid: int, gid: int, project: str | None = None, *, pins: Path = PINS) -> Folder:
    """The user's workspace, `<workspaces>/<uid>`, or a project folder in it; made if it is not there.

    Args:
        workspaces: parent of all (`Settings.workspaces`); made root-owned if it is not there.
        project: path below the user's workspace such as `thesis/run1`; None = the whole workspace.
        pins: where a project folder is bound to, out of its owner's reach.

    Raises:
        Refusal: `bad_request`: the project's path is not a plain path downwards.
        HostError: `storage_refused`: the parent is not safe, a folder belongs to somebody else, a link is in the way,
            or the project folder cannot be bound.
    """
    parts = () if project is None else project_parts(project)
    return _prepare(workspaces, uid, gid, parts, f"the workspace of uid {uid}", pins)


def project_parts(project: str) -> tuple[str, ...]:
    """The components of a project path.

    Raises:
        Refusal: `bad_request`: absolute, with `.`, `..`, hidden or empty components, control characters, characters
            that mount options or shells would understand, or too long.
    """
    parts = tuple(project.split("/"))
    bad = next((part for part in parts if not _plain_component(part)), None)
    if bad is not None or len(parts) > _MAX_DEPTH:
        raise Refusal(
            Code.BAD_REQUEST,
            f"The project folder {project[:200]!r} cannot be used: write a path below your workspace such as "
            "thesis/run1, without leading dots and special characters.",
            facts={"project": project[:200], "component": bad},
        )
    return parts


def populate_welcome(workspace: Folder, notebook: bytes, uid: int, gid: int) -> bool:
    """Put `welcome.ipynb` into an empty workspace, owned by the user.

    Returns:
        True if it was written, False if the workspace is not empty.

    Raises:
        HostError: `storage_refused`: the folder is no longer the one that was prepared, or the disk is full.
    """
    try:
        folder = os.open(workspace.path, _OPEN_FOLDER)
    except OSError as error:
        raise _refused(f"{workspace.shown} cannot be opened: {error.strerror}", workspace.shown) from error
    try:
        found = os.fstat(folder)
        if (found.st_dev, found.st_ino) != (workspace.device, workspace.inode):
            raise _refused(f"{workspace.shown} was replaced while the server was being prepared", workspace.shown)
        return _empty(folder) and _write_new(folder, WELCOME, notebook, uid, gid)
    except OSError as error:
        why = f"{WELCOME} cannot be written to {workspace.shown}: {error.strerror}"
        raise _refused(why, workspace.shown) from error
    finally:
        os.close(folder)


def verify_mounted(pid: int, target: str, folder: Folder, *, proc: Path = Path("/proc")) -> None:
    """Check from outside that a running container has `folder` at `target`.

    Args:
        pid: the container's first process. target: absolute path inside the container.

    Raises:
        HostError: `storage_refused`: something else is mounted there, or the container has ended.
    """
    try:
        found = _stat_inside(proc / str(pid) / "root", target)
    except OSError as error:
        raise _refused(
            f"the folder mounted at {target} cannot be checked ({error.strerror}); the container may have ended",
            folder.shown,
        ) from error
    if (found.st_dev, found.st_ino) != (folder.device, folder.inode):
        raise _refused(
            f"not {folder.shown} but another folder is mounted at {target}: it was replaced during the start, or "
            "Docker does not see the mounts that the Hub makes",
            folder.shown,
        )


def _prepare(parent: Path, uid: int, gid: int, project: tuple[str, ...], what: str, pins: Path | None = None) -> Folder:
    """Open `<parent>/<uid>/<project…>` downwards, making what is missing; what its owner could swap is bound."""
    if uid == 0:
        raise _refused(f"{what} cannot be prepared for root", parent)
    descriptor, path = _open_trusted(parent)
    created = False
    try:
        for part in (str(uid), *project):
            path = path / part
            below, created = _open_or_make(descriptor, part, path, uid, gid)
            os.close(descriptor)
            descriptor = below
        found = os.fstat(descriptor)
        if not project or pins is None:
            return Folder(path, found.st_dev, found.st_ino, created)
        bound = pin(descriptor, uid, str(path), pins=pins)
        return Folder(bound, found.st_dev, found.st_ino, created, place=path)
    finally:
        os.close(descriptor)


def _open_or_make(parent: int, name: str, path: Path, uid: int, gid: int) -> tuple[int, bool]:
    """Open a user's folder below the open folder `parent`; returns its descriptor and whether it is new."""
    created = False
    with suppress(FileExistsError):
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
            created = True
        except FileExistsError:
            raise
        except OSError as error:
            raise _refused(f"{path} cannot be made: {error.strerror}", path) from error
    try:
        descriptor = os.open(name, _OPEN_FOLDER, dir_fd=parent)
    except OSError as error:
        raise _refused(f"{path} is not a folder of its own (a link or a file is there)", path) from error
    try:
        _own(descriptor, path, uid, gid)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, created


def _own(descriptor: int, path: Path, uid: int, gid: int) -> None:
    """Check that the open folder belongs to the user; hand it over if it is root's and empty.

    Empty and root's is what `mkdir` just made here, or before a crash. In a tree of the user's they could put
    another one in its place, but an empty folder gives them nothing.
    """
    owner = os.fstat(descriptor).st_uid
    if owner == 0 and _empty(descriptor):
        os.fchown(descriptor, uid, gid)
        os.fchmod(descriptor, 0o700)
        return
    # Asked again: another start of the same user may have handed it over, and filled it, since.
    owner = os.fstat(descriptor).st_uid
    if owner != uid:
        raise _refused(
            f"{path} belongs to uid {owner}, not to {uid}. An administrator must look into it and then "
            f"either move it away or run: chown -R -h {uid}:{gid} {path}",
            path,
        )


def _empty(descriptor: int) -> bool:
    """True if the open folder has nothing in it; stops at the first entry, however many millions a user made."""
    with os.scandir(descriptor) as entries:
        return next(entries, None) is None


def _open_trusted(path: Path) -> tuple[int, Path]:
    """Open a folder of the settings; returns its descriptor and its real path.

    Every folder on the way, links of root's resolved, must be root's and not writable by others: whoever can
    write to one of them decides what is mounted. A sticky one (/tmp) will do, its entries are safe from others.
    Missing ones are made: 0711, so that users cannot list each other.
    """
    pending = list(reversed(path.parts[1:]))
    real: list[str] = []
    descriptor = os.open("/", _OPEN_FOLDER)
    links = 0
    try:
        while pending:
            part = pending.pop()
            step = _step_trusted(descriptor, part, Path("/", *real, part))
            if isinstance(step, int):
                os.close(descriptor)
                descriptor = step
                real = real[:-1] if part == ".." else [*real, part]
                continue
            links += 1
            if links > _MAX_LINKS:
                raise _refused(f"{path} leads through too many links", path)
            pending += reversed([part for part in step.parts if part != "/"])
            if step.is_absolute():
                os.close(descriptor)
                descriptor, real = os.open("/", _OPEN_FOLDER), []
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, Path("/", *real)


def _step_trusted(parent: int, name: str, path: Path) -> int | Path:
    """One component downwards: the descriptor of a root-owned folder, or where a link leads."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o711, dir_fd=parent)
    try:
        descriptor = os.open(name, _OPEN_FOLDER, dir_fd=parent)
    except OSError as error:
        with suppress(OSError):
            return Path(os.readlink(name, dir_fd=parent))
        raise _refused(f"{path} is not a folder: {error.strerror}", path) from error
    found = os.fstat(descriptor)
    shared = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
    if found.st_uid != 0 or shared:
        os.close(descriptor)
        raise _refused(
            f"{path} (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}) could be changed by others than "
            f"root. Run: chown root {path}; chmod go-w {path}",
            path,
        )
    return descriptor


def _stat_inside(root: Path, target: str) -> os.stat_result:
    """Status of `target` below `root` (the magic link /proc/PID/root), without following links of the image's."""
    descriptor = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in Path(target).parts[1:]:
            below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def _write_new(folder: int, name: str, content: bytes, uid: int, gid: int) -> bool:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=folder), "wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fchown(file.fileno(), uid, gid)
    return True


def _plain_component(part: str) -> bool:
    try:
        size = len(part.encode())
    except UnicodeEncodeError:
        return False
    return (
        0 < size <= _NAME_MAX
        and part.isprintable()
        and part == part.strip()
        and part[0] not in ".-~"
        and not _FORBIDDEN.search(part)
    )


def _refused(why: str, path: Path) -> HostError:
    return HostError(f"Storage refused: {why}.", code=Code.STORAGE_REFUSED, facts={"path": str(path)})


# --------------------------------------------------------------------------- the kernel's view


class Disk(NamedTuple):
    """A file system: bytes that can still be written, bytes in all."""

    free: int
    total: int


def disk_free(path: Path) -> Disk:
    """Free and total bytes of the file system of `path`.

    Raises:
        HostError: `storage_refused`: the path does not exist or its file system does not answer.
    """
    try:
        found = os.statvfs(path)
    except OSError as error:
        raise _refused(f"the disk of {path} cannot be measured: {error.strerror}", path) from error
    return Disk(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


def boot_id(file: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """The kernel's id of this boot: another one means that the machine was rebooted."""
    return file.read_text().strip()


def container_of_pid(pid: int, proc: Path = Path("/proc")) -> str | None:
    """Id (64 hexadecimal digits) of the container that the process `pid` runs in.

    Docker inside a container nests ids; the outermost is the one that the host's Docker knows.

    Returns:
        None for a process of the host and for one that has ended.
    """
    try:
        text = (proc / str(pid) / "cgroup").read_text()
    except OSError:
        return None
    return next(_container_ids(text), None)


def _container_ids(text: str) -> Iterator[str]:
    """Container ids in a /proc/PID/cgroup text, outermost first: `/docker/<id>`, `docker-<id>.scope`, `/…/<id>`."""
    for line in text.splitlines():
        path = line.split(":", 2)[-1]
        # Users may name cgroups of their own sessions as they like (delegation): no evidence.
        if path.startswith("/user.slice/"):
            continue
        for part in path.split("/"):
            match = _CONTAINER_ID.fullmatch(part)
            if match:
                yield match[1]
