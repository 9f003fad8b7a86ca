"""How does a command with commands of its own (`actstore sae train`, `actstore index build`) hand over to them?"""

import argparse
import importlib
from collections.abc import Mapping


def add_subcommands(parser: argparse.ArgumentParser, commands: Mapping[str, tuple[str, str]]) -> None:
    """Add each sub-command to the parser; the chosen one's `run` is in `args.run_subcommand`.

    Args:
        parser: Of the command.
        commands: By name, the module with `add_arguments(parser)` and `run(args) -> int`, and its line in the overview.
    """
    added = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, line) in commands.items():
        implementation = importlib.import_module(module)
        command = added.add_parser(name, help=line, description=line)
        # Kept from overwriting a --json that stands before the sub-command.
        command.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print machine-readable JSON"
        )
        implementation.add_arguments(command)
        command.set_defaults(run_subcommand=implementation.run)


def run_subcommand(args: argparse.Namespace) -> int:
    """Run the chosen sub-command and return its exit code."""
    code: int = args.run_subcommand(args)
    return code
