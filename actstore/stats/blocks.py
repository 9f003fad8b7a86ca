"""How are rows counted into statistics, in one pass and at the speed at which a model makes them?

Rows come a block at a time as float32, from whatever they are stored as. Everything is counted exactly or in float64, but the
norms, which float32 gives to 0.025 % (the sketch that counts them is right to 1 %). No BLAS call here is large enough
to start threads of its own, and all long calls let other threads run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.stats.columns import Columns, FloatArray, sum_deviations
from actstore.stats.sinks import LATER, N_TOP_ROWS, RowNorms, largest_first
from actstore.stats.sketch import (
    N_VALUE_KEYS,
    Float64Array,
    Int32Array,
    Int64Array,
    ValueSketch,
    is_sketched,
    norm_bins,
    sketch_of_keys,
    value_keys,
)
from actstore.stats.values import HookPointStats, empty_stats, merge_moments

Bools: TypeAlias = npt.NDArray[np.bool_]

ReadRows: TypeAlias = Callable[[slice | Int64Array, FloatArray], FloatArray]
"""Returns some of the rows as float32, C-contiguous: in the array it is given, which has as many rows, or in memory that
will not be written to."""

_BLOCKS_PER_GROUP: Final = 16
"""Blocks whose moments are plain sums, and whose values are counted at once; groups are merged."""

_ROWS_AT_ONCE: Final = 1 << 13
"""Rows whose numbers, norms or positions are handled at once."""

_DOT_VALUES: Final = 8192
"""Longest dot product: OpenBLAS starts threads from 10,000 values on, and a float32 sum of n squares is right to
n * 2^-24, which the square root halves."""

_UNDERFLOW: Final = 1e-25
"""Sums of squares under this may have lost squares below the range of float32 (1e-38 each), and are done again in float64."""


@dataclass(frozen=True, slots=True)
class RowTokens:
    """What the rows stand for; arrays of shape (t,)."""

    rows: Int64Array
    """Row numbers of the run."""
    token_ids: Int32Array
    window_positions: Int32Array


@dataclass(slots=True)
class _Rows:
    """What is known of every row as the pass goes on; arrays of shape (t,)."""

    is_finite: Bools
    square_norms: Float64Array
    """To float32's precision; -1 where a value is not finite."""
    nonfinite: int = 0
    """Values."""


def block_stats(hook_point: str, acts_td: FloatArray, *, tokens: RowTokens | None = None) -> HookPointStats:
    """Return the statistics of rows in memory, shape (t, d_model), any number of them.

    Args:
        hook_point: Its name.
        acts_td: float32.
        tokens: What the rows stand for. Without, they are taken for rows 0 and on, and the statistics cannot tell sinks.
    """

    def read(index: slice | Int64Array, _out: FloatArray) -> FloatArray:
        return np.ascontiguousarray(acts_td[index])

    return read_stats(hook_point, read, n_rows=len(acts_td), d_model=acts_td.shape[1], tokens=tokens)


