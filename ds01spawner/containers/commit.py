"""Keeping what a container changed outside its mounts: committed to the owner's own tag, without any secret.

Docker's own commit copies the container's whole configuration into the image, the Hub's API token included, twice:
into what the image hands down and (engines before 25) into a record of the container it came from. So the layer that
Docker makes is taken and the image around it is written anew, from the configuration of the image that the
container was created from.
"""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ds01spawner.errors import Code, EngineError, Refusal

from . import aime, layers
from .engine import Engine
from .facts import ContainerFacts, ImageFacts

REBASE_AT = 20
"""Layers above the base at which they are merged into one (Docker ends at about 125 in all)."""
HUB_ENV = ("JUPYTERHUB_", "JPY_")
OUR_LABELS = ("ds01.", "aime.mlc")
PASSING_TREES = ("/tmp", "/var/tmp", "/run", "/var/run", "/dev", "/proc", "/sys")  # noqa: S108 - paths in the image
"""Nothing below these is worth keeping."""
PASSING_FILES = (
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/mtab",
    "/.dockerenv",
    "/sbin/docker-init",
    "/usr/sbin/docker-init",  # where /sbin is a link, as on every current Debian and Ubuntu
)
"""What Docker itself puts into every container."""
BYTECODE = "__pycache__"


@dataclass(frozen=True)
class CommittedImage:
    """An image that holds one container's changes; the ledger remembers it.

    Attributes:
        ref: its tag. image_id: its id. base: the policy's image that it goes back to.
        size: bytes above the base. layers: layers above the base.
        superseded: ids of images that nothing needs any more once the old container is removed.
        note: what did not work although the changes are safe; may be "".
    """

    ref: str
    image_id: str
    base: str
    size: int
    layers: int
    superseded: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class DiskUse:
    """What a container takes outside its mounts, in bytes: written since it was created, and committed before."""

    written: int
    committed: int

    @property
    def total(self) -> int:
        """What `max_container_disk` is compared with."""
        return self.written + self.committed


# --------------------------------------------------------------------------- pure


def substance(changes: Iterable[tuple[str, int]], mounts: Collection[str]) -> tuple[str, ...]:
    """The changed paths that are worth a commit.

    Args:
        changes: (path, kind) as Docker compares them. mounts: where something is mounted; Docker makes those points.

    Left out: mount points and what leads to them, temporary folders, files that Docker puts there, Python's byte
    code, and folders that only show because something in them changed.
    """
    paths = [path for path, _ in changes]
    above_others = {parent for path in [*mounts, *paths] for parent in _parents(path)}
    return tuple(
        path
        for path in paths
        if path not in above_others
        and path not in mounts
        and not passing(path)
        and not any(_below(path, mount) for mount in mounts)
    )


def passing(path: str) -> bool:
    """True for what no commit needs to keep."""
    return (
        path in PASSING_FILES
        or any(_below(path, tree) for tree in PASSING_TREES)
        or path in PASSING_TREES
        or BYTECODE in path.split("/")
    )


def _below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _parents(path: str) -> list[str]:
    found = []
    while (path := posixpath.dirname(path)) not in ("", "/"):
        found.append(path)
    return found


def scrubbed(config: Mapping[str, Any]) -> dict[str, Any]:
    """An image's configuration without the Hub's variables and without our and AIME's container labels."""
    env = [line for line in config.get("Env") or () if not line.startswith(HUB_ENV)]
    labels = {k: v for k, v in (config.get("Labels") or {}).items() if not k.startswith(OUR_LABELS)}
    return {**config, "Env": env, "Labels": labels}


def blanked(container: ContainerFacts, image: ImageFacts) -> dict[str, Any]:
    """Overrides for Docker's commit, which can empty a variable or a label but not take it away."""
    config = scrubbed(image.config)
    kept = {line.partition("=")[0] for line in config["Env"]}
    env = [*config["Env"], *(f"{name}=" for name in container.env if name not in kept)]
    labels = {**dict.fromkeys(container.labels, ""), **config["Labels"]}
    names = ("Cmd", "Entrypoint", "WorkingDir", "Volumes", "ExposedPorts", "Healthcheck")
    rest = {name: config[name] for name in names if config.get(name)}
    return {**rest, "User": config.get("User") or "0", "Env": env, "Labels": labels}


def above(image: ImageFacts, base: ImageFacts | None) -> int | None:
    """Number of layers that `image` has above `base`; None if it does not stand on it."""
    if base is None or image.layers[: len(base.layers)] != base.layers:
        return None
    return len(image.layers) - len(base.layers)


# --------------------------------------------------------------------------- the edge


def base_of(engine: Engine, container: ContainerFacts, base_image: str) -> ImageFacts | None:
    """The image that a container goes back to: as it was then, even if its name has moved on since."""
    return engine.image_facts(container.labels.get(aime.LABEL_IMAGE_ID) or base_image)


def disk_use(engine: Engine, container: ContainerFacts, base_image: str) -> DiskUse:
    """Measure what a container takes. Docker walks its files for this: seconds, for a container with many."""
    image, base = engine.image_facts(container.image_id), base_of(engine, container, base_image)
    committed = image.size - base.size if image and base and above(image, base) else 0
    return DiskUse(engine.disk_use(container.id), max(0, committed))


def require_room(use: DiskUse, limit: int | None, name: str) -> None:
    """Refuse a commit that would pass `max_container_disk`.

    Raises:
        Refusal: disk_full.
    """
    if limit is None or use.total <= limit:
        return
    raise Refusal(
        Code.DISK_FULL,
        f"Container {name} has {use.total / 2**30:.1f} GiB outside your folders, and you may keep "
        f"{limit / 2**30:.1f} GiB. Start it once more as it was and move or delete what is not needed (look at "
        "`du -xsh /opt /usr/local`), or ask an admin for more.",
        facts={"size": use.total, "written": use.written, "committed": use.committed, "limit": limit},
    )


