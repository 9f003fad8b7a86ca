"""What is known of a unit's rows, as they are stored and for the tokens that they belong to?

Stored rows are widened to float32 a block at a time, so that no unit is ever in memory twice.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.codec.spec import ShardSpec
from actstore.covariance import covariance_of, pack_covariance
from actstore.dtypes import to_float32
from actstore.int8 import Int8Error, Int8Transform, dequantise
from actstore.stats import HookPointStats, RowTokens, read_stats

Rows = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Widen: TypeAlias = Callable[[slice | npt.NDArray[np.int64], FloatArray], FloatArray]


def unit_stats(
    hook_point: str,
    spec: ShardSpec,
    rows: Rows,
    tokens: pa.Table,
    *,
    int8: Int8Transform | None = None,
    error: Int8Error | None = None,
) -> HookPointStats:
    """Return the statistics of a unit's stored rows at one hook point.

    Takes about 0.4 us for a row of 256 values, on the calling thread alone; safe from several threads at once.

    Args:
        hook_point: Its name.
        spec: How its rows are stored.
        rows: As stored: shape (n, stored_width).
        tokens: One row for each of `rows`, in order: at least `row`, `token_id` and `window_position`.
        int8: What the rows are centred and scaled by, where they are int8.
        error: What quantising them lost; kept as `int8_error`.
    """
    row_tokens = RowTokens(*(tokens[name].to_numpy() for name in ("row", "token_id", "window_position")))
    stats = read_stats(
        hook_point, _widen(spec, rows, int8), n_rows=len(rows), d_model=spec.d_model, tokens=row_tokens
    )
    return stats if error is None else dataclasses.replace(stats, int8_error=error)


def unit_covariance(spec: ShardSpec, rows: Rows, *, int8: Int8Transform | None = None) -> bytes:
    """Return the stored form of the covariance of a unit's rows at one hook point (FORMAT.md, section 7.5).

    Args:
        spec: How the rows are stored.
        rows: As stored: shape (n, stored_width).
        int8: What they are centred and scaled by, where they are int8.

    Raises:
        InvalidInputError: the hook point is wider than `actstore.covariance.MAX_D_MODEL`.
    """
    return pack_covariance(covariance_of(_widen(spec, rows, int8), n_rows=len(rows), d_model=spec.d_model))


def _widen(spec: ShardSpec, rows: Rows, int8: Int8Transform | None) -> Widen:
    """Return a function that gives some of the rows as float32."""
    if spec.dtype == "int8":
        assert int8 is not None, "int8 rows are numbers only with the transform they were made with"
        transform = int8
        return lambda index, out: dequantise(rows[index], transform, out=out)
    if spec.dtype == "float32":
        return lambda index, _: np.ascontiguousarray(rows[index], np.float32)
    return lambda index, out: to_float32(rows[index], spec.dtype, out=out)