def read_stats(
    hook_point: str, read: ReadRows, *, n_rows: int, d_model: int, tokens: RowTokens | None
) -> HookPointStats:
    """Return the statistics of the rows that `read` gives; it is called once for each block, and again for a few rows.

    Memory: 12 bytes for each value of a block (`BLOCK_VALUES`, so 3 MiB), which the thread keeps, and 17 for each row.
    """
    empty = empty_stats(hook_point, d_model)
    if not n_rows or not d_model:
        return empty
    columns, moments = Columns(d_model), (0, empty.mean, empty.m2)
    scratch = columns.scratch
    rows = _Rows(np.ones(n_rows, np.bool_), np.empty(n_rows))
    group = _BLOCKS_PER_GROUP * len(scratch)
    for start in range(0, n_rows, group):
        stop = min(start + group, n_rows)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            for block in _blocks(start, stop, len(scratch)):
                columns.add(_finite_rows(read(block, scratch[: block.stop - block.start]), block, rows))
            found = _moments(columns, read, rows.is_finite, start, stop)
        moments = (moments[0] + found[0], *merge_moments(*moments, *found))
    n_finite, mean, m2 = moments
    cells = _norm_cells(rows, None if tokens is None else tokens.window_positions)
    bins, counts = _marginal(cells)
    return HookPointStats(
        hook_point,
        n_rows=n_rows,
        n_finite_rows=n_finite,
        nonfinite=rows.nonfinite,
        mean=mean,
        m2=m2,
        min=columns.low,
        max=columns.high,
        zero_norms=n_finite - int(counts.sum()),
        norm_bins=bins,
        norm_counts=counts,
        outlier_counts=columns.loud,
        value_sketch=_sketch(rows.is_finite, None if tokens is None else tokens.rows, read, columns),
        row_norms=None if tokens is None else _row_norms(cells, rows, tokens, read, scratch),
    )


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _finite_rows(acts_td: FloatArray, block: slice, rows: _Rows) -> FloatArray:
    """Note a block's norms and what is not finite; return its finite rows."""
    squares = square_norms(acts_td, rows.square_norms[block])
    # The sums of squares show almost every block clean. A NaN fails both comparisons.
    if not (squares.min() > _UNDERFLOW and squares.max() < np.inf):
        finite_td = np.isfinite(acts_td)
        is_finite = finite_td.all(axis=1)
        rows.nonfinite += finite_td.size - int(np.count_nonzero(finite_td))
        rows.is_finite[block] = is_finite
        squares[~is_finite] = -1.0
        (odd,) = np.nonzero(is_finite & ~((squares > _UNDERFLOW) & (squares < np.inf)))
        squares[odd] = square_norms(acts_td[odd].astype(np.float64), np.empty(len(odd)))
        if not is_finite.all():
            return acts_td[is_finite]
    return acts_td


def square_norms(acts_td: npt.NDArray[np.floating], out_t: Float64Array) -> Float64Array:
    """Write each row's sum of squares, added up in the rows' own precision, to `out_t` and return that."""
    width = acts_td.shape[1]
    out_t[:] = 0
    for first in range(0, width, _DOT_VALUES):
        piece = acts_td[:, first : first + _DOT_VALUES]
        out_t += np.vecdot(piece, piece)
    return out_t


def _moments(
    columns: Columns, read: ReadRows, is_finite: Bools, start: int, stop: int
) -> tuple[int, Float64Array, Float64Array]:
    """Return rows, means and squared deviations of a group, those that cancelled summed again around their mean."""
    n, mean, m2, is_cancelled = columns.take_moments()
    if not n or not is_cancelled.any():
        return n, mean, m2
    (which,) = np.nonzero(is_cancelled)
    # Gathering a quarter of the dimensions costs as much as taking all.
    dims = which if len(which) * 4 < len(mean) else slice(None)
    center = mean[dims]
    total, squares = np.zeros_like(center), np.zeros_like(center)
    for block in _blocks(start, stop, len(columns.scratch)):
        acts_td = read(block, columns.scratch[: block.stop - block.start])
        if not is_finite[block].all():
            acts_td = acts_td[is_finite[block]]
        more, more_squares = sum_deviations(acts_td, dims, center)
        total += more
        squares += more_squares
    mean[dims] = center + total / n
    m2[dims] = np.maximum(squares - total * (total / n), 0.0)
    return n, mean, m2


def _sketch(is_finite: Bools, numbers: Int64Array | None, read: ReadRows, columns: Columns) -> ValueSketch:
    """Return how often which values occur in the chosen rows, which are read again."""
    n_rows = len(is_finite)
    pieces = [
        piece.start
        + np.flatnonzero(
            is_sketched(np.arange(piece.start, piece.stop) if numbers is None else numbers[piece])
        )
        for piece in _blocks(0, n_rows, _ROWS_AT_ONCE)
    ]
    chosen = np.concatenate(pieces)
    chosen = chosen[is_finite[chosen]]
    counts = np.zeros(N_VALUE_KEYS, np.int64)
    for piece in _blocks(0, len(chosen), len(columns.scratch)):
        acts_td = read(chosen[piece], columns.scratch[: piece.stop - piece.start])
        keys = columns.whole_numbers(acts_td.size)
        value_keys(acts_td.reshape(-1), out=keys)
        counts += np.bincount(keys, minlength=N_VALUE_KEYS)
    return sketch_of_keys(len(chosen), counts)


