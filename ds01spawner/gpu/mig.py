"""MIG geometry as data: which instances a GPU model can be cut into, and where they fit.

A GPU has compute slices and memory slices (7 and 8 on A100, H100, H200 and B200; 4 and 4 on A30 and RTX PRO
6000). A placement names MEMORY slices: an instance of a profile starts at one of the profile's starts and covers
`memory_slices` of them, so that what is occupied on one GPU is a bit mask of at most 8 bits.

On a real box the geometry is asked from NVML (`gpu/nvml.py`); the tables here serve simulated boxes and stand in
where NVML does not tell. Traps that the tables avoid: a name does not tell its slices (1g.10gb is 1+1 on an 80 GB
part and 1+2 on an A100-40GB); a 3g takes 4 memory slices; a 4g starts at 0 only; go-nvml's mock is wrong for H100
and newer. Sources: MIG user guide, "Supported MIG Profiles"; NVIDIA/k8s-test-infra `mock-nvml-config-*.mig.yaml`;
a real H100-80GB read through NVML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

MIB = 1024**2
GIB = 1024**3

_NAME = re.compile(r"(?:(?P<ci>\d+)c\.)?(?P<compute>\d+)g\.(?P<memory>\d+)gb(?P<extra>(?:[+-][a-z.]+)*)")
_RESERVED_MIB = 128
"""What an instance loses to the driver where no measured size is known (roughly; simulated boxes only)."""


@dataclass(frozen=True)
class MigProfile:
    """One way to cut an instance out of a GPU model.

    Attributes:
        name: NVIDIA's name. compute_slices, memory_slices: what it takes. starts: first memory slices it may have.
        limit: instances of it per GPU. memory_bytes: usable memory.
    """

    name: str
    compute_slices: int
    memory_slices: int
    starts: tuple[int, ...]
    limit: int
    memory_bytes: int


@dataclass(frozen=True)
class Geometry:
    """What one GPU model can be cut into; `profiles` is empty for a model without MIG."""

    model: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    compute_slices: int = 1
    memory_slices: int = 1
    profiles: tuple[MigProfile, ...] = ()

    def profile(self, name: str) -> MigProfile | None:
        """The MIG profile of that name, or None."""
        return next((profile for profile in self.profiles if profile.name == name), None)


@dataclass(frozen=True)
class ProfileName:
    """What a MIG profile's name says: enough to compare two profiles, not enough to place one.

    Attributes:
        compute: compute slices of the GPU instance, or of the compute instance where the name has one (`1c.3g.20gb`).
        memory_gb: nominal memory. extras: `+me`, `+gfx`, `-me`, …
    """

    compute: int
    memory_gb: int
    extras: frozenset[str]


def parse_name(name: str) -> ProfileName | None:
    """Read a MIG profile's name; None if it is none."""
    match = _NAME.fullmatch(name.strip().lower())
    if match is None:
        return None
    extras = frozenset(re.findall(r"[+-][a-z.]+", match["extra"]))
    return ProfileName(int(match["ci"] or match["compute"]), int(match["memory"]), extras)


def sufficient(have: str, asked: str) -> bool:
    """True if an instance of MIG profile `have` can stand in for `asked`: slices, memory and engines suffice."""
    mine, wanted = parse_name(have), parse_name(asked)
    if mine is None or wanted is None:
        return have == asked
    engines = {extra for extra in wanted.extras if extra.startswith("+")} <= mine.extras
    return mine.compute >= wanted.compute and mine.memory_gb >= wanted.memory_gb and engines


def mask(start: int, size: int) -> int:
    """Bit mask of `size` memory slices from `start` on."""
    return ((1 << size) - 1) << start


def fit(geometry: Geometry, names: Sequence[str]) -> tuple[int, ...] | None:
    """A start for each profile of `names`, in their order; None if the GPU cannot be cut like that.

    Exact backtracking over the profiles, large ones first. 1g and 3g take the highest start that works and the
    others the lowest, as HAMi does, because a 4g fits at 0 only.

    Raises:
        KeyError: a name that this model does not have.
    """
    profiles = [geometry.profile(name) for name in names]
    unknown = [name for name, profile in zip(names, profiles, strict=True) if profile is None]
    if unknown:
        raise KeyError(unknown[0])
    known = [profile for profile in profiles if profile is not None]
    if any(names.count(profile.name) > profile.limit for profile in known):
        return None
    order = sorted(range(len(known)), key=lambda place: -known[place].memory_slices)
    starts = _search([known[place] for place in order], 0)
    if starts is None:
        return None
    by_place = dict(zip(order, starts, strict=True))
    return tuple(by_place[place] for place in range(len(known)))


def _search(profiles: Sequence[MigProfile], occupied: int) -> list[int] | None:
    if not profiles:
        return []
    first, rest = profiles[0], profiles[1:]
    high_first = first.compute_slices in (1, 3)
    for start in sorted(first.starts, reverse=high_first):
        taken = mask(start, first.memory_slices)
        if taken & occupied:
            continue
        found = _search(rest, occupied | taken)
        if found is not None:
            return [start, *found]
    return None


def totals(largest_compute: int) -> tuple[int, int]:
    """(compute, memory) slices of a GPU by its largest MIG profile's compute slices, where NVML does not tell."""
    return (4, 4) if 0 < largest_compute <= 4 else (7, 8)


