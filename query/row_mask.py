"""Which of some rows, given by number, may be answers? The masks of `actstore.query.eligible`, for rows found by an index.

A scan asks every row of a unit; whoever has a list of rows from postings asks only about those, in any units. The masks are the
same ones in the same order, and a row is counted at the first that removes it: rows, documents, `where`, the pattern on the
token's text, special tokens, the first token of a window, the norm.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.arrow_arrays import from_numbers
from actstore.run import Run
from actstore.stats import NORM_GAMMA, HookPointStats, is_stats_key
from actstore.stats.sinks import N_TOP_ROWS

from .eligible import Masks, Removed, check_selection, norm_limit
from .fold import CONTEXT_TOKENS, Fold, fold_keys
from .token_groups import Pieces, read_around, read_columns, rows_by_unit
from .token_pattern import match_tokens, read_matches
from .unit_tables import CACHE, read_units, unit_entry
from .where import Predicate

Bools: TypeAlias = npt.NDArray[np.bool_]
Int64s: TypeAlias = npt.NDArray[np.int64]

_NORM_ERROR = 1e-3
"""Norms are counted in float32, which adds at most 0.025 %."""

_FEW_UNITS = 64
"""Units of which all tokens are looked at to find the rows of documents."""

_FEW_ROWS = 2
"""Rows a unit, on average, up to which the row groups around them are read, and not whole columns of their units."""

_WHERE_ROWS = 1 << 18
"""Rows given to a predicate at a time: about 16 MiB of tokens."""


@dataclass(frozen=True, slots=True)
class SinkRule:
    """Which rows of a hook point are attention sinks by their norm."""

    limit: float
    """L2 norm above which a row is one; infinite if the median is unknown or 0."""

    rows: Int64s | None
    """All such rows that are not the first of their window, ascending, and maybe some that are; None where the statistics do
    not tell and norms must be read."""

    has_nonfinite: bool
    """Whether rows hold NaN or infinite values."""


def sink_rule(run: Run, hook_point: str) -> SinkRule:
    """Return what tells sinks by norm.

    The statistics count norms by place in the window, and name the 64 rows of largest norm. Mostly that is all: nearly every sink
    is the first token of its window, which is masked for its place.
    """

    def load() -> tuple[SinkRule, int]:
        stats = run.stats(hook_point)
        limit = norm_limit(stats)
        rows = _rows_over(stats, limit)
        return SinkRule(limit, rows, stats.nonfinite > 0), 1024

    seal = run.collection.seal
    stored = [o.sha256 for o in seal.objects if is_stats_key(run.id, o.key)] if seal is not None else []
    if not stored:  # the statistics are still growing
        return load()[0]
    rule: SinkRule = CACHE.get(f"sinks:{stored[0]}:{hook_point}", load)
    return rule


def _rows_over(stats: HookPointStats, limit: float) -> Int64s | None:
    if not math.isfinite(limit):
        return np.empty(0, np.int64)
    record = stats.row_norms
    if record is None:
        return None
    # Norms of a bin are at most `NORM_GAMMA` to the power of its number.
    largest = NORM_GAMMA ** record.bins[record.positions > 0].astype(np.float64)
    if not (largest > limit * (1 - _NORM_ERROR)).any():
        return np.empty(0, np.int64)
    if len(record.top_norms) >= N_TOP_ROWS and record.top_norms[-1] > limit:
        return None
    return np.sort(record.top_rows[record.top_norms > limit])


class RowMask:
    """The masks of one question, for rows given by number. Close it after use."""

    def __init__(
        self,
        run: Run,
        masks: Masks,
        *,
        sinks: SinkRule | None,
        norms: Callable[[Int64s], npt.NDArray[np.floating[Any]]],
        memory_bytes: int,
    ) -> None:
        """Check the masks against the run; reads no tokens yet.

        Args:
            run: The run asked.
            masks: What the caller asked to leave out.
            sinks: The rule for norms; None not to ask for them.
            norms: Reads the norms of rows, where the rule does not know them by number.
            memory_bytes: For `where`.

        Raises:
            InvalidInputError: a condition, pattern or selection that is none.
            NotFoundError: a row or document that does not exist.
        """
        # Whoever finds rows through postings takes no such masks yet: to leave them out silently would be a wrong answer.
        assert masks.exclude_docs is None, "only `Eligibility` leaves out documents"
        assert not masks.has_next, "only `Eligibility` looks at what follows a row"
        self._tokenization = run.tokenization
        self._masks = masks
        self._sinks = sinks if masks.sinks else None
        self._norms = norms
        top = self._tokenization.rows_per_unit * len(self._tokenization.collection.units)
        self.rows = check_selection(masks.rows, top, name="rows", what="row")
        self.docs = check_selection(
            masks.docs, self._tokenization.corpus.n_documents, name="docs", what="document"
        )
        self._tokens = None if masks.regex is None else match_tokens(masks.regex, self._tokenization)
        needed = {"doc_id": self.docs is not None, "token_id": self._tokens is not None,
                  "is_special": masks.special, "window_position": masks.sinks}  # fmt: skip
        self._columns = [name for name, is_needed in needed.items() if is_needed]
        self._stack = ExitStack()
        self._predicate = None
        if masks.where is not None:
            predicate = Predicate(masks.where, self._tokenization, memory_bytes=memory_bytes)
            self._predicate = self._stack.enter_context(predicate)
        self._last: tuple[Int64s, Pieces] | None = None
        self.bytes_of_units: dict[int, int] = {}
        """Stored bytes of the token tables that were needed, by unit."""

    def __enter__(self) -> "RowMask":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def keep(self, rows: Int64s, removed: Removed) -> Bools:
        """Return which rows may be answers, and count those that may not by what removed them.

        Args:
            rows: Row numbers that the run stores, ascending, shape (n,).
            removed: Where the counts are added; `n_seen` and `n_kept` too.
        """
        removed.n_seen += len(rows)
        keep = np.ones(len(rows), np.bool_)
        if self.rows is not None:
            keep = removed.apply("rows", keep, np.isin(rows, self.rows, assume_unique=True))
        asked = np.flatnonzero(keep)
        tokens = self.columns(rows[asked], *self._columns)
        some = np.ones(len(asked), np.bool_)
        if self.docs is not None:
            some = removed.apply("docs", some, np.isin(tokens["doc_id"], self.docs))
        if self._predicate is not None:
            some = removed.apply("where", some, self._where(rows[asked], some))
        if self._tokens is not None:
            some = removed.apply("regex", some, read_matches(self._tokens, tokens["token_id"]))
        if self._masks.special:
            some = removed.apply("special", some, ~tokens["is_special"])
        if self._masks.sinks:
            some = removed.apply("window_first", some, tokens["window_position"] > 0)
            if self._sinks is not None and math.isfinite(self._sinks.limit):
                some = removed.apply("norm", some, self._below_limit(rows[asked], some))
        removed.n_kept += int(some.sum())
        keep[asked] = some
        return keep

    def columns(self, rows: Int64s, *names: str) -> dict[str, npt.NDArray[Any]]:
        """Return columns of the tokens of some rows, ascending, each of shape (n,)."""
        units = self._count_bytes(rows)
        if not 0 < len(rows) <= _FEW_ROWS * len(units):
            return read_columns(self._tokenization, rows, names)
        pieces = self._around(rows)
        return {name: np.concatenate([getattr(t, name)[at] for t, at in pieces]) for name in names}

    def named_rows(self) -> Int64s | None:
        """Return the rows that the caller named, by number or by document, ascending; None if none, or in too many units."""
        if self.rows is not None or self.docs is None:
            return self.rows
        bounds = [(u.unit, *np.searchsorted(self.docs, [u.meta["first_doc"], u.meta["last_doc"] + 1]))
                  for u in self._tokenization.units]  # fmt: skip
        units = [unit for unit, low, high in bounds if low < high]
        if len(units) > _FEW_UNITS:
            return None
        tables = read_units(self._tokenization, units)
        found = [t.first_row + np.flatnonzero(np.isin(t.doc_id, self.docs)) for t in tables.values()]
        return np.sort(np.concatenate([np.empty(0, np.int64), *found]))

    def fold_keys(self, fold: Fold, rows: Int64s) -> npt.NDArray[Any]:
        """Return the keys by which some rows, in any order, are folded; see `actstore.query.fold`."""
        if fold is None:
            return rows
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        self._count_bytes(ascending)
        found = [
            fold_keys(
                fold,
                offsets=offsets,
                rows=rows,  # only for fold=None
                doc_ids=tokens.doc_id,
                token_ids=tokens.token_id,
                window_positions=tokens.window_position,
            )
            for tokens, offsets in self._around(ascending)
        ]
        if not found:
            return rows
        together = np.concatenate(found)
        keys = np.empty_like(together)
        keys[order] = together
        return keys

    def _around(self, rows: Int64s) -> Pieces:
        """Return the tokens of some rows, ascending, and what folding needs before each; those last asked for are at hand."""
        if self._last is None or not np.array_equal(self._last[0], rows):
            self._last = rows, read_around(self._tokenization, rows, before=CONTEXT_TOKENS - 1)
        return self._last[1]

    def _count_bytes(self, rows: Int64s) -> list[int]:
        """Note the token tables that some rows, ascending, are in, and return their units."""
        units = rows // self._tokenization.rows_per_unit
        found: list[int] = units[np.flatnonzero(np.diff(units, prepend=-1))].tolist()
        for unit in found:
            if unit not in self.bytes_of_units:
                self.bytes_of_units[unit] = unit_entry(self._tokenization, unit).objects[0].nbytes
        return found

    def _below_limit(self, rows: Int64s, asked: Bools) -> Bools:
        """Return which rows are no sinks by norm; those not asked about need not be right."""
        assert self._sinks is not None
        if self._sinks.rows is not None:
            return ~np.isin(rows, self._sinks.rows, assume_unique=True)
        below = np.zeros(len(rows), np.bool_)
        below[asked] = self._norms(rows[asked]) <= self._sinks.limit
        return below

    def _where(self, rows: Int64s, asked: Bools) -> Bools:
        """Return which rows `where` keeps; rows that are not asked about count as not kept."""
        assert self._predicate is not None
        kept = np.zeros(len(rows), np.bool_)
        places = np.flatnonzero(asked)
        for start in range(0, len(places), _WHERE_ROWS):
            some = places[start : start + _WHERE_ROWS]
            by_unit = rows_by_unit(self._tokenization, rows[some])
            units = read_units(self._tokenization, by_unit)
            pieces = []
            for unit, offsets in by_unit.items():
                piece = units[unit].table.take(from_numbers(offsets, pa.int64()))
                numbers = from_numbers(offsets + units[unit].first_row, pa.int64())
                pieces.append(piece.add_column(0, "row", numbers))
            table = pa.concat_tables(pieces).select(self._tokenization.schema.names)
            kept[some] = self._predicate.mask(table)
        return kept
