"""Which tokens stand at some rows, and around them? Read from the row groups that hold those rows, not from whole units.

Twenty contexts lie in as many units of a large run. Of each a row group is read and decoded, some thousands of rows, and kept in
the process's cache (`actstore.query.unit_tables`), as are single columns of units where many rows must be masked. The objects
themselves are checked whole, once. Token tables may be cut into row groups at any row.
"""

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from actstore.arrow_arrays import NUMPY_TYPES, to_array
from actstore.tokenization import Tokenization

from .unit_tables import (
    CACHE,
    TOKEN_COLUMNS,
    Tokens,
    check_rows,
    read_unit,
    side_by_side,
    token_arrays,
    unit_entry,
    unit_key,
)

Int64s: TypeAlias = npt.NDArray[np.int64]
Pieces: TypeAlias = list[tuple[Tokens, Int64s]]


def read_around(tokenization: Tokenization, rows: Int64s, *, before: int = 0, after: int = 0) -> Pieces:
    """Return the tokens at some rows and around them, as pairs: tokens, and the offsets in them of the next of the rows.

    Units of which most row groups are needed are read whole.

    Args:
        tokenization: The rows' tokenization.
        rows: Row numbers that exist, ascending, shape (n,); may repeat.
        before: So many tokens before each row are among those returned with it, fewer at the start of its unit.
        after: So many after it, fewer at the unit's end.

    Raises:
        NotFoundError: no such unit.
        FormatError: an object is missing or damaged.
    """
    wanted = rows_by_unit(tokenization, rows)

    def load(unit: int) -> Pieces:
        return _load_around(tokenization, unit, wanted[unit], before, after)

    found = {
        unit: _kept_around(tokenization, unit, offsets, before, after) for unit, offsets in wanted.items()
    }
    missing = [unit for unit, pieces in found.items() if pieces is None]
    found |= dict(zip(missing, side_by_side(tokenization.objects, load, missing), strict=True))
    return [piece for pieces in found.values() for piece in pieces or ()]


