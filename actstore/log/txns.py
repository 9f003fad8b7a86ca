"""Which version did a transaction make, if it was one of the recent ones?

An immutable record of the transactions of the last `KEPT_TXNS` versions, found by version and by name; the next version's
shares nearly all of it.
"""

import zlib
from collections.abc import Iterator, Mapping

from actstore.log.chunked import ChunkedMap

KEPT_TXNS = 4096
"""So many versions back a retried transaction is still recognised; a retry comes within minutes, and adds are
idempotent without it."""

_SLOT_BITS = 14
"""16,384 slots: with 4,096 names most slots hold one, and a table of 64 chunks is copied in a microsecond."""


class RecentTxns:
    """Transactions by version and by name.

    >>> txns = RecentTxns().added("a", 0).added("b", 1)
    >>> txns.version_of("b"), txns.version_of("c"), list(txns.items())
    (1, None, [(0, 'a'), (1, 'b')])
    """

    __slots__ = ("_by_slot", "_by_version")

    def __init__(self) -> None:
        self._by_version: ChunkedMap[str] = ChunkedMap()
        self._by_slot: ChunkedMap[tuple[int, ...]] = ChunkedMap()

    @classmethod
    def of(cls, txns: Mapping[int, str]) -> "RecentTxns":
        """Return a record of `txns`, by version."""
        slots: dict[int, tuple[int, ...]] = {}
        for version, txn in txns.items():
            slots[_slot(txn)] = (*slots.get(_slot(txn), ()), version)
        new = cls()
        new._by_version = ChunkedMap.of(txns)
        new._by_slot = ChunkedMap.of(slots)
        return new

    def version_of(self, txn: str) -> int | None:
        """Return the version that `txn` made, or None when it is not among the recent ones."""
        versions = self._by_slot.get(_slot(txn), ())
        return next((version for version in versions if self._by_version[version] == txn), None)

    def oldest_to_go(self, version: int) -> tuple[int, str] | None:
        """Return the version that leaves the record when `version` enters it, and its transaction."""
        gone = version - KEPT_TXNS
        return (gone, self._by_version[gone]) if gone in self._by_version else None

    def added(self, txn: str, version: int) -> "RecentTxns":
        """Return the record with the next version in it, and without the one that is too old then."""
        slots = {_slot(txn): (*self._by_slot.get(_slot(txn), ()), version)}
        gone = self.oldest_to_go(version)
        if gone is not None:
            slot = _slot(gone[1])
            slots[slot] = tuple(v for v in slots.get(slot, self._by_slot.get(slot, ())) if v != gone[0])
        new = RecentTxns()
        new._by_version = self._by_version.updated({version: txn}, removed=[] if gone is None else [gone[0]])
        new._by_slot = self._by_slot.updated(slots)
        return new

    def items(self) -> Iterator[tuple[int, str]]:
        """Yield version and transaction, oldest first."""
        return iter(self._by_version.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecentTxns) and self._by_version == other._by_version

    __hash__ = None  # type: ignore[assignment]


def _slot(txn: str) -> int:
    return zlib.crc32(txn.encode()) >> (32 - _SLOT_BITS)
