"""`actstore active STORE RUN DICTIONARY (--text T | --row N | --doc N)`: the latents that fire there."""

import argparse
from typing import Any

from actstore.store import open_store
from actstore.targets import document

from ._latents import add_latent_arguments, add_mask_arguments, latent_options, mask_options
from ._print import print_result

HELP = "list the latents that fire on a text, rows or a document"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", help="name of the run")
    parser.add_argument("dictionary", metavar="DICTIONARY", help="name of the dictionary")
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--text", help="a text, through the run's model and the dictionary's encoder")
    subject.add_argument("--row", type=int, action="append", help="a stored token row; repeatable")
    subject.add_argument("--doc", type=int, help="a document of the run's corpus")
    parser.add_argument("-k", type=int, default=20, help="latents (default: %(default)s)")
    parser.add_argument(
        "--rank",
        choices=["activation", "share_of_max", "surprise"],
        default="activation",
        help="what they are ordered by (default: %(default)s)",
    )
    parser.add_argument(
        "--agg",
        choices=["max", "mean", "sum", "count"],
        default="max",
        help="how the tokens' values become one number (default: %(default)s)",
    )
    parser.add_argument("--per-token", action="store_true", help="the best latents of every token")
    parser.add_argument("--keep-special", action="store_true", help="do not leave out special tokens")
    parser.add_argument("--keep-sinks", action="store_true", help="do not leave out attention sinks")
    add_latent_arguments(parser, where="--where-latents")
    add_mask_arguments(parser)


def run(args: argparse.Namespace) -> int:
    what: Any = args.text if args.text is not None else args.row
    if args.doc is not None:
        what = document(args.doc)
    found = open_store(args.store, version=args.at).run(args.run_name)
    result = found.active(
        what,
        args.dictionary,
        args.k,
        rank=args.rank,
        agg=args.agg,
        per_token=args.per_token,
        mask_special=not args.keep_special,
        mask_sinks=not args.keep_sinks,
        **latent_options(args),
        **mask_options(args),
    )
    print_result(result, as_json=args.json)
    return 0
