"""Indexes that are built, found and searched: against scikit-learn's brute force on what is stored."""

import dataclasses

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

import actstore
from actstore.errors import ConflictError, ErrorKind, InvalidInputError, NotFoundError
from actstore.index_list import list_indexes
from actstore.ingest import build_index
from actstore.ingest.indexing.rows import RowSource
from actstore.ingest.indexing.task import IndexTask
from actstore.log import fsck
from actstore.vector_index import VectorIndex, index_collections, open_indexes, sealed_indexes
from tests.indexing import indexed
from tests.indexing.indexed import HOOK_POINT
from tests.ingest import kept
from tests.query.make_store import add_run, make_store

WIDTH = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A run with rows that are NaN, infinite, zeros and equal, in units of 128 rows; what is built in it stays."""
    url = str(tmp_path_factory.mktemp("store") / "s")
    indexed.make(url, values=indexed.clustered(WIDTH, odd=True), rows_per_unit=128)
    return actstore.open(url)


def stored(run):
    """Row numbers and rows that can be compared, from the store itself."""
    acts = run.activations(HOOK_POINT)
    rows = acts.rows()
    values = acts.read(rows)
    fit = np.isfinite(values).all(axis=1)
    return rows[fit], values[fit]


def brute(rows, values, queries, k, metric):
    """The rows of the k nearest by scikit-learn (the inner product by numpy)."""
    if metric == "ip":
        scores = queries.astype(np.float64) @ values.T.astype(np.float64)
        return rows[np.argsort(-scores, axis=1, kind="stable")[:, :k]]
    name = {"cosine": "cosine", "l2": "euclidean"}[metric]
    oracle = NearestNeighbors(n_neighbors=k, algorithm="brute", metric=name).fit(values.astype(np.float64))
    return rows[oracle.kneighbors(queries.astype(np.float64), return_distance=False)]


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("kind", ["flat", "ivf_sq8", "ivf_rabitq"])
def test_what_is_nearest_is_among_the_candidates(store, kind, metric):
    """Foreign queries, all lists: what is lost is the kind's rounding alone, and 8 bits lose hardly anything."""
    report = build_index(
        store, "run", HOOK_POINT, kind=kind, metric=metric, rebuild=True, shard_rows=400, n_queries=50, recall_floor=0.3
    )  # fmt: skip
    assert (report.kind, report.is_complete, report.n_uncovered) == (kind, True, 0)
    assert report.n_shards == report.n_shards_planned > 1
    run = store.run("run")
    [index] = open_indexes(run, HOOK_POINT, metric=metric)
    assert (index.id, index.kind) == (report.index, kind)
    rows, values = stored(run)
    if metric == "cosine":
        some = values.any(axis=1)
        rows, values = rows[some], values[some]
    assert index.n_rows == run.n_rows == report.n_rows
    assert index.n_indexed == len(rows) == report.n_indexed < run.n_rows
    queries = np.random.default_rng(9).standard_normal((40, WIDTH)).astype(np.float32) + 0.5
    k = 10
    expected = brute(rows, values, queries, k, metric)
    found = indexed.candidates(run, queries, index.overfetch(k), metric=metric)
    share = np.mean([np.isin(e, f).mean() for e, f in zip(expected, found, strict=True)])
    assert share == 1.0 if kind != "ivf_rabitq" else share > 0.8


def test_every_row_has_one_ordinal_and_a_norm(store):
    build_index(store, "run", HOOK_POINT, kind="flat", metric="l2", rebuild=True, shard_rows=300, n_queries=5)
    run = store.run("run")
    [index] = open_indexes(run, HOOK_POINT, metric="l2")
    seen = np.concatenate([shard.rows_of(np.arange(shard.n)) for shard in index.shards])
    assert seen.tolist() == run.activations(HOOK_POINT).rows().tolist()
    for shard in index.shards:
        rows = shard.rows_of(np.arange(shard.n))
        assert shard.ordinals_of(rows).tolist() == list(range(shard.n))
        assert (shard.ordinals_of(np.setdiff1d(seen, rows)) == -1).all()
        values = run.activations(HOOK_POINT).read(rows).astype(np.float64)
        finite = np.isfinite(values).all(axis=1)
        norms = shard.norms()
        np.testing.assert_allclose(norms[finite], np.sqrt((values[finite] ** 2).sum(axis=1)), rtol=1e-6)
        assert not np.isfinite(norms[~finite]).any()
        assert shard.n <= 300
        units = [(unit, first, stop) for unit, first, stop in shard.unit_ranges()]
        assert units[0][1] == 0
        assert units[-1][2] == shard.n
        assert all(stop - first == run.collection.units[unit].rows for unit, first, stop in units)
    assert index.covered().tolist() == sorted(run.collection.units)


