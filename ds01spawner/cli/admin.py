"""`ds01-admin`: what the operator asks and tells on the command line.

Commands are looked up by name when they are used, so that one does not pay for the imports of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

import click

from .output import Ds01Group

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "config": "ds01spawner.cli.policy_commands:config",
        "limits": "ds01spawner.cli.policy_commands:limits",
        "gpus": "ds01spawner.cli.gpu_commands:gpus",
        "place": "ds01spawner.cli.gpu_commands:place",
        "reconcile": "ds01spawner.cli.reconcile_commands:reconcile",
    }
)
"""Command → module and attribute that has it."""


class _LazyGroup(Ds01Group):
    """Loads a command when it is asked for. A part that cannot be imported does not take the others with it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of `COMMANDS`."""
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None where it does not exist or cannot be loaded."""
        where = COMMANDS.get(cmd_name)
        if where is None:
            return super().get_command(ctx, cmd_name)
        module, attribute = where.split(":")
        try:
            command = getattr(import_module(module), attribute, None)
        except ImportError as error:
            click.echo(f"ds01-admin {cmd_name} is not available: {error}", err=True)
            return None
        return command if isinstance(command, click.Command) else None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ds01spawner")
def main() -> None:
    """Look at and check one ds01spawner installation.

    The commands run the same code as a start does. Exit codes: 0 ok, 1 error, 2 usage, 10-29 refusals,
    30 and above: something is broken (`--json` names the code).
    """


if __name__ == "__main__":
    main()
