"""Which type and which name does a metadata column have in the corpus?

Sources show their columns piece by piece: a JSONL column may hold integers for a million lines and then 0.5. Types are
therefore unified over the whole stream (`unify_types`) and only what no value contradicts is accepted. Names are kept,
except where they would clash with the corpus's own columns or with each other in SQL, which ignores case.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from actstore.corpus import FIXED_COLUMNS
from actstore.errors import ErrorKind, InvalidInputError

RESERVED = frozenset({*FIXED_COLUMNS, "corpus", ""})
"""Names that the corpus's own columns, and the view over all corpora, need; the empty name cannot be asked for."""

MAX_FIELDS = 1_000
"""Fields of one struct column: beyond it, the keys are data rather than names, and every document pays for all of them."""


class ColumnNames:
    """Gives every source column its name in the corpus, on first sight and the same ever after."""

    def __init__(self, rename: Mapping[str, str] | None = None) -> None:
        """Start with the user's own renames.

        Raises:
            InvalidInputError: a rename to a reserved name, or two to the same.
        """
        self._stored: dict[str, str] = {}
        self._taken = {name.lower() for name in RESERVED}
        self._chosen = dict(rename or {})
        for source, target in self._chosen.items():
            if target.lower() in self._taken:
                raise InvalidInputError(
                    ErrorKind.BAD_ARGUMENT,
                    f"rename of column {source!r} to {target!r}: that name is taken, choose another",
                )
            self._taken.add(target.lower())

    def stored(self, source: str) -> str:
        """Return the name in the corpus.

        >>> names = ColumnNames()
        >>> names.stored("url"), names.stored("Text"), names.stored("URL"), names.stored("url")
        ('url', 'source_Text', 'URL_2', 'url')
        """
        if source not in self._stored:
            self._stored[source] = self._chosen.get(source) or self._free(source)
        return self._stored[source]

    @property
    def sources(self) -> list[str]:
        """Source names seen so far, in order."""
        return list(self._stored)

    @property
    def renamed(self) -> dict[str, str]:
        """Source names that are not the stored ones, with the stored ones."""
        return {source: stored for source, stored in self._stored.items() if source != stored}

    def _free(self, source: str) -> str:
        reserved = source.lower() in RESERVED
        base = f"source_{source}" if reserved else source
        name, n = base, 2
        while name.lower() in self._taken:
            name, n = f"{base}_{n}", n + 1
        self._taken.add(name.lower())
        return name


