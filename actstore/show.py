"""How is an answer that holds text of a corpus shown in a terminal without that text acting on the terminal?

Corpus text is foreign: it may hold escape sequences or bidirectional overrides. Here every character that a terminal or a
reader's eye could mistake for something else becomes a visible escape. Tokens of contexts are shaded by their values, and
what was found stands in «guillemets», which are there without colours too. `actstore.show_html` does the same for pages.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from actstore.shading import Piece, finite_sizes, is_context, scales, share_of, split_context

SHOWN_ROWS = 50
"""Rows of an answer that are shown; the others are only counted."""

SHOWN_CHARS = 200
"""Characters of one value, or of one token, that are shown."""

_SHOWN_PIECES = 512
"""Tokens of a context that are shown, those around the hit."""

_LEAST_WIDTH = 10
"""Terminal columns that a column of an answer needs to be readable, its frame included."""

_CONTEXT_WIDTH = 110
"""Terminal columns below which a context would be squeezed by the columns that it makes dispensable."""

_TOLD_BY_CONTEXT = ("position", "token_id", "token")
"""What the marked token of a context, and its row number, say too."""

_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that show as nothing or move other text: controls, formats (bidi, zero width), line ends."""

N_STEPS = 8
"""Shades of each sign in a terminal: as many as the eye tells apart side by side."""

_LIGHT, _POSITIVE, _NEGATIVE = (255, 244, 228), (255, 140, 0), (80, 150, 255)
"""Backgrounds of the weakest and of the strongest values (RGB); black is readable on all, whatever the terminal's own."""

_STRONG = 0.5
"""Share of the scale from which a token is marked where there are no colours."""


def visible(text: str) -> str:
    r"""Return `text` with every hidden character written as an escape.

    >>> visible("a\x1b[31mb\u202ec\n")
    'a\\x1b[31mb\\u202ec\\n'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible_char(c) for c in text)


def _visible_char(char: str) -> str:
    if unicodedata.category(char) not in _HIDDEN:
        return char
    code = ord(char)
    return _ESCAPES.get(char) or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )


def terminal_table(table: pa.Table, *, width: int, colour: bool = True) -> RenderableType:
    """Return the first rows as a rich table for `width` columns; text of the corpus is never read as rich markup.

    Args:
        table: The answer.
        width: Columns of the terminal.
        colour: Shade tokens by background; without it strong tokens stand in single guillemets.
    """
    table = table.slice(0, SHOWN_ROWS)
    scaled = {field.name: scales(table, field.name) for field in table.schema if is_context(field.type)}
    notes = _legends(table, scaled, colour=colour)
    if width < _CONTEXT_WIDTH and scaled:
        hidden = [name for name in _TOLD_BY_CONTEXT if name in table.column_names]
        table = table.drop_columns(hidden)
        notes += [Text(f"{', '.join(hidden)}: in a wider terminal, or as data")] if hidden else []
    rows = _rows(table, scaled, colour=colour)
    is_wide = table.num_columns * _LEAST_WIDTH > width
    return Group(_records(table, rows) if is_wide else _columns(table, rows), *notes)


def _columns(table: pa.Table, rows: Iterable[Sequence[Text]]) -> Table:
    shown = Table()
    for field in table.schema:
        numeric = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        shown.add_column(Text(visible(field.name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def _records(table: pa.Table, rows: Iterable[Sequence[Text]]) -> Table:
    """Return a table that is too wide for the terminal with one line per value."""
    shown = Table()
    shown.add_column("column")
    shown.add_column("value", overflow="fold")
    for row in rows:
        for name, cell in zip(table.column_names, row, strict=True):
            shown.add_row(Text(visible(name)), cell)
        shown.add_section()
    return shown


def _rows(table: pa.Table, scaled: Mapping[str, Sequence[float]], *, colour: bool) -> Iterable[list[Text]]:
    columns = [column.to_pylist() for column in table.columns]
    for i in range(table.num_rows):
        row = []
        for name, column in zip(table.column_names, columns, strict=True):
            if name in scaled and column[i] is not None:
                row.append(context_text(column[i], scale=scaled[name][i], colour=colour))
            else:
                row.append(Text(plain(column[i])))
        yield row


def plain(value: Any) -> str:
    """Return a value as text of at most `SHOWN_CHARS` visible characters; None is empty.

    >>> plain([{"token": " a", "mean": 0.1234567}, None])
    "[{token: ' a', mean: 0.123457}, -]"
    """
    return "" if value is None else cut(visible(value) if isinstance(value, str) else _nested(value))


def _nested(value: Any) -> str:
    """Return a value within another, or one that is no text; lists end where nobody would see more of them."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return f"'{visible(value[:SHOWN_CHARS])}'"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{visible(str(k))}: {_nested(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        # Of so many items, each at least three characters with its comma, the last are cut off.
        return "[" + ", ".join(_nested(item) for item in value[:SHOWN_CHARS]) + "]"
    return visible(str(value)[: SHOWN_CHARS + 1])


