"""`examples` and `nearest` over int8 rows and over runs that keep a sample: the plain loop's answers, to the last row."""

import math

import numpy as np
import pytest

import actstore
from actstore.errors import ErrorKind, FormatError, NotFoundError
from actstore.sampling import Sample
from tests.query.make_store import add_run, is_kept, make_store, random_values
from tests.query.naive import dot, eligible, top

H = "layers.0.resid_post"
WIDTHS = {H: 12, "layers.1.mlp_act": 24}
SAMPLE = Sample(0.3, 5)
THIN = Sample(0.02, 1)
"""Keeps no row of some units."""

RUNS = ["int8", "sampled", "both", "thin"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    made = make_store(str(tmp_path_factory.mktemp("query") / "c.store"), seed=3, n_documents=36)
    values = random_values(6, WIDTHS, nonfinite=True, sinks=True)
    add_run(made, "int8", WIDTHS, values, dtype="int8")
    add_run(made, "sampled", WIDTHS, values, sample=SAMPLE)
    add_run(made, "both", WIDTHS, values, dtype="int8", codec="lz4", sample=SAMPLE)
    add_run(made, "thin", WIDTHS, random_values(7, WIDTHS), dtype="bfloat16", sample=THIN)
    return made


def score_of(metric, q):
    length = math.sqrt(dot(q, q))
    return {
        "ip": lambda a: dot(a, q),
        "cosine": lambda a: dot(a, q) / (math.sqrt(dot(a, a)) * length),
        "l2": lambda a: -math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, q, strict=True))),
    }[metric]


def test_the_runs_are_what_the_tests_need(made):
    rows = {name: {row for row, *_ in made.acts[name, H].items()} for name in RUNS}
    assert rows["int8"] == {t.row for t in made.tokens}
    assert rows["sampled"] == rows["both"] == {t.row for t in made.tokens if is_kept(t.row, SAMPLE)}
    assert any(unit.rows == 0 for unit in made.run("thin").collection.units.values())
    assert sum(np.isnan(a).all() for a in made.acts["int8", H].values()) > 0
    assert sum(np.isnan(a).any() != np.isnan(a).all() for a in made.acts["int8", H].values()) == 0


@pytest.mark.parametrize("name", RUNS)
def test_counts_of_rows(made, name):
    run, acts = made.run(name), made.run(name).activations(H)
    rows, values = made.matrix(H, name)
    assert run.n_rows == len(acts) == len(rows)
    assert acts.rows().tolist() == rows.tolist()
    assert acts[:].astype(np.float64).tobytes() == values.tobytes()
    assert run.examples(actstore.neuron(H, 1), 5).meta.mask[H]["n_rows"] == len(rows)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("sign", ["pos", "abs"])
