"""`actstore knn-lm STORE RUN (--text T | --row N)`: the next tokens that the nearest contexts vote for."""

import argparse
from typing import Any

from actstore.errors import ErrorKind, InvalidInputError
from actstore.query.answer import DEFAULT_RECALL
from actstore.store import open_store

from ._print import print_result

HELP = "predict the next token from the nearest stored contexts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", help="name of the run")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="a text: what comes after its last token?")
    query.add_argument("--row", type=int, help="a stored token row: what comes after it?")
    parser.add_argument(
        "--token", type=int, help="of a text, ask about this token instead (negative: from the end)"
    )
    parser.add_argument(
        "--hook-point", metavar="H", help="where to compare (default: the last layer's mlp_in, or the last)"
    )
    parser.add_argument("-k", type=int, default=1024, help="neighbours (default: %(default)s)")
    parser.add_argument(
        "--metric", choices=["l2", "cosine"], default="l2", help="what near means (default: %(default)s)"
    )
    parser.add_argument(
        "--transform",
        default="",
        metavar="STEP,...",
        help="done to vectors before: centre, standardise, whiten, drop_outliers",
    )
    parser.add_argument("--exact", action="store_true", help="never answer from an index")
    parser.add_argument(
        "--recall",
        type=float,
        default=DEFAULT_RECALL,
        help="of the neighbours, what an index must find (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature", type=float, help="of the neighbours' votes (default: set by their distances)"
    )
    parser.add_argument(
        "--interpolate",
        type=float,
        default=0.25,
        help="weight of the neighbours, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=20, help="tokens shown (default: %(default)s)")
    parser.add_argument(
        "--keep-own-document", action="store_true", help="do not leave out the documents of the row or text"
    )
    parser.add_argument("--exclude-docs", metavar="N,N,...", help="leave out these documents too")
    parser.add_argument(
        "--where", metavar="SQL", help="condition over columns of tokens and of their documents"
    )
    parser.add_argument("--keep-special", action="store_true", help="do not leave out special tokens")
    parser.add_argument("--keep-sinks", action="store_true", help="do not leave out attention sinks")
    parser.add_argument(
        "--memory-mib", type=int, default=512, help="memory for buffers (default: %(default)s)"
    )
    parser.add_argument("--at", type=int, metavar="VERSION", help="ask an earlier version of the store")


def run(args: argparse.Namespace) -> int:
    query: Any = args.row if args.row is not None else args.text
    result = (
        open_store(args.store, version=args.at)
        .run(args.run_name)
        .knn_lm(
            query,
            args.k,
            hook_point=args.hook_point,
            metric=args.metric,
            transform=args.transform,
            exact=True if args.exact else None,
            recall=args.recall,
            temperature=args.temperature,
            interpolate=args.interpolate,
            n_tokens=args.tokens,
            token=args.token,
            exclude_own_document=not args.keep_own_document,
            exclude_docs=None if args.exclude_docs is None else _parse_numbers(args.exclude_docs),
            where=args.where,
            mask_special=not args.keep_special,
            mask_sinks=not args.keep_sinks,
            memory_bytes=args.memory_mib << 20,
        )
    )
    print_result(result, as_json=args.json)
    return 0


def _parse_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"--exclude-docs takes whole numbers with commas between them, got {text!r}",
        ) from error
