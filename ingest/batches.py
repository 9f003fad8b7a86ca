"""Which windows go through the model together?

Version 1 of the plan. A unit's batches are a function of its window lengths and the token budget alone, so that a retry
computes the very same batches: in low precision a row depends, in its last bits, on the batch it was computed in.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

BATCH_PLAN_VERSION = 1
"""Raised whenever the same lengths and budget would give other batches."""

IntArray = npt.NDArray[np.int64]


def plan_batches(
    window_lengths: Sequence[int] | npt.NDArray[np.integer], batch_tokens: int, *, equal_lengths: bool = False
) -> tuple[IntArray, ...]:
    """Return the windows of each batch, as arrays of window numbers; every window is in exactly one batch.

    Windows are sorted by length, longest first and equal ones in their own order, and cut greedily: windows x longest
    window <= `batch_tokens`, so similar lengths meet and little is padded. Longest first, so that a batch too large for
    the device shows in the first batch and not in the last. A window longer than the budget is a batch of its own.

    Args:
        window_lengths: Tokens of each window, at least 1.
        batch_tokens: Tokens that a batch may hold, padding included.
        equal_lengths: Whether windows of different lengths may not meet, for models to which padding is not invisible.

    Raises:
        InvalidInputError: a budget below 1 or an empty window.

    >>> [batch.tolist() for batch in plan_batches([3, 9, 3, 8, 1], batch_tokens=18)]
    [[1, 3], [0, 2, 4]]
    >>> [batch.tolist() for batch in plan_batches([3, 9, 3, 8, 1], batch_tokens=18, equal_lengths=True)]
    [[1], [3], [0, 2], [4]]
    """
    lengths = np.asarray(window_lengths, np.int64)
    if batch_tokens < 1:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"batch_tokens must be at least 1, got {batch_tokens}: 4096 is a usual value",
        )
    if lengths.size and lengths.min() < 1:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"window {int(lengths.argmin())} has {int(lengths.min())} tokens: leave it out",
        )
    order = np.argsort(-lengths, kind="stable")
    batches, start = list[IntArray](), 0
    while start < len(order):
        longest = int(lengths[order[start]])
        stop = min(len(order), start + max(1, batch_tokens // longest))
        if equal_lengths:
            # `order` falls, so the windows as long as the first one end where the lengths drop below it.
            stop = start + int(np.searchsorted(-lengths[order[start:stop]], -longest, side="right"))
        batches.append(order[start:stop])
        start = stop
    return tuple(batches)
