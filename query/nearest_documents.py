"""Which documents are nearest to a document, a text or a vector? Their pooled vectors are compared, one for each document.

A document has a vector if the run keeps pooled vectors and one of its tokens entered it. Vectors that an index of documents has
are searched there and compared again as they are stored; all others, and all with `exact=True`, are compared one by one.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.arrow_arrays import from_numbers, from_texts
from actstore.checks import check_whole
from actstore.faiss_file import has_faiss
from actstore.pooled import Pooled
from actstore.result import Result
from actstore.run import Run
from actstore.transforms import Transform, fit_transform, parse_steps
from actstore.vector_index import open_indexes

from .answer import (
    DEFAULT_MEMORY_BYTES,
    DEFAULT_RECALL,
    WITHOUT_FAISS,
    RowOptions,
    check_choice,
    check_recall,
    make_result,
)
from .document_answer import DocumentAnswer, DocumentQuestion, search_documents
from .eligible import Selection, check_selection
from .index_search import LocalShards, ShardSearcher, place_searchers
from .query_vectors import QueryVectors, check_fit, narrow_queries, read_query, transform_queries
from .scan import check_k, plan_block_rows
from .scores import Metric, Scorer, SimilarityScorer, TransformedScorer
from .unit_tables import read_texts
from .where import keep_documents

TEXT_CHARS = 240
"""Characters of a document's text that an answer shows: about two lines."""


