"""Which neurons respond to something that a few words can say?

For every neuron the rows of its strongest activations are found in one scan. A neuron has a story when those rows have
one thing in common (the token, the token before it, or the kind of document) and come from many documents. A story says
how many of the rows it explains, and how common the thing is anyway.

Only strongest activations are looked at, so a story is about them; a neuron may mean something else when it fires weakly.
Source: Bolukbasi et al. (2021), "An Interpretability Illusion for BERT", section 3.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .facts import NO_TOKEN, Bools, Ints, TokenFacts

TOP_ROWS = 200
"""Strongest rows looked at per neuron: the top 0.2 % of the demo's corpus."""

_MOST = 0.6
"""Share of the top rows that a token alone must explain."""
_HALF = 0.5
"""Share that the token before, or both tokens, must explain."""
_KIND = 0.9
"""Share that the kind of document must explain when no token does."""
_ANY_TOKEN = 0.2
"""At most this share on one token counts as "no token in particular"."""
_STRONGEST, _STRONGEST_FIT = 10, 0.8
"""Of the very strongest rows so many must fit too: a story that its first examples belie is none."""
_DOCUMENTS = 0.2
"""Documents among the top rows, per row: fewer, and the neuron knows a few documents by heart."""

QUOTAS = {"token": 3, "pair": 1, "after": 2, "kind": 1}
"""How many neurons of each pattern are shown."""


@dataclass(frozen=True, slots=True)
class Story:
    """What one neuron's strongest rows have in common."""

    hook_point: str
    neuron: int
    pattern: str
    """`token`: the token itself; `pair`: it and the one before; `after`: the one before; `kind`: the kind of document."""
    token: str | None
    previous: str | None
    kind: str | None
    share: float
    """Of the top rows: how many the pattern explains."""
    base_share: float
    """The same of all rows."""
    n_rows: int
    """Top rows looked at."""
    n_documents: int
    """Documents they come from."""

    @property
    def key(self) -> tuple[str | None, ...]:
        """What it is about: two neurons with one key tell the same story."""
        word = self.token if self.pattern in ("token", "pair") else self.previous
        return (None if word is None else word.strip(), self.kind)

    def sentence(self, *, quote: Any = repr) -> str:
        """The story in words; `quote` makes a token's text fit to print."""
        about = {
            "token": lambda: f"fires on {quote(self.token)}",
            "pair": lambda: f"fires on {quote(self.token)} after {quote(self.previous)}",
            "after": lambda: f"fires on whatever follows {quote(self.previous)}",
            "kind": lambda: f"fires in {self.kind} text, on no token in particular",
        }[self.pattern]()
        return (
            f"{about}: {self.share:.0%} of its {self.n_rows} strongest tokens, from {self.n_documents} documents "
            f"({self.base_share:.1%} of all tokens)"
        )


