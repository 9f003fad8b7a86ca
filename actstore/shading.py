"""Which pieces does the text of a context fall into, and how strongly is each to be shaded?

A context has the document's own text and the readable text of every token; characters cut by byte-level tokens and the marks
of WordPiece are only right in the first, values belong to the second. Here tokens are laid over the text; where that fails
(a tokenizer that changes the text), the tokens are the text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

CONTEXT_FIELDS = frozenset({"text", "token_start", "token_end", "tokens", "token_index", "values"})

SCALE_BY = ("target", "query", "latent", "dictionary")
"""Columns that say what a context's values are values of: contexts of one thing share one scale."""

_PART = "\ufffd"
"""Stands in a token for bytes that are no whole character."""

_CHARS_PER_PART = 2
"""Most characters that a token of such bytes can stand for: the end of one and the beginning of another."""

_CONTINUES = "##"
"""How WordPiece writes that a token goes on where the one before it ends."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a context's text."""

    text: str
    value: float | None
    """Of the token that it is, or the one furthest from 0 of several that share a character; None where none is known."""

    is_token: bool
    """False for text between tokens."""

    is_hit: bool
    """Whether it is the token that was found."""


def is_context(type_: pa.DataType) -> bool:
    """Return whether a column holds contexts as `examples` and `nearest` make them."""
    return pa.types.is_struct(type_) and {f.name for f in type_} >= CONTEXT_FIELDS


