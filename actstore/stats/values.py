"""What is known of one hook point's rows, and how are two such records made one?

Source: Chan, Golub, LeVeque (1983), "Algorithms for computing the sample variance", eq. 2.1 (merging).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from actstore.int8 import Int8Error
from actstore.stats import outliers
from actstore.stats.sinks import (
    SINK_NORM_RATIO,
    RowNorms,
    Sinks,
    empty_row_norms,
    find_sinks,
    merge_row_norms,
)
from actstore.stats.sketch import (
    Float64Array,
    Int64Array,
    ValueSketch,
    empty_value_sketch,
    merge_counts,
    merge_value_sketches,
    norm_quantile,
)


@dataclass(frozen=True, slots=True)
class HookPointStats:
    """Statistics of one hook point over the rows seen; vectors have shape (d_model,).

    What statistics of an earlier version lack is None, and so is what they are merged with.
    """

    hook_point: str
    n_rows: int
    """Rows seen."""
    n_finite_rows: int
    """Rows without NaN or infinity: only these enter everything below."""
    nonfinite: int
    """NaN or infinite values among all rows."""
    mean: Float64Array
    m2: Float64Array
    """Sum over rows of squared deviations from the mean."""
    min: npt.NDArray[np.float32]
    max: npt.NDArray[np.float32]
    zero_norms: int
    """Rows that are all zeros."""
    norm_bins: npt.NDArray[np.int32]
    """Sorted bin numbers i: L2 norms in (gamma^(i-1), gamma^i]."""
    norm_counts: npt.NDArray[np.int64]
    outlier_counts: Int64Array | None = None
    """Rows whose value in a dimension has a magnitude of at least `OUTLIER_MAGNITUDE`, 6."""
    value_sketch: ValueSketch | None = None
    """Values of one row in 16, all dimensions together; see `value_quantile`."""
    row_norms: RowNorms | None = None
    """Norms by window position and the largest rows; None also if rows were counted without their tokens."""
    int8_error: Int8Error | None = None
    """How far stored int8 rows are from what was computed; None if rows are not int8."""

    @property
    def variance(self) -> Float64Array:
        """Population variance per dimension (divided by `n_finite_rows`); NaN without rows."""
        return self.m2 / self.n_finite_rows if self.n_finite_rows else np.full_like(self.m2, np.nan)

    @property
    def std(self) -> Float64Array:
        """Population standard deviation per dimension."""
        return np.sqrt(self.variance)

    @property
    def second_moment(self) -> Float64Array:
        """Mean of the squares per dimension."""
        return self.variance + self.mean**2

    def norm_quantile(self, q: float) -> float:
        """Return the `q` quantile (0 to 1) of the rows' L2 norms, within 1 % of the lower-rank exact one; NaN without rows.

        Norms are counted in float32, which adds at most 0.025 %.

        Raises:
            InvalidInputError: `q` is not from 0 to 1.
        """
        return norm_quantile(self.norm_bins, self.norm_counts, self.zero_norms, q)

    def value_quantile(self, q: float) -> float | None:
        """Return the `q` quantile (0 to 1) of the values of one row in 16, all dimensions together; None if unknown.

        The rows are chosen by a hash of their number (`actstore.stats.sketch`). Of their values the answer is within 0.78 % of
        the lower-rank exact quantile; NaN if none of the rows was chosen. `min` and `max` are of all rows, and exact.

        Raises:
            InvalidInputError: `q` is not from 0 to 1.
        """
        if self.value_sketch is None:
            return None
        value = self.value_sketch.quantile(q)
        return float(np.clip(value, self.min.min(initial=np.inf), self.max.max(initial=-np.inf)))

    def sinks(self, ratio: float = SINK_NORM_RATIO) -> Sinks:
        """Return which rows have a norm over `ratio` times the median, where in the window, and the largest of all."""
        return find_sinks(self.norm_bins, self.norm_counts, self.zero_norms, self.row_norms, ratio=ratio)

    def outlier_dims(
        self,
        criterion: Literal["magnitude", "massive", "robust"] = "magnitude",
        *,
        share: float = outliers.OUTLIER_SHARE,
        times: float = outliers.ROBUST_TIMES,
    ) -> Int64Array | None:
        """Return the indices of dimensions that are unlike the others, ascending; None if the statistics do not tell.

        Args:
            criterion: `magnitude`: at least 6 in magnitude in at least `share` of the rows (Dettmers et al. 2022). `massive`:
                somewhere over 100 and over 1,000 times the median magnitude of the hook point (Sun et al. 2024, who compare
                with the median of the row). `robust`: the mean's magnitude or the standard deviation is over `times` the
                median of those of all dimensions; where the median is 0 it does not count.
            share: For `magnitude`: 0 to 1.
            times: For `robust`.

        Raises:
            InvalidInputError: another criterion, or a share that is none.
        """
        return outliers.outlier_dims(self, criterion, share=share, times=times)


def empty_stats(hook_point: str, d_model: int) -> HookPointStats:
    """Return the statistics of no rows: the neutral element of `merge_stats`."""
    return HookPointStats(
        hook_point,
        n_rows=0,
        n_finite_rows=0,
        nonfinite=0,
        mean=np.zeros(d_model),
        m2=np.zeros(d_model),
        min=np.full(d_model, np.inf, np.float32),
        max=np.full(d_model, -np.inf, np.float32),
        zero_norms=0,
        norm_bins=np.zeros(0, np.int32),
        norm_counts=np.zeros(0, np.int64),
        outlier_counts=np.zeros(d_model, np.int64),
        value_sketch=empty_value_sketch(),
        row_norms=empty_row_norms(),
    )


def merge_stats(a: HookPointStats, b: HookPointStats) -> HookPointStats:
    """Return the statistics of both sets of rows together. Associative and commutative up to float64 rounding of moments."""
    n = a.n_finite_rows + b.n_finite_rows
    mean, m2 = merge_moments(a.n_finite_rows, a.mean, a.m2, b.n_finite_rows, b.mean, b.m2)
    bins, counts = merge_counts([a.norm_bins, b.norm_bins], [a.norm_counts, b.norm_counts])
    return HookPointStats(
        a.hook_point,
        n_rows=a.n_rows + b.n_rows,
        n_finite_rows=n,
        nonfinite=a.nonfinite + b.nonfinite,
        mean=mean,
        m2=m2,
        min=np.minimum(a.min, b.min),
        max=np.maximum(a.max, b.max),
        zero_norms=a.zero_norms + b.zero_norms,
        norm_bins=bins,
        norm_counts=counts,
        outlier_counts=(
            None
            if a.outlier_counts is None or b.outlier_counts is None
            else a.outlier_counts + b.outlier_counts
        ),
        value_sketch=(
            None
            if a.value_sketch is None or b.value_sketch is None
            else merge_value_sketches(a.value_sketch, b.value_sketch)
        ),
        row_norms=(
            None if a.row_norms is None or b.row_norms is None else merge_row_norms(a.row_norms, b.row_norms)
        ),
        # Here None is "no int8 rows", which adds nothing, not "unknown".
        int8_error=(
            a.int8_error + b.int8_error if a.int8_error and b.int8_error else a.int8_error or b.int8_error
        ),
    )


def merge_moments(
    n_a: int, mean_a: Float64Array, m2_a: Float64Array, n_b: int, mean_b: Float64Array, m2_b: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Return the mean and the sum of squared deviations of two sets of `n_a` and `n_b` rows together."""
    if not n_a or not n_b:
        return (mean_a, m2_a) if n_a else (mean_b, m2_b)
    n = n_a + n_b
    delta = mean_b - mean_a
    return mean_a + delta * (n_b / n), m2_a + m2_b + delta**2 * (n_a * n_b / n)
