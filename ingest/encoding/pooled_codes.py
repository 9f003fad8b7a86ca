"""What do the codes of a unit come to for each of its documents? (FORMAT.md, section 8.4)

Pure: the rows that enter are those that enter pooled vectors (`actstore.ingest.pooling`), so that every position of a
document counts once, in whatever windows and units it lies.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.ingest.pooling import Mask, UnitDocuments, plan_documents
from actstore.pooled_codes_table import PooledBatch, concat_batches, keep_top, pooled_to_bytes, reduce_codes
from actstore.sparse.rows import SparseRows
from actstore.tokenization import Tokenization

Int64Array = npt.NDArray[np.int64]

_BLOCK_CODES = 1 << 20
"""Codes sorted at a time, about 40 MiB of buffers; a document with more is sorted at once."""


def unit_documents(
    tokenization: Tokenization, unit: int, tokens: pa.Table, *, pool_special: bool
) -> UnitDocuments:
    """Return a unit's documents and which of its rows enter their pooled codes.

    Args:
        tokenization: All of it: the next unit tells whether the last document goes on.
        unit: The unit.
        tokens: Its tokens, at least `actstore.ingest.pooling.POOLING_COLUMNS`.
        pool_special: Whether special tokens enter.
    """
    after = tokenization.collection.units.get(unit + 1)
    last: Any = tokens["doc_id"][-1].as_py() if tokens.num_rows else None
    return plan_documents(
        tokens,
        window=int(tokenization.config["window"]),
        overlap=int(tokenization.config["overlap"]),
        pool_special=pool_special,
        goes_on=after is not None and after.meta["first_doc"] == last,
    )


def pool_codes(
    codes: SparseRows,
    documents: UnitDocuments,
    *,
    kept: Int64Array | None = None,
    finite: Mask | None = None,
    top_m: int | None,
) -> PooledBatch:
    """Return the pooled codes of a unit's documents; those of pieces with all their latents.

    Costs about 0.1 us a code. Holds one block of codes besides the answer.

    Args:
        codes: Of the unit's stored rows.
        documents: Of all its token rows.
        kept: Offsets of the stored rows among the token rows; None for all.
        finite: Stored rows whose activations are finite; None for all. Others count no token.
        top_m: Latents kept of each document that lies in the unit whole; None for all.
    """
    n_docs = len(documents.doc_ids)
    doc_of_row = np.repeat(np.arange(n_docs), np.diff(documents.starts))
    enters = documents.enters
    if kept is not None:
        doc_of_row, enters = doc_of_row[kept], enters[kept]
    if finite is not None:
        enters = enters & finite
    starts = np.searchsorted(doc_of_row, np.arange(n_docs + 1))
    n_tokens = np.bincount(doc_of_row[enters], minlength=n_docs).astype(np.int64)
    parts = [
        _pool_block(
            codes.slice(int(starts[a]), int(starts[b])),
            doc_of_row[starts[a] : starts[b]] - a,
            enters[starts[a] : starts[b]],
            documents.doc_ids[a:b],
            n_tokens[a:b],
            whole=~documents.is_piece[a:b],
            top_m=top_m,
        )
        for a, b in _blocks(codes.indptr[starts])
    ]
    return concat_batches(parts, value_dtype=codes.value_dtype)


def pooled_object(pooled: PooledBatch, documents: UnitDocuments) -> tuple[bytes, dict[str, int]]:
    """Return a unit's object of pooled codes, and what the unit's `meta["pooled"]` says of it."""
    n_pieces = int(documents.is_piece.sum())
    counts = {"documents": len(pooled) - n_pieces, "pieces": n_pieces}
    return pooled_to_bytes(pooled, documents.is_piece), counts


def _blocks(code_starts: Int64Array) -> Iterator[tuple[int, int]]:
    """Yield ranges of documents that have at most `_BLOCK_CODES` codes together, at least one document each."""
    a, n = 0, len(code_starts) - 1
    while a < n:
        b = int(np.searchsorted(code_starts, code_starts[a] + _BLOCK_CODES, side="right")) - 1
        b = min(n, max(a + 1, b))
        yield a, b
        a = b


def _pool_block(
    codes: SparseRows,
    doc_of_row: Int64Array,
    enters: Mask,
    doc_ids: Int64Array,
    n_tokens: Int64Array,
    *,
    whole: Mask,
    top_m: int | None,
) -> PooledBatch:
    n_docs = len(doc_ids)
    counts = codes.counts
    keys = np.repeat(doc_of_row, counts) * codes.n_latents + codes.latents
    values = codes.values
    if not enters.all():
        entering = np.repeat(enters, counts)
        keys, values = keys[entering], values[entering]
    # Stable, so that float32 codes are added in the order of their rows.
    order = np.argsort(keys, kind="stable")
    values = values[order]
    ones = np.ones(len(values), np.int64)
    found, maxima, sums, n_codes = reduce_codes(keys[order], values, values.astype(np.float64), ones)
    docs, latents = np.divmod(found, codes.n_latents)
    indptr = np.searchsorted(docs, np.arange(n_docs + 1)).astype(np.int64)
    total_max = np.zeros(n_docs, np.float32)
    np.maximum.at(total_max, docs, maxima.astype(np.float32))
    batch = PooledBatch(
        doc_ids=doc_ids,
        indptr=indptr,
        latents=latents.astype(np.uint32),
        max=maxima,
        sum=sums,
        count=n_codes.astype(np.uint32),
        n_tokens=n_tokens,
        n_fired=np.diff(indptr),
        total_sum=np.bincount(docs, weights=sums, minlength=n_docs).astype(np.float64),
        total_max=total_max,
        total_count=np.diff(np.concatenate([[0], np.cumsum(n_codes)])[indptr]),
    )
    return keep_top(batch, top_m, whole=whole)
