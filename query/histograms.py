"""Which bars show a latent's stored histogram, or the densities of all latents?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.latent_stats import HIST_SHIFT, histogram_edges

MOST_BARS = 48
"""Bars of a histogram: more are thinner than the eye tells apart in a small picture."""

BARS_PER_DECADE = 8
"""Bars of densities: 8 for each power of ten, as densities of one dictionary span five to six of them."""

_LEAST = 2.0**-24
"""The smallest positive float16, where the lowest bin begins on a scale that has no 0."""

_BEYOND = (0x7C00 >> HIST_SHIFT) + 1
"""The bin behind that of the values that float16 cannot hold."""


@dataclass(frozen=True, slots=True, eq=False)
class Bars:
    """Counts of neighbouring ranges of values."""

    edges: npt.NDArray[np.float64]
    """Shape (n + 1,), ascending, positive: bar i counts values in [edges[i], edges[i + 1])."""

    counts: npt.NDArray[np.int64]
    """Shape (n,)."""


def histogram_bars(bins: Any, counts: Any, *, largest: float, most: int = MOST_BARS) -> Bars:
    """Return at most `most` bars of a stored histogram, its bins merged by a power of two; no count is changed.

    Args:
        bins: Bin numbers, ascending, as `actstore.latent_stats.histogram_bins` gives them.
        counts: Values in each bin.
        largest: The largest value: where the last bar ends if float16 cannot hold it.
        most: Bars at most.

    >>> bars = histogram_bars([240, 241, 256], [3, 1, 2], largest=2.0)
    >>> bars.edges[[0, 1, -1]].tolist(), bars.counts.sum()
    ([1.0, 1.0625, 2.125], np.int64(6))
    """
    bins_, counts_ = np.asarray(bins, np.int64), np.asarray(counts, np.int64)
    if not bins_.size:
        return Bars(np.empty(0, np.float64), np.empty(0, np.int64))
    width = 1
    while int(bins_[-1] // width - bins_[0] // width) + 1 > most:
        width *= 2
    first, last = int(bins_[0] // width), int(bins_[-1] // width)
    merged = np.zeros(last - first + 1, np.int64)
    np.add.at(merged, bins_ // width - first, counts_)
    edges = histogram_edges(np.minimum(np.arange(first, last + 2) * width, _BEYOND - 1)).astype(np.float64)
    edges[0] = max(edges[0], _LEAST)
    top = float(np.finfo(np.float16).max)
    edges = np.minimum(edges, top)
    if edges[-1] >= top:
        edges[-1] = max(top, largest)
    keep = np.concatenate([[True], np.diff(edges) > 0])
    if not keep.all():  # the bin of what float16 cannot hold begins where the one before it ends
        starts = np.flatnonzero(keep[:-1])
        merged, edges = np.add.reduceat(merged, starts), np.append(edges[starts], edges[-1])
    return Bars(edges, merged)


def density_bars(densities: npt.NDArray[np.float64]) -> Bars:
    """Return how many latents have a density in each of `BARS_PER_DECADE` ranges per power of ten, up to 1.

    Args:
        densities: Shares of the tokens; zeros (dead latents) are left out.

    >>> density_bars(np.array([0.0, 0.5, 1.0])).counts.tolist()
    [1, 0, 0, 1]
    """
    live = np.asarray(densities, np.float64)
    live = live[live > 0]
    if not live.size:
        return Bars(np.empty(0, np.float64), np.empty(0, np.int64))
    places = np.floor(np.log10(live) * BARS_PER_DECADE).astype(np.int64)
    first = int(places.min())
    counts = np.bincount(places - first, minlength=1 - first)
    edges = 10.0 ** (np.arange(first, first + len(counts) + 1) / BARS_PER_DECADE)
    return Bars(edges, counts.astype(np.int64))
