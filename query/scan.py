"""Which k rows of a run score best? One pass over the stored activations of a hook point, whatever the number of queries.

Units without an eligible row are not read; units with few are read by row. What is held at a time is one unit's token table
and a few blocks of activations, so memory does not grow with the run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from actstore.activations import Activations
from actstore.errors import ErrorKind, InvalidInputError
from actstore.row_norms import row_norms

from .eligible import Bools, Eligibility, Int64s, Removed, UnitRows
from .fold import Fold, fold_keys
from .scores import Float32s, Float64s, Scorer
from .top_k import TopK, offer_block

MAX_K = 10_000
"""Most answers to one query: beyond it, a scan that streams its rows is the better tool."""

_MAX_BLOCK_ROWS = 8192
"""Rows per matrix product: longer ones are no faster."""

_SPARSE_SHARE = 1 / 256
"""Share of a unit's rows below which they are read one by one: a chunk holds a few hundred rows."""


@dataclass(slots=True)
class ScanReport:
    """What a pass over one hook point did."""

    removed: Removed
    norm_limit: float
    bytes_read: int = 0
    n_scored: int = 0
    """Rows scored exactly, all queries together."""

    best: list[TopK] = field(default_factory=list)


def check_k(k: int) -> int:
    """Return `k` if that many answers may be asked for.

    Raises:
        InvalidInputError: not a whole number from 1 to `MAX_K`.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= MAX_K:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"k must be a whole number from 1 to {MAX_K}, got {k!r}"
        )
    return int(k)


def plan_block_rows(d_model: int, n_queries: int, memory_bytes: int) -> int:
    """Return how many rows to score at a time so that a block and its scores take about a quarter of `memory_bytes`.

    Raises:
        InvalidInputError: not even one row fits.

    >>> plan_block_rows(768, 1, 256 << 20)
    8192
    """
    # A row: float32 values twice (read and decoded), norms, and per query a product, a bound and their copies.
    per_row = 8 * d_model + 64 + 40 * n_queries
    rows = memory_bytes // 4 // per_row
    if rows < 1:
        raise InvalidInputError(
            ErrorKind.TOO_LARGE,
            f"memory_bytes={memory_bytes} is too small for {n_queries} queries at {d_model} dimensions: "
            f"give at least {4 * per_row}",
        )
    return int(min(rows, _MAX_BLOCK_ROWS))


def scan_top_k(
    acts: Activations,
    scorer: Scorer,
    eligibility: Eligibility,
    *,
    k: int,
    fold: Fold,
    norm_limit: float,
    drop_zero_rows: bool,
    block_rows: int,
    barred: Sequence[tuple[int | None, int | None]] | None = None,
) -> ScanReport:
    """Return the best `k` keys of every query.

    Args:
        acts: The rows of a hook point.
        scorer: The queries.
        eligibility: The masks that need no activations.
        k: Answers per query.
        fold: See `actstore.query.fold`.
        norm_limit: L2 norm above which a row is left out; infinite for no limit.
        drop_zero_rows: Leave out rows of zeros, which have no direction.
        block_rows: Rows per block.
        barred: For each query a row and a document that are no answers to it; None for no such thing.
    """
    report = ScanReport(eligibility.removed, norm_limit, best=[TopK(k) for _ in range(scorer.n_queries)])
    for unit, offsets, acts_td in _blocks(acts, eligibility, block_rows, report):
        norms_t, keep = _mask_block(acts_td, unit.keep[offsets], report, drop_zero_rows=drop_zero_rows)
        report.removed.n_kept += int(keep.sum())
        if keep.any():
            _score_block(scorer, unit, offsets, acts_td, norms_t, keep, fold, barred, report)
    return report


def _blocks(
    acts: Activations, eligibility: Eligibility, block_rows: int, report: ScanReport
) -> Iterator[tuple[UnitRows, Int64s, Float32s]]:
    """Yield units, offsets into them and the activations there, in row order."""
    stored = _stored_bytes(acts)
    if not eligibility.is_selective:
        # One scan over everything reads ahead across units.
        unit = None
        for rows, acts_td in acts.scan(block_rows):
            number = int(rows[0]) // acts.rows_per_unit
            if unit is None or unit.unit != number:
                unit = eligibility.unit(number)
                report.bytes_read += unit.nbytes + stored[number]
            yield unit, rows - unit.first_row, acts_td
        return
    for unit in eligibility.units():
        report.bytes_read += unit.nbytes
        wanted = np.flatnonzero(unit.keep)
        if len(wanted) <= unit.n_stored * _SPARSE_SHARE:
            for start in range(0, len(wanted), block_rows):
                offsets = wanted[start : start + block_rows]
                report.bytes_read += offsets.size * acts.layout.spec.row_bytes
                yield unit, offsets, acts.read(unit.first_row + offsets)
        else:
            report.bytes_read += stored[unit.unit]
            for rows, acts_td in acts.scan(block_rows, units=[unit.unit]):
                yield unit, rows - unit.first_row, acts_td


def _stored_bytes(acts: Activations) -> dict[int, int]:
    return {unit.unit: sum(shard.nbytes for shard in unit.shards) for unit in acts.layout.units}


def _mask_block(
    acts_td: Float32s, keep: Bools, report: ScanReport, *, drop_zero_rows: bool
) -> tuple[Float64s, Bools]:
    norms_t, finite = row_norms(acts_td)
    removed = report.removed
    keep = removed.apply("nonfinite", keep, finite)
    if report.norm_limit < np.inf:
        keep = removed.apply("norm", keep, norms_t <= report.norm_limit)
    if drop_zero_rows:
        keep = removed.apply("zero_norm", keep, norms_t > 0)
    return norms_t, keep


def _score_block(
    scorer: Scorer,
    unit: UnitRows,
    offsets: Int64s,
    acts_td: Float32s,
    norms_t: Float64s,
    keep: Bools,
    fold: Fold,
    barred: Sequence[tuple[int | None, int | None]] | None,
    report: ScanReport,
) -> None:
    rows, doc_ids = unit.column("row"), unit.column("doc_id")
    token_ids, window_positions = unit.column("token_id"), unit.column("window_position")

    def keys(index: Int64s) -> npt.NDArray[np.generic]:
        return fold_keys(
            fold,
            offsets=offsets[index],
            rows=rows,
            doc_ids=doc_ids,
            token_ids=token_ids,
            window_positions=window_positions,
        )

    upper_tq = scorer.upper(acts_td, norms_t)
    upper_tq[~keep] = -np.inf
    upper_qt = np.ascontiguousarray(upper_tq.T)
    for query, best in enumerate(report.best):
        upper = upper_qt[query]
        if barred is not None:
            row, doc = barred[query]
            if row is not None:
                upper[rows[offsets] == row] = -np.inf
            if doc is not None:
                upper[doc_ids[offsets] == doc] = -np.inf

        def exact(index: Int64s, query: int = query) -> Float64s:
            return scorer.exact(acts_td[index], query)

        report.n_scored += offer_block(best, upper, rows[offsets], exact=exact, keys=keys)
