"""What may the rest of actstore ask of a storage, and what may it rely on?

The whole surface is eight operations. Nothing outside `actstore.storage` touches a file system or a bucket, so one wrapper
can inject every fault. Objects are write-once: a key is created whole or not at all and never overwritten; `put_hint` is
the one exception and nothing relies on it. Keys are relative, `/`-separated and pass `actstore.names.check_key`
(FORMAT.md, section 2).
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
"""One-dimensional, contiguous, of items of one byte."""


class PutOutcome(StrEnum):
    """What is known after `put_new`."""

    CREATED = "created"
    """The object exists, holds exactly the given bytes, and is durable."""

    EXISTS = "exists"
    """The key was taken before; whose bytes it holds is for the caller to read back."""

    UNKNOWN = "unknown"
    """The answer was lost: the object may or may not be there. Read back before deciding anything."""


class Storage(Protocol):
    """A place for write-once objects, safe for use from many threads and processes at once.

    An instance survives pickling (a Ray actor opens its own connections) and must not be used across `fork()`.
    All methods raise `StorageError` when the storage fails: an unknown state is never reported as absence.
    """

    @property
    def url(self) -> str:
        """Where it is, for messages: never with credentials."""

    @property
    def writable(self) -> bool:
        """Whether `put_new`, `put_hint` and `delete` may be used; otherwise they raise `StorageError` (READ_ONLY)."""

    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:
        """Create `key` with the concatenation of `data` (at least one byte), unless it exists. Durable when CREATED."""

    def get(self, key: str) -> bytes | None:
        """Return the whole object, or None when it is certainly absent."""

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Return bytes `[start, stop)` of each range, shorter past the object's end; None when certainly absent."""

    def read_into(self, key: str, start: int, out: memoryview) -> int | None:
        """Fill `out` with the bytes from `start` on and return how many there were; None when certainly absent."""

    def head(self, key: str) -> int | None:
        """Return the object's length in bytes, or None when it is certainly absent."""

    def list(self, prefix: str) -> Iterator[str]:
        """Yield every key that starts with `prefix`, a folder ending in `/`, in lexicographic order, never from a cache."""

    def delete(self, key: str) -> None:
        """Remove the object; no error when it is absent."""

    def put_hint(self, key: str, data: bytes) -> None:
        """Write `key`, replacing it whole. Not durable, not exclusive: for objects that nothing trusts."""

    def local_path(self, key: str) -> str | None:
        """Return the path of the object on this machine's disk, for libraries that read files; None elsewhere."""
