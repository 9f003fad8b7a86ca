"""Which rows are nearest: asked of the indexes that there are for a metric and a transform, or of every row?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actstore.activations import Activations
from actstore.codec.cache import BytesCache
from actstore.errors import ErrorKind, InvalidInputError
from actstore.faiss_file import has_faiss
from actstore.log.state import State
from actstore.run import Run
from actstore.transforms import Transform, fit_transform
from actstore.vector_index import VectorIndex, open_indexes

from .answer import RowOptions, find_rows
from .index_answer import IndexAnswer, Question, search_index
from .index_search import LocalShards, ShardSearcher
from .query_vectors import QueryVectors
from .scores import Metric, Scorer

_LARGEST = 2.0**50
"""Of a query's numbers: the products and squares of larger ones may leave float32, in which indexes are searched."""

_INDEXES: BytesCache[tuple[State, Run, list[VectorIndex]]] = BytesCache(64)
"""Counted, not weighed: each is about as large as a store's list of units."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a question is answered."""

    searchers: Sequence[ShardSearcher]
    """Of the indexes that have some of the rows; empty without an index."""

    transform: Transform
    notes: Sequence[str]


def choose_way(
    run: Run,
    hook_point: str,
    metric: Metric,
    steps: tuple[str, ...],
    *,
    exact: bool | None,
    shards: ShardSearcher | None,
) -> Way:
    """Return which indexes to ask, and the space to compare in: theirs.

    Args:
        run: The run asked.
        hook_point: Canonical name.
        metric: Of the question.
        steps: Of its transform, canonical.
        exact: As the caller gave it.
        shards: What searches one of the indexes elsewhere; None for nothing.

    Raises:
        InvalidInputError: `shards` is of no index that would be asked.
        FormatError: an index, or its transform, is missing or damaged.
    """
    indexes = _open_indexes(run, hook_point, metric, steps)
    if shards is not None and shards.index.id not in {index.id for index in indexes}:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"shards= has shards of index {shards.index.id!r}, and {hook_point!r} of run {run.id!r} is asked through "
            f"{', '.join(repr(index.id) for index in indexes) or 'no index'} for metric={metric!r}, transform={list(steps)}",
        )
    if not indexes:
        notes = [] if exact else _why_no_index(run, hook_point, metric, steps, exact=exact)
        return Way([], fit_transform(run, hook_point, steps), notes)
    searchers: list[ShardSearcher] = []
    for index in indexes:
        is_elsewhere = shards is not None and shards.index.id == index.id
        searchers.append(shards if is_elsewhere and shards is not None else LocalShards(index))
    return Way(searchers, indexes[0].transform(), [])


def _open_indexes(run: Run, hook_point: str, metric: Metric, steps: tuple[str, ...]) -> list[VectorIndex]:
    """Return the indexes of a metric and transform; those of the last questions are kept, with what they know of rows."""
    state = run.store.state

    def load() -> tuple[tuple[State, Run, list[VectorIndex]], int]:
        return (state, run, open_indexes(run, hook_point, metric=metric, transform_steps=steps)), 1

    # What is kept holds the state and the run's collection, so their identities name no others.
    return _INDEXES.get(f"{id(state)} {id(run.collection)} {hook_point} {metric} {steps}", load)[2]


def _why_no_index(
    run: Run, hook_point: str, metric: Metric, steps: tuple[str, ...], *, exact: bool | None
) -> list[str]:
    """Return why rows are compared one by one, where that may come unexpected."""
    others = open_indexes(run, hook_point)
    if others:
        found = f"metric={others[0].metric!r}, transform={list(others[0].transform_steps)}"
        return [
            f"the index of this hook point is for {found}: every row was compared for metric={metric!r}, "
            f"transform={list(steps)}"
        ]
    return ["this hook point has no index: the answer is exact"] if exact is False else []


def find_nearest(
    run: Run,
    acts: Activations,
    scorer: Scorer,
    asked: QueryVectors,
    way: Way,
    options: RowOptions,
    *,
    k: int,
    metric: Metric,
    recall: float | None,
) -> IndexAnswer:
    """Return the best rows: by the indexes there are, or by a scan.

    Args:
        run: The run asked.
        acts: Its rows at the hook point.
        scorer: Exact scores, in the space of `way`.
        asked: The queries, as rows of the hook point.
        way: From `choose_way`.
        options: The masks.
        k: Answers per query.
        metric: Of the question.
        recall: That an index must have been measured to have; None: every row is compared.
    """
    notes, cosine = list(way.notes), metric == "cosine"
    if not way.searchers:
        report = find_rows(run, acts, scorer, options, k=k, drop_zero_rows=cosine, barred=asked.barred)
        return IndexAnswer(report, exact=True, recall=1.0, index=None, warnings=notes)
    vectors_qd = asked.vectors_qd
    if cosine and way.transform.is_identity:  # only the direction counts
        vectors_qd = vectors_qd / np.abs(vectors_qd).max(axis=1, keepdims=True)
    if recall is not None and np.abs(vectors_qd).max() > _LARGEST:
        recall = None
        notes.append(
            f"the query has values beyond {_LARGEST:.0e}, too large to search an index for: all rows were compared"
        )
    searched_qd = np.clip(vectors_qd, -_LARGEST, _LARGEST).astype(np.float32)
    if recall is not None and any(isinstance(s, LocalShards) for s in way.searchers) and not has_faiss():
        recall = None
        notes.append("FAISS is not installed (pip install 'actstore[cpu]'): all rows were compared")
    question = Question(run, acts, scorer, searched_qd, options, k, cosine, asked.barred)
    answer = search_index(question, way.searchers, recall=recall)
    if not answer.exact and asked.echo["query"] != "row":
        notes.append("recall was measured with rows of the run as queries: of others it may be lower")
    answer.warnings += notes
    return answer
