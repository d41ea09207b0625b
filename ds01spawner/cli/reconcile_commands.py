"""`ds01-admin reconcile`: what the watcher's reconciler finds, on demand, and what it does about it."""

from __future__ import annotations

from typing import Any

import click
from rich.text import Text

from ds01spawner.errors import SettingsInvalid
from ds01spawner.reconcile.findings import Action, Outcome, Report, Result, Severity
from ds01spawner.reconcile.reconciler import Reconciler
from ds01spawner.runtime import Runtime
from ds01spawner.settings import Settings, load_settings

from .output import console, emit, json_option

_COLOURS = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.ALERT: "bold red"}
_PLANS = {
    Action.STOP: "would be stopped",
    Action.REMOVE: "would be removed",
    Action.TAKE_BACK: "would be taken back",
    Action.HOLD: "would be held",
    Action.RELEASE: "would be given back",
    Action.STRIP: "would be replaced by a stopped container without a GPU, and the GPU be free",
    Action.BIND: "would be written down",
    Action.LIMIT_HOLD: "would get an end",
    Action.RAISE_COUNTER: "tokens would go on after it",
}


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what is found and what would be done.")
@json_option
def reconcile(dry_run: bool, as_json: bool) -> None:
    """Compare the ledger with Docker and the GPUs, and repair what a crash left behind.

    The watcher does the same at its start and every minute. Nothing is freed or stopped without evidence: while the
    watcher's picture of the GPUs is missing or older than 15 s, this command only tells. Containers with a token that
    the ledger never gave (a restored backup) are never touched. Exit code 1: something could not be repaired.
    """
    settings = load_settings()
    _require_ledger(settings)
    runtime = Runtime.open(role="admin", settings=settings)
    try:
        report = Reconciler(runtime, runtime.ledger.read_snapshot).run(dry_run=dry_run)
    finally:
        runtime.close()
    if as_json:
        emit(_data(report))
    else:
        _show(report)
    if report.failed:
        raise click.exceptions.Exit(1)


def _require_ledger(settings: Settings) -> None:
    """Looking must not make a ledger where there is none."""
    if not settings.ledger_url and not (settings.state_dir / "ledger.sqlite").exists():
        raise SettingsInvalid(f"There is no ledger in {settings.state_dir} yet. Start the Hub once.")


def _data(report: Report) -> dict[str, Any]:
    """The report for programs: what was found, with what became of it in `result`."""
    return {
        "dry_run": report.dry_run,
        "notes": report.notes,
        "counts": {**report.counts, **{r.value: sum(o.result is r for o in report.outcomes) for r in Result}},
        "findings": [{**vars(o.finding), "result": o.result, "detail": o.detail} for o in report.outcomes],
    }


def _show(report: Report) -> None:
    out = console()
    for note in report.notes:
        out.print(Text(note, "yellow"), soft_wrap=True)
    for outcome in report.outcomes:
        finding = outcome.finding
        words = Text.assemble((finding.subject, _COLOURS[finding.severity]), f"  {finding.evidence}")
        words.append(f"\n    → {_result(outcome)}")
        if finding.remedy:
            words.append(f"\n    {finding.remedy}", "dim")
        out.print(words, soft_wrap=True)
    looked = f"{report.counts.get('allocations', 0)} servers and {report.counts.get('containers', 0)} containers"
    if not report.outcomes:
        out.print(f"All is as it should be: {looked} were compared.")
    else:
        said = ", ".join(f"{n} {r.value}" for r in Result if (n := sum(o.result is r for o in report.outcomes)))
        out.print(f"{looked} were compared; {said}.")


def _result(outcome: Outcome) -> str:
    if outcome.result is Result.TOLD:
        return "nothing is done about it"
    if outcome.result is Result.SKIPPED and not outcome.detail:
        return _PLANS.get(outcome.finding.action, "skipped")
    if outcome.result is Result.DONE:
        return outcome.detail
    return f"{outcome.result.value}: {outcome.detail}"
