"""Which stored tokens are nearest to a token, a text or a vector?

Exact: every stored row is compared, in blocks of one matrix product for all queries; there is no index yet.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.activations import Activations
from actstore.checks import is_whole
from actstore.errors import ErrorKind, InvalidInputError
from actstore.result import Result
from actstore.run import Run
from actstore.targets import MAX_VALUE, check_vectors

from .answer import (
    DEFAULT_MEMORY_BYTES,
    RowOptions,
    check_choice,
    find_rows,
    make_result,
    mask_warnings,
    open_acts,
    report_mask,
)
from .context import Hit, check_context, describe_hits
from .eligible import Selection
from .fold import Fold
from .scan import check_k
from .scores import Metric, SimilarityScorer

_Barred: TypeAlias = list[tuple[int | None, int | None]] | None
"""For each query the row and the document that may not answer it."""


def nearest(
    run: Run,
    hook_point: str,
    query: int | str | npt.ArrayLike,
    k: int = 20,
    *,
    metric: Metric = "cosine",
    where: str | None = None,
    exact: bool | None = None,
    mask_special: bool = True,
    mask_sinks: bool = True,
    exclude_own_document: bool = False,
    fold: Fold = "context",
    token: int | None = None,
    before: int = 16,
    after: int = 8,
    rows: Selection = None,
    docs: Selection = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Result:
    """Return the stored tokens whose activations are nearest to a query, each with its context.

    The answer is that of comparing every row in float64; equal ones are in row order. Memory: `memory_bytes` and the answer.

    Args:
        run: The run to ask.
        hook_point: Where to compare; aliases are accepted.
        query: A row number of the run (the row itself is never in the answer), a text (run through the run's own model; its
            last token that is not special), a vector (d_model,), or several vectors (q, d_model).
        k: Answers per query, at most; 1 to 10,000.
        metric: "cosine"; "ip": inner product; "l2": Euclidean distance, smallest first.
        where: SQL condition over columns of `tokens` and of the documents.
        exact: None or True. There is no index yet: False is answered exactly too, with a warning.
        mask_special: Leave out tokens that the tokenizer added.
        mask_sinks: Leave out attention sinks: the first token of each window, and rows of over 10 times the median norm.
        exclude_own_document: Leave out the document of the query's row.
        fold: "context": of rows with the same last 8 tokens only the nearest; "doc": the nearest of a document; None: all.
        token: For a text: index of the token to ask for, negative from the end; None for the last that is not special.
        before: Tokens shown before each answer.
        after: Tokens shown after it; neither crosses a model window.
        rows: Only these rows (numbers or a slice).
        docs: Only these documents (numbers or a slice).
        memory_bytes: Bound on buffers.

    Returns:
        Columns: query (its number, when several vectors were given), rank (from 1), row, doc_id, position, token_id, token,
        value (cosine, inner product or distance, float64), context (its `values` are each shown token's, null where a
        sampled run stores no row).

    Raises:
        NotFoundError: no such hook point, row or document, or a row that a sampled run did not keep.
        InvalidInputError: a query that does not fit, zeros with cosine, a bad option, or a run of pooled vectors only.
        FormatError: stored rows are missing or damaged.
        MissingDependencyError: a text, and the packages that run models are not installed.
    """
    start = time.perf_counter()
    k = check_k(k)
    check_choice(metric, Metric, what="metric")
    check_context(before, after)
    options = RowOptions(where, rows, docs, mask_special, mask_sinks, fold, memory_bytes)
    acts = open_acts(run, hook_point, memory_bytes)
    own = exclude_own_document
    vectors_qd, barred, asked = _read_query(run, acts, query, token, exclude_own_document=own)
    _check_fit(vectors_qd, acts, metric)
    scorer = SimilarityScorer(vectors_qd, metric)
    request = {"verb": "nearest", "run": run.id, "hook_point": acts.hook_point, **asked, "k": k}
    request |= {"metric": metric, "exclude_own_document": own, "before": before, "after": after}
    notes = ["this hook point has no index: the answer is exact"] if exact is False else []
    return _answer(run, acts, scorer, barred, options, request, notes, start=start)


def _answer(
    run: Run,
    acts: Activations,
    scorer: SimilarityScorer,
    barred: _Barred,
    options: RowOptions,
    request: Mapping[str, Any],
    notes: Sequence[str],
    *,
    start: float,
) -> Result:
    """Find the rows and return them with their contexts."""
    k, cosine = request["k"], request["metric"] == "cosine"
    report = find_rows(run, acts, scorer, options, k=k, drop_zero_rows=cosine, barred=barred)
    hits = [
        Hit(q, rank, row)
        for q, best in enumerate(report.best)
        for rank, (_, row) in enumerate(best.ranked(), start=1)
    ]
    before, after = request["before"], request["after"]
    table = describe_hits(run.tokenization, acts, scorer, hits, before=before, after=after)
    if request["query"] == "vectors":
        table = table.add_column(0, "query", pa.array([hit.query for hit in hits], pa.int32()))
    n_requested = k * scorer.n_queries
    return make_result(
        run,
        [table],
        start=start,
        request={**request, **options.echo()},
        mask=report_mask(report, options),
        n_requested=n_requested,
        n_eligible=report.removed.n_kept,
        bytes_read=report.bytes_read,
        options=options,
        warnings=[*mask_warnings(run, report, len(hits), n_requested), *notes],
    )


def _read_query(
    run: Run, acts: Activations, query: Any, token: int | None, *, exclude_own_document: bool
) -> tuple[npt.NDArray[np.float64], _Barred, dict[str, Any]]:
    """Return query vectors (q, d), what may not answer each, and the query as it is reported."""
    if token is not None and not isinstance(query, str):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, "token= says which token of a text is meant: give a text"
        )
    if is_whole(query):
        row = int(query)
        vector = check_vectors(acts.read([row])[0], what=f"stored row {row}")
        doc = _document_of(run, row) if exclude_own_document else None
        return vector[None], [(row, doc)], {"query": "row", "row": row}
    if exclude_own_document:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            "exclude_own_document needs a query that has a document: give a row number",
        )
    if isinstance(query, str):
        vector, index = _encode(run, acts.hook_point, query, token)
        return vector[None], None, {"query": "text", "text": query, "token": index}
    vectors = check_vectors(query, what="query")
    if vectors.ndim == 1:
        return vectors[None], None, {"query": "vector"}
    return vectors, None, {"query": "vectors", "n_queries": len(vectors)}


def _document_of(run: Run, row: int) -> int:
    unit, offset = divmod(row, run.tokenization.rows_per_unit)
    return int(run.tokenization.unit_table(unit, ["doc_id"])["doc_id"][offset].as_py())


def _encode(run: Run, hook_point: str, text: str, token: int | None) -> tuple[npt.NDArray[np.float64], int]:
    [encoded] = run.encode_text([text], hook_point)
    acts_td = encoded.activations
    n = len(acts_td)
    if token is None:
        body = np.flatnonzero(~encoded.is_special)
        if not body.size:
            raise InvalidInputError(ErrorKind.BAD_ARGUMENT, f"text {text!r} has no token that is not special")
        token = int(body[-1])
    if not is_whole(token) or not -n <= token < n:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"token={token!r} was asked for, the text has {n} tokens, special ones included",
        )
    index = int(token) % n
    return check_vectors(np.asarray(acts_td[index], dtype=np.float64), what="the text's activation"), index


def _check_fit(vectors_qd: npt.NDArray[np.float64], acts: Activations, metric: Metric) -> None:
    n_queries, width = vectors_qd.shape
    if width != acts.shape[1]:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"the query has {width} dimensions, {acts.hook_point!r} has {acts.shape[1]}",
        )
    if metric != "cosine" and np.abs(vectors_qd).max() > MAX_VALUE:
        raise InvalidInputError(
            ErrorKind.OVERFLOW,
            f"the query has values beyond {MAX_VALUE:g}, whose {metric} with a row cannot be computed: scale it down",
        )
    zeros = np.flatnonzero(~vectors_qd.any(axis=1))
    if metric == "cosine" and zeros.size:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"query {int(zeros[0])} of {n_queries} is all zeros and has no direction: use metric='l2', or another query",
        )
