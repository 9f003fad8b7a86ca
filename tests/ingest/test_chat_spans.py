"""Are the spans of messages exactly where the template put their contents, and is every doubt refused?

The oracle is a template written in Python, which notes where it writes each content.
"""

import itertools
import re
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actstore.ingest.chat_spans import RenderError, SpansNotProvedError, find_spans

MARKUP = [
    "<u>",
    "</u>",
    "\n",
    " ",
    "\n\n",
    "a",
    "ab",
    "\t",
    "é",
    "🎉",
    "<|im_end|>",
    "\U00100000",
    "\u3000",
    "\x1c",
]
CONTENTS = st.lists(
    st.lists(st.sampled_from(MARKUP), max_size=5).map("".join) | st.text(max_size=6), min_size=1, max_size=6
)

Template = Callable[[list[str]], tuple[str, list[tuple[int, int]]]]


def template(piece: Callable[[int, str], tuple[str, str, str]]) -> Template:
    """Return a template that writes `before`, the kept content and `after` of each message, and where the content is."""

    def render(contents: list[str]) -> tuple[str, list[tuple[int, int]]]:
        text, spans = "<start>", []
        for i, content in enumerate(contents):
            before, kept, after = piece(i, content)
            start = len(text) + len(before)
            spans.append((start, start + len(kept)))
            text += before + kept + after
        return text + "\n", spans

    return render


TEMPLATES = {
    "plain": template(lambda i, c: (f"<u{i}>", c, "</u>")),
    "trimmed": template(lambda i, c: ("<u>\n", c.strip(), "\n</u>\n")),
    "bare line breaks": template(lambda i, c: ("\n", c, "\n")),
    "trimmed in line breaks": template(lambda i, c: ("\n", c.strip(), " \n ")),
    "nothing between": template(lambda i, c: ("", c, "")),
    "nothing between, trimmed": template(lambda i, c: ("", c.strip(), "")),
    "left": template(lambda i, c: (" ", c.lstrip(), "\n")),
    "right": template(lambda i, c: ("\n", c.rstrip(), "\n")),
    "some line breaks": template(lambda i, c: ("\n", c.strip("\n"), "\n")),
    "every other": template(lambda i, c: ("\n", c.strip() if i % 2 else c, "\n")),
    "only the first": template(lambda i, c: ("\n", c if i else c.strip(), "\n")),
    "skips empty": template(lambda i, c: ("<u>", c, "</u>") if c else ("", "", "")),
    "skips white": template(lambda i, c: ("<u>", c.strip(), "</u>\n") if c.strip() else ("", "", "")),
    "by beginning": template(
        lambda i, c: ("<tool>", c, "</tool>") if c.startswith("<u>") else ("<u>", c, "")
    ),
    "by end": template(lambda i, c: ("<tool>", c, "</tool>") if c.endswith("</u>") else ("<u>", c, "")),
    "by what it holds": template(
        lambda i, c: ("<think>", c, "</think>") if "</u>" in c else ("<u>", c, "\n")
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(CONTENTS)
@example(["a", "a", "a"])
@example(["", "", ""])
@example([" \n", "a ", "\n a"])
@example(["a\n", "\nb\n", "\n"])
@example(["\U00100000\U00100001", "\U00100002"])
@example(["</u>", "<u>", "</u><u>"])
def test_spans_are_where_the_template_wrote(name, contents):
    write = TEMPLATES[name]
    text, expected = write(contents)
    try:
        found = find_spans(contents, text, lambda changed: write(changed)[0])
    except SpansNotProvedError:
        # Refusing is never wrong, but only templates that look into contents, or trim a part of the white space, may need it.
        assert name in ("some line breaks", "by beginning", "by end", "by what it holds")
        return
    for content, (start, end), (true_start, true_end) in zip(contents, found, expected, strict=True):
        if true_start == true_end:
            assert start == end
        else:
            assert (start, end) == (true_start, true_end)
            assert text[start:end] in content
    filled = sorted((s, e) for s, e in found if s < e)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(filled))


@settings(max_examples=100, deadline=None)
@given(CONTENTS, st.sampled_from(["upper", "escape", "twice", "drop", "replace", "cut", "title"]))
def test_rewritten_contents_are_refused_or_the_spans_hold_what_is_left(contents, how):
    change = {
        "upper": str.upper,
        "escape": lambda c: c.replace("&", "&amp;").replace("<", "&lt;"),
        "twice": lambda c: c + c,
        "drop": lambda c: "",
        "replace": lambda c: c.replace("a", "bb"),
        "cut": lambda c: c[:1],
        "title": lambda c: c[:1].upper() + c[1:],
    }[how]

    def render(changed: list[str]) -> str:
        return "".join(f"<m>{change(c)}</m>" for c in changed)

    text = render(contents)
    try:
        found = find_spans(contents, text, render)
    except SpansNotProvedError:
        # Spans are proved by marks put into the contents: a template that alters only these is no more to be trusted.
        assert any(change(c) != c or change(f"{c}\ue000") != f"{c}\ue000" for c in contents)
        return
    for content, (start, end) in zip(contents, found, strict=True):
        assert text[start:end].strip() == content.strip()
        assert text[:start].endswith("<m>") or start == end or text[start:end] != content


def test_dropped_repeated_and_refused_contents():
    contents = ["first", "second"]
    for render in (
        lambda c: f"<m>{c[0]}</m>",
        lambda c: f"<m>{c[0]}</m><m>{c[1]}</m>{c[1]}",
        lambda c: f"<m>{c[0].upper()}</m><m>{c[1]}</m>",
        lambda c: f"{len(c[0])}{c[1]}",
    ):
        with pytest.raises(SpansNotProvedError):
            find_spans(contents, render(contents), render)

    def strict(changed: list[str]) -> str:
        if any(not re.fullmatch("[a-z]*", c) for c in changed):
            raise RenderError("letters only")
        return "".join(changed)

    with pytest.raises(SpansNotProvedError):
        find_spans(contents, strict(contents), strict)


def test_reordered_messages_keep_their_spans():
    def render(changed: list[str]) -> str:
        return f"<s>{changed[-1]}</s>" + "".join(f"<m>{c}</m>" for c in changed[:-1])

    contents = ["user", " user ", "system"]
    text = render(contents)
    assert [text[a:b] for a, b in find_spans(contents, text, render)] == contents


def test_long_conversations_take_two_renderings():
    calls = []

    def render(changed: list[str]) -> str:
        calls.append(1)
        return "".join(f"<m>{c}</m>" for c in changed)

    contents = [f"message {i % 7}" for i in range(2_000)]
    text = render(contents)
    spans = find_spans(contents, text, render)
    assert [text[a:b] for a, b in spans] == contents
    assert len(calls) == 2