def _cut(total_mib: int, of: int, memory_slices: int) -> int:
    """Usable bytes of an instance with `memory_slices` of `of`, where no measured size is known."""
    return (total_mib * memory_slices // of - _RESERVED_MIB) * MIB


def _seven(
    model: str,
    memory_mib: int,
    capability: tuple[int, int],
    names: Sequence[str],
    usable_mib: Sequence[int] | None = None,
) -> Geometry:
    """A model with 7 compute and 8 memory slices; `names`: 1g, 1g with two memory slices, 2g, 3g, 4g, 7g."""
    shapes = (
        (1, 1, (0, 1, 2, 3, 4, 5, 6), 7),
        (1, 2, (0, 2, 4, 6), 4),
        (2, 2, (0, 2, 4), 3),
        (3, 4, (0, 4), 2),
        (4, 4, (0,), 1),
        (7, 8, (0,), 1),
    )
    profiles = []
    for place, (name, (compute, memory, starts, limit)) in enumerate(zip(names, shapes, strict=True)):
        size = usable_mib[place] * MIB if usable_mib else _cut(memory_mib, 8, memory)
        profiles.append(MigProfile(name, compute, memory, starts, limit, size))
    media = MigProfile(f"{names[0]}+me", 1, 1, shapes[0][2], 1, profiles[0].memory_bytes)
    return Geometry(model, memory_mib * MIB, capability, 7, 8, (*profiles, media))


def _four(model: str, memory_mib: int, capability: tuple[int, int], names: Sequence[str]) -> Geometry:
    """A model with 4 compute and 4 memory slices; `names`: 1g, 2g, 4g."""
    shapes = ((1, 1, (0, 1, 2, 3), 4), (2, 2, (0, 2), 2), (4, 4, (0,), 1))
    profiles = [
        MigProfile(name, compute, memory, starts, limit, _cut(memory_mib, 4, memory))
        for name, (compute, memory, starts, limit) in zip(names, shapes, strict=True)
    ]
    media = [
        MigProfile(f"{p.name}+me", p.compute_slices, p.memory_slices, p.starts, 1, p.memory_bytes) for p in profiles[:2]
    ]
    return Geometry(model, memory_mib * MIB, capability, 4, 4, (*profiles, *media))


def _whole(model: str, memory_mib: int, capability: tuple[int, int]) -> Geometry:
    return Geometry(model, memory_mib * MIB, capability)


GEOMETRIES: Mapping[str, Geometry] = MappingProxyType(
    {
        geometry.model: geometry
        for geometry in (
            _seven(
                "A100-40GB",
                40960,
                (8, 0),
                ("1g.5gb", "1g.10gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"),
                (4864, 9856, 9856, 19968, 19968, 40192),
            ),
            _seven(
                "A100-80GB",
                81920,
                (8, 0),
                ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"),
                (9856, 19968, 19968, 40192, 40192, 80384),
            ),
            _seven("H100-80GB", 81559, (9, 0), ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb")),
            _seven("H100-NVL", 95830, (9, 0), ("1g.12gb", "1g.24gb", "2g.24gb", "3g.47gb", "4g.47gb", "7g.94gb")),
            _seven("H200-141GB", 143771, (9, 0), ("1g.18gb", "1g.35gb", "2g.35gb", "3g.71gb", "4g.71gb", "7g.141gb")),
            _seven("B200-180GB", 183359, (10, 0), ("1g.23gb", "1g.45gb", "2g.45gb", "3g.90gb", "4g.90gb", "7g.180gb")),
            _four("A30", 24576, (8, 0), ("1g.6gb", "2g.12gb", "4g.24gb")),
            _four("RTX-PRO-6000", 97887, (12, 0), ("1g.24gb", "2g.48gb", "4g.96gb")),
            _whole("L40S", 46068, (8, 9)),
            _whole("L4", 23034, (8, 9)),
            _whole("T4", 15360, (7, 5)),
            _whole("V100-32GB", 32768, (7, 0)),
        )
    }
)
"""Known models by the short name that simulated boxes use."""

_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"A100.*80\s*G", "A100-80GB"),
    (r"A100", "A100-40GB"),
    (r"H100.*NVL", "H100-NVL"),
    (r"H100", "H100-80GB"),
    (r"H200", "H200-141GB"),
    (r"B200", "B200-180GB"),
    (r"\bA30\b", "A30"),
    (r"RTX.?PRO.?6000", "RTX-PRO-6000"),
    (r"L40S", "L40S"),
    (r"\bL4\b", "L4"),
    (r"\bT4\b", "T4"),
    (r"V100.*32\s*G", "V100-32GB"),
)


def geometry_of(model: str) -> Geometry | None:
    """The geometry of a model by short name or by NVML's name ("NVIDIA A100-SXM4-40GB"); None if unknown."""
    exact = GEOMETRIES.get(model)
    if exact is not None:
        return exact
    upper = model.upper()
    if re.search(r"GB200|GH200", upper):
        # Superchips carry other memory sizes under other profile names; guessing would give wrong shares.
        return None
    return next((GEOMETRIES[short] for pattern, short in _PATTERNS if re.search(pattern, upper)), None)
