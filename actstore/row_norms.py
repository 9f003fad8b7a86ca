"""How long is each row? L2 norms that are right for tiny, huge and damaged rows too."""

import numpy as np
import numpy.typing as npt

_TRUSTED_SQUARE = 2.0**-90
"""Float32 sums of squares below this may have lost small terms to underflow."""


def row_norms(
    rows_td: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return the L2 norm of every row (NaN or infinite for one that is not finite), and which rows are finite.

    Args:
        rows_td: Shape (t, d).
    """
    with np.errstate(all="ignore"):
        squares = np.einsum("td,td->t", rows_td, rows_td).astype(np.float64)
        doubtful = np.flatnonzero(~((squares > _TRUSTED_SQUARE) & (squares < np.inf)))
        finite = np.ones(len(rows_td), dtype=np.bool_)
        for start in range(0, len(doubtful), 1024):
            some = doubtful[start : start + 1024]
            wide = rows_td[some].astype(np.float64)
            squares[some] = (wide * wide).sum(axis=1)
            finite[some] = np.isfinite(wide).all(axis=1)
        return np.sqrt(squares), finite
