"""Which questions does the demo ask a store, and what does it say about the answers?"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

import actstore
from actstore.ingest.indexing import build_index

from . import show
from .directions import separate_kinds
from .facts import read_facts
from .neurons import QUOTAS, TOP_ROWS, Story, choose_stories, find_stories, top_rows

SQL = {
    "Words that each kind of text uses most": """
WITH words AS (
  SELECT d.kind, trim(t.token) AS word, count(*) AS n
  FROM tokens t JOIN documents d USING (corpus, doc_id)
  WHERE regexp_matches(t.token, '^ ?[A-Za-z]{3,}$') GROUP BY ALL)
SELECT kind, sum(n) AS n_words, array_to_string(list(word ORDER BY n DESC, word)[:9], ' ') AS commonest
FROM words GROUP BY kind ORDER BY kind""",
    "Documents that take most model windows": """
SELECT d.kind, d.module, d.name, count(*) AS n_tokens, max(t."window") + 1 AS n_windows
FROM tokens t JOIN documents d USING (corpus, doc_id)
GROUP BY ALL ORDER BY n_tokens DESC, d.name LIMIT 3""",
    "What is stored": """
SELECT kind, id, count(*) AS n_units, sum(rows) AS n_rows, round(sum(nbytes) / 1e6, 1) AS megabytes
FROM units WHERE kind IN ('corpus', 'tokenization', 'run') GROUP BY ALL ORDER BY kind, id""",
}

ROW_SQL = """
WITH words AS (
  SELECT token_id FROM tokens
  WHERE regexp_matches(token, '^ ?[A-Za-z]{2,}$') GROUP BY token_id
  ORDER BY count(*) >= 20 DESC, length(trim(any_value(token))) DESC, token_id LIMIT 1)
