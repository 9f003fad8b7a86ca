"""`actstore nearest STORE RUN HOOK_POINT (--row N | --text T | --document N | --vector FILE.npy)`: the nearest stored tokens."""

import argparse
from typing import Any

from actstore.store import open_store
from actstore.targets import document, load_vectors

from ._print import add_row_arguments, print_result, row_options

HELP = "find the stored contexts (or documents) nearest to a row, text, document or vector"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", help="name of the run")
    parser.add_argument(
        "hook_point", metavar="HOOK_POINT", help="where to compare, for instance layers.3.resid_post"
    )
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--row", type=int, help="a stored token row")
    query.add_argument("--text", help="a text: its last token, through the run's model")
    query.add_argument("--document", type=int, metavar="N", help="a document: the mean of its tokens")
    query.add_argument("--vector", metavar="FILE.npy", help="one vector, or several as rows")
    parser.add_argument(
        "--token", type=int, help="of a text, ask for this token instead (negative: from the end)"
    )
    parser.add_argument(
        "--metric",
        choices=["cosine", "ip", "l2"],
        default="cosine",
        help="what near means (default: %(default)s)",
    )
    parser.add_argument(
        "--transform",
        default="",
        metavar="STEPS",
        help="what is done to rows first: of drop_outliers, centre, standardise, whiten, with commas between",
    )
    parser.add_argument("--exact", action="store_true", help="never answer from an index")
    parser.add_argument(
        "--recall",
        type=float,
        help="share of the true answer that an index must have been measured to find (default: 0.95)",
    )
    parser.add_argument(
        "--exclude-own-document", action="store_true", help="leave out the document of --row or --document"
    )
    parser.add_argument(
        "--of", choices=["tokens", "documents"], default="tokens", help="what to find (default: %(default)s)"
    )
    parser.add_argument(
        "--pooling", default="mean", help="of documents: which of their vectors (default: %(default)s)"
    )
    add_row_arguments(parser)


def run(args: argparse.Namespace) -> int:
    query: Any = args.row if args.row is not None else args.text
    if args.vector is not None:
        query = load_vectors(args.vector)
    elif args.document is not None:
        query = document(args.document)
    found = open_store(args.store, version=args.at).run(args.run_name)
    result = found.nearest(
        args.hook_point,
        query,
        args.k,
        metric=args.metric,
        transform=args.transform,
        exact=True if args.exact else None,
        exclude_own_document=args.exclude_own_document,
        token=args.token,
        of=args.of,
        pooling=args.pooling,
        **({} if args.recall is None else {"recall": args.recall}),
        **row_options(args),
    )
    print_result(result, as_json=args.json)
    return 0