def test_a_bitmap_lets_through_what_it_says(store):
    rng = np.random.default_rng(2)
    build_index(store, "run", HOOK_POINT, kind="ivf_sq8", metric="l2", rebuild=True, n_queries=5)
    run = store.run("run")
    [index] = open_indexes(run, HOOK_POINT, metric="l2")
    [shard] = index.shards
    values = run.activations(HOOK_POINT).read(shard.rows_of(np.arange(shard.n)))
    finite = np.isfinite(values).all(axis=1)
    passes = rng.random(shard.n) < 0.1
    bits = np.packbits(passes, bitorder="little")
    scores, ordinals = shard.search(index.prepare(values[finite][:5]), 20, effort=1 << 20, bits=bits)
    allowed = np.flatnonzero(passes & finite)
    for query, found in zip(values[finite][:5], ordinals, strict=True):
        distances = ((values[allowed].astype(np.float64) - query) ** 2).sum(axis=1)
        assert len(np.intersect1d(found, allowed[np.argsort(distances)[:20]])) >= 19
        assert np.isin(found, allowed).all()
    assert (np.diff(scores, axis=1) <= 0).all()
    few = np.zeros_like(bits)
    few[allowed[0] // 8] = 1 << (allowed[0] % 8)
    scores, ordinals = shard.search(index.prepare(values[finite][:1]), 5, effort=1 << 20, bits=few)
    assert ordinals.tolist() == [[allowed[0], -1, -1, -1, -1]]
    assert scores[0, 1:].tolist() == [-np.inf] * 4


def test_bad_questions_are_errors(store):
    build_index(store, "run", HOOK_POINT, kind="flat", rebuild=True, n_queries=5)
    index = open_indexes(store.run("run"), HOOK_POINT, metric="cosine")[0]
    shard = index.shards[0]
    one = np.ones((1, WIDTH), np.float32)
    with pytest.raises(InvalidInputError, match="k must be a whole number of 1 or more"):
        shard.search(one, 0, effort=1)
    with pytest.raises(InvalidInputError, match="k must be"):
        shard.search(one, -3, effort=1)
    with pytest.raises(InvalidInputError, match=r"array of shape \(1, 15\)"):
        shard.search(one[:, 1:], 1, effort=1)
    with pytest.raises(InvalidInputError, match="NaN or infinity"):
        shard.search(one * np.nan, 1, effort=1)
    with pytest.raises(InvalidInputError, match="bitmap of"):
        shard.search(one, 1, effort=1, bits=np.zeros(1, np.uint8))
    with pytest.raises(InvalidInputError, match="ordinals from"):
        shard.rows_of([shard.n])
    with pytest.raises(InvalidInputError, match="is 16 wide"):
        index.prepare(one[:, 1:])
    scores, ordinals = shard.search(one, 10**8, effort=1)
    assert scores.shape == ordinals.shape == (1, shard.n)
    assert (ordinals >= 0).sum() == shard.n_indexed
    assert shard.search(one[:0], 3, effort=1)[0].shape == (0, 3)


def test_prepared_rows_are_what_they_are_alone(store):
    index = open_indexes(store.run("run"), HOOK_POINT, metric="cosine")[0]
    rows = np.random.default_rng(0).standard_normal((3000, WIDTH)).astype(np.float32)
    rows[5] = 0
    together = index.prepare(rows)
    assert together[5].tolist() == [0.0] * WIDTH
    lengths = np.linalg.norm(together.astype(np.float64), axis=1)
    np.testing.assert_allclose(np.delete(lengths, 5), 1, rtol=1e-6)
    for some in (slice(0, 1), slice(1020, 1030), slice(2999, 3000)):
        assert (index.prepare(rows[some]) == together[some]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hnsw"}, "kind='hnsw' is unknown"),
        ({"metric": "dot"}, "metric='dot' is unknown"),
        ({"of": "rows"}, "of='rows' is unknown"),
        ({"of": "documents", "pooling": "median"}, "pooling='median' is unknown"),
        ({"of": "documents"}, "keeps"),
        ({"transform": ["rotate"]}, "rotate"),
        ({"first_dims": 0}, "first_dims must be"),
        ({"first_dims": WIDTH + 1}, "vectors have 16 numbers"),
        ({"recall_floor": 1.5}, "recall_floor is a share"),
        ({"recall_floor": float("nan")}, "recall_floor is a share"),
        ({"recall_floor": "high"}, "recall_floor is a share"),
        ({"memory_bytes": 0}, "memory_bytes must be"),
        ({"shard_rows": 0}, "shard_rows must be"),
        ({"n_lists": 0}, "n_lists must be"),
        ({"kind": "flat", "n_lists": 8}, "has no lists"),
        ({"n_queries": 0}, "n_queries must be"),
        ({"seed": -1}, "seed must be"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "tpu", "ray_address": "local"}, "device 'tpu'"),
        ({"device": "cuda"}, "finds no GPU"),
        ({"workers": 2}, "workers must be 1"),
        ({"kind": "scan_sq8", "metric": "cosine"}, "do not go with it"),
        ({"kind": "scan_sq8", "transform": ["centre"]}, "do not go with it"),
    ],
)
def test_what_cannot_be_is_an_error_before_anything_is_written(tmp_path, options, message):
    made = indexed.make(str(tmp_path / "s"), n_documents=4)
    version = made.store.refresh().version
    with pytest.raises(InvalidInputError, match=message):
        build_index(made.store, "run", HOOK_POINT, **options)
    assert made.store.refresh().version == version


