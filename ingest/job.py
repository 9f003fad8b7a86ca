"""What happens, in order, when a model's activations over a corpus are ingested as a run?

Model and hook points are checked first, then the corpus is tokenized (once for all models that share the tokenizer), the
run is created or found, taken over from any earlier job, its missing units are computed and committed, and when all are
there it is sealed. Each step can be repeated: running the same configuration again finishes what is not done and changes
nothing that is.
"""

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import actstore
from actstore.errors import ConflictError, ErrorKind, InvalidInputError
from actstore.log.values import Collection, Create
from actstore.store import Store, open_store
from actstore.tokenization import Tokenization

from .backend import Backend, open_backend
from .committer import KIND, Committer
from .config import IngestConfig, config_differences
from .cost import check_run_room
from .events import Collector, JobEvents, ray_sinks
from .flow import Counters, Outcome, Progress
from .host import ModelDescription
from .report import IngestReport as IngestReport
from .report import failure_error, make_report, nothing_succeeded, with_documents
from .run_codes import (
    check_dictionaries,
    codes_are_complete,
    ensure_run_codes,
    finish_run_codes,
    take_over_run,
)
from .run_plan import check_same_config, dtype_to_store, tokenize_settings
from .run_plan import run_config as run_config
from .scheduler import Limits, Scheduler
from .signals import stop_on_signals
from .tokenization_plan import plan_tokenization
from .tokenizing import tokenize_corpus
from .unit import RunPlan, WrittenUnit

_BACKLOG_BATCHES = 4
"""Batches that may be written and not committed before no unit is started any more."""


def run_ingest(
    store: Store | str | os.PathLike[str],
    config: IngestConfig,
    *,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    backend: Backend | None = None,
    collector: Collector | None = None,
) -> IngestReport:
    """Ingest a run, or finish one that was begun; idempotent.

    Cost: one forward pass over the corpus's tokens for all hook points together; memory per worker is the model and two
    units' rows of every hook point, whatever the size of the corpus.

    Args:
        store: A store, or where it is.
        config: What to do.
        progress: Called after every commit.
        notice: Called with a line of text as each step begins.
        stop: When set, no new unit is begun, those running are finished (within 25 s) and committed, and the report says
            so. Once units run, SIGINT and SIGTERM do the same when this is called in the main thread; a second SIGINT
            interrupts.
        backend: Where the model runs, closed at the end; None for what `config.ray_address` says.
        collector: Keeps the numbers of `actstore.ingest.events`.

    Returns:
        What was done. `store`, if it was a `Store`, is moved to the new version.

    Raises:
        NotFoundError: no such corpus, model or hook point.
        InvalidInputError: a setting that cannot work, or activations that are not finite in more units than
            `allow_failed`; all other units are committed.
        ConflictError: a run of that name exists with another configuration (the difference is shown), or a newer job has
            taken the run over.
        StorageError: the storage or the workers failed; run the same again.
    """
    config = config.check()
    events = JobEvents(config.run, notice=notice or (lambda _: None), collector=collector)
    stop = stop or threading.Event()
    if not isinstance(store, Store):
        store = open_store(store)
    store.refresh().corpus(config.corpus)
    events.say(f"loading {config.model}")
    backend = backend or open_backend(config, store, events=events)
    try:
        events.export(ray_sinks())
        model = backend.describe()
        dtype_to_store(config, model)  # refused before the corpus is tokenized
        check_dictionaries(store, config, model)
        tokenization = _tokenize(store, config, model, events.say)
        collection = _create_or_find(store, config, backend, model, tokenization, events.say)
        codes = ensure_run_codes(store, store.run(config.run))
        if collection.is_sealed:
            if codes_are_complete(store, codes):
                checked = (
                    "; its self-check is the one made when it was completed" if config.self_check else ""
                )
                events.say(f"run {config.run} is complete already{checked}")
            report = make_report(store, config.run, events=events)
        else:
            # Only now: before, there is no unit to wait for, and an interrupt should end loading or tokenizing at once.
            with stop_on_signals(stop, events.say):
                report = _run_units(store, config, backend, collection, codes, progress, events, stop)
    finally:
        backend.close()
    if not codes or not report.is_complete:
        return report
    # The workers are gone: those that build postings need their places.
    finish_run_codes(store, codes, config, notice=events.say, stop=stop)
    return replace(report, version=store.refresh().version, is_complete=codes_are_complete(store, codes))


