"""What happens, in order, when a model's activations over a corpus are ingested as a run?

Model and hook points are checked first, then the corpus is tokenized (once for all models that share the tokenizer), the
run is created or found, taken over from any earlier job, its missing units are computed and committed, and when all are
there it is sealed. Each step can be repeated: running the same configuration again finishes what is not done and changes
nothing that is.
"""

import contextlib
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import actstore
from actstore.codec.spec import ShardSpec, plan_spec
from actstore.errors import ConflictError, ErrorKind, InvalidInputError
from actstore.log import fingerprint
from actstore.log.values import Collection, Create
from actstore.store import Store, open_store
from actstore.tokenization import Tokenization

from .backend import Backend, open_backend
from .batches import BATCH_PLAN_VERSION
from .committer import KIND, Committer, take_over
from .config import DTYPES, IngestConfig, config_differences
from .host import ModelDescription
from .scheduler import Counters, Progress, Scheduler
from .tokenizing import tokenize_corpus
from .unit import RunPlan, WrittenUnit

_MAX_WINDOW = 4096


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What an ingest did."""

    run: str
    version: int
    is_complete: bool
    """False when the job was stopped before its end; run the same again to go on."""
    n_units: int
    """Units the run has now."""
    n_units_planned: int
    n_rows: int
    nbytes: int
    """Stored bytes of the run."""
    nonfinite: int
    rows_this_job: int
    units_this_job: int
    retries: int
    elapsed_s: float
    """Time spent on units: loading the model and tokenizing not counted."""

    @property
    def rows_per_s(self) -> float:
        """Token rows computed and committed per second by this job."""
        return self.rows_this_job / self.elapsed_s if self.elapsed_s else 0.0


def run_ingest(
    store: Store | str | os.PathLike[str],
    config: IngestConfig,
    *,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    backend: Backend | None = None,
) -> IngestReport:
    """Ingest a run, or finish one that was begun; idempotent.

    Cost: one forward pass over the corpus's tokens for all hook points together; memory per worker is the model and two
    units' rows of every hook point, whatever the size of the corpus.

    Args:
        store: A store, or where it is.
        config: What to do.
        progress: Called after every commit.
        notice: Called with a line of text as each step begins.
        stop: When set, no new unit is begun, those running are finished and committed, and the report says so. Once units
            run, SIGINT and SIGTERM do the same when this is called in the main thread; a second SIGINT interrupts.
        backend: Where the model runs, closed at the end; None for what `config.ray_address` says.

    Returns:
        What was done. `store`, if it was a `Store`, is moved to the new version.

    Raises:
        NotFoundError: no such corpus, model or hook point.
        InvalidInputError: a setting that cannot work, or activations that are not finite.
        ConflictError: a run of that name exists with another configuration (the difference is shown), or a newer job has
            taken the run over.
        StorageError: the storage or the workers failed; run the same again.
    """
    config = config.check()
    say = notice or (lambda _: None)
    stop = stop or threading.Event()
    if not isinstance(store, Store):
        store = open_store(store)
    store.refresh().corpus(config.corpus)
    say(f"loading {config.model}")
    backend = backend or open_backend(config, store)
    try:
        model = backend.describe()
        _stored_dtype(config, model)  # refused before the corpus is tokenized
        tokenization = _tokenize(store, config, model, say)
        collection = _create_or_find(store, config, model, tokenization)
        if collection.is_sealed:
            say(f"run {config.run} is complete already")
            return _report(store, config.run, Counters(), 0, 0.0)
        # Only now: before, there is no unit to wait for, and an interrupt should end loading or tokenizing at once.
        with _stop_on_signals(stop):
            return _run_units(store, config, backend, collection, progress, say, stop)
    finally:
        backend.close()


def _tokenize(
    store: Store, config: IngestConfig, model: ModelDescription, say: Callable[[str], None]
) -> Tokenization:
    say(f"tokenizing {config.corpus}")
    if config.window is not None and model.context is not None and config.window > model.context:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"window is {config.window} tokens, but {config.model!r} has a context of {model.context}: choose at most that",
        )
    report = tokenize_corpus(
        store,
        config.corpus,
        config.tokenizer or config.model,
        revision=None if config.tokenizer else config.revision,
        window=config.window or min(model.context or 1024, _MAX_WINDOW),
        overlap=config.overlap,
        rows_per_unit=config.rows_per_unit,
    )
    tokenization = store.refresh().tokenization(report.id)
    largest = max(tokenization.vocabulary()["token_id"].to_pylist(), default=-1)
    if model.vocab_size is not None and largest >= model.vocab_size:
        raise InvalidInputError(
            ErrorKind.BAD_TOKENIZER,
            f"the tokenizer has token ids up to {largest}, but {config.model!r} knows only {model.vocab_size}: "
            "they do not belong together; give the model's own tokenizer",
        )
    return tokenization


def _stored_dtype(config: IngestConfig, model: ModelDescription) -> str:
    stored = model.compute_dtype if config.dtype == "auto" else DTYPES[config.dtype]
    if config.codec == "cold" and stored != "bfloat16":
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"codec 'cold' is for bfloat16 and would barely shrink {stored}: store bf16, or use hot or lz4",
        )
    return stored


def run_config(
    config: IngestConfig, model: ModelDescription, tokenization: Tokenization
) -> tuple[dict[str, Any], dict[str, ShardSpec]]:
    """Return what shapes the run's numbers, as stored and fingerprinted, and the shard layout by hook point."""
    stored = _stored_dtype(config, model)
    specs = {
        name: plan_spec(
            rows_per_unit=tokenization.rows_per_unit, d_model=width, dtype=stored, codec=config.codec
        )
        for name, width in model.hook_points
    }
    return {
        "format": 1,
        "model": dict(model.fingerprint),
        "tokenization": tokenization.id,
        "tokenization_fingerprint": tokenization.collection.fingerprint,
        "rows_per_unit": tokenization.rows_per_unit,
        "hook_points": [{"name": name, "d_model": width} for name, width in model.hook_points],
        "dtype": stored,
        "compute_dtype": model.compute_dtype,
        "codec": config.codec,
        "rows_per_shard": {name: spec.rows_per_shard for name, spec in specs.items()},
        "rows_per_chunk": {name: spec.rows_per_chunk for name, spec in specs.items()},
        "batch_tokens": config.batch_tokens,
        "batch_plan": BATCH_PLAN_VERSION,
        "equal_lengths": model.equal_lengths,
        "attn_implementation": model.attn_implementation,
        "nonfinite": config.nonfinite,
    }, specs


