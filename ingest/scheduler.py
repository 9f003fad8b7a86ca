"""In what order do units run, and what happens when one fails?

The scheduler hands units to a pool (this process, or Ray actors), keeps it fed without running ahead of it, has finished
units committed in batches, and retries what may pass. It holds only numbers of units: its memory does not grow with the
size of the data.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from actstore.errors import ActstoreError, ConflictError, ErrorKind, InvalidInputError, StorageError

from .unit import WrittenUnit


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of one try of one unit."""

    unit: int
    written: WrittenUnit | None = None
    error: BaseException | None = None


class Pool(Protocol):
    """Something that runs units, at most `capacity` at once."""

    @property
    def capacity(self) -> int:
        """Units that may be in flight: enough that no worker waits for its next."""

    def submit(self, unit: int) -> None:
        """Start a unit; never blocks for its result."""

    def wait(self, timeout_s: float) -> Sequence[Completion]:
        """Return what ended since the last call; waits up to `timeout_s` for something to end."""

    def close(self) -> None:
        """Stop the workers. Units in flight may be lost; nothing committed is."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress bar shows. Counts cover the whole run, units of earlier jobs included."""

    units_done: int
    units_total: int
    rows_done: int
    rows_total: int
    rows_this_job: int
    """Rows committed since this job began: divide by `elapsed_s` for tokens per second."""
    elapsed_s: float
    retries: int


@dataclass(slots=True)
class Counters:
    """Every unit that this job was to run is in exactly one of them at the end."""

    planned: int = 0
    committed: int = 0
    abandoned: int = 0
    """Not run because the job was stopped."""
    failed: int = 0
    retries: int = 0


class Scheduler:
    """Runs pending units through a pool and commits them."""

    def __init__(
        self,
        pool: Pool,
        commit: Callable[[Sequence[WrittenUnit]], None],
        *,
        max_attempts: int,
        commit_units: int,
        commit_interval_s: float,
        stop: threading.Event,
        on_commit: Callable[[Sequence[WrittenUnit], Counters], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._commit = commit
        self._max_attempts = max_attempts
        self._commit_units = commit_units
        self._commit_interval_s = commit_interval_s
        self._stop = stop
        self._on_commit = on_commit
        self._clock = clock
        self._written: list[WrittenUnit] = []
        self._oldest_s = 0.0
        self._attempts: dict[int, int] = {}

    def run(self, pending: Sequence[int]) -> Counters:
        """Run every pending unit, or those begun before `stop` was set, and commit what was written.

        Raises:
            ActstoreError: a unit failed for good. What had been written by then is committed first.
        """
        counters = Counters(planned=len(pending))
        queue = deque(pending)
        in_flight = 0
        failure: ActstoreError | None = None
        while queue or in_flight:
            halted = self._stop.is_set() or failure is not None
            while queue and in_flight < self._pool.capacity and not halted:
                self._pool.submit(queue.popleft())
                in_flight += 1
            if halted and not in_flight:
                break
            for done in self._pool.wait(timeout_s=self._patience_s()):
                in_flight -= 1
                if done.written is not None:
                    self._keep(done.written)
                    continue
                error = self._judge(done)
                if error is None:
                    counters.retries += 1
                    queue.append(done.unit)
                else:
                    counters.failed += 1
                    failure = failure or error
            self._flush(counters, force=False)
        self._flush(counters, force=True)
        counters.abandoned = counters.planned - counters.committed - counters.failed
        if failure is not None:
            raise failure
        if counters.abandoned and not self._stop.is_set():
            raise StorageError(
                ErrorKind.WORKER_FAILED,
                f"the job's counts do not balance ({counters}): report this as a bug; what is committed is safe",
            )
        return counters

    def _patience_s(self) -> float:
        if not self._written:
            return 1.0
        return max(0.05, min(1.0, self._oldest_s + self._commit_interval_s - self._clock()))

    def _keep(self, written: WrittenUnit) -> None:
        if not self._written:
            self._oldest_s = self._clock()
        self._written.append(written)
        self._attempts.pop(written.unit, None)

    def _flush(self, counters: Counters, *, force: bool) -> None:
        due = self._written and (
            force
            or len(self._written) >= self._commit_units
            or self._clock() - self._oldest_s >= self._commit_interval_s
        )
        if not due:
            return
        while self._written:
            batch = self._written[: self._commit_units]
            self._commit(batch)
            del self._written[: len(batch)]
            counters.committed += len(batch)
            self._on_commit(batch, counters)

    def _judge(self, done: Completion) -> ActstoreError | None:
        """Return the error that ends the job, or None when the unit should be tried again."""
        error = done.error
        if isinstance(error, InvalidInputError | ConflictError):
            return error
        tries = self._attempts[done.unit] = self._attempts.get(done.unit, 0) + 1
        if tries < self._max_attempts:
            return None
        if isinstance(error, ActstoreError):
            return error
        failure = StorageError(
            ErrorKind.WORKER_FAILED,
            f"unit {done.unit} failed {tries} times, the last time with {type(error).__name__}: {error}",
        )
        failure.__cause__ = error
        return failure
