"""On which rows do the latents of a pattern fire, as far as it can matter? From postings, rarest first, or from a scan."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from actstore.codes import Codes
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.patterns import Conjunction, Fires
from actstore.postings import Postings
from actstore.run import Run
from actstore.targets import Latent

from .cofiring import near_rows
from .latent_filter import has_statistics

Bools = npt.NDArray[np.bool_]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

_FIRING_BYTES = 24
"""Of one firing held: its row, its value, its coordinate."""

_SCAN_ROWS = 8192


@dataclass(slots=True)
class Firings:
    """The firings of every condition of a pattern."""

    codes: dict[str, Codes]
    """By dictionary."""

    found: dict[Fires, tuple[Int64s, Float64s]] = field(default_factory=dict)
    """Rows, ascending, and values of each condition."""

    maxima: dict[Latent, float] = field(default_factory=dict)
    """Each latent's largest value in the run; 0 where it never fires."""

    nbytes: int = 0
    """Stored bytes of the objects read."""

    def of(self, leaf: Fires) -> tuple[Int64s, Float64s]:
        """Return the rows and values of one condition."""
        return self.found[leaf]

    def largest(self, leaf: Fires) -> float:
        """Return the latent's largest value in the run; 1 where it never fires, so that one can divide by it."""
        return self.maxima[leaf.latent] or 1.0

    def all_rows(self) -> Int64s:
        """Return every row on which any condition holds, ascending."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in self.found.values())]))

    def shares(self, rows: Int64s) -> tuple[Float64s, Bools]:
        """Return the largest share of its maximum that any of the pattern's latents has at some rows, and which are unknown.

        Unknown are rows that some dictionary has no codes of.
        """
        best, missing = np.zeros(len(rows)), np.zeros(len(rows), np.bool_)
        unique, inverse = np.unique(rows, return_inverse=True)
        for name, codes in self.codes.items():
            stored = is_encoded(codes, unique)
            dense = np.zeros(len(unique))
            held = codes.rows(unique[stored])
            owners = np.flatnonzero(stored)[held.row_numbers()]
            for latent in dict.fromkeys(leaf.latent for leaf in self.found if leaf.latent.dictionary == name):
                at = np.flatnonzero(held.latents == latent.index)
                share = held.values[at].astype(np.float64) / (self.maxima[latent] or 1.0)
                dense[owners[at]] = np.maximum(dense[owners[at]], share)
            best = np.maximum(best, dense[inverse])
            missing |= ~stored[inverse]
        return best, missing


def is_encoded(codes: Codes, rows: Int64s) -> Bools:
    """Return which rows have codes, firing or not."""
    units = np.unique(rows // codes.rows_per_unit)
    present = [codes.unit_rows(u) for u in units.tolist() if u in codes.collection.units]
    return np.isin(rows, np.concatenate([np.empty(0, np.int64), *present]))


def find_firings(
    run: Run, alternatives: Sequence[Conjunction], *, reach: int | None, memory_bytes: int
) -> Firings:
    """Return the firings of all conditions of a pattern.

    Args:
        run: The run asked.
        alternatives: The pattern, written out.
        reach: Firings further than so many row numbers from every place where an alternative can hold may be left out; None to
            keep all.
        memory_bytes: Bound on what is held.

    Raises:
        NotFoundError: no such codes or latent.
        InvalidInputError: TOO_LARGE: more firings than `memory_bytes` holds.
    """
    leaves = list(dict.fromkeys(leaf for c in alternatives for leaf in (*c.positive, *c.negative)))
    names = list(dict.fromkeys(leaf.latent.dictionary for leaf in leaves))
    firings = Firings({name: run.codes(name) for name in names})
    for leaf in leaves:
        _check_latent(firings.codes[leaf.latent.dictionary], leaf.latent)
    if all(has_statistics(codes) for codes in firings.codes.values()):
        _from_postings(firings, alternatives, reach, memory_bytes)
    else:
        _from_scan(firings, leaves, memory_bytes)
    return firings


def _check_latent(codes: Codes, latent: Latent) -> None:
    if latent.index >= codes.n_latents:
        raise NotFoundError(
            ErrorKind.ROW_NOT_FOUND,
            f"{latent.label!r} was asked for, dictionary {codes.dictionary!r} has latents [0, {codes.n_latents})",
        )


def _from_postings(
    firings: Firings, alternatives: Sequence[Conjunction], reach: int | None, memory_bytes: int
) -> None:
    """Read each conjunction's latents, rarest first; of the others keep what is near all those read before."""
    postings = {name: codes.postings() for name, codes in firings.codes.items()}
    counts: dict[Latent, int] = {}
    for conjunction in alternatives:
        for leaf in (*conjunction.positive, *conjunction.negative):
            latent = leaf.latent
            if latent not in counts:
                of_dictionary = postings[latent.dictionary]
                counts[latent] = of_dictionary.count(latent.index)
                top = of_dictionary.top(latent.index, 1)[1]
                firings.maxima[latent] = float(top[0]) if len(top) else 0.0
                firings.nbytes += sum(obj.nbytes for obj in of_dictionary.objects_of([latent.index]))

    held: dict[Fires, list[tuple[Int64s, Float64s]]] = {}
    n_held = 0
    for conjunction in alternatives:
        near: Int64s | None = None
        order = sorted(conjunction.positive, key=lambda leaf: counts[leaf.latent])
        for leaf in (*order, *conjunction.negative):
            rows, values = _read_postings(postings[leaf.latent.dictionary], leaf, memory_bytes)
            if near is not None and reach is not None:
                # An anchor is within reach of some row of `near`, and what counts for it within reach of the anchor.
                close = near_rows(rows, near, 2 * reach)
                rows, values = rows[close], values[close]
            if leaf in conjunction.positive and (near is None or len(rows) < len(near)):
                near = rows
            held.setdefault(leaf, []).append((rows, values))
            n_held += len(rows)
            _check_room(n_held, memory_bytes)
    for leaf, pieces in held.items():
        firings.found[leaf] = _merged(pieces)


