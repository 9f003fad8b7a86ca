"""Which token comes next, if the stored tokens nearest to a context are a memory of what came after it?

Each stored row is a key, and the token that follows it in its model window of its document a value. The neighbours of a query
vote for their values, a near one more than a far one, and the result is mixed with what the run's own model expects:

    p_kNN(y) ∝ sum over the neighbours with next token y of exp(-d / T)      d: squared Euclidean distance
    p(y) = λ p_kNN(y) + (1 - λ) p_LM(y)

Rows without a token after them are no neighbours: they are masked before the k nearest are taken, not dropped afterwards.

Source: Khandelwal et al. (2020), "Generalization through Memorization: Nearest Neighbor Language Models", arXiv:1911.00172,
section 2, equations 2 and 3; the temperature T: Khandelwal et al. (2021), "Nearest Neighbor Machine Translation",
arXiv:2010.00710, equation 2.
"""

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore._lazy import lazy_import
from actstore.arrow_arrays import from_numbers
from actstore.checks import check_whole
from actstore.errors import ErrorKind, InvalidInputError
from actstore.hook_points import parse_hook_point
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
from .eligible import Selection, check_selection
from .index_search import ShardSearcher
from .knn_context import read_context
from .knn_neighbours import KnnMetric, find_neighbours, read_next_tokens
from .nearest_rows import choose_way
from .query_vectors import check_fit
from .scan import check_k
from .unit_tables import read_words
from .votes import Votes, count_votes, gap_temperature

Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]


