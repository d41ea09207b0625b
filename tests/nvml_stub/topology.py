"""Topology files for the stub NVML: which GPUs a pretended machine has, and what is wrong with them.

A line is a word and its fields, separated by blanks; GPUs and instances are named by their NVML index.

    driver VERSION                     init CODE (nvmlInit fails)
    gpu BUS UUID MIB CC MIG PENDING NAME
    profile GPU ENUM ID SLICES MIB MEMORY_SLICES START,START,… MIG_PROFILE
    mig GPU INDEX UUID GI CI PROFILE_ID GI_SLICES CI_SLICES MIB START SIZE NAME
    process GPU INDEX PID MIB c|g      (INDEX -1: the GPU itself; c compute, g graphics)
    rows GPU PENDING FAILURE           ecc GPU COUNT             sram GPU INDEX COUNT
    minor GPU NUMBER                   (of its device node; else the NVML index)
    topo GPU GPU LEVEL                 nvlink GPU GPU|-1 COUNT   (-1: to an NVSwitch)
    error GPU[.INDEX]|-1 FUNCTION|* CODE   (-1: a call without a device)
"""

from __future__ import annotations

from dataclasses import dataclass, field

ENUMS = (0, 9, 1, 2, 3, 4, 7)
"""NVML's enum of 1g, 1g with two memory slices, 2g, 3g, 4g, 7g, 1g+me."""

IDS = (19, 15, 14, 9, 5, 0, 20)
"""Profile ids on A100 and H100, in the same order."""

SHAPES = (
    (1, 1, "0,1,2,3,4,5,6"),
    (1, 2, "0,2,4,6"),
    (2, 2, "0,2,4"),
    (3, 4, "0,4"),
    (4, 4, "0"),
    (7, 8, "0"),
    (1, 1, "0,1,2,3,4,5,6"),
)


@dataclass(frozen=True)
class Model:
    """A GPU model: NVML's name, memory in MiB, compute capability, its MIG profiles (name, usable MiB) as in ENUMS."""

    name: str
    memory: int
    capability: str = "8.0"
    profiles: tuple[tuple[str, int], ...] = ()


A100 = Model(
    "NVIDIA A100-SXM4-40GB",
    40960,
    "8.0",
    (
        ("1g.5gb", 4864),
        ("1g.10gb", 9856),
        ("2g.10gb", 9856),
        ("3g.20gb", 19968),
        ("4g.20gb", 19968),
        ("7g.40gb", 40192),
        ("1g.5gb+me", 4864),
    ),
)
H100 = Model(
    "NVIDIA H100 80GB HBM3",
    81559,
    "9.0",
    (
        ("1g.10gb", 9984),
        ("1g.20gb", 20096),
        ("2g.20gb", 20096),
        ("3g.40gb", 40448),
        ("4g.40gb", 40448),
        ("7g.80gb", 81151),
        ("1g.10gb+me", 9984),
    ),
)
A30 = Model("NVIDIA A30", 24576, "8.0")
L40S = Model("NVIDIA L40S", 46068, "8.9")


@dataclass
class Topology:
    """Builds the text of a topology file."""

    lines: list[str] = field(default_factory=lambda: ["driver 580.95.05"])
    models: list[Model] = field(default_factory=list)

    def gpu(self, model: Model, bus: str, *, mig: bool = False, pending: bool | None = None) -> int:
        """Add a GPU; answers its NVML index. Its uuid ends in its bus number."""
        index = len(self.models)
        self.models.append(model)
        waiting = mig if pending is None else pending
        self.lines.append(
            f"gpu {bus} {gpu_uuid(bus)} {model.memory} {model.capability} {int(mig)} {int(waiting)} {model.name}"
        )
        for place, (name, memory) in enumerate(model.profiles):
            compute, size, starts = SHAPES[place]
            self.lines.append(f"profile {index} {ENUMS[place]} {IDS[place]} {compute} {memory} {size} {starts} {name}")
        return index

    def mig(self, gpu: int, index: int, profile: str, start: int, *, ci: int = 0, ci_slices: int | None = None) -> str:
        """Add an instance at a MIG index; answers its uuid. GI ids are 1 + start, so that two in one GI share it."""
        model = self.models[gpu]
        place = [name for name, _ in model.profiles].index(profile)
        compute, size, _ = SHAPES[place]
        own = compute if ci_slices is None else ci_slices
        name = profile if own == compute else f"{own}c.{profile}"
        uuid = f"MIG-{gpu:08d}-0000-4000-8000-{index:012d}"
        memory = model.profiles[place][1]
        self.lines.append(
            f"mig {gpu} {index} {uuid} {start + 1} {ci} {IDS[place]} {compute} {own} {memory} {start} {size} "
            f"{model.name} MIG {name}"
        )
        return uuid

    def add(self, *lines: str) -> Topology:
        """Further lines."""
        self.lines += lines
        return self

    @property
    def text(self) -> str:
        """The file."""
        return "\n".join(self.lines) + "\n"


def gpu_uuid(bus: str) -> str:
    """The uuid that the GPU at a bus id gets here."""
    digits = "".join(c for c in bus.lower() if c in "0123456789abcdef")
    return f"GPU-{digits:0>8.8}-0000-4000-8000-{digits:0>12.12}"
