"""What a container changed outside its mounts, kept as its owner's own image and known to the ledger."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from .containers import aime
from .containers.commit import CommittedImage, commit, discard
from .containers.engine import ContainerFacts, ImageFacts
from .errors import Code, EngineError, Refusal
from .images import ImageChoice, SavedImage
from .ledger.records import ImageRecord
from .runtime import Runtime

log = logging.getLogger("ds01.images")

_ASIDE: Final = "private"
"""The ledger's kind of an image that is its owner's to choose and that no server goes on with by itself."""


def saved_images(runtime: Runtime, user: str) -> tuple[SavedImage, ...]:
    """What `user` has saved, oldest first."""
    records = sorted(runtime.ledger.images_of(user), key=lambda record: record.id or 0)
    return tuple(_saved(record) for record in records)


@dataclass(frozen=True)
class Kept:
    """What was saved of a container.

    Attributes:
        image: on its owner's list now. superseded: ids of images that nothing needs once the container is removed.
    """

    image: SavedImage
    superseded: tuple[str, ...] = ()

    def tidy(self, runtime: Runtime) -> None:
        """Delete what is superseded. The container is gone; an image that cannot go stays, without an error."""
        with suppress(EngineError):
            discard(runtime.engine, self.superseded)


def keep_changes(
    runtime: Runtime, user: str, server_name: str, old: ContainerFacts, *, max_size: int | None
) -> Kept | None:
    """Commit what a stopped container changed outside its mounts; None if that is nothing.

    The image gets a tag of its own that no later commit moves. An earlier one that the server went on with on the
    same base is untagged: all of it is in the new one. One of another base, or one that was set aside, stays listed.

    Args:
        max_size: bytes above the base that may be kept (`max_container_disk`); None = no limit.

    Raises:
        Refusal: disk_full. EngineError: Docker failed; nothing changed.
    """
    base = old.labels.get(aime.LABEL_IMAGE) or old.image_ref
    stamp = runtime.now().strftime("%Y%m%dT%H%M%S")
    target = aime.kept_image(aime.private_image(base, old.name), stamp)
    made = commit(runtime.engine, old, target=target, base_image=base, max_bytes=max_size)
    if made is None:
        return None
    earlier = _line(runtime, user, server_name, base)
    record = _record(user, server_name, made)
    runtime.ledger.remember_image(record, actor=runtime.who)
    for image in earlier:
        if image.ref != made.ref:
            runtime.engine.remove_image(image.ref)
            runtime.ledger.forget_image(image.ref, "a later commit holds all of it", actor=runtime.who)
    if made.note:
        log.warning("%s: %s", old.name, made.note)
    return Kept(_saved(record), made.superseded)


def begin_anew(runtime: Runtime, user: str, server_name: str, container_name: str, choice: ImageChoice) -> None:
    """A container now exists that does not go on with what its server had: set that aside, still listed.

    What was wished for instead becomes what the server goes on with: an own image as it is, one that was saved from
    another server under a tag of this one's (that server goes on with its own).
    """
    wished = choice.saved
    for record in _line(runtime, user, server_name, choice.base):
        if wished is None or record.ref != wished.ref:
            runtime.ledger.remember_image(replace(record, kind=_ASIDE), actor=runtime.who)
    if wished is None:
        return
    record = next(record for record in runtime.ledger.images_of(user) if record.ref == wished.ref)
    if record.server_name != server_name:
        stamp = runtime.now().strftime("%Y%m%dT%H%M%S%f")  # never the tag of a commit a moment ago
        ref = aime.kept_image(aime.private_image(choice.base, container_name), stamp)
        runtime.engine.tag(record.image_id, ref)
        record = replace(record, ref=ref, server_name=server_name, created_at=None, last_used_at=None)
    runtime.ledger.remember_image(replace(record, kind="committed"), actor=runtime.who)


def _line(runtime: Runtime, user: str, server_name: str, base: str) -> list[ImageRecord]:
    """What a server goes on with on one base; one image at most, unless something died half-way."""
    return [
        record
        for record in runtime.ledger.images_of(user)
        if record.server_name == server_name and record.base_image == base and record.kind != _ASIDE
    ]


def require_permitted(runtime: Runtime, user: str, ref: str, facts: ImageFacts) -> None:
    """Refuse an image that is somebody else's saved one, however it was named.

    A pattern such as `lab/*` matches the tags of what other users saved, and an engine may find an image by its id or
    digest. An image that an admin gave a name of its own is judged by that name.

    Raises:
        Refusal: image_not_allowed.
    """
    named = ref in facts.tags or f"{ref}:latest" in facts.tags
    record = runtime.ledger.find_image(ref) or (None if named else runtime.ledger.find_image(facts.id))
    if record is not None and record.owner != user:
        raise Refusal(Code.IMAGE_NOT_ALLOWED, f"Image {ref!r} is not yours to start.", facts={"image": ref})


def forget_missing(runtime: Runtime, image: SavedImage) -> None:
    """Take an image that Docker no longer has off its owner's list."""
    runtime.ledger.forget_image(image.ref, "Docker no longer has it", actor=runtime.who)


def _record(user: str, server_name: str, made: CommittedImage) -> ImageRecord:
    return ImageRecord(
        owner=user,
        ref=made.ref,
        image_id=made.image_id,
        base_image=made.base,
        server_name=server_name,
        size=made.size,
        layers=made.layers,
    )


def _saved(record: ImageRecord) -> SavedImage:
    return SavedImage(
        ref=record.ref,
        image_id=record.image_id,
        base=record.base_image,
        server_name=record.server_name,
        layers=record.layers,
        size=record.size,
        aside=record.kind == _ASIDE,
        at=record.created_at,
    )
