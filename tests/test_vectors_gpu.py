"""Every case of the shared vectors about GPU shares, who gets which device, and what a group holds together.

`DS01_VECTORS` names another folder with files of the same form. Each case runs through `admission.check` with the
limits that the real policy gives the user, on a simulated box.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds01spawner import admission
from ds01spawner.errors import Refusal
from ds01spawner.gpu.held import read_held
from ds01spawner.gpu.mig import geometry_of
from ds01spawner.gpu.simulated import SimulatedGpu, SimulatedUnit, build
from ds01spawner.model import GpuAsk, GpuKind, Inventory, Request, Snapshot, Unit, Usage
from ds01spawner.policy.resolve import resolve
from ds01spawner.policy.schema import Policy, Profile, ProfileSize
from tests.vectors_support import case_params, document, fixture_policy, fixture_time, noon

DOCUMENT = document()
POLICY = fixture_policy(DOCUMENT)
MODEL = str(DOCUMENT["fixture"].get("gpu_model", "A100-40GB"))


def box_of(layout: Sequence[Sequence[str] | None], model: str = MODEL) -> Inventory:
    """One GPU per entry, each a list of its MIG profiles; an empty list is a whole GPU."""
    gpus = [SimulatedGpu(model, tuple(SimulatedUnit(name) for name in profiles or ())) for profiles in layout]
    return build(gpus, salt="vectors")


def ask_of(case: dict[str, Any]) -> GpuAsk:
    """The GPU part of a case: a count, and a kind or MIG profile where the case names one."""
    named = case.get("mig_profile")
    kind = case.get("kind") or (GpuKind.MIG if named else GpuKind.ANY)
    return GpuAsk(int(case["count"]), GpuKind(kind), named, None, bool(case.get("allow_larger", False)))


def anything() -> tuple[Profile, ProfileSize]:
    """A profile that offers every GPU wish, so that only the limits decide."""
    profile = Profile.model_validate(
        {"name": "any", "image": "any", "sizes": {"any": {"gpu": {"count": 64, "kind": "any", "allow_larger": True}}}}
    )
    return profile, profile.sizes["any"]


def answer(policy: Policy, case: dict[str, Any], at: datetime) -> list[str] | str:
    """The devices that the user of the case gets, or the code of the refusal."""
    box = box_of(case["box"], str(case.get("gpu_model", MODEL)))
    user = str(case["user"])
    limits = resolve(policy, user, at=at, has_mig=box.has_mig)

    def group_of(name: str) -> str | None:
        return resolve(policy, name, at=at, has_mig=box.has_mig).group

    held = read_held(case.get("held") or [], box, group_of)
    profile, size = anything()
    request = Request(gpu=ask_of(case))
    usage, snapshot = Usage(held.holdings), Snapshot(at, box, held.external)
    try:
        granted = admission.check(request, profile, size, "any", limits, usage, snapshot, at)
    except Refusal as refusal:
        assert refusal.message
        return refusal.code.value
    return [unit.label for unit in granted.units]


@pytest.mark.parametrize(("case", "expect"), [*case_params("gpus"), *case_params("group_total")])
def test_vectors_who_gets_which_device(case: dict[str, Any], expect: list[str] | str) -> None:
    at = noon(case["day"]) if "day" in case else fixture_time(DOCUMENT)
    assert answer(POLICY, case, at) == expect


@pytest.mark.parametrize(("case", "expect"), case_params("gpu_share"))
def test_vectors_share_of_a_unit(case: dict[str, Any], expect: float) -> None:
    if case.get("full"):
        unit = Unit("GPU-a", "GPU-a", 0, MODEL, 1)
    else:
        (compute, memory), (of_compute, of_memory) = case["slices"], case["of"]
        name = str(case["profile"])
        unit = Unit("MIG-a", "GPU-a", 0, MODEL, 1, compute, memory, of_compute, of_memory, 0, name)
        if tuple(case["of"]) == (7, 8) and (geometry := geometry_of(MODEL)) and (known := geometry.profile(name)):
            assert (known.compute_slices, known.memory_slices) == (compute, memory), "the table of the model"
    assert unit.share == pytest.approx(expect, abs=1e-6)


HERE = Path(__file__).parent
MORE = yaml.safe_load((HERE / "gpu" / "more_vectors.yaml").read_text())["cases"]
OWN_DOCUMENT = yaml.safe_load((HERE / "vectors" / "policy.yaml").read_text())
OWN_POLICY = fixture_policy(OWN_DOCUMENT)


@pytest.mark.parametrize(("case", "expect"), [pytest.param(c["input"], c["expect"], id=c["id"]) for c in MORE])
def test_vectors_of_our_own(case: dict[str, Any], expect: list[str] | str) -> None:
    at = noon(case["day"]) if "day" in case else fixture_time(OWN_DOCUMENT)
    assert answer(OWN_POLICY, case, at) == expect
