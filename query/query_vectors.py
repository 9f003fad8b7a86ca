"""What is asked for the nearest of? One vector for a row, a text or a document, or the vectors themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.activations import Activations
from actstore.checks import is_whole
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.pooled_tables import PooledSums
from actstore.row_norms import row_norms
from actstore.run import Run
from actstore.targets import MAX_VALUE, Document, check_vectors
from actstore.transforms import Transform
from actstore.vector_index import VectorIndex

from .answer import DEFAULT_MEMORY_BYTES, open_acts
from .row_mask import sink_rule
from .scores import Metric
from .unit_tables import read_units

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

Barred: TypeAlias = list[tuple[int | None, int | None]]
"""For each query the row and the document that may not answer it."""

_LARGEST = 2.0**50
"""Of a query's numbers: the products and squares of larger ones may leave float32, in which indexes are searched."""

_MAX_DOCUMENT_ROWS = 1 << 22
"""Longest document whose rows are averaged."""

_BATCH_BYTES = 32 << 20
"""Activations read at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class QueryVectors:
    """The queries of one question, as vectors of the hook point."""

    vectors_qd: Float64s
    """Finite, shape (q, d_model)."""

    barred: Barred | None
    """What may not answer each; None for no such thing."""

    echo: dict[str, Any]
    """The query as it is reported; `echo["query"]` is "row", "text", "document", "vector" or "vectors"."""

    @property
    def is_batch(self) -> bool:
        """Whether several vectors were given, so that answers say to which they belong."""
        return bool(self.echo["query"] == "vectors")


def read_query(
    run: Run,
    hook_point: str,
    query: Any,
    *,
    token: int | None = None,
    exclude_own_document: bool = False,
    pooling: str | None = None,
    mask_special: bool = True,
    mask_sinks: bool = True,
) -> QueryVectors:
    """Return the vectors that a query stands for.

    Args:
        run: The run asked.
        hook_point: One of its hook points, or an alias.
        query: A row number, a text (run through the run's own model), `actstore.document(doc_id)`, a vector (d_model,), or
            vectors (q, d_model). Without `pooling` a text is one of its tokens, and a document the mean of its rows that
            the masks leave, each position once; with it both are pooled as the run's documents are.
        token: For a text without `pooling`: index of the token, negative from the end; None for the last that is not special.
        exclude_own_document: Bar the document of a row, or the document that is the query.
        pooling: The question is about documents, pooled like this; one that is the query is always barred.
        mask_special: Leave special tokens out of the mean of a document's rows.
        mask_sinks: Leave attention sinks out of it.

    Raises:
        NotFoundError: no such row, document or hook point.
        InvalidInputError: something that is no query, not finite, without a token that counts, or an option that does not fit it.
    """
    if token is not None and (not isinstance(query, str) or pooling is not None):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            "token= says which token of a text is meant: give a text"
            + ("" if pooling is None else ", and ask for tokens: of documents the whole text is the query"),
        )
    own = exclude_own_document
    if is_whole(query):
        row = int(query)
        [acts] = open_acts(run, hook_point, DEFAULT_MEMORY_BYTES).read([row])
        vector = check_vectors(acts, what=f"stored row {row}")
        doc = _document_of(run, row) if own else None
        return QueryVectors(vector[None], [(row, doc)], {"query": "row", "row": row})
    if isinstance(query, Document):
        vector = _document_vector(
            run, hook_point, query.doc_id, pooling, special=mask_special, sinks=mask_sinks
        )
        barred: Barred = [(None, query.doc_id if own or pooling is not None else None)]
        return QueryVectors(vector[None], barred, {"query": "document", "doc_id": query.doc_id})
    if own:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            "exclude_own_document needs a query that has a document: give a row number or actstore.document(doc_id)",
        )
    if isinstance(query, str):
        vector, at = _text_vector(run, hook_point, query, token, pooling)
        return QueryVectors(vector[None], None, {"query": "text", "text": query, **at})
    vectors = check_vectors(query, what="query")
    if vectors.ndim == 1:
        return QueryVectors(vectors[None], None, {"query": "vector"})
    return QueryVectors(vectors, None, {"query": "vectors", "n_queries": len(vectors)})


def check_fit(vectors_qd: Float64s, *, d_model: int, hook_point: str, metric: Metric) -> None:
    """Check that queries can be compared with the rows of a hook point.

    Raises:
        InvalidInputError: of another width, too large for the metric, or all zeros with cosine.
    """
    width = vectors_qd.shape[1]
    if width != d_model:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"the query has {width} dimensions, {hook_point!r} has {d_model}"
        )
    if metric != "cosine" and np.abs(vectors_qd).max() > MAX_VALUE:
        raise InvalidInputError(
            ErrorKind.OVERFLOW,
            f"the query has values beyond {MAX_VALUE:g}, whose {metric} with a row cannot be computed: scale it down",
        )
    _check_direction(vectors_qd, metric, "is all zeros")


def transform_queries(transform: Transform, vectors_qd: Float64s, metric: Metric) -> Float64s:
    """Return queries in the space in which transformed rows are compared, shape (q, d_out).

    A query that is a stored row becomes exactly what that row becomes.

    Raises:
        InvalidInputError: a query that becomes too large for float32, or with cosine one that becomes zeros.
    """
    if transform.is_identity:
        return vectors_qd
    moved = transform.apply(vectors_qd).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(moved).all(axis=1))
    if bad.size:
        raise InvalidInputError(
            ErrorKind.OVERFLOW,
            f"query {int(bad[0])} of {len(moved)} is beyond float32 after transform={list(transform.steps)}: scale it down",
        )
    _check_direction(moved, metric, f"becomes all zeros by transform={list(transform.steps)}")
    return moved


def narrow_queries(
    vectors_qd: Float64s, indexes: Sequence[VectorIndex], metric: Metric
) -> tuple[Float32s, str | None]:
    """Return queries as indexes are searched for them, and why they must not be searched, if so.

    What float32 cannot tell apart an index cannot find: numbers whose products leave its range, or queries that become zeros, to
    which all rows are alike. Where scale changes no order, it is changed to what float32 has.

    Args:
        vectors_qd: Queries as rows of the hook point, shape (q, d_model).
        indexes: All with one transform.
        metric: Of the question.
    """
    if metric != "l2" and not any(index.transform_steps for index in indexes):
        sizes_q1 = np.abs(vectors_qd).max(axis=1, keepdims=True)
        some = sizes_q1 > 0 if metric == "cosine" else (sizes_q1 > 0) & (sizes_q1 < 1)
        vectors_qd = vectors_qd / np.where(some, sizes_q1, 1.0)
    is_large = bool(np.abs(vectors_qd).max() > _LARGEST)
    narrow = np.clip(vectors_qd, -_LARGEST, _LARGEST).astype(np.float32)
    for index in indexes if not is_large else ():
        prepared = index.prepare(narrow)
        is_large |= not bool(np.abs(prepared).max() <= _LARGEST)
        if metric != "l2" and not prepared.any(axis=1).all():
            return narrow, "a query is all zeros where the index compares: all rows were compared"
    if is_large:
        why = f"a query has values beyond {_LARGEST:.0e}, too large to search an index for: all rows were compared"
        return narrow, why
    return narrow, None


def _check_direction(vectors_qd: Float64s, metric: Metric, what: str) -> None:
    zeros = np.flatnonzero(~vectors_qd.any(axis=1))
    if metric == "cosine" and zeros.size:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"query {int(zeros[0])} of {len(vectors_qd)} {what} and has no direction: use metric='l2', or another query",
        )


def _document_of(run: Run, row: int) -> int:
    unit, offset = divmod(row, run.tokenization.rows_per_unit)
    return int(read_units(run.tokenization, [unit])[unit].doc_id[offset])


def _text_vector(
    run: Run, hook_point: str, text: str, token: int | None, pooling: str | None
) -> tuple[Float64s, dict[str, Any]]:
    """Return the vector of a text's token, or of the whole text, and which token that is."""
    if pooling is not None:
        run.pooled(hook_point, pooling)  # tells what the run has before the model is loaded
    [encoded] = run.encode_text([text], hook_point)
    acts_td = np.asarray(encoded.activations, np.float32)
    n = len(acts_td)
    if pooling is not None:
        pools_special = bool(run.collection.config.get("pool_special", False))
        enters = np.isfinite(acts_td).all(axis=1) & (pools_special | ~encoded.is_special)
        vector = _pool(acts_td[enters], np.flatnonzero(enters), pooling)
        if vector is None:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"text {text!r:.80} has no token that counts: special ones do not"
            )
        return check_vectors(vector, what="the text's vector"), {}
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
    return check_vectors(acts_td[index], what="the text's activation"), {"token": index}


