"""How does the code behave when the storage fails at exactly this operation?

`FaultStorage` wraps any storage, counts its operations and misbehaves at chosen ones in one of nine ways: everything
that can happen between a process and its storage, death of the process included. A campaign runs a scenario once to
count its operations and then once for every operation and mode.
"""

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TypeVar

from actstore.errors import ErrorKind, StorageError
from actstore.storage.base import Buffer, PutOutcome, Storage

T = TypeVar("T")


class Fault(StrEnum):
    """What happens at an operation."""

    ERROR_BEFORE = "error-before"
    """It is not done, and raises."""

    ERROR_AFTER = "error-after"
    """It is done, and raises."""

    LOST_ANSWER = "lost-answer"
    """It is done, and the answer is lost: `put_new` returns UNKNOWN, anything else raises."""

    TIMEOUT = "timeout"
    """It is not done, and nobody can tell: `put_new` returns UNKNOWN, anything else raises."""

    KILL_BEFORE = "kill-before"
    """The process dies before it."""

    KILL_AFTER = "kill-after"
    """The process dies after it, before it learns so."""

    TORN = "torn"
    """The process dies in the middle: a write leaves a part of its bytes, but not under the object's key."""

    DISK_FULL = "disk-full"
    """A write finds no space and leaves nothing; a read succeeds."""

    PERSISTENT = "persistent"
    """It and every later operation fail."""


class Killed(BaseException):
    """The process died: no handler may catch this, and no clean-up after it reaches the storage."""


class FaultStorage:
    """A storage that fails as planned; safe for threads as far as the wrapped one is."""

    def __init__(self, inner: Storage, plan: Mapping[int, Fault]) -> None:
        """Wrap a storage.

        Args:
            inner: The storage that works.
            plan: Operation, counted from 0, to what happens at it.
        """
        self._inner = inner
        self._plan = dict(plan)
        self._lock = threading.Lock()
        self._broken = False
        self._dead = False
        self.n_operations = 0
        """How many operations were asked for so far."""

        self.operations: list[tuple[str, str]] = []
        """What they were: method and key."""

    @property
    def url(self) -> str:
        """Of the wrapped storage."""
        return self._inner.url

    @property
    def writable(self) -> bool:
        """Of the wrapped storage."""
        return self._inner.writable

    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:
        """Create `key`, or fail as planned."""
        fault = self._next("put_new", key)
        if fault is Fault.TIMEOUT:
            return PutOutcome.UNKNOWN
        if fault is Fault.TORN:
            self._leave_torn(b"".join(data))
        outcome = self._do(fault, "put_new", key, lambda: self._inner.put_new(key, data), writes=True)
        return PutOutcome.UNKNOWN if fault is Fault.LOST_ANSWER else outcome

    def get(self, key: str) -> bytes | None:
        """Return the object, or fail as planned."""
        return self._do(self._next("get", key), "get", key, lambda: self._inner.get(key))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Return the ranges, or fail as planned."""
        fault = self._next("get_ranges", key)
        return self._do(fault, "get_ranges", key, lambda: self._inner.get_ranges(key, ranges))

    def read_into(self, key: str, start: int, out: memoryview) -> int | None:
        """Fill `out`, or fail as planned."""
        fault = self._next("read_into", key)
        return self._do(fault, "read_into", key, lambda: self._inner.read_into(key, start, out))

    def head(self, key: str) -> int | None:
        """Return the length, or fail as planned."""
        return self._do(self._next("head", key), "head", key, lambda: self._inner.head(key))

    def list(self, prefix: str) -> Iterator[str]:
        """Return the keys, or fail as planned."""
        fault = self._next("list", prefix)
        return iter(self._do(fault, "list", prefix, lambda: [*self._inner.list(prefix)]))

    def delete(self, key: str) -> None:
        """Remove the object, or fail as planned."""
        self._do(self._next("delete", key), "delete", key, lambda: self._inner.delete(key), writes=True)

    def put_hint(self, key: str, data: bytes) -> None:
        """Write the hint, or fail as planned; TORN leaves half of it, as nothing forbids that."""
        fault = self._next("put_hint", key)
        if fault is Fault.TORN:
            self._inner.put_hint(key, data[: len(data) // 2])
        self._do(fault, "put_hint", key, lambda: self._inner.put_hint(key, data), writes=True)

    def local_path(self, key: str) -> str | None:
        """Of the wrapped storage; not an operation."""
        return self._inner.local_path(key)

    def _next(self, name: str, key: str) -> Fault | None:
        with self._lock:
            if self._dead:
                raise Killed(f"{name} {key!r} after death")
            fault = self._plan.get(self.n_operations)
            self.n_operations += 1
            self.operations.append((name, key))
            if self._broken:
                return Fault.ERROR_BEFORE
            if fault is Fault.PERSISTENT:
                self._broken = True
                return Fault.ERROR_BEFORE
            return fault

    def _do(
        self, fault: Fault | None, name: str, key: str, operation: Callable[[], T], *, writes: bool = False
    ) -> T:
        if fault in (Fault.KILL_BEFORE, Fault.TORN):
            raise self._die(name, key)
        if fault is Fault.DISK_FULL and writes:
            raise StorageError(ErrorKind.STORAGE_FULL, f"{name} {key!r}: no space left (injected)")
        if fault in (Fault.ERROR_BEFORE, Fault.TIMEOUT):
            raise StorageError(ErrorKind.STORAGE_FAILED, f"{name} {key!r}: {fault} (injected)")
        result = operation()
        if fault is Fault.KILL_AFTER:
            raise self._die(name, key)
        if fault is Fault.ERROR_AFTER or (fault is Fault.LOST_ANSWER and name != "put_new"):
            raise StorageError(ErrorKind.OUTCOME_UNKNOWN, f"{name} {key!r}: {fault} (injected)")
        return result

    def _die(self, name: str, key: str) -> Killed:
        with self._lock:
            self._dead = True
        return Killed(f"{name} {key!r}")

    def _leave_torn(self, data: bytes) -> None:
        """Leave what a process that dies while it writes leaves on a local disk; elsewhere it leaves nothing."""
        marker = self._inner.local_path("_torn")
        if marker is not None:
            folder = os.path.join(os.path.dirname(marker), ".tmp")
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, uuid.uuid4().hex), "xb") as file:
                file.write(data[: len(data) // 2])
