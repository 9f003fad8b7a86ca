"""How does a storage that must not be written say so, and how is a store read over plain HTTP?

`ReadOnlyStorage` wraps any storage. `HttpStorage` reads a store that a web server hands out: by key only, as HTTP knows no
listing. Neither can change anything.
"""

import importlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from actstore.errors import ErrorKind, MissingDependencyError, StorageError
from actstore.names import check_key
from actstore.storage.base import Buffer, PutOutcome, Storage
from actstore.storage.object_errors import Meaning, meaning_of
from actstore.storage.ranges import as_writable, check_ranges
from actstore.storage.retry import DEFAULT_RETRY, RetryPolicy

T = TypeVar("T")


def _refuse(url: str, doing: str, why: str) -> NoReturn:
    raise StorageError(ErrorKind.READ_ONLY, f"{doing} {url!r} is not possible: {why}")


class ReadOnlyStorage:
    """Another storage's objects, safe from this process: what would change them raises `StorageError` (READ_ONLY)."""

    def __init__(self, inner: Storage, *, why: str) -> None:
        self._inner = inner
        self._why = why

    def __repr__(self) -> str:
        return f"ReadOnlyStorage({self._inner!r})"

    @property
    def url(self) -> str:
        """The wrapped storage's URL."""
        return self._inner.url

    @property
    def writable(self) -> bool:
        """Always false."""
        return False

    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:
        """Raise `StorageError` (READ_ONLY)."""
        _refuse(
            self.url,
            f"writing object {key!r} ({sum(memoryview(b).nbytes for b in data)} bytes) to",
            self._why,
        )

    def get(self, key: str) -> bytes | None:
        """Return the whole object, or None when it is certainly absent."""
        return self._inner.get(key)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Return bytes `[start, stop)` of each range, shorter past the object's end; None when certainly absent."""
        return self._inner.get_ranges(key, ranges)

    def read_into(self, key: str, start: int, out: memoryview) -> int | None:
        """Fill `out` with the bytes from `start` on and return how many there were; None when certainly absent."""
        return self._inner.read_into(key, start, out)

    def head(self, key: str) -> int | None:
        """Return the object's length in bytes, or None when it is certainly absent."""
        return self._inner.head(key)

    def list(self, prefix: str) -> Iterator[str]:
        """Yield every key that starts with `prefix`, in lexicographic order."""
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        """Raise `StorageError` (READ_ONLY)."""
        _refuse(self.url, f"deleting object {key!r} from", self._why)

    def put_hint(self, key: str, data: bytes) -> None:
        """Raise `StorageError` (READ_ONLY)."""
        _refuse(self.url, f"writing object {key!r} ({len(data)} bytes) to", self._why)

    def local_path(self, key: str) -> str | None:
        """Return the wrapped storage's path."""
        return self._inner.local_path(key)


@dataclass(frozen=True, slots=True)
class _Slice:
    """A request for the bytes `[start, stop)` of `url`."""

    url: str
    start: int
    stop: int

    def __call__(self, client: Any) -> bytes:
        return bytes(client.cat_file(self.url, start=self.start, end=self.stop))


