"""What are the statistics of a range of latents, given everything they fire on? (FORMAT.md, section 8.5)

All of them are exact and computed for many latents at once: postings are taken in blocks of whole latents, sorted once by
(latent, value) and once by (latent, token, value), as integers into which all of that is packed, so that every statistic is a
reduction over runs of the sorted keys. Memory beside the postings is that of one block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.latent_stats import (
    HIST_SHIFT,
    LATENT_STATS_SCHEMA,
    MIN_TOKEN_COUNT,
    QUANTILES,
    TOP_TOKENS,
    ULTRA_DENSE,
    histogram_bins,
)

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]
Float64s = npt.NDArray[np.float64]
Bits = npt.NDArray[np.unsignedinteger[Any]]

BLOCK_POSTINGS: Final = 1 << 19
"""Postings of a block, unless one latent has more: large enough that numpy's calls cost nothing, small enough for the caches. A
block takes at most 130 bytes for each while it is worked on, if every token is another; a latent with millions takes 28."""

_LOW32: Final = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, slots=True, eq=False)
class RangePostings:
    """Everything that the latents `[first_latent, first_latent + n)` fire on, latent after latent."""

    first_latent: int
    indptr: Int64s
    """Shape (n + 1,): the postings of latent `first_latent + i` are `[indptr[i], indptr[i + 1])`."""
    rows: Int64s
    """Ascending within a latent."""
    values: npt.NDArray[Any]
    """Positive and finite float16 or float32."""
    token_ids: npt.NDArray[np.int32]
    """Of each row, not negative."""
    n_docs: Int64s
    """Shape (n,): documents in which the latent fires."""

    @property
    def n_latents(self) -> int:
        """Latents of the range."""
        return len(self.indptr) - 1


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """The postings of some latents, each of which has some."""

    lengths: Int64s
    rows: Int64s
    bits: Bits
    """The values' bits, which are ordered as the values are, for these are positive."""
    tokens: npt.NDArray[np.uint32]
    token_bits: int

    @property
    def value_bits(self) -> int:
        return self.bits.dtype.itemsize * 8

    @property
    def starts(self) -> Int64s:
        return np.cumsum(self.lengths) - self.lengths


@dataclass(frozen=True, slots=True, eq=False)
class TokenRuns:
    """Some postings by latent and token: one entry for each pair that occurs, in that order."""

    owners: Int64s
    tokens: npt.NDArray[np.int32]
    counts: Int64s
    means: Float64s
    strong: Int64s
    """Those of its postings whose value is at least the latent's upper median."""


def latent_statistics(
    postings: RangePostings,
    *,
    n_rows: int,
    n_documents: int,
    decoder_norms: npt.NDArray[np.floating[Any]],
    block_postings: int = BLOCK_POSTINGS,
) -> pa.Table:
    """Return one table row per latent: `LATENT_STATS_SCHEMA` without `promoted` and `suppressed`.

    Args:
        postings: Of the latents.
        n_rows: Rows of the run that were encoded.
        n_documents: Documents that have such rows.
        decoder_norms: L2 norm of each latent's row of the decoder, shape (n,).
        block_postings: Postings worked on at once; the answer does not depend on it.
    """
    token_bits = max(1, int(postings.token_ids.max(initial=0)).bit_length())
    most = 1 << min(20, 64 - token_bits - postings.values.itemsize * 8)
    tables = [statistics_schema().empty_table()]
    for start, stop in _plan_blocks(postings.indptr, block_postings, most):
        tables.append(
            statistics_table(
                _block_columns(postings, start, stop, token_bits),
                first_latent=postings.first_latent + start,
                n_tokens=np.diff(postings.indptr[start : stop + 1]),
                n_docs=postings.n_docs[start:stop],
                n_rows=n_rows,
                n_documents=n_documents,
                decoder_norms=decoder_norms[start:stop],
            )
        )
    return pa.concat_tables(tables)


def statistics_schema() -> pa.Schema:
    """Return `LATENT_STATS_SCHEMA` without `promoted` and `suppressed`."""
    return pa.schema([field for field in LATENT_STATS_SCHEMA if field.name not in ("promoted", "suppressed")])


