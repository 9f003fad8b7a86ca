"""Which latents of a dictionary are worth showing?

Those that fire neither hardly ever nor nearly everywhere, in many documents, and not on one token alone: a latent for a token
says what the embedding says already. Of these, the ones whose strongest tokens have one thing in common, as for neurons
(`actstore.ingest.demo.neurons`): what stands before them, a pair of tokens, or the kind of document.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from actstore.codes import Codes
from actstore.run import Run

from .facts import Ints, TokenFacts
from .neurons import Story, choose_stories, find_stories

N_LATENTS = 10
"""Latents that are shown."""

TOP_ROWS = 50
"""Strongest rows looked at of each: the rarest that are candidates fire on about 100."""

DENSITY = (0.001, 0.05)
"""Share of the tokens on which a candidate fires."""

LEAST_DOCUMENTS = 20
MOST_SINGLE_TOKEN = 0.5
"""Single-token score of a candidate, at most."""

CRITERION = (
    f"fires on {DENSITY[0]:.1%} to {DENSITY[1]:.0%} of the tokens, in at least {LEAST_DOCUMENTS} documents, no token alone has "
    f"more than {MOST_SINGLE_TOKEN:.0%} of its activation, and its {TOP_ROWS} strongest tokens have one thing in common"
)

_QUOTAS = {"pair": 3, "after": 4, "kind": 3, "token": 2}
_SPARE = 1.5
"""Rows read of each latent, per row wanted: some are special tokens or begin a window."""


def choose_latents(run: Run, dictionary: str, facts: TokenFacts) -> list[Story]:
    """Return at most `N_LATENTS` latents that meet `CRITERION`, each with what its strongest tokens have in common.

    `Story.neuron` is the latent's number, `Story.hook_point` the dictionary's.
    """
    where = (
        f"density BETWEEN {DENSITY[0]} AND {DENSITY[1]} AND n_docs >= {LEAST_DOCUMENTS} "
        f"AND single_token_score <= {MOST_SINGLE_TOKEN}"
    )
    found = run.latents(dictionary, k=None, where=where, order_by=None, columns=["n_docs"])
    candidates = [int(row["latent"]) for row in found]
    codes = run.codes(dictionary)
    rows_kd = strongest_rows(codes, candidates, facts, k=TOP_ROWS)
    stories = [_renamed(story, candidates) for story in find_stories(codes.hook_point, rows_kd, facts)]
    return fill_up(choose_stories(stories, _QUOTAS), stories)[:N_LATENTS]


def strongest_rows(codes: Codes, latents: Sequence[int], facts: TokenFacts, *, k: int) -> Ints:
    """Return the row numbers of each latent's `k` largest values, special tokens and windows' first ones left out.

    Returns:
        Shape (k, number of latents), strongest first; a latent with fewer such rows has -1 in the rest of its column.
    """
    postings = codes.postings()
    rows_kd = np.full((k, len(latents)), -1, np.int64)
    for column, latent in enumerate(latents):
        rows, _ = postings.top(latent, int(k * _SPARE))
        shown = rows[facts.is_shown[facts.index(rows)]][:k]
        rows_kd[: len(shown), column] = shown
    return rows_kd


def fill_up(chosen: Sequence[Story], stories: Iterable[Story]) -> list[Story]:
    """Return the chosen ones and, behind them, other stories about other things, those of the largest share first."""
    filled = list(chosen)
    for story in sorted(stories, key=lambda s: (-round(s.share, 2), -s.n_documents, s.neuron)):
        if story.key not in {other.key for other in filled}:
            filled.append(story)
    return filled


def _renamed(story: Story, latents: Sequence[int]) -> Story:
    """Return a story about a column as one about its latent."""
    return replace(story, neuron=latents[story.neuron])


def short(story: Story, quote: Callable[[str | None], str]) -> str:
    """Return a story in a few words, for a picture."""
    if story.pattern == "token":
        return quote(story.token)
    if story.pattern == "pair":
        return f"{quote(story.previous)} {quote(story.token)}"
    return f"after {quote(story.previous)}" if story.pattern == "after" else f"{story.kind} text"
