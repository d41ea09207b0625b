"""What an admin should know, told once: raised when it is first seen, cleared when it is seen no more.

Alerts are audit rows, so that they outlive a restart and every process knows the same ones. Whoever delivers them
(pages, mail) reads those rows.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from ds01spawner.ledger.store import Ledger

from .findings import Finding, Severity, What

log = logging.getLogger("ds01.alerts")

RAISED, CLEARED, EVENT = "alert.raised", "alert.cleared", "alert.event"
"""Actions of the audit rows: of what lasts, of its end, and of what is over once it is told."""
_PAGE = 1000
"""Rows that are looked through; an older alert that still lasts is raised again."""

Key = tuple[str, str, str]


def open_alerts(ledger: Ledger) -> frozenset[Key]:
    """Keys of the alerts that last."""
    latest: dict[Key, str] = {}
    for row in ledger.audit_rows(action="alert.", limit=_PAGE):
        told = row.after or row.before or {}
        latest.setdefault((str(told.get("what")), row.subject, str(told.get("container", ""))), row.action)
    return frozenset(key for key, action in latest.items() if action == RAISED)


def tell(
    ledger: Ledger, who: str, findings: Iterable[Finding], scope: Collection[What], keep: Collection[Key] = ()
) -> tuple[Finding, ...]:
    """Raise what is new among `findings`, clear what is over; gives what was raised.

    Args:
        findings: all of this pass; those of lower severity are passed over.
        scope: what this pass can see at all; open alerts of other kinds stay open.
        keep: open alerts that stay open although they are not among `findings`.
    """
    known = open_alerts(ledger)
    current = {finding.key: finding for finding in findings if finding.severity is Severity.ALERT}
    raised = [finding for key, finding in current.items() if key not in known or not finding.lasting]
    for finding in raised:
        log.warning("%s%s", finding.sentence, f". {finding.remedy}" if finding.remedy else "")
        ledger.audit(
            who,
            RAISED if finding.lasting else EVENT,
            finding.subject,
            finding.evidence,
            after={
                "what": finding.what.value,
                "container": finding.container_id,
                "remedy": finding.remedy,
                "units": list(finding.units),
            },
            allocation_id=finding.allocation_id,
        )
    words = {what.value for what in scope}
    for what, subject, container in sorted(known - current.keys()):
        if what in words and (what, subject, container) not in keep:
            log.info("%s: no longer %s", subject, what.replace("_", " "))
            ledger.audit(who, CLEARED, subject, "seen no more", before={"what": what, "container": container})
    return tuple(raised)
