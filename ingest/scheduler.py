"""In which order do units run and get committed, and when is enough enough?

The scheduler hands units to a pool (this process, or Ray actors), keeps it fed without running ahead of it, has finished
units committed in batches beside that, retries what may pass, gives a second worker what takes too long, and stops when it
is told to. Everything it holds is bounded: tries in flight by the pool's capacity, units written and not committed yet by
`backlog_units` and what is in flight. When commits are slow, it stops starting units.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actstore.errors import ActstoreError, ErrorKind, StorageError

from .commits import Commits
from .events import JobEvents
from .failures import Failures, as_error
from .flow import Completion as Completion
from .flow import Counters as Counters
from .flow import FailedUnit, Outcome
from .flow import Pool as Pool
from .flow import Progress as Progress
from .unit import WrittenUnit

_MEDIAN_OF = 512
"""Units whose time is remembered."""
_MEDIAN_LEAST = 3
_MOST_COPIES = 2
_COPY_LEAST_S = 1.0
"""No unit is slow before this: a second copy costs more than a hiccup."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at once, how often, how long."""

    max_attempts: int = 3
    commit_units: int = 64
    commit_interval_s: float = 5.0
    backlog_units: int = 256
    """Units written and not committed, above which none is started."""
    retry_s: float = 120.0
    """Seconds for which a failing storage is borne."""
    straggler_factor: float = 4.0
    grace_s: float = 25.0
    """Seconds that units in flight have to end once the job stops: spot machines give 30."""
    drain_s: float = 5.0
    """Seconds beyond, for their commit."""
    failed_kept: int = 100
    """Failed units that are remembered; all are counted."""


@dataclass(slots=True)
class _Running:
    started_s: float
    tries: int = 1
    """In flight at once: 2 with a second copy."""
    copies: int = 0
    """Started so far."""


