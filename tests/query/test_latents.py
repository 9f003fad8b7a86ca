"""Searching latents by statistics and tokens, against pandas over statistics worked out one latent at a time."""

import json
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from actstore.cli import main
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from tests.query import make_codes
from tests.query.make_codes import naive_stats
from tests.query.make_store import WORDS, add_run, make_store, random_values


@pytest.fixture(scope="module")
def frame(coded):
    return naive_stats(coded["sae"], 0, 60).to_pandas()


def numbers(result):
    return result.table["latent"].to_pylist()


@pytest.mark.parametrize(
    ("where", "query"),
    [
        (None, None),
        ("density > 0.02 AND max >= 2", "density > 0.02 and max >= 2"),
        ("n_docs BETWEEN 3 AND 20 OR latent IN (1, 2)", "3 <= n_docs <= 20 or latent in [1, 2]"),
        ("is_dead", "is_dead"),
        ("NOT is_dead -- a comment", "not is_dead"),
        ("list_max(quantiles) > 1.6", "quantile > 1.6"),
        ("max IS NULL", "max != max"),
    ],
)
def test_where_and_order(coded, frame, where, query):
    run = coded["sae"].made.run()
    table = frame.assign(quantile=[np.nan if q is None else max(q) for q in frame["quantiles"]])
    kept = table if query is None else table.query(query)
    for mask_dead in (None, True, False):
        hides = mask_dead or (mask_dead is None and "is_dead" not in (where or ""))
        rows = kept[~kept["is_dead"]] if hides else kept
        for order_by, columns, ascending in (
            ("density DESC", ["density", "latent"], [False, True]),
            ("max, n_docs DESC", ["max", "n_docs", "latent"], [True, False, True]),
            (None, ["latent"], [True]),
            ("single_token_score DESC NULLS LAST", ["single_token_score", "latent"], [False, True]),
        ):
            wanted = rows.sort_values(columns, ascending=ascending, na_position="last")["latent"].tolist()
            result = run.latents("sae", where=where, order_by=order_by, k=None, mask_dead=mask_dead)
            assert numbers(result) == wanted
            assert (
                numbers(run.latents("sae", where=where, order_by=order_by, k=3, mask_dead=mask_dead))
                == wanted[:3]
            )
            assert result.meta.n_eligible == len(wanted)


def test_columns(coded, frame):
    run = coded["sae"].made.run()
    result = run.latents("sae", k=None, order_by=None, mask_dead=False)
    for name in (
        "n_tokens", "n_docs", "density", "doc_density", "mean", "max", "max_row", "single_token_score", "is_dead",
        "is_ultra_dense",
    ):  # fmt: skip
        told = pd.Series(result.table[name].to_pylist(), name=name, dtype=frame[name].dtype)
        pd.testing.assert_series_equal(told, frame[name])
    for name in ("top_tokens_by_mean", "top_tokens_by_count"):
        assert result.table[name].to_pylist() == [
            [WORDS[t["token_id"]] for t in tops] for tops in frame[name]
        ]
    assert set(result.table["promoted"].to_pylist()) == {None}
    raw = run.latents("sae", k=2, columns=["quantiles", "hist_counts"])
    assert raw.table.column_names == ["rank", "latent", "quantiles", "hist_counts"]
    assert len(run.latents("sae", where="max > 1e9")) == 0


def test_tokens(coded, frame):
    run = coded["sae"].made.run()

    def tops(latent):
        both = [*frame["top_tokens_by_mean"][latent], *frame["top_tokens_by_count"][latent]]
        return {WORDS[t["token_id"]] for t in both}

    for word in ("cat", " cat ", "漢字", "w2", "absent"):
        wanted = [f for f in range(60) if word.strip() in tops(f)]
        assert numbers(run.latents("sae", k=None, top_token=word, order_by=None)) == wanted
    for pattern in ("^w1", "cat|dog", "[<>]"):
        wanted = [f for f in range(60) if any(re.search(pattern, t) for t in tops(f))]
        result = run.latents("sae", k=None, top_token_regex=pattern, order_by=None)
        assert numbers(result) == wanted
        assert result.meta.mask["removed"]["top_token_regex"] == 60 - result.meta.mask["removed"][
            "dead"
        ] - len(wanted)
    both = run.latents(
        "sae", k=None, top_token="cat", top_token_regex="^w1", where="density < 0.1", order_by=None
    )
    assert numbers(both) == [
        f for f in range(60)
        if "cat" in tops(f) and any(t.startswith("w1") for t in tops(f)) and frame["density"][f] < 0.1
    ]  # fmt: skip
    assert numbers(run.latents("sae", promotes="cat")) == []  # no model is behind these codes


