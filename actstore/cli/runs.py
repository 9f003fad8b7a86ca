"""Which runs does a store hold?"""

import argparse
import json

from rich.table import Table

import actstore
from actstore.cli.console import output_console
from actstore.show import visible

HELP = "list the runs of a store"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")


def run(args: argparse.Namespace) -> int:
    store = actstore.open(args.store)
    rows = [
        {
            "run": r.id,
            "model": r.model["source"],
            "hook_points": len(r.hook_points),
            "dtype": r.config["dtype"],
            "rows": r.n_rows,
            "units": r.n_units,
            "bytes": r.collection.nbytes,
            "complete": r.is_complete,
        }
        for r in store.runs()
    ]
    if args.json:
        print(json.dumps({"version": store.version, "runs": rows}))
        return 0
    table = Table()
    for name in ("run", "model", "hook points", "dtype", "rows", "units", "bytes", "complete"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(
            *(f"{v:,}" if type(v) is int else visible("" if v is None else str(v)) for v in row.values())
        )
    output_console().print(table if rows else "no runs yet: `actstore ingest` makes one")
    return 0
