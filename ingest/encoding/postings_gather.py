"""How do the codes of all rows become the postings of some latents, in memory that their number alone decides?

How often each latent fires is known before, so every posting's place is: pages of codes are read in the order of rows, each
is sorted by latent, and its postings go where those of the pages before end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, FormatError
from actstore.sparse.rows import VALUE_DTYPES, SparseRows

from .latent_stats import RangePostings

if TYPE_CHECKING:
    from actstore.codes import Codes

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class UnitTokens:
    """What is known of the rows of one unit that have codes, in order."""

    rows: Int64s
    """Their row numbers."""
    token_ids: npt.NDArray[np.int32]
    doc_ids: Int64s
    """Never decreasing, from unit to unit too."""


class PostingsGatherer:
    """Takes the codes of all rows, in order, and keeps those of the latents `[start, stop)`."""

    def __init__(self, start: int, counts: Int64s, dtype: np.dtype[Any]) -> None:
        """Take room for everything.

        Args:
            start: First latent.
            counts: How often each latent of the range fires in all rows together, exactly.
            dtype: Of the values.
        """
        self._start, self._n = start, len(counts)
        self._indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        n_postings = int(self._indptr[-1])
        self._rows = np.empty(n_postings, np.int64)
        self._values = np.empty(n_postings, dtype)
        self._token_ids = np.empty(n_postings, np.int32)
        self._next = self._indptr[:-1].copy()
        self._n_docs = np.zeros(self._n, np.int64)
        self._last_doc = np.full(self._n, -1, np.int64)

    def add(self, page: SparseRows, first: int, tokens: UnitTokens) -> None:
        """Take the codes of some rows that follow all rows before.

        Args:
            page: The codes.
            first: Which of the unit's rows with codes the first one is.
            tokens: Of the unit.

        Raises:
            FormatError: a latent fires more often than was said.
        """
        offsets = np.repeat(np.arange(first, first + page.n_rows, dtype=np.int32), page.counts)
        latents, values = page.latents, page.values
        if self._n < page.n_latents:
            inside = np.flatnonzero((latents >= self._start) & (latents < self._start + self._n))
            offsets, latents, values = offsets[inside], latents[inside], values[inside]
        if not len(latents):
            return
        local, order = sort_by_latent(latents - np.uint32(self._start), self._n)
        offsets, values = offsets[order], values[order]
        begins = np.flatnonzero(np.concatenate([[True], local[1:] != local[:-1]]))
        lengths = np.diff(begins, append=len(local))
        owners = local[begins]
        ends = self._next[owners] + lengths
        if (ends > self._indptr[owners + 1]).any():
            raise self._miscounted()
        places = np.arange(len(local)) + np.repeat(self._next[owners] - begins, lengths)
        self._next[owners] = ends
        self._rows[places] = tokens.rows[offsets]
        self._values[places] = values
        self._token_ids[places] = tokens.token_ids[offsets]
        self._count_documents(tokens.doc_ids[offsets], begins, owners)

    def finish(self) -> RangePostings:
        """Return the postings; all rows were given.

        Raises:
            FormatError: a latent fires less often than was said.
        """
        if not np.array_equal(self._next, self._indptr[1:]):
            raise self._miscounted()
        return RangePostings(
            self._start, self._indptr, self._rows, self._values, self._token_ids, self._n_docs
        )

    def _count_documents(self, doc_ids: Int64s, begins: Int64s, owners: npt.NDArray[Any]) -> None:
        """Count the documents that are new to their latent; `doc_ids` ascend within each latent's stretch."""
        before = np.empty_like(doc_ids)
        before[1:] = doc_ids[:-1]
        before[begins] = self._last_doc[owners]
        self._n_docs[owners] += np.add.reduceat(doc_ids != before, begins, dtype=np.int64)
        self._last_doc[owners] = doc_ids[np.append(begins[1:], len(doc_ids)) - 1]

    def _miscounted(self) -> FormatError:
        return FormatError(
            ErrorKind.INVARIANT_BROKEN,
            f"codes of latents [{self._start}, {self._start + self._n}) are more or fewer than the directories of their units "
            "say: a faulty program wrote them; encode the run again under another dictionary name",
        )


def sort_by_latent(local: npt.NDArray[np.uint32], n_latents: int) -> tuple[Int64s, Int64s]:
    """Return some latents, all below `n_latents`, in ascending order, and the stable order that makes them so.

    Latent and place are sorted as one integer, of 32 bits where they fit: numpy sorts those by vector instructions.

    >>> [a.tolist() for a in sort_by_latent(np.array([2, 0, 2], np.uint32), 3)]
    [[0, 2, 2], [1, 0, 2]]
    """
    place_bits = max(1, (len(local) - 1).bit_length())
    kind: Any = np.uint32 if place_bits + (n_latents - 1).bit_length() <= 32 else np.uint64
    keys = local.astype(kind) << kind(place_bits)
    keys |= np.arange(len(local), dtype=kind)
    keys.sort()
    return (keys >> kind(place_bits)).astype(np.int64), (keys & kind((1 << place_bits) - 1)).astype(np.int64)


def read_unit_tokens(codes: "Codes", unit: int) -> UnitTokens:
    """Return what is known of a unit's rows that have codes. Reads three columns of one table."""
    rows = codes.unit_rows(unit)
    table = codes.run.tokenization.unit_table(unit, ["token_id", "doc_id"])
    offsets = rows - unit * codes.rows_per_unit
    return UnitTokens(rows, table["token_id"].to_numpy()[offsets], table["doc_id"].to_numpy()[offsets])


def gather_postings(
    codes: "Codes", start: int, counts: Int64s, *, check: Callable[[], None] = lambda: None
) -> tuple[RangePostings, int]:
    """Return everything that the latents `[start, start + len(counts))` fire on, and how many documents have rows.

    Reads all codes and tokens of the run once. Memory: see `postings_plan.task_bytes`.

    Args:
        codes: Complete.
        start: First latent.
        counts: How often each one fires.
        check: Called between pages; may raise to end this.

    Raises:
        FormatError: an object is missing or damaged, or the counts are not those of the codes.
    """
    gatherer = PostingsGatherer(start, counts, VALUE_DTYPES[codes.value_dtype])
    n_documents = gather_codes(codes, gatherer, check=check)
    return gatherer.finish(), n_documents


class TakesCodes(Protocol):
    """What is given all codes of a run: `PostingsGatherer`, `LargeLatent`."""

    def add(self, page: SparseRows, first: int, tokens: UnitTokens) -> None:
        """Take the codes of some rows that follow all rows before."""


def gather_codes(codes: "Codes", gatherer: TakesCodes, *, check: Callable[[], None] = lambda: None) -> int:
    """Give a gatherer all codes of the run, in the order of rows, and return how many documents have rows.

    Raises:
        FormatError: an object is missing or damaged.
    """
    n_documents, last_doc = 0, -1
    for unit in sorted(codes.collection.units):
        if not codes.collection.units[unit].rows:
            continue
        tokens = read_unit_tokens(codes, unit)
        n_documents += int(np.count_nonzero(np.diff(tokens.doc_ids, prepend=last_doc)))
        last_doc = int(tokens.doc_ids[-1])
        for first, page in codes.unit(unit).scan():
            check()
            gatherer.add(page, first, tokens)
    return n_documents
