"""How strongly does a stored row answer a query, fast and bounded first, then exactly?

A scorer gives every row of a block an upper bound on its score from one float32 matrix product, and the exact score of
the few rows that may matter from float64 sums. Higher scores are better; `value` turns a score into what the
user asked for (an activation, a cosine, a distance).

The bound: a float32 inner product of d terms in any order, fused or not, is within gamma_d |x|·|w| of the true one,
gamma_d = d u / (1 - d u), u = 2^-24, and |x|·|w| <= ||x|| ||w||. Rounding w to float32 adds u ||x|| ||w||. The constants
below are doubled, which covers the rounding of the norms themselves.

Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1, eq. 3.5.
"""

from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.row_norms import row_norms
from actstore.transforms import Transform

Float32s: TypeAlias = npt.NDArray[np.float32]
Float64s: TypeAlias = npt.NDArray[np.float64]
Sign = Literal["pos", "neg", "abs"]
Metric = Literal["cosine", "ip", "l2"]

_UNIT_ROUNDOFF = 2.0**-24
_TINY = 2.0**-100
"""Above what 2^20 underflowing terms can lose, even where the processor flushes subnormals (2^-126 each)."""


def dot_bound(d_model: int) -> float:
    """Return c with |float32 inner product - true one| <= c ||x|| ||w||, doubled for the rounding of the norms.

    >>> 9.0e-05 < dot_bound(768) < 9.5e-05
    True
    """
    nu = (d_model + 2) * _UNIT_ROUNDOFF
    return 2.0 * nu / (1.0 - nu) if nu < 0.5 else float("inf")


class Scorer(Protocol):
    """Scores of rows for `n_queries` queries at once."""

    n_queries: int

    def upper(self, acts_td: Float32s, norms_t: Float64s) -> Float64s:
        """Return upper bounds, shape (t, q); NaN never, `inf` where nothing is known."""

    def exact(self, acts_td: Float32s, query: int) -> Float64s:
        """Return the exact scores of rows for one query, shape (t,); `-inf` for a row that cannot be an answer."""

    def value(self, acts_td: Float32s, query: int) -> Float64s:
        """Return what the user asked for of each row, shape (t,)."""


def dot64(acts_td: Float32s, vector_d: Float64s) -> Float64s:
    """Return the inner products in float64, each the same whatever rows are around it; shape (t,)."""
    with np.errstate(all="ignore"):
        # Not a BLAS call: its order of summation may depend on the block's shape, and equal rows must tie.
        products: Float64s = acts_td.astype(np.float64) * vector_d
        total: Float64s = products.sum(axis=1)
    return total


class _Products:
    """Float32 inner products with unit vectors along the queries, and their bound."""

    def __init__(self, vectors_qd: Float64s) -> None:
        self.vectors_qd = np.ascontiguousarray(vectors_qd, dtype=np.float64)
        self.n_queries, d_model = self.vectors_qd.shape
        with np.errstate(all="ignore"):
            scale_q = np.abs(self.vectors_qd).max(axis=1)
            # Scaled first: squares of large or small numbers would overflow or vanish.
            scaled = self.vectors_qd / np.where(scale_q > 0, scale_q, 1.0)[:, None]
            self.lengths_q: Float64s = scale_q * np.sqrt((scaled**2).sum(axis=1))
            unit = scaled / np.maximum(np.sqrt((scaled**2).sum(axis=1)), 1e-300)[:, None]
        self.units_dq = np.ascontiguousarray(unit.T.astype(np.float32))
        self.bound = dot_bound(d_model)

    def unit_products(self, acts_td: Float32s) -> Float64s:
        """Return inner products with the unit vectors, shape (t, q); not finite where float32 overflows."""
        with np.errstate(all="ignore"):
            products_tq: Float64s = (acts_td @ self.units_dq).astype(np.float64)
        return products_tq

    def slack(self, norms_t: Float64s) -> Float64s:
        """Return how far `unit_products` may be from the truth, shape (t, 1)."""
        return (self.bound * norms_t + _TINY)[:, None]


def _known(upper_tq: Float64s) -> Float64s:
    """Return the bounds with NaN (float32 overflow met its opposite) as `inf`: the row must be looked at."""
    return np.where(np.isnan(upper_tq), np.inf, upper_tq)


def _signed(values: Float64s, sign: Sign) -> Float64s:
    """Return numbers whose order, largest first, is the one that `sign` asks for."""
    return values if sign == "pos" else -values if sign == "neg" else np.abs(values)


class ProjectionScorer:
    """Inner products with directions, largest first in the sense of `sign`."""

    def __init__(self, vectors_qd: Float64s, sign: Sign, neurons: Mapping[int, int] | None = None) -> None:
        """Take the directions, shape (q, d), and which end of the order comes first.

        Args:
            vectors_qd: One direction per query.
            sign: Which inner products come first: the largest, the smallest, or those furthest from zero.
            neurons: Queries whose direction is one dimension, and which: their value is the stored one, whatever else the
                row holds.
        """
        self._products = _Products(vectors_qd)
        self._neurons = dict(neurons or {})
        self.n_queries = self._products.n_queries
        self.sign = sign

    def directions(self) -> Float64s:
        """Return what rows are multiplied with, shape (q, d)."""
        return self._products.vectors_qd

    def upper(self, acts_td: Float32s, norms_t: Float64s) -> Float64s:
        """Return upper bounds of the signed inner products."""
        products = self._products.unit_products(acts_td)
        with np.errstate(all="ignore"):
            bound_tq: Float64s = (_signed(products, self.sign) + self._products.slack(norms_t)) * (
                self._products.lengths_q * (1 + 1e-12)
            )
        return _known(bound_tq)

    def exact(self, acts_td: Float32s, query: int) -> Float64s:
        """Return the signed inner product."""
        return _signed(self.value(acts_td, query), self.sign)

    def value(self, acts_td: Float32s, query: int) -> Float64s:
        """Return the inner product."""
        if query in self._neurons:
            return acts_td[:, self._neurons[query]].astype(np.float64)
        return dot64(acts_td, self._products.vectors_qd[query])


