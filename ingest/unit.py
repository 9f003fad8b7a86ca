"""What does one unit of a run become in the store, and is what is stored right?

`UnitWriter` turns the rows of one unit into stored objects: it reads the unit's tokens, has them captured, checks what is
not finite, pools documents, encodes and writes one shard (or a few) per hook point and the unit's statistics, and returns
what a commit needs. It is idempotent: shard keys are fixed, created if absent, and a shard that an earlier attempt left
behind is adopted once its content has been checked (FORMAT.md, section 3). Nothing here makes anything visible; the commit does.
"""

import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.codec.layout import shard_key, sums_key
from actstore.codec.spec import ShardSpec
from actstore.codec.sums import Sums, pack_sums
from actstore.covariance import covariance_key
from actstore.dtypes import count_nonfinite, stored_dtype
from actstore.errors import ErrorKind, InvalidInputError
from actstore.int8 import Int8Transform, dequantise
from actstore.log.values import Add, StoredObject
from actstore.sampling import kept_offsets
from actstore.stats import HookPointStats, stats_to_table
from actstore.storage import Storage, write_new
from actstore.tokenization import Tokenization

from .encoding.plan import CodesPlan
from .encoding.unit_codes import CodesWriter, EncodedRows, blocks_of
from .pooling import POOLING_COLUMNS, Mask, finite_rows
from .row_buffers import Buffers
from .shards import Offsets, StoredRows, store_rows
from .unit_pooled import UnitPooling, unit_pooling
from .unit_stats import unit_covariance, unit_stats

Rows = npt.NDArray[Any]

_TOKEN_COLUMNS = ("row", "token_id", *POOLING_COLUMNS)


class CaptureUnit(Protocol):
    """Fills `out` with the activations of one unit; `actstore.ingest.capture` has the real one."""

    def __call__(self, token_ids: Rows, window_starts: Rows, out: Mapping[str, Rows]) -> int | None:
        """Compute rows for `token_ids` (n,), cut into windows at `window_starts` (n_windows + 1,).

        Returns:
            How many of them went through the model, counted on the way; None where that is not counted.
        """


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
    """`dense`, `pooled`, `codes`, or several of them."""
    poolings: tuple[str, ...] = ()
    pool_special: bool = False
    sample: float = 1.0
    """Share of rows that dense storage keeps; see `actstore.sampling`."""
    seed: int = 0
    int8: Mapping[str, Int8Transform] | None = None
    """By hook point, where rows are stored as int8."""
    covariance: bool = False
    compute_dtype: str = "float32"
    """What the model computes in: rows that become int8 are captured so; others in the dtype they are stored in."""
    stored_rows_per_unit: int | None = None
    """Places that a unit has in a sampled run's arrays; None for `rows_per_unit`."""
    codes: tuple[CodesPlan, ...] = ()
    """Of the codes that are committed with the units."""

    @property
    def capture_dtype(self) -> str:
        """The dtype of the arrays that capture fills: `float32`, `float16` or `bfloat16`."""
        dtype = next(iter(self.specs.values())).dtype
        return self.compute_dtype if dtype == "int8" else dtype

    def shards_per_unit(self, hook_point: str) -> int:
        """Return how many shards of a hook point a unit has room for."""
        return (self.stored_rows_per_unit or self.rows_per_unit) // self.specs[hook_point].rows_per_shard


@dataclass(frozen=True, slots=True)
class WrittenUnit:
    """A unit whose objects are stored and durable, ready to be committed."""

    unit: int
    rows: int
    """Rows stored; where only pooled vectors are kept, rows that they stand for."""
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
    """Seconds spent in `read`, `forward`, `pool`, `statistics`, `codes`, `encode`, `write`; waiting for a turn is in none."""
    also: tuple[Add, ...] = ()
    """Units of other collections that come of the same rows: they become live in the same commit, or none does."""


class UnitWriter:
    """Runs units of one run. Several threads may call `run_unit` at once: `streams` compute while others write.

    Memory: for each thread one unit's rows of every hook point, and the vectors of their documents where these are pooled,
    whatever the corpus's size.
    """

    def __init__(
        self,
        storage: Storage,
        tokenization: Tokenization,
        plan: RunPlan,
        capture: CaptureUnit,
        *,
        streams: int = 1,
        codes: Sequence[CodesWriter] = (),
    ) -> None:
        """Bind what units are made of.

        Args:
            storage: Where shards go.
            tokenization: Of the corpus.
            plan: Of the run.
            capture: Computes rows; called by at most `streams` threads at once.
            streams: Units computed at once.
            codes: One for each of `plan.codes`.
        """
        self._storage = storage
        self._tokenization = tokenization
        self._plan = plan
        self._capture = capture
        self._codes = codes
        self._forward = threading.Semaphore(streams)
        self._spare = Buffers()

    def run_unit(self, unit: int) -> WrittenUnit:
        """Compute and store one unit; safe to repeat.

        Raises:
            InvalidInputError: activations that are not finite under policy `error`, or too large for the dtype.
            StorageError, FormatError: the storage failed or holds something else under one of the unit's keys.
        """
        work = _UnitWork(self._storage, self._tokenization, self._plan, unit, self._spare, self._codes)
        tokens, starts = work.read()
        token_ids = tokens["token_id"].to_numpy()
        with self._forward, work.timed("forward"):
            dtype = stored_dtype(self._plan.capture_dtype)
            out = {
                name: self._spare.take(len(token_ids), self._plan.rows_per_unit, spec.d_model, dtype)
                for name, spec in self._plan.specs.items()
            }
            forwarded = self._capture(token_ids, starts, out)
        work.rows_forwarded = len(token_ids) if forwarded is None else forwarded
        return work.write(out)


