"""What is known about one run without reading its activations?"""

import argparse
import json

from rich.console import Console
from rich.table import Table

import actstore

HELP = "show one run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", help="name of the run")


def run(args: argparse.Namespace) -> int:
    store = actstore.open(args.store)
    asked = store.run(args.run_name)
    hook_points = []
    for name in asked.hook_points:
        stats = asked.stats(name)
        hook_points.append(
            {
                "hook_point": name,
                "d_model": asked.d_model(name),
                "rows": stats.n_rows,
                "nonfinite": stats.nonfinite,
                "norm_median": stats.norm_quantile(0.5) if stats.n_finite_rows else None,
                "array": asked.array_path(name),
            }
        )
    summary = {
        "run": asked.id,
        "version": store.version,
        "complete": asked.is_complete,
        "rows": asked.n_rows,
        "units": asked.n_units,
        "units_planned": len(asked.tokenization.units),
        "bytes": asked.collection.nbytes,
        "model": asked.model,
        "tokenization": asked.tokenization.id,
        "corpus": asked.tokenization.corpus.id,
        "dtype": asked.config["dtype"],
        "codec": asked.config["codec"],
        "fingerprint": asked.collection.fingerprint,
    }
    if args.json:
        print(json.dumps({**summary, "hook_points": hook_points}))
        return 0
    console = Console(markup=False)
    for key, value in summary.items():
        console.print(f"{key:>14}  {value}")
    table = Table("hook point", "width", "rows", "non-finite", "median norm", "array")
    for row in hook_points:
        norm = row["norm_median"]
        shown = "-" if norm is None else f"{norm:.4g}"
        table.add_row(
            str(row["hook_point"]),
            str(row["d_model"]),
            f"{row['rows']:,}",
            str(row["nonfinite"]),
            shown,
            str(row["array"]),
        )
    console.print(table)
    return 0
