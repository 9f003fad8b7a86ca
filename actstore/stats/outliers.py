"""Which dimensions of a hook point are unlike the others?

Source: Dettmers et al. (2022), "LLM.int8()", arXiv:2208.07339, section 4.1 (magnitude at least 6 in at least 6 % of the
sequence); Sun et al. (2024), "Massive Activations in Large Language Models", arXiv:2402.17762, section 2 (over 100, and
about 1,000 times the median magnitude).
"""

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

if TYPE_CHECKING:
    from actstore.stats.values import HookPointStats

Int64Array = npt.NDArray[np.int64]

OUTLIER_MAGNITUDE: Final = 6.0
"""Values from this magnitude on are counted by dimension (Dettmers et al., section 4.1)."""

OUTLIER_SHARE: Final = 0.06
"""Share of rows in which a dimension must reach it (ibid.; that it does so in a quarter of the layers is left to the reader)."""

MASSIVE_MAGNITUDE: Final = 100.0
MASSIVE_TIMES: Final = 1000.0
"""A massive activation is over the one and over the other times the median magnitude (Sun et al., section 2)."""

ROBUST_TIMES: Final = 10.0
"""Normally distributed means are 10 times the median of their magnitudes once in 10^11 dimensions."""


def outlier_dims(stats: "HookPointStats", criterion: str, *, share: float, times: float) -> Int64Array | None:
    """Return the dimensions that meet `criterion`; see `HookPointStats.outlier_dims`."""
    if not stats.n_finite_rows:
        return np.zeros(0, np.int64)
    if criterion == "magnitude":
        if not 0 <= share <= 1:
            raise InvalidInputError(ErrorKind.BAD_ARGUMENT, f"a share of rows is from 0 to 1, got {share!r}")
        counts = stats.outlier_counts
        return None if counts is None else np.flatnonzero(counts >= max(1.0, share * stats.n_finite_rows))
    if criterion == "massive":
        if stats.value_sketch is None or not stats.value_sketch.n_rows:
            return None
        median = stats.value_sketch.magnitude_quantile(0.5)
        largest = np.maximum(np.abs(stats.min), np.abs(stats.max)).astype(np.float64)
        return np.flatnonzero((largest > MASSIVE_MAGNITUDE) & (largest > MASSIVE_TIMES * median))
    if criterion == "robust":
        return np.flatnonzero(_far(np.abs(stats.mean), times) | _far(stats.std, times))
    raise InvalidInputError(
        ErrorKind.BAD_ARGUMENT,
        f"dimensions are found by 'magnitude', 'massive' or 'robust', got the criterion {criterion!r}",
    )


def _far(values: npt.NDArray[np.float64], times: float) -> npt.NDArray[np.bool_]:
    median = np.median(values)
    far: npt.NDArray[np.bool_] = (values > times * median) & (median > 0)
    return far
