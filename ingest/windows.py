"""How is a document cut into the model's windows, and how are windows packed into units?

Pure plans over token counts; FORMAT.md, section 7, has the rules. A document's token sequence is `prefix` special tokens, its
body, `suffix` special tokens. A sequence no longer than the window is one window. A longer one is cut by its body, every
window with its own prefix and suffix, as the model expects its input. Windows are packed into units in order, each unit
taking windows as long as they fit: no window spans two units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

Ints = npt.NDArray[Any]

MIN_ROWS_PER_UNIT = 2_048
"""A shard of fewer rows is a small object that costs more requests than bytes."""

MAX_ROWS_PER_UNIT = 65_536
"""With d_model 768 in float16 a shard of this many rows is 96 MiB."""

_UNITS_WANTED = 64
_BYTES_PER_TOKEN = 4
"""Of English text under the usual vocabularies; it only sizes units."""


def check_window(*, window: int, overlap: int, prefix: int, suffix: int) -> None:
    """Check that windows advance.

    Raises:
        InvalidInputError: a window with no room for text, or an overlap as large as that room.
    """
    room = window - prefix - suffix
    if room < 1:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"window={window} has no room for text: the tokenizer adds {prefix + suffix} special tokens to each window; use at "
            f"least {prefix + suffix + 1}",
        )
    if not 0 <= overlap < room:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"overlap={overlap} must be at least 0 and less than the {room} text tokens that window={window} holds",
        )


def plan_windows(
    n_body: int, *, prefix: int, suffix: int, window: int, overlap: int
) -> list[tuple[int, int]]:
    """Return the body range `[start, stop)` of each window of one document.

    A document without any token, special ones included, has no window.

    >>> plan_windows(5, prefix=1, suffix=1, window=7, overlap=0)
    [(0, 5)]
    >>> plan_windows(6, prefix=1, suffix=1, window=6, overlap=1)
    [(0, 4), (3, 6)]
    >>> plan_windows(0, prefix=0, suffix=0, window=6, overlap=0)
    []
    """
    if prefix + n_body + suffix == 0:
        return []
    room = window - prefix - suffix
    if n_body <= room:
        return [(0, n_body)]
    step = room - overlap
    n_windows = 1 + -(-(n_body - room) // step)
    return [(k * step, min(k * step + room, n_body)) for k in range(n_windows)]


def pack_units(lengths: Sequence[int], rows_per_unit: int, *, filled: int = 0) -> list[tuple[int, int]]:
    """Return the ranges `[start, stop)` of windows that go into consecutive units.

    Args:
        lengths: Rows of each window, none more than `rows_per_unit`.
        rows_per_unit: Room of a unit.
        filled: Rows that the first unit holds already; its range is the first, and may be empty.

    >>> pack_units([3, 3, 3], 6)
    [(0, 2), (2, 3)]
    >>> pack_units([3, 3], 6, filled=4)
    [(0, 0), (0, 2)]
    """
    ranges = []
    start, rows = 0, filled
    for i, length in enumerate(lengths):
        if rows + length > rows_per_unit:
            ranges.append((start, i))
            start, rows = i, 0
        rows += length
    ranges.append((start, len(lengths)))
    return ranges


def auto_rows_per_unit(text_bytes: int, *, window: int) -> int:
    """Return a power of two that gives a corpus about 64 units, within what makes good shards and holds a window.

    >>> auto_rows_per_unit(1_000, window=1024), auto_rows_per_unit(10**12, window=1024)
    (2048, 65536)
    """
    rows = max(1, text_bytes // _BYTES_PER_TOKEN // _UNITS_WANTED)
    rows = min(max(_power_of_two(rows), MIN_ROWS_PER_UNIT), MAX_ROWS_PER_UNIT)
    return max(rows, _power_of_two(window))


def _power_of_two(n: int) -> int:
    """Return the least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True, slots=True)
class WindowRows:
    """The rows of consecutive windows, as where each row's values are found."""

    source: Ints
    """Index of each row's token in the flat arrays of the encoded documents, shape (n_rows,)."""

    position: Ints
    """Position in the document's whole token sequence, shape (n_rows,)."""

    window_position: Ints
    """Index in the window, shape (n_rows,)."""

    anchor: Ints
    """Flat index of the body token that a special token leans on, the row's own otherwise, shape (n_rows,)."""

    is_template: npt.NDArray[np.bool_]
    """Whether the row is a special token around the text, shape (n_rows,)."""

    after_anchor: npt.NDArray[np.bool_]
    """Whether a special token stands behind its anchor, shape (n_rows,)."""

    lengths: Ints
    """Rows of each window, shape (n_windows,)."""


def plan_rows(
    starts: Ints, stops: Ints, doc_offset: Ints, doc_body: Ints, *, prefix: int, suffix: int
) -> WindowRows:
    """Return where the rows of windows come from.

    Args:
        starts: First body token of each window, shape (n_windows,).
        stops: End of each window's body range.
        doc_offset: Where the flat arrays hold the window's document, special tokens included.
        doc_body: Body tokens of the window's document.
        prefix: Special tokens before the body.
        suffix: Special tokens behind it.
    """
    lengths = prefix + (stops - starts) + suffix
    w = np.repeat(np.arange(len(lengths)), lengths)
    at = np.arange(len(w)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    start, stop, body = starts[w], stops[w], doc_body[w]
    from_end = at - (prefix + stop - start)
    is_prefix, is_suffix = at < prefix, from_end >= 0
    in_doc = np.where(is_prefix, at, np.where(is_suffix, prefix + body + from_end, at + start))
    # A special token at a cut inside the document stands at its neighbour's position; the outer ones have their own.
    position = np.where(is_prefix & (start > 0), prefix + start, in_doc)
    position = np.where(is_suffix & (stop < body), prefix + stop - 1, position)
    empty = stop == start
    anchor = np.where(is_prefix, prefix + start, np.where(is_suffix, prefix + stop - 1, in_doc))
    anchor = np.where(empty, in_doc, anchor)
    offset = doc_offset[w]
    return WindowRows(
        source=offset + in_doc,
        position=position,
        window_position=at,
        anchor=offset + anchor,
        is_template=is_prefix | is_suffix,
        after_anchor=is_suffix,
        lengths=lengths,
    )
