"""What a terminal shows of an answer: shades that follow the values, text that stays text, lines that fit."""

import io
import math
import re
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from actstore.shading import Piece, scales, share_of, split_context
from actstore.show import N_STEPS, context_text, plain, shade, shade_step, terminal_table
from tests.query.hostile import HOSTILE, context, result

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
SGR = re.compile(r"\x1b\[[\d;]*m")
"""The only escape sequence that rich writes here: colours and bold."""


def shown(answer, **options):
    file = io.StringIO()
    answer.show(file=file, **options)
    return file.getvalue()


def hostile_answer():
    contexts = [context([text, "X", text], [-1.0, 2.0, 0.25], 1) for text in HOSTILE]
    return result(contexts, row=list(range(len(HOSTILE))), token=HOSTILE)


def styled(text):
    """The words of a rich text with their backgrounds (RGB or None)."""
    found = []
    for span in text.spans:
        style = span.style
        colour = style.bgcolor.triplet if style and style.bgcolor else None
        found.append((text.plain[span.start : span.end], colour))
    return found


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_in_the_corpus_acts_on_the_terminal(colour, width):
    out = shown(hostile_answer(), width=width, colour=colour)
    plain = SGR.sub("", out)
    assert not CONTROLS.findall(plain)
    assert "\x1b" not in plain
    assert ("\x1b" in out) is colour
    assert max(map(cell_len, plain.splitlines())) <= width
    assert "[bold red]x[/]" in plain.replace("\n", "")


def test_the_words_are_the_same_with_and_without_colours():
    def letters(text):
        return re.sub(r"[\s\W]", "", SGR.sub("", text))

    answer = result([context(["one ", "two ", "three"], [0.1, 3.0, 2.9], 1)])
    legend = "valueofeachtoken"
    with_colours = letters(shown(answer, width=80, colour=True))
    without = letters(shown(answer, width=80, colour=False))
    assert "onetwothree" in with_colours
    assert "onetwothree" in without
    assert legend in with_colours
    assert "atleasthalfof3" in without


def test_without_colours_strong_tokens_are_marked():
    one = context(["weak", "hit", "strong", "minus"], [0.9, 2.0, 1.0, -1.5], 1)
    assert context_text(one, scale=2.0, colour=False).plain == "weak«hit»‹strong›‹minus›"
    assert context_text(one, scale=2.0, colour=True).plain == "weak«hit»strongminus"
    assert not [colour for _, colour in styled(context_text(one, scale=2.0, colour=False)) if colour]


@given(st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=30))
def test_shades_grow_with_the_size_of_the_value(shares):
    steps = [shade_step(share) for share in sorted(shares)]
    assert steps == sorted(steps)
    for share in shares:
        assert (shade_step(share) == 0) == (share == 0)
        assert shade_step(-share) == -shade_step(share)
        assert abs(shade_step(share)) == math.ceil(abs(share) * N_STEPS)


def luminance(rgb):
    """Relative luminance. Source: WCAG 2.2, its definition."""
    parts = [c / 255 for c in rgb]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("sign", [1, -1])
def test_stronger_shades_are_darker_and_black_stays_readable(sign):
    colours = [shade(sign * step / N_STEPS).bgcolor.triplet for step in range(1, N_STEPS + 1)]
    brightness = [luminance(c) for c in colours]
    assert brightness == sorted(brightness, reverse=True)
    assert len(set(colours)) == N_STEPS
    assert min((b + 0.05) / 0.05 for b in brightness) >= 4.5
    assert all(shade(sign * step / N_STEPS).color.name == "black" for step in range(1, N_STEPS + 1))


def test_a_sink_in_a_context_does_not_dim_what_was_found():
    table = result([
        context(["<s>", "a", "b"], [900.0, 4.0, 2.0], 1), context(["<s>", "c"], [800.0, 1.0], 1),
    ]).table  # fmt: skip
    assert scales(table, "context") == [4.0, 4.0]
    assert share_of(900.0, 4.0) == 1.0


def test_targets_have_scales_of_their_own():
    contexts = [context(["a"], [v], 0) for v in (1.0, 3.0, 50.0, 0.0)] + [context(["a", "b"], [0.0, 7.0], 0)]
    table = result(contexts, target=["p", "p", "q", "z", "w"]).table
    assert scales(table, "context") == [3.0, 3.0, 50.0, 0.0, 7.0]
    assert "the largest found of its target" in repr(result(contexts, target=["p", "p", "q", "z", "w"]))


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, 0.0])
def test_unknown_and_infinite_values_have_no_shade(value):
    assert share_of(value, 2.0) == 0.0
    out = shown(result([context(["a", "b"], [value, value], 0)]), width=80, colour=True)
    assert "48;2;" not in out
    assert "«a»" in SGR.sub("", out)


def test_an_answer_without_contexts_or_rows_is_shown():
    assert "value of each" not in shown(result([]), width=80, colour=True)
    assert "examples: 0 rows" in shown(result([]), width=80)
    no_context = result([None], row=[1])
    assert "1 rows" in shown(no_context, width=80, colour=False)
    assert "<table>" in no_context._repr_html_()


def test_huge_contexts_and_tokens_are_cut_around_the_hit():
    tokens = [f"t{i} " for i in range(20_000)]
    one = context(tokens, np.linspace(0, 1, 20_000), 15_000)
    text = context_text(one, scale=1.0, colour=False)
    assert "«t15000 »" in text.plain
    assert text.plain.startswith("…")
    assert text.plain.endswith("…")
    assert len(text.plain) < 6_000
    long = context_text(context(["x" * 10**6, "hit"], [1.0, 1.0], 1), scale=1.0, colour=False)
    assert len(long.plain) < 300
    assert "…" in long.plain
    assert len(shown(result([context(["x" * 10**6], [1.0], 0)] * 3), width=80, colour=True)) < 20_000


