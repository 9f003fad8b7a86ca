"""Examples of latents worked out the slow and plain way: every row's code, one token after another."""

import numpy as np

from tests.query.make_codes import MadeCodes
from tests.query.naive import context_key

SINK_RATIO = 10


def norm_limit(told: MadeCodes, hook_point: str) -> float:
    """Ten times the median norm, as the run's statistics have it (within 1 % of the exact median)."""
    return SINK_RATIO * told.made.run(told.run).stats(hook_point).norm_quantile(0.5)


def eligible_rows(
    told: MadeCodes, hook_point: str, *, special=True, sinks=True, keep=lambda token: True
) -> list[int]:
    """Rows that pass the masks, whether anything fires there or not."""
    limit = norm_limit(told, hook_point)
    tokens = told.made.by_row
    rows = []
    for row, norm in zip(told.rows.tolist(), told.norms.tolist(), strict=True):
        token = tokens[row]
        if not keep(token) or (special and token.is_special):
            continue
        if sinks and (token.window_position == 0 or norm > limit):
            continue
        rows.append(row)
    return rows


def fold_key(told: MadeCodes, row: int, fold: str | None):
    token = told.made.by_row[row]
    if fold is None:
        return row
    return token.doc_id if fold == "doc" else context_key(told.made, token)


def ranked(told: MadeCodes, latent: int, rows: list[int], fold: str | None) -> list[tuple[int, float]]:
    """(row, value) of the rows on which the latent fires, by falling value and rising row, the first of each key."""
    where = {row: i for i, row in enumerate(told.rows.tolist())}
    column = told.column(latent)
    firing = [(row, float(column[where[row]])) for row in rows if column[where[row]] > 0]
    firing.sort(key=lambda pair: (-pair[1], pair[0]))
    seen, found = set(), []
    for row, value in firing:
        key = fold_key(told, row, fold)
        if key not in seen:
            seen.add(key)
            found.append((row, value))
    return found


def count_firing(told: MadeCodes, latent: int, rows: list[int]) -> int:
    fires = set(told.firing(latent)[0].tolist())
    return sum(row in fires for row in rows)


def check_rows(told: MadeCodes, latent: int, result, wanted: list[tuple[int, float]]) -> None:
    """Compare an answer, contexts included, with (row, value) pairs."""
    rows = result.to_dicts()
    assert [(r["row"], r["value"]) for r in rows] == wanted
    assert [r["rank"] for r in rows] == list(range(1, len(rows) + 1))
    for r in rows:
        check_context(told, latent, r)


def check_context(told: MadeCodes, latent: int, r: dict, before: int = 16, after: int = 8) -> None:
    """Compare one row's context with the tokens of its window and the latent's value on each."""
    from tests.query.make_store import WORDS

    made = told.made
    token, context = made.by_row[r["row"]], r["context"]
    assert (r["doc_id"], r["position"], r["token_id"]) == (token.doc_id, token.position, token.token_id)
    assert r["token"] == WORDS[token.token_id]
    low, high = token.window_position - before, token.window_position + after
    first = token.row - min(before, token.window_position)
    shown = [made.by_row.get(row) for row in range(first, token.row + after + 1)]
    shown = [
        t for t in shown
        if t and (t.doc_id, t.window) == (token.doc_id, token.window) and low <= t.window_position <= high
    ]  # fmt: skip
    assert context["tokens"] == [WORDS[t.token_id] for t in shown]
    assert shown[context["token_index"]].row == token.row
    stored = set(told.rows.tolist())
    assert context["values"] == [told.value(t.row, latent) if t.row in stored else None for t in shown]
    plain = [t for t in shown if not t.is_special]
    text = made.texts[token.doc_id]
    whole = text[plain[0].char_start : plain[-1].char_end] if plain else ""
    assert context["text"] == whole
    if not token.is_special:
        cut = context["text"][context["token_start"] : context["token_end"]]
        assert cut == text[token.char_start : token.char_end]


def densest(told: MadeCodes) -> int:
    return int(np.argmax(np.diff(told.matrix.tocsc().indptr)))