def nearest_documents(
    run: Run,
    hook_point: str,
    query: Any,
    k: int = 20,
    *,
    pooling: str = "mean",
    metric: Metric = "cosine",
    transform: str | Sequence[str] | None = (),
    where: str | None = None,
    docs: Selection = None,
    exclude_own_document: bool = False,
    exact: bool | None = None,
    recall: float = DEFAULT_RECALL,
    shards: ShardSearcher | None = None,
    text_chars: int = TEXT_CHARS,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Result:
    """Return the documents whose pooled vectors are nearest to a query; equal ones are in the order of the corpus.

    Memory: `memory_bytes`, the documents of one unit, four bytes for each document of the corpus, and the answer.

    Args:
        run: A run that keeps pooled vectors.
        hook_point: Where to compare; aliases are accepted.
        query: `actstore.document(doc_id)` (never in its own answer), a text (pooled as the run's documents are), a row number,
            a vector (d_model,), or several vectors (q, d_model).
        k: Answers per query, at most; 1 to 10,000.
        pooling: Which of the run's pooled vectors.
        metric: "cosine"; "ip": inner product; "l2": Euclidean distance, smallest first.
        transform: Steps of `actstore.transforms`, fitted to the documents' vectors.
        where: SQL condition over the columns of documents.
        docs: Only these documents (numbers or a slice).
        exclude_own_document: Leave out the document that the query's row is in.
        exact: True: compare all vectors one by one. None and False: search an index where there is one.
        recall: Share of the true answer that an index must have been measured to find; where it was not, all are compared.
        shards: What searches the index's shards; the threads of this process if None.
        text_chars: Characters of the text to show.
        memory_bytes: Bound on buffers.

    Returns:
        Columns: query (its number, when several vectors were given), rank (from 1), doc_id, value (cosine, inner product or
        distance, float64), n_tokens (that entered the vector), text (its beginning).

    Raises:
        NotFoundError: no such hook point, row or document, or one without a vector.
        InvalidInputError: the run keeps no pooled vectors, or not these; a query that does not fit, or a bad option.
        FormatError: a stored object is missing or damaged.
        MissingDependencyError: a text, and the packages that run models are not installed.
    """
    start = time.perf_counter()
    k, steps = check_k(k), parse_steps(transform)
    check_choice(metric, Metric, what="metric")
    check_choice(exact, Literal[None, True, False], what="exact")
    recall = check_recall(recall)
    text_chars = check_whole(text_chars, what="text_chars", least=0)
    options = RowOptions(
        where=where, docs=docs, mask_special=False, mask_sinks=False, memory_bytes=memory_bytes
    )
    pooled = run.pooled(hook_point, pooling)
    own = exclude_own_document
    asked = read_query(run, pooled.hook_point, query, exclude_own_document=own, pooling=pooling)
    check_fit(asked.vectors_qd, d_model=pooled.d_model, hook_point=pooled.hook_point, metric=metric)
    searchers, notes = _searchers(run, pooled, metric, steps, shards, exact=exact)
    # Exact answers are in the same space as those of the index.
    fitted = searchers[0].index.transform() if searchers else _fit(run, pooled, steps)
    searched_qd, problem = narrow_queries(asked.vectors_qd, [s.index for s in searchers], metric)
    if problem is not None and searchers and not exact:
        notes.append(problem)
    question = _question(
        run,
        pooled,
        asked,
        fitted,
        options,
        k=k,
        metric=metric,
        searched_qd=searched_qd if problem is None else None,
    )
    if not exact and any(isinstance(s, LocalShards) for s in searchers) and not has_faiss():
        searchers = []
        notes.append(f"{WITHOUT_FAISS}: all vectors were compared")
    answer = search_documents(question, [] if exact else searchers, recall=recall)
    n_requested = k * len(asked.vectors_qd)
    table = _describe(run, question, answer, text_chars)
    request = {
        "verb": "nearest",
        "run": run.id,
        "hook_point": pooled.hook_point,
        "of": "documents",
        **asked.echo,
        "k": k,
    }
    request |= {"pooling": pooling, "metric": metric, "transform": list(steps), "where": where}
    request |= {"exact": exact, "recall": None if exact else recall}
    request |= {"exclude_own_document": own, "text_chars": text_chars}
    removed = answer.removed
    notes += _notes(run, pooled, asked, options, answer)
    if table.num_rows < n_requested:
        notes.append(f"{table.num_rows} documents were found of {n_requested} asked for")
    return make_result(
        run,
        [table if asked.is_batch else table.drop_columns(["query"])],
        start=start,
        request=request,
        mask={
            "n_documents": removed.n_seen,
            "removed": dict(removed.counts),
            "pool_special": bool(run.collection.config.get("pool_special", False)),
        },
        n_requested=n_requested,
        n_eligible=removed.n_kept,
        bytes_read=answer.bytes_read,
        options=options,
        warnings=notes,
        exact=answer.exact,
        recall=answer.recall,
        index={"n_scanned": answer.n_scanned, "generations": answer.generations}
        if answer.generations
        else None,
    )


def _searchers(
    run: Run,
    pooled: Pooled,
    metric: Metric,
    steps: tuple[str, ...],
    shards: ShardSearcher | None,
    *,
    exact: bool | None,
) -> tuple[list[ShardSearcher], list[str]]:
    """Return what searches the indexes of these vectors, and why vectors are compared one by one where that may be unexpected."""
    hook_point, pooling = pooled.hook_point, pooled.pooling
    indexes = open_indexes(
        run, hook_point, of="documents", metric=metric, transform_steps=steps, pooling=pooling
    )
    asked = f"metric={metric!r}, transform={list(steps)}, pooling={pooling!r}"
    searchers = place_searchers(
        indexes, shards, asked=f"{hook_point!r} of run {run.id!r}, its documents, for {asked}"
    )
    others = [] if indexes or exact else open_indexes(run, hook_point, of="documents")
    notes = []
    if others:
        found = f"metric={others[0].metric!r}, transform={list(others[0].transform_steps)}, pooling={others[0].pooling!r}"
        notes.append(f"the index of documents is for {found}: every vector was compared for {asked}")
    elif exact is False and not indexes:
        notes.append("this hook point has no index of documents: the answer is exact")
    return searchers, notes


def _fit(run: Run, pooled: Pooled, steps: Sequence[str]) -> Transform:
    return fit_transform(run, pooled.hook_point, steps, of="documents", pooling=pooled.pooling)


def _question(
    run: Run,
    pooled: Pooled,
    asked: QueryVectors,
    fitted: Transform,
    options: RowOptions,
    *,
    k: int,
    metric: Metric,
    searched_qd: npt.NDArray[np.float32] | None,
) -> DocumentQuestion:
    corpus = run.tokenization.corpus
    selected = check_selection(options.docs, corpus.n_documents, name="docs", what="document")
    moved = SimilarityScorer(transform_queries(fitted, asked.vectors_qd, metric), metric)
    scorer: Scorer = moved if fitted.is_identity else TransformedScorer(fitted, moved)
    where_bytes = max(64 << 20, options.memory_bytes // 4)
    return DocumentQuestion(
        pooled=pooled,
        scorer=scorer,
        vectors_qd=searched_qd,
        k=k,
        drop_zero_rows=metric == "cosine",
        barred=asked.barred,
        n_documents=corpus.n_documents,
        selected=selected,
        kept=None
        if options.where is None
        else keep_documents(options.where, corpus, memory_bytes=where_bytes),
        block_rows=plan_block_rows(pooled.d_model, len(asked.vectors_qd), options.memory_bytes),
    )


def _describe(run: Run, question: DocumentQuestion, answer: DocumentAnswer, text_chars: int) -> pa.Table:
    """Return what is to be said about every document found, query by query, best first."""
    hits = [
        (query, rank, doc_id)
        for query, best in enumerate(answer.best)
        for rank, (_, doc_id) in enumerate(best.ranked(), start=1)
    ]
    queries, ranks, doc_ids = np.array(hits, np.int64).reshape(-1, 3).T
    values, n_tokens = np.empty(len(hits)), np.empty(len(hits), np.int64)
    for part in question.pooled.scan(docs=np.unique(doc_ids)):
        places = np.flatnonzero(np.isin(doc_ids, part.doc_ids))
        at = np.searchsorted(part.doc_ids, doc_ids[places])
        n_tokens[places] = part.n_tokens[at]
        for query in np.unique(queries[places]).tolist():
            mine = queries[places] == query
            values[places[mine]] = question.scorer.value(part.vectors[at[mine]], query)
    texts = read_texts(run.tokenization.corpus, doc_ids)
    return pa.table(
        {
            "query": from_numbers(queries, pa.int32()),
            "rank": from_numbers(ranks, pa.int32()),
            "doc_id": from_numbers(doc_ids, pa.int64()),
            "value": from_numbers(values, pa.float64()),
            "n_tokens": from_numbers(n_tokens, pa.int64()),
            "text": from_texts([texts[doc_id][:text_chars] for doc_id in doc_ids.tolist()]),
        }
    )


def _notes(
    run: Run, pooled: Pooled, asked: QueryVectors, options: RowOptions, answer: DocumentAnswer
) -> list[str]:
    """Return what a careful reader should know about the answer."""
    notes, counts = list(answer.warnings), answer.removed.counts
    if not run.is_complete:
        planned = len(run.tokenization.units)
        notes.append(f"run {run.id!r} is not complete: {run.n_units} of {planned} units were asked")
    if counts["nonfinite"]:
        notes.append(
            f"{counts['nonfinite']} {pooled.pooling} vectors hold NaN or infinite values and were left out"
        )
    if answer.generations and answer.n_scanned:
        notes.append(
            f"{answer.n_scanned} documents are in no index and were compared one by one: actstore index build brings it up "
            "to date"
        )
    if not answer.exact and answer.recall is not None:
        if asked.echo["query"] != "document":
            notes.append(
                "recall was measured with documents of the run as queries: of others it may be lower"
            )
        if options.where is not None or options.docs is not None:
            notes.append(
                f"the recall of {answer.recall:.3f} was measured under filters that know nothing of the vectors: where a "
                "filter keeps documents far from the query it may be lower; exact=True compares all that it keeps"
            )
    return notes
