"""The picture of `ds01-admin gpus`: each GPU's layout to scale, then its units one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds01spawner.model import Gpu, Snapshot, Unit

_WIDTH = 64
"""Columns of a whole GPU; a memory slice is an eighth or a quarter of it."""

_STYLES = {
    "free": "black on green",
    "leased": "white on blue",
    "external": "black on yellow",
    "unhealthy": "white on red",
}


@dataclass(frozen=True)
class Box:
    """A snapshot with what the ledger knows of its units.

    Attributes:
        leased: unit uuid → who has it ("ann/main (active)"). now: when it is looked at, to tell a stale picture;
            None if it was read just now.
    """

    snapshot: Snapshot
    leased: Mapping[str, str] = field(default_factory=dict)
    now: datetime | None = None

    @property
    def stale(self) -> bool:
        """True if the watcher gives no news."""
        return self.now is not None and self.snapshot.stale(self.now)

    def state(self, unit: Unit) -> tuple[str, str]:
        """`free`, `leased`, `external` or `unhealthy`, and who or why."""
        external = self.snapshot.external_by_unit().get(unit.uuid)
        if unit.uuid in self.leased:
            problem = f"; {unit.problem}" if unit.problem else ""
            return "leased", self.leased[unit.uuid] + problem
        if unit.problem:
            return "unhealthy", unit.problem
        if external is not None:
            return "external", f"{external.holder}: {external.why}"
        return "free", ""

    def counts(self) -> dict[str, int]:
        """Number of units by state."""
        found = Counter(self.state(unit)[0] for unit in self.snapshot.inventory.units)
        return {state: found[state] for state in _STYLES}

    def data(self) -> dict[str, Any]:
        """The machine-readable form, in base units."""
        inventory = self.snapshot.inventory
        return {
            "at": self.snapshot.at,
            "stale": self.stale,
            "source": inventory.source,
            "driver": inventory.driver,
            "fingerprint": inventory.fingerprint,
            "units": self.counts(),
            "gpus": [self._gpu_data(gpu) for gpu in inventory.gpus],
        }

    def _gpu_data(self, gpu: Gpu) -> dict[str, Any]:
        return {
            "index": gpu.index,
            "uuid": gpu.uuid,
            "pci_bus_id": gpu.pci_bus_id,
            "model": gpu.model,
            "memory_bytes": gpu.memory_bytes,
            "compute_capability": gpu.compute_capability,
            "mig_enabled": gpu.mig_enabled,
            "compute_slices": gpu.compute_slices,
            "memory_slices": gpu.memory_slices,
            "problem": gpu.problem,
            "links": gpu.links,
            "units": [self._unit_data(unit) for unit in gpu.units],
        }

    def _unit_data(self, unit: Unit) -> dict[str, Any]:
        state, why = self.state(unit)
        return {
            "uuid": unit.uuid,
            "label": unit.label,
            "mig_profile": unit.mig_profile,
            "start": unit.start,
            "compute_slices": unit.compute_slices,
            "memory_slices": unit.memory_slices,
            "memory_bytes": unit.memory_bytes,
            "share": unit.share,
            "state": state,
            "why": why,
        }


def show(box: Box, out: Console) -> None:
    """Print the picture."""
    inventory = box.snapshot.inventory
    driver = f", driver {inventory.driver}" if inventory.driver else ""
    counts = ", ".join(f"{number} {state}" for state, number in box.counts().items() if number)
    source = f" ({inventory.source}{driver}): {counts or 'no units'}"
    out.print(Text.assemble((f"{len(inventory.gpus)} GPUs", "bold"), source))
    if box.stale:
        at = f"{box.snapshot.at:%Y-%m-%d %H:%M:%S} UTC"
        out.print(Text(f"This picture is of {at}: the watcher gives no news.", "bold red"), soft_wrap=True)
    for gpu in inventory.gpus:
        out.print()
        out.print(_heading(gpu))
        if gpu.units:
            out.print(_bar(box, gpu), soft_wrap=True)
            out.print(_table(box, gpu))
    out.print()
    out.print(Text("  ").join(Text(f" {state} ", style) for state, style in _STYLES.items()))


def _heading(gpu: Gpu) -> Text:
    mode = "MIG on" if gpu.mig_enabled else "MIG off"
    if gpu.mig_enabled and not gpu.units:
        mode += ", no instances: cut it with nvidia-smi mig -cgi"
    return Text.assemble(
        (f"GPU {gpu.index}", "bold"),
        f"  {gpu.model}  {gpu.memory_bytes / 2**30:.0f} GB  {gpu.pci_bus_id}  {mode}",
        (f"  {gpu.problem}", "bold red") if gpu.problem else "",
    )


def _bar(box: Box, gpu: Gpu) -> Text:
    """The GPU's memory slices from left to right; what no instance covers is dotted."""
    column = _WIDTH // max(1, gpu.memory_slices)
    bar, at = Text(), 0
    for unit in sorted(gpu.units, key=lambda unit: unit.start or 0):
        start = 0 if unit.whole else at if unit.start is None else unit.start
        if start > at:
            bar.append("·" * column * (start - at), "dim")
        size = gpu.memory_slices if unit.whole else unit.memory_slices
        name = unit.mig_profile or "whole GPU"
        bar.append(f"[{name[: column * size - 2]:^{column * size - 2}}]", _STYLES[box.state(unit)[0]])
        at = max(at, start + size)
    bar.append("·" * column * (gpu.memory_slices - at), "dim")
    return bar


def _table(box: Box, gpu: Gpu) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for unit in gpu.units:
        state, why = box.state(unit)
        memory = f"{unit.memory_bytes / 2**30:.1f} GB"
        table.add_row(
            Text(unit.label, "bold"),
            unit.mig_profile or "whole",
            Text(memory, justify="right"),
            f"share {unit.share:.3f}",
            Text(state, _STYLES[state]),
            Text(why),
            Text(unit.uuid, "dim"),
        )
    return table
