"""Which stored rows may be an answer, and what kept the others out?

Masks are applied in a fixed order and a row is counted at the first that removes it: the caller's rows and documents, then
`where`, then the pattern on the token's text, then special tokens, then attention sinks by position; and, once the activations
are read, rows that are not finite, attention sinks by norm, and rows of zeros where a direction is asked for. Where only rows
count that another token follows, those without one are removed behind the pattern.

Of a run that keeps a sample of its rows, only those that it stores count at all: the others are not rows of it.

Attention sinks are the few tokens that models attend to for lack of anything better; their activations are huge in a few
dimensions, say nothing about the text, and would otherwise lead almost every answer. `mask_sinks` removes the first token
of every model window, where they nearly always are, and rows whose L2 norm is over `SINK_NORM_RATIO` times the hook
point's median.

Source: Xiao et al. (2023), "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453, section 3.1; Sun et
al. (2024), "Massive Activations in Large Language Models", arXiv:2402.17762, section 2.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.checks import is_whole
from actstore.errors import ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.run import Run
from actstore.sampling import parse_kept
from actstore.stats import SINK_NORM_RATIO, HookPointStats

from .token_pattern import match_tokens, read_matches
from .where import Predicate

Bools: TypeAlias = npt.NDArray[np.bool_]
Int64s: TypeAlias = npt.NDArray[np.int64]
Selection: TypeAlias = slice | range | Sequence[int] | Int64s | None


@dataclass(frozen=True, slots=True)
class Masks:
    """What the caller asked to leave out."""

    where: str | None
    rows: Selection
    docs: Selection
    special: bool
    sinks: bool
    regex: str | None = None
    """Pattern of which the token's text must hold a match."""
    exclude_docs: Selection = None
    """Documents to leave out."""
    has_next: bool = False
    """Whether only rows count whose model window goes on: another token of the same document follows."""


@dataclass(slots=True)
class UnitRows:
    """One unit's tokens, and which of them may be answers as far as is known without the activations."""

    unit: int
    first_row: int
    """Row number of offset 0."""

    table: pa.Table
    keep: Bools
    """Shape (t,), for every token of the unit; False where a sampled run stores no row."""

    n_stored: int
    """Rows of activations that the run stores for the unit."""

    nbytes: int
    """Stored bytes of the token table."""

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a column of the token table as an array, shape (t,)."""
        values: npt.NDArray[Any] = self.table[name].to_numpy()
        return values


@dataclass(slots=True)
class Removed:
    """How many rows each mask kept out."""

    counts: dict[str, int] = field(default_factory=dict)
    n_seen: int = 0
    n_kept: int = 0

    def apply(self, name: str, keep: Bools, passing: Bools) -> Bools:
        """Return `keep` narrowed to `passing`, and count what that removed under `name`."""
        narrowed: Bools = keep & passing
        self.counts[name] = self.counts.get(name, 0) + int(keep.sum() - narrowed.sum())
        return narrowed


class Eligibility:
    """The rows of a run that pass the masks which need no activations, unit by unit. Close it after use."""

    def __init__(
        self,
        run: Run,
        masks: Masks,
        *,
        memory_bytes: int,
        units: Collection[int] | None = None,
        only_masks: bool = False,
    ) -> None:
        """Check the masks against the run; reads no unit yet.

        Args:
            run: The run asked.
            masks: What the caller asked to leave out.
            memory_bytes: For `where`.
            units: Only these of the stored units; all if None.
            only_masks: Read of tokens only what the masks need; the tables of units then have no other columns.

        Raises:
            InvalidInputError: `where` is not a condition over tokens and documents, `regex` no pattern, or a selection is not
                of whole numbers.
            NotFoundError: a row or document that does not exist.
        """
        self._run = run
        self._masks = masks
        self._units = None if units is None else frozenset(units)
        self.removed = Removed()
        self._tokenization = run.tokenization
        self._kept = parse_kept(run.collection.config)
        top = self._tokenization.rows_per_unit * len(self._tokenization.units)
        self._rows = check_selection(masks.rows, top, name="rows", what="row")
        self._docs = check_selection(
            masks.docs, self._tokenization.corpus.n_documents, name="docs", what="document"
        )
        self._not_docs = check_selection(
            masks.exclude_docs, self._tokenization.corpus.n_documents, name="exclude_docs", what="document"
        )
        self._matches = None if masks.regex is None else match_tokens(masks.regex, self._tokenization)
        self._stack = ExitStack()
        self._predicate = None
        if masks.where is not None:
            predicate = Predicate(masks.where, self._tokenization, memory_bytes=memory_bytes)
            self._predicate = self._stack.enter_context(predicate)
        self._columns = self._mask_columns() if only_masks and masks.where is None else None

    def __enter__(self) -> "Eligibility":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def is_selective(self) -> bool:
        """Whether whole units may drop out before their activations are read."""
        selections = (self._units, self._rows, self._docs, self._predicate)
        return any(selection is not None for selection in selections)

    def unit(self, unit: int) -> UnitRows:
        """Return the rows of one stored unit; for a pass that is not selective."""
        rows = self.rows_of(unit)
        assert rows is not None, "only a selection drops a unit unread"
        return rows

    def units(self) -> Iterator[UnitRows]:
        """Yield every stored unit that has an eligible row, in row order; the others cost at most their token table."""
        for unit in sorted(self._run.collection.units):
            if self._units is not None and unit not in self._units:
                continue
            rows = self.rows_of(unit)
            if rows is not None and rows.keep.any():
                yield rows

    def rows_of(self, unit: int) -> UnitRows | None:
        """Return the rows of one stored unit; None, unread, if the caller's rows leave none of it."""
        stored = self._run.collection.units[unit]
        first = unit * self._tokenization.rows_per_unit
        self.removed.n_seen += stored.rows
        tokens = self._tokenization.collection.units.get(unit)
        keep = self._stored_rows(unit, 0 if tokens is None else tokens.rows)
        if tokens is None or keep.sum() != stored.rows:
            raise FormatError(
                ErrorKind.INVARIANT_BROKEN,
                f"unit {unit} has {stored.rows} rows in run {self._run.id!r} and {keep.sum()} in its tokenization: run fsck",
            )
        if self._rows is not None:
            keep = self.removed.apply("rows", keep, _in_range(self._rows, first, len(keep)))
            if not keep.any():
                return None
        table = self._tokenization.unit_table(unit, self._columns)
        if table.num_rows != len(keep):
            raise FormatError(
                ErrorKind.INVARIANT_BROKEN,
                f"unit {unit} has {len(keep)} rows in the manifest and {table.num_rows} in its token table: run fsck",
            )
        rows = UnitRows(unit, first, table, keep, stored.rows, tokens.objects[0].nbytes)
        if self._docs is not None:
            rows.keep = self.removed.apply("docs", rows.keep, np.isin(rows.column("doc_id"), self._docs))
        if self._not_docs is not None:
            others = ~np.isin(rows.column("doc_id"), self._not_docs)
            rows.keep = self.removed.apply("exclude_docs", rows.keep, others)
        if self._predicate is not None and rows.keep.any():
            rows.keep = self.removed.apply("where", rows.keep, self._predicate.mask(table))
        if self._matches is not None:
            matching = read_matches(self._matches, rows.column("token_id"))
            rows.keep = self.removed.apply("regex", rows.keep, matching)
        if self._masks.has_next:
            going_on = goes_on(rows.column("doc_id"), rows.column("window_position"))
            rows.keep = self.removed.apply("no_next_token", rows.keep, going_on)
        if self._masks.special:
            rows.keep = self.removed.apply("special", rows.keep, ~rows.column("is_special"))
        if self._masks.sinks:
            rows.keep = self.removed.apply("window_first", rows.keep, rows.column("window_position") > 0)
        return rows

    def _mask_columns(self) -> list[str]:
        """Return the columns of tokens that the masks but `where` are evaluated on; at least one."""
        masks = self._masks
        needed = {
            "doc_id": self._docs is not None or self._not_docs is not None or masks.has_next,
            "token_id": self._matches is not None,
            "is_special": True,
            "window_position": masks.sinks or masks.has_next,
        }
        return [name for name, is_needed in needed.items() if is_needed]

    def _stored_rows(self, unit: int, n_tokens: int) -> Bools:
        """Return which tokens of a unit the run keeps the rows of, shape (n_tokens,)."""
        if self._kept is None:
            return np.ones(n_tokens, dtype=np.bool_)
        keep = np.zeros(n_tokens, dtype=np.bool_)
        offsets = self._kept.offsets(unit, self._kept.rows_per_unit)
        keep[offsets[: np.searchsorted(offsets, n_tokens)]] = True
        return keep


