"""How is whatever a user calls a corpus read as a stream of records?

`open_source` looks at the value and returns one of the sources of this package: files (`source_files`), Hugging Face
datasets (`source_datasets`), or what is in memory already (here). All stream; none holds more than a batch.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from actstore.errors import ErrorKind, InvalidInputError

from .records import (
    BATCH_BYTES,
    BATCH_ROWS,
    BadDocuments,
    ReadOptions,
    Record,
    Records,
    Source,
    batch_records,
)
from .source_datasets import dataset_source, hub_source, is_hub_name, is_saved_dataset, saved_dataset_source
from .source_files import FORMATS, file_source, path_exists, without_secrets

SOURCE_FORMATS = (*FORMATS, "hub")


class SourceList(tuple[Any, ...]):
    """Several sources that make one corpus, in this order: paths, globs and URLs, or whatever else is a source.

    A plain list of strings is a list of texts, so several files are named with this (or as `pathlib.Path` objects).

    >>> SourceList(["a/*.parquet", "s3://bucket/b.parquet"])[1]
    's3://bucket/b.parquet'
    """


@dataclass(frozen=True, slots=True)
class SourceChoice:
    """How a source that is not an object in memory is to be understood."""

    format: str | None = None
    """One of `SOURCE_FORMATS`, or None to find out."""

    split: str | None = None
    """Split of a `datasets` source."""

    subset: str | None = None
    """Subset (configuration) of a hub dataset."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""

    streaming: bool = True
    """Whether a hub dataset is read as it comes instead of downloaded first."""

    storage_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the fsspec client behind a URL."""


def open_source(source: Any, *, options: ReadOptions, choice: SourceChoice) -> Source:
    """Return a source of records.

    Args:
        source: A path, glob or URL of files, or a folder of them; a folder that `datasets` saved; a hub name; a `datasets`
            object; a pandas, polars or pyarrow table; an iterable of records or strings; a `SourceList` of any of these.
        options: What the import wants of it.
        choice: How it is to be understood.

    Raises:
        NotFoundError: nothing is there.
        InvalidInputError: something is there that is no source of documents.
    """
    if choice.format is not None and choice.format not in SOURCE_FORMATS:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"source_format must be one of {', '.join(SOURCE_FORMATS)}, got {choice.format!r}",
        )
    if isinstance(source, list | tuple) and source and all(isinstance(s, os.PathLike) for s in source):
        source = SourceList(source)
    if isinstance(source, SourceList):
        sources = tuple(open_source(item, options=options, choice=choice) for item in source)
        if not sources:
            raise InvalidInputError(ErrorKind.BAD_ARGUMENT, "the list of sources is empty: name at least one")
        return sources[0] if len(sources) == 1 else ChainedSource(sources)
    if isinstance(source, str | os.PathLike):
        return _path_source(os.fspath(source), options, choice)
    return _memory_source(source, options=options, split=choice.split)


def _path_source(path: str, options: ReadOptions, choice: SourceChoice) -> Source:
    hub = partial(
        hub_source,
        split=choice.split,
        subset=choice.subset,
        revision=choice.revision,
        streaming=choice.streaming,
    )
    if choice.format == "hub":
        return hub(path)
    if choice.format is None and is_saved_dataset(path):
        return saved_dataset_source(path, split=choice.split)
    storage = choice.storage_options
    if choice.format is None and is_hub_name(path) and not path_exists(path, storage_options=storage):
        return hub(path)
    if choice.format is None and os.path.isdir(path) and (choice.split or choice.subset):
        return hub(path)  # a downloaded copy of a hub dataset: `datasets` knows its splits
    for argument in ("split", "subset", "revision"):
        if (value := getattr(choice, argument)) is not None:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{argument}={value!r} is for datasets, and {without_secrets(path)!r} names files: leave it out, or give a "
                "dataset's name",
            )
    return file_source(path, options=options, source_format=choice.format, storage_options=storage)


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
        return batch_records(self._records(bad))

    def _records(self, bad: BadDocuments) -> Iterator[Record]:
        for i, record in enumerate(self.records):
            row = {self.options.text_column: record} if isinstance(record, str) else record
            if not isinstance(row, Mapping):
                bad.reject(
                    f"record {i}",
                    f"it is a {type(record).__name__}, not a mapping or a string",
                    "pass one mapping or string per document",
                )
                continue
            text = row.get(self.options.text_column)
            yield Record(row, str(i), len(text) if isinstance(text, str) else 0)


@dataclass(frozen=True, slots=True)
class ChainedSource:
    """Several sources, one after the other."""

    sources: tuple[Source, ...]

    @property
    def description(self) -> str:
        """All of them."""
        return ", ".join(source.description for source in self.sources)

    @property
    def schema(self) -> pa.Schema | None:
        """Unknown: each source has its own."""
        return None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of all of them."""
        return tuple(warning for source in self.sources for warning in source.warnings)

    def read(self, bad: BadDocuments) -> Iterator[Records]:
        """Yield the records of the sources in order."""
        for source in self.sources:
            yield from source.read(bad)
