import datetime as dt
import json
import math
import re
from decimal import Decimal
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.query.context import CONTEXT_TYPE
from actstore.result import Meta, Result
from actstore.show import visible

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '" onmouseover="alert(1)', "</td></table><h1>",
    "javascript:alert(1)",
    "\x1b]0;owned\x07", "\x1b[2J\x1b[31mred", "a\u202egnp.exe", "\u2066\u2069", "line\u2028break\r\nnew", "[bold red]markup[/]",
    "=HYPERLINK(1)", "zero\u200bwidth", "\x00nul", "\ufeffbom", "漢字 🙂 naïve", "\x9b31m", "&lt;b&gt;", "[link=http://x]y[/link]",
]  # fmt: skip


def context(text):
    return {
        "text": text + "X" + text, "token_start": len(text), "token_end": len(text) + 1, "tokens": [text, "X", text],
        "token_index": 1, "values": [-1.0, 2.0, float("nan")],
    }  # fmt: skip


def hostile_result():
    table = pa.table({
        "row": list(range(len(HOSTILE))), "token": HOSTILE, "context": pa.array(map(context, HOSTILE), CONTEXT_TYPE),
        "<b>column\x1b</b>": HOSTILE,
    })  # fmt: skip
    meta = Meta(
        version=3,
        n_returned=len(HOSTILE),
        warnings=("<script>warn\x1b[0m</script>",),
        request={"verb": "<i>\x1b"},
    )
    return Result(table, meta)


def test_a_terminal_gets_no_control_characters():
    shown = repr(hostile_result())
    assert not re.findall(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]", shown
    )
    assert "\\x1b[2J" in shown
    assert "\\u202e" in shown
    assert "[bold red]markup[/]" in shown
    assert "漢字 🙂 naïve" in shown


def test_a_page_gets_no_markup_from_the_corpus():
    html = hostile_result()._repr_html_()
    allowed = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "span", "mark"}

    class Check(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag in allowed
            for name, value in attrs:
                assert name in {"title", "style", "scope", "dir"}
                if name == "style":
                    assert re.fullmatch(
                        r"white-space:pre-wrap|background:rgba\([\d,]+,0\.\d{3}\)"
                        r"(;color:inherit;font-weight:bold;border-bottom:2px solid)?",
                        value,
                    )
                elif name == "title":
                    assert re.fullmatch(r"-?[\d.e+-]+|not finite|not stored", value)

    Check().feed(html)
    assert "<script" not in html.lower()
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "rgba(40,110,255,0.300)" in html
    assert "rgba(230,100,0,0.600)" in html


@given(st.text())
def test_visible_text_is_printable_and_plain_text_is_kept(text):
    shown = visible(text)
    assert all(c.isprintable() or ord(c) > 0x2FF or c == "\xa0" for c in shown)
    assert not set(shown) & set("\x1b\x07\u202e\u2028\n\r\t\x00")
    if text.isascii() and text.isprintable():
        assert shown == text


def test_json_has_no_nan_and_says_so():
    table = pa.table({
        "f": [1.5, math.nan, math.inf], "d": [Decimal("3"), Decimal("1.5"), None], "b": [b"\x00\xff", None, b""],
        "t": [dt.datetime(2024, 5, 1), None, None], "s": [{"v": [math.nan]}, None, {"v": []}],
        "u": ["\u2028", "🙂", "x"],
    })  # fmt: skip
    text = Result(table, Meta(version=1, warnings=("w",))).to_json(indent=1)
    answer = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert [r["f"] for r in answer["rows"]] == [1.5, None, None]
    assert answer["nonfinite"] == 3
    assert answer["meta"]["warnings"][0] == "w"
    assert "3 values" in answer["meta"]["warnings"][1]
    assert [r["d"] for r in answer["rows"]] == [3, "1.5", None]
    assert answer["rows"][0]["b"] == "AP8="
    assert answer["rows"][0]["t"] == "2024-05-01T00:00:00"
    assert text.isascii()


def test_conversions_agree():
    result = Result(pa.table({"row": [1, 2], "value": [0.5, -1.0]}), Meta(version=1, n_returned=2))
    assert list(result) == result.to_dicts() == [{"row": 1, "value": 0.5}, {"row": 2, "value": -1.0}]
    assert isinstance(result.to_pandas(), pd.DataFrame)
    assert isinstance(result.to_polars(), pl.DataFrame)
    assert result.to_pandas().to_dict("records") == result.to_polars().to_dicts() == result.to_dicts()
    assert result.to_arrow() is result.table
    assert len(result) == 2


def test_meta_cannot_be_changed():
    meta = Meta(version=1)
    with pytest.raises(AttributeError):
        meta.version = 2
    assert json.loads(json.dumps(meta.to_dict()))["warnings"] == []


def test_only_so_many_rows_are_shown():
    result = Result(pa.table({"n": np.arange(10_000)}), Meta(version=1))
    assert "50 of 10000 rows shown" in repr(result)
    assert len(repr(result).splitlines()) < 70
    assert result._repr_html_().count("<tr>") == 51


def test_wide_tables_are_shown_as_records():
    table = pa.table({f"column{i}": [i] for i in range(40)})
    shown = repr(Result(table, Meta(version=1)))
    assert "column39" in shown
    assert max(map(len, shown.splitlines())) <= 200
