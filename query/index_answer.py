"""Which k rows are nearest, asked of an index, and how sure is that?

The index gives candidates; they are read from the stored rows, scored exactly and folded as a scan would, so the values of an
answer and the order of its rows are exact, and all that may lack is a row that was no candidate. How many lack was measured when
the index was built: for each question the least effort is chosen at which the recall asked for was measured, at the share of
the rows that the masks leave. Where the masks leave few rows, or no effort suffices, the rows that they leave are compared one
by one. Rows that no index has are always. Where folding leaves fewer than k answers the search goes on, further each time, at
last over every row: k answers come back wherever k exist.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.activations import Activations
from actstore.run import Run
from actstore.vector_index import VectorIndex

from .answer import RowOptions, find_rows
from .index_search import ShardSearcher
from .offer_rows import RowOffers
from .row_bits import Bits, add_counts, bits_to_rows, document_rows, read_row_bits
from .scan import ScanReport
from .scores import Float32s, Scorer

Bools: TypeAlias = npt.NDArray[np.bool_]
Int64s: TypeAlias = npt.NDArray[np.int64]
Barred: TypeAlias = tuple[int | None, int | None]

_FEW_ROWS = 512
"""Rows up to which they are compared one by one, whatever the index: that takes no longer than searching it."""

_WHOLE_SEARCH = 1000
"""Vectors of an index whose numbers are looked at, all lists being probed, in the time that one scattered row takes to read."""

_GROWTH = 4
"""How many times more candidates are asked for, and lists probed, where folding left too few answers."""

_MOST_CANDIDATES = 1 << 18
"""Candidates of one query at most."""

_SCATTERED = 8
"""Times as long as in a scan that a row takes to be read alone: beyond this part of the rows all are compared."""

_SEARCH_BYTES = 64 << 20
"""Of the candidates of one search: as many queries are searched for at a time."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: which rows are nearest to some queries, of those that count."""

    run: Run
    acts: Activations
    scorer: Scorer
    """Exact scores of stored rows."""

    vectors_qd: Float32s
    """The queries as rows of the hook point, finite, shape (q, d_model): what indexes are searched for."""

    options: RowOptions
    k: int
    drop_zero_rows: bool
    barred: Sequence[Barred] | None
    """For each query the row and the document that may not answer it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the rows of one generation are asked."""

    effort: int | None
    """With which the index is searched; None: its eligible rows are compared one by one."""

    recall: float
    """As it was measured at that effort; 1.0 without a search."""

    share: float
    """Eligible rows as a part of those in the index."""


@dataclass(slots=True)
class IndexAnswer:
    """The rows found, and how."""

    report: ScanReport
    exact: bool
    recall: float | None
    """None if a part of an index did not answer."""

    index: dict[str, Any] | None
    """For `Meta.index`; None without an index."""

    warnings: list[str] = field(default_factory=list)


def plan_generation(index: VectorIndex, n_eligible: int, *, k: int, recall: float) -> Plan:
    """Return how to ask the eligible rows of an index for the `k` nearest.

    Recall was measured down to some share of eligible rows. Below it only a search that probes all lists is known to find as
    much: it looks at every eligible vector, and the fewer there are the fewer come between a true neighbour and the candidates.
    """
    share = min(1.0, n_eligible / max(1, index.n_indexed))
    one_by_one = Plan(None, 1.0, share)
    if n_eligible <= max(_FEW_ROWS, 2 * k) or not index.measured:
        return one_by_one
    measured = max(share, min(m.share for m in index.measured))
    effort = index.effort_for(recall, k, measured)
    if effort is None:
        return one_by_one
    if share < measured:
        if n_eligible * _WHOLE_SEARCH < index.n_indexed:
            return one_by_one
        effort = all_lists(index)
    return Plan(effort, index.recall(effort, k, measured), share)


def all_lists(index: VectorIndex) -> int:
    """Return the effort at which every vector is looked at."""
    return max([int(index.params.get("n_lists") or 0), *index.efforts])


