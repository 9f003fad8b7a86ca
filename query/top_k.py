"""Which k keys have the best scores, when rows stream past once and several rows may share a key?

Rows that share a key (the same context, the same document) are folded into the best of them. The answer is that of sorting
all rows by falling score, then rising row number, keeping the first row of each key, and taking k: exactly, in memory that
grows with k alone. That works because the k-th best key's score only rises: a row below it can never be in the answer, and a
key that was pushed out comes back only with a better row, which is then its best.
"""

import heapq
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Float64s: TypeAlias = npt.NDArray[np.float64]
Int64s: TypeAlias = npt.NDArray[np.int64]
Keys: TypeAlias = npt.NDArray[Any]

_FIRST_CHUNK = 256
_LAST_CHUNK = 65_536


class TopK:
    """The best `k` keys of the rows offered so far.

    >>> best = TopK(2)
    >>> best.offer(np.array([1.0, 3.0, 2.0]), np.array([10, 11, 12]), np.array([7, 8, 8]))
    >>> best.ranked()
    [(3.0, 11), (1.0, 10)]
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._best: dict[Any, tuple[float, int]] = {}
        # Worst entry first; entries that were replaced or pushed out stay until they come up.
        self._heap: list[tuple[float, int, Any]] = []

    @property
    def threshold(self) -> float:
        """The score below which a row cannot enter; equal to it, a row enters only with a lower row number."""
        return -np.inf if len(self._best) < self.k else self._worst()[0]

    def offer(self, scores: Float64s, rows: Int64s, keys: Keys) -> None:
        """Take rows with their exact scores (finite) and keys, all of shape (n,)."""
        order = np.lexsort((rows, -scores))
        _, first = np.unique(keys[order], return_index=True)
        for i in order[np.sort(first)].tolist():
            if not self._offer_one(float(scores[i]), int(rows[i]), keys[i].tobytes()):
                break  # the rest are worse still

    def ranked(self) -> list[tuple[float, int]]:
        """Return (score, row), best first; fewer than k when there were fewer keys."""
        return sorted(self._best.values(), key=lambda entry: (-entry[0], entry[1]))

    def _offer_one(self, score: float, row: int, key: Any) -> bool:
        """Take one row; return False when it is below the threshold, and so is every worse one."""
        known = self._best.get(key)
        if known is not None:
            if (score, -row) > (known[0], -known[1]):
                self._put(score, row, key)
            return True
        if len(self._best) >= self.k:
            worst = self._worst()
            if (score, -row) <= worst[:2]:
                return False
            heapq.heappop(self._heap)
            del self._best[worst[2]]
        self._put(score, row, key)
        return True

    def _put(self, score: float, row: int, key: Any) -> None:
        self._best[key] = (score, row)
        heapq.heappush(self._heap, (score, -row, key))
        if len(self._heap) > 4 * self.k + 64:
            self._heap = [(s, -r, known) for known, (s, r) in self._best.items()]
            heapq.heapify(self._heap)

    def _worst(self) -> tuple[float, int, Any]:
        while True:
            score, minus_row, key = self._heap[0]
            if self._best.get(key) == (score, -minus_row):
                return self._heap[0]
            heapq.heappop(self._heap)


def offer_block(
    best: TopK,
    upper: Float64s,
    rows: Int64s,
    *,
    exact: Callable[[Int64s], Float64s],
    keys: Callable[[Int64s], Keys],
) -> int:
    """Offer a block of rows of which only upper bounds are known, and return how many had to be scored exactly.

    Args:
        best: Where they go.
        upper: Shape (n,). No row's exact score is above it; `-inf` leaves the row out.
        rows: Row numbers, shape (n,).
        exact: Exact scores of rows given by index into the block; NaN or -inf leaves the row out.
        keys: Keys of rows given by index into the block.
    """
    alive = np.flatnonzero((upper >= best.threshold) & (upper > -np.inf))
    alive = alive[np.argsort(-upper[alive], kind="stable")]
    start, size, scored = 0, _FIRST_CHUNK, 0
    while start < len(alive) and upper[alive[start]] >= best.threshold:
        chunk = alive[start : start + size]
        chunk = chunk[upper[chunk] >= best.threshold]
        scores = exact(chunk)
        scored += len(chunk)
        good = np.flatnonzero((scores > -np.inf) & (scores >= best.threshold))
        if good.size:
            best.offer(scores[good], rows[chunk[good]], keys(chunk[good]))
        start, size = start + size, min(size * 4, _LAST_CHUNK)
    return scored
