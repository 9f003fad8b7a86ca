"""How are pooled codes stored and put together? (FORMAT.md, section 8.4)

Values only: batches of documents, each with its latents ascending, their maxima, sums and counts. Sums are float64: those of
float16 codes are exact, whatever the order they are added in, and compress to what float32 would take.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import ErrorKind, FormatError

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

_ROWS_PER_GROUP: Final = 1024
"""Documents per Parquet row group: 16 MiB decoded at 512 latents each."""

_LISTS: Final = ("latents", "max", "sum", "count")
_TOTALS: Final = ("n_tokens", "n_fired", "total_sum", "total_max", "total_count")


@dataclass(frozen=True, slots=True, eq=False)
class PooledBatch:
    """The pooled codes of n documents."""

    doc_ids: Int64Array
    """Shape (n,)."""

    indptr: Int64Array
    """Shape (n + 1,): the entries of document i are those from `indptr[i]` on and before `indptr[i + 1]`."""

    latents: npt.NDArray[np.uint32]
    """Shape (entries,): latents kept, ascending within a document."""

    max: npt.NDArray[Any]
    """Largest code of the latent in the document, in the dtype of the codes; shape (entries,)."""

    sum: Float64Array
    """Sum of its codes; shape (entries,)."""

    count: npt.NDArray[np.uint32]
    """Tokens at which it fires; shape (entries,)."""

    n_tokens: Int64Array
    """Tokens pooled, those without codes included; shape (n,), as all that follow."""

    n_fired: Int64Array
    """Latents that fire at all, those that are not kept included."""

    total_sum: Float64Array
    """Sum of all codes, those of latents that are not kept included, as in the totals that follow."""

    total_max: npt.NDArray[np.float32]
    """Largest code; 0 without any."""

    total_count: Int64Array
    """Codes."""

    def __len__(self) -> int:
        return len(self.doc_ids)

    @property
    def mean(self) -> Float64Array:
        """Sum of a latent's codes divided by all tokens pooled, those at which it does not fire included; shape (entries,)."""
        mean: Float64Array = self.sum / np.repeat(np.maximum(self.n_tokens, 1), np.diff(self.indptr))
        return mean

    @property
    def entry_docs(self) -> Int64Array:
        """`doc_id` of every entry, shape (entries,)."""
        return np.repeat(self.doc_ids, np.diff(self.indptr))

    def slice(self, start: int, stop: int) -> "PooledBatch":
        """Return documents `[start, stop)` of these; arrays are views."""
        low, high = int(self.indptr[start]), int(self.indptr[stop])
        return PooledBatch(
            doc_ids=self.doc_ids[start:stop],
            indptr=self.indptr[start : stop + 1] - low,
            **{name: getattr(self, name)[low:high] for name in _LISTS},
            **{name: getattr(self, name)[start:stop] for name in _TOTALS},
        )

    def take(self, places: Sequence[int] | Int64Array) -> "PooledBatch":
        """Return the documents at some places, in that order; new memory."""
        at = np.asarray(places, np.int64)
        counts = np.diff(self.indptr)[at]
        indptr = _indptr(counts)
        entries = np.arange(int(indptr[-1])) + np.repeat(self.indptr[at] - indptr[:-1], counts)
        return PooledBatch(
            doc_ids=self.doc_ids[at],
            indptr=indptr,
            **{name: getattr(self, name)[entries] for name in _LISTS},
            **{name: getattr(self, name)[at] for name in _TOTALS},
        )


def pooled_codes_key(codes: str, unit: int, attempt: str) -> str:
    """Return the key of a unit's pooled codes."""
    return f"codes/{codes}/pooled/{unit:08}-{attempt}.parquet"


def is_pooled_codes_key(codes: str, key: str) -> bool:
    """Return whether an object of a unit of codes holds its pooled codes."""
    return key.startswith(f"codes/{codes}/pooled/")


def concat_batches(parts: Sequence[PooledBatch], *, value_dtype: str) -> PooledBatch:
    """Return the documents of all parts, one after another; `value_dtype` is that of `max` where there are none."""
    lists: dict[str, Any] = {"latents": np.uint32, "max": value_dtype, "sum": np.float64, "count": np.uint32}
    totals: dict[str, Any] = {"n_tokens": np.int64, "n_fired": np.int64, "total_sum": np.float64, "total_max": np.float32,
              "total_count": np.int64, "doc_ids": np.int64}  # fmt: skip
    arrays = {
        name: np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in parts)])
        for name, dtype in {**lists, **totals}.items()
    }
    counts = np.concatenate([np.empty(0, np.int64), *(np.diff(part.indptr) for part in parts)])
    return PooledBatch(indptr=_indptr(counts), **arrays)


def add_pieces(pieces: Sequence[PooledBatch]) -> PooledBatch:
    """Return one document from its pieces, none of which was cut to the top latents."""
    latents = np.concatenate([piece.latents for piece in pieces])
    order = np.argsort(latents, kind="stable")
    found, maxima, sums, counts = reduce_codes(
        latents[order].astype(np.int64),
        np.concatenate([piece.max for piece in pieces])[order],
        np.concatenate([piece.sum for piece in pieces])[order],
        np.concatenate([piece.count for piece in pieces])[order],
    )
    return PooledBatch(
        doc_ids=pieces[0].doc_ids,
        indptr=np.array([0, len(found)], np.int64),
        latents=found.astype(np.uint32),
        max=maxima,
        sum=sums,
        count=counts.astype(np.uint32),
        n_tokens=sum(piece.n_tokens for piece in pieces) + np.zeros(1, np.int64),
        n_fired=np.array([len(found)], np.int64),
        total_sum=sum(piece.total_sum for piece in pieces) + np.zeros(1),
        total_max=np.maximum.reduce([piece.total_max for piece in pieces]),
        total_count=sum(piece.total_count for piece in pieces) + np.zeros(1, np.int64),
    )