def test_a_run_or_hook_point_that_is_not_there(store):
    with pytest.raises(NotFoundError, match="nothing"):
        build_index(store, "nothing", HOOK_POINT)
    with pytest.raises(NotFoundError, match=r"layers\.9"):
        build_index(store, "run", "layers.9.resid_post")


@pytest.mark.parametrize("kind", ["auto", "flat", "ivf_sq8", "ivf_rabitq"])
@pytest.mark.parametrize("what", ["one row", "zeros", "nan"])
def test_one_row_or_none_that_can_be_indexed(tmp_path, kind, what):
    made = make_store(str(tmp_path / "s"), n_documents=2 if what == "one row" else 12, bos=False)

    def values(hook_point, tokens):
        rows = np.zeros((len(tokens), 4), np.float32)
        if what == "nan":
            rows[:] = np.nan
        elif tokens[0].row == 0 and what == "one row":
            rows[0] = [1, 2, 3, 4]
        return rows

    add_run(made, "run", {HOOK_POINT: 4}, values)
    report = build_index(made.store, "run", HOOK_POINT, kind=kind)
    assert report.is_complete
    assert report.n_indexed == (what == "one row")
    assert report.recall == 1.0
    run = made.store.run("run")
    found = indexed.candidates(run, np.array([[1, 2, 3, 5]], np.float32), 3)
    assert found.tolist()[0][0] == (0 if what == "one row" else -1)
    assert (found[0, 1:] == -1).all()


def test_what_was_ingested_since_is_indexed_by_the_next_build(tmp_path):
    store = actstore.open(tmp_path / "s", create=True)
    tokenization = kept.tokenized(store, tmp_path / "tokenizer")
    run = kept.KeptRun(store, "run", tokenization, nonfinite="mask")
    units = [u.unit for u in tokenization.units]
    assert len(units) > 4
    run.finish(without=units[3:], seal=False)
    first = build_index(store, "run", HOOK_POINT, transform="centre", n_queries=20)
    assert (first.is_complete, first.n_uncovered) == (True, 0)
    run.finish(without=units[-1:], seal=False)
    index = open_indexes(store.refresh().run("run"), HOOK_POINT)[0]
    assert index.covered().tolist() == units[:3]
    second = build_index(store, "run", HOOK_POINT, transform="centre", n_queries=20)
    run.finish()
    newest, oldest = open_indexes(store.refresh().run("run"), HOOK_POINT)
    assert (oldest.id, newest.id) == (first.index, second.index)
    assert (oldest.covered().tolist(), newest.covered().tolist()) == (units[:3], units[3:-1])
    assert (oldest.transform().mean == newest.transform().mean).all(), "or their scores could not be compared"
    assert oldest.transform_object().sha256 == newest.transform_object().sha256
    third = build_index(store, "run", HOOK_POINT, transform="centre", n_queries=20)
    assert len(open_indexes(store.run("run"), HOOK_POINT)) == 3
    again = build_index(store, "run", HOOK_POINT, transform="centre", n_queries=20)
    assert (again.index, again.units_this_job, again.version) == (third.index, 0, third.version)
    rows = store.run("run").activations(HOOK_POINT).rows()
    queries = store.run("run").activations(HOOK_POINT).read(rows[:30])
    found = indexed.candidates(store.run("run"), queries, 5)
    assert found[:, 0].tolist() == rows[:30].tolist()
    whole = build_index(store, "run", HOOK_POINT, transform="centre", rebuild=True, n_queries=20)
    assert [index.id for index in open_indexes(store.run("run"), HOOK_POINT)] == [whole.index]
    assert len(sealed_indexes(store.run("run"), HOOK_POINT, of="tokens", purpose="nearest")) == 4
    assert not fsck(store.storage, deep=True).n_problems


