"""What tensors does a safetensors file hold, and where are their bytes?

Read here and not by the `safetensors` package because numpy has no bfloat16, and because a file is checked wholly before
one value of it is used: every byte behind the header belongs to exactly one tensor.

Source: the format's description in the documentation of `safetensors`, section "Format".
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, NotFoundError

from .source import refuse

_MAX_HEADER = 100_000_000
"""The bound that the format itself sets."""

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Floating-point types that can be imported, by their name in the file."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file."""

    dtype: str
    """As the file calls it: `BF16`."""
    shape: tuple[int, ...]
    offset: int
    """Where its bytes begin in the file."""


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A file that was found whole."""

    path: Path
    tensors: Mapping[str, Tensor]

    def map(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor, memory-mapped and read-only; bfloat16 as the uint16 of its bits."""
        tensor = self.tensors[name]
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            refuse(
                f"{self.path}: tensor {name!r} is {tensor.dtype}, which cannot be stored",
                "convert it to BF16, F16 or F32",
            )
        if not math.prod(tensor.shape):
            return np.empty(tensor.shape, dtype)
        return np.memmap(self.path, dtype, "r", offset=tensor.offset, shape=tensor.shape)


def open_safetensors(path: Path) -> SafetensorsFile:
    """Return the tensors of a file, by name; reads its header only.

    Raises:
        NotFoundError: there is no such file.
        InvalidInputError: it is damaged, cut short, or of another format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                _damaged(path, f"its header of {length} bytes does not fit into {size} bytes")
            header = file.read(length)
    except FileNotFoundError as error:
        raise NotFoundError(ErrorKind.SOURCE_NOT_FOUND, f"there is no file {path}: check the path") from error
    if os.fspath(path).endswith(".zst"):
        _damaged(path, "it is compressed")
    try:
        parsed = json.loads(header)
        tensors = {
            str(name): _tensor(entry, 8 + length) for name, entry in parsed.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _damaged(path, f"its header cannot be read ({error})")
    _check_cover(path, tensors, 8 + length, size)
    return SafetensorsFile(path, tensors)


def _tensor(entry: Mapping[str, Any], base: int) -> Tensor:
    shape = tuple(int(n) for n in entry["shape"])
    start, stop = (int(n) for n in entry["data_offsets"])
    dtype = str(entry["dtype"])
    if min(shape, default=0) < 0 or not 0 <= start <= stop:
        raise ValueError(f"shape {shape} at bytes {start} to {stop}")
    known = _DTYPES.get(dtype)
    if known is not None and math.prod(shape) * np.dtype(known).itemsize != stop - start:
        raise ValueError(f"{dtype} of shape {shape} in {stop - start} bytes")
    return Tensor(dtype, shape, base + start)


def _check_cover(path: Path, tensors: Mapping[str, Tensor], base: int, size: int) -> None:
    """Check that tensors of known types lie one after the other up to the end of the file."""
    at = base
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, math.prod(t.shape))):
        known = _DTYPES.get(tensor.dtype)
        if known is None:
            return  # widths of types that cannot be imported are not known here
        if tensor.offset != at:
            _damaged(path, f"its tensors leave or share bytes at {min(at, tensor.offset)}")
        at += math.prod(tensor.shape) * np.dtype(known).itemsize
    if at != size:
        _damaged(path, f"its header speaks of {at} bytes, the file has {size}")


def _damaged(path: Path, problem: str) -> NoReturn:
    refuse(f"{path} is no whole safetensors file: {problem}", "write or copy it again")
