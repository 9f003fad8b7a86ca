"""How do the codes of a run become postings with statistics of every latent?

The latents are cut into ranges by what each needs in memory; a range is a unit, and the task of one unit reads all codes of the
run, keeps those of its latents, and writes their postings and their statistics. Units are idempotent (keys of their own per
attempt), so the same call again finishes what is not done.
"""

import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import actstore
from actstore.codes import Codes
from actstore.dictionary import Dictionary
from actstore.errors import ActstoreError, ConflictError, ErrorKind, InvalidInputError, StorageError
from actstore.ingest.flow import Progress
from actstore.ingest.unit import WrittenUnit
from actstore.ingest.unit_collection import ensure_collection, seal_collection
from actstore.ingest.unit_job import run_unit_job
from actstore.latent_stats import LATENT_STATS_SCHEMA, stats_bytes, stats_key
from actstore.log.values import Collection
from actstore.sparse.rows import VALUE_DTYPES
from actstore.sparse.segment_grouped import encode_grouped
from actstore.storage import write_new
from actstore.store import Store

from .large_latent import LargeLatent
from .latent_stats import RangePostings, latent_statistics
from .postings_gather import gather_codes, gather_postings
from .postings_plan import DEFAULT_MEMORY_BYTES, is_large, plan_ranges, ranges_bytes
from .promoted import promoted_columns, promoted_ends
from .unembedding import Unembedding, find_unembedding

KIND = "postings"

_Built: TypeAlias = tuple[list[bytes], dict[str, Any], pa.Table]
"""The pieces of a range's object, what `meta` says of it, and statistics of its latents."""

_WORKER_POSTINGS = 1 << 20
"""Postings below which a range is not cut further to give another worker something to do."""


@dataclass(frozen=True, slots=True)
class PostingsReport:
    """What building postings did."""

    postings: str
    """Id of the postings, that of the codes."""
    version: int
    is_complete: bool
    n_units: int
    """Ranges of latents that are built."""
    n_units_planned: int
    n_postings: int
    """Of those that are built."""
    nbytes: int
    """Stored bytes, statistics included."""
    units_this_job: int
    elapsed_s: float
    no_promoted: str | None
    """Why the statistics have no promoted vocabulary; None if they have."""


