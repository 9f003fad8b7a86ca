"""How does the demo show its answers in a terminal?

All text of the corpus goes through `actstore.show.visible`, so that nothing in it acts on the terminal; tokens are shaded
by activation, and the token that was found stands in «guillemets», which are there without colours too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from actstore.result import Result
from actstore.show import visible

from .train import BOUNDARY

_SHADES = ("", "black on #ffe0b0", "black on #ffc266", "black on #ff9f1a")
"""From inactive to as active as the token that was found; a quarter of the range each."""

_BLANKS = re.compile(r"[ \t]{2,}")


def heading(console: Console, number: int, title: str) -> None:
    """Begin a step."""
    console.print()
    console.print(Rule(Text(f"{number}. {title}", style="bold"), align="left"))


def line(console: Console, text: str, *, style: str = "") -> None:
    """One line of words; nothing in it is read as markup."""
    console.print(Text(visible(text), style=style), highlight=False, soft_wrap=True)


def query(console: Console, sql: str) -> None:
    """The text of a query, before its answer."""
    console.print(Padding(Text(sql, style="cyan"), (1, 0, 0, 2)), highlight=False)


def answer(console: Console, result: Result) -> None:
    """An answer as the table it is."""
    console.print(Padding(Group(result), (0, 0, 0, 2)))


def contexts(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Contexts found, one a line: the value, then the text with the token marked."""
    for row in rows:
        shown = Text(f"  {row['value']:8.3f}  ")
        shown.append_text(context_text(row["context"]))
        console.print(shown, no_wrap=True, overflow="ellipsis", highlight=False)


def context_text(context: Mapping[str, Any]) -> Text:
    """One context, each token shaded by its value as a share of the marked token's; beginnings of text are not shown."""
    top = context["values"][context["token_index"]]
    shown = Text()
    for i, (token, value) in enumerate(zip(context["tokens"], context["values"], strict=True)):
        words = _BLANKS.sub(" ", visible(token.replace(BOUNDARY, "")))
        if i == context["token_index"]:
            shown.append("«" + words + "»", style="bold " + _SHADES[-1])
        else:
            shown.append(words, style=_shade(value, top))
    return shown


def quote(token: str | None) -> str:
    """A token in quotation marks, with whatever cannot be seen written as an escape."""
    return f'"{visible(token or "")}"'


def _shade(value: float | None, top: float) -> str:
    if value is None or not top or not 0 < value / top < float("inf"):
        return _SHADES[0]
    return _SHADES[min(len(_SHADES) - 1, int(value / top * len(_SHADES)))]
