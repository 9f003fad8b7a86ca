"""The recall that an index states, against an independent sample of queries and FAISS's own brute force."""

import collections
import functools

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

import actstore
from actstore.ingest import build_index
from actstore.ingest.indexing.measure import _recall, filter_of
from actstore.ingest.indexing.truth import Truth
from actstore.vector_index import VectorIndex, open_indexes
from tests.indexing import indexed
from tests.indexing.indexed import HOOK_POINT

WIDTH, SEED = 24, 5


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("measured") / "s")
    values = indexed.clustered(WIDTH, n_clusters=120, noise=0.8)
    indexed.make(url, n_documents=320, width=WIDTH, values=values, rows_per_unit=512)
    return actstore.open(url)


def build(store, **options) -> VectorIndex:
    options = {"shard_rows": 2500, "recall_floor": 0.0, "rebuild": True, "seed": SEED, **options}
    report = build_index(store, "run", HOOK_POINT, **options)
    return VectorIndex(store.run("run"), store.state.collection("index", report.index))


@functools.cache
def large(store, kind: str, metric: str) -> VectorIndex:
    """An index of 64 lists that was measured with 1,000 queries."""
    return build(store, kind=kind, metric=metric, n_lists=64)


def truth(vectors, queries, k, metric):
    """FAISS, float32, everything compared: ordinals of the k nearest."""
    flat = faiss.IndexFlat(
        vectors.shape[1], faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    )
    flat.add(vectors)
    return flat.search(queries, k)[1]


def true_recall(index, *, k: int, effort: int, share: float, n: int, keep_filter: bool) -> float:
    """Of n other rows of the run as queries: the mean share of the true k nearest among the candidates."""
    run = index.run
    rows = run.activations(HOOK_POINT).rows()
    values = run.activations(HOOK_POINT).read(rows)
    vectors = values.astype(np.float64)
    if index.metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.ascontiguousarray(vectors, np.float32)
    rng = np.random.default_rng(77)
    passes = np.concatenate([filter_of(shard, share, seed=SEED) for shard in index.shards])
    if not keep_filter:
        passes = rng.random(len(rows)) < share
    some = rng.choice(len(rows), n, replace=False)
    allowed = np.flatnonzero(passes)
    expected = allowed[truth(vectors[allowed], vectors[some], k + 1, index.metric)]
    at, scores, found = 0, [], []
    for shard in index.shards:
        bits = np.packbits(passes[at : at + shard.n], bitorder="little")
        s, o = shard.search(index.prepare(values[some]), index.overfetch(k) + 1, effort=effort, bits=bits)
        scores.append(s)
        found.append(np.where(o >= 0, o + at, -1))
        at += shard.n
    order = np.argsort(-np.concatenate(scores, axis=1), axis=1, kind="stable")
    found = np.take_along_axis(np.concatenate(found, axis=1), order, axis=1)
    shares = []
    for own, right, given in zip(some.tolist(), expected, found, strict=True):
        nearest = right[right != own][:k]
        candidates = given[given != own][: index.overfetch(k)]
        shares.append(np.isin(nearest, candidates).mean())
    return float(np.mean(shares))


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        ("ivf_sq8", "cosine"),
        pytest.param("ivf_sq8", "ip", marks=pytest.mark.slow),
        pytest.param("ivf_rabitq", "l2", marks=pytest.mark.slow),
    ],
)
def test_it_is_the_true_one(store, kind, metric):
    """Within 0.01 where an index is used, near 0.95 and above, and at every share of eligible rows."""
    index = large(store, kind, metric)
    assert index.run.n_rows > 6000
    checked = 0
    for k, n in ((10, 4000), (100, 1500)):
        for share in (1.0, 0.2):
            effort = index.effort_for(0.93, k, share)
            if effort is None:
                continue
            stated = index.recall(effort, k, share)
            true = true_recall(index, k=k, effort=effort, share=share, n=n, keep_filter=False)
            assert abs(stated - true) < 0.01, (k, share, effort)
            checked += 1
    assert checked >= 2


def test_one_list_of_many_finds_little_and_says_so(store):
    index = large(store, "ivf_sq8", "cosine")
    stated = index.recall(1, 10)
    true = true_recall(index, k=10, effort=1, share=1.0, n=6000, keep_filter=True)
    assert stated < 0.9
    assert abs(stated - true) < 0.02