def _norm_cells(
    rows: _Rows, window_positions: Int32Array | None
) -> tuple[Int64Array, Int32Array, Int64Array]:
    """Return finite rows by window position (all at 0 if unknown), bin numbers, and counts of shape (9, number of bins)."""
    squares, n = rows.square_norms, len(rows.square_norms)
    position_rows, bins = np.zeros(LATER + 1, np.int64), np.empty(n, np.int32)
    positions = np.zeros(n, np.int32)
    if window_positions is not None:
        np.minimum(window_positions, LATER, out=positions)
    # Pieces fit a cache, and their temporary arrays are memory that was used before.
    with np.errstate(divide="ignore", invalid="ignore"):
        for piece in _blocks(0, n, _ROWS_AT_ONCE):
            position_rows += np.bincount(positions[piece][rows.is_finite[piece]], minlength=LATER + 1)
            bins[piece] = norm_bins(np.sqrt(squares[piece]))
    is_positive = squares > 0
    if not is_positive.any():
        return position_rows, np.zeros(0, np.int32), np.zeros((LATER + 1, 0), np.int64)
    if not is_positive.all():
        bins, positions = bins[is_positive], positions[is_positive]
    least = int(bins.min())
    n_bins = int(bins.max()) - least + 1
    counts = np.zeros((LATER + 1) * n_bins, np.int64)
    for piece in _blocks(0, len(bins), _ROWS_AT_ONCE):
        counts += np.bincount(positions[piece] * n_bins + (bins[piece] - least), minlength=len(counts))
    return (
        position_rows,
        np.arange(least, least + n_bins, dtype=np.int32),
        counts.reshape(LATER + 1, n_bins),
    )


def _marginal(cells: tuple[Int64Array, Int32Array, Int64Array]) -> tuple[Int32Array, Int64Array]:
    _, bins, counts = cells
    total = counts.sum(axis=0)
    return bins[total > 0], total[total > 0]


def _row_norms(
    cells: tuple[Int64Array, Int32Array, Int64Array],
    rows: _Rows,
    tokens: RowTokens,
    read: ReadRows,
    scratch: FloatArray,
) -> RowNorms:
    position_rows, bins, counts = cells
    at, number = np.nonzero(counts)
    top, norms = _top_rows(rows, tokens, read, scratch)
    return RowNorms(
        position_rows,
        at.astype(np.int32),
        bins[number],
        counts[at, number],
        tokens.rows[top].astype(np.int64),
        tokens.token_ids[top].astype(np.int32),
        tokens.window_positions[top].astype(np.int32),
        norms,
    )


def _top_rows(
    rows: _Rows, tokens: RowTokens, read: ReadRows, scratch: FloatArray
) -> tuple[Int64Array, Float64Array]:
    """Return where the rows of largest norm are, largest first, and their norms in float64.

    Float32 chooses all that may be among them. Where very many norms are nearly equal, as behind a norm layer, that can be
    every row.
    """
    error = (min(scratch.shape[1], _DOT_VALUES) + 8) * 2.0**-24
    (candidates,) = np.nonzero(rows.square_norms >= _least_of_top(rows.square_norms) * (1 - 2 * error))
    exact = np.empty(len(candidates))
    for piece in _blocks(0, len(candidates), len(scratch)):
        acts_td = read(candidates[piece], scratch[: piece.stop - piece.start])
        square_norms(acts_td.astype(np.float64), exact[piece])
    norms = np.sqrt(exact)
    first = largest_first(tokens.rows[candidates], norms)
    return candidates[first], norms[first]


def _least_of_top(squares: Float64Array) -> float:
    """Return the 64th largest value, or 0 where fewer are not negative."""
    size = len(squares) // N_TOP_ROWS
    if not size:
        return 0.0
    # The least of the maxima of 64 pieces is not above it, so few values need sorting.
    bound = squares[: size * N_TOP_ROWS].reshape(N_TOP_ROWS, size).max(axis=1).min()
    return max(0.0, float(np.sort(squares[squares >= bound])[-N_TOP_ROWS]))
