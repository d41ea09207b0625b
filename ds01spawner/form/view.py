"""What the spawn form shows, as plain values: cards, notes, quota lines. Pure; `form.render_form` makes HTML of it.

The cards are made in `cards`; here they are put together, and one of them is preselected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import takewhile
from typing import Any

from ds01spawner import admission_words as words
from ds01spawner.containers import aime
from ds01spawner.errors import Code, Ds01Error, Refusal
from ds01spawner.images import SavedImage, allowed, continued
from ds01spawner.model import (
    DEFAULT_SERVER,
    Inventory,
    Limits,
    Request,
    Snapshot,
    State,
    Usage,
)
from ds01spawner.policy.schema import Profile

from . import words as plain
from .cards import Card, Fact, Scene, make_card
from .choice import choose, default_profile, profile_title, size_key
from .request import IMAGE_FIELD, SpawnRequest

AS_LEFT = "As this server left it"
FRESH = "Start fresh from the profile's image (what was saved stays in this list)"


@dataclass(frozen=True)
class ImageOption:
    """One image to choose instead of the profile's own."""

    ref: str
    label: str
    saved: bool = False
    selected: bool = False


@dataclass(frozen=True)
class Group:
    """One profile with its cards.

    Attributes:
        image: the profile's own; image_label: what comes without a wish (the same, or what this server saved of it).
        fresh_label: offers to begin anew from the profile's own; "" where there is nothing to leave behind.
        images: the others to choose from.
    """

    profile: str
    title: str
    description: str
    image: str | None
    cards: tuple[Card, ...]
    image_label: str = ""
    fresh_label: str = ""
    images: tuple[ImageOption, ...] = ()

    @property
    def image_field(self) -> str:
        """Name of the profile's image selector."""
        return f"{IMAGE_FIELD}{self.profile}"

    @property
    def selectable(self) -> bool:
        """True if there is more than one image to start from."""
        return bool(self.images or self.fresh_label)


@dataclass(frozen=True)
class Section:
    """Profiles that share one grid: one that has several cards, with its title, or some with one card each.

    The title is "" where the cards need none.
    """

    groups: tuple[Group, ...]
    title: str = ""
    description: str = ""

    @property
    def count(self) -> int:
        """Cards in the grid."""
        return sum(len(group.cards) for group in self.groups)


@dataclass(frozen=True)
class FormView:
    """Everything on the form. `server` is its name for people; `project`, `cpus`, `memory` are prefilled."""

    user: str
    server: str
    groups: tuple[Group, ...]
    quota: tuple[Fact, ...]
    notes: tuple[str, ...]
    at: datetime
    project: str = ""
    cpus: str = ""
    memory: str = ""

    @property
    def sections(self) -> tuple[Section, ...]:
        """The grids from top to bottom: profiles with one card each stand together, first or last."""
        first = tuple(takewhile(lambda group: len(group.cards) == 1, self.groups))
        others = self.groups[len(first) :]
        large = [Section((group,), group.title, group.description) for group in others if len(group.cards) > 1]
        last = tuple(group for group in others if len(group.cards) == 1)
        found = (Section(first), *large, Section(last, "Also offered"))
        return tuple(section for section in found if section.groups)

    @property
    def cards(self) -> tuple[Card, ...]:
        """All cards in order."""
        return tuple(card for group in self.groups for card in group.cards)

    @property
    def adjusted(self) -> bool:
        """True if something is filled in that only the details show."""
        selected = any(option.selected for group in self.groups for option in group.images)
        return selected or bool(self.project or self.cpus or self.memory)

    @property
    def chosen(self) -> Card | None:
        """The preselected card; None only if nothing is offered."""
        return next((card for card in self.cards if card.checked), None)


