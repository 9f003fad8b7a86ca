"""Which numbers can a store hold, and how do they become float32 and back?

Three floating-point types are stored bit for bit: `float32`, `float16` and `bfloat16`. numpy and zarr have no bfloat16, so
its 16 bits are stored as `uint16`; widening them to float32 is exact (FORMAT.md, section 6). `int8` rows are rounded and
carry a scale: only `actstore.int8` turns them into numbers and back. In memory a *stored* array is one of dtype
`stored_dtype(name)` and `stored_width(d_model, name)` columns, a *natural* one of dtype `natural_dtype(name)` and `d_model`.
"""

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

FloatArray: TypeAlias = npt.NDArray[np.float32]
StoredArray: TypeAlias = npt.NDArray[Any]

_STORED: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
}

STORED_DTYPES: Final = tuple(_STORED)
"""Names of the dtypes that a store can hold."""

FLOAT_DTYPES: Final = ("float32", "float16", "bfloat16")
"""Those whose numbers are stored one by one, bit for bit."""

SCALE_BYTES: Final = 4
"""An int8 row's scale: a little-endian float32 behind its numbers."""


def stored_dtype(name: str) -> np.dtype[Any]:
    """Return the little-endian numpy dtype whose bytes are stored for `name`.

    Raises:
        InvalidInputError: `name` is not in `STORED_DTYPES`.

    >>> stored_dtype("bfloat16")
    dtype('uint16')
    """
    if name not in _STORED:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"dtype {name!r} cannot be stored: use one of {STORED_DTYPES}"
        )
    return _STORED[name]


def stored_width(d_model: int, name: str) -> int:
    """Return how many stored numbers of `name` a row of `d_model` numbers takes.

    >>> stored_width(768, "bfloat16"), stored_width(768, "int8")
    (768, 772)
    """
    return d_model + SCALE_BYTES if name == "int8" else d_model


def natural_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype in which values of `name` are given out: its own, or float32 for bfloat16 and int8.

    >>> natural_dtype("bfloat16"), natural_dtype("float16")
    (dtype('float32'), dtype('float16'))
    """
    return np.dtype(np.float32) if name in ("bfloat16", "int8") else stored_dtype(name)


def to_float32(stored: StoredArray, dtype: str, *, out: FloatArray | None = None) -> FloatArray:
    """Return stored numbers as float32, exactly: NaN payloads of bfloat16, signed zeros and denormals included.

    Args:
        stored: Any shape, dtype `stored_dtype(dtype)`.
        dtype: Name of the stored dtype, one of `FLOAT_DTYPES`.
        out: Written and returned if given; same shape, may be strided.

    Raises:
        InvalidInputError: int8, whose numbers need the run's transform: `actstore.int8.dequantise`.

    >>> to_float32(np.array([0x3F80, 0xFF80], np.uint16), "bfloat16")
    array([  1., -inf], dtype=float32)
    """
    _check_float(dtype)
    if out is None:
        out = np.empty(stored.shape, np.float32)
    if dtype == "bfloat16":
        bits = out.view(np.uint32)
        # Widened first: a shift that also widens goes through numpy's buffers, 1.4 times as slow.
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, stored)
    return out


def to_stored(values: npt.NDArray[np.floating[Any]], dtype: str) -> StoredArray:
    """Return numbers as they are stored, rounded to nearest, ties to even.

    Finite numbers beyond the range of `dtype` become infinite: a caller that must notice compares the non-finite counts.
    bfloat16 keeps a NaN's sign and upper payload bits and makes it quiet.

    Args:
        values: Floating point, any shape. Already of the stored dtype: returned as it is.
        dtype: Name of the stored dtype, one of `FLOAT_DTYPES`.

    Raises:
        InvalidInputError: int8, whose numbers need a transform: `actstore.int8.quantise`.

    >>> hex(to_stored(np.array([1.0], np.float32), "bfloat16")[0])
    '0x3f80'
    """
    _check_float(dtype)
    target = stored_dtype(dtype)
    if dtype == "bfloat16":
        return _round_to_bfloat16(np.ascontiguousarray(values, np.float32))
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, target)


def count_nonfinite(stored: StoredArray, dtype: str) -> int:
    """Return how many of the stored numbers are NaN or infinite; all of an int8 row whose scale says so.

    >>> count_nonfinite(np.array([0x7F80, 0x7FC0, 0x3F80], np.uint16), "bfloat16")
    2
    """
    if dtype == "bfloat16":
        return int(np.count_nonzero((stored & 0x7F80) == 0x7F80))
    if dtype == "int8":
        width = int(stored.shape[-1]) - SCALE_BYTES
        return width * int(np.count_nonzero(~np.isfinite(row_scales(stored))))
    return stored.size - int(np.count_nonzero(np.isfinite(stored)))


def row_scales(stored: StoredArray) -> FloatArray:
    """Return the scale of every int8 row, shape (t,), new memory.

    Args:
        stored: int8 rows `[t, d_model + SCALE_BYTES]`.
    """
    scales: FloatArray = np.ascontiguousarray(stored[:, -SCALE_BYTES:]).view("<f4")[:, 0]
    return scales.astype(np.float32, copy=False)


def _check_float(dtype: str) -> None:
    if dtype == "int8":
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            "int8 rows are no plain numbers: actstore.int8 turns them into float32 and back with the run's transform",
        )


def _round_to_bfloat16(values: FloatArray) -> StoredArray:
    """Return the upper 16 bits after rounding: adding 0x7FFF plus the last kept bit carries exactly when it must."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits  # wraps for NaNs alone, which are replaced below
    rounded >>= 16
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = (bits[nan] >> 16) | 0x0040
    return result
