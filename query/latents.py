"""Which latents does a dictionary have, and what does each do on a run? Search by statistics, top tokens and vocabulary."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore.checks import MAX_BYTES, check_whole
from actstore.codes import Codes
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.result import Meta, Result
from actstore.run import Run

from .answer import DEFAULT_MEMORY_BYTES
from .latent_filter import Bools, Int64s, LatentOptions, check_density, know_latents, order_latents
from .token_pattern import check_pattern
from .unit_tables import Words, read_words

_BLOCK = 16_384
"""Latents whose lists of tokens are held at a time."""

_NUMBERS = (
    "latent", "n_tokens", "n_docs", "density", "doc_density", "mean", "max", "max_row", "single_token_score", "decoder_norm",
    "is_dead", "is_ultra_dense",
)  # fmt: skip
_TOKENS = ("top_tokens_by_mean", "top_tokens_by_count")
_VOCABULARY = ("promoted", "suppressed")


def latents(
    run: Run,
    dictionary: str,
    k: int | None = 20,
    *,
    where: str | None = None,
    order_by: str | None = "density DESC",
    latents: Sequence[int] | None = None,
    top_token: str | None = None,
    top_token_regex: str | None = None,
    promotes: str | None = None,
    promotes_regex: str | None = None,
    density: tuple[float | None, float | None] | None = None,
    mask_dead: bool | None = None,
    mask_ultra_dense: bool = False,
    columns: Sequence[str] | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Result:
    """Return latents of a dictionary with their statistics on this run.

    Reads the statistics' columns that are needed; every number is exact, over all stored rows. Memory: the columns mentioned,
    and the lists of 16,384 latents at a time.

    Args:
        run: The run to ask.
        dictionary: Name of the dictionary; the run was encoded with it and has postings.
        k: Latents returned, at most; None for all.
        where: SQL condition over the statistics (the columns of the view `latents`), such as
            "density > 0.001 AND max > 3 * mean".
        order_by: What SQL's ORDER BY takes; latents that are equal in it are in the order of their numbers, as all are with
            None.
        latents: Only these.
        top_token: Only latents among whose top tokens (by mean or by count) one reads so, spaces around it aside.
        top_token_regex: Only latents among whose top tokens one holds a match of this regular expression (RE2).
        promotes: Only latents that promote a token which reads so, spaces around it aside.
        promotes_regex: Only latents that promote a token which holds a match.
        density: Least and largest share of rows on which a latent fires, both included, None for no bound.
        mask_dead: Leave out latents that never fire; None: yes, unless `where` speaks of `is_dead` or `latents` were given.
        mask_ultra_dense: Leave out latents that fire on more than 10 % of the rows.
        columns: Columns of the statistics to return as they are stored; None for the usual ones, tokens as text.
        memory_bytes: Memory of the query over the statistics.

    Returns:
        Columns: rank (from 1), latent, n_tokens, n_docs, density, doc_density, mean, max, max_row, single_token_score,
        decoder_norm, is_dead, is_ultra_dense, and as lists of text top_tokens_by_mean, top_tokens_by_count, promoted and
        suppressed (null without a model). Or rank, latent and `columns`.

    Raises:
        NotFoundError: no such dictionary, codes of it, statistics, or latent.
        InvalidInputError: `where` or `order_by` are not SQL over the statistics; a pattern that is none; a bad option.
        FormatError: stored statistics are missing or damaged.
    """
    start = time.perf_counter()
    k = None if k is None else check_whole(k, what="k", least=1)
    memory_bytes = check_whole(memory_bytes, what="memory_bytes", least=1, most=MAX_BYTES)
    codes = run.codes(dictionary)
    if mask_dead is None:
        mask_dead = latents is None and "is_dead" not in str(where).lower()
    options = LatentOptions(None, check_density(density), mask_dead, mask_ultra_dense)
    texts = _TextSearch(run, top_token, top_token_regex, promotes, promotes_regex)
    order = order_latents(codes, where, order_by, memory_bytes=memory_bytes)
    known = know_latents(codes, options, memory_bytes=memory_bytes)
    if latents is not None:
        known.apply("latents", _chosen(latents, codes.n_latents))
    if where is not None:
        known.apply("where", _chosen(order, codes.n_latents))
    for name, passing in texts.search(codes, known.keep):
        known.apply(name, passing)
    found = order[known.keep[order]]
    shown = found if k is None else found[:k]
    table = _table(run, codes, shown, columns)
    request: dict[str, Any] = {"verb": "latents", "run": run.id, "dictionary": dictionary, "k": k}
    request |= {"where": where, "order_by": order_by, **texts.echo(), **options.echo()}
    if latents is not None:
        request["latents"] = np.unique(np.asarray(latents, np.int64)).tolist()
    request["columns"] = None if columns is None else list(columns)
    request.pop("where_latents")
    meta = Meta(
        version=run.store.version,
        n_requested=k,
        n_returned=len(shown),
        n_eligible=len(found),
        request=request,
        mask=known.report(),
        budget={"memory_bytes": memory_bytes},
        warnings=run_warnings(run, codes),
        elapsed_s=time.perf_counter() - start,
    )
    return Result(table, meta)


def run_warnings(run: Run, codes: Codes) -> tuple[str, ...]:
    """Return what a careful reader of an answer over codes should know."""
    if codes.is_complete:
        return ()
    return (
        f"codes {codes.id!r} are not complete: {len(codes.collection.units)} of {len(run.tokenization.units)} units were asked",
    )


class _TextSearch:
    """What is asked about the tokens of latents."""

    def __init__(
        self,
        run: Run,
        top_token: str | None,
        top_token_regex: str | None,
        promotes: str | None,
        promotes_regex: str | None,
    ) -> None:
        """Check the patterns; reads the vocabulary if one is about top tokens."""
        self._asked = {
            "top_token": top_token,
            "top_token_regex": top_token_regex,
            "promotes": promotes,
            "promotes_regex": promotes_regex,
        }
        self._tests: dict[str, Callable[[pa.Array], pa.Array]] = {}
        for name, pattern in self._asked.items():
            if pattern is not None:
                self._tests[name] = _token_test(name, pattern)
        self._words: Words | None = None
        if "top_token" in self._tests or "top_token_regex" in self._tests:
            self._words = read_words(run.tokenization)

    def echo(self) -> dict[str, Any]:
        """Return what was asked, as it is reported."""
        return {name: pattern for name, pattern in self._asked.items() if pattern is not None}

    def search(self, codes: Codes, keep: Bools) -> list[tuple[str, Bools]]:
        """Return each question's name and the latents that pass; only those in `keep` are looked at."""
        passing = [(name, np.zeros(len(keep), np.bool_)) for name in self._tests]
        alive = np.flatnonzero(keep) if passing else np.empty(0, np.int64)
        for first in range(0, len(alive), _BLOCK):
            block = alive[first : first + _BLOCK]
            for name, found in passing:
                columns = list(_TOKENS) if name.startswith("top") else ["promoted"]
                stats = codes.stats(block.tolist(), columns)
                for column in columns:
                    found[block] |= self._any(stats[column].combine_chunks(), self._tests[name])
        return passing

    def _any(self, lists: Any, test: Callable[[pa.Array], pa.Array]) -> Bools:
        """Return which lists hold a token that passes, shape (len(lists),)."""
        lists = pa.concat_arrays(lists.chunks) if isinstance(lists, pa.ChunkedArray) else lists
        entries, owners = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
        if "token" in [field.name for field in entries.type]:
            texts = pc.struct_field(entries, "token")
        else:
            assert self._words is not None
            texts = self._words.read(pc.struct_field(entries, "token_id").to_numpy())
        found: Bools = np.zeros(len(lists), np.bool_)
        found[owners[test(texts).fill_null(False).to_numpy(zero_copy_only=False)]] = True
        return found


