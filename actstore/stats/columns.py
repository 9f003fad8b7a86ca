"""What do blocks of finite rows add up to, dimension by dimension?

Rows are taken as float64 a block at a time, in memory that is used again. A block's size is a compromise: smaller ones stay
nearer to the processor and cost more calls; 2 MiB of float64 was best for widths of 256 to 4,096. numpy adds up long
rows faster than short ones, so several rows are seen as one, and the sums are folded when they are asked for.

Source: Chan, Golub, LeVeque (1983), "Algorithms for computing the sample variance", sections 1 and 2 (what cancels in a one-pass
variance, and why a shift near the mean cures it).
"""

import math
import threading
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore.stats.outliers import OUTLIER_MAGNITUDE
from actstore.stats.sketch import Float64Array, Int64Array

FloatArray = npt.NDArray[np.float32]

BLOCK_VALUES: Final = 1 << 18
"""Values of a block."""

_WIDE: Final = 2048
"""Narrower rows are seen as one of at most this many values."""

_MOST_ROWS: Final = 255
"""Rows, or several seen as one, of a block: so many can be counted in a byte."""

_CANCELLED: Final = 64.0
"""A sum of squares over so many times the sum of squared deviations loses 6 of float64's 53 bits: the dimension's mean is 8
standard deviations from 0 or more, and its deviations are summed again around the mean."""

_SELDOM: Final = 8
"""Where fewer than one dimension in so many reaches the outliers' magnitude, looking at those alone is faster."""


def rows_per_block(d_model: int) -> int:
    """Return how many rows a block has."""
    fold = _fold(d_model)
    return min(max(1, BLOCK_VALUES // (d_model * fold)), _MOST_ROWS) * fold


def _fold(d_model: int) -> int:
    return max(1, _WIDE // d_model)


class _Memory(threading.local):
    """Arrays that a thread uses again: fresh memory costs a page fault for every 4 KiB, up to a tenth of the whole time."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def take(self, name: str, dtype: type[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return an array of this name, whatever it holds; larger than most blocks are only for those who ask."""
        size = math.prod(shape)
        if size > BLOCK_VALUES:
            return np.empty(shape, dtype)
        if name not in self._arrays:
            self._arrays[name] = np.empty(BLOCK_VALUES, dtype)
        return self._arrays[name][:size].reshape(shape)


_memory = _Memory()


class Columns:
    """Sums over rows, for every dimension."""

    def __init__(self, d_model: int) -> None:
        """Start from nothing; takes this thread's memory for one block, 12 bytes for each of its values."""
        self._fold = _fold(d_model)
        width = self._fold * d_model
        block = (rows_per_block(d_model), d_model)
        self.scratch: FloatArray = _memory.take("scratch", np.float32, block)
        """Room for a block, for the caller to fill."""
        self._wide: Float64Array = _memory.take("wide", np.float64, block)
        self._n_rows = 0
        self._total: Float64Array = np.zeros(width)
        self._squares: Float64Array = np.zeros(width)
        self._low: FloatArray = np.full(width, np.inf, np.float32)
        self._high: FloatArray = np.full(width, -np.inf, np.float32)
        self._loud: Int64Array = np.zeros(width, np.int64)

    @property
    def low(self) -> FloatArray:
        """Least values; infinite without rows."""
        low: FloatArray = self._folded(self._low).min(axis=0)
        return low

    @property
    def high(self) -> FloatArray:
        """Largest values; minus infinite without rows."""
        high: FloatArray = self._folded(self._high).max(axis=0)
        return high

    @property
    def loud(self) -> Int64Array:
        """How many rows reach the outliers' magnitude."""
        loud: Int64Array = self._folded(self._loud).sum(axis=0)
        return loud

    def whole_numbers(self, size: int) -> npt.NDArray[np.intp]:
        """Return an array of `size`, at most a block's values, that holds anything and is good until the next call of `add`."""
        numbers: npt.NDArray[np.intp] = self._wide.view(np.intp).reshape(-1)[:size]
        return numbers

    def add(self, acts_td: FloatArray) -> None:
        """Count finite rows: C-contiguous, at most `rows_per_block` of them."""
        n_whole = len(acts_td) // self._fold * self._fold
        if n_whole:
            self._add(acts_td[:n_whole].reshape(-1, len(self._total)))
        if n_whole < len(acts_td):
            self._add(acts_td[n_whole:])
        self._n_rows += len(acts_td)

    def take_moments(self) -> tuple[int, Float64Array, Float64Array, npt.NDArray[np.bool_]]:
        """Return rows, means and sums of squared deviations since the last call, and in which dimensions the latter cancelled."""
        n, self._n_rows = self._n_rows, 0
        total, squares = self._folded(self._total).sum(axis=0), self._folded(self._squares).sum(axis=0)
        self._total[:], self._squares[:] = 0, 0
        mean = total / max(n, 1)
        m2 = squares - total * mean
        return n, mean, m2, squares > _CANCELLED * m2

    def _add(self, rows: FloatArray) -> None:
        """Count rows, or several seen as one; what is narrower than the sums belongs to their first columns."""
        columns = slice(0, rows.shape[1])
        low, high = np.minimum.reduce(rows, axis=0), np.maximum.reduce(rows, axis=0)
        np.minimum(self._low[columns], low, out=self._low[columns])
        np.maximum(self._high[columns], high, out=self._high[columns])
        wide = self._wide.reshape(-1)[: rows.size].reshape(rows.shape)
        np.copyto(wide, rows)
        self._total[columns] += np.add.reduce(wide, axis=0)
        self._squares[columns] += np.einsum("td,td->d", wide, wide)
        (loud,) = np.nonzero((high >= OUTLIER_MAGNITUDE) | (low <= -OUTLIER_MAGNITUDE))
        if len(loud):
            self._count_loud(rows, loud)

    def _count_loud(self, rows: FloatArray, columns: Int64Array) -> None:
        if len(columns) * _SELDOM < rows.shape[1]:
            self._loud[columns] += np.count_nonzero(np.abs(rows[:, columns]) >= OUTLIER_MAGNITUDE, axis=0)
            return
        # The block's float64 numbers are not needed any more.
        memory = self._wide.reshape(-1).view(np.uint8)
        magnitude = memory[: 4 * rows.size].view(np.float32).reshape(rows.shape)
        is_loud = memory[4 * rows.size : 5 * rows.size].view(np.bool_).reshape(rows.shape)
        np.abs(rows, out=magnitude)
        np.greater_equal(magnitude, OUTLIER_MAGNITUDE, out=is_loud)
        # Bytes add up faster than wider numbers.
        dtype: type[Any] = np.uint8 if len(rows) <= _MOST_ROWS else np.int64
        self._loud[: rows.shape[1]] += np.add.reduce(is_loud.view(np.uint8), axis=0, dtype=dtype)

    def _folded(self, sums: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return sums.reshape(self._fold, -1)


def sum_deviations(
    acts_td: FloatArray, dims: Int64Array | slice, center_d: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Return the sums over rows of deviations from `center_d` and of their squares, for some dimensions."""
    wide = acts_td[:, dims].astype(np.float64)
    wide -= center_d
    return wide.sum(axis=0), np.einsum("td,td->d", wide, wide)
