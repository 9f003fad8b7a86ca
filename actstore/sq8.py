"""What do the bytes of a compressed row stand for, and how far may an inner product with them be from the true one?

A row is turned to axes along which its numbers vary independently, unless it is very wide. Along every axis there is a range, cut
into 256 bins; a byte is the number of a bin and stands for its middle. In FAISS's words that is a `LinearTransform` and a
`QT_8bit`, so its own code reads the files; the turn and the ranges are ours (`actstore.ingest.indexing.scan_sq8`), and so is the
rule that a row outside of a range along any axis is not compressed at all. Hence the bound, for the turned numbers y of a row,
those yc that its bytes stand for, and any direction v in the turned space:

    |y.v - yc.v| <= sum_j |v_j| step_j / 2

which is all that a compressed row leaves open; the rest is rounding, of the turn and of the sum. Turned, bins are as fine as rows
differ along each axis, so that what is left open is little beside how rows differ along *any* direction: without the turn, a
direction along which they differ little, such as most probes, could not be told from noise.

Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1, eq. 3.5, for the rounding of sums.
"""

import functools
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.faiss_file import load_faiss

Float32s: TypeAlias = npt.NDArray[np.float32]
Float64s: TypeAlias = npt.NDArray[np.float64]
Codes: TypeAlias = npt.NDArray[np.uint8]
Bools: TypeAlias = npt.NDArray[np.bool_]

LEAST_WIDTH: Final = 2.0**-100
"""Narrowest range: of constant dimensions too, so that no step is 0 and no quotient overflows."""

_LAST: Final = 255.999
"""End of the last bin, less what rounding may be off."""

_SLIP: Final = 2.0**-12
"""Share of a step by which rounding may put a number into the bin beside its own: 255 (4 u) is a quarter of it."""

_TURN_SLIP: Final = 2.0**-13
"""Share of a step by which the turn of a row may be off; ranges are wide enough for it (`least_widths`)."""

_UNIT_ROUNDOFF32: Final = 2.0**-24
_UNIT_ROUNDOFF64: Final = 2.0**-53

_LOST32: Final = 2.0**-116
"""Above what one term of a float32 sum may lose where numbers below 2^-126 are taken for 0."""

_LOST64: Final = 2.0**-1040
"""Above what a float64 sum of 2^20 terms may lose to underflow."""


class Compression:
    """How rows become bytes, and what these stand for; immutable."""

    def __init__(self, low_d: Float32s, width_d: Float32s, turn_dd: Float32s | None) -> None:
        """Take what FAISS keeps.

        Args:
            low_d: Where the first bin of every axis begins, shape (d,).
            width_d: 255 bins: the last one ends beyond `low + width`. At least `least_widths`, shape (d,).
            turn_dd: What rows are multiplied with, axes in rows: orthogonal but for rounding to float32. None: nothing.
        """
        self.low_d, self.width_d, self.turn_dd = low_d, width_d, turn_dd
        self.step_d: Float64s = width_d.astype(np.float64) / 255.0
        """Width of a bin."""
        low = low_d.astype(np.float64)
        self.reach_d: Float64s = np.maximum(np.abs(low), np.abs(low + 257 * self.step_d))
        """No number in the bins is further from 0."""
        self.longest = np.inf if turn_dd is None else 1.01 * float(np.linalg.norm(self.reach_d))
        """No row that is compressed is longer (L2)."""

    @functools.cached_property
    def turn64_dd(self) -> Float64s:
        """The turn, as float64."""
        assert self.turn_dd is not None
        return self.turn_dd.astype(np.float64)

    def encode(self, rows_td: Float32s) -> tuple[Codes, Bools]:
        """Return the bytes of rows, shape (t, d), and which rows they stand for, shape (t,).

        A row that is outside of a range, too long, or not finite is not one of them: its bytes are the nearest there are.

        >>> ranges = Compression(np.float32([0]), np.float32([255]), None)
        >>> codes, fits = ranges.encode(np.float32([[0], [0.9], [255.5], [256.5], [np.nan]]))
        >>> codes.ravel().tolist(), fits.tolist()
        ([0, 0, 255, 255, 0], [True, True, True, False, False])
        """
        bins: npt.NDArray[Any]
        with np.errstate(all="ignore"):
            if self.turn_dd is None:
                bins = rows_td - self.low_d
                bins *= (1.0 / self.step_d).astype(np.float32)
                fits = np.ones(len(rows_td), np.bool_)
            else:
                wide = rows_td.astype(np.float64)
                fits = np.sqrt((wide * wide).sum(axis=1)) <= self.longest
                bins = wide @ self.turn64_dd.T
                bins -= self.low_d
                bins *= 1.0 / self.step_d
            fits &= (bins.min(axis=1, initial=0.0) >= 0) & (bins.max(axis=1, initial=0.0) <= _LAST)
            others = np.flatnonzero(~fits)
            bins[others] = np.clip(np.nan_to_num(bins[others], nan=0.0), 0.0, _LAST)
        return bins.astype(np.uint8), fits


def least_widths(turn_dd: Float32s, longest: float) -> Float64s:
    """Return how wide ranges must be so that rows up to a length, once turned in float64, are in their bin or at its edge."""
    lengths_d = np.sqrt((turn_dd.astype(np.float64) ** 2).sum(axis=1))
    off_d: Float64s = 2 * _gamma(len(turn_dd) + 2, _UNIT_ROUNDOFF64) * lengths_d * longest
    return off_d * (255 / _TURN_SLIP)


