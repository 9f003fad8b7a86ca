"""Which rows of a hook point exist at this version, and in which shard is each? (FORMAT.md, sections 5 and 6)

Row `r` is row `r % rows_per_unit` of unit `r // rows_per_unit`. Units end early (they hold whole documents) and may be
missing (not committed yet), and a run may keep a sample of its rows, so row numbers have gaps; the manifest alone says which
rows exist.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.codec.spec import ShardSpec
from actstore.codec.sums import SumsRef, parse_sums_ref
from actstore.errors import ActstoreError, ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.int8 import Int8Transform, parse_int8
from actstore.log.values import Collection, StoredObject, Unit
from actstore.names import hook_point_folder
from actstore.sampling import Int64s, KeptRows, parse_kept


@dataclass(frozen=True, slots=True)
class ShardRef:
    """One stored shard."""

    key: str
    nbytes: int
    sha256: str
    n_rows: int


@dataclass(frozen=True, slots=True)
class UnitRows:
    """The rows of one live unit at one hook point."""

    unit: int
    n_rows: int
    """Rows that it stores; of a sampled run fewer than its tokens."""

    shards: tuple[ShardRef, ...]
    """In order; every one but the last holds `rows_per_shard` rows."""

    sums: SumsRef | None
    """None when the writer stored none: a reader then hashes whole shards to make them."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """All rows of a hook point at one version.

    A row's *number* is that of the run's tokenization. Its *place* is where it lies in the hook point's array: the same number,
    unless the run keeps a sample; then unit u has the places from `u * stored_rows_per_unit` on, one for each row it stores.
    """

    hook_point: str
    spec: ShardSpec
    rows_per_unit: int
    """Distance between the row numbers of neighbouring units' first rows."""

    stored_rows_per_unit: int
    """Distance between their places; `rows_per_unit` unless the run keeps a sample."""

    units: tuple[UnitRows, ...]
    """Live units that store rows, by ascending number."""

    kept: KeptRows | None = None
    """Which rows a sampled run keeps; None when all."""

    int8: Int8Transform | None = None
    """What int8 rows were made with; None for other dtypes."""

    @property
    def n_rows(self) -> int:
        """Rows that exist."""
        return sum(unit.n_rows for unit in self.units)

    def unit_rows(self) -> Int64s:
        """Return `[last unit + 1]`: stored rows of every unit, 0 where it is not live."""
        rows = np.zeros(self.units[-1].unit + 1 if self.units else 0, np.int64)
        for unit in self.units:
            rows[unit.unit] = unit.n_rows
        return rows

    def numbers(self, unit: UnitRows, first: int, end: int) -> Int64s:
        """Return the row numbers of the stored rows `[first, end)` of a unit, ascending, new memory.

        Args:
            unit: One of `units`.
            first: Counted in the rows that the unit stores.
            end: At most `unit.n_rows`.
        """
        base = unit.unit * self.rows_per_unit
        if self.kept is None:
            return np.arange(base + first, base + end, dtype=np.int64)
        return self._offsets(unit)[first:end] + base

    def span(self, unit: UnitRows, start: int, stop: int) -> tuple[int, int]:
        """Return which of a unit's stored rows have numbers in `[start, stop)`, as `[first, end)`; empty if `end <= first`."""
        first, end = start - unit.unit * self.rows_per_unit, stop - unit.unit * self.rows_per_unit
        first, end = max(0, first), min(self.rows_per_unit, end)
        if self.kept is None or (first, end) == (0, self.rows_per_unit):
            return first, min(unit.n_rows, end)
        if end <= first:
            return 0, 0
        low, high = np.searchsorted(self._offsets(unit), [first, end]).tolist()
        return low, high

    def row_ranges(self) -> list[tuple[int, int]]:
        """Return half-open ranges of row numbers, ascending, that begin and end with an existing row and cover all of them.

        Every row in them exists, and they are as few as possible; of a sampled run there is one for each unit, with gaps in it.
        """
        starts = [unit.unit * self.rows_per_unit for unit in self.units]
        if self.kept is None:
            return _joined([(s, s + unit.n_rows) for s, unit in zip(starts, self.units, strict=True)])
        offsets = [self._offsets(unit) for unit in self.units]
        return [(s + int(o[0]), s + int(o[-1]) + 1) for s, o in zip(starts, offsets, strict=True)]

    def existing(self, start: int, stop: int, step: int = 1) -> Int64s:
        """Return the rows of `range(start, stop, step)` that exist."""
        parts = []
        for unit in self.units:
            first, end = self.span(unit, start, stop)
            if first >= end:
                continue
            if self.kept is not None:
                numbers = self.numbers(unit, first, end)
                parts.append(numbers[(numbers - start) % step == 0])
            else:
                base = unit.unit * self.rows_per_unit
                low = base + first + (start - base - first) % step
                parts.append(np.arange(low, base + end, step, dtype=np.int64))
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def exist(self, rows: Int64s) -> npt.NDArray[np.bool_]:
        """Return which rows exist, in any order; no number is an error."""
        return self._find(rows) >= 0

    def places(self, rows: Int64s) -> Int64s:
        """Return the place of every row, in any order, repeats allowed.

        Raises:
            NotFoundError: a row does not exist; it names the first one, and what rows there are.
        """
        places = self._find(rows)
        missing = np.flatnonzero(places < 0)
        if missing.size:
            raise self._not_found(int(rows[missing[0]]))
        return places

    def _find(self, rows: Int64s) -> Int64s:
        """Return the place of every row, -1 for one that does not exist."""
        unit_rows = self.unit_rows()
        unit, offset = np.divmod(rows, self.rows_per_unit)
        known = (unit >= 0) & (unit < len(unit_rows))
        if self.kept is not None:
            return self._find_sampled(unit, offset, known, unit_rows)
        exists = known.copy()
        exists[known] = offset[known] < unit_rows[unit[known]]
        return rows if exists.all() else np.where(exists, rows, -1)

    def _find_sampled(
        self, unit: Int64s, offset: Int64s, known: npt.NDArray[np.bool_], unit_rows: Int64s
    ) -> Int64s:
        assert self.kept is not None
        places = np.full(len(unit), -1, np.int64)
        order = np.flatnonzero(known)
        order = order[np.argsort(unit[order], kind="stable")]
        numbers, starts = np.unique(unit[order], return_index=True)
        ends = [*starts[1:].tolist(), len(order)]
        for number, start, end in zip(numbers.tolist(), starts.tolist(), ends[: len(numbers)], strict=True):
            here = order[start:end]
            stored = self.kept.offsets(number, int(unit_rows[number]))
            rank = np.searchsorted(stored, offset[here])
            found = rank < len(stored)
            found[found] = stored[rank[found]] == offset[here][found]
            places[here[found]] = number * self.stored_rows_per_unit + rank[found]
        return places

    def _offsets(self, unit: UnitRows) -> Int64s:
        """Return the offsets of the rows that a unit of a sampled run stores."""
        assert self.kept is not None
        offsets = self.kept.offsets(unit.unit, unit.n_rows)
        if len(offsets) != unit.n_rows:
            raise FormatError(
                ErrorKind.INVARIANT_BROKEN,
                f"unit {unit.unit} stores {unit.n_rows} rows of {self.hook_point!r}, and a sample of rate "
                f"{self.kept.sample.rate:.3g} keeps {len(offsets)} of a full unit: it was written by a faulty program",
            )
        return offsets

    def _not_found(self, row: int) -> NotFoundError:
        unit, offset = divmod(row, self.rows_per_unit)
        if self.kept is not None and any(unit == live.unit for live in self.units):
            full = self.kept.offsets(unit, self.rows_per_unit)
            if offset not in full:
                return NotFoundError(
                    ErrorKind.ROW_NOT_FOUND,
                    f"row {row} was not sampled: hook point {self.hook_point!r} stores {self.kept.sample.rate:.3g} of all rows, "
                    "and this is none of them; activations.rows() gives the numbers of those that are stored",
                )
        units = [(u.unit * self.rows_per_unit, (u.unit + 1) * self.rows_per_unit) for u in self.units]
        ranges = self.row_ranges() if self.kept is None else _joined(units)
        what = "rows are" if self.kept is None else "a sample is stored of the rows"
        return NotFoundError(
            ErrorKind.ROW_NOT_FOUND,
            f"row {row} of hook point {self.hook_point!r} does not exist at this version: "
            f"{what} {_ranges_text(ranges)} (row numbers have gaps, and never count from the end)",
        )


