"""MIG geometry: the tables, what fits, and what a name says."""

from __future__ import annotations

import pytest

from ds01spawner.gpu.mig import GEOMETRIES, Geometry, fit, geometry_of, mask, parse_name, sufficient

SEVEN = [g for g in GEOMETRIES.values() if g.compute_slices == 7]
FOUR = [g for g in GEOMETRIES.values() if g.compute_slices == 4]

# Placements of the 7-slice models, start:size in memory slices, as a real H100-80GB tells them through NVML.
H100_PLACEMENTS = {
    "1g.10gb": ([0, 1, 2, 3, 4, 5, 6], 1),
    "1g.20gb": ([0, 2, 4, 6], 2),
    "2g.20gb": ([0, 2, 4], 2),
    "3g.40gb": ([0, 4], 4),
    "4g.40gb": ([0], 4),
    "7g.80gb": ([0], 8),
}


def test_placements_are_those_of_a_real_h100() -> None:
    geometry = GEOMETRIES["H100-80GB"]
    told = {p.name: (list(p.starts), p.memory_slices) for p in geometry.profiles if not p.name.endswith("+me")}
    assert told == H100_PLACEMENTS
    assert {p.name: p.limit for p in geometry.profiles if "+" not in p.name} == {
        "1g.10gb": 7,
        "1g.20gb": 4,
        "2g.20gb": 3,
        "3g.40gb": 2,
        "4g.40gb": 1,
        "7g.80gb": 1,
    }


@pytest.mark.parametrize("geometry", [*SEVEN, *FOUR], ids=lambda geometry: geometry.model)
def test_every_profile_fits_as_often_as_it_may_and_no_more(geometry: Geometry) -> None:
    for profile in geometry.profiles:
        most = [profile.name] * profile.limit
        assert fit(geometry, most) is not None, profile.name
        assert fit(geometry, [*most, profile.name]) is None, profile.name
        assert profile.memory_bytes <= geometry.memory_bytes


@pytest.mark.parametrize(
    ("layout", "possible"),
    [
        (["3g.20gb", "2g.10gb", "1g.5gb", "1g.5gb"], True),
        (["1g.5gb"] * 4 + ["3g.20gb"], True),
        (["4g.20gb", "3g.20gb"], True),
        (["3g.20gb", "3g.20gb"], True),
        (["3g.20gb", "3g.20gb", "1g.5gb"], False),
        (["4g.20gb", "4g.20gb"], False),
        (["1g.10gb"] * 4, True),
        (["1g.10gb"] * 4 + ["1g.5gb"], False),
        (["2g.10gb", "2g.10gb", "2g.10gb", "1g.5gb"], True),
        (["2g.10gb", "2g.10gb", "2g.10gb", "1g.10gb"], True),
        (["7g.40gb", "1g.5gb"], False),
        (["1g.5gb+me", "1g.5gb+me"], False),
        ([], True),
    ],
)
def test_layouts_that_fit_an_a100(layout: list[str], possible: bool) -> None:
    geometry = GEOMETRIES["A100-40GB"]
    starts = fit(geometry, layout)
    assert (starts is not None) == possible
    occupied = 0
    for name, start in zip(layout, starts or (), strict=False):
        profile = geometry.profile(name)
        assert profile is not None and start in profile.starts
        assert not occupied & mask(start, profile.memory_slices)
        occupied |= mask(start, profile.memory_slices)


def test_layout_with_an_unknown_profile_is_an_error() -> None:
    with pytest.raises(KeyError, match="5g"):
        fit(GEOMETRIES["A100-40GB"], ["5g.25gb"])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-80GB"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA B200", "B200-180GB"),
        ("NVIDIA A30", "A30"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A3000", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_models_are_recognised_by_the_name_that_nvml_gives(name: str, short: str | None) -> None:
    geometry = geometry_of(name)
    assert (geometry.model if geometry else None) == short


@pytest.mark.parametrize(
    ("have", "asked", "enough"),
    [
        ("2g.10gb", "1g.5gb", True),
        ("1g.10gb", "1g.5gb", True),
        ("1g.5gb", "1g.5gb", True),
        ("1g.5gb", "1g.10gb", False),
        ("1g.10gb", "2g.10gb", False),
        ("3g.20gb", "2g.10gb", True),
        ("1g.5gb+me", "1g.5gb", True),
        ("2g.10gb", "1g.5gb+me", False),
        ("1c.3g.20gb", "2g.10gb", False),
        ("2c.3g.20gb", "2g.10gb", True),
    ],
)
def test_what_may_stand_in_for_what(have: str, asked: str, enough: bool) -> None:
    assert sufficient(have, asked) is enough


@pytest.mark.parametrize("name", ["", "full", "1g", "g.5gb", "1g.5g", "1g.5gb me", "-1g.5gb"])
def test_what_is_no_name_of_a_profile(name: str) -> None:
    assert parse_name(name) is None
