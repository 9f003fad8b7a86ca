"""Which arguments of the read and write operations are sound, and how is a long read cut into requests?

Pure functions shared by all storages, so that each refuses the same things with the same words.
"""

from collections.abc import Sequence

from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.names import check_key
from actstore.storage.base import Buffer


def check_ranges(key: str, ranges: Sequence[tuple[int, int]]) -> None:
    """Raise unless every range is half-open and not reversed.

    Raises:
        InvalidInputError: a range that is negative or ends before it starts.
    """
    for start, stop in ranges:
        if not 0 <= start <= stop:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"range [{start}, {stop}) of object {key!r} is not 0 <= start <= stop"
            )


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is empty or a folder of keys ending in `/`.

    Raises:
        InvalidInputError: anything else, because `runs/a` would also find `runs/ab/...`.

    >>> check_prefix("runs/a/")
    'runs/a/'
    """
    if prefix:
        try:
            check_key(prefix.removesuffix("/"))
        except FormatError:
            prefix_is_key = False
        else:
            prefix_is_key = prefix.endswith("/")
        if not prefix_is_key:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"cannot list {prefix!r}: give '' or a folder of keys that ends in '/'",
            )
    return prefix


def as_views(key: str, data: Sequence[Buffer]) -> tuple[list[memoryview], int]:
    """Return the non-empty buffers of `data` as byte views, without copying, and their total length in bytes.

    Raises:
        InvalidInputError: no byte at all. Some object stores create an empty object even where one exists.
    """
    views: list[memoryview] = []
    for buffer in data:
        view = memoryview(buffer)
        if view.nbytes:
            views.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
    nbytes = sum(view.nbytes for view in views)
    if nbytes == 0:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"cannot write object {key!r}: it is empty, and stored objects have at least one byte",
        )
    return views, nbytes


def as_writable(key: str, out: memoryview) -> memoryview:
    """Return `out` as a writable view of bytes, without copying.

    Raises:
        InvalidInputError: `out` is read-only or not contiguous.
    """
    if out.readonly or not out.c_contiguous:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"cannot read object {key!r} into memory that is read-only or not contiguous",
        )
    return out if out.format == "B" and out.ndim == 1 else out.cast("B")


def split_range(start: int, stop: int, *, step: int) -> list[tuple[int, int]]:
    """Return `[start, stop)` cut into ranges of at most `step` bytes.

    >>> split_range(5, 12, step=4)
    [(5, 9), (9, 12)]
    """
    return [(cut, min(cut + step, stop)) for cut in range(start, stop, step)]
