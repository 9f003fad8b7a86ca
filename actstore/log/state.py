"""What does the store hold at one version? (FORMAT.md, section 4.4)

A `State` is an immutable value: the one a reader has pinned never changes under it, and the next version's shares
everything but what changed (see `actstore.log.chunked`). `actstore.log.fold` makes one from another.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.log.entries import (
    collection_entry,
    epoch_entry,
    format_entry,
    seal_entry,
    tomb_entry,
    txn_entry,
    unit_entry,
)
from actstore.log.manifest import After
from actstore.log.txns import RecentTxns
from actstore.log.units import UnitMap
from actstore.log.values import Collection, Format, StoredObject

_LISTED = 20
"""Names that an error lists."""


@dataclass(frozen=True, slots=True)
class State:
    """Everything the store holds at `version`."""

    version: int
    manifest_sha256: str
    """SHA-256 of the bytes of this version's manifest, 64 hex digits."""

    format: Format
    collections: Mapping[tuple[str, str], Collection]
    """By kind and id."""

    txns: RecentTxns
    """Which of the last versions was made by which transaction."""

    tombs: Mapping[str, str]
    """Key to the time before which it must not be deleted."""

    hash_sum: int
    """Sum of the entry hashes modulo 2**256, see `actstore.log.entries`."""

    n_units: int = 0
    n_rows: int = 0
    nbytes: int = 0
    """Stored bytes of all live units and seals."""

    def collection(self, kind: str, id: str) -> Collection:
        """Return a collection.

        Raises:
            NotFoundError: there is none; the message lists ids like it, else those of that kind.
            InvalidInputError: `id` is no text.
        """
        if not isinstance(id, str):
            raise InvalidInputError(ErrorKind.BAD_NAME, f"the name of a {kind} is text, got {id!r:.80}")
        found = self.collections.get((kind, id))
        if found is not None:
            return found
        ids = sorted(i for k, i in self.collections if k == kind)
        hint = _hint(kind, ids, near=difflib.get_close_matches(id, ids, n=3, cutoff=0.5))
        raise NotFoundError(
            ErrorKind.COLLECTION_NOT_FOUND, f"no {kind} {id!r} at version {self.version}: {hint}"
        )

    def objects(self) -> Iterator[StoredObject]:
        """Yield every live object: those of units, then of the seal, collection by collection."""
        for collection in self.collections.values():
            for unit in collection.units.values():
                yield from unit.objects
            if collection.seal is not None:
                yield from collection.seal.objects

    @property
    def after(self) -> After:
        """What the manifest of this version says about it."""
        return After(
            collections=len(self.collections),
            units=self.n_units,
            rows=self.n_rows,
            nbytes=self.nbytes,
            state=f"{self.hash_sum:064x}",
        )

    def entries(self) -> Iterator[bytes]:
        """Yield every entry of the state, see `actstore.log.entries`; in an order that the state alone decides."""
        yield format_entry(self.format)
        for _, collection in sorted(self.collections.items(), key=lambda item: item[0]):
            kind, id = collection.kind, collection.id
            yield collection_entry(collection)
            if collection.epoch:
                yield epoch_entry(kind, id, collection.epoch)
            units = collection.units
            if isinstance(units, UnitMap):
                yield from units.entries(kind, id)
            else:
                yield from (unit_entry(kind, id, unit) for unit in units.values())
            if collection.seal is not None:
                yield seal_entry(collection.seal)
        for key, not_before in sorted(self.tombs.items()):
            yield tomb_entry(key, not_before)
        for version, txn in self.txns.items():
            yield txn_entry(txn, version)


def _hint(kind: str, ids: Sequence[str], *, near: Sequence[str]) -> str:
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    if not ids:
        return f"the store has no {kind} yet"
    more = f" and {len(ids) - _LISTED} more" if len(ids) > _LISTED else ""
    return f"there are {', '.join(map(repr, ids[:_LISTED]))}{more}"
