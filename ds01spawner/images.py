"""Which image a start uses: the profile's, one that the profile allows, or one that its owner saved. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import Alternative, Code, Refusal
from .model import Request
from .policy.schema import Profile


@dataclass(frozen=True)
class SavedImage:
    """An image that the ledger knows as committed for one owner.

    Attributes:
        ref: its name in Docker. base: the image it was first made from. server_name: the server it was saved from.
        layers: layers above the base. size: bytes above the base.
    """

    ref: str
    image_id: str
    base: str
    server_name: str
    layers: int = 0
    size: int = 0


@dataclass(frozen=True)
class ImageChoice:
    """What a start uses.

    Attributes:
        base: the image of the policy that this lineage goes back to (decides tags, labels and re-basing).
        source: what the container is created from: `base` itself or a saved image.
        saved: the saved image, if `source` is one.
    """

    base: str
    source: str
    saved: SavedImage | None = None


def profile_image(profile: Profile, newest: Callable[[str, str | None], str | None]) -> str:
    """The image a profile names, by reference or by framework.

    Args:
        newest: (framework, version or None) → newest image of the catalogue for this box, or None.

    Raises:
        Refusal: image_missing, when the catalogue has nothing that runs here.
    """
    if profile.image:
        return profile.image
    found = newest(profile.framework, profile.version) if profile.framework else None
    if found is None:
        raise Refusal(
            Code.IMAGE_MISSING,
            f"Profile {profile.name!r} asks for the newest {profile.framework or 'image'} of the catalogue, but "
            "none fits this server. Choose another profile, or ask the admin to name an image for it.",
            facts={"profile": profile.name, "framework": profile.framework},
        )
    return found


def choose_image(request: Request, profile: Profile, default: str, saved: Sequence[SavedImage]) -> ImageChoice:
    """The image of one start.

    Without a wish: what was saved from this very server on the same base goes on, else the profile's image.
    A wish must be the profile's image, match one of its `images` patterns (shell patterns on the whole
    reference, digest included), or be one of the owner's own saved images.

    Raises:
        Refusal: image_not_allowed.
    """
    newest_first = list(reversed(saved))
    wish = request.image
    if wish is None or wish == default:
        own = next((s for s in newest_first if s.server_name == request.server_name and s.base == default), None)
        return ImageChoice(default, own.ref if own else default, own)
    mine = next((s for s in newest_first if s.ref == wish), None)
    if mine is not None and allowed(mine.base, profile, default):
        return ImageChoice(mine.base, mine.ref, mine)
    if mine is None and allowed(wish, profile, default):
        own = next((s for s in newest_first if s.server_name == request.server_name and s.base == wish), None)
        return ImageChoice(wish, own.ref if own else wish, own)
    raise Refusal(
        Code.IMAGE_NOT_ALLOWED,
        f"Image {wish!r} is not offered by profile {profile.title or profile.name!r}.",
        facts={"image": wish, "profile": profile.name},
        alternatives=[Alternative(f"the profile's own image {default}", {"profile": profile.name})],
    )


def allowed(image: str, profile: Profile, default: str) -> bool:
    """True if the profile offers `image`."""
    return image == default or any(fnmatch.fnmatchcase(image, pattern) for pattern in profile.images)
