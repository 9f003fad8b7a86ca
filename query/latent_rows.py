"""On which rows does a latent fire, and how strongly? From its postings, or from all codes where there are none yet."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.codes import Codes
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.postings import Postings

Int64s: TypeAlias = npt.NDArray[np.int64]
Values: TypeAlias = npt.NDArray[np.floating[Any]]

_BYTES_PER_POSTING = 48
"""Of a list in memory: rows and values as read, their order, and a copy of each."""

_SCAN_ROWS = 65_536


@dataclass(slots=True)
class LatentRows:
    """The rows on which some latents of one dictionary fire. Without postings, all codes are read once, at the start."""

    codes: Codes
    postings: Postings | None
    memory_bytes: int
    scanned: dict[int, tuple[Int64s, Values]] = field(default_factory=dict)

    @property
    def most_rows(self) -> int:
        """Rows of one latent that half of `memory_bytes` can hold."""
        return self.memory_bytes // 2 // _BYTES_PER_POSTING

    def count(self, latent: int) -> int:
        """Return on how many rows a latent fires."""
        if self.postings is None:
            return len(self.scanned[latent][0])
        return int(self.postings.count(latent))

    def whole(self, latent: int) -> tuple[Int64s, Values]:
        """Return all rows on which a latent fires, ascending, and its values there.

        Raises:
            InvalidInputError: (TOO_LARGE) they take more than half of `memory_bytes`.
        """
        if self.postings is None:
            return self.scanned[latent]
        _check_room(self.count(latent), self.memory_bytes, latent)
        rows, values = self.postings.latent(latent)
        return rows, values

    def ranked(self, latent: int) -> tuple[Int64s, Values]:
        """Return all rows on which a latent fires, the strongest first, equal values by row, and its values there.

        Of a latent that fires on many rows this is several times faster than `whole`: values are sorted in linear time.

        Raises:
            InvalidInputError: (TOO_LARGE) they take more than half of `memory_bytes`.
        """
        if self.postings is not None:
            _check_room(self.count(latent), self.memory_bytes, latent)
        return self.best(latent, self.count(latent))

    def nbytes(self, latent: int) -> int:
        """Return about how many stored bytes a latent's rows take."""
        if self.postings is None:
            return self.codes.collection.nbytes // max(1, len(self.scanned))
        return self.postings.collection.nbytes * self.count(latent) // max(1, self.postings.n_postings)

    def best(self, latent: int, n: int) -> tuple[Int64s, Values]:
        """Return the `n` rows of largest value, fewer where it fires on fewer; equal values by row."""
        if self.postings is not None:
            rows, values = self.postings.top(latent, n)
            return rows, values
        rows, values = self.scanned[latent]
        order = value_order(values)[:n]
        return rows[order], values[order]


def open_latent_rows(codes: Codes, latents: Sequence[int], *, memory_bytes: int) -> LatentRows:
    """Return the rows of some latents: their postings where they are built, otherwise those that a scan of all codes finds.

    Raises:
        InvalidInputError: (TOO_LARGE) without postings, and the latents' rows take more than half of `memory_bytes`.
        FormatError: an object is missing or damaged.
    """
    try:
        return LatentRows(codes, codes.postings(), memory_bytes)
    except (NotFoundError, InvalidInputError):
        return LatentRows(codes, None, memory_bytes, _scan(codes, latents, memory_bytes))


def value_order(values: Values) -> Int64s:
    """Return the order of values, above 0, from the largest; equal ones keep theirs.

    >>> value_order(np.array([1, 3, 1, 2], np.float16)).tolist()
    [1, 3, 0, 2]
    """
    # The bits of positive floats ascend with them, and 16-bit integers are sorted in linear time.
    bits = values.view(f"u{values.dtype.itemsize}")
    order: Int64s = np.argsort(np.iinfo(bits.dtype).max - bits, kind="stable")
    return order


def values_at(rows: Int64s, values: Values, wanted: Int64s) -> npt.NDArray[np.float64]:
    """Return a latent's value on every wanted row, 0 where it does not fire; `rows` ascend."""
    found = np.zeros(len(wanted))
    if len(rows):
        places = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
        there = rows[places] == wanted
        found[there] = values[places[there]]
    return found


def values_among(rows: Int64s, values: Values, wanted: Int64s) -> npt.NDArray[np.float64]:
    """Return what `values_at` does, of rows in any order, for few wanted ones.

    >>> values_among(np.array([70, 3, 5]), np.array([4, 2, 1], np.float16), np.array([5, 4, 70, 5])).tolist()
    [1.0, 0.0, 4.0, 1.0]
    """
    # Nearly all rows drop out by their lowest 16 bits; only the others are put in order.
    is_near = np.zeros(1 << 16, np.bool_)
    is_near[wanted.astype(np.uint16)] = True
    near = np.flatnonzero(is_near[rows.astype(np.uint16)])
    near = near[np.argsort(rows[near], kind="stable")]
    return values_at(rows[near], values[near], wanted)


def _scan(codes: Codes, latents: Sequence[int], memory_bytes: int) -> dict[int, tuple[Int64s, Values]]:
    wanted = np.unique(np.asarray(latents, np.int64))
    is_wanted = np.zeros(codes.n_latents, np.bool_)
    is_wanted[wanted] = True
    pieces: list[tuple[Int64s, npt.NDArray[np.uint32], Values]] = []
    n_found = 0
    for rows, found in codes.scan(_SCAN_ROWS):
        places = np.flatnonzero(is_wanted[found.latents])
        row_of = np.searchsorted(found.indptr, places, side="right") - 1
        pieces.append((rows[row_of], found.latents[places], found.values[places]))
        n_found += len(places)
        _check_room(n_found, memory_bytes, None)
    if not pieces:
        none = np.empty(0, np.int64), np.empty(0, codes.value_dtype)
        return dict.fromkeys(wanted.tolist(), none)
    rows, numbers, values = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.argsort(numbers, kind="stable")  # rows keep ascending within a latent
    cuts = np.searchsorted(numbers[order], np.append(wanted, codes.n_latents))
    parts = [order[low:high] for low, high in itertools.pairwise(cuts.tolist())]
    return {latent: (rows[part], values[part]) for latent, part in zip(wanted.tolist(), parts, strict=True)}


def _check_room(n_rows: int, memory_bytes: int, latent: int | None) -> None:
    if n_rows * _BYTES_PER_POSTING > memory_bytes // 2:
        which = "the latents fire" if latent is None else f"latent {latent} fires"
        raise InvalidInputError(
            ErrorKind.TOO_LARGE,
            f"{which} on {n_rows} rows or more, which must be in memory at once and do not fit memory_bytes={memory_bytes}: "
            f"give at least {2 * n_rows * _BYTES_PER_POSTING}"
            + (
                ", or build postings: actstore sae encode"
                if latent is None
                else ", or ask for bands.top(n) alone"
            ),
        )
