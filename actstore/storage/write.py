"""How is an object written and read so that what a manifest promises of it is true?

`write_new` returns only when the key holds exactly the given bytes, whoever put them there and whatever answers were lost;
it is idempotent. `read_verified` returns only bytes with the promised length and SHA-256.
"""

import hashlib
import itertools
import threading
from collections.abc import Sequence

from actstore.errors import ConflictError, ErrorKind, FormatError, StorageError
from actstore.log.values import StoredObject
from actstore.storage.base import Buffer, PutOutcome, Storage
from actstore.storage.ranges import as_views
from actstore.storage.retry import DEFAULT_RETRY, RetryPolicy

_PARALLEL_HASH_NBYTES = 1 << 20
"""From this size on a second thread hashes while the first one writes; below, starting the thread costs more."""

_READ_NBYTES = 16 << 20
"""Bytes per range when the object is not on this machine's disk, so that its requests run side by side."""


class _Hasher:
    """The SHA-256 of some buffers, computed beside the caller's work; hashlib lets other threads run meanwhile."""

    def __init__(self, views: Sequence[memoryview], nbytes: int) -> None:
        self._views = views
        self._digest = ""
        self._thread: threading.Thread | None = None
        if nbytes >= _PARALLEL_HASH_NBYTES:
            self._thread = threading.Thread(target=self._run, name="actstore-sha256", daemon=True)
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        digest = hashlib.sha256()
        for view in self._views:
            digest.update(view)
        self._digest = digest.hexdigest()

    def result(self) -> str:
        """Return the hex digest, waiting for it if need be."""
        if self._thread is not None:
            self._thread.join()
        return self._digest


def write_new(
    storage: Storage, key: str, data: Sequence[Buffer], *, retry: RetryPolicy = DEFAULT_RETRY
) -> StoredObject:
    """Return the description of the object `key`, which now holds the concatenation of `data`, durably.

    Idempotent: a key that holds the same bytes already, from an earlier attempt or another process, is success. A lost
    answer is resolved by reading back; nothing is ever overwritten. The buffers must not change meanwhile.

    Raises:
        ConflictError: the key holds other bytes (ALREADY_EXISTS).
        StorageError: not written (STORAGE_FULL, READ_ONLY, STORAGE_FAILED), or no way to tell (OUTCOME_UNKNOWN).
    """
    views, nbytes = as_views(key, data)
    hasher = _Hasher(views, nbytes)
    try:
        for _ in retry.tries():
            outcome = storage.put_new(key, views)
            if outcome is PutOutcome.CREATED or _holds(storage, key, nbytes, hasher, outcome):
                return StoredObject(key=key, nbytes=nbytes, sha256=hasher.result())
    finally:
        # The caller may reuse the buffers as soon as it has an answer, an error included.
        hasher.result()
    raise StorageError(
        ErrorKind.STORAGE_FAILED,
        f"writing object {key!r} ({nbytes} bytes) to {storage.url!r} failed: {retry.attempts} attempts were not answered, "
        "and it is not there: try again later",
    )


def _holds(storage: Storage, key: str, nbytes: int, hasher: _Hasher, outcome: PutOutcome) -> bool:
    """Return whether the object is there with the hashed bytes; False when it is certainly absent."""
    try:
        found_nbytes = storage.head(key)
        found = storage.get(key) if found_nbytes == nbytes else None
    except StorageError as err:
        raise StorageError(
            ErrorKind.OUTCOME_UNKNOWN,
            f"object {key!r} ({nbytes} bytes) may or may not be in {storage.url!r}: writing it ended as {outcome.value!r} "
            f"and reading it back failed ({err.message}): run the same command again, which is safe",
        ) from err
    if found_nbytes is None or (found is None and found_nbytes == nbytes):
        return False
    if found is None or hashlib.sha256(found).hexdigest() != hasher.result():
        raise ConflictError(
            ErrorKind.ALREADY_EXISTS,
            f"object {key!r} in {storage.url!r} holds {found_nbytes} other bytes than the {nbytes} to be written; objects "
            "are never overwritten: write under another key",
        )
    return True


def read_verified(storage: Storage, obj: StoredObject) -> bytes:
    """Return the bytes of `obj` if they have its length and SHA-256. At most one byte more than promised is read.

    Raises:
        FormatError: the object is absent (OBJECT_MISSING), or shorter, longer or different (OBJECT_DAMAGED).
        StorageError: it could not be read.
    """
    if obj.nbytes >= _READ_NBYTES and storage.head(obj.key) not in (obj.nbytes, None):
        _damaged(storage, obj, f"has not {obj.nbytes} bytes")
    step = obj.nbytes + 1 if storage.local_path(obj.key) is not None else _READ_NBYTES
    edges = [*range(0, obj.nbytes, step), obj.nbytes + 1]
    pieces = storage.get_ranges(obj.key, list(itertools.pairwise(edges)))
    if pieces is None:
        raise FormatError(
            ErrorKind.OBJECT_MISSING,
            f"object {obj.key!r} ({obj.nbytes} bytes) is promised by the manifest and absent from {storage.url!r}: "
            "restore it from a copy, or run `actstore fsck`",
        )
    body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if len(body) != obj.nbytes:
        found = "more" if len(body) > obj.nbytes else f"only {len(body)}"
        _damaged(storage, obj, f"has {found} bytes instead of {obj.nbytes}")
    if (sha256 := hashlib.sha256(body).hexdigest()) != obj.sha256:
        _damaged(storage, obj, f"({obj.nbytes} bytes) has SHA-256 {sha256} instead of {obj.sha256}")
    return body


def _damaged(storage: Storage, obj: StoredObject, what: str) -> None:
    raise FormatError(
        ErrorKind.OBJECT_DAMAGED,
        f"object {obj.key!r} in {storage.url!r} {what}: it was altered after it was written: restore it from a copy, or "
        "run `actstore fsck`",
    )
