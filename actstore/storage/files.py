"""How are the files of a folder listed, read by position, and cleared away?

What `local.py` needs of the operating system and Python has no function for. All raise `OSError`.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import suppress

from actstore.errors import FormatError
from actstore.names import check_key


def reason(err: OSError) -> str:
    """Return what the system said, with the error's name: `No space left on device (ENOSPC)`."""
    name = errno.errorcode.get(err.errno or 0, "unknown error")
    return f"{err.strerror or err} ({name})"


def unlink_quietly(path: str) -> None:
    """Remove a temporary file, of which nothing depends."""
    with suppress(OSError):
        os.unlink(path)


def remove_stale(folder: str, *, age_s: float) -> None:
    """Remove the files in `folder` that are older than `age_s` seconds, as far as possible."""
    oldest = time.time() - age_s
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)


def pread(fd: int, start: int, stop: int) -> bytes:
    """Return the bytes `[start, stop)` of the file, fewer past its end."""
    piece = os.pread(fd, stop - start, start) if stop > start else b""
    if not piece or len(piece) == stop - start:
        return piece
    # One call gives at most 2 GiB, and less when a signal comes in between.
    return piece + pread(fd, start + len(piece), stop)


def pread_into(fd: int, start: int, out: memoryview) -> int:
    """Fill `out` from byte `start` on and return how many bytes the file had."""
    filled = 0
    while filled < out.nbytes:
        count = os.preadv(fd, [out[filled:]], start + filled)
        if count == 0:
            break
        filled += count
    return filled


def _is_key_part(name: str) -> bool:
    try:
        check_key(name)
    except FormatError:
        return False
    return True


def walk(folder: str, prefix: str, *, ancestors: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield the keys below `folder`, whose own key is `prefix`; a folder linked into itself is entered once."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as scan:
            entries = [entry for entry in scan if _is_key_part(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return
    children: list[str] = []
    for entry in entries:
        if entry.is_dir():
            children.append(f"{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            children.append(entry.name)
    for child in sorted(children):
        if child.endswith("/"):
            yield from walk(
                os.path.join(folder, child[:-1]), prefix + child, ancestors=ancestors | {identity}
            )
        else:
            yield prefix + child
