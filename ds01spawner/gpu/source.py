"""Where the list of GPUs comes from: one interface, three sources (NVML, a simulated box, none).

Only the watcher keeps a source open; everybody else reads the snapshot that it writes. A source that cannot be
read raises InventoryError and never answers "no GPUs": nobody may conclude that a unit is gone, or free, from a
failure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType

from ds01spawner.model import External, Inventory


@dataclass(frozen=True)
class GpuProcess:
    """A host process that has the unit open. `memory_bytes` is what it holds there; None where unknown."""

    unit_uuid: str
    pid: int
    memory_bytes: int | None = None


class InventorySource(ABC):
    """Something that can tell the GPUs of this box. Safe to call from several threads."""

    @abstractmethod
    def read(self) -> Inventory:
        """All GPUs and units now, unhealthy ones with their reason.

        Raises:
            InventoryError: they cannot be told at all.
        """

    @abstractmethod
    def processes(self) -> tuple[GpuProcess, ...]:
        """Host processes that use a unit, by unit and pid.

        A unit whose processes cannot be told is no evidence of an idle unit: `read` gives it a problem.

        Raises:
            InventoryError: nothing can be told at all.
        """

    def external(self) -> tuple[External, ...]:
        """Holders that only the source knows (simulated boxes pretend to have some)."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Give back what was opened. A later `read` opens it again."""

    def __enter__(self) -> InventorySource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class NoInventory(InventorySource):
    """A box without GPUs."""

    def read(self) -> Inventory:
        return Inventory((), "none")

    def processes(self) -> tuple[GpuProcess, ...]:
        return ()

    def close(self) -> None:
        pass