def _pool(
    rows_td: npt.NDArray[np.float32], positions: Int64s, pooling: str
) -> npt.NDArray[np.float32] | None:
    """Return the vector of rows at these positions; None without rows."""
    if not len(rows_td):
        return None
    wide = rows_td.astype(np.float64)
    weights = positions.astype(np.float64) + 1
    sums = PooledSums(
        n_tokens=len(rows_td),
        weight_sum=int(weights.sum()),
        last_position=int(positions[-1]),
        sum=wide.sum(axis=0),
        weighted_sum=(wide * weights[:, None]).sum(axis=0),
        max=rows_td.max(axis=0),
        last=rows_td[-1],
    )
    return sums.vector(pooling)


def _document_vector(
    run: Run, hook_point: str, doc_id: int, pooling: str | None, *, special: bool, sinks: bool
) -> Float64s:
    n_documents = run.tokenization.corpus.n_documents
    if doc_id >= n_documents:
        raise NotFoundError(
            ErrorKind.ROW_NOT_FOUND,
            f"document {doc_id} was asked for, corpus {run.tokenization.corpus.id!r} has documents [0, {n_documents})",
        )
    if pooling is None:
        return _mean_of_rows(run, hook_point, doc_id, special=special, sinks=sinks)
    found = run.pooled(hook_point, pooling).documents([doc_id])
    if not len(found):
        raise NotFoundError(
            ErrorKind.ROW_NOT_FOUND,
            f"document {doc_id} has no pooled vector in run {run.id!r}: it has no token that counts, or not all of its units "
            "are stored",
        )
    return check_vectors(found.vectors[0], what=f"the pooled vector of document {doc_id}")


