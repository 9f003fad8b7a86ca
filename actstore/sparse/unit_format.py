"""What are the stored bytes of a unit's codes, token-major? (FORMAT.md, section 8.2)

An object is a magic number, pages of a few thousand rows, the rows' norms where they are kept, and the directory. A page
has, each packed (`actstore.sparse.ints`), the number of codes of every row, the gaps between the ascending latents of a row,
and the bits of the values. Positive floats ascend as their bits do, so the bits less the page's smallest are small numbers.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore.codec.crc import crc32c
from actstore.errors import ErrorKind, InvalidInputError
from actstore.sparse.ints import bits_of, damaged_ints, pack_ints, pack_values, unpack_ints, unpack_values
from actstore.sparse.parts import DirectoryRef, PageTable, Promised, page_table
from actstore.sparse.rows import MAX_LATENTS, VALUE_DTYPES, SparseRows, check_n_latents, indptr_of

MAGIC: Final = b"ACTCODE1"

PAGE_ROWS: Final = 2048
PAGE_CODES: Final = 1 << 16
"""A page ends before the row that would give it more of either, unless that is its only row."""

_NORM_SHIFT: Final = 20
"""Norms of one hook point vary by a few powers of two: 12 bits of float32 have something to gain."""

_HEADER: Final = struct.Struct("<QQQIIBB")
"""Rows, codes, latents of the dictionary, pages, latents that fire, bytes of a value, whether there are norms."""

_NORMS: Final = struct.Struct("<II")
"""Bytes of the norms, and their CRC-32C."""

_PAGE_ENTRY: Final = np.dtype([("rows", "<u4"), ("codes", "<u4"), ("nbytes", "<u4"), ("crc", "<u4")])


@dataclass(frozen=True, slots=True, eq=False)
class UnitDirectory:
    """What a unit's directory says."""

    n_rows: int
    nnz: int
    n_latents: int
    value_dtype: str
    first_rows: npt.NDArray[np.int64]
    """Shape (n_pages + 1,): first row of every page, and `n_rows`."""

    n_codes: npt.NDArray[np.int64]
    """Shape (n_pages,)."""

    table: PageTable
    """Of the pages; its last entry is the norms if there are any."""

    has_norms: bool
    latents: npt.NDArray[np.uint32]
    """Those that fire, ascending."""

    counts: npt.NDArray[np.int64]
    """In how many rows each of them does."""

    @property
    def n_pages(self) -> int:
        """Number of pages with codes."""
        return len(self.n_codes)

    @property
    def nbytes(self) -> int:
        """Size in memory, about."""
        return self.latents.nbytes + self.counts.nbytes + 48 * self.n_pages + 512