def check_selection(selection: Selection, stop: int, *, name: str, what: str) -> Int64s | None:
    """Return the selected numbers, sorted and unique; None for all.

    Raises:
        InvalidInputError: not whole numbers.
        NotFoundError: a number outside `[0, stop)`.
    """
    if selection is None:
        return None
    if isinstance(selection, slice):
        ends = [end for end in (selection.start, selection.stop, selection.step) if end is not None]
        if not all(map(is_whole, ends)):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"{name}={selection!r:.80}: a slice is of whole numbers"
            )
        if (selection.start or 0) < 0 or (selection.stop or 0) < 0 or (selection.step or 1) < 1:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"{name}={selection!r}: numbers never count from the end"
            )
        selection = range(*selection.indices(stop))
    try:
        values = np.asarray(selection)
    except ValueError:
        values = np.zeros((0, 0))
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{name}= must be whole numbers or a slice, got {type(selection).__name__} of {values.dtype}",
        )
    numbers = np.unique(values.astype(np.int64))
    if numbers.size and (numbers[0] < 0 or numbers[-1] >= stop):
        bad = int(numbers[0] if numbers[0] < 0 else numbers[-1])
        raise NotFoundError(ErrorKind.ROW_NOT_FOUND, f"{what} {bad} was asked for, there are [0, {stop})")
    return numbers


def _in_range(numbers: Int64s, first: int, size: int) -> Bools:
    inside = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + size)]
    mask = np.zeros(size, dtype=np.bool_)
    mask[inside - first] = True
    return mask


def goes_on(doc_ids: Int64s, window_positions: npt.NDArray[np.int32]) -> Bools:
    """Return which tokens of a unit another one follows in their model window, shape (t,).

    Args:
        doc_ids: Documents of the unit's tokens, in row order, shape (t,).
        window_positions: Index of each in its window.

    >>> goes_on(np.array([4, 4, 4, 5]), np.array([0, 1, 0, 1], np.int32)).tolist()
    [True, False, False, False]
    """
    found = np.zeros(len(doc_ids), np.bool_)
    found[:-1] = (doc_ids[1:] == doc_ids[:-1]) & (np.diff(window_positions) == 1)
    return found


def sink_norm_limit(run: Run, hook_point: str) -> float:
    """Return the L2 norm above which a row is taken for an attention sink; infinite when the median norm is unknown or 0."""
    return norm_limit(run.stats(hook_point))


def norm_limit(stats: HookPointStats) -> float:
    """Return that norm, from the hook point's statistics."""
    median = stats.norm_quantile(0.5)
    return SINK_NORM_RATIO * median if math.isfinite(median) and median > 0 else math.inf