def statistics_table(
    columns: dict[str, Any],
    *,
    first_latent: int,
    n_tokens: Int64s,
    n_docs: Int64s,
    n_rows: int,
    n_documents: int,
    decoder_norms: npt.NDArray[np.floating[Any]],
) -> pa.Table:
    """Return the statistics of latents that follow each other: columns made of their postings, and those made of counts."""
    density = n_tokens / max(1, n_rows)
    columns = columns | {
        "latent": np.arange(first_latent, first_latent + len(n_tokens), dtype=np.int32),
        "n_tokens": n_tokens,
        "n_docs": n_docs,
        "density": density,
        "doc_density": n_docs / max(1, n_documents),
        "decoder_norm": decoder_norms.astype(np.float64),
        "is_dead": n_tokens == 0,
        "is_ultra_dense": density > ULTRA_DENSE,
    }
    schema = statistics_schema()
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _plan_blocks(indptr: Int64s, most_postings: int, most_latents: int) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges of latents that cover all of them, none with more than asked but for a latent alone."""
    start, n = 0, len(indptr) - 1
    while start < n:
        stop = int(np.searchsorted(indptr, indptr[start] + most_postings, side="right")) - 1
        stop = min(max(stop, start + 1), start + most_latents, n)
        yield start, stop
        start = stop


def _block_columns(postings: RangePostings, start: int, stop: int, token_bits: int) -> dict[str, Any]:
    """Return the columns that are made of the postings of latents `[start, stop)` of the range."""
    lengths = np.diff(postings.indptr[start : stop + 1])
    alive = np.flatnonzero(lengths)
    at = slice(int(postings.indptr[start]), int(postings.indptr[stop]))
    values = postings.values[at]
    block = _Block(
        lengths=lengths[alive],
        rows=postings.rows[at],
        bits=values.view(np.uint16 if values.dtype == np.float16 else np.uint32),
        tokens=postings.token_ids[at].view(np.uint32),
        token_bits=token_bits,
    )
    n = stop - start
    if not len(alive):
        block = _Block(lengths[:0], block.rows, block.bits, block.tokens, token_bits)
    by_value = _sorted_bits(block)
    runs = _token_runs(block, by_value[block.starts + block.lengths // 2] if len(alive) else by_value)
    return {
        **_value_columns(block, by_value, alive, n),
        **token_columns(runs, alive, n),
    }


def _sorted_bits(block: _Block) -> Bits:
    """Return the bits of the values, ascending within each latent."""
    n = len(block.lengths)
    wide: Any = np.uint32 if max(n - 1, 0).bit_length() + block.value_bits <= 32 else np.uint64
    keys = np.repeat(np.arange(n, dtype=wide) << wide(block.value_bits), block.lengths)
    keys |= block.bits
    keys.sort()
    return keys.astype(block.bits.dtype)  # the bits of the latent are cut off


def _value_columns(block: _Block, by_value: Bits, alive: Int64s, n: int) -> dict[str, Any]:
    values = _to_float64(by_value)
    starts, lengths = block.starts, block.lengths
    total, largest = np.zeros(n), np.zeros(n)
    if len(alive):
        total[alive] = np.add.reduceat(values, starts)
        largest[alive] = values[starts + lengths - 1]
    dead = np.ones(n, bool)
    dead[alive] = False
    max_row = np.zeros(n, np.int64)
    max_row[alive] = _first_rows_of(block, by_value[starts + lengths - 1])
    mean = np.zeros(n)
    mean[alive] = total[alive] / lengths
    bins, counts, n_bins = _histograms(by_value, lengths)
    return {
        "mean": pa.array(mean, mask=dead),
        "max": pa.array(largest, mask=dead),
        "sum": total,
        "max_row": pa.array(max_row, mask=dead),
        "quantiles": _quantile_lists(values, starts, lengths, dead),
        "hist_bins": lists_of(pa.array(bins), n_bins, alive, n),
        "hist_counts": lists_of(pa.array(counts), n_bins, alive, n),
    }


def _first_rows_of(block: _Block, largest: Bits) -> Int64s:
    """Return the lowest row on which each latent takes its largest value."""
    owners = np.repeat(np.arange(len(largest), dtype=np.int32), block.lengths)
    at = np.flatnonzero(block.bits == largest[owners])
    _, first = np.unique(owners[at], return_index=True)
    return block.rows[at[first]]


def quantile_places(q: float, lengths: Int64s) -> tuple[Int64s, Int64s, Float64s]:
    """Return between which two of so many ascending values a quantile lies, and which part of the way from the first."""
    position = q * (lengths - 1)
    lower = np.floor(position).astype(np.int64)
    return lower, np.minimum(lower + 1, lengths - 1), position - lower


def _quantile_lists(
    values: Float64s, starts: Int64s, lengths: Int64s, dead: npt.NDArray[np.bool_]
) -> pa.Array:
    """Return the quantiles of each latent's firing values; null where there are none.

    The quantile q of n ascending values x is x[i] + f (x[i + 1] - x[i]), i and f being the whole and the broken part of
    q (n - 1): Hyndman and Fan (1996), type 7, which numpy calls `linear`.
    """
    columns = np.zeros((len(lengths), len(QUANTILES)))
    for column, q in enumerate(QUANTILES):
        lower, upper, part = quantile_places(q, lengths)
        low, high = values[starts + lower], values[starts + upper]
        columns[:, column] = low + part * (high - low)
    offsets = np.concatenate([[0], np.cumsum(~dead)]).astype(np.int32) * np.int32(len(QUANTILES))
    flat = pa.array(columns.astype(np.float32).ravel())
    field = LATENT_STATS_SCHEMA.field("quantiles")
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=field.type, mask=pa.array(dead))


def _histograms(by_value: Bits, lengths: Int64s) -> tuple[npt.NDArray[np.int32], Int64s, Int64s]:
    """Return bins and counts, latent after latent, bins ascending, and how many bins each latent has."""
    bins = (by_value >> HIST_SHIFT if by_value.dtype == np.uint16 else histogram_bins(by_value.view(np.float32)))  # fmt: skip
    owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    first = _run_starts((owners[1:] != owners[:-1]) | (bins[1:] != bins[:-1]), len(bins))
    counts = np.diff(first, append=len(bins))
    return bins[first].astype(np.int32), counts, np.bincount(owners[first], minlength=len(lengths))


def _token_runs(block: _Block, medians: Bits) -> TokenRuns:
    """Return the postings by latent and token; `medians` are the bits of each latent's upper median."""
    value_bits, token_bits = np.uint64(block.value_bits), np.uint64(block.token_bits)
    owners = np.arange(len(block.lengths), dtype=np.uint64) << (value_bits + token_bits)
    keys = np.repeat(owners, block.lengths)
    keys |= block.tokens.astype(np.uint64) << value_bits
    keys |= block.bits
    keys.sort()
    bits = keys.astype(block.bits.dtype)
    strong = bits >= np.repeat(medians, block.lengths)
    keys >>= value_bits
    first = _run_starts(keys[1:] != keys[:-1], len(keys))
    counts = np.diff(first, append=len(keys))
    pairs = keys[first]
    del keys
    totals = np.add.reduceat(_to_float64(bits), first) if len(first) else np.zeros(0)
    n_strong = np.add.reduceat(strong, first, dtype=np.int64) if len(first) else np.zeros(0, np.int64)
    return TokenRuns(
        owners=(pairs >> token_bits).astype(np.int64),
        tokens=(pairs & ((np.uint64(1) << token_bits) - np.uint64(1))).astype(np.int32),
        counts=counts,
        means=totals / np.maximum(counts, 1),
        strong=n_strong,
    )


