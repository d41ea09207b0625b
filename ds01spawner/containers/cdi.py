"""Which CDI devices (Container Device Interface) the engine knows: from its answer, or from the folders it names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

API_WITH_DISCOVERED = (1, 50)
"""First Docker API version whose `/info` lists `DiscoveredDevices` (Docker 28.2)."""
DEFAULT_DIRS = ("/etc/cdi", "/var/run/cdi")
MAX_SPEC_BYTES = 8 * 2**20
"""A specification of eight GPUs has some 100 KB; more than this is no specification."""


def discover(info: Mapping[str, Any], api_version: tuple[int, int]) -> frozenset[str]:
    """Fully qualified names (`nvidia.com/gpu=GPU-…`) of the CDI devices that the engine can inject.

    Args:
        info: the answer of `GET /info`.
        api_version: of the engine; from 1.50 on its own list is the truth, before that the specification files
            in the folders it names. An engine that names none has CDI switched off, or is too old for it.
    """
    if api_version >= API_WITH_DISCOVERED and "DiscoveredDevices" in info:
        rows = info["DiscoveredDevices"] or ()
        return frozenset(str(row.get("ID")) for row in rows if row.get("Source") == "cdi" and row.get("ID"))
    return read_dirs(spec_dirs(info))


def spec_dirs(info: Mapping[str, Any]) -> tuple[str, ...]:
    """Folders of CDI specifications in use; empty where the engine has no CDI.

    Docker 25 to 27 name them when their `cdi` feature is on. An engine that lists the feature without folders uses
    the specification's default ones.
    """
    named = tuple(info.get("CDISpecDirs") or ())
    if named:
        return named
    features = info.get("Features")
    return DEFAULT_DIRS if isinstance(features, Mapping) and features.get("cdi") else ()


def read_dirs(folders: Iterable[str]) -> frozenset[str]:
    """Names in all `*.json`, `*.yaml` and `*.yml` files of `folders`; what cannot be read lists no device."""
    found: set[str] = set()
    for folder in folders:
        path = Path(folder)
        if not path.is_dir():
            continue
        for file in sorted(path.iterdir()):
            if file.suffix in (".json", ".yaml", ".yml"):
                found |= read_spec(file)
    return frozenset(found)


def read_spec(file: Path) -> frozenset[str]:
    """`kind=name` of every device in one specification; empty if it is none (a missing name only means no CDI)."""
    try:
        if file.stat().st_size > MAX_SPEC_BYTES:
            return frozenset()
        text = file.read_text()
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = json.loads(text) if file.suffix == ".json" else yaml.load(text, Loader=loader)  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError):
        return frozenset()
    if not isinstance(content, Mapping) or not isinstance(content.get("kind"), str):
        return frozenset()
    devices = content.get("devices")
    rows = devices if isinstance(devices, list) else []
    return frozenset(f"{content['kind']}={row['name']}" for row in rows if isinstance(row, Mapping) and "name" in row)
