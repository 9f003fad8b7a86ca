"""How do the asking commands read their common options and print an answer?"""

import argparse

from actstore.cli.console import output_console
from actstore.result import Result


def print_result(result: Result, *, as_json: bool) -> None:
    """Print an answer: a table for people, JSON for programs."""
    if as_json:
        print(result.to_json())
    else:
        output_console().print(result)


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which rows count, and what is shown of each."""
    parser.add_argument("-k", type=int, default=20, help="answers (default: %(default)s)")
    parser.add_argument(
        "--where", metavar="SQL", help="condition over columns of tokens and of their documents"
    )
    parser.add_argument("--keep-special", action="store_true", help="do not leave out special tokens")
    parser.add_argument("--keep-sinks", action="store_true", help="do not leave out attention sinks")
    parser.add_argument(
        "--fold",
        choices=["context", "doc", "none"],
        default="context",
        help="of answers that share this, show only the best (default: %(default)s)",
    )
    parser.add_argument("--before", type=int, default=16, help="tokens shown before (default: %(default)s)")
    parser.add_argument("--after", type=int, default=8, help="tokens shown after (default: %(default)s)")
    parser.add_argument(
        "--memory-mib", type=int, default=512, help="memory for buffers (default: %(default)s)"
    )
    parser.add_argument("--at", type=int, metavar="VERSION", help="ask an earlier version of the store")


def row_options(args: argparse.Namespace) -> dict[str, object]:
    """Return those options as keywords of `examples` and `nearest`."""
    return {
        "where": args.where,
        "mask_special": not args.keep_special,
        "mask_sinks": not args.keep_sinks,
        "fold": None if args.fold == "none" else args.fold,
        "before": args.before,
        "after": args.after,
        "memory_bytes": args.memory_mib << 20,
    }
