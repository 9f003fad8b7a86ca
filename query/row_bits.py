"""Which stored rows may be an answer, as one bit for every vector of an index?

The masks are those of `actstore.query.eligible`, in the same order and with the same counts: first what the tokens tell, unit by
unit, then what the norms tell that the index keeps of every row. What the tokens of a shard say is kept apart, as it holds for
every hook point of the run. Both are kept in the process by everything that they depend on, so that a second question with the
same masks evaluates nothing; an eighth of a byte for each row.
"""

import hashlib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.checks import is_whole
from actstore.codec.cache import BytesCache
from actstore.errors import ErrorKind, FormatError
from actstore.run import Run
from actstore.sampling import parse_kept
from actstore.tokenization import Tokenization

from .answer import RowOptions
from .eligible import Eligibility, Masks, Removed
from .row_mask import sink_rule
from .unit_tables import read_units

Bits: TypeAlias = npt.NDArray[np.uint8]
Bools: TypeAlias = npt.NDArray[np.bool_]
Int64s: TypeAlias = npt.NDArray[np.int64]
Float64s: TypeAlias = npt.NDArray[np.float64]

CACHE_BYTES = 128 << 20
"""Bound on the bitmaps that the process keeps: those of one question about 500 million rows, or of many about fewer."""

_CACHE: BytesCache["ShardBits"] = BytesCache(CACHE_BYTES)

_CLOCK = re.compile(
    r"\b(now|today|get_current_\w+|current_\w+|transaction_timestamp|localtime\w*|age)\b", re.IGNORECASE
)
"""What in a condition may make its answer depend on when it is asked."""

_ENTRY_BYTES = 1024
"""Of the counts beside a bitmap."""


class RowShard(Protocol):
    """What is asked of an index's shard; `actstore.vector_index.IndexShard` is one."""

    @property
    def number(self) -> int:
        """Its number in the index."""

    @property
    def n(self) -> int:
        """Ordinals: stored rows of its units."""

    def unit_ranges(self) -> list[tuple[int, int, int]]:
        """Return (unit, first ordinal, end of its ordinals) of every unit, ascending and without gaps."""

    def norms(self) -> Float64s:
        """Return the L2 norm of every row by ordinal, shape (n,); not finite for a row that is not."""

    def ordinals_of(self, rows: Int64s) -> Int64s:
        """Return the ordinals of rows, -1 for those that are not in the shard."""

    def rows_of(self, ordinals: Int64s) -> Int64s:
        """Return the row numbers of ordinals."""


@dataclass(frozen=True, slots=True)
class ShardBits:
    """The rows of one shard that may be answers."""

    bits: Bits
    """Bit i (bit i % 8 of byte i // 8, the lowest first) is 1 if ordinal i may be one; shape (ceil(n / 8),), read-only."""

    removed: Removed
    """What kept the others out; shared, never changed."""


@dataclass(frozen=True, slots=True)
class RowBits:
    """The rows of some shards that may be answers, and what kept out the others."""

    bits: Mapping[int, Bits]
    """By number of the shard, as `ShardBits.bits`; shards without an eligible row are left out."""

    removed: Removed
    """Counts of all shards together."""

    @property
    def n_eligible(self) -> int:
        """Rows that may be answers."""
        return self.removed.n_kept

    def without(self, shards: Sequence[RowShard], rows: Int64s) -> Mapping[int, Bits]:
        """Return the bitmaps with some more rows taken out; those of other shards are the same arrays."""
        found = dict(self.bits)
        for shard in shards:
            ordinals = shard.ordinals_of(rows)
            ordinals = ordinals[ordinals >= 0]
            if ordinals.size and shard.number in found:
                cleared = found[shard.number].copy()
                np.bitwise_and.at(cleared, ordinals >> 3, ~(np.uint8(1) << (ordinals & 7).astype(np.uint8)))
                found[shard.number] = cleared
        return found


