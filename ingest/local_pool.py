"""How do units run in this process, without Ray?

Two threads: while one unit is encoded and written, the next is computed. Computing itself is one at a time (the writer
holds a lock), so memory is two units' rows.
"""

import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from .scheduler import Completion
from .unit import WrittenUnit


class LocalPool:
    """Runs units by `run_unit` on threads of this process."""

    def __init__(self, run_unit: Callable[[int], WrittenUnit], *, threads: int = 2) -> None:
        self._run_unit = run_unit
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="actstore-unit")
        self._futures: dict[Future[WrittenUnit], int] = {}

    @property
    def capacity(self) -> int:
        """As many as there are threads: what is submitted runs at once."""
        return self._threads

    def submit(self, unit: int) -> None:
        """Start a unit."""
        self._futures[self._executor.submit(self._run_unit, unit)] = unit

    def wait(self, timeout_s: float) -> Sequence[Completion]:
        """Return the units that ended."""
        done, _ = wait(self._futures, timeout=timeout_s, return_when=FIRST_COMPLETED)
        return [_completion(self._futures.pop(future), future) for future in done]

    def close(self) -> None:
        """Let running units end, start no more."""
        self._executor.shutdown(cancel_futures=True)


def _completion(unit: int, future: Future[WrittenUnit]) -> Completion:
    error = future.exception()
    if error is None:
        return Completion(unit, written=future.result())
    # The frames of a failed unit hold its rows, on the model's device too: the next try may need that memory.
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    return Completion(unit, error=error)