def _create_or_find(
    store: Store, config: IngestConfig, model: ModelDescription, tokenization: Tokenization
) -> Collection:
    wanted, _ = run_config(config, model, tokenization)
    existing = store.state.collections.get((KIND, config.run))
    if existing is None:
        info = {
            # A folder is to be found again from wherever a text is asked about.
            "model_source": os.path.abspath(config.model) if os.path.isdir(config.model) else config.model,
            "tokenizer_source": config.tokenizer or config.model,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": platform.node(),
            "actstore": actstore.__version__,
        }
        try:
            store.log.commit([Create(KIND, config.run, wanted, info)], txn=uuid.uuid4().hex)
        except ConflictError:
            # Another job may have been first: what it made is compared below. Anything else is the caller's to know.
            if (KIND, config.run) not in store.refresh().state.collections:
                raise
        existing = store.refresh().state.collection(KIND, config.run)
    if existing.fingerprint != fingerprint(wanted):
        lines = "\n  ".join(config_differences(existing.config, wanted))
        raise ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"run {config.run!r} exists with another configuration (stored -> asked):\n  {lines}\n"
            "Give the same settings to go on with it, or another run name",
        )
    return existing


def _run_units(
    store: Store,
    config: IngestConfig,
    backend: Backend,
    collection: Collection,
    progress: Callable[[Progress], None] | None,
    say: Callable[[str], None],
    stop: threading.Event,
) -> IngestReport:
    tokenization = store.tokenization(collection.config["tokenization"])
    specs = {
        h["name"]: _spec(collection, h["name"], int(h["d_model"])) for h in collection.config["hook_points"]
    }
    plan = RunPlan(
        run=config.run,
        fingerprint=collection.fingerprint,
        epoch=take_over(store.log, config.run),
        tokenization=tokenization.id,
        specs=specs,
        rows_per_unit=tokenization.rows_per_unit,
        nonfinite=config.nonfinite,
    )
    run = store.refresh().state.collection(KIND, config.run)
    units = [u.unit for u in tokenization.units]
    pending = [u for u in units if u not in run.units]
    say(f"computing {len(pending)} of {len(units)} units of {config.run}")
    started = time.monotonic()
    tally = {"units": len(run.units), "rows": run.rows, "new_rows": 0}

    def on_commit(batch: Sequence[WrittenUnit], counters: Counters) -> None:
        rows = sum(u.rows for u in batch)
        tally["units"] += len(batch)
        tally["rows"] += rows
        tally["new_rows"] += rows
        if progress is not None:
            progress(
                Progress(
                    units_done=tally["units"],
                    units_total=len(units),
                    rows_done=tally["rows"],
                    rows_total=tokenization.n_rows,
                    rows_this_job=tally["new_rows"],
                    elapsed_s=time.monotonic() - started,
                    retries=counters.retries,
                )
            )

    scheduler = Scheduler(
        backend.start(store, plan),
        backend.commit,
        max_attempts=config.max_attempts,
        commit_units=config.commit_units,
        commit_interval_s=config.commit_interval_s,
        stop=stop,
        on_commit=on_commit,
    )
    counters = scheduler.run(pending)
    elapsed = time.monotonic() - started
    if not counters.abandoned:
        Committer(store.log, store.objects, plan).seal(n_units=len(units))
    return _report(store, config.run, counters, tally["new_rows"], elapsed)


def _spec(collection: Collection, name: str, width: int) -> ShardSpec:
    config = collection.config
    return ShardSpec(
        rows_per_shard=int(config["rows_per_shard"][name]),
        rows_per_chunk=int(config["rows_per_chunk"][name]),
        d_model=width,
        dtype=config["dtype"],
        codec=config["codec"],
    )


def _report(store: Store, run: str, counters: Counters, new_rows: int, elapsed_s: float) -> IngestReport:
    collection = store.refresh().state.collection(KIND, run)
    tokenization = store.tokenization(collection.config["tokenization"])
    return IngestReport(
        run=run,
        version=store.version,
        is_complete=collection.is_sealed,
        n_units=len(collection.units),
        n_units_planned=len(tokenization.units),
        n_rows=collection.rows,
        nbytes=collection.nbytes,
        nonfinite=collection.nonfinite,
        rows_this_job=new_rows,
        units_this_job=counters.committed,
        retries=counters.retries,
        elapsed_s=elapsed_s,
    )


@contextlib.contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on the first SIGINT or SIGTERM; a second SIGINT interrupts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {}

    def handle(number: int, _frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            # None: not installed from Python, and not to be had back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
