"""What does one worker of a unit job hold: a task, opened once, that runs units?

A plain object: the Ray backend makes an actor of it, the local backend uses it as it is.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from actstore.store import Store, open_store

from .unit import WrittenUnit

RunUnit = Callable[[int], WrittenUnit]


class UnitTask(Protocol):
    """What a job does; a small value that pickles (it travels to every worker)."""

    def open(self, store: Store) -> RunUnit:
        """Return what runs one unit: called once per worker process, with the store at the job's version.

        Two threads may run units at once (while one computes, another reads or writes): what must not be doubled, such as a
        large buffer or the device, is held under a lock. `rows_read` and `rows_forwarded` of the result must both be the
        job's `rows_of(unit)`: the job refuses a unit that counted anything else. If what is returned has a method `stop`, it
        is called, from another thread, when running units should end soon with a `StorageError` INTERRUPTED.
        """


@dataclass(frozen=True, slots=True)
class TaskPlace:
    """A task, its store, and where its workers live; what a Ray worker is made from."""

    run: str
    """Id of the collection, as the events and messages of a job call it."""
    task: UnitTask
    url: str
    version: int
    storage_options: Mapping[str, Any] | None = field(repr=False)
    ray_address: str | None
    workers: int
    device: str
    gpus_per_worker: int | None
    start_timeout_s: float
    min_workers: int = 1

    def open_store(self) -> Store:
        """Return the store at the job's version."""
        return open_store(self.url, version=self.version, storage_options=self.storage_options)


class TaskHost:
    """One worker's task, opened when first needed. Two threads may run units at once."""

    def __init__(self, place: TaskPlace, *, threads: int | None = None, store: Store | None = None) -> None:
        """Remember what to open.

        Args:
            place: The task, and where its store is.
            threads: Not needed: Ray sets OMP_NUM_THREADS to what an actor reserved.
            store: The store, where this process has it open.
        """
        del threads
        self._place = place
        self._store = store
        self._lock = threading.Lock()
        self._run: RunUnit | None = None

    def describe(self) -> str:
        """Open the task, so that what it cannot find ends the job and not a unit."""
        self._opened()
        return self._place.run

    def run_job_unit(self, _job: object, unit: int) -> WrittenUnit:
        """Run one unit."""
        return self._opened()(unit)

    def stop(self) -> None:
        """Have running units end soon, if the task can."""
        stop = getattr(self._run, "stop", None)
        if stop is not None:
            stop()

    def _opened(self) -> RunUnit:
        with self._lock:
            if self._run is None:
                place = self._place
                self._run = place.task.open(self._store or place.open_store())
            return self._run
