"""Which latents fire on a text, on some rows, or in a document?"""

import time
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.checks import MAX_BYTES, check_whole
from actstore.codes import Codes
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.result import Meta, Result
from actstore.run import Run
from actstore.targets import Document, document

from .answer import DEFAULT_MEMORY_BYTES, check_choice
from .coded_tokens import CodedTokens, read_subject
from .latent_filter import Float64s, Int64s, KnownLatents, LatentOptions, check_density, know_latents
from .latents import run_warnings
from .scan import check_k

__all__ = ["Agg", "Document", "Rank", "active", "document", "surprise_bits"]

Rank = Literal["activation", "share_of_max", "surprise"]
Agg = Literal["max", "mean", "sum", "count"]

_FORMULAS = {
    "activation": "agg(value)",
    "share_of_max": "agg(value) / the latent's largest value on the run",
    "surprise": "agg(value) / the latent's largest value on the run * -log2((n_tokens + 0.5) / (n_rows + 1))",
}
_MAX_ANSWERS = 1 << 20
"""Most lines of a table per token."""


def active(
    run: Run,
    what: Any,
    dictionary: str,
    k: int = 20,
    *,
    rank: Rank = "activation",
    agg: Agg = "max",
    per_token: bool = False,
    where: str | None = None,
    density: tuple[float | None, float | None] | None = None,
    mask_dead: bool = True,
    mask_ultra_dense: bool = True,
    mask_special: bool = True,
    mask_sinks: bool = True,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Result:
    """Return the latents that fire on a text, on rows or in a document, the strongest in the sense of `rank` first.

    What a latent is worth is computed of its values on the tokens asked about (0 where it does not fire): `agg` makes one number
    of them, `rank` weighs it:

    - "activation": the number itself.
    - "share_of_max": divided by the latent's largest value on the run's stored rows.
    - "surprise": that share times the bits of information in the latent's firing, -log2 of its density, so that a latent that
      fires everywhere is worth little however strongly it fires. Of "count", the number of tokens times those bits: tf-idf.

    Latents that masks or `where` remove are removed before the best `k` are taken. Memory: 32 bytes per latent and 40 per
    token, the codes of 8,192 tokens at a time.

    Args:
        run: The run to ask.
        what: A text (encoded now, by the run's own model and the dictionary's encoder), a row number or several (or a slice),
            or `document(doc_id)`. Rows are taken as they are given; of texts and documents masks leave out tokens, and of a
            document a token counts once where windows overlap.
        dictionary: Name of the dictionary.
        k: Latents returned, at most; per token if `per_token`.
        rank: What they are ordered by; equal ones by number.
        agg: "max", "mean" (over all tokens that masks left), "sum", or "count" of the tokens on which the latent fires.
        per_token: Return the best latents of every token instead of one list for all; `agg` has no meaning then.
        where: SQL condition over the latents' statistics, such as "single_token_score < 0.5".
        density: Least and largest share of the run's rows on which a latent fires, both included, None for no bound.
        mask_dead: Leave out latents that fire on none of the run's rows.
        mask_ultra_dense: Leave out latents that fire on more than 10 % of the run's rows.
        mask_special: Leave out tokens that the tokenizer added.
        mask_sinks: Leave out attention sinks: the first token of each window, and rows of over 10 times the median norm.
        memory_bytes: Memory of the query that `where` is.

    Returns:
        Columns: rank (from 1), latent, score, value (`agg` of the values), share_of_max, surprise (bits), n_fires (tokens), row
        (null for a text), position and token where it is strongest, n_tokens (rows of the run on which it fires), density,
        max (on the run). Or per token: row, doc_id, position, token_id, token, rank, latent, score, value, share_of_max,
        surprise, density, max. What needs statistics is null where there are none.

    Raises:
        NotFoundError: no such dictionary, row or document, or rows that were not encoded.
        InvalidInputError: a bad option; a ranking that needs statistics which there are not yet; a text for a run without model.
        FormatError: stored codes are missing or damaged.
        MissingDependencyError: a text, and the packages that run models are not installed.

    Source: Shannon (1948), "A Mathematical Theory of Communication", section 6 (the information of an event of probability p
    is -log2 p); Spärck Jones (1972), "A statistical interpretation of term specificity", Journal of Documentation 28(1) (that
    weight in retrieval); Robertson and Spärck Jones (1976), "Relevance weighting of search terms", the 0.5 that keeps it finite.
    """
    start = time.perf_counter()
    k = check_k(k)
    check_choice(rank, Rank, what="rank")
    check_choice(agg, Agg, what="agg")
    memory_bytes = check_whole(memory_bytes, what="memory_bytes", least=1, most=MAX_BYTES)
    if agg == "count" and rank == "share_of_max" and not per_token:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            "a number of tokens is no share of a largest value: use agg='max', 'mean' or 'sum', or rank='surprise'",
        )
    options = LatentOptions(where, check_density(density), mask_dead, mask_ultra_dense)
    known_dictionary = run.store.dictionary(dictionary)
    codes = _codes_of(run, dictionary, what, rank, options)
    tokens = read_subject(run, what, known_dictionary, codes, special=mask_special, sinks=mask_sinks)
    known = _know(codes, known_dictionary.n_latents, options, memory_bytes)
    _check_rank(rank, known, codes, dictionary)
    weights = _Weights(known, rank, "max" if per_token else agg)
    table, n_eligible = (_per_token if per_token else _together)(tokens, weights, k)
    request = {"verb": "active", "run": run.id, "dictionary": dictionary, **tokens.echo, "k": k, "rank": rank}
    request |= {"agg": None if per_token else agg, "per_token": per_token, "score": weights.formula}
    meta = Meta(
        version=run.store.version,
        n_requested=k * len(tokens) if per_token else k,
        n_returned=table.num_rows,
        n_eligible=n_eligible,
        request={**request, **options.echo()},
        mask={
            "tokens": {"n_rows": tokens.removed.n_seen, "removed": dict(tokens.removed.counts)},
            "latents": known.report(),
        },
        budget={"memory_bytes": memory_bytes},
        warnings=_warnings(run, codes, tokens, known),
        elapsed_s=time.perf_counter() - start,
    )
    return Result(table, meta)


