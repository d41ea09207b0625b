"""The audit trail: who changed what, why, before and after. Rows are only ever added (triggers see to it)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select

from .part import Part
from .records import AuditRow
from .tables import audit

PAGE_MAX = 1000


class Audit(Part):
    """The audit rows of the ledger."""

    def audit(
        self,
        actor: str,
        action: str,
        subject: str,
        reason: str = "",
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        *,
        allocation_id: int | None = None,
    ) -> None:
        """Add one row for a change made outside the ledger (the ledger's own changes write theirs themselves).

        Args:
            actor: who: a Hub user, or `watcher`, `system`.
            action: what kind: `policy.edit`, `container.stop`.
            subject: what it was done to. before, after: the changed values only; JSON-ready.

        Raises:
            LedgerError: the ledger does not answer.
        """
        with self._db.write() as connection:
            self._note(connection, actor, action, subject, reason, before, after, allocation_id=allocation_id)

    def audit_rows(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        subject: str | None = None,
        allocation_id: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        before_id: int | None = None,
        limit: int = 100,
    ) -> tuple[AuditRow, ...]:
        """Rows that meet every given filter, newest first.

        Args:
            action: exact, or a group with a trailing dot (`allocation.`).
            since, until: aware datetimes; since is included, until is not.
            before_id: only rows older than this one: the last id of a page gives the next page.
            limit: rows per page, at most 1000.
        """
        query = select(audit).order_by(audit.c.id.desc()).limit(max(1, min(limit, PAGE_MAX)))
        equal = {"actor": actor, "subject": subject, "allocation_id": allocation_id}
        for name, value in equal.items():
            if value is not None:
                query = query.where(audit.c[name] == value)
        if action is not None:
            group = audit.c.action.startswith(action, autoescape=True)
            query = query.where(group if action.endswith(".") else audit.c.action == action)
        if since is not None:
            query = query.where(audit.c.at >= since)
        if until is not None:
            query = query.where(audit.c.at < until)
        if before_id is not None:
            query = query.where(audit.c.id < before_id)
        with self._db.read() as connection:
            return tuple(AuditRow(**row) for row in connection.execute(query).mappings())
