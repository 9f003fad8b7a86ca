"""How does SQL read codes without a copy of them? As a data source that decodes what a query's conditions leave, and no more.

DuckDB hands a pyarrow dataset the columns and the conditions that it proved to be needed of it, and takes the conditions for
applied. The datasets here are such sources: `scanner` finds ranges of rows, latents or documents outside of which the conditions
cannot hold, decodes those in batches, and filters every batch by the conditions themselves. So nothing here decides what a
query means, and a range that is too wide costs time, never an answer. Each scan decodes anew: memory does not grow with the
run, and a relation that a query mentions twice is read twice.

Which ranges may hold matches is told by Arrow's own simplification of a condition under a guarantee (`row >= 0 and row < 64`),
the one that prunes files of partitioned datasets.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs

from actstore.codes import Codes, unit_object
from actstore.errors import ActstoreError, NotFoundError
from actstore.pooled_codes import PooledCodes
from actstore.sparse import SparseRows

from .code_relations import CODES_SCHEMA, POOLED_SCHEMA, Reads
from .latent_filter import has_statistics

Range = tuple[int, int]
"""Half-open."""

_FAN_OUT = 64
"""Parts that a range is cut into to see which may hold matches; the check of one takes about 15 us."""

_MOST_PARTS = 2048
"""Parts checked at a time."""

_MOST_RANGES = 256
"""Ranges beyond which they are not cut further: what is asked for is all over the place."""

_MOST_LATENTS = 4096
"""Latents beyond which postings are not read one by one."""

_BATCH_CODES = 1 << 18
"""Codes handed over at a time: 4 MiB as Arrow."""

_BATCH_ROWS = 8192
"""Rows decoded at a time: about one page of token-major codes."""

_BATCH_DOCS = 1024

_PAGE_CODES = 1 << 16
"""Postings that reading one rare latent decodes along with it."""


class _Reader(ds.Scanner):  # type: ignore[misc]
    """What DuckDB asks of a scanner: its columns, and one pass over its rows."""

    def __init__(self, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        self._schema = schema
        self._batches = batches

    @property
    def projected_schema(self) -> pa.Schema:
        return self._schema

    def to_reader(self) -> pa.RecordBatchReader:
        return pa.RecordBatchReader.from_batches(self._schema, self._batches)


class _Source(ds.Dataset):  # type: ignore[misc]
    """A relation that is decoded when it is scanned; `tables` is what differs between relations."""

    # The base class refuses to be initialised from Python; nothing of it is used but its name.
    def __init__(self, columns: pa.Schema, reads: Reads) -> None:
        self._columns = columns
        self._reads = reads

    @property
    def schema(self) -> pa.Schema:
        """Columns of the relation."""
        return self._columns

    def scanner(
        self,
        columns: Sequence[str] | None = None,
        filter: Any = None,
        **_: Any,
    ) -> _Reader:
        """Return one pass over the rows on which `filter` holds.

        Args:
            columns: Columns wanted, in this order; None for all.
            filter: A pyarrow expression over the columns; None for all rows.
        """
        names = list(self._columns.names if columns is None else columns)
        schema = pa.schema([self._columns.field(name) for name in names])
        return _Reader(schema, self._batches(names, filter))

    def tables(self, filter: Any) -> Iterator[pa.Table]:
        """Yield tables that together hold every row on which `filter` may hold, each row once."""
        raise NotImplementedError

    def _batches(self, names: list[str], filter: Any) -> Iterator[pa.RecordBatch]:
        try:
            for table in self.tables(filter):
                found = table if filter is None else table.filter(filter)
                yield from found.select(names).to_batches(max_chunksize=_BATCH_CODES)
        except ActstoreError as error:
            self._reads.error = self._reads.error or error
            raise


class CodeRows(_Source):
    """The codes of a run in a dictionary as `CODES_SCHEMA`, from the token-major codes or the postings, whichever is less.

    Memory: one page of codes, or the postings of the most frequent latent asked for.
    """

    def __init__(self, codes: Codes, reads: Reads) -> None:
        super().__init__(CODES_SCHEMA, reads)
        self._codes = codes

    def tables(self, filter: Any) -> Iterator[pa.Table]:
        """Yield the codes in row order or latent by latent."""
        codes = self._codes
        last = max(codes.collection.units, default=-1)
        rows = ranges_where(filter, "row", self._columns, stop=(last + 1) * codes.rows_per_unit)
        latents = self._latents(filter)
        if latents is not None and self._latents_are_cheaper(latents, rows):
            yield from self._by_latent(latents)
        else:
            yield from self._by_row(rows)

    def _latents(self, filter: Any) -> npt.NDArray[np.int64] | None:
        """Return the few latents that a condition leaves; None where they are many or there are no postings."""
        if filter is None or not has_statistics(self._codes):
            return None
        ranges = ranges_where(filter, "latent", self._columns, stop=self._codes.n_latents)
        if sum(stop - start for start, stop in ranges) > _MOST_LATENTS:
            return None
        return np.concatenate([np.empty(0, np.int64), *(np.arange(*of_range) for of_range in ranges)])

    def _latents_are_cheaper(self, latents: npt.NDArray[np.int64], rows: Sequence[Range]) -> bool:
        codes, step = self._codes, self._codes.rows_per_unit
        counts = codes.postings().counts()[latents]
        by_latent = int(np.maximum(counts, _PAGE_CODES).sum())
        by_row = 0.0
        for unit, entry in codes.collection.units.items():
            first, stop = unit * step, (unit + 1) * step
            wanted = sum(max(0, min(b, stop) - max(a, first)) for a, b in rows)
            # A row costs the page that it is in.
            pages = sum(min(a, b) < stop and b > first for a, b in rows)
            share = min(1.0, (wanted + pages * _BATCH_ROWS) / step) if wanted else 0.0
            by_row += share * int(entry.meta.get("nnz", 0))
        return by_latent < by_row

    def _by_latent(self, latents: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
        postings = self._codes.postings()
        for obj in postings.objects_of(latents):
            self._reads.note(obj.key, obj.nbytes)
        for latent in latents.tolist():
            rows, values = postings.latent(latent)
            yield _code_table(rows, np.full(len(rows), latent, np.int32), values)

    def _by_row(self, ranges: Sequence[Range]) -> Iterator[pa.Table]:
        codes, step = self._codes, self._codes.rows_per_unit
        for unit in sorted(codes.collection.units):
            first = unit * step
            inside = [(a, b) for a, b in ranges if a < first + step and b > first]
            if not inside:
                continue
            entry = codes.collection.units[unit]
            obj = unit_object(codes.collection, entry)
            self._reads.note(obj.key, obj.nbytes)
            numbers = codes.unit_rows(unit)
            held = codes.unit(unit)
            for start, stop in inside:
                low, high = (int(i) for i in np.searchsorted(numbers, [start, stop]))
                for at in range(low, high, _BATCH_ROWS):
                    until = min(high, at + _BATCH_ROWS)
                    yield _row_table(numbers[at:until], held.slice(at, until))


class PooledCodeRows(_Source):
    """The pooled codes of a run in a dictionary as `POOLED_SCHEMA`. Memory: one unit's."""

    def __init__(self, codes: Codes, n_documents: int, reads: Reads) -> None:
        super().__init__(POOLED_SCHEMA, reads)
        self._codes = codes
        self._n_documents = n_documents

    def tables(self, filter: Any) -> Iterator[pa.Table]:
        """Yield documents, ascending."""
        pooled = self._codes.pooled()
        for unit in self._codes.collection.units.values():
            for obj in unit.objects:
                if "/pooled/" in obj.key:
                    self._reads.note(obj.key, obj.nbytes)
        ranges = ranges_where(filter, "doc_id", self._columns, stop=self._n_documents)
        few = sum(stop - start for start, stop in ranges) <= _MOST_RANGES
        batches = _pooled_documents(pooled, ranges) if few else pooled.scan(_BATCH_DOCS)
        for batch in batches:
            yield pa.table(
                {
                    "doc_id": batch.entry_docs,
                    "latent": batch.latents.astype(np.int32),
                    "max": batch.max.astype(np.float32),
                    "mean": batch.mean,
                    "sum": batch.sum,
                    "count": batch.count.astype(np.int64),
                },
                schema=POOLED_SCHEMA,
            )