class NeuronScorer:
    """Single dimensions: the stored values are the scores, and exact."""

    def __init__(self, indices: list[int], sign: Sign) -> None:
        """Take the dimensions and which end of the order comes first."""
        self._indices = np.asarray(indices, dtype=np.int64)
        self.n_queries = len(indices)
        self.sign = sign

    def upper(self, acts_td: Float32s, norms_t: Float64s) -> Float64s:  # noqa: ARG002 - the protocol's
        """Return the signed stored values."""
        return _signed(acts_td[:, self._indices].astype(np.float64), self.sign)

    def exact(self, acts_td: Float32s, query: int) -> Float64s:
        """Return the signed stored value."""
        return _signed(self.value(acts_td, query), self.sign)

    def value(self, acts_td: Float32s, query: int) -> Float64s:
        """Return the stored value."""
        return acts_td[:, self._indices[query]].astype(np.float64)


class SimilarityScorer:
    """Cosine, inner product or Euclidean distance to query vectors; nearer rows score higher."""

    def __init__(self, vectors_qd: Float64s, metric: Metric) -> None:
        """Take the queries, shape (q, d), none all zeros for cosine, and the metric."""
        self._products = _Products(vectors_qd)
        self.n_queries = self._products.n_queries
        self.metric = metric

    def upper(self, acts_td: Float32s, norms_t: Float64s) -> Float64s:
        """Return upper bounds of the cosine, the inner product, or minus the squared distance."""
        products = self._products
        unit_tq = products.unit_products(acts_td)
        slack_t1 = products.slack(norms_t)
        with np.errstate(all="ignore"):
            if self.metric == "cosine":
                bound_tq = (unit_tq + slack_t1) / norms_t[:, None]
                bound_tq = bound_tq + products.bound
            elif self.metric == "ip":
                bound_tq = (unit_tq + slack_t1) * (products.lengths_q * (1 + 1e-12))
            else:
                bound_tq = self._upper_l2(unit_tq, slack_t1, norms_t)
        return _known(bound_tq)

    def _upper_l2(self, unit_tq: Float64s, slack_t1: Float64s, norms_t: Float64s) -> Float64s:
        lengths_q = self._products.lengths_q
        # -(||x||^2 - 2 x.q + ||q||^2), and the norms of x come from float32.
        squares_t1 = norms_t[:, None] ** 2
        error_tq = 2 * slack_t1 * lengths_q + self._products.bound * (squares_t1 + lengths_q**2) + _TINY
        bound_tq: Float64s = 2 * unit_tq * lengths_q - squares_t1 - lengths_q**2 + error_tq
        return bound_tq

    def exact(self, acts_td: Float32s, query: int) -> Float64s:
        """Return the cosine, the inner product, or minus the squared distance; `-inf` where undefined."""
        scores = (
            -self._squared_distance(acts_td, query) if self.metric == "l2" else self.value(acts_td, query)
        )
        return np.where(np.isnan(scores), -np.inf, scores)

    def value(self, acts_td: Float32s, query: int) -> Float64s:
        """Return the cosine (NaN for a row of zeros), the inner product, or the distance."""
        if self.metric == "l2":
            return np.sqrt(self._squared_distance(acts_td, query))
        products = dot64(acts_td, self._products.vectors_qd[query])
        if self.metric == "ip":
            return products
        wide = acts_td.astype(np.float64)
        with np.errstate(all="ignore"):
            lengths: Float64s = np.sqrt((wide * wide).sum(axis=1)) * self._products.lengths_q[query]
            # Rounding may carry a cosine of 1 past it by an ulp or two.
            cosine: Float64s = np.clip(np.where(lengths > 0, products / lengths, np.nan), -1.0, 1.0)
        return cosine

    def _squared_distance(self, acts_td: Float32s, query: int) -> Float64s:
        with np.errstate(all="ignore"):
            difference = acts_td.astype(np.float64) - self._products.vectors_qd[query]
            total: Float64s = (difference * difference).sum(axis=1)
        return total


class TransformedScorer:
    """Scores of transformed rows; the masks, and the norms that they look at, stay those of the rows as they are stored."""

    def __init__(self, transform: Transform, scorer: SimilarityScorer) -> None:
        """Take the transform, and a scorer whose queries were transformed (`query_vectors.transform_queries`)."""
        self._transform = transform
        self._scorer = scorer
        self.n_queries = scorer.n_queries
        self.metric = scorer.metric

    def upper(self, acts_td: Float32s, norms_t: Float64s) -> Float64s:  # noqa: ARG002 - the protocol's
        """Return upper bounds of the scores of the transformed rows."""
        moved_td = self._transform.apply(acts_td)
        return self._scorer.upper(moved_td, row_norms(moved_td)[0])

    def exact(self, acts_td: Float32s, query: int) -> Float64s:
        """Return the scores of the transformed rows; `-inf` for one that becomes zeros with cosine, or too large."""
        return self._scorer.exact(self._transform.apply(acts_td), query)

    def value(self, acts_td: Float32s, query: int) -> Float64s:
        """Return the values of the transformed rows."""
        return self._scorer.value(self._transform.apply(acts_td), query)
