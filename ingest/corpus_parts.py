"""How do documents become the Parquet parts of a corpus? (FORMAT.md, section 7)"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actstore.corpus import DOC_ID, TEXT
from actstore.log.values import Add, StoredObject
from actstore.storage import Storage, write_new

_ROW_GROUP_BYTES = 256 << 10
"""Reading one document reads its row group: this bounds the cost. At this level groups of 8 MiB would be a sixth smaller."""

_LEVEL = 3
"""Of zstd: what small row groups cost in size, a higher level than the default one mostly wins back, while writing."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive documents that are stored as one object."""

    index: int
    first_doc: int
    text_bytes: int
    table: pa.Table


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """A part without its documents: what the commit needs."""

    index: int
    first_doc: int
    rows: int
    text_bytes: int
    objects: tuple[StoredObject, ...]


def number_documents(
    batches: Iterable[pa.RecordBatch], keep: npt.NDArray[np.bool_], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Yield the kept documents with their `doc_id`, which counts them from 0.

    Args:
        batches: All documents in order, with the columns of `schema` but `doc_id`.
        keep: Which documents the corpus gets, shape (number of documents,).
        schema: `doc_id` and the columns of `batches`.
    """
    seen = kept = 0
    for batch in batches:
        mask = keep[seen : seen + batch.num_rows]
        seen += batch.num_rows
        rows = batch if mask.all() else batch.filter(pa.array(mask))
        if rows.num_rows:
            ids = pa.array(np.arange(kept, kept + rows.num_rows, dtype=np.int64))
            kept += rows.num_rows
            yield pa.RecordBatch.from_arrays([ids, *rows.columns], schema=schema)


def split_parts(batches: Iterable[pa.RecordBatch], part_bytes: int) -> Iterator[Part]:
    """Yield parts of at most `part_bytes`, or of one document that is larger. Holds one part at a time."""
    pending: list[pa.RecordBatch] = []
    index = pending_bytes = 0
    for batch in batches:
        sizes = document_sizes(batch)
        start = 0
        while start < batch.num_rows:
            fits = int(np.searchsorted(np.cumsum(sizes[start:]), part_bytes - pending_bytes, side="right"))
            if fits == 0 and not pending:
                fits = 1
            if fits:
                pending.append(batch.slice(start, fits))
                pending_bytes += int(sizes[start : start + fits].sum())
                start += fits
            if start < batch.num_rows:
                yield _make_part(index, pending)
                index, pending, pending_bytes = index + 1, [], 0
    if pending:
        yield _make_part(index, pending)


def document_sizes(batch: pa.RecordBatch) -> npt.NDArray[Any]:
    """Return about how many bytes each document takes in memory, shape (n,): its text, and a share of the rest."""
    text = pc.binary_length(batch.column(TEXT)).to_numpy(zero_copy_only=False).astype(np.int64)
    rest = max(batch.nbytes - int(text.sum()), 0)
    sizes: npt.NDArray[Any] = text + rest // max(batch.num_rows, 1)
    return sizes


def _make_part(index: int, batches: list[pa.RecordBatch]) -> Part:
    table = pa.Table.from_batches(batches)
    text_bytes = pc.sum(pc.binary_length(table[TEXT])).as_py()
    return Part(index, table[DOC_ID][0].as_py(), text_bytes, table)


def describe_part(part: Part) -> WrittenPart:
    """Return a part without storing it."""
    return WrittenPart(part.index, part.first_doc, part.table.num_rows, part.text_bytes, ())


def write_part(storage: Storage, part: Part, *, corpus: str, attempt: str) -> WrittenPart:
    """Store one part under a new key. Idempotent for one attempt."""
    key = f"corpora/{corpus}/documents/{part.index:06}-{attempt}.parquet"
    obj = write_new(storage, key, [part_bytes_of(part.table)])
    return WrittenPart(part.index, part.first_doc, part.table.num_rows, part.text_bytes, (obj,))


def make_add(corpus: str, fingerprint: str, attempt: str, part: WrittenPart) -> Add:
    """Return the action that makes a stored part live."""
    return Add(
        kind="corpus",
        id=corpus,
        epoch=0,
        fingerprint=fingerprint,
        unit=part.index,
        rows=part.rows,
        nonfinite=0,
        attempt=attempt,
        objects=part.objects,
        meta={"first_doc": part.first_doc, "text_bytes": part.text_bytes},
    )


def part_bytes_of(table: pa.Table) -> memoryview:
    """Return the Parquet file of a part: zstd, with page checksums, in row groups of about 256 KiB."""
    nested = pa.types.is_nested
    dictionary = [f.name for f in table.schema if f.name not in (DOC_ID, TEXT) and not nested(f.type)]
    rows = max(1, table.num_rows * _ROW_GROUP_BYTES // max(table.nbytes, 1))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=_LEVEL,
        use_dictionary=dictionary,
        write_page_checksum=True,
        row_group_size=rows,
    )
    return memoryview(sink.getvalue())