def _pooled_documents(pooled: PooledCodes, ranges: Sequence[Range]) -> Iterator[Any]:
    for start, stop in ranges:
        for doc_id in range(start, stop):
            try:
                found = pooled.documents([doc_id])
            except NotFoundError:  # without a token, or not encoded yet: not in the relation
                continue
            yield found


def ranges_where(condition: Any, column: str, schema: pa.Schema, *, stop: int) -> list[Range]:
    """Return ascending, disjoint ranges of a column outside of which a condition holds for no row.

    Args:
        condition: A pyarrow expression over `schema`; None for one that always holds.
        column: A column of whole numbers in `[0, stop)`, never null.
        schema: Columns that the condition may mention.
        stop: Above every number.

    >>> ranges_where(ds.field("row").isin([3, 70]) & (ds.field("value") > 1), "row", CODES_SCHEMA, stop=1000)
    [(3, 4), (70, 71)]
    """
    if stop <= 0:
        return []
    ranges = [(0, stop)]
    if condition is None:
        return ranges
    if column not in str(condition):  # then it cannot tell numbers apart
        return ranges
    while len(ranges) <= _MOST_RANGES and any(b - a > 1 for a, b in ranges):
        n_parts = max(2, min(_FAN_OUT, _MOST_PARTS // max(1, len(ranges))))
        cut = [part for of_range in ranges for part in _parts(*of_range, n_parts)]
        ranges = _possible(cut, condition, column, schema)
    return _joined(ranges)


def _parts(start: int, stop: int, n_parts: int) -> list[Range]:
    step = max(1, -(-(stop - start) // n_parts))
    return [(at, min(stop, at + step)) for at in range(start, stop, step)]


def _possible(ranges: Sequence[Range], condition: Any, column: str, schema: pa.Schema) -> list[Range]:
    """Return the ranges in which the condition may hold, by Arrow's pruning of partitions; touches no file."""
    file_format, files = ds.ParquetFileFormat(), pyarrow.fs.LocalFileSystem()
    name, type_ = ds.field(column), schema.field(column).type

    def guarantee(start: int, stop: int) -> Any:
        inside = (name >= pa.scalar(start, type_)) & (name <= pa.scalar(stop - 1, type_))
        return name.is_valid() & inside

    fragments = [
        file_format.make_fragment(str(i), filesystem=files, partition_expression=guarantee(*of_range))
        for i, of_range in enumerate(ranges)
    ]
    dataset = ds.FileSystemDataset(fragments, schema, file_format, filesystem=files)
    return [ranges[int(fragment.path)] for fragment in dataset.get_fragments(filter=condition)]


def _joined(ranges: Sequence[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _row_table(numbers: npt.NDArray[np.int64], codes: SparseRows) -> pa.Table:
    rows = np.repeat(numbers, np.diff(codes.indptr))
    return _code_table(rows, codes.latents.astype(np.int32), codes.values)


def _code_table(
    rows: npt.NDArray[np.int64], latents: npt.NDArray[np.int32], values: npt.NDArray[Any]
) -> pa.Table:
    return pa.table({"row": rows, "latent": latents, "value": values.astype(np.float32)}, schema=CODES_SCHEMA)