def build_view(
    *,
    user: str,
    server_name: str,
    limits: Limits,
    profiles: Sequence[Profile],
    usage: Usage,
    snapshot: Snapshot | None,
    now: datetime,
    image_of: Callable[[Profile], str | None],
    last_choice: Mapping[str, Any] | None = None,
    private_images: Sequence[SavedImage] = (),
    policy_problems: bool = False,
) -> FormView:
    """The form of `user` for the server `server_name`.

    Args:
        profiles: what the user is offered, in file order (`policy.resolve.offered_profiles`).
        usage: as the ledger gives it for this server (its own holding apart). snapshot: None = no watcher yet.
        last_choice: the `user_options` of the last start, as stored; it is parsed and judged anew, never trusted.
        image_of: the image a profile means on this machine, None (or a Refusal) where there is none.
        private_images: what the user saved. policy_problems: the files on disk are wrong, an older policy rules.
    """
    known = snapshot or Snapshot(at=datetime.min.replace(tzinfo=timezone.utc), inventory=Inventory((), "none"))
    scene = Scene(server_name, limits, usage, known, now)
    remembered, lost = _remembered(last_choice, server_name, profiles)
    before = None if remembered is None else remembered.profile
    groups = tuple(
        group
        for profile in profiles
        if (group := _group(scene, profile, image_of, private_images, started=profile.name == before)) is not None
    )
    notes = _machine_notes(groups, known, now, policy_problems)
    groups, chosen_note = _preselect(groups, profiles, remembered, lost)
    view = FormView(
        user=user,
        server=server_name or DEFAULT_SERVER,
        groups=groups,
        quota=quota_lines(limits, usage, user),
        notes=tuple(note for note in (*notes, chosen_note) if note),
        at=now,
    )
    return _prefill(view, remembered)


# --------------------------------------------------------------------------- one profile


def _group(
    scene: Scene,
    profile: Profile,
    image_of: Callable[[Profile], str | None],
    private_images: Sequence[SavedImage],
    *,
    started: bool,
) -> Group | None:
    """The profile's cards, None if none of them is for this user. `started`: this server was started with it last."""
    missing = ""
    try:
        image = image_of(profile)
    except Refusal as refusal:
        image, missing = None, refusal.message
    if image is None and not missing:
        missing = "Its image is not on this server yet. Ask the admin to fetch it."
    cards = tuple(
        card for size in profile.sizes.values() if (card := make_card(scene, profile, size, image, missing)) is not None
    )
    if not cards:
        return None
    if len(cards) == 1:
        cards = (_alone(profile, cards[0]),)
    own = None if image is None else continued(private_images, scene.server_name, image)
    goes_on = own is not None or (started and image is not None)
    return Group(
        profile=profile.name,
        title=profile_title(profile),
        description=profile.description or "",
        image=image,
        cards=cards,
        image_label=f"{AS_LEFT} ({image})" if goes_on else f"The image of this profile ({image})",
        fresh_label=FRESH if goes_on else "",
        images=_image_options(profile, image, private_images, scene.server_name),
    )


def _alone(profile: Profile, card: Card) -> Card:
    """A profile's only card: it speaks for the profile, which has no heading then."""
    given = card.name if profile.sizes[card.size].title else ""
    name = plain.joined_title(profile_title(profile), given)
    about = plain.sentence(profile.description or "")
    return replace(card, name=name, tagline=" ".join(dict.fromkeys(text for text in (card.tagline, about) if text)))


# --------------------------------------------------------------------------- quota


def quota_lines(limits: Limits, usage: Usage, user: str) -> tuple[Fact, ...]:
    """What the user holds of what they may hold, one line per cap that is set, each with its source."""
    lines: list[Fact] = []
    own_units = usage.own.units if usage.own else {}
    units = usage.units_of(user) + len(own_units)
    share = usage.share_of(user) + sum(own_units.values())
    own_running = usage.own is not None and usage.own.state in (State.RESERVED, State.ACTIVE)
    servers = usage.servers_of(user) + own_running
    for key, label, held in (
        ("max_gpu_equivalents", "GPU in use", words.amount(share)),
        ("max_mig_instances", "GPU units in use", str(units)),
        ("max_containers_per_user", "Servers in use", str(servers)),
    ):
        if key in limits.values and limits[key] is not None:
            lines.append(Fact(label, f"{held} of {words.amount(float(limits[key]))}", limits.source(key)))
    return tuple(lines)


def quota_sentence(lines: Sequence[Fact]) -> str:
    """The same as one line for the home page: "GPU in use 0.5 of 1 · Servers in use 1 of 3"."""
    return " · ".join(f"{line.label} {line.value}" for line in lines)


def _machine_notes(
    groups: Sequence[Group], snapshot: Snapshot, now: datetime, policy_problems: bool
) -> tuple[str, ...]:
    """What stands in the way of several cards, once."""
    notes = []
    if policy_problems:
        notes.append("The rules of this server were changed and have a mistake; the last good ones are in force.")
    cards = [card for group in groups for card in group.cards]
    if any(card.code is Code.INVENTORY_STALE for card in cards):
        notes.append(f"{words.stale(snapshot, now).message} This page keeps looking.")
    notes += dict.fromkeys(card.refused for card in cards if card.code is Code.TOO_MANY_SERVERS)
    return tuple(notes)


# --------------------------------------------------------------------------- images


