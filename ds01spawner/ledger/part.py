"""What every part of the ledger stands on: the database and the one way to write an audit row."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert

from .database import Database
from .records import tidy
from .tables import audit

_INSERT = insert(audit)

SYSTEM = "system"
"""Actor of a change that nobody in particular asked for."""


class Part:
    """One part of the ledger; `Ledger` is all of them over one database."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def _now(self) -> datetime:
        return self._db.clock()

    def _note(
        self,
        connection: Connection,
        actor: str,
        action: str,
        subject: str,
        reason: str = "",
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        *,
        allocation_id: int | None = None,
    ) -> None:
        """Write one audit row inside the caller's transaction, so that no change goes without it."""
        row = {
            "at": self._now(),
            "actor": tidy(actor, 600),
            "action": tidy(action, 100),
            "subject": tidy(subject, 600),
            "reason": tidy(reason),
            "before": before,
            "after": after,
            "allocation_id": allocation_id,
        }
        connection.execute(_INSERT, row)
