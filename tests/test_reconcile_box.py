"""What the reconciler concludes from pictures of the box: missing units, void leases, reboots, MIG switched over."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from reconcile_scene import BOOT, BOX, MIG_1G, MIG_2G, MIG_3G, NOW, WHOLE, box, picture

from ds01spawner.model import Gpu, Inventory, Unit, mark
from ds01spawner.reconcile.box import BoxNews, KnownBox, KnownUnit, compare
from ds01spawner.reconcile.findings import Severity

REBOOT = "22222222-0000-0000-0000-000000000000"


def without(*uuids: str, inventory: Inventory = BOX) -> Inventory:
    """The box without these units (and without GPUs of that uuid)."""
    gpus = tuple(
        replace(gpu, units=tuple(u for u in gpu.units if u.uuid not in uuids))
        for gpu in inventory.gpus
        if gpu.uuid not in uuids
    )
    return replace(inventory, gpus=gpus)


def known() -> KnownBox:
    """What a first look at the box remembers."""
    return compare(None, picture(), {}).known


def watch(inventory: Inventory, seconds: list[int], *, leased: tuple[str, ...] = (), boot: str = BOOT) -> list[BoxNews]:
    """Passes at these seconds, each knowing what the one before knew."""
    news = [BoxNews(known())]
    for second in seconds:
        at = NOW + timedelta(seconds=second)
        news.append(compare(news[-1].known, picture(inventory, at, boot), news[-1].absences, leased))
    return news[1:]


def words(news: BoxNews) -> list[str]:
    return [finding.what.value for finding in news.findings]


def test_reconcile_box_first_look_remembers_and_says_nothing() -> None:
    news = compare(None, picture(), {})
    assert not news.findings and not news.gone
    assert [unit.uuid for unit in news.known.units] == [WHOLE, MIG_3G, MIG_2G, MIG_1G]
    assert KnownBox.from_dict(news.known.as_dict()) == news.known


def test_reconcile_box_same_picture_changes_nothing() -> None:
    news = watch(BOX, [60, 120])
    assert news[-1].known == known() and not news[-1].findings and not news[-1].absences


@pytest.mark.parametrize(
    ("seconds", "gone"),
    [
        ([5], False),  # one picture is no evidence
        ([5, 10, 15, 20, 25], False),  # nor are many within a few seconds
        ([5, 70], False),  # nor two
        ([5, 60, 65], True),
        ([5, 5, 5, 90, 90], False),  # the same picture counts once
        ([5, 65, 125], True),
    ],
)
def test_reconcile_box_a_unit_is_gone_after_several_pictures_over_a_minute(seconds: list[int], gone: bool) -> None:
    last = watch(without(MIG_1G), seconds, leased=(MIG_1G,))[-1]
    assert last.gone == (frozenset({MIG_1G}) if gone else frozenset())
    assert words(last) == (["units_missing"] if gone else [])


def test_reconcile_box_absence_must_be_in_a_row() -> None:
    news = compare(known(), picture(without(MIG_1G), NOW + timedelta(seconds=5)), {})
    news = compare(news.known, picture(BOX, NOW + timedelta(seconds=10)), news.absences)
    assert not news.absences
    for second in (15, 40, 70):
        at = NOW + timedelta(seconds=second)
        news = compare(news.known, picture(without(MIG_1G), at), news.absences)
        assert not news.gone


def test_reconcile_box_alerts_once_for_all_missing_units_and_again_never() -> None:
    news = watch(without(MIG_1G, MIG_2G), [5, 65, 125, 185, 245], leased=(MIG_1G,))
    assert [words(item) for item in news] == [[], [], ["units_missing"], [], []]
    alert = news[2].findings[0]
    assert alert.severity is Severity.ALERT and set(alert.units) == {MIG_1G, MIG_2G} and not alert.lasting
    assert "mig-parted" in alert.remedy and "1g.5gb" in alert.evidence
    # A lease is void as long as there is one; what nobody holds is forgotten.
    assert news[-1].gone == {MIG_1G}
    assert {unit.uuid for unit in news[-1].known.units if unit.missing} == {MIG_1G}
    over = compare(news[-1].known, picture(without(MIG_1G, MIG_2G), NOW + timedelta(seconds=305)), news[-1].absences)
    assert MIG_1G not in {unit.uuid for unit in over.known.units} and not over.findings


def test_reconcile_box_restart_of_the_watcher_alerts_no_second_time() -> None:
    news = watch(without(MIG_1G), [5, 65, 125], leased=(MIG_1G,))[-1]
    remembered = KnownBox.from_dict(news.known.as_dict())
    again = compare(remembered, picture(without(MIG_1G), NOW + timedelta(seconds=200)), {}, (MIG_1G,))
    assert not again.findings and again.gone == {MIG_1G}


def test_reconcile_box_reboot_voids_mig_instances_at_once_and_whole_gpus_never() -> None:
    news = watch(without(MIG_1G, MIG_3G, MIG_2G), [5], boot=REBOOT)[0]
    assert words(news) == ["rebooted", "units_missing"]
    assert news.gone == {MIG_1G, MIG_2G, MIG_3G}
    assert news.known.boot_id == REBOOT
    late = watch(without(WHOLE), [5, 65, 125], boot=REBOOT)
    assert [words(item) for item in late] == [["rebooted"], [], ["units_missing"]]
    assert not late[-1].gone, "a GPU that is away may come back"


def test_reconcile_box_reboot_that_lost_nothing_voids_nothing() -> None:
    news = watch(BOX, [5, 65], boot=REBOOT)
    assert words(news[0]) == ["rebooted"] and not news[0].gone and not news[1].findings


def test_reconcile_box_restart_of_a_daemon_is_no_reboot() -> None:
    assert not watch(without(MIG_1G), [5])[0].findings


def test_reconcile_box_instance_of_a_gpu_that_does_not_answer_is_not_gone() -> None:
    parent = next(gpu for gpu in BOX.gpus if gpu.mig_enabled)
    silent = replace(parent, problem="lost: off the bus", units=mark(parent.units, "lost: off the bus"))
    for inventory in (
        replace(BOX, gpus=(BOX.gpus[0], silent)),
        replace(BOX, gpus=(BOX.gpus[0], replace(silent, units=()))),
        without(parent.uuid),
    ):
        news = watch(inventory, [5, 65, 125, 185], leased=(MIG_1G,))
        assert [words(item) for item in news] == [[], [], ["units_missing"], []]
        assert not any(item.gone for item in news)
        assert "dmesg" in news[2].findings[0].remedy
        back = compare(news[-1].known, picture(BOX, NOW + timedelta(seconds=300)), news[-1].absences)
        assert words(back) == ["units_back"] and not any(unit.missing for unit in back.known.units)


def test_reconcile_box_gpu_switched_to_mig_voids_the_whole_gpu() -> None:
    other = next(gpu for gpu in box("1g.5gb", whole=0).gpus)
    cut = replace(BOX.gpus[0], mig_enabled=True, units=other.units)
    news = watch(replace(BOX, gpus=(cut, BOX.gpus[1])), [5, 65, 125], leased=(WHOLE,))
    assert [words(item) for item in news] == [["mig_mode_changed"], [], ["units_missing"]]
    assert news[0].findings[0].severity is Severity.ALERT and "on" in news[0].findings[0].evidence
    assert news[-1].gone == {WHOLE}
    back = [compare(news[-1].known, picture(BOX, NOW + timedelta(seconds=200)), news[-1].absences)]
    assert "mig_mode_changed" in words(back[0])


def test_reconcile_box_remade_instances_are_others() -> None:
    remade = box("3g.20gb", "1g.5gb", "1g.5gb")
    fresh = {unit.uuid for unit in remade.units} - {unit.uuid for unit in BOX.units}
    news = watch(remade, [5, 65, 125], leased=(MIG_2G,))[-1]
    assert MIG_2G in news.gone and fresh <= {unit.uuid for unit in news.known.units}


def test_reconcile_box_name_that_another_profile_has_got_is_another_unit() -> None:
    def renamed(unit: Unit) -> Unit:
        return replace(unit, mig_profile="2g.10gb") if unit.uuid == MIG_1G else unit

    def change(gpu: Gpu) -> Gpu:
        return replace(gpu, units=tuple(map(renamed, gpu.units)))

    news = watch(replace(BOX, gpus=tuple(map(change, BOX.gpus))), [5, 65, 125], leased=(MIG_1G,))[-1]
    assert news.gone == {MIG_1G}


def test_reconcile_box_source_that_finds_no_gpu_voids_nothing() -> None:
    news = watch(Inventory((), "none"), [5, 65, 125, 185], leased=(WHOLE, MIG_1G))
    assert [words(item) for item in news] == [[], [], ["units_missing"], []]
    assert not any(item.gone for item in news) and news[-1].known.mig == known().mig


def test_reconcile_box_what_is_remembered_reads_back_or_fails_clearly() -> None:
    for wrong in ({}, {"boot_id": "x", "driver": None, "units": [{"odd": 1}], "mig": {}}, {"units": 3}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            KnownBox.from_dict(wrong)
    assert KnownUnit("MIG-1", "GPU-1", "0.0", "1g.5gb").words == "1g.5gb (0.0, MIG-1)"
