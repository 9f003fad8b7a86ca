"""What stands around a token, and how strongly does each token of it answer the query?

Contexts are cut when they are asked for: the tokens before and after, as many as wanted, never past the edge of the model
window that computed the activation. The text is that of the document itself; the activations are read again by row. Of a run
that keeps a sample of its rows, most tokens shown have no stored activation: their values are null.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from actstore.activations import Activations
from actstore.errors import ErrorKind, InvalidInputError
from actstore.tokenization import Tokenization

from .scores import Scorer

MAX_CONTEXT = 4096
"""Most tokens shown on either side."""

_GATHER_BYTES = 32 << 20
"""Activations gathered at a time."""

CONTEXT_TYPE = pa.struct(
    [
        pa.field("text", pa.string()),
        pa.field("token_start", pa.int32()),
        pa.field("token_end", pa.int32()),
        pa.field("tokens", pa.list_(pa.string())),
        pa.field("token_index", pa.int32()),
        pa.field("values", pa.list_(pa.float64())),
    ]
)
"""`text[token_start:token_end]` is the token (code points); `tokens[token_index]` too, `values[token_index]` its value. The
value of a token whose row is not stored is null."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer: a row, the query it answers, and its rank."""

    query: int
    rank: int
    row: int


@dataclass(slots=True)
class _Shown:
    """The tokens shown for one hit."""

    start: int
    """First row shown."""

    token_ids: list[int]
    char_starts: list[int]
    char_ends: list[int]
    specials: list[bool]
    index: int
    """Of the hit's own token."""

    doc_id: int
    position: int


def check_context(before: int, after: int) -> None:
    """Check how many tokens to show.

    Raises:
        InvalidInputError: not whole numbers from 0 to `MAX_CONTEXT`.
    """
    for name, value in (("before", before), ("after", after)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not 0 <= value <= MAX_CONTEXT:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{name} must be a whole number of tokens from 0 to {MAX_CONTEXT}, got {value!r}",
            )


def describe_hits(
    tokenization: Tokenization,
    acts: Activations,
    scorer: Scorer,
    hits: Sequence[Hit],
    *,
    before: int,
    after: int,
) -> pa.Table:
    """Return what is to be said about every hit, in the order given.

    Columns: rank, row, doc_id, position, token_id, token, value, context (`CONTEXT_TYPE`). Reads the token tables of the
    units that hold hits, their documents' text, and the activations of the rows shown.
    """
    shown = _shown_tokens(tokenization, hits, before, after)
    words = _Words(tokenization.vocabulary())
    texts = _texts(tokenization, {s.doc_id for s in shown})
    values = _values(acts, scorer, hits, shown)
    own_ids = [s.token_ids[s.index] for s in shown]
    return pa.table(
        {
            "rank": pa.array([hit.rank for hit in hits], pa.int32()),
            "row": pa.array([hit.row for hit in hits], pa.int64()),
            "doc_id": pa.array([s.doc_id for s in shown], pa.int64()),
            "position": pa.array([s.position for s in shown], pa.int32()),
            "token_id": pa.array(own_ids, pa.int32()),
            "token": pa.array(words.read(own_ids), pa.string()),
            "value": pa.array([v[s.index] for v, s in zip(values, shown, strict=True)], pa.float64()),
            "context": pa.array(
                [_context(s, texts[s.doc_id], words, v) for s, v in zip(shown, values, strict=True)],
                CONTEXT_TYPE,
            ),
        }
    )


def plan_window(
    window: Sequence[int], doc: Sequence[int], offset: int, before: int, after: int
) -> tuple[int, int]:
    """Return the half-open range of offsets shown around `offset`: one model window of one document, at most.

    Args:
        window: Window number of every row of a unit.
        doc: Document number of every row of a unit.
        offset: The hit.
        before: Tokens shown before it, at most.
        after: Tokens shown after it, at most.

    >>> plan_window([0, 0, 0, 1, 1], [5, 5, 5, 5, 5], 2, before=1, after=8)
    (1, 3)
    """
    start = stop = offset
    while start > 0 and offset - start < before and _together(window, doc, start - 1, offset):
        start -= 1
    while stop + 1 < len(window) and stop - offset < after and _together(window, doc, stop + 1, offset):
        stop += 1
    return start, stop + 1


def _together(window: Sequence[int], doc: Sequence[int], a: int, b: int) -> bool:
    return window[a] == window[b] and doc[a] == doc[b]