def search_index(
    question: Question, searchers: Sequence[ShardSearcher], *, recall: float | None
) -> IndexAnswer:
    """Return the `k` nearest rows of every query.

    Args:
        question: What is asked.
        searchers: The generations to ask; no two have the same rows.
        recall: Share of the true answer that must have been measured to be found; None: all of it, no index is searched.

    Raises:
        FormatError: an index, or a stored row, is missing or damaged.
    """
    covered = {unit for searcher in searchers for unit in searcher.index.covered().tolist()}
    report = _scan_others(question, covered)
    n_scanned = report.removed.n_seen
    offers = RowOffers(question.run, question.acts, question.scorer, question.options, report)
    answer = IndexAnswer(report, exact=True, recall=1.0, index=None)
    told = []
    for searcher in searchers:
        generation = _Generation(question, searcher, offers, report)
        generation.ask(recall)
        told.append(generation.tell(answer))
    answer.index = {"generations": told, "n_scanned": n_scanned}
    answer.warnings += _warnings(question, answer, [searcher.index for searcher in searchers], n_scanned)
    return answer


def _scan_others(question: Question, covered: set[int]) -> ScanReport:
    """Compare the rows that no index has."""
    return find_rows(
        question.run,
        question.acts,
        question.scorer,
        question.options,
        k=question.k,
        drop_zero_rows=question.drop_zero_rows,
        barred=question.barred,
        units=[unit for unit in question.run.collection.units if unit not in covered],
    )


