"""What does one task of an index build do? It trains the index (unit 0), or fills one shard (unit s + 1).

Units are idempotent: their objects have keys of their own per attempt. Rows are read once and in blocks; what a task holds is
a block, the norms of its rows, and the shard's vectors as the kind stores them.
"""

import errno
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError, StorageError
from actstore.ingest.unit import WrittenUnit
from actstore.log.values import StoredObject
from actstore.row_norms import row_norms
from actstore.storage import write_new
from actstore.store import Store
from actstore.transforms import Transform, fit_transform
from actstore.vector_index import KIND, VectorIndex, prepare_rows

from .choose import sample_rows
from .gpu import resolve_device
from .kinds import Part, index_kind, scratch_failed
from .rows import RowSource

Float32s: TypeAlias = npt.NDArray[np.float32]
Float64s: TypeAlias = npt.NDArray[np.float64]
Int64s: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

_LONGEST: Final = 2.0**62
"""The squared distance of two vectors no longer than this is a float32 number."""


@dataclass(frozen=True, slots=True)
class IndexTask:
    """Trains and fills an index; a `UnitTask`."""

    index: str
    """Id of the collection."""
    run: str
    rows_of: tuple[int, ...]
    """What each unit counts, the first one's training 0."""
    transform_of: str | None
    """Id of an index whose transform this one takes over, so that both answer together; None to fit one."""
    device: str
    sample_bytes: int
    """For the rows that the index is trained on."""

    def open(self, store: Store) -> "IndexWriter":
        """Return what runs units; cheap but for the trained index, which is read with the first shard."""
        return IndexWriter(store, self)


class IndexWriter:
    """Trains an index or fills shards, one at a time whatever the number of threads; safe to repeat.

    Memory: for training twice `sample_bytes`; for a shard its vectors (at most 1 GiB, twice that as lists grow) and blocks of
    32 MiB of rows. Disk: the shard's file in the folder for temporary files.
    """

    def __init__(self, store: Store, task: IndexTask) -> None:
        self._store = store
        self._task = task
        run = store.run(task.run)
        self._index = VectorIndex(run, store.state.collection(KIND, task.index))
        self._source = RowSource(run, self._index.hook_point, self._index.of, self._index.pooling)
        self._kind = index_kind(self._index.kind, device=resolve_device(task.device))
        self._lock = threading.Lock()
        self._stopped = False
        self._trained: tuple[bytes, Transform | None] | None = None

    def __call__(self, unit: int) -> WrittenUnit:
        """Run one unit."""
        with self._lock:
            return self._train() if unit == 0 else self._fill(unit - 1)

    def stop(self) -> None:
        """Have running units end at the next block of rows."""
        self._stopped = True

    def _train(self) -> WrittenUnit:
        index, attempt, began = self._index, uuid.uuid4().hex, time.perf_counter()
        ranges = [pair for shard in index.unit_ranges for pair in shard]
        n_rows = sum(self._task.rows_of)
        packed = self._make_transform()
        transform = None if packed is None else Transform.from_bytes(packed)
        # Rows are read whole, also where only their first dimensions are indexed.
        widest = max(index.d, index.run.d_model(index.hook_point))
        n_sample = sample_rows(
            index.kind, index.params, n_rows=n_rows, d=widest, memory_bytes=self._task.sample_bytes
        )
        sample = np.empty((0, index.d), np.float32)
        if n_sample:
            rows = self._source.sample(ranges, n_sample, seed=int(index.collection.config["seed"]))
            self._check_stopped()
            sample = _prepared(index, rows, transform)[1]
            del rows
        trained = self._kind.train(
            sample, n_rows=n_rows, metric=index.metric, seed=int(index.collection.config["seed"]), params=index.params
        )  # fmt: skip
        folder = f"indexes/{index.id}"
        objects = [write_new(self._store.storage, f"{folder}/trained-{attempt}.faiss", [trained])]
        if packed is not None:
            key = f"{folder}/transform-{attempt}.safetensors"
            objects.append(write_new(self._store.storage, key, [packed]))
        meta = {"n_sample": len(sample)}
        return _written(0, attempt, objects, meta, rows=0, counted=0, seconds=time.perf_counter() - began)

    def _fill(self, shard: int) -> WrittenUnit:
        attempt, began = uuid.uuid4().hex, time.perf_counter()
        blocks = _Blocks(self, shard)
        trained, _ = self._load_trained()
        try:
            parts = self._kind.build_shard(trained, iter(blocks), self._task.rows_of[shard + 1])
        except OSError as error:
            if isinstance(error, StorageError) or error.errno != errno.ENOSPC:
                raise
            raise scratch_failed(error) from error
        try:
            objects = self._write(shard, attempt, parts, blocks)
        finally:
            for part in parts.values():
                if isinstance(part, Path):
                    part.unlink(missing_ok=True)
        meta = {"n_indexed": blocks.n_given}
        rows = sum(len(norms) for norms in blocks.norms)
        counted = rows if self._index.of == "tokens" else self._task.rows_of[shard + 1]
        return _written(
            shard + 1, attempt, objects, meta, rows=rows, counted=counted, seconds=time.perf_counter() - began
        )

    def _write(
        self, shard: int, attempt: str, parts: dict[str, Part], blocks: "_Blocks"
    ) -> list[StoredObject]:
        storage, folder = self._store.storage, f"indexes/{self._index.id}/shards"
        objects = []
        for name, part in parts.items():
            key = f"{folder}/{shard:06}-{attempt}.faiss"
            if name != "faiss":
                key = f"{folder}/{name}-{shard:06}-{attempt}.safetensors"
            data = np.memmap(part, np.uint8, "r").data if isinstance(part, Path) else part
            objects.append(write_new(storage, key, [data]))
        norms = np.concatenate([np.empty(0, np.float64), *blocks.norms]).astype("<f8")
        if len(norms):  # an object has at least one byte
            objects.append(write_new(storage, f"{folder}/norms-{shard:06}-{attempt}.bin", [norms.tobytes()]))
        if self._index.of == "documents" and len(norms):
            numbers = np.concatenate(blocks.numbers).astype("<i8")
            objects.append(write_new(storage, f"{folder}/docs-{shard:06}-{attempt}.bin", [numbers.tobytes()]))
        return objects

    def _make_transform(self) -> bytes | None:
        """Return the transform as it is to be stored: that of another index to the byte, as that is how they know each other."""
        index, task = self._index, self._task
        if not index.transform_steps:
            return None
        if task.transform_of is not None:
            other = VectorIndex(index.run, self._store.state.collection(KIND, task.transform_of))
            return self._store.objects.read(other.transform_object())
        pooling = index.pooling or "mean"
        return fit_transform(
            index.run, index.hook_point, index.transform_steps, of=index.of, pooling=pooling
        ).to_bytes()

    def _load_trained(self) -> tuple[bytes, Transform | None]:
        if self._trained is None:
            transform = self._index.transform() if self._index.transform_steps else None
            self._trained = Path(self._index.trained_file()).read_bytes(), transform
        return self._trained

    def _check_stopped(self) -> None:
        if self._stopped:
            raise StorageError(
                ErrorKind.INTERRUPTED, "building an index was stopped: run the same again to finish it"
            )


