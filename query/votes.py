"""Which next tokens do neighbours vote for, a near one more than a far one?"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

SCALE_RANK = 32
"""Neighbour whose distance sets the temperature: of the ranks from 4 to 48 those from 16 on gave the lowest perplexity on the
demo's models (two hook points, 64 and 1,024 neighbours, each row's own document left out), within 0.04 nats of each other."""


@dataclass(frozen=True, slots=True)
class Votes:
    """What neighbours say: for each of v different next tokens, ascending."""

    token_ids: Int64s
    p: Float64s
    """p_kNN, shape (v,), of sum 1; the probability of all other tokens is 0."""

    counts: Int64s
    distances: Float64s
    """Of the nearest neighbour with the token, the first in the order given of equal ones."""

    rows: Int64s
    """Row of that neighbour."""


def count_votes(next_ids: Int64s, distances: Float64s, rows: Int64s, *, temperature: float) -> Votes:
    """Return p_kNN of neighbours.

    Args:
        next_ids: Token after each neighbour, shape (n,).
        distances: Squared distances, ascending, shape (n,).
        rows: Rows of the neighbours, shape (n,).
        temperature: T, above 0.

    Source: arXiv:1911.00172, equation 2, with the temperature of arXiv:2010.00710, equation 2.

    >>> votes = count_votes(np.array([7, 5, 7]), np.array([0.0, 0.0, 0.0]), np.arange(3), temperature=1.0)
    >>> votes.token_ids.tolist(), votes.p.round(3).tolist(), votes.counts.tolist(), votes.rows.tolist()
    ([5, 7], [0.333, 0.667], [1, 2], [1, 0])
    """
    token_ids, first, owner = np.unique(next_ids, return_index=True, return_inverse=True)
    with np.errstate(over="ignore", under="ignore"):
        # A common factor goes out in the division; with this one the largest weight is 1.
        weights = np.exp(-(distances - distances.min(initial=np.inf)) / temperature)
    totals = np.bincount(owner, weights=weights, minlength=len(token_ids))
    counts = np.bincount(owner, minlength=len(token_ids))
    p = totals / max(float(weights.sum()), 1.0)
    return Votes(token_ids, p, counts, distances[first], rows[first])


def gap_temperature(distances: Float64s) -> float:
    """Return the temperature at which a neighbour as far as the `SCALE_RANK`-th counts 1/e of the nearest one.

    Like the votes it is the same whatever is added to all distances, and it does not depend on how many neighbours are asked
    for. Where so many are equally near, the first that is further counts 1/e; 1 if none is.

    Args:
        distances: Squared distances, ascending, shape (n,).

    >>> gap_temperature(np.array([2.0, 3.0, 7.0])), gap_temperature(np.array([2.0, 2.0]))
    (5.0, 1.0)
    """
    gaps = distances - distances.min(initial=np.inf)
    further = gaps[SCALE_RANK - 1 :] if len(gaps) >= SCALE_RANK else gaps[-1:]
    positive = further[further > 0]
    return float(positive[0]) if positive.size else 1.0
