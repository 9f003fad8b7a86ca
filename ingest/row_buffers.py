"""Where do the rows of the next unit go? Into the memory of the last one's."""

from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[Any]


class Buffers:
    """Memory of rows that were written, for the rows of the next unit: fresh pages from the kernel cost as much as hashing.

    Holds what the units in flight held and no more.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Rows]] = {}

    def take(self, n_rows: int, most_rows: int, width: int, dtype: np.dtype[Any]) -> Rows:
        """Return an array `(n_rows, width)` that holds anything; `most_rows` is what any unit may need."""
        nbytes = most_rows * width * dtype.itemsize
        try:
            raw = self._free.get(
                nbytes, []
            ).pop()  # a list's own operations are atomic: two threads may do this at once
        except IndexError:
            raw = np.empty(nbytes, np.uint8)
        return raw[: n_rows * width * dtype.itemsize].view(dtype).reshape(n_rows, width)

    def give(self, rows: Rows) -> None:
        """Take back an array that `take` gave and nothing refers to any more."""
        raw = rows
        while isinstance(raw.base, np.ndarray):
            raw = raw.base
        self._free.setdefault(raw.nbytes, []).append(raw)
