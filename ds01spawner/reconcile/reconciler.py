"""One pass: gather, compare the box, plan, do, tell. What is remembered from pass to pass is here and in the ledger."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from ds01spawner.ledger.store import Ledger
from ds01spawner.model import Snapshot
from ds01spawner.runtime import Runtime

from .alerts import tell
from .apply import apply
from .box import BOX, Absence, KnownBox, compare
from .evidence import Evidence
from .findings import Finding, Outcome, Report, Result, Severity, What
from .gather import gather
from .plan import NO_PICTURE, plan

log = logging.getLogger("ds01.reconcile")

LAYOUT = "box.layout"
"""Action of the audit rows that remember the box."""
RETRY_FIRST, RETRY_LONGEST = timedelta(minutes=1), timedelta(minutes=30)
ALERT_AFTER = 3
"""Failures in a row of the same repair before an admin is told."""
Later = Callable[[tuple[Finding, ...], Evidence], None]
SCOPE = frozenset(What) - {What.NETWORK_OPEN}
"""What a pass can see."""


@dataclass(frozen=True)
class Retry:
    """A repair that failed: of what, how often in a row, why, and when it is tried again."""

    finding: Finding
    times: int
    why: str
    at: datetime

    @classmethod
    def after(cls, before: Retry | None, finding: Finding, why: str, now: datetime) -> Retry:
        """The next one; each waits twice as long as the one before."""
        times = 1 if before is None else before.times + 1
        return cls(finding, times, why, now + min(RETRY_FIRST * 2 ** (min(times, 10) - 1), RETRY_LONGEST))

    @property
    def alert(self) -> Finding:
        """What an admin is told of it."""
        said = f"{self.finding.evidence}; {self.times} repairs failed: {self.why}"
        return replace(self.finding, what=What.REPAIR_FAILS, severity=Severity.ALERT, evidence=said)


@dataclass
class Reconciler:
    """The passes of one process. Not thread-safe; the watcher has one thread for it.

    Attributes:
        picture: gives the watcher's newest snapshot, however old. watching_since: see `Evidence`.
    """

    runtime: Runtime
    picture: Callable[[], Snapshot | None]
    watching_since: datetime | None = None
    _absences: Mapping[str, Absence] = field(default_factory=dict)
    _retries: dict[tuple[str, str, str], Retry] = field(default_factory=dict)
    _gone: frozenset[str] = frozenset()

    def run(self, *, dry_run: bool = False, later: Later | None = None) -> Report:
        """One pass.

        Args:
            dry_run: only look. later: takes the repairs that may last minutes (`finish` does them); None = done here.

        Raises:
            EngineError, LedgerError: without Docker or the ledger nothing is known, and nothing was done.
        """
        news = self._look_at_box(keep=not dry_run)
        evidence = self.look()
        findings = (*news, *(self._paced(finding, evidence.now) for finding in plan(evidence)))
        counts = {"containers": len(evidence.facts), "allocations": len(evidence.allocations)}
        notes = () if evidence.fresh else (f"Limited: {NO_PICTURE}.",)
        if dry_run:
            outcomes = tuple(Outcome(f, Result.SKIPPED if f.acting else Result.TOLD, f.waits) for f in findings)
            return Report(outcomes, True, notes, counts)
        slow = tuple(f for f in findings if f.acting and f.action.slow and later is not None)
        outcomes = apply(self.runtime, (f for f in findings if f not in slow), evidence, self.look)
        self._remember(outcomes, evidence.now)
        if later is not None and slow:
            later(slow, evidence)
        self._forget_settled(findings, evidence)
        self._tell(findings)
        report = Report((*outcomes, *(Outcome(f, Result.SKIPPED, "under way") for f in slow)), False, notes, counts)
        write(report)
        return report

    def finish(self, findings: tuple[Finding, ...], evidence: Evidence) -> tuple[Outcome, ...]:
        """Do the repairs that `run` handed on. May be called in another thread than `run`."""
        outcomes = apply(self.runtime, findings, evidence, self.look)
        self._remember(outcomes, self.runtime.now())
        write(Report(outcomes))
        return outcomes

    def look(self) -> Evidence:
        """The evidence of this moment."""
        return gather(self.runtime, self.picture(), gone=self._gone, watching_since=self.watching_since)

    # ----------------------------------------------------------------- the box

    def _look_at_box(self, *, keep: bool) -> tuple[Finding, ...]:
        """Compare the newest picture with what was known; a picture that is too old says nothing."""
        snapshot, ledger = self.picture(), self.runtime.ledger
        if snapshot is None or snapshot.stale(self.runtime.now()):
            return ()
        known = known_box(ledger)
        leased = {lease.unit_uuid for a in ledger.allocations() for lease in a.leases}
        news = compare(known, snapshot, self._absences, leased)
        self._gone = news.gone
        if keep:
            self._absences = news.absences
            if known != news.known:
                reason = "; ".join(f.evidence for f in news.findings) or "looked at"
                before = known.as_dict() if known else None
                ledger.audit(self.runtime.who, LAYOUT, BOX, reason, before, news.known.as_dict())
            for finding in news.findings:
                if finding.severity is not Severity.ALERT:
                    log.info("%s", finding.sentence)
        return news.findings

    # ----------------------------------------------------------------- repairs that fail

    def _tell(self, findings: tuple[Finding, ...]) -> None:
        failing = tuple(retry.alert for retry in list(self._retries.values()) if retry.times >= ALERT_AFTER)
        # Another process may have told that a repair fails; it does so as long as there is something to repair.
        keep = {(What.REPAIR_FAILS.value, finding.subject, finding.container_id) for finding in findings}
        tell(self.runtime.ledger, self.runtime.who, (*findings, *failing), SCOPE, keep)

    def _paced(self, finding: Finding, now: datetime) -> Finding:
        retry = self._retries.get(finding.key)
        if retry is None or now >= retry.at or not finding.acting:
            return finding
        return replace(finding, waits=f"tried {retry.times} times, again at {retry.at:%H:%M:%S} UTC: {retry.why}")

    def _remember(self, outcomes: tuple[Outcome, ...], now: datetime) -> None:
        for outcome in outcomes:
            key = outcome.finding.key
            if outcome.result is Result.FAILED:
                self._retries[key] = Retry.after(self._retries.get(key), outcome.finding, outcome.detail, now)
            elif outcome.result is Result.DONE:
                self._retries.pop(key, None)

    def _forget_settled(self, findings: tuple[Finding, ...], evidence: Evidence) -> None:
        """What is found no more needs no repair any more; unless somebody (we, perhaps) is just at it."""
        found = {finding.key for finding in findings}
        busy = {row.allocation_id for row in evidence.operations if not row.stale}
        for key, retry in list(self._retries.items()):
            if key not in found and retry.finding.allocation_id not in busy:
                self._retries.pop(key, None)


def known_box(ledger: Ledger) -> KnownBox | None:
    """What the ledger remembers of the box; None if that is nothing, or nothing that this program can read."""
    for row in ledger.audit_rows(action=LAYOUT, limit=1):
        try:
            return KnownBox.from_dict(row.after or {})
        except (KeyError, TypeError, ValueError):
            log.warning("What the ledger remembers of the GPUs (audit row %d) cannot be read; looking anew", row.id)
    return None


def write(report: Report) -> None:
    """Log what was repaired and what could not be."""
    for severity, line in report.lines():
        log.log(logging.INFO if severity is Severity.INFO else logging.WARNING, "%s", line)
