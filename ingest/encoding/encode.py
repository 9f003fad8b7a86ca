"""How do the stored rows of a run become codes in a dictionary, and codes postings?

`encode` creates the codes' collection (or finds it), encodes the run's units that are not encoded yet, seals the codes when
the run is complete, and has the postings and statistics of latents built. Each step is skipped where it is done: running the
same again finishes what is not done and changes nothing that is.
"""

import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import actstore
from actstore.codes import codes_id
from actstore.dictionary import Dictionary
from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.encoding.codes_job import CodesTask
from actstore.ingest.encoding.plan import KIND, POOL_TOP_M, CodesSettings, codes_config, codes_plan
from actstore.ingest.encoding.postings_plan import DEFAULT_MEMORY_BYTES as POSTINGS_MEMORY_BYTES
from actstore.ingest.events import Collector
from actstore.ingest.flow import Counters, Outcome, Progress
from actstore.ingest.unit_collection import ensure_collection, seal_collection
from actstore.ingest.unit_job import run_unit_job
from actstore.log.values import Collection
from actstore.run import Run
from actstore.store import Store, open_store

DEFAULT_MEMORY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What an encoding did."""

    codes: str
    """Id of the codes."""
    dictionary: str
    run: str
    version: int
    is_complete: bool
    """Whether codes and, if they were asked for, postings are complete; False when the job was stopped, or the run itself is
    not complete yet."""
    n_units: int
    """Units the codes have now."""
    n_units_planned: int
    """Units the run has now."""
    n_rows: int
    """Rows encoded."""
    n_codes: int
    """Codes that are not zero."""
    nbytes: int
    """Stored bytes of the codes, pooled codes included."""
    units_this_job: int
    rows_this_job: int
    retries: int
    elapsed_s: float
    """Time spent on encoding units."""
    has_postings: bool

    @property
    def rows_per_s(self) -> float:
        """Rows encoded per second by this job."""
        return self.rows_this_job / self.elapsed_s if self.elapsed_s else 0.0


def encode(
    store: Store | str | os.PathLike[str],
    dictionary: str,
    run: str,
    *,
    value_dtype: str = "float16",
    pool_top_m: int | None = POOL_TOP_M,
    pool_special: bool = False,
    compute_dtype: str = "float32",
    postings: bool = True,
    promoted: bool | None = None,
    ray_address: str | None = None,
    workers: int = 1,
    device: str = "auto",
    gpus_per_worker: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    postings_memory_bytes: int = POSTINGS_MEMORY_BYTES,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    collector: Collector | None = None,
) -> EncodeReport:
    """Encode a run's stored rows in a dictionary, or finish what was begun; idempotent.

    Cost: one product with the encoder for every row. Memory per worker: the encoder's (see `Encoder`), two units' codes, and
    `memory_bytes`, whatever the number of rows. A run that is not complete yet is encoded as far as it is.

    Args:
        store: A store, or where it is.
        dictionary: Name of a dictionary in it.
        run: Name of a run that keeps dense rows of the dictionary's hook point.
        value_dtype: Of the codes: float16 or float32.
        pool_top_m: Latents kept of each document in the pooled codes, those of the largest sums; None for all.
        pool_special: Whether special tokens enter pooled codes.
        compute_dtype: float32, or bfloat16 on a GPU, which is not exact.
        postings: Whether to go on and build postings and latent statistics once all is encoded.
        promoted: Whether the statistics say which vocabulary each latent promotes; see `build_postings`.
        ray_address: `local`, `auto` or `ray://host:port`; None runs in this process.
        workers: Ray actors, each with its own copy of the dictionary.
        device: Of the product; `auto` takes a GPU where there is one.
        gpus_per_worker: GPUs that each worker reserves; None for one, or a share of one, where there are GPUs.
        memory_bytes: For rows on their way from the storage.
        postings_memory_bytes: For building postings, see `build_postings`: the more, the less often all codes are read.
        progress: Called after every commit, first of codes and then of postings.
        notice: Called with a line of text as each step begins.
        stop: When set, no unit is begun any more; SIGINT and SIGTERM do the same while units run.
        collector: Keeps the numbers of `actstore.ingest.events`.

    Returns:
        What was done. `store`, if it was a `Store`, is moved to the new version.

    Raises:
        NotFoundError: no such dictionary or run.
        InvalidInputError: they do not fit, the run keeps no dense rows, a setting that cannot be, or a code too large for
            `value_dtype`; all other units are committed.
        ConflictError: they were encoded with other settings (the difference is shown), or a newer job took over.
        StorageError: storage or workers failed; run the same again.
    """
    settings = CodesSettings(value_dtype, pool_top_m, pool_special, compute_dtype).check()
    say = notice or (lambda _: None)
    stop = stop or threading.Event()
    if not isinstance(store, Store):
        store = open_store(store)
    collection = prepare_codes(store, dictionary, run, settings)
    task = CodesTask(codes_plan(collection), device, memory_bytes)
    source = store.run(run).collection
    # Units that an ingest commits together with their codes are never pending here.
    pending = [u for u in sorted(source.units) if u not in collection.units]
    outcome = Outcome(Counters(), (), stopped=False)
    began = time.monotonic()
    if pending:
        say(f"encoding {len(pending)} of {len(source.units)} units of {run} with {dictionary}")
        outcome = run_unit_job(
            store, kind=KIND, id=collection.id, task=task, pending=pending,
            rows_of=lambda unit: source.units[unit].rows, ray_address=ray_address, workers=workers, device=device,
            gpus_per_worker=gpus_per_worker, progress=progress, notice=notice, stop=stop, collector=collector,
        )  # fmt: skip
    elapsed_s = time.monotonic() - began
    if not outcome.stopped and not stop.is_set():
        finish_codes(
            store, collection.id, postings=postings, promoted=promoted, ray_address=ray_address, workers=workers,
            memory_bytes=postings_memory_bytes, progress=progress, notice=notice, stop=stop,
        )  # fmt: skip
    return _report(store, collection.id, outcome, elapsed_s, postings=postings)


def prepare_codes(store: Store, dictionary: str, run: str, settings: CodesSettings) -> Collection:
    """Return the codes of a run in a dictionary, created if there are none; `store` is moved to the newest version.

    Raises:
        NotFoundError, InvalidInputError, ConflictError: as `encode`.
    """
    from actstore.ingest.dictionaries.fits import check_fits

    found = store.refresh().dictionary(dictionary)
    of_run = store.run(run)
    hook_point = check_fits(found, of_run)
    existing = store.state.collections.get((KIND, codes_id(dictionary, run)))
    made_by_ingest = dictionary in of_run.collection.config.get("codes", {}).get("dictionaries", ())
    if existing is not None and made_by_ingest:  # of the rows that the model computed
        rows_dtype = str(existing.config["encoder"]["rows_dtype"])
    elif "dense" in of_run.keep:
        rows_dtype = str(of_run.collection.config["dtype"])
    else:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"run {run!r} keeps {', '.join(of_run.keep)} and no dense rows to encode: ingest with --keep codes --dictionary "
            f"{dictionary}, which encodes as it goes, or with --keep dense",
        )
    return ensure_codes(store, found, of_run, hook_point, settings, rows_dtype=rows_dtype)


def ensure_codes(
    store: Store,
    dictionary: Dictionary,
    run: Run,
    hook_point: str,
    settings: CodesSettings,
    *,
    rows_dtype: str,
) -> Collection:
    """Return the codes' collection, created if there is none; idempotent. Arguments as of `codes_config`.

    Raises:
        ConflictError: it exists with another configuration.
    """
    config = codes_config(dictionary, run, hook_point, settings, rows_dtype=rows_dtype)
    return ensure_collection(store, KIND, codes_id(dictionary.id, run.id), config, _info())


def finish_codes(
    store: Store,
    codes: str,
    *,
    postings: bool = True,
    promoted: bool | None = None,
    ray_address: str | None = None,
    workers: int = 1,
    memory_bytes: int = POSTINGS_MEMORY_BYTES,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> bool:
    """Seal codes whose run is complete and wholly encoded, and build their postings; return whether all of that is done.

    Idempotent: what is done stays as it is.

    Raises:
        ActstoreError: as `encode`.
    """
    collection = store.refresh().state.collection(KIND, codes)
    run = store.run(collection.config["run"]).collection
    if not run.is_sealed or any(u not in collection.units for u in run.units):
        return False
    seal_collection(store, KIND, codes, n_units=len(run.units))
    if not postings or (stop is not None and stop.is_set()):
        return False
    from actstore.ingest.encoding.postings_job import build_postings

    build_postings(
        store.refresh(),
        codes,
        ray_address=ray_address,
        workers=workers,
        memory_bytes=memory_bytes,
        promoted=promoted,
        progress=progress,
        notice=notice,
        stop=stop,
    )
    return has_postings(store.refresh(), codes)


def has_postings(store: Store, codes: str) -> bool:
    """Return whether the postings of codes are complete at the store's version."""
    found = store.state.collections.get(("postings", codes))
    return found is not None and found.is_sealed


def _info() -> dict[str, Any]:
    """Return what is stored with new codes and shapes nothing."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "actstore": actstore.__version__,
    }


def _report(store: Store, codes: str, outcome: Outcome, elapsed_s: float, *, postings: bool) -> EncodeReport:
    collection = store.refresh().state.collection(KIND, codes)
    config = collection.config
    done = has_postings(store, codes)
    return EncodeReport(
        codes=codes,
        dictionary=config["dictionary"],
        run=config["run"],
        version=store.version,
        is_complete=collection.is_sealed and (done or not postings),
        n_units=len(collection.units),
        n_units_planned=len(store.run(config["run"]).collection.units),
        n_rows=collection.rows,
        n_codes=sum(int(unit.meta["nnz"]) for unit in collection.units.values()),
        nbytes=collection.nbytes,
        units_this_job=outcome.counters.committed,
        rows_this_job=outcome.counters.rows_committed,
        retries=outcome.counters.retries,
        elapsed_s=elapsed_s,
        has_postings=done,
    )
