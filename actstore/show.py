"""How is an answer that holds text of a corpus shown to a person without that text acting on the terminal or the page?

Corpus text is foreign: it may hold escape sequences, bidirectional overrides, or markup. Here every character that a
terminal or a reader's eye could mistake for something else becomes a visible escape, and HTML gets nothing unescaped.
"""

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from rich.table import Table
from rich.text import Text

SHOWN_ROWS = 50
"""Rows of an answer that are shown; the others are only counted."""

_SHOWN_CHARS = 200
_LEAST_WIDTH = 10
"""Terminal columns that a column of an answer needs to be readable, its frame included."""

_CONTEXT_WIDTH = 110
"""Terminal columns below which a context would be squeezed by the columns that it makes dispensable."""

_TOLD_BY_CONTEXT = ("position", "token_id", "token")
"""What the marked token of a context, and its row number, say too."""

_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that show as nothing or move other text: controls, formats (bidi, zero width), line ends."""

_CONTEXT_FIELDS = frozenset({"text", "token_start", "token_end", "tokens", "token_index", "values"})
_POSITIVE, _NEGATIVE = "255,140,0", "70,130,255"


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


def is_context(type_: pa.DataType) -> bool:
    """Return whether a column holds contexts as `examples` and `nearest` make them."""
    return pa.types.is_struct(type_) and {f.name for f in type_} >= _CONTEXT_FIELDS


def terminal_table(table: pa.Table, *, width: int) -> Table:
    """Return the first rows as a rich table for `width` columns; text of the corpus is never read as rich markup."""
    shown = Table()
    if width < _CONTEXT_WIDTH and any(is_context(field.type) for field in table.schema):
        hidden = [name for name in _TOLD_BY_CONTEXT if name in table.column_names]
        table = table.drop_columns(hidden)
        shown.caption = Text(f"{', '.join(hidden)}: in a wider terminal, or as data") if hidden else None
    if table.num_columns * _LEAST_WIDTH > width:
        return _records(shown, table)
    for field in table.schema:
        numeric = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        shown.add_column(Text(visible(field.name)), justify="right" if numeric else "left", overflow="fold")
    for row in _head(table):
        shown.add_row(*[_cell(value, field.type) for value, field in zip(row, table.schema, strict=True)])
    return shown


def _records(shown: Table, table: pa.Table) -> Table:
    """Fill in a table that is too wide for the terminal with one line per value."""
    shown.add_column("column")
    shown.add_column("value", overflow="fold")
    for row in _head(table):
        for value, field in zip(row, table.schema, strict=True):
            shown.add_row(Text(visible(field.name)), _cell(value, field.type))
        shown.add_section()
    return shown


def html_table(table: pa.Table, *, title: str, caption: str) -> str:
    """Return the first rows as an HTML table with everything escaped; contexts are coloured by activation."""
    head = "".join(f"<th>{_html(field.name)}</th>" for field in table.schema)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{_html_cell(v, f.type)}</td>" for v, f in zip(row, table.schema, strict=True))
        + "</tr>"
        for row in _head(table)
    )
    return (
        f"<table><caption>{_html(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{_html(caption)}</p>"
    )


def _head(table: pa.Table) -> Iterable[tuple[Any, ...]]:
    columns = [column.to_pylist() for column in table.slice(0, SHOWN_ROWS).columns]
    return zip(*columns, strict=True)


def _cell(value: Any, type_: pa.DataType) -> Text:
    if value is not None and is_context(type_):
        return _context_text(value)
    return Text(_plain(value))


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = visible(value if isinstance(value, str) else str(value))
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"


def _context_text(context: Mapping[str, Any]) -> Text:
    text, start, stop = context["text"], context["token_start"], context["token_end"]
    marked = Text(visible(text[:start]))
    marked.append("«" + visible(text[start:stop]) + "»", style="bold reverse")
    marked.append(visible(text[stop:]))
    return marked


def _html(text: str) -> str:
    return html.escape(visible(text), quote=True)


def _html_cell(value: Any, type_: pa.DataType) -> str:
    if value is not None and is_context(type_):
        return _html_context(value["tokens"], value["values"], value["token_index"])
    return html.escape(_plain(value), quote=True)


def _html_context(tokens: Sequence[str], values: Sequence[float | None], token_index: int) -> str:
    finite = [abs(v) for v in values if v is not None and abs(v) < float("inf")]
    scale = max(finite, default=0.0) or 1.0
    return "".join(
        _html_token(token, value, scale, is_hit=i == token_index)
        for i, (token, value) in enumerate(zip(tokens, values, strict=True))
    )


def _html_token(token: str, value: float | None, scale: float, *, is_hit: bool) -> str:
    known = value is not None and abs(value) < float("inf")
    alpha = abs(value) / scale if known and value is not None else 0.0
    colour = _POSITIVE if value is None or value >= 0 else _NEGATIVE
    border = ";border-bottom:2px solid" if is_hit else ""
    shown = f"{value:.6g}" if known else "not finite"
    return (
        f'<span title="{shown}" style="white-space:pre-wrap;background:rgba({colour},{alpha:.2f}){border}">'
        f"{_html(token)}</span>"
    )
