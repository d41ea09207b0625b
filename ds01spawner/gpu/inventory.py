"""Which source of GPUs this installation reads: NVML, a simulated box, or none."""

from __future__ import annotations

from pathlib import Path

from ds01spawner.errors import InventoryError

from .nvml import NvmlInventory, nvml_has_devices
from .simulated import SimulatedInventory
from .source import InventorySource, NoInventory


def open_inventory(setting: str) -> InventorySource:
    """The source that `setting` names.

    Args:
        setting: `auto` (NVML if the box has it, else none), `nvml`, `none`, or the path of a simulated box.

    Raises:
        InventoryError: with `auto`, NVML is installed but does not work (a driver mismatch is not "no GPUs");
            otherwise, the simulated box's file is wrong.
    """
    if setting == "none":
        return NoInventory()
    if setting == "nvml":
        return NvmlInventory()
    if setting == "auto":
        return NvmlInventory() if nvml_has_devices() else NoInventory()
    path = Path(setting)
    if not path.is_file():
        raise InventoryError(f"The GPU inventory '{setting}' is neither auto, nvml, none nor a file.")
    source = SimulatedInventory(path)
    source.read()
    return source