class CodeQueries:
    """Directions as they are multiplied with bytes, and what the products say about the true inner products.

    The product of one with `bytes - shift` is `raw`; the true inner product is within `slack_q` of `offset_q + scale_q * raw`
    if `raw` was summed in float32: in any order, fused or not, the shift taken from each byte or from the sum, and each byte
    decoded to within `2^-12`.
    """

    def __init__(self, compression: Compression, vectors_qd: Float64s, *, shift: float) -> None:
        """Take directions, shape (q, d), of numbers up to 1e200.

        Args:
            compression: Of the rows.
            vectors_qd: Finite.
            shift: What is subtracted from every byte; at least 0.
        """
        # By powers of two, which rounds nothing: squares of large or small numbers would overflow or vanish.
        largest_q = np.abs(vectors_qd).max(axis=1, initial=0.0)
        exponents_q = np.where(largest_q > 0, np.frexp(largest_q)[1], 0)
        turned_qd, slack_q = _turn(compression, np.ldexp(vectors_qd, -exponents_q[:, None]))
        step_d, d = compression.step_d, len(compression.low_d)
        scaled_qd = turned_qd * step_d
        scale_q = np.abs(scaled_qd).max(axis=1, initial=0.0)
        unit_qd = scaled_qd / np.where(scale_q > 0, scale_q, 1.0)[:, None]
        self.vectors_qd = np.ascontiguousarray(unit_qd, np.float32)
        """What is multiplied with bytes, shape (q, d); the largest number of each is 1."""

        total_q = np.abs(self.vectors_qd).sum(axis=1, dtype=np.float64)
        largest = 255.0 + shift + 1.0  # terms of the sum, or of the sums of bytes and of shifts
        # The bins themselves, how rows fell into them, and how a byte is decoded; the direction's rounding; the sum's.
        raw_q = total_q * (0.5 + 3 * _SLIP)
        raw_q += np.abs(unit_qd - self.vectors_qd).sum(axis=1) * largest
        raw_q += total_q * largest * _gamma(d + 2, _UNIT_ROUNDOFF32) + d * _LOST32
        # Of the offset here, and of the float64 sum that a row's true value is.
        sums_q = (np.abs(turned_qd) @ compression.reach_d) * (4 * _gamma(d + 8, _UNIT_ROUNDOFF64))
        slack_q = (slack_q + scale_q * raw_q + sums_q) * (1 + 1e-9)
        with np.errstate(under="ignore"):
            self.scale_q: Float64s = np.ldexp(scale_q, exponents_q)
            self.offset_q: Float64s = np.ldexp(
                turned_qd @ (compression.low_d + (shift + 0.5) * step_d), exponents_q
            )
            self.slack_q: Float64s = np.ldexp(slack_q, exponents_q) + _LOST64

    def values(self, raw_qk: Float32s) -> Float64s:
        """Return the inner products that products with bytes stand for, each within `slack_q`; shape (q, k), `-inf` stays."""
        there = raw_qk > -np.inf
        found: Float64s = (
            np.where(there, raw_qk, np.float32(0)) * self.scale_q[:, None] + self.offset_q[:, None]
        )
        return np.where(there, found, -np.inf)


def _turn(compression: Compression, vectors_qd: Float64s) -> tuple[Float64s, Float64s]:
    """Return directions v in the turned space, and how far `turned row . v` may be from `row . w` by float64's rounding."""
    if compression.turn_dd is None:
        return vectors_qd, np.zeros(len(vectors_qd))
    turn = compression.turn64_dd
    d = len(turn)
    # A row's product with w is that of the turned row with v where `v turn = w`; the turn's transpose is nearly its inverse.
    turned_qd = vectors_qd @ turn.T
    turned_qd += (vectors_qd - turned_qd @ turn) @ turn.T
    left_q = np.linalg.norm(vectors_qd - turned_qd @ turn, axis=1)
    lengths_q = np.linalg.norm(vectors_qd, axis=1) + np.linalg.norm(turned_qd, axis=1)
    rounding = 4 * _gamma(d + 8, _UNIT_ROUNDOFF64) * (1 + np.sqrt(d))
    slack_q: Float64s = (left_q + rounding * lengths_q) * compression.longest
    return turned_qd, slack_q


def _gamma(n: int, roundoff: float) -> float:
    nu = n * roundoff
    return nu / (1.0 - nu) if nu < 0.5 else float("inf")


def code_index(opened: Any) -> Any:
    """Return the FAISS index that holds the bytes, of an index of kind `scan_sq8`."""
    faiss = load_faiss()
    return faiss.downcast_index(opened.index) if isinstance(opened, faiss.IndexPreTransform) else opened


def read_compression(opened: Any) -> Compression:
    """Return how the rows of a FAISS index of kind `scan_sq8` became bytes."""
    faiss = load_faiss()
    trained, d = faiss.vector_to_array(code_index(opened).sq.trained), int(opened.d)
    turn_dd = None
    if isinstance(opened, faiss.IndexPreTransform):
        turn = faiss.downcast_VectorTransform(opened.chain.at(0))
        turn_dd = faiss.vector_to_array(turn.A).reshape(d, d).copy()
    return Compression(trained[:d].copy(), trained[d:].copy(), turn_dd)
