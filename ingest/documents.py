"""Which documents do the records of a source make?

Every record becomes one row of the corpus's columns, or goes to `BadDocuments`. What is checked: the text is there, is a
string, is valid Unicode, and is not larger than the limit.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actstore.corpus import SOURCE_KEY, TEXT
from actstore.errors import ErrorKind, InvalidInputError

from .columns import ColumnNames, make_array, plain_array, stringify
from .records import BadDocuments, Records


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns of the source become what."""

    text_column: str
    id_column: str | None
    columns: tuple[str, ...] | None
    """Metadata columns to keep, None for all."""

    stringify: frozenset[str]
    """Metadata columns to store as text."""

    max_document_bytes: int
    names: ColumnNames
    typed: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Types of columns that are made here rather than found."""

    def keeps(self, column: str) -> bool:
        """Return whether a source column becomes a metadata column."""
        if column == self.text_column or (column == self.id_column and column == SOURCE_KEY):
            return False
        return self.columns is None or column in self.columns


@dataclass(frozen=True, slots=True)
class Documents:
    """Consecutive documents: columns text, source_key and the metadata; and where each stands."""

    rows: pa.RecordBatch
    places: list[str]


def check_columns(found: Sequence[str], layout: Layout, *, where: str) -> None:
    """Check that the columns asked for are among those found.

    Raises:
        InvalidInputError: one is not; the message lists what there is.
    """
    asked = {"text": layout.text_column, "id": layout.id_column}
    for what, column in asked.items():
        if column is not None and column not in found:
            raise missing_column(f"{what} column", f"{what}_column", column, found, where=where)


def missing_column(
    what: str, argument: str, column: str, found: Sequence[str], *, where: str
) -> InvalidInputError:
    """Return the error for a column that is not in the source."""
    close = (
        difflib.get_close_matches(column, found, n=3) or [c for c in found if column.lower() in c.lower()][:3]
    )
    advice = (
        f"did you mean {' or '.join(map(repr, close))}? Choose with {argument}="
        if close
        else f"choose with {argument}="
    )
    return InvalidInputError(
        ErrorKind.MISSING_COLUMN,
        f"{where}: no {what} {column!r} among {', '.join(map(repr, found)) or 'no columns'}; {advice}",
    )


def check_text_type(schema: pa.Schema, text_column: str, *, where: str) -> None:
    """Check that a typed source's text column holds strings.

    Raises:
        InvalidInputError: it holds something else.
    """
    kind = schema.field(text_column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    t = pa.types
    if not (t.is_string(value) or t.is_large_string(value) or t.is_string_view(value)):
        strings = [f.name for f in schema if t.is_string(f.type) or t.is_large_string(f.type)]
        raise InvalidInputError(
            ErrorKind.BAD_DOCUMENT,
            f"{where}: text column {text_column!r} has type {kind}, not string: cast it, or choose another with text_column= "
            f"(string columns: {', '.join(map(repr, strings)) or 'none'})",
        )


def make_documents(records: Records, layout: Layout, bad: BadDocuments) -> Documents | None:
    """Return the documents of one batch of records, None when all were rejected.

    Raises:
        InvalidInputError: a missing column, a column of mixed types, or a bad document under policy "error".
    """
    if not records.places:
        return None
    if isinstance(records.rows, list):
        return _from_values(records.rows, records.places, records.keys, layout, bad)
    return _from_arrow(records.rows, records.places, layout, bad)


def _from_arrow(
    rows: pa.RecordBatch, places: list[str], layout: Layout, bad: BadDocuments
) -> Documents | None:
    where = places[0]
    check_columns(rows.schema.names, layout, where=where)
    check_text_type(rows.schema, layout.text_column, where=where)
    text = plain_array(layout.text_column, rows.column(layout.text_column)).cast(pa.large_string())
    good = _good_texts(text, places, layout, bad)
    if not good.all():
        mask = pa.array(good)
        rows, text = rows.filter(mask), text.filter(mask)
        places = [p for p, g in zip(places, good, strict=True) if g]
    if not places:
        return None
    arrays = {TEXT: text, SOURCE_KEY: _keys(rows, places, layout)}
    for name in rows.schema.names:
        if layout.keeps(name):
            arrays[layout.names.stored(name)] = _metadata(name, rows.column(name), places, layout)
    return Documents(pa.RecordBatch.from_pydict(arrays), places)


def _keys(rows: pa.RecordBatch, places: list[str], layout: Layout) -> pa.Array:
    if layout.id_column is None:
        return pa.array(places, pa.string())
    ids = plain_array(layout.id_column, rows.column(layout.id_column))
    try:
        return ids.cast(pa.string())
    except (pa.ArrowException, NotImplementedError):
        return pa.array([stringify(v) for v in ids.to_pylist()], pa.string())


def _metadata(name: str, array: pa.Array, places: list[str], layout: Layout) -> pa.Array:
    if name in layout.stringify:
        return pa.array([stringify(v) for v in array.to_pylist()], pa.string())
    plain = plain_array(name, array)
    try:
        plain.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InvalidInputError(
            ErrorKind.BAD_DOCUMENT,
            f"column {name!r} from {places[0]} on is damaged ({error}): repair the source, or leave it out of columns=",
        ) from error
    return plain


def _good_texts(text: pa.Array, places: list[str], layout: Layout, bad: BadDocuments) -> Any:
    """Return which texts can be documents, shape (n,) bool; the others are rejected."""
    good = np.ones(len(text), bool)
    for i in np.flatnonzero(text.is_null().to_numpy(zero_copy_only=False)):
        _reject_null(bad, places[i], layout.text_column)
        good[i] = False
    nbytes = pc.binary_length(text).fill_null(0).to_numpy(zero_copy_only=False)
    for i in np.flatnonzero(nbytes > layout.max_document_bytes):
        _reject_large(bad, places[i], int(nbytes[i]), layout.max_document_bytes)
        good[i] = False
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        for i in np.flatnonzero(good):
            try:
                text.slice(i, 1).validate(full=True)
            except pa.ArrowInvalid as error:
                bad.reject(places[i], f"the text is not UTF-8 ({error})", "repair the source")
                good[i] = False
    return good


def _reject_null(bad: BadDocuments, place: str, column: str) -> None:
    bad.reject(place, f"text column {column!r} is null", "fill it")


def _reject_large(bad: BadDocuments, place: str, nbytes: int, limit: int) -> None:
    bad.reject(
        place,
        f"the document has {nbytes} bytes, more than max_document_bytes={limit}",
        "raise the limit or split it",
        kind=ErrorKind.TOO_LARGE,
    )


def _from_values(
    rows: list[Mapping[Any, Any]],
    places: list[str],
    keys: list[str] | None,
    layout: Layout,
    bad: BadDocuments,
) -> Documents | None:
    for column in filter(None, (layout.text_column, layout.id_column)):
        if not any(column in row for row in rows):
            check_columns([str(name) for name in rows[0]], layout, where=places[0])
    kept = [i for i, row in enumerate(rows) if _is_good(row, places[i], layout, bad)]
    while kept:
        try:
            return _to_columns(rows, places, keys or places, kept, layout)
        except UnicodeEncodeError:
            # Some metadata string holds a lone surrogate: the records that have one are rejected, the others kept.
            kept = [i for i in kept if _is_encodable(rows[i], places[i], bad)]
    return None


def _to_columns(
    all_rows: list[Mapping[Any, Any]],
    all_places: list[str],
    all_keys: list[str],
    kept: list[int],
    layout: Layout,
) -> Documents:
    """Return the kept rows as columns.

    Raises:
        UnicodeEncodeError: a metadata string with a lone surrogate.
    """
    rows = [all_rows[i] for i in kept]
    places = [all_places[i] for i in kept]
    keys: list[str | None] = [all_keys[i] for i in kept]
    if layout.id_column is not None:
        keys = [stringify(row.get(layout.id_column)) for row in rows]
    arrays = {
        TEXT: pa.array([row[layout.text_column] for row in rows], pa.large_string()),
        SOURCE_KEY: pa.array(keys, pa.string()),
    }
    for name in dict.fromkeys(name for row in rows for name in row):
        if not layout.keeps(name):
            continue
        values = [row.get(name) for row in rows]
        if name in layout.typed:
            array = pa.array(values, layout.typed[name])
        else:
            texts = [stringify(v) for v in values] if name in layout.stringify else values
            array = make_array(name, texts, places)
        arrays[layout.names.stored(name)] = array
    return Documents(pa.RecordBatch.from_pydict(arrays), places)


def _is_good(row: Mapping[Any, Any], place: str, layout: Layout, bad: BadDocuments) -> bool:
    if layout.text_column not in row:
        bad.reject(
            place, f"the record has no {layout.text_column!r}, only {', '.join(map(repr, row))}", "add it"
        )
        return False
    text = row[layout.text_column]
    if text is None:
        _reject_null(bad, place, layout.text_column)
        return False
    if not isinstance(text, str):
        bad.reject(
            place,
            f"text column {layout.text_column!r} holds a {type(text).__name__}, not a string",
            "convert it, or choose another column with text_column=",
        )
        return False
    try:
        nbytes = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        bad.reject(
            place,
            f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which UTF-8 cannot "
            "encode",
            "repair it",
        )
        return False
    if nbytes > layout.max_document_bytes:
        _reject_large(bad, place, nbytes, layout.max_document_bytes)
        return False
    for name in row:
        if not isinstance(name, str):
            bad.reject(
                place, f"the record has a key {name!r} that is not a string", "name columns by strings"
            )
            return False
    return True


def _is_encodable(row: Mapping[Any, Any], place: str, bad: BadDocuments) -> bool:
    for name, value in row.items():
        try:
            pa.array([value])
        except UnicodeEncodeError as error:
            bad.reject(
                place,
                f"column {name!r} holds a lone surrogate, which UTF-8 cannot encode ({error.reason})",
                "repair it",
            )
            return False
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            continue  # reported with its own message when the column is made
    return True
