"""`Ledger`: the one door to everything this installation remembers."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from types import TracebackType

from .allocations import Allocations
from .audit import Audit
from .database import Database, utcnow
from .history import Policies, Requests, Snapshots
from .holdings import Holdings
from .operations import Operation
from .owners import Images, Uids
from .records import AuditRow, Claim, ImageRecord, OperationRow, RequestRecord

__all__ = ["AuditRow", "Claim", "ImageRecord", "Ledger", "Operation", "OperationRow", "RequestRecord", "utcnow"]


class Ledger(Holdings, Allocations, Audit, Requests, Policies, Snapshots, Uids, Images):
    """The ledger of one installation: SQLite by default, PostgreSQL by URL.

    Every method is synchronous, thread-safe and one transaction; callers run them off the event loop. Errors
    are `LedgerError` sentences (or the typed refusals that a method names), never SQL. Open it in the process
    that uses it, not before a fork; several processes may have it open.
    """

    @classmethod
    def open(cls, url: str, *, clock: Callable[[], datetime] = utcnow) -> Ledger:
        """Open the ledger, make or update its schema, and give a new one its instance uuid.

        Args:
            url: SQLAlchemy URL, normally `settings.url`.
            clock: the wall clock as a value (aware). A caller that brings its own also brings the passing of
                time: operations go stale by it.

        Raises:
            LedgerError: it cannot be opened, is damaged, or is newer than this program.
        """
        return cls(Database(url, clock))

    @property
    def instance(self) -> str:
        """Uuid of this installation; containers, networks and images carry it."""
        return self._db.instance

    def close(self) -> None:
        """End the heartbeats and close every connection. Closing twice is harmless."""
        self._close_operations()
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
