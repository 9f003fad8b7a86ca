"""Which bytes must be read for these rows, and where does each row go? Pure functions.

Rows are asked for by their *places*, where they lie in the hook point's array (`RowLayout.places`): their row numbers, unless
the run keeps a sample. *Scattered* rows are fetched by sum groups (about a page, the least that can be verified), neighbours
together; *spans* are runs of rows fetched by chunks. Neither ever crosses a chunk without its checksum being accounted for.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore.codec.layout import RowLayout, ShardRef, UnitRows
from actstore.codec.spec import ShardSpec

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ShardRows:
    """The rows wanted of one shard."""

    unit: UnitRows
    number: int
    """Of the shard in its unit."""

    rows: Int64s
    """Rows of the shard, ascending, repeats allowed."""

    targets: Int64s
    """Where each goes in the answer."""

    @property
    def shard(self) -> ShardRef:
        """The shard."""
        return self.unit.shards[self.number]


@dataclass(frozen=True, slots=True)
class Fetch:
    """One call to the storage for scattered rows of one shard."""

    wanted: ShardRows
    starts: Int64s
    """First row in the shard of each range to read; every range is whole groups within one chunk."""

    stops: Int64s
    places: Int64s
    """For each wanted row, which of the rows read it is."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of rows of one chunk."""

    unit: UnitRows
    number: int
    """Of the shard in its unit."""

    chunk: int
    start: int
    """First row, counted in the chunk."""

    stop: int
    target: int
    """Row of the answer where the first row goes."""

    @property
    def shard(self) -> ShardRef:
        """The shard."""
        return self.unit.shards[self.number]


def plan_shards(layout: RowLayout, places: Int64s) -> list[ShardRows]:
    """Return which rows to take from which shard.

    Args:
        layout: Of the hook point.
        places: Of existing rows, in any order, repeats allowed.
    """
    if not len(places):
        return []
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    shard_ids = ordered // layout.spec.rows_per_shard
    per_unit = layout.stored_rows_per_unit // layout.spec.rows_per_shard
    by_number = {unit.unit: unit for unit in layout.units}
    cuts = [0, *(np.flatnonzero(np.diff(shard_ids)) + 1).tolist(), len(ordered)]
    plans = []
    for low, high in itertools.pairwise(cuts):
        unit, number = divmod(int(shard_ids[low]), per_unit)
        in_shard = ordered[low:high] - shard_ids[low] * layout.spec.rows_per_shard
        plans.append(ShardRows(by_number[unit], number, in_shard, order[low:high]))
    return plans


def plan_fetches(spec: ShardSpec, wanted: ShardRows, *, max_gap_rows: int, max_rows: int) -> Iterator[Fetch]:
    """Yield the calls that bring the wanted rows of a shard.

    Args:
        spec: Layout of the shard.
        wanted: At least one row.
        max_gap_rows: Rows nobody asked for that are read along rather than cutting a range in two.
        max_rows: Rows that one call may bring, unless a single range has more.
    """
    group_rows = spec.rows_per_sum if spec.codec == "hot" else spec.rows_per_chunk
    groups = np.unique(wanted.rows // group_rows)
    chunk_of_group = groups // (spec.rows_per_chunk // group_rows)
    cut = (np.diff(groups) - 1 > max_gap_rows // group_rows) | (np.diff(chunk_of_group) > 0)
    first = groups[np.concatenate(([True], cut))]
    last = groups[np.concatenate((cut, [True]))]
    starts, stops = first * group_rows, (last + 1) * group_rows
    read_before = np.concatenate(([0], np.cumsum(stops - starts)))
    low = 0
    while low < len(starts):
        high = max(low + 1, int(np.searchsorted(read_before, read_before[low] + max_rows, "right")) - 1)
        here = slice(*np.searchsorted(wanted.rows, [starts[low], stops[high - 1]]).tolist())
        part = ShardRows(wanted.unit, wanted.number, wanted.rows[here], wanted.targets[here])
        of_row = np.searchsorted(starts[low:high], part.rows, "right") - 1 + low
        places = part.rows - starts[of_row] + read_before[of_row] - read_before[low]
        yield Fetch(part, starts[low:high], stops[low:high], places)
        low = high


def plan_pieces(layout: RowLayout, unit: UnitRows, start: int, stop: int, *, target: int = 0) -> list[Piece]:
    """Return the pieces of chunks that make up stored rows `[start, stop)` of a unit, in order.

    Args:
        layout: Of the hook point.
        unit: One of its units.
        start: First row, counted in the rows that the unit stores.
        stop: Its end, at most `unit.n_rows`.
        target: Row of the answer where row `start` goes.
    """
    spec = layout.spec
    pieces = []
    row = start
    while row < stop:
        number, in_shard = divmod(row, spec.rows_per_shard)
        chunk, first = divmod(in_shard, spec.rows_per_chunk)
        end = min(spec.rows_per_chunk, first + stop - row)
        pieces.append(Piece(unit, number, chunk, first, end, target + row - start))
        row += end - first
    return pieces


def plan_slabs(
    layout: RowLayout, *, start: int, stop: int, slab_rows: int, units: frozenset[int] | None = None
) -> Iterator[tuple[UnitRows, int, int]]:
    """Yield the existing rows of `[start, stop)` as runs `(unit, first, end)` of at most `slab_rows` rows.

    A run lies within one unit; `first` and `end` count the rows that it stores, from whose first (or `start`) runs are cut.
    """
    for unit in layout.units:
        if units is not None and unit.unit not in units:
            continue
        first, end = layout.span(unit, start, stop)
        for low in range(first, end, slab_rows):
            yield unit, low, min(low + slab_rows, end)
