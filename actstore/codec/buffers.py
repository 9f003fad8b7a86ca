"""How can a reader reuse large arrays without ever changing one that its caller still holds?

Fresh memory costs a page fault for every 4 KiB, as much as reading the rows. Each buffer is given out through a new array
that owns nothing; whatever the caller derives from it (numpy views, torch tensors, memoryviews) keeps that array alive, so a
weak reference tells when all of it is gone.
"""

import mmap
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt


class BufferRing:
    """Buffers of one size, each given out again once its last user has dropped it."""

    def __init__(self, nbytes: int, *, capacity: int) -> None:
        """Keep at most `capacity` buffers of `nbytes` bytes; while all are in use, further ones are made and not kept."""
        self._nbytes = nbytes
        self._capacity = capacity
        self._kept: list[tuple[mmap.mmap, weakref.ref[npt.NDArray[np.uint8]]]] = []

    def take(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an array of `shape` and `dtype`, at most `nbytes` large, with any content.

        >>> ring = BufferRing(64, capacity=2)
        >>> row = ring.take((2, 4), np.dtype(np.float32))[0]
        >>> np.shares_memory(ring.take((2, 4), np.dtype(np.float32)), row)
        False
        """
        memory = self._free_memory()
        # The base of every view of `owner` is `owner`: numpy skips to the base's base for arrays alone.
        owner = np.frombuffer(memory, np.uint8)
        if len(self._kept) < self._capacity:
            self._kept.append((memory, weakref.ref(owner)))
        return owner[: shape[0] * shape[1] * dtype.itemsize].view(dtype).reshape(shape)

    def _free_memory(self) -> mmap.mmap:
        """Return memory that nobody uses; it is in the ring no more."""
        for place, (memory, user) in enumerate(self._kept):
            if user() is None:
                del self._kept[place]
                return memory
        memory = mmap.mmap(-1, max(self._nbytes, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory
