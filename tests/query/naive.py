"""The questions answered the slow and plain way: one token after another, with Python's own exact sums."""

import json
import math

import numpy as np

from tests.query.make_store import Made

_KEYS: dict[int, tuple[Made, dict[int, tuple[int, ...]]]] = {}
"""By identity, of what is kept alive here: another store could be made at the same place."""


def context_key(made: Made, token) -> tuple[int, ...]:
    """Token ids of the last eight tokens of the window, up to and including this one."""
    if id(made) not in _KEYS:
        windows: dict[tuple[int, int], list] = {}
        for t in made.tokens:
            windows.setdefault((t.doc_id, t.window), []).append(t)
        keys = {
            t.row: tuple(o.token_id for o in window if o.window_position <= t.window_position)[-8:]
            for window in windows.values()
            for t in window
        }
        _KEYS[id(made)] = (made, keys)
    return _KEYS[id(made)][1][token.row]


def eligible(
    made: Made,
    hook_point: str,
    run: str = "run",
    *,
    special=True,
    sinks=True,
    zero=False,
    keep=lambda token: True,
):
    """Yield (token, acts) of the rows that may be answers."""
    stored = made.acts[run, hook_point]
    norms = [float(np.linalg.norm(a.astype(np.float64))) for a in stored.values() if np.isfinite(a).all()]
    limit = 10 * float(np.median(norms))
    for token in made.tokens:
        acts = stored.get(token.row)
        if acts is None or not np.isfinite(acts).all() or not keep(token):
            continue
        norm = float(np.linalg.norm(acts.astype(np.float64)))
        if (special and token.is_special) or (sinks and (token.window_position == 0 or norm > limit)):
            continue
        if zero and norm == 0:
            continue
        yield token, acts.astype(np.float64)


def top(made: Made, rows, score, k: int, fold: str | None = "context"):
    """Return (row, score) of the best k after folding; `score` gives None for a row that is no answer."""
    scored = [(score(acts), token) for token, acts in rows]
    scored = sorted(((s, t) for s, t in scored if s is not None), key=lambda pair: (-pair[0], pair[1].row))
    seen, best = set(), []
    for s, token in scored:
        key = {
            None: token.row,
            "doc": token.doc_id,
            "context": context_key(made, token) if fold == "context" else 0,
        }[fold]
        if key not in seen:
            seen.add(key)
            best.append((token.row, s))
    return best[:k]


def dot(a, b) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def same(a, b) -> bool:
    """Whether two answers are equal, NaN and all."""
    return json.dumps(a) == json.dumps(b)
