"""How is whatever a user calls a corpus read as a stream of records?

`open_source` looks at the value and returns one of the sources of this package: files (`source_files`), Hugging Face
datasets (`source_datasets`), or what is in memory already (here). All stream; none holds more than a batch.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actstore.errors import ErrorKind, InvalidInputError

from .records import BATCH_BYTES, BATCH_ROWS, BadDocuments, ReadOptions, Records, Source
from .source_datasets import dataset_source, hub_source, is_hub_name, is_saved_dataset, saved_dataset_source
from .source_files import FORMATS, file_source, path_exists, without_secrets

SOURCE_FORMATS = (*FORMATS, "hub")


def open_source(
    source: Any,
    *,
    options: ReadOptions,
    source_format: str | None,
    split: str | None,
    subset: str | None,
    revision: str | None,
) -> Source:
    """Return a source of records.

    Args:
        source: A path, glob or URL of JSONL, Parquet or text files, or a folder of them; a folder that `datasets` saved; a
            hub name; a `datasets` object; a pandas, polars or pyarrow table; an iterable of records or strings.
        options: What the import wants of it.
        source_format: One of `SOURCE_FORMATS`, or None to find out.
        split: Split of a `datasets` source.
        subset: Subset (configuration) of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.

    Raises:
        NotFoundError: nothing is there.
        InvalidInputError: something is there that is no source of documents.
    """
    if source_format is not None and source_format not in SOURCE_FORMATS:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"source_format must be one of {', '.join(SOURCE_FORMATS)}, got {source_format!r}",
        )
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if source_format == "hub":
            return hub_source(path, split=split, subset=subset, revision=revision)
        if is_saved_dataset(path) and source_format is None:
            return saved_dataset_source(path, split=split)
        if source_format is None and is_hub_name(path) and not path_exists(path):
            return hub_source(path, split=split, subset=subset, revision=revision)
        for argument, value in (("split", split), ("subset", subset), ("revision", revision)):
            if value is not None:
                raise InvalidInputError(
                    ErrorKind.BAD_ARGUMENT,
                    f"{argument}={value!r} is for datasets, and {without_secrets(path)!r} names files: leave it out, or give a "
                    "dataset's name",
                )
        return file_source(path, options=options, source_format=source_format)
    return _memory_source(source, options=options, split=split)


def _memory_source(source: Any, *, options: ReadOptions, split: str | None) -> Source:
    if type(source).__module__.partition(".")[0] == "datasets":
        return dataset_source(source, description=f"datasets.{type(source).__name__}", split=split)
    if isinstance(source, pa.RecordBatch):
        source = pa.Table.from_batches([source])
    name = f"{type(source).__module__.partition('.')[0]}.{type(source).__name__}"
    if hasattr(source, "__arrow_c_stream__"):
        return ArrowSource(_arrow_reader(source, name), name)
    if isinstance(source, Iterable) and not isinstance(source, bytes | bytearray | memoryview | Mapping):
        return IterableSource(source, name, options)
    raise InvalidInputError(
        ErrorKind.BAD_ARGUMENT,
        f"the source is a {name}: pass a path, a datasets, pandas, polars or pyarrow table, or an iterable of records (one "
        "mapping or string per document)",
    )


def _arrow_reader(source: Any, name: str) -> pa.RecordBatchReader:
    try:
        return pa.RecordBatchReader.from_stream(source)
    except (pa.ArrowException, TypeError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_DOCUMENT,
            f"the {name} cannot be read as Arrow ({error}): give each column one type, for example with astype(str)",
        ) from error


@dataclass(frozen=True, slots=True)
class ArrowSource:
    """A table in memory, or a stream of Arrow batches. Keys are row numbers."""

    reader: pa.RecordBatchReader
    description: str
    warnings: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema | None:
        """The table's own."""
        return self.reader.schema

    def read(self, bad: BadDocuments) -> Iterator[Records]:  # noqa: ARG002
        """Yield the rows in order."""
        row = 0
        for batch in self.reader:
            step = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1)))
            for start in range(0, batch.num_rows, step):
                piece = batch.slice(start, step)
                yield Records(piece, [str(row + i) for i in range(piece.num_rows)])
                row += piece.num_rows


@dataclass(frozen=True, slots=True)
class IterableSource:
    """Records or strings of any Python iterable, read once. Keys are record numbers."""

    records: Iterable[Any]
    description: str
    options: ReadOptions
    warnings: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema | None:
        """Unknown until all is read."""
        return None

    def read(self, bad: BadDocuments) -> Iterator[Records]:
        """Yield the records in order; strings become records of the text column alone."""
        rows: list[Mapping[Any, Any]] = []
        places: list[str] = []
        nbytes = 0
        for i, record in enumerate(self.records):
            row = {self.options.text_column: record} if isinstance(record, str) else record
            if not isinstance(row, Mapping):
                bad.reject(
                    f"record {i}",
                    f"it is a {type(record).__name__}, not a mapping or a string",
                    "pass one mapping or string per document",
                )
                continue
            rows.append(row)
            places.append(str(i))
            text = row.get(self.options.text_column)
            nbytes += len(text) if isinstance(text, str) else 0
            if nbytes >= BATCH_BYTES or len(rows) == BATCH_ROWS:
                yield Records(rows, places)
                rows, places, nbytes = [], [], 0
        if rows:
            yield Records(rows, places)
