"""Which tokens have massive norms? A record of the largest rows and of norms by place in the model's window.

Models attend to a few tokens for lack of anything better, nearly always the first of a window, and give them activations that
are huge in a few dimensions. `RowNorms` is what is stored and merges exactly; `Sinks` is the answer read from it.

Source: Xiao et al. (2023), "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453, section 3.1 (the
first tokens); Sun et al. (2024), "Massive Activations in Large Language Models", arXiv:2402.17762, section 2 (which tokens
and how much larger).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np

from actstore.errors import ErrorKind, InvalidInputError
from actstore.stats.sketch import (
    NORM_GAMMA,
    Float64Array,
    Int32Array,
    Int64Array,
    bin_norm,
    merge_counts,
    norm_bins,
    norm_quantile,
)

SINK_NORM_RATIO: Final = 10.0
"""Times the median norm above which a row is taken for an attention sink. A massive activation is about 1,000 times its
row's median magnitude (Sun et al., section 2); in 4,096 Gaussian dimensions that is 10 times the norm of all the others."""

N_TOP_ROWS: Final = 64
"""Rows of the largest norms that are kept by number."""

LATER: Final = 8
"""Window positions from this one on are counted together: sinks are among the first few (Xiao et al. keep 4)."""

_CELL: Final = 1 << 32
"""A position and a bin number as one integer: `position * 2^32 + bin + 2^31`."""


@dataclass(frozen=True, slots=True)
class RowNorms:
    """L2 norms of finite rows by window position, and the rows of the largest; merges exactly."""

    position_rows: Int64Array
    """Rows at window position 0 to 7, and at 8 and later: shape (9,)."""

    positions: Int32Array
    """With `bins` and `counts`: how many rows at window position `positions[j]` (8 for all later ones) have a norm in bin
    `bins[j]` (`actstore.stats.sketch`). Sorted by position and bin; rows of zeros are in none."""

    bins: Int32Array
    counts: Int64Array

    top_rows: Int64Array
    """Numbers of the rows with the 64 largest norms, largest first; of equal norms those of lower numbers."""

    top_token_ids: Int32Array
    top_positions: Int32Array
    """Their window positions."""

    top_norms: Float64Array
    """Their norms, computed in float64."""

    def zeros(self, position: int) -> int:
        """Return how many rows at a window position (8 for all later ones) are all zeros."""
        return int(self.position_rows[position] - self.counts[self.positions == position].sum())


@dataclass(frozen=True, slots=True)
class SinkRow:
    """A token whose activation is massive."""

    row: int
    token_id: int
    window_position: int
    norm: float


@dataclass(frozen=True, slots=True)
class PositionNorms:
    """Norms of the rows at one place in the window."""

    position: int
    """0 to 7, or 8 for 8 and all later ones."""

    n_rows: int
    n_over: int
    """Rows whose norm is over the limit."""

    median_norm: float
    """Within 1 %; NaN without rows."""

    largest_norm: float
    """Within 1 %; NaN without rows."""


@dataclass(frozen=True, slots=True)
class Sinks:
    """Rows of a hook point whose norm is over `limit`."""

    ratio: float
    """What was asked for: times the median."""

    median_norm: float
    """Of all rows, within 1 %."""

    limit: float
    """Norms over this count: the first edge of the sketch's bins that is not below `ratio * median_norm`, so at most 2 % above
    it and from 0.99 to 1.03 times `ratio` the exact median. Infinite if the median is 0 or unknown."""

    n_rows: int
    """Finite rows."""

    n_over: int
    """Rows over `limit`, exactly but for rounding (3e-4) at the edge."""

    by_position: tuple[PositionNorms, ...] | None
    """Nine places in the window; None if the statistics were made without tokens."""

    rows: tuple[SinkRow, ...] | None
    """Those of the 64 rows of largest norm that are over `limit`, largest first; None as above."""

    largest: tuple[SinkRow, ...] | None
    """All 64, over the limit or not; None as above."""

    @property
    def share(self) -> float:
        """Share of rows over the limit; 0 without rows."""
        return self.n_over / self.n_rows if self.n_rows else 0.0

    @property
    def token_ids(self) -> dict[int, int]:
        """How often which `token_id` is among `rows`, most frequent first; empty if they are unknown."""
        return dict(Counter(row.token_id for row in self.rows or ()).most_common())


