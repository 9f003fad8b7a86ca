"""How are files of documents read: JSONL, Parquet and plain text, single, in folders, by glob, local or behind a URL?

Files are taken in the order of their paths below the source, and a record's key is that path and its line (from 1) or row
(from 0), so that keys do not depend on the machine. A text file is one document.
"""

import bz2
import gzip
import io
import json
import lzma
import posixpath
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import fsspec
import fsspec.spec
import pyarrow as pa
import pyarrow.parquet as pq

from actstore._lazy import missing
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError, StorageError

from .records import BATCH_BYTES, BATCH_ROWS, BadDocuments, ReadOptions, Records, Source

FORMATS = ("jsonl", "parquet", "text")
_SUFFIX_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_TABLES = (".csv", ".tsv", ".arrow", ".feather", ".xlsx", ".sqlite", ".db")
"""Never meant as one document of text."""

KNOWN_SUFFIXES = (*_SUFFIX_FORMATS, *_COMPRESSED, *_TABLES, ".txt", ".md")
_BOM = b"\xef\xbb\xbf"
_REMOTE_BUFFER = 1 << 20
_MAX_ESCAPE = 6
"""Bytes of JSON (`\\u0041`) that one byte of text may take."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source."""

    fs: Any
    """The fsspec file system it is on."""

    path: str
    """Its path there."""

    name: str
    """Its path below the source, with `/`: what keys and messages call it."""


def without_secrets(path: str) -> str:
    """Return a URL without what may be credentials: user information and, of a web address, query and fragment.

    What is shown here ends up in the corpus for good, and in every document's `source_key`.

    >>> without_secrets("https://me:secret@host/a.jsonl?signature=secret"), without_secrets("s3://bucket/a?.jsonl")
    ('https://host/a.jsonl', 's3://bucket/a?.jsonl')
    """
    protocol, separator, place = path.partition("://")
    if not separator:
        return path
    if "http" in protocol:
        place = re.split("[?#]", place, maxsplit=1)[0]
    authority, slash, rest = place.partition("/")
    return f"{protocol}://{authority.rpartition('@')[2]}{slash}{rest}"


def path_exists(path: str) -> bool:
    """Return whether a path, glob or URL names anything."""
    return bool(_list_files(path))


def file_source(path: str, *, options: ReadOptions, source_format: str | None) -> Source:
    """Return the source of a file, a folder or a glob.

    Raises:
        NotFoundError: no such file, or a folder or glob without files.
        InvalidInputError: files of several formats, or of one that is not read.
    """
    files = _list_files(path)
    path = without_secrets(path)  # from here on it is only shown and stored
    if not files:
        raise NotFoundError(
            ErrorKind.SOURCE_NOT_FOUND,
            f"no file at {path!r}: give a file, a folder or a glob of JSONL, Parquet or text files, or a dataset's hub name",
        )
    kind, chosen = _choose(path, files, source_format)
    left_out = [f.name for f in files if f not in chosen]
    warnings = []
    if left_out:
        shown = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        warnings.append(
            f"read {len(chosen)} {kind} files of {path}, left out {len(left_out)} others: {shown}"
        )
    if kind == "parquet":
        return ParquetSource(tuple(chosen), path, options, _parquet_schema(chosen[0]), tuple(warnings))
    if kind == "jsonl":
        return JsonlSource(tuple(chosen), path, options, tuple(warnings))
    return TextSource(tuple(chosen), path, options, tuple(warnings))


def _list_files(path: str) -> list[SourceFile]:
    try:
        return _find(*fsspec.core.url_to_fs(path))
    except ImportError as error:
        raise missing(str(error), needed_for=f"reading {without_secrets(path)}", extra="all") from error
    except ValueError as error:
        raise InvalidInputError(
            ErrorKind.BAD_URL, f"source {without_secrets(path)!r} cannot be opened: {error}"
        ) from error
    except Exception as error:
        # Every file system raises errors of its own, which do not name the source.
        raise StorageError(
            ErrorKind.STORAGE_FAILED,
            f"source {without_secrets(path)!r} cannot be listed ({type(error).__name__}): check address, network and permissions",
        ) from error