def top_rows(
    batches: Iterable[tuple[Ints, npt.NDArray[Any]]], facts: TokenFacts, *, k: int
) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Row numbers and activations of the `k` strongest shown rows of every neuron, strongest first.

    Returns:
        rows (k, d) int64 and values (k, d) float32; where a neuron has fewer than `k` positive activations the rest of
        its column is row -1 and value 0. Memory: one batch and 12 * k * d bytes.
    """
    best_rows_kd: Ints | None = None
    best_kd = np.zeros((0, 0), np.float32)
    for rows, acts_td in batches:
        if best_rows_kd is None:
            best_rows_kd = np.full((k, acts_td.shape[1]), -1, np.int64)
            best_kd = np.zeros((k, acts_td.shape[1]), np.float32)
        shown = facts.is_shown[facts.index(rows)]
        both = np.concatenate([best_kd, acts_td[shown]])
        keep_kd = np.argpartition(-both, k - 1, axis=0)[:k]
        best_kd = np.take_along_axis(both, keep_kd, axis=0)
        old_kd = np.take_along_axis(best_rows_kd, np.minimum(keep_kd, k - 1), axis=0)
        new_rows = np.concatenate([np.full(k, -1, np.int64), rows[shown]])
        best_rows_kd = np.where(keep_kd < k, old_kd, new_rows[keep_kd])
    if best_rows_kd is None:
        return np.empty((k, 0), np.int64), best_kd
    order_kd = np.argsort(-best_kd, axis=0, kind="stable")
    return np.take_along_axis(best_rows_kd, order_kd, axis=0), np.take_along_axis(best_kd, order_kd, axis=0)


def find_stories(hook_point: str, rows_kd: Ints, facts: TokenFacts) -> list[Story]:
    """Stories of the neurons of a hook point that have one, from the rows that `top_rows` found."""
    base = _Base.of(facts)
    found = []
    for neuron in np.flatnonzero((rows_kd >= 0).all(axis=0)):
        story = _story(hook_point, int(neuron), facts.index(rows_kd[:, neuron]), facts, base)
        if story is not None:
            found.append(story)
    return found


def choose_stories(stories: Iterable[Story], quotas: dict[str, int]) -> list[Story]:
    """The best stories of each pattern: largest share first, no two about one thing, layers taking turns."""
    left = sorted(stories, key=lambda s: (-round(s.share, 2), -s.n_documents, s.hook_point, s.neuron))
    chosen: list[Story] = []
    for pattern, quota in quotas.items():
        used: dict[str, int] = {}
        for _ in range(quota):
            taken = {story.key for story in chosen}
            fitting = [s for s in left if s.pattern == pattern and s.key not in taken]
            if not fitting:
                break
            story = min(fitting, key=lambda s: used.get(s.hook_point, 0))
            used[story.hook_point] = used.get(story.hook_point, 0) + 1
            chosen.append(story)
    return chosen


@dataclass(frozen=True, slots=True, eq=False)
class _Base:
    """How common tokens, pairs and kinds are among all shown rows, and which tokens are words."""

    tokens: Ints
    previous: Ints
    kinds: Ints
    pairs: dict[tuple[int, int], int]
    n_rows: int
    words: frozenset[int]
    """Readable tokens that letters seldom follow: " self", but not " re" of " returned"."""

    @classmethod
    def of(cls, facts: TokenFacts) -> "_Base":
        shown = facts.is_shown
        tokens, previous = facts.token_ids[shown], facts.previous_ids[shown]
        pairs, counts = np.unique(np.stack([previous, tokens], axis=1), axis=0, return_counts=True)
        return cls(
            tokens=np.bincount(tokens),
            previous=np.bincount(previous[previous != NO_TOKEN]),
            kinds=np.bincount(facts.kind_codes[shown]),
            pairs={(int(p), int(t)): int(n) for (p, t), n in zip(pairs, counts, strict=True)},
            n_rows=int(shown.sum()),
            words=_words(tokens, previous, facts.words),
        )


def _story(hook_point: str, neuron: int, at: Ints, facts: TokenFacts, base: _Base) -> Story | None:
    """The story of one neuron, whose top rows stand at `at` in the facts; None if they have nothing in common."""
    n_documents = len(np.unique(facts.doc_ids[at]))
    if n_documents < _DOCUMENTS * len(at):
        return None
    token, is_token = _commonest(facts.token_ids[at])
    before, is_before = _commonest(facts.previous_ids[at])
    kind, is_kind = _commonest(facts.kind_codes[at])
    is_pair = is_token & is_before
    inner = before != NO_TOKEN
    if inner and is_pair.mean() >= _HALF and _is_readable(facts.words[before] + facts.words[token]):
        pattern, fits, base_count = "pair", is_pair, base.pairs[before, token]
    elif is_token.mean() >= _MOST and token in base.words:
        pattern, fits, base_count = "token", is_token, int(base.tokens[token])
    elif inner and is_before.mean() >= _HALF > is_token.mean():
        pattern, fits, base_count = "after", is_before, int(base.previous[before])
    elif is_kind.mean() >= _KIND and max(is_token.mean(), is_before.mean()) <= _ANY_TOKEN:
        pattern, fits, base_count = "kind", is_kind, int(base.kinds[kind])
    else:
        return None
    if fits[:_STRONGEST].mean() < _STRONGEST_FIT:
        return None
    return Story(
        hook_point=hook_point,
        neuron=neuron,
        pattern=pattern,
        token=facts.words[token] if pattern in ("token", "pair") else None,
        previous=facts.words[before] if pattern in ("pair", "after") else None,
        kind=facts.kinds[kind] if pattern == "kind" else None,
        share=float(fits.mean()),
        base_share=base_count / base.n_rows,
        n_rows=len(at),
        n_documents=n_documents,
    )


def _commonest(values: Ints) -> tuple[int, Bools]:
    """The most frequent value (the smallest of equals) and where it stands."""
    found, counts = np.unique(values, return_counts=True)
    best = int(found[np.argmax(counts)])
    return best, values == best


def _words(tokens: Ints, previous: Ints, texts: dict[int, str]) -> frozenset[int]:
    begins_with_letter = np.array([texts.get(token, "")[:1].isalpha() for token in range(tokens.max() + 1)])
    inner = previous != NO_TOKEN
    followed = np.bincount(previous[inner], weights=begins_with_letter[tokens[inner]])
    counts = np.bincount(previous[inner])
    often = np.flatnonzero(followed > counts / 2)
    readable = {token for token, text in texts.items() if _is_readable(text)}
    return frozenset(readable - set(often.tolist()))


def _is_readable(word: str) -> bool:
    return sum(c.isalpha() for c in word) >= 2
