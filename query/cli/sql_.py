"""`actstore sql STORE QUERY`: one SELECT over the store's views."""

import argparse

from actstore.result import Result
from actstore.store import open_store

from ._print import print_result

HELP = "run one SELECT over the store's views"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "SHOW TABLES lists the views, SELECT * FROM view_columns says what their columns mean."
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("query", metavar="QUERY", help="one SELECT, DESCRIBE, SUMMARIZE or SHOW TABLES")
    parser.add_argument(
        "-p", "--param", action="append", default=[], help="value for the next ? of the query; repeatable"
    )
    parser.add_argument("--timeout", type=float, help="stop after so many seconds")
    parser.add_argument(
        "--memory-mib", type=int, default=512, help="memory of the query (default: %(default)s)"
    )
    parser.add_argument(
        "--max-result-mib", type=int, default=256, help="largest answer (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="threads (default: every core)")
    parser.add_argument("--at", type=int, metavar="VERSION", help="ask an earlier version of the store")


def run(args: argparse.Namespace) -> int:
    result: Result = open_store(args.store, version=args.at).sql(
        args.query,
        args.param or None,
        timeout_s=args.timeout,
        memory_bytes=args.memory_mib << 20,
        max_result_bytes=args.max_result_mib << 20,
        threads=args.threads,
    )
    print_result(result, as_json=args.json)
    return 0
