"""Which rows may be shown as ones on which a latent does not fire? A random draw from all that pass the masks."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.log.values import Collection
from actstore.run import Run
from actstore.sampling import parse_kept

Bools: TypeAlias = npt.NDArray[np.bool_]
Int64s: TypeAlias = npt.NDArray[np.int64]

MAX_DRAWN = 1 << 20
"""Most rows looked at: where the masks leave fewer than one in thousands, the answer may stay short."""

_FEW_ROWS = 16
"""Times the rows asked for that are drawn at first; putting all rows of a run in random order takes longer than the answer."""

_FIRST_DRAW = 1.25
"""Times the rows asked for that are looked at first: every row may need another unit's tokens."""


class StoredRows:
    """The rows that a run stores, by their place in the run and by their number."""

    def __init__(self, run: Run, codes: Collection) -> None:
        """Take a run and its codes; reads nothing.

        Args:
            run: Says which rows of a unit are stored.
            codes: The units that are encoded, and the rows of each.
        """
        self._rows_per_unit = run.tokenization.rows_per_unit
        self._kept = parse_kept(run.collection.config)
        self._collection = codes

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self._collection.rows

    def numbers(self, places: Int64s) -> Int64s:
        """Return the row numbers of the rows at some places in [0, n_rows)."""
        units, counts = self._units()
        ends = np.cumsum(counts)
        at = np.searchsorted(ends, places, side="right")
        offsets = places - (ends - counts)[at]
        if self._kept is not None:
            for i in np.unique(at).tolist():
                mine = at == i
                kept = self._kept.offsets(int(units[i]), int(counts[i]))
                offsets[mine] = kept[offsets[mine]]
        numbers: Int64s = units[at] * self._rows_per_unit + offsets
        return numbers

    def exist(self, rows: Int64s) -> Bools:
        """Return which rows, of units that are encoded, are stored; all of them unless the run keeps a sample."""
        if self._kept is None:
            return np.ones(len(rows), np.bool_)
        found = np.zeros(len(rows), np.bool_)
        units = rows // self._rows_per_unit
        for unit in np.unique(units).tolist():
            mine = units == unit
            stored = self._collection.units[unit].rows
            found[mine] = np.isin(rows[mine] % self._rows_per_unit, self._kept.offsets(unit, stored))
        return found

    def among(self, rows: Int64s) -> Int64s:
        """Return those of some rows that are stored."""
        encoded = self._collection.units
        units = rows // self._rows_per_unit
        live = [unit for unit in np.unique(units).tolist() if unit in encoded]
        rows = rows[np.isin(units, live)]
        return rows[self.exist(rows)]

    def _units(self) -> tuple[Int64s, Int64s]:
        """Return the encoded units, ascending, and the rows of each."""
        found = [(number, unit.rows) for number, unit in sorted(self._collection.units.items())]
        table: Int64s = np.array(found, np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]


def draw_quiet_rows(
    stored: StoredRows,
    among: Int64s | None,
    n: int,
    *,
    seed: int,
    firing: Int64s,
    keep: Callable[[Int64s], Bools],
    keys: Callable[[Int64s], npt.NDArray[Any]],
    shown: set[bytes],
) -> Int64s:
    """Return up to `n` rows, ascending, that are no firing ones and pass the masks, each as likely as any other.

    Rows are looked at in a random order that the seed sets; of near-duplicates the first one counts. Fewer than `n` come back
    where there are no more, or where `MAX_DRAWN` rows have been looked at.

    Args:
        stored: The run's rows.
        among: Draw from these rows only, ascending; those that the run does not store do not count.
        n: Rows asked for.
        seed: Of the order.
        firing: Rows on which the latent fires, ascending.
        keep: Which rows, ascending, pass the masks.
        keys: Keys by which rows are folded.
        shown: Keys of rows shown already; those drawn are added.
    """
    chosen: list[int] = []
    for order in _random_orders(stored, among, n, seed):
        order = order[~_is_in(order, firing)]
        _choose(order, n, chosen, keep=keep, keys=keys, shown=shown)
        if len(chosen) == n:
            break
    return np.array(sorted(chosen), np.int64)


def _choose(
    order: Int64s,
    n: int,
    chosen: list[int],
    *,
    keep: Callable[[Int64s], Bools],
    keys: Callable[[Int64s], npt.NDArray[Any]],
    shown: set[bytes],
) -> None:
    """Add rows that pass the masks to `chosen`, in their order, until there are `n`."""
    start, size = 0, max(8, int(n * _FIRST_DRAW))
    while len(chosen) < n and start < len(order):
        some = order[start : start + size]
        start, size = start + size, size * 4
        ascending = np.argsort(some)
        passing = np.empty(len(some), np.bool_)
        passing[ascending] = keep(some[ascending])
        some = some[passing]
        for row, key in zip(some.tolist(), keys(some), strict=True):
            text = key.tobytes()
            if text not in shown and len(chosen) < n:
                shown.add(text)
                chosen.append(row)


def _random_orders(stored: StoredRows, among: Int64s | None, n: int, seed: int) -> Iterator[Int64s]:
    """Yield the rows to look at, in random order, none of them twice: a few first, and then the others."""
    rng = np.random.default_rng(seed)
    if among is not None:
        yield rng.permutation(stored.among(among))[:MAX_DRAWN]
        return
    first = _drawn(rng, stored.n_rows, min(_FEW_ROWS * n, MAX_DRAWN))
    yield stored.numbers(first)
    if stored.n_rows <= MAX_DRAWN:
        rest = np.ones(stored.n_rows, np.bool_)
        rest[first] = False
        yield stored.numbers(rng.permutation(np.flatnonzero(rest)))
    elif len(first) < MAX_DRAWN:
        more = _drawn(rng, stored.n_rows, MAX_DRAWN - len(first))
        yield stored.numbers(more[~np.isin(more, first)])


def _drawn(rng: np.random.Generator, n_rows: int, n_draws: int) -> Int64s:
    """Return different places in [0, n_rows), in the order drawn; fewer than `n_draws` where some came twice."""
    if not n_rows:
        return np.empty(0, np.int64)
    drawn = rng.integers(0, n_rows, n_draws)
    _, first = np.unique(drawn, return_index=True)
    return drawn[np.sort(first)]


def _is_in(rows: Int64s, ascending: Int64s) -> Bools:
    if not len(ascending):
        return np.zeros(len(rows), np.bool_)
    places = np.minimum(np.searchsorted(ascending, rows), len(ascending) - 1)
    found: Bools = ascending[places] == rows
    return found
