"""Which rows are nearest: asked of the indexes that there are for a metric and a transform, or of every row?"""

from collections.abc import Sequence
from dataclasses import dataclass

from actstore.activations import Activations
from actstore.codec.cache import BytesCache
from actstore.faiss_file import has_faiss
from actstore.log.state import State
from actstore.run import Run
from actstore.transforms import Transform, fit_transform
from actstore.vector_index import VectorIndex, open_indexes

from .answer import WITHOUT_FAISS, RowOptions, find_rows
from .index_answer import IndexAnswer, Question, search_index
from .index_search import LocalShards, ShardSearcher, place_searchers
from .query_vectors import QueryVectors, narrow_queries
from .scores import Metric, Scorer

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
    asked = f"{hook_point!r} of run {run.id!r} for metric={metric!r}, transform={list(steps)}"
    searchers = place_searchers(indexes, shards, asked=asked)
    if not indexes:
        notes = [] if exact else _why_no_index(run, hook_point, metric, steps, exact=exact)
        return Way([], fit_transform(run, hook_point, steps), notes)
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
    indexes = [searcher.index for searcher in way.searchers]
    searched_qd, problem = narrow_queries(asked.vectors_qd, indexes, metric)
    if problem is None and any(isinstance(s, LocalShards) for s in way.searchers) and not has_faiss():
        problem = f"{WITHOUT_FAISS}: all rows were compared"
    if recall is not None and problem is not None:
        recall = None
        notes.append(problem)
    question = Question(run, acts, scorer, searched_qd, options, k, cosine, asked.barred)
    answer = search_index(question, way.searchers, recall=recall)
    if not answer.exact and asked.echo["query"] != "row":
        notes.append("recall was measured with rows of the run as queries: of others it may be lower")
    answer.warnings += notes
    return answer
