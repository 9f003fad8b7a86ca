"""Does this store keep the promises that writers rely on?

Stores exist that accept a conditional create and ignore the condition, or list what was true a while ago; on those two
writers could both win. So a process that is going to write tries it out once per store, with objects under `probe/`.
"""

import os
import threading
import uuid

from actstore.errors import ActstoreError, ErrorKind, StorageError
from actstore.storage.base import PutOutcome, Storage
from actstore.storage.write import write_new

_LOCK = threading.Lock()
_PASSED: set[tuple[int, str]] = set()


def probe(storage: Storage) -> None:
    """Return if `storage` may be written to; asks the store once per process and root, with about eight requests.

    Safe to run at the same time from anywhere: every probe uses a key of its own, which it removes.

    Raises:
        StorageError: the store does not do what writers need (UNSAFE_STORE), is read-only (READ_ONLY), or failed.
    """
    if not storage.writable:
        raise StorageError(
            ErrorKind.READ_ONLY,
            f"store {storage.url!r} is read-only for this process: write to a folder or bucket that you may change",
        )
    scope = (os.getpid(), str(getattr(storage, "probe_scope", storage.url)))
    with _LOCK:
        if scope in _PASSED:
            return
    _try_out(storage)
    with _LOCK:
        _PASSED.add(scope)


def _try_out(storage: Storage) -> None:
    """Write, rewrite, read, list and delete one object; raise at the first deviation, the object removed."""
    key = f"probe/{uuid.uuid4().hex}"
    first, second = f"{key} first".encode(), f"{key} second".encode()
    write_new(storage, key, [first])
    try:
        if storage.put_new(key, [second]) is PutOutcome.CREATED:
            _unsafe(
                storage,
                "created an object that existed already: it ignores the condition of a conditional write",
            )
        if (found := storage.get(key)) != first:
            _unsafe(storage, f"gave back {found!r} for an object written as {first!r}")
        if storage.head(key) != len(first):
            _unsafe(storage, "reports a wrong length for an object just written")
        if key not in storage.list("probe/"):
            _unsafe(storage, "does not list an object just written: its listings are stale")
    except ActstoreError:
        _delete_quietly(storage, key)
        raise
    storage.delete(key)
    if storage.get(key) is not None:
        _unsafe(storage, "still shows an object just deleted")


def _delete_quietly(storage: Storage, key: str) -> None:
    """Remove the probe's object while a more telling error is on its way."""
    try:
        storage.delete(key)
    except StorageError:
        return


def _unsafe(storage: Storage, what: str) -> None:
    raise StorageError(
        ErrorKind.UNSAFE_STORE,
        f"store {storage.url!r} {what}; with it two writers could destroy each other's work, so actstore only reads it: "
        "keep the store in a folder of a POSIX file system, or on S3, GCS, Azure or a fully compatible store",
    )
