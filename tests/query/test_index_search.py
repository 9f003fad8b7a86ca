"""What several shards found, put together, against sorting everything."""

import itertools

import numpy as np
import pytest

from actstore.query.index_search import LocalShards, merge_found
from actstore.vector_index import open_indexes
from tests.query.make_index import add_index
from tests.query.make_store import add_run, make_store, random_values

H = "layers.0.resid_post"


def random_parts(rng, n_parts, n_queries):
    """Scores with many ties, row numbers that no two parts share, and missing answers."""
    parts, first = [], 0
    for _ in range(n_parts):
        m = int(rng.integers(0, 9))
        scores = rng.integers(0, 4, (n_queries, m)).astype(np.float32)
        rows = first + np.stack([rng.permutation(20)[:m] for _ in range(n_queries)]).astype(np.int64)
        none = rng.random((n_queries, m)) < 0.2
        parts.append((np.where(none, np.float32(-np.inf), scores), np.where(none, -1, rows)))
        first += 20
    return parts


@pytest.mark.parametrize("seed", range(20))
def test_merged_is_sorted_however_the_parts_are_grouped(seed):
    rng = np.random.default_rng(seed)
    n_queries, k = int(rng.integers(1, 5)), int(rng.integers(1, 30))
    parts = random_parts(rng, int(rng.integers(1, 6)), n_queries)
    found = merge_found(parts, k, n_queries=n_queries, lost=(3,))
    for q in range(n_queries):
        every = [(s, r) for scores, rows in parts for s, r in zip(scores[q], rows[q], strict=True) if r >= 0]
        pairs = sorted((-float(score), int(row)) for score, row in every)
        there = found.rows[q] >= 0
        assert [
            (-float(s), int(r)) for s, r in zip(found.scores[q][there], found.rows[q][there], strict=True)
        ] == pairs[:k]
        assert (found.scores[q][~there] == -np.inf).all()
    assert found.lost == (3,)
    cut = int(rng.integers(0, len(parts) + 1))
    groups = [merge_found(some, k, n_queries=n_queries) for some in (parts[cut:], parts[:cut])]
    again = merge_found([(g.scores, g.rows) for g in groups], k, n_queries=n_queries)
    for q in range(n_queries):
        mine, theirs = found.rows[q], again.rows[q]
        assert mine[mine >= 0].tolist() == theirs[theirs >= 0].tolist()


def test_no_parts():
    found = merge_found([], 5, n_queries=3)
    assert found.rows.shape == found.scores.shape == (3, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = make_store(
        str(tmp_path_factory.mktemp("shards") / "a.store"), seed=2, n_documents=60, rows_per_unit=128
    )
    add_run(made, "run", {H: 8}, random_values(1, {H: 8}))
    n = len(made.run().collection.units)
    return add_index(made.run(), H, shards=[[(0, 2)], [(2, 3)], [(3, n)]], kind="flat", metric="l2")


def test_local_shards_against_numpy(run):
    [index] = open_indexes(run, H, metric="l2")
    acts = run.activations(H)
    rows, values = acts.rows(), acts[:].astype(np.float64)
    rng = np.random.default_rng(4)
    for n_queries, k in itertools.product((1, 7), (1, 30, len(rows) + 5)):
        queries = rng.standard_normal((n_queries, 8)).astype(np.float32)
        keep = rng.random(len(rows)) < 0.4
        ranges = np.cumsum([0, *(shard.n for shard in index.shards)])
        bits = {
            s: np.packbits(keep[a:b], bitorder="little")
            for s, (a, b) in enumerate(itertools.pairwise(ranges.tolist()))
            if s != 1  # a shard that is not named has no vector that counts
        }
        allowed = keep & ((np.arange(len(rows)) < ranges[1]) | (np.arange(len(rows)) >= ranges[2]))
        for given, inside in ((None, np.ones(len(rows), bool)), (bits, allowed)):
            found = LocalShards(index).search(index.prepare(queries), k, effort=0, bits=given)
            distance = ((values[None] - queries[:, None]) ** 2).sum(axis=2)
            distance[:, ~inside] = np.inf
            for q in range(n_queries):
                there = found.rows[q] >= 0
                wanted = np.sort(distance[q])[: min(k, int(inside.sum()))]
                assert int(there.sum()) == len(wanted)
                np.testing.assert_allclose(-found.scores[q][there], wanted, rtol=1e-4, atol=1e-4)
                at = np.searchsorted(rows, found.rows[q][there])
                np.testing.assert_allclose(distance[q][at], wanted, rtol=1e-4, atol=1e-4)
                assert len(set(at.tolist())) == len(at)
