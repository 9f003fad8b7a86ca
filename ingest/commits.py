"""How do commits run beside the scheduler, one at a time, and survive a storage that fails for a while?

The scheduler hands over one batch, goes on feeding workers, and takes the outcome when it is there. A commit that fails in
a way that may pass is tried again, with growing pauses, for a bounded time: committing is idempotent, so an answer that
was lost costs nothing.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence

from actstore.errors import ActstoreError, ErrorKind, StorageError

from .events import JobEvents
from .unit import WrittenUnit

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 15.0
_NO_USE = frozenset({ErrorKind.READ_ONLY, ErrorKind.UNSAFE_STORE})


def may_pass(error: BaseException) -> bool:
    """Return whether the same call may succeed later.

    >>> from actstore.errors import ConflictError
    >>> may_pass(StorageError(ErrorKind.STORAGE_FAILED, "a timeout"))
    True
    >>> may_pass(ConflictError(ErrorKind.FENCED, "a newer job"))
    False
    """
    if isinstance(error, StorageError):
        return error.kind not in _NO_USE
    return isinstance(error, ActstoreError) and error.kind is ErrorKind.COMMIT_CONTENTION


class Commits:
    """Commits one batch at a time from a thread of its own; used from one other thread."""

    def __init__(
        self, commit: Callable[[Sequence[WrittenUnit]], object], *, retry_s: float, events: JobEvents
    ) -> None:
        """Make it; no thread runs between two batches.

        Args:
            commit: Commits a batch; idempotent.
            retry_s: Seconds for which a failing commit is tried again.
            events: Told of every commit and every try that failed.
        """
        self._commit = commit
        self._retry_s = retry_s
        self._events = events
        self._hurry = threading.Event()
        self._ended = threading.Event()
        self._batch: Sequence[WrittenUnit] = ()
        self._error: BaseException | None = None

    @property
    def batch(self) -> Sequence[WrittenUnit]:
        """What is being committed; empty when nothing is."""
        return self._batch

    def start(self, batch: Sequence[WrittenUnit]) -> None:
        """Begin to commit; the batch before must have been taken."""
        assert not self._batch
        assert batch
        self._batch = batch
        self._ended.clear()
        # A daemon: a storage that does not answer must not keep the process from ending.
        threading.Thread(target=self._run, args=(batch,), name="actstore-commit", daemon=True).start()

    def take(self) -> Sequence[WrittenUnit]:
        """Return the batch if it is committed by now, else nothing.

        Raises:
            ConflictError: another job has taken the run over.
            StorageError: the storage failed for longer than `retry_s`.
        """
        if not self._batch or not self._ended.is_set():
            return ()
        batch, self._batch = self._batch, ()
        if self._error is not None:
            raise self._error
        return batch

    def wait(self, timeout_s: float) -> None:
        """Return when the batch has ended, or after `timeout_s`."""
        if self._batch:
            self._ended.wait(timeout_s)

    def hurry(self) -> None:
        """Try no commit again from now on: the process has to end."""
        self._hurry.set()

    def _run(self, batch: Sequence[WrittenUnit]) -> None:
        started = time.monotonic()
        pause = _FIRST_PAUSE_S
        self._error = None
        while True:
            try:
                self._commit(batch)
                self._events.committed(batch, time.monotonic() - started)
                break
            except BaseException as error:  # noqa: BLE001  (it is raised by `take`, where the job can act on it)
                waited = time.monotonic() - started
                if not may_pass(error) or waited + pause > self._retry_s or self._hurry.is_set():
                    self._error = error
                    break
                self._events.commit_retried(batch, error, waited)
                self._hurry.wait(random.uniform(pause / 2, pause))
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        self._ended.set()