def commit(
    engine: Engine,
    container: ContainerFacts,
    *,
    target: str,
    base_image: str,
    max_bytes: int | None = None,
    workdir: Path | None = None,
    rebase_at: int = REBASE_AT,
    now: datetime | None = None,
) -> CommittedImage | None:
    """Save what a container changed outside its mounts as the image `target`.

    Args:
        container: the (stopped) container. target: the owner's own tag; it moves to the new image.
        base_image: the policy's image that the container goes back to.
        max_bytes: `max_container_disk`; None = no limit. workdir: for the temporary files of a re-base.
        rebase_at: layers above the base at which they become one.

    Returns:
        None if nothing of substance changed (then there is no new image, and `target` stays what it is).

    Raises:
        Refusal: disk_full. EngineError: Docker failed; `target` is then unchanged.
    """
    mounts = [mount.target for mount in container.mounts]
    if not substance(engine.changes(container.id), mounts):
        return None
    base = base_of(engine, container, base_image)
    require_room(disk_use(engine, container, base_image), max_bytes, container.name)
    image = engine.image_facts(container.image_id)
    if image is None:
        raise EngineError(
            f"The image of {container.name} is gone from Docker, so its changes cannot be saved. Look at `docker "
            f"image ls -a` and restore {container.image_ref}.",
            code=Code.IMAGE_MISSING,
        )
    saved = _commit_clean(engine, container, image, target, _stamp(now))
    count = above(saved, base)
    result = CommittedImage(
        ref=target,
        image_id=saved.id,
        base=base_image,
        size=max(0, saved.size - (base.size if base else image.size)),
        layers=1 if count is None else count,
        superseded=_superseded(image, base),
    )
    if base is None or count is None or count < rebase_at:
        return result
    try:
        return rebase(engine, result, base, workdir=workdir, now=now)
    except (EngineError, OSError) as error:
        # The changes are safe in the image with many layers; the next commit tries again.
        return replace(result, note=f"{count} layers could not be merged into one: {error}")


def _stamp(now: datetime | None) -> str:
    return (now or datetime.now(timezone.utc)).astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _superseded(image: ImageFacts, base: ImageFacts | None) -> tuple[str, ...]:
    return () if base is not None and image.id == base.id else (image.id,)


def _commit_clean(engine: Engine, container: ContainerFacts, image: ImageFacts, target: str, stamp: str) -> ImageFacts:
    comment = f"changes of {container.name}"
    raw = engine.commit(container.id, blanked(container, image), comment)
    if engine.info().containerd_store:
        # It keeps no record of the container, and loads no image whose layers are not in the archive.
        engine.tag(raw, target)
        return _there(engine, target)
    try:
        return _made(engine, image, target, _there(engine, raw).layers, {}, comment, stamp)
    finally:
        engine.remove_image(raw)


def _made(
    engine: Engine,
    like: ImageFacts,
    ref: str,
    diffs: tuple[str, ...],
    new: Mapping[str, Path],
    comment: str,
    stamp: str,
) -> ImageFacts:
    """Make the image `ref` of these layers with the clean configuration of `like`."""
    draft = layers.ImageDraft(
        ref=ref,
        config=scrubbed(like.config),
        layers=diffs,
        comments=(*(f"layer {number}" for number in range(1, len(diffs))), comment),
        created=stamp,
        architecture=like.architecture,
        os=like.os,
    )
    engine.load(layers.pack(draft, new))
    return _there(engine, draft.image_id)


def _there(engine: Engine, ref: str) -> ImageFacts:
    facts = engine.image_facts(ref)
    if facts is None:
        raise EngineError(f"Docker made an image and does not have it: {ref}.", code=Code.INTERNAL)
    return facts


def rebase(
    engine: Engine,
    committed: CommittedImage,
    base: ImageFacts,
    *,
    workdir: Path | None = None,
    now: datetime | None = None,
) -> CommittedImage:
    """Merge all layers above the base into one, leaving out what passes (temporary folders).

    Docker hands out images only whole, so the base passes by once: its size in reading, and as much again in Docker's
    own temporary folder. `workdir` needs twice the size above the base, or the base's largest layer.

    Raises:
        EngineError, OSError: it did not work; the image is as it was.
    """
    image = _there(engine, committed.image_id)
    upper = image.layers[len(base.layers) :]
    if engine.info().containerd_store:
        return replace(committed, note="layers are not merged on this engine (containerd image store)")
    with tempfile.TemporaryDirectory(prefix="ds01-rebase-", dir=workdir) as folder:
        files = layers.unpack(engine.save(image.id), upper, Path(folder))
        missing = [diff for diff in upper if diff not in files]
        if missing:
            raise EngineError(f"Docker's copy of {committed.ref} lacks the layers {missing}.", code=Code.INTERNAL)
        merged = Path(folder) / "merged.tar"
        with merged.open("wb") as out:
            diff = layers.merge([files[d] for d in upper], out, passing)
        comment = f"{len(upper)} commits merged"
        saved = _made(engine, image, committed.ref, (*base.layers, diff), {diff: merged}, comment, _stamp(now))
    return replace(
        committed,
        image_id=saved.id,
        size=max(0, saved.size - base.size),
        layers=1,
        superseded=(*committed.superseded, image.id),
    )


def discard(engine: Engine, images: Sequence[str]) -> None:
    """Delete superseded images, once their containers are gone; one with a name or a user stays, without an error."""
    for image in images:
        facts = engine.image_facts(image)
        if facts is not None and not facts.tags:
            engine.remove_image(image)
