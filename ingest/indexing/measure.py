"""How many of the true nearest does an index find? Measured with rows of its own as queries, against brute force.

For each effort, number of neighbours and share of eligible rows: the mean share of the true `k` nearest that are among the
candidates that a search would score exactly (`overfetch`). A vector that equals one of the true nearest counts as it: which of
equal ones an answer names is chance. It counts as one of them only, so equals of the last one make up for no other. Queries are
rows of the index, drawn at random; the row itself does not answer.
"""

import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import ErrorKind, StorageError
from actstore.faiss_file import load_faiss
from actstore.vector_index import IndexShard, VectorIndex, prepare_rows

from .kinds import deserialise
from .rows import RowSource, shard_blocks
from .truth import Comparison, Truth, hash_rows

Float32s: TypeAlias = npt.NDArray[np.float32]
Int64s: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Hashes: TypeAlias = npt.NDArray[np.uint64]

N_QUERIES: Final = 1000
"""The standard deviation of a recall near 0.95 is then about 0.003."""

KS: Final = (10, 20, 50, 100)
"""Numbers of neighbours that recall is measured for; 20 is what a question asks for if nothing is said."""

MANY: Final = 1024
"""The largest of them, which language models from neighbours ask for."""

N_QUERIES_OF_MANY: Final = 100
"""Queries for that one: the recall of each is a mean of 1,024 already."""

SHARES: Final = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)

LEAST_ELIGIBLE: Final = 512
"""Rows: where a filter leaves fewer, comparing them all costs less than asking an index, and recall is not measured."""

ENOUGH: Final = 0.9995
"""From here on larger efforts are not measured: the recall of none of them is less."""

_STORED_NEIGHBOURS: Final = 100