def parse_layout(collection: Collection, hook_point: str) -> RowLayout:
    """Return the rows of a run's hook point from the run's configuration and live units.

    Raises:
        NotFoundError: the run has no such hook point.
        InvalidInputError: the run keeps no rows, only pooled vectors.
        FormatError: the configuration or a unit is not as FORMAT.md has it.
    """
    config = collection.config
    check_keeps_rows(collection)
    try:
        spec = _parse_spec(collection, hook_point)
        rows_per_unit = int(config["rows_per_unit"])
        kept = parse_kept(config)
        per_unit = rows_per_unit if kept is None else int(config["stored_rows_per_unit"])
        int8 = None
        if spec.dtype == "int8":
            int8 = parse_int8(collection.info["int8"][hook_point], d_model=spec.d_model)
    except NotFoundError:
        raise
    except (KeyError, TypeError, ValueError, InvalidInputError) as error:
        raise _broken(
            collection, f"its configuration does not describe hook point {hook_point!r} ({error!r})"
        ) from error
    if min(rows_per_unit, per_unit) < 1 or per_unit % spec.rows_per_shard:
        raise _broken(
            collection, f"units of {per_unit} rows are no whole shards of {spec.rows_per_shard} rows"
        )
    units = [
        _unit_rows(collection, hook_point, spec, per_unit, collection.units[number])
        for number in sorted(collection.units)
    ]
    stored = tuple(unit for unit in units if unit.n_rows)
    return RowLayout(hook_point, spec, rows_per_unit, per_unit, stored, kept, int8)


