"""How are write-once objects kept in the memory of one process?

For tests and throw-away work: the objects are gone with the process. All storages of one name share their objects.
"""

import os
import threading
from collections.abc import Iterator, Sequence

from actstore.errors import ErrorKind, StorageError
from actstore.names import check_key, check_name
from actstore.storage.base import Buffer, PutOutcome
from actstore.storage.ranges import as_views, as_writable, check_prefix, check_ranges

_LOCK = threading.Lock()
_STORES: dict[str, dict[str, bytes]] = {}


class MemoryStorage:
    """The objects of `memory://<name>`; see `actstore.storage.base.Storage` for what every method promises."""

    def __init__(self, name: str) -> None:
        self._name = check_name(name, what="name of a memory store")
        self._pid = os.getpid()
        with _LOCK:
            self._stored = _STORES.setdefault(name, {})

    def __getstate__(self) -> dict[str, str | int]:
        return {"name": self._name, "pid": self._pid}

    def __setstate__(self, state: dict[str, str | int]) -> None:
        self._name = str(state["name"])
        self._pid = int(state["pid"])
        with _LOCK:
            self._stored = _STORES.setdefault(self._name, {})

    def __repr__(self) -> str:
        return f"MemoryStorage({self._name!r})"

    @property
    def url(self) -> str:
        """`memory://<name>`."""
        return f"memory://{self._name}"

    @property
    def writable(self) -> bool:
        """Always true."""
        return True

    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:
        """Create `key` with the concatenation of `data`, unless it exists. It lasts as long as the process."""
        objects = self._objects(key)
        views, _ = as_views(key, data)
        body = b"".join(views)
        with _LOCK:
            if key in objects:
                return PutOutcome.EXISTS
            objects[key] = body
        return PutOutcome.CREATED

    def get(self, key: str) -> bytes | None:
        """Return the whole object, or None when it is absent."""
        return self._objects(key).get(key)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Return bytes `[start, stop)` of each range, shorter past the object's end; None when absent."""
        check_ranges(key, ranges)
        body = self.get(key)
        return None if body is None else [body[start:stop] for start, stop in ranges]

    def read_into(self, key: str, start: int, out: memoryview) -> int | None:
        """Fill `out` with the bytes from `start` on and return how many there were; None when absent."""
        check_ranges(key, [(start, start + out.nbytes)])
        out = as_writable(key, out)
        body = self.get(key)
        if body is None:
            return None
        piece = memoryview(body)[start : start + out.nbytes]
        out[: piece.nbytes] = piece
        return piece.nbytes

    def head(self, key: str) -> int | None:
        """Return the object's length in bytes, or None when it is absent."""
        body = self.get(key)
        return None if body is None else len(body)

    def list(self, prefix: str) -> Iterator[str]:
        """Yield every key that starts with `prefix`, in lexicographic order."""
        check_prefix(prefix)
        objects = self._objects()
        with _LOCK:
            found = sorted(key for key in objects if key.startswith(prefix))
        yield from found

    def delete(self, key: str) -> None:
        """Remove the object; no error when it is absent."""
        objects = self._objects(key)
        with _LOCK:
            objects.pop(key, None)

    def put_hint(self, key: str, data: bytes) -> None:
        """Write `key`, replacing it whole."""
        objects = self._objects(key)
        as_views(key, [data])
        with _LOCK:
            objects[key] = bytes(data)

    def local_path(self, key: str) -> None:
        """Return None: the objects are in no file."""
        check_key(key)

    def _objects(self, key: str | None = None) -> dict[str, bytes]:
        """Return the objects of this name.

        Raises:
            StorageError: in another process, where the same name would silently be another, empty store.
        """
        if key is not None:
            check_key(key)
        if os.getpid() != self._pid:
            raise StorageError(
                ErrorKind.STORAGE_FAILED,
                f"{self.url} exists only in process {self._pid} and was used in process {os.getpid()}: "
                "use a folder or an object store when several processes work on one store",
            )
        return self._stored
