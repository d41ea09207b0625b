"""Image layers as tar files: merging several into one, and packing what `docker load` takes. No Docker in here.

A layer's tar holds what it adds or changes, an empty file `.wh.<name>` for what it deletes from the layers below
("whiteout"), and `.wh..wh..opq` in a folder of which nothing below shows ("opaque").
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
CHUNK = 2**20
BLOCK = tarfile.BLOCKSIZE


@dataclass
class _Plan:
    """What the merged layer will hold, while the layers are read from the top down.

    Attributes:
        kept: path → (layer, entry). whiteouts, opaque: paths.
        gone: nothing of a lower layer shows at or below these; emptied: nothing below these.
    """

    kept: dict[str, tuple[int, tarfile.TarInfo]] = field(default_factory=dict)
    whiteouts: set[str] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    emptied: set[str] = field(default_factory=set)

    def covered(self, path: str) -> bool:
        """True if a higher layer hides `path`."""
        if path in self.gone:
            return True
        parent = posixpath.dirname(path)
        while parent:
            if parent in self.gone or parent in self.emptied:
                return True
            parent = posixpath.dirname(parent)
        return False

    def add(self, layer: int, members: Sequence[tarfile.TarInfo], skip: Callable[[str], bool]) -> None:
        """Take in the next lower layer."""
        # What this layer hides, it hides from the layers below, not from itself.
        gone: set[str] = set()
        emptied: set[str] = set()
        for member in members:
            path = member.name.lstrip("/").removeprefix("./").rstrip("/")
            folder, name = posixpath.split(path)
            if path in ("", ".") or skip("/" + path):
                continue
            if name == OPAQUE:
                if not self.covered(folder):
                    self.opaque.add(folder)
                    emptied.add(folder)
            elif name.startswith(WHITEOUT):
                self._delete(posixpath.join(folder, name[len(WHITEOUT) :]), gone, emptied)
            elif not self.covered(path):
                self._keep(path, layer, member, gone, emptied)
        self.gone |= gone
        self.emptied |= emptied

    def _delete(self, path: str, gone: set[str], emptied: set[str]) -> None:
        if self.covered(path):
            return
        if path in self.kept:  # a folder, made anew above: what was there before must not show through
            self.opaque.add(path)
            emptied.add(path)
        else:
            self.whiteouts.add(path)
            gone.add(path)

    def _keep(self, path: str, layer: int, member: tarfile.TarInfo, gone: set[str], emptied: set[str]) -> None:
        if path not in self.kept:
            self.kept[path] = (layer, member)
            if not member.isdir():
                gone.add(path)
        elif not member.isdir():  # a folder above stands where this layer had put a file
            self.opaque.add(path)
            emptied.add(path)


def merge(layers: Sequence[Path], out: BinaryIO, skip: Callable[[str], bool] = lambda path: False) -> str:
    """Write one layer that does what `layers` do together.

    Args:
        layers: uncompressed tar files, lowest first. out: where the merged tar goes.
        skip: absolute paths that are left out.

    Returns:
        Its diff id (`sha256:…` of the tar).
    """
    writer = _Hashing(out)
    with ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(path)) for path in layers]
        plan = _Plan()
        for number in range(len(tars) - 1, -1, -1):
            plan.add(number, tars[number].getmembers(), skip)
        archive = stack.enter_context(tarfile.open(fileobj=writer, mode="w", format=tarfile.PAX_FORMAT))
        _write(plan, tars, archive)
    return f"sha256:{writer.digest()}"


def _write(plan: _Plan, tars: Sequence[tarfile.TarFile], archive: tarfile.TarFile) -> None:
    links: list[tuple[str, int, tarfile.TarInfo]] = []
    for path in sorted(plan.kept.keys() | plan.whiteouts):
        if path in plan.whiteouts:
            folder, name = posixpath.split(path)
            archive.addfile(tarfile.TarInfo(posixpath.join(folder, WHITEOUT + name)))
            continue
        layer, member = plan.kept[path]
        if member.islnk():
            links.append((path, layer, member))
            continue
        archive.addfile(member, tars[layer].extractfile(member) if member.isreg() else None)
        if path in plan.opaque:
            archive.addfile(tarfile.TarInfo(posixpath.join(path, OPAQUE)))
    for path in sorted(plan.opaque - plan.kept.keys()):
        archive.addfile(tarfile.TarInfo(posixpath.join(path, OPAQUE)))
    # Hard links come last, when what they point to is there. A target that a higher layer replaced lives on under
    # the first of its other names.
    moved: dict[tuple[int, str], str] = {}
    for path, layer, member in links:
        target = member.linkname.lstrip("/").removeprefix("./")
        kept = plan.kept.get(target)
        if kept is not None and kept[0] == layer:
            archive.addfile(member)
        elif (layer, target) in moved:
            archive.addfile(_changed(member, linkname=moved[layer, target]))
        else:
            original = tars[layer].getmember(member.linkname)
            archive.addfile(_changed(original, name=path), tars[layer].extractfile(original))
            moved[layer, target] = path


def _changed(member: tarfile.TarInfo, *, name: str = "", linkname: str = "") -> tarfile.TarInfo:
    """A copy with another name or link target; the extended headers must not say the old one."""
    changed = copy.copy(member)
    changed.name, changed.linkname = name or member.name, linkname or member.linkname
    changed.pax_headers = {k: v for k, v in member.pax_headers.items() if k not in ("path", "linkpath")}
    return changed


class _Hashing(io.BufferedIOBase):
    """A file to write to that hashes what passes."""

    def __init__(self, out: BinaryIO) -> None:
        super().__init__()
        self._out = out
        self._hash = hashlib.sha256()
        self._at = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._at += len(data)
        return self._out.write(data)

    def tell(self) -> int:
        return self._at

    def digest(self) -> str:
        return self._hash.hexdigest()


# --------------------------------------------------------------------------- docker load


@dataclass(frozen=True)
class ImageDraft:
    """An image to be made: its name, its `Config`, its layers' diff ids (lowest first), one comment per layer."""

    ref: str
    config: Mapping[str, Any]
    layers: tuple[str, ...]
    comments: tuple[str, ...]
    created: str
    architecture: str = "amd64"
    os: str = "linux"

    def document(self) -> bytes:
        """The image's configuration file; its hash is the image's id."""
        history = [{"created": self.created, "created_by": comment} for comment in self.comments]
        content = {
            "architecture": self.architecture,
            "os": self.os,
            "created": self.created,
            "config": dict(self.config),
            "history": history,
            "rootfs": {"type": "layers", "diff_ids": list(self.layers)},
        }
        return json.dumps(content, sort_keys=True).encode()

    @property
    def image_id(self) -> str:
        """The id that Docker will give it."""
        return f"sha256:{hashlib.sha256(self.document()).hexdigest()}"


