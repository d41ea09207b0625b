"""The ulimits that AIME's containers have, as far as this machine's Docker daemon may raise them."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from .spec import Ulimit

_CAP_SYS_RESOURCE = 24
UNLIMITED = -1
AIME_ULIMITS = (Ulimit("memlock", UNLIMITED, UNLIMITED), Ulimit("stack", 67_108_864, 67_108_864))
"""What `mlc create` gives: pinned memory without a limit, 64 MiB of stack (facts: AIME, create)."""
_NAMES = {"memlock": "Max locked memory", "stack": "Max stack size"}


@lru_cache(maxsize=4)
def daemon_ulimits(
    pid_file: Path = Path("/var/run/docker.pid"), proc: Path = Path("/proc")
) -> tuple[tuple[Ulimit, ...], tuple[str, ...]]:
    """What may be set, and a warning for each that may not.

    A daemon without CAP_SYS_RESOURCE cannot raise a hard limit above its own; asking for it would fail every start.
    """
    try:
        process = proc / pid_file.read_text().strip()
        status, limits = (process / "status").read_text(), (process / "limits").read_text()
    except OSError:
        return (), ("the Docker daemon's own limits cannot be read: containers get its default ulimits",)
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    if capabilities and int(capabilities[1], 16) >> _CAP_SYS_RESOURCE & 1:
        return AIME_ULIMITS, ()
    given, warnings = [], []
    for wanted in AIME_ULIMITS:
        hard = _hard(limits, _NAMES[wanted.name])
        if hard == UNLIMITED or (wanted.hard != UNLIMITED and hard is not None and wanted.hard <= hard):
            given.append(wanted)
        else:
            warnings.append(f"the Docker daemon may not raise {wanted.name}: containers get its default of that ulimit")
    return tuple(given), tuple(warnings)


def _hard(limits: str, name: str) -> int | None:
    found = re.search(rf"^{re.escape(name)}\s+\S+\s+(\S+)", limits, re.MULTILINE)
    if found is None:
        return None
    return UNLIMITED if found[1] == "unlimited" else int(found[1])
