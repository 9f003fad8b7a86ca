"""How are pooled vectors stored, and how do the pieces of a document become one? (FORMAT.md, section 7)

A unit has a table of the documents that lie in it whole, with their finished vectors, and a table of *pieces*, at most two,
of the documents that have rows in other units too: sums in float64, which merge exactly. When a run is complete, the merged
vectors of such documents are stored once more, finished, in tables like those of the units.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import ErrorKind, FormatError
from actstore.log.values import Collection, StoredObject, Unit

Vector = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

POOLINGS: Final = ("mean", "last", "max", "weighted_mean")
"""Ways to make one vector of a document's rows; `weighted_mean` weighs a row by its 1-based position in the document."""

ROWS_PER_GROUP: Final = 2048
"""Documents per Parquet row group: 6 MiB of a column at 768 dimensions."""


@dataclass(frozen=True, slots=True, eq=False)
class PooledSums:
    """What some rows of one document come to at one hook point; arrays have shape (d_model,), None where not asked for."""

    n_tokens: int
    """Rows pooled."""

    weight_sum: int
    """Sum over them of their 1-based positions."""

    last_position: int
    """The greatest of their positions, from 0; -1 without rows."""

    sum: Float64Array | None
    weighted_sum: Float64Array | None
    """Sum of the rows times their 1-based positions."""

    max: Vector | None
    last: Vector | None
    """The row at `last_position`."""

    @classmethod
    def empty(cls, d_model: int, poolings: Sequence[str]) -> "PooledSums":
        """Return the sums of no rows: neutral for `+`."""
        return cls(
            n_tokens=0,
            weight_sum=0,
            last_position=-1,
            sum=np.zeros(d_model) if "mean" in poolings else None,
            weighted_sum=np.zeros(d_model) if "weighted_mean" in poolings else None,
            max=np.full(d_model, -np.inf, np.float32) if "max" in poolings else None,
            last=np.zeros(d_model, np.float32) if "last" in poolings else None,
        )

    def __add__(self, other: "PooledSums") -> "PooledSums":
        """Return the sums of both sets of rows, which share none."""
        later = other if other.last_position > self.last_position else self
        return PooledSums(
            n_tokens=self.n_tokens + other.n_tokens,
            weight_sum=self.weight_sum + other.weight_sum,
            last_position=later.last_position,
            sum=None if self.sum is None or other.sum is None else self.sum + other.sum,
            weighted_sum=None
            if self.weighted_sum is None or other.weighted_sum is None
            else self.weighted_sum + other.weighted_sum,
            max=None if self.max is None or other.max is None else np.maximum(self.max, other.max),
            last=later.last,
        )

    def vector(self, pooling: str) -> Vector | None:
        """Return the finished vector of one pooling; None without rows, as nothing stands for no tokens.

        >>> two = PooledSums(2, 3, 1, np.array([4.0]), np.array([7.0]), None, None)
        >>> two.vector("mean"), two.vector("weighted_mean")
        (array([2.], dtype=float32), array([2.3333333], dtype=float32))
        """
        if not self.n_tokens:
            return None
        if pooling == "mean":
            assert self.sum is not None
            return (self.sum / self.n_tokens).astype(np.float32)
        if pooling == "weighted_mean":
            assert self.weighted_sum is not None
            return (self.weighted_sum / self.weight_sum).astype(np.float32)
        return self.max if pooling == "max" else self.last


def pooled_column(hook_point: str, part: str) -> str:
    """Return the name of the column that holds a hook point's `part`: a pooling, `n_tokens`, or a sum.

    >>> pooled_column("layers.3.resid_post", "mean")
    'layers.3.resid_post/mean'
    """
    return f"{hook_point}/{part}"


_PIECE_PARTS: Final = {
    "mean": ("sum", pa.float64()),
    "weighted_mean": ("weighted_sum", pa.float64()),
    "max": ("max", pa.float32()),
    "last": ("last", pa.float32()),
}
"""Of each pooling, what a piece stores for it."""

_COUNTS: Final = ("n_tokens", "weight_sum", "last_position")


class VectorColumns:
    """The finished vectors of `n` documents at one hook point, filled one document after the other."""

    def __init__(self, n: int, d_model: int, poolings: Sequence[str]) -> None:
        self._n_tokens = np.zeros(n, np.int64)
        self._vectors = {pooling: np.zeros((n, d_model), np.float32) for pooling in poolings}

    def put(self, i: int, sums: PooledSums) -> None:
        """Set document `i` of them."""
        self._n_tokens[i] = sums.n_tokens
        for pooling, vectors in self._vectors.items():
            vector = sums.vector(pooling)
            if vector is not None:
                vectors[i] = vector

    def columns(self, hook_point: str) -> Iterator[tuple[pa.Field, pa.Array]]:
        """Yield the hook point's columns; a document without a pooled token has null vectors."""
        name = pooled_column(hook_point, "n_tokens")
        yield pa.field(name, pa.int64(), nullable=False), pa.array(self._n_tokens)
        empty = pa.array(self._n_tokens == 0) if (self._n_tokens == 0).any() else None
        for pooling, vectors in self._vectors.items():
            array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1], mask=empty)
            yield pa.field(pooled_column(hook_point, pooling), array.type), array


