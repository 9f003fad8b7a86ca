"""How are the bytes of one source file read: local or remote, plain or compressed, and never a silently short one?

Compression is told by the suffix. A compressed file that is cut off, empty, damaged, or followed by something else is an
error that names the file; so is everything else that fails while reading.
"""

import io
import lzma
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa

from actstore.errors import ErrorKind, InvalidInputError

from .records import BadDocuments, ReadOptions

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz"}
"""Compression of each suffix; pyarrow reads all but xz, and unlike the standard library it stops at what follows a stream."""

_CODECS = {**COMPRESSED, ".tgz": "gzip"}
BOM = b"\xef\xbb\xbf"
_BUFFER = 1 << 20
_XZ_MEMORY = 512 << 20
"""`xz -9` needs 65 MiB; a file may ask for 4 GiB."""

_MAX_ESCAPE = 6
"""Bytes of JSON (`\\u0041`) that one byte of text may take."""

_LINE_SLACK = 16 << 20
"""Room for the metadata of a record beside its text."""

READ_ERRORS = (OSError, EOFError, lzma.LZMAError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source."""

    fs: Any
    """The fsspec file system it is on."""

    path: str
    """Its path there."""

    name: str
    """Its path below the source, with `/`: what keys and messages call it."""


@contextmanager
def opened(file: SourceFile) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed by its suffix.

    Raises:
        OSError, EOFError, lzma.LZMAError, pa.ArrowException: on opening or reading; see `unreadable`.
    """
    with file.fs.open(file.path, "rb") as raw:
        codec = _CODECS.get(posixpath.splitext(file.name)[1].lower())
        if codec == "xz":
            yield cast(BinaryIO, io.BufferedReader(_XzReader(_NotEmpty(raw)), _BUFFER))
        elif codec is not None:
            inner = pa.PythonFile(_NotEmpty(raw), mode="r")
            yield cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(inner, codec), _BUFFER))
        else:  # a buffer of our own: readline() of fsspec's files takes no limit or goes byte by byte
            yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw), _BUFFER))


class _NotEmpty(io.RawIOBase):
    """A compressed file that has at least one byte: nothing at all would decompress to nothing."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._seen = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        if not data and not self._seen:
            raise EOFError("the compressed file is empty")
        self._seen = True
        buffer[: len(data)] = data
        return len(data)


class _XzReader(io.RawIOBase):
    """Decompresses the streams of an xz file one after the other; `lzma.open` takes a damaged one for the end."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._input = b""
        self._decoder: lzma.LZMADecompressor | None = _xz_decoder()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._decoder is not None or self._find_stream():
            decoder = self._decoder or _xz_decoder()
            if decoder.needs_input and not self._fill():
                raise EOFError("the compressed file is cut off")
            data = decoder.decompress(self._input, len(buffer))
            self._decoder, self._input = (None, decoder.unused_data) if decoder.eof else (decoder, b"")
            if data:
                buffer[: len(data)] = data
                return len(data)
        return 0

    def _fill(self) -> bool:
        if not self._input:
            self._input = self._raw.read(_BUFFER) or b""
        return bool(self._input)

    def _find_stream(self) -> bool:
        """Skip the zeros between streams; return whether another begins."""
        while self._fill():
            self._input = self._input.lstrip(b"\0")
            if self._input:
                return True
        return False


def _xz_decoder() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


def unreadable(file: SourceFile, error: Exception) -> InvalidInputError:
    """Return the error for a file that cannot be read to its end."""
    return InvalidInputError(
        ErrorKind.BAD_DOCUMENT,
        f"{file.name} cannot be read to its end ({error or type(error).__name__}): check that the file is whole and readable",
    )


def reject_encoding(bad: BadDocuments, place: str, error: UnicodeDecodeError, base: int) -> None:
    """Leave out a record that is not UTF-8; `base` is where in the file the decoded bytes begin."""
    bad.reject(
        place,
        f"byte 0x{error.object[error.start]:02x} at offset {base + error.start} of the file is not UTF-8 ({error.reason})",
        "convert it with iconv",
    )


def max_record_bytes(options: ReadOptions) -> int:
    """Return how many bytes of JSON or CSV a record may take: beyond it, it holds no document that may be kept."""
    return _MAX_ESCAPE * options.max_document_bytes + _LINE_SLACK


def read_lines(
    file: SourceFile, max_line: int, *, skip_blank: bool = True
) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield number (from 1), offset and bytes of every line; None for the bytes of one longer than `max_line`.

    Raises:
        InvalidInputError: the file cannot be read to its end.
    """
    number, offset = 0, 0
    try:
        with opened(file) as stream:
            while line := stream.readline(max_line):
                number += 1
                start, offset = offset, offset + len(line)
                if len(line) == max_line and not line.endswith(b"\n"):
                    while (rest := stream.readline(max_line)) and not rest.endswith(b"\n"):
                        offset += len(rest)
                    offset += len(rest)
                    yield number, start, None
                elif not (skip_blank and line.isspace()):
                    yield number, start, line
    except READ_ERRORS as error:
        raise unreadable(file, error) from error
