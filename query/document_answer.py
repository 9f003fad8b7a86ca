"""Which k documents' vectors are nearest to some queries? Through an index of documents where there is one, and one by one.

Documents are left out in a fixed order and counted at the first reason: the caller's documents, `where`, no vector (no token
entered it, or not all units of the document are stored), and, once vectors are known, those that are not finite and with cosine
those of zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.pooled import Pooled, PooledVectors
from actstore.row_norms import row_norms
from actstore.vector_index import IndexShard, VectorIndex

from .eligible import Removed
from .index_answer import Plan, plan_generation
from .index_search import ShardSearcher
from .query_vectors import Barred
from .row_bits import Bits
from .scores import Scorer
from .top_k import TopK, offer_block

Bools = npt.NDArray[np.bool_]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

_GROWTH = 4
"""How many times more candidates, and lists, are asked for where an index gave too few."""

_DENSE = 8
"""Candidates beyond one in so many of an index's vectors are not asked for: comparing all is no slower."""

_SEARCH_BYTES = 64 << 20
"""Of candidates that one search returns: queries are searched as many at a time as that allows."""

_REASONS = ("docs", "where", "no_vector", "nonfinite")
"""Why documents are left out, in the order in which they are counted."""


@dataclass(frozen=True, slots=True)
class DocumentQuestion:
    """What is asked: which documents are nearest to some queries, of those that count."""

    pooled: Pooled
    scorer: Scorer
    """Exact scores of pooled vectors."""

    vectors_qd: Float32s | None
    """The queries as pooled vectors, shape (q, d_model): what indexes are searched for. None if float32 cannot tell them."""

    k: int
    drop_zero_rows: bool
    barred: Barred | None
    """For each query the document that may not answer it."""

    n_documents: int
    """Documents of the corpus."""

    selected: Int64s | None
    """Documents that the caller names, ascending; all if None."""

    kept: Bools | None
    """Which documents `where` keeps, shape (n_documents,); all if None."""

    block_rows: int


@dataclass(slots=True)
class DocumentAnswer:
    """The documents found, and how."""

    best: list[TopK]
    removed: Removed
    bytes_read: int = 0
    exact: bool = True
    recall: float | None = 1.0
    """As it was measured of the index; None if a part of it did not answer."""

    n_scanned: int = 0
    """Vectors that no index has and that were compared one by one."""

    generations: list[dict[str, Any]] = field(default_factory=list)
    """What was done with each index; for `Meta.index`."""

    warnings: list[str] = field(default_factory=list)


def search_documents(
    question: DocumentQuestion, searchers: Sequence[ShardSearcher], *, recall: float
) -> DocumentAnswer:
    """Return the `k` nearest documents of every query.

    Args:
        question: What is asked.
        searchers: The indexes to ask; no two have the same documents.
        recall: Share of the true answer that an index must have been measured to find; else its vectors are compared.

    Raises:
        FormatError: an index, or a stored vector, is missing or damaged.
    """
    reasons = [*_REASONS, *(["zero_norm"] if question.drop_zero_rows else [])]
    removed = Removed(dict.fromkeys(reasons, 0), n_seen=question.n_documents)
    answer = DocumentAnswer([TopK(question.k) for _ in range(question.scorer.n_queries)], removed)
    wanted = _wanted(question, removed)
    n_wanted, others = int(wanted.sum()), wanted
    for searcher in searchers:
        others = _ask_index(question, searcher, wanted, others, answer, recall=recall)
    answer.n_scanned = _compare(question, np.flatnonzero(others), answer, removed)
    found = removed.n_kept + removed.counts["nonfinite"] + removed.counts.get("zero_norm", 0)
    removed.counts["no_vector"] = n_wanted - found
    return answer


def _wanted(question: DocumentQuestion, removed: Removed) -> Bools:
    """Return which documents the caller's conditions leave, shape (n_documents,)."""
    wanted = np.ones(question.n_documents, np.bool_)
    if question.selected is not None:
        named = np.zeros(question.n_documents, np.bool_)
        named[question.selected] = True
        wanted = removed.apply("docs", wanted, named)
    return wanted if question.kept is None else removed.apply("where", wanted, question.kept)