def surprise_bits(n_tokens: Int64s, n_rows: int) -> Float64s:
    """Return the information in a latent's firing, in bits: -log2 of the share of rows on which it fires.

    Args:
        n_tokens: Rows on which each latent fires.
        n_rows: All rows.

    >>> surprise_bits(np.array([0, 1, 511, 1023]), 1023).round(2).tolist()
    [11.0, 9.42, 1.0, 0.0]
    """
    bits: Float64s = -np.log2((n_tokens + 0.5) / (n_rows + 1))
    return np.maximum(bits, 0.0)


class _Weights:
    """What one unit of each latent's value is worth."""

    def __init__(self, known: KnownLatents, rank: Rank, agg: Agg) -> None:
        self.known = known
        self.agg = agg
        self.rank = rank
        self.bits = surprise_bits(known.n_tokens, known.n_rows)
        self.formula = _FORMULAS[rank]
        if agg == "count":
            self.formula = self.formula.replace(
                "agg(value) / the latent's largest value on the run", "n_fires"
            )
            self.formula = self.formula.replace("agg(value)", "n_fires")

    def share(self, latents: Int64s, values: Float64s, largest_here: Float64s) -> Float64s:
        """Return values as shares of the latents' largest; of one that never fired on the run, of its largest here."""
        assert self.known.largest is not None
        largest = self.known.largest[latents]
        return values / np.where(largest > 0, largest, np.maximum(largest_here, 1e-300))

    def score(self, latents: Int64s, values: Float64s, shares: Float64s | None) -> Float64s:
        """Return what latents are ranked by."""
        if self.rank == "activation":
            return values
        if self.rank == "surprise" and self.agg == "count":
            return values * self.bits[latents]
        assert shares is not None
        return shares if self.rank == "share_of_max" else shares * self.bits[latents]


