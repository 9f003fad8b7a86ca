"""How do postings in memory become a stored segment? (FORMAT.md, section 8.3)

`encode_grouped` takes them latent by latent, as a job that also computes their statistics has them; `encode_segment` in any
order; `encode_blocks` in the stored order, a part at a time, so that a latent need not be in memory. All give the same bytes.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore.checks import check_whole
from actstore.codec.crc import crc32c
from actstore.errors import ErrorKind, InvalidInputError
from actstore.sparse.ints import bits_of
from actstore.sparse.order import group_postings, stable_order
from actstore.sparse.parts import DirectoryRef
from actstore.sparse.rows import MAX_LATENTS, VALUE_DTYPES, Values, are_codes, indptr_of
from actstore.sparse.segment_format import (
    BLOCK_POSTINGS,
    MAGIC,
    PAGE_POSTINGS,
    block_counts_of,
    density_order,
    encode_directory,
    encode_page,
)

Int64s = npt.NDArray[np.int64]
Part = tuple[Int64s, npt.NDArray[Any]]
"""Rows of some postings, and the bits of their values."""

_MAX_ROW: Final = 1 << 62
_BATCH_POSTINGS: Final = 1 << 17
"""Postings of small latents that are brought into their order together."""


def encode_segment(
    first_latent: int,
    n_latents: int,
    latents: npt.NDArray[np.integer[Any]],
    rows: npt.NDArray[np.integer[Any]],
    values: Values,
) -> tuple[bytes, dict[str, Any]]:
    """Return the object of the postings of latents `[first_latent, first_latent + n_latents)`, and what `meta` must say of it.

    The order in which postings are given does not matter; fastest if rows ascend.
    Memory: 12 bytes for each posting beside the arguments (30 if rows do not ascend), and what `encode_grouped` needs.

    Args:
        first_latent: First latent of the segment.
        n_latents: Its number of latents; some may have no posting.
        latents: Latent of every posting.
        rows: Its row number, not negative; a latent has a row at most once.
        values: Its value, float16 or float32, finite and positive.

    Returns:
        The object, never empty, and `{"format", "nnz", "directory"}`.

    Raises:
        InvalidInputError: arrays that are not as above.
    """
    check_whole(n_latents, what="n_latents", least=1, most=MAX_LATENTS - first_latent)
    if len({latents.shape, rows.shape, values.shape}) > 1 or latents.ndim != 1:
        shapes = latents.shape, rows.shape, values.shape
        raise _bad(f"latents, rows and values must be flat and equally long, got shapes {shapes}")
    if latents.dtype.kind not in "iu" or rows.dtype.kind not in "iu":
        raise _bad(f"latents and rows must be whole numbers, got {latents.dtype} and {rows.dtype}")
    if len(latents) and not first_latent <= latents.min() <= latents.max() < first_latent + n_latents:
        found, stop = f"latents from {latents.min()} to {latents.max()}", first_latent + n_latents
        raise _bad(f"{found} are not in [{first_latent}, {stop})")
    grouped = group_postings(latents - latents.dtype.type(first_latent), rows, values, n_latents)
    return encode_grouped(first_latent, *grouped)


def encode_grouped(
    first_latent: int, indptr: Int64s, rows: Int64s, values: Values
) -> tuple[bytes, dict[str, Any]]:
    """Return what `encode_segment` returns, of postings that are given latent by latent, each one's rows ascending.

    Memory: the object twice, a few MiB, and about 40 bytes for each posting of the latent that has most.

    Args:
        first_latent: First latent of the segment.
        indptr: Shape (n_latents + 1,): the postings of latent `first_latent + i` are `[indptr[i], indptr[i + 1])`.
        rows: Row number of every posting, int64, not negative.
        values: Its value, float16 or float32, finite and positive.

    Raises:
        InvalidInputError: arrays that are not as above.

    >>> from actstore.sparse import encode_segment
    >>> rows, values = np.array([3, 8, 1]), np.array([1, 4, 2], np.float16)
    >>> grouped = encode_grouped(5, np.array([0, 2, 2, 3]), rows, values)
    >>> grouped == encode_segment(5, 3, np.array([5, 5, 7]), rows, values)
    True
    """
    check_postings(indptr, rows, values)
    counts = np.diff(indptr)
    ordered = _ordered(density_order(counts), indptr, rows, bits_of(values))
    parts, meta = encode_blocks(first_latent, counts, ordered, values.dtype)
    return b"".join(parts), meta


def encode_blocks(
    first_latent: int, counts: Int64s, ordered: Iterable[Part], value_dtype: np.dtype[Any]
) -> tuple[list[bytes], dict[str, Any]]:
    """Return the object as pieces that follow each other, and what `encode_segment` returns with it.

    Memory: the object, one part, and a few MiB.

    Args:
        first_latent: First latent of the segment.
        counts: Postings of every latent.
        ordered: Rows and bits of the values of all postings in the stored order: latents in `density_order`, of each the blocks
            by descending value, in a block by row. However it is cut into parts; `check_postings` holds of them.
        value_dtype: Of the values.
    """
    check_whole(first_latent, what="first_latent", least=0, most=MAX_LATENTS)
    parts, entries = [MAGIC], []
    low, high = [np.empty(0, np.uint32)], [np.empty(0, np.uint32)]
    for page_rows, bits, starts in _pages(counts, iter(ordered), bits_dtype=f"<u{value_dtype.itemsize}"):
        part, block_low, block_high = encode_page(page_rows, bits, starts)
        entries.append((len(starts), len(part), crc32c(part)))
        parts.append(part)
        low.append(block_low)
        high.append(block_high)
    n_postings = int(counts.sum())
    header = (first_latent, len(counts), n_postings, value_dtype.itemsize)
    tail = encode_directory(header, entries, counts, np.concatenate(low), np.concatenate(high))
    ref = DirectoryRef.of(tail, sum(map(len, parts)))
    return [*parts, tail], {"format": 1, "nnz": n_postings, "directory": ref.to_json()}


def _pages(
    counts: Int64s, stream: Iterator[Part], *, bits_dtype: str
) -> Iterator[tuple[Int64s, npt.NDArray[Any], Int64s]]:
    """Yield rows, bits and starts of blocks of every page: as many whole blocks as fit."""
    starts = indptr_of(block_counts_of(counts[density_order(counts)]))
    held_rows, held_bits = np.empty(0, np.int64), np.empty(0, bits_dtype)
    first = 0
    while first < len(starts) - 1:
        stop = max(first + 1, int(np.searchsorted(starts, starts[first] + PAGE_POSTINGS, side="right")) - 1)
        size = int(starts[stop] - starts[first])
        while len(held_rows) < size:
            more_rows, more_bits = next(stream)
            held_rows, held_bits = np.append(held_rows, more_rows), np.append(held_bits, more_bits)
        yield held_rows[:size], held_bits[:size], starts[first:stop] - starts[first]
        held_rows, held_bits = held_rows[size:], held_bits[size:]
        first = stop


def _ordered(order: Int64s, indptr: Int64s, rows: Int64s, bits: npt.NDArray[Any]) -> Iterator[Part]:
    """Yield rows and bits of all postings block by block: a latent with several blocks alone, others some together."""
    counts = np.diff(indptr)[order]
    n_large = int(np.searchsorted(-counts, -BLOCK_POSTINGS, side="left"))
    for latent in order[:n_large].tolist():
        yield _in_blocks(rows[indptr[latent] : indptr[latent + 1]], bits[indptr[latent] : indptr[latent + 1]])
    first, ends = n_large, np.cumsum(counts)
    n_firing = int(np.searchsorted(-counts, 0, side="left"))
    while first < n_firing:
        before = int(ends[first] - counts[first])
        stop = max(first + 1, int(np.searchsorted(ends, before + _BATCH_POSTINGS, side="right")))
        stop = min(stop, n_firing)
        lengths = counts[first:stop]
        shift = indptr[order[first:stop]] - (ends[first:stop] - lengths - before)
        places = np.repeat(shift, lengths)
        places += np.arange(len(places))
        yield rows[places], bits[places]
        first = stop


def _in_blocks(rows: Int64s, bits: npt.NDArray[Any]) -> Part:
    """Return one latent's postings, given by ascending row, block by block."""
    by_value = stable_order(np.iinfo(bits.dtype).max - bits)
    block = np.empty(len(rows), np.uint32)
    block[by_value] = np.arange(len(rows), dtype=np.uint32) // BLOCK_POSTINGS
    order = stable_order(block)
    return rows[order], bits[order]