def knn_lm(
    run: Run,
    query: int | str,
    k: int = 1024,
    *,
    hook_point: str | None = None,
    metric: KnnMetric = "l2",
    transform: str | Sequence[str] = (),
    temperature: float | None = None,
    interpolate: float = 0.25,
    n_tokens: int | None = 20,
    token: int | None = None,
    exclude_own_document: bool = True,
    exclude_docs: Selection = None,
    where: str | None = None,
    rows: Selection = None,
    docs: Selection = None,
    exact: bool | None = None,
    recall: float = DEFAULT_RECALL,
    shards: ShardSearcher | None = None,
    mask_special: bool = True,
    mask_sinks: bool = True,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Result:
    """Return the most likely next tokens by the stored contexts nearest to a query, mixed with the run's own model.

    Memory: `memory_bytes`, and 60 bytes per token of the vocabulary.

    Args:
        run: The run to ask.
        query: A text (its last token that is not special), or a row number of the run: what comes after it?
        k: Neighbours, 1 to 10,000; the paper takes 1,024.
        hook_point: Where to compare. None: of the last layer that the run stores `mlp_in`, which the paper found best, or
            else the last hook point.
        metric: "l2": distances between the vectors as they are; "cosine": between the vectors scaled to length 1, for which
            an index of cosines serves.
        transform: What is done to the vectors before, see `actstore.transforms`; an index must have been built with the same.
        temperature: T of the formula; the larger, the flatter the neighbours' distribution. Distances have another scale at
            every hook point, so None takes what the 32nd neighbour is further away than the first; `meta` tells it.
        interpolate: λ, the weight of the neighbours, 0 to 1. With 1 no row's model is needed, and p_lm is null.
        n_tokens: Tokens returned, at most, those of largest p; None for all whose p is above 0.
        token: Of a text: index of the token to ask about, negative from the end.
        exclude_own_document: Leave out the document of a row; of a text all documents that hold its last 16 tokens word for
            word, none if it has fewer. The query's own row is always left out.
        exclude_docs: Leave out these documents too (numbers or a slice).
        where: SQL condition over columns of `tokens` and of the documents.
        rows: Only these rows (numbers or a slice).
        docs: Only these documents (numbers or a slice).
        exact: True: compare all rows that the masks leave. None or False: ask an index if there is one of the metric and
            transform; False says so if there is none.
        recall: With an index, the share of the neighbours that it must have been measured to find, above 0 and at most 1.
        shards: Searches the index elsewhere, such as `actstore.query.ray_shards.RayShards`; None for this process.
        mask_special: Leave out rows of tokens that the tokenizer added.
        mask_sinks: Leave out attention sinks: the first token of each window, and rows of over 10 times the median norm.
        memory_bytes: Bound on buffers.

    Returns:
        Columns: rank (from 1, by falling p, of equal ones the smaller token_id first), token_id, token, p, p_knn (null if
        there are no neighbours: p is p_lm then), p_lm, n_neighbours (that have it next), nearest_distance (the smallest
        of theirs, squared; null if none) and nearest_row (of that neighbour), is_next (whether it is what follows the row in
        its document; null for a text, and where the window ends). What follows is in the answer whatever its rank, behind the
        others. Rows of its own documents that are further away may count in `meta.n_eligible`.

    Raises:
        NotFoundError: no such hook point, row or document, or the run's model is not where it was.
        InvalidInputError: a query that does not fit, a bad option, a run without dense rows, or without a model that predicts
            tokens.
        FormatError: stored rows are missing or damaged.
        MissingDependencyError: the packages that run models are needed and not installed.
    """
    start = time.perf_counter()
    k = check_k(k)
    check_choice(metric, KnnMetric, what="metric")
    check_choice(exact, Literal[None, True, False], what="exact")
    recall = check_recall(recall)
    interpolate = _check_number(interpolate, what="interpolate", least=0.0, most=1.0)
    if temperature is not None:
        temperature = _check_number(temperature, what="temperature", least=1e-100, most=1e100)
    if n_tokens is not None:
        n_tokens = check_whole(n_tokens, what="n_tokens", least=1)
    _check_has_model(run, interpolate)
    left_out = check_selection(
        exclude_docs, run.tokenization.corpus.n_documents, name="exclude_docs", what="document"
    )
    options = RowOptions(
        where, rows, docs, mask_special, mask_sinks, None, memory_bytes, exclude_docs=left_out, has_next=True
    )
    acts = open_acts(run, default_hook_point(run) if hook_point is None else hook_point, memory_bytes)
    way = choose_way(run, acts.hook_point, metric, parse_steps(transform), exact=exact, shards=shards)
    context = read_context(run, acts, query, token)
    check_fit(context.vector[None], d_model=acts.shape[1], hook_point=acts.hook_point, metric=metric)
    p_lm = None if interpolate == 1 else own_distribution(run, context.token_ids)
    found = find_neighbours(
        run,
        acts,
        context,
        options,
        way,
        k=k,
        metric=metric,
        recall=None if exact else recall,
        exclude_own_document=exclude_own_document,
    )
    answer, report = found.answer, found.answer.report
    scale = gap_temperature(found.distances) if temperature is None else temperature
    votes = count_votes(read_next_tokens(run, found.rows), found.distances, found.rows, temperature=scale)
    table = _describe(run, votes, p_lm, interpolate, n_tokens=n_tokens, actual=context.next_token)
    request = {"verb": "knn_lm", "run": run.id, "hook_point": acts.hook_point, **context.echo, "k": k}
    request |= {"metric": metric, "transform": list(way.transform.steps)}
    request |= {"exact": exact, "recall": None if exact else recall}
    request |= {"temperature": scale, "temperature_is_given": temperature is not None}
    request |= {"interpolate": interpolate, "n_tokens": n_tokens}
    request |= {"exclude_own_document": exclude_own_document, **options.echo()}
    warnings = [*mask_warnings(run, report, len(found.rows), k), *answer.warnings]
    if not len(found.rows):
        warnings.append("there are no neighbours: p is what the model expects")
    return make_result(
        run,
        [table],
        start=start,
        request=request,
        mask={**report_mask(report, options), "own_documents": found.own_documents.tolist()},
        n_requested=n_tokens,
        n_eligible=report.removed.n_kept,
        bytes_read=report.bytes_read,
        options=options,
        warnings=warnings,
        exact=answer.exact,
        recall=answer.recall,
        index=answer.index,
    )


def default_hook_point(run: Run) -> str:
    """Return where contexts are compared if nothing else is said.

    `mlp_in` of the last layer that the run stores anything of, if it stores that, else its last hook point. Source:
    arXiv:1911.00172, section 5, "Key Function": the input of the last layer's feedforward network, after layer normalisation.
    """
    layers = [point.layer for point in map(parse_hook_point, run.hook_points) if point.layer is not None]
    best = f"layers.{max(layers, default=0)}.mlp_in"
    return best if best in run.hook_points else run.hook_points[-1]


def own_distribution(run: Run, token_ids: npt.NDArray[np.int32]) -> Float64s:
    """Return p_LM: what the run's own model expects behind some tokens, shape (vocabulary,).

    Raises:
        NotFoundError: the model is not where it was.
        ConflictError: there is another one there.
        InvalidInputError: it predicts no tokens.
        MissingDependencyError: the packages that run models are not installed.
    """
    module = lazy_import(
        "actstore.ingest.encode_text", needed_for="knn_lm() below interpolate=1", extra="ingest"
    )
    config = run.collection.config
    found: Float64s = module.next_token_probabilities(
        model_source=run.collection.info["model_source"],
        expected_model=config["model"],
        compute_dtype=config["compute_dtype"],
        attn_implementation=config["attn_implementation"],
        token_ids=token_ids,
    )
    return found


def _check_number(value: Any, *, what: str, least: float, most: float) -> float:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan
    if not least <= number <= most:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"{what} must be a number from {least:g} to {most:g}, got {value!r:.80}"
        )
    return number


