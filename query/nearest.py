"""Which stored tokens (or documents) are nearest to a token, a text, a document or a vector?

Through the hook point's index if it has one of the metric asked for, with the recall that was measured for it told
(`actstore.query.index_answer`); otherwise every stored row is compared, in blocks of one matrix product for all queries.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa

from actstore.activations import Activations
from actstore.errors import ErrorKind, InvalidInputError
from actstore.result import Result
from actstore.run import Run
from actstore.transforms import parse_steps

from .answer import (
    DEFAULT_MEMORY_BYTES,
    DEFAULT_RECALL,
    RowOptions,
    check_choice,
    check_recall,
    make_result,
    mask_warnings,
    open_acts,
    report_mask,
)
from .context import check_context
from .eligible import Selection
from .fold import Fold
from .hit_contexts import Hit, describe_hits
from .index_answer import IndexAnswer
from .index_search import ShardSearcher
from .nearest_documents import nearest_documents
from .nearest_rows import choose_way, find_nearest
from .query_vectors import check_fit, read_query, transform_queries
from .scan import check_k
from .scores import Metric, Scorer, SimilarityScorer, TransformedScorer

Of = Literal["tokens", "documents"]


def nearest(
    run: Run,
    hook_point: str,
    query: Any,
    k: int = 20,
    *,
    metric: Metric = "cosine",
    where: str | None = None,
    exact: bool | None = None,
    recall: float = DEFAULT_RECALL,
    transform: str | Sequence[str] = (),
    mask_special: bool = True,
    mask_sinks: bool = True,
    exclude_own_document: bool = False,
    fold: Fold = "context",
    token: int | None = None,
    before: int = 16,
    after: int = 8,
    rows: Selection = None,
    docs: Selection = None,
    of: Of = "tokens",
    pooling: str = "mean",
    shards: ShardSearcher | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Result:
    """Return the stored tokens whose activations are nearest to a query, each with its context.

    Values are those of comparing in float64; equal ones are in row order. Without an index, and with `exact=True`, the answer is
    that of comparing every row. Memory: `memory_bytes`, the answer, and what the process keeps: bitmaps of masks
    (`actstore.query.row_bits`), norms, opened indexes and decoded tokens.

    Args:
        run: The run to ask.
        hook_point: Where to compare; aliases are accepted.
        query: A row number of the run (the row itself is never in the answer), a text (run through the run's own model; its
            last token that is not special), `actstore.document(doc_id)` (the mean of its rows), a vector (d_model,), or several
            vectors (q, d_model).
        k: Answers per query, at most; 1 to 10,000.
        metric: "cosine"; "ip": inner product; "l2": Euclidean distance, smallest first.
        where: SQL condition over columns of `tokens` and of the documents.
        exact: True: compare all rows that the masks leave. None or False: ask an index if there is one; False says so if there
            is none.
        recall: With an index, the share of the true answer that it must have been measured to find, above 0 and at most 1.
            Where it was measured for no effort, all rows are compared.
        transform: What is done to rows and query before they are compared: of "drop_outliers", "centre", "standardise" and
            "whiten", see `actstore.transforms`; as it was when the index was built, if there is one.
        mask_special: Leave out tokens that the tokenizer added.
        mask_sinks: Leave out attention sinks: the first token of each window, and rows of over 10 times the median norm.
        exclude_own_document: Leave out the document of the query's row, or the document that is the query.
        fold: "context": of rows with the same last 8 tokens only the nearest; "doc": the nearest of a document; None: all.
        token: For a text: index of the token to ask for, negative from the end; None for the last that is not special.
        before: Tokens shown before each answer.
        after: Tokens shown after it; neither crosses a model window.
        rows: Only these rows (numbers or a slice).
        docs: Only these documents (numbers or a slice).
        of: "documents": the nearest documents, by their pooled vectors; see `actstore.query.nearest_documents`.
        pooling: Of documents.
        shards: Searches the index elsewhere, such as `actstore.query.ray_shards.RayShards`; None for this process.
        memory_bytes: Bound on buffers.

    Returns:
        Columns: query (its number, when several vectors were given), rank (from 1), row, doc_id, position, token_id, token,
        value (cosine, inner product or distance, float64), context (its `values` are each shown token's, null where a
        sampled run stores no row).

        `meta.recall` is the share of the true k nearest that the index found when it was measured against brute force, with rows
        of the run as queries; `meta.index` says which index, with what effort, and how many rows were compared.

    Raises:
        NotFoundError: no such hook point, row or document, or a row that a sampled run did not keep.
        InvalidInputError: a query that does not fit, zeros with cosine, a bad option, or a run of pooled vectors only.
        FormatError: stored rows, or an index, are missing or damaged.
        MissingDependencyError: a text, and the packages that run models are not installed.
    """
    start = time.perf_counter()
    check_choice(of, Of, what="of")
    if of == "documents":
        if rows is not None or token is not None:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, "rows= and token= speak of tokens: of documents, docs= names some"
            )
        return nearest_documents(
            run,
            hook_point,
            query,
            k,
            pooling=pooling,
            metric=metric,
            transform=transform,
            where=where,
            docs=docs,
            exclude_own_document=exclude_own_document,
            exact=exact,
            recall=recall,
            shards=shards,
            memory_bytes=memory_bytes,
        )
    k = check_k(k)
    check_choice(metric, Metric, what="metric")
    check_choice(fold, Fold, what="fold")
    check_choice(exact, Literal[None, True, False], what="exact")
    check_context(before, after)
    recall = check_recall(recall)
    options = RowOptions(where, rows, docs, mask_special, mask_sinks, fold, memory_bytes)
    acts = open_acts(run, hook_point, memory_bytes)
    asked = read_query(
        run,
        acts.hook_point,
        query,
        token=token,
        exclude_own_document=exclude_own_document,
        mask_special=mask_special,
        mask_sinks=mask_sinks,
    )
    check_fit(asked.vectors_qd, d_model=acts.shape[1], hook_point=acts.hook_point, metric=metric)
    way = choose_way(run, acts.hook_point, metric, parse_steps(transform), exact=exact, shards=shards)
    request = {"verb": "nearest", "run": run.id, "hook_point": acts.hook_point, **asked.echo, "k": k}
    request |= {"metric": metric, "transform": list(way.transform.steps), "of": of}
    request |= {"exact": exact, "recall": None if exact else recall}
    request |= {"exclude_own_document": exclude_own_document, "before": before, "after": after}
    vectors_qd = transform_queries(way.transform, asked.vectors_qd, metric)
    scorer: Scorer = SimilarityScorer(vectors_qd, metric)
    if not way.transform.is_identity:
        scorer = TransformedScorer(way.transform, SimilarityScorer(vectors_qd, metric))
    answer = find_nearest(
        run, acts, scorer, asked, way, options, k=k, metric=metric, recall=None if exact else recall
    )
    return _describe(run, acts, scorer, answer, options, {**request, **options.echo()}, start=start)


def _describe(
    run: Run,
    acts: Activations,
    scorer: Scorer,
    answer: IndexAnswer,
    options: RowOptions,
    request: dict[str, Any],
    *,
    start: float,
) -> Result:
    """Return the rows found, with their contexts."""
    report = answer.report
    hits = [
        Hit(q, rank, row)
        for q, best in enumerate(report.best)
        for rank, (_, row) in enumerate(best.ranked(), start=1)
    ]
    before, after = request["before"], request["after"]
    table = describe_hits(run.tokenization, acts, scorer, hits, before=before, after=after)
    if request["query"] == "vectors":
        table = table.add_column(0, "query", pa.array([hit.query for hit in hits], pa.int32()))
    n_requested = request["k"] * scorer.n_queries
    return make_result(
        run,
        [table],
        start=start,
        request=request,
        mask=report_mask(report, options),
        n_requested=n_requested,
        n_eligible=report.removed.n_kept,
        bytes_read=report.bytes_read,
        options=options,
        warnings=[*mask_warnings(run, report, len(hits), n_requested), *answer.warnings],
        exact=answer.exact,
        recall=answer.recall,
        index=answer.index,
    )
