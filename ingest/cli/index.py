"""What does `actstore index COMMAND ...` run? Indexes of a run's hook points: build one, list them."""

import argparse

from .subcommands import add_subcommands, run_subcommand

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
    add_subcommands(parser, COMMANDS)


def run(args: argparse.Namespace) -> int:
    return run_subcommand(args)