def _shown_tokens(tokenization: Tokenization, hits: Sequence[Hit], before: int, after: int) -> list[_Shown]:
    by_unit: dict[int, list[int]] = {}
    for i, hit in enumerate(hits):
        by_unit.setdefault(hit.row // tokenization.rows_per_unit, []).append(i)
    shown: dict[int, _Shown] = {}
    for unit in sorted(by_unit):
        table = tokenization.unit_table(unit)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        for i in by_unit[unit]:
            shown[i] = _shown_of(columns, hits[i].row - unit * tokenization.rows_per_unit, before, after)
    return [shown[i] for i in range(len(hits))]


def _shown_of(columns: Mapping[str, np.ndarray[Any, Any]], offset: int, before: int, after: int) -> _Shown:
    start, stop = plan_window(columns["window"], columns["doc_id"], offset, before, after)  # type: ignore[arg-type]
    return _Shown(
        start=int(columns["row"][start]),
        token_ids=columns["token_id"][start:stop].tolist(),
        char_starts=columns["char_start"][start:stop].tolist(),
        char_ends=columns["char_end"][start:stop].tolist(),
        specials=columns["is_special"][start:stop].tolist(),
        index=offset - start,
        doc_id=int(columns["doc_id"][offset]),
        position=int(columns["position"][offset]),
    )


class _Words:
    """The readable text of tokens, by number."""

    def __init__(self, vocabulary: pa.Table) -> None:
        self._words = dict(
            zip(vocabulary["token_id"].to_pylist(), vocabulary["token"].to_pylist(), strict=True)
        )

    def read(self, token_ids: Iterable[int]) -> list[str]:
        """Return the tokens' texts; a number the vocabulary lacks reads as `<number>`."""
        return [self._words.get(token_id, f"<{token_id}>") for token_id in token_ids]


def _texts(tokenization: Tokenization, doc_ids: Iterable[int]) -> dict[int, str]:
    wanted = sorted(doc_ids)
    if not wanted:
        return {}
    return dict(zip(wanted, tokenization.corpus.documents(wanted, ["text"])["text"].to_pylist(), strict=True))


def _context(shown: _Shown, text: str, words: _Words, values: list[float | None]) -> dict[str, Any]:
    spans = [
        (start, end)
        for start, end, special in zip(shown.char_starts, shown.char_ends, shown.specials, strict=True)
        if not special
    ]
    first = min((start for start, _ in spans), default=0)
    last = max((end for _, end in spans), default=first)
    start, end = shown.char_starts[shown.index], shown.char_ends[shown.index]
    if shown.specials[shown.index]:
        # A token that stands for no characters is put where the text around it begins or ends.
        start = end = first if not any(not s for s in shown.specials[: shown.index]) else last
    return {
        "text": text[first:last],
        "token_start": min(max(start, first), last) - first,
        "token_end": min(max(end, first), last) - first,
        "tokens": words.read(shown.token_ids),
        "token_index": shown.index,
        "values": values,
    }


def _values(
    acts: Activations, scorer: Scorer, hits: Sequence[Hit], shown: Sequence[_Shown]
) -> list[list[float | None]]:
    """Return, for every hit, its query's value at every token shown; None where no row is stored."""
    values: dict[int, list[float | None]] = {}
    room = max(1, _GATHER_BYTES // (4 * acts.shape[1]))
    # Neighbouring hits share chunks, so rows are gathered in row order, as many hits at a time as fit.
    order = sorted(range(len(hits)), key=lambda i: shown[i].start)
    batch: list[int] = []
    n_rows = 0
    for i in order:
        if batch and n_rows + len(shown[i].token_ids) > room:
            values.update(_values_of(acts, scorer, hits, shown, batch))
            batch, n_rows = [], 0
        batch.append(i)
        n_rows += len(shown[i].token_ids)
    if batch:
        values.update(_values_of(acts, scorer, hits, shown, batch))
    return [values[i] for i in range(len(hits))]


def _values_of(
    acts: Activations, scorer: Scorer, hits: Sequence[Hit], shown: Sequence[_Shown], batch: Sequence[int]
) -> dict[int, list[float | None]]:
    spans = [np.arange(shown[i].start, shown[i].start + len(shown[i].token_ids)) for i in batch]
    rows = np.unique(np.concatenate(spans))
    rows = rows[acts.exist(rows)]
    acts_td = acts.read(rows)
    found = {}
    for i, span in zip(batch, spans, strict=True):
        stored = np.flatnonzero(np.isin(span, rows, assume_unique=True))
        values: list[float | None] = [None] * len(span)
        scores = scorer.value(acts_td[np.searchsorted(rows, span[stored])], hits[i].query)
        for place, value in zip(stored.tolist(), scores.tolist(), strict=True):
            values[place] = value
        found[i] = values
    return found