def _compare(question: DocumentQuestion, docs: Int64s, answer: DocumentAnswer, removed: Removed) -> int:
    """Offer the vectors of some documents, ascending, to every query; return how many there were."""
    is_all, n_found = len(docs) == question.n_documents, 0
    if not len(docs):
        return 0
    answer.bytes_read += sum(obj.nbytes for obj in question.pooled.objects(None if is_all else docs))
    for part in question.pooled.scan(docs=None if is_all else docs):
        n_found += len(part)
        for start in range(0, len(part), question.block_rows):
            some = slice(start, start + question.block_rows)
            _offer(question, part.doc_ids[some], part.vectors[some], answer, removed)
    return n_found


def _offer(
    question: DocumentQuestion,
    doc_ids: Int64s,
    vectors_nd: Float32s,
    answer: DocumentAnswer,
    removed: Removed,
) -> None:
    norms_n, finite = row_norms(vectors_nd)
    keep = _countable(question, norms_n, finite, np.ones(len(doc_ids), np.bool_), removed)
    upper_nq = question.scorer.upper(vectors_nd, norms_n)
    upper_nq[~keep] = -np.inf
    for query, best in enumerate(answer.best):
        upper = np.ascontiguousarray(upper_nq[:, query])
        upper[doc_ids == _barred(question, query)] = -np.inf
        offer_block(
            best,
            upper,
            doc_ids,
            exact=lambda at, query=query: question.scorer.exact(vectors_nd[at], query),  # type: ignore[misc]
            keys=lambda at: doc_ids[at],
        )


def _countable(
    question: DocumentQuestion, norms_n: Float64s, finite: Bools, keep: Bools, removed: Removed
) -> Bools:
    """Return which vectors may be answers, and count those that may not."""
    keep = removed.apply("nonfinite", keep, finite)
    if question.drop_zero_rows:
        keep = removed.apply("zero_norm", keep, norms_n > 0)
    removed.n_kept += int(keep.sum())
    return keep


def _barred(question: DocumentQuestion, query: int) -> int:
    """Return the document that may not answer a query; -1 for none."""
    doc = None if question.barred is None else question.barred[query][1]
    return -1 if doc is None else doc


def _ask_index(
    question: DocumentQuestion,
    searcher: ShardSearcher,
    wanted: Bools,
    others: Bools,
    answer: DocumentAnswer,
    *,
    recall: float,
) -> Bools:
    """Offer the nearest documents of one index; return `others` without those that it covers."""
    index = searcher.index
    others = others.copy()
    for first, stop in index.covered().tolist():
        others[first:stop] = False
    bits = {shard.number: _bits(question, shard, wanted, answer.removed) for shard in index.shards}
    n_eligible = sum(int(np.bitwise_count(some).sum()) for some in bits.values())
    plan = plan_generation(index, n_eligible, k=question.k + (question.barred is not None), recall=recall)
    if question.vectors_qd is None:
        plan = Plan(None, 1.0, plan.share)
    generation = _Generation(question, searcher, plan, bits, n_eligible)
    if n_eligible and plan.effort is not None:
        generation.search(answer)
    elif n_eligible:
        generation.compare(answer)
    generation.tell(answer)
    return others


def _bits(question: DocumentQuestion, shard: IndexShard, wanted: Bools, removed: Removed) -> Bits:
    """Return which vectors of a shard may be answers, one bit each, the lowest of a byte first."""
    norms_n = shard.norms()
    keep = _countable(question, norms_n, np.isfinite(norms_n), wanted[shard.documents()], removed)
    return np.packbits(keep, bitorder="little")