def split_context(context: Mapping[str, Any], *, most: int) -> list[Piece]:
    """Return the pieces of a context from left to right; of more than `most` those around the hit, between ellipses.

    Joined they are the context's text, with what stands for no text (special tokens) put where it is.

    >>> context = {"text": "a cat", "tokens": ["<s>", "a", "cat"], "values": [0.0, 1.0, 2.0]}
    >>> context |= {"token_index": 2, "token_start": 2, "token_end": 5}
    >>> [(piece.text, piece.value) for piece in split_context(context, most=9)]
    [('<s>', 0.0), ('a', 1.0), (' ', None), ('cat', 2.0)]
    """
    pieces = _Layer(context).lay() or _tokens_alone(context)
    hit = next((i for i, piece in enumerate(pieces) if piece.is_hit), 0)
    start = min(max(0, hit - most // 2), max(0, len(pieces) - most))
    shown = pieces[start : start + most]
    dots = Piece("…", None, False, False)
    return [dots] * (start > 0) + shown + [dots] * (start + most < len(pieces))


def scales(table: pa.Table, name: str) -> list[float]:
    """Return for every row the size of value that gets the full shade: one for all contexts of a target.

    It is the largest of the tokens found, as attention sinks, which are not found by default, may be a thousand times
    larger; where all of those are 0, the largest of any token; 0.0 where there is none.

    Args:
        table: An answer, or its first rows.
        name: A column of contexts.
    """
    columns = [table[by].to_pylist() for by in SCALE_BY if by in table.column_names]
    keys = list(zip(*columns, strict=True)) if columns else [()] * table.num_rows
    found: dict[tuple[Any, ...], float] = {}
    shown: dict[tuple[Any, ...], float] = {}
    for key, context in zip(keys, table[name].to_pylist(), strict=True):
        if context is not None:
            at, values = context["token_index"], context["values"]
            found[key] = max(found.get(key, 0.0), *finite_sizes(values[at : at + 1]), 0.0)
            shown[key] = max(shown.get(key, 0.0), *finite_sizes(values), 0.0)
    return [found.get(key) or shown.get(key, 0.0) for key in keys]


def finite_sizes(values: Iterable[float | None]) -> list[float]:
    """Return the absolute values of those that are numbers."""
    return [abs(v) for v in values if v is not None and math.isfinite(v)]


def share_of(value: float | None, scale: float) -> float:
    """Return a value as a share of the scale, -1.0 to 1.0; 0.0 for what is unknown, not finite, or without a scale.

    >>> share_of(-1.0, 4.0), share_of(None, 4.0), share_of(float("inf"), 4.0)
    (-0.25, 0.0, 0.0)
    """
    if value is None or not math.isfinite(value) or scale <= 0:
        return 0.0
    return max(-1.0, min(1.0, value / scale))


def _tokens_alone(context: Mapping[str, Any]) -> list[Piece]:
    pairs = zip(context["tokens"], context["values"], strict=True)
    return [Piece(t, v, True, i == context["token_index"]) for i, (t, v) in enumerate(pairs)]


class _Layer:
    """Lays the tokens of a context over its text, from left to right."""

    def __init__(self, context: Mapping[str, Any]) -> None:
        self._text: str = context["text"]
        self._lower = _lower(self._text)
        self._tokens: Sequence[str] = context["tokens"]
        self._values: Sequence[float | None] = context["values"]
        self._hit: int = context["token_index"]
        self._span: tuple[int, int] = (context["token_start"], context["token_end"])
        self._at = 0
        self._waiting: list[int] = []
        self._pieces: list[Piece] = []
        self._laid = (0, 0)

    def lay(self) -> list[Piece] | None:
        """Return the pieces, or None where text is left over or the hit is not where it should be."""
        for i, token in enumerate(self._tokens):
            if _PART in token:
                self._waiting.append(i)
            else:
                self._place(i, token)
        rest = self._text[self._at :]
        if rest.strip() and not self._can_wait(rest):
            return None
        self._fill(len(self._text))
        return self._pieces if self._is_hit_right() else None

    def _place(self, i: int, token: str) -> None:
        if not self._waiting and token and self._text.startswith(token, self._at):
            self._add(i, self._at + len(token))
            return
        for form in (token, token.removeprefix(_CONTINUES).strip()):
            start = self._find(_lower(form)) if form else -1
            if start >= 0 and self._can_wait(self._text[self._at : start]):
                self._fill(start)
                self._add(i, start + len(form))
                return
        # It stands for no text: a special token, or a blank that the tokenizer added.
        self._fill(self._at)
        self._append(token, self._values[i], self._at, is_hit=i == self._hit)

    def _find(self, form: str) -> int:
        """Return where a token begins: blanks, and whatever the tokens that wait can stand for, may lie before it."""
        reach = self._at + _CHARS_PER_PART * len(self._waiting)
        while reach < len(self._text) and self._text[reach].isspace():
            reach += 1
        return self._lower.find(form, self._at, reach + len(form))

    def _can_wait(self, gap: str) -> bool:
        return not gap.strip() or (
            bool(self._waiting) and len(gap.strip()) <= _CHARS_PER_PART * len(self._waiting)
        )

    def _fill(self, stop: int) -> None:
        """Give the text up to `stop` to the tokens that wait; without any it lies between tokens."""
        gap = self._text[self._at : stop]
        if self._waiting:
            known = [v for v in (self._values[i] for i in self._waiting) if v is not None]
            text = gap or "".join(self._tokens[i] for i in self._waiting)
            largest = max(known, key=abs) if known else None
            self._append(text, largest, stop, is_hit=self._hit in self._waiting)
            self._waiting = []
        elif gap:
            self._pieces.append(Piece(gap, None, False, False))
            self._at = stop

    def _add(self, i: int, stop: int) -> None:
        self._append(self._text[self._at : stop], self._values[i], stop, is_hit=i == self._hit)

    def _append(self, text: str, value: float | None, stop: int, *, is_hit: bool) -> None:
        if is_hit:
            self._laid = (self._at, stop)
        self._pieces.append(Piece(text, value, True, is_hit))
        self._at = stop

    def _is_hit_right(self) -> bool:
        """Return whether the hit lies on the text that the context says it is."""
        (start, stop), (laid_start, laid_stop) = self._span, self._laid
        return start == stop or (laid_start < stop and laid_stop > start)


def _lower(text: str) -> str:
    """Return `text` in lower case, of the same length: tokenizers may ignore case."""
    lower = text.lower()
    return lower if len(lower) == len(text) else text