def pack(draft: ImageDraft, new_layers: Mapping[str, Path]) -> Iterator[bytes]:
    """The archive for `docker load`, in pieces.

    Args:
        new_layers: tar file by diff id. Layers that are not in here must be known to the engine: it looks a layer
            up by its chain before it opens its tar, so that gigabytes of a base need not travel.
    """
    document = draft.document()
    config_name = f"{draft.image_id.removeprefix('sha256:')}.json"
    names = [f"{diff.removeprefix('sha256:')}/layer.tar" for diff in draft.layers]
    manifest = [{"Config": config_name, "RepoTags": [draft.ref], "Layers": names}]
    for diff, path in new_layers.items():
        yield from _packed(f"{diff.removeprefix('sha256:')}/layer.tar", path)
    yield from _packed(config_name, document)
    yield from _packed("manifest.json", json.dumps(manifest).encode())
    yield bytes(2 * BLOCK)


def _packed(name: str, content: bytes | Path) -> Iterator[bytes]:
    info = tarfile.TarInfo(name)
    info.size = content.stat().st_size if isinstance(content, Path) else len(content)
    yield info.tobuf(tarfile.PAX_FORMAT)
    if isinstance(content, Path):
        with content.open("rb") as file:
            while piece := file.read(CHUNK):
                yield piece
    else:
        yield content
    yield bytes(-info.size % BLOCK)


# --------------------------------------------------------------------------- docker save


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file to read from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def unpack(archive: Iterator[bytes], wanted: Sequence[str], folder: Path) -> dict[str, Path]:
    """The wanted layers of a `docker save` archive as files in `folder`; the others pass by.

    Older engines name layers by ids of their own and list them at the very end, so that each layer is written out
    and known by its hash. `folder` needs room for the wanted layers and one more.

    Returns:
        Path by diff id, for those of `wanted` that the archive holds.
    """
    found: dict[str, Path] = {}
    names = {diff.removeprefix("sha256:") for diff in wanted}
    stream = io.BufferedReader(_Pieces(archive), CHUNK)
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for number, member in enumerate(tar):
            by_hash = member.name.startswith("blobs/sha256/")
            if not member.isreg() or not (by_hash or member.name.endswith("/layer.tar")):
                continue
            if by_hash and posixpath.basename(member.name) not in names:
                continue
            path = folder / f"{number}.tar"
            source = tar.extractfile(member)
            with path.open("wb") as out:
                writer = _Hashing(out)
                while source is not None and (piece := source.read(CHUNK)):
                    writer.write(piece)
            diff = f"sha256:{writer.digest()}"
            if diff in wanted:
                found[diff] = path
            else:
                path.unlink()
    return found