def build_postings(
    store: Store,
    codes_id: str,
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    promoted: bool | None = None,
    ray_address: str | None = None,
    workers: int = 1,
    device: str = "cpu",
    gpus_per_worker: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> PostingsReport:
    """Build the postings of complete codes and the statistics of their latents, or finish what was begun; idempotent.

    Cost: all codes are read once for each `memory_bytes` that the postings take, at about 25 bytes each. A latent that needs more
    (about 62 bytes for each row it fires on) is sorted on local disk, 16 bytes a row in the system's temporary folder.

    Args:
        store: Moved to the newest version, before and after.
        codes_id: Id of the codes, see `actstore.codes.codes_id`.
        memory_bytes: What a task may take beside the program itself; a worker runs one task at a time.
        promoted: Whether the statistics say which vocabulary each latent promotes and suppresses: None where the run's model
            is at hand and has an unembedding that the decoder can go through, True to fail where it is not, False for no.
        ray_address: As in `IngestConfig`; None runs in this process.
        workers: Ray actors, each of which takes `memory_bytes`.
        device: Where decoder and unembedding are multiplied.
        gpus_per_worker: As in `IngestConfig`.
        progress: Called after every commit; its rows are postings.
        notice: Called with a line of text as each step begins.
        stop: When set, no unit is begun any more and those that run end at the next page.

    Raises:
        NotFoundError: no such codes.
        InvalidInputError: the codes are not complete, or the encoded postings of a latent alone, 8 bytes a row, need more than
            `memory_bytes` (TOO_LARGE).
        ConflictError: they were begun with another `promoted`, are of other codes, or a newer job took over.
        StorageError: storage or workers failed; run the same again.
        FormatError: an object of the codes is missing or damaged.
    """
    say = notice or (lambda _: None)
    stop = stop or threading.Event()
    codes = _complete_codes(store, codes_id)
    existing = store.state.collections.get((KIND, codes_id))
    if existing is not None and existing.is_sealed:
        return _report(store, codes_id, 0, 0.0)
    counts = codes.counts()
    plan = _Planned(codes, counts, memory_bytes, workers, promoted)
    collection, unembedding = (
        plan.resume(store, existing) if existing is not None else plan.create(store, say)
    )
    n_units = len(collection.config["boundaries"]) - 1
    of_unit = np.add.reduceat(counts, collection.config["boundaries"][:-1])
    pending = [unit for unit in range(n_units) if unit not in collection.units]
    say(
        f"building {len(pending)} of {n_units} units of the postings of {codes_id}, {int(counts.sum()):,} in all"
    )
    began = time.monotonic()
    outcome = run_unit_job(
        store, kind=KIND, id=codes_id, pending=pending,
        task=PostingsTask(codes.run.id, codes.dictionary, unembedding, device, memory_bytes),
        rows_of=lambda unit: int(of_unit[unit]), ray_address=ray_address, workers=workers, device=device,
        gpus_per_worker=gpus_per_worker, commit_units=1, progress=progress, notice=notice, stop=stop,
    )  # fmt: skip
    elapsed_s = time.monotonic() - began
    if not outcome.stopped:
        seal_collection(store, KIND, codes_id, n_units=n_units)
    return _report(store, codes_id, outcome.counters.committed, elapsed_s)


@dataclass(frozen=True, slots=True)
class _Planned:
    """What new postings of some codes would be, or must be to go on with those that there are."""

    codes: Codes
    counts: npt.NDArray[np.int64]
    memory_bytes: int
    workers: int
    promoted: bool | None

    @property
    def value_bytes(self) -> int:
        return VALUE_DTYPES[self.codes.value_dtype].itemsize

    def create(self, store: Store, say: Callable[[str], None]) -> tuple[Collection, Unembedding | None]:
        """Create the postings, unless another job is first."""
        spread = max(_WORKER_POSTINGS, -(-int(self.counts.sum()) // self.workers))
        boundaries = plan_ranges(
            self.counts, memory_bytes=self.memory_bytes, value_bytes=self.value_bytes, worker_postings=spread
        )
        unembedding, reason = self._unembedding(store)
        if reason is not None:
            say(f"no promoted vocabulary: {reason}")
        info = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": platform.node(),
            "actstore": actstore.__version__,
            "no_promoted": reason,
        }
        return ensure_collection(
            store, KIND, self.codes.id, self._config(boundaries, unembedding), info
        ), unembedding

    def resume(self, store: Store, existing: Collection) -> tuple[Collection, Unembedding | None]:
        """Go on with postings as they were begun."""
        boundaries = [int(b) for b in existing.config["boundaries"]]
        wants = existing.config.get("promoted") is not None
        if self.promoted is not None and self.promoted != wants:
            raise ConflictError(
                ErrorKind.CONFIG_DIFFERS,
                f"postings {self.codes.id!r} were begun {'with' if wants else 'without'} promoted vocabulary "
                f"({existing.info.get('no_promoted')}), and promoted={self.promoted} was asked for: leave it out to finish them",
            )
        unembedding = (
            find_unembedding(self.codes.run, store.dictionary(self.codes.dictionary)) if wants else None
        )
        found = ensure_collection(store, KIND, self.codes.id, self._config(boundaries, unembedding))
        needed = ranges_bytes(self.counts, boundaries, value_bytes=self.value_bytes)
        if needed > self.memory_bytes:
            raise InvalidInputError(
                ErrorKind.TOO_LARGE,
                f"postings {self.codes.id!r} were begun with tasks of up to {needed:,} bytes of memory, and memory_bytes is "
                f"{self.memory_bytes:,}: give memory_bytes={needed} or more to finish them",
            )
        return found, unembedding

    def _config(self, boundaries: list[int], unembedding: Unembedding | None) -> dict[str, Any]:
        return {
            "format": 1,
            "codes": self.codes.id,
            "codes_fingerprint": self.codes.collection.fingerprint,
            "n_latents": self.codes.n_latents,
            "boundaries": boundaries,
            "promoted": None if unembedding is None else unembedding.to_json(),
        }

    def _unembedding(self, store: Store) -> tuple[Unembedding | None, str | None]:
        """Return what turns decoder rows into logits, or why there is nothing."""
        if self.promoted is False:
            return None, "it was not asked for"
        try:
            return find_unembedding(self.codes.run, store.dictionary(self.codes.dictionary)), None
        except ActstoreError as error:
            if self.promoted:
                raise
            return None, error.message


@dataclass(frozen=True, slots=True)
class PostingsTask:
    """Builds ranges of latents; pickles."""

    run: str
    dictionary: str
    unembedding: Unembedding | None
    device: str
    memory_bytes: int
    """Of a task; latents that need more are sorted on disk."""

    def open(self, store: Store) -> "PostingsWriter":
        """Return what builds one range."""
        run = store.run(self.run)
        return PostingsWriter(
            store,
            run.codes(self.dictionary),
            store.dictionary(self.dictionary),
            self.unembedding,
            self.device,
            self.memory_bytes,
        )


class PostingsWriter:
    """Builds and stores ranges of latents, one at a time whatever the number of threads; idempotent.

    Memory: see `postings_plan.task_bytes` and `large_bytes`.
    """

    def __init__(
        self,
        store: Store,
        codes: Codes,
        dictionary: Dictionary,
        unembedding: Unembedding | None,
        device: str,
        memory_bytes: int,
    ) -> None:
        self._store = store
        self._codes = codes
        self._dictionary = dictionary
        self._unembedding = unembedding
        self._device = device
        self._memory_bytes = memory_bytes
        self._boundaries = store.state.collection(KIND, codes.id).config["boundaries"]
        self._lock = threading.Lock()
        self._stopped = False
        self._counts: npt.NDArray[np.int64] | None = None

    def __call__(self, unit: int) -> WrittenUnit:
        """Build and store one range; safe to repeat."""
        with self._lock:
            return self._run(unit)

    def stop(self) -> None:
        """Have running units end at the next page of codes."""
        self._stopped = True

    def _run(self, unit: int) -> WrittenUnit:
        spent = dict.fromkeys(("read", "statistics", "encode", "promote", "write"), 0.0)
        began = time.perf_counter()

        def lap(step: str) -> None:
            nonlocal began
            now = time.perf_counter()
            spent[step] += now - began
            began = now

        start, stop = (int(b) for b in self._boundaries[unit : unit + 2])
        attempt = uuid.uuid4().hex
        if self._counts is None:
            self._counts = self._codes.counts()
        counts = self._counts[start:stop]
        n_postings = int(counts.sum())
        value_bytes = VALUE_DTYPES[self._codes.value_dtype].itemsize
        large = is_large(n_postings, len(counts), memory_bytes=self._memory_bytes, value_bytes=value_bytes)
        data, meta, table = (self._large_range if large else self._range)(start, counts, lap)
        key = f"postings/{self._codes.id}/{unit:06}-{attempt}.bin"
        segment = write_new(self._store.storage, key, data)
        del data
        lap("write")
        table = self._with_promoted(table, start, stop)
        lap("promote")
        written = write_new(
            self._store.storage, stats_key(self._codes.id, unit, attempt), [stats_bytes(table)]
        )
        lap("write")
        return WrittenUnit(
            unit=unit,
            rows=n_postings,
            nonfinite=0,
            attempt=attempt,
            objects=(segment, written),
            meta=meta,
            nbytes=segment.nbytes + written.nbytes,
            rows_read=n_postings,
            rows_forwarded=n_postings,
            timings_s=spent,
        )

    def _range(self, start: int, counts: npt.NDArray[np.int64], lap: Callable[[str], None]) -> _Built:
        postings, n_documents = gather_postings(self._codes, start, counts, check=self._check_stopped)
        lap("read")
        table = self._statistics(postings, n_documents)
        lap("statistics")
        data, meta = encode_grouped(start, postings.indptr, postings.rows, postings.values)
        lap("encode")
        return [data], meta, table

    def _large_range(self, latent: int, counts: npt.NDArray[np.int64], lap: Callable[[str], None]) -> _Built:
        """Do the same for one latent whose postings do not fit into memory."""
        dtype = VALUE_DTYPES[self._codes.value_dtype]
        with LargeLatent(latent, int(counts[0]), dtype) as gatherer:
            n_documents = gather_codes(self._codes, gatherer, check=self._check_stopped)
            lap("read")
            built = gatherer.finish(
                n_rows=self._codes.n_rows,
                n_documents=n_documents,
                decoder_norms=self._dictionary.decoder_norms()[latent : latent + 1],
            )
            lap("encode")
        return built

    def _statistics(self, postings: RangePostings, n_documents: int) -> pa.Table:
        first = postings.first_latent
        return latent_statistics(
            postings,
            n_rows=self._codes.n_rows,
            n_documents=n_documents,
            decoder_norms=self._dictionary.decoder_norms()[first : first + postings.n_latents],
        )

    def _with_promoted(self, table: pa.Table, start: int, stop: int) -> pa.Table:
        vocabulary = self._codes.run.tokenization.vocabulary()
        ends = None
        if self._unembedding is not None:

            def directions(first: int, last: int) -> npt.NDArray[np.float32]:
                self._check_stopped()
                return self._dictionary.decoder(np.arange(start + first, start + last))

            ids = vocabulary["token_id"].to_numpy()
            ends = promoted_ends(directions, stop - start, self._unembedding, ids, device=self._device)
        for name, column in promoted_columns(ends, stop - start, vocabulary).items():
            table = table.append_column(LATENT_STATS_SCHEMA.field(name), column)
        return table

    def _check_stopped(self) -> None:
        if self._stopped:
            raise StorageError(
                ErrorKind.INTERRUPTED, "building postings was stopped: run the same again to finish them"
            )


def _complete_codes(store: Store, codes_id: str) -> Codes:
    """Return complete codes by their id; `store` is moved to the newest version."""
    collection = store.refresh().state.collection("codes", codes_id)
    if not collection.is_sealed:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"codes {codes_id!r} have {len(collection.units)} units and are not complete: postings are built of complete codes; "
            f"run actstore sae encode again to finish them",
        )
    return store.run(str(collection.config["run"])).codes(str(collection.config["dictionary"]))


def _report(store: Store, id: str, units_this_job: int, elapsed_s: float) -> PostingsReport:
    found = store.refresh().state.collection(KIND, id)
    return PostingsReport(
        postings=id,
        version=store.version,
        is_complete=found.is_sealed,
        n_units=len(found.units),
        n_units_planned=len(found.config["boundaries"]) - 1,
        n_postings=found.rows,
        nbytes=found.nbytes,
        units_this_job=units_this_job,
        elapsed_s=elapsed_s,
        no_promoted=found.info.get("no_promoted"),
    )
