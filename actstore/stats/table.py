"""How are statistics stored? One row of a table per hook point (FORMAT.md, section 7.3).

Columns from `outlier_counts` on came later: tables without them are read, and what they would hold is unknown.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.arrow_arrays import NUMPY_TYPES, to_array
from actstore.errors import ErrorKind, FormatError
from actstore.int8 import Int8Error
from actstore.stats.sinks import RowNorms
from actstore.stats.sketch import ValueSketch
from actstore.stats.values import HookPointStats, empty_stats, merge_stats

if TYPE_CHECKING:
    from actstore.run import Run

_INT8_ERROR = pa.struct(
    [
        pa.field("n_values", pa.int64(), nullable=False),
        pa.field("squared_error", pa.float64(), nullable=False),
        pa.field("squared_deviation", pa.float64(), nullable=False),
        pa.field("largest", pa.float64(), nullable=False),
    ]
)

STATS_SCHEMA = pa.schema(
    [
        pa.field("hook_point", pa.string(), nullable=False),
        pa.field("n_rows", pa.int64(), nullable=False),
        pa.field("n_finite_rows", pa.int64(), nullable=False),
        pa.field("nonfinite", pa.int64(), nullable=False),
        pa.field("mean", pa.list_(pa.float64()), nullable=False),
        pa.field("m2", pa.list_(pa.float64()), nullable=False),
        pa.field("min", pa.list_(pa.float32()), nullable=False),
        pa.field("max", pa.list_(pa.float32()), nullable=False),
        pa.field("zero_norms", pa.int64(), nullable=False),
        pa.field("norm_bins", pa.list_(pa.int32()), nullable=False),
        pa.field("norm_counts", pa.list_(pa.int64()), nullable=False),
        pa.field("outlier_counts", pa.list_(pa.int64())),
        pa.field("value_rows", pa.int64()),
        pa.field("value_bins", pa.list_(pa.int32())),
        pa.field("value_counts", pa.list_(pa.int64())),
        pa.field("position_rows", pa.list_(pa.int64())),
        pa.field("position_norm_positions", pa.list_(pa.int32())),
        pa.field("position_norm_bins", pa.list_(pa.int32())),
        pa.field("position_norm_counts", pa.list_(pa.int64())),
        pa.field("top_rows", pa.list_(pa.int64())),
        pa.field("top_token_ids", pa.list_(pa.int32())),
        pa.field("top_positions", pa.list_(pa.int32())),
        pa.field("top_norms", pa.list_(pa.float64())),
        pa.field("int8_error", _INT8_ERROR),
    ]
)

_VALUE_COLUMNS = {"n_rows": "value_rows", "bins": "value_bins", "counts": "value_counts"}
_NORM_COLUMNS = {
    "position_rows": "position_rows",
    "positions": "position_norm_positions",
    "bins": "position_norm_bins",
    "counts": "position_norm_counts",
    "top_rows": "top_rows",
    "top_token_ids": "top_token_ids",
    "top_positions": "top_positions",
    "top_norms": "top_norms",
}
"""Column by field."""

_PLAIN = (*STATS_SCHEMA.names[: STATS_SCHEMA.get_field_index("outlier_counts") + 1],)
"""Columns that are fields of `HookPointStats`."""


def is_stats_key(run: str, key: str) -> bool:
    """Return whether `key` is where a run's statistics are stored, of a unit or of the whole run.

    >>> is_stats_key("stats", "runs/stats/embed/c/0/0"), is_stats_key("a", "runs/a/stats/all-00.parquet")
    (False, True)
    """
    return key.startswith(f"runs/{run}/stats/")


def stats_to_table(stats: Iterable[HookPointStats]) -> pa.Table:
    """Return one table row per hook point (`STATS_SCHEMA`)."""
    rows = [_row_of(one) for one in stats]
    arrays = [_column([row[field.name] for row in rows], field.type) for field in STATS_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=STATS_SCHEMA)


def stats_from_table(table: pa.Table, hook_points: Iterable[str] | None = None) -> dict[str, HookPointStats]:
    """Return what `stats_to_table` wrote, by hook point; of all of them, or of those wanted that there are.

    A table of an earlier version may lack the later columns.
    """
    wanted = None if hook_points is None else set(hook_points)
    names = table["hook_point"].to_pylist()
    return {name: _stats_of(table, i) for i, name in enumerate(names) if wanted is None or name in wanted}


def run_stats(run: "Run", hook_points: Iterable[str] | None = None) -> dict[str, HookPointStats]:
    """Return statistics over all stored rows of a run, by hook point; of all of them, or of those of the given names.

    Reads one small object when the run is complete, one per unit before.

    Raises:
        FormatError: an object is missing or damaged.
    """
    collection = run.collection
    widths = {h["name"]: int(h["d_model"]) for h in collection.config["hook_points"]}
    names = list(widths) if hook_points is None else list(hook_points)
    totals = {name: empty_stats(name, widths[name]) for name in names}
    seal, units = collection.seal, collection.units.values()
    for obj in seal.objects if seal is not None else (o for u in units for o in u.objects):
        if is_stats_key(collection.id, obj.key):
            found = stats_from_table(run.store.objects.table(obj), names)
            if missing := set(names) - set(found):
                raise FormatError(
                    ErrorKind.INVARIANT_BROKEN,
                    f"{obj.key!r} has no statistics of {', '.join(sorted(missing))}: a faulty writer wrote it; ingest again",
                )
            for name in names:
                totals[name] = merge_stats(totals[name], found[name])
    return totals


def _row_of(stats: HookPointStats) -> dict[str, Any]:
    row = {name: getattr(stats, name) for name in _PLAIN}
    for part, columns in ((stats.value_sketch, _VALUE_COLUMNS), (stats.row_norms, _NORM_COLUMNS)):
        row |= {column: None if part is None else getattr(part, name) for name, column in columns.items()}
    return row | {"int8_error": None if stats.int8_error is None else asdict(stats.int8_error)}


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    lengths = [0 if value is None else len(value) for value in values]
    flat = np.concatenate([np.zeros(0, NUMPY_TYPES[kind.value_type]), *(v for v in values if v is not None)])
    return pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()),
        pa.array(flat, kind.value_type),
        mask=pa.array([value is None for value in values], pa.bool_()),
    )


def _stats_of(table: pa.Table, i: int) -> HookPointStats:
    plain = {name: _cell(table, name, i) for name in _PLAIN}
    error = _cell(table, "int8_error", i)
    return HookPointStats(
        **plain,
        value_sketch=_part(ValueSketch, table, i, _VALUE_COLUMNS),
        row_norms=_part(RowNorms, table, i, _NORM_COLUMNS),
        int8_error=None if error is None else Int8Error(**error),
    )


def _part(kind: type[Any], table: pa.Table, i: int, columns: Mapping[str, str]) -> Any:
    cells = {name: _cell(table, column, i) for name, column in columns.items()}
    return None if any(cell is None for cell in cells.values()) else kind(**cells)


def _cell(table: pa.Table, name: str, i: int) -> Any:
    """Return one cell: a list as an array of its type, and None for what is null or has no column."""
    if name not in table.column_names:
        return None
    scalar = table[name][i]
    if not pa.types.is_list(scalar.type):
        return scalar.as_py()
    if not scalar.is_valid:
        return None
    values: npt.NDArray[Any] = to_array(scalar.values)
    return values.astype(NUMPY_TYPES[STATS_SCHEMA.field(name).type.value_type])