def _check_has_model(run: Run, interpolate: float) -> None:
    if interpolate < 1 and "imported" in run.collection.config["model"]:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"interpolate={interpolate:g} mixes with what the run's own model expects, and run {run.id!r} was imported from "
            "another program's activations and has no model: ask about a row with interpolate=1",
        )


def _describe(
    run: Run,
    votes: Votes,
    p_lm: Float64s | None,
    interpolate: float,
    *,
    n_tokens: int | None,
    actual: int | None,
) -> pa.Table:
    """Return the tokens of largest p, and behind them what follows if it is not among them."""
    words = read_words(run.tokenization)
    size = max(
        len(words) if p_lm is None else len(p_lm),
        int(votes.token_ids.max(initial=-1)) + 1,
        -1 if actual is None else actual + 1,
    )
    has_votes = len(votes.token_ids) > 0
    p_model, p_knn = np.zeros(size), np.zeros(size)
    p_model[: 0 if p_lm is None else len(p_lm)] = 0.0 if p_lm is None else p_lm
    p_knn[votes.token_ids] = votes.p
    weight = interpolate if has_votes else 0.0
    # Source: arXiv:1911.00172, equation 3.
    p = weight * p_knn + (1 - weight) * p_model
    order = np.argsort(-p, kind="stable")
    n_shown = int((p > 0).sum())
    ids = order[: n_shown if n_tokens is None else min(n_shown, n_tokens)]
    ranks = np.arange(1, len(ids) + 1)
    if actual is not None and actual not in ids:
        ids = np.append(ids, actual)
        ranks = np.append(ranks, np.flatnonzero(order == actual) + 1)
    place = np.full(size, -1, np.int64)
    place[votes.token_ids] = np.arange(len(votes.token_ids))
    at, missing = np.maximum(place[ids], 0), place[ids] < 0

    def of_votes(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values[at] if has_votes else np.zeros(len(ids), values.dtype)

    nulls = pa.nulls(len(ids), pa.float64())
    columns = {
        "rank": from_numbers(ranks, pa.int32()),
        "token_id": from_numbers(ids, pa.int32()),
        "token": words.read(ids),
        "p": from_numbers(p[ids], pa.float64()),
        "p_knn": from_numbers(p_knn[ids], pa.float64()) if has_votes else nulls,
        "p_lm": nulls if p_lm is None else from_numbers(p_model[ids], pa.float64()),
        "n_neighbours": from_numbers(np.where(missing, 0, of_votes(votes.counts)), pa.int64()),
        "nearest_distance": from_numbers(of_votes(votes.distances), pa.float64(), missing=missing),
        "nearest_row": from_numbers(of_votes(votes.rows), pa.int64(), missing=missing),
        "is_next": pa.array([None if actual is None else bool(i == actual) for i in ids], pa.bool_()),
    }
    return pa.table(columns)
