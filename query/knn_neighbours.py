"""Which stored contexts are nearest to one, outside of the documents that it comes from?

A row's own document is known. Those that a text was cut from are the documents that hold its end word for word. They are known
from the neighbours: where none of the k nearest rows outside of some of these documents lies in another of them, these rows are
the k nearest outside of all. So a search with some to spare mostly is all, and no text of the corpus is looked through.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from actstore.activations import Activations
from actstore.run import Run

from .answer import RowOptions
from .index_answer import IndexAnswer
from .knn_context import Context
from .nearest_rows import Way, find_nearest
from .query_vectors import QueryVectors, transform_queries
from .scores import Scorer, SimilarityScorer, TransformedScorer
from .token_groups import read_columns
from .verbatim import holding, holding_among

Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

KnnMetric = Literal["l2", "cosine"]

_SPARE = 256
"""Neighbours of a text beyond those asked for, in case the nearest are of documents that hold it."""

_ROUNDS = 3
"""Searches after which the documents that hold a text are looked for in the whole corpus."""


@dataclass(slots=True)
class Neighbours:
    """The nearest rows, nearest first."""

    rows: Int64s
    distances: Float64s
    """Squared Euclidean ones, shape (n,); of vectors scaled to length 1 if the metric is the cosine."""

    answer: IndexAnswer
    """How they were found."""

    own_documents: Int64s
    """Documents left out because they hold the text; more may lie further away."""


def find_neighbours(
    run: Run,
    acts: Activations,
    context: Context,
    options: RowOptions,
    way: Way,
    *,
    k: int,
    metric: KnnMetric,
    recall: float | None,
    exclude_own_document: bool,
) -> Neighbours:
    """Return the `k` nearest rows; fewer where there are no more.

    Args:
        run: The run asked.
        acts: Its rows at a hook point.
        context: What they should be near to; its own row is never a neighbour.
        options: The masks.
        way: The indexes to ask, and the space to compare in.
        k: Neighbours.
        metric: Of distances.
        recall: Which an index must have been measured to reach; None: all rows are compared.
        exclude_own_document: Whether the documents that the context comes from are left out.
    """
    tail = context.tail if exclude_own_document else None
    barred = [(context.row, context.doc_id if exclude_own_document else None)]
    asked = QueryVectors(context.vector[None], barred, context.echo)
    own = np.empty(0, np.int64)
    wanted = k if tail is None else k + _SPARE
    for searches in range(1, _ROUNDS + 2):
        found = _search(
            run, acts, asked, _excluding(options, own), way, k=wanted, metric=metric, recall=recall
        )
        if tail is None:
            return found
        docs = read_documents(run, found.rows)
        holds = holding_among(run.tokenization.corpus, docs, tail)
        own = np.union1d(own, holds)
        keep = np.flatnonzero(~np.isin(docs, holds))
        if len(keep) >= k or len(docs) < wanted:
            return Neighbours(found.rows[keep[:k]], found.distances[keep[:k]], found.answer, own)
        if searches == _ROUNDS:
            own = holding(run.tokenization.corpus, tail)
    raise AssertionError("outside of all documents that hold the text no row is of one")


def read_documents(run: Run, rows: Int64s) -> Int64s:
    """Return the document of each of some rows, in any order; shape (n,)."""
    return _read_column(run, rows, "doc_id")


def read_next_tokens(run: Run, rows: Int64s) -> Int64s:
    """Return the token after each of some rows, in any order, all of which have one; shape (n,)."""
    return _read_column(run, rows + 1, "token_id").astype(np.int64)


def _read_column(run: Run, rows: Int64s, name: str) -> npt.NDArray[Any]:
    order = np.argsort(rows, kind="stable")
    ascending = read_columns(run.tokenization, rows[order], [name])[name]
    values = np.empty_like(ascending)
    values[order] = ascending
    return values


def _excluding(options: RowOptions, docs: Int64s) -> RowOptions:
    """Return the options with more documents left out."""
    if not docs.size:
        return options
    given: Any = () if options.exclude_docs is None else options.exclude_docs
    return replace(options, exclude_docs=np.union1d(np.asarray(given, np.int64), docs))


def _search(
    run: Run,
    acts: Activations,
    asked: QueryVectors,
    options: RowOptions,
    way: Way,
    *,
    k: int,
    metric: KnnMetric,
    recall: float | None,
) -> Neighbours:
    """Return the `k` nearest rows that the options leave."""
    vectors_qd = transform_queries(way.transform, asked.vectors_qd, metric)
    scorer: Scorer = SimilarityScorer(vectors_qd, metric)
    if not way.transform.is_identity:
        scorer = TransformedScorer(way.transform, SimilarityScorer(vectors_qd, metric))
    answer = find_nearest(run, acts, scorer, asked, way, options, k=k, metric=metric, recall=recall)
    ranked = answer.report.best[0].ranked()
    rows = np.array([row for _, row in ranked], np.int64)
    scores = np.array([score for score, _ in ranked], np.float64)
    # Of vectors of length 1 the squared distance is 2 - 2 cos.
    distances = -scores if metric == "l2" else 2.0 - 2.0 * scores
    return Neighbours(rows, distances, answer, np.empty(0, np.int64))