def check_postings(indptr: Int64s, rows: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
    """Raise unless postings are what `encode_grouped` takes.

    Raises:
        InvalidInputError: they are not; the message says where.
    """
    if values.dtype not in VALUE_DTYPES.values() or rows.dtype != np.int64 or rows.shape != values.shape:
        found = f"{rows.dtype} {rows.shape} and {values.dtype} {values.shape}"
        raise _bad(f"rows and values must be int64 and float16 or float32, and equally long, got {found}")
    if len(indptr) < 2 or indptr[0] != 0 or (np.diff(indptr) < 0).any() or indptr[-1] != len(rows):
        raise _bad(f"indptr does not cut {len(rows)} postings into those of {len(indptr) - 1} latents")
    if not len(rows):
        return
    steps_back = rows[1:] <= rows[:-1]
    starts = indptr[1:-1]
    steps_back[starts[(starts > 0) & (starts < len(rows))] - 1] = False
    if steps_back.any():
        place = int(steps_back.argmax()) + 1
        latent = int(np.searchsorted(indptr, place, side="right")) - 1
        raise _bad(
            f"row {rows[place]} follows row {rows[place - 1]} in the {latent + 1}th latent: rows ascend, each once"
        )
    if not 0 <= rows.min() <= rows.max() < _MAX_ROW:
        raise _bad(f"rows from {rows.min()} to {rows.max()} are not in [0, 2^62)")
    if not are_codes(values):
        raise InvalidInputError(
            ErrorKind.NON_FINITE,
            f"postings have finite and positive values, found {values.min()} to {values.max()}: leave out zeros",
        )


def _bad(message: str) -> InvalidInputError:
    return InvalidInputError(ErrorKind.BAD_ARGUMENT, f"postings cannot be stored: {message}")
