"""Which windows of a tokenization stand for all of them, where looking at all would take too long?"""

from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.tokenization import Tokenization

from .unit import window_starts

Ints = npt.NDArray[Any]


def sample_windows(
    tokenization: Tokenization, *, n_tokens: int, n_units: int, seed: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return whole windows from several units, about `n_tokens` tokens in all (at least one window, all if there are fewer).

    Deterministic. The units are spread over the tokenization, the windows drawn within each. Reads one object per unit.

    Args:
        tokenization: Where from.
        n_tokens: Tokens wanted.
        n_units: Units to take them from, at most.
        seed: Of what is drawn.

    Returns:
        Token ids of the windows, one after the other, shape (n,); where each starts, and n, shape (n_windows + 1,).
    """
    rng = np.random.default_rng([seed, 0x77696E])
    units = [u.unit for u in tokenization.units]
    chosen = [units[i] for i in stratified(len(units), min(n_units, len(units)), rng)]
    pieces: list[npt.NDArray[np.int32]] = []
    for i, unit in enumerate(chosen):
        wanted = -(-(n_tokens - sum(map(len, pieces))) // (len(chosen) - i))
        table = tokenization.unit_table(unit, ["token_id", "doc_id", "window"])
        ids = table["token_id"].to_numpy()
        starts = window_starts(table["doc_id"].to_numpy(), table["window"].to_numpy())
        pieces += _draw(ids, starts, wanted, rng)
    lengths = [len(p) for p in pieces]
    return np.concatenate(pieces).astype(np.int32), np.cumsum([0, *lengths], dtype=np.int64)


def stratified(n: int, k: int, rng: np.random.Generator) -> list[int]:
    """Return `k` of the numbers below `n`, ascending: one drawn from each of `k` equal stretches.

    >>> stratified(10, 10, np.random.default_rng(0)), len(stratified(1000, 7, np.random.default_rng(0)))
    ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 7)
    """
    return [int(rng.integers(i * n // k, (i + 1) * n // k)) for i in range(k)]


def _draw(ids: Ints, starts: Ints, wanted: int, rng: np.random.Generator) -> list[npt.NDArray[np.int32]]:
    """Return windows in the order that they stand, drawn until they hold the tokens wanted."""
    lengths = np.diff(starts)
    order = rng.permutation(len(lengths))
    n = 1 + int(np.searchsorted(np.cumsum(lengths[order]), wanted))
    return [ids[starts[w] : starts[w + 1]] for w in sorted(order[:n])]