def set_bits(bits: Bits) -> Int64s:
    """Return the numbers of the bits that are 1, ascending.

    >>> set_bits(np.array([5, 0, 128], np.uint8)).tolist()
    [0, 2, 23]
    """
    filled = np.flatnonzero(bits)  # mostly few: only their bits are looked at one by one
    inside = np.unpackbits(bits[filled][:, None], axis=1, bitorder="little")
    byte, bit = np.nonzero(inside)
    ordinals: Int64s = filled[byte] * 8 + bit
    return ordinals


def bits_to_rows(bits: Bits, shard: RowShard) -> Int64s:
    """Return the numbers of the rows of a shard that may be answers, ascending; 8 bytes each."""
    return shard.rows_of(set_bits(bits))


def read_row_bits(
    run: Run, hook_point: str, options: RowOptions, shards: Sequence[RowShard], *, drop_zero_rows: bool
) -> RowBits:
    """Return which rows of some shards may be answers.

    Args:
        run: The run whose rows they are.
        hook_point: Canonical name, of which the norms are.
        options: The masks, and a bound on memory for `where`.
        shards: Of one index, each of whole units.
        drop_zero_rows: Leave out rows of zeros, which have no direction.

    Raises:
        InvalidInputError: a condition, pattern or selection that is none.
        NotFoundError: a row or document that does not exist.
        FormatError: a token table is missing or damaged, or a shard is not of the run's rows.
    """
    limit = sink_rule(run, hook_point).limit if options.mask_sinks else math.inf
    rules = f"{hook_point} {limit!r} {drop_zero_rows}"
    bits: dict[int, Bits] = {}
    total = Removed()
    with _TokenBits(run, options) as tokens:
        for shard in shards:
            key = tokens.key(shard)

            def load(shard: RowShard = shard, key: str = key) -> tuple[ShardBits, int]:
                told = tokens.read(shard, key)
                return _measured(_apply_norms(told, shard, limit=limit, drop_zero_rows=drop_zero_rows))

            found = _CACHE.get(_digest([key, tokens.rows_key(shard), rules]), load)
            add_counts(total, found.removed)
            if found.removed.n_kept:
                bits[shard.number] = found.bits
    return RowBits(bits, total)


def document_rows(tokenization: Tokenization, doc_id: int) -> Int64s:
    """Return the rows of a document, ascending; also those that a sampled run does not store."""
    units = [u.unit for u in tokenization.units if u.meta["first_doc"] <= doc_id <= u.meta["last_doc"]]
    found = [
        t.first_row + np.flatnonzero(t.doc_id == doc_id) for t in read_units(tokenization, units).values()
    ]
    return np.sort(np.concatenate([np.empty(0, np.int64), *found]))


def add_counts(total: Removed, part: Removed) -> None:
    """Add what was counted of some rows to what was counted of others."""
    for name, count in part.counts.items():
        total.counts[name] = total.counts.get(name, 0) + count
    total.n_seen += part.n_seen
    total.n_kept += part.n_kept


