"""What does `actstore sae COMMAND ...` run? Dictionaries: train one, import one, encode stored rows with one."""

import argparse

from .subcommands import add_subcommands, run_subcommand

COMMANDS = {
    "train": (
        "actstore.ingest.cli.sae_train",
        "train sparse autoencoders on a run's stored activations",
    ),
    "import": (
        "actstore.ingest.cli.sae_import",
        "import a dictionary that SAELens, sparsify or dictionary_learning trained",
    ),
    "encode": (
        "actstore.ingest.cli.sae_encode",
        "encode a run's rows with a dictionary; makes codes, postings and latent statistics",
    ),
}
"""Sub-command: the module with `add_arguments(parser)` and `run(args) -> int`, and its line in the overview."""

HELP = "train, import or encode with a sparse autoencoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subcommands(parser, COMMANDS)


def run(args: argparse.Namespace) -> int:
    return run_subcommand(args)
