"""What does one unit of a run become in the store, and is what is stored right?

`UnitWriter` turns the rows of one unit into stored objects: it reads the unit's tokens, has them captured, counts what is
not finite, encodes and writes one shard (or a few) per hook point and the unit's statistics, and returns what a commit
needs. It is idempotent: shard keys are fixed, created if absent, and a shard that an earlier attempt left behind is
adopted once its content has been checked (FORMAT.md, section 5). Nothing here makes anything visible; the commit does.
"""

import hashlib
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.codec.decode import decode_shard
from actstore.codec.encode import encode_shard
from actstore.codec.spec import ShardSpec
from actstore.codec.sums import Sums, pack_sums, sums_of
from actstore.dtypes import stored_dtype, to_float32
from actstore.errors import ConflictError, ErrorKind, FormatError, InvalidInputError
from actstore.int8 import Int8Transform
from actstore.log.values import StoredObject
from actstore.names import hook_point_folder
from actstore.stats import HookPointStats, block_stats, empty_stats, merge_stats, stats_to_table
from actstore.storage import Storage, write_new
from actstore.tokenization import Tokenization

Rows = npt.NDArray[Any]

_STATS_ROWS = 4096
"""Rows widened to float32 at a time: 12 MiB at 768 dimensions."""


class CaptureUnit(Protocol):
    """Fills `out` with the activations of one unit; `actstore.ingest.capture` has the real one."""

    def __call__(self, token_ids: Rows, window_starts: Rows, out: Mapping[str, Rows]) -> None:
        """Compute rows for `token_ids` (n,), cut into windows at `window_starts` (n_windows + 1,)."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a worker must know of a run; pickles."""

    run: str
    fingerprint: str
    epoch: int
    tokenization: str
    specs: Mapping[str, ShardSpec]
    """Shard layout by hook point, in stored order."""
    rows_per_unit: int
    nonfinite: str
    """`error` or `mask`."""
    keep: tuple[str, ...] = ("dense",)
    """`dense`, `pooled` or both."""
    poolings: tuple[str, ...] = ()
    pool_special: bool = False
    sample: float = 1.0
    """Share of rows that dense storage keeps; see `actstore.sampling`."""
    seed: int = 0
    int8: Mapping[str, Int8Transform] | None = None
    """By hook point, where rows are stored as int8."""
    covariance: bool = False


