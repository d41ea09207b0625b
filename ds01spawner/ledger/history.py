"""What happened and what is in force: request rows, policy versions, the watcher's snapshot."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import func, insert, select, update

from ds01spawner.errors import LedgerError
from ds01spawner.model import Snapshot

from .part import Part
from .records import RequestRecord, checked_name, tidy
from .tables import policy_versions, requests, snapshots

log = logging.getLogger(__name__)

PAGE_MAX = 1000


class Requests(Part):
    """Request rows."""

    def record_request(self, record: RequestRecord) -> int:
        """Add a row for a request, granted or refused; returns its id.

        Raises:
            LedgerError: the ledger does not answer, or the names cannot be stored.
        """
        values = {
            "at": record.at or self._now(),
            "door": tidy(record.door, 100),
            "owner": checked_name("user name", record.user),
            "server_name": checked_name("server name", record.server_name, empty=True),
            "group_name": record.group,
            "groups": record.groups,
            "request": record.request,
            "usage": record.usage,
            "policy_hash": record.policy_hash,
            "inventory_hash": record.inventory_hash,
            "outcome": record.outcome,
            "code": record.code,
            "message": tidy(record.message),
            "allocation_id": record.allocation_id,
        }
        with self._db.write() as connection:
            key = connection.execute(insert(requests).values(values)).inserted_primary_key
        if key is None:
            raise LedgerError("The ledger's database did not give a new row its number.")
        return int(key[0])

    def last_choice(self, user: str, server_name: str) -> Mapping[str, Any] | None:
        """What was asked in the last granted request of this server; None if none was granted yet."""
        query = (
            select(requests.c.request)
            .where(requests.c.owner == user, requests.c.server_name == server_name, requests.c.outcome == "granted")
            .order_by(requests.c.id.desc())
            .limit(1)
        )
        with self._db.read() as connection:
            found = connection.scalar(query)
        return found if isinstance(found, dict) else None

    def requests(
        self,
        *,
        user: str | None = None,
        outcome: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after_id: int = 0,
        limit: int = 100,
    ) -> tuple[RequestRecord, ...]:
        """Request rows that meet every given filter, oldest first; `after_id` gives the next page (≤ 1000 rows)."""
        query = select(requests).where(requests.c.id > after_id).order_by(requests.c.id)
        query = query.limit(max(1, min(limit, PAGE_MAX)))
        if user is not None:
            query = query.where(requests.c.owner == user)
        if outcome is not None:
            query = query.where(requests.c.outcome == outcome)
        if since is not None:
            query = query.where(requests.c.at >= since)
        if until is not None:
            query = query.where(requests.c.at < until)
        with self._db.read() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        return tuple(
            RequestRecord(user=row.pop("owner"), group=row.pop("group_name"), groups=tuple(row.pop("groups")), **row)
            for row in rows
        )


class Policies(Part):
    """Policy versions: the texts that were in force, so that all processes use the same one."""

    def save_policy(self, hash: str, text: str) -> None:  # noqa: A002 (the protocol's word)
        """Make this text the last good policy. Saving what already is the last one writes nothing."""
        newest = select(policy_versions.c.hash).order_by(policy_versions.c.ordinal.desc()).limit(1)
        with self._db.read() as connection:
            if connection.scalar(newest) == hash:
                return
        with self._db.write() as connection:
            last = connection.scalar(newest)
            if last == hash:
                return
            now = self._now()
            ordinal = 1 + int(connection.scalar(select(func.max(policy_versions.c.ordinal))) or 0)
            again = update(policy_versions).where(policy_versions.c.hash == hash)
            if not connection.execute(again.values(ordinal=ordinal, in_force_since=now)).rowcount:
                values = {"hash": hash, "text": text, "first_seen": now, "in_force_since": now, "ordinal": ordinal}
                connection.execute(insert(policy_versions).values(values))
            self._note(connection, "system", "policy.in_force", "policy", "", {"hash": last}, {"hash": hash})

    def last_policy(self) -> tuple[str, str] | None:
        """(hash, text) of the last good policy; None before the first one."""
        query = select(policy_versions.c.hash, policy_versions.c.text).order_by(policy_versions.c.ordinal.desc())
        with self._db.read() as connection:
            found = connection.execute(query.limit(1)).first()
        return None if found is None else (str(found[0]), str(found[1]))

    def policy_text(self, hash: str) -> str | None:  # noqa: A002 (the protocol's word)
        """The text of an older version, for replaying a request row; None if it was never in force."""
        with self._db.read() as connection:
            found = connection.scalar(select(policy_versions.c.text).where(policy_versions.c.hash == hash))
        return None if found is None else str(found)


class Snapshots(Part):
    """The watcher's newest snapshot: one row, overwritten."""

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """Replace the snapshot. Not waited for on the disk: after a power cut it is stale anyway."""
        adapter, layout = _snapshot_format()
        values = {"at": snapshot.at, "format": layout, "body": adapter.dump_json(snapshot).decode()}
        with self._db.write(durable=False) as connection:
            if not connection.execute(update(snapshots).values(values)).rowcount:
                connection.execute(insert(snapshots).values(id=1, **values))

    def read_snapshot(self) -> Snapshot | None:
        """The newest snapshot, however old (ask `stale`); None if there is none that this program can read."""
        adapter, layout = _snapshot_format()
        query = select(snapshots.c.body).where(snapshots.c.format == layout)
        with self._db.read() as connection:
            body = connection.scalar(query)
        if body is None:
            return None
        try:
            return adapter.validate_json(body)
        except ValidationError as error:
            # No evidence is a state that everybody handles; the watcher overwrites it within seconds.
            log.warning("The snapshot in the ledger cannot be read: %d problems", error.error_count())
            return None


@lru_cache(maxsize=1)
def _snapshot_format() -> tuple[TypeAdapter[Snapshot], str]:
    """The JSON adapter and a name of its layout that changes with any field, so that none is misread."""
    adapter = TypeAdapter(Snapshot)
    schema = json.dumps(adapter.json_schema(), sort_keys=True)
    return adapter, hashlib.sha256(schema.encode()).hexdigest()[:16]