def token_columns(runs: TokenRuns, alive: Int64s, n: int) -> dict[str, Any]:
    """Return the columns of n latents that are made of their tokens; owners of runs count those that fire, `alive`."""
    n_alive = len(alive)
    starts = np.searchsorted(runs.owners, np.arange(n_alive))
    score = np.zeros(n)
    commonest = np.zeros(0, np.int64)
    if n_alive:
        commonest = np.maximum.reduceat(runs.counts, starts)
        score[alive] = np.maximum.reduceat(runs.strong, starts) / np.add.reduceat(runs.strong, starts)
    dead = np.ones(n, bool)
    dead[alive] = False
    counts = np.minimum(runs.counts, _LOW32.astype(np.int64)).astype(np.uint64)
    means = runs.means.view(np.uint64)  # positive floats are ordered as their bits are
    high, low = means >> np.uint64(32), means & _LOW32
    by_count = _top(runs, np.arange(len(runs.owners)), (counts, high, low), n_alive)
    frequent = np.flatnonzero(runs.counts >= np.minimum(MIN_TOKEN_COUNT, commonest)[runs.owners])
    by_mean = _top(runs, frequent, (high, low, counts), n_alive)
    by_count = by_count[np.lexsort((runs.tokens[by_count], -runs.means[by_count], -runs.counts[by_count],
                                    runs.owners[by_count]))]  # fmt: skip
    by_mean = by_mean[np.lexsort((runs.tokens[by_mean], -runs.counts[by_mean], -runs.means[by_mean],
                                  runs.owners[by_mean]))]  # fmt: skip
    return {
        "top_tokens_by_count": _token_lists(runs, by_count, alive, n),
        "top_tokens_by_mean": _token_lists(runs, by_mean, alive, n),
        "single_token_score": pa.array(score, mask=dead),
    }


