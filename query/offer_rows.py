"""How do rows that are given by number enter the best of some queries? They are read, scored exactly, and folded.

A scan offers every row in turn; whoever has candidates of an index, or the few rows that a filter leaves, offers those. Scores,
keys and ties are a scan's, so the answers are too.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.activations import Activations
from actstore.row_norms import row_norms
from actstore.run import Run

from .answer import RowOptions
from .eligible import Masks
from .row_mask import RowMask
from .scan import ScanReport, plan_block_rows
from .scores import Float32s, Float64s, Scorer
from .top_k import offer_block

Bools: TypeAlias = npt.NDArray[np.bool_]
Int64s: TypeAlias = npt.NDArray[np.int64]

_DENSE = 8
"""Rows of which at least one in so many of their units is wanted are read by a scan of the units: scattered rows take up to so
many times as long each."""


class RowOffers:
    """Offers rows of a hook point to the best of every query; counts in the report what it reads and scores."""

    def __init__(
        self, run: Run, acts: Activations, scorer: Scorer, options: RowOptions, report: ScanReport
    ) -> None:
        """Take the rows, the queries, the way to fold, and where answers go.

        Raises:
            InvalidInputError: `options.memory_bytes` has no room for a row.
        """
        self._acts = acts
        self._scorer = scorer
        self._fold = options.fold
        self._report = report
        self._block_rows = plan_block_rows(acts.shape[1], scorer.n_queries, options.memory_bytes)
        nothing = Masks(None, None, None, special=False, sinks=False)
        self._mask = RowMask(run, nothing, sinks=None, norms=_no_norms, memory_bytes=options.memory_bytes)

    def candidates(self, queries: Sequence[int], rows_qm: Int64s) -> Float64s:
        """Offer every query its own rows, and return the worst of their exact scores; infinite for a query without any.

        Args:
            queries: Numbers of q queries.
            rows_qm: Rows that may be answers, -1 for none, shape (q, m).
        """
        rows, places = np.unique(rows_qm, return_inverse=True)
        places = places.reshape(rows_qm.shape)
        worst_q = np.full(len(queries), np.inf)
        first = int(np.searchsorted(rows, 0))
        for start in range(first, len(rows), self._block_rows):
            some = rows[start : start + self._block_rows]
            acts_td, keys = self._acts.read(some), self._keys(some)
            for i, query in enumerate(queries):
                own = places[i] - start
                own = own[(own >= 0) & (own < len(some))]
                scores = self._scorer.exact(acts_td[own], query)
                is_answer = scores > -np.inf
                if is_answer.any():
                    own, scores = own[is_answer], scores[is_answer]
                    worst_q[i] = min(worst_q[i], scores.min())
                    self._report.best[query].offer(scores, some[own], keys[own])
        self._report.n_scored += int((rows_qm >= 0).sum())
        self._report.bytes_read += (len(rows) - first) * self._acts.layout.spec.row_bytes
        return worst_q

    def all_of(self, queries: Sequence[int], rows: Int64s) -> None:
        """Offer all of some rows, ascending, to every query."""
        for some, acts_td, wanted in self._blocks(rows):
            self.at_hand(queries, some, acts_td, wanted)

    def at_hand(self, queries: Sequence[int], rows: Int64s, acts_td: Float32s, wanted: Bools) -> None:
        """Offer those of some rows that are wanted, whose activations have been read, to every query."""
        upper_qt = np.ascontiguousarray(self._scorer.upper(acts_td, row_norms(acts_td)[0]).T)
        upper_qt[:, ~wanted] = -np.inf
        for query in queries:

            def exact(at: Int64s, query: int = query) -> Float64s:
                return self._scorer.exact(acts_td[at], query)

            best = self._report.best[query]
            self._report.n_scored += offer_block(
                best, upper_qt[query], rows, exact=exact, keys=lambda at: self._keys(rows[at])
            )

    def _blocks(self, rows: Int64s) -> Iterator[tuple[Int64s, Float32s, Bools]]:
        """Yield row numbers, their activations, and which of them are wanted."""
        acts = self._acts
        units = np.unique(rows // acts.rows_per_unit).tolist()
        n_rows = {unit.unit: unit.n_rows for unit in acts.layout.units}
        if len(rows) * _DENSE < sum(n_rows[unit] for unit in units):
            for start in range(0, len(rows), self._block_rows):
                some = rows[start : start + self._block_rows]
                self._report.bytes_read += len(some) * acts.layout.spec.row_bytes
                yield some, acts.read(some), np.ones(len(some), np.bool_)
            return
        for some, acts_td in acts.scan(self._block_rows, units=units):
            self._report.bytes_read += len(some) * acts.layout.spec.row_bytes
            yield some, acts_td, np.isin(some, rows, assume_unique=True)

    def _keys(self, rows: Int64s) -> npt.NDArray[Any]:
        return self._mask.fold_keys(self._fold, rows)


def _no_norms(rows: Int64s) -> Float64s:  # noqa: ARG001 - as the mask would call it
    raise AssertionError("no mask is in force")
