"""Who asks, what is true at that moment (read once, so that one start sees one truth), and the row that tells of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import Code, Ds01Error, LedgerError, Refusal
from .images import SavedImage
from .keep import saved_images
from .ledger.records import RequestRecord, tidy
from .model import Limits, Snapshot, Usage
from .policy.resolve import may_log_in, offered_profiles, resolve
from .policy.schema import Policy, Profile
from .runtime import Runtime

log = logging.getLogger("ds01.requests")

MAX_RECORDED = 4096
"""Characters of JSON that one request may take in its row; nobody honest comes near."""


@dataclass(frozen=True)
class Person:
    """A Hub user with the Hub groups of this moment. `admin`: of the Hub; is told what is wrong with the policy."""

    name: str
    hub_groups: tuple[str, ...] = ()
    admin: bool = False


@dataclass(frozen=True)
class Scene:
    """Everything that is known before a request is judged."""

    policy: Policy
    snapshot: Snapshot | None
    limits: Limits
    profiles: tuple[Profile, ...]
    saved: tuple[SavedImage, ...]


def look(runtime: Runtime, person: Person) -> Scene:
    """Policy, snapshot and limits of this moment.

    Raises:
        Refusal: not_allowed, when the policy does not name the user. PolicyInvalid: there never was a valid policy.
    """
    policy = runtime.policies.current()
    unix = runtime.unix_groups(person.name)
    if not may_log_in(policy, person.name, hub_groups=person.hub_groups, unix_groups=unix):
        raise Refusal(
            Code.NOT_ALLOWED,
            f"{person.name} is in no group of this server's policy. Ask the admin to be added to one.",
            facts={"user": person.name},
        )
    snapshot = runtime.ledger.read_snapshot()
    limits = resolve(
        policy,
        person.name,
        at=runtime.now(),
        hub_groups=person.hub_groups,
        unix_groups=unix,
        has_mig=snapshot is not None and snapshot.inventory.has_mig,
    )
    return Scene(policy, snapshot, limits, offered_profiles(policy, limits), saved_images(runtime, person.name))


@dataclass
class Asking:
    """One request on its way to a row: what was asked, and as much as was seen until it was decided."""

    person: Person
    server_name: str
    door: str
    options: Mapping[str, Any]
    scene: Scene | None = None
    usage: Usage | None = None
    allocation_id: int | None = None

    def write(self, runtime: Runtime, error: BaseException | None) -> None:
        """Write the row; `error` None = granted.

        Raises:
            LedgerError: a granted request could not be written down. One that failed already says why it failed.
        """
        known = error if isinstance(error, Ds01Error) else None
        scene = self.scene
        snapshot = scene.snapshot if scene else None
        row = RequestRecord(
            user=self.person.name,
            server_name=self.server_name,
            door=self.door,
            outcome="granted" if error is None else "refused" if isinstance(error, Refusal) else "failed",
            request=recordable(self.options),
            group=scene.limits.group if scene else None,
            groups=scene.limits.groups if scene else (),
            usage=self.usage,
            policy_hash=scene.policy.hash if scene else "",
            inventory_hash=snapshot.inventory.fingerprint if snapshot else "",
            code="" if error is None else known.code.value if known else Code.INTERNAL.value,
            message="" if error is None else known.message if known else type(error).__name__,
            allocation_id=self.allocation_id,
        )
        try:
            runtime.ledger.record_request(row)
        except LedgerError as failed:
            if error is None:
                raise
            log.warning("The request of %s (%s) could not be written down: %s", row.user, row.code, failed.message)


def recordable(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` as they may stand in a row: plain JSON of a bounded size, in characters that every database stores."""
    try:
        text = json.dumps(options, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return {"unreadable": True}
    if len(text) > MAX_RECORDED:
        return {"too_long": len(text)}
    found: dict[str, Any] = _storable(json.loads(text))
    return found


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return tidy(value)
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        return {tidy(key): _storable(item) for key, item in value.items()}
    return value
