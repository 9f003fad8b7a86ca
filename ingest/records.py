"""What does a source of documents hand over, and what becomes of a record that cannot be a document?"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import pyarrow as pa

from actstore.errors import ErrorKind, InvalidInputError

BATCH_BYTES = 8 << 20
"""Records are handed over in batches of about this many bytes: enough to make per-batch costs vanish, little memory."""

BATCH_ROWS = 4_096
"""And at most this many records."""

BadDocumentPolicy: TypeAlias = Literal["error", "skip"]

_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a source needs to know of the import."""

    text_column: str
    """Name of the text column; sources of bare text give their text this name."""

    wanted: frozenset[str] | None
    """Source columns to read, None for all; a hint that saves reading."""

    max_document_bytes: int
    """UTF-8 bytes of one document; bounds what a source may buffer."""


@dataclass(frozen=True, slots=True)
class Records:
    """Consecutive records of a source, either typed by the source or still plain Python values."""

    rows: pa.RecordBatch | list[Mapping[Any, Any]]
    places: list[str]
    """Where each record stands in the source (`train.jsonl:17`), for messages and as its default key."""

    keys: list[str] | None = None
    """Names that the source itself gives its records: their default keys instead of the places."""


class Record(NamedTuple):
    """One record as plain Python values, on its way into a batch."""

    row: Mapping[Any, Any]
    place: str
    nbytes: int
    """About how much memory it takes."""

    key: str | None = None
    """The source's own name for it; all records of a source have one or none has."""


def batch_records(records: Iterable[Record]) -> Iterator[Records]:
    """Yield records in batches of at most `BATCH_ROWS` and about `BATCH_BYTES`."""
    rows: list[Mapping[Any, Any]] = []
    places: list[str] = []
    keys: list[str] = []
    total = 0
    for row, place, nbytes, key in records:
        rows.append(row)
        places.append(place)
        if key is not None:
            keys.append(key)
        total += nbytes
        if total >= BATCH_BYTES or len(rows) == BATCH_ROWS:
            yield Records(rows, places, keys or None)
            rows, places, keys, total = [], [], [], 0
    if rows:
        yield Records(rows, places, keys or None)


class Source(Protocol):
    """Documents to import. Read once, from first to last, in an order that the source alone decides."""

    @property
    def description(self) -> str:
        """What it is, for messages and for the corpus's record of where it came from."""

    @property
    def schema(self) -> pa.Schema | None:
        """The columns, where they are known before anything is read."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know about how the source was understood."""

    def read(self, bad: "BadDocuments") -> Iterator[Records]:
        """Yield the records in order, a few megabytes at a time; unreadable ones go to `bad`."""


class BadDocuments:
    """Decides about records that cannot become documents: stops the import, or counts and remembers some."""

    def __init__(self, policy: BadDocumentPolicy) -> None:
        self.policy = policy
        self.n_skipped = 0
        self.examples: list[str] = []

    def reject(
        self, place: str, problem: str, advice: str, *, kind: ErrorKind = ErrorKind.BAD_DOCUMENT
    ) -> None:
        """Leave one record out.

        Args:
            place: Where it stands.
            problem: What was found.
            advice: What the user can do, besides skipping it.
            kind: Of the error, where it is one.

        Raises:
            InvalidInputError: the policy is "error".
        """
        if self.policy == "error":
            raise InvalidInputError(
                kind, f"{place}: {problem}; {advice}, or leave such documents out with on_bad_document='skip'"
            )
        self.n_skipped += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{place}: {problem}")

    def warnings(self) -> list[str]:
        """Return what to report about skipped records."""
        if not self.n_skipped:
            return []
        more = self.n_skipped - len(self.examples)
        return [f"skipped {e}" for e in self.examples] + ([f"skipped {more} more"] if more else [])
