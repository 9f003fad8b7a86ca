"""Which rows of a hook point exist at this version, and in which shard is each? (FORMAT.md, sections 5 and 6)

Row `r` is row `r % rows_per_unit` of unit `r // rows_per_unit`. Units end early (they hold whole documents) and may be
missing (not committed yet), so row numbers have gaps; the manifest alone says which rows exist.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.codec.spec import ShardSpec
from actstore.codec.sums import SumsRef, parse_sums_ref
from actstore.errors import ActstoreError, ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.log.values import Collection, StoredObject, Unit
from actstore.names import hook_point_folder


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
    shards: tuple[ShardRef, ...]
    """In order; every one but the last holds `rows_per_shard` rows."""

    sums: SumsRef | None
    """None when the writer stored none: a reader then hashes whole shards to make them."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """All rows of a hook point at one version."""

    hook_point: str
    spec: ShardSpec
    rows_per_unit: int
    units: tuple[UnitRows, ...]
    """Live units by ascending number."""

    @property
    def n_rows(self) -> int:
        """Rows that exist."""
        return sum(unit.n_rows for unit in self.units)

    def unit_rows(self) -> npt.NDArray[np.int64]:
        """Return `[last unit + 1]`: rows of every unit, 0 where it is not live."""
        rows = np.zeros(self.units[-1].unit + 1 if self.units else 0, np.int64)
        for unit in self.units:
            rows[unit.unit] = unit.n_rows
        return rows

    def row_ranges(self) -> list[tuple[int, int]]:
        """Return the half-open ranges of existing rows, as few as possible, ascending."""
        ranges: list[tuple[int, int]] = []
        for unit in self.units:
            start = unit.unit * self.rows_per_unit
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, unit.unit * self.rows_per_unit + unit.n_rows))
        return ranges

    def existing(self, start: int, stop: int, step: int = 1) -> npt.NDArray[np.int64]:
        """Return the rows of `range(start, stop, step)` that exist."""
        parts = []
        for first, end in self.row_ranges():
            low = start + max(0, -(-(first - start) // step)) * step
            parts.append(np.arange(low, min(end, stop), step, dtype=np.int64))
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def check_rows(self, rows: npt.NDArray[np.int64]) -> None:
        """Raise unless every row exists.

        Raises:
            NotFoundError: naming the first one that does not, and the ranges that do.
        """
        unit_rows = self.unit_rows()
        unit, offset = np.divmod(rows, self.rows_per_unit)
        known = (unit >= 0) & (unit < len(unit_rows))
        exists = known.copy()
        exists[known] = offset[known] < unit_rows[unit[known]]
        if not exists.all():
            first = int(rows[np.argmin(exists)])
            raise NotFoundError(
                ErrorKind.ROW_NOT_FOUND,
                f"row {first} of hook point {self.hook_point!r} does not exist at this version: "
                f"rows are {_ranges_text(self.row_ranges())} (row numbers have gaps, and never count from the end)",
            )


def parse_layout(collection: Collection, hook_point: str) -> RowLayout:
    """Return the rows of a run's hook point from the run's configuration and live units.

    Raises:
        NotFoundError: the run has no such hook point.
        FormatError: the configuration or a unit is not as FORMAT.md has it.
    """
    config = collection.config
    try:
        widths = {str(point["name"]): int(point["d_model"]) for point in config["hook_points"]}
        if hook_point not in widths:
            raise NotFoundError(
                ErrorKind.HOOK_POINT_NOT_FOUND,
                f"run {collection.id!r} has no hook point {hook_point!r}: it has {sorted(widths)}",
            )
        spec = ShardSpec(
            rows_per_shard=int(config["rows_per_shard"][hook_point]),
            rows_per_chunk=int(config["rows_per_chunk"][hook_point]),
            d_model=widths[hook_point],
            dtype=str(config["dtype"]),
            codec=str(config["codec"]),
        )
        rows_per_unit = int(config["rows_per_unit"])
    except (KeyError, TypeError, ValueError, InvalidInputError) as error:
        if isinstance(error, NotFoundError):
            raise
        raise _broken(
            collection, f"its configuration does not describe hook point {hook_point!r} ({error!r})"
        ) from error
    if rows_per_unit < 1 or rows_per_unit % spec.rows_per_shard:
        raise _broken(
            collection, f"units of {rows_per_unit} rows are no whole shards of {spec.rows_per_shard} rows"
        )
    units = [
        _unit_rows(collection, hook_point, spec, rows_per_unit, collection.units[number])
        for number in sorted(collection.units)
    ]
    return RowLayout(hook_point, spec, rows_per_unit, tuple(unit for unit in units if unit.n_rows))


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


def _ranges_text(ranges: Sequence[tuple[int, int]]) -> str:
    if not ranges:
        return "none yet"
    shown = ", ".join(f"[{start}, {stop})" for start, stop in ranges[:4])
    return (
        shown
        if len(ranges) <= 4
        else f"{shown}, ... {len(ranges) - 5} more ..., [{ranges[-1][0]}, {ranges[-1][1]})"
    )
