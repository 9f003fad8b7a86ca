"""How do the rows of a hook point become an index that may be used?

A generation is created with its shards laid down, trained (unit 0), filled shard by shard, measured against brute force, and
sealed if it finds enough: only sealed ones are read. The same call again finishes what was begun, and, once that is sealed,
indexes what was ingested since.
"""

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import actstore
from actstore.checks import MAX_BYTES, check_whole
from actstore.errors import ConflictError, ErrorKind, InvalidInputError, StorageError
from actstore.faiss_file import load_faiss
from actstore.index_pieces import Piece, all_pieces, rows_of_shards
from actstore.ingest.flow import Progress
from actstore.ingest.unit_collection import ensure_collection, seal_collection
from actstore.ingest.unit_job import run_unit_job
from actstore.log.values import Collection, StoredObject
from actstore.run import Run
from actstore.stats import SINK_NORM_RATIO
from actstore.storage import write_new
from actstore.store import Store, open_store
from actstore.transforms import fit_transform
from actstore.vector_index import FORMAT, KIND, VectorIndex, index_id

from .choose import choose_kind, default_memory_bytes, rows_per_shard
from .gpu import check_device, resolve_device
from .measure import N_QUERIES, measure
from .plan import (
    Wanted,
    covered_by,
    cut_shards,
    find_unfinished,
    generations,
    uncovered,
)
from .rows import RowSource
from .task import IndexTask
from .wanted import check_floor, check_wanted

RECALL_FLOOR: Final = 0.9
SHARD_ROWS: Final = 1 << 20
SAMPLE_BYTES: Final = 4 << 30
"""For the rows that an index is trained on."""

