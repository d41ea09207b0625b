"""What a pass of the reconciler finds and does, as frozen values. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum


class What(str, Enum):
    """What is wrong. The value is the word in JSON, audit rows and logs."""

    # of an allocation
    START_DIED = "start_died"
    CONTAINER_ENDED = "container_ended"
    MACHINE_REBOOTED = "machine_rebooted"
    CONTAINER_GONE = "container_gone"
    HOLD_ENDED = "hold_ended"
    HOLD_ENDLESS = "hold_endless"
    UNIT_GONE = "unit_gone"
    NAMES_RELEASED = "names_released"
    HALF_REPLACED = "half_replaced"
    UNWRITTEN = "unwritten"
    STOP_PENDING = "stop_pending"
    STARTED_BEHIND = "started_behind"
    STARTED_UNSEEN = "started_unseen"
    UNIT_SHARED = "unit_shared"
    MISLABELLED = "mislabelled"
    UNREADABLE = "unreadable"
    # of a container that no live allocation is bound to
    OUTDATED = "outdated"
    UNKNOWN = "unknown"
    COPIED = "copied"
    NEVER_STARTED = "never_started"
    ORPHAN = "orphan"
    # of the box
    UNITS_MISSING = "units_missing"
    UNITS_BACK = "units_back"
    MIG_MODE_CHANGED = "mig_mode_changed"
    REBOOTED = "rebooted"
    # of the installation
    NETWORK_OPEN = "network_open"
    REPAIR_FAILS = "repair_fails"


class Action(str, Enum):
    """What is done about it."""

    NOTHING = "nothing"
    STOP = "stop"
    REMOVE = "remove"
    TAKE_BACK = "take_back"
    HOLD = "hold"
    RELEASE = "release"
    STRIP = "strip"
    BIND = "bind"
    LIMIT_HOLD = "limit_hold"
    RAISE_COUNTER = "raise_counter"

    @property
    def slow(self) -> bool:
        """True if it may take minutes (it may save what a container changed)."""
        return self in (Action.STRIP, Action.HOLD)


class Severity(str, Enum):
    """Whom it concerns: nobody in particular, the log, or the admin."""

    INFO = "info"
    WARNING = "warning"
    ALERT = "alert"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        subject: `alice/main` for a server, a container's name, `box` or `network`.
        evidence: a sentence: what was seen. remedy: what the admin can do; "" where nothing is to be done.
        allocation_id: whose operation row an action holds; None where no allocation is concerned.
        container_id, token, units: what the action is about.
        lasting: it is seen again at each pass until it is remedied (an event is told once and is over).
        waits: why nothing may be done about it now; "" = it may.
    """

    what: What
    subject: str
    evidence: str
    action: Action = Action.NOTHING
    severity: Severity = Severity.WARNING
    remedy: str = ""
    allocation_id: int | None = None
    container_id: str = ""
    token: int | None = None
    units: tuple[str, ...] = ()
    lasting: bool = True
    waits: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same finding in a later pass."""
        return (self.what.value, self.subject, self.container_id)

    @property
    def acting(self) -> bool:
        """True if something is to be done, and may be done now."""
        return self.action is not Action.NOTHING and not self.waits

    @property
    def sentence(self) -> str:
        """Subject and evidence for logs."""
        return f"{self.subject}: {self.evidence}"


class Result(str, Enum):
    """What became of a finding."""

    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"
    TOLD = "told"


@dataclass(frozen=True)
class Outcome:
    """A finding and what became of it. detail: what was done, or why not."""

    finding: Finding
    result: Result
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """One pass.

    Attributes:
        outcomes: one per finding, in the order of the plan. dry_run: nothing was done.
        notes: what limits the pass as a whole ("no fresh picture of the GPUs").
        counts: what was looked at.
    """

    outcomes: tuple[Outcome, ...] = ()
    dry_run: bool = False
    notes: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def _of(self, result: Result) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.result is result)

    @property
    def done(self) -> tuple[Outcome, ...]:
        """What was repaired."""
        return self._of(Result.DONE)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """What could not be repaired this time."""
        return self._of(Result.FAILED)

    @property
    def skipped(self) -> tuple[Outcome, ...]:
        """What another hand is at, what waits, and what was no longer so when it was looked at again."""
        return self._of(Result.SKIPPED)

    @property
    def alerts(self) -> tuple[Finding, ...]:
        """What an admin should know."""
        return tuple(o.finding for o in self.outcomes if o.finding.severity is Severity.ALERT)

    def lines(self) -> Iterator[tuple[Severity, str]]:
        """What is worth a line in the log: repairs and failures (alerts are told by `alerts.py`, once)."""
        for outcome in self.done:
            yield Severity.INFO, f"{outcome.finding.sentence}; {outcome.detail}"
        for outcome in self.failed:
            yield Severity.WARNING, f"{outcome.finding.sentence}; could not be repaired: {outcome.detail}"
