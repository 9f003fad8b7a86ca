"""How do units run in this process, without Ray?

Threads: while one unit is encoded and written, others are computed, as many at once as the writer lets through. Memory is one
unit's rows for each thread.
"""

import queue
import threading
import traceback
from collections.abc import Callable, Sequence

from .flow import Completion
from .unit import WrittenUnit

_JOIN_S = 5.0
"""Longest wait for a thread that was told to stop: between two batches it looks."""


class LocalPool:
    """Runs units by `run_unit` on threads of this process."""

    def __init__(
        self,
        run_unit: Callable[[int], WrittenUnit],
        *,
        threads: int = 2,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the threads.

        Args:
            run_unit: Computes and stores a unit.
            threads: Units at once.
            interrupt: Called, at most once, when what runs is to end soon and its result is not wanted.
        """
        self._run_unit = run_unit
        self._interrupt = interrupt
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._in_flight = 0
        self._closed = False
        # Daemons: a unit whose write hangs must not keep a process alive that was told to end.
        self._threads = [
            threading.Thread(target=self._work, name=f"actstore-unit-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def capacity(self) -> int:
        """As many as there are threads: what is submitted runs at once."""
        return len(self._threads)

    @property
    def n_workers(self) -> int:
        """One: the threads share a model."""
        return 1

    def submit(self, unit: int) -> None:
        """Start a unit."""
        self._in_flight += 1
        self._todo.put(unit)

    def submit_copy(self, unit: int) -> bool:  # noqa: ARG002
        """Never: there is no other worker."""
        return False

    def wait(self, timeout_s: float) -> Sequence[Completion]:
        """Return the units that ended."""
        ended: list[Completion] = []
        while len(ended) < self._in_flight:
            try:
                ended.append(self._done.get(timeout=timeout_s) if not ended else self._done.get_nowait())
            except queue.Empty:
                break
        self._in_flight -= len(ended)
        return ended

    def abandon(self) -> None:
        """Have running units end at their next batch."""
        if not self._closed:
            self._closed = True
            if self._in_flight:
                self._interrupt()
            while True:  # what has not begun never will
                try:
                    self._todo.get_nowait()
                except queue.Empty:
                    break
            for _ in self._threads:
                self._todo.put(None)

    def close(self) -> None:
        """Interrupt what runs, start no more, wait a moment for the threads to end."""
        self.abandon()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _work(self) -> None:
        while (unit := self._todo.get()) is not None:
            try:
                done = Completion(unit, written=self._run_unit(unit))
            except BaseException as error:  # noqa: BLE001  (the scheduler decides what becomes of it)
                _clear_frames(error)
                done = Completion(unit, error=error)
            self._done.put(done)
            del done


def _clear_frames(error: BaseException) -> None:
    """Drop the rows that the frames of a failed unit hold, on the model's device too: the next try may need that memory."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