def test_indexes_of_other_metrics_and_transforms_stand_side_by_side(store):
    made = {}
    for metric, transform in (("cosine", ()), ("cosine", ("centre",)), ("l2", ())):
        made[metric, transform] = build_index(
            store,
            "run",
            HOOK_POINT,
            kind="flat",
            metric=metric,
            transform=transform,
            rebuild=True,
            n_queries=5,
        ).index
    run = store.run("run")
    for (metric, transform), id in made.items():
        found = open_indexes(run, HOOK_POINT, metric=metric, transform_steps=transform)
        assert [index.id for index in found] == [id]
    assert [index.id for index in open_indexes(run, HOOK_POINT)] == [made["l2", ()]]
    assert open_indexes(run, HOOK_POINT, metric="l2", transform_steps=("centre",)) == []
    assert open_indexes(run, HOOK_POINT, purpose="directions") == []


def test_transformed_rows_are_found_by_their_distance_after_the_transform(store):
    build_index(
        store,
        "run",
        HOOK_POINT,
        kind="ivf_sq8",
        metric="l2",
        transform="standardise",
        rebuild=True,
        n_queries=30,
    )
    run = store.run("run")
    [index] = open_indexes(run, HOOK_POINT, metric="l2", transform_steps=("standardise",))
    rows, values = stored(run)
    scaled = (values - values.astype(np.float64).mean(axis=0)) / values.astype(np.float64).std(axis=0)
    expected = brute(rows, scaled, scaled[:25], 6, "l2")
    found = indexed.candidates(
        run, values[:25], index.overfetch(6), metric="l2", transform_steps=("standardise",)
    )
    assert np.mean([np.isin(e, f).mean() for e, f in zip(expected, found, strict=True)]) == 1.0


def test_first_dimensions_are_indexed_and_candidates_judged_in_all(store):
    report = build_index(
        store, "run", HOOK_POINT, kind="flat", metric="l2", first_dims=2, rebuild=True, n_queries=200, recall_floor=0.1
    )  # fmt: skip
    run = store.run("run")
    [index] = open_indexes(run, HOOK_POINT, metric="l2")
    assert (index.d, index.first_dims) == (2, 2)
    rows, values = stored(run)
    some = np.random.default_rng(1).permutation(len(rows))[:400]
    expected = brute(rows, values, values[some], 11, "l2")[:, 1:]
    found = brute(rows, values[:, :2], values[some, :2], index.overfetch(10) + 1, "l2")
    share = np.mean([np.isin(e, f).mean() for e, f in zip(expected, found, strict=True)])
    assert abs(report.recall - share) < 0.03
    assert share < 0.99, "or nothing is shown"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rows_of_narrow_types(tmp_path, dtype):
    made = indexed.make(str(tmp_path / "s"), n_documents=20, dtype=dtype)
    build_index(made.store, "run", HOOK_POINT, kind="ivf_sq8", n_queries=30)
    run = made.store.run("run")
    rows, values = made.matrix(HOOK_POINT)
    found = indexed.candidates(run, values[:20].astype(np.float32), 60)
    expected = brute(rows, values, values[:20], 10, "cosine")
    assert np.mean([np.isin(e, f).mean() for e, f in zip(expected, found, strict=True)]) == 1.0