class _UnitWork:
    """One attempt at one unit."""

    def __init__(
        self,
        storage: Storage,
        tokenization: Tokenization,
        plan: RunPlan,
        unit: int,
        spare: Buffers,
        codes: Sequence[CodesWriter],
    ) -> None:
        self._spare = spare
        self._codes = codes
        self._also: list[Add] = []
        self._storage = storage
        self._tokenization = tokenization
        self._plan = plan
        self._unit = unit
        self._attempt = uuid.uuid4().hex
        self._tokens: pa.Table
        self._objects: list[StoredObject] = []
        self._meta: dict[str, Any] = {}
        self._spent = dict.fromkeys(("read", "forward", "pool", "statistics", "encode", "write"), 0.0)
        self.rows_forwarded = 0

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time that the block takes to the seconds spent in `what`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] = self._spent.get(what, 0.0) + time.perf_counter() - began

    def read(self) -> tuple[pa.Table, Rows]:
        """Return the unit's tokens and where its windows start."""
        with self.timed("read"):
            self._tokens = self._tokenization.unit_table(self._unit, _TOKEN_COLUMNS)
            doc_ids, windows = self._tokens["doc_id"].to_numpy(), self._tokens["window"].to_numpy()
            return self._tokens, window_starts(doc_ids, windows)

    def write(self, out: dict[str, Rows]) -> WrittenUnit:
        """Store everything that the plan keeps of the captured rows, which are dropped one hook point after the other.

        The unit's codes in all dictionaries are in memory at once.
        """
        plan = self._plan
        # All are checked and encoded before the first shard is written: a refused unit leaves nothing behind under fixed keys.
        with self.timed("statistics"):
            finite = {name: self._checked(name, rows) for name, rows in out.items()}
        kept = self._kept_rows()
        encoded = {name: self._encoded(name, rows, kept) for name, rows in out.items()}
        tokens = self._tokens if kept is None else self._tokens.take(pa.array(kept))
        pooling = self._pooling()
        stats: list[HookPointStats] = []
        sums: dict[str, Sums] = {}
        for name, spec in plan.specs.items():
            rows = out.pop(name)
            if pooling is not None:
                with self.timed("pool"):
                    pooling.add(name, rows, plan.capture_dtype, finite[name])
            if "dense" in plan.keep:
                stored = self._store(name, spec, rows, kept)
                self._objects += stored.objects
                sums[name] = stored.sums
                stats.append(self._describe(name, spec, stored, tokens))
                codes = encoded.pop(name)
                # Codes are those of the stored rows, whoever computed them; int8 rows are not what a model computed.
                if stored.is_adopted and spec.dtype != "int8":
                    codes = self._encoded(name, stored.rows, None)
                del stored
                self._store_codes(codes, kept)
            else:
                captured = StoredRows((), np.empty(0, np.uint32), rows, None)
                stats.append(self._describe(name, replace(spec, dtype=plan.capture_dtype), captured, tokens))
                self._store_codes(encoded.pop(name), None)
                del captured
            self._spare.give(rows)
            del rows
        self._write_small(stats, sums, pooling)
        return WrittenUnit(
            unit=self._unit,
            rows=tokens.num_rows,
            nonfinite=sum(s.nonfinite for s in stats),
            attempt=self._attempt,
            objects=tuple(self._objects),
            meta={"nonfinite": {s.hook_point: s.nonfinite for s in stats}, **self._meta},
            nbytes=sum(o.nbytes for o in self._objects),
            rows_read=self._tokens.num_rows,
            rows_forwarded=self.rows_forwarded,
            timings_s=self._spent,
            also=tuple(self._also),
        )

    def _encoded(
        self, name: str, rows: Rows, wanted: Offsets | None
    ) -> list[tuple[CodesWriter, EncodedRows]]:
        """Return the codes of a hook point's rows, of those at `wanted` if given, in every dictionary; stores nothing."""
        found = []
        for writer in self._codes:
            if writer.plan.hook_point == name:
                found.append((writer, writer.encode(blocks_of(rows, self._plan.capture_dtype, wanted))))
                self._spent["codes"] = self._spent.get("codes", 0.0) + found[-1][1].seconds
        return found

    def _store_codes(self, codes: list[tuple[CodesWriter, EncodedRows]], kept: Offsets | None) -> None:
        """Store the codes of the unit's tokens at `kept`, of all if None."""
        for writer, encoded in codes:
            with self.timed("codes"):
                add = writer.add(self._unit, self._attempt, encoded, self._tokens, kept=kept)
            self._also.append(add)

    def _checked(self, name: str, rows: Rows) -> Mask | None:
        """Return which captured rows are finite, None for all, if the run may have others."""
        finite = finite_rows(rows, self._plan.capture_dtype)
        if finite is not None and self._plan.nonfinite == "error":
            n = count_nonfinite(rows, self._plan.capture_dtype)
            raise _nonfinite_error(self._unit, name, n, ~finite, self._tokens["doc_id"].to_numpy())
        return finite

    def _kept_rows(self) -> Offsets | None:
        plan = self._plan
        if "dense" not in plan.keep or plan.sample >= 1:
            return None
        n_rows = self._tokens.num_rows
        return kept_offsets(
            self._unit, n_rows, rows_per_unit=plan.rows_per_unit, rate=plan.sample, seed=plan.seed
        )

    def _pooling(self) -> UnitPooling | None:
        plan = self._plan
        if "pooled" not in plan.keep:
            return None
        return unit_pooling(
            self._tokenization,
            self._unit,
            self._tokens,
            poolings=plan.poolings,
            pool_special=plan.pool_special,
        )

    def _store(self, name: str, spec: ShardSpec, rows: Rows, kept: Offsets | None) -> StoredRows:
        plan = self._plan
        first = self._unit * plan.shards_per_unit(name)
        return store_rows(
            self._storage,
            spec,
            rows,
            plan.capture_dtype,
            key=lambda number: shard_key(plan.run, name, first + number),
            kept=kept,
            transform=None if plan.int8 is None else plan.int8[name],
            spent=self._spent,
        )

    def _describe(self, name: str, spec: ShardSpec, stored: StoredRows, tokens: pa.Table) -> HookPointStats:
        """Return the statistics of what is stored, and store its covariance if that is asked for."""
        plan = self._plan
        transform = plan.int8[name] if plan.int8 is not None and spec.dtype == "int8" else None
        with self.timed("statistics"):
            stats = unit_stats(name, spec, stored.rows, tokens, int8=transform, error=stored.error)
            if stats.nonfinite and plan.nonfinite == "error":  # an adopted shard, of who knows what policy
                bad = _bad_rows(stored.rows, spec, transform)
                raise _nonfinite_error(self._unit, name, stats.nonfinite, bad, tokens["doc_id"].to_numpy())
            covariance = unit_covariance(spec, stored.rows, int8=transform) if plan.covariance else None
        if covariance is not None:
            self._put(covariance_key(plan.run, name, f"{self._unit:08}-{self._attempt}"), covariance)
        return stats

    def _write_small(
        self, stats: list[HookPointStats], sums: Mapping[str, Sums], pooling: UnitPooling | None
    ) -> None:
        """Store sums, statistics and pooled vectors."""
        run = self._plan.run
        if any(len(values) for values in sums.values()):
            key = sums_key(run, self._unit, self._attempt)
            data, self._meta["sums"] = pack_sums(key, sums)
            self._put(key, data)
        with self.timed("statistics"):
            table = parquet_bytes(stats_to_table(stats))
        self._put(f"runs/{run}/stats/{self._unit:08}-{self._attempt}.parquet", table)
        if pooling is not None:
            with self.timed("encode"):
                found, self._meta["pooled"] = pooling.objects(run, self._unit, self._attempt)
            for key, data in found.items():
                self._put(key, data)

    def _put(self, key: str, data: bytes) -> None:
        with self.timed("write"):
            self._objects.append(write_new(self._storage, key, [data]))