def reduce_codes(
    keys: Int64Array, maxima: npt.NDArray[Any], sums: Float64Array, counts: npt.NDArray[Any]
) -> tuple[Int64Array, npt.NDArray[Any], Float64Array, Int64Array]:
    """Return the distinct ones of ascending `keys`, and the largest maximum and the added sums and counts of each."""
    if not len(keys):
        return keys, maxima, sums, counts.astype(np.int64)
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return (
        keys[starts],
        np.maximum.reduceat(maxima, starts),
        np.add.reduceat(sums, starts),
        np.add.reduceat(counts.astype(np.int64), starts),
    )


def keep_top(
    batch: PooledBatch, top_m: int | None, *, whole: npt.NDArray[np.bool_] | None = None
) -> PooledBatch:
    """Return the documents with at most `top_m` latents each: those of the largest sums, of equal ones the lower latents.

    Args:
        batch: Documents.
        top_m: None keeps all.
        whole: Documents to be cut, shape (n,); None for all of them.
    """
    n_entries = np.diff(batch.indptr)
    if top_m is None or not (n_entries > top_m).any():
        return batch
    docs = np.repeat(np.arange(len(batch)), n_entries)
    order = np.lexsort((batch.latents, -batch.sum, docs))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(batch.indptr[:-1], n_entries)
    kept = rank < top_m
    if whole is not None:
        kept |= ~whole[docs]
    return PooledBatch(
        doc_ids=batch.doc_ids,
        indptr=_indptr(np.bincount(docs[kept], minlength=len(batch)).astype(np.int64)),
        **{name: getattr(batch, name)[kept] for name in _LISTS},
        **{name: getattr(batch, name) for name in _TOTALS},
    )


def pooled_to_bytes(batch: PooledBatch, is_piece: npt.NDArray[np.bool_]) -> bytes:
    """Return a unit's pooled codes as a Parquet file with page checksums; about 6 bytes an entry."""
    offsets = pa.array(batch.indptr.astype(np.int32))
    fields = [
        pa.field("doc_id", pa.int64(), nullable=False),
        pa.field("is_piece", pa.bool_(), nullable=False),
    ]
    arrays = [pa.array(batch.doc_ids), pa.array(is_piece)]
    for name in _TOTALS:
        arrays.append(pa.array(getattr(batch, name)))
        fields.append(pa.field(name, arrays[-1].type, nullable=False))
    for name in _LISTS:
        arrays.append(pa.ListArray.from_arrays(offsets, pa.array(getattr(batch, name))))
        fields.append(pa.field(name, arrays[-1].type, nullable=False))
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=pa.schema(fields)),
        sink,
        compression="zstd",
        use_dictionary=False,
        # Bytes of one significance lie together, and latents are stored as differences.
        use_byte_stream_split=[f"{name}.list.element" for name in ("max", "sum", "count")],
        column_encoding={"latents.list.element": "DELTA_BINARY_PACKED"},
        write_statistics=["doc_id"],
        write_page_checksum=True,
        row_group_size=_ROWS_PER_GROUP,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def pooled_from_table(
    table: pa.Table, *, value_dtype: str, key: str
) -> tuple[PooledBatch, npt.NDArray[np.bool_]]:
    """Return what `pooled_to_bytes` wrote: the documents, and which of them are pieces.

    Args:
        table: Of the object.
        value_dtype: Of the codes.
        key: Of the object, for the error.

    Raises:
        FormatError: the table is another.
    """
    types = {
        "latents": pa.uint32(),
        "max": pa.from_numpy_dtype(np.dtype(value_dtype)),
        "sum": pa.float64(),
        "count": pa.uint32(),
    }
    try:
        lists, indptr = {}, np.zeros(1, np.int64)
        for name, type_ in types.items():
            column = table[name].combine_chunks()
            if column.type.value_type != type_ or column.null_count:
                raise ValueError(f"{name} is {column.type}, not a list of {type_}")
            offsets = column.offsets.to_numpy().astype(np.int64)
            if name != "latents" and not np.array_equal(offsets - offsets[0], indptr):
                raise ValueError(f"{name} and latents are lists of different lengths")
            indptr = offsets - offsets[0]
            lists[name] = column.flatten().to_numpy()
        totals = {name: table[name].to_numpy() for name in _TOTALS}
        batch = PooledBatch(doc_ids=table["doc_id"].to_numpy(), indptr=indptr, **lists, **totals)
        return batch, table["is_piece"].to_numpy()
    except (KeyError, ValueError, AttributeError, pa.ArrowException) as error:
        raise FormatError(
            ErrorKind.OBJECT_DAMAGED,
            f"object {key!r} is not a table of pooled codes ({error}): it was written by a faulty program; see fsck",
        ) from error


def _indptr(counts: Int64Array) -> Int64Array:
    indptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return indptr