def _tokenize(
    store: Store, config: IngestConfig, model: ModelDescription, say: Callable[[str], None]
) -> Tokenization:
    say(f"tokenizing {config.corpus}")
    if config.window is not None and model.context is not None and config.window > model.context:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"window is {config.window} tokens, but {config.model!r} has a context of {model.context}: choose at most that",
        )
    _check_same_tokenization(store, config, model)
    report = tokenize_corpus(
        store,
        config.corpus,
        config.tokenizer or config.model,
        **tokenize_settings(config, model),
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


def _check_same_tokenization(store: Store, config: IngestConfig, model: ModelDescription) -> None:
    """Raise before anything is tokenized for a run that was begun over another tokenization.

    Raises:
        ConflictError: CONFIG_DIFFERS: the settings of the two.
    """
    existing = store.state.collections.get((KIND, config.run))
    if existing is None:
        return
    planned = plan_tokenization(
        store, config.corpus, config.tokenizer or config.model, **tokenize_settings(config, model)
    )
    if planned.id != existing.config["tokenization"]:
        stored = store.state.collection("tokenization", existing.config["tokenization"])
        lines = "\n  ".join(config_differences(stored.config, planned.config))
        raise ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"run {config.run!r} exists over another tokenization (stored -> asked):\n  {lines}\n"
            "Give the same settings to go on with it, or another run name",
        )


def _create_or_find(
    store: Store,
    config: IngestConfig,
    backend: Backend,
    model: ModelDescription,
    tokenization: Tokenization,
    say: Callable[[str], None],
) -> Collection:
    existing = store.state.collections.get((KIND, config.run))
    if existing is None:
        wanted, _ = run_config(config, model, tokenization)
        info = _run_info(store, config, backend, model, tokenization, say)
        try:
            store.log.commit([Create(KIND, config.run, wanted, info)], txn=uuid.uuid4().hex)
        except ConflictError:
            # Another job may have been first: what it made is compared below. Anything else is the caller's to know.
            if (KIND, config.run) not in store.refresh().state.collections:
                raise
        existing = store.refresh().state.collection(KIND, config.run)
    wanted, _ = run_config(config, model, tokenization, existing=existing.config)
    check_same_config(existing, wanted)
    return existing


