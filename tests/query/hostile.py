"""Text that tries to act on a terminal or a page, and contexts of it; shared by the tests of what is shown."""

import pyarrow as pa

from actstore.query.context import CONTEXT_TYPE
from actstore.result import Meta, Result

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '" onmouseover="alert(1)', "</td></table><h1>",
    "</title></style><svg/onload=alert(1)>", "--><!-- ]]>", "javascript:alert(1)", "&lt;b&gt;&amp;", "</pre></details>",
    "\x1b]0;owned\x07", "\x1b[2J\x1b[31mred", "a\u202egnp.exe", "\u2066\u2069", "line\u2028break\r\nnew", "[bold red]x[/]",
    "zero\u200bwidth", "\x00nul", "\ufeffbom", "漢字 🙂 naïve", "\x9b31m", "\u0627\u0644\u0639", "e\u0301", "$x^2$ \\frac{",
]  # fmt: skip


def context(tokens, values, hit, *, text=None, span=None):
    """A context whose text is its tokens side by side, unless another is given."""
    start = sum(map(len, tokens[:hit]))
    start, stop = (start, start + len(tokens[hit])) if span is None else span
    return {
        "text": "".join(tokens) if text is None else text, "token_start": start, "token_end": stop,
        "tokens": list(tokens), "token_index": hit, "values": list(values),
    }  # fmt: skip


def result(contexts, **columns):
    """An answer with a column of contexts."""
    table = pa.table({**columns, "context": pa.array(contexts, CONTEXT_TYPE)})
    return Result(table, Meta(version=3, n_returned=len(contexts), request={"verb": "examples"}))
