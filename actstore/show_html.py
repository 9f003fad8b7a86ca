"""How is an answer that holds text of a corpus shown on a page without that text becoming markup?

Everything foreign is escaped, first what acts on the eye (`actstore.show.visible`), then what acts on a browser. Fragments
carry their own styles, as notebooks drop style sheets; a whole page is one file that loads nothing and allows no scripts.
Shades are translucent and never darker than `MAX_ALPHA`, so text keeps its own colour on light and on dark pages.
"""

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from actstore.shading import Piece, is_context, scales, share_of, split_context
from actstore.show import SHOWN_ROWS, cut, plain, visible

MAX_ALPHA = 0.6
"""Opacity of the strongest shade: text on it keeps a contrast of 4.5 (WCAG 2.2, AA) on black and on white pages."""

POSITIVE, NEGATIVE = (230, 100, 0), (40, 110, 255)
"""Colours (RGB) of values above and below 0; told apart by all common kinds of colour blindness."""

_SHOWN_PIECES = 1024
"""Tokens of a context that are shown, those around the hit."""

_LEGEND_STEPS = 5

_PAGE_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
caption { font-weight: 600; text-align: left }
th, td { border-bottom: 1px solid #8886; padding: .25rem .6rem; text-align: left; vertical-align: top }
td { overflow-wrap: anywhere }
code { background: #8882; border-radius: .2rem; padding: 0 .15rem }
figure { margin: 1rem 0 } img { height: auto; max-width: 100% } pre { overflow-x: auto; white-space: pre-wrap }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Scripts, other files and forms are refused by the browser too, should anything ever slip through."""


def escape(text: str) -> str:
    r"""Return text for a page: hidden characters as escapes, markup and quotes as entities.

    >>> escape("<b>\x1b")
    '&lt;b&gt;\\x1b'
    """
    return html.escape(visible(text), quote=True)


def html_table(table: pa.Table, *, title: str, caption: str, max_rows: int = SHOWN_ROWS) -> str:
    """Return the first rows as an HTML table with everything escaped; contexts are shaded by value.

    Every token has its value as its title. Values of one target share one scale, which a legend tells.
    """
    table = table.slice(0, max_rows)
    scaled = {f.name: scales(table, f.name) for f in table.schema if is_context(f.type)}
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.column_names)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in _rows(table, scaled))
    legends = "".join(_legend(name, found) for name, found in scaled.items())
    return (
        f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{legends}<p>{escape(caption)}</p>"
    )


def _rows(table: pa.Table, scaled: Mapping[str, Sequence[float]]) -> Iterable[list[str]]:
    columns = [column.to_pylist() for column in table.columns]
    for i in range(table.num_rows):
        row = []
        for name, column in zip(table.column_names, columns, strict=True):
            if name in scaled and column[i] is not None:
                row.append(
                    f'<td dir="auto" style="white-space:pre-wrap">{html_context(column[i], scaled[name][i])}</td>'
                )
            else:
                row.append(f'<td dir="auto">{html.escape(plain(column[i]), quote=True)}</td>')
        yield row


def html_context(context: Mapping[str, Any], scale: float) -> str:
    """Return a context as spans, each token shaded by its value's share of `scale`, the hit as `<mark>`."""
    return "".join(_span(piece, scale) for piece in split_context(context, most=_SHOWN_PIECES))


def _span(piece: Piece, scale: float) -> str:
    words = html.escape(cut(visible(piece.text)), quote=True)
    if not piece.is_token:
        return words
    background = f"background:{shade(share_of(piece.value, scale))}"
    title = f' title="{_value(piece.value)}"'
    if piece.is_hit:
        style = f"{background};color:inherit;font-weight:bold;border-bottom:2px solid"
        return f'<mark{title} style="{style}">{words}</mark>'
    return f'<span{title} style="{background}">{words}</span>'


def _value(value: float | None) -> str:
    if value is None:
        return "not stored"
    return f"{value:.6g}" if math.isfinite(value) else "not finite"


def shade(share: float) -> str:
    """Return the CSS colour of a share of the scale, -1.0 to 1.0: its opacity grows with the size, 0.0 is clear.

    >>> shade(0.5), shade(-1.0)
    ('rgba(230,100,0,0.300)', 'rgba(40,110,255,0.600)')
    """
    red, green, blue = POSITIVE if share >= 0 else NEGATIVE
    return f"rgba({red},{green},{blue},{abs(share) * MAX_ALPHA:.3f})"


def _legend(name: str, found: Sequence[float]) -> str:
    if not any(found):
        return ""
    top = f"{max(found):.4g}" if len(set(found)) == 1 else "the largest found of its target"
    steps = [i / _LEGEND_STEPS for i in range(-_LEGEND_STEPS, _LEGEND_STEPS + 1)]
    swatches = "".join(f'<span style="background:{shade(step)}">&nbsp;&nbsp;</span>' for step in steps)
    return f"<p>{escape(name)}: -{top} {swatches} {top}; the token found is underlined</p>"


def html_image(data: bytes, *, kind: str, alt: str, caption: str = "") -> str:
    """Return an image as part of the page itself; `kind` is png or svg+xml, `alt` says in words what it shows."""
    encoded = base64.b64encode(data).decode("ascii")
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="data:image/{kind};base64,{encoded}" alt="{escape(alt)}">{told}</figure>'


def html_details(summary: str, values: Mapping[str, Any]) -> str:
    """Return values as folded, indented JSON."""
    text = json.dumps(values, indent=2, default=str)
    lines = "\n".join(escape(line) for line in text.split("\n"))
    return f"<details><summary>{escape(summary)}</summary><pre>{lines}</pre></details>"


def html_page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page of fragments as the functions here make them; nothing in it is loaded from elsewhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="generator" content="actstore">'
        f"<title>{escape(title)}</title><style>{_PAGE_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
