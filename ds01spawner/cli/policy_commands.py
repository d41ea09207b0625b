"""`ds01-admin config check` and `ds01-admin limits`: the policy, tried without a Hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timezone
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ds01spawner.errors import Ds01Error, PolicyInvalid, Problem
from ds01spawner.gpu.inventory import open_inventory
from ds01spawner.model import Limit, Limits, Mount
from ds01spawner.policy.fields import known_of
from ds01spawner.policy.layers import Aggregate, Quantities
from ds01spawner.policy.load import Loaded, read_policy
from ds01spawner.policy.quantity import format_duration, format_number, format_size
from ds01spawner.policy.resolve import may_log_in, offered_profiles, resolve
from ds01spawner.policy.schema import Policy

from .installation import installed_settings, policy_folder, unix_groups
from .output import Ds01Group, console, emit, json_option

_SECTIONS = (
    ("Each server", ("max_cpus", "memory", "memory_swap", "shm_size", "pids_limit", "max_container_disk", "mounts")),
    (
        "GPUs",
        (
            "max_gpu_equivalents",
            "max_mig_instances",
            "max_gpu_slots_per_container",
            "allow_full_gpu",
            "gpu_pool",
            "group_total.max_gpu_equivalents",
        ),
    ),
    (
        "Time",
        (
            "max_runtime",
            "idle_timeout",
            "gpu_idle_timeout",
            "unknown_gpu_idle_timeout",
            "gpu_hold_after_stop",
            "container_hold_after_stop",
        ),
    ),
    (
        "All servers together",
        (
            "max_containers_per_user",
            "aggregate.cpu_quota",
            "aggregate.memory_max",
            "aggregate.memory_high",
            "aggregate.tasks_max",
            "aggregate.gpu_limit",
            "priority",
        ),
    ),
)


@click.group(cls=Ds01Group)
def config() -> None:
    """The policy files."""


@config.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@json_option
def check(folder: Path | None, as_json: bool) -> None:
    """Check the policy files in FOLDER and show every problem with its place.

    FOLDER is by default that of the installation, else ./config. Nothing is changed. Exit code 31 if the files
    are not valid; warnings leave them valid.
    """
    chosen = folder or policy_folder(installed_settings())
    loaded = read_policy(chosen)
    if as_json:
        emit(
            {
                "folder": str(chosen),
                "valid": loaded.policy is not None,
                "hash": loaded.hash if loaded.policy is not None else None,
                "problems": [_problem_data(problem) for problem in loaded.problems],
            }
        )
    else:
        _show_check(chosen, loaded)
    if loaded.policy is None:
        click.get_current_context().exit(PolicyInvalid(loaded.problems).exit_code)


@click.command()
@click.argument("user")
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="GROUP",
    help="As if USER were in the Hub or Unix group GROUP, or listed in the policy's group GROUP. May be repeated.",
)
@click.option("--config", "folder", type=click.Path(path_type=Path), help="Folder of the policy files.")
@click.option("--at", "moment", metavar="DATE", help="As of this day (YYYY-MM-DD, at noon UTC) instead of now.")
@click.option("--inventory", metavar="SOURCE", help="auto, nvml, none or the YAML file of a simulated box.")
@json_option
def limits(
    user: str, groups: tuple[str, ...], folder: Path | None, moment: str | None, inventory: str | None, as_json: bool
) -> None:
    """Show every limit of USER with its value and where it comes from.

    The Hub is not asked: name the Hub groups that count with --group. Unix groups are looked up where the
    installation says that Hub names are Unix accounts. JSON values are in base units (bytes, seconds, cores,
    shares), null is no limit.
    """
    settings = installed_settings()
    chosen = folder or policy_folder(settings)
    loaded = read_policy(chosen)
    if loaded.policy is None:
        raise PolicyInvalid(loaded.problems)
    at = _moment(moment)
    has_mig, note = _has_mig(inventory or (settings.inventory if settings else "auto"))
    unix = (*groups, *(unix_groups(user) if settings and settings.unix_accounts else ()))
    found = resolve(loaded.policy, user, at=at, hub_groups=groups, unix_groups=unix, member_of=groups, has_mig=has_mig)
    admitted = bool(set(groups) & set(loaded.policy.groups)) or may_log_in(
        loaded.policy, user, hub_groups=groups, unix_groups=unix
    )
    notes = [*found.notes, *_preview_notes(loaded.policy, groups), *filter(None, [note])]
    if not admitted:
        notes.append("no group names this user and there is no default_group: they may not log in")
    report = _Report(found, at, admitted, tuple(notes), loaded.policy)
    if as_json:
        emit(report.data())
    else:
        report.show()


# --------------------------------------------------------------------------- the report of `limits`


@dataclass(frozen=True)
class _Report:
    """One user's limits, ready to be printed."""

    limits: Limits
    at: datetime
    may_log_in: bool
    notes: tuple[str, ...]
    policy: Policy

    def rows(self) -> dict[str, Limit]:
        """All limits by key, the group's total included."""
        return {**self.limits.values, "group_total.max_gpu_equivalents": self.limits.group_total_gpu}

    def data(self) -> dict[str, Any]:
        """The machine-readable form."""
        return {
            "user": self.limits.user,
            "group": self.limits.group,
            "groups": self.limits.groups,
            "at": self.at,
            "may_log_in": self.may_log_in,
            "limits": self.rows(),
            "policies": self.limits.policies,
            "profiles": [profile.name for profile in offered_profiles(self.policy, self.limits)],
            "notes": self.notes,
            "policy_hash": self.policy.hash,
        }

    def show(self) -> None:
        """The form for people."""
        out = console()
        out.print(self._heading())
        table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False, padding=(0, 2, 0, 0))
        for column in ("Limit", "Value", "From", "Note"):
            table.add_column(column, overflow="fold", no_wrap=column == "Limit")
        rows = self.rows()
        for title, keys in _SECTIONS:
            table.add_row(Text(title, style="bold cyan"))
            for key in keys:
                limit = rows[key]
                table.add_row(f"  {key}", _value(key, limit.value), _source(limit.source), Text(limit.note, "dim"))
        written = {key: limit for key, limit in self.limits.policies.items() if limit.source != "built-in"}
        if written:
            table.add_row(Text("Idle and runtime rules (the others are built-in)", style="bold cyan"))
            for key, limit in written.items():
                table.add_row(f"  {key}", _plain(limit.value), _source(limit.source), Text(limit.note, "dim"))
        out.print(table)
        profiles = [profile.name for profile in offered_profiles(self.policy, self.limits)]
        out.print(Text.assemble(("Profiles  ", "bold"), ", ".join(profiles) or "none"))
        for note in self.notes:
            out.print(Text.assemble(("Note  ", "bold yellow"), note))

    def _heading(self) -> Text:
        others = [name for name in self.limits.groups if name != self.limits.group]
        group = f"group {self.limits.group}" if self.limits.group else "in no group"
        return Text.assemble(
            (self.limits.user, "bold"),
            f" · {group}",
            f" (also in {', '.join(others)})" if others else "",
            (f" · {self.at:%Y-%m-%d %H:%M} UTC", "dim"),
        )


