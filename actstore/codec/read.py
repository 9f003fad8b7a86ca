"""How are planned rows brought from the storage into an array, every byte verified, within a memory limit?

`RowReader` is the one place where rows are read. It gives out no row that it did not compare with the unit's sums in the same
call (`actstore.codec.sums`); a missing object or a short read is an error, never zeros.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from actstore.codec.crc import crc32c
from actstore.codec.decode import ChunkDecoder
from actstore.codec.index import damaged, missing
from actstore.codec.layout import RowLayout, UnitRows
from actstore.codec.plan import Fetch, Int64s, Piece, plan_fetches, plan_pieces, plan_shards
from actstore.codec.trusted import Trusted, UnitSums
from actstore.dtypes import FloatArray, StoredArray, stored_dtype, to_float32
from actstore.int8 import dequantise
from actstore.storage.base import Storage

_GAP_BYTES_LOCAL: Final = 16 << 10
"""A system call costs about as much as copying this from the page cache."""

_GAP_BYTES_REMOTE: Final = 64 << 10
"""Below it another request costs more than the bytes; measured on an S3 emulator with 30 ms per request."""

_SMALL_BYTES_LOCAL: Final = 4 << 20
"""Scattered rows of a local disk up to this are read by the calling thread: starting others takes as long."""

_SPAN_BYTES_REMOTE: Final = 8 << 20
"""One request of a scan."""

_THREADS_REMOTE: Final = 16

T = TypeVar("T")


class RowReader:
    """Reads rows of one hook point; safe for use from many threads."""

    def __init__(self, storage: Storage, layout: RowLayout, *, memory_bytes: int) -> None:
        """Read `layout` from `storage`.

        Args:
            storage: Where the objects are.
            layout: Of the hook point at one version.
            memory_bytes: Limit for buffers in use at once, answers and caches of sums (80 MiB at most) not counted.
                At least one chunk per thread is used whatever it says.
        """
        self.layout = layout
        self.memory_bytes = memory_bytes
        self.is_local = not layout.units or storage.local_path(layout.units[0].shards[0].key) is not None
        self.span_bytes = 1 if self.is_local else _SPAN_BYTES_REMOTE
        per_thread = 2 * max(self.span_bytes, layout.spec.chunk_bytes + 64)
        wanted = max(2, min(8, os.cpu_count() or 2)) if self.is_local else _THREADS_REMOTE
        self.threads = max(1, min(wanted, memory_bytes // per_thread))
        self._storage = storage
        self._trusted = Trusted(storage, layout.spec)
        self._decoder = ChunkDecoder(layout.spec)
        self._stored = stored_dtype(layout.spec.dtype)
        self._scratch: SimpleQueue[npt.NDArray[np.uint8]] = SimpleQueue()

    def gather(self, places: Int64s, out: StoredArray) -> None:
        """Read the rows at some places, in any order and repeated, into `out` `[len(places), width]` in the order asked.

        Args:
            places: From `layout.places`.
            out: float32 of `d_model` numbers a row, or of the stored dtype and width.
        """
        spec = self.layout.spec
        gap = (_GAP_BYTES_LOCAL if self.is_local else _GAP_BYTES_REMOTE) // spec.row_bytes
        per_row = spec.row_bytes + (4 * spec.d_model if spec.dtype == "int8" else 0)
        max_rows = max(1, self.memory_bytes // (4 * self.threads * per_row))
        plans = plan_shards(self.layout, places)
        fetches = [
            fetch for plan in plans for fetch in plan_fetches(spec, plan, max_gap_rows=gap, max_rows=max_rows)
        ]
        fetch_one = self._fetch_hot if spec.codec == "hot" else self._fetch_compressed
        is_small = (
            self.is_local and spec.codec == "hot" and len(places) * spec.row_bytes <= _SMALL_BYTES_LOCAL
        )
        run_all(
            [partial(fetch_one, fetch, out) for fetch in fetches], threads=1 if is_small else self.threads
        )

    def read_runs(self, runs: Iterable[tuple[UnitRows, int, int]], out: StoredArray) -> None:
        """Read runs `(unit, first, end)` of units' stored rows one after another into `out`."""
        pieces, target = list[Piece](), 0
        for unit, first, end in runs:
            pieces += plan_pieces(self.layout, unit, first, end, target=target)
            target += end - first
        run_all(self.tasks(pieces, out), threads=self.threads)

    def tasks(
        self, pieces: Sequence[Piece], out: StoredArray, columns: npt.NDArray[np.int64] | None = None
    ) -> list[Callable[[], None]]:
        """Return independent calls that together read `pieces` into `out`.

        Args:
            pieces: What to read.
            out: `[rows, width]`, float32 of `d_model` numbers a row or of the stored dtype and width; `[rows, len(columns)]`.
            columns: Of that width; all of them if None.
        """
        return [partial(self._read_span, span, out, columns) for span in self._spans(pieces)]

    def _spans(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """Group pieces of chunks that follow each other in one shard into requests of about `span_bytes`."""
        per_span = max(1, self.span_bytes // self.layout.spec.chunk_bytes)
        spans: list[list[Piece]] = []
        for piece in pieces:
            last = spans[-1] if spans else []
            follows = last and last[-1].shard is piece.shard and last[-1].chunk + 1 == piece.chunk
            if follows and len(last) < per_span:
                last.append(piece)
            else:
                spans.append([piece])
        return spans

    def _read_span(self, span: list[Piece], out: StoredArray, columns: npt.NDArray[np.int64] | None) -> None:
        """Read pieces of consecutive chunks by one request, or by several where the index has them apart."""
        index = self._trusted.index(span[0].shard)
        sums = self._trusted.sums(span[0].unit)
        low = 0
        for high in range(1, len(span) + 1):
            if high < len(span) and index[span[high].chunk, 0] == index[span[high - 1].chunk].sum():
                continue
            if self.layout.spec.codec == "hot":
                self._read_hot(span[low:high], index, sums, out, columns)
            else:
                self._read_compressed(span[low:high], index, sums, out, columns)
            low = high

    def _read_hot(
        self, span: list[Piece], index: Int64s, sums: UnitSums, out: StoredArray, columns: Int64s | None
    ) -> None:
        """Read from the first piece's first sum group to the last one's last; checksums in between are skipped."""
        spec, shard = self.layout.spec, span[0].shard
        first = _down(span[0].start, spec.rows_per_sum)
        end = _up(span[-1].stop, spec.rows_per_sum)
        base = int(index[span[0].chunk, 0]) + first * spec.row_bytes
        nbytes = int(index[span[-1].chunk, 0]) + end * spec.row_bytes - base
        direct = self._direct_target(span, first, end, out, columns)
        buffer = self._take(nbytes) if direct is None else direct
        try:
            self._read_exactly(shard.key, base, buffer[:nbytes])
            for piece in span:
                low, high = _down(piece.start, spec.rows_per_sum), _up(piece.stop, spec.rows_per_sum)
                offset = int(index[piece.chunk, 0]) + low * spec.row_bytes - base
                rows = buffer[offset : offset + (high - low) * spec.row_bytes]
                self._verify(piece, low, rows, sums)
                if direct is None:
                    self._emit(piece, low, rows, out, columns)
        finally:
            if direct is None:
                self._scratch.put(buffer)

    def _direct_target(
        self, span: list[Piece], first: int, end: int, out: StoredArray, columns: Int64s | None
    ) -> npt.NDArray[np.uint8] | None:
        """Return the memory of `out` itself when the bytes can be read straight into it."""
        piece = span[0]
        whole = len(span) == 1 and (first, end) == (piece.start, piece.stop)
        if not whole or columns is not None or out.dtype != self._stored or not out.flags.c_contiguous:
            return None
        return out[piece.target : piece.target + end - first].view(np.uint8).reshape(-1)

    def _read_compressed(
        self, span: list[Piece], index: Int64s, sums: UnitSums, out: StoredArray, columns: Int64s | None
    ) -> None:
        base = int(index[span[0].chunk, 0])
        buffer = self._take(int(index[span[-1].chunk].sum()) - base)
        try:
            self._read_exactly(span[0].shard.key, base, buffer[: int(index[span[-1].chunk].sum()) - base])
            for piece in span:
                offset, length = index[piece.chunk].tolist()
                rows = self._decoder.decode(
                    buffer[offset - base : offset - base + length], key=piece.shard.key
                )
                self._verify(piece, 0, self._stored_part(piece, rows), sums)
                self._emit(piece, 0, rows, out, columns)
        finally:
            self._scratch.put(buffer)

    def _stored_part(self, piece: Piece, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the chunk without groups that are wholly past the shard's rows: there is nothing to compare them with."""
        spec = self.layout.spec
        left = piece.shard.n_rows - piece.chunk * spec.rows_per_chunk
        return rows[: min(spec.rows_per_chunk, _up(left, spec.rows_per_sum)) * spec.row_bytes]

    def _verify(self, piece: Piece, first: int, rows: npt.NDArray[np.uint8], sums: UnitSums) -> None:
        """Raise unless `rows`, from row `first` of the chunk on, are what the unit's sums say."""
        spec = self.layout.spec
        chunk = piece.number * spec.n_chunks + piece.chunk
        if len(rows) == spec.chunk_bytes and chunk < len(sums.chunks):
            right = crc32c(rows) == int(sums.chunks[chunk])
        else:
            right = sums.match(spec, rows, (chunk * spec.rows_per_chunk + first) // spec.rows_per_sum)
        if not right:
            raise _wrong_rows(piece.shard.key)

    def _emit(
        self, piece: Piece, first: int, rows: npt.NDArray[np.uint8], out: StoredArray, columns: Int64s | None
    ) -> None:
        """Put the piece's rows into their place in `out`; `rows` start at row `first` of the chunk."""
        row_bytes = self.layout.spec.row_bytes
        part = rows[(piece.start - first) * row_bytes : (piece.stop - first) * row_bytes]
        values = part.view(self._stored).reshape(piece.stop - piece.start, -1)
        target = out[piece.target : piece.target + len(values)]
        if out.dtype != self._stored:
            self.widen(values, out=target, columns=columns)
        else:
            target[...] = values if columns is None else values[:, columns]

    def widen(
        self, stored: StoredArray, *, out: FloatArray | None = None, columns: Int64s | None = None
    ) -> FloatArray:
        """Return stored rows `[t, stored_width]` as float32 `[t, d_model]` or `[t, len(columns)]`, in `out` if given."""
        if self.layout.int8 is not None:
            return dequantise(stored, self.layout.int8, out, columns=columns)
        return to_float32(stored if columns is None else stored[:, columns], self.layout.spec.dtype, out=out)

    def _fetch_hot(self, fetch: Fetch, out: StoredArray) -> None:
        """Bring scattered rows of an uncompressed shard: exact ranges of sum groups."""
        spec, wanted = self.layout.spec, fetch.wanted
        offsets = self._trusted.index(wanted.shard)[:, 0]
        chunk, in_chunk = np.divmod(fetch.starts, spec.rows_per_chunk)
        begins = offsets[chunk] + in_chunk * spec.row_bytes
        ends = begins + (fetch.stops - fetch.starts) * spec.row_bytes
        data = self._get_ranges(wanted.shard.key, begins, ends)
        groups = _concatenated_ranges(fetch.starts // spec.rows_per_sum, fetch.stops // spec.rows_per_sum)
        groups += wanted.number * (spec.rows_per_shard // spec.rows_per_sum)
        sums = self._trusted.sums(wanted.unit)
        existing = groups < len(sums.groups)
        if not existing.all():  # padding behind the last row of a unit
            kept = data.reshape(len(groups), -1)[existing]
            right = sums.match(spec, kept, groups[existing])
        else:
            right = sums.match(spec, data, groups)
        if not right:
            raise _wrong_rows(wanted.shard.key)
        self._scatter(fetch, data.view(self._stored).reshape(-1, spec.stored_width), out)

    def _fetch_compressed(self, fetch: Fetch, out: StoredArray) -> None:
        """Bring scattered rows of a compressed shard: the frames of their chunks, decoded one at a time."""
        spec, wanted = self.layout.spec, fetch.wanted
        index = self._trusted.index(wanted.shard)
        chunks = _concatenated_ranges(fetch.starts // spec.rows_per_chunk, fetch.stops // spec.rows_per_chunk)
        begins, ends = index[chunks, 0], index[chunks].sum(axis=1)
        frames = self._get_ranges(wanted.shard.key, begins, ends)
        sums = self._trusted.sums(wanted.unit)
        offset = 0
        for chunk, length in zip(chunks.tolist(), (ends - begins).tolist(), strict=True):
            rows = self._decoder.decode(frames[offset : offset + length], key=wanted.shard.key)
            offset += length
            piece = Piece(wanted.unit, wanted.number, chunk, 0, spec.rows_per_chunk, 0)
            self._verify(piece, 0, self._stored_part(piece, rows), sums)
            here = slice(
                *np.searchsorted(
                    wanted.rows, [chunk * spec.rows_per_chunk, (chunk + 1) * spec.rows_per_chunk]
                )
            )
            values = rows.view(self._stored).reshape(-1, spec.stored_width)[
                wanted.rows[here] - chunk * spec.rows_per_chunk
            ]
            out[wanted.targets[here]] = self._answer(values, out)

    def _scatter(self, fetch: Fetch, read: StoredArray, out: StoredArray) -> None:
        out[fetch.wanted.targets] = self._answer(read[fetch.places], out)

    def _answer(self, stored: StoredArray, out: StoredArray) -> StoredArray:
        return stored if out.dtype == self._stored else self.widen(stored)

    def _get_ranges(self, key: str, begins: Int64s, ends: Int64s) -> npt.NDArray[np.uint8]:
        """Return the bytes of all ranges, one after another."""
        found = self._storage.get_ranges(key, list(zip(begins.tolist(), ends.tolist(), strict=True)))
        if found is None:
            raise missing(key)
        data = np.frombuffer(found[0] if len(found) == 1 else b"".join(found), np.uint8)
        if len(data) != int((ends - begins).sum()):
            raise damaged(key, "it is shorter than the manifest says")
        return data

    def _read_exactly(self, key: str, start: int, out: npt.NDArray[np.uint8]) -> None:
        count = self._storage.read_into(key, start, out.data)
        if count is None:
            raise missing(key)
        if count != len(out):
            raise damaged(key, "it is shorter than the manifest says")

    def _take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return a buffer of at least `nbytes` that another call has let go, or a new one."""
        with suppress(Empty):
            while True:
                buffer = self._scratch.get_nowait()
                if len(buffer) >= nbytes:
                    return buffer
        return np.empty(max(nbytes, self.layout.spec.chunk_bytes), np.uint8)


def run_all(tasks: Sequence[Callable[[], Any]], *, threads: int) -> None:
    """Run all tasks and return when they are done; the first error is raised once the running ones have ended."""
    if len(tasks) == 1 or threads == 1:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(max(1, min(threads, len(tasks)))) as pool:
        wait_for([pool.submit(task) for task in tasks])


def wait_for(futures: Sequence[Future[T]]) -> list[T]:
    """Return all results in order; at the first error the ones not begun are cancelled and it is raised."""
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _concatenated_ranges(starts: Int64s, stops: Int64s) -> Int64s:
    """Return all integers of the ranges `[start, stop)`, one range after another."""
    lengths = stops - starts
    before = np.concatenate(([0], np.cumsum(lengths)))
    return np.arange(before[-1], dtype=np.int64) + np.repeat(starts - before[:-1], lengths)


def _down(row: int, step: int) -> int:
    return row // step * step


def _up(row: int, step: int) -> int:
    return -(-row // step) * step


def _wrong_rows(key: str) -> Exception:
    return damaged(key, "some of its rows are not the ones that were written (their checksums differ)")
