"""Does the memory of one layer's activations serve the next layer, or does it go back to the kernel in between?

glibc gives large blocks back as soon as they are freed. A forward pass on the CPU frees and asks for megabytes hundreds of
times a second, and every page that comes back is a page fault and is cleared first: a tenth of a small model's time. A worker
that computes on the CPU therefore has the allocator keep what it had. What it keeps is bounded by `_KEPT` and by the most it
ever used. On GPUs torch has an allocator of its own that does this; other C libraries are left as they are.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEPT = 1 << 30
_USUAL_MMAP, _USUAL_TRIM = 32 << 20, 64 << 20
"""Where glibc's own adjustment of these two ends in a process that frees large blocks (mallopt(3))."""


def keep_freed_memory() -> None:
    """Have glibc keep up to 1 GiB of freed memory in this process for what is asked for next; elsewhere do nothing."""
    _set(_KEPT, _KEPT)


def release_freed_memory() -> None:
    """Give freed memory back to the kernel, and go back to glibc's usual thresholds."""
    libc = _set(_USUAL_MMAP, _USUAL_TRIM)
    if libc is not None:
        libc.malloc_trim(0)


def _set(mmap_threshold: int, trim_threshold: int) -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
    libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
    return libc