def test_the_stored_queries_and_their_neighbours_are_brute_force(store):
    index = build(store, kind="flat", metric="l2", n_queries=80)
    [obj] = index.collection.seal.objects
    table = pq.read_table(store.objects.file(obj)).to_pydict()
    rows = index.run.activations(HOOK_POINT).rows()
    values = index.run.activations(HOOK_POINT).read(rows)
    assert len(table["row"]) == 80
    assert sorted(table["row"]) == table["row"]
    for row, neighbours, scores in zip(table["row"], table["neighbours"], table["scores"], strict=True):
        query = values[rows == row].astype(np.float64)
        distances = ((values.astype(np.float64) - query) ** 2).sum(axis=1)
        distances[rows == row] = np.inf
        order = np.lexsort((rows, distances))[:100]
        assert neighbours == rows[order].tolist()
        np.testing.assert_allclose(scores, -distances[order], rtol=1e-9)


def test_what_is_measured_is_an_effort_table(store):
    index = build(store, kind="ivf_sq8", metric="cosine", n_lists=16, n_queries=200)
    table = [(m.effort, m.k, m.share) for m in index.measured]
    assert len(set(table)) == len(table)
    ks = (10, 20, 50, 100, 1024)
    assert {k for _, k, _ in table} == set(ks)
    assert {share for _, k, share in table if k == 10} == {1.0, 0.5, 0.2, 0.1}
    assert set(index.efforts) <= {1, 2, 4, 8, 16}
    for k in ks:
        recalls = [m.recall for m in index.measured if m.k == k and m.share == 1.0]
        assert recalls == sorted(recalls)
        assert recalls[-1] > 0.999
    # Stricter than asked: more neighbours, fewer eligible rows.
    assert index.recall(4, 7) == index.recall(4, 10)
    assert index.recall(4, 11) == index.recall(4, 20)
    assert index.recall(4, 51) == index.recall(4, 100)
    assert index.recall(4, 5000) == index.recall(4, 1024)
    assert index.recall(4, 10, 0.3) == index.recall(4, 10, 0.2)
    assert index.recall(5, 10) == index.recall(4, 10)
    assert index.recall(0, 10) == 0.0
    assert index.recall(16, 10, 0.05) == 0.0
    assert index.effort_for(0.9, 10, 0.05) is None
    least = index.effort_for(0.9, 100)
    assert index.recall(least, 100) >= 0.9
    assert least == 1 or index.recall(least // 2, 100) < 0.9
    assert index.effort_for(1.01, 10) is None


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_equal_rows_count_as_one_another(tmp_path, metric):
    """Every row is there 30 times: which of them an index names is chance, and no loss."""

    def values(hook_point, tokens):
        rng = np.random.default_rng(1)
        rows = rng.standard_normal((9, 6)).astype(np.float32)
        return rows[[t.row % 9 for t in tokens]]

    made = indexed.make(str(tmp_path / "s"), width=6, values=values, n_documents=30)
    report = build_index(
        made.store, "run", HOOK_POINT, kind="ivf_sq8", metric=metric, n_lists=9, n_queries=60
    )
    assert report.recall == 1.0
    assert report.measured[0]["recall"] == 1.0, "every vector's equals are in its own list"


@pytest.mark.parametrize("seed", range(5))
def test_equals_of_one_true_neighbour_stand_for_no_other(seed):
    """Against multisets of vectors, one query at a time: a candidate counts for one true neighbour."""
    rng = np.random.default_rng(seed)
    n, k, n_candidates = 30, 10, 25
    truth = Truth(n, k, share=1.0)
    n_true = rng.integers(0, k + 1, n)
    n_true[:2] = k
    best = np.zeros((n, k), np.uint64)
    for query, count in enumerate(n_true.tolist()):
        truth.rows[query, :count] = np.arange(count)
        best[query, :count] = rng.integers(1, 5, count)
    candidates = rng.integers(0, 5, (n, n_candidates)).astype(np.uint64)
    best[0, :5], best[0, 5:], candidates[0] = (
        1,
        2,
        2,
    )  # five are missed, though the sixth has equals enough for all
    best[1], candidates[1] = 3, 3
    shares = []
    for wanted, given, count in zip(best.tolist(), candidates.tolist(), n_true.tolist(), strict=True):
        common = collections.Counter(wanted[:count]) & collections.Counter(v for v in given if v)
        shares += [common.total() / count] if count else []
    assert shares[:2] == [0.5, 1.0]
    assert _recall(truth, best, candidates, k) == pytest.approx(np.mean(shares), abs=1e-12)


def test_another_seed_draws_other_queries_and_the_same_gives_the_same(store):
    tables = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        index = build(store, kind="flat", n_queries=20, seed=seed)
        tables[name] = pq.read_table(store.objects.file(index.collection.seal.objects[0])).to_pydict()
    assert tables["a"] == tables["b"]
    assert tables["a"]["row"] != tables["c"]["row"]
    assert len(open_indexes(store.run("run"), HOOK_POINT, metric="cosine")) == 1