class _TokenBits:
    """What tokens tell of the rows of a run, in one question. Close it after use."""

    def __init__(self, run: Run, options: RowOptions) -> None:
        self._run = run
        self._options = options
        self._tokenization = run.tokenization
        self._kept = parse_kept(run.collection.config)
        self._stack = ExitStack()
        self._eligibility: Eligibility | None = None
        corpus = self._tokenization.corpus.collection
        masks = options.masks
        self._question = [
            str(time.time_ns()) if masks.where is not None and _CLOCK.search(masks.where) else "",
            self._tokenization.collection.fingerprint,
            corpus.fingerprint,
            repr(run.collection.config.get("sample")),
            *_spell_masks(masks),
        ]

    def __enter__(self) -> "_TokenBits":
        return self

    def __exit__(self, *caught: object) -> None:
        self._stack.close()

    def key(self, shard: RowShard) -> str:
        """Return what the answer for a shard depends on."""
        units = self._tokenization.collection.units
        ranges = (
            f"{unit}:{stop - first}:{units[unit].objects[0].sha256 if unit in units else None}"
            for unit, first, stop in shard.unit_ranges()
        )
        return _digest([*self._question, *ranges])

    def rows_key(self, shard: RowShard) -> str:
        """Return what tells the stored rows of a shard from any others: the attempts that wrote its units."""
        units = self._run.collection.units
        attempts = (units[u].attempt for u, _, _ in shard.unit_ranges() if u in units)
        return " ".join([self._run.collection.fingerprint, *attempts])

    def read(self, shard: RowShard, key: str) -> ShardBits:
        """Return which rows of a shard pass the masks that need no activations."""
        return _CACHE.get(key, lambda: _measured(self._evaluate(shard)))

    def _evaluate(self, shard: RowShard) -> ShardBits:
        if self._eligibility is None:
            memory = max(64 << 20, self._options.memory_bytes // 4)
            opened = Eligibility(self._run, self._options.masks, memory_bytes=memory, only_masks=True)
            self._eligibility = self._stack.enter_context(opened)
        eligibility = self._eligibility
        eligibility.removed = Removed()
        keep = np.zeros(shard.n, np.bool_)
        for unit, first, stop in shard.unit_ranges():
            self._check_unit(unit, stop - first)
            rows = eligibility.rows_of(unit)
            if rows is not None:
                keep[first:stop] = rows.keep if self._kept is None else self._stored(unit, rows.keep)
        eligibility.removed.n_kept = int(keep.sum())
        return ShardBits(_pack(keep), eligibility.removed)

    def _stored(self, unit: int, keep_t: Bools) -> Bools:
        """Return the entries of the tokens of which a sampled run stores the rows."""
        assert self._kept is not None
        offsets = self._kept.offsets(unit, self._kept.rows_per_unit)
        return keep_t[offsets[: np.searchsorted(offsets, len(keep_t))]]

    def _check_unit(self, unit: int, n_rows: int) -> None:
        stored = self._run.collection.units.get(unit)
        if stored is None or stored.rows != n_rows:
            found = "no such unit" if stored is None else f"{stored.rows} rows"
            raise FormatError(
                ErrorKind.INVARIANT_BROKEN,
                f"an index of run {self._run.id!r} has {n_rows} rows of unit {unit}, and the run has {found}: build it again "
                "(actstore index build --rebuild)",
            )


def _apply_norms(told: ShardBits, shard: RowShard, *, limit: float, drop_zero_rows: bool) -> ShardBits:
    """Return the rows that also pass the masks which need activations, by their norms."""
    norms = shard.norms()
    keep = np.unpackbits(told.bits, count=shard.n, bitorder="little").view(np.bool_)
    removed = Removed(dict(told.removed.counts), told.removed.n_seen)
    keep = removed.apply("nonfinite", keep, np.isfinite(norms))
    if limit < math.inf:
        keep = removed.apply("norm", keep, norms <= limit)
    if drop_zero_rows:
        keep = removed.apply("zero_norm", keep, norms > 0)
    removed.n_kept = int(keep.sum())
    return ShardBits(_pack(keep), removed)


def _pack(keep: Bools) -> Bits:
    bits = np.packbits(keep, bitorder="little")
    bits.setflags(write=False)
    return bits


def _measured(found: ShardBits) -> tuple[ShardBits, int]:
    return found, found.bits.nbytes + _ENTRY_BYTES


def _spell_masks(masks: Masks) -> Iterator[str]:
    """Yield every field of the masks as text that is the same for the same masks only."""
    for field in fields(masks):
        value: Any = getattr(masks, field.name)
        if not (value is None or isinstance(value, str | bool | slice | range) or is_whole(value)):
            value = _spell_numbers(value)
        yield f"{field.name}={value!r}"


def _spell_numbers(values: Any) -> str:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal length, which whoever reads the selection refuses
        return repr(values)
    return f"{array.dtype}{array.shape}{hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()}"


def _digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