def unify_types(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """Return the narrowest type that holds the values of both without changing them, or None.

    >>> str(unify_types(pa.int64(), pa.float64())), str(unify_types(pa.null(), pa.string()))
    ('double', 'string')
    >>> unify_types(pa.int64(), pa.string()) is None
    True
    """
    t = pa.types
    if a == b or t.is_null(b):
        return a
    if t.is_null(a):
        return b
    if _is_number(a) and _is_number(b):
        return _unify_numbers(a, b)
    for family, wide in ((_is_text, pa.large_string()), (_is_bytes, pa.large_binary())):
        if family(a) and family(b):
            return wide
    if t.is_timestamp(a) and t.is_timestamp(b) and a.tz == b.tz:
        return max((a, b), key=lambda x: ("s", "ms", "us", "ns").index(x.unit))
    if _is_list(a) and _is_list(b):
        value = unify_types(a.value_type, b.value_type)
        large = t.is_large_list(a) or t.is_large_list(b)
        return None if value is None else (pa.large_list(value) if large else pa.list_(value))
    if t.is_struct(a) and t.is_struct(b):
        return _unify_structs(a, b)
    return None


def _is_number(t: pa.DataType) -> bool:
    return bool(pa.types.is_integer(t) or pa.types.is_floating(t))


def _is_text(t: pa.DataType) -> bool:
    return bool(pa.types.is_string(t) or pa.types.is_large_string(t))


def _is_bytes(t: pa.DataType) -> bool:
    return bool(pa.types.is_binary(t) or pa.types.is_large_binary(t))


def _is_list(t: pa.DataType) -> bool:
    return bool(pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_fixed_size_list(t))


def _unify_numbers(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    t = pa.types
    if t.is_floating(a) or t.is_floating(b):
        both = t.is_floating(a) and t.is_floating(b)
        return max((a, b), key=lambda x: x.bit_width) if both else pa.float64()
    if t.is_signed_integer(a) == t.is_signed_integer(b):
        return max((a, b), key=lambda x: x.bit_width)
    unsigned = b if t.is_signed_integer(a) else a
    return pa.int64() if unsigned.bit_width < 64 else None


def _unify_structs(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    merged = {field.name: field.type for field in a}
    for field in b:
        kind = unify_types(merged.get(field.name, pa.null()), field.type)
        if kind is None:
            return None
        merged[field.name] = kind
    return pa.struct(list(merged.items()))


def unify_schemas(old: pa.Schema, new: pa.Schema, *, place_of: Callable[[str], str]) -> pa.Schema:
    """Return a schema that holds the rows of both; `old`'s columns come first.

    Args:
        old: What has been seen so far.
        new: What the next records hold.
        place_of: Where the next records hold their first value of a column, for the message.

    Raises:
        InvalidInputError: a column whose types have no common one, or a struct of more than `MAX_FIELDS` fields.
    """
    merged = {field.name: field.type for field in old}
    for field in new:
        kind = unify_types(merged.get(field.name, pa.null()), field.type)
        if kind is None:
            raise mixed_types(field.name, place_of(field.name), str(merged[field.name]), str(field.type))
        if _n_fields(kind) > MAX_FIELDS:
            raise InvalidInputError(
                ErrorKind.TOO_LARGE,
                f"column {field.name!r} has {_n_fields(kind)} different keys by {place_of(field.name)}, more than "
                f"{MAX_FIELDS}: they are data, not field names; store it as JSON text with "
                f"stringify=[{field.name!r}] or leave it out",
            )
        merged[field.name] = kind
    return pa.schema(list(merged.items()))


def _n_fields(kind: pa.DataType) -> int:
    return 1 + sum(_n_fields(kind.field(i).type) for i in range(kind.num_fields))


def mixed_types(column: str, place: str, before: str, here: str) -> InvalidInputError:
    """Return the error for a column that holds two types that do not mix."""
    return InvalidInputError(
        ErrorKind.BAD_DOCUMENT,
        f"column {column!r} holds {before} up to {place} and {here} there: make them one type, store the column as text "
        f"with stringify=[{column!r}], or leave it out of columns=",
    )


def make_array(column: str, values: Sequence[Any], places: Sequence[str]) -> pa.Array:
    """Return Python values as an Arrow array of the type that they all have.

    Args:
        column: Name, for messages.
        values: None, booleans, integers, floats, strings, bytes, dates, datetimes, lists and mappings of them.
        places: Where each value stands.

    Raises:
        InvalidInputError: values of types that do not mix, or of a type that no column can hold.
        UnicodeEncodeError: a string with a lone surrogate; the caller knows which policy applies.
    """
    try:
        return pa.array(values)
    except UnicodeEncodeError:
        raise
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise _explain(column, values, places, error) from error


def _explain(
    column: str, values: Sequence[Any], places: Sequence[str], error: Exception
) -> InvalidInputError:
    """Find the first value that does not fit, so that the message can name it."""
    seen = pa.null()
    for value, place in zip(values, places, strict=True):
        try:
            kind = pa.array([value]).type
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as own:
            shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
            return InvalidInputError(
                ErrorKind.BAD_DOCUMENT,
                f"{place}: column {column!r} holds {shown}, which no column type can hold ({own}): store the column as "
                f"text with stringify=[{column!r}], or leave it out of columns=",
            )
        both = unify_types(seen, kind)
        if both is None:
            return mixed_types(column, place, str(seen), str(kind))
        seen = both
    return InvalidInputError(
        ErrorKind.BAD_DOCUMENT,
        f"column {column!r} from {places[0]} on has no single type ({error}): store it as text with "
        f"stringify=[{column!r}], or leave it out of columns=",
    )


def stringify(value: Any) -> str | None:
    """Return a value as text: strings and None as they are, everything else as JSON.

    >>> stringify("a"), stringify(1.0), stringify({"b": [1, None]}), stringify(None)
    ('a', '1.0', '{"b": [1, null]}', None)
    """
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def plain_array(column: str, array: pa.Array) -> pa.Array:
    """Return an array of a type that Parquet and DuckDB hold: dictionaries and encodings undone, views as strings.

    Raises:
        InvalidInputError: a type that cannot be stored (unions, month intervals).
    """
    t = pa.types
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return plain_array(column, array.storage)
    if t.is_dictionary(kind):
        return plain_array(column, array.dictionary_decode())
    if t.is_run_end_encoded(kind):
        return plain_array(column, pa.compute.run_end_decode(array))
    target = _plain_type(kind)
    if target is None:
        raise InvalidInputError(
            ErrorKind.BAD_DOCUMENT,
            f"column {column!r} has type {kind}, which a corpus cannot store: cast it in the source, store it as text with "
            f"stringify=[{column!r}], or leave it out of columns=",
        )
    return array if str(target) == str(kind) else array.cast(target)  # == overlooks names inside lists


def _plain_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type with default names and nullability inside, so that the same data has one type from every source."""
    t = pa.types
    if t.is_string_view(kind):
        return pa.string()
    if t.is_binary_view(kind):
        return pa.binary()
    if t.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    if t.is_union(kind) or t.is_interval(kind) or t.is_run_end_encoded(kind):
        return None
    inner = [_plain_type(child) for child in _children(kind)]
    if any(child is None for child in inner):
        return None
    if t.is_struct(kind):
        return pa.struct([(field.name, child) for field, child in zip(kind, inner, strict=True)])
    if t.is_map(kind):
        return pa.map_(*inner)
    if t.is_fixed_size_list(kind):
        return pa.list_(inner[0], kind.list_size)
    if t.is_large_list(kind) or t.is_large_list_view(kind):
        return pa.large_list(inner[0])
    return pa.list_(inner[0]) if inner else kind


def _children(kind: pa.DataType) -> list[pa.DataType]:
    """Return the types inside a struct, map or list."""
    t = pa.types
    if t.is_struct(kind):
        return [field.type for field in kind]
    if t.is_map(kind):
        return [kind.key_type, kind.item_type]
    return [kind.value_type] if t.is_list_view(kind) or t.is_large_list_view(kind) or _is_list(kind) else []


def final_type(kind: pa.DataType) -> pa.DataType:
    """Return the type a column is stored with: what was always null, or always an empty object, becomes text.

    >>> str(final_type(pa.null())), str(final_type(pa.list_(pa.null())))
    ('string', 'list<item: string>')
    """
    t = pa.types
    if t.is_null(kind) or (t.is_struct(kind) and kind.num_fields == 0):
        return pa.string()
    if t.is_struct(kind):
        return pa.struct([(field.name, final_type(field.type)) for field in kind])
    if t.is_large_list(kind):
        return pa.large_list(final_type(kind.value_type))
    if t.is_list(kind):
        return pa.list_(final_type(kind.value_type))
    return kind


def conform(column: str, array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return the array with exactly the given, wider type.

    Raises:
        InvalidInputError: an integer too large to be the float that other values of its column are.
    """
    if array.type == kind:
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind)
    try:
        if _has_empty_struct(array.type):
            return pa.array([_without_empty(v, kind) for v in array.to_pylist()], type=kind)
        return array.cast(kind)
    except pa.ArrowInvalid as error:
        raise InvalidInputError(
            ErrorKind.BAD_DOCUMENT,
            f"column {column!r} holds both {array.type} and {kind} values, and not all fit one type ({error}): store it "
            f"as text with stringify=[{column!r}]",
        ) from error


def _has_empty_struct(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.num_fields == 0:
        return True
    return any(_has_empty_struct(kind.field(i).type) for i in range(kind.num_fields))


def _without_empty(value: Any, kind: pa.DataType) -> Any:
    """Return a value whose empty objects are None wherever its column holds no object."""
    if isinstance(value, dict):
        if not pa.types.is_struct(kind):
            return None
        return {field.name: _without_empty(value.get(field.name), field.type) for field in kind}
    return [_without_empty(v, kind.value_type) for v in value] if isinstance(value, list) else value