class _Blocks:
    """The blocks of a shard as its kind is given them, and what else is stored of every row."""

    def __init__(self, writer: IndexWriter, shard: int) -> None:
        self._writer = writer
        self._shard = shard
        self.norms: list[Float64s] = []
        self.numbers: list[Int64s] = []
        """Of documents."""
        self.n_given = 0
        """Vectors that the kind was given."""

    def __iter__(self) -> Iterator[tuple[Int64s, Float32s]]:
        writer, first = self._writer, 0
        index, takes_all = writer._index, writer._kind.takes_all
        _, transform = writer._load_trained()
        for numbers, rows in writer._source.blocks(index.unit_ranges[self._shard]):
            writer._check_stopped()
            self.norms.append(row_norms(rows)[0])
            if index.of == "documents":
                self.numbers.append(numbers)
            if takes_all:
                places, vectors = np.arange(len(rows)), rows
            else:
                places, vectors = _prepared(index, rows, transform)
            self.n_given += len(places)
            yield first + places, vectors
            first += len(rows)


def _prepared(index: VectorIndex, rows_td: Float32s, transform: Transform | None) -> tuple[Int64s, Float32s]:
    """Return which rows can be indexed, and them as FAISS sees them.

    Raises:
        InvalidInputError: numbers whose squares FAISS's float32 cannot add up: it would end the process.
    """
    vectors = prepare_rows(rows_td, transform, first_dims=index.first_dims, metric=index.metric)
    fit = np.isfinite(vectors).all(axis=1) & np.isfinite(rows_td).all(axis=1)
    if index.metric == "cosine":
        fit &= vectors.any(axis=1)
    places = np.flatnonzero(fit)
    vectors = vectors if len(places) == len(vectors) else vectors[places]
    largest = max(float(vectors.max(initial=0.0)), -float(vectors.min(initial=0.0)))
    if index.purpose == "nearest" and largest * index.d**0.5 > _LONGEST:
        raise InvalidInputError(
            ErrorKind.TOO_LARGE,
            f"numbers up to {largest:.3g} are to be indexed with metric {index.metric!r}: vectors longer than {_LONGEST:.3g} "
            "cannot be compared in float32. Use metric='cosine', or a transform that scales or leaves out such dimensions "
            "(standardise, drop_outliers), or ask without an index",
        )
    return places, vectors


def _written(
    unit: int, attempt: str, objects: list[StoredObject], meta: dict[str, int], *, rows: int, counted: int, seconds: float
) -> WrittenUnit:  # fmt: skip
    return WrittenUnit(
        unit=unit,
        rows=rows,
        nonfinite=0,
        attempt=attempt,
        objects=tuple(objects),
        meta=meta,
        nbytes=sum(obj.nbytes for obj in objects),
        rows_read=counted,
        rows_forwarded=counted,
        timings_s={"encode": seconds},
    )
