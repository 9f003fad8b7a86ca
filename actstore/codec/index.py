"""Where in a shard does each inner chunk lie? (FORMAT.md, section 6)

The index is the last `spec.index_bytes` bytes of a shard: for each chunk its offset and length as little-endian uint64, both
2^64 - 1 when it is absent, then the CRC-32C of the index.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.codec.crc import crc32c
from actstore.codec.spec import ShardSpec
from actstore.errors import ErrorKind, FormatError

_ABSENT = 2**64 - 1
_FRAME_OVERHEAD = 20
"""A Blosc header of 16 bytes at most is added to data that do not compress; 4 bytes are the checksum."""


def encode_index(lengths: Sequence[int], n_chunks: int) -> bytes:
    """Return the index of a shard whose first `len(lengths)` chunks are stored one after another from byte 0.

    >>> len(encode_index([10, 10], 4))
    68
    """
    index = np.full((n_chunks, 2), _ABSENT, np.dtype("<u8"))
    stored = len(lengths)
    index[:stored, 1] = lengths
    index[:stored, 0] = np.cumsum([0, *lengths])[:stored]
    body = index.tobytes()
    return body + crc32c(body).to_bytes(4, "little")


def parse_index(
    data: bytes | npt.NDArray[np.uint8], spec: ShardSpec, *, n_rows: int, nbytes: int, key: str
) -> npt.NDArray[np.int64]:
    """Return where the chunks that hold `n_rows` rows lie.

    Args:
        data: The last `spec.index_bytes` bytes of the shard.
        spec: Layout of the shard.
        n_rows: Rows that must be there, at most `spec.rows_per_shard`.
        nbytes: Length of the shard that the manifest promises.
        key: Key of the shard, for messages.

    Returns:
        `[n_chunks, 2]`: offset and length in bytes of each chunk with its checksum; all within the shard.

    Raises:
        FormatError: short, damaged, a chunk is absent, outside of the shard, or of an impossible length.
    """
    body, stored = bytes(data[:-4]), bytes(data[-4:])
    if len(data) != spec.index_bytes or crc32c(body) != int.from_bytes(stored, "little"):
        raise damaged(key, f"its index of {spec.index_bytes} bytes does not match its checksum")
    n_chunks = spec.n_chunks_of(n_rows)
    index = np.frombuffer(body, "<u8").reshape(-1, 2)[:n_chunks]
    if np.any(index == _ABSENT):
        raise damaged(key, f"its index lacks chunks that hold some of its {n_rows} rows")
    offsets, lengths = index[:, 0], index[:, 1]
    end = nbytes - spec.index_bytes
    if np.any(lengths > end) or np.any(offsets > end - lengths):
        raise damaged(key, f"its index points outside of its {nbytes} bytes")
    if spec.codec == "hot":
        impossible = lengths != spec.chunk_bytes + 4
    else:
        impossible = (lengths < _FRAME_OVERHEAD) | (lengths > spec.chunk_bytes + _FRAME_OVERHEAD)
    if np.any(impossible):
        raise damaged(
            key, f"its index gives chunks a length that {spec.chunk_bytes} bytes of rows cannot have"
        )
    return index.astype(np.int64)


def damaged(key: str, found: str) -> FormatError:
    """Return the error for a shard whose bytes are not what was written."""
    return FormatError(
        ErrorKind.OBJECT_DAMAGED,
        f"object {key!r} is damaged: {found}; restore it or write its unit again (see fsck)",
    )


def missing(key: str) -> FormatError:
    """Return the error for an object that the manifest promises and the storage does not have."""
    return FormatError(
        ErrorKind.OBJECT_MISSING,
        f"object {key!r} is in the manifest and not in the storage: restore it (see fsck)",
    )


def frame_sizes(frame: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Return what a Blosc frame says of itself: its length decoded and encoded, in bytes.

    Source: c-blosc, README_CHUNK_FORMAT.rst: bytes 4-7 nbytes, 8-11 blocksize, 12-15 cbytes.
    """
    header: npt.NDArray[Any] = np.frombuffer(frame[4:16].tobytes(), "<u4")
    return int(header[0]), int(header[2])
