"""How are the rows of one hook point laid out in shards, and what does Zarr call that? (FORMAT.md, section 6)

A run's rows of a hook point are one Zarr v3 array `[rows, stored_width]`, cut into shards of `rows_per_shard` rows, one object
each. A shard is inner chunks of `rows_per_chunk` full rows, each with its CRC-32C, and an index at its end. Uncompressed,
it is a row-major file with 4 bytes after each chunk.
"""

from dataclasses import dataclass
from typing import Any, Final

from actstore.dtypes import stored_dtype, stored_width
from actstore.errors import ErrorKind, InvalidInputError

MAX_SHARD_BYTES: Final = 128 << 20
"""One PUT of every object store, and little enough to hold a few in memory."""

TARGET_CHUNK_BYTES: Final = 1 << 20
"""Fits a core's L2 cache; large enough that an object store's request costs little."""

TARGET_SUM_BYTES: Final = 4096
"""A page: reading less from a disk costs the same, and checksums of it take 0.1 % of the shard."""

MAX_CHUNK_BYTES: Final = 8 << 20
"""Planned chunks are at most this large; a reader decodes whole chunks of compressed shards."""

MAX_CHUNKS_PER_SHARD: Final = 1 << 16
"""An index of 1 MiB; more chunks than that mean a unit size that is no multiple of a power of two."""

CODECS: Final = {
    "hot": None,
    "lz4": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0},
    "cold": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 20},
}
"""Name of each codec and its Blosc configuration. `hot` stores rows as they are; measured on bf16 activations `lz4` is 1.3x
and `cold` 1.5x smaller (blosc's own block size would lose half of that gain)."""


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """The layout of a shard.

    Raises:
        InvalidInputError: sizes that are not positive or do not divide, or an unknown dtype or codec.

    >>> ShardSpec(rows_per_shard=8, rows_per_chunk=4, d_model=2, dtype="float16", codec="hot").n_chunks
    2
    """

    rows_per_shard: int
    rows_per_chunk: int
    """Divides `rows_per_shard`."""

    d_model: int
    """Numbers of a row as readers give it."""

    dtype: str
    """`float32`, `float16`, `bfloat16`, or `int8` with a scale per row."""

    codec: str
    """`hot`, `lz4` or `cold`."""

    def __post_init__(self) -> None:
        stored_dtype(self.dtype)
        if self.codec not in CODECS:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"codec {self.codec!r} is unknown: use one of {tuple(CODECS)}"
            )
        sizes = (self.rows_per_shard, self.rows_per_chunk, self.d_model)
        if min(sizes) < 1 or self.rows_per_shard % self.rows_per_chunk:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"a shard of {self.rows_per_shard} rows cannot be cut into chunks of {self.rows_per_chunk} rows of "
                f"{self.d_model} numbers: the sizes must be positive, and the second must divide the first",
            )
        if self.n_chunks > MAX_CHUNKS_PER_SHARD or self.chunk_bytes >= 1 << 31:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{self.n_chunks} chunks of {self.chunk_bytes} bytes in a shard are too many or too large: choose a "
                "number of rows per unit that is a multiple of a large power of two",
            )

    @property
    def n_chunks(self) -> int:
        """Inner chunks of a full shard."""
        return self.rows_per_shard // self.rows_per_chunk

    @property
    def stored_width(self) -> int:
        """Stored numbers of a row: `d_model`, or for int8 `d_model` and the bytes of the row's scale.

        >>> ShardSpec(8, 4, 2, "int8", "hot").stored_width
        6
        """
        return stored_width(self.d_model, self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row before compression."""
        return self.stored_width * stored_dtype(self.dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of an inner chunk before compression and without its checksum."""
        return self.rows_per_chunk * self.row_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of every shard: an offset and a length for each chunk, then a checksum."""
        return 16 * self.n_chunks + 4

    @property
    def rows_per_sum(self) -> int:
        """Rows under one checksum of the unit's sums: the fewest that fill a page, by powers of two, within a chunk."""
        return min(self.wanted_rows_per_sum, self.rows_per_chunk & -self.rows_per_chunk)

    @property
    def wanted_rows_per_sum(self) -> int:
        """What `rows_per_sum` is where chunks let it be."""
        return _power_of_two_at_least(-(-TARGET_SUM_BYTES // self.row_bytes))

    def n_chunks_of(self, n_rows: int) -> int:
        """Return how many chunks a shard of `n_rows` rows stores."""
        return -(-n_rows // self.rows_per_chunk)

    def n_sums_of(self, n_rows: int) -> int:
        """Return how many checksums cover `n_rows` rows."""
        return -(-n_rows // self.rows_per_sum)


def plan_spec(*, rows_per_unit: int, d_model: int, dtype: str, codec: str) -> ShardSpec:
    """Return the layout of a hook point: a whole unit in a shard, or as many halvings as 128 MiB ask for.

    Raises:
        InvalidInputError: no power of two divides `rows_per_unit` often enough.

    >>> spec = plan_spec(rows_per_unit=65536, d_model=768, dtype="bfloat16", codec="hot")
    >>> spec.rows_per_shard, spec.rows_per_chunk, spec.rows_per_sum
    (65536, 512, 4)
    """
    if rows_per_unit < 1 or d_model < 1:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{rows_per_unit} rows of {d_model} numbers cannot be stored: both must be positive",
        )
    row_bytes = stored_width(d_model, dtype) * stored_dtype(dtype).itemsize
    rows_per_shard = _halve(rows_per_unit, row_bytes, MAX_SHARD_BYTES)
    if rows_per_shard * row_bytes > MAX_SHARD_BYTES:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"units of {rows_per_unit} rows of {row_bytes} bytes cannot be halved into shards of at most "
            f"{MAX_SHARD_BYTES} bytes: choose a number of rows that is a multiple of a large power of two",
        )
    rows_per_chunk = _halve(rows_per_shard, row_bytes, TARGET_CHUNK_BYTES)
    if rows_per_chunk * row_bytes > MAX_CHUNK_BYTES:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"units of {rows_per_unit} rows of {row_bytes} bytes cannot be halved into chunks of about "
            f"{TARGET_CHUNK_BYTES} bytes: choose a number of rows that is a multiple of a large power of two",
        )
    return ShardSpec(rows_per_shard, rows_per_chunk, d_model, dtype, codec)


def blosc_configuration(spec: ShardSpec) -> dict[str, Any] | None:
    """Return the configuration of Zarr's `blosc` codec for `spec`, or None when rows are stored as they are."""
    configuration = CODECS[spec.codec]
    return None if configuration is None else {**configuration, "typesize": stored_dtype(spec.dtype).itemsize}


def _halve(n_rows: int, row_bytes: int, limit: int) -> int:
    while n_rows * row_bytes > limit and n_rows % 2 == 0:
        n_rows //= 2
    return n_rows


def _power_of_two_at_least(n: int) -> int:
    return 1 << (n - 1).bit_length()