class _Generation:
    """One index, asked one question."""

    def __init__(
        self,
        question: DocumentQuestion,
        searcher: ShardSearcher,
        plan: Plan,
        bits: dict[int, Bits],
        n_eligible: int,
    ) -> None:
        self._question = question
        self._searcher = searcher
        self._plan = plan
        self._bits = bits
        self._n_eligible = n_eligible
        self._lost: set[int] = set()
        self._n_candidates = 0
        self._n_compared = 0

    @property
    def _index(self) -> VectorIndex:
        return self._searcher.index

    def search(self, answer: DocumentAnswer) -> None:
        """Search the index, further each time, until every query has all the answers that there are."""
        question, effort = self._question, self._plan.effort
        assert effort is not None
        assert question.vectors_qd is not None
        queries = np.arange(question.scorer.n_queries)
        vectors_qd = self._index.prepare(question.vectors_qd)
        # One more than are asked for: the query itself may be among them.
        needed = min(question.k + (question.barred is not None), self._n_eligible)
        wanted, most = self._index.overfetch(needed), max([effort, *self._index.efforts])
        while len(queries):
            size = max(1, _SEARCH_BYTES // (wanted * 12 * len(self._index.shards)))
            n_found = np.empty(len(queries), np.int64)
            for start in range(0, len(queries), size):
                some = slice(start, start + size)
                found = self._searcher.search(
                    vectors_qd[queries[some]], wanted, effort=effort, bits=self._bits
                )
                self._lost |= set(found.lost)
                self._rank(queries[some], found.rows, answer)
                n_found[some] = (found.rows >= 0).sum(axis=1)
            answer.bytes_read += self._index_bytes(effort)
            queries = queries[n_found < needed]
            wanted, effort = wanted * _GROWTH, min(effort * _GROWTH, most)
            if wanted * _DENSE > self._n_eligible:
                break
        if len(queries):
            self.compare(answer)

    def compare(self, answer: DocumentAnswer) -> None:
        """Offer all vectors whose bit is set, of the shards that answered."""
        for shard in self._index.shards:
            if shard.number not in self._lost:
                there = np.unpackbits(self._bits[shard.number], count=shard.n, bitorder="little").view(
                    np.bool_
                )
                self._n_compared += _compare(
                    self._question, shard.documents()[there], answer, Removed()
                ) * len(answer.best)

    def tell(self, answer: DocumentAnswer) -> None:
        """Add what was done to the answer's account."""
        index, plan = self._index, self._plan
        told: dict[str, Any] = {
            "id": index.id,
            "kind": index.kind,
            "generation": index.generation,
            "n_indexed": index.n_indexed,
            "n_eligible": self._n_eligible,
            "effort": plan.effort,
            "recall": plan.recall,
            "share": plan.share,
            "n_candidates": self._n_candidates,
            "n_compared": self._n_compared,
        }
        if plan.effort is not None:
            answer.exact = False
            answer.recall = None if answer.recall is None else min(answer.recall, plan.recall)
        if self._lost:
            lost = [shard for shard in index.shards if shard.number in self._lost]
            told["lost_shards"] = sorted(self._lost)
            answer.exact, answer.recall = False, None
            answer.warnings.append(
                f"{len(lost)} of {len(index.shards)} shards of index {index.id!r} did not answer: the nearest of "
                f"{sum(shard.n for shard in lost)} documents are not in this answer"
            )
        answer.generations.append(told)

    def _rank(self, queries: Int64s, docs_qm: Int64s, answer: DocumentAnswer) -> None:
        """Offer candidates (-1: none) by the exact scores of their stored vectors."""
        question = self._question
        docs = np.unique(docs_qm[docs_qm >= 0])
        self._n_candidates += int((docs_qm >= 0).sum())
        answer.bytes_read += sum(obj.nbytes for obj in question.pooled.objects(docs)) if len(docs) else 0
        for part in question.pooled.scan(docs=docs) if len(docs) else ():
            for query, own in zip(queries.tolist(), docs_qm, strict=True):
                self._rank_part(part, own[own != _barred(question, query)], query, answer.best[query])

    def _rank_part(self, part: PooledVectors, own: Int64s, query: int, best: TopK) -> None:
        some = np.flatnonzero(np.isin(part.doc_ids, own, assume_unique=False))
        for start in range(0, len(some), self._question.block_rows):
            at = some[start : start + self._question.block_rows]
            scores = self._question.scorer.exact(part.vectors[at], query)
            good = scores > -np.inf
            best.offer(scores[good], part.doc_ids[at[good]], part.doc_ids[at[good]])

    def _index_bytes(self, effort: int) -> int:
        """Return about how many bytes of the index a search of one effort looks at."""
        n_lists = int(self._index.params.get("n_lists", 0) or 0)
        share = min(1.0, effort / n_lists) if effort and n_lists else 1.0
        return int(self._index.nbytes * share)