def cut(text: str) -> str:
    """Return `text`, or its beginning and an ellipsis where it is longer than `SHOWN_CHARS`."""
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def context_text(context: Mapping[str, Any], *, scale: float, colour: bool = True) -> Text:
    """Return a context as rich text, every token shaded by its share of `scale`, the hit in guillemets.

    Without colours, other tokens of at least half the scale stand in single guillemets.
    """
    shown = Text()
    for piece in split_context(context, most=_SHOWN_PIECES):
        share = share_of(piece.value, scale)
        words = _marked(piece, share, colour=colour)
        style = shade(share) if colour else Style()
        shown.append(words, style=style + Style(bold=True) if piece.is_hit else style)
    return shown


def _marked(piece: Piece, share: float, *, colour: bool) -> str:
    words = cut(visible(piece.text))
    if piece.is_hit:
        return f"«{words}»"
    return f"‹{words}›" if not colour and abs(share) >= _STRONG else words


def shade(share: float) -> Style:
    """Return how a token of this share of the scale looks: one of `N_STEPS` backgrounds of its sign; 0.0 is plain."""
    step = shade_step(share)
    if not step:
        return Style()
    end = _POSITIVE if step > 0 else _NEGATIVE
    part = (abs(step) - 1) / (N_STEPS - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_LIGHT, end, strict=True))
    return Style(bgcolor=Color.from_rgb(red, green, blue), color="black")


def shade_step(share: float) -> int:
    """Return the shade of a share of the scale: 0 for 0.0, else 1 to `N_STEPS` with the sign, rounded away from 0."""
    step = min(N_STEPS, -int(-abs(share) * N_STEPS // 1))
    return step if share >= 0 else -step


def _legends(table: pa.Table, scaled: Mapping[str, Sequence[float]], *, colour: bool) -> list[Text]:
    """Return a line for every column of contexts that says what its shades mean."""
    lines = []
    for name, found in scaled.items():
        if not any(found):
            continue
        values = [
            v for c in table[name].to_pylist() if c is not None for v in c["values"] if finite_sizes([v])
        ]
        top = f"{max(found):.4g}" if len(set(found)) == 1 else "the largest found of its target"
        line = Text(f"{visible(name)}: " if len(scaled) > 1 else "")
        if not colour:
            lines.append(line.append(f"«found»; ‹at least half of {top}›"))
            continue
        if min(values) < 0:
            line.append(f"-{top} ")
            line.append_text(_swatches(range(-N_STEPS, 0)))
        line.append(" 0 ")
        line.append_text(_swatches(range(1, N_STEPS + 1)))
        lines.append(line.append(f" {top}: value of each token, «found»"))
    return lines


def _swatches(steps: Iterable[int]) -> Text:
    shown = Text()
    for step in steps:
        shown.append(" ", style=shade(step / N_STEPS))
    return shown
