"""`actstore examples STORE RUN TARGET`: the contexts that most activate a neuron or a direction."""

import argparse

from actstore.store import open_store
from actstore.targets import parse_target

from ._print import add_row_arguments, print_result, row_options

HELP = "find the contexts that most activate a neuron or direction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", help="name of the run")
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="+",
        help="neuron:HOOK_POINT:INDEX, direction:HOOK_POINT:FILE.npy or latent:DICTIONARY:INDEX; several share one pass",
    )
    parser.add_argument(
        "--sign",
        choices=["pos", "neg", "abs"],
        default="pos",
        help="which activations count (default: %(default)s)",
    )
    add_row_arguments(parser)


def run(args: argparse.Namespace) -> int:
    targets = [parse_target(text) for text in args.target]
    found = open_store(args.store, version=args.at).run(args.run_name)
    asked = targets[0] if len(targets) == 1 else targets
    print_result(found.examples(asked, args.k, sign=args.sign, **row_options(args)), as_json=args.json)
    return 0
