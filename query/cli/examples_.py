"""`actstore examples STORE RUN TARGET`: the contexts that most activate a latent, a neuron or a direction."""

import argparse

from actstore.query.bands import parse_bands
from actstore.store import open_store
from actstore.targets import parse_target

from ._print import add_row_arguments, print_result, row_options

HELP = "find the contexts that most activate a latent, neuron or direction"


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
        help="which activations count; latents have no negative ones (default: %(default)s)",
    )
    parser.add_argument(
        "--bands",
        metavar="LIST",
        help="which rows of latents to show, instead of the best: comma-separated top:N, rank:BANDSxPER, value:BANDSxPER, "
        "percentile:0.5/0.9xPER, random:N, nonactivating:N; @SEED behind one changes its draw",
    )
    parser.add_argument(
        "--regex", metavar="PATTERN", help="only tokens whose text has a match of this regular expression"
    )
    add_row_arguments(parser)


def run(args: argparse.Namespace) -> int:
    targets = [parse_target(text) for text in args.target]
    bands = None if args.bands is None else parse_bands(args.bands)
    found = open_store(args.store, version=args.at).run(args.run_name)
    asked = targets[0] if len(targets) == 1 else targets
    options = {**row_options(args), "bands": bands, "regex": args.regex}
    print_result(found.examples(asked, args.k, sign=args.sign, **options), as_json=args.json)
    return 0