def _run_info(
    store: Store,
    config: IngestConfig,
    backend: Backend,
    model: ModelDescription,
    tokenization: Tokenization,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return what is fixed with a new run and not part of what two runs are compared by."""
    info: dict[str, Any] = {
        # A folder is to be found again from wherever a text is asked about.
        "model_source": os.path.abspath(config.model) if os.path.isdir(config.model) else config.model,
        "tokenizer_source": config.tokenizer or config.model,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "actstore": actstore.__version__,
    }
    if config.dtype == "int8" and "dense" in config.keep:
        from .calibrate import calibrate

        say("measuring the channels for int8")
        transforms = calibrate(backend, store, tokenization, model, config)
        info["int8"] = {name: transform.to_json() for name, transform in transforms.items()}
    return info


def _run_units(
    store: Store,
    config: IngestConfig,
    backend: Backend,
    collection: Collection,
    codes: Sequence[Collection],
    progress: Callable[[Progress], None] | None,
    events: JobEvents,
    stop: threading.Event,
) -> IngestReport:
    tokenization = store.tokenization(collection.config["tokenization"])
    plan = take_over_run(store, collection, codes)
    run = store.refresh().state.collection(KIND, config.run)
    units = tokenization.collection.units
    pending = [unit for unit in sorted(units) if unit not in run.units]
    check_run_room(store, plan, tokenization, pending)
    events.say(f"computing {len(pending)} of {len(units)} units of {config.run}")
    events.log("begun", epoch=plan.epoch, units=len(units), pending=len(pending))
    started = time.monotonic()
    rows_before = tokenization.n_rows - sum(units[u].rows for u in pending)

    def on_commit(_: Sequence[WrittenUnit], counters: Counters) -> None:
        if progress is not None:
            progress(
                Progress(
                    units_done=len(units) - len(pending) + counters.committed,
                    units_total=len(units),
                    rows_done=rows_before + counters.rows_committed,
                    rows_total=tokenization.n_rows,
                    rows_this_job=counters.rows_committed,
                    elapsed_s=time.monotonic() - started,
                    retries=counters.retries,
                    failed=counters.failed,
                )
            )

    scheduler = Scheduler(
        backend.start(store, plan),
        backend.commit,
        rows_of=lambda unit: units[unit].rows,
        limits=_limits(config),
        stop=stop,
        on_commit=on_commit,
        events=events,
    )
    outcome = scheduler.run(pending)
    elapsed = time.monotonic() - started
    if outcome.failed:
        outcome = Outcome(outcome.counters, with_documents(tokenization, outcome.failed), outcome.stopped)
    if not outcome.stopped and not stop.is_set():
        _finish(store, config, backend, plan, outcome, n_units=len(units), events=events, stop=stop)
    events.log("ended", committed=outcome.counters.committed, failed=outcome.counters.failed,
               abandoned=outcome.counters.abandoned, seconds=round(elapsed, 1))  # fmt: skip
    return make_report(store, config.run, outcome=outcome, events=events, elapsed_s=elapsed)


def _limits(config: IngestConfig) -> Limits:
    return Limits(
        max_attempts=config.max_attempts,
        commit_units=config.commit_units,
        commit_interval_s=config.commit_interval_s,
        backlog_units=_BACKLOG_BATCHES * config.commit_units,
        retry_s=config.retry_s,
        straggler_factor=config.straggler_factor,
        failed_kept=max(100, config.allow_failed),
    )


def _finish(
    store: Store,
    config: IngestConfig,
    backend: Backend,
    plan: RunPlan,
    outcome: Outcome,
    *,
    n_units: int,
    events: JobEvents,
    stop: threading.Event,
) -> None:
    """Check and seal the run, without the units that failed if so many may; leave it open if the job is stopped."""
    if outcome.counters.failed > config.allow_failed:
        raise failure_error(config.run, outcome, config.allow_failed)
    if outcome.failed and outcome.counters.failed == n_units:
        raise nothing_succeeded(config.run, outcome)
    meta: dict[str, Any] = {}
    if config.self_check > 0:
        from .self_check import check_run

        events.say("checking documents of the run against plain transformers")
        try:
            stoppable = _StopBetweenCalls(backend, stop)
            meta["self_check"] = check_run(
                stoppable, store, config.run, config.self_check, config.seed, events.say
            )
        except _StoppedError:
            return
    quarantined = {failed.unit: failed.reason for failed in outcome.failed}
    Committer(store.log, store.objects, plan).seal(n_units=n_units, quarantined=quarantined, meta=meta)
    events.log("sealed", units=n_units - len(quarantined), quarantined=len(quarantined))


class _StoppedError(Exception):
    """The job was asked to stop between two calls to a worker."""


class _StopBetweenCalls:
    """A backend whose calls end the job's last step once it is asked to stop."""

    def __init__(self, backend: Backend, stop: threading.Event) -> None:
        self._backend = backend
        self._stop = stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def call(self, method: str, *args: Any) -> Any:
        if self._stop.is_set():
            raise _StoppedError
        return self._backend.call(method, *args)