def encode_unit(
    rows: SparseRows, norms: npt.NDArray[np.float32] | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Return the object of a unit's codes, and what the unit's `meta` must say of it for the object to be read.

    Memory: the object twice, and about 20 bytes for each code of one page.

    Args:
        rows: The codes of the unit's stored rows, in order.
        norms: L2 norm of every row's activation, shape (n_rows,), if they are kept.

    Returns:
        The object, never empty, and `{"format", "nnz", "directory"}`.

    Raises:
        InvalidInputError: `rows.check()` fails, or norms of another shape or dtype, or that are negative or not finite.
    """
    check_n_latents(rows.n_latents)
    rows.check()
    firsts = _page_starts(rows.indptr)
    parts = [encode_page(rows.slice(start, stop)) for start, stop in pairwise(firsts.tolist())]
    pages = np.empty(len(parts), _PAGE_ENTRY)
    pages["rows"], pages["codes"] = np.diff(firsts), np.diff(rows.indptr[firsts])
    pages["nbytes"], pages["crc"] = [len(part) for part in parts], [crc32c(part) for part in parts]
    latents, counts = _count(rows)
    has_norms = norms is not None
    header = (
        rows.n_rows,
        rows.nnz,
        rows.n_latents,
        len(parts),
        len(latents),
        rows.values.itemsize,
        has_norms,
    )
    directory = [_HEADER.pack(*header), pages.tobytes()]
    if norms is not None:
        _check_norms(norms, rows.n_rows)
        parts.append(pack_ints(norms.astype("<f4").view("<u4"), _NORM_SHIFT))
        directory.append(_NORMS.pack(len(parts[-1]), crc32c(parts[-1])))
    directory += [pack_ints(_gaps(latents)), pack_ints((counts - 1).astype(np.uint64))]
    tail = b"".join(directory)
    body = b"".join([MAGIC, *parts])
    ref = DirectoryRef.of(tail, len(body))
    return body + tail, {"format": 1, "nnz": rows.nnz, "directory": ref.to_json()}


def parse_directory(data: bytes, *, told: Promised) -> tuple[UnitDirectory, int]:
    """Return what a directory says, and its size in memory, which what the manifest told bounds.

    Raises:
        FormatError: it says nothing that `encode_unit` writes; without the name of the object.
    """
    try:
        n_rows, nnz, n_latents, n_pages, n_firing, value_bytes, has_norms = _HEADER.unpack_from(data)
        pages = np.frombuffer(data, _PAGE_ENTRY, n_pages, _HEADER.size)
        offset = _HEADER.size + pages.nbytes
        is_known = told.n_rows in (None, n_rows) and told.latents in (None, range(n_latents))
        if nnz != told.nnz or not is_known or not 0 < n_latents <= MAX_LATENTS:
            raise damaged_ints(
                f"{nnz} codes of {n_rows} rows and {n_latents} latents; the manifest has {told}"
            )
        if n_firing > min(nnz, n_latents):
            raise damaged_ints(f"{n_firing} latents fire, with {nnz} codes of {n_latents} latents")
        nbytes, crcs = pages["nbytes"].astype(np.int64), pages["crc"].astype(np.uint32)
        if has_norms:
            norms_nbytes, norms_crc = _NORMS.unpack_from(data, offset)
            offset += _NORMS.size
            nbytes, crcs = np.append(nbytes, norms_nbytes), np.append(crcs, np.uint32(norms_crc))
        gaps, offset = unpack_ints(data, n_firing, np.uint32, offset)
        counts, _ = unpack_ints(data, n_firing, np.uint64, offset)
        dtype = {kind.itemsize: name for name, kind in VALUE_DTYPES.items()}[value_bytes]
    except (struct.error, ValueError, KeyError) as error:
        raise damaged_ints(f"the directory is not one of codes ({error!r})") from error
    first_rows = indptr_of(pages["rows"].astype(np.int64))
    n_codes = pages["codes"].astype(np.int64)
    if first_rows[-1] != n_rows or n_codes.sum() != nnz:
        raise damaged_ints(f"pages of {first_rows[-1]} rows where there should be {n_rows}")
    latents = np.cumsum(gaps, dtype=np.uint64)
    if n_firing and (not gaps[1:].all() or int(latents[-1]) >= n_latents):
        raise damaged_ints(
            f"latents that fire do not ascend, or latent {latents[-1]} where there are {n_latents}"
        )
    if (n_firing and int(counts.max()) >= n_rows) or int(counts.sum()) + n_firing != nnz:
        raise damaged_ints(f"its latents do not fire {nnz} times on {n_rows} rows")
    table = page_table(nbytes, crcs, len(MAGIC))
    if table.offsets[-1] != told.pages_end:
        raise damaged_ints(
            f"its pages end at byte {table.offsets[-1]}, its directory begins at {told.pages_end}"
        )
    directory = UnitDirectory(
        n_rows=n_rows,
        nnz=nnz,
        n_latents=n_latents,
        value_dtype=dtype,
        first_rows=first_rows,
        n_codes=n_codes,
        table=table,
        has_norms=bool(has_norms),
        latents=latents.astype(np.uint32),
        counts=counts.astype(np.int64) + 1,
    )
    return directory, directory.nbytes


def encode_page(rows: SparseRows) -> bytes:
    """Return the bytes of one page."""
    counts = rows.counts
    parts = [pack_ints(counts.astype(np.uint32))]
    if rows.nnz:
        gaps = rows.latents.copy()
        gaps[1:] -= rows.latents[:-1] + np.uint32(1)
        firsts = rows.indptr[:-1][counts > 0]
        gaps[firsts] = rows.latents[firsts]
        most = bits_of(rows.values).max()
        parts += [pack_ints(gaps), int(most).to_bytes(4, "little"), pack_values(rows.values, most)]
    return b"".join(parts)


def decode_page(data: bytes, directory: UnitDirectory, number: int) -> SparseRows:
    """Return the rows of a page.

    Raises:
        FormatError: the bytes are none that `encode_page` writes; without the name of the object.
    """
    n_rows = int(directory.first_rows[number + 1] - directory.first_rows[number])
    nnz = int(directory.n_codes[number])
    counts, offset = unpack_ints(data, n_rows, np.uint32)
    indptr = indptr_of(counts.astype(np.int64))
    if indptr[-1] != nnz:
        raise damaged_ints(f"rows have {indptr[-1]} codes, and the page should have {nnz}")
    if not nnz:
        return SparseRows.empty(n_rows, directory.n_latents, directory.value_dtype)
    gaps, offset = unpack_ints(data, nnz, np.uint32, offset)
    value_dtype = VALUE_DTYPES[directory.value_dtype]
    most = int.from_bytes(data[offset : offset + 4], "little")
    values, _ = unpack_values(data, most, nnz, value_dtype, offset + 4)
    # Sums modulo 2^32 over the whole page: a latent is a difference of two of them, and below 2^32.
    gaps += np.uint32(1)
    sums = np.cumsum(gaps, dtype=np.uint32)
    some = counts > 0
    starts = indptr[:-1][some]
    before = sums[starts - 1]
    before[0] = 0
    sums -= np.repeat(before + np.uint32(1), counts[some])
    if int(sums.max()) >= directory.n_latents:
        raise damaged_ints(f"latent {int(sums.max())} where there are {directory.n_latents}")
    return SparseRows(indptr, sums, values, directory.n_latents)


def decode_norms(data: bytes, directory: UnitDirectory) -> npt.NDArray[np.float32]:
    """Return the norms of a unit's rows.

    Raises:
        FormatError: the bytes are none that `encode_unit` writes; without the name of the object.
    """
    bits, _ = unpack_ints(data, directory.n_rows, "<u4")
    return bits.view(np.float32)


def _gaps(ascending: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    gaps = ascending.copy()
    gaps[1:] -= ascending[:-1]
    return gaps


def _page_starts(indptr: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    n_rows, firsts = len(indptr) - 1, [0]
    while firsts[-1] < n_rows:
        first = firsts[-1]
        stop = int(np.searchsorted(indptr, indptr[first] + PAGE_CODES, side="right")) - 1
        firsts.append(max(first + 1, min(stop, first + PAGE_ROWS, n_rows)))
    return np.array(firsts, np.int64)


def _count(rows: SparseRows) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    if rows.n_latents <= max(1 << 20, 4 * rows.nnz):
        counts = np.bincount(rows.latents, minlength=1).astype(np.int64)
        latents = np.flatnonzero(counts).astype(np.uint32)
        return latents, counts[latents]
    latents, found = np.unique(rows.latents, return_counts=True)
    return latents, found.astype(np.int64)


def _check_norms(norms: npt.NDArray[np.float32], n_rows: int) -> None:
    if norms.dtype != np.float32 or norms.shape != (n_rows,):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"norms must be float32 of shape ({n_rows},), got {norms.dtype} of shape {norms.shape}",
        )
    if n_rows and not (norms.min() >= 0 and np.isfinite(norms.max())):
        raise InvalidInputError(
            ErrorKind.NON_FINITE, f"norms are finite and not negative, found {norms.min()} to {norms.max()}"
        )
