"""Which objects hold the pooled vectors of one unit, and what do they hold? (FORMAT.md, section 7)"""

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from actstore.pooled_tables import (
    PooledSums,
    VectorColumns,
    documents_key,
    documents_table,
    pieces_key,
    pieces_table,
    pooled_bytes,
)
from actstore.tokenization import Tokenization

from .pooling import Mask, UnitDocuments, plan_documents, pool_rows


class UnitPooling:
    """Gathers a unit's pooled vectors, one hook point after the other.

    Memory: the vectors of all documents of the unit, for every hook point and pooling; as much as its rows for each pooling
    if every document has one token.
    """

    def __init__(self, documents: UnitDocuments, poolings: Sequence[str]) -> None:
        self._documents = documents
        self._poolings = poolings
        self._vectors: dict[str, VectorColumns] = {}
        self._pieces: dict[str, list[PooledSums]] = {}

    def add(self, hook_point: str, rows: npt.NDArray[Any], dtype: str, finite: Mask | None) -> None:
        """Pool the rows `(n_rows, d_model)`, in the numpy dtype of `dtype`, of one hook point."""
        is_piece = self._documents.is_piece
        vectors = VectorColumns(int((~is_piece).sum()), rows.shape[1], self._poolings)
        pieces = list[PooledSums]()
        sums = pool_rows(rows, dtype, self._documents, poolings=self._poolings, finite=finite)
        at = 0
        for of_document, in_part in zip(sums, is_piece.tolist(), strict=True):
            if in_part:
                pieces.append(of_document)
            else:
                vectors.put(at, of_document)
                at += 1
        self._vectors[hook_point], self._pieces[hook_point] = vectors, pieces

    def objects(self, run: str, unit: int, attempt: str) -> tuple[dict[str, bytes], dict[str, int]]:
        """Return the objects by key, and what the unit's `meta["pooled"]` says of them."""
        is_piece = self._documents.is_piece
        whole, pieces = self._documents.doc_ids[~is_piece], self._documents.doc_ids[is_piece]
        found: dict[str, bytes] = {}
        if len(whole):
            found[documents_key(run, unit, attempt)] = pooled_bytes(documents_table(whole, self._vectors))
        if len(pieces):
            table = pieces_table(pieces.tolist(), self._pieces, self._poolings)
            found[pieces_key(run, unit, attempt)] = pooled_bytes(table)
        return found, {"documents": len(whole), "pieces": len(pieces)}


def unit_pooling(
    tokenization: Tokenization, unit: int, tokens: pa.Table, *, poolings: Sequence[str], pool_special: bool
) -> UnitPooling:
    """Return what gathers the pooled vectors of a unit.

    Args:
        tokenization: All of it: the next unit tells whether the last document goes on.
        unit: The unit.
        tokens: Its tokens.
        poolings: Which vectors.
        pool_special: Whether special tokens enter.
    """
    after = tokenization.collection.units.get(unit + 1)
    last: Any = tokens["doc_id"][-1].as_py() if tokens.num_rows else None
    documents = plan_documents(
        tokens,
        window=int(tokenization.config["window"]),
        overlap=int(tokenization.config["overlap"]),
        pool_special=pool_special,
        goes_on=after is not None and after.meta["first_doc"] == last,
    )
    return UnitPooling(documents, poolings)
