"""What are a hook point's channels centred and scaled by, before its rows become int8?

Mean and standard deviation of every channel are measured once, on a few thousand tokens drawn from all over the corpus, before
the run is created; they are fixed for the run. A rough measure is enough: a row's own scale takes up what they miss.
"""

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.dtypes import stored_dtype, to_float32
from actstore.int8 import Int8Transform, fit_int8
from actstore.store import Store
from actstore.tokenization import Tokenization

from .capture import Capturer
from .config import IngestConfig
from .window_sample import sample_windows

if TYPE_CHECKING:
    from .backend import Backend
    from .host import ModelDescription

Moments: TypeAlias = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Mean and standard deviation of every channel, each (d_model,)."""

_TOKENS = 8_192
"""Ten times the tokens that settle a channel's power of two: its standard deviation is known to about 1 %."""

_UNITS = 8
"""Parts of the corpus that they come from."""

_GROUP_TOKENS = 1_024
"""Tokens captured at once: rows of all hook points of a large model, 8,192 wide in 80 layers, are 2.5 GiB."""


def calibrate(
    backend: "Backend",
    store: Store,  # noqa: ARG001 - of the tokenization; here so that all steps of a job are called alike
    tokenization: Tokenization,
    model: "ModelDescription",
    config: IngestConfig,
) -> dict[str, Int8Transform]:
    """Return the int8 transform of every hook point. Deterministic: the same tokenization, model and seed give the same.

    Cost: eight token objects read, and one forward pass over about 8,192 tokens on one worker.
    """
    token_ids, starts = sample_windows(tokenization, n_tokens=_TOKENS, n_units=_UNITS, seed=config.seed)
    moments: dict[str, Moments] = backend.call("calibrate", token_ids, starts)
    return {name: fit_int8(*moments[name]) for name, _ in model.hook_points}


def measure_moments(
    capturer: Capturer, token_ids: npt.NDArray[np.int32], window_starts: npt.NDArray[np.int64]
) -> dict[str, Moments]:
    """Return mean and standard deviation of every channel over windows of tokens, in float64.

    Rows with a number that is not finite are left out; without any row, channels have mean 0 and deviation 1.

    Args:
        capturer: The model and its hook points.
        token_ids: Windows of tokens, one after the other; shape (n,).
        window_starts: Where each starts, and n; shape (n_windows + 1,).
    """
    sums = {name: _Sums.empty(width) for name, width in capturer.widths.items()}
    dtype = capturer.loaded.dtype
    first, n_windows = 0, len(window_starts) - 1
    while first < n_windows:
        limit = window_starts[first] + _GROUP_TOKENS
        last = max(first + 1, int(np.searchsorted(window_starts, limit, side="right")) - 1)
        low, high = int(window_starts[first]), int(window_starts[last])
        out = {
            name: np.empty((high - low, width), stored_dtype(dtype))
            for name, width in capturer.widths.items()
        }
        capturer.capture_unit(
            token_ids[low:high],
            window_starts[first : last + 1] - low,
            out,
            batch_tokens=_GROUP_TOKENS,
            stored_dtype=dtype,
        )
        for name in sums:
            sums[name].add(to_float32(out.pop(name), dtype))
        first = last
    return {name: found.moments() for name, found in sums.items()}


class _Sums:
    """Mean and sum of squared deviations so far.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    def __init__(self, n: int, mean: npt.NDArray[np.float64], squares: npt.NDArray[np.float64]) -> None:
        self._n, self._mean, self._squares = n, mean, squares

    @classmethod
    def empty(cls, width: int) -> "_Sums":
        return cls(0, np.zeros(width), np.zeros(width))

    def add(self, rows_td: npt.NDArray[np.float32]) -> None:
        """Add rows, those that are finite."""
        kept = rows_td[np.isfinite(rows_td).all(axis=1)].astype(np.float64)
        if not len(kept):
            return
        mean = kept.mean(axis=0)
        n = self._n + len(kept)
        delta = mean - self._mean
        self._squares += ((kept - mean) ** 2).sum(axis=0) + delta**2 * (self._n * len(kept) / n)
        self._mean += delta * (len(kept) / n)
        self._n = n

    def moments(self) -> Moments:
        """Return mean and standard deviation."""
        if not self._n:
            return self._mean, np.ones_like(self._mean)
        return self._mean, np.sqrt(self._squares / self._n)