_QUERIES: Final = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("neighbours", pa.list_(pa.int64()), nullable=False),
        pa.field("scores", pa.list_(pa.float64()), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured."""

    table: list[dict[str, Any]]
    """`effort`, `k`, `share`, `recall`, as the seal has them."""
    queries: bytes
    """A Parquet table: `row`, and its true nearest `neighbours` with their `scores`."""

    def recall(self, k: int = KS[0]) -> float:
        """Return the recall among all rows at the largest effort that was measured; 1 where nothing was."""
        found = [m for m in self.table if m["k"] == k and m["share"] == SHARES[0]]
        return float(max(found, key=lambda m: m["effort"])["recall"]) if found else 1.0


def measure(
    index: VectorIndex,
    source: RowSource,
    *,
    seed: int,
    floor: float,
    n_queries: int,
    stop: threading.Event,
    say: Callable[[str], None],
) -> Measurement:
    """Measure an index whose shards are all built; deterministic.

    Cost: every vector is compared with all queries once, and the index is searched with them at growing efforts. Memory: 8
    bytes for each row, the norms of at most 1 GiB of rows (`IndexShard.norms`), some 100 MB of answers however many shards
    there are, and a block of rows.

    Args:
        index: The index, sealed or not.
        source: Of its rows.
        seed: Of queries and filters.
        n_queries: Rows that are queries; all of a smaller index.
        floor: Efforts are measured until this recall is reached, even where `ENOUGH` is.
        stop: When set, measuring ends.
        say: Called with lines of text.

    Raises:
        StorageError: INTERRUPTED: `stop` was set.
        FormatError: an object is missing or damaged.
    """
    rows = choose_queries(index, seed=seed, n=n_queries)
    raw = source.some(rows)
    whole = _Whole(index)
    wanted, fit = whole.prepare(raw)
    comparison = Comparison(wanted, rows[fit], is_l2=index.metric == "l2")
    truths = _truths(len(comparison.own_rows), index.n_indexed)
    say(f"comparing {index.n_indexed:,} vectors with {len(comparison.own_rows):,} queries")
    hashes = _find_truth(whole, source, comparison, truths, seed=seed, stop=stop)
    search = _Search(index, index.prepare(raw[fit]), comparison.own_rows, hashes, seed, efforts_of(index))
    table = list[dict[str, Any]]()
    for truth in sorted(truths, key=lambda truth: -truth.share):
        table += _recalls(search, truth, floor=floor, stop=stop)
    first = next((t for t in truths if t.share == SHARES[0] and t.k == KS[-1]), None)
    return Measurement(table, _queries_table(comparison, first))


def choose_queries(index: VectorIndex, *, seed: int, n: int) -> Int64s:
    """Return the numbers of `n` rows (documents) of an index at random, ascending; all if there are no more."""
    counts = np.cumsum([0, *(np.count_nonzero(_comparable(index, shard)) for shard in index.shards)])
    total = int(counts[-1])
    rng = np.random.default_rng([seed, 2])
    chosen = np.arange(total) if total <= n else np.sort(rng.choice(total, n, replace=False))
    parts = [np.empty(0, np.int64)]
    for shard, low, high in zip(index.shards, counts[:-1], counts[1:], strict=True):
        here = chosen[(chosen >= low) & (chosen < high)] - low
        if len(here):
            parts.append(shard.rows_of(np.flatnonzero(_comparable(index, shard))[here]))
    return np.sort(np.concatenate(parts))


def _comparable(index: VectorIndex, shard: IndexShard) -> Bools:
    """Return which ordinals of a shard are finite and, where the metric asks for it, not zeros; shape (n,)."""
    norms = shard.norms()
    found: Bools = np.isfinite(norms) & ((norms > 0) | (index.metric != "cosine"))
    return found


def filter_of(shard: IndexShard, share: float, *, seed: int) -> Bools:
    """Return which ordinals of a shard the filter of a share lets through, shape (n,)."""
    if share == 1.0:
        return np.ones(shard.n, np.bool_)
    rng = np.random.default_rng([seed, 3, SHARES.index(share), shard.number])
    return rng.random(shard.n, dtype=np.float32) < share


def efforts_of(index: VectorIndex) -> list[int]:
    """Return the efforts to measure: powers of two up to the number of lists, and that; 0 of an index without lists."""
    if not index.kind.startswith("ivf"):
        return [0]
    faiss = load_faiss()
    with open(index.trained_file(), "rb") as file:
        trained = deserialise(file.read())
    n_lists = int(faiss.extract_index_ivf(trained).nlist)
    powers = [1 << i for i in range(n_lists.bit_length()) if 1 << i <= n_lists]
    return powers if powers[-1] == n_lists else [*powers, n_lists]


def _truths(n_queries: int, n_indexed: int) -> list[Truth]:
    """Return what to find: at shares at which a search would not sooner compare all rows."""
    truths = [Truth(n_queries, KS[-1], share=share) for share in _shares(n_indexed, LEAST_ELIGIBLE)]
    if n_indexed > KS[-1]:
        n_queries = min(n_queries, N_QUERIES_OF_MANY)
        truths += [Truth(n_queries, MANY, share=share) for share in _shares(n_indexed, 2 * MANY)]
    return truths


def _shares(n_indexed: int, least: int) -> list[float]:
    return [share for share in SHARES if share == 1.0 or share * n_indexed >= least]


class _Whole:
    """Rows as they are compared in the end: in all dimensions, also where the index has the first ones only."""

    def __init__(self, index: VectorIndex) -> None:
        self.index = index
        self._transform = index.transform() if index.transform_steps else None

    def prepare(self, rows_td: Float32s) -> tuple[Float32s, Bools]:
        """Return the vectors of those rows that can be compared, and which these are."""
        metric = self.index.metric
        vectors = prepare_rows(rows_td, self._transform, first_dims=None, metric=metric)
        fit: Bools = np.asarray(np.isfinite(vectors).all(axis=1) & np.isfinite(rows_td).all(axis=1))
        if metric == "cosine":
            np.logical_and(fit, vectors.any(axis=1), out=fit)
        return vectors[fit], fit


def _find_truth(
    whole: _Whole,
    source: RowSource,
    comparison: Comparison,
    truths: Sequence[Truth],
    *,
    seed: int,
    stop: threading.Event,
) -> list[Hashes]:
    """Fill the truths, and return a hash of the vector of every ordinal, shard by shard."""
    hashes = []
    for shard in whole.index.shards:
        of_shard = np.zeros(shard.n, np.uint64)
        filters = {share: filter_of(shard, share, seed=seed) for share in SHARES}
        for first, numbers, rows in shard_blocks(source, shard):
            _check_stopped(stop)
            vectors, fit = whole.prepare(rows)
            ordinals = first + np.flatnonzero(fit)
            of_shard[ordinals] = hash_rows(vectors)
            passing = [filters[truth.share][ordinals] for truth in truths]
            comparison.offer(numbers[fit], vectors, truths, passing)
        hashes.append(of_shard)
    for truth in truths:
        truth.settle()
    return hashes


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """An index and the queries that it is measured with."""

    index: VectorIndex
    queries_qd: Float32s
    own_rows: Int64s
    hashes: Sequence[Hashes]
    """Of the vectors of every shard's ordinals."""
    seed: int
    efforts: Sequence[int]

    def candidates(self, n_queries: int, k: int, *, effort: int, share: float) -> Hashes:
        """Return the hashes of the best `k` of each query, best first; 0 where there are no more. Shape (q, m)."""
        best_scores, best = np.empty((n_queries, 0), np.float32), np.empty((n_queries, 0), np.uint64)
        for shard, hashes in zip(self.index.shards, self.hashes, strict=True):
            bits = None
            if share != 1.0:
                bits = np.packbits(filter_of(shard, share, seed=self.seed), bitorder="little")
            # One more: the query's own row may be the best.
            scores, ordinals = shard.search(self.queries_qd[:n_queries], k + 1, effort=effort, bits=bits)
            own = shard.ordinals_of(self.own_rows[:n_queries])[:, None]
            if not shard.n:
                continue
            none = (ordinals == own) | (ordinals < 0)
            scores = np.concatenate([best_scores, np.where(none, np.float32(-np.inf), scores)], axis=1)
            found = np.concatenate([best, np.where(none, np.uint64(0), hashes[ordinals])], axis=1)
            # Shard by shard: the answers of thousands of shards at once would not fit in memory.
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            best_scores, best = (
                np.take_along_axis(scores, order, axis=1),
                np.take_along_axis(found, order, axis=1),
            )
        return best

    def hashes_of(self, truth: Truth) -> Hashes:
        """Return the hashes of the true nearest, 0 where there are no more; shape (q, k)."""
        found = np.zeros(truth.rows.shape, np.uint64)
        exists = truth.exists()
        for shard, hashes in zip(self.index.shards, self.hashes, strict=True):
            ordinals = np.full(truth.rows.shape, -1, np.int64)
            ordinals[exists] = shard.ordinals_of(truth.rows[exists])
            found[ordinals >= 0] = hashes[ordinals[ordinals >= 0]]
        return found


def _recalls(search: _Search, truth: Truth, *, floor: float, stop: threading.Event) -> list[dict[str, Any]]:
    """Return the recall at growing efforts under one filter."""
    index, table = search.index, list[dict[str, Any]]()
    ks = KS if truth.k == KS[-1] else (truth.k,)
    best = search.hashes_of(truth)
    for effort in search.efforts:
        _check_stopped(stop)
        most = index.overfetch(ks[-1])
        candidates = search.candidates(truth.n_queries, most, effort=effort, share=truth.share)
        found = [_recall(truth, best, candidates[:, : index.overfetch(k)], k) for k in ks]
        table += [
            {"effort": effort, "k": k, "share": truth.share, "recall": recall}
            for k, recall in zip(ks, found, strict=True)
        ]
        if min(found) >= max(ENOUGH, floor):
            break
    return table


def _recall(truth: Truth, best: Hashes, candidates: Hashes, k: int) -> float:
    """Return the mean share of the true `k` nearest among the candidates, equal vectors in place of each other."""
    n_true = truth.n_found(k)
    some = np.flatnonzero(n_true)
    if not len(some):
        return 1.0
    # Each query's vectors under numbers of their own, so that one look-up serves all queries.
    known = np.unique(best[:, :k])
    is_true = truth.exists()[:, :k]
    queries = np.arange(len(best))[:, None] * len(known)
    wanted, n_wanted = np.unique((queries + np.searchsorted(known, best[:, :k]))[is_true], return_counts=True)
    place = np.minimum(np.searchsorted(known, candidates), len(known) - 1)
    is_known = (known[place] == candidates) & (candidates != 0)
    given, n_given = np.unique((queries + place)[is_known], return_counts=True)
    # A vector counts no oftener than it is among the true ones: many equals of the last one do not stand for the others.
    both, of_wanted, of_given = np.intersect1d(wanted, given, assume_unique=True, return_indices=True)
    n_both = np.minimum(n_wanted[of_wanted], n_given[of_given])
    hits = np.bincount(both // len(known), n_both, minlength=len(best))
    return float(np.mean(hits[some] / n_true[some]))


def _queries_table(comparison: Comparison, truth: Truth | None) -> bytes:
    rows = comparison.own_rows
    neighbours, scores = list[list[int]](), list[list[float]]()
    for query in range(len(rows)):
        n = 0 if truth is None else int(truth.n_found(_STORED_NEIGHBOURS)[query])
        neighbours.append([] if truth is None else truth.rows[query, :n].tolist())
        scores.append([] if truth is None else truth.scores[query, :n].tolist())
    table = pa.table(
        {"row": pa.array(rows, pa.int64()), "neighbours": neighbours, "scores": scores},
        schema=_QUERIES,
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _check_stopped(stop: threading.Event) -> None:
    if stop.is_set():
        raise StorageError(
            ErrorKind.INTERRUPTED, "measuring an index was stopped: run the same again to finish it"
        )