def _top(runs: TokenRuns, candidates: Int64s, levels: Sequence[Uint64s], n_owners: int) -> Int64s:
    """Return which of the candidates, ascending, are among the `TOP_TOKENS` first of their latent, in no order.

    Args:
        runs: By latent, then token.
        candidates: Ascending.
        levels: Keys below 2^32 that decide, the larger one first; later levels break ties, and after them the lower token.
        n_owners: Latents.
    """
    chosen = []
    needed = np.full(n_owners, TOP_TOKENS, np.int64)
    for level in levels:
        owners, keys = runs.owners[candidates], level[candidates]
        packed = owners.astype(np.uint64) << np.uint64(32)
        packed |= _LOW32 - keys
        packed.sort()
        ends = np.cumsum(np.bincount(owners, minlength=n_owners))
        begins = np.concatenate([[0], ends[:-1]]) if n_owners else ends
        # Of each latent the last one that still has a place; a latent without candidates looks at a neighbour's, in vain.
        last = np.clip(np.minimum(begins + needed, ends) - 1, 0, max(len(packed) - 1, 0))
        bar = _LOW32 - (packed[last] & _LOW32) if len(packed) else np.zeros(n_owners, np.uint64)
        del packed
        above, level_with = keys > bar[owners], keys == bar[owners]
        chosen.append(candidates[above])
        needed -= np.bincount(owners[above], minlength=n_owners)
        candidates = candidates[level_with]
    owners = runs.owners[candidates]
    places = np.arange(len(owners)) - np.searchsorted(owners, owners)
    chosen.append(candidates[places < needed[owners]])
    return np.concatenate(chosen)


def _token_lists(runs: TokenRuns, picked: Int64s, alive: Int64s, n: int) -> pa.Array:
    kind = LATENT_STATS_SCHEMA.field("top_tokens_by_count").type.value_type
    columns: list[npt.NDArray[Any]] = [runs.tokens, runs.counts, runs.means]
    arrays = [pa.array(column[picked], field.type) for column, field in zip(columns, kind, strict=True)]
    flat = pa.StructArray.from_arrays(arrays, fields=list(kind))
    return lists_of(flat, np.bincount(runs.owners[picked], minlength=len(alive)), alive, n)


def lists_of(flat: pa.Array, lengths: Int64s, alive: Int64s, n: int) -> pa.Array:
    """Return n lists: of the latents `alive` as long as `lengths` says, of the others empty."""
    all_lengths = np.zeros(n, np.int64)
    all_lengths[alive] = lengths
    offsets = np.concatenate([[0], np.cumsum(all_lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def _run_starts(changes: npt.NDArray[np.bool_], n: int) -> Int64s:
    """Return where runs of equal elements begin; `changes[i]` says that elements i and i + 1 of n differ."""
    if not n:
        return np.zeros(0, np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(changes) + 1])


_HALVES: Final = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float64)
"""Every float16 that is not negative, in float64: looking a value up is faster than converting it."""


def _to_float64(bits: Bits) -> Float64s:
    if bits.dtype == np.uint16:
        return _HALVES[bits]
    return bits.view(np.float32).astype(np.float64)