def _value(key: str, value: Any) -> Text:
    """A value in words that people use."""
    if value is None:
        return Text("all" if key == "gpu_pool" else "no limit", style="green")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if key == "mounts":
        return Text("\n".join(_mount(mount) for mount in value) or "none")
    if isinstance(value, tuple):
        return Text(", ".join(value) or "none")
    unit = _unit(key)
    if unit == "seconds":
        return Text("at once" if value == 0 and "hold" in key else format_duration(value))
    return Text(format_size(value) if unit == "bytes" else _counted(value, unit))


def _counted(value: float, unit: str) -> str:
    """`1 core`, `2 cores`; a share is a bare number."""
    if unit in ("", "share"):
        return format_number(value)
    return f"{format_number(value)} {unit.removesuffix('s') if value == 1 else unit}"


def _plain(value: Any) -> Text:
    return Text(format_number(value) if isinstance(value, (int, float)) or value is None else str(value))


def _unit(key: str) -> str:
    """Base unit of a key."""
    section, _, name = key.rpartition(".")
    info = (Aggregate if section == "aggregate" else Quantities).model_fields.get(name)
    return str(known_of(info).get("unit", "")) if info is not None else ""


def _mount(mount: Mount) -> str:
    return f"{mount.host} → {mount.target} ({'ro' if mount.read_only else 'rw'})"


