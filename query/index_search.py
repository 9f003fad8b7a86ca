"""Which vectors of an index are nearest to some queries? The shards of one generation searched, and their answers merged.

Shards may be anywhere: `LocalShards` searches those of an index with the threads of this process, `actstore.query.ray_shards`
those that Ray actors hold. What they return are candidates: approximate scores, to be compared again by the stored rows
(`actstore.query.index_answer`).
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError
from actstore.faiss_file import faiss_threads
from actstore.vector_index import IndexShard, VectorIndex

from .row_bits import Bits

Float32s: TypeAlias = npt.NDArray[np.float32]
Int64s: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Found:
    """The candidates of q queries."""

    scores: Float32s
    """As the index has them, larger is nearer, best first; shape (q, m), `-inf` where there is none."""

    rows: Int64s
    """Row numbers (documents, of an index of documents), -1 where there is none; shape (q, m). Equal scores are in row order."""

    lost: tuple[int, ...] = ()
    """Numbers of the shards that did not answer and whose rows are therefore not among the candidates."""


class ShardSearcher(Protocol):
    """Searches the shards of one index."""

    @property
    def index(self) -> VectorIndex:
        """The generation whose shards these are."""

    def search(
        self, vectors_qd: Float32s, k: int, *, effort: int, bits: Mapping[int, Bits] | None = None
    ) -> Found:
        """Return the best `k` vectors of all shards for every query, fewer where there are no more: m is at most k.

        Args:
            vectors_qd: Queries as `index.prepare` gives them, shape (q, d).
            k: Candidates per query, at least 1.
            effort: How much of every shard is looked at; see `VectorIndex.effort_for`.
            bits: For each shard by number which of its vectors count (`actstore.query.row_bits`); a shard that is not named has
                none and is not searched. None: all vectors of all shards.
        """


class LocalShards:
    """The shards of an index, searched side by side by threads of this process; FAISS does not hold Python's lock."""

    def __init__(self, index: VectorIndex) -> None:
        """Take the index; opens no file before the first search."""
        self.index = index

    def search(
        self, vectors_qd: Float32s, k: int, *, effort: int, bits: Mapping[int, Bits] | None = None
    ) -> Found:
        """Return the best `k` vectors of all shards; see `ShardSearcher.search`."""
        shards = [shard for shard in self.index.shards if bits is None or shard.number in bits]

        def search_one(shard: IndexShard) -> tuple[Float32s, Int64s]:
            own = None if bits is None else bits[shard.number]
            return search_shard(shard, vectors_qd, k, effort=effort, bits=own)

        if len(shards) < 2:
            return merge_found([search_one(shard) for shard in shards], k, n_queries=len(vectors_qd))
        cores = os.cpu_count() or 1
        threads = min(len(shards), cores)
        # FAISS shares several queries out among threads of its own, one query among none.
        faiss_own = 1 if len(vectors_qd) == 1 else max(1, cores // threads)

        def search_beside(shard: IndexShard) -> tuple[Float32s, Int64s]:
            with faiss_threads(faiss_own):
                return search_one(shard)

        with ThreadPoolExecutor(threads, thread_name_prefix="actstore-index") as pool:
            return merge_found(pool.map(search_beside, shards), k, n_queries=len(vectors_qd))


def place_searchers(
    indexes: Sequence[VectorIndex], shards: ShardSearcher | None, *, asked: str
) -> list[ShardSearcher]:
    """Return what searches each of some indexes: the threads of this process, or `shards` if they are its own.

    Args:
        indexes: To search.
        shards: What the caller has shards of one of them in; None for nothing.
        asked: What the indexes would be asked, for the error.

    Raises:
        InvalidInputError: `shards` searches nothing, or none of these indexes: one of the same name in another store is another.
    """
    searchers: list[ShardSearcher] = [LocalShards(index) for index in indexes]
    if shards is None:
        return searchers
    given = getattr(shards, "index", None)
    if not isinstance(given, VectorIndex):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"shards= takes what searches the shards of an index, such as RayShards, got {type(shards).__name__}",
        )
    places = [i for i, index in enumerate(indexes) if _attempts(index) == _attempts(given)]
    if not places:
        same_name = " (another one of that name)" if given.id in [index.id for index in indexes] else ""
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"shards= has shards of index {given.id!r}, and {asked} is asked through "
            f"{', '.join(repr(index.id) for index in indexes) or 'no index'}{same_name}",
        )
    searchers[places[0]] = shards
    return searchers


def _attempts(index: VectorIndex) -> tuple[str, ...]:
    """Return what tells an index from any other: the attempts that wrote its units."""
    units = index.collection.units
    return (index.id, *(units[unit].attempt for unit in sorted(units)))


def search_shard(
    shard: IndexShard, vectors_qd: Float32s, k: int, *, effort: int, bits: Bits | None
) -> tuple[Float32s, Int64s]:
    """Return scores and row numbers (-1: none) of the best `k` vectors of one shard, both of shape (q, m)."""
    scores, ordinals = shard.search(vectors_qd, k, effort=effort, bits=bits)
    there = ordinals >= 0
    rows = np.full(ordinals.shape, -1, np.int64)
    rows[there] = shard.rows_of(ordinals[there])
    return np.where(there, scores, np.float32(-np.inf)), rows


def merge_found(
    parts: Iterable[tuple[Float32s, Int64s]], k: int, *, n_queries: int, lost: tuple[int, ...] = ()
) -> Found:
    """Return the best `k` of what several shards, or groups of shards, found; the same however they are grouped.

    Args:
        parts: Scores and row numbers of each, of shape (q, m); m may differ.
        k: Candidates per query.
        n_queries: q.
        lost: See `Found`.

    >>> parts = [(np.float32([[2, 1]]), np.array([[7, 8]])), (np.float32([[2, -np.inf]]), np.array([[3, -1]]))]
    >>> merge_found(parts, 2, n_queries=1).rows.tolist()
    [[3, 7]]
    """
    found = list(parts)
    if not found:
        return Found(np.empty((n_queries, 0), np.float32), np.empty((n_queries, 0), np.int64), lost)
    scores = np.concatenate([part for part, _ in found], axis=1)
    rows = np.concatenate([part for _, part in found], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return Found(np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1), lost)
