"""What does `actstore index COMMAND ...` run? Indexes of a run's hook points: build one, list them."""

import argparse
import importlib

COMMANDS = {
    "build": (
        "actstore.ingest.cli.index_build",
        "index a hook point for nearest neighbours or directions",
    ),
    "list": ("actstore.ingest.cli.index_list", "list the indexes of a store: coverage, kind, recall, bytes"),
}
"""Sub-command: the module with `add_arguments(parser)` and `run(args) -> int`, and its line in the overview."""

HELP = "build or list indexes for nearest neighbours and directions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, line) in COMMANDS.items():
        implementation = importlib.import_module(module)
        command = commands.add_parser(name, help=line, description=line)
        # Kept from overwriting a --json that stands before the sub-command.
        command.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print machine-readable JSON"
        )
        implementation.add_arguments(command)
        command.set_defaults(run_index=implementation.run)


def run(args: argparse.Namespace) -> int:
    code: int = args.run_index(args)
    return code