def test_examples_against_a_plain_loop(made, name, sign):
    w = np.random.default_rng(len(name)).standard_normal(12)
    for target, value in (
        (actstore.neuron(H, 5), lambda a: a[5]),
        (actstore.direction(H, w), lambda a: dot(a, w)),
    ):
        result = made.run(name).examples(target, 25, sign=sign)
        rows = list(eligible(made, H, name))
        score = (lambda a, v=value: abs(v(a))) if sign == "abs" else value
        wanted = top(made, rows, score, 25)
        assert result.table["row"].to_pylist() == [row for row, _ in wanted]
        assert result.meta.n_eligible == len(rows)
        stored = [value(made.acts[name, H][row].astype(float)) for row, _ in wanted]
        assert result.table["value"].to_pylist() == pytest.approx(stored, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_nearest_against_a_plain_loop(made, name, metric):
    q = np.random.default_rng(len(metric)).standard_normal(12)
    result = made.run(name).nearest(H, q, 25, metric=metric)
    rows = list(eligible(made, H, name, zero=metric == "cosine"))
    wanted = top(made, rows, score_of(metric, q), 25)
    assert result.table["row"].to_pylist() == [row for row, _ in wanted]
    sign = -1 if metric == "l2" else 1
    assert result.table["value"].to_pylist() == pytest.approx([sign * s for _, s in wanted], rel=1e-12)


@pytest.mark.parametrize("name", RUNS)
def test_selections(made, name):
    """Few rows are read one by one, many by scanning their unit; rows that are not stored are no answers."""
    w = np.random.default_rng(0).standard_normal(12)
    target = actstore.direction(H, w)
    rows = [t.row for t in made.tokens]
    for chosen in (rows[:3], rows[70:72] + rows[200:280], rows[::2]):
        result = made.run(name).examples(target, 50, rows=chosen, fold=None)
        members = set(chosen)
        wanted = top(
            made,
            list(eligible(made, H, name, keep=lambda t: t.row in members)),  # noqa: B023
            lambda a: dot(a, w),
            50,
            None,
        )
        assert result.table["row"].to_pylist() == [row for row, _ in wanted]
    result = made.run(name).examples(target, 50, where="source = 'book'", docs=range(30), fold=None)
    keep = lambda t: made.metadata[t.doc_id]["source"] == "book" and t.doc_id < 30  # noqa: E731
    wanted = top(made, list(eligible(made, H, name, keep=keep)), lambda a: dot(a, w), 50, None)
    assert result.table["row"].to_pylist() == [row for row, _ in wanted]


@pytest.mark.parametrize("name", RUNS)
def test_context_values_are_null_where_no_row_is_stored(made, name):
    w = np.random.default_rng(1).standard_normal(12)
    stored, by_row = made.acts[name, H], made.by_row
    shown = n_null = 0
    for r in made.run(name).examples(actstore.direction(H, w), 20, before=6, after=4).to_dicts():
        context, first = r["context"], r["row"] - r["context"]["token_index"]
        assert context["values"][context["token_index"]] == r["value"]
        for i, value in enumerate(context["values"]):
            own, there = by_row[r["row"]], by_row[first + i]
            assert (own.doc_id, own.window) == (there.doc_id, there.window)
            shown += 1
            if first + i in stored and np.isfinite(stored[first + i]).all():
                assert value == pytest.approx(dot(stored[first + i].astype(float), w), rel=1e-12, abs=1e-12)
            else:  # None in JSON for NaN too
                n_null += value is None
    assert shown > 80
    assert (n_null > shown / 3) == (name != "int8")


def test_a_row_that_was_not_sampled_cannot_be_asked_for(made):
    run = made.run("both")
    stored = set(made.acts["both", H])
    row = next(t.row for t in made.tokens if t.row not in stored)
    for ask in (
        lambda: run.nearest(H, row),
        lambda: run.nearest(H, row, exclude_own_document=True),
        lambda: run.activations(H)[[row]],
    ):
        with pytest.raises(NotFoundError, match=rf"row {row} was not sampled") as error:
            ask()
        assert error.value.kind is ErrorKind.ROW_NOT_FOUND
    finite = (r for r, a in sorted(made.acts["both", H].items()) if np.isfinite(a).all() and a.any())
    row = next(finite)
    q = made.acts["both", H][row].astype(float)
    rows = [(t, a) for t, a in eligible(made, H, "both", zero=True) if t.row != row]
    found = run.nearest(H, row, 10).table["row"].to_pylist()
    assert found == [r for r, _ in top(made, rows, score_of("cosine", q), 10)]


@pytest.mark.parametrize("name", RUNS)
def test_a_sample_is_mentioned(made, name):
    warnings = made.run(name).examples(actstore.neuron(H, 1), 3).meta.warnings
    assert any("a sample of its rows" in w for w in warnings) == (name != "int8")


def test_a_result_with_nulls_is_shown(made):
    result = made.run("sampled").examples(actstore.neuron(H, 1), 3)
    assert None in result.to_dicts()[0]["context"]["values"]
    assert "<table" in result._repr_html_()
    assert str(result)
    assert len(result.to_pandas()) == 3


def test_a_unit_of_another_sample_is_noticed(made):
    """The manifest says how many rows a unit stores; the sample says how many it must."""
    run = made.run("sampled")
    config = {**run.collection.config, "sample": {"rate": 0.3, "seed": 6}}
    from dataclasses import replace

    other = replace(run, collection=replace(run.collection, config=config))
    with pytest.raises(FormatError, match="fsck"):
        other.examples(actstore.neuron(H, 1), 3)
