"""What one pass knows, as one frozen value. Pure; `gather.py` fills it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from ds01spawner.containers.facts import ContainerFacts
from ds01spawner.ledger.records import OperationRow
from ds01spawner.model import Allocation, Snapshot


@dataclass(frozen=True)
class Origin:
    """Where a token comes from: the allocation it was given to (live or released), and when."""

    allocation: Allocation
    given_at: datetime


@dataclass(frozen=True)
class Evidence:
    """Ledger, Docker and the watcher's picture of the box at one moment.

    Attributes:
        now: the moment. instance: uuid of this installation.
        facts: every container of the engine. Listed before the ledger was read: an allocation is written before its
            container is made, so that none of these can be unknown only because it is new.
        allocations: live ones. operations: rows of running operations, dead holders' included.
        origins: by token, for every token on a container of ours that this ledger has given.
        last_token: the highest token that this ledger has given.
        snapshot: the watcher's picture; None if there is none that is fresh, and then nothing is freed or stopped.
        gone: units that are proven not to exist any more (`box.py`).
        booted_at: when the machine was started.
        watching_since: since when this process has been looking; None = it has only begun. A container of a held
            server that was started before may have been started by a Hub of which a restored ledger knows nothing.
        hold_limits: seconds that a hold without an end should last, by allocation, where the policy says so.
    """

    now: datetime
    instance: str
    facts: tuple[ContainerFacts, ...] = ()
    allocations: tuple[Allocation, ...] = ()
    operations: tuple[OperationRow, ...] = ()
    origins: Mapping[int, Origin] = field(default_factory=dict)
    last_token: int = 0
    snapshot: Snapshot | None = None
    gone: frozenset[str] = frozenset()
    booted_at: datetime | None = None
    watching_since: datetime | None = None
    hold_limits: Mapping[int, float] = field(default_factory=dict)

    @property
    def fresh(self) -> bool:
        """True if the picture of the box is evidence."""
        return self.snapshot is not None and not self.snapshot.stale(self.now)