class _Generation:
    """One generation of an index, asked one question."""

    def __init__(
        self, question: Question, searcher: ShardSearcher, offers: RowOffers, report: ScanReport
    ) -> None:
        self._question = question
        self._searcher = searcher
        self._offers = offers
        self._report = report
        self._index = searcher.index
        self._bits = read_row_bits(
            question.run,
            question.acts.hook_point,
            question.options,
            self._index.shards,
            drop_zero_rows=question.drop_zero_rows,
        )
        self._plan = Plan(None, 1.0, 0.0)
        self._lost: set[int] = set()
        self._is_exact = True
        self._n_candidates = self._n_compared = 0

    def ask(self, recall: float | None) -> None:
        """Offer the generation's nearest rows to the best of every query."""
        question, index = self._question, self._index
        if recall is not None:
            self._plan = plan_generation(index, self._bits.n_eligible, k=question.k, recall=recall)
        add_counts(self._report.removed, self._bits.removed)
        units = question.run.tokenization.collection.units
        self._report.bytes_read += sum(units[u].objects[0].nbytes for u in index.covered().tolist())
        for queries, barred in _by_barred(question):
            bits: Mapping[int, Bits] = self._bits.bits
            if barred != (None, None):
                bits = self._bits.without(index.shards, _barred_rows(question.run, *barred))
            if self._plan.effort is not None:
                queries = self._search(queries, bits, self._plan.effort)
            self._compare(queries, bits)

    def tell(self, answer: IndexAnswer) -> dict[str, Any]:
        """Return what was done, and lower what is promised of the answer to it."""
        index = self._index
        told = {
            "id": index.id,
            "kind": index.kind,
            "generation": index.generation,
            "n_indexed": index.n_indexed,
            "n_eligible": self._bits.n_eligible,
            "effort": self._plan.effort,
            "n_candidates": self._n_candidates,
            "n_compared": self._n_compared,
        }
        if not self._is_exact:
            answer.exact = False
            answer.recall = None if answer.recall is None else min(answer.recall, self._plan.recall)
        if self._lost:
            lost = [shard for shard in index.shards if shard.number in self._lost]
            told["lost_shards"] = [shard.number for shard in lost]
            answer.exact, answer.recall = False, None
            answer.warnings.append(
                f"this is a part of the answer: {len(lost)} of {len(index.shards)} shards of index {index.id!r} did not "
                f"answer, and {sum(shard.n for shard in lost)} rows were not compared"
            )
        return told

    def _search(self, queries: Int64s, bits: Mapping[int, Bits], effort: int) -> Int64s:
        """Offer candidates, more each time; return the queries whose answer is still not whole."""
        most = all_lists(self._index)
        wanted = self._index.overfetch(self._question.k)
        while len(queries):
            queries = queries[~self._search_once(queries, bits, wanted, effort)]
            wanted, effort = wanted * _GROWTH, min(effort * _GROWTH, most)
            if wanted > min(_MOST_CANDIDATES, self._count(bits) // _SCATTERED):
                break
        return queries

    def _search_once(
        self, queries: Int64s, bits: Mapping[int, Bits], wanted: int, effort: int
    ) -> npt.NDArray[np.bool_]:
        """Offer `wanted` candidates of every query; return which queries need no more of them, shape (q,)."""
        vectors_qd = self._index.prepare(self._question.vectors_qd[queries])
        is_whole = np.zeros(len(queries), np.bool_)
        size = max(1, _SEARCH_BYTES // (12 * wanted * max(1, len(bits))))
        for start in range(0, len(queries), size):
            some = slice(start, start + size)
            found = self._searcher.search(vectors_qd[some], wanted, effort=effort, bits=bits)
            self._lost |= set(found.lost)
            worst_q = self._offers.candidates(queries[some].tolist(), found.rows)
            # A row that was no candidate is, as far as the index knows, no better than the worst that was.
            best = self._report.best
            is_enough = np.array(
                [best[q].threshold >= w for q, w in zip(queries[some], worst_q, strict=True)]
            )
            n_found = (found.rows >= 0).sum(axis=1)
            has_all = n_found >= self._count(bits)
            is_whole[some] = has_all | is_enough
            self._is_exact &= bool((has_all | ~is_enough).all())
            self._n_candidates += int(n_found.sum())
        self._report.bytes_read += self._searched_bytes(effort)
        return is_whole

    def _compare(self, queries: Int64s, bits: Mapping[int, Bits]) -> None:
        """Offer all rows whose bit is set, but for those of shards that did not answer."""
        if not len(queries):
            return
        for shard in self._index.shards:
            if shard.number in bits and shard.number not in self._lost:
                rows = bits_to_rows(bits[shard.number], shard)
                self._offers.all_of(queries.tolist(), rows)
                self._n_compared += len(rows)

    def _count(self, bits: Mapping[int, Bits]) -> int:
        """Return how many rows may be found."""
        return sum(int(np.bitwise_count(b).sum()) for n, b in bits.items() if n not in self._lost)

    def _searched_bytes(self, effort: int) -> int:
        """Return about how many bytes of the index one search looks at."""
        n_lists = int(self._index.params.get("n_lists") or 0)
        return self._index.nbytes * min(effort, n_lists) // n_lists if n_lists else self._index.nbytes


def _by_barred(question: Question) -> Iterator[tuple[Int64s, Barred]]:
    """Yield the numbers of queries with the row and the document that may not answer them."""
    n, barred = question.scorer.n_queries, question.barred
    if barred is None:
        yield np.arange(n), (None, None)
        return
    for one in dict.fromkeys(barred):
        yield np.array([q for q in range(n) if barred[q] == one]), one


def _barred_rows(run: Run, row: int | None, doc: int | None) -> Int64s:
    rows = np.array([] if row is None else [row], np.int64)
    return rows if doc is None else np.union1d(rows, document_rows(run.tokenization, doc))


def _warnings(
    question: Question, answer: IndexAnswer, indexes: Sequence[VectorIndex], n_scanned: int
) -> list[str]:
    """Return what a careful reader should know about an answer from an index."""
    warnings, options = [], question.options
    if n_scanned:
        warnings.append(
            f"{n_scanned} rows are in no index and were compared one by one: actstore index build brings it up to date"
        )
    if answer.exact or answer.recall is None:
        return warnings
    filters = (options.where, options.rows, options.docs, options.regex, options.exclude_docs)
    if any(given is not None for given in filters) or options.has_next:
        warnings.append(
            f"the recall of {answer.recall:.3f} was measured under filters that know nothing of the vectors; where the rows "
            "that a filter keeps are far from the query it may be lower: exact=True compares them all"
        )
    most = min(max(m.k for m in index.measured) for index in indexes if index.measured)
    if question.k > most:
        warnings.append(f"recall was measured for up to {most} answers: for k={question.k} it may be lower")
    return warnings