class HttpStorage:
    """The objects under an `http(s)://` URL, through fsspec, read-only. It cannot list."""

    def __init__(self, url: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> None:
        self._url = url.rstrip("/")
        self._retry = retry
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._connected: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self._url, "retry": self._retry}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._url = state["url"]
        self._retry = state["retry"]
        self._start()

    def __repr__(self) -> str:
        return f"HttpStorage({self._url!r})"

    @property
    def url(self) -> str:
        """The URL without a final `/`."""
        return self._url

    @property
    def writable(self) -> bool:
        """Always false."""
        return False

    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:
        """Raise `StorageError` (READ_ONLY)."""
        _refuse(
            self._url,
            f"writing object {key!r} ({sum(memoryview(b).nbytes for b in data)} bytes) to",
            _WHY_HTTP,
        )

    def get(self, key: str) -> bytes | None:
        """Return the whole object, or None when the server answers 404."""
        url = self._object_url(key)
        return self._request(key, lambda client: bytes(client.cat_file(url)))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Return bytes `[start, stop)` of each range, shorter past the object's end; None when the server answers 404.

        A server that ignores ranges sends the whole object every time: right, and slow.
        """
        check_ranges(key, ranges)
        url = self._object_url(key)
        size = self.head(key)
        if size is None:
            return None
        found = []
        for start, stop in ranges:
            stop = min(stop, size)
            if start >= stop:
                found.append(b"")
                continue
            piece = self._request(key, _Slice(url, start, stop))
            if piece is None:
                return None
            if len(piece) != stop - start:
                if len(piece) != size:
                    raise StorageError(
                        ErrorKind.STORAGE_FAILED,
                        f"asked {self._url!r} for bytes [{start}, {stop}) of object {key!r} ({size} bytes) and got "
                        f"{len(piece)} bytes: the server or a proxy answers wrongly",
                    )
                piece = piece[start:stop]
            found.append(piece)
        return found

    def read_into(self, key: str, start: int, out: memoryview) -> int | None:
        """Fill `out` with the bytes from `start` on and return how many there were; None when the server answers 404."""
        out = as_writable(key, out)
        pieces = self.get_ranges(key, [(start, start + out.nbytes)])
        if pieces is None:
            return None
        out[: len(pieces[0])] = pieces[0]
        return len(pieces[0])

    def head(self, key: str) -> int | None:
        """Return the object's length in bytes, or None when the server answers 404."""
        url = self._object_url(key)

        def ask(client: Any) -> int:
            try:
                size = client.info(url)["size"]
            except FileNotFoundError as err:
                # fsspec calls every failed HEAD "not found"; only a GET says what it was.
                if meaning_of(err) is not Meaning.MAYBE_ABSENT:
                    raise
                size = None
            return len(client.cat_file(url)) if size is None else int(size)

        return self._request(key, ask)

    def list(self, prefix: str) -> Iterator[str]:
        """Raise `StorageError`: HTTP has no listing."""
        raise StorageError(
            ErrorKind.STORAGE_FAILED,
            f"listing {prefix!r} in {self._url!r} is not possible: HTTP cannot list: copy the store",
        )

    def delete(self, key: str) -> None:
        """Raise `StorageError` (READ_ONLY)."""
        _refuse(self._url, f"deleting object {key!r} from", _WHY_HTTP)

    def put_hint(self, key: str, data: bytes) -> None:
        """Raise `StorageError` (READ_ONLY)."""
        _refuse(self._url, f"writing object {key!r} ({len(data)} bytes) to", _WHY_HTTP)

    def local_path(self, key: str) -> None:
        """Return None: the objects are in no local file."""
        check_key(key)

    def _object_url(self, key: str) -> str:
        return f"{self._url}/{check_key(key)}"

    def _client(self) -> Any:
        if os.getpid() != self._pid:
            raise StorageError(
                ErrorKind.STORAGE_FAILED,
                f"store {self._url!r} was opened in process {self._pid} and used in its fork {os.getpid()}: open it there",
            )
        with self._lock:
            if self._connected is None:
                try:
                    importlib.import_module("aiohttp")
                except ModuleNotFoundError as err:
                    raise MissingDependencyError(
                        ErrorKind.MISSING_DEPENDENCY,
                        f"reading {self._url!r} needs aiohttp: pip install 'actstore[s3]'",
                    ) from err
                fsspec = importlib.import_module("fsspec")
                self._connected = fsspec.filesystem(
                    "http", use_listings_cache=False, skip_instance_cache=True
                )
            return self._connected

    def _request(self, key: str, ask: Callable[[Any], T]) -> T | None:
        """Return `ask(client)`, tried again by our policy; None when the server says that the object is not there."""
        client = self._client()
        last: Exception | None = None
        for _ in self._retry.tries():
            try:
                return ask(client)
            except Exception as err:
                if isinstance(err, FileNotFoundError) and meaning_of(err) is Meaning.MAYBE_ABSENT:
                    return None
                if meaning_of(err) in (Meaning.DENIED, Meaning.REFUSED):
                    raise self._failed(key, err) from err
                last = err
        raise self._failed(key, last) from last

    def _failed(self, key: str, err: Exception | None) -> StorageError:
        return StorageError(
            ErrorKind.STORAGE_FAILED,
            f"reading object {key!r} from {self._url!r} failed: {type(err).__name__}: {err}; check the URL, or try later",
        )


_WHY_HTTP = "stores at http(s) URLs are read-only: write to the folder or bucket behind the server"
