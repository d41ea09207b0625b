"""What a container changed outside its mounts, kept as its owner's own image and known to the ledger."""

from __future__ import annotations

from .containers.engine import ContainerFacts
from .images import SavedImage
from .ledger.records import ImageRecord
from .runtime import Runtime


def saved_images(runtime: Runtime, user: str) -> tuple[SavedImage, ...]:
    """What `user` has saved, oldest first."""
    return tuple(_saved(record) for record in runtime.ledger.images_of(user))


def _saved(record: ImageRecord) -> SavedImage:
    return SavedImage(record.ref, record.image_id, record.base_image, record.server_name, record.layers, record.size)


def keep_changes(
    runtime: Runtime, user: str, server_name: str, old: ContainerFacts, *, max_size: int | None
) -> SavedImage | None:
    """PROVISIONAL."""
    return None