def documents_table(doc_ids: npt.NDArray[np.int64], vectors: Mapping[str, VectorColumns]) -> pa.Table:
    """Return the table of whole documents: doc_id, and by hook point `n_tokens` and a vector for each pooling."""
    fields, arrays = [pa.field("doc_id", pa.int64(), nullable=False)], [pa.array(doc_ids, pa.int64())]
    for hook_point, columns in vectors.items():
        for field, array in columns.columns(hook_point):
            fields.append(field)
            arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def pieces_table(
    doc_ids: Sequence[int], pieces: Mapping[str, Sequence[PooledSums]], poolings: Sequence[str]
) -> pa.Table:
    """Return the table of pieces: doc_id, and by hook point the counts and the sums that `poolings` need."""
    fields, arrays = [pa.field("doc_id", pa.int64(), nullable=False)], [pa.array(doc_ids, pa.int64())]
    for hook_point, sums in pieces.items():
        for count in _COUNTS:
            fields.append(pa.field(pooled_column(hook_point, count), pa.int64(), nullable=False))
            arrays.append(pa.array([getattr(one, count) for one in sums], pa.int64()))
        for pooling in poolings:
            part, type_ = _PIECE_PARTS[pooling]
            values = np.stack([getattr(one, part) for one in sums])
            array = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), type_), values.shape[1])
            fields.append(pa.field(pooled_column(hook_point, part), array.type))
            arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def piece_columns(hook_points: Iterable[str], poolings: Iterable[str]) -> list[str]:
    """Return the columns of a table of pieces that these vectors need."""
    parts = [*_COUNTS, *(_PIECE_PARTS[pooling][0] for pooling in poolings)]
    return ["doc_id", *(pooled_column(name, part) for name in hook_points for part in parts)]


def piece_of(
    table: pa.Table, doc_id: int, hook_point: str, poolings: Sequence[str], *, key: str
) -> PooledSums:
    """Return a document's piece from a table of pieces.

    Raises:
        FormatError: the table, of the object `key`, does not have it.
    """
    try:
        i = table["doc_id"].to_pylist().index(doc_id)
        column = {part: table[pooled_column(hook_point, part)][i] for part in _COUNTS}
        arrays: dict[str, Any] = dict.fromkeys(("sum", "weighted_sum", "max", "last"))
        for pooling in poolings:
            part, _ = _PIECE_PARTS[pooling]
            arrays[part] = table[pooled_column(hook_point, part)][i].values.to_numpy()
    except (KeyError, ValueError) as error:
        raise _broken(key, f"it has no piece of document {doc_id} at {hook_point!r} ({error!r})") from error
    return PooledSums(**{part: value.as_py() for part, value in column.items()}, **arrays)


def vectors_of(
    table: pa.Table, hook_point: str, pooling: str, d_model: int, *, key: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Vector]:
    """Return doc_ids and n_tokens `(n,)`, and the vectors `(n_with, d_model)` of the documents whose n_tokens is not 0.

    Raises:
        FormatError: the table, of the object `key`, does not have them.
    """
    try:
        doc_ids = table["doc_id"].to_numpy()
        n_tokens = table[pooled_column(hook_point, "n_tokens")].to_numpy()
        column = table[pooled_column(hook_point, pooling)]
        if column.type != pa.list_(pa.float32(), d_model):
            raise ValueError(f"{column.type} instead of {d_model} float32")
        chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
        flat = chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, np.float32), *chunks])
        vectors = flat.reshape(-1, d_model)
        if len(vectors) != np.count_nonzero(n_tokens):
            raise ValueError(f"{len(vectors)} vectors of {np.count_nonzero(n_tokens)} documents with tokens")
    except (KeyError, ValueError) as error:
        raise _broken(key, f"it does not hold {pooling!r} vectors of {hook_point!r} ({error!r})") from error
    return doc_ids, n_tokens, vectors


def pooled_bytes(table: pa.Table) -> bytes:
    """Return a table of vectors as a Parquet file with page checksums; bytes of one significance lie together."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        use_byte_stream_split=True,
        write_statistics=["doc_id"],
        write_page_checksum=True,
        row_group_size=ROWS_PER_GROUP,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def documents_key(run: str, unit: int, attempt: str) -> str:
    """Return the key of a unit's finished vectors."""
    return f"runs/{run}/pooled/{unit:08}-{attempt}.parquet"


def pieces_key(run: str, unit: int, attempt: str) -> str:
    """Return the key of a unit's pieces."""
    return f"runs/{run}/pooled/pieces-{unit:08}-{attempt}.parquet"


def merged_key(run: str, number: int, attempt: str) -> str:
    """Return the key of an object of merged vectors; a sealed run may have several."""
    return f"runs/{run}/pooled/merged-{number:04}-{attempt}.parquet"


def pooled_objects(
    collection: Collection, objects: Iterable[StoredObject], *, pieces: bool = False
) -> list[StoredObject]:
    """Return those of a unit's or a seal's objects that hold finished vectors, or pieces."""
    folder = f"runs/{collection.id}/pooled/"
    return [o for o in objects if o.key.startswith(folder) and o.key.startswith(folder + "pieces-") == pieces]


def spanning_documents(units: Sequence[Unit]) -> Iterator[tuple[int, list[int]]]:
    """Yield each document that has rows in several units, and these units, both ascending.

    Args:
        units: Of the tokenization, all of them, ascending; their `meta` says their first and last document.
    """
    open_doc, open_units = -1, list[int]()
    for unit in units:
        first, last = int(unit.meta["first_doc"]), int(unit.meta["last_doc"])
        if open_units and first == open_doc:
            open_units.append(unit.unit)
            if last == first:
                continue
        if len(open_units) > 1:
            yield open_doc, open_units
        open_doc, open_units = last, [unit.unit]
    if len(open_units) > 1:
        yield open_doc, open_units


def _broken(key: str, found: str) -> FormatError:
    return FormatError(
        ErrorKind.OBJECT_DAMAGED,
        f"object {key!r} is not a table of pooled vectors: {found}; it was written by a faulty program: see fsck",
    )
