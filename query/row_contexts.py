"""What stands around some rows? Their windows of tokens, cut when asked for, with a number for every token shown.

The same contexts as those of `actstore.query.context`, for rows found by an index: many at a time, from decoded tables that
the process keeps, and with numbers that are known without reading activations.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.arrow_arrays import from_numbers, from_texts, take_texts
from actstore.tokenization import Tokenization

from .context import CONTEXT_TYPE
from .token_groups import read_around
from .unit_tables import Tokens, read_texts, read_words, unit_entry

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_TOKEN_COLUMNS = ("token_id", "char_start", "char_end", "is_special")


@dataclass(frozen=True, slots=True)
class Shown:
    """The tokens shown around each of n rows, one window behind another: s tokens in all."""

    rows: Int64s
    """Shape (n,)."""

    starts: Int64s
    """First row shown, shape (n,)."""

    indptr: Int64s
    """The tokens of window i are those from `indptr[i]` on and before `indptr[i + 1]`; shape (n + 1,)."""

    doc_id: Int64s
    position: npt.NDArray[np.int32]
    token_id: npt.NDArray[np.int32]
    """Of every token shown, shape (s,); so the next three."""

    char_start: npt.NDArray[np.int32]
    char_end: npt.NDArray[np.int32]
    is_special: Bools
    nbytes: int
    """Stored bytes of the token tables read."""

    @property
    def index(self) -> Int64s:
        """Where each row's own token stands in its window, shape (n,)."""
        return self.rows - self.starts

    @property
    def token_rows(self) -> Int64s:
        """Row of every token shown, shape (s,)."""
        lengths = np.diff(self.indptr)
        rows: Int64s = np.arange(self.indptr[-1]) + np.repeat(self.starts - self.indptr[:-1], lengths)
        return rows

    @property
    def window_of(self) -> Int64s:
        """Which of the n windows each token shown is in, shape (s,)."""
        return np.repeat(np.arange(len(self.rows)), np.diff(self.indptr))


def show_rows(tokenization: Tokenization, rows: Int64s, *, before: int, after: int) -> Shown:
    """Return the tokens shown around some rows, in the order given; no window crosses a model window or a document.

    Args:
        tokenization: The rows' tokenization.
        rows: Row numbers that exist, shape (n,); may repeat.
        before: Tokens shown before each, at most.
        after: Tokens shown after it, at most.
    """
    n = len(rows)
    starts, lengths = np.zeros(n, np.int64), np.zeros(n, np.int64)
    doc_id, position = np.zeros(n, np.int64), np.zeros(n, np.int32)
    pieces: list[tuple[npt.NDArray[Any], ...]] = [()] * n
    order = np.argsort(rows, kind="stable")
    places = iter(order.tolist())
    for tokens, offsets in read_around(tokenization, rows[order], before=before, after=after):
        for offset in offsets.tolist():
            i = next(places)
            first, stop = _window(tokens, offset, before, after)
            starts[i], lengths[i] = tokens.first_row + first, stop - first
            doc_id[i], position[i] = tokens.doc_id[offset], tokens.position[offset]
            pieces[i] = tuple(getattr(tokens, name)[first:stop] for name in _TOKEN_COLUMNS)
    empty = (np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.bool_))
    columns = [np.concatenate(column) for column in zip(*pieces, strict=True)] if pieces else list(empty)
    units = set((rows // tokenization.rows_per_unit).tolist())
    return Shown(
        rows=rows,
        starts=starts,
        indptr=np.concatenate([[0], np.cumsum(lengths)]),
        doc_id=doc_id,
        position=position,
        **dict(zip(_TOKEN_COLUMNS, columns, strict=True)),
        nbytes=sum(unit_entry(tokenization, unit).objects[0].nbytes for unit in units),
    )


def describe_shown(
    tokenization: Tokenization,
    shown: Shown,
    values: Float64s,
    *,
    ranks: npt.NDArray[np.integer[Any]],
    own: Float64s | None = None,
    missing: Bools | None = None,
) -> pa.Table:
    """Return what is to be said about every row, in order.

    Columns: rank, row, doc_id, position, token_id, token, value, context (`actstore.query.context.CONTEXT_TYPE`).

    Args:
        tokenization: The rows' tokenization.
        shown: From `show_rows`.
        values: A number for every token shown, shape (s,).
        ranks: Shape (n,).
        own: The rows' own values, shape (n,); None for what `values` has at their tokens.
        missing: Tokens shown whose number is not known: null; shape (s,).
    """
    at = shown.indptr[:-1] + shown.index
    words = read_words(tokenization)
    tokens = words.read(shown.token_id)
    offsets = from_numbers(shown.indptr, pa.int32())
    text, token_start, token_end = _cut_texts(tokenization, shown)
    context = pa.StructArray.from_arrays(
        [
            from_texts(text),
            from_numbers(token_start, pa.int32()),
            from_numbers(token_end, pa.int32()),
            pa.ListArray.from_arrays(offsets, tokens),
            from_numbers(shown.index, pa.int32()),
            pa.ListArray.from_arrays(offsets, from_numbers(values, pa.float64(), missing=missing)),
        ],
        fields=list(CONTEXT_TYPE),
    )
    columns = {
        "rank": from_numbers(ranks, pa.int32()),
        "row": from_numbers(shown.rows, pa.int64()),
        "doc_id": from_numbers(shown.doc_id, pa.int64()),
        "position": from_numbers(shown.position, pa.int32()),
        "token_id": from_numbers(shown.token_id[at], pa.int32()),
        "token": take_texts(tokens, at),
        "value": from_numbers(values[at] if own is None else own, pa.float64()),
        "context": context,
    }
    return pa.table(columns)


def _window(tokens: Tokens, offset: int, before: int, after: int) -> tuple[int, int]:
    """Return the half-open range of offsets shown; positions in a model window count up by one from 0."""
    own = int(tokens.window_position[offset])
    first = offset - min(before, own, offset)
    ahead = tokens.window_position[offset + 1 : offset + 1 + after]
    same = ahead == np.arange(own + 1, own + 1 + len(ahead))
    return first, offset + 1 + (len(same) if same.all() else int(same.argmin()))


def _cut_texts(tokenization: Tokenization, shown: Shown) -> tuple[list[str], Int64s, Int64s]:
    """Return the text of every window, and where in it the row's own token begins and ends."""
    n = len(shown.rows)
    if not n:
        return [], np.empty(0, np.int64), np.empty(0, np.int64)
    plain = ~shown.is_special
    cuts = shown.indptr[:-1]
    largest = np.iinfo(np.int32).max
    first = np.minimum.reduceat(np.where(plain, shown.char_start, largest), cuts).astype(np.int64)
    last = np.maximum.reduceat(np.where(plain, shown.char_end, -1), cuts).astype(np.int64)
    nothing = last < 0  # special tokens only: no characters
    first[nothing] = last[nothing] = 0
    at = cuts + shown.index
    start, end = shown.char_start[at].astype(np.int64), shown.char_end[at].astype(np.int64)
    # A special token stands for no characters: it is put where the text around it begins or, behind other tokens, ends.
    n_plain = np.concatenate([[0], np.cumsum(plain)])
    behind = n_plain[at] > n_plain[cuts]
    special = shown.is_special[at]
    start[special] = end[special] = np.where(behind, last, first)[special]
    texts = read_texts(tokenization.corpus, shown.doc_id)
    ranges = zip(shown.doc_id.tolist(), first.tolist(), last.tolist(), strict=True)
    cut = [texts[doc][a:b] for doc, a, b in ranges]
    return cut, np.clip(start, first, last) - first, np.clip(end, first, last) - first
