"""`actstore match STORE RUN DICTIONARY PATTERN`: the contexts in which latents fire together."""

import argparse

from actstore.patterns import parse_pattern
from actstore.store import open_store

from ._print import add_row_arguments, print_result, row_options

HELP = "find contexts in which latents fire together"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", help="name of the run")
    parser.add_argument("dictionary", metavar="DICTIONARY", help="dictionary of the pattern's plain numbers")
    parser.add_argument(
        "pattern",
        metavar="PATTERN",
        help="latents joined by & | ~ and brackets, such as '3 > 0.5 & ~(4 | latent:other:9)'",
    )
    parser.add_argument(
        "--within", type=int, default=0, help="tokens that they may be apart (default: %(default)s)"
    )
    parser.add_argument("--ordered", action="store_true", help="each must follow the one before it")
    parser.add_argument(
        "--scope",
        choices=["window", "document"],
        default="window",
        help="inside what they must be (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        choices=["strength", "row"],
        default="strength",
        help="order of the answers (default: %(default)s)",
    )
    parser.add_argument("--regex", help="pattern that the answer's token matches")
    add_row_arguments(parser)


def run(args: argparse.Namespace) -> int:
    pattern = parse_pattern(args.pattern, args.dictionary)
    found = open_store(args.store, version=args.at).run(args.run_name)
    result = found.match(
        pattern,
        args.k,
        within=args.within,
        ordered=args.ordered,
        scope=args.scope,
        rank=args.rank,
        **{"regex": args.regex, **row_options(args)},
    )
    print_result(result, as_json=args.json)
    return 0