_BEGIN_TRIES: Final = 10
"""Each time another job has begun an index of the same hook point in between."""


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What building an index did."""

    index: str
    """Id of the generation that was built; of the newest one where nothing was left to index."""
    version: int
    is_complete: bool
    """Whether it is sealed, and so used."""
    kind: str
    why: tuple[str, ...]
    """Why this kind."""
    n_rows: int
    """Rows (documents) that the generation covers so far."""
    n_indexed: int
    """Vectors in it: the others are not finite, or zeros with the metric cosine."""
    n_uncovered: int
    """Rows (documents) of the run that no sealed generation covers: searches scan them. Build again to index them."""
    n_shards: int
    n_shards_planned: int
    nbytes: int
    recall: float | None
    """Of the 10 nearest, at the largest effort; None of an index of directions, which is exact, and of one not complete."""
    measured: tuple[dict[str, Any], ...]
    """All measurements: effort, k, share, recall."""
    units_this_job: int
    elapsed_s: float


def build_index(
    store: Store | str | os.PathLike[str],
    run: str,
    hook_point: str,
    *,
    kind: str = "auto",
    of: str = "tokens",
    metric: str | None = None,
    transform: str | Sequence[str] = (),
    first_dims: int | None = None,
    pooling: str = "mean",
    recall_floor: float = RECALL_FLOOR,
    memory_bytes: int | None = None,
    seed: int = 0,
    shard_rows: int = SHARD_ROWS,
    rebuild: bool = False,
    n_lists: int | None = None,
    n_queries: int = N_QUERIES,
    ray_address: str | None = None,
    workers: int = 1,
    device: str = "cpu",
    gpus_per_worker: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> IndexReport:
    """Index what of a hook point is not indexed yet, or finish an index that was begun; idempotent.

    Cost: all rows are read twice, to fill the index and to compare them with 1,000 queries. Memory per worker: at most 4 GiB for
    training, and a shard's vectors (1 GiB at most, twice that while lists grow); here 8 bytes for each row, and the norms of at
    most 1 GiB of rows, besides. Disk: twice a shard's bytes in each worker's folder for temporary files.

    Args:
        store: A store, or where it is.
        run: Name of a run.
        hook_point: One of its hook points; aliases are accepted.
        kind: `flat`, `ivf_sq8`, `ivf_rabitq`: for nearest neighbours; `scan_sq8`: for directions (inner products with rows as
            they are stored); `auto`: one for nearest neighbours that suits the number of rows, their width and `memory_bytes`.
        of: `tokens`: the run's rows; `documents`: its pooled vectors.
        metric: `cosine`, `ip` or `l2`; None for `cosine`, and `ip` of `scan_sq8`.
        transform: Steps applied to rows and queries; see `actstore.transforms`.
        first_dims: Index only so many of the first dimensions; candidates are compared in all of them.
        pooling: Of documents: which pooled vectors.
        recall_floor: The index is used only if it finds at least this share of the 10 nearest; 0 to 1.
        memory_bytes: What the vectors may take in the memory of a machine that answers queries; None for a quarter of this one's.
        seed: Of the sample that it is trained on, and of the queries that it is measured with.
        shard_rows: Rows of a shard at most; fewer where that many vectors are over 1 GiB.
        rebuild: Index everything anew, also what is indexed.
        n_lists: Of `ivf_` kinds; None for a number that suits the rows.
        n_queries: Rows that recall is measured with.
        ray_address: `local`, `auto` or `ray://host:port`; None runs in this process.
        workers: Ray actors.
        device: `cpu`, `cuda` or `auto`: where FAISS clusters and fills lists; GPUs need `actstore[gpu]`.
        gpus_per_worker: As in `IngestConfig`.
        progress: Called after every commit.
        notice: Called with a line of text as each step begins.
        stop: When set, no shard is begun any more; SIGINT and SIGTERM do the same while shards are filled.

    Returns:
        What was done. `store`, if it was a `Store`, is moved to the new version.

    Raises:
        NotFoundError: no such run or hook point.
        InvalidInputError: a setting that cannot be, nothing stored yet, or an index that finds less than `recall_floor`
            (SELF_TEST_FAILED): it is not used, and the message has the figures.
        ConflictError: another job took over.
        StorageError: storage or workers failed; run the same again.
        MissingDependencyError: FAISS is not installed.
    """
    began = time.monotonic()
    floor = check_floor(recall_floor)
    memory_bytes = (
        default_memory_bytes()
        if memory_bytes is None
        else check_whole(memory_bytes, what="memory_bytes", least=1, most=MAX_BYTES)
    )
    check_whole(shard_rows, what="shard_rows", least=1)
    check_whole(n_queries, what="n_queries", least=1, most=100_000)
    if n_lists is not None:
        check_whole(n_lists, what="n_lists", least=1, most=1 << 20)
    if ray_address is None and workers != 1:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"workers must be 1 without Ray, got {workers!r:.80}: give a ray_address to use more",
        )
    if not isinstance(store, Store):
        store = open_store(store)
    opened = store.refresh().run(run)
    wanted = check_wanted(
        opened, hook_point, kind=kind, of=of, metric=metric, transform=transform, first_dims=first_dims, pooling=pooling,
        seed=seed,
    )  # fmt: skip
    load_faiss()
    check_device(device)
    resolve_device("cpu" if ray_address else device)
    build = _Build(store, opened, wanted, all_pieces(opened, wanted.of), kind, n_lists, rebuild=rebuild)
    say = notice or (lambda _: None)
    found = build.begin(memory_bytes=memory_bytes, shard_rows=shard_rows, say=say)
    if found is None:
        return build.report(None, 0, began)
    task = IndexTask(found.id, run, build.rows_of_units(found), build.transform_of(), device, SAMPLE_BYTES)
    stop = stop or threading.Event()
    done = 0
    # The index is trained before the first shard is filled: two jobs, one after the other.
    for units in ([0], range(1, len(task.rows_of))):
        pending = [unit for unit in units if unit not in found.units]
        outcome = run_unit_job(
            store, kind=KIND, id=found.id, task=task, pending=pending, rows_of=lambda unit: task.rows_of[unit],
            ray_address=ray_address, workers=workers if units != [0] else 1, device=device, gpus_per_worker=gpus_per_worker,
            commit_units=1, progress=progress, notice=notice, stop=stop,
        )  # fmt: skip
        done += outcome.counters.committed
        if outcome.stopped or stop.is_set():
            return build.report(found.id, done, began)
    try:
        build.publish(found.id, floor=floor, n_queries=n_queries, stop=stop, say=say)
    except StorageError as error:
        if error.kind is not ErrorKind.INTERRUPTED:
            raise
    return build.report(found.id, done, began)


@dataclass(slots=True)
class _Build:
    """One call of `build_index`."""

    store: Store
    run: Run
    wanted: Wanted
    pieces: list[Piece]
    """Everything that there is to index."""
    kind: str
    n_lists: int | None
    rebuild: bool

    def pieces_to_index(self) -> list[Piece]:
        """Return what the generation to build or finish is made of; nothing if all is indexed.

        Raises:
            InvalidInputError: the run has nothing that could be indexed.
        """
        if not self.pieces:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"run {self.run.id!r} has no {self.wanted.of} stored yet at version {self.store.version}: nothing can be indexed",
            )
        if self.rebuild:
            return self.pieces
        return uncovered(self.pieces, covered_by(self.run, self.wanted))

    def begin(self, *, memory_bytes: int, shard_rows: int, say: Callable[[str], None]) -> Collection | None:
        """Return the generation that was begun over what is to be indexed, or a new one; None if all is indexed.

        Raises:
            InvalidInputError: the run has nothing that could be indexed, or not so.
            ConflictError: other jobs keep beginning indexes of this hook point.
        """
        for _ in range(_BEGIN_TRIES):
            pieces = self.pieces_to_index()
            if not pieces:
                return None
            try:
                return self._begin(pieces, memory_bytes=memory_bytes, shard_rows=shard_rows, say=say)
            except ConflictError as error:
                if error.kind is not ErrorKind.CONFIG_DIFFERS:
                    raise
                # Another job has begun another index under the same number: this one gets the next.
                self.run = self.run_now()
        raise ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"other jobs began indexes of {self.wanted.hook_point!r} in run {self.run.id!r} {_BEGIN_TRIES} times in a row: run "
            "the same again when they have begun",
        )

    def _begin(
        self,
        pieces: Sequence[Piece],
        *,
        memory_bytes: int,
        shard_rows: int,
        say: Callable[[str], None],
    ) -> Collection:
        """Return the generation that was begun over such pieces, or a new one."""
        found = generations(self.run, self.wanted)
        unfinished = find_unfinished(
            found, self.wanted, pieces, kind=self.kind, n_lists=self.n_lists, rebuild=self.rebuild
        )
        if unfinished is not None:
            return unfinished
        wanted, run = self.wanted, self.run
        d = self._width()
        stats = run.stats(wanted.hook_point)
        choice = choose_kind(
            self.kind, n_rows=sum(piece.n for piece in pieces), d=d, memory_bytes=memory_bytes, n_lists=self.n_lists,
            norm_limit=SINK_NORM_RATIO * stats.norm_quantile(0.5),
        )  # fmt: skip
        generation = int(found[-1].config["generation"]) + 1 if found else 0
        per_shard = rows_per_shard(choice.kind, d, shard_rows)
        config = {
            "format": FORMAT,
            "run": run.id,
            "run_fingerprint": run.collection.fingerprint,
            **wanted.config(),
            "kind": choice.kind,
            "params": choice.params,
            "d": d,
            "generation": generation,
            "shards": cut_shards(pieces, shard_rows=per_shard),
        }
        info = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": platform.node(),
            "actstore": actstore.__version__,
            "faiss": load_faiss().__version__,
            "why": list(choice.why),
        }
        for line in choice.why:
            say(line)
        id = index_id(run.id, wanted.hook_point, wanted.of, wanted.purpose, generation)
        return ensure_collection(self.store, KIND, id, config, info)

    def rows_of_units(self, collection: Collection) -> tuple[int, ...]:
        """Return what each unit of a generation counts; 0 of the first, which is trained."""
        return 0, *rows_of_shards(self.pieces, collection.config["shards"])

    def transform_of(self) -> str | None:
        """Return the id of the index that this one will answer together with."""
        if self.rebuild or not self.wanted.transform:
            return None
        return next((index.id for index in covered_by(self.run, self.wanted)), None)

    def publish(
        self, id: str, *, floor: float, n_queries: int, stop: threading.Event, say: Callable[[str], None]
    ) -> None:
        """Measure an index whose shards are all built, and seal it if it finds enough."""
        self.store.refresh()
        index = VectorIndex(self.run_now(), self.store.state.collection(KIND, id))
        objects = list[StoredObject]()
        why = index.collection.info.get("why", [])
        meta: dict[str, Any] = {"recall": [], "floor": floor, "why": why}
        if index.purpose == "nearest":
            source = RowSource(index.run, index.hook_point, index.of, index.pooling)
            seed = int(index.collection.config["seed"])
            measured = measure(index, source, seed=seed, floor=floor, n_queries=n_queries, stop=stop, say=say)
            if measured.recall() < floor:
                raise _below_floor(index, measured.table, floor)
            key = f"indexes/{id}/queries-{uuid.uuid4().hex}.parquet"
            objects.append(write_new(self.store.storage, key, [measured.queries]))
            meta["recall"] = measured.table
        seal_collection(self.store, KIND, id, n_units=len(index.unit_ranges) + 1, objects=objects, meta=meta)

    def run_now(self) -> Run:
        """Return the run at the store's version."""
        return self.store.run(self.run.id)

    def report(self, id: str | None, units_this_job: int, began: float) -> IndexReport:
        """Return what there is now."""
        if id is not None:
            self.store.refresh()
        run = self.run_now()
        sealed = covered_by(run, self.wanted)
        left = uncovered(all_pieces(run, self.wanted.of), sealed)
        index = sealed[0] if id is None and sealed else None
        if id is not None:
            index = VectorIndex(run, self.store.state.collection(KIND, id))
        assert index is not None, "everything is indexed, or something was begun"
        at_all = [m for m in index.measured if m.share == 1.0 and m.k == 10]
        return IndexReport(
            index=index.id,
            version=self.store.version,
            is_complete=index.collection.is_sealed,
            kind=index.kind,
            why=tuple(index.collection.info.get("why", ())),
            n_rows=index.n_rows,
            n_indexed=index.n_indexed,
            n_uncovered=sum(piece.n for piece in left),
            n_shards=len(index.shards),
            n_shards_planned=len(index.unit_ranges),
            nbytes=index.nbytes,
            recall=max(at_all, key=lambda m: m.effort).recall if at_all else None,
            measured=tuple(
                {"effort": m.effort, "k": m.k, "share": m.share, "recall": m.recall} for m in index.measured
            ),
            units_this_job=units_this_job,
            elapsed_s=time.monotonic() - began,
        )

    def _width(self) -> int:
        """Return the width of the vectors in the files; the transform is fitted here already, so that it fails here."""
        wanted = self.wanted
        d_out = self.run.d_model(wanted.hook_point)
        before = self.transform_of()
        if before is not None:
            d_out = VectorIndex(self.run, self.store.state.collection(KIND, before)).transform().d_out
        elif wanted.transform:
            d_out = fit_transform(
                self.run, wanted.hook_point, wanted.transform, of=wanted.of, pooling=wanted.pooling or "mean"
            ).d_out
        if wanted.first_dims is not None and wanted.first_dims > d_out:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"first_dims={wanted.first_dims} was asked for, and vectors have {d_out} numbers",
            )
        return wanted.first_dims or d_out


def _below_floor(index: VectorIndex, table: Sequence[Mapping[str, Any]], floor: float) -> InvalidInputError:
    figures = ", ".join(
        f"{m['recall']:.4f} of the {m['k']} nearest at effort {m['effort']}"
        for m in table
        if m["share"] == 1.0
    )
    return InvalidInputError(
        ErrorKind.SELF_TEST_FAILED,
        f"index {index.id!r} ({index.kind}) finds too few of the true nearest: {figures}; recall_floor is {floor}, so it is not "
        "published and never used. Build another kind (kind='ivf_sq8' or 'flat'), or give a lower recall_floor",
    )
