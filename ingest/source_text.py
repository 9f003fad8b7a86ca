"""How are text files and JSON files read: one document per file, per line, or per object?

Keys are the file's path below the source and, of JSON, the line (from 1); objects of an array and objects that take several
lines count from 0 instead.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from actstore.errors import ErrorKind

from .records import BadDocuments, ReadOptions, Record, Records, batch_records
from .source_streams import (
    BOM,
    READ_ERRORS,
    SourceFile,
    max_record_bytes,
    opened,
    read_lines,
    reject_encoding,
    unreadable,
)

_CHUNK = 1 << 20
_NEAR_END = 16
"""Where text ends in the middle of a value, `json` sees an error at most this many characters before the end."""

_LINES = re.compile(r"\.(jsonl|ndjson)(\.|$)")
_SPACE = re.compile(r"[ \t\r\n]*")


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
        return batch_records(self._records(bad))

    def _records(self, bad: BadDocuments) -> Iterator[Record]:
        for file in self.files:
            text = self._text(file, bad)
            if text is not None:
                yield Record({self.options.text_column: text}, file.name, len(text))

    def _text(self, file: SourceFile, bad: BadDocuments) -> str | None:
        limit = self.options.max_document_bytes
        try:
            with opened(file) as stream:
                data = stream.read(limit + len(BOM) + 1)
        except READ_ERRORS as error:
            raise unreadable(file, error) from error
        return parse_text(data, file.name, limit, bad)


def parse_text(data: bytes, place: str, limit: int, bad: BadDocuments) -> str | None:
    """Return a file's content as text, None where it cannot be a document."""
    text = data.removeprefix(BOM)
    if len(text) > limit:
        bad.reject(
            place,
            f"the file is larger than max_document_bytes={limit}",
            "raise the limit or split it",
            kind=ErrorKind.TOO_LARGE,
        )
        return None
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        reject_encoding(bad, place, error, len(data) - len(text))
        return None


@dataclass(frozen=True, slots=True)
class JsonSource:
    """JSON objects: one per line, or, in `.json` files, the objects of an array or whole files of objects."""

    files: tuple[SourceFile, ...]
    description: str
    options: ReadOptions
    lines_only: bool
    """Every file has one object per line; otherwise those called so have, and the others' beginning tells."""

    warnings: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema | None:
        """Unknown until all is read."""
        return None

    def read(self, bad: BadDocuments) -> Iterator[Records]:
        """Yield the records, files in order of their paths."""
        return batch_records(self._records(bad))

    def _records(self, bad: BadDocuments) -> Iterator[Record]:
        limit = max_record_bytes(self.options)
        for file in self.files:
            if self.lines_only or _LINES.search(file.name.lower()) or has_object_lines(file, limit):
                yield from _line_records(file, limit, bad)
            else:
                yield from _object_records(file, limit, bad)


def _line_records(file: SourceFile, limit: int, bad: BadDocuments) -> Iterator[Record]:
    for number, offset, line in read_lines(file, limit):
        place = f"{file.name}:{number}"
        row = _parse_line(line, place, offset, bad)
        if row is not None:
            yield Record(row, place, len(line or b""))


def _parse_line(line: bytes | None, place: str, offset: int, bad: BadDocuments) -> Mapping[str, Any] | None:
    if line is None:
        bad.reject(
            place,
            "the line is longer than any document may be",
            "raise max_document_bytes or check that the file has one object per line",
            kind=ErrorKind.TOO_LARGE,
        )
        return None
    start = len(BOM) if offset == 0 and line.startswith(BOM) else 0
    try:
        row = json.loads(line[start:].decode("utf-8"))
    except UnicodeDecodeError as error:
        reject_encoding(bad, place, error, offset + start)
        return None
    except (ValueError, RecursionError) as error:
        bad.reject(place, f"the line is not JSON ({error})", "repair it: each line must hold one JSON object")
        return None
    return _checked_object(row, place, bad, "the line", "write one JSON object per line")


def _checked_object(
    value: Any, place: str, bad: BadDocuments, what: str, advice: str
) -> Mapping[str, Any] | None:
    if isinstance(value, dict):
        return value
    found = "array" if isinstance(value, list) else type(value).__name__
    bad.reject(place, f"{what} holds a JSON {found}, not an object", advice)
    return None


def has_object_lines(file: SourceFile, limit: int) -> bool:
    """Return whether a file has one JSON object per line, as its first line that is not blank tells.

    An array never has; a first line that is broken JSON counts as one that should have been an object.
    """
    for _, offset, line in read_lines(file, limit):
        if line is None:
            return True
        text = line[len(BOM) :] if offset == 0 and line.startswith(BOM) else line
        if text.lstrip()[:1] == b"[":
            return False
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            # An object that goes on in the next line breaks off where the line ends; anything else is a broken line.
            return not (isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip()))
        return True
    return True


def _object_records(file: SourceFile, limit: int, bad: BadDocuments) -> Iterator[Record]:
    for number, (value, nbytes) in enumerate(_values(file, limit)):
        place = f"{file.name}:{number}"
        row = _checked_object(value, place, bad, "the item", "give objects, alone or in one array")
        if row is not None:
            yield Record(row, place, nbytes)


def _values(file: SourceFile, limit: int) -> Iterator[tuple[Any, int]]:
    """Yield the items of the one array in a file, or the values that stand there one after the other.

    What is no JSON cannot be stepped over: it ends the reading, whatever the policy for bad documents.
    """
    try:
        with opened(file) as stream:
            text = _JsonText(stream, limit)
            if text.peek() == "[":
                yield from text.items()
            else:
                while text.peek():
                    yield text.value()
    except (*READ_ERRORS, ValueError) as error:
        raise unreadable(file, error) from error


class _JsonText:
    """JSON values one after the other, holding one at a time."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._before = "", 0, 0
        self._ended = False

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._fill()

    def items(self) -> Iterator[tuple[Any, int]]:
        """Yield the items of an array, which must be all there is."""
        expected = "["
        while (found := self.peek()) in expected and found:
            self._at += 1
            if found == "]":
                break
            if found == "[" and self.peek() == "]":
                expected = "]"
                continue
            yield self.value()
            expected = ",]"
        else:
            raise self._broken(f"{' or '.join(map(repr, expected))} expected", self._at)
        if self.peek():
            raise self._broken("text after the array", self._at)

    def value(self) -> tuple[Any, int]:
        """Return the next value, and its length."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self._broken("a value nested too deeply", self._at) from error
            except json.JSONDecodeError as error:
                goes_on = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _NEAR_END
                if self._ended or not goes_on:
                    raise self._broken(error.msg, error.pos) from error
            else:
                if end < len(self._text) or self._ended:  # a number may go on
                    nbytes, self._at = end - self._at, end
                    return value, nbytes
            if len(self._text) - self._at > self._limit:
                raise self._broken(f"a value of more than {self._limit} characters", self._at)
            self._fill()

    def _fill(self) -> None:
        """Read as much again as is held, so that a long value is parsed few times."""
        data = self._stream.read(max(_CHUNK, len(self._text) - self._at))
        self._ended = not data
        self._before += self._at
        self._text, self._at = self._text[self._at :] + self._utf8.decode(data, final=self._ended), 0

    def _broken(self, problem: str, at: int) -> ValueError:
        return ValueError(f"not JSON at character {self._before + at}: {problem}")
