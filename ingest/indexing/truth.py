"""Which vectors are truly nearest to some queries? Brute force over vectors that stream past once.

Every query is compared with every vector by one float32 product, and those that may be among its best again in float64: the
answer is that of sorting all vectors by float64 score, equal ones by row. Several answers are found in one pass, each among
the vectors that a filter lets through. Memory: the answers, twice, and a block's scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Float32s: TypeAlias = npt.NDArray[np.float32]
Float64s: TypeAlias = npt.NDArray[np.float64]
Int64s: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

_NO_ROW = np.iinfo(np.int64).max
_UNIT_ROUNDOFF = 2.0**-24
_TINY = 2.0**-100
"""Above what terms that underflow may lose."""

_BLOCK_SCORES = 1 << 23
"""Scores of a block: 32 MiB."""

_PAIRS = 1 << 13
"""Pairs of a query and a vector that are compared in float64 at once."""


class Truth:
    """The best `k` of the vectors offered so far that pass a filter, for each of the first `n_queries` queries."""

    def __init__(self, n_queries: int, k: int, *, share: float) -> None:
        """Begin with no vectors.

        Args:
            n_queries: Of the queries, in their order.
            k: Vectors to find.
            share: Name of its filter.
        """
        self.n_queries = n_queries
        self.k = k
        self.share = share
        self.scores: Float64s = np.full((n_queries, k), -np.inf)
        """Best first; `-inf` where there are no more. Shape (q, k)."""
        self.rows: Int64s = np.full((n_queries, k), _NO_ROW, np.int64)
        """Their rows."""
        self._pending: list[tuple[Int64s, Float64s, Int64s]] = []
        self._n_pending = 0

    @property
    def floor(self) -> Float64s:
        """Below which a vector cannot enter, shape (q, 1)."""
        return self.scores[:, -1:]

    def offer(self, queries: Int64s, scores: Float64s, rows: Int64s) -> None:
        """Take vectors, each for one query."""
        self._pending.append((queries, scores, rows))
        self._n_pending += len(queries)
        if self._n_pending > self.scores.size:
            self.settle()

    def settle(self) -> None:
        """Enter what was offered."""
        if not self._n_pending:
            return
        queries = np.concatenate(
            [np.repeat(np.arange(self.n_queries), self.k), *(p[0] for p in self._pending)]
        )
        scores = np.concatenate([self.scores.ravel(), *(p[1] for p in self._pending)])
        rows = np.concatenate([self.rows.ravel(), *(p[2] for p in self._pending)])
        order = np.lexsort((rows, -scores, queries))
        # Every query has at least k entries, those of no row included.
        starts = np.searchsorted(queries[order], np.arange(self.n_queries))
        first = order[(starts[:, None] + np.arange(self.k)).ravel()]
        self.scores = scores[first].reshape(self.n_queries, self.k)
        self.rows = rows[first].reshape(self.n_queries, self.k)
        self._pending, self._n_pending = [], 0

    def exists(self) -> Bools:
        """Return where there is a vector, shape (q, k)."""
        exists: Bools = self.rows != _NO_ROW
        return exists

    def n_found(self, k: int) -> Int64s:
        """Return how many of the best `k` there are for each query, shape (q,)."""
        n: Int64s = self.exists()[:, :k].sum(axis=1)
        return n


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """How queries are compared with vectors."""

    queries_qd: Float32s
    """Prepared as the vectors are."""
    own_rows: Int64s
    """The row that each query is, which does not answer it; shape (q,)."""
    is_l2: bool

    def offer(
        self, rows: Int64s, vectors_td: Float32s, truths: Sequence[Truth], passing: Sequence[Bools]
    ) -> None:
        """Compare a block of vectors with all queries, and offer each truth those that pass its filter.

        Args:
            rows: Their row numbers, shape (t,).
            vectors_td: Prepared and finite.
            truths: What to find.
            passing: For each truth which vectors count, shape (t,).
        """
        step = max(1, _BLOCK_SCORES // max(1, len(self.queries_qd)))
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            self._offer(rows[block], vectors_td[block], truths, [mask[block] for mask in passing])

    def _offer(
        self, rows: Int64s, vectors_td: Float32s, truths: Sequence[Truth], passing: Sequence[Bools]
    ) -> None:
        queries = self.queries_qd
        with np.errstate(all="ignore"):
            lengths_t = _lengths(vectors_td)
            lengths_q = _lengths(queries)
            upper_qt = queries @ vectors_td.T
            if self.is_l2:
                upper_qt *= 2
                upper_qt -= (lengths_t**2).astype(np.float32)
                upper_qt -= (lengths_q**2).astype(np.float32)[:, None]
            # A float32 sum of d terms in any order is within d u |x||w| of the true one (Higham, section 3.1), and what is
            # added here within as much; doubled for the rounding of the lengths.
            slack = 2 * (vectors_td.shape[1] + 8) * _UNIT_ROUNDOFF
            longest = float(lengths_t.max(initial=0.0))
            slack_q = (
                slack * (lengths_q * longest + ((lengths_q + longest) ** 2 if self.is_l2 else 0.0)) + _TINY
            )
            known = np.isfinite(upper_qt)
            if not known.all():
                upper_qt[~known] = np.nan  # what float32 cannot hold must be looked at
        for truth, mask in zip(truths, passing, strict=True):
            columns = np.flatnonzero(mask)
            if not len(columns):
                continue
            some = upper_qt[: truth.n_queries]
            some = some if len(columns) == len(mask) else some[:, columns]
            with np.errstate(all="ignore"):
                least = (truth.floor[:, 0] - slack_q[: truth.n_queries]).astype(np.float32)
            # `not below`: NaN counts as above.
            query_of, place = np.nonzero(~(some < least[:, None]))
            found = columns[place]
            other = rows[found] != self.own_rows[query_of]
            query_of, found = query_of[other], found[other]
            query_of, found = _best_of_block(query_of, found, some, place[other], truth.k, slack_q)
            if len(query_of):
                truth.offer(query_of, self.exact(query_of, vectors_td, found), rows[found])

    def exact(self, query_of: Int64s, vectors_td: Float32s, found: Int64s) -> Float64s:
        """Return the float64 scores of pairs of a query and a vector; equal vectors have equal ones."""
        scores = np.empty(len(query_of))
        for start in range(0, len(query_of), _PAIRS):
            some = slice(start, start + _PAIRS)
            queries = self.queries_qd[query_of[some]].astype(np.float64)
            vectors = vectors_td[found[some]].astype(np.float64)
            with np.errstate(all="ignore"):
                if self.is_l2:
                    queries -= vectors
                    scores[some] = -(queries * queries).sum(axis=1)
                else:
                    scores[some] = (queries * vectors).sum(axis=1)
        return np.where(np.isnan(scores), -np.inf, scores)


def _best_of_block(
    query_of: Int64s, found: Int64s, scores_qt: Float32s, place: Int64s, k: int, slack_q: Float64s
) -> tuple[Int64s, Int64s]:
    """Return the pairs that may be among the best `k` of their query in this block: the first block lets all through."""
    if len(query_of) <= 4 * k * max(1, len(scores_qt)):
        return query_of, found
    width = scores_qt.shape[1]
    if width <= k:
        return query_of, found
    known = np.where(np.isnan(scores_qt), -np.inf, scores_qt)
    # The query itself may be one of the k.
    limit = np.partition(known, width - k - 1, axis=1)[:, width - k - 1].astype(np.float64)
    with np.errstate(invalid="ignore"):
        limit -= 2 * slack_q[: len(scores_qt)]
    keep = ~(scores_qt[query_of, place].astype(np.float64) < limit[query_of])
    return query_of[keep], found[keep]


def _lengths(rows_td: Float32s) -> Float64s:
    wide: Float64s = np.sqrt(np.einsum("td,td->t", rows_td, rows_td, dtype=np.float64))
    return wide


def hash_rows(rows_td: Float32s) -> npt.NDArray[np.uint64]:
    """Return a number of 64 bits for each row, the same for equal rows and hardly ever for others; shape (t,)."""
    bits = np.ascontiguousarray(rows_td + np.float32(0)).view(np.uint32)
    odd = np.random.Philox(12345).random_raw(bits.shape[1]) | np.uint64(1)
    total = np.zeros(len(bits), np.uint64)
    for start in range(0, len(bits), 1024):
        block = bits[start : start + 1024].astype(np.uint64)
        # Mixed before they are added, or rows of the same numbers in other places would meet more often.
        block = (block + np.uint64(0x9E3779B97F4A7C15)) * odd
        block ^= block >> np.uint64(29)
        total[start : start + 1024] = (block * (odd << np.uint64(1) | np.uint64(1))).sum(
            axis=1, dtype=np.uint64
        )
    return total
