"""How are some latents' postings read from a stored segment? Only the pages they lie in, each checked (FORMAT.md, 8.3)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.log.values import StoredObject
from actstore.sparse.ints import bits_of
from actstore.sparse.parts import ObjectParts, checked_entry, promised
from actstore.sparse.rows import VALUE_DTYPES, Values
from actstore.sparse.segment_format import (
    BLOCK_POSTINGS,
    PostingsPage,
    SegmentDirectory,
    decode_page,
    parse_directory,
)
from actstore.storage.base import Storage

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Block:
    """Some of a latent's postings: those of ranks `[start, start + count)` by descending value."""

    start: int
    count: int
    low: float
    """Smallest value."""

    high: float
    """Largest value."""


class Segment:
    """The stored postings of a stretch of latents; safe for use from many threads, pickles."""

    def __init__(
        self, storage: Storage, obj: StoredObject, meta: Any, *, latents: range | None = None
    ) -> None:
        """Take an object; reads nothing yet.

        Args:
            storage: Where it is.
            obj: As the manifest promises it.
            meta: What `encode_segment` returned with it.
            latents: Its latents, as the manifest has them; an object of others is damaged. None if that is not known.

        Raises:
            FormatError: `meta` is something else, or of a newer format.
        """
        self.key = obj.key
        self._parts = ObjectParts(storage, obj, checked_entry(obj, meta))
        self._parse = partial(parse_directory, told=promised(obj, meta, n_rows=None, latents=latents))

    @property
    def directory(self) -> SegmentDirectory:
        """What is where; read once and kept by a cache of the process.

        Raises:
            FormatError: the object is missing or damaged.
        """
        return self._parts.directory(self._parse)

    def blocks(self, latent: int) -> list[Block]:
        """Return the blocks of a latent, strongest first; reads the directory only."""
        directory = self.directory
        numbers = directory.blocks_of(latent - directory.first_latent)
        found = slice(numbers.start, numbers.stop)
        low, high = (directory.values_of(bits[found]).tolist() for bits in (directory.low, directory.high))
        counts = directory.block_counts[found].tolist()
        return [
            Block(place * BLOCK_POSTINGS, *block)
            for place, block in enumerate(zip(counts, low, high, strict=True))
        ]

    def ranks(self, latent: int, start: int, stop: int) -> tuple[Int64s, Values]:
        """Return rows and values of the postings of ranks `[start, stop)`: by descending value, equal ones by row."""
        directory = self.directory
        local = latent - directory.first_latent
        stop = min(stop, int(directory.counts[local]))
        if start >= stop:
            return np.empty(0, np.int64), np.empty(0, VALUE_DTYPES[directory.value_dtype])
        numbers = directory.blocks_of(local)
        first = start // BLOCK_POSTINGS
        wanted = numbers[first : -(-stop // BLOCK_POSTINGS)]
        rows, values = self._gather(directory, wanted, self._pages(directory, wanted))
        # Blocks follow each other by value, and equal values in two of them by row: a stable sort keeps that.
        bits = bits_of(values)
        order = np.argsort(np.iinfo(bits.dtype).max - bits, kind="stable")
        order = order[start - first * BLOCK_POSTINGS : stop - first * BLOCK_POSTINGS]
        return rows[order], values[order]

    def read_many(self, latents: Sequence[int]) -> list[tuple[Int64s, Values]]:
        """Return rows, ascending, and values of all postings of some latents; pages are read together."""
        directory = self.directory
        blocks = [directory.blocks_of(latent - directory.first_latent) for latent in latents]
        pages = self._pages(directory, [number for numbers in blocks for number in numbers])
        found = []
        for numbers in blocks:
            rows, values = self._gather(directory, numbers, pages)
            if len(numbers) > 1:
                order = np.argsort(rows, kind="stable")
                rows, values = rows[order], values[order]
            found.append((rows, values))
        return found

    def _pages(self, directory: SegmentDirectory, blocks: Iterable[int]) -> dict[int, PostingsPage]:
        numbers = np.fromiter(blocks, np.int64)
        # A set, as numpy's unique imports 40 ms of modules at its first call.
        wanted = sorted(set((np.searchsorted(directory.page_blocks, numbers, side="right") - 1).tolist()))

        def decode(number: int, data: bytes) -> tuple[PostingsPage, int]:
            page = decode_page(data, directory, number)
            return page, page.rows.nbytes + page.values.nbytes

        found = self._parts.pages(directory.table, wanted, decode)
        return dict(zip(wanted, found, strict=True))

    def _gather(
        self, directory: SegmentDirectory, blocks: range, pages: dict[int, PostingsPage]
    ) -> tuple[Int64s, Values]:
        """Return rows and values of blocks that follow each other, block by block; new memory."""
        rows: list[Int64s] = [np.empty(0, np.int64)]
        values: list[Values] = [np.empty(0, VALUE_DTYPES[directory.value_dtype])]
        block = blocks.start
        while block < blocks.stop:
            number = int(np.searchsorted(directory.page_blocks, block, side="right")) - 1
            end = min(blocks.stop, int(directory.page_blocks[number + 1]))
            base = int(directory.block_starts[directory.page_blocks[number]])
            part = slice(int(directory.block_starts[block]) - base, int(directory.block_starts[end]) - base)
            rows.append(pages[number].rows[part])
            values.append(pages[number].values[part])
            block = end
        return np.concatenate(rows), np.concatenate(values)
