"""What does `actstore sae COMMAND ...` run? Dictionaries: train one, import one, encode stored rows with one."""

import argparse
import importlib

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
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, line) in COMMANDS.items():
        implementation = importlib.import_module(module)
        command = commands.add_parser(name, help=line, description=line)
        # Kept from overwriting a --json that stands before the sub-command.
        command.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print machine-readable JSON"
        )
        implementation.add_arguments(command)
        command.set_defaults(run_sae=implementation.run)


def run(args: argparse.Namespace) -> int:
    code: int = args.run_sae(args)
    return code
