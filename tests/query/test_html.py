"""What a page shows of an answer: the same text, escaped; shades that follow the values; nothing that acts or loads."""

import itertools
import json
import math
import re
import stat
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import NotFoundError, StorageError
from actstore.result import Meta, Result
from actstore.save_file import save_file
from actstore.show import visible
from actstore.show_html import (
    MAX_ALPHA,
    NEGATIVE,
    POSITIVE,
    html_context,
    html_image,
    html_page,
    html_table,
    shade,
)
from tests.query.hostile import HOSTILE, context, result
from tests.query.test_show import luminance

VOID = {"meta", "img", "br"}
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "table", "caption", "thead", "tbody", "tr", "th", "td", "p", "span",
    "mark", "details", "summary", "pre", "figure", "img", "figcaption",
}  # fmt: skip
ATTRIBUTES = {
    "title",
    "style",
    "scope",
    "dir",
    "lang",
    "charset",
    "http-equiv",
    "content",
    "name",
    "src",
    "alt",
}


class Page(HTMLParser):
    """A page as a parser sees it: every tag closed and known, and the text of every cell."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.cells, self.titled, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, name
            assert name != "src" or value.startswith("data:image/")
        if tag in ("td", "th"):
            self.cells.append("")
        if tag in ("span", "mark") and dict(attrs).get("title"):
            self.titled.append([tag, dict(attrs)["title"], dict(attrs)["style"], ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        if self.open and self.open[-1] in ("span", "mark") and self.titled:
            self.titled[-1][3] += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data!r}")


def alpha(style):
    return float(re.search(r"rgba\(\d+,\d+,\d+,([\d.]+)\)", style)[1])


def test_hostile_text_comes_back_as_text():
    table = pa.table({"token": HOSTILE, "</th><script>": HOSTILE})
    html = html_table(table, title="</caption><script>", caption="<b>\x1b[0m")
    page = Page(html)
    assert page.cells[:2] == ["token", "</th><script>"]
    assert page.cells[2::2] == page.cells[3::2] == [visible(text) for text in HOSTILE]
    assert "</caption><script>" in page.texts
    assert "<b>\\x1b[0m" in page.texts


def test_hostile_contexts_come_back_as_text_in_their_tokens():
    for text in HOSTILE:
        page = Page("<p>" + html_context(context([text, "X", text], [1.0, 2.0, -0.5], 1), 2.0) + "</p>")
        assert [(tag, title, words) for tag, title, _, words in page.titled] == [
            ("span", "1", visible(text)), ("mark", "2", "X"), ("span", "-0.5", visible(text)),
        ]  # fmt: skip
        assert "".join(page.texts) == visible(text) + "X" + visible(text)


@given(
    st.lists(st.tuples(st.text(max_size=8), st.none() | st.floats(width=32)), min_size=1, max_size=15),
    st.data(),
)
def test_any_context_round_trips_and_shades_grow_with_values(tokens, data):
    hit = data.draw(st.integers(0, len(tokens) - 1))
    words, values = [t for t, _ in tokens], [v for _, v in tokens]
    scale = data.draw(st.floats(0.0, 1e30))
    one = context(words, values, hit)
    page = Page("<p>" + html_context(one, scale) + "</p>")
    assert "".join(page.texts) == visible(one["text"])
    by_value = {}
    for _, title, style, _ in page.titled:
        known = title not in ("not stored", "not finite")
        assert 0 <= alpha(style) <= MAX_ALPHA
        by_value.setdefault(abs(float(title)) if known else 0.0, set()).add(alpha(style))
    order = [max(by_value[size]) for size in sorted(by_value)]
    assert all(a <= b for a, b in itertools.pairwise(order))


def test_what_has_no_value_says_so():
    one = context(["a", "b", "c", "d"], [None, math.nan, math.inf, 0.0], 3)
    page = Page(html_context(one, 1.0))
    assert [t[1] for t in page.titled] == ["not stored", "not finite", "not finite", "0"]
    assert {alpha(t[2]) for t in page.titled} == {0.0}


@pytest.mark.parametrize("colour", [POSITIVE, NEGATIVE])
@pytest.mark.parametrize(
    ("page", "text"), [((255,) * 3, (33,) * 3), ((17,) * 3, (222,) * 3), ((0,) * 3, (255,) * 3)], ids=str
)
def test_text_is_readable_on_light_and_dark_pages(colour, page, text):
    for step in range(11):
        part = MAX_ALPHA * step / 10
        behind = luminance([c * part + p * (1 - part) for c, p in zip(colour, page, strict=True)])
        light, dark = max(behind, luminance(text)), min(behind, luminance(text))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_shades_are_those_of_the_sign():
    assert shade(1.0).startswith(f"rgba({','.join(map(str, POSITIVE))},")
    assert shade(-0.1).startswith(f"rgba({','.join(map(str, NEGATIVE))},")
    assert [alpha(shade(s)) for s in (0.0, 0.5, 1.0)] == [0.0, MAX_ALPHA / 2, MAX_ALPHA]


def test_a_page_is_whole_safe_and_says_what_was_asked(tmp_path):
    contexts = [context([text, "X"], [0.5, 2.0], 1) for text in HOSTILE]
    request = {"verb": "</title><script>", "where": "kind = '</pre><script>\x1b[2J\u202e'"}
    meta = Meta(version=7, request=request, warnings=("<script>",), n_returned=len(HOSTILE))
    answer = Result(pa.table({"context": pa.array(contexts, result([]).table["context"].type)}), meta)
    path = answer.to_html(tmp_path / "answer.html")
    html = path.read_text(encoding="utf-8")
    page = Page(html.removeprefix("<!DOCTYPE html>\n"))
    assert page.cells[1:] == [visible(text) + "X" for text in HOSTILE]
    assert not re.search(r"<script|\x1b|[\u2028-\u202e\u2066-\u2069\ufeff\x00\x9b]", html)
    assert "default-src 'none'" in html
    assert 'content="light dark"' in html
    asked = json.loads(next(text for text in page.texts if text.startswith("{")))
    assert asked["version"] == 7
    assert asked["request"] == {**request}
    assert not re.search(r"(src|href)=\"(?!data:)", html)


def test_only_so_many_rows_are_on_a_page(tmp_path):
    answer = Result(pa.table({"n": np.arange(5_000)}), Meta(version=1))
    text = answer.to_html(tmp_path / "a.html").read_text()
    assert text.count("<tr>") == 1001
    assert "1000 of 5000 rows shown" in text
    assert answer.to_html(tmp_path / "b.html", max_rows=5_000).read_text().count("<tr>") == 5001
    assert answer.to_html(tmp_path / "c.html", title="<Mine>").read_text().count("&lt;Mine&gt;") == 2


def test_huge_tokens_and_contexts_do_not_make_huge_pages():
    tokens = ["x" * 10**6, "hit", *["y"] * 50_000]
    html = result([context(tokens, [1.0] * len(tokens), 1)], token=["z" * 10**6])._repr_html_()
    assert len(html) < 200_000
    page = Page(html)
    assert [t[3] for t in page.titled if t[0] == "mark"] == ["hit"]


def test_a_table_of_no_rows_is_a_table(tmp_path):
    page = Page(result([])._repr_html_())
    assert page.cells == ["context"]
    assert result([]).to_html(tmp_path / "a.html").exists()


def test_images_are_part_of_the_page():
    page = html_page(
        "t", [html_image(b"\x89PNG<script>", kind="png", alt='" onerror="alert(1)', caption="<b>")]
    )
    Page(page.removeprefix("<!DOCTYPE html>\n"))
    assert 'src="data:image/png;base64,iVBORzxzY3JpcHQ+"' in page


def test_files_are_whole_or_not_there(tmp_path):
    path = save_file(tmp_path / "a.html", b"one")
    assert save_file(str(path), b"two").read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
    with pytest.raises(NotFoundError, match="does not exist; make it"):
        save_file(tmp_path / "absent" / "a.html", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        save_file(tmp_path / "folder", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "folder"]