def _image_options(
    profile: Profile, image: str | None, saved: Sequence[SavedImage], server_name: str
) -> tuple[ImageOption, ...]:
    """Images the user may take instead: those the profile names in full, and what they saved on a base it allows.

    What this server goes on with by itself is no choice of its own.
    """
    if image is None:
        return ()
    named = [ref for ref in profile.images if ref != image and not set("*?[") & set(ref)]
    by_itself = [continued(saved, server_name, ref) for ref in (image, *named)]
    options = [ImageOption(ref, ref) for ref in named]
    options += [
        ImageOption(item.ref, _saved_label(item), saved=True)
        for item in reversed(saved)
        if allowed(item.base, profile, image) and item not in by_itself
    ]
    return tuple(options)


def _saved_label(item: SavedImage) -> str:
    when = f" on {item.at.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC" if item.at else ""
    return f"Saved from your server {item.server_name or DEFAULT_SERVER}{when} ({item.base})"


# --------------------------------------------------------------------------- the preselected card


def _remembered(
    last_choice: Mapping[str, Any] | None, server_name: str, profiles: Sequence[Profile]
) -> tuple[Request | None, bool]:
    """The last choice with profile and size filled in, and whether there was one that is not valid any more."""
    if not last_choice or not isinstance(last_choice, Mapping):
        return None, False
    try:
        request = SpawnRequest.parse(last_choice, server_name=server_name, door="form")
        profile, size = choose(request, profiles)
    except Ds01Error:
        return None, True
    return replace(request, profile=profile.name, size=size_key(profile, size)), False


def _preselect(
    groups: Sequence[Group], profiles: Sequence[Profile], remembered: Request | None, lost: bool
) -> tuple[tuple[Group, ...], str]:
    """`groups` with exactly one card checked, and a note if that is not what was chosen last time."""
    cards = [card for group in groups for card in group.cards]
    if not cards:
        return tuple(groups), ""
    wanted = f"{remembered.profile}/{remembered.size}" if remembered else None
    last = next((card for card in cards if card.value == wanted), None)
    chosen = last if last is not None and last.available else _smallest(cards, profiles)
    note = ""
    if last is None and (lost or remembered is not None):
        note = f"What you chose last time is not offered any more. Chosen for you: {chosen.title}."
    elif last is not None and chosen is not last:
        note = f"What you chose last time, {last.title}, cannot start now. Chosen for you: {chosen.title}."
    return tuple(
        replace(group, cards=tuple(replace(card, checked=card is chosen) for card in group.cards)) for group in groups
    ), note


def _smallest(cards: Sequence[Card], profiles: Sequence[Profile]) -> Card:
    """The smallest sufficient card: the default profile's default size, else what comes nearest to it.

    A whole GPU is chosen on purpose, never by us, unless whole GPUs are all there is.
    """
    profile = default_profile(profiles)
    favourite = "" if profile is None else f"{profile.name}/{profile.default_size}"
    home = "" if profile is None else profile.name

    def rank(card: Card) -> tuple[bool, bool, bool, bool, bool, float]:
        without_gpu = card.share == 0.0
        return (
            card.whole,
            not card.available,
            card.value != favourite,
            card.profile != home,
            without_gpu,
            card.share,
        )

    return min(cards, key=rank)


def _prefill(view: FormView, remembered: Request | None) -> FormView:
    """Put the rest of a last choice that is still valid into the form: image, folder, fewer cores, less memory.

    A fresh start and a saved image are no habit: the server goes on from where they led.
    """
    chosen = view.chosen
    if remembered is None or chosen is None or chosen.value != f"{remembered.profile}/{remembered.size}":
        return view
    mine = next(group for group in view.groups if group.profile == chosen.profile)
    offered = {option.ref for option in mine.images}
    notes = view.notes
    wish = remembered.image
    if wish is not None and aime.SEPARATOR not in wish and wish not in offered | {mine.image}:
        notes = (*notes, "The image you chose last time is not offered any more; the profile's own is taken.")
    groups = tuple(
        replace(
            group,
            images=tuple(
                replace(option, selected=group is mine and not option.saved and option.ref == wish)
                for option in group.images
            ),
        )
        for group in view.groups
    )
    return replace(
        view,
        groups=groups,
        notes=notes,
        project=remembered.project or "",
        cpus="" if remembered.cpus is None else f"{remembered.cpus:g}",
        memory="" if remembered.memory is None else exact_size(remembered.memory),
    )


def exact_size(size: int) -> str:
    """`size` in bytes as a text that parses back to it: "16g", "1536m", or the number."""
    for unit, factor in (("g", 2**30), ("m", 2**20), ("k", 2**10)):
        if size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)
