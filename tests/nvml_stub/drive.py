"""Read the stub's GPUs through ds01spawner and real pynvml, in a process of its own, and print JSON.

Arguments: the inventory setting, then one topology file per step. All steps use one source; its clock goes 10 s
ahead each. LD_LIBRARY_PATH, which the loader reads at start, makes pynvml find the stub.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import count
from typing import Any

from ds01spawner.errors import InventoryError
from ds01spawner.gpu.inventory import open_inventory
from ds01spawner.gpu.nvml import NvmlInventory
from ds01spawner.gpu.source import InventorySource
from ds01spawner.model import plain


def step(source: InventorySource) -> dict[str, Any]:
    try:
        inventory = source.read()
        return {
            "inventory": plain(inventory),
            "fingerprint": inventory.fingerprint,
            "has_mig": inventory.has_mig,
            "processes": [[p.unit_uuid, p.pid, p.memory_bytes] for p in source.processes()],
        }
    except InventoryError as error:
        return {"error": error.message, "facts": error.facts}


def main(setting: str, topologies: list[str]) -> None:
    os.environ["DS01_NVML_STUB"] = topologies[0]
    try:
        source = open_inventory(setting)
    except InventoryError as error:
        print(json.dumps([{"error": error.message, "facts": error.facts}]))
        return
    if isinstance(source, NvmlInventory):
        ticks = count(step=10)
        source = NvmlInventory(clock=lambda: float(next(ticks)))
    found = []
    with source:
        for topology in topologies:
            os.environ["DS01_NVML_STUB"] = topology
            found.append(step(source))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
