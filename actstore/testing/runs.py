"""What is a small run to test readers with? One whose numbers encode their own address.

A number is a function of row, column and hook point, so a wrong row, shard, unit or column shows as a wrong number.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.codec.encode import encode_shard
from actstore.codec.layout import shard_key, sums_key
from actstore.codec.spec import ShardSpec
from actstore.codec.sums import pack_sums
from actstore.dtypes import StoredArray, stored_dtype
from actstore.log.values import Collection, StoredObject, Unit
from actstore.storage.base import Buffer, PutOutcome, Storage

ATTEMPT = "a" * 32


def addressed_rows(
    rows: npt.NDArray[np.integer[Any]], d_model: int, dtype: str, *, salt: int = 0
) -> StoredArray:
    """Return stored numbers `[len(rows), d_model]` whose bits are a hash of row, column and salt, all of them finite.

    >>> addressed_rows(np.arange(2), 2, "bfloat16").dtype
    dtype('uint16')
    """
    kind = stored_dtype(dtype)
    cells: npt.NDArray[np.uint64] = np.add.outer(
        rows.astype(np.uint64) * np.uint64(1_000_003),
        np.arange(d_model, dtype=np.uint64) + np.uint64(salt << 48),
    )
    cells ^= np.right_shift(cells, 7)
    cells *= np.uint64(0x9E3779B97F4A7C15)
    # Without the exponent's highest bit no number is infinite or NaN.
    finite = 0xBFFFFFFF if kind.itemsize == 4 else 0xBFFF
    bits: StoredArray = np.right_shift(cells, 24).astype(f"<u{kind.itemsize}") & finite
    return bits.view(kind)


def make_run(
    storage: Storage,
    *,
    spec: ShardSpec,
    rows_per_unit: int,
    unit_rows: Mapping[int, int],
    hook_points: Sequence[str] = ("layers.0.resid_post",),
    run: str = "r",
    with_sums: bool = True,
) -> Collection:
    """Write the shards and sums of a run and return its collection as the version log would hold it.

    Row `r` of the `i`-th hook point is `addressed_rows(r, ..., salt=i)`.

    Args:
        storage: Where to write; no manifest is written.
        spec: Layout of every hook point.
        rows_per_unit: A multiple of `spec.rows_per_shard`.
        unit_rows: Rows of each live unit by number.
        hook_points: Their names.
        run: Name of the run.
        with_sums: Whether units have a sums object.
    """
    units = {
        unit: _write_unit(storage, spec, rows_per_unit, unit, n_rows, hook_points, run, with_sums)
        for unit, n_rows in unit_rows.items()
    }
    return Collection(
        kind="run",
        id=run,
        config={
            "hook_points": [{"name": name, "d_model": spec.d_model} for name in hook_points],
            "dtype": spec.dtype,
            "codec": spec.codec,
            "rows_per_unit": rows_per_unit,
            "rows_per_shard": dict.fromkeys(hook_points, spec.rows_per_shard),
            "rows_per_chunk": dict.fromkeys(hook_points, spec.rows_per_chunk),
        },
        fingerprint=hashlib.sha256(run.encode()).hexdigest(),
        info={},
        version=1,
        units=units,
        rows=sum(unit_rows.values()),
    )


def _write_unit(
    storage: Storage,
    spec: ShardSpec,
    rows_per_unit: int,
    unit: int,
    n_rows: int,
    hook_points: Sequence[str],
    run: str,
    with_sums: bool,
) -> Unit:
    objects, sums = [], {}
    for salt, hook_point in enumerate(hook_points):
        rows = addressed_rows(unit * rows_per_unit + np.arange(n_rows), spec.d_model, spec.dtype, salt=salt)
        parts = []
        for number, start in enumerate(range(0, n_rows, spec.rows_per_shard)):
            shard = encode_shard(spec, rows[start : start + spec.rows_per_shard])
            key = shard_key(run, hook_point, unit * (rows_per_unit // spec.rows_per_shard) + number)
            objects.append(_store(storage, key, shard.buffers))
            parts.append(shard.sums)
        sums[hook_point] = np.concatenate(parts)
    meta: dict[str, Any] = {}
    if with_sums:
        key = sums_key(run, unit, ATTEMPT)
        data, meta["sums"] = pack_sums(key, sums)
        objects.append(_store(storage, key, [data]))
    return Unit(unit, n_rows, 0, ATTEMPT, tuple(objects), meta, version=2)


def _store(storage: Storage, key: str, buffers: list[Buffer]) -> StoredObject:
    data = b"".join(buffers)
    if storage.put_new(key, buffers) is not PutOutcome.CREATED:
        raise ValueError(f"{key} exists")
    return StoredObject(key, len(data), hashlib.sha256(data).hexdigest())
