"""What the form shows: cards judged by the real admission, one of them preselected, reasons and counts."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from form_scene import NOW, PROFILES, box, held, limits, profiles, snapshot, spoiled, units, view
from hypothesis import given
from hypothesis import strategies as st

from ds01spawner import admission
from ds01spawner.errors import Code, Refusal
from ds01spawner.form.cards import Card
from ds01spawner.form.view import FormView, quota_sentence
from ds01spawner.images import SavedImage
from ds01spawner.model import Limit, Request, State, Usage

ALL = ["pytorch/small", "pytorch/medium", "pytorch/whole", "pytorch/cpu", "r/cpu"]


def card(form: FormView, value: str) -> Card:
    return next(card for card in form.cards if card.value == value)


def values(form: FormView) -> list[str]:
    return [card.value for card in form.cards]


def test_an_empty_box_offers_everything_in_plain_words() -> None:
    form = view()
    assert values(form) == ALL
    assert all(card.available and not card.reason for card in form.cards)
    small = card(form, "pytorch/small")
    assert (small.title, small.tagline) == ("Small GPU, 5 GB", "Right for coursework.")
    assert small.gives == "A slice of a GPU · 16 GB memory"
    assert small.takes == "Takes 0.14 of your 1 GPU · group students"
    assert small.badge == "9 of 9 free now"
    assert card(form, "pytorch/medium").tagline == "For training a small model."
    whole, cpu = card(form, "pytorch/whole"), card(form, "pytorch/cpu")
    assert (whole.gives, whole.takes) == ("A whole GPU · 32 GB memory", "Takes all of your GPU quota · group students")
    assert (cpu.badge, cpu.gives, cpu.takes) == ("can start now", "No GPU · 8 GB memory", "")
    details = {fact.label: fact.value for fact in small.details}
    assert (details["CPU"], details["GPU memory"]) == ("4 cores", "5 GB")


def test_a_title_tells_the_memory_unless_it_does_so_itself() -> None:
    sizes = {
        "s": {"title": "Small: right for coursework", "gpu": {"mig_profile": "1g.5gb"}},
        "m": {"title": "Medium, 20GB", "gpu": {"mig_profile": "3g.20gb"}},
        "two": {"title": "Two GPUs", "gpu": {"kind": "full", "count": "2"}},
        "c": {"title": "No GPU"},
    }
    rich = limits(max_gpu_equivalents=4.0, max_gpu_slots_per_container=4)
    form = view(profiles=profiles({"p": {"image": "i", "sizes": sizes}}), limits=rich, snapshot=snapshot(box(whole=2)))
    titles = ["Small, 5 GB", "Medium, 20GB", "Two GPUs, 40 GB each", "No GPU"]
    assert [found.title for found in form.cards] == titles
    assert card(form, "p/two").gives == "2 whole GPUs · 32 GB memory"


def test_what_is_free_now_may_be_larger_than_usual() -> None:
    inventory = box()
    sizes = {"s": {"title": "Small", "gpu": {"mig_profile": "1g.5gb", "allow_larger": "true"}}}
    form = view(
        profiles=profiles({"p": {"title": "P", "image": "i", "sizes": sizes}}),
        usage=Usage((held("bo", units(inventory, "1g.5gb")),)),
        snapshot=snapshot(inventory),
    )
    only = form.cards[0]
    assert (only.title, only.notes) == ("P: Small, 5 GB", ("What is free now is larger: 10 GB.",))
    assert only.takes == "Takes 0.29 of your 1 GPU · group students"
    assert {fact.label: fact.value for fact in only.details}["GPU memory"] == "10 GB"


# --------------------------------------------------------------------------- sections


@pytest.mark.parametrize(
    ("profile", "size", "title", "tagline"),
    [
        (
            {"title": "Small GPU", "description": "right for x"},
            {"title": "Small GPU"},
            "Small GPU, 5 GB",
            "Right for x.",
        ),
        ({"title": "PyTorch"}, {"title": "Small: for x"}, "PyTorch: Small, 5 GB", "For x."),
        (
            {"title": "PyTorch", "description": "Notebooks!"},
            {"description": "for x"},
            "PyTorch, 5 GB",
            "For x. Notebooks!",
        ),
        ({"title": "Same", "description": "for x"}, {"title": "Same", "description": "For x."}, "Same, 5 GB", "For x."),
        ({"title": "Small GPU"}, {"title": "small"}, "Small GPU, 5 GB", ""),
        ({"title": "Small GPU, 5 GB"}, {"title": "Small GPU"}, "Small GPU, 5 GB", ""),
        ({"title": "Small GPU"}, {"title": "Small GPU, 5 GB: for x"}, "Small GPU, 5 GB", "For x."),
    ],
)
def test_the_only_card_of_a_profile_speaks_for_it(
    profile: dict[str, Any], size: dict[str, Any], title: str, tagline: str
) -> None:
    sizes = {"s": {**size, "gpu": {"mig_profile": "1g.5gb"}}}
    form = view(profiles=profiles({"p": {**profile, "image": "i", "sizes": sizes}}))
    only = form.cards[0]
    assert (only.title, only.tagline) == (title, tagline)
    assert [section.title for section in form.sections] == [""]


def test_a_size_without_a_name_adds_none() -> None:
    assert view(profiles=profiles({"p": {"title": "Plain", "image": "i"}})).cards[0].title == "Plain"


def test_profiles_with_one_card_share_a_grid() -> None:
    one, two = {"s": {}}, {"s": {}, "t": {}}
    shapes = {"a": one, "b": one, "c": two, "d": one, "e": one, "f": two}
    source = {name: {"title": name.upper(), "image": "i", "sizes": sizes} for name, sizes in shapes.items()}
    sections = view(profiles=profiles(source)).sections
    assert [(section.title, section.count) for section in sections] == [
        ("", 2),
        ("C", 2),
        ("F", 2),
        ("Also offered", 2),
    ]


# --------------------------------------------------------------------------- reasons


def test_mig_names_are_under_details_only() -> None:
    inventory = box()
    form = view(usage=Usage((held("bo", units(inventory, "1g.5gb")),)), snapshot=snapshot(inventory))
    small = card(form, "pytorch/small")
    face = [
        small.title,
        small.tagline,
        small.takes,
        small.badge,
        small.reason,
        small.when,
        small.gives,
    ]
    assert not any("1g" in text or "MIG" in text for text in face)
    details = {fact.label: fact for fact in small.details}
    assert details["GPU units"].value == "1g.5gb"
    assert details["Image"].value == PROFILES["pytorch"]["image"]
    assert "1g.5gb" in details["Why not now"].value
    assert details["Memory"].source == "this profile"
    assert {fact.label: fact for fact in card(form, "pytorch/whole").details}["Memory"].source == "user override"


def test_what_is_taken_is_counted_and_explained() -> None:
    inventory = box()
    small = units(inventory, "1g.5gb")
    form = view(
        usage=Usage((held("bo", small[:6]), held("cy", units(inventory, "3g.20gb")))),
        snapshot=snapshot(inventory, external=[*small[6:7], *units(inventory, None)]),
    )
    assert card(form, "pytorch/small").badge == "2 of 9 free now"
    medium, whole = card(form, "pytorch/medium"), card(form, "pytorch/whole")
    assert (medium.available, medium.code, medium.badge) == (False, Code.NO_GPU, "none free now")
    assert medium.reason == "It is held by servers, running or stopped a short while ago."
    assert whole.reason == "It is used by something outside this service."


def test_out_of_order_units_are_not_free() -> None:
    form = view(snapshot=snapshot(spoiled(box(), "lost: simulated")))
    small = card(form, "pytorch/small")
    assert small.reason == "All 9 are out of order."
    assert small.meter is not None
    assert small.meter.total == 0


def test_a_unit_that_the_box_does_not_have() -> None:
    form = view(snapshot=snapshot(box(mixed=False)))
    medium = card(form, "pytorch/medium")
    assert (medium.badge, medium.reason) == ("not on this server", "This server has no such GPU at the moment.")


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"allow_full_gpu": False}, {"pytorch/whole"}),
        ({"max_gpu_equivalents": 0.4}, {"pytorch/whole", "pytorch/medium"}),
        ({"max_gpu_equivalents": 0.0}, {"pytorch/whole", "pytorch/medium", "pytorch/small"}),
        ({"max_gpu_slots_per_container": 0}, {"pytorch/whole", "pytorch/medium", "pytorch/small"}),
        ({"max_mig_instances": 0}, {"pytorch/whole", "pytorch/medium", "pytorch/small"}),
        ({"max_containers_per_user": 0}, set(ALL)),
    ],
)
def test_what_a_user_may_never_have_is_not_offered(changes: dict[str, Any], gone: set[str]) -> None:
    assert set(ALL) - set(values(view(limits=limits(**changes)))) == gone


def test_a_pool_counts_its_own_units_only() -> None:
    form = view(limits=limits(gpu_pool=("2",)))
    assert card(form, "pytorch/small").badge == "2 of 2 free now"
    assert card(form, "pytorch/whole").badge == "not on this server"


def test_several_gpus_count_whole_ones_of_any_model() -> None:
    two = {"p": {"image": "i", "sizes": {"two": {"gpu": {"count": "2", "kind": "full"}}}}}
    inventory = box(whole=3)
    odd = tuple(
        replace(gpu, model="H100-80GB", units=tuple(replace(u, model="H100-80GB") for u in gpu.units))
        if gpu.index == 1
        else gpu
        for gpu in inventory.gpus
    )
    form = view(
        profiles=profiles(two),
        limits=limits(max_gpu_equivalents=4.0, max_gpu_slots_per_container=4),
        snapshot=snapshot(replace(inventory, gpus=odd)),
    )
    only = form.cards[0]
    assert (only.badge, only.title) == ("3 of 3 free now", "p, 40 GB each")
    assert only.takes == "Takes 2 of your 4 GPUs · group students"


# --------------------------------------------------------------------------- quota, and when


def test_a_used_quota_names_the_server_that_uses_it() -> None:
    inventory = box()
    form = view(usage=Usage((held("ada", units(inventory, None), server="lab"),)), snapshot=snapshot(inventory))
    small = card(form, "pytorch/small")
    assert (small.available, small.code, small.badge) == (False, Code.USER_QUOTA, "your quota is used")
    assert "server lab" in small.reason
    assert "group students" in small.reason
    assert card(form, "pytorch/cpu").available
    assert small.when == ""


@pytest.mark.parametrize(
    ("holder", "caps", "value", "code"),
    [
        ("ada", {}, "pytorch/medium", Code.USER_QUOTA),
        ("ada", {"max_gpu_equivalents": None, "max_mig_instances": 1}, "pytorch/small", Code.USER_COUNT),
        ("bo", {}, "pytorch/whole", Code.NO_GPU),
    ],
)
def test_the_end_of_a_hold_is_told(holder: str, caps: dict[str, Any], value: str, code: Code) -> None:
    inventory = box()
    stopped = held(
        holder, units(inventory, None), server="lab", state=State.HELD, until=NOW + timedelta(minutes=11, seconds=5)
    )
    later = held("bo", [], server="x", state=State.HELD, until=NOW + timedelta(minutes=1))
    form = view(usage=Usage((later, stopped)), snapshot=snapshot(inventory), limits=limits(**caps))
    found = card(form, value)
    assert found.code is code
    assert found.when == "Expected free in about 12m."


def test_the_end_of_a_hold_of_the_group_is_told() -> None:
    inventory = box()
    cap = replace(limits(), group_total_gpu=Limit(1.0, "group students"))
    stopped = held("bo", units(inventory, None), state=State.HELD, until=NOW + timedelta(hours=2))
    form = view(usage=Usage((stopped,)), snapshot=snapshot(inventory), limits=cap)
    small = card(form, "pytorch/small")
    assert (small.code, small.badge, small.when) == (
        Code.GROUP_QUOTA,
        "your group's quota is used",
        "Expected free in about 2h.",
    )


def test_too_many_servers_closes_every_card() -> None:
    running = tuple(held("ada", [], server=f"s{number}") for number in range(3))
    form = view(usage=Usage(running))
    assert {found.code for found in form.cards} == {Code.TOO_MANY_SERVERS}
    assert form.chosen is not None
    assert form.chosen.value == "pytorch/small"
    assert {found.reason for found in form.cards} == {"You run as many servers as you may."}
    (note,) = form.notes
    assert "may run 3 at a time" in note, "the whole sentence stands once"
    assert not any(found.takes for found in form.cards)


def test_the_quota_lines_count_this_server_too() -> None:
    inventory = box()
    own = held("ada", units(inventory, "3g.20gb"), state=State.HELD)
    other = held("ada", units(inventory, "1g.5gb")[:1], server="lab")
    form = view(
        usage=Usage((other, held("bo", units(inventory, None))), own=own),
        snapshot=snapshot(inventory),
        limits=limits(max_mig_instances=2),
    )
    assert [(line.label, line.value, line.source) for line in form.quota] == [
        ("GPU in use", "0.64 of 1", "group students"),
        ("GPU units in use", "2 of 2", "group students"),
        ("Servers in use", "1 of 3", "defaults"),
    ]
    assert quota_sentence(form.quota[:1]) == "GPU in use 0.64 of 1"
    assert card(form, "pytorch/medium").available, "what this server holds itself does not stand in its way"


def test_no_cap_no_quota_line() -> None:
    free = limits(max_gpu_equivalents=None, max_containers_per_user=None)
    assert view(limits=free).quota == ()
    assert card(view(limits=free), "pytorch/small").takes == ""


# --------------------------------------------------------------------------- fail closed


@pytest.mark.parametrize("age", [None, timedelta(minutes=1), timedelta(minutes=-1)])
def test_without_news_of_the_gpus_only_cpu_cards_start(age: timedelta | None) -> None:
    old = None if age is None else replace(snapshot(box()), at=NOW - age)
    form = view(snapshot=old)
    assert {found.value for found in form.cards if found.available} == {"pytorch/cpu", "r/cpu"}
    assert card(form, "pytorch/small").code is Code.INVENTORY_STALE
    assert card(form, "pytorch/small").meter is None
    assert "GPU" in form.notes[0]
    assert form.chosen is not None
    assert form.chosen.value == "pytorch/cpu"


def test_a_missing_image_is_said_and_closes_the_card() -> None:
    def image_of(profile: Any) -> str | None:
        if profile.name == "r":
            raise Refusal(Code.IMAGE_MISSING, "None fits this server.")
        return None

    form = view(image_of=image_of)
    assert {found.badge for found in form.cards} == {"image missing"}
    assert card(form, "r/cpu").reason == "None fits this server."
    assert "admin" in card(form, "pytorch/cpu").reason


def test_nothing_offered_is_an_empty_form() -> None:
    form = view(profiles=(), last_choice={"profile": "pytorch"})
    assert form.cards == ()
    assert form.chosen is None


def test_a_broken_policy_is_noted() -> None:
    assert "last good ones are in force" in view(policy_problems=True).notes[0]


# --------------------------------------------------------------------------- preselection


def chosen(**changes: Any) -> tuple[str, tuple[str, ...]]:
    form = view(**changes)
    assert sum(found.checked for found in form.cards) == 1
    assert form.chosen is not None
    return form.chosen.value, form.notes


def test_the_default_size_of_the_default_profile_is_preselected() -> None:
    assert chosen() == ("pytorch/small", ())


def test_the_nearest_free_card_is_preselected_never_a_whole_gpu() -> None:
    inventory = box()
    small, medium = held("bo", units(inventory, "1g.5gb")), held("cy", units(inventory, "3g.20gb"))
    assert chosen(usage=Usage((small,)), snapshot=snapshot(inventory))[0] == "pytorch/medium"
    assert chosen(usage=Usage((small, medium)), snapshot=snapshot(inventory))[0] == "pytorch/cpu"


def test_a_whole_gpu_is_no_default_even_where_the_file_says_so() -> None:
    sizes = {
        "big": {"gpu": {"kind": "full", "count": "1"}, "default": "true"},
        "mid": {"gpu": {"kind": "mig", "mig_profile": "3g.20gb"}},
    }
    offered = profiles({"p": {"image": "i", "sizes": sizes}})
    assert chosen(profiles=offered)[0] == "p/mid"
    inventory = box()
    busy = Usage((held("bo", units(inventory, "3g.20gb")),))
    assert chosen(profiles=offered, usage=busy, snapshot=snapshot(inventory))[0] == "p/mid", "stays, though disabled"
    assert chosen(profiles=profiles({"p": {"image": "i", "sizes": {"big": sizes["big"]}}}))[0] == "p/big"


def test_any_gpu_counts_as_whole_where_it_would_be_one() -> None:
    sizes = {"gpu": {"gpu": {"count": "1", "kind": "any"}, "default": "true"}, "cpu": {}}
    offered = profiles({"p": {"image": "i", "sizes": sizes}})
    assert chosen(profiles=offered)[0] == "p/cpu"
    assert chosen(profiles=offered, limits=limits(allow_full_gpu=False))[0] == "p/gpu"


def test_the_last_choice_is_preselected_a_whole_gpu_too() -> None:
    assert chosen(last_choice={"profile": "pytorch", "size": "whole"}) == ("pytorch/whole", ())
    assert chosen(last_choice={"profile": "r"}) == ("r/cpu", ())


@pytest.mark.parametrize("last", [None, {}, {"__jupyterhub_x": 1}])
def test_no_last_choice_no_note(last: Any) -> None:
    assert chosen(last_choice=last) == ("pytorch/small", ())


@pytest.mark.parametrize(
    "last",
    [
        {"profile": "gone"},
        {"profile": "pytorch", "size": "gone"},
        {"profile": "<b>x</b>"},
        {"gpus": "all"},
        {"size": "cpu", "gpus": 3},
        {"a": 1},
    ],
)
def test_a_last_choice_that_is_not_valid_any_more_is_noted_and_not_echoed(last: dict[str, Any]) -> None:
    value, notes = chosen(last_choice=last)
    assert value == "pytorch/small"
    assert notes == ("What you chose last time is not offered any more. Chosen for you: Small GPU, 5 GB.",)


def test_a_last_choice_that_the_user_may_not_have_any_more() -> None:
    value, notes = chosen(last_choice={"profile": "pytorch", "size": "whole"}, limits=limits(allow_full_gpu=False))
    assert value == "pytorch/small"
    assert "not offered any more" in notes[0]


def test_a_last_choice_that_is_busy_now() -> None:
    inventory = box()
    value, notes = chosen(
        last_choice={"profile": "pytorch", "size": "medium"},
        usage=Usage((held("bo", units(inventory, "3g.20gb")),)),
        snapshot=snapshot(inventory),
    )
    assert value == "pytorch/small"
    assert notes == ("What you chose last time, Medium GPU, 20 GB, cannot start now. Chosen for you: Small GPU, 5 GB.",)


def test_the_rest_of_the_last_choice_is_filled_in() -> None:
    form = view(
        last_choice={
            "size": "cpu",
            "project": "thesis",
            "cpus": 1,
            "memory": "4g",
            "image": "aimehub/pytorch-2.7.1-aime",
        }
    )
    assert (form.project, form.cpus, form.memory) == ("thesis", "1", "4g")
    assert [option.ref for option in form.groups[0].images if option.selected] == ["aimehub/pytorch-2.7.1-aime"]
    assert form.notes == ()


def test_an_image_that_is_not_offered_any_more_is_noted() -> None:
    form = view(last_choice={"size": "cpu", "image": "lab/old:1"})
    assert not any(option.selected for group in form.groups for option in group.images)
    assert "image you chose last time" in form.notes[0]
    assert view(last_choice={"size": "cpu", "image": PROFILES["pytorch"]["image"]}).notes == ()


def test_own_saved_images_are_offered_where_their_base_is() -> None:
    base = PROFILES["pytorch"]["image"]
    saved = [
        SavedImage("ds01/lab._.70001:1", "sha256:1", base, "lab"),
        SavedImage("ds01/main._.70001:1", "sha256:2", "lab/custom:3", ""),
        SavedImage("ds01/old._.70001:1", "sha256:3", "gone/base:1", "old"),
    ]
    pytorch, r = view(private_images=saved).groups
    assert [(option.ref, option.saved) for option in pytorch.images] == [
        ("aimehub/pytorch-2.7.1-aime", False),
        ("ds01/main._.70001:1", True),
        ("ds01/lab._.70001:1", True),
    ]
    assert "server main" in pytorch.images[1].label
    assert r.images == ()
    assert pytorch.image_label == f"The image of this profile ({base})"
    assert pytorch.fresh_label == ""
    again = view(private_images=saved, server_name="lab").groups[0]
    assert again.image_label == f"As this server left it ({base})"
    assert "fresh" in again.fresh_label
    assert [option.ref for option in again.images if option.saved] == ["ds01/main._.70001:1"], "not its own"


def test_what_was_set_aside_is_listed_with_its_date() -> None:
    base = PROFILES["pytorch"]["image"]
    saved = [
        SavedImage("x:main._.70001-1", "sha256:1", base, "", aside=True, at=NOW),
        SavedImage("x:main._.70001-2", "sha256:2", base, ""),
    ]
    (option,) = [option for option in view(private_images=saved).groups[0].images if option.saved]
    assert option.ref == "x:main._.70001-1"
    assert option.label == f"Saved from your server main on 2026-11-23 12:00 UTC ({base})"
    r = {"r": {"image": "lab/rstudio:4"}}
    assert not view(profiles=profiles(r), private_images=saved).groups[0].selectable


def test_a_server_that_was_started_before_may_start_fresh() -> None:
    form = view(last_choice={"size": "cpu", "fresh": True})
    pytorch, r = form.groups
    assert pytorch.fresh_label
    assert pytorch.image_label.startswith("As this server left it")
    assert r.fresh_label == ""
    assert form.notes == ()
    assert not form.adjusted, "a fresh start is no habit"


def test_a_saved_image_is_no_habit_either() -> None:
    base = PROFILES["pytorch"]["image"]
    saved = [SavedImage("x:lab._.70001-1", "sha256:1", base, "lab")]
    for last in ("x:lab._.70001-1", "x:main._.70001-9"):
        form = view(last_choice={"size": "cpu", "image": last}, private_images=saved)
        assert not any(option.selected for group in form.groups for option in group.images)
        assert form.notes == (), "where it led is what the server goes on with"


# --------------------------------------------------------------------------- form and start agree

kinds = st.sampled_from(["1g.5gb", "2g.10gb", "3g.20gb", None])


@given(
    taken=st.lists(st.tuples(st.sampled_from(["ada", "bo", "cy"]), kinds, st.integers(1, 9)), max_size=4),
    outside=st.lists(kinds, max_size=2),
    share=st.sampled_from([None, 0.2, 0.6, 1.0, 2.0]),
    count=st.sampled_from([None, 1, 3]),
    full=st.booleans(),
    servers=st.sampled_from([1, 3, None]),
    stale=st.booleans(),
)
def test_a_card_can_start_exactly_if_admission_says_so(
    taken: list[tuple[str, str | None, int]],
    outside: list[str | None],
    share: float | None,
    count: int | None,
    full: bool,
    servers: int | None,
    stale: bool,
) -> None:
    inventory = box()
    gone: set[str] = set()
    holdings = []
    for number, (user, kind, wanted) in enumerate(taken):
        found = [unit for unit in units(inventory, kind) if unit.uuid not in gone][:wanted]
        gone |= {unit.uuid for unit in found}
        holdings.append(held(user, found, server=f"s{number}"))
    seen = snapshot(inventory, external=[unit for kind in outside for unit in units(inventory, kind)[-1:]])
    seen = replace(seen, at=NOW - timedelta(hours=1)) if stale else seen
    usage = Usage(tuple(holdings))
    caps = limits(
        max_gpu_equivalents=share, max_mig_instances=count, allow_full_gpu=full, max_containers_per_user=servers
    )
    form = view(usage=usage, limits=caps, snapshot=seen)
    shown = {found.value: found for found in form.cards}
    for profile in profiles():
        for key, size in profile.sizes.items():
            found = shown.pop(f"{profile.name}/{key}", None)
            try:
                admission.check(
                    Request(profile=profile.name, size=key), profile, size, profile.image or "", caps, usage, seen, NOW
                )
            except Refusal as refusal:
                assert found is None or (not found.available and found.code is refusal.code and found.reason)
            else:
                assert found is not None
                assert found.available
    assert not shown
    assert sum(found.checked for found in form.cards) == (1 if form.cards else 0)
