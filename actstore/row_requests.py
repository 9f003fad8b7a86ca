"""Which rows does a caller ask for, and does the answer fit where it shall go? Checks of foreign input."""

import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

Rows: TypeAlias = int | slice | Sequence[int] | npt.NDArray[np.integer[Any]]
"""Row numbers: one, those of a slice that exist, or a list in the order wanted."""


def is_one_row(rows: object) -> bool:
    """Return whether a request is one row number."""
    return not isinstance(rows, bool | np.bool_) and hasattr(rows, "__index__") and np.ndim(rows) == 0  # type: ignore[arg-type]


def as_numbers(values: Any, *, what: str) -> npt.NDArray[np.int64]:
    """Return a flat list of whole numbers as an array.

    Args:
        values: Foreign input.
        what: Name of the argument, for messages.

    Raises:
        InvalidInputError: it is something else.

    >>> as_numbers([3, 1], what="rows")
    array([3, 1])
    """
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if (
        array.ndim != 1
        or array.dtype.kind not in "iu"
        or (array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max)
    ):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{what} must be an int below 2^63, a slice or a flat list of such ints, not an array of shape {array.shape} and "
            f"dtype {array.dtype} (np.flatnonzero turns a boolean mask into one)",
        )
    return array.astype(np.int64, copy=False)


def slice_bounds(rows: slice, *, end: int) -> tuple[int, int, int]:
    """Return start, stop (at most `end`) and step of a slice of rows.

    Raises:
        InvalidInputError: bounds that are no ints or count from the end, or a step below 1.

    >>> slice_bounds(slice(3, None), end=10)
    (3, 10, 1)
    """
    try:
        start = 0 if rows.start is None else operator.index(rows.start)
        stop = end if rows.stop is None else operator.index(rows.stop)
        step = 1 if rows.step is None else operator.index(rows.step)
    except TypeError as error:
        raise InvalidInputError(ErrorKind.BAD_ARGUMENT, f"{rows!r} is no slice of rows: use ints") from error
    if start < 0 or stop < 0 or step < 1:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{rows!r} is no slice of rows: bounds never count from the end, and the step must be positive",
        )
    return start, min(stop, end), step


def fit_answer(
    out: npt.NDArray[Any] | None, shape: tuple[int, int], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """Return `out` if the answer fits into it, new memory if it is None.

    Raises:
        InvalidInputError: `out` has another shape or dtype, or cannot be written row after row.
    """
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"out has shape {out.shape} and dtype {out.dtype}; the answer needs a writable, C-contiguous array of shape "
            f"{shape} and dtype {dtype}",
        )
    return out
