"""Which rows do the bytes of a chunk or of a whole shard hold? (FORMAT.md, section 6)

Nothing is decoded before its checksum matched, and no frame before it said that it holds exactly one chunk: a forged frame
cannot claim memory.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.codec.crc import crc32c
from actstore.codec.encode import make_blosc
from actstore.codec.index import damaged, frame_sizes, parse_index
from actstore.codec.spec import ShardSpec
from actstore.dtypes import StoredArray, stored_dtype

if TYPE_CHECKING:
    from numcodecs.blosc import Blosc


class ChunkDecoder:
    """Decodes the chunks of one layout; safe for use from many threads."""

    def __init__(self, spec: ShardSpec) -> None:
        self._spec = spec
        self._blosc: Blosc | None = None if spec.codec == "hot" else make_blosc(spec)

    def decode(self, frame: npt.NDArray[np.uint8], *, key: str) -> npt.NDArray[np.uint8]:
        """Return the `spec.chunk_bytes` bytes of a chunk's rows.

        Args:
            frame: The chunk as stored, its checksum included.
            key: Key of the shard, for messages.

        Returns:
            A view of `frame` when rows are stored as they are, new memory otherwise.

        Raises:
            FormatError: the checksum differs, or the frame does not hold one chunk.
        """
        body = frame[:-4]
        if crc32c(body) != int.from_bytes(frame[-4:].tobytes(), "little"):
            raise damaged(key, "a chunk does not match its checksum")
        if self._blosc is None:
            if len(body) != self._spec.chunk_bytes:
                raise damaged(key, f"a chunk has {len(body)} bytes instead of {self._spec.chunk_bytes}")
            return body
        if frame_sizes(body) != (self._spec.chunk_bytes, len(body)):
            raise damaged(key, "a compressed chunk claims another length than it must have")
        rows = np.empty(self._spec.chunk_bytes, np.uint8)
        try:
            self._blosc.decode(body, out=rows)
        except (RuntimeError, ValueError) as error:
            raise damaged(key, f"a chunk cannot be decompressed ({error})") from error
        return rows


def decode_shard(spec: ShardSpec, data: bytes, *, n_rows: int, key: str) -> StoredArray:
    """Return the rows of a whole shard, every checksum in it verified.

    Args:
        spec: Layout of the shard.
        data: The whole object.
        n_rows: Rows that it must hold.
        key: Its key, for messages.

    Returns:
        `[n_rows, stored_width]` of dtype `stored_dtype(spec.dtype)`, new memory.

    Raises:
        FormatError: anything about the bytes is not as FORMAT.md has it.
    """
    view = np.frombuffer(data, np.uint8)
    index = parse_index(view[-spec.index_bytes :], spec, n_rows=n_rows, nbytes=len(data), key=key)
    rows = np.empty((n_rows, spec.stored_width), stored_dtype(spec.dtype))
    flat = rows.view(np.uint8).reshape(-1)
    decoder = ChunkDecoder(spec)
    for chunk, (offset, length) in enumerate(index.tolist()):
        target = flat[chunk * spec.chunk_bytes : (chunk + 1) * spec.chunk_bytes]
        target[:] = decoder.decode(view[offset : offset + length], key=key)[: len(target)]
    return rows