def test_a_sampled_run(tmp_path):
    store = actstore.open(tmp_path / "s", create=True)
    run = kept.KeptRun(store, "run", kept.tokenized(store, tmp_path / "tokenizer"), rate=0.4)
    run.finish()
    build_index(store, "run", HOOK_POINT, shard_rows=80, kind="flat", metric="l2", n_queries=20)
    opened = store.run("run")
    [index] = open_indexes(opened, HOOK_POINT)
    assert len(index.shards) > 1
    acts = opened.activations(HOOK_POINT)
    rows = np.concatenate([shard.rows_of(np.arange(shard.n)) for shard in index.shards])
    assert rows.tolist() == acts.rows().tolist()
    for shard in index.shards:
        own = shard.rows_of(np.arange(shard.n))
        assert shard.ordinals_of(own).tolist() == list(range(shard.n))
        assert (shard.ordinals_of(np.setdiff1d(np.arange(rows.max() + 70), own)) == -1).all()
    values = acts.read(rows)
    found = indexed.candidates(opened, values[::7], 5)
    assert found.tolist() == brute(rows, values, values[::7], 5, "l2").tolist()


@pytest.mark.parametrize("seal", [True, False])
def test_documents(tmp_path, seal):
    store = actstore.open(tmp_path / "s", create=True)
    tokenization = kept.tokenized(store, tmp_path / "tokenizer", n=40)
    run = kept.KeptRun(store, "run", tokenization, keep=("pooled",))
    without = () if seal else (1, 4)
    run.finish(without=without, seal=seal)
    report = build_index(
        store, "run", HOOK_POINT, of="documents", pooling="last", shard_rows=9, metric="l2", n_queries=20
    )
    opened = store.run("run")
    expected = {
        doc: vectors["last"]
        for doc, (_, vectors) in kept.naive_pooled(run, HOOK_POINT, without=without).items()
        if vectors is not None
    }
    [index] = open_indexes(opened, HOOK_POINT, of="documents")
    assert index.pooling == "last"
    docs = np.concatenate([shard.documents() for shard in index.shards])
    assert docs.tolist() == sorted(expected)
    assert report.n_rows == len(expected)
    covered = index.covered()
    assert (covered[1:, 0] >= covered[:-1, 1]).all()
    assert all(any(a <= doc < b for a, b in covered.tolist()) for doc in expected)
    for shard in index.shards:
        assert shard.ordinals_of(shard.documents()).tolist() == list(range(shard.n))
        lengths = [np.linalg.norm(expected[doc]) for doc in shard.documents().tolist()]
        np.testing.assert_allclose(shard.norms(), lengths, rtol=1e-5)
    values = np.stack([expected[doc] for doc in sorted(expected)]).astype(np.float32)
    found = indexed.candidates(opened, values, 4, of="documents")
    assert found.tolist() == brute(np.array(sorted(expected)), values, values, 4, "l2").tolist()
    if not seal:
        run.finish()
        assert (
            build_index(store, "run", HOOK_POINT, of="documents", pooling="last", metric="l2").n_uncovered
            == 0
        )
        both = open_indexes(store.run("run"), HOOK_POINT, of="documents")
        every = np.concatenate([shard.documents() for i in both for shard in i.shards])
        all_docs = [d for d, (_, v) in kept.naive_pooled(run, HOOK_POINT).items() if v is not None]
        assert sorted(every.tolist()) == sorted(all_docs)
    assert not fsck(store.storage, deep=True).n_problems


def test_documents_without_a_vector_are_covered_too(tmp_path):
    """Documents of special tokens alone have none: nothing is left to index of them."""
    store = actstore.open(tmp_path / "s", create=True)
    run = kept.KeptRun(store, "run", kept.tokenized(store, tmp_path / "tokenizer", n=40), keep=("pooled",))
    run.finish()
    report = build_index(store, "run", HOOK_POINT, of="documents", shard_rows=9, n_queries=3)
    [listed] = list_indexes(store)
    pooled = store.run("run").pooled(HOOK_POINT, "mean")
    assert report.n_rows == listed["n_rows"] == len(pooled.to_numpy()) < pooled.n_documents
    assert (report.n_uncovered, listed["coverage"]) == (0, 1.0)


