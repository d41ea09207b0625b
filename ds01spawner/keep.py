"""What a container changed outside its mounts, kept as its owner's own image and known to the ledger."""

from __future__ import annotations

from .containers import aime
from .containers.commit import CommittedImage, commit
from .containers.engine import ContainerFacts
from .images import SavedImage
from .ledger.records import ImageRecord
from .runtime import Runtime


def saved_images(runtime: Runtime, user: str) -> tuple[SavedImage, ...]:
    """What `user` has saved, oldest first."""
    return tuple(_saved(record) for record in runtime.ledger.images_of(user))


def keep_changes(
    runtime: Runtime, user: str, server_name: str, old: ContainerFacts, *, max_size: int | None
) -> SavedImage | None:
    """Commit what a stopped container changed outside its mounts; None if that is nothing.

    The image gets a tag of its own that no later commit moves. An earlier one of the same server and base is
    untagged: all of it is in the new one. One of another base stays, and stays listed.

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
    earlier = [s for s in saved_images(runtime, user) if s.server_name == server_name and s.base == base]
    record = _record(user, server_name, made)
    runtime.ledger.remember_image(record, actor=runtime.who)
    for image in earlier:
        if image.ref != made.ref:
            runtime.engine.remove_image(image.ref)
            runtime.ledger.forget_image(image.ref, "a later commit holds all of it", actor=runtime.who)
    return _saved(record)


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
    return SavedImage(record.ref, record.image_id, record.base_image, record.server_name, record.layers, record.size)