def _token_test(name: str, pattern: object) -> Callable[[pa.Array], pa.Array]:
    if name.endswith("regex"):
        regex = check_pattern(pattern, name)
        return lambda texts: pc.match_substring_regex(texts, regex)
    try:
        wanted = pa.scalar(pattern.strip(), pa.string()) if isinstance(pattern, str) else None
    except UnicodeEncodeError:  # a lone surrogate, as of bytes on a command line that are no UTF-8
        wanted = None
    if wanted is None:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"{name}= is a token's text, such as 'cat', got {pattern!r:.80}"
        )
    return lambda texts: pc.equal(pc.utf8_trim_whitespace(texts), wanted)


def _chosen(latents: Sequence[int] | Int64s, n_latents: int) -> Bools:
    """Return a mask of some latents, shape (n_latents,).

    Raises:
        InvalidInputError: not whole numbers.
        NotFoundError: one that the dictionary does not have.
    """
    try:
        numbers = np.asarray(latents)
    except ValueError:  # lists of different lengths
        numbers = np.empty((0, 0))
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"latents= is a list of whole numbers, got {latents!r:.80}"
        )
    bad = numbers[(numbers < 0) | (numbers >= n_latents)] if numbers.size else numbers
    if bad.size:
        raise NotFoundError(
            ErrorKind.ROW_NOT_FOUND,
            f"latent {int(bad[0])} was asked for, the dictionary has latents [0, {n_latents})",
        )
    chosen = np.zeros(n_latents, np.bool_)
    chosen[numbers.astype(np.int64)] = True
    return chosen


def _table(run: Run, codes: Codes, shown: Int64s, columns: Sequence[str] | None) -> pa.Table:
    ranks = pa.array(np.arange(1, len(shown) + 1), pa.int32())
    if columns is not None:
        names = ["latent", *columns] if "latent" not in columns else list(columns)
        return codes.stats(shown.tolist(), names).add_column(0, "rank", ranks)
    blocks = [
        _named(run, codes.stats(shown[first : first + _BLOCK].tolist(), [*_NUMBERS, *_TOKENS, *_VOCABULARY]))
        for first in range(0, max(1, len(shown)), _BLOCK)
    ]
    return pa.concat_tables(blocks).add_column(0, "rank", ranks)


def _named(run: Run, stats: pa.Table) -> pa.Table:
    """Return statistics with lists of text in place of lists of tokens."""
    words = read_words(run.tokenization)
    for name in (*_TOKENS, *_VOCABULARY):
        lists = stats[name].combine_chunks()
        lists = pa.concat_arrays(lists.chunks) if isinstance(lists, pa.ChunkedArray) else lists
        entries = pc.list_flatten(lists)
        if name in _VOCABULARY:
            texts = pc.struct_field(entries, "token")
        else:
            texts = words.read(pc.struct_field(entries, "token_id").to_numpy())
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        offsets: npt.NDArray[np.int32] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        nulls = lists.is_null() if lists.null_count else None
        named = pa.ListArray.from_arrays(pa.array(offsets), texts.cast(pa.string()), mask=nulls)
        stats = stats.set_column(stats.schema.get_field_index(name), name, named)
    return stats
