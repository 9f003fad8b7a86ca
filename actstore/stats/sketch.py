"""How are quantiles answered from counts? Two histograms with bins of fixed ratio, which merge by adding.

Norms: bin i holds L2 norms in `(gamma^(i-1), gamma^i]`. Values: a bin is what a float32 has in common in its sign, exponent and
6 leading bits of its fraction, so no logarithm is taken; bin numbers are signed and in the order of the values. Both are
right to 1 % of the value (FORMAT.md, section 7.3).

Source: Masson, Rim, Lee (2019), "DDSketch", VLDB 12(12), section 2 (relative-error quantiles, their merging, and the
harmonic middle of a bin).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError
from actstore.sampling import row_hashes

Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

NORM_GAMMA: Final = 1.02
"""Ratio of the norms' bin edges: their quantiles are right to 1 %, (gamma - 1) / (gamma + 1)."""

ROWS_PER_SKETCHED: Final = 16
"""One row in so many enters the sketch of values: counting every value costs more than all other statistics together
(1.2 ns a value against 1.0), and a sixteenth of a million rows of 768 is still 50 million values."""

SKETCH_SEED: Final = 0x76616C756573
"""Seed of the hash that chooses those rows ("values" in ASCII): no seed that a user would choose for a sample of rows."""

_FRACTION_BITS: Final = 6
_SHIFT: Final = 23 - _FRACTION_BITS
N_VALUE_KEYS: Final = 1 << (32 - _SHIFT)
"""Different sign, exponent and leading fraction bits: 32,768."""

VALUE_ERROR: Final = 1 / 129
"""Relative error of a value taken from its bin: (hi - lo) / (hi + lo), at worst for lo = 64 and hi = 65."""


@dataclass(frozen=True, slots=True)
class ValueSketch:
    """How often which values occur in every 16th row or so, all dimensions together; exact counts of bins."""

    n_rows: int
    """Rows counted: those finite rows whose number `is_sketched` chooses, the same ones in whatever pieces they come."""

    bins: Int32Array
    """Ascending bin numbers, each once: sign of the value times the number that the upper 14 of the 31 bits of its magnitude
    make, as float32. 0 also holds what is smaller than 2^-132."""

    counts: Int64Array
    """Values in each bin."""

    @property
    def n_values(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum())

    def quantile(self, q: float) -> float:
        """Return the `q` quantile (0 to 1) of the counted values, of lower rank; NaN if there are none.

        It is within 1/129 (0.78 %) of the exact one; within 2^-133 for magnitudes below 2^-126, which are subnormal.
        """
        index = rank_index(self.counts, q, self.n_values)
        return float("nan") if index is None else float(bin_values(self.bins[index : index + 1])[0])

    def magnitude_quantile(self, q: float) -> float:
        """Return the `q` quantile of the counted values' magnitudes; NaN if there are none. Error as of `quantile`."""
        folded = merge_counts([np.abs(self.bins)], [self.counts])
        return ValueSketch(self.n_rows, *folded).quantile(q)


def empty_value_sketch() -> ValueSketch:
    """Return the sketch of no rows."""
    return ValueSketch(0, np.zeros(0, np.int32), np.zeros(0, np.int64))


def merge_value_sketches(a: ValueSketch, b: ValueSketch) -> ValueSketch:
    """Return the sketch of both sets of rows; exact."""
    return ValueSketch(a.n_rows + b.n_rows, *merge_counts([a.bins, b.bins], [a.counts, b.counts]))


def is_sketched(rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
    """Return which row numbers' values enter the sketch: one in 16, by a hash of the number alone."""
    sketched: npt.NDArray[np.bool_] = row_hashes(rows, SKETCH_SEED) < np.uint64(
        (1 << 64) // ROWS_PER_SKETCHED
    )
    return sketched


def value_keys(values: npt.NDArray[np.float32], *, out: npt.NDArray[np.intp]) -> None:
    """Write each value's sign, exponent and leading fraction bits to `out`, as a number below `N_VALUE_KEYS`."""
    np.right_shift(values.view(np.uint32), _SHIFT, out=out, casting="unsafe")


def sketch_of_keys(n_rows: int, key_counts: Int64Array) -> ValueSketch:
    """Return the sketch of values counted by key, shape (N_VALUE_KEYS,); all finite."""
    half = N_VALUE_KEYS // 2
    # Keys from `half` on are negative values: the larger the key, the lower the value. -0.0 counts with 0.0.
    ordered = np.concatenate([key_counts[:half:-1], key_counts[:half]])
    ordered[half - 1] += key_counts[half]
    (used,) = np.nonzero(ordered)
    return ValueSketch(n_rows, (used - (half - 1)).astype(np.int32), ordered[used].astype(np.int64))


def bin_values(bins: Int32Array) -> Float64Array:
    """Return the value that stands for each bin: the harmonic middle of its edges, the middle where values are subnormal."""
    key = np.abs(bins.astype(np.int64))
    low, high = _edge(key), _edge(key + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = np.where(key >= 1 << _FRACTION_BITS, 2 * low / (1 + low / high), (low + high) / 2)
    values: Float64Array = np.where(key == 0, 0.0, np.sign(bins) * middle)
    return values


def _edge(key: Int64Array) -> Float64Array:
    """Return the least magnitude with these upper bits, as float64; the key after the last finite one gives 2^128."""
    exponent, fraction = key >> _FRACTION_BITS, (key & ((1 << _FRACTION_BITS) - 1)) / (1 << _FRACTION_BITS)
    edge: Float64Array = np.ldexp(fraction + (exponent > 0), np.maximum(exponent, 1) - 127)
    return edge


def norm_bins(norms: Float64Array) -> Int32Array:
    """Return the bin number of each positive norm."""
    bins: Int32Array = np.ceil(np.log(norms) / np.log(NORM_GAMMA)).astype(np.int32)
    return bins


def bin_norm(number: int) -> float:
    """Return the norm that stands for a bin: within 1 % of all that it holds."""
    return float(2.0 * NORM_GAMMA ** float(number) / (NORM_GAMMA + 1.0))


def norm_quantile(bins: Int32Array, counts: Int64Array, zeros: int, q: float) -> float:
    """Return the `q` quantile of norms counted by bin and `zeros` norms that are 0; NaN if there are none."""
    index = rank_index(np.concatenate([np.full(1, zeros, np.int64), counts]), q, zeros + int(counts.sum()))
    if index is None:
        return float("nan")
    return bin_norm(int(bins[index - 1])) if index else 0.0


def rank_index(counts: Int64Array, q: float, total: int) -> int | None:
    """Return the index of the count that holds the value of lower rank `q * (total - 1)`, or None if `total` is 0.

    Raises:
        InvalidInputError: `q` is not from 0 to 1.
    """
    if not 0 <= q <= 1:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"a quantile is asked for by a number from 0 to 1, got {q!r}"
        )
    if not total:
        return None
    index = int(np.searchsorted(np.cumsum(counts), np.floor(q * (total - 1)), side="right"))
    return min(index, len(counts) - 1)


def merge_counts(
    bins: Iterable[npt.NDArray[Any]], counts: Iterable[Int64Array]
) -> tuple[npt.NDArray[Any], Int64Array]:
    """Return every bin number that occurs once, ascending, and the sums of its counts."""
    merged, inverse = np.unique(np.concatenate(list(bins)), return_inverse=True)
    total = np.zeros(len(merged), np.int64)
    np.add.at(total, inverse.reshape(-1), np.concatenate(list(counts)))
    return merged, total
