"""What all commands share: `--json`, tables for terminals, and errors with their exit code."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from ds01spawner.errors import Ds01Error
from ds01spawner.model import plain

_JSON = "ds01spawner.json"
_PIPE_WIDTH = 160
"""Columns where no terminal says how many: wide enough that `grep` finds whole rows."""


def _note_json(context: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    """Remember the choice where the error handler of the outermost command finds it."""
    if value:
        context.meta[_JSON] = True
    return value


def json_option(function: Any) -> Any:
    """Decorator: `--json`, given to the command as `as_json`."""
    option = click.option(
        "--json", "as_json", is_flag=True, is_eager=True, callback=_note_json, help="Print JSON with base units."
    )
    return option(function)


def console(*, stderr: bool = False) -> Console:
    """Where people read: colours on terminals only, no wrapping at 80 columns in pipes."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH, highlight=False)


def emit(data: Any) -> None:
    """Print `data` (dataclasses and enums included) as JSON."""
    click.echo(json.dumps(plain(data), indent=2, ensure_ascii=False))


class Ds01Group(click.Group):
    """A group of commands that turns a `Ds01Error` into a sentence (or JSON) and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except Ds01Error as error:
            report(error, as_json=bool(ctx.meta.get(_JSON)))
            ctx.exit(error.exit_code)


def report(error: Ds01Error, *, as_json: bool) -> None:
    """Tell an error: as JSON on stdout, else its sentence and its list of problems on stderr."""
    if as_json:
        emit({"error": error.as_dict()})
        return
    out = console(stderr=True)
    out.print(Text.assemble(("Error: ", "bold red"), error.message), soft_wrap=True)
    for alternative in getattr(error, "alternatives", ()):
        out.print(Text(f"  instead: {alternative.text}"), soft_wrap=True)