def _codes_of(run: Run, dictionary: str, what: Any, rank: Rank, options: LatentOptions) -> Codes | None:
    """Return the run's codes; None for a text and a dictionary that the run was not encoded with."""
    try:
        return run.codes(dictionary)
    except NotFoundError:
        if not isinstance(what, str) or rank != "activation" or options.where is not None:
            raise
        return None


def _know(codes: Codes | None, n_latents: int, options: LatentOptions, memory_bytes: int) -> KnownLatents:
    if codes is not None:
        return know_latents(codes, options, memory_bytes=memory_bytes)
    # Nothing is known of latents on a run that was not encoded: none is dead or dense.
    nothing = np.zeros(n_latents, np.int64)
    return KnownLatents(np.ones(n_latents, np.bool_), nothing, None, 0)


def _check_rank(rank: Rank, known: KnownLatents, codes: Codes | None, dictionary: str) -> None:
    if rank != "activation" and known.largest is None:
        name = codes.id if codes is not None else dictionary
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"rank={rank!r} needs the latents' largest values, and codes {name!r} have no complete postings with statistics: "
            "finish actstore sae encode, or use rank='activation'",
        )


def _warnings(run: Run, codes: Codes | None, tokens: CodedTokens, known: KnownLatents) -> tuple[str, ...]:
    if codes is None:
        return (
            f"run {run.id!r} is not encoded: densities are unknown, and no latent was left out for its own",
        )
    found = list(run_warnings(run, codes))
    if known.largest is None:
        found.append(f"codes {codes.id!r} have no postings yet: the latents' largest values are unknown")
    if not len(tokens):
        found.append("masks left no token: mask_special=False and mask_sinks=False keep all")
    return tuple(found)


class _Totals:
    """What each latent does on the tokens asked about."""

    def __init__(self, n_latents: int) -> None:
        self.best = np.zeros(n_latents)
        self.where = np.full(n_latents, -1, np.int64)
        """Index of the token with the largest value, the first of equal ones."""
        self.sum = np.zeros(n_latents)
        self.count = np.zeros(n_latents, np.int64)

    def add(self, first: int, latents: Int64s, values: Float64s, tokens: Int64s) -> None:
        """Take the codes of a batch of tokens, in token order; `tokens` are indices into the batch."""
        n = len(self.best)
        before = self.best[latents]
        np.maximum.at(self.best, latents, values)
        new = np.flatnonzero((values == self.best[latents]) & (values > before))[::-1]
        # Of several writes to one place the last stays: that of the first token.
        self.where[latents[new]] = first + tokens[new]
        self.sum += np.bincount(latents, weights=values, minlength=n)
        self.count += np.bincount(latents, minlength=n)


def _together(tokens: CodedTokens, weights: _Weights, k: int) -> tuple[pa.Table, int]:
    """Return one list of latents for all tokens, and how many there are to choose from."""
    known = weights.known
    totals = _Totals(len(known.keep))
    for first, codes in tokens.batches():
        totals.add(
            first, codes.latents.astype(np.int64), codes.values.astype(np.float64), codes.row_numbers()
        )
    here = np.flatnonzero(known.keep & (totals.count > 0))
    values: Float64s = {
        "max": totals.best,
        "mean": totals.sum / max(1, len(tokens)),
        "sum": totals.sum,
        "count": totals.count.astype(np.float64),
    }[weights.agg][here]
    shares = None
    if known.largest is not None and weights.agg != "count":
        shares = weights.share(here, values, totals.best[here])
    scores = weights.score(here, values, shares)
    order = np.lexsort((here, -scores))[:k]
    at = totals.where[here[order]]
    table = _latent_columns(weights, here, values, shares, scores, order)
    columns = {
        "rank": pa.array(np.arange(1, len(order) + 1), pa.int32()),
        **{name: table[name] for name in ("latent", "score", "value", "share_of_max", "surprise")},
        "n_fires": pa.array(totals.count[here[order]], pa.int64()),
        "row": pa.nulls(len(order), pa.int64()) if tokens.rows is None else pa.array(tokens.rows[at]),
        "position": pa.array(tokens.position[at], pa.int32()),
        "token": tokens.tokens.take(pa.array(at)),
        "n_tokens": pa.array(known.n_tokens[here[order]], pa.int64()),
        **{name: table[name] for name in ("density", "max")},
    }
    return pa.table(columns), len(here)


