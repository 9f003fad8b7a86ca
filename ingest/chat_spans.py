"""Where in a rendered conversation does the content of each message stand, exactly?

A chat template is a program: it may trim, reorder, drop or rewrite contents, and contents may repeat or look like the
template's own text, so searching for them finds wrong places. Instead the template renders the conversation again with a
private-use character, different for each message, put into each content. If taking these characters out gives the first
text back, they have shown where the contents are. White space at the edges of a content, which templates trim or not, is
measured by rendering the conversation without it, and the text between contents must then be spelt exactly by what the
template wrote there and what it kept. Whatever cannot be proved so is refused.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Render = Callable[[list[str]], str]
"""The text of the conversation whose messages have the given contents."""

Span = tuple[int, int]

_PLACES = (0.5, 0.25, 0.75, 0.0, 1.0)
"""Where in a content to put the character, as a share of its length: a template may look at its beginning, its end, or
for something in between (`startswith("<tool_response>")`), and then render the marked conversation differently."""

_PRIVATE = (range(0x100000, 0x10FFFE), range(0xF0000, 0xFFFFE))


class RenderError(ValueError):
    """The template refuses a conversation."""


class SpansNotProvedError(ValueError):
    """The template changes contents in a way that does not show where they are."""


@dataclass(frozen=True, slots=True)
class _Content:
    """One message's content: white space, core, white space. Of mere white space, all is `lead`."""

    lead: str
    core: str
    trail: str


@dataclass(frozen=True, slots=True)
class _Edge:
    """White space that the template may have kept."""

    message: int
    text: str
    side: str
    """lead, trail, or white: a content that is nothing else."""

    def kept(self, n: int) -> str | None:
        """Return what is there if `n` characters are: templates trim from outside. None if that cannot be."""
        if not 0 <= n <= len(self.text) or (self.side == "white" and n not in (0, len(self.text))):
            return None
        return self.text[len(self.text) - n :] if self.side == "lead" else self.text[:n]


def find_spans(contents: Sequence[str], text: str, render: Render) -> list[Span]:
    r"""Return the range of characters `[start, end)` of each content in the rendered text.

    A range covers what is left of its content after the template trimmed it. An empty content has an empty range.

    Args:
        contents: Content of each message.
        text: `render(contents)`.
        render: The template over everything in the conversation but the contents.

    Raises:
        SpansNotProvedError: the template drops, repeats or rewrites a content.

    >>> def render(contents):
    ...     return "".join(f"<user>{content.strip()}</user>" for content in contents)
    >>> contents = ["user", " user\n"]
    >>> find_spans(contents, render(contents), render)
    [(6, 10), (23, 27)]
    """
    parts = [_split(content) for content in contents]
    marks = _free_characters(len(contents), [text, *contents])
    for place in _PLACES:
        cuts = [int(len(part.core) * place) for part in parts]
        whole = [
            part.lead + _marked(part.core, mark, cut) + part.trail
            for part, mark, cut in zip(parts, marks, cuts, strict=True)
        ]
        found = _take_out(_try(render, whole), marks)
        if found is not None and found[0] == text:
            break
    else:
        raise SpansNotProvedError("the chat template drops, repeats or rewrites the content of a message")
    starts = {i: at - cuts[i] for i, at in found[1].items()}
    for i, part in enumerate(parts):
        if part.core and (i not in starts or not text.startswith(part.core, starts[i])):
            raise SpansNotProvedError(f"the chat template rewrites or leaves out the content of message {i}")
    if all(part.core and not part.lead and not part.trail for part in parts):
        return [(starts[i], starts[i] + len(part.core)) for i, part in enumerate(parts)]
    return _Edges(text, parts, starts, marks, cuts, render).find()


def _split(content: str) -> _Content:
    core = content.strip()
    if not core:
        return _Content(content, "", "")
    start = content.index(core)
    return _Content(content[:start], core, content[start + len(core) :])


def _free_characters(n: int, texts: Iterable[str]) -> str:
    """Return `n` private-use characters that are in none of the texts."""
    taken = {c for text in texts if not text.isascii() for c in text if c >= "\U000f0000"}
    free = (chr(i) for block in _PRIVATE for i in block if chr(i) not in taken)
    marks = "".join(itertools.islice(free, n))
    if len(marks) < n:
        raise SpansNotProvedError(f"{n} messages are more than can be told apart")
    return marks


def _marked(core: str, mark: str, cut: int) -> str:
    return f"{core[:cut]}{mark}{core[cut:]}" if core else ""


def _try(render: Render, contents: list[str]) -> str | None:
    try:
        return render(contents)
    except RenderError:
        return None  # a template may check contents; then another place for the marks may do


