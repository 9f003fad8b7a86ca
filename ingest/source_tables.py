"""How are tables in files read: Parquet and CSV?"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import ErrorKind, InvalidInputError

from .records import BATCH_BYTES, BATCH_ROWS, BadDocuments, ReadOptions, Record, Records, batch_records
from .source_streams import (
    BOM,
    READ_ERRORS,
    SourceFile,
    max_record_bytes,
    read_lines,
    unreadable,
)


def parquet_schema(file: SourceFile) -> pa.Schema:
    """Return the columns of a Parquet file.

    Raises:
        InvalidInputError: it is no Parquet file.
    """
    try:
        return pq.read_schema(file.path, filesystem=file.fs)
    except READ_ERRORS as error:
        raise unreadable(file, error) from error


@dataclass(frozen=True, slots=True)
class ParquetSource:
    """Rows of Parquet files; memory is bounded by their row groups. Paths give no columns."""

    files: tuple[SourceFile, ...]
    description: str
    options: ReadOptions
    schema: pa.Schema | None
    """Of the first file; others may have more columns or wider types."""

    warnings: tuple[str, ...] = ()

    def read(self, bad: BadDocuments) -> Iterator[Records]:  # noqa: ARG002
        """Yield the rows, files in order of their paths."""
        for file in self.files:
            row = 0
            for batch in self._batches(file):
                yield Records(batch, [f"{file.name}:{row + i}" for i in range(batch.num_rows)])
                row += batch.num_rows

    def _batches(self, file: SourceFile) -> Iterator[pa.RecordBatch]:
        wanted = self.options.wanted
        try:
            with pq.ParquetFile(file.path, filesystem=file.fs) as parquet:
                names = [n for n in parquet.schema_arrow.names if wanted is None or n in wanted]
                for g in range(parquet.metadata.num_row_groups):
                    group = parquet.metadata.row_group(g)
                    step = BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)
                    yield from parquet.iter_batches(
                        max(1, min(BATCH_ROWS, step)), row_groups=[g], columns=names, use_threads=False
                    )
        except READ_ERRORS as error:
            raise unreadable(file, error) from error


@dataclass(frozen=True, slots=True)
class CsvSource:
    """Rows of CSV or TSV files as Excel writes them, with a header. Every value is text: CSV has no types.

    Keys are the line that a row begins in, from 1.
    """

    files: tuple[SourceFile, ...]
    description: str
    options: ReadOptions
    warnings: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema | None:
        """Unknown until all is read."""
        return None

    def read(self, bad: BadDocuments) -> Iterator[Records]:
        """Yield the rows, files in order of their paths."""
        # A setting of the whole process: it is only ever raised.
        csv.field_size_limit(max(csv.field_size_limit(), max_record_bytes(self.options)))
        return batch_records(record for file in self.files for record in self._records(file, bad))

    def _records(self, file: SourceFile, bad: BadDocuments) -> Iterator[Record]:
        lines = _Lines(file, max_record_bytes(self.options))
        delimiter = "\t" if ".tsv" in file.name.lower() else ","
        header: list[str] | None = None
        first = 1
        try:
            for values in csv.reader(lines, delimiter=delimiter, strict=True):
                place, first = f"{file.name}:{first}", lines.number + 1
                if not values:
                    continue  # a blank line
                if header is None:
                    header = _checked_header(values, file)
                elif _is_good_row(values, len(header), place, bad):
                    yield Record(dict(zip(header, values, strict=True)), place, sum(map(len, values)))
        except csv.Error as error:
            raise unreadable(file, ValueError(f"row at line {first}: {error}")) from error


class _Lines:
    """The lines of a file as text; bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, file: SourceFile, limit: int) -> None:
        self._file = file
        self._limit = limit
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for number, offset, line in read_lines(self._file, self._limit, skip_blank=False):
            self.number = number
            if line is None:
                raise unreadable(self._file, ValueError(f"line {number} is longer than any document may be"))
            start = len(BOM) if offset == 0 and line.startswith(BOM) else 0
            yield line[start:].decode("utf-8", "surrogateescape")


def _checked_header(names: list[str], file: SourceFile) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise InvalidInputError(
                ErrorKind.BAD_DOCUMENT,
                f"{file.name} has two columns {name!r} in its header ({', '.join(map(repr, names))}): name each once",
            )
    return names


def _is_good_row(values: list[str], n_columns: int, place: str, bad: BadDocuments) -> bool:
    if len(values) != n_columns:
        problem = f"the row has {len(values)} values, the header {n_columns}"
        bad.reject(place, problem, "put quotes around values that hold commas or line breaks")
        return False
    for value in values:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            byte = ord(value[error.start]) - 0xDC00
            bad.reject(place, f"byte 0x{byte:02x} is not UTF-8", "convert the file with iconv")
            return False
    return True