def test_an_index_that_finds_too_little_is_not_published(tmp_path):
    made = indexed.make(str(tmp_path / "s"))
    with pytest.raises(InvalidInputError, match=r"recall_floor is 0.99.*not published") as caught:
        build_index(
            made.store, "run", HOOK_POINT, kind="flat", metric="l2", first_dims=1, recall_floor=0.99, n_queries=50
        )  # fmt: skip
    assert caught.value.kind is ErrorKind.SELF_TEST_FAILED
    run = made.store.refresh().run("run")
    assert open_indexes(run, HOOK_POINT) == []
    [unfinished] = [c for (kind, _), c in made.store.state.collections.items() if kind == "index"]
    assert not unfinished.is_sealed
    # The same again measures again, whatever was asked of it; another floor lets it through.
    report = build_index(
        made.store, "run", HOOK_POINT, kind="flat", metric="l2", first_dims=1, recall_floor=0.0, n_queries=50
    )  # fmt: skip
    assert (report.index, report.units_this_job, report.is_complete) == (unfinished.id, 0, True)
    assert report.recall < 0.99
    assert not fsck(made.store.storage, deep=True).n_problems


def test_begun_otherwise_is_another_generation(tmp_path):
    made = indexed.make(str(tmp_path / "s"), n_documents=10)
    with pytest.raises(InvalidInputError, match="not published"):
        build_index(made.store, "run", HOOK_POINT, first_dims=1, recall_floor=1.0, n_queries=30, metric="l2")
    report = build_index(made.store, "run", HOOK_POINT, metric="l2", n_queries=30)
    assert report.is_complete
    collection = made.store.state.collection("index", report.index)
    assert collection.config["generation"] == 1


def test_a_damaged_entry_is_an_error_that_names_the_index(store):
    run = store.run("run")
    index = sealed_indexes(run, HOOK_POINT, of="tokens", purpose="nearest")[0]
    good = index.collection
    for changes in (
        {"d": 0}, {"d": "wide"}, {"shards": [[[3, 1]]]}, {"shards": None}, {"kind": "hnsw"}, {"metric": "dot"},
        {"run_fingerprint": "00"}, {"of": "rows"}, {"shards": [[[0, 1 << 60]]]}, {"transform": None},
        {"first_dims": "few"}, {"first_dims": good.config["d"] - 1}, {"first_dims": -1},
    ):  # fmt: skip
        bad = dataclasses.replace(good, config={**good.config, **changes})
        with pytest.raises(actstore.FormatError, match="cannot be read") as caught:
            VectorIndex(run, bad)
        assert caught.value.kind is ErrorKind.INVARIANT_BROKEN
        assert good.id in str(caught.value)
    with pytest.raises(actstore.FormatError, match="of format 2") as caught:
        VectorIndex(run, dataclasses.replace(good, config={**good.config, "format": 2}))
    assert caught.value.kind is ErrorKind.FORMAT_TOO_NEW


def test_a_damaged_generation_is_an_error_and_no_crash(tmp_path):
    """Generations are put in order before any is looked at."""
    made = indexed.make(str(tmp_path / "s"), n_documents=4)
    build_index(made.store, "run", HOOK_POINT, n_queries=5)
    state = made.store.state
    [(key, good)] = [(key, c) for key, c in state.collections.items() if key[0] == "index"]
    for generation in (None, "first", [1]):
        bad = dataclasses.replace(good, config={**good.config, "generation": generation})
        made.store.state = dataclasses.replace(state, collections={**state.collections, key: bad})
        with pytest.raises(actstore.FormatError, match="its generation is"):
            index_collections(made.store.run("run"), HOOK_POINT, of="tokens", purpose="nearest")


def test_a_job_that_begins_another_index_meanwhile_takes_nothing_away(tmp_path):
    """Between looking which generations there are and creating one: each gets a number of its own, and is finished."""
    url = str(tmp_path / "s")
    indexed.make(url, n_documents=6)
    other = []

    def notice(_):
        if not other:
            other.append(None)
            other[0] = build_index(url, "run", HOOK_POINT, metric="l2", n_queries=5)

    report = build_index(url, "run", HOOK_POINT, metric="cosine", n_queries=5, notice=notice)
    assert report.is_complete
    assert other[0].is_complete
    store = actstore.open(url)
    generations = {
        i.metric: i.generation
        for i in sealed_indexes(store.run("run"), HOOK_POINT, of="tokens", purpose="nearest")
    }
    assert generations == {"l2": 0, "cosine": 1}
    assert not fsck(store.storage, deep=True).n_problems


def test_a_job_that_indexes_the_same_otherwise_meanwhile_leaves_nothing_to_do(tmp_path):
    url = str(tmp_path / "s")
    indexed.make(url, n_documents=6)
    other = []

    def notice(_):
        if not other:
            other.append(None)
            other[0] = build_index(url, "run", HOOK_POINT, kind="ivf_sq8", n_queries=5, recall_floor=0.0)

    report = build_index(url, "run", HOOK_POINT, kind="flat", n_queries=5, notice=notice)
    assert (report.index, report.kind, report.units_this_job) == (other[0].index, "ivf_sq8", 0)


