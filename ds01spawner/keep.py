"""What a container changed outside its mounts, kept as its owner's own image and known to the ledger."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from .containers import aime
from .containers.commit import CommittedImage, commit
from .containers.engine import ContainerFacts
from .images import ImageChoice, SavedImage
from .ledger.records import ImageRecord
from .runtime import Runtime

_ASIDE: Final = "private"
"""The ledger's kind of an image that is its owner's to choose and that no server goes on with by itself."""


def saved_images(runtime: Runtime, user: str) -> tuple[SavedImage, ...]:
    """What `user` has saved, oldest first."""
    records = sorted(runtime.ledger.images_of(user), key=lambda record: record.id or 0)
    return tuple(_saved(record) for record in records)


def keep_changes(
    runtime: Runtime, user: str, server_name: str, old: ContainerFacts, *, max_size: int | None
) -> SavedImage | None:
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
    return _saved(record)


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
    aside = record.kind == _ASIDE
    return SavedImage(
        record.ref, record.image_id, record.base_image, record.server_name, record.layers, record.size, aside
    )
