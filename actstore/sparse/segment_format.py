"""What are the stored bytes of a stretch of latents' postings, latent-major? (FORMAT.md, section 8.3)

A latent's postings, by descending value (of equal values the lowest row first), are cut into *blocks* of 4,096; within a block
rows ascend. So the strongest postings of a latent, or those in a range of values, lie in few blocks, and rows are still small
gaps. Latents follow each other by descending number of postings: pages then hold latents of like density, whose gaps have one
distribution. The directory has every latent's number of postings, from which all places follow, and every block's values.

Source: impact-ordered blocks are those of Anh, Moffat (2002), "Impact transformation: effective and efficient web retrieval",
SIGIR, section 3.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore.sparse.ints import damaged_ints, pack_ints, pack_values, unpack_ints, unpack_values
from actstore.sparse.parts import PageTable, Promised, frozen, page_table
from actstore.sparse.rows import MAX_LATENTS, VALUE_DTYPES, Values, indptr_of

MAGIC: Final = b"ACTPOST1"

BLOCK_POSTINGS: Final = 4096
PAGE_POSTINGS: Final = 1 << 15
"""A page ends before the block that would give it more. Decoding one takes well under a millisecond."""

_HEADER: Final = struct.Struct("<QQQIIB")
"""First latent, latents, postings, blocks, pages, bytes of a value."""

_PAGE_ENTRY: Final = np.dtype([("blocks", "<u4"), ("nbytes", "<u4"), ("crc", "<u4")])

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SegmentDirectory:
    """What a segment's directory says."""

    first_latent: int
    n_latents: int
    n_postings: int
    value_dtype: str
    counts: Int64s
    """Shape (n_latents,): postings of every latent, in the order of latents."""

    first_blocks: Int64s
    """Shape (n_latents,): number of every latent's first block; they follow each other."""

    block_counts: Int64s
    """Shape (n_blocks,): postings of every block."""

    block_starts: Int64s
    """Shape (n_blocks + 1,): postings before every block, in all pages together."""

    low: npt.NDArray[np.uint32]
    """Shape (n_blocks,): bits of the smallest value of every block."""

    high: npt.NDArray[np.uint32]
    """Shape (n_blocks,): bits of the largest."""

    page_blocks: Int64s
    """Shape (n_pages + 1,): first block of every page, and the number of blocks."""

    table: PageTable

    @property
    def nbytes(self) -> int:
        """Size in memory, about."""
        return 16 * self.n_latents + 24 * len(self.low) + 20 * len(self.page_blocks) + 512

    def blocks_of(self, local: int) -> range:
        """Return the numbers of a latent's blocks, strongest first; `local` counts from the segment's first latent."""
        first = int(self.first_blocks[local])
        return range(first, first + -(-int(self.counts[local]) // BLOCK_POSTINGS))

    def values_of(self, bits: npt.NDArray[np.uint32]) -> Values:
        """Return the values that some bits stand for."""
        kind = VALUE_DTYPES[self.value_dtype]
        values: Values = bits.astype(f"<u{kind.itemsize}").view(kind)
        return values


@dataclass(frozen=True, slots=True, eq=False)
class PostingsPage:
    """The postings of some blocks, one after another; in a block rows ascend."""

    rows: Int64s
    values: Values


def encode_page(
    rows: Int64s, bits: npt.NDArray[Any], starts: Int64s
) -> tuple[bytes, npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Return the bytes of a page, and the bits of the smallest and largest value of every block.

    Args:
        rows: Of the page's postings, block by block, ascending in each.
        bits: Of their values.
        starts: Where each block begins; there is at least one, and none is empty.
    """
    low = np.minimum.reduceat(bits, starts)
    high = np.maximum.reduceat(bits, starts)
    counts = np.diff(np.append(starts, len(rows)))
    gaps = np.diff(rows, prepend=0)
    gaps[starts] = 0
    # The first row of a block is stored apart; of the others the distance to the row before is at least 1.
    gaps = gaps[gaps > 0] - 1
    narrow = np.uint32 if int(gaps.max(initial=0)) < 1 << 32 else np.uint64
    data = b"".join(
        [
            pack_ints(rows[starts].astype(np.uint64)),
            pack_ints(gaps.astype(narrow)),
            pack_values(bits.view(f"<f{bits.itemsize}"), np.repeat(high, counts)),
        ]
    )
    return data, low.astype(np.uint32), high.astype(np.uint32)


def encode_directory(
    header: tuple[int, int, int, int],
    pages: Sequence[tuple[int, int, int]],
    counts: Int64s,
    low: npt.NDArray[np.uint32],
    high: npt.NDArray[np.uint32],
) -> bytes:
    """Return the bytes of a directory.

    Args:
        header: First latent, latents, postings, bytes of a value.
        pages: Blocks, length and CRC-32C of every page.
        counts: Postings of every latent.
        low: Bits of the smallest value of every block.
        high: Bits of the largest.
    """
    first_latent, n_latents, n_postings, value_bytes = header
    return b"".join(
        [
            _HEADER.pack(first_latent, n_latents, n_postings, len(low), len(pages), value_bytes),
            np.array(pages, _PAGE_ENTRY).tobytes(),
            pack_ints(counts.astype(np.uint64)),
            pack_ints(high),
            pack_ints(high - low),
        ]
    )


def parse_directory(data: bytes, *, told: Promised) -> tuple[SegmentDirectory, int]:
    """Return what a directory says, and its size in memory, which what the manifest told bounds.

    Raises:
        FormatError: it says nothing that `encode_segment` writes; without the name of the object.
    """
    try:
        first_latent, n_latents, n_postings, n_blocks, n_pages, value_bytes = _HEADER.unpack_from(data)
        pages = np.frombuffer(data, _PAGE_ENTRY, n_pages, _HEADER.size)
        latents = range(first_latent, first_latent + n_latents)
        is_known = n_latents > 0 and latents.stop <= MAX_LATENTS and told.latents in (None, latents)
        if n_postings != told.nnz or not is_known:
            raise damaged_ints(f"{n_postings} postings of the latents {latents}; the manifest has {told}")
        packed, offset = unpack_ints(data, n_latents, np.uint64, _HEADER.size + pages.nbytes)
        # A sum of whole numbers may go round.
        if packed.sum(dtype=np.float64) > 2.0 * n_postings or int(packed.sum()) != n_postings:
            raise damaged_ints(f"its latents do not have {n_postings} postings together")
        if n_blocks != int((-(-packed.astype(np.int64) // BLOCK_POSTINGS)).sum()):
            raise damaged_ints(f"the directory has {n_blocks} blocks, its counts make others")
        high, offset = unpack_ints(data, n_blocks, np.uint32, offset)
        span, _ = unpack_ints(data, n_blocks, np.uint32, offset)
        dtype = {kind.itemsize: name for name, kind in VALUE_DTYPES.items()}[value_bytes]
    except (struct.error, ValueError, KeyError) as error:
        raise damaged_ints(f"the directory is not one of postings ({error!r})") from error
    counts = packed.astype(np.int64)
    ranks = density_order(counts)
    ranked = -(-counts[ranks] // BLOCK_POSTINGS)
    first_blocks = np.empty(n_latents, np.int64)
    first_blocks[ranks] = indptr_of(ranked)[:-1]
    block_counts = block_counts_of(counts[ranks])
    page_blocks = indptr_of(pages["blocks"].astype(np.int64))
    if page_blocks[-1] != n_blocks or (span > high).any() or int(high.max(initial=0)) >> 8 * value_bytes:
        raise damaged_ints(
            f"pages of {page_blocks[-1]} blocks where there should be {n_blocks}, or their values are none"
        )
    table = page_table(pages["nbytes"].astype(np.int64), pages["crc"].astype(np.uint32), len(MAGIC))
    if table.offsets[-1] != told.pages_end:
        raise damaged_ints(
            f"its pages end at byte {table.offsets[-1]}, its directory begins at {told.pages_end}"
        )
    directory = SegmentDirectory(
        first_latent=first_latent,
        n_latents=n_latents,
        n_postings=n_postings,
        value_dtype=dtype,
        counts=frozen(counts),
        first_blocks=first_blocks,
        block_counts=block_counts,
        block_starts=indptr_of(block_counts),
        low=high - span,
        high=high,
        page_blocks=page_blocks,
        table=table,
    )
    return directory, directory.nbytes


def decode_page(data: bytes, directory: SegmentDirectory, number: int) -> PostingsPage:
    """Return the postings of a page.

    Raises:
        FormatError: the bytes are none that `encode_segment` writes; without the name of the object.
    """
    blocks = slice(int(directory.page_blocks[number]), int(directory.page_blocks[number + 1]))
    counts = directory.block_counts[blocks]
    n_blocks, n = len(counts), int(counts.sum())
    starts = indptr_of(counts)[:-1]
    firsts, offset = unpack_ints(data, n_blocks, np.int64)
    gaps, offset = unpack_ints(data, n - n_blocks, np.int64, offset)
    kind = VALUE_DTYPES[directory.value_dtype]
    most = np.repeat(directory.high[blocks].astype(f"<u{kind.itemsize}"), counts)
    values, _ = unpack_values(data, most, n, kind, offset)
    steps = np.empty(n, np.int64)
    inner = np.ones(n, np.bool_)
    inner[starts] = False
    gaps += 1
    steps[inner] = gaps
    # The first step of a block leads from the last row of the block before to its own first row.
    steps[starts] = 0
    ends = np.add.reduceat(steps, starts) + firsts
    steps[starts] = firsts
    steps[starts[1:]] -= ends[:-1]
    return PostingsPage(frozen(np.cumsum(steps)), frozen(values))


def block_counts_of(counts: Int64s) -> Int64s:
    """Return the postings of every block of latents with `counts` postings, in their order."""
    n_blocks = -(-counts // BLOCK_POSTINGS)
    blocks = np.full(int(n_blocks.sum()), BLOCK_POSTINGS, np.int64)
    ends = np.cumsum(n_blocks)[counts > 0]
    blocks[ends - 1] = (counts[counts > 0] - 1) % BLOCK_POSTINGS + 1
    return blocks


def density_order(counts: Int64s) -> Int64s:
    """Return the latents by descending number of postings, of equal ones the lowest first."""
    order: Int64s = np.argsort(-counts, kind="stable")
    return order