@dataclass(frozen=True, slots=True)
class WrittenUnit:
    """A unit whose objects are stored and durable, ready to be committed."""

    unit: int
    rows: int
    nonfinite: int
    attempt: str
    objects: tuple[StoredObject, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    nbytes: int = 0
    rows_read: int = 0
    """Token rows read from the tokenization."""
    rows_forwarded: int = 0
    """Token rows that went through the model."""
    timings_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds spent in `read`, `forward`, `statistics`, `encode`, `write`."""


class UnitWriter:
    """Runs units of one run. Two threads may call `run_unit` at once: one computes while the other writes.

    Memory: two units' rows of every hook point, whatever the corpus's size.
    """

    def __init__(
        self, storage: Storage, tokenization: Tokenization, plan: RunPlan, capture: CaptureUnit
    ) -> None:
        self._storage = storage
        self._tokenization = tokenization
        self._plan = plan
        self._capture = capture
        self._forward = threading.Lock()

    def run_unit(self, unit: int) -> WrittenUnit:
        """Compute and store one unit; safe to repeat.

        Raises:
            InvalidInputError: activations that are not finite under policy `error`, or too large for the dtype.
            StorageError, FormatError: the storage failed or holds something else under one of the unit's keys.
        """
        tokens = self._tokenization.unit_table(unit, ["token_id", "doc_id", "window"])
        token_ids = tokens["token_id"].to_numpy()
        starts = window_starts(tokens["doc_id"].to_numpy(), tokens["window"].to_numpy())
        with self._forward:
            out = {
                name: np.empty((len(token_ids), spec.d_model), stored_dtype(spec.dtype))
                for name, spec in self._plan.specs.items()
            }
            self._capture(token_ids, starts, out)
        return self._write(unit, out, tokens)

    def _write(self, unit: int, out: dict[str, Rows], tokens: pa.Table) -> WrittenUnit:
        attempt = uuid.uuid4().hex
        objects: list[StoredObject] = []
        sums: dict[str, Sums] = {}
        n_rows = tokens.num_rows
        # All are checked before the first shard is written: a refused unit must leave nothing behind under fixed keys.
        found = {name: self._checked_stats(unit, name, out[name], tokens) for name in self._plan.specs}
        for name, spec in self._plan.specs.items():
            shards, adopted, sums[name] = self._write_shards(unit, name, spec, out.pop(name))
            objects += shards
            if adopted is not None:
                found[name] = self._checked_stats(unit, name, adopted, tokens)
        stats = list(found.values())
        sums_key = f"runs/{self._plan.run}/sums/{unit:08}-{attempt}.bin"
        sums_data, sums_meta = pack_sums(sums_key, sums)
        objects.append(write_new(self._storage, sums_key, [sums_data]))
        stats_key = f"runs/{self._plan.run}/stats/{unit:08}-{attempt}.parquet"
        objects.append(write_new(self._storage, stats_key, [parquet_bytes(stats_to_table(stats))]))
        return WrittenUnit(
            unit=unit,
            rows=n_rows,
            nonfinite=sum(s.nonfinite for s in stats),
            attempt=attempt,
            objects=tuple(objects),
            meta={"nonfinite": {s.hook_point: s.nonfinite for s in stats}, "sums": sums_meta},
            nbytes=sum(o.nbytes for o in objects),
        )

    def _write_shards(
        self, unit: int, name: str, spec: ShardSpec, rows: Rows
    ) -> tuple[list[StoredObject], Rows | None, Sums]:
        """Store the unit's shards; return them, the stored rows if any shard was an earlier attempt's, and the sums."""
        per_unit = self._plan.rows_per_unit // spec.rows_per_shard
        objects, pieces, sums, adopted = [], [], [], False
        for j, start in enumerate(range(0, len(rows), spec.rows_per_shard)):
            piece = rows[start : start + spec.rows_per_shard]
            key = f"runs/{self._plan.run}/{hook_point_folder(name)}/c/{unit * per_unit + j}/0"
            encoded = encode_shard(spec, piece)
            try:
                objects.append(write_new(self._storage, key, encoded.buffers))
                sums.append(encoded.sums)
            except ConflictError:
                stored, piece = adopt_shard(self._storage, key, spec, n_rows=len(piece))
                objects.append(stored)
                sums.append(sums_of(spec, piece))
                adopted = True
            pieces.append(piece)
        return objects, np.concatenate(pieces) if adopted else None, np.concatenate(sums)

    def _checked_stats(self, unit: int, name: str, rows: Rows, tokens: pa.Table) -> HookPointStats:
        spec = self._plan.specs[name]
        stats = stored_stats(name, spec, rows)
        if stats.nonfinite and self._plan.nonfinite == "error":
            raise _nonfinite_error(unit, stats, rows, spec, tokens)
        return stats


def window_starts(doc_ids: Rows, windows: Rows) -> Rows:
    """Return where the unit's windows start, and its length: shape (n_windows + 1,), int64.

    >>> window_starts(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0])).tolist()
    [0, 2, 3, 4]
    """
    change = (doc_ids[1:] != doc_ids[:-1]) | (windows[1:] != windows[:-1])
    inner = np.flatnonzero(change) + 1
    return np.concatenate([np.zeros(1, np.int64), inner, np.full(1, len(doc_ids), np.int64)])


def stored_stats(hook_point: str, spec: ShardSpec, rows: Rows) -> HookPointStats:
    """Return the statistics of rows in their stored type, widened a block at a time."""
    total = empty_stats(hook_point, spec.d_model)
    for start in range(0, len(rows), _STATS_ROWS):
        block = to_float32(rows[start : start + _STATS_ROWS], spec.dtype)
        total = merge_stats(total, block_stats(hook_point, block))
    return total


def _nonfinite_error(
    unit: int, stats: HookPointStats, rows: Rows, spec: ShardSpec, tokens: pa.Table
) -> InvalidInputError:
    bad = ~np.isfinite(to_float32(rows, spec.dtype)).all(axis=1)
    documents = np.unique(tokens["doc_id"].to_numpy()[bad])
    shown = ", ".join(map(str, documents[:5])) + (", ..." if len(documents) > 5 else "")
    return InvalidInputError(
        ErrorKind.NON_FINITE,
        f"unit {unit}: {stats.nonfinite} activations of {stats.hook_point!r} in {int(bad.sum())} rows are NaN or "
        f"infinite (documents {shown}); the unit was not stored. Check the model, compute in float32 or "
        "bfloat16, or store and count them with nonfinite='mask'",
    )


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


def parquet_bytes(table: pa.Table) -> bytes:
    """Return `table` as a Parquet file with page checksums."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data: bytes = sink.getvalue().to_pybytes()
    return data