def _find(fs: Any, root: str) -> list[SourceFile]:
    if fs.isfile(root):
        return [SourceFile(fs, root, posixpath.basename(without_secrets(root)))]
    if fs.isdir(root):
        base, paths = root, fs.find(root)
    else:
        base = root[: min((root.index(c) for c in "*?[" if c in root), default=len(root))].rpartition("/")[0]
        paths = [p for p in fs.glob(root) if fs.isfile(p)] if fs.exists(base or "/") or base == "" else []
    named = [(posixpath.relpath(p, base) if base else p, p) for p in paths]
    return [SourceFile(fs, p, n) for n, p in sorted(named) if not _is_hidden(n)]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/")) or name.endswith("/")


def _format_of(name: str) -> str:
    stem = name.lower()
    for suffix in _COMPRESSED:
        stem = stem.removesuffix(suffix)
    suffix = posixpath.splitext(stem)[1]
    return "table" if suffix in _TABLES else _SUFFIX_FORMATS.get(suffix, "text")


def _choose(
    path: str, files: Sequence[SourceFile], source_format: str | None
) -> tuple[str, Sequence[SourceFile]]:
    """Return the format and the files that have it."""
    by_format: dict[str, list[SourceFile]] = {}
    for file in files:
        by_format.setdefault(_format_of(file.name), []).append(file)
    if source_format is not None:
        # Asked for by name: a single file, or files of no known suffix, are taken at the user's word.
        return source_format, files if source_format == "text" else by_format.get(source_format, files)
    found = [kind for kind in ("parquet", "jsonl") if kind in by_format]
    if found == ["parquet", "jsonl"] and all(f.name.endswith(".json") for f in by_format["jsonl"]):
        found = ["parquet"]  # a downloaded dataset: its .json files describe it
    has_text = any(".txt" in f.name for f in by_format.get("text", []))
    if len(found) > 1 or (found and has_text):
        kinds = ", ".join(f"{len(v)} {k}" for k, v in sorted(by_format.items()))
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{path} holds files of several formats ({kinds}): choose with source_format= or a glob such as '{path}/*.jsonl'",
        )
    if found:
        return found[0], by_format[found[0]]
    if "text" not in by_format:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{path} holds no JSONL, Parquet or text file (found {by_format['table'][0].name}): convert it, for example with "
            "DuckDB's COPY ... TO 'x.parquet', or pass a pandas table; source_format='text' reads files as they are",
        )
    return "text", by_format["text"]


