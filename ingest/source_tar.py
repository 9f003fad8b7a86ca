"""How are WebDataset archives read: which members make a sample, and which record does a sample make?

Members that stand one after the other and share a path up to the first dot of its last part are one sample, as in
https://github.com/webdataset/webdataset. Its record has the fields of its `.json` member and, if that holds no text column,
the content of its `.txt` member as the text (else a column `txt`). Other members (images, audio) are passed over unread.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from actstore.errors import ErrorKind

from .records import BadDocuments, ReadOptions, Record, Records, batch_records
from .source_streams import READ_ERRORS, SourceFile, max_record_bytes, opened, unreadable
from .source_text import parse_text
from .tar_members import TarMember, read_members

_TXT, _JSON = "txt", "json"


@dataclass(slots=True)
class _Sample:
    """What has been read of one sample."""

    key: str
    place: str
    parts: dict[str, bytes] = field(default_factory=dict)
    is_bad: bool = False


def split_name(name: str) -> tuple[str, str]:
    """Return a member's sample and extension; no sample for hidden members.

    >>> split_name("a/b.c/0001.cls.txt"), split_name("a/.x.txt"), split_name("notes")
    (('a/b.c/0001', 'cls.txt'), ('', ''), ('notes', ''))
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem else ("", "")


@dataclass(frozen=True, slots=True)
class TarSource:
    """Samples of tar archives, in the order they stand there. The sample's key becomes the document's."""

    files: tuple[SourceFile, ...]
    description: str
    options: ReadOptions
    warnings: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema | None:
        """Unknown until all is read."""
        return None

    def read(self, bad: BadDocuments) -> Iterator[Records]:
        """Yield the samples, archives in order of their paths."""
        return batch_records(self._records(bad))

    def _records(self, bad: BadDocuments) -> Iterator[Record]:
        for file in self.files:
            for sample in self._samples(file, bad):
                row = None if sample.is_bad else self._row(sample, bad)
                if row is not None:
                    yield Record(row, sample.place, sum(map(len, sample.parts.values())), sample.key)

    def _samples(self, file: SourceFile, bad: BadDocuments) -> Iterator[_Sample]:
        sample: _Sample | None = None
        try:
            with opened(file) as stream:
                for member in read_members(stream):
                    name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                    key, extension = split_name(name.removeprefix("./"))
                    if not key:
                        continue
                    if sample is None or key != sample.key:
                        if sample is not None:
                            yield sample
                        sample = _Sample(key, f"{file.name}:{key}")
                    if extension in (_TXT, _JSON):
                        self._take(sample, extension, member, bad)
        except READ_ERRORS as error:
            raise unreadable(file, error) from error
        if sample is not None:
            yield sample

    def _take(self, sample: _Sample, extension: str, member: TarMember, bad: BadDocuments) -> None:
        limit = self.options.max_document_bytes if extension == _TXT else max_record_bytes(self.options)
        if sample.is_bad:
            return
        if member.size > limit:
            sample.is_bad = True
            bad.reject(
                sample.place,
                f"its .{extension} has {member.size} bytes, more than max_document_bytes allows",
                "raise the limit or split it",
                kind=ErrorKind.TOO_LARGE,
            )
        elif extension in sample.parts:
            sample.is_bad = True
            bad.reject(
                sample.place, f"the sample has two .{extension} members", "give samples different names"
            )
        else:
            sample.parts[extension] = member.read()

    def _row(self, sample: _Sample, bad: BadDocuments) -> Mapping[str, Any] | None:
        if not sample.parts:
            advice = "put the members of a sample one after the other (tar --sort=name)"
            bad.reject(sample.place, "the sample has no .txt and no .json member", advice)
            return None
        row: Mapping[str, Any] | None = {}
        if _JSON in sample.parts:
            row = _parse_object(sample.parts[_JSON], sample.place, bad)
        if row is None or _TXT not in sample.parts:
            return row
        text = parse_text(sample.parts[_TXT], sample.place, self.options.max_document_bytes, bad)
        if text is None:
            return None
        column = self.options.text_column
        return {**row, _TXT if column in row else column: text}


def _parse_object(data: bytes, place: str, bad: BadDocuments) -> Mapping[str, Any] | None:
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        bad.reject(place, f"its .json member is not JSON ({error})", "repair it")
        return None
    if not isinstance(row, dict):
        bad.reject(place, f"its .json member holds a {type(row).__name__}, not an object", "write one object")
        return None
    return row
