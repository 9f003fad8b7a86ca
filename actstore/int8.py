"""How are rows kept in a quarter of their float32 bytes? As int8 numbers with a scale per row.

Each channel is first centred and divided by a power of two near its standard deviation, both fixed for the run, so that a few
channels that are always large (outlier dimensions) do not take the precision of all others; then a row's largest magnitude
becomes 127.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SCALE_BYTES = 4
"""A row's scale: a little-endian float32 behind its int8 numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Int8Transform:
    """What all rows of a hook point are centred and scaled by; both of shape (d_model,)."""

    mean: npt.NDArray[np.float32]
    exponent: npt.NDArray[np.int8]
    """Rows are multiplied by 2^-exponent after centring."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Int8Transform) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(tuple(self.to_json().values()))

    def to_json(self) -> dict[str, str]:
        """Return the little-endian bytes of both, in base64."""
        return {
            "mean": base64.b64encode(self.mean.astype("<f4").tobytes()).decode(),
            "exponent": base64.b64encode(self.exponent.tobytes()).decode(),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, str]) -> "Int8Transform":
        """Return what `to_json` wrote."""
        mean = np.frombuffer(base64.b64decode(stored["mean"]), "<f4").astype(np.float32)
        return cls(mean, np.frombuffer(base64.b64decode(stored["exponent"]), np.int8))


@dataclass(frozen=True, slots=True)
class Int8Error:
    """How far stored int8 rows are from the numbers they stand for; merges exactly by adding (and the largest)."""

    n_values: int = 0
    """Finite values compared."""
    squared_error: float = 0.0
    """Sum over values of (stored - true)^2, float64."""
    squared_deviation: float = 0.0
    """Sum over values of (true - channel mean of the transform)^2, float64: what the error is a part of."""
    largest: float = 0.0
    """Largest |stored - true|."""

    def __add__(self, other: "Int8Error") -> "Int8Error":
        return Int8Error(
            self.n_values + other.n_values,
            self.squared_error + other.squared_error,
            self.squared_deviation + other.squared_deviation,
            max(self.largest, other.largest),
        )

    @property
    def relative(self) -> float:
        """Root of squared error over squared deviation: 0.01 means that 0.01 % of the variance is lost."""
        return (self.squared_error / self.squared_deviation) ** 0.5 if self.squared_deviation else 0.0