def _mean_of_rows(run: Run, hook_point: str, doc_id: int, *, special: bool, sinks: bool) -> Float64s:
    """Return the mean in float64 of the finite rows of a document that the masks leave, each position once."""
    acts = run.activations(hook_point)
    rows = _rows_of(run, acts, doc_id, special=special, sinks=sinks)
    limit = sink_rule(run, acts.hook_point).limit if sinks else np.inf
    total, n = np.zeros(acts.shape[1]), 0
    size = max(1, _BATCH_BYTES // (4 * acts.shape[1]))
    for start in range(0, len(rows), size):
        acts_td = acts.read(rows[start : start + size])
        norms_t, finite = row_norms(acts_td)
        some = acts_td[finite & (norms_t <= limit)]
        total += some.sum(axis=0, dtype=np.float64)
        n += len(some)
    if not n:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"document {doc_id} has no row in run {run.id!r} that counts (mask_special={special}, mask_sinks={sinks}): ask for a "
            "row, or unmask",
        )
    return total / n


def _rows_of(run: Run, acts: Activations, doc_id: int, *, special: bool, sinks: bool) -> Int64s:
    """Return the stored rows of a document that the masks leave, the first of each position, ascending."""
    tokenization = run.tokenization
    units = [u.unit for u in tokenization.units if u.meta["first_doc"] <= doc_id <= u.meta["last_doc"]]
    n_rows = sum(tokenization.collection.units[unit].rows for unit in units)
    if n_rows > _MAX_DOCUMENT_ROWS + 2 * tokenization.rows_per_unit:
        raise InvalidInputError(
            ErrorKind.TOO_LARGE,
            f"document {doc_id} has over {_MAX_DOCUMENT_ROWS} tokens: ask for a row of it, or for vectors",
        )
    rows, positions = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for unit, tokens in sorted(read_units(tokenization, units).items()):
        keep = tokens.doc_id == doc_id
        if special:
            keep &= ~tokens.is_special
        if sinks:
            keep &= tokens.window_position > 0
        at = np.flatnonzero(keep)
        rows.append(unit * tokenization.rows_per_unit + at)
        # Special tokens stand at the position of a neighbour, which they are not.
        positions.append(tokens.position[at].astype(np.int64) * 2 + tokens.is_special[at])
    found, places = np.concatenate(rows), np.concatenate(positions)
    stored = acts.exist(found)
    found, places = found[stored], places[stored]
    _, first = np.unique(places, return_index=True)
    return np.sort(found[first])