def _read_postings(postings: Postings, leaf: Fires, memory_bytes: int) -> tuple[Int64s, Float64s]:
    """Return one condition's firings, by row; of a latent with a bound the blocks that have such values are read."""
    index = leaf.latent.index
    if leaf.above == 0:
        _check_room(postings.count(index), memory_bytes)
        return _within_bounds(leaf, *postings.latent(index))
    _check_room(sum(b.count for b in postings.blocks(index) if b.high > leaf.above), memory_bytes)
    rows, values = _within_bounds(leaf, *postings.value_range(index, leaf.above))
    order = np.argsort(rows, kind="stable")
    return rows[order], values[order]


def _merged(pieces: Sequence[tuple[Int64s, Float64s]]) -> tuple[Int64s, Float64s]:
    """Return what several conjunctions kept of one condition, each firing once."""
    if len(pieces) == 1:
        return pieces[0]
    rows, first = np.unique(np.concatenate([rows for rows, _ in pieces]), return_index=True)
    return rows, np.concatenate([values for _, values in pieces])[first]


def _from_scan(firings: Firings, leaves: Sequence[Fires], memory_bytes: int) -> None:
    """Read all codes once."""
    pieces: dict[Fires, list[tuple[Int64s, Float64s]]] = {leaf: [] for leaf in leaves}
    n_held = 0
    for name, codes in firings.codes.items():
        mine = [leaf for leaf in leaves if leaf.latent.dictionary == name]
        wanted = np.unique([leaf.latent.index for leaf in mine])
        for leaf in mine:
            firings.maxima.setdefault(leaf.latent, 0.0)
        units = codes.collection.units.values()
        firings.nbytes += sum(obj.nbytes for unit in units for obj in unit.objects if "/units/" in obj.key)
        for numbers, held in codes.scan(_SCAN_ROWS):
            some = np.flatnonzero(np.isin(held.latents, wanted))
            rows = numbers[held.row_numbers()[some]]
            latents, values = held.latents[some], held.values[some].astype(np.float64)
            for leaf in mine:
                at = latents == leaf.latent.index
                largest = float(values[at].max(initial=0.0))
                firings.maxima[leaf.latent] = max(firings.maxima[leaf.latent], largest)
                piece = _within_bounds(leaf, rows[at], values[at])
                n_held += len(piece[0])
                pieces[leaf].append(piece)
            _check_room(n_held, memory_bytes)
    for leaf, found in pieces.items():
        rows = np.concatenate([np.empty(0, np.int64), *(r for r, _ in found)])
        firings.found[leaf] = (rows, np.concatenate([np.empty(0), *(v for _, v in found)]))


def _within_bounds(leaf: Fires, rows: Int64s, values: npt.NDArray[np.floating]) -> tuple[Int64s, Float64s]:
    # Compared as float64: a bound need not be a number of the stored dtype.
    wide = values.astype(np.float64)
    inside = (wide > leaf.above) & (wide < leaf.below)
    return rows[inside], wide[inside]


def _check_room(n_firings: int, memory_bytes: int) -> None:
    if n_firings * _FIRING_BYTES > memory_bytes:
        raise InvalidInputError(
            ErrorKind.TOO_LARGE,
            f"the pattern's latents fire {n_firings} times or more, which takes {n_firings * _FIRING_BYTES} bytes of "
            f"memory_bytes={memory_bytes}: raise it, or ask for firings above a bound, as fires(...) > 1",
        )
