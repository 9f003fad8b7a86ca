"""What comes before and after the units of a collection: is it there with this configuration, and is it complete?"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from actstore.errors import ConflictError, ErrorKind, StorageError
from actstore.log import fingerprint
from actstore.log.values import Collection, Create, Seal, StoredObject
from actstore.store import Store

from .config import config_differences

_SEAL_TRIES = 10
_OTHERS = frozenset({ErrorKind.FENCED, ErrorKind.SEALED, ErrorKind.COUNT_DIFFERS})
"""What a seal meets when another job took the collection over or sealed it: looked at again, the content is the same."""


def ensure_collection(
    store: Store, kind: str, id: str, config: Mapping[str, Any], info: Mapping[str, Any] | None = None
) -> Collection:
    """Return the collection, created if there is none; `store` is moved to the newest version. Idempotent.

    Raises:
        ConflictError: CONFIG_DIFFERS: it exists with another configuration; the message lists the differences.
    """
    if (kind, id) not in store.refresh().state.collections:
        try:
            store.log.commit([Create(kind, id, dict(config), dict(info or {}))], txn=uuid.uuid4().hex)
        except ConflictError:
            # Another job may have been first: what it made is compared below. Anything else is the caller's to know.
            if (kind, id) not in store.refresh().state.collections:
                raise
    found = store.refresh().state.collection(kind, id)
    if found.fingerprint != fingerprint(dict(config)):
        lines = "\n  ".join(config_differences(found.config, config))
        raise ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"{kind} {id!r} exist with another configuration (stored -> asked):\n  {lines}\n"
            "Give the same settings to go on with them, or use another name",
        )
    return found


def seal_collection(
    store: Store,
    kind: str,
    id: str,
    *,
    n_units: int,
    objects: Sequence[StoredObject] = (),
    meta: Mapping[str, Any] | None = None,
) -> int:
    """Declare a collection of `n_units` complete, and return the version; one that is sealed already stays as it is.

    Raises:
        ConflictError: COUNT_DIFFERS: it has another number of units.
        StorageError: the storage failed, or other jobs keep taking the collection over; run the same again.
    """
    for _ in range(_SEAL_TRIES):
        found = store.refresh().state.collection(kind, id)
        if found.is_sealed:
            return store.version
        if len(found.units) != n_units:
            raise ConflictError(
                ErrorKind.COUNT_DIFFERS,
                f"cannot seal {kind} {id!r} with {len(found.units)} of {n_units} units: run the same again to compute the rest",
            )
        seal = Seal(
            kind=kind, id=id, epoch=found.epoch, units=n_units, rows=found.rows, objects=tuple(objects),
            meta=dict(meta or {}),
        )  # fmt: skip
        try:
            store.log.commit([seal], txn=uuid.uuid4().hex)
        except ConflictError as error:
            if error.kind not in _OTHERS:
                raise
    raise StorageError(
        ErrorKind.STORAGE_FAILED,
        f"{kind} {id!r} was taken over by other jobs {_SEAL_TRIES} times in a row: stop the other jobs of it",
    )