@contextmanager
def _opened(file: SourceFile) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed by its suffix; what fails on the way names the file."""
    with file.fs.open(file.path, "rb") as raw:
        suffix = posixpath.splitext(file.name)[1].lower()
        if suffix == ".gz":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        elif suffix == ".bz2":
            yield cast(BinaryIO, bz2.BZ2File(raw))
        elif suffix == ".xz":
            yield cast(BinaryIO, lzma.open(raw, "rb"))  # noqa: SIM115 - closed with the raw file
        elif suffix == ".zst":
            yield cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd")))
        elif isinstance(raw, fsspec.spec.AbstractBufferedFile):  # remote: its own readline() takes no limit
            yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw), _REMOTE_BUFFER))
        else:
            yield cast(BinaryIO, raw)


def _unreadable(file: SourceFile, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        ErrorKind.BAD_DOCUMENT,
        f"{file.name} cannot be read to its end ({error or type(error).__name__}): check that the file is whole and readable",
    )


_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


def _reject_encoding(bad: BadDocuments, place: str, error: UnicodeDecodeError, base: int) -> None:
    bad.reject(
        place,
        f"byte 0x{error.object[error.start]:02x} at offset {base + error.start} of the file is not UTF-8 ({error.reason})",
        "convert it with iconv",
    )


@dataclass(frozen=True, slots=True)
class TextSource:
    """Text files, one document each. A byte order mark is no part of the text."""

    files: tuple[SourceFile, ...]
    description: str
    options: ReadOptions
    warnings: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema | None:
        """The text alone."""
        return pa.schema([(self.options.text_column, pa.large_string())])

    def read(self, bad: BadDocuments) -> Iterator[Records]:
        """Yield the files in order of their paths."""
        rows: list[Mapping[Any, Any]] = []
        places: list[str] = []
        nbytes = 0
        for file in self.files:
            text = self._text(file, bad)
            if text is None:
                continue
            rows.append({self.options.text_column: text})
            places.append(file.name)
            nbytes += len(text)
            if nbytes >= BATCH_BYTES or len(rows) == BATCH_ROWS:
                yield Records(rows, places)
                rows, places, nbytes = [], [], 0
        if rows:
            yield Records(rows, places)

    def _text(self, file: SourceFile, bad: BadDocuments) -> str | None:
        limit = self.options.max_document_bytes
        try:
            with _opened(file) as stream:
                data = stream.read(limit + len(_BOM) + 1)
        except _READ_ERRORS as error:
            raise _unreadable(file, error) from error
        text = data.removeprefix(_BOM)
        if len(text) > limit:
            bad.reject(
                file.name,
                f"the file is larger than max_document_bytes={limit}",
                "raise the limit or split it",
                kind=ErrorKind.TOO_LARGE,
            )
            return None
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            _reject_encoding(bad, file.name, error, len(data) - len(text))
            return None


@dataclass(frozen=True, slots=True)
class JsonlSource:
    """JSON objects, one per line."""

    files: tuple[SourceFile, ...]
    description: str
    options: ReadOptions
    warnings: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema | None:
        """Unknown until all is read."""
        return None

    def read(self, bad: BadDocuments) -> Iterator[Records]:
        """Yield the records, files in order of their paths."""
        for file in self.files:
            rows: list[Mapping[Any, Any]] = []
            places: list[str] = []
            nbytes = 0
            for number, offset, line in _lines(file, self._max_line()):
                place = f"{file.name}:{number}"
                row = _parse_line(line, place, offset, bad)
                if row is None:
                    continue
                rows.append(row)
                places.append(place)
                nbytes += len(line or b"")
                if nbytes >= BATCH_BYTES or len(rows) == BATCH_ROWS:
                    yield Records(rows, places)
                    rows, places, nbytes = [], [], 0
            if rows:
                yield Records(rows, places)

    def _max_line(self) -> int:
        return _MAX_ESCAPE * self.options.max_document_bytes + (16 << 20)


def _lines(file: SourceFile, max_line: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield number, offset and bytes of every line that is not blank; None for one longer than `max_line`."""
    number, offset = 0, 0
    try:
        with _opened(file) as stream:
            while line := stream.readline(max_line):
                number += 1
                start, offset = offset, offset + len(line)
                if len(line) == max_line and not line.endswith(b"\n"):
                    while (rest := stream.readline(max_line)) and not rest.endswith(b"\n"):
                        offset += len(rest)
                    offset += len(rest)
                    yield number, start, None
                elif not line.isspace():
                    yield number, start, line
    except _READ_ERRORS as error:
        raise _unreadable(file, error) from error


def _parse_line(line: bytes | None, place: str, offset: int, bad: BadDocuments) -> Mapping[str, Any] | None:
    if line is None:
        bad.reject(
            place,
            "the line is longer than any document may be",
            "raise max_document_bytes or check that the file has one object per line",
            kind=ErrorKind.TOO_LARGE,
        )
        return None
    start = len(_BOM) if offset == 0 and line.startswith(_BOM) else 0
    try:
        row = json.loads(line[start:].decode("utf-8"))
    except UnicodeDecodeError as error:
        _reject_encoding(bad, place, error, offset + start)
        return None
    except (ValueError, RecursionError) as error:
        bad.reject(place, f"the line is not JSON ({error})", "repair it: each line must hold one JSON object")
        return None
    if not isinstance(row, dict):
        found = "array" if isinstance(row, list) else type(row).__name__
        bad.reject(place, f"the line holds a JSON {found}, not an object", "write one JSON object per line")
        return None
    return row


def _parquet_schema(file: SourceFile) -> pa.Schema:
    try:
        return pq.read_schema(file.path, filesystem=file.fs)
    except _READ_ERRORS as error:
        raise _unreadable(file, error) from error


@dataclass(frozen=True, slots=True)
class ParquetSource:
    """Rows of Parquet files; memory is bounded by their row groups."""

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
        except _READ_ERRORS as error:
            raise _unreadable(file, error) from error
