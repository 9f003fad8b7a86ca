"""How are the units of any collection computed and committed: codes, postings, whatever a task makes of a unit number?

A task is opened once per worker process and then turns unit numbers into `WrittenUnit`s; `run_unit_job` has them run in
this process or in Ray actors, and committed, with the scheduler, committer and epochs of an ingest. Units are idempotent:
their objects have keys of their own per attempt (FORMAT.md, section 3), and a unit that is live already stays as it is.
`unit_collection.py` has what comes before and after: creating and sealing the collection.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from actstore.errors import ActstoreError, ErrorKind, InvalidInputError
from actstore.log.values import Collection
from actstore.store import Store

from .committer import CommitTarget, UnitCommitter, take_over
from .events import Collector, JobEvents, ray_sinks
from .flow import Counters, Outcome, Pool, Progress
from .local_pool import LocalPool
from .scheduler import Limits, Scheduler
from .signals import stop_on_signals
from .task_host import TaskHost, TaskPlace, UnitTask
from .unit import WrittenUnit

_SHOWN = 3


def run_unit_job(
    store: Store,
    *,
    kind: str,
    id: str,
    task: UnitTask,
    pending: Sequence[int],
    rows_of: Callable[[int], int],
    ray_address: str | None = None,
    workers: int = 1,
    device: str = "cpu",
    gpus_per_worker: int | None = None,
    max_attempts: int = 3,
    commit_units: int = 64,
    commit_interval_s: float = 5.0,
    retry_s: float = 120.0,
    start_timeout_s: float = 900.0,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    collector: Collector | None = None,
) -> Outcome:
    """Compute and commit the pending units of a collection, and return how they ended; idempotent.

    An earlier job of the same collection that is still alive is fenced off first. Nothing is sealed.

    Args:
        store: Moved to the newest version, before and after.
        kind: Of the collection.
        id: Of the collection, which exists (`ensure_collection`).
        task: Runs units.
        pending: Units to run, in this order.
        rows_of: What a unit counts, for progress and as proof that it was read whole.
        ray_address: As in `IngestConfig`; None runs in this process.
        workers: Ray actors; 1 in this process.
        device: What Ray workers reserve: `cpu`, or `auto` and `cuda` for GPUs.
        gpus_per_worker: As in `IngestConfig`.
        max_attempts: Times a unit is tried on errors that may pass.
        commit_units: Units per commit at most.
        commit_interval_s: Longest that a finished unit waits for its commit.
        retry_s: Seconds for which a failing storage is borne.
        start_timeout_s: Seconds for which Ray workers may wait for a place.
        progress: Called after every commit.
        notice: Called with lines of text.
        stop: When set, no unit is begun any more, those running are finished (within 25 s) and committed. SIGINT and SIGTERM
            do the same when this is called in the main thread; a second SIGINT interrupts.
        collector: Keeps the numbers of `actstore.ingest.events`.

    Returns:
        `stopped` tells whether units are left. No unit in it has failed: that raises.

    Raises:
        ActstoreError: a unit failed for good (class and kind of the first one; all others are committed), the job was fenced
            off, or storage or workers failed for good. Run the same again.
    """
    if ray_address is None and workers > 1:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"workers must be 1 without Ray, got {workers}: give a ray_address to use more",
        )
    stop = stop or threading.Event()
    events = JobEvents(id, notice=notice or (lambda _: None), collector=collector)
    existing = store.refresh().state.collection(kind, id)
    if not pending:
        return Outcome(Counters(), (), stopped=False)
    target = CommitTarget(kind, id, existing.fingerprint, take_over(store.log, id, kind=kind))
    collection = store.refresh().state.collection(kind, id)
    pending = [unit for unit in pending if unit not in collection.units]
    place = TaskPlace(
        id, task, store.url, store.version, store.storage_options, ray_address=ray_address, workers=workers,
        device=device, gpus_per_worker=gpus_per_worker, start_timeout_s=start_timeout_s,
    )  # fmt: skip
    limits = Limits(
        max_attempts=max_attempts, commit_units=commit_units, commit_interval_s=commit_interval_s,
        backlog_units=4 * commit_units, retry_s=retry_s,
    )  # fmt: skip
    backend = _open_backend(place, store, events)
    try:
        events.export(ray_sinks())
        with stop_on_signals(stop, events.say):
            scheduler = Scheduler(
                backend.start_job(store, None, target),
                backend.commit,
                rows_of=rows_of,
                limits=limits,
                stop=stop,
                on_commit=_reporter(collection, pending, rows_of, progress),
                events=events,
            )
            events.log("begun", kind=kind, epoch=target.epoch, pending=len(pending))
            outcome = scheduler.run(pending)
    finally:
        backend.close()
    store.refresh()
    if outcome.failed:
        raise _failure(kind, id, outcome)
    return outcome


class _Backend(Protocol):
    def start_job(self, store: Store, job: Any, target: CommitTarget) -> Pool: ...
    def commit(self, units: Sequence[WrittenUnit]) -> None: ...
    def close(self) -> None: ...


class _LocalBackend:
    """The task in this process, on the store as it is: a memory:// store is no other process's."""

    def __init__(self, place: TaskPlace, store: Store) -> None:
        self._host = TaskHost(place, store=store)
        self._host.describe()
        self._pool: LocalPool | None = None
        self._committer: UnitCommitter | None = None

    def start_job(self, store: Store, job: Any, target: CommitTarget) -> Pool:
        self._committer = UnitCommitter(store.log, target)
        self._pool = LocalPool(lambda unit: self._host.run_job_unit(job, unit), interrupt=self._host.stop)
        return self._pool

    def commit(self, units: Sequence[WrittenUnit]) -> None:
        assert self._committer is not None
        self._committer.commit(units)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def _open_backend(place: TaskPlace, store: Store, events: JobEvents) -> _Backend:
    if place.ray_address is None:
        return _LocalBackend(place, store)
    from .ray_backend import RayBackend

    backend = RayBackend(place, store, host=TaskHost, events=events)
    try:
        backend.describe()
    except BaseException:
        backend.close()
        raise
    return backend


def _reporter(
    collection: Collection,
    pending: Sequence[int],
    rows_of: Callable[[int], int],
    progress: Callable[[Progress], None] | None,
) -> Callable[[Sequence[WrittenUnit], Counters], None]:
    started = time.monotonic()
    rows_pending = sum(map(rows_of, pending))

    def report(_: Sequence[WrittenUnit], counters: Counters) -> None:
        if progress is not None:
            progress(
                Progress(
                    units_done=len(collection.units) + counters.committed,
                    units_total=len(collection.units) + len(pending),
                    rows_done=collection.rows + counters.rows_committed,
                    rows_total=collection.rows + rows_pending,
                    rows_this_job=counters.rows_committed,
                    elapsed_s=time.monotonic() - started,
                    retries=counters.retries,
                    failed=counters.failed,
                )
            )

    return report


def _failure(kind: str, id: str, outcome: Outcome) -> ActstoreError:
    first = outcome.failed[0]
    n = outcome.counters.failed
    shown = "; ".join(
        f"unit {f.unit} ({f.tries} tr{'y' if f.tries == 1 else 'ies'}): {f.error.message:.500}"
        for f in outcome.failed[:_SHOWN]
    )
    more = f"; and {n - _SHOWN} more" if n > _SHOWN else ""
    error = type(first.error)(
        first.error.kind,
        f"{n} of {outcome.counters.planned} units of {kind} {id!r} failed: {shown}{more}. The other units are committed: run "
        "the same again to try these once more",
    )
    error.__cause__ = first.error.__cause__ or first.error
    return error
