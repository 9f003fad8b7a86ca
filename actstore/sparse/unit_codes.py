"""How are some rows of a unit's stored codes read? Only the pages they lie in, each checked (FORMAT.md, section 8.2)."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError
from actstore.log.values import StoredObject
from actstore.sparse.parts import ObjectParts, checked_entry, frozen, promised
from actstore.sparse.rows import SparseRows
from actstore.sparse.unit_format import UnitDirectory, decode_norms, decode_page, parse_directory
from actstore.storage.base import Storage


class UnitCodes:
    """The stored codes of one unit; safe for use from many threads, pickles. Row k is the unit's k-th stored row."""

    def __init__(
        self,
        storage: Storage,
        obj: StoredObject,
        meta: Any,
        *,
        n_rows: int | None = None,
        n_latents: int | None = None,
    ) -> None:
        """Take an object; reads nothing yet.

        Args:
            storage: Where it is.
            obj: As the manifest promises it.
            meta: What `encode_unit` returned with it.
            n_rows: Rows of the unit, as the manifest has them; an object of others is damaged. None if that is not known.
            n_latents: Latents of the dictionary, the same.

        Raises:
            FormatError: `meta` is something else, or of a newer format.
        """
        self.key = obj.key
        self._parts = ObjectParts(storage, obj, checked_entry(obj, meta))
        latents = None if n_latents is None else range(n_latents)
        self._parse = partial(parse_directory, told=promised(obj, meta, n_rows=n_rows, latents=latents))

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self._directory.n_rows

    @property
    def nnz(self) -> int:
        """Number of codes."""
        return self._directory.nnz

    @property
    def n_latents(self) -> int:
        """Latents of the dictionary."""
        return self._directory.n_latents

    def rows(self, offsets: npt.ArrayLike) -> SparseRows:
        """Return the codes of some rows, in the order asked, repeats allowed. Reads the pages that they lie in.

        Raises:
            InvalidInputError: a row that the unit does not have.
            FormatError: the object is missing or damaged.
        """
        wanted = np.asarray(offsets, np.int64).reshape(-1)
        directory = self._directory
        self._check_bounds(int(wanted.min(initial=0)), int(wanted.max(initial=-1)) + 1)
        page = np.searchsorted(directory.first_rows, wanted, side="right") - 1
        numbers = np.flatnonzero(np.bincount(page))
        if not len(numbers):
            return self._none(0)
        found = self._parts.pages(directory.table, numbers.tolist(), self._decode)
        return _take_from(found, np.searchsorted(numbers, page), wanted - directory.first_rows[page])

    def slice(self, start: int, stop: int) -> SparseRows:
        """Return the codes of the rows `[start, stop)`, new memory. Reads the pages that they lie in.

        Raises:
            InvalidInputError: rows that the unit does not have.
            FormatError: the object is missing or damaged.
        """
        self._check_bounds(start, stop)
        if start >= stop:
            return self._none(0)
        firsts = self._directory.first_rows
        low = int(np.searchsorted(firsts, start, side="right")) - 1
        high = int(np.searchsorted(firsts, stop))
        found = self._parts.pages(self._directory.table, range(low, high), self._decode)
        rows = SparseRows.concat(found).slice(start - int(firsts[low]), stop - int(firsts[low]))
        return rows.copy() if len(found) == 1 else rows

    def scan(self) -> Iterator[tuple[int, SparseRows]]:
        """Yield first row and codes of stretches of at most 2,048 rows, in order; arrays are read-only.

        Reads the object once, past the cache of pages. Memory: one stretch, and at most 32 MiB of encoded ones.

        Raises:
            FormatError: the object is missing or damaged.
        """
        directory = self._directory
        for number, rows, _ in self._parts.scan(directory.table, range(directory.n_pages), self._decode):
            yield int(directory.first_rows[number]), rows

    def counts(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Return the latents that fire in the unit, ascending, and in how many rows each. Reads the directory only."""
        return self._directory.latents.copy(), self._directory.counts.copy()

    def norms(self, offsets: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """Return the norms of some rows' activations, of all in order if None.

        Raises:
            InvalidInputError: the unit keeps no norms, or has no such row.
            FormatError: the object is missing or damaged.
        """
        directory = self._directory
        if not directory.has_norms:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"norms were asked for, and the codes in {self.key!r} were stored without: encode again with norms",
            )
        norms = self._parts.page(directory.table, directory.n_pages, self._decode_norms)
        if offsets is None:
            return norms.copy()
        wanted = np.asarray(offsets, np.int64).reshape(-1)
        self._check_bounds(int(wanted.min(initial=0)), int(wanted.max(initial=-1)) + 1)
        return norms[wanted]

    @property
    def _directory(self) -> UnitDirectory:
        return self._parts.directory(self._parse)

    def _none(self, n_rows: int) -> SparseRows:
        return SparseRows.empty(n_rows, self._directory.n_latents, self._directory.value_dtype)

    def _decode(self, number: int, data: bytes) -> tuple[SparseRows, int]:
        rows = decode_page(data, self._directory, number)
        for array in (rows.indptr, rows.latents, rows.values):
            frozen(array)
        return rows, rows.nbytes

    def _decode_norms(self, _: int, data: bytes) -> tuple[npt.NDArray[np.float32], int]:
        norms = decode_norms(data, self._directory)
        return frozen(norms), norms.nbytes

    def _check_bounds(self, start: int, stop: int) -> None:
        if not 0 <= start <= max(start, stop) <= self.n_rows:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"rows from {start} on and before {stop} of {self.key!r} were asked for, it has {self.n_rows}",
            )


def _take_from(
    pages: list[SparseRows], rank: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]
) -> SparseRows:
    """Return rows of several pages: row i of the answer is row `offsets[i]` of page `rank[i]`. Whole pages are not joined."""
    order = np.argsort(rank, kind="stable")
    cuts = np.searchsorted(rank[order], np.arange(len(pages) + 1))
    taken = [
        page.take(offsets[order[low:high]])
        for page, low, high in zip(pages, cuts[:-1], cuts[1:], strict=True)
    ]
    together = SparseRows.concat(taken)
    if np.array_equal(order, np.arange(len(order))):
        return together
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return together.take(back)
