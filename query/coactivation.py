"""How often do other latents fire where one fires, and how surprising is that? Exact counts, and measures of association."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from actstore.codes import Codes
from actstore.sparse import SparseRows

from .unit_tables import read_unit

Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Unit = Literal["token", "document"]

MEASURES = ("jaccard", "npmi", "phi", "lift", "p_other", "p_this")

_BATCH_ROWS = 8192
"""Rows decoded at a time: about a page."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How often latents fire, alone and together with one of them."""

    n_total: int
    """Tokens or documents of the run."""

    n_this: int
    """Of those, how many have the one latent."""

    n_other: Int64s
    """How many have each latent, shape (f,)."""

    n_both: Int64s
    """How many have both, shape (f,)."""

    @property
    def n_expected(self) -> Float64s:
        """How many would have both if the two had nothing to do with each other, shape (f,)."""
        return self.n_other.astype(np.float64) * (self.n_this / max(1, self.n_total))

    def only(self, latents: Int64s) -> "Counts":
        """Return the counts of some of the latents."""
        return Counts(self.n_total, self.n_this, self.n_other[latents], self.n_both[latents])


def count_tokens(codes: Codes, latent: int) -> Counts:
    """Return on how many rows each latent fires together with one; reads the pages of the rows on which that fires.

    Raises:
        NotFoundError: no postings.
        InvalidInputError: postings that are not complete.
    """
    rows, _ = codes.postings().latent(latent)
    both = np.zeros(codes.n_latents, np.int64)
    step = codes.rows_per_unit
    for unit in np.unique(rows // step).tolist():
        low, high = np.searchsorted(rows, [unit * step, (unit + 1) * step])
        offsets = np.searchsorted(codes.unit_rows(unit), rows[low:high])
        for _, found in _codes_at(codes, unit, offsets):
            both += np.bincount(found.latents, minlength=codes.n_latents)
    return Counts(codes.n_rows, len(rows), codes.counts(), both)


def count_documents(codes: Codes, latent: int) -> Counts:
    """Return in how many documents each latent fires together with one; reads the codes of the documents it fires in.

    A document counts if it has a stored row. Memory: the documents' numbers, and the codes of 8,192 rows.

    Raises:
        NotFoundError: no postings.
        InvalidInputError: postings that are not complete.
    """
    firing, _ = codes.postings().latent(latent)
    mine = _documents_of(codes, firing)
    both = np.zeros(codes.n_latents, np.int64)
    last_seen = np.full(codes.n_latents, -1, np.int64)
    n_total, last_doc = 0, -1
    for unit in sorted(codes.collection.units):
        docs = _row_documents(codes, unit)
        distinct = np.unique(docs)
        # Documents ascend with the rows: only one that goes on from the unit before can come twice.
        n_total += len(distinct) - int(bool(len(distinct)) and int(distinct[0]) == last_doc)
        last_doc = int(distinct[-1]) if len(distinct) else last_doc
        for offsets, found in _codes_at(codes, unit, np.flatnonzero(np.isin(docs, mine))):
            _count_new(both, last_seen, found.latents, np.repeat(docs[offsets], found.counts))
    n_other = codes.stats(columns=["n_docs"])["n_docs"].to_numpy()
    return Counts(n_total, len(mine), n_other, both)


def _codes_at(codes: Codes, unit: int, offsets: Int64s) -> Iterator[tuple[Int64s, SparseRows]]:
    """Yield ascending offsets of a unit's rows and their codes; pages without one of them are not read."""
    held = codes.unit(unit)
    cuts = np.flatnonzero(np.diff(offsets // _BATCH_ROWS)) + 1
    for some in np.split(offsets, cuts) if len(offsets) else []:
        first = int(some[0])
        page = held.slice(first, int(some[-1]) + 1)
        yield some, page if len(some) == page.n_rows else page.take(some - first)


def _count_new(both: Int64s, last_seen: Int64s, latents: npt.NDArray[np.uint32], docs: Int64s) -> None:
    """Count each latent once for every document; codes come in the order of documents."""
    # Numbers of 16 bits are sorted by counting them, several times as fast.
    narrow = latents.astype(np.uint16) if len(both) <= 1 << 16 else latents
    order = np.argsort(narrow, kind="stable")
    latents, docs = latents[order], docs[order]
    first = np.ones(len(latents), np.bool_)
    first[1:] = (latents[1:] != latents[:-1]) | (docs[1:] != docs[:-1])
    latents, docs = latents[first], docs[first]
    both += np.bincount(latents[docs != last_seen[latents]], minlength=len(both))
    last_seen[latents] = docs  # ascending within a latent: the last one stays


def _documents_of(codes: Codes, rows: Int64s) -> Int64s:
    """Return the documents that some rows, ascending, are in; each once, ascending."""
    tokenization, step = codes.run.tokenization, codes.rows_per_unit
    found = [np.empty(0, np.int64)]
    for unit in np.unique(rows // step).tolist():
        low, high = np.searchsorted(rows, [unit * step, (unit + 1) * step])
        found.append(np.unique(read_unit(tokenization, unit).doc_id[rows[low:high] - unit * step]))
    return np.unique(np.concatenate(found))


def _row_documents(codes: Codes, unit: int) -> Int64s:
    """Return the document of every encoded row of a unit."""
    tokens = read_unit(codes.run.tokenization, unit)
    documents: Int64s = tokens.doc_id[codes.unit_rows(unit) - tokens.first_row]
    return documents


def measure_all(counts: Counts) -> dict[str, Float64s]:
    """Return every measure of association, shape (f,) each; none is NaN or infinite.

    Latents that fire are expected: `n_this` and `n_other` above 0; of one that never fires all measures are 0 but npmi, -1.

    >>> found = measure_all(Counts(100, 10, np.array([10, 20]), np.array([10, 2])))
    >>> {name: found[name].round(3).tolist() for name in ("jaccard", "npmi", "phi", "lift")}
    {'jaccard': [1.0, 0.071], 'npmi': [1.0, 0.0], 'phi': [1.0, 0.0], 'lift': [10.0, 1.0]}
    """
    total, this = float(counts.n_total), float(counts.n_this)
    other, both = counts.n_other.astype(np.float64), counts.n_both.astype(np.float64)
    return {
        "jaccard": _ratio(both, this + other - both),
        "npmi": _npmi(total, this, other, both),
        "phi": _ratio(
            total * both - this * other, np.sqrt(this * (total - this)) * np.sqrt(other * (total - other))
        ),
        "lift": _ratio(both, counts.n_expected),
        "p_other": _ratio(both, np.full(len(both), this)),
        "p_this": _ratio(both, other),
    }


def _npmi(total: float, this: float, other: Float64s, both: Float64s) -> Float64s:
    """Bouma 2009, eq. 7; its limit 1 where both fire everywhere, and -1 where they never meet."""
    npmi = np.full(len(both), -1.0)
    meet = both > 0
    surprise = np.log(total / both[meet])
    # One logarithm of one ratio: exactly 0 where both meet as often as chance would have it.
    pmi = np.log(both[meet] * total / (this * other[meet]))
    npmi[meet] = np.where(surprise > 0, pmi / np.where(surprise > 0, surprise, 1.0), 1.0)
    clipped: Float64s = np.clip(npmi, -1.0, 1.0)
    return clipped


def _ratio(top: Float64s, bottom: Float64s) -> Float64s:
    ratio: Float64s = np.divide(top, bottom, out=np.zeros(len(top)), where=bottom > 0)
    return ratio
