"""What is known about one run without reading its activations?"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

import actstore
from actstore.cli.console import output_console
from actstore.run import Run
from actstore.show import visible
from actstore.stats import HookPointStats, run_stats

HELP = "show one run"

_SINK_TOKENS = 3
"""Tokens named for each hook point: nearly all sinks are one or two."""

_QUANTILES = (0.001, 0.01, 0.5, 0.99, 0.999)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", help="name of the run")


def run(args: argparse.Namespace) -> int:
    store = actstore.open(args.store)
    asked = store.run(args.run_name)
    found = run_stats(asked)
    words = _words(asked, found)
    hook_points = [
        {
            "hook_point": name,
            "d_model": asked.d_model(name),
            "rows": stats.n_rows,
            "nonfinite": stats.nonfinite,
            "array": asked.array_path(name) if "dense" in asked.keep else None,
            **_summary(stats, words),
        }
        for name, stats in found.items()
    ]
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
        "keep": list(asked.keep),
        "poolings": list(asked.poolings),
        "sample": asked.config.get("sample"),
        "quarantined": {str(unit): reason for unit, reason in asked.quarantined.items()},
        "self_check": asked.self_check,
        "fingerprint": asked.collection.fingerprint,
    }
    if args.json:
        print(json.dumps({**summary, "hook_points": hook_points}))
        return 0
    _print(summary, hook_points)
    return 0


def _words(asked: Run, found: Mapping[str, HookPointStats]) -> dict[int, str]:
    """Return the text of every token that is a sink somewhere."""
    ids = sorted({token for stats in found.values() for token in stats.sinks().token_ids})
    if not ids:
        return {}
    table = asked.tokenization.vocabulary()
    table = table.filter(pc.is_in(table["token_id"], pa.array(ids, pa.int32())))
    return dict(zip(table["token_id"].to_pylist(), table["token"].to_pylist(), strict=True))


def _summary(stats: HookPointStats, words: Mapping[int, str]) -> dict[str, Any]:
    """Return the statistics as JSON has them: numbers, and null for what is unknown or of no rows."""
    sinks, error = stats.sinks(), stats.int8_error
    dims = {c: stats.outlier_dims(c) for c in ("magnitude", "massive", "robust")}
    return {
        "norm_median": _number(stats.norm_quantile(0.5)),
        "norm_p99": _number(stats.norm_quantile(0.99)),
        "min": _number(float(np.min(stats.min, initial=np.inf))),
        "max": _number(float(np.max(stats.max, initial=-np.inf))),
        "value_quantiles": {str(q): _number(stats.value_quantile(q)) for q in _QUANTILES},
        "outlier_dims": {c: None if found is None else len(found) for c, found in dims.items()},
        "sinks": {
            "limit": _number(sinks.limit),
            "rows": sinks.n_over,
            "rows_by_position": None if sinks.by_position is None else [p.n_over for p in sinks.by_position],
            "tokens": [
                {"token_id": token, "token": words.get(token), "rows_of_largest": count}
                for token, count in sinks.token_ids.items()
            ],
        },
        "int8_error": None if error is None else error.relative,
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _print(summary: Mapping[str, Any], hook_points: Sequence[Mapping[str, Any]]) -> None:
    console = output_console()
    flat = {f"model {k}": v for k, v in summary["model"].items() if v is not None}
    shown = dict(summary, keep=", ".join(summary["keep"]), poolings=", ".join(summary["poolings"]))
    shown["self_check"] = _shown_check(summary["self_check"])
    shown["quarantined"] = "; ".join(f"unit {unit}: {why}" for unit, why in summary["quarantined"].items())
    optional = ("poolings", "sample", "quarantined", "self_check")
    lines = {k: v for k, v in shown.items() if k != "model" and (v or k not in optional)} | flat
    for key, value in lines.items():
        text = f"{value:,}" if type(value) is int else str(value)
        console.print(f"{key:>25}  {visible(text)}", soft_wrap=True)
    stored = _table("hook point", "width", "rows", "non-finite", "array")
    is_int8 = any(row["int8_error"] is not None for row in hook_points)
    columns = ["hook point", "median norm", "p99", "values", "outlier dims", "attention sinks"]
    numbers = _table(*columns, *(["int8 error"] if is_int8 else []))
    for row in hook_points:
        name = str(row["hook_point"])
        stored.add_row(
            name, str(row["d_model"]), f"{row['rows']:,}", str(row["nonfinite"]), str(row["array"] or "-")
        )
        values = f"{_short(row['min'])} to {_short(row['max'])}"
        cells = [
            _short(row["norm_median"]),
            _short(row["norm_p99"]),
            values,
            _shown_dims(row),
            _shown_sinks(row),
        ]
        if is_int8:
            cells.append("-" if row["int8_error"] is None else f"{row['int8_error']:.2%}")
        numbers.add_row(name, *cells)
    console.print(stored)
    console.print(numbers)


def _shown_check(check: Mapping[str, Any] | None) -> str:
    if check is None:
        return ""
    found = {name: one["max_relative"] for name, one in check["hook_points"].items()}
    worst = max(found, key=found.__getitem__, default=None)
    much = f"at most {found[worst]:.2g} of a row's length, at {worst}" if worst else "nothing to compare"
    return f"{check['n_documents']:,} documents, {check['n_rows']:,} rows: {much}"


def _table(*columns: str) -> Table:
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _shown_dims(row: Mapping[str, Any]) -> str:
    count = row["outlier_dims"]["magnitude"]
    return "-" if count is None else f"{count} ({count / row['d_model']:.1%})" if count else "0"


def _shown_sinks(row: Mapping[str, Any]) -> str:
    """Return how many rows are sinks, how many of them begin a window, and their most frequent tokens."""
    sinks = row["sinks"]
    if not sinks["rows"] or sinks["rows_by_position"] is None:
        return f"{sinks['rows']:,}"
    tokens = [visible(repr(t["token"] if t["token"] is not None else t["token_id"])) for t in sinks["tokens"]]
    more = ", ..." if len(tokens) > _SINK_TOKENS else ""
    first = sinks["rows_by_position"][0] / sinks["rows"]
    return f"{sinks['rows']:,} ({first:.0%} at 0): {', '.join(tokens[:_SINK_TOKENS])}{more}"
