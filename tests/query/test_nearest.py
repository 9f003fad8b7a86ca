import math

import faiss
import numpy as np
import pytest

import actstore
from actstore.errors import InvalidInputError, NotFoundError
from tests.query.naive import dot, eligible, same, top

H = "layers.0.resid_post"


def score_of(metric, q):
    """The plain score of a row, larger is nearer."""
    length = math.sqrt(dot(q, q))
    return {
        "ip": lambda a: dot(a, q),
        "cosine": lambda a: dot(a, q) / (math.sqrt(dot(a, a)) * length),
        "l2": lambda a: -math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, q, strict=True))),
    }[metric]


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("fold", ["context", "doc", None])
def test_against_a_plain_loop(made, metric, fold):
    q = np.random.default_rng(len(metric)).standard_normal(12)
    result = made.run().nearest(H, q, 25, metric=metric, fold=fold)
    rows = list(eligible(made, H, zero=metric == "cosine"))
    wanted = top(made, rows, score_of(metric, q), 25, fold)
    assert result.table["row"].to_pylist() == [row for row, _ in wanted]
    sign = -1 if metric == "l2" else 1
    assert result.table["value"].to_pylist() == pytest.approx([sign * s for _, s in wanted], rel=1e-12)
    assert result.meta.n_eligible == len(rows)
    assert result.meta.exact
    assert result.meta.recall == 1.0


@pytest.mark.parametrize(
    ("metric", "index"), [("ip", faiss.IndexFlatIP), ("l2", faiss.IndexFlatL2), ("cosine", faiss.IndexFlatIP)]
)
@pytest.mark.parametrize("run", ["half", "run"])
def test_against_faiss(made, metric, index, run):
    """Brute force of an independent library, many queries at once, without masks."""
    h = "layers.1.mlp_act"
    rows, acts = made.matrix(h, run)
    good = np.isfinite(acts).all(axis=1) & (acts.any(axis=1) | (metric != "cosine"))
    rows, acts = rows[good], acts[good]
    queries = np.random.default_rng(7).standard_normal((9, 24))
    result = made.run(run).nearest(
        h, queries, 12, metric=metric, fold=None, mask_special=False, mask_sinks=False, before=0, after=0
    )

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    prepared = unit if metric == "cosine" else (lambda x: x)
    flat = index(24)
    flat.add(prepared(acts).astype(np.float32))
    distances, found = flat.search(prepared(queries).astype(np.float32), 12)
    table = result.to_pandas()
    for q in range(9):
        mine = table[table["query"] == q]
        assert mine["row"].tolist() == rows[found[q]].tolist()
        theirs = np.sqrt(distances[q]) if metric == "l2" else distances[q]
        np.testing.assert_allclose(mine["value"], theirs, rtol=2e-5, atol=2e-5)


def test_a_row_is_not_its_own_neighbour(made):
    run = made.run()
    token = next(t for t in made.tokens if t.doc_id == 10 and t.window_position == 3)
    q = made.acts["run", H][token.row].astype(float)
    for own in (False, True):
        result = run.nearest(H, token.row, 15, exclude_own_document=own)
        rows = [
            (t, a)
            for t, a in eligible(made, H, zero=True)
            if t.row != token.row and not (own and t.doc_id == token.doc_id)
        ]
        assert result.table["row"].to_pylist() == [r for r, _ in top(made, rows, score_of("cosine", q), 15)]
        assert result.meta.request["row"] == token.row
    assert token.row not in run.nearest(H, np.int64(token.row), 900, fold=None).table["row"].to_pylist()


def test_where_comes_before_the_limit(made):
    q = np.random.default_rng(5).standard_normal(12)
    result = made.run().nearest(H, q, 10, where="source = 'book' AND n < 20")
    keep = lambda t: made.metadata[t.doc_id]["source"] == "book" and t.doc_id < 20  # noqa: E731
    rows = list(eligible(made, H, zero=True, keep=keep))
    assert result.table["row"].to_pylist() == [r for r, _ in top(made, rows, score_of("cosine", q), 10)]
    assert result.meta.n_returned == 10
    assert result.meta.n_eligible == len(rows)


def test_many_queries_answer_as_alone(made):
    queries = np.random.default_rng(6).standard_normal((4, 12))
    together = made.run().nearest(H, queries, 6).to_dicts()
    for q, vector in enumerate(queries):
        alone = made.run().nearest(H, vector, 6).to_dicts()
        mine = [{key: v for key, v in r.items() if key != "query"} for r in together if r["query"] == q]
        assert same(mine, alone)
    single = made.run().nearest(H, queries[:1], 3)
    assert single.table.column_names[0] == "query"


def test_scale_of_the_query_does_not_matter_to_cosine(made):
    q = np.random.default_rng(8).standard_normal(12)
    rows = made.run().nearest(H, q, 10).table["row"].to_pylist()
    for scale in (1e-200, 1e-30, 1e30, 1e200):
        assert made.run().nearest(H, q * scale, 10).table["row"].to_pylist() == rows


def test_context_values_are_the_metric_of_each_token(made):
    q = np.random.default_rng(9).standard_normal(12)
    for metric in ("cosine", "l2"):
        for r in made.run().nearest(H, q, 5, metric=metric, before=2, after=2):
            context = r["context"]
            first = r["row"] - context["token_index"]
            for i, value in enumerate(context["values"]):
                acts = made.acts["run", H][first + i].astype(float)
                if np.isfinite(acts).all() and acts.any():
                    expected = score_of(metric, q)(acts) * (-1 if metric == "l2" else 1)
                    assert value == pytest.approx(expected, rel=1e-12)
            assert context["values"][context["token_index"]] == r["value"]


def test_index_is_not_there_yet(made):
    result = made.run().nearest(H, np.ones(12), 3, exact=False)
    assert result.meta.exact
    assert any("no index" in w for w in result.meta.warnings)


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (np.ones(5), {}, "5 dimensions"),
        (np.zeros(12), {}, "all zeros"),
        (np.full(12, np.nan), {}, "12 NaN"),
        (np.ones((2, 2, 2)), {}, "shape"),
        ([], {}, "shape"),
        (["a"], {}, "numbers"),
        (np.ones(12), {"metric": "dot"}, "'cosine', 'ip', 'l2'"),
        (np.ones(12), {"k": 10**8}, "k must be"),
        (np.ones(12), {"exclude_own_document": True}, "row number"),
        (np.ones(12), {"token": 1}, "give a text"),
        (True, {}, "shape"),
    ],
)
def test_bad_queries(made, query, options, message):
    with pytest.raises(InvalidInputError, match=message):
        made.run().nearest(H, query, **options)


def test_rows_that_do_not_exist(made):
    gap = next(r for r in range(10_000) if r not in made.by_row)
    for row in (gap, -1):
        with pytest.raises(NotFoundError, match=str(row)):
            made.run().nearest(H, row)


def test_a_nonfinite_row_cannot_be_a_query(made):
    row = next(r for r, a in made.acts["run", H].items() if not np.isfinite(a).all())
    with pytest.raises(InvalidInputError, match="NaN"):
        made.run().nearest(H, row)


def test_aliases_of_hook_points(made):
    a = made.run().nearest("blocks.0.hook_resid_post", np.ones(12), 3)
    assert a.meta.request["hook_point"] == H
    assert same(a.to_dicts(), made.run().nearest(H, np.ones(12), 3).to_dicts())
    assert actstore.neuron("blocks.0.hook_resid_post", 1) == actstore.neuron(H, 1)