def _source(source: str) -> Text:
    word = source.split()[0]
    styles = {"built-in": "dim", "group": "blue", "override": "magenta", "grant": "yellow"}
    return Text(source, style=styles.get(word, ""))


# --------------------------------------------------------------------------- the report of `config check`


def _show_check(folder: Path, loaded: Loaded) -> None:
    out = console()
    for problem in loaded.problems:
        out.print(_problem_text(problem), soft_wrap=True)
    warnings = sum(problem.warning for problem in loaded.problems)
    counted = f", {warnings} warning{'s' * (warnings != 1)}" if warnings else ""
    if loaded.policy is None:
        errors = len(loaded.errors)
        text = f"{folder}: not valid, {errors} error{'s' * (errors != 1)}{counted}; the version in force stays"
        out.print(Text(text, style="bold red"), soft_wrap=True)
        return
    policy = loaded.policy
    people = len(frozenset[str]().union(*policy.members.values()))
    groups, profiles = _counted(len(policy.groups), "groups"), _counted(len(policy.profiles), "profiles")
    facts = f"{groups}, {people} people, {profiles}{counted}"
    out.print(Text.assemble((f"{folder}: valid", "bold green"), f" ({facts}; {policy.hash[:12]})"), soft_wrap=True)


def _problem_text(problem: Problem) -> Text:
    place = ":".join(str(part) for part in (problem.file, problem.line, problem.column) if part is not None)
    kind = ("warning: ", "yellow") if problem.warning else ("error: ", "bold red")
    hint = (f" ({problem.hint})", "dim") if problem.hint else ""
    return Text.assemble((f"{place}: ", "bold"), kind, problem.message, hint)


def _problem_data(problem: Problem) -> dict[str, Any]:
    return {
        "severity": "warning" if problem.warning else "error",
        "file": problem.file,
        "line": problem.line,
        "column": problem.column,
        "message": problem.message,
        "hint": problem.hint,
    }


# --------------------------------------------------------------------------- what is asked of the machine


def _moment(text: str | None) -> datetime:
    """Now, or noon (UTC) of the day that was asked for."""
    if text is None:
        return datetime.now(timezone.utc)
    try:
        return datetime.combine(date.fromisoformat(text), time(12), timezone.utc)
    except ValueError as error:
        raise click.BadParameter(f'"{text}" is not a day; write for example 2026-11-30', param_hint="--at") from error


def _has_mig(inventory: str) -> tuple[bool, str]:
    """Whether the box has MIG units, and a note if it could not be told."""
    try:
        with open_inventory(inventory) as source:
            return source.read().has_mig, ""
    except Ds01Error as error:
        return False, f"the GPUs cannot be read, so no MIG units are assumed: {error.message}"


def _preview_notes(policy: Policy, groups: tuple[str, ...]) -> Iterator[str]:
    """Say where a group that was asked for means nothing."""
    known = set(policy.groups)
    for group in policy.groups.values():
        known.update(group.hub_groups, group.unix_groups)
    for name in groups:
        if name not in known:
            yield f'the policy does not mention the group "{name}"'