def _per_token(tokens: CodedTokens, weights: _Weights, k: int) -> tuple[pa.Table, int]:
    """Return the best latents of every token, in token order, and how many codes there were to choose from."""
    known = weights.known
    parts: list[pa.Table] = []
    n_eligible = n_lines = 0
    for first, codes in tokens.batches():
        latents, owners = codes.latents.astype(np.int64), codes.row_numbers()
        kept = known.keep[latents]
        latents, owners = latents[kept], owners[kept]
        values = codes.values[kept].astype(np.float64)
        n_eligible += len(latents)
        shares = None if known.largest is None else weights.share(latents, values, values)
        scores = weights.score(latents, values, shares)
        order = np.lexsort((latents, -scores, owners))
        starts = np.searchsorted(owners[order], np.arange(codes.n_rows))
        ranks = np.arange(len(order)) - starts[owners[order]]
        order, ranks = order[ranks < k], ranks[ranks < k]
        n_lines += len(order)
        if n_lines > _MAX_ANSWERS:
            raise InvalidInputError(
                ErrorKind.TOO_LARGE,
                f"the table would have more than {_MAX_ANSWERS} lines: ask for fewer tokens or a smaller k",
            )
        table = _latent_columns(weights, latents, values, shares, scores, order)
        parts.append(_token_columns(tokens, first + owners[order], ranks + 1, table))
    if not parts:
        nothing: Any = np.empty(0, np.int64)
        empty = _latent_columns(weights, nothing, np.empty(0), None, np.empty(0), nothing)
        parts = [_token_columns(tokens, nothing, nothing, empty)]
    return pa.concat_tables(parts), n_eligible


def _token_columns(
    tokens: CodedTokens, at: Int64s, ranks: npt.NDArray[np.integer[Any]], latents: pa.Table
) -> pa.Table:
    def of_rows(values: Int64s | None) -> pa.Array:
        return pa.nulls(len(at), pa.int64()) if values is None else pa.array(values[at], pa.int64())

    columns = {
        "row": of_rows(tokens.rows),
        "doc_id": of_rows(tokens.doc_id),
        "position": pa.array(tokens.position[at], pa.int32()),
        "token_id": pa.array(tokens.token_id[at], pa.int32()),
        "token": tokens.tokens.take(pa.array(at, pa.int64())),
        "rank": pa.array(ranks, pa.int32()),
    }
    return pa.table(columns | {name: latents[name] for name in latents.column_names})


def _latent_columns(
    weights: _Weights,
    latents: Int64s,
    values: Float64s,
    shares: Float64s | None,
    scores: Float64s,
    order: Int64s,
) -> pa.Table:
    """Return what is said about latents, in an order: latent, score, value, share_of_max, surprise, density, max."""
    known, chosen = weights.known, latents[order]
    nulls = pa.nulls(len(order), pa.float64())
    never = known.n_tokens[chosen] == 0
    return pa.table(
        {
            "latent": pa.array(chosen, pa.int32()),
            "score": pa.array(scores[order], pa.float64()),
            "value": pa.array(values[order], pa.float64()),
            "share_of_max": nulls if shares is None else pa.array(shares[order], pa.float64()),
            "surprise": nulls if not known.n_rows else pa.array(weights.bits[chosen], pa.float64()),
            "density": nulls if not known.n_rows else pa.array(known.density[chosen], pa.float64()),
            "max": nulls if known.largest is None else pa.array(known.largest[chosen], mask=never),
        }
    )
