"""Which indexes does a store have, on the command line?"""

import argparse
import json
from typing import Any

from rich.table import Table

import actstore
from actstore.cli.console import output_console
from actstore.index_list import list_indexes
from actstore.show import visible

HELP = "list the indexes of a store: coverage, kind, recall, bytes"

_COLUMNS = (
    "run",
    "hook_point",
    "of",
    "kind",
    "metric",
    "transform",
    "state",
    "n_indexed",
    "coverage",
    "recall",
    "nbytes",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", nargs="?", help="only of this run")


def run(args: argparse.Namespace) -> int:
    store = actstore.open(args.store)
    found = list_indexes(store, args.run_name)
    if args.json:
        print(json.dumps({"version": store.version, "indexes": found}))
        return 0
    table = Table()
    for name in _COLUMNS:
        table.add_column(name.replace("_", " "), overflow="fold")
    for entry in found:
        table.add_row(*(visible(_text(name, entry[name])) for name in _COLUMNS))
    output_console().print(table if found else "no indexes yet: `actstore index build` makes one")
    return 0


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "coverage":
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