def test_promoted_vocabulary(tmp_path, monkeypatch):
    """Statistics with vocabulary, as a model's unembedding gives them: some lists empty, some null, tokens of odd text."""
    rng = np.random.default_rng(4)
    plain = make_codes.naive_stats
    lists = [
        None if i % 7 == 3 else [{"token_id": int(t), "token": f" {WORDS[t]}", "logit": 1.0} for t in rng.integers(0, 20, i % 5)]
        for i in range(40)
    ]  # fmt: skip

    def with_vocabulary(told, first, stop):
        table = plain(told, first, stop)
        at = table.schema.get_field_index("promoted")
        return table.set_column(at, "promoted", pa.array(lists[first:stop], table.schema.field(at).type))

    monkeypatch.setattr(make_codes, "naive_stats", with_vocabulary)
    made = make_store(str(tmp_path / "s"), n_documents=10)
    widths = {"layers.0.resid_post": 4}
    add_run(made, "run", widths, random_values(0, widths))
    make_codes.add_codes(
        made, make_codes.random_codes(len(make_codes.stored_rows(made, "run")), 40), n_segments=4
    )
    run = made.run()
    result = run.latents("sae", k=None, order_by=None, mask_dead=False)
    texts = [None if told is None else [t["token"] for t in told] for told in lists]
    assert result.table["promoted"].to_pylist() == texts
    for word in ("cat", " cat", "漢字", "zebra"):
        wanted = [i for i, told in enumerate(texts) if f" {word.strip()}" in (told or [])]
        assert numbers(run.latents("sae", k=None, promotes=word, order_by=None, mask_dead=False)) == wanted
    wanted = [i for i, told in enumerate(texts) if any(re.search("^ w[0-3]$", t) for t in told or [])]
    found = run.latents("sae", k=None, promotes_regex="^ w[0-3]$", order_by=None, mask_dead=False)
    assert numbers(found) == wanted
    assert wanted


def test_chosen_latents_and_masks(coded, frame):
    run = coded["sae"].made.run()
    dead = frame["latent"][frame["is_dead"]].tolist()
    assert numbers(run.latents("sae", latents=[5, 3, *dead], order_by=None)) == sorted([5, 3, *dead])
    kept = frame[(frame["density"] >= 0.01) & (frame["density"] <= 0.1)]["latent"].tolist()
    result = run.latents("sae", k=None, density=(0.01, None), mask_ultra_dense=True, order_by=None)
    assert numbers(result) == kept
    assert result.meta.mask["max_density"] == 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"where": "density > 0 LIMIT 1"},
        {"where": "1 = 1) OR (SELECT true"},
        {"where": "latent IN (SELECT latent FROM latents)"},
        {"where": "true) ORDER BY (1"},
        {"where": "density > 0; DROP VIEW latents"},
        {"where": "read_text('/etc/passwd') = ''"},
        {"where": "random() < 0.5"},
        {"where": ""},
        {"where": "nothing > 1"},
        {"where": "sum(density) > 1"},
        {"where": 5},
        {"order_by": "unnest(quantiles)"},
        {"order_by": "density LIMIT 1"},
        {"order_by": "density) UNION SELECT 1 --"},
        {"order_by": "(SELECT 1)"},
        {"order_by": "random()"},
        {"order_by": "nothing"},
        {"order_by": 3},
    ],
)
def test_sql_that_is_more_than_a_condition(coded, options):
    with pytest.raises(InvalidInputError) as caught:
        coded["sae"].made.run().latents("sae", **options)
    assert caught.value.kind == ErrorKind.BAD_SQL


def test_errors(coded):
    run = coded["sae"].made.run()
    for error, options in (
        (NotFoundError, {"latents": [60]}),
        (InvalidInputError, {"latents": [0.5]}),
        (InvalidInputError, {"latents": [[1], [1, 2]]}),
        (InvalidInputError, {"top_token_regex": "\ud800"}),
        (InvalidInputError, {"top_token": "\ud800"}),
        (InvalidInputError, {"top_token_regex": "("}),
        (InvalidInputError, {"top_token": 3}),
        (InvalidInputError, {"k": 0}),
        (InvalidInputError, {"columns": ["nothing"]}),
    ):
        with pytest.raises(error):
            run.latents("sae", **options)
    with pytest.raises(NotFoundError, match="postings"):
        run.latents("bare")
    with pytest.raises(NotFoundError, match="encoded with"):
        run.latents("absent")


def test_command(coded, capsys):
    made = coded["sae"].made
    command = [
        "latents",
        made.url,
        "run",
        "sae",
        "-k",
        "3",
        "--where",
        "density < 0.1",
        "--order-by",
        "max DESC",
    ]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    wanted = made.run().latents("sae", k=3, where="density < 0.1", order_by="max DESC")
    assert answer["rows"] == json.loads(wanted.to_json())["rows"]
    assert main(["latents", made.url, "run", "sae", "--top-token", "cat"]) == 0
    assert "latents: " in capsys.readouterr().out
