"""Which image a start uses: the profile's, one that the profile allows, or one that its owner saved. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from .containers import aime
from .errors import Alternative, Code, Refusal
from .model import Request
from .policy.schema import Profile

_ID = re.compile(r"(sha256:)?[0-9a-f]{1,64}")
"""What Docker may take for (the beginning of) an image id."""


@dataclass(frozen=True)
class SavedImage:
    """An image that the ledger knows as committed for one owner.

    Attributes:
        ref: its name in Docker. base: the image it was first made from. server_name: the server it was saved from.
        layers: layers above the base. size: bytes above the base.
        aside: the server has begun anew since; only a wish takes it up again. at: when it was saved, if known.
    """

    ref: str
    image_id: str
    base: str
    server_name: str
    layers: int = 0
    size: int = 0
    aside: bool = False
    at: datetime | None = None


@dataclass(frozen=True)
class ImageChoice:
    """What a start uses.

    Attributes:
        base: the image of the policy that this lineage goes back to (decides tags, labels and re-basing).
        source: what the container is created from: `base` itself or a saved image.
        saved: the saved image, if `source` is one.
        anew: this very source is wished for, not what the server went on with before.
    """

    base: str
    source: str
    saved: SavedImage | None = None
    anew: bool = False

    def leaves(self, made_from: str) -> bool:
        """True if a container that was made from the image of that id must not go on as this choice."""
        return self.anew and (self.saved is None or self.saved.image_id != made_from)


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
    reference, digest included), or be one of the owner's own saved images. A fresh start takes an image of the
    policy as it is, whatever was saved on it.

    Args:
        default: the profile's image. saved: of the owner, oldest first.

    Raises:
        Refusal: image_not_allowed.
    """
    wish = request.image or default
    mine = next((s for s in saved if s.ref == wish), None)
    if mine is not None and allowed(mine.base, profile, default):
        return ImageChoice(mine.base, mine.ref, mine, anew=True)
    if mine is None and allowed(wish, profile, default) and (wish == default or not _hidden(wish)):
        own = None if request.fresh else continued(saved, request.server_name, wish)
        return ImageChoice(wish, own.ref if own else wish, own, anew=request.fresh)
    raise Refusal(
        Code.IMAGE_NOT_ALLOWED,
        f"Image {wish!r} is not offered by profile {profile.title or profile.name!r}.",
        facts={"image": wish, "profile": profile.name},
        alternatives=[Alternative(f"the profile's own image {default}", {"profile": profile.name})],
    )


def continued(saved: Sequence[SavedImage], server_name: str, base: str) -> SavedImage | None:
    """What a server goes on with on that base: its newest saved image (`saved` is oldest first), if any."""
    own = (s for s in reversed(saved) if s.server_name == server_name and s.base == base and not s.aside)
    return next(own, None)


def _hidden(image: str) -> bool:
    """True for what no pattern may reach: an image by its id (a pattern judges names), and the private or saved tag of
    some container (its owner's alone)."""
    return _ID.fullmatch(image) is not None or aime.SEPARATOR in image.rpartition("/")[2]


def allowed(image: str, profile: Profile, default: str) -> bool:
    """True if the profile offers `image`.

    A `*` does not cross registries: an image of a named registry (`host.example/…`, `host:5000/…`) needs a pattern that
    begins with that very name, or `pytorch*` would mean `pytorch.evil.example/x` too.
    """
    if image == default:
        return True
    if ".." in image or "//" in image:
        return False
    home = _registry(image)
    return any(fnmatch.fnmatchcase(image, pattern) for pattern in profile.images if pattern.startswith(home))


def _registry(image: str) -> str:
    """`host/` of a reference that names a registry, by Docker's own rule; "" otherwise."""
    first, slash, _ = image.partition("/")
    return f"{first}/" if slash and ("." in first or ":" in first or first == "localhost") else ""
