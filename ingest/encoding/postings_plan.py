"""Which ranges of latents are built together, so that what a task holds fits into its memory?

A task reads all codes of the run and keeps those of its latents, so the fewer ranges, the less is read. The counts of all
latents are known exactly before, and with them what every range needs. A latent that alone needs more than there is has a range
of its own, whose postings wait on local disk (`large_latent.py`).
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

Int64s = npt.NDArray[np.int64]

DEFAULT_MEMORY_BYTES: Final = 1 << 30

HELD_BYTES: Final = 14
"""Of a posting with a float16 value: its row, its value, its token."""

ENCODED_BYTES: Final = 8
"""Of a posting once it is encoded, in pieces and as one object, at most."""

LATENT_BYTES: Final = 3072
"""Of a latent's statistics, as columns and as a file: two lists of ten tokens, two of ten logits, some tens of bins."""

LARGEST_BYTES: Final = 40
"""Of a posting of the largest latent while its statistics are computed, or its blocks are cut: it is worked on whole."""

FIXED_BYTES: Final = 160 << 20
"""What a task holds whatever its range: encoded pages read ahead, a decoded page, a unit's tokens, a block of postings that is
worked on; and later, when the postings are gone, logits and a part of the unembedding."""

DISK_BYTES: Final = 16
"""Of a posting of a latent that is too large for memory, in temporary files."""

MAX_POSTINGS: Final = 40_000_000
"""Of a range, unless one latent has more: an object then takes about 128 MiB."""


def task_bytes(n_postings: int, n_latents: int, largest: int, *, value_bytes: int) -> int:
    """Return the memory that a task takes at most for a range of latents.

    Args:
        n_postings: All of the range.
        n_latents: Latents of the range.
        largest: Postings of the latent that has most.
        value_bytes: Size of a value.
    """
    of_posting = HELD_BYTES - 2 + value_bytes + ENCODED_BYTES
    return FIXED_BYTES + n_latents * LATENT_BYTES + n_postings * of_posting + largest * LARGEST_BYTES


def is_large(n_postings: int, n_latents: int, *, memory_bytes: int, value_bytes: int) -> bool:
    """Return whether a range is one latent whose postings must wait on disk."""
    needed = task_bytes(n_postings, n_latents, n_postings, value_bytes=value_bytes)
    return n_latents == 1 and needed > memory_bytes


def large_bytes(n_postings: int) -> int:
    """Return the memory that a latent takes at most whose postings wait on disk: that of the encoded object."""
    return FIXED_BYTES + LATENT_BYTES + n_postings * ENCODED_BYTES


def plan_ranges(
    counts: Int64s, *, memory_bytes: int, value_bytes: int = 2, worker_postings: int = MAX_POSTINGS
) -> list[int]:
    """Return the boundaries of as few ranges of latents as fit into memory, one after the other: `[0, ..., n_latents]`.

    Args:
        counts: Postings of every latent; there is at least one.
        memory_bytes: What a task may take.
        value_bytes: Size of a value.
        worker_postings: Most postings of a range, unless one latent has more, so that every worker gets one; at most
            `MAX_POSTINGS`.

    Raises:
        InvalidInputError: TOO_LARGE: a latent's encoded postings alone need more memory; the message says how much.

    >>> plan_ranges(np.array([3, 1, 0, 2]), memory_bytes=1 << 30, worker_postings=4)
    [0, 3, 4]
    """
    n, most_postings = len(counts), min(worker_postings, MAX_POSTINGS)
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    most = int(counts.argmax())
    if _needed(counts[most : most + 1], value_bytes=value_bytes) > memory_bytes:
        raise _too_large(most, int(counts[most]), memory_bytes, value_bytes)
    boundaries = [0]
    while boundaries[-1] < n:
        start = boundaries[-1]
        stop = int(np.searchsorted(before, before[start] + most_postings, side="right")) - 1
        stop = min(max(stop, start + 1), n)
        largest = np.maximum.accumulate(counts[start:stop])

        def fits(length: int, start: int = start, largest: Int64s = largest) -> bool:
            n_postings = int(before[start + length] - before[start])
            needed = task_bytes(n_postings, length, int(largest[length - 1]), value_bytes=value_bytes)
            return needed <= memory_bytes

        boundaries.append(start + _last_true(fits, stop - start))
    return boundaries


def ranges_bytes(counts: Int64s, boundaries: list[int], *, value_bytes: int) -> int:
    """Return the memory that the range takes which cannot do with less."""
    return max(_needed(part, value_bytes=value_bytes) for part in np.split(counts, boundaries[1:-1]))


def _needed(counts: Int64s, *, value_bytes: int) -> int:
    """Return the least memory in which a range can be built."""
    needed = task_bytes(int(counts.sum()), len(counts), int(counts.max()), value_bytes=value_bytes)
    return min(needed, large_bytes(int(counts[0]))) if len(counts) == 1 else needed


def _last_true(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest length that `fits`, which is true of 1 and of no length above one that it is false of."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _too_large(latent: int, count: int, memory_bytes: int, value_bytes: int) -> InvalidInputError:
    needed = _needed(np.array([count]), value_bytes=value_bytes)
    return InvalidInputError(
        ErrorKind.TOO_LARGE,
        f"latent {latent} fires on {count:,} rows, and its encoded postings alone take {needed:,} bytes of memory to build, more "
        f"than the {memory_bytes:,} that a task may take: give memory_bytes={needed} or more (actstore sae encode "
        f"--postings-memory-mb {-(-needed >> 20)}, for an ingest with the same option)",
    )