def test_a_sample_fits_its_memory_as_it_is_read(tmp_path):
    """Rows are read in all dimensions, though one is indexed."""
    made = indexed.make(str(tmp_path / "s"), n_documents=150)
    report = build_index(
        made.store, "run", HOOK_POINT, kind="ivf_sq8", n_lists=64, first_dims=1, n_queries=5, recall_floor=0.0
    )
    n_rows = made.store.run("run").n_rows
    assert n_rows > 3000
    budget = 8 * WIDTH * 1200
    rows_of = (0, n_rows)
    written = IndexTask(report.index, "run", rows_of, None, "cpu", budget).open(made.store)(0)
    assert 1100 < written.meta["n_sample"] <= 1200 + 128


@pytest.mark.parametrize("rate", [None, 0.5])
def test_a_sample_is_of_stored_rows_in_short_stretches(tmp_path, rate):
    store = actstore.open(tmp_path / "s", create=True)
    options = {} if rate is None else {"rate": rate}
    run = kept.KeptRun(store, "run", kept.tokenized(store, tmp_path / "tokenizer"), **options)
    run.finish()
    opened = store.run("run")
    acts = opened.activations(HOOK_POINT)
    every = acts.read(acts.rows())
    place = {row.tobytes(): at for at, row in enumerate(every)}
    source = RowSource(opened, HOOK_POINT, "tokens", None)
    units = [(0, len(opened.tokenization.units))]
    assert source.sample(units, len(every), seed=1).tobytes() == every.tobytes()
    some = source.sample(units, 130, seed=1)
    assert 2 <= len(some) <= 256
    places = [place[row.tobytes()] for row in some]
    assert len(set(places)) == len(places)
    assert places == sorted(places)
    second = next(unit for unit in acts.layout.units if unit.unit == 1)
    whole = acts.read(acts.layout.numbers(second, 0, second.n_rows))
    assert source.sample([(1, 2)], 10**6, seed=1).tobytes() == whole.tobytes()
    assert source.sample([], 5, seed=1).shape == (0, every.shape[1])


@pytest.mark.parametrize("kind", ["flat", "ivf_sq8", "ivf_rabitq"])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_rows_whose_squares_overflow_are_an_error_and_the_process_lives(tmp_path, kind, metric):
    """FAISS ends the process that clusters them; as directions, and with the cosine, they are indexed."""

    def values(hook_point, tokens):
        rows = np.random.default_rng(tokens[0].row).standard_normal((len(tokens), 4)) * 1e30
        return rows.astype(np.float32)

    made = indexed.make(str(tmp_path / "s"), n_documents=12, width=4, values=values)
    with pytest.raises(
        InvalidInputError, match=r"cannot be compared in float32\. Use metric='cosine'"
    ) as caught:
        build_index(made.store, "run", HOOK_POINT, kind=kind, metric=metric, n_queries=5)
    assert caught.value.kind is ErrorKind.TOO_LARGE
    assert open_indexes(made.store.refresh().run("run"), HOOK_POINT) == []
    report = build_index(made.store, "run", HOOK_POINT, kind=kind, n_queries=5, recall_floor=0.0)
    assert report.n_indexed == report.n_rows
    assert build_index(made.store, "run", HOOK_POINT, kind="scan_sq8").is_complete


def test_one_number_alone_is_looked_up(store):
    build_index(store, "run", HOOK_POINT, kind="flat", rebuild=True, n_queries=5)
    [index] = open_indexes(store.run("run"), HOOK_POINT, metric="cosine", transform_steps=())
    shard = index.shards[0]
    row = shard.rows_of(3)
    assert row.shape == ()
    assert shard.ordinals_of(row) == 3


def test_two_writers_with_other_settings_do_not_mix(tmp_path):
    made = indexed.make(str(tmp_path / "s"), n_documents=6)
    from actstore.ingest.unit_collection import ensure_collection

    first = build_index(made.store, "run", HOOK_POINT, n_queries=5)
    config = made.store.state.collection("index", first.index).config
    with pytest.raises(ConflictError, match="seed"):
        ensure_collection(made.store, "index", first.index, {**config, "seed": 9})
