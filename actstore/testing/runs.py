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
from actstore.dtypes import SCALE_BYTES, StoredArray, stored_dtype
from actstore.int8 import Int8Transform
from actstore.log.values import Collection, StoredObject, Unit
from actstore.sampling import Sample, kept_offsets
from actstore.storage.base import Buffer, PutOutcome, Storage

ATTEMPT = "a" * 32


def addressed_rows(
    rows: npt.NDArray[np.integer[Any]], d_model: int, dtype: str, *, salt: int = 0
) -> StoredArray:
    """Return stored rows `[len(rows), stored_width]` whose bits are a hash of row, column and salt, all numbers finite.

    int8 rows have scales from 2^-10 to 2^10; `addressed_transform` is what they are read with.

    >>> addressed_rows(np.arange(2), 2, "bfloat16").dtype
    dtype('uint16')
    """
    kind = stored_dtype(dtype)
    if dtype == "int8":
        stored = np.empty((len(rows), d_model + SCALE_BYTES), np.int8)
        cells = _cells(rows, d_model + 1, salt)
        stored[:, :d_model] = (cells[:, :-1] >> 24) % 255 - 127.0
        # A float32 with sign 0, an exponent from 117 to 137 and any fraction.
        scale = ((117 + (cells[:, -1] >> 24) % 21) << 23) | (cells[:, -1] >> 41)
        stored[:, d_model:] = scale.astype("<u4")[:, None].view(np.int8)
        return stored
    cells = _cells(rows, d_model, salt)
    # Without the exponent's highest bit no number is infinite or NaN.
    finite = 0xBFFFFFFF if kind.itemsize == 4 else 0xBFFF
    bits: StoredArray = np.right_shift(cells, 24).astype(f"<u{kind.itemsize}") & finite
    return bits.view(kind)


def addressed_transform(d_model: int, *, salt: int = 0) -> Int8Transform:
    """Return the transform that goes with int8 `addressed_rows`: means within [-4, 4), exponents from -8 to 8."""
    [cells] = _cells(np.array([1 << 40]), d_model, salt)
    mean = ((cells >> 24) % 4096 / 512 - 4).astype(np.float32)
    return Int8Transform(mean, ((cells >> 40) % 17 - 8.0).astype(np.int8))


def _cells(rows: npt.NDArray[np.integer[Any]], width: int, salt: int) -> npt.NDArray[np.uint64]:
    cells: npt.NDArray[np.uint64] = np.add.outer(
        rows.astype(np.uint64) * np.uint64(1_000_003),
        np.arange(width, dtype=np.uint64) + np.uint64(salt << 48),
    )
    cells ^= np.right_shift(cells, 7)
    cells *= np.uint64(0x9E3779B97F4A7C15)
    return cells


def make_run(
    storage: Storage,
    *,
    spec: ShardSpec,
    rows_per_unit: int,
    unit_rows: Mapping[int, int],
    hook_points: Sequence[str] = ("layers.0.resid_post",),
    run: str = "r",
    with_sums: bool = True,
    sample: Sample | None = None,
    stored_rows_per_unit: int | None = None,
) -> Collection:
    """Write the shards and sums of a run and return its collection as the version log would hold it.

    Row `r` of the `i`-th hook point is `addressed_rows(r, ..., salt=i)`, read with `addressed_transform(..., salt=i)` if int8.

    Args:
        storage: Where to write; no manifest is written.
        spec: Layout of every hook point.
        rows_per_unit: A multiple of `spec.rows_per_shard`, unless the run keeps a sample.
        unit_rows: Token rows of each live unit by number.
        hook_points: Their names.
        run: Name of the run.
        with_sums: Whether units have a sums object.
        sample: What to keep of the rows; all of them if None.
        stored_rows_per_unit: Places of a unit in a sampled run's arrays, a multiple of `spec.rows_per_shard`; the fewest that
            fit if None.
    """
    kept = {unit: np.arange(n_rows) for unit, n_rows in unit_rows.items()}
    per_unit, sampled = rows_per_unit, dict[str, Any]()
    if sample is not None:
        kept = {
            unit: kept_offsets(unit, n_rows, rows_per_unit=rows_per_unit, rate=sample.rate, seed=sample.seed)
            for unit, n_rows in unit_rows.items()
        }
        most = max(map(len, kept.values()), default=1)
        per_shard = spec.rows_per_shard
        per_unit = stored_rows_per_unit or max(1, -(-most // per_shard)) * per_shard
        sampled = {"sample": sample.to_json(), "stored_rows_per_unit": per_unit}
    units = {
        unit: _write_unit(
            storage, spec, per_unit, unit, unit * rows_per_unit + offsets, hook_points, run, with_sums
        )
        for unit, offsets in kept.items()
    }
    info = {}
    if spec.dtype == "int8":
        info["int8"] = {
            name: addressed_transform(spec.d_model, salt=salt).to_json()
            for salt, name in enumerate(hook_points)
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
            **sampled,
        },
        fingerprint=hashlib.sha256(run.encode()).hexdigest(),
        info=info,
        version=1,
        units=units,
        rows=sum(map(len, kept.values())),
    )


def _write_unit(
    storage: Storage,
    spec: ShardSpec,
    per_unit: int,
    unit: int,
    numbers: npt.NDArray[np.int64],
    hook_points: Sequence[str],
    run: str,
    with_sums: bool,
) -> Unit:
    objects, sums = [], {}
    for salt, hook_point in enumerate(hook_points):
        rows = addressed_rows(numbers, spec.d_model, spec.dtype, salt=salt)
        parts = []
        for number, start in enumerate(range(0, len(numbers), spec.rows_per_shard)):
            shard = encode_shard(spec, rows[start : start + spec.rows_per_shard])
            key = shard_key(run, hook_point, unit * (per_unit // spec.rows_per_shard) + number)
            objects.append(_store(storage, key, shard.buffers))
            parts.append(shard.sums)
        sums[hook_point] = np.concatenate([np.empty(0, np.uint32), *parts])
    meta: dict[str, Any] = {}
    if with_sums and len(numbers):
        key = sums_key(run, unit, ATTEMPT)
        data, meta["sums"] = pack_sums(key, sums)
        objects.append(_store(storage, key, [data]))
    return Unit(unit, len(numbers), 0, ATTEMPT, tuple(objects), meta, version=2)


def _store(storage: Storage, key: str, buffers: list[Buffer]) -> StoredObject:
    data = b"".join(buffers)
    if storage.put_new(key, buffers) is not PutOutcome.CREATED:
        raise ValueError(f"{key} exists")
    return StoredObject(key, len(data), hashlib.sha256(data).hexdigest())
