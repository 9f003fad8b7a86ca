"""What does a corpus hold, and how are single documents read from it? (FORMAT.md, section 7)"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.log.values import Collection, Unit
from actstore.objects import ObjectReader

DOC_ID = "doc_id"
TEXT = "text"
SOURCE_KEY = "source_key"
FIXED_COLUMNS = (DOC_ID, TEXT, SOURCE_KEY)
"""Columns of every corpus; all others are the user's metadata."""

ROLES = "roles"
"""Column of a corpus of conversations: who wrote which characters of the text."""

ROLES_TYPE = pa.list_(pa.struct([("role", pa.string()), ("start", pa.int32()), ("end", pa.int32())]))
"""One entry per message, in their order; characters are Unicode code points, half-open, and no two ranges overlap."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Immutable documents, numbered from 0 in the order they were imported, in Parquet parts."""

    collection: Collection
    objects: ObjectReader

    @property
    def id(self) -> str:
        """The corpus's name."""
        return self.collection.id

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return self.collection.rows

    @property
    def columns(self) -> dict[str, str]:
        """Arrow type, as text, of every stored column, metadata included."""
        return dict(self.collection.config["columns"])

    @property
    def is_chat(self) -> bool:
        """Whether the texts are rendered conversations: with a column `roles`, and with special tokens written out."""
        return "chat" in self.collection.config

    @property
    def allows_special_tokens(self) -> bool:
        """Whether messages of its conversations may hold special tokens."""
        return bool(self.collection.config.get("chat", {}).get("allow_special_tokens"))

    @property
    def parts(self) -> list[Unit]:
        """The Parquet parts in document order."""
        return [self.collection.units[i] for i in sorted(self.collection.units)]

    def part_paths(self, first_doc: int = 0, last_doc: int | None = None) -> Iterator[str]:
        """Yield checked local files of the parts that hold documents `first_doc` to `last_doc`, both included."""
        for part in self.parts:
            start = int(part.meta["first_doc"])
            if start + part.rows > first_doc and (last_doc is None or start <= last_doc):
                yield self.objects.file(part.objects[0])

    def documents(self, doc_ids: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Return the given documents, in the order asked, one table row each.

        Reads the row groups that hold them, not whole parts.

        Args:
            doc_ids: Document numbers; may repeat.
            columns: Columns to read besides `doc_id`; None for all.

        Raises:
            NotFoundError: a number outside `[0, n_documents)`.
            InvalidInputError: numbers that are not whole, or a column that the corpus has not.
        """
        wanted = _whole_numbers(doc_ids)
        _check_columns(columns, self.columns, self.id)
        bad = wanted[(wanted < 0) | (wanted >= self.n_documents)]
        if bad.size:
            raise NotFoundError(
                ErrorKind.ROW_NOT_FOUND,
                f"document {int(bad[0])} was asked for, corpus {self.id!r} has documents [0, {self.n_documents})",
            )
        names = None if columns is None else list(dict.fromkeys([DOC_ID, *columns]))
        unique = np.unique(wanted)
        pieces = []
        for part in self.parts:
            start = int(part.meta["first_doc"])
            inside = unique[(unique >= start) & (unique < start + part.rows)]
            if inside.size:
                pieces.append(_read_documents(self.objects.file(part.objects[0]), inside, names))
        if not pieces:
            nothing = pq.read_schema(self.objects.file(self.parts[0].objects[0])).empty_table()
            return nothing if names is None else nothing.select(names)
        table = pa.concat_tables(pieces)
        return table.take(pa.array(np.searchsorted(unique, wanted)))


def _whole_numbers(doc_ids: Sequence[int]) -> npt.NDArray[np.int64]:
    try:
        wanted = np.asarray(doc_ids)
    except ValueError:  # lists of unequal length
        wanted = np.zeros((0, 0))
    if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"documents are asked for as a flat list of whole numbers, got {doc_ids!r:.80}",
        )
    return wanted.astype(np.int64)


def _check_columns(columns: Sequence[str] | None, known: Mapping[str, str], corpus: str) -> None:
    if isinstance(columns, str):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"columns= is a list of names, got the one name {columns!r}: write [{columns!r}]",
        )
    for name in columns or ():
        if name not in known:
            raise InvalidInputError(
                ErrorKind.MISSING_COLUMN, f"corpus {corpus!r} has no column {name!r}, only {', '.join(known)}"
            )


def _read_documents(path: str, doc_ids: np.ndarray, columns: list[str] | None) -> pa.Table:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        index = file.schema_arrow.get_field_index(DOC_ID)
        groups = []
        for g in range(file.metadata.num_row_groups):
            bounds = file.metadata.row_group(g).column(index).statistics
            if np.searchsorted(doc_ids, bounds.min) < np.searchsorted(doc_ids, bounds.max, side="right"):
                groups.append(g)
        table = file.read_row_groups(groups, columns=columns)
    wanted = np.isin(table[DOC_ID].to_numpy(), doc_ids)
    return table.filter(pa.array(wanted))