def read_columns(
    tokenization: Tokenization, rows: Int64s, names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """Return columns (of `TOKEN_COLUMNS`) of the tokens at some rows, ascending, each of shape (n,).

    Reads and keeps these columns of whole units: for many rows of each. A row group takes as long as two or three columns.

    Raises:
        NotFoundError: no such unit.
        FormatError: an object is missing or damaged.
    """
    wanted = rows_by_unit(tokenization, rows)

    def load(unit: int) -> list[npt.NDArray[Any]]:
        return [column[wanted[unit]] for column in _load_columns(tokenization, unit, names)]

    found = {unit: _kept_columns(tokenization, unit, offsets, names) for unit, offsets in wanted.items()}
    missing = [unit for unit, columns in found.items() if columns is None]
    found |= dict(zip(missing, side_by_side(tokenization.objects, load, missing), strict=True))
    told = [columns for columns in found.values() if columns is not None]
    none = [np.empty(0, NUMPY_TYPES[tokenization.schema.field(name).type]) for name in names]
    return {
        name: np.concatenate([none[i], *(columns[i] for columns in told)]) for i, name in enumerate(names)
    }


def rows_by_unit(tokenization: Tokenization, rows: Int64s) -> dict[int, Int64s]:
    """Return the offsets in its unit of each row, ascending, by unit."""
    if not len(rows):
        return {}
    step = tokenization.rows_per_unit
    units = rows // step
    cuts = [0, *(np.flatnonzero(units[1:] != units[:-1]) + 1).tolist(), len(rows)]
    return {
        unit: rows[low:high] - unit * step
        for unit, (low, high) in zip(units[cuts[:-1]].tolist(), itertools.pairwise(cuts), strict=True)
    }


def _kept_around(
    tokenization: Tokenization, unit: int, offsets: Int64s, before: int, after: int
) -> Pieces | None:
    """Return the tokens around some rows of a unit from the cache; None if something is not there."""
    key = unit_key(unit_entry(tokenization, unit))
    whole: Tokens | None = CACHE.find(key)
    if whole is not None:
        return [(whole, offsets)]
    starts: list[int] | None = CACHE.find(f"{key}:groups")
    if starts is None or len(offsets) >= len(starts):
        return None
    spans = _spans(starts, offsets, before, after)
    groups: dict[int, Tokens] = {}
    for low, high in spans:
        for group in range(low, high + 1):
            if group not in groups:
                kept = CACHE.find(f"{key}:{group}")
                if kept is None:
                    return None
                groups[group] = kept
    return _assemble(starts, spans, offsets, groups)


def _load_around(tokenization: Tokenization, unit: int, offsets: Int64s, before: int, after: int) -> Pieces:
    """Return the tokens around some rows of a unit: what the cache does not have is read by opening the object once."""
    entry = unit_entry(tokenization, unit)
    key = unit_key(entry)
    with tokenization.objects.parquet(entry.objects[0]) as file:
        counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        starts = list(itertools.accumulate(counts, initial=0))
        check_rows(unit, entry, starts[-1])
        CACHE.put(f"{key}:groups", starts, 32 * len(starts))
        spans = (
            _spans(starts, offsets, before, after) if len(offsets) < len(starts) else [(0, len(counts) - 1)]
        )
        needed = sorted({group for low, high in spans for group in range(low, high + 1)})
        if 2 * len(needed) > len(counts):
            return [(read_unit(tokenization, unit), offsets)]
        groups: dict[int, Tokens] = {}
        for group in needed:
            kept = CACHE.find(f"{key}:{group}")
            if kept is None:
                kept = _read_group(file, group, unit * tokenization.rows_per_unit + starts[group])
                CACHE.put(f"{key}:{group}", kept, sum(getattr(kept, name).nbytes for name in TOKEN_COLUMNS))
            groups[group] = kept
    return _assemble(starts, spans, offsets, groups)


def _spans(starts: Sequence[int], offsets: Int64s, before: int, after: int) -> list[tuple[int, int]]:
    """Return the first and the last row group needed for each of a few rows; `starts` ends with the number of rows."""
    end = starts[-1] - 1
    return [
        (bisect_right(starts, max(at - before, 0)) - 1, bisect_right(starts, min(at + after, end)) - 1)
        for at in offsets.tolist()
    ]


def _assemble(
    starts: Sequence[int], spans: Sequence[tuple[int, int]], offsets: Int64s, groups: Mapping[int, Tokens]
) -> Pieces:
    """Return the tokens around each row, those of neighbouring rows with the same row groups together."""
    pieces: Pieces = []
    at = 0
    for (low, high), members in itertools.groupby(spans):
        stop = at + len(list(members))
        piece = groups[low] if low == high else _joined([groups[group] for group in range(low, high + 1)])
        pieces.append((piece, offsets[at:stop] - starts[low]))
        at = stop
    return pieces


def _read_group(file: pq.ParquetFile, group: int, first_row: int) -> Tokens:
    table = file.read_row_group(group, columns=list(TOKEN_COLUMNS), use_threads=False)
    return Tokens(first_row=first_row, **token_arrays(table))


def _joined(groups: Sequence[Tokens]) -> Tokens:
    """Return row groups that follow each other as one."""
    columns = {name: np.concatenate([getattr(group, name) for group in groups]) for name in TOKEN_COLUMNS}
    return Tokens(first_row=groups[0].first_row, **columns)


def _kept_columns(
    tokenization: Tokenization, unit: int, offsets: Int64s, names: Sequence[str]
) -> list[npt.NDArray[Any]] | None:
    """Return columns of some rows of a unit from the cache; None if something is not there."""
    key = unit_key(unit_entry(tokenization, unit))
    whole = CACHE.find(key)
    if whole is not None:
        return [getattr(whole, name)[offsets] for name in names]
    found = []
    for name in names:
        column = CACHE.find(f"{key}:{name}")
        if column is None:
            return None
        found.append(column[offsets])
    return found


def _load_columns(tokenization: Tokenization, unit: int, names: Sequence[str]) -> list[npt.NDArray[Any]]:
    """Return whole columns of a unit, those that the cache does not have read together."""
    entry = unit_entry(tokenization, unit)
    key = unit_key(entry)
    columns: dict[str, Any] = {name: CACHE.find(f"{key}:{name}") for name in names}
    missing = [name for name, column in columns.items() if column is None]
    if missing:
        table = tokenization.unit_table(unit, missing)
        check_rows(unit, entry, table.num_rows)
        for name in missing:
            column = columns[name] = to_array(table[name])
            column.setflags(write=False)
            CACHE.put(f"{key}:{name}", column, column.nbytes)
    return [columns[name] for name in names]
