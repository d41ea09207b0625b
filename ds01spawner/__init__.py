"""ds01spawner: containers with CPU, memory and GPUs by YAML quotas, behind one JupyterHub spawner.

Public names: `setup` (one line for jupyterhub_config.py) and `DS01Spawner`. They load on first use, so that
the command lines, which need neither, start fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configure import setup as setup
    from .spawner import DS01Spawner as DS01Spawner

__version__ = "0.1.0"
__all__ = ["DS01Spawner", "__version__", "setup"]


def __getattr__(name: str) -> Any:
    if name == "setup":
        from .configure import setup

        return setup
    if name == "DS01Spawner":
        from .spawner import DS01Spawner

        return DS01Spawner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