def test_show_writes_to_the_terminal_of_the_moment(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    answer = result([context(["a", "b"], [1.0, 2.0], 1)])
    answer.show()
    out = capsys.readouterr().out
    assert "«b»" in out
    assert "\x1b" not in out


def test_no_color_is_obeyed(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    console.print(result([context(["a", "b"], [2.0, 2.0], 1)]))
    assert "48;" not in console.file.getvalue()
    assert "‹a›«b»" in re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())


def test_a_notebook_displays_the_page_instead(monkeypatch):
    displayed = []
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    display.display = displayed.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    answer = result([context(["a", "b"], [1.0, 2.0], 1)])
    answer.show()
    assert displayed == [answer]
    assert "«b»" in shown(answer, width=80)
    assert displayed == [answer]


def texts(one, most=1000):
    return [(p.text, p.value, p.is_hit) for p in split_context(one, most=most)]


def test_tokens_are_laid_over_the_text():
    spaced = context(["the", "cat", "sat"], [1.0, 2.0, 3.0], 1, text="the  cat\nsat", span=(5, 8))
    assert texts(spaced) == [
        ("the", 1.0, False), ("  ", None, False), ("cat", 2.0, True), ("\n", None, False), ("sat", 3.0, False),
    ]  # fmt: skip
    words, values = ["[CLS]", "un", "##believ", "##able", "!"], [9.0, 1.0, 2.0, 3.0, 4.0]
    pieces = context(words, values, 3, text="Unbelievable!", span=(8, 12))
    assert texts(pieces) == [
        ("[CLS]", 9.0, False), ("Un", 1.0, False), ("believ", 2.0, False), ("able", 3.0, True), ("!", 4.0, False),
    ]  # fmt: skip
    halves = context(["a ", "\ufffd", "\ufffd", " b"], [1.0, -5.0, 2.0, 3.0], 2, text="a 漢 b", span=(2, 3))
    assert texts(halves) == [("a ", 1.0, False), ("漢", -5.0, True), (" b", 3.0, False)]
    cut = context(["\ufffd", "x"], [1.0, 2.0], 1, text="x", span=(0, 1))
    assert texts(cut) == [("\ufffd", 1.0, False), ("x", 2.0, True)]
    last = context(["x", "\ufffd", "\ufffd"], [1.0, 2.0, None], 0, text="x🙂", span=(0, 1))
    assert texts(last) == [("x", 1.0, True), ("🙂", 2.0, False)]


def test_where_the_text_does_not_fit_the_tokens_are_shown():
    changed = context(["naive", "cafe"], [1.0, 2.0], 1, text="naïve café", span=(6, 10))
    assert texts(changed) == [("naive", 1.0, False), ("cafe", 2.0, True)]
    elsewhere = context(["a", "b"], [1.0, 2.0], 0, text="xx ab", span=(0, 2))
    assert [t for t, _, _ in texts(elsewhere)] == ["a", "b"]


@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=20), st.data())
def test_pieces_joined_are_the_text(tokens, data):
    hit = data.draw(st.integers(0, len(tokens) - 1))
    values = data.draw(st.lists(st.none() | st.floats(), min_size=len(tokens), max_size=len(tokens)))
    one = context(tokens, values, hit)
    pieces = split_context(one, most=1000)
    assert "".join(p.text for p in pieces) == one["text"]
    assert sum(p.is_hit for p in pieces) == 1
    shades = context_text(one, scale=1.0, colour=False).plain
    assert not set(shades) & set("\x1b\x07\u202e\n\r\t\x00")


@given(st.integers(1, 60), st.integers(0, 59), st.integers(1, 20))
def test_pieces_around_the_hit_are_kept(n, hit, most):
    hit %= n
    pieces = split_context(context([f"<{i}>" for i in range(n)], [0.0] * n, hit), most=most)
    inner = [p for p in pieces if p != Piece("…", None, False, False)]
    assert len(inner) == min(n, most)
    assert [p.text for p in inner if p.is_hit] == [f"<{hit}>"]
    numbers = [int(p.text[1:-1]) for p in inner]
    assert numbers == list(range(numbers[0], numbers[0] + len(inner)))
    assert (pieces[0].text == "…") == (numbers[0] > 0)
    assert (pieces[-1].text == "…") == (numbers[-1] < n - 1)


def test_several_columns_of_contexts_are_shaded_alike():
    answer = result([context(["a"], [1.0], 0)])
    table = answer.table.append_column("other", answer.table["context"])
    console = Console(file=io.StringIO(), width=200)
    console.print(terminal_table(table, width=200))
    out = console.file.getvalue()
    assert out.count("value of each token") == 2
    assert "context: " in out
    assert "other: " in out


def test_nested_values_are_short_and_visible():
    assert plain([" a", "\x1b[2J", None, 0.1 + 0.2]) == "[' a', '\\x1b[2J', -, 0.3]"
    assert plain({"\x1bk": [{"v": 1}], "s": (1, 2)}) == "{\\x1bk: [{v: 1}], s: [1, 2]}"
    assert plain(b"\x1b") == "b'\\x1b'"
    assert plain(1 << 4000).endswith("…")
    for value in ([["x" * 10**5] * 10**4], [[1] * 10**6] * 3, {"k": "x" * 10**6}, "x" * 10**6):
        assert len(plain(value)) == 200
    assert plain(True) == "True"
    assert plain(None) == ""
