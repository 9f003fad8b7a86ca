"""Which compressed rows have the largest inner products with some directions? All of a shard's bytes, multiplied once.

FAISS multiplies a few directions, one at a time. It reads the bytes where they are mapped, and for it every byte stands for
itself less 127.5, twice as fast as a range for each axis: the true ranges are in the direction (`actstore.sq8`). Many directions
are multiplied together: blocks of bytes become float32, and one matrix product takes all of them.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.faiss_file import faiss_threads, load_faiss
from actstore.sq8 import CodeQueries, Codes, code_index, read_compression

from .row_bits import Bits

Float32s: TypeAlias = npt.NDArray[np.float32]
Float64s: TypeAlias = npt.NDArray[np.float64]
Int64s: TypeAlias = npt.NDArray[np.int64]

_SHIFT: Final = 127.5
_MANY: Final = 8
"""Directions from which on a matrix product is faster; measured with 768 dimensions, and twice as fast with 32."""

_BLOCK_ROWS: Final = 512
"""Rows made float32 at a time: 1.5 MiB of 768 dimensions."""

_CHUNK_SCORES: Final = 1 << 22
"""Products held at a time by a thread: 16 MiB."""

_LEAST_ROWS: Final = 1 << 15
"""Rows that are worth a thread: about 2 ms."""


@dataclass(frozen=True, slots=True)
class Matches:
    """What was found of q directions among the rows that count."""

    values: Float64s
    """Inner products, each within `slack_q` of the true one; `-inf` where there is none. Shape (q, m), in no order."""

    ordinals: Int64s
    """Of the rows, -1 where there is none; shape (q, m)."""

    slack_q: Float64s
    beyond_q: Float64s
    """No other row that counts has a larger value, error included; `-inf` if there is no other row."""


class CompressedRows:
    """The bytes of one shard; safe for use from many threads."""

    def __init__(self, opened: Any) -> None:
        """Take an index of kind `scan_sq8` as `IndexShard.open` gives it, which stays mapped as long as this lives."""
        self._opened, self._index = opened, code_index(opened)
        self.n, self.d = int(self._index.ntotal), int(self._index.d)
        self._compression = read_compression(opened)
        flat: Codes = np.empty(0, np.uint8)
        if self.n:
            flat = load_faiss().rev_swig_ptr(self._index.codes.data(), self.n * self.d)
        self._codes_nd: Codes = flat.reshape(self.n, self.d)

    @property
    def nbytes(self) -> int:
        """Bytes that a scan reads."""
        return self._codes_nd.nbytes

    def n_found(self, k: int, *, threads: int) -> int:
        """Return how many rows of a direction `best` returns at most."""
        return sum(min(k, stop - start) for start, stop in self._parts(threads))

    def best(self, vectors_qd: Float64s, k: int, *, bits: Bits, threads: int) -> Matches:
        """Return at least the `k` rows of every direction whose values are largest, all there are if fewer count.

        Memory: `threads` times 16 bytes for each direction and row returned; with many directions 16 MiB more.

        Args:
            vectors_qd: Finite directions, shape (q, d).
            k: At least 1.
            bits: Which rows count, as `row_bits.ShardBits.bits`.
            threads: Parts that are looked at side by side.
        """
        is_many = len(vectors_qd) >= _MANY
        queries = CodeQueries(self._compression, vectors_qd, shift=0.0 if is_many else _SHIFT)
        parts = self._parts(threads)
        if is_many:
            tasks = [_Product(self._codes_nd, *part, queries.vectors_qd, k, bits) for part in parts]
            found = _run(tasks)
        else:
            found = _run([_Scan(self._view(*part), part[0], queries.vectors_qd, k, bits) for part in parts])
        raw = np.concatenate([some.raw for some in found], axis=1)
        beyond_q1 = np.max([some.beyond_q for some in found], axis=0)[:, None]
        return Matches(
            values=queries.values(raw),
            ordinals=np.concatenate([some.ordinals for some in found], axis=1),
            slack_q=queries.slack_q,
            beyond_q=queries.values(beyond_q1)[:, 0] + queries.slack_q,
        )

    def _parts(self, threads: int) -> list[tuple[int, int]]:
        """Return half-open ranges of rows that begin at a whole byte of a bitmap."""
        n_parts = max(1, min(threads, self.n // _LEAST_ROWS))
        size = max(8, -(-self.n // (8 * n_parts)) * 8)
        return [(start, min(start + size, self.n)) for start in range(0, max(1, self.n), size)]

    def _view(self, start: int, stop: int) -> Any:
        """Return a FAISS index over the same bytes in which every byte stands for itself less 127.5."""
        faiss = load_faiss()
        quantizer = faiss.ScalarQuantizer.QT_8bit_uniform
        view = faiss.IndexScalarQuantizer(self.d, quantizer, faiss.METRIC_INNER_PRODUCT)
        # FAISS decodes byte c of a uniform range to low + width (c + 0.5) / 255.
        faiss.copy_array_to_vector(np.array([-_SHIFT - 0.5, 255], np.float32), view.sq.trained)
        view.is_trained = True
        if stop > start:
            owner = self._index.codes.owner
            bytes_of = faiss.swig_ptr(self._codes_nd[start:stop])
            view.codes = faiss.MaybeOwnedVectorUInt8.create_view(bytes_of, (stop - start) * self.d, owner)
        view.ntotal = stop - start
        return view


@dataclass(frozen=True, slots=True)
class _Part:
    """What was found in a range of rows."""

    raw: Float32s
    ordinals: Int64s
    beyond_q: Float32s
    """The largest product that may have been left out; `-inf` if none was."""


@dataclass(frozen=True, slots=True)
class _Scan:
    """FAISS's scan of a range of rows."""

    view: Any
    start: int
    vectors_qd: Float32s
    k: int
    bits: Bits

    def __call__(self) -> _Part:
        faiss = load_faiss()
        n = int(self.view.ntotal)
        bits = np.ascontiguousarray(self.bits[self.start // 8 : -(-(self.start + n) // 8)])
        k = min(self.k, max(1, n))
        with faiss_threads(1):
            raw, ordinals = self.view.search(
                self.vectors_qd, k, params=faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
            )
        there = ordinals >= 0
        raw = np.where(there, raw, np.float32(-np.inf))
        is_full = there.all(axis=1) & (k < n)
        beyond_q = np.where(is_full, raw.min(axis=1), np.float32(-np.inf))
        return _Part(raw, np.where(there, ordinals + self.start, -1), beyond_q)


@dataclass(frozen=True, slots=True)
class _Product:
    """The scan of a range of rows by matrix products."""

    codes_nd: Codes
    start: int
    stop: int
    vectors_qd: Float32s
    k: int
    bits: Bits

    def __call__(self) -> _Part:
        n_queries = len(self.vectors_qd)
        n_blocks = min(
            _CHUNK_SCORES // (n_queries * _BLOCK_ROWS), -(-(self.stop - self.start) // _BLOCK_ROWS)
        )
        chunk_rows = max(1, n_blocks) * _BLOCK_ROWS
        best = [_Best(self.k) for _ in range(n_queries)]
        chunk_qt = np.empty((n_queries, chunk_rows), np.float32)
        for first in range(self.start, self.stop, chunk_rows):
            stop = min(first + chunk_rows, self.stop)
            self._multiply(first, stop, chunk_qt)
            bits = self.bits[first // 8 : -(-stop // 8)]
            keep = np.unpackbits(bits, count=stop - first, bitorder="little").view(np.bool_)
            for scores_t, one in zip(chunk_qt[:, : stop - first], best, strict=True):
                one.offer(scores_t, keep, first)
        return _pad([one.finish() for one in best])

    def _multiply(self, first: int, stop: int, out_qt: Float32s) -> None:
        block_td = np.empty((_BLOCK_ROWS, self.codes_nd.shape[1]), np.float32)
        for start in range(first, stop, _BLOCK_ROWS):
            codes_td = self.codes_nd[start : min(start + _BLOCK_ROWS, stop)]
            block = block_td[: len(codes_td)]
            np.copyto(block, codes_td, casting="unsafe")
            out_qt[:, start - first : start - first + len(block)] = self.vectors_qd @ block.T


class _Best:
    """The `k` largest products of one direction, of those offered so far."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._raw = [np.empty(0, np.float32)]
        self._ordinals = [np.empty(0, np.int64)]
        self._n = 0
        self._beyond = np.float32(-np.inf)

    def offer(self, scores_t: Float32s, keep: npt.NDArray[np.bool_], first: int) -> None:
        above = np.flatnonzero((scores_t > self._beyond) & keep)
        self._raw.append(scores_t[above])
        self._ordinals.append(above + first)
        self._n += len(above)
        if self._n > 4 * self._k + 1024:
            self._cut()

    def finish(self) -> tuple[Float32s, Int64s, np.float32]:
        self._cut()
        return self._raw[0], self._ordinals[0], self._beyond

    def _cut(self) -> None:
        raw, ordinals = np.concatenate(self._raw), np.concatenate(self._ordinals)
        if len(raw) > self._k:
            kept = np.argpartition(-raw, self._k - 1)[: self._k]
            raw, ordinals = raw[kept], ordinals[kept]
            self._beyond = raw.min()
        self._raw, self._ordinals, self._n = [raw], [ordinals], len(raw)


def _pad(found: Sequence[tuple[Float32s, Int64s, np.float32]]) -> _Part:
    most = max(len(raw) for raw, _, _ in found)
    all_raw = np.full((len(found), most), -np.inf, np.float32)
    all_ordinals = np.full((len(found), most), -1, np.int64)
    for i, (raw, ordinals, _) in enumerate(found):
        all_raw[i, : len(raw)], all_ordinals[i, : len(raw)] = raw, ordinals
    return _Part(all_raw, all_ordinals, np.array([beyond for _, _, beyond in found], np.float32))


def _run(tasks: Sequence[_Scan] | Sequence[_Product]) -> list[_Part]:
    if len(tasks) == 1:
        return [tasks[0]()]
    with ThreadPoolExecutor(len(tasks), thread_name_prefix="actstore-codes") as pool:
        return list(pool.map(lambda task: task(), tasks))
