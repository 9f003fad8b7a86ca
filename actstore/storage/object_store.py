"""How are write-once objects kept in a bucket of S3, GCS or Azure?

One request per object wherever the store allows it, through fsspec clients without listing caches and without retries of
their own; the retries are ours (`retry.py`). Credentials are in the client's options only: never in URLs, `repr`, errors.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from actstore.errors import ActstoreError, ErrorKind, StorageError
from actstore.names import check_key
from actstore.storage.backends import BACKENDS, Backend
from actstore.storage.base import Buffer, PutOutcome
from actstore.storage.object_errors import Meaning, meaning_of
from actstore.storage.ranges import as_views, as_writable, check_prefix, check_ranges, split_range
from actstore.storage.retry import DEFAULT_RETRY, RetryPolicy
from actstore.storage.scrub import scrub

_REQUEST_NBYTES = 16 << 20
"""Bytes per request of a long read. Requests of one read run side by side; one connection gives about 100 MB/s."""

_CONCURRENT_REQUESTS = 128

_GIVE_UP = frozenset({Meaning.DENIED, Meaning.REFUSED, Meaning.NO_BUCKET})
"""Not worth another attempt."""

T = TypeVar("T")


class _AbsentError(Exception):
    """The object is certainly absent; never leaves this module."""


class ObjectStorage:
    """The objects under `<protocol>://<bucket>/<prefix>`; see `actstore.storage.base.Storage` for every method's promise.

    Safe for threads. It connects on first use. Pickles carry the options, credentials included, and connect anew; a process
    made by `fork()` must open its own.
    """

    def __init__(
        self,
        protocol: str,
        bucket: str,
        prefix: str,
        options: Mapping[str, Any],
        *,
        retry: RetryPolicy = DEFAULT_RETRY,
    ) -> None:
        self._where = (protocol, bucket, prefix)
        self._options = dict(options)
        self._retry = retry
        self._start()

    def _start(self) -> None:
        """Begin life in this process, not yet connected."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._connected: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"where": self._where, "options": self._options, "retry": self._retry}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._where = state["where"]
        self._options = state["options"]
        self._retry = state["retry"]
        self._start()

    def __repr__(self) -> str:
        return f"ObjectStorage({self.url!r})"

    @property
    def url(self) -> str:
        """`<protocol>://<bucket>/<prefix>`."""
        protocol, bucket, prefix = self._where
        return f"{protocol}://{bucket}/{prefix}".rstrip("/")

    @property
    def probe_scope(self) -> str:
        """The URL and the endpoint: the same bucket name at two endpoints is two stores."""
        client = self._options.get("client_kwargs", {})
        endpoint = self._options.get("endpoint_url") or client.get("endpoint_url")
        account = self._options.get("account_name")
        return f"{self.url} {endpoint} {account}"

    @property
    def writable(self) -> bool:
        """Always true; whether the credentials suffice shows at the first write."""
        return True

    def check_bucket(self) -> bool:
        """Return whether the bucket exists.

        Raises:
            StorageError: the store did not say, after all retries, or refuses these credentials.
        """
        try:
            self._request(f"opening {self.url!r}", self._ask_bucket)
        except _AbsentError:
            return False
        return True

    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:
        """Create `key` with the concatenation of `data`, unless it exists.

        EXISTS may be this call's own doing, when an answer was lost on the way; UNKNOWN means that no attempt was answered.

        Raises:
            StorageError: the store certainly refused: the bucket or the right to write is missing.
        """
        path = self._path(key)
        views, nbytes = as_views(key, data)
        whole = views[0].obj if len(views) == 1 else None
        body = whole if isinstance(whole, bytes) and len(whole) == nbytes else b"".join(views)
        unanswered = False
        for _ in self._retry.tries():
            try:
                self._client().pipe_file(path, body, **self._backend.create)
            except ActstoreError:
                raise
            except Exception as err:  # noqa: BLE001 - clients raise anything; each becomes an outcome or an error of ours
                meaning = meaning_of(err)
                if meaning is Meaning.EXISTS:
                    return PutOutcome.EXISTS
                if meaning in _GIVE_UP and not unanswered:
                    self._fail(f"writing object {key!r} ({nbytes} bytes) to {self.url!r}", err, meaning)
                unanswered = True
            else:
                return PutOutcome.CREATED
        return PutOutcome.UNKNOWN

    def get(self, key: str) -> bytes | None:
        """Return the whole object, in one request, or None when it is certainly absent."""
        path = self._path(key)
        try:
            return self._read(key, lambda client: bytes(client.cat_file(path, **self._backend.get)))
        except _AbsentError:
            return None

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Return bytes `[start, stop)` of each range, shorter past the object's end; None when certainly absent.

        One request per range, side by side; long ranges are cut into several. Only what failed is asked again.
        """
        check_ranges(key, ranges)
        cuts = [split_range(start, stop, step=_REQUEST_NBYTES) for start, stop in ranges]
        pieces = self._get_pieces(key, [piece for cut in cuts for piece in cut])
        if pieces is None:
            return None
        found = iter(pieces)
        return [next(found) if len(cut) == 1 else b"".join(next(found) for _ in cut) for cut in cuts]

    def read_into(self, key: str, start: int, out: memoryview) -> int | None:
        """Fill `out` with the bytes from `start` on and return how many there were; None when certainly absent."""
        check_ranges(key, [(start, start + out.nbytes)])
        out = as_writable(key, out)
        pieces = self._get_pieces(key, split_range(start, start + out.nbytes, step=_REQUEST_NBYTES))
        if pieces is None:
            return None
        filled = 0
        for piece in pieces:
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled

    def _get_pieces(self, key: str, pieces: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Return the bytes of each of `pieces`, none of which is empty; None when the object is certainly absent."""
        if not pieces:
            return None if self.head(key) is None else []
        path = self._path(key)
        found: dict[tuple[int, int], bytes] = {}

        def ask(client: Any) -> None:
            missing = [piece for piece in pieces if piece not in found]
            starts, stops = [start for start, _ in missing], [stop for _, stop in missing]
            answers = client.cat_ranges(
                [path] * len(missing), starts, stops, on_error="return", batch_size=_CONCURRENT_REQUESTS
            )
            failure: BaseException | None = None
            for piece, answer in zip(missing, answers, strict=True):
                if not isinstance(answer, BaseException):
                    found[piece] = self._check_piece(key, piece, bytes(answer))
                elif meaning_of(answer) is Meaning.PAST_END:
                    found[piece] = b""
                else:
                    failure = answer
            if failure is not None:
                raise failure

        try:
            self._read(key, ask)
        except _AbsentError:
            return None
        return [found[piece] for piece in pieces]

    def _check_piece(self, key: str, piece: tuple[int, int], answer: bytes) -> bytes:
        """Return `answer` unless it is longer than what was asked: then the store ignored the range."""
        start, stop = piece
        if len(answer) > stop - start:
            raise StorageError(
                ErrorKind.UNSAFE_STORE,
                f"asked {self.url!r} for {stop - start} bytes of object {key!r} and got {len(answer)}: it does not support "
                "range requests, which actstore needs: use another store",
            )
        return answer

    def head(self, key: str) -> int | None:
        """Return the object's length in bytes, or None when it is certainly absent."""
        path = self._path(key)

        def ask(client: Any) -> int:
            info = client.info(path)
            if info.get("type") == "directory":
                raise _AbsentError
            return int(info["size"])

        try:
            return self._read(key, ask)
        except _AbsentError:
            return None

    def list(self, prefix: str) -> Iterator[str]:
        """Yield every key that starts with `prefix`, in lexicographic order, from a fresh listing."""
        check_prefix(prefix)
        root = self._root()
        folder = (root + prefix).removesuffix("/")

        def ask(client: Any) -> list[str]:
            client.invalidate_cache()
            try:
                paths = client.find(folder)
            except FileNotFoundError as err:
                if meaning_of(err) is Meaning.NO_BUCKET:
                    raise
                paths = []
            if not paths:
                # Some clients list a bucket that does not exist as empty.
                self._ask_bucket(client)
            return sorted(path.removeprefix(root) for path in paths if path.startswith(root + prefix))

        doing = f"listing {prefix!r} in {self.url!r}"
        try:
            keys = self._request(doing, ask)
        except _AbsentError:
            self._fail(doing, FileNotFoundError("no such bucket"), Meaning.NO_BUCKET)
        yield from (key for key in keys if not key.endswith("/"))

    def delete(self, key: str) -> None:
        """Remove the object; no error when it is absent."""
        path = self._path(key)
        try:
            self._request(f"deleting object {key!r} from {self.url!r}", lambda client: client.rm_file(path))
        except _AbsentError:
            return

    def put_hint(self, key: str, data: bytes) -> None:
        """Write `key`, replacing it whole."""
        path = self._path(key)
        as_views(key, [data])
        doing = f"writing object {key!r} ({len(data)} bytes) to {self.url!r}"
        try:
            self._request(doing, lambda client: client.pipe_file(path, bytes(data)))
        except _AbsentError:
            self._fail(doing, FileNotFoundError("no such bucket"), Meaning.NO_BUCKET)

    def local_path(self, key: str) -> None:
        """Return None: the objects are in no file."""
        check_key(key)

    @property
    def _backend(self) -> Backend:
        return BACKENDS[self._where[0]]

    def _root(self) -> str:
        """Return the client's path of the store, ending in `/`."""
        _, bucket, prefix = self._where
        return f"{bucket}/{prefix}/" if prefix else f"{bucket}/"

    def _path(self, key: str) -> str:
        """Return the client's path of `key`."""
        return self._root() + check_key(key)

    def _client(self) -> Any:
        """Return the connected client.

        Raises:
            StorageError: in a process made by `fork()`, where the parent's connections and threads are not usable.
        """
        if os.getpid() != self._pid:
            raise StorageError(
                ErrorKind.STORAGE_FAILED,
                f"store {self.url!r} was opened in process {self._pid} and used in its fork {os.getpid()}, where its "
                "connections do not work: open the store in the new process, or start processes with 'spawn'",
            )
        with self._lock:
            if self._connected is None:
                try:
                    self._connected = self._backend.connect(self._options)
                except ActstoreError:
                    raise
                except Exception as err:  # noqa: BLE001 - becomes an error of ours
                    self._fail(f"connecting to {self.url!r}", err, Meaning.REFUSED)
            return self._connected

    def _ask_bucket(self, client: Any) -> None:
        """Return if the bucket exists; raise `_AbsentError` when it certainly does not."""
        _, bucket, prefix = self._where
        try:
            self._backend.check_bucket(client, bucket, prefix)
        except FileNotFoundError as err:
            raise _AbsentError from err

    def _read(self, key: str, ask: Callable[[Any], T]) -> T:
        """Return what `ask` answers about `key`; a bucket that is not there is an error, no absence."""
        doing = f"reading object {key!r} from {self.url!r}"

        def ask_object(client: Any) -> T:
            try:
                return ask(client)
            except FileNotFoundError as err:
                meaning = meaning_of(err)
                if meaning is Meaning.ABSENT:
                    raise _AbsentError from err
                if meaning is not Meaning.MAYBE_ABSENT:
                    raise
            if not self.check_bucket():
                self._fail(doing, FileNotFoundError("no such bucket"), Meaning.NO_BUCKET)
            raise _AbsentError

        return self._request(doing, ask_object)

    def _request(self, doing: str, ask: Callable[[Any], T]) -> T:
        """Return `ask(client)`, tried again by our policy.

        Raises:
            _AbsentError: what was asked for is certainly not there.
            StorageError: refused, or not answered by any attempt.
        """
        last: tuple[Exception, Meaning] = (TimeoutError("no attempt"), Meaning.RETRY)
        for _ in self._retry.tries():
            try:
                return ask(self._client())
            except (ActstoreError, _AbsentError):
                raise
            except Exception as err:
                meaning = meaning_of(err)
                if meaning in (Meaning.ABSENT, Meaning.MAYBE_ABSENT):
                    raise _AbsentError from err
                if meaning in _GIVE_UP:
                    self._fail(doing, err, meaning)
                last = (err, meaning)
        return self._fail(doing, *last)

    def _fail(self, doing: str, err: Exception, meaning: Meaning) -> NoReturn:
        """Raise `err` as an error of actstore's, without its chain: clients put request details into their exceptions."""
        said = scrub(f"{type(err).__name__}: {err}", self._options)
        kind, advice = (
            ErrorKind.STORAGE_FAILED,
            f"gave up after {self._retry.attempts} attempts: try again later",
        )
        if meaning is Meaning.NO_BUCKET:
            word = self._backend.bucket_word
            advice = f"{word} {self._where[1]!r} does not exist: check the name and the endpoint, or create the {word}"
        elif meaning is Meaning.DENIED:
            kind = ErrorKind.READ_ONLY if doing.startswith(("writing", "deleting")) else kind
            advice = "the credentials are missing or do not allow it: check them and the storage options"
        elif meaning is Meaning.REFUSED:
            advice = "the store or its client refuses this request: check the storage options"
        raise StorageError(kind, f"{doing} failed: {said}; {advice}") from None
