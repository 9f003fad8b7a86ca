"""What must a reader know of a unit and a shard before it can verify rows: its sums, and where its chunks lie.

Both are small (0.1 % and 0.002 % of the rows), read once, bound to the manifest by SHA-256 or checked against it, and kept
up to a limit. Neither is trusted to be current: rows are compared with the sums each time they are read, so an object that
changes later is noticed.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from actstore.codec.cache import BytesCache
from actstore.codec.crc import crc32c_pieces
from actstore.codec.decode import decode_shard
from actstore.codec.index import damaged, missing, parse_index
from actstore.codec.layout import ShardRef, UnitRows
from actstore.codec.spec import ShardSpec
from actstore.codec.sums import Sums, chunk_sums, sums_of, unpack_sums
from actstore.storage.base import Storage

SUMS_CACHE_BYTES: Final = 64 << 20
"""Sums of about 60 GB of rows."""

INDEX_CACHE_BYTES: Final = 16 << 20
"""Indexes of about 8,000 shards."""


@dataclass(frozen=True, slots=True)
class UnitSums:
    """The sums of a unit at one hook point, and what they say of its whole chunks."""

    groups: Sums
    """`[n_sums]`."""

    chunks: Sums
    """`[whole chunks]`: CRC-32C of their rows."""

    def match(
        self, spec: ShardSpec, rows: npt.NDArray[np.uint8], first_group: int | npt.NDArray[np.int64]
    ) -> bool:
        """Return whether rows are the ones that were written.

        Args:
            spec: Layout of the shard.
            rows: Bytes of whole groups.
            first_group: Number of the first group in the unit, or of every group.
        """
        pieces = rows.reshape(-1, spec.rows_per_sum * spec.row_bytes)
        if isinstance(first_group, int):
            expected = self.groups[first_group : first_group + len(pieces)]
        else:
            expected = self.groups[first_group]
        return np.array_equal(crc32c_pieces(pieces), expected)


class Trusted:
    """Sums and indexes of the units of one hook point; safe for use from many threads."""

    def __init__(self, storage: Storage, spec: ShardSpec) -> None:
        self._storage = storage
        self._spec = spec
        self._sums: BytesCache[UnitSums] = BytesCache(SUMS_CACHE_BYTES)
        self._indexes: BytesCache[npt.NDArray[np.int64]] = BytesCache(INDEX_CACHE_BYTES)

    def sums(self, unit: UnitRows) -> UnitSums:
        """Return a unit's sums, from its sums object or, when it has none, from its shards hashed whole.

        Raises:
            FormatError: an object is missing, or not what the manifest says.
        """
        return self._sums.get(str(unit.unit), lambda: self._load_sums(unit))

    def index(self, shard: ShardRef) -> npt.NDArray[np.int64]:
        """Return offset and length of each chunk of a shard, `[n_chunks, 2]`.

        Raises:
            FormatError: the shard is missing, short, or its index is damaged.
        """
        return self._indexes.get(shard.key, lambda: self._load_index(shard))

    def _load_index(self, shard: ShardRef) -> tuple[npt.NDArray[np.int64], int]:
        found = self._storage.get_ranges(shard.key, [(shard.nbytes - self._spec.index_bytes, shard.nbytes)])
        if found is None:
            raise missing(shard.key)
        index = parse_index(found[0], self._spec, n_rows=shard.n_rows, nbytes=shard.nbytes, key=shard.key)
        return index, index.nbytes

    def _load_sums(self, unit: UnitRows) -> tuple[UnitSums, int]:
        groups = self._derive_sums(unit) if unit.sums is None else self._read_sums(unit)
        sums = UnitSums(groups, chunk_sums(self._spec, groups))
        return sums, sums.groups.nbytes + sums.chunks.nbytes

    def _read_sums(self, unit: UnitRows) -> Sums:
        ref = unit.sums
        assert ref is not None
        found = self._storage.get_ranges(ref.key, [(ref.offset, ref.offset + ref.nbytes)])
        if found is None:
            raise missing(ref.key)
        sums = unpack_sums(found[0], ref)
        if sums is None:
            raise damaged(ref.key, "the sums in it do not match their SHA-256 in the manifest")
        return sums

    def _derive_sums(self, unit: UnitRows) -> Sums:
        """Return the sums of shards that match their SHA-256; reads and hashes every one, one in memory at a time."""
        parts = []
        for shard in unit.shards:
            data = self._storage.get(shard.key)
            if data is None:
                raise missing(shard.key)
            if len(data) != shard.nbytes or hashlib.sha256(data).hexdigest() != shard.sha256:
                raise damaged(
                    shard.key,
                    f"its {len(data)} bytes do not match the manifest's {shard.nbytes} bytes and SHA-256",
                )
            parts.append(
                sums_of(self._spec, decode_shard(self._spec, data, n_rows=shard.n_rows, key=shard.key))
            )
        return np.concatenate(parts)
