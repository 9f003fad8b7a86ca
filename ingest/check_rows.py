"""How far are the stored rows of one document from what the model computes on it, and how far may they be?

A row's error is the length of the difference, as a part of the row's own length (or of the document's median row, if that is
longer: a row near zero is the difference of large numbers, and carries their rounding). What may be is stated by type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.int8 import Int8Transform

Floats = npt.NDArray[np.float64]

_COMPUTED = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2}
"""What a forward pass in other batches may change of a row. Rounding alone gives about 1e-6, 1e-3 and 1e-2 in models of 30
layers; documents that see each other's tokens, shifted rows and other layers differ by 0.1 and more."""

_STORED = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-8, "int8": 0.0}
"""What storing may add: a unit in the last place. Int8 has a bound for every row, from its scale."""

_BOUND_SLACK = 1.1
"""The bound is made from the row as computed alone, whose largest number may be a little smaller than in its batch."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Stored against computed, over some rows of one hook point; adds up."""

    n_rows: int = 0
    max_abs: float = 0.0
    """Largest difference of two numbers."""
    max_relative: float = 0.0
    """Largest error of a row, as a part of the row's length."""
    sum_relative: float = 0.0
    excess: float = 0.0
    """Largest error of a document, in units of what may be; more than 1 fails."""
    worst_document: int | None = None
    """Document of that error."""

    @property
    def mean_relative(self) -> float:
        """Mean error of a row."""
        return self.sum_relative / self.n_rows if self.n_rows else 0.0

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.n_rows + other.n_rows,
            max(self.max_abs, other.max_abs),
            max(self.max_relative, other.max_relative),
            self.sum_relative + other.sum_relative,
            max(self.excess, other.excess),
            self.worst_document if self.excess >= other.excess else other.worst_document,
        )


@dataclass(frozen=True, slots=True)
class DocumentCheck:
    """One document, compared."""

    doc_id: int
    n_rows: int
    """Stored rows compared, the same for every hook point; 0 if it has none."""
    differences: Mapping[str, Difference]
    """By hook point."""


def tolerance_of(config: Mapping[str, Any]) -> float:
    """Return how far a stored row may be off, as a part of its length; int8's own bound comes on top.

    >>> tolerance_of({"compute_dtype": "float32", "dtype": "float32"})
    0.001
    """
    return _COMPUTED[config["compute_dtype"]] + _STORED[config["dtype"]]


def compare_rows(
    stored_td: Floats,
    computed_td: Floats,
    *,
    tolerance: float,
    bounds: Floats | None,
    document: int,
    typical: bool,
) -> Difference:
    """Return the difference of a document's rows. Rows that are not finite in both are as they should be, and left out.

    Args:
        stored_td: Rows read back, (t, d).
        computed_td: The same rows computed.
        tolerance: What a row may be off, as a part of its length.
        bounds: What it may be off besides, (t,).
        document: Whose rows they are.
        typical: Whether the document's median row is judged and not its worst.
    """
    n_rows = len(stored_td)
    is_stored, is_computed = np.isfinite(stored_td).all(axis=1), np.isfinite(computed_td).all(axis=1)
    both = is_stored & is_computed
    if (is_stored != is_computed).any():
        return Difference(n_rows, np.inf, np.inf, np.inf, np.inf, document)
    if not both.any():
        return Difference(n_rows)
    difference = stored_td[both] - computed_td[both]
    lengths = np.linalg.norm(computed_td[both], axis=1)
    scale = np.maximum(np.maximum(lengths, np.median(lengths)), np.finfo(np.float32).tiny)
    errors = np.linalg.norm(difference, axis=1)
    allowed = tolerance * scale + (0.0 if bounds is None else bounds[both])
    relative, excess = errors / scale, errors / allowed
    return Difference(
        n_rows=n_rows,
        max_abs=float(np.abs(difference).max()),
        max_relative=float(relative.max()),
        sum_relative=float(relative.sum()),
        excess=float(np.median(excess) if typical else excess.max()),
        worst_document=document,
    )


def int8_bounds(rows_td: npt.NDArray[np.float32], transform: Int8Transform) -> Floats:
    """Return how far int8 numbers may be from rows (t, d): half a step in every channel, as a length (t,)."""
    steps = np.exp2(transform.exponent.astype(np.float64))
    scaled = (rows_td.astype(np.float64) - transform.mean) / steps
    with np.errstate(invalid="ignore"):
        bounds: Floats = np.abs(scaled).max(axis=1) / 127 / 2 * np.linalg.norm(steps) * _BOUND_SLACK
    return bounds
