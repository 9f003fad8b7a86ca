"""How are the weights of a dictionary stored? A safetensors file of float32 matrices (FORMAT.md, section 9.2).

Written and read here so that writing copies no weight, and reading maps the file: asking for one latent's decoder row reads
one row. Any safetensors reader can open the file.

Source: https://github.com/huggingface/safetensors, README, section "Format".
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, FormatError
from actstore.storage import Buffer

FloatArray = npt.NDArray[np.float32]

_ALIGNMENT: Final = 64
"""The header is filled up with spaces to a multiple of this, so that mapped matrices are aligned for every vector unit."""

_MAX_HEADER: Final = 1 << 20
"""Bytes; a dictionary has at most eight matrices."""


def pack_weights(weights: Mapping[str, FloatArray]) -> list[Buffer]:
    """Return the buffers that make the file, one after the other; the matrices are not copied.

    >>> buffers = pack_weights({"b_dec": np.zeros(3, np.float32)})
    >>> len(buffers[0]) + len(buffers[1]), len(buffers[1])
    (140, 12)
    """
    header: dict[str, Any] = {}
    buffers: list[Buffer] = []
    at = 0
    for name in sorted(weights):
        data = np.ascontiguousarray(weights[name], "<f4")
        header[name] = {"dtype": "F32", "shape": list(data.shape), "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
        buffers.append(data.data.cast("B"))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return [len(text).to_bytes(8, "little") + text, *buffers]


def map_weights(path: str, shapes: Mapping[str, tuple[int, ...]], *, what: str) -> dict[str, FloatArray]:
    """Return the matrices of a file, mapped and read-only. The file must have been checked against its hash.

    Args:
        path: A local file.
        shapes: What must be in it, by name: neither less nor more.
        what: The dictionary, for errors.

    Raises:
        FormatError: it holds something else.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        found = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if found.keys() != shapes.keys():
            raise ValueError(f"weights {sorted(found)} instead of {sorted(shapes)}")
        return {name: _map(path, 8 + length, found[name], shape) for name, shape in shapes.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            ErrorKind.OBJECT_DAMAGED,
            f"the weights of {what} are not what its configuration says ({error}): run fsck",
        ) from error


def _map(path: str, base: int, entry: Mapping[str, Any], shape: tuple[int, ...]) -> FloatArray:
    start, stop = entry["data_offsets"]
    if (
        entry["dtype"] != "F32"
        or tuple(entry["shape"]) != shape
        or stop - start != 4 * math.prod(shape)
        or start < 0
    ):
        raise ValueError(f"{entry['dtype']} of shape {entry['shape']} instead of F32 of {list(shape)}")
    return np.memmap(path, "<f4", "r", offset=base + start, shape=shape)