SELECT t.row FROM tokens t JOIN words USING (token_id)
ORDER BY t.window_position >= 12 DESC, t.row LIMIT 1"""
"""A row of a long word that is common, with a dozen tokens before it: easy to judge by eye."""

QUERY_TEXT = "if not isinstance(value, str):\n    raise"
_NEAREST = 20
_SHOWN = 4


def ask_sql(console: Console, store: actstore.Store) -> dict[str, list[dict[str, Any]]]:
    """Ask the SQL questions; returns the rows of each."""
    answers = {}
    for title, sql in SQL.items():
        show.query(console, f"-- {title}{sql}")
        result = store.sql(sql)
        show.answer(console, result)
        answers[title] = result.to_dicts()
    return answers


def ask_neurons(console: Console, store: actstore.Store, run: actstore.Run) -> list[dict[str, Any]]:
    """Find neurons that a few words describe, and show what most activates them."""
    stories = find_neurons(store, run)
    show.line(
        console,
        f"Of every MLP neuron of {run.id}, one scan keeps the {TOP_ROWS} strongest tokens. These neurons' have one thing in "
        "common (shading: activation):",
    )
    found = []
    for story in stories:
        target = actstore.neuron(story.hook_point, story.neuron)
        rows = run.examples(target, k=_SHOWN, fold="doc", before=12, after=5).to_dicts()
        console.print()
        show.line(
            console,
            f"{story.hook_point} neuron {story.neuron}: {story.sentence(quote=show.quote)}",
            style="bold",
        )
        show.contexts(console, rows)
        found.append({**asdict(story), "says": story.sentence(quote=show.quote), "examples": rows})
    if not stories:
        show.line(console, "none has: the models were trained for too few steps")
    return found


def find_neurons(store: actstore.Store, run: actstore.Run) -> list[Story]:
    """The neurons worth showing, one scan of every `mlp_act` hook point; see `actstore.ingest.demo.neurons`."""
    facts = read_facts(store, run)
    stories: list[Story] = []
    for hook_point in run.hook_points:
        if hook_point.endswith(".mlp_act"):
            rows_kd, _ = top_rows(run.activations(hook_point).scan(), facts, k=TOP_ROWS)
            stories += find_stories(hook_point, rows_kd, facts)
    return choose_stories(stories, QUOTAS)


def ask_direction(console: Console, store: actstore.Store, run: actstore.Run) -> dict[str, Any]:
    """Show a direction that is no neuron: from prose to code, and the docstrings that are most like code."""
    hook_point = middle_stream(run)
    found = separate_kinds(
        run.activations(hook_point).scan, read_facts(store, run), toward="source", away="topic"
    )
    direction = actstore.direction(hook_point, found.vector, name="source-minus-topic")
    console.print()
    show.line(
        console, f"{hook_point}: mean of source code minus mean of the language reference", style="bold"
    )
    show.line(
        console,
        f"Of {found.n_held_out:,} held-out tokens, {found.accuracy:.0%} are on their own kind's side (50% by chance). Asked "
        "with where=\"kind = 'docstring'\", which it never saw, it finds code inside docstrings:",
    )
    result = run.examples(direction, k=_SHOWN, where="kind = 'docstring'", fold="doc", before=12, after=5)
    show.contexts(console, result.to_dicts())
    return {
        "hook_point": hook_point,
        "accuracy": found.accuracy,
        "n_held_out": found.n_held_out,
        "examples": result.to_dicts(),
    }


def index_stream(console: Console, store: actstore.Store, run_id: str) -> dict[str, Any]:
    """Index the middle residual stream of a run, if that was not done yet, and say what it finds."""
    run = store.run(run_id)
    report = build_index(store, run_id, middle_stream(run))
    show.line(
        console,
        f"{middle_stream(run)} of {run_id} is indexed: {report.kind} ({'; '.join(report.why)}), {report.n_indexed:,} vectors, "
        f"{report.nbytes / 1e6:,.0f} MB; of the 10 nearest it finds {report.recall:.1%} if it looks everywhere, and each answer "
        "says what was measured for the part it looks at.",
    )
    return {
        "index": report.index,
        "kind": report.kind,
        "n_indexed": report.n_indexed,
        "recall": report.recall,
    }


def ask_nearest(console: Console, store: actstore.Store, runs: Sequence[actstore.Run]) -> dict[str, Any]:
    """Show the nearest contexts of a stored token, in both models, and of a text, and what comes next after such contexts."""
    run, other = runs[0], runs[-1]
    hook_point = middle_stream(run)
    row = int(store.sql(ROW_SQL).to_dicts()[0]["row"])
    own = run.nearest(hook_point, row, k=_NEAREST, exclude_own_document=True, before=12, after=5)
    theirs = other.nearest(hook_point, row, k=_NEAREST, exclude_own_document=True)
    shared = len({r["row"] for r in own} & {r["row"] for r in theirs})
    asked = run.examples(
        actstore.direction(hook_point, run.activations(hook_point)[row]), k=1, rows=[row], fold=None
    )
    token = asked.to_dicts()[0] if len(asked) else None
    show.line(console, f"{hook_point} of {run.id}, cosine to stored row {row}:", style="bold")
    if token is not None:
        show.contexts(console, [{**token, "value": 1.0}])
    show.line(console, "is nearest to")
    show.contexts(console, own.to_dicts()[:_SHOWN])
    show.line(
        console,
        f"Both models share row numbers: of the {_NEAREST} nearest in {run.id}, {shared} are also among those in {other.id}.",
    )
    console.print()
    show.line(console, f"The end of the text {show.quote(QUERY_TEXT)} is nearest to", style="bold")
    by_text = run.nearest(hook_point, QUERY_TEXT, k=_SHOWN, fold="doc", before=12, after=5)
    show.contexts(console, by_text.to_dicts())
    voted = run.knn_lm(QUERY_TEXT, k=256, n_tokens=_SHOWN).to_dicts()
    guesses = ", ".join(f"{show.quote(r['token'])} {r['p']:.0%} (model alone {r['p_lm']:.0%})" for r in voted)
    console.print()
    show.line(console, f"What followed such contexts, mixed with the model's own prediction: {guesses}")
    return {
        "hook_point": hook_point,
        "row": row,
        "by_row": own.to_dicts()[:_SHOWN],
        "shared_between_models": shared,
        "k": _NEAREST,
        "text": QUERY_TEXT,
        "by_text": by_text.to_dicts(),
        "next_tokens": voted,
    }


def middle_stream(run: actstore.Run) -> str:
    """The middle residual stream of a run: neither about the token itself nor about the next one alone."""
    points = [name for name in run.hook_points if name.endswith(".resid_post")]
    return points[len(points) // 2]
