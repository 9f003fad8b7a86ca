"""Where do several latents fire within n tokens of each other? Pure functions over sorted coordinates.

Firings are given by one coordinate per row on a line on which different windows (or documents) lie further than n apart, so
that "near" and "in the same window" is one comparison of distances. Everything is a binary search: the cost grows with the
number of firings, not with n.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bools: TypeAlias = npt.NDArray[np.bool_]
Float64s: TypeAlias = npt.NDArray[np.float64]
Int64s: TypeAlias = npt.NDArray[np.int64]


def stretch(segments: Int64s, places: Int64s, within: int, n_places: int) -> Int64s:
    """Return coordinates whose distance is that of `places` inside a segment, and above `within` between segments.

    Args:
        segments: Which window or document each row is in, numbered so that `segments * n_places` fits 63 bits, shape (n,).
        places: Index of the row in its segment, `0 <= place < n_places`, shape (n,).
        within: The largest distance that will be asked for.
        n_places: Above every place.

    >>> stretch(np.array([0, 0, 1]), np.array([0, 1, 0]), within=3, n_places=2).tolist()
    [0, 1, 5]
    """
    coordinates: Int64s = segments * np.int64(n_places + within) + places
    return coordinates


def match_anchors(
    positive: Sequence[Int64s], negative: Sequence[Int64s], *, within: int, ordered: bool
) -> Bools:
    """Return at which firings of the first latent a conjunction holds, shape (len(positive[0]),).

    It holds at a firing if every other positive latent has a firing such that all of them lie within `within` of each other
    and, when `ordered`, each lies strictly after the one before it in the pattern; and if no negative latent fires
    within `within` of it, on either side.

    Args:
        positive: Sorted coordinates of every latent that must fire; the first is the anchor.
        negative: Sorted coordinates of every latent that must not.
        within: Largest distance.
        ordered: Whether the positive latents must follow each other in their order.
    """
    anchors = positive[0]
    if ordered:
        holds = _follow(positive, within)
    elif len(positive) == 2:
        holds = _any_near(anchors, positive[1], within)
    else:
        holds = _span(positive, within)
    for silent in negative:
        holds &= ~_any_near(anchors, silent, within)
    return holds


def strongest(
    anchors: Int64s, coordinates: Int64s, values: Float64s, *, before: int, after: int
) -> tuple[Float64s, Int64s]:
    """Return the largest value within reach of every anchor and the index of the firing that has it (the first of equal ones).

    Args:
        anchors: Sorted coordinates, shape (a,).
        coordinates: Sorted coordinates of one latent's firings, shape (n,).
        values: Their values, shape (n,).
        before: Reach below the anchor; negative to begin above it.
        after: Reach above it.

    Returns:
        Shape (a,) each; -inf and -1 where nothing is in reach.
    """
    low = np.searchsorted(coordinates, anchors - before, side="left")
    high = np.searchsorted(coordinates, anchors + after, side="right")
    best = np.full(len(anchors), -np.inf)
    where = np.full(len(anchors), -1, np.int64)
    # One step per firing in reach of the anchor that has most of them, all anchors at once.
    at = np.flatnonzero(low < high)
    for step in range(int((high - low).max(initial=0))):
        at = at[low[at] + step < high[at]]
        index = low[at] + step
        better = values[index] > best[at]
        best[at[better]] = values[index[better]]
        where[at[better]] = index[better]
    return best, where


def near_rows(rows: Int64s, others: Int64s, within: int) -> Bools:
    """Return which rows have one of `others` within `within` row numbers; both sorted. A cheap bound on real nearness."""
    return _any_near(rows, others, within)


def _any_near(anchors: Int64s, others: Int64s, within: int) -> Bools:
    low = np.searchsorted(others, anchors - within, side="left")
    near: Bools = low < np.searchsorted(others, anchors + within, side="right")
    return near


def _follow(positive: Sequence[Int64s], within: int) -> Bools:
    """The earliest firing of each next latent is the best choice: it leaves the most room for those after it."""
    anchors = positive[0]
    at, holds = anchors, np.ones(len(anchors), np.bool_)
    for later in positive[1:]:
        index = np.searchsorted(later, at, side="right")
        holds &= index < len(later)
        if not len(later):
            return holds
        at = later[np.minimum(index, len(later) - 1)]
    holds &= at - anchors <= within
    return holds


def _span(positive: Sequence[Int64s], within: int) -> Bools:
    """A firing x opens a span if all latents fire in [x, x + within]; an anchor matches if it lies in an open span.

    Enough, as the first firing of any fitting choice opens a span that holds the whole choice.
    """
    anchors = positive[0]
    starts = np.unique(np.concatenate(positive))
    is_open = np.ones(len(starts), np.bool_)
    for coordinates in positive:
        index = np.searchsorted(coordinates, starts, side="left")
        is_open &= index < np.searchsorted(coordinates, starts + within, side="right")
    starts = starts[is_open]
    return _any_in(starts, anchors - within, anchors)


def _any_in(coordinates: Int64s, low: Int64s, high: Int64s) -> Bools:
    inside: Bools = np.searchsorted(coordinates, low, "left") < np.searchsorted(coordinates, high, "right")
    return inside