def describe_kept(collection: Collection) -> str:
    """Return what a run stores of its activations, in words."""
    keep = collection.config.get("keep", ["dense"])
    words = {"dense": "dense rows", "pooled": "pooled vectors"}
    return " and ".join(words.get(what, str(what)) for what in keep) + " only" if keep else "nothing"


def check_keeps_rows(collection: Collection) -> None:
    """Raise unless a run stores its rows.

    Raises:
        InvalidInputError: it keeps pooled vectors or codes only.
    """
    keep = collection.config.get("keep", ["dense"])
    if isinstance(keep, Sequence) and "dense" not in keep:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"the activations of single rows were asked for, and run {collection.id!r} keeps {describe_kept(collection)}: "
            "use run.pooled(hook_point) or run.codes(dictionary), or ingest with keep=['dense']",
        )


def _parse_spec(collection: Collection, hook_point: str) -> ShardSpec:
    config = collection.config
    widths = {str(point["name"]): int(point["d_model"]) for point in config["hook_points"]}
    if hook_point not in widths:
        raise NotFoundError(
            ErrorKind.HOOK_POINT_NOT_FOUND,
            f"run {collection.id!r} has no hook point {hook_point!r}: it has {sorted(widths)}",
        )
    return ShardSpec(
        rows_per_shard=int(config["rows_per_shard"][hook_point]),
        rows_per_chunk=int(config["rows_per_chunk"][hook_point]),
        d_model=widths[hook_point],
        dtype=str(config["dtype"]),
        codec=str(config["codec"]),
    )


def shard_key(run: str, hook_point: str, shard: int) -> str:
    """Return the key of a shard of a run.

    >>> shard_key("a", "layers.0.resid_post", 3)
    'runs/a/layers.0.resid_post/c/3/0'
    """
    return f"runs/{run}/{hook_point_folder(hook_point)}/c/{shard}/0"


def sums_key(run: str, unit: int, attempt: str) -> str:
    """Return the key of the sums of a unit (`actstore.codec.sums`).

    >>> sums_key("a", 3, "0" * 4)
    'runs/a/sums/00000003-0000.bin'
    """
    return f"runs/{run}/sums/{unit:08}-{attempt}.bin"


def _unit_rows(
    collection: Collection, hook_point: str, spec: ShardSpec, rows_per_unit: int, unit: Unit
) -> UnitRows:
    if not 0 <= unit.rows <= rows_per_unit:
        raise _broken(
            collection, f"unit {unit.unit} has {unit.rows} rows, and units have at most {rows_per_unit}"
        )
    objects = {stored.key: stored for stored in unit.objects}
    first = unit.unit * (rows_per_unit // spec.rows_per_shard)
    shards = []
    for number, start in enumerate(range(0, unit.rows, spec.rows_per_shard)):
        key = shard_key(collection.id, hook_point, first + number)
        stored = objects.get(key)
        if stored is None or stored.nbytes < spec.index_bytes:
            raise _broken(collection, f"unit {unit.unit} does not list a shard {key!r} of a possible length")
        shards.append(
            ShardRef(key, stored.nbytes, stored.sha256, min(spec.rows_per_shard, unit.rows - start))
        )
    return UnitRows(
        unit.unit, unit.rows, tuple(shards), _sums_ref(collection, hook_point, spec, unit, objects)
    )


def _sums_ref(
    collection: Collection, hook_point: str, spec: ShardSpec, unit: Unit, objects: Mapping[str, StoredObject]
) -> SumsRef | None:
    meta: Any = unit.meta.get("sums")
    if meta is None:
        return None
    try:
        ref = parse_sums_ref(meta, hook_point)
        stored = objects[ref.key]
    except (KeyError, TypeError, ValueError, ActstoreError) as error:
        raise _broken(collection, f"unit {unit.unit} does not say where its sums are ({error!r})") from error
    if ref.nbytes != 4 * spec.n_sums_of(unit.rows) or not 0 <= ref.offset <= stored.nbytes - ref.nbytes:
        raise _broken(collection, f"unit {unit.unit} has sums of {ref.nbytes} bytes for {unit.rows} rows")
    return ref


def _broken(collection: Collection, found: str) -> FormatError:
    return FormatError(
        ErrorKind.INVARIANT_BROKEN, f"{collection.kind} {collection.id!r} cannot be read: {found}; see fsck"
    )


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ascending ranges with those that touch made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def _ranges_text(ranges: Sequence[tuple[int, int]]) -> str:
    if not ranges:
        return "none yet"
    shown = ", ".join(f"[{start}, {stop})" for start, stop in ranges[:4])
    return (
        shown
        if len(ranges) <= 4
        else f"{shown}, ... {len(ranges) - 5} more ..., [{ranges[-1][0]}, {ranges[-1][1]})"
    )