def _take_out(marked: str | None, marks: str) -> tuple[str, dict[int, int]] | None:
    """Return a text without its marks, and where each stood in it, by message; None where one is there twice."""
    if marked is None:
        return None
    pieces = re.split(f"([{marks}])", marked)
    messages = {mark: i for i, mark in enumerate(marks)}
    text, at, found = [], 0, {}
    for piece, mark in itertools.zip_longest(pieces[::2], pieces[1::2]):
        text.append(piece)
        at += len(piece)
        if mark is not None:
            if messages[mark] in found:
                return None
            found[messages[mark]] = at
    return "".join(text), found


@dataclass(slots=True)
class _Edges:
    """Finds how much white space the template kept at the edges of contents whose cores are known."""

    text: str
    parts: list[_Content]
    starts: Mapping[int, int]
    """Where the core of each message that has one begins in `text`."""

    marks: str
    cuts: list[int]
    render: Render
    spans: dict[int, Span] = field(default_factory=dict)

    def find(self) -> list[Span]:
        """Return the spans of all messages."""
        white = {i for i, part in enumerate(self.parts) if not part.core}
        for shown in (white, {i for i in white if self.parts[i].lead}, set[int]()):
            self.spans = {i: (at, at + len(self.parts[i].core)) for i, at in self.starts.items()}
            if self._fit(shown):
                return self._all()
        raise SpansNotProvedError(
            "the chat template changes the white space around contents in a way that does not show where they are"
        )

    def _all(self) -> list[Span]:
        """Return the spans in order; a content of which nothing is left, nor its place, stands behind the one before."""
        found: list[Span] = []
        for i in range(len(self.parts)):
            end = found[-1][1] if found else 0
            found.append(self.spans.get(i, (end, end)))
        return found

    def _fit(self, shown: set[int]) -> bool:
        """Compare the text with that of the bare cores, gap by gap; return whether every gap is accounted for.

        A mark in a content without a core shows where it stands, unless the template then treats the message otherwise;
        `shown` says which of them get one.
        """
        contents = [
            _marked(part.core, self.marks[i], self.cuts[i]) or (self.marks[i] if i in shown else "")
            for i, part in enumerate(self.parts)
        ]
        found = _take_out(_try(self.render, contents), self.marks)
        if found is None:
            return False
        bare, at = found
        places = sorted((at[i] - self.cuts[i], i) for i in at)
        if [i for _, i in places if self.parts[i].core] != sorted(self.starts, key=self.starts.__getitem__):
            return False
        edges, segments = [_Edge(-1, "", "trail")], []
        text_at = bare_at = 0
        for place, i in places:
            segments.append(bare[bare_at:place])
            part = self.parts[i]
            if not part.core:
                edges.append(_Edge(i, part.lead, "white"))
                bare_at = place
                continue
            edges.append(_Edge(i, part.lead, "lead"))
            if not self._fill(text_at, self.starts[i], edges, segments):
                return False
            text_at, bare_at = self.starts[i] + len(part.core), place + len(part.core)
            edges, segments = [_Edge(i, part.trail, "trail")], []
        return self._fill(
            text_at, len(self.text), [*edges, _Edge(-1, "", "lead")], [*segments, bare[bare_at:]]
        )

    def _fill(self, start: int, stop: int, edges: list[_Edge], segments: list[str]) -> bool:
        """Spell `text[start:stop]` by the edges, as far as kept, and the template's segments between them."""
        n_kept = stop - start - sum(map(len, segments))
        kept = [edge.kept(n) for edge, n in zip(edges, self._counts(edges, n_kept), strict=True)]
        at = start
        for edge, text, segment in zip(edges, kept, [*segments, ""], strict=True):
            if text is None or self.text[at : at + len(text) + len(segment)] != text + segment:
                return False
            if edge.message >= 0:
                known = self.spans.get(edge.message, (at, at))
                self.spans[edge.message] = (min(known[0], at), max(known[1], at + len(text)))
            at += len(text) + len(segment)
        return at == stop

    def _counts(self, edges: list[_Edge], n_kept: int) -> list[int]:
        """Return how many characters of each edge are kept, if `n_kept` are in all."""
        sizes = [len(edge.text) for edge in edges]
        if n_kept == sum(sizes):
            return sizes
        if n_kept == 0 or sum(map(bool, sizes)) == 1:
            return [n_kept if size else 0 for size in sizes]
        return [self._kept_alone(edge) if edge.text else 0 for edge in edges]

    def _kept_alone(self, edge: _Edge) -> int:
        """Return how much longer the text of the bare cores is with this one edge."""
        cores = [part.core for part in self.parts]
        without = _try(self.render, cores)
        core = cores[edge.message]
        cores[edge.message] = core + edge.text if edge.side == "trail" else edge.text + core
        with_edge = _try(self.render, cores)
        return -1 if without is None or with_edge is None else len(with_edge) - len(without)
