"""What is known about a hook point's activations without reading them again?

Per unit and hook point: row counts, mean and squared deviations per dimension, extremes, and a sketch of the rows' L2 norms.
All parts merge exactly (the sketch within its stated error), so a run's statistics are the fold of its units' (FORMAT.md,
section 7). Moments are accumulated in float64 whatever the stored dtype.

Source: Chan, Golub, LeVeque (1983), "Algorithms for computing the sample variance", eq. 2.1 (merging); Masson, Rim, Lee
(2019), "DDSketch", VLDB 12(12), section 2 (relative-error quantiles).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Float64Array = npt.NDArray[np.float64]

NORM_GAMMA = 1.02
"""Ratio of the sketch's bin edges: quantiles of norms are right to 1 %, (gamma - 1) / (gamma + 1)."""

_BLOCK_ROWS = 1024
"""Rows turned to float64 at a time: 6 MiB at 768 dimensions."""


@dataclass(frozen=True, slots=True)
class HookPointStats:
    """Statistics of one hook point over the rows seen; vectors have shape (d_model,)."""

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
        """Return the `q` quantile (0 to 1) of the rows' L2 norms, within 1 % of the lower-rank exact one."""
        if not self.n_finite_rows:
            return float("nan")
        rank = q * (self.n_finite_rows - 1)
        seen = self.zero_norms
        if rank < seen:
            return 0.0
        index = int(np.searchsorted(seen + np.cumsum(self.norm_counts), rank, side="right"))
        edge = float(self.norm_bins[min(index, len(self.norm_bins) - 1)])
        return float(2.0 * NORM_GAMMA**edge / (NORM_GAMMA + 1.0))


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
    )


def block_stats(hook_point: str, acts_td: npt.NDArray[np.float32]) -> HookPointStats:
    """Return the statistics of one block of rows, shape (t, d_model), any size; memory is bounded by inner blocks."""
    total = empty_stats(hook_point, acts_td.shape[1])
    for start in range(0, len(acts_td), _BLOCK_ROWS):
        total = merge_stats(total, _one_block(hook_point, acts_td[start : start + _BLOCK_ROWS]))
    return total


def _one_block(hook_point: str, acts_td: npt.NDArray[np.float32]) -> HookPointStats:
    n_rows = len(acts_td)
    # One pass finds almost every block clean: a row's float64 sum is finite unless one of its values is not.
    nonfinite = 0
    with np.errstate(invalid="ignore"):
        sums_t = acts_td.sum(axis=1, dtype=np.float64)
    if not np.isfinite(sums_t).all():
        finite_td = np.isfinite(acts_td)
        nonfinite = int(finite_td.size - finite_td.sum())
        acts_td = acts_td[finite_td.all(axis=1)]
    if not len(acts_td):
        nothing = empty_stats(hook_point, acts_td.shape[1])
        return HookPointStats(
            hook_point, n_rows, 0, nonfinite, nothing.mean, nothing.m2, nothing.min, nothing.max, 0,
            nothing.norm_bins, nothing.norm_counts,
        )  # fmt: skip
    wide_td = acts_td.astype(np.float64)
    norms_t = np.sqrt(np.einsum("td,td->t", wide_td, wide_td))
    mean = wide_td.mean(axis=0)
    wide_td -= mean
    positive = norms_t[norms_t > 0]
    bins, counts = np.unique(
        np.ceil(np.log(positive) / np.log(NORM_GAMMA)).astype(np.int32), return_counts=True
    )
    return HookPointStats(
        hook_point,
        n_rows=n_rows,
        n_finite_rows=len(acts_td),
        nonfinite=nonfinite,
        mean=mean,
        m2=np.einsum("td,td->d", wide_td, wide_td),
        min=acts_td.min(axis=0),
        max=acts_td.max(axis=0),
        zero_norms=int(len(norms_t) - len(positive)),
        norm_bins=bins,
        norm_counts=counts.astype(np.int64),
    )


def merge_stats(a: HookPointStats, b: HookPointStats) -> HookPointStats:
    """Return the statistics of both sets of rows together. Associative up to float64 rounding."""
    n = a.n_finite_rows + b.n_finite_rows
    if n:
        delta = b.mean - a.mean
        mean = a.mean + delta * (b.n_finite_rows / n)
        m2 = a.m2 + b.m2 + delta**2 * (a.n_finite_rows * b.n_finite_rows / n)
    else:
        mean, m2 = a.mean, a.m2
    bins, inverse = np.unique(np.concatenate([a.norm_bins, b.norm_bins]), return_inverse=True)
    counts = np.zeros(len(bins), np.int64)
    np.add.at(counts, inverse, np.concatenate([a.norm_counts, b.norm_counts]))
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
    )


STATS_SCHEMA = pa.schema(
    [
        pa.field("hook_point", pa.string(), nullable=False),
        pa.field("n_rows", pa.int64(), nullable=False),
        pa.field("n_finite_rows", pa.int64(), nullable=False),
        pa.field("nonfinite", pa.int64(), nullable=False),
        pa.field("mean", pa.list_(pa.float64()), nullable=False),
        pa.field("m2", pa.list_(pa.float64()), nullable=False),
        pa.field("min", pa.list_(pa.float32()), nullable=False),
        pa.field("max", pa.list_(pa.float32()), nullable=False),
        pa.field("zero_norms", pa.int64(), nullable=False),
        pa.field("norm_bins", pa.list_(pa.int32()), nullable=False),
        pa.field("norm_counts", pa.list_(pa.int64()), nullable=False),
    ]
)


def is_stats_key(run: str, key: str) -> bool:
    """Return whether `key` is where a run's statistics are stored, of a unit or of the whole run.

    >>> is_stats_key("stats", "runs/stats/embed/c/0/0"), is_stats_key("a", "runs/a/stats/all-00.parquet")
    (False, True)
    """
    return key.startswith(f"runs/{run}/stats/")


def stats_to_table(stats: Iterable[HookPointStats]) -> pa.Table:
    """Return one table row per hook point (`STATS_SCHEMA`)."""
    rows = [
        {
            name: value.tolist() if isinstance(value := getattr(one, name), np.ndarray) else value
            for name in STATS_SCHEMA.names
        }
        for one in stats
    ]
    return pa.Table.from_pylist(rows, schema=STATS_SCHEMA)


def stats_from_table(table: pa.Table) -> dict[str, HookPointStats]:
    """Return what `stats_to_table` wrote, by hook point."""
    found = {}
    for row in table.to_pylist():
        found[row["hook_point"]] = HookPointStats(
            hook_point=row["hook_point"],
            n_rows=row["n_rows"],
            n_finite_rows=row["n_finite_rows"],
            nonfinite=row["nonfinite"],
            mean=np.asarray(row["mean"], np.float64),
            m2=np.asarray(row["m2"], np.float64),
            min=np.asarray(row["min"], np.float32),
            max=np.asarray(row["max"], np.float32),
            zero_norms=row["zero_norms"],
            norm_bins=np.asarray(row["norm_bins"], np.int32),
            norm_counts=np.asarray(row["norm_counts"], np.int64),
        )
    return found
