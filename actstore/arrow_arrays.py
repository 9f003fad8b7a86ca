"""How do columns of Arrow tables and numpy arrays become each other without pandas?

Arrow's own `to_numpy` and `pa.array` import pandas where it is installed, a quarter of a second in every new process: longer
than many a question takes. Numbers and texts need nothing of it.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

NUMPY_TYPES: Final[dict[pa.DataType, type[np.generic]]] = {
    pa.float64(): np.float64,
    pa.float32(): np.float32,
    pa.float16(): np.float16,
    pa.int64(): np.int64,
    pa.int32(): np.int32,
    pa.uint32(): np.uint32,
    pa.bool_(): np.bool_,
}
"""Numpy's type of the same numbers."""


def to_array(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return the numbers of a column; a read-only view of them where the column is in one piece, except for booleans.

    A column of other types, or with nulls, is what Arrow's `to_numpy` makes of it.

    >>> to_array(pa.chunked_array([[1, 2], [3]])), to_array(pa.array([True, False, True]))
    (array([1, 2, 3]), array([ True, False,  True]))
    """
    if isinstance(column, pa.ChunkedArray):
        pieces = [to_array(chunk) for chunk in column.chunks]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.empty(0, NUMPY_TYPES.get(column.type)), *pieces])
    kind = NUMPY_TYPES.get(column.type)
    if kind is None or column.null_count:
        slow: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return slow
    if not len(column):
        return np.empty(0, kind)
    data = column.buffers()[1]
    if kind is np.bool_:
        first = column.offset // 8
        packed = np.frombuffer(data, np.uint8, -(-(column.offset + len(column)) // 8) - first, first)
        bits = np.unpackbits(packed, bitorder="little")[column.offset % 8 :][: len(column)]
        return bits.view(np.bool_)
    width = np.dtype(kind).itemsize
    values = np.frombuffer(data, kind, len(column), column.offset * width)
    values.setflags(write=False)
    return values


def from_numbers(
    values: npt.NDArray[Any], kind: pa.DataType, *, missing: npt.NDArray[np.bool_] | None = None
) -> pa.Array:
    """Return numbers as a column of a type in `NUMPY_TYPES`, not booleans; null where `missing`.

    >>> from_numbers(np.array([1, 2]), pa.int64(), missing=np.array([False, True])).to_pylist()
    [1, None]
    """
    data = np.ascontiguousarray(values, NUMPY_TYPES[kind])
    valid = None if missing is None else pa.py_buffer(np.packbits(~missing, bitorder="little"))
    return pa.Array.from_buffers(kind, len(data), [valid, pa.py_buffer(data)])


def from_texts(texts: Sequence[str]) -> pa.Array:
    """Return texts as a column of strings, of at most 2 GiB together.

    >>> from_texts(["a", "", "é"]).to_pylist()
    ['a', '', 'é']
    """
    encoded = [text.encode() for text in texts]
    offsets = np.zeros(len(encoded) + 1, np.int32)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def take_texts(texts: pa.StringArray, places: npt.NDArray[np.integer[Any]]) -> pa.StringArray:
    """Return some texts of a column, repeats allowed; null stays null. Of at most 2 GiB together.

    Arrow's own `take` is a compute function, and importing those takes longer than all the rest of a short question.

    Args:
        texts: Strings with 32-bit offsets.
        places: Indexes into it, shape (n,), each at least 0 and below its length.

    >>> take_texts(pa.array(["a", None, "bc"]), np.array([2, 1, 2])).to_pylist()
    ['bc', None, 'bc']
    """
    n = len(places)
    if not n:
        return texts[:0]
    valid, offsets, data = texts.buffers()
    at = np.asarray(places, np.int64) + texts.offset
    bounds = np.frombuffer(offsets, np.int32)
    starts = bounds[at].astype(np.int64)
    lengths = bounds[at + 1] - starts
    ends = np.cumsum(lengths)
    source = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    letters = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)[source]
    known = None
    if valid is not None:
        bits = np.frombuffer(valid, np.uint8)[at >> 3] >> (at & 7).astype(np.uint8) & 1
        known = pa.py_buffer(np.packbits(bits, bitorder="little"))
    kept = np.concatenate([[0], ends]).astype(np.int32)
    return pa.Array.from_buffers(texts.type, n, [known, pa.py_buffer(kept), pa.py_buffer(letters)])
