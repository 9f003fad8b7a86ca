"""Which rows does a run that keeps a sample keep? Those whose hash is small, whatever unit they are in.

A row is kept if a 64-bit hash of its number and the run's seed is below `rate * 2^64` (FORMAT.md, section 6.8), so any program
can tell without reading anything, every run with the same rate and seed keeps the same rows, and the rows of a smaller rate
are among those of a larger one.

Source: Steele, Lea, Flood (2014), "Fast Splittable Pseudorandom Number Generators", OOPSLA, figure 19 (the generator
SplitMix64 and its finaliser, variant 13 of David Stafford's).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore.checks import check_whole
from actstore.codec.cache import BytesCache
from actstore.codec.spec import MAX_CHUNK_BYTES, TARGET_CHUNK_BYTES, ShardSpec, plan_spec
from actstore.errors import ErrorKind, InvalidInputError

Int64s = npt.NDArray[np.int64]

_GAMMA: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
_BLOCK_ROWS: Final = 1 << 14
"""Rows hashed at a time: 128 KiB of hashes and as much again stay in a core's cache."""

_CACHE_BYTES: Final = 32 << 20
"""Offsets of about 1,200 units of 65,536 rows at a rate of 5 %."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The share of rows that a run keeps."""

    rate: float
    """Above 0, at most 1: each row is kept with this probability."""

    seed: int
    """Of the hash; 0 to 2^64 - 1."""

    def __post_init__(self) -> None:
        check_whole(self.seed, what="seed", least=0, most=_MASK)
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not 0 < self.rate <= 1:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"a sample is a share above 0 and at most 1, got {self.rate!r}"
            )

    @property
    def threshold(self) -> int:
        """The least whole number that is not below `rate * 2^64`: rows with a smaller hash are kept.

        >>> Sample(0.5, 0).threshold == 1 << 63
        True
        """
        return math.ceil(Fraction(self.rate) * (1 << 64))

    def to_json(self) -> dict[str, Any]:
        """Return what a run's configuration says of it."""
        return {"rate": float(self.rate), "seed": self.seed}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Sample":
        """Return what `to_json` wrote.

        Raises:
            KeyError, InvalidInputError: it is something else.
        """
        return cls(stored["rate"], stored["seed"])


def row_hashes(rows: npt.NDArray[np.integer[Any]], seed: int) -> npt.NDArray[np.uint64]:
    """Return the 64-bit hash of every row number.

    The hash of row r is output number r (from 0) of SplitMix64 whose state starts at the first output of SplitMix64 whose
    state starts at `seed`.

    >>> row_hashes(np.array([0, 1]), 0).tolist()
    [12035550249420947055, 12935080325729570654]
    """
    with np.errstate(over="ignore"):
        hashes: npt.NDArray[np.uint64] = rows.astype(np.uint64)
        hashes *= np.uint64(_GAMMA)
        hashes += np.uint64((_mix_int((seed + _GAMMA) & _MASK) + _GAMMA) & _MASK)
        shifted = np.empty_like(hashes)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            np.right_shift(hashes, np.uint64(shift), out=shifted)
            hashes ^= shifted
            hashes *= np.uint64(factor)
        np.right_shift(hashes, np.uint64(31), out=shifted)
        hashes ^= shifted
    return hashes


