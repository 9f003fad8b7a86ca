"""What did an ingest do, and which documents are in the units that failed?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actstore.corpus import SOURCE_KEY
from actstore.errors import ActstoreError, ErrorKind, StorageError
from actstore.store import Store
from actstore.tokenization import Tokenization

from .committer import KIND
from .events import JobEvents
from .flow import Counters, FailedUnit, Outcome

_NAMED_UNITS, _NAMED_DOCUMENTS, _IN_MESSAGE = 20, 5, 3


@dataclass(frozen=True, slots=True)
class UnitFailure:
    """A unit that this job gave up."""

    unit: int
    rows: int
    tries: int
    reason: str
    documents: tuple[str, ...]
    """The first few in it: `doc_id (source key)`."""
    n_documents: int


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
    """Rows the run has now; where a sample is kept, the rows of the sample."""
    nbytes: int
    """Stored bytes of the run."""
    nonfinite: int
    rows_this_job: int
    """Token rows computed and committed by this job, all of them counted where a sample is kept."""
    units_this_job: int
    retries: int
    elapsed_s: float
    """Time spent on units: loading the model and tokenizing not counted."""
    quarantined: Mapping[int, str] = field(default_factory=dict)
    """Units that the complete run does without, and why."""
    failures: tuple[UnitFailure, ...] = ()
    """Units that this job gave up."""
    counters: Counters = field(default_factory=Counters)
    self_check: Mapping[str, Any] | None = None
    """What running some documents again found; see `actstore.ingest.self_check`."""
    timings_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds that workers spent in each stage of units, summed over workers; `all` from submission to result."""
    idle_share: float | None = None
    """Share of the workers' time in which their model computed nothing."""

    @property
    def rows_per_s(self) -> float:
        """Token rows computed and committed per second by this job."""
        return self.rows_this_job / self.elapsed_s if self.elapsed_s else 0.0


def make_report(
    store: Store, run: str, *, outcome: Outcome | None = None, events: JobEvents, elapsed_s: float = 0.0
) -> IngestReport:
    """Return the report of a job; reads the newest version.

    Args:
        store: Moved to the newest version.
        run: The run.
        outcome: How the units ended, their documents found; None where none was run.
        events: Of the job.
        elapsed_s: Seconds spent on units.
    """
    collection = store.refresh().state.collection(KIND, run)
    tokenization = store.tokenization(collection.config["tokenization"])
    seal = {} if collection.seal is None else collection.seal.meta
    outcome = outcome or Outcome(Counters(), (), stopped=False)
    return IngestReport(
        run=run,
        version=store.version,
        is_complete=collection.is_sealed,
        n_units=len(collection.units),
        n_units_planned=len(tokenization.collection.units),
        n_rows=collection.rows,
        nbytes=collection.nbytes,
        nonfinite=collection.nonfinite,
        rows_this_job=outcome.counters.rows_committed,
        units_this_job=outcome.counters.committed,
        retries=outcome.counters.retries,
        elapsed_s=elapsed_s,
        quarantined={int(unit): str(reason) for unit, reason in dict(seal.get("quarantined", {})).items()},
        failures=tuple(
            UnitFailure(f.unit, f.rows, f.tries, f.reason, f.documents, f.n_documents) for f in outcome.failed
        ),
        counters=outcome.counters,
        self_check=seal.get("self_check"),
        timings_s=events.collector.stages(),
        idle_share=events.idle_share,
    )


def with_documents(tokenization: Tokenization, failed: Sequence[FailedUnit]) -> tuple[FailedUnit, ...]:
    """Return the failed units with the documents in them, as far as they can be read; of the first twenty units."""
    return tuple(
        _with_documents(tokenization, unit) if i < _NAMED_UNITS else unit for i, unit in enumerate(failed)
    )


def failure_error(run: str, outcome: Outcome, allow_failed: int) -> ActstoreError:
    """Return the error of a job with more failed units than may be left out; of the class of the first unit's error."""
    first = outcome.failed[0].error
    n = outcome.counters.failed
    shown = "; ".join(map(_describe, outcome.failed[:_IN_MESSAGE]))
    more = f"; and {n - _IN_MESSAGE} more" if n > _IN_MESSAGE else ""
    error = type(first)(
        first.kind,
        f"{n} of {outcome.counters.planned} units of run {run!r} failed, {allow_failed} may be left out: {shown}{more}. The "
        "other units are committed: run the same again to try these once more, or with allow_failed to complete the run "
        "without them",
    )
    error.__cause__ = first.__cause__ or first
    return error


def nothing_succeeded(run: str, outcome: Outcome) -> ActstoreError:
    """Return the error of a run in which every unit failed: there is nothing to complete."""
    return StorageError(
        ErrorKind.WORKER_FAILED,
        f"all units of run {run!r} failed, so there is nothing to seal: {_describe(outcome.failed[0])}",
    )


def _describe(failed: FailedUnit) -> str:
    documents = ", ".join(failed.documents) + (", ..." if failed.n_documents > len(failed.documents) else "")
    what = (
        f"{failed.rows} rows, {failed.n_documents} documents: {documents}"
        if documents
        else f"{failed.rows} rows"
    )
    tries = "1 try" if failed.tries == 1 else f"{failed.tries} tries"
    return f"unit {failed.unit} ({what}) after {tries}: {failed.error.message:.500}"


def _with_documents(tokenization: Tokenization, failed: FailedUnit) -> FailedUnit:
    try:
        doc_ids = tokenization.unit_table(failed.unit, ["doc_id"])["doc_id"].unique().to_pylist()
        first = doc_ids[:_NAMED_DOCUMENTS]
        corpus = tokenization.corpus
        keys = [None] * len(first)
        if SOURCE_KEY in corpus.columns:
            keys = corpus.documents(first, [SOURCE_KEY])[SOURCE_KEY].to_pylist()
    except ActstoreError:
        return failed  # what may have made the unit fail hides its documents too
    named = tuple(str(d) if k is None else f"{d} ({k})" for d, k in zip(first, keys, strict=True))
    return replace(failed, documents=named, n_documents=len(doc_ids))
