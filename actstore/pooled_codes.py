"""Which latents fire anywhere in each document, and how strongly? (FORMAT.md, section 8.4)

    for batch in run.codes("gpt2-l6").pooled().scan():
        batch.doc_ids, batch.indptr, batch.latents, batch.max, batch.sum, batch.count

Of every document the `pool_top_m` latents of the largest sums are kept; the totals beside them are over all latents, exact. A
unit's object has the documents that lie in it, and whole *pieces* of those that have rows in other units too, which are put
together here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.checks import check_whole
from actstore.errors import ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.log.values import Collection, Unit
from actstore.objects import ObjectReader
from actstore.pooled_codes_table import PooledBatch as PooledBatch
from actstore.pooled_codes_table import (
    add_pieces,
    concat_batches,
    is_pooled_codes_key,
    keep_top,
    pooled_from_table,
)
from actstore.pooled_tables import spanning_documents

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PooledCodes:
    """The pooled codes of a run in one dictionary, at one version of the store; reads nothing until asked. Pickles.

    A document is there once all units that it lies in are encoded. Documents without a token are in no unit and never there.
    """

    objects: ObjectReader
    """Of the store."""

    collection: Collection
    """The codes."""

    units: Sequence[Unit]
    """Of the run's tokenization, all of them, ascending."""

    def __repr__(self) -> str:
        return (
            f"<PooledCodes of {self.collection.id}: {self.n_documents} documents, top {self.top_m or 'all'}>"
        )

    @property
    def top_m(self) -> int | None:
        """How many latents of a document are kept; None for all."""
        found = self.collection.config["pool_top_m"]
        return None if found is None else int(found)

    @property
    def n_documents(self) -> int:
        """Documents that are there. Reads nothing."""
        whole = sum(int(unit.meta["pooled"]["documents"]) for unit in self.collection.units.values())
        return whole + sum(map(self._is_live, (spans for _, spans in spanning_documents(self.units))))

    def scan(self, batch_docs: int = 4096) -> Iterator[PooledBatch]:
        """Yield all documents that are there, ascending, at most `batch_docs` at once.

        Reads each unit's object once, and holds one and the pieces of one document.

        Raises:
            FormatError: an object is missing or damaged.
        """
        batch_docs = check_whole(batch_docs, what="batch_docs", least=1)
        spanning = {doc_id: spans for doc_id, spans in spanning_documents(self.units) if self._is_live(spans)}
        pieces: list[PooledBatch] = []
        for u in sorted(self.collection.units):
            unit = self._read(u)
            for i in np.flatnonzero(unit.is_piece).tolist():
                doc_id = int(unit.batch.doc_ids[i])
                if doc_id in spanning:
                    pieces.append(unit.batch.take([i]))
                    if spanning[doc_id][-1] == u:  # it comes before all other documents of this unit
                        yield self._merged(pieces, doc_id, spanning[doc_id])
                        pieces = []
            whole = unit.batch.take(np.flatnonzero(~unit.is_piece))
            for start in range(0, len(whole), batch_docs):
                yield whole.slice(start, min(start + batch_docs, len(whole)))

    def documents(self, doc_ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> PooledBatch:
        """Return these documents in the order asked, repeats allowed. Reads the object of every unit that they lie in once.

        Raises:
            NotFoundError: a document without tokens, or one that is not encoded yet or was left out of the run.
            InvalidInputError: something else than whole numbers.
            FormatError: an object is missing or damaged.
        """
        wanted = np.asarray(doc_ids).reshape(-1)
        if wanted.size and wanted.dtype.kind not in "iu":
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"doc_ids must be whole numbers, got {wanted.dtype}: give a list of ints",
            )
        distinct, inverse = np.unique(wanted.astype(np.int64), return_inverse=True)
        spans = self._units_of(distinct)
        by_unit: dict[int, list[int]] = {}
        for i, of_document in enumerate(spans):
            for u in of_document:
                by_unit.setdefault(u, []).append(i)
        found: list[list[PooledBatch]] = [[] for _ in spans]
        for u in sorted(by_unit):
            unit = self._read(u)
            for i in by_unit[u]:
                at = int(np.searchsorted(unit.batch.doc_ids, distinct[i]))
                if at == len(unit.batch) or unit.batch.doc_ids[at] != distinct[i]:
                    if 0 < at < len(unit.batch):  # between two that have tokens: it has none
                        raise self._not_there(int(distinct[i]), [])
                    raise self._lacks(u, int(distinct[i]))
                found[i].append(unit.batch.take([at]))
        parts = [self._merged(p, int(d), s) for p, d, s in zip(found, distinct, spans, strict=True)]
        value_dtype = str(self.collection.config["value_dtype"])
        return concat_batches(parts, value_dtype=value_dtype).take(inverse.reshape(-1))

    def _units_of(self, doc_ids: Int64Array) -> list[list[int]]:
        """Return the units that each document lies in, all of them encoded."""
        first = np.array([int(u.meta["first_doc"]) for u in self.units], np.int64)
        last = np.array([int(u.meta["last_doc"]) for u in self.units], np.int64)
        low = np.searchsorted(last, doc_ids, side="left")
        high = np.searchsorted(first, doc_ids, side="right")
        spans = []
        for doc_id, a, b in zip(doc_ids.tolist(), low.tolist(), high.tolist(), strict=True):
            units = [self.units[i].unit for i in range(a, b)]
            if not units or not self._is_live(units):
                raise self._not_there(doc_id, units)
            spans.append(units)
        return spans

    def _is_live(self, units: Sequence[int]) -> bool:
        return all(u in self.collection.units for u in units)

    def _merged(self, pieces: Sequence[PooledBatch], doc_id: int, spans: Sequence[int]) -> PooledBatch:
        """Return one document from what the units that it lies in have of it."""
        if len(pieces) != len(spans) or any(int(p.doc_ids[0]) != doc_id for p in pieces):
            raise self._lacks(spans[-1], doc_id)
        return pieces[0] if len(pieces) == 1 else keep_top(add_pieces(pieces), self.top_m)

    def _read(self, unit: int) -> "_UnitPooled":
        found = [
            o for o in self.collection.units[unit].objects if is_pooled_codes_key(self.collection.id, o.key)
        ]
        if len(found) != 1:
            raise FormatError(
                ErrorKind.INVARIANT_BROKEN,
                f"unit {unit} of codes {self.collection.id!r} lists {len(found)} objects of pooled codes, not one; see fsck",
            )
        value_dtype = str(self.collection.config["value_dtype"])
        table = self.objects.table(found[0])
        return _UnitPooled(*pooled_from_table(table, value_dtype=value_dtype, key=found[0].key))

    def _lacks(self, unit: int, doc_id: int) -> FormatError:
        return FormatError(
            ErrorKind.INVARIANT_BROKEN,
            f"unit {unit} of codes {self.collection.id!r} has no pooled codes of document {doc_id}, whose tokens lie in it: it "
            "was written by a faulty program; see fsck",
        )

    def _not_there(self, doc_id: int, units: Sequence[int]) -> NotFoundError:
        lacking = [u for u in units if u not in self.collection.units]
        found = f"its units {lacking} are not encoded" if lacking else "it has no token"
        return NotFoundError(
            ErrorKind.ROW_NOT_FOUND,
            f"pooled codes of document {doc_id} were asked for, and codes {self.collection.id!r} have none: {found}",
        )


@dataclass(frozen=True, slots=True, eq=False)
class _UnitPooled:
    """What one unit's object holds."""

    batch: PooledBatch
    is_piece: npt.NDArray[np.bool_]
