"""A small world for tests of the spawn form: a box, profiles, limits, and the form of one user on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from ds01spawner.form.view import FormView, build_view
from ds01spawner.gpu.simulated import SimulatedGpu, SimulatedUnit, build
from ds01spawner.model import External, Holding, Inventory, Limit, Limits, Snapshot, State, Unit, Usage
from ds01spawner.policy.schema import Profile, ProfilesFile

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc)
GIB = 2**30

PROFILES: Mapping[str, Any] = {
    "pytorch": {
        "title": "PyTorch",
        "description": "Notebooks with PyTorch and the usual data science tools.",
        "image": "aimehub/pytorch-2.8.0-aime-cuda12.6.3",
        "images": ["aimehub/pytorch-2.7.1-aime", "lab/*"],
        "default": True,
        "sizes": {
            "small": {
                "title": "Small GPU, 5 GB: right for coursework",
                "cpus": "4",
                "memory": "16g",
                "gpu": {"count": "1", "kind": "mig", "mig_profile": "1g.5gb"},
                "default": "true",
            },
            "medium": {
                "title": "Medium GPU, 20 GB",
                "description": "for training a small model",
                "memory": "32g",
                "gpu": {"count": "1", "kind": "mig", "mig_profile": "3g.20gb"},
            },
            "whole": {"title": "Whole GPU, 40 GB: for long training runs", "gpu": {"count": "1", "kind": "full"}},
            "cpu": {"title": "No GPU: writing and looking at data", "cpus": "2", "memory": "8g"},
        },
    },
    "r": {"title": "R", "description": "RStudio.", "image": "lab/rstudio:4", "sizes": {"cpu": {"title": "No GPU"}}},
}


def profiles(source: Mapping[str, Any] = PROFILES) -> tuple[Profile, ...]:
    """Profiles as the policy loader gives them."""
    return tuple(ProfilesFile.model_validate({"profiles": source}).profiles.values())


def box(*, whole: int = 1, small: int = 7, mixed: bool = True) -> Inventory:
    """`whole` whole GPUs, one cut into `small` 1g.5gb, and one into 3g.20gb, 2g.10gb and two 1g.5gb."""
    gpus = [SimulatedGpu("A100-40GB") for _ in range(whole)]
    if small:
        gpus.append(SimulatedGpu("A100-40GB", units=tuple(SimulatedUnit("1g.5gb") for _ in range(small))))
    if mixed:
        names = ("3g.20gb", "2g.10gb", "1g.5gb", "1g.5gb")
        gpus.append(SimulatedGpu("A100-40GB", units=tuple(SimulatedUnit(name) for name in names)))
    return build(gpus, salt="form")


def limits(**values: Any) -> Limits:
    """Limits of user ada in group students."""
    known: dict[str, Any] = {
        "max_cpus": 8.0,
        "memory": 32 * GIB,
        "memory_swap": 32 * GIB,
        "shm_size": 16 * GIB,
        "pids_limit": 4096,
        "max_gpu_equivalents": 1.0,
        "max_mig_instances": None,
        "max_gpu_slots_per_container": 1,
        "allow_full_gpu": True,
        "max_containers_per_user": 3,
        "gpu_pool": None,
        "mounts": (),
        **values,
    }
    sources = {
        "memory": "user override",
        "max_gpu_equivalents": "group students",
        "max_containers_per_user": "defaults",
    }
    found = {key: Limit(value, sources.get(key, "group students")) for key, value in known.items()}
    return Limits(user="ada", group="students", groups=("students",), values=found)


def units(inventory: Inventory, mig_profile: str | None) -> list[Unit]:
    """The units of one kind, in PCI order."""
    return [unit for unit in inventory.units if unit.mig_profile == mig_profile]


def held(user: str, taken: Sequence[Unit], *, server: str = "", **fields: Any) -> Holding:
    """One allocation of `user`."""
    fields = {"group": "students", "state": State.ACTIVE, **fields}
    return Holding(user=user, server_name=server, units={unit.uuid: unit.share for unit in taken}, **fields)


def snapshot(inventory: Inventory, *, external: Sequence[Unit] = (), **fields: Any) -> Snapshot:
    """A fresh snapshot."""
    found = tuple(External(unit.uuid, "container", "grafana", "--gpus all") for unit in external)
    return Snapshot(at=NOW, inventory=inventory, external=found, **fields)


def view(**changes: Any) -> FormView:
    """The form of ada on an empty box, with `changes` to the arguments of `build_view`."""
    arguments: dict[str, Any] = {
        "user": "ada",
        "server_name": "",
        "limits": limits(),
        "profiles": profiles(),
        "usage": Usage(),
        "snapshot": snapshot(box()),
        "now": NOW,
        "image_of": lambda profile: profile.image,
        **changes,
    }
    return build_view(**arguments)


def spoiled(inventory: Inventory, problem: str) -> Inventory:
    """The same box with every unit out of order."""
    gpus = tuple(replace(g, units=tuple(replace(u, problem=problem) for u in g.units)) for g in inventory.gpus)
    return replace(inventory, gpus=gpus)
