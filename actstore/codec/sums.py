"""Which few rows does each checksum of a unit cover, and are these the rows that were written? (FORMAT.md, section 7)

A chunk's own checksum says that its bytes belong together, not that they are the chunk that was asked for: a shard swapped
with its sibling passes. So a unit has *sums*: the CRC-32C of every `rows_per_sum` rows (about a page) of every hook point, in
one small object whose SHA-256 the manifest holds. Every row that a reader gives out was compared with its sum, whether it
came alone, with its chunk (the sums of a chunk join to the checksum of the whole) or out of a compressed frame.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.codec.crc import crc32c_joined, crc32c_pieces
from actstore.codec.spec import ShardSpec
from actstore.dtypes import StoredArray

Sums: TypeAlias = npt.NDArray[np.uint32]
"""`[n_sums]`, one for each `rows_per_sum` rows; the last rows are padded with zeros to a full group."""


@dataclass(frozen=True, slots=True)
class SumsRef:
    """Where a unit's sums of one hook point are stored."""

    key: str
    offset: int
    """First byte in the object."""

    nbytes: int
    sha256: str
    """Of these bytes, hex."""


def sums_of(spec: ShardSpec, rows: StoredArray) -> Sums:
    """Return the sums of contiguous stored rows `[n_rows, stored_width]` that start at a multiple of `rows_per_sum`.

    >>> spec = ShardSpec(8, 4, 2, "float16", "hot")
    >>> sums_of(spec, np.zeros((5, 2), np.float16)).shape
    (2,)
    """
    per_sum = spec.rows_per_sum
    n_whole = len(rows) // per_sum
    whole = crc32c_pieces(rows[: n_whole * per_sum].view(np.uint8).reshape(n_whole, per_sum * spec.row_bytes))
    if n_whole * per_sum == len(rows):
        return whole
    padded = np.zeros((per_sum, spec.stored_width), rows.dtype)
    padded[: len(rows) - n_whole * per_sum] = rows[n_whole * per_sum :]
    return np.append(whole, crc32c_pieces(padded.view(np.uint8).reshape(1, -1)))


def chunk_sums(spec: ShardSpec, sums: Sums) -> Sums:
    """Return the CRC-32C of every whole chunk that `sums`, which start at a chunk, cover."""
    per_chunk = spec.rows_per_chunk // spec.rows_per_sum
    n_chunks = len(sums) // per_chunk
    return crc32c_joined(
        sums[: n_chunks * per_chunk].reshape(n_chunks, per_chunk), spec.rows_per_sum * spec.row_bytes
    )


def pack_sums(key: str, sums: Mapping[str, Sums]) -> tuple[bytes, dict[str, Any]]:
    """Return a unit's sums object and what the unit's `meta["sums"]` says of it.

    Args:
        key: Key that the object will have, `runs/<id>/sums/<unit:08>-<attempt>.bin`.
        sums: Of every hook point, all shards of the unit one after another.

    >>> data, meta = pack_sums("k", {"embed": np.array([7], np.uint32)})
    >>> unpack_sums(data, parse_sums_ref(meta, "embed")).tolist()
    [7]
    """
    data, places = bytearray(), {}
    for hook_point, values in sums.items():
        part = values.astype("<u4").tobytes()
        places[hook_point] = [len(data), len(part), hashlib.sha256(part).hexdigest()]
        data += part
    return bytes(data), {"key": key, "hook_points": places}


def parse_sums_ref(meta: Mapping[str, Any], hook_point: str) -> SumsRef:
    """Return the place of one hook point's sums from a unit's `meta["sums"]`.

    Raises:
        KeyError, TypeError, ValueError: not what `pack_sums` made.
    """
    offset, nbytes, sha256 = meta["hook_points"][hook_point]
    return SumsRef(str(meta["key"]), int(offset), int(nbytes), str(sha256))


def unpack_sums(data: bytes, ref: SumsRef) -> Sums | None:
    """Return the sums in the bytes `[ref.offset, ref.offset + ref.nbytes)` of the object, None if damaged."""
    if len(data) != ref.nbytes or hashlib.sha256(data).hexdigest() != ref.sha256:
        return None
    return np.frombuffer(data, "<u4").astype(np.uint32)
