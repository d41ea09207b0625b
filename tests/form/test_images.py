"""Which image a start uses: the profile's, what the server goes on with, or what its owner asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from form_scene import PROFILES, profiles

from ds01spawner.errors import Code, Refusal
from ds01spawner.images import ImageChoice, SavedImage, choose_image, continued
from ds01spawner.model import Request

BASE = PROFILES["pytorch"]["image"]
PROFILE = profiles()[0]
OLD = SavedImage("x:main._.70001-1", "sha256:1", BASE, "")
NEW = SavedImage("x:main._.70001-2", "sha256:2", BASE, "")
LAB = SavedImage("x:lab._.70001-3", "sha256:3", BASE, "lab")
ALL = (OLD, NEW, LAB)


def choose(request: Request, saved: tuple[SavedImage, ...] = ALL) -> ImageChoice:
    return choose_image(request, PROFILE, BASE, saved)


def test_without_a_wish_the_newest_of_this_server_goes_on() -> None:
    assert choose(Request()) == ImageChoice(BASE, NEW.ref, NEW)
    assert choose(Request(image=BASE)) == ImageChoice(BASE, NEW.ref, NEW)
    assert choose(Request(server_name="lab")).saved is LAB
    assert choose(Request(server_name="other")) == ImageChoice(BASE, BASE)


def test_what_was_set_aside_does_not_go_on() -> None:
    aside = (OLD, replace(NEW, aside=True))
    assert choose(Request(), aside).saved is OLD
    assert continued((replace(OLD, aside=True),), "", BASE) is None


def test_a_fresh_start_takes_the_image_itself() -> None:
    choice = choose(Request(fresh=True))
    assert choice == ImageChoice(BASE, BASE, anew=True)
    assert choice.leaves("sha256:of the base"), "a container of the same image may have changes of its own"
    other = choose(Request(fresh=True, image="lab/tools:1"), (replace(NEW, base="lab/tools:1"),))
    assert other == ImageChoice("lab/tools:1", "lab/tools:1", anew=True)


def test_a_wished_image_is_taken_although_another_goes_on() -> None:
    choice = choose(Request(image=OLD.ref))
    assert choice == ImageChoice(BASE, OLD.ref, OLD, anew=True)
    assert choice.leaves(NEW.image_id)
    assert not choice.leaves(OLD.image_id), "its own container goes on"
    assert not choose(Request()).leaves(OLD.image_id)
    assert choose(Request(image=OLD.ref, fresh=True)) == choice


@pytest.mark.parametrize("image", ["x:main._.70002-1", "gone/base:1"])
def test_what_is_not_offered_is_refused(image: str) -> None:
    elsewhere = SavedImage("x:main._.70001-4", "sha256:4", "gone/base:1", "")
    with pytest.raises(Refusal) as caught:
        choose(Request(image=image), (*ALL, elsewhere))
    assert caught.value.code is Code.IMAGE_NOT_ALLOWED
    with pytest.raises(Refusal):
        choose(Request(image=elsewhere.ref, fresh=True), (*ALL, elsewhere))
