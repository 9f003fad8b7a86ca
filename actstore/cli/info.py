"""What is known about one run without reading its activations?"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

import actstore
from actstore.cli.console import output_console
from actstore.show import visible

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
    _print(summary, hook_points)
    return 0


def _print(summary: Mapping[str, Any], hook_points: Sequence[Mapping[str, Any]]) -> None:
    console = output_console()
    flat = {f"model {k}": v for k, v in summary["model"].items()}
    lines = {k: v for k, v in summary.items() if k != "model"} | flat
    for key, value in lines.items():
        shown = f"{value:,}" if type(value) is int else str(value)
        console.print(f"{key:>25}  {visible(shown)}", soft_wrap=True)
    table = Table()
    for name in ("hook point", "width", "rows", "non-finite", "median norm", "array"):
        table.add_column(name, overflow="fold")
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