def kept_offsets(unit: int, n_rows: int, *, rows_per_unit: int, rate: float, seed: int) -> Int64s:
    """Return which rows of a unit are kept, as ascending offsets in the unit.

    Args:
        unit: Number of the unit.
        n_rows: Rows that it has; the answer for fewer rows is the beginning of that for more.
        rows_per_unit: Distance between the first rows of neighbouring units.
        rate: Share of rows kept, above 0 and at most 1.
        seed: Of the hash.

    Raises:
        InvalidInputError: `rate` or `seed` out of range.

    >>> kept_offsets(0, 10, rows_per_unit=10, rate=0.5, seed=0).tolist()
    [2, 5, 7, 8]
    """
    threshold = Sample(rate, seed).threshold
    if threshold > _MASK:
        return np.arange(n_rows, dtype=np.int64)
    limit = np.uint64(threshold)
    parts = []
    first = unit * rows_per_unit
    for start in range(0, n_rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, n_rows)
        hashes = row_hashes(np.arange(first + start, first + stop, dtype=np.uint64), seed)
        parts.append(np.flatnonzero(hashes < limit) + start)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def most_kept(units_rows: Iterable[tuple[int, int]], *, rows_per_unit: int, rate: float, seed: int) -> int:
    """Return the largest number of rows that any unit keeps; costs about half a millisecond for 65,536 rows.

    Args:
        units_rows: Number and rows of every unit.
        rows_per_unit: As in `kept_offsets`.
        rate: As in `kept_offsets`.
        seed: As in `kept_offsets`.

    >>> most_kept([(0, 10), (1, 4)], rows_per_unit=10, rate=0.5, seed=0)
    4
    """
    counts = (
        len(kept_offsets(unit, n_rows, rows_per_unit=rows_per_unit, rate=rate, seed=seed))
        for unit, n_rows in units_rows
    )
    return max(counts, default=0)


def plan_stored_rows(most: int, *, widths: Iterable[int], dtype: str, codec: str) -> int:
    """Return how many places for rows a unit has in a sampled run's arrays, `stored_rows_per_unit`.

    The smallest number from `most` on that can be cut well at every hook point: into shards and chunks of the usual size, with
    checksums over no fewer rows than usual. Places that stay empty cost nothing but the padding of a last chunk.

    Args:
        most: Rows that the fullest unit keeps.
        widths: `d_model` of every hook point.
        dtype: Stored dtype.
        codec: As in `plan_spec`.

    Raises:
        InvalidInputError: rows that are too wide for any layout.

    >>> plan_stored_rows(3277, widths=[768], dtype="bfloat16", codec="hot")
    3296
    """
    distinct = sorted(set(widths))
    step = 1
    while True:
        places = -(-max(1, most) // step) * step
        try:
            specs = [
                plan_spec(rows_per_unit=places, d_model=width, dtype=dtype, codec=codec) for width in distinct
            ]
        except InvalidInputError:
            if step > 2 * max(1, most):
                raise
        else:
            if step > 2 * max(1, most) or all(_is_cut_well(spec, places) for spec in specs):
                return places
        step *= 2


class KeptRows:
    """The offsets of a run's kept rows, unit by unit, computed when they are asked for; memory is bounded.

    Safe for use from many threads.
    """

    def __init__(self, sample: Sample, *, rows_per_unit: int) -> None:
        """Take the sample of a run; computes nothing yet."""
        self.sample = sample
        self.rows_per_unit = rows_per_unit
        self._offsets: BytesCache[Int64s] = BytesCache(_CACHE_BYTES)

    def offsets(self, unit: int, n_stored: int) -> Int64s:
        """Return the offsets of the `n_stored` rows that a unit stores, ascending and read-only.

        They are the first ones of a full unit's, so the length of the unit need not be known.
        """
        return self._offsets.get(unit, lambda: self._load(unit))[:n_stored]

    def _load(self, unit: int) -> tuple[Int64s, int]:
        sample, size = self.sample, self.rows_per_unit
        offsets = kept_offsets(unit, size, rows_per_unit=size, rate=sample.rate, seed=sample.seed)
        offsets.flags.writeable = False
        return offsets, offsets.nbytes


def parse_kept(config: Mapping[str, Any]) -> KeptRows | None:
    """Return which rows the run of a configuration keeps; None when all.

    Raises:
        KeyError, TypeError, InvalidInputError: the configuration is damaged.
    """
    if "sample" not in config:
        return None
    return KeptRows(Sample.from_json(config["sample"]), rows_per_unit=int(config["rows_per_unit"]))


def _is_cut_well(spec: ShardSpec, places: int) -> bool:
    """Return whether chunks are as small as planned ones should be and sums as large, or all rows of a unit are few."""
    small_enough = spec.chunk_bytes <= max(TARGET_CHUNK_BYTES, min(spec.row_bytes, MAX_CHUNK_BYTES))
    return small_enough and spec.rows_per_sum >= min(spec.wanted_rows_per_sum, places)


def _mix_int(z: int) -> int:
    """Return SplitMix64's output for one state."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
