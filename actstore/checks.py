"""Is an argument the whole number that it must be? Checked where it enters, so that the error names the argument."""

import operator
from typing import Any

import numpy as np

from actstore.errors import ErrorKind, InvalidInputError

MAX_BYTES = 1 << 50
"""Largest limit on memory or on an answer: more than any machine has, and small enough for every library below."""


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number, Python's or numpy's; booleans and arrays do not count.

    >>> is_whole(3), is_whole(3.0), is_whole(True)
    (True, False, False)
    """
    if isinstance(value, (bool, np.bool_)):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return getattr(value, "ndim", 0) == 0


def check_whole(value: Any, *, what: str, least: int, most: int | None = None) -> int:
    """Return `value` as an int if it is a whole number from `least` to `most`, both included.

    Raises:
        InvalidInputError: it is something else; the message says what was given.

    >>> check_whole(4096, what="batch_rows", least=1)
    4096
    """
    if is_whole(value) and least <= value and (most is None or value <= most):
        return operator.index(value)
    bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
    raise InvalidInputError(
        ErrorKind.BAD_ARGUMENT, f"{what} must be a whole number {bounds}, got {value!r:.80}"
    )
