"""How do a unit's rows of one hook point become stored shards, as they are, sampled, or as int8?

Shard keys are fixed and created if absent. A shard that an earlier attempt left behind is adopted once its content has been
checked, and what is said of the unit afterwards (sums, statistics, error of int8) is said of what is stored
(FORMAT.md, sections 3 and 6).
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.codec.decode import decode_shard
from actstore.codec.encode import encode_shard
from actstore.codec.spec import ShardSpec
from actstore.codec.sums import Sums, sums_of
from actstore.dtypes import to_float32
from actstore.errors import ConflictError, ErrorKind, FormatError
from actstore.int8 import Int8Error, Int8Transform, int8_error, quantise
from actstore.log.values import StoredObject
from actstore.storage import Storage, write_new

Rows = npt.NDArray[Any]
Offsets = npt.NDArray[np.int64]

_BLOCK_ROWS = 1024
"""Rows widened to float32 at a time: 3 MiB at 768 dimensions."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """A unit's rows of one hook point, stored and durable."""

    objects: tuple[StoredObject, ...]
    """The shards, in order."""

    sums: Sums
    rows: Rows
    """What the shards hold: `(n_stored, stored_width)` in the stored dtype."""

    error: Int8Error | None
    """How far int8 rows are from those that were captured; None for other dtypes."""

    is_adopted: bool = False
    """Whether some of them were there already, with other rows than were captured."""


def store_rows(
    storage: Storage,
    spec: ShardSpec,
    captured: Rows,
    dtype: str,
    *,
    key: Callable[[int], str],
    kept: Offsets | None,
    transform: Int8Transform | None,
    spent: dict[str, float],
) -> StoredRows:
    """Store rows as shards; idempotent.

    Args:
        storage: Where to.
        spec: Layout of the hook point.
        captured: `(n_rows, d_model)` in the numpy dtype of `dtype`; may be changed.
        dtype: Of `captured`: the stored one, or for int8 the one that the model computes in.
        key: Key of the unit's shard number 0, 1, ...
        kept: Offsets of the rows to store, ascending; None for all.
        transform: Of int8 rows, None for others.
        spent: Seconds by what they were spent on; `encode` and `write` grow.

    Raises:
        FormatError: a shard that is there already is not whole.
        StorageError: the storage failed.
    """
    began = time.perf_counter()
    if transform is not None:
        stored = _quantised(spec, captured, dtype, kept, transform)
    else:
        stored = captured if kept is None else captured[kept]
    spent["encode"] += time.perf_counter() - began
    objects: list[StoredObject] = []
    sums: list[Sums] = []
    is_adopted = False
    for number, start in enumerate(range(0, len(stored), spec.rows_per_shard)):
        piece = stored[start : start + spec.rows_per_shard]
        began = time.perf_counter()
        encoded = encode_shard(spec, piece)
        spent["encode"] += time.perf_counter() - began
        began = time.perf_counter()
        try:
            objects.append(write_new(storage, key(number), encoded.buffers))
            sums.append(encoded.sums)
        except ConflictError:
            del encoded
            is_adopted = True
            found, theirs = adopt_shard(storage, key(number), spec, n_rows=len(piece))
            stored[start : start + len(theirs)] = theirs
            objects.append(found)
            sums.append(sums_of(spec, stored[start : start + len(theirs)]))
        spent["write"] += time.perf_counter() - began
    began = time.perf_counter()
    error = None if transform is None else _measured(captured, dtype, kept, stored, transform)
    spent["encode"] += time.perf_counter() - began
    of_all = np.concatenate(sums) if sums else np.empty(0, np.uint32)
    return StoredRows(tuple(objects), of_all, stored, error, is_adopted)


def adopt_shard(storage: Storage, key: str, spec: ShardSpec, *, n_rows: int) -> tuple[StoredObject, Rows]:
    """Return an object that an earlier attempt stored under `key`, and its rows, once it proves to be a whole shard.

    Raises:
        FormatError: it is missing, damaged, or not of this shape.
    """
    data = storage.get(key)
    if data is None:
        raise FormatError(
            ErrorKind.OBJECT_MISSING, f"object {key!r} vanished while it was read: is something deleting?"
        )
    rows = decode_shard(spec, data, n_rows=n_rows, key=key)
    return StoredObject(key, len(data), hashlib.sha256(data).hexdigest()), rows


def _quantised(
    spec: ShardSpec, captured: Rows, dtype: str, kept: Offsets | None, transform: Int8Transform
) -> Rows:
    n_rows = len(captured) if kept is None else len(kept)
    stored = np.empty((n_rows, spec.stored_width), np.int8)
    for start in range(0, n_rows, _BLOCK_ROWS):
        block_td = _block(captured, dtype, kept, start)
        quantise(block_td, transform, out=stored[start : start + len(block_td)])
    return stored


def _measured(
    captured: Rows, dtype: str, kept: Offsets | None, stored: Rows, transform: Int8Transform
) -> Int8Error:
    total = Int8Error()
    for start in range(0, len(stored), _BLOCK_ROWS):
        block_td = _block(captured, dtype, kept, start)
        total = total + int8_error(block_td, stored[start : start + len(block_td)], transform)
    return total


def _block(captured: Rows, dtype: str, kept: Offsets | None, start: int) -> npt.NDArray[np.float32]:
    """Return the rows to store from number `start` on, as float32."""
    some = slice(start, start + _BLOCK_ROWS)
    return to_float32(captured[some if kept is None else kept[some]], dtype)