def empty_row_norms() -> RowNorms:
    """Return the record of no rows."""
    no32, no64 = np.zeros(0, np.int32), np.zeros(0, np.int64)
    return RowNorms(np.zeros(LATER + 1, np.int64), no32, no32, no64, no64, no32, no32, np.zeros(0))


def merge_row_norms(a: RowNorms, b: RowNorms) -> RowNorms:
    """Return the record of both sets of rows, which share none; exact."""
    cells, counts = merge_counts([_cells(a), _cells(b)], [a.counts, b.counts])
    rows = np.concatenate([a.top_rows, b.top_rows])
    norms = np.concatenate([a.top_norms, b.top_norms])
    first = largest_first(rows, norms)
    return RowNorms(
        a.position_rows + b.position_rows,
        (cells // _CELL).astype(np.int32),
        (cells % _CELL - _CELL // 2).astype(np.int32),
        counts,
        rows[first],
        np.concatenate([a.top_token_ids, b.top_token_ids])[first],
        np.concatenate([a.top_positions, b.top_positions])[first],
        norms[first],
    )


def largest_first(rows: Int64Array, norms: Float64Array) -> Int64Array:
    """Return where the 64 largest norms are, largest first, and of equal ones the lowest row first."""
    order: Int64Array = np.lexsort((rows, -norms))[:N_TOP_ROWS]
    return order


def find_sinks(
    bins: Int32Array, counts: Int64Array, zeros: int, record: RowNorms | None, *, ratio: float
) -> Sinks:
    """Return the rows whose norm is over `ratio` times the median.

    Args:
        bins: Bin numbers of all rows' norms, ascending.
        counts: Rows in each.
        zeros: Rows of zeros.
        record: Norms by position, and the largest; None if unknown.
        ratio: Times the median.

    Raises:
        InvalidInputError: `ratio` is not positive.
    """
    if not ratio > 0:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"sinks are over a positive number of times the median, got ratio={ratio!r}",
        )
    median = norm_quantile(bins, counts, zeros, 0.5)
    last, limit = None, float("inf")
    if median > 0:
        last = int(norm_bins(np.full(1, ratio * median))[0])
        limit = float(NORM_GAMMA ** float(last))
    largest = None if record is None else _rows_of(record)
    return Sinks(
        ratio=ratio,
        median_norm=median,
        limit=limit,
        n_rows=zeros + int(counts.sum()),
        n_over=_over(bins, counts, last),
        by_position=None if record is None else tuple(_at(record, p, last) for p in range(LATER + 1)),
        rows=None if largest is None else tuple(r for r in largest if r.norm > limit),
        largest=largest,
    )


def _cells(record: RowNorms) -> Int64Array:
    cells: Int64Array = record.positions.astype(np.int64) * _CELL + record.bins + _CELL // 2
    return cells


def _rows_of(record: RowNorms) -> tuple[SinkRow, ...]:
    columns = (record.top_rows, record.top_token_ids, record.top_positions, record.top_norms)
    return tuple(SinkRow(*values) for values in zip(*(c.tolist() for c in columns), strict=True))


def _over(bins: Int32Array, counts: Int64Array, last: int | None) -> int:
    return 0 if last is None else int(counts[bins > last].sum())


def _at(record: RowNorms, position: int, last: int | None) -> PositionNorms:
    here = record.positions == position
    bins, counts, zeros = record.bins[here], record.counts[here], record.zeros(position)
    largest = bin_norm(int(bins[-1])) if len(bins) else 0.0 if zeros else float("nan")
    return PositionNorms(
        position=position,
        n_rows=int(record.position_rows[position]),
        n_over=_over(bins, counts, last),
        median_norm=norm_quantile(bins, counts, zeros, 0.5),
        largest_norm=largest,
    )