class Scheduler:
    """Runs pending units through a pool and commits them."""

    def __init__(
        self,
        pool: Pool,
        commit: Callable[[Sequence[WrittenUnit]], object],
        *,
        rows_of: Callable[[int], int],
        limits: Limits,
        stop: threading.Event,
        on_commit: Callable[[Sequence[WrittenUnit], Counters], None],
        events: JobEvents,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a scheduler for one call of `run`.

        Args:
            pool: Runs the units.
            commit: Commits a batch; idempotent, called from a thread of its own.
            rows_of: Token rows that the tokenization has in a unit: what its reading and its forward pass must count.
            limits: Bounds.
            stop: When set, no unit is begun any more.
            on_commit: Called after each commit, in the thread of `run`.
            events: Told what happens.
            clock: Seconds.
        """
        self._pool = pool
        self._rows_of = rows_of
        self._limits = limits
        self._stop = stop
        self._on_commit = on_commit
        self._events = events
        self._clock = clock
        self._commits = Commits(commit, retry_s=limits.retry_s, events=events)
        self._failures = Failures(max_attempts=limits.max_attempts, retry_s=limits.retry_s, clock=clock)
        self._counters = Counters()
        self._queue: deque[int] = deque()
        self._running: dict[int, _Running] = {}
        self._tries_in_flight = 0
        self._written: list[WrittenUnit] = []
        self._oldest_s = 0.0
        self._seconds: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._failed: list[FailedUnit] = []
        self._fatal: ActstoreError | None = None
        self._halted_s: float | None = None

    def run(self, pending: Sequence[int]) -> Outcome:
        """Run every pending unit, or those begun before `stop` was set, and commit what was written.

        Units that fail for good do not end the job: they are in the outcome.

        Raises:
            ActstoreError: the job as a whole is broken: fenced off, no workers, storage down, counts that do not agree.
                What had been written by then is committed first, as far as that is possible.
        """
        counters = self._counters
        self._queue.extend(pending)
        counters.planned = len(pending)
        counters.rows_planned = sum(map(self._rows_of, pending))
        while self._queue or self._running:
            self._halt_if_due()
            if self._halted_s is not None and (not self._running or self._clock() >= self._deadline_s()):
                break
            self._feed()
            self._copy_stragglers()
            for done in self._next():
                self._settle(done)
            self._flush(force=False)
            self._tick()
        if self._running:
            self._events.log("abandoned", units=len(self._running))
            self._pool.abandon()
        self._drain()
        self._tick(at_once=True)
        return self._finish()

    def _halt_if_due(self) -> None:
        if self._halted_s is None and (self._stop.is_set() or self._fatal is not None):
            self._halted_s = self._clock()
            why = "stopped" if self._fatal is None else str(self._fatal)
            self._events.log("halting", why=why, in_flight=len(self._running), left=len(self._queue))

    def _deadline_s(self) -> float:
        assert self._halted_s is not None
        return self._halted_s + self._limits.grace_s

    def _feed(self) -> None:
        if self._halted_s is not None or self._failures.hold_s:
            return
        while self._queue and self._has_room():
            unit = self._queue.popleft()
            self._running[unit] = _Running(self._clock())
            self._pool.submit(unit)
            self._tries_in_flight += 1

    def _has_room(self) -> bool:
        capacity = min(self._pool.capacity, 1) if self._failures.is_probing else self._pool.capacity
        return self._tries_in_flight < capacity and self._backlog() < self._limits.backlog_units

    def _backlog(self) -> int:
        return len(self._written) + len(self._commits.batch)

    def _copy_stragglers(self) -> None:
        """Start units that take too long a second time, where nothing else is left to start."""
        factor = self._limits.straggler_factor
        if self._queue or self._halted_s is not None or not factor or len(self._seconds) < _MEDIAN_LEAST:
            return
        slow_s = max(_COPY_LEAST_S, factor * statistics.median(self._seconds))
        for unit, running in self._running.items():
            ran_s = self._clock() - running.started_s
            due = running.tries == 1 and running.copies < _MOST_COPIES and ran_s > slow_s
            if due and self._pool.submit_copy(unit):
                running.tries += 1
                running.copies += 1
                self._tries_in_flight += 1
                self._counters.copies += 1
                self._events.unit_copied(unit, ran_s)

    def _next(self) -> Sequence[Completion]:
        """Wait for something to happen: a try to end, a worker to join, a commit or a pause to end."""
        patience = self._patience_s()
        starved = bool(self._queue) and self._halted_s is None and not self._pool.capacity
        if self._tries_in_flight or starved:
            try:
                return self._pool.wait(patience)
            except ActstoreError as error:
                self._fatal = self._fatal or error
                self._queue.extendleft(self._running)  # with no workers nothing runs: all of it is abandoned
                self._running.clear()
                return ()
        if self._commits.batch:
            self._commits.wait(patience)
        elif self._failures.hold_s:
            self._stop.wait(min(patience, self._failures.hold_s))
        return ()

    def _patience_s(self) -> float:
        waits = [1.0]
        if self._written and not self._commits.batch:
            waits.append(self._oldest_s + self._limits.commit_interval_s - self._clock())
        if self._commits.batch:
            waits.append(0.25)
        if self._halted_s is not None:
            waits.append(self._deadline_s() - self._clock())
        return max(0.01, min(waits))

    def _settle(self, done: Completion) -> None:
        self._tries_in_flight -= 1
        running = self._running.get(done.unit)
        if running is None:
            return  # the other copy was first, or the unit was given up
        if done.written is not None:
            del self._running[done.unit]
            self._keep(done.written, self._clock() - running.started_s)
            return
        running.tries -= 1
        again = self._failures.failed(done, running.started_s)
        self._fatal = self._fatal or self._failures.verdict(done)
        if running.tries:
            return  # its copy may still succeed
        del self._running[done.unit]
        tries = self._failures.tries(done.unit)
        if again:
            self._counters.retries += 1
            self._events.unit_retried(done.unit, done.error, tries)
            self._queue.append(done.unit)
        else:
            self._give_up(done, tries)

    def _give_up(self, done: Completion, tries: int) -> None:
        rows = self._rows_of(done.unit)
        self._failures.forget(done.unit)
        self._counters.failed += 1
        self._counters.rows_failed += rows
        self._events.unit_failed(done.unit, done.error, tries)
        if len(self._failed) < self._limits.failed_kept:
            self._failed.append(FailedUnit(done.unit, rows, tries, as_error(done.error, done.unit, tries)))

    def _keep(self, written: WrittenUnit, seconds: float) -> None:
        expected = self._rows_of(written.unit)
        if not written.rows_read == written.rows_forwarded == expected:
            self._fatal = self._fatal or _count_error(written, expected)
            self._queue.append(written.unit)  # not committed: it ends as abandoned
            return
        if not self._written:
            self._oldest_s = self._clock()
        self._written.append(written)
        self._seconds.append(seconds)
        self._failures.succeeded(written.unit)
        self._counters.written += 1
        self._counters.rows_read += written.rows_read
        self._counters.rows_forwarded += written.rows_forwarded
        self._events.written(written, seconds)

    def _flush(self, *, force: bool) -> None:
        """Take the commit that has ended, and start the next one if it is due."""
        batch = self._commits.take()
        if batch:
            self._count_commit(batch)
        due = self._written and (
            force
            or len(self._written) >= min(self._limits.commit_units, self._limits.backlog_units)
            or self._clock() - self._oldest_s >= self._limits.commit_interval_s
        )
        if due and not self._commits.batch:
            batch = self._written[: self._limits.commit_units]
            del self._written[: len(batch)]
            self._commits.start(batch)

    def _count_commit(self, batch: Sequence[WrittenUnit]) -> None:
        counters = self._counters
        counters.committed += len(batch)
        counters.rows_committed += sum(self._rows_of(u.unit) for u in batch)
        counters.rows_stored += sum(u.rows for u in batch)
        counters.nbytes += sum(u.nbytes for u in batch)
        self._on_commit(batch, counters)

    def _drain(self) -> None:
        """Commit what is written; within what is left of the grace where the job was stopped."""
        while self._written or self._commits.batch:
            self._flush(force=True)
            self._commits.wait(0.25)
            self._halt_if_due()
            if self._halted_s is not None and self._stop.is_set():
                left_s = self._deadline_s() + self._limits.drain_s - self._clock()
                if left_s < self._limits.drain_s:
                    self._commits.hurry()
                if left_s <= 0:
                    break

    def _tick(self, *, at_once: bool = False) -> None:
        self._events.tick(self._clock(), workers=self._pool.n_workers, in_flight=self._tries_in_flight,
                          backlog=self._backlog(), at_once=at_once)  # fmt: skip

    def _finish(self) -> Outcome:
        counters = self._counters
        left = [*self._queue, *self._running, *(u.unit for u in (*self._written, *self._commits.batch))]
        counters.abandoned = len(left)
        counters.rows_abandoned = sum(map(self._rows_of, left))
        if self._fatal is not None:
            raise self._fatal
        wrong = counters.imbalance()
        if wrong is None and counters.abandoned and not self._stop.is_set():
            wrong = f"{counters.abandoned} units were neither committed nor given up"
        if wrong is not None:
            raise StorageError(
                ErrorKind.WORKER_FAILED,
                f"the job's counts do not balance ({wrong}): report this as a bug; what is committed is safe",
            )
        return Outcome(counters, tuple(self._failed), stopped=bool(counters.abandoned))


def _count_error(written: WrittenUnit, expected: int) -> StorageError:
    return StorageError(
        ErrorKind.WORKER_FAILED,
        f"unit {written.unit} has {expected} token rows, but {written.rows_read} were read and {written.rows_forwarded} went "
        "through the model: the unit was not committed; report this as a bug",
    )