def window_starts(doc_ids: Rows, windows: Rows) -> Rows:
    """Return where the unit's windows start, and its length: shape (n_windows + 1,), int64.

    >>> window_starts(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0])).tolist()
    [0, 2, 3, 4]
    """
    change = (doc_ids[1:] != doc_ids[:-1]) | (windows[1:] != windows[:-1])
    inner = np.flatnonzero(change) + 1
    return np.concatenate([np.zeros(1, np.int64), inner, np.full(1, len(doc_ids), np.int64)])


def parquet_bytes(table: pa.Table) -> bytes:
    """Return `table` as a Parquet file with page checksums."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _bad_rows(rows: Rows, spec: ShardSpec, transform: Int8Transform | None) -> Mask:
    """Return which stored rows are read as numbers of which some are not finite."""
    if transform is not None:  # a foreign row may overflow although its scale is finite
        rows, dtype = dequantise(rows, transform), "float32"
    else:
        dtype = spec.dtype
    finite = finite_rows(rows, dtype)
    return np.zeros(len(rows), bool) if finite is None else ~finite


def _nonfinite_error(unit: int, name: str, n: int, bad: Mask, doc_ids: Rows) -> InvalidInputError:
    documents = np.unique(doc_ids[bad])
    shown = ", ".join(map(str, documents[:5])) + (", ..." if len(documents) > 5 else "")
    return InvalidInputError(
        ErrorKind.NON_FINITE,
        f"unit {unit}: {n} activations of {name!r} in {int(bad.sum())} rows are NaN or infinite (documents {shown}); the "
        "unit was not stored. Check the model, compute in float32 or bfloat16, or, under another run name, store and count them "
        "with nonfinite='mask'",
    )
