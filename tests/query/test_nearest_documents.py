import sys

import faiss
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.preprocessing import StandardScaler

import actstore
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest import IngestConfig, build_index, import_corpus
from actstore.ingest import run as run_ingest
from actstore.query.index_search import LocalShards
from actstore.query.nearest_documents import nearest_documents
from actstore.vector_index import open_indexes
from tests.ingest import tiny_models
from tests.ingest.kept import naive_pooled
from tests.query.make_documents import D, H, kept_run, records, tokenized

N = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    store, tokenization = tokenized(tmp_path_factory.mktemp("documents"), N)
    kinds = {
        "pooled": kept_run(store, "pooled", tokenization, keep=("pooled",)),
        "both": kept_run(store, "both", tokenization, keep=("dense", "pooled")),
        "dense": kept_run(store, "dense", tokenization),
        "special": kept_run(store, "special", tokenization, keep=("pooled",), pool_special=True),
    }
    runs = {name: kind.finish() for name, kind in kinds.items()}
    part = kept_run(store, "part", tokenization, keep=("pooled",)).finish(without=(1, 3), seal=False)
    return {"runs": runs | {"part": part}, "kinds": kinds, "store": store.refresh()}


def stored(run, pooling="mean"):
    found = run.pooled(H, pooling).to_numpy()
    return found.doc_ids, found.vectors.astype(np.float64)


def order_of(scores, doc_ids, k):
    """Documents and scores by falling score, then rising number."""
    order = np.lexsort((doc_ids, -scores))[:k]
    return doc_ids[order].tolist(), scores[order]


def far_apart(values) -> bool:
    """Whether rounding cannot exchange two neighbours that are not equal."""
    gaps = np.abs(np.diff(values))
    return bool(((gaps == 0) | (gaps > 1e-9)).all())


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("name", ["pooled", "both"])
@pytest.mark.parametrize("pooling", ["mean", "last", "max", "weighted_mean"])
def test_against_scipy(made, metric, name, pooling):
    run = made["runs"][name]
    doc_ids, vectors = stored(run, pooling)
    query = np.random.default_rng(1).standard_normal(D)
    scores = {
        "cosine": lambda: 1 - cdist(query[None], vectors, "cosine")[0],
        "ip": lambda: vectors @ query,
        "l2": lambda: -cdist(query[None], vectors)[0],
    }[metric]()
    result = nearest_documents(run, H, query, 12, metric=metric, pooling=pooling)
    wanted, best = order_of(np.round(scores, 10), doc_ids, 12)
    assert result.table.column_names == ["rank", "doc_id", "value", "n_tokens", "text"]
    assert result.table["doc_id"].to_pylist() == wanted
    np.testing.assert_allclose(result.table["value"], -best if metric == "l2" else best, rtol=1e-9, atol=1e-9)
    assert result.table["rank"].to_pylist() == list(range(1, 13))
    assert (result.meta.exact, result.meta.recall, result.meta.index) == (True, 1.0, None)
    assert result.meta.n_eligible == len(doc_ids)
    texts = [r["text"] for r in records(N)]
    assert result.table["text"].to_pylist() == [texts[d][:240] for d in wanted]


def test_against_vectors_pooled_by_hand(made):
    """From the rows of the model on: special tokens out, each position once, documents over several units whole."""
    naive = {d: v for d, v in naive_pooled(made["kinds"]["pooled"], H).items() if v[0]}
    vectors = np.array([naive[d][1]["mean"] for d in sorted(naive)])
    query = vectors[sorted(naive).index(4)]  # document 4 has 150 words, more than a unit's rows
    scores = 1 - cdist(query[None], vectors, "cosine")[0]
    result = nearest_documents(made["runs"]["pooled"], H, query, N)
    wanted, best = order_of(np.round(scores, 6), np.array(sorted(naive)), N)
    assert result.table["doc_id"].to_pylist()[:2] == wanted[:2]
    assert sorted(result.table["doc_id"].to_pylist()) == sorted(wanted)
    np.testing.assert_allclose(result.table["value"], best, atol=2e-6)
    assert {r["doc_id"]: r["n_tokens"] for r in result} == {d: n for d, (n, _) in naive.items()}


def test_against_faiss_with_many_queries(made):
    run = made["runs"]["both"]
    _, vectors = stored(run)
    queries = np.random.default_rng(2).standard_normal((7, D))
    flat = faiss.IndexFlatL2(D)
    flat.add(vectors.astype(np.float32))
    distances, _ = flat.search(queries.astype(np.float32), 5)
    table = nearest_documents(run, H, queries, 5, metric="l2").to_pandas()
    assert table.columns[0] == "query"
    for q in range(7):
        mine = table[table["query"] == q]
        np.testing.assert_allclose(mine["value"], np.sqrt(distances[q]), rtol=1e-5)
        alone = nearest_documents(run, H, queries[q], 5, metric="l2").to_pandas()
        assert mine.drop(columns="query").reset_index(drop=True).equals(alone)


def test_equal_documents_tie_in_order(made):
    """Every fifth document has the text of the one before it."""
    run = made["runs"]["pooled"]
    result = nearest_documents(run, H, actstore.document(8), N)
    assert result.table["doc_id"][0].as_py() == 9
    assert result.table["value"][0].as_py() == pytest.approx(1.0, abs=1e-12)
    values, docs = result.table["value"].to_pylist(), result.table["doc_id"].to_pylist()
    pairs = [(d, d + 1) for d in docs if d % 5 == 3 and d + 1 in docs]
    assert len(pairs) > 5
    for first, second in pairs:
        assert docs.index(second) == docs.index(first) + 1
        assert values[docs.index(first)] == values[docs.index(second)]


def test_a_document_is_not_in_its_own_answer(made):
    for name in ("pooled", "both"):
        result = nearest_documents(made["runs"][name], H, actstore.document(7), N)
        assert 7 not in result.table["doc_id"].to_pylist()
        assert result.meta.request["query"] == "document"
        assert result.meta.n_returned == result.meta.n_eligible - 1


def test_documents_without_a_token_have_no_vector(made):
    run, empty = made["runs"]["pooled"], [i for i, record in enumerate(records(N)) if not record["text"]]
    assert 6 in empty
    result = nearest_documents(run, H, np.ones(D), N)
    assert not set(result.table["doc_id"].to_pylist()) & set(empty)
    assert result.meta.mask["removed"] == {
        "docs": 0,
        "where": 0,
        "no_vector": len(empty),
        "nonfinite": 0,
        "zero_norm": 0,
    }
    assert result.meta.mask["n_documents"] == N
    with pytest.raises(NotFoundError, match="no pooled vector"):
        nearest_documents(run, H, actstore.document(6))
    special = nearest_documents(made["runs"]["special"], H, np.ones(D), N)
    assert set(empty) <= set(special.table["doc_id"].to_pylist())  # [CLS] and [SEP] stand for something there
    assert special.meta.mask["pool_special"]


def test_where_and_docs_come_before_the_limit(made):
    run, query = made["runs"]["both"], np.random.default_rng(3).standard_normal(D)
    doc_ids, vectors = stored(run)
    scores = 1 - cdist(query[None], vectors, "cosine")[0]
    about = records(N)
    cases = [
        ({"where": "source = 'book' AND n < 40"}, lambda d: about[d]["source"] == "book" and d < 40),
        ({"where": "score > 10"}, lambda d: (about[d]["score"] or 0) > 10),
        ({"where": "length(text) > 50 AND doc_id <> 4"}, lambda d: len(about[d]["text"]) > 50 and d != 4),
        ({"docs": range(10, 30)}, lambda d: 10 <= d < 30),
        ({"docs": [50, 4, 17], "where": "n > 4"}, lambda d: d in (50, 17)),
        ({"docs": []}, lambda d: False),
        ({"where": "1 = 2"}, lambda d: False),
    ]
    for options, keep in cases:
        result = nearest_documents(run, H, query, 8, **options)
        some = np.array([keep(int(d)) for d in doc_ids], bool)
        wanted, _ = order_of(scores[some], doc_ids[some], 8)
        assert result.table["doc_id"].to_pylist() == wanted, options
        assert result.meta.n_eligible == some.sum()
        removed = result.meta.mask["removed"]
        assert sum(removed.values()) + result.meta.n_eligible == N
        assert result.meta.request["where"] == options.get("where")
        if len(wanted) < 8:
            assert any("were found of 8" in w for w in result.meta.warnings)


@pytest.mark.parametrize(
    ("where", "message"),
    [("position > 3", "documents lack; there are: .*source"), ("n +", "cannot be evaluated"), ("n > (SELECT 1)", "SELECT"),
     ("random() > 0.5", "repeatable"), ("", "SQL condition"), ("n = 'x'", "cannot be evaluated")],
)  # fmt: skip
def test_bad_conditions(made, where, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        nearest_documents(made["runs"]["pooled"], H, np.ones(D), where=where)
    assert caught.value.kind == ErrorKind.BAD_SQL


def test_rows_as_queries(made):
    run = made["runs"]["both"]
    row = int(run.activations(H).rows()[5])
    acts = run.activations(H)[row].astype(np.float64)
    doc = run.tokenization.unit_table(0)["doc_id"][5].as_py()
    doc_ids, vectors = stored(run)
    wanted, _ = order_of(vectors @ acts, doc_ids, N)
    assert nearest_documents(run, H, row, N, metric="ip").table["doc_id"].to_pylist() == wanted
    without = nearest_documents(run, H, row, N, metric="ip", exclude_own_document=True)
    assert without.table["doc_id"].to_pylist() == [d for d in wanted if d != doc]
    with pytest.raises(InvalidInputError, match="pooled vectors only"):
        nearest_documents(made["runs"]["pooled"], H, row)


def test_transforms(made):
    run, query = made["runs"]["pooled"], np.random.default_rng(4).standard_normal(D)
    doc_ids, vectors = stored(run)
    scaler = StandardScaler().fit(vectors)
    scores = 1 - cdist(scaler.transform(query[None]), scaler.transform(vectors), "cosine")[0]
    result = nearest_documents(run, H, query, 10, transform="standardize")
    wanted, best = order_of(np.round(scores, 5), doc_ids, 10)
    np.testing.assert_allclose(result.table["value"], best, atol=2e-5)
    assert sorted(result.table["doc_id"].to_pylist()) == sorted(wanted)
    assert result.meta.request["transform"] == ["standardise"]
    # In whitened space the squared length of what is left of the mean is Mahalanobis'.
    inverse = np.linalg.inv(np.cov(vectors, rowvar=False, bias=True))
    distances = cdist(query[None], vectors, "mahalanobis", VI=inverse)[0]
    result = nearest_documents(run, H, query, 10, transform=["whiten"], metric="l2")
    np.testing.assert_allclose(result.table["value"], np.sort(distances)[:10], rtol=1e-4)


def test_dense_rows_only(made):
    with pytest.raises(
        InvalidInputError, match=r"keeps .*dense.* ingest again with keep=\['dense', 'pooled'\]"
    ):
        nearest_documents(made["runs"]["dense"], H, np.ones(D))


def test_before_the_run_is_complete(made):
    run = made["runs"]["part"]
    doc_ids, vectors = stored(run)
    assert 0 < len(doc_ids) < 50
    result = nearest_documents(run, H, np.ones(D), N, metric="ip")
    wanted, _ = order_of(vectors.sum(axis=1), doc_ids, N)
    assert result.table["doc_id"].to_pylist() == wanted
    assert any("not complete" in w for w in result.meta.warnings)
    missing = min(set(range(N)) - set(doc_ids.tolist()))
    with pytest.raises(NotFoundError, match="no pooled vector"):
        nearest_documents(run, H, actstore.document(missing))


def test_nonfinite_and_zero_vectors(tmp_path):
    store, tokenization = tokenized(tmp_path, 20)

    def value(tokens, width):
        rows = np.ones((tokens.num_rows, width), np.float32)
        rows[:, 0] = tokens["doc_id"].to_numpy()
        rows[tokens["doc_id"].to_numpy() == 3] = 0
        rows[tokens["doc_id"].to_numpy() == 5] = 3e38
        return rows

    run = kept_run(store, "r", tokenization, value=value, keep=("pooled",)).finish()
    result = nearest_documents(run, H, np.ones(D), 20)
    counts = result.meta.mask["removed"]
    assert counts["zero_norm"] == 1
    assert 3 not in result.table["doc_id"].to_pylist()
    assert 5 in result.table["doc_id"].to_pylist()  # sums in float64 do not overflow
    nearest_l2 = nearest_documents(run, H, np.zeros(D), 20, metric="l2")
    assert nearest_l2.table["doc_id"][0].as_py() == 3
    assert "zero_norm" not in nearest_l2.meta.mask["removed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": np.ones(5)}, "5 dimensions"),
        ({"query": np.zeros(D)}, "all zeros"),
        ({"query": np.full(D, np.nan)}, "20 NaN"),
        ({"k": 0}, "k must be"),
        ({"k": 10**8}, "k must be"),
        ({"metric": "dot"}, "metric must be"),
        ({"transform": "pca"}, "pca"),
        ({"pooling": "first"}, "'first'"),
        ({"recall": 0}, "recall must be"),
        ({"exact": "yes"}, "exact must be"),
        ({"text_chars": -1}, "text_chars"),
        ({"memory_bytes": 10}, "too small"),
        ({"exclude_own_document": True}, "row number"),
        ({"docs": [0.5]}, "docs"),
    ],
)
def test_bad_questions(made, options, message):
    query = options.pop("query", np.ones(D))
    with pytest.raises(InvalidInputError, match=message):
        nearest_documents(made["runs"]["both"], H, query, **options)


def test_documents_that_do_not_exist(made):
    with pytest.raises(NotFoundError, match=f"documents \\[0, {N}\\)"):
        nearest_documents(made["runs"]["both"], H, actstore.document(N))
    with pytest.raises(NotFoundError):
        nearest_documents(made["runs"]["both"], H, np.ones(D), docs=[N])


def test_only_what_is_needed_is_read(made):
    """Of some documents only their units' objects are read."""
    run = made["runs"]["pooled"]
    everything = nearest_documents(run, H, np.ones(D), 3)
    few = nearest_documents(run, H, np.ones(D), 3, docs=[0, 1])
    assert 0 < few.meta.bytes_read < everything.meta.bytes_read / 2


TEXTS = [f"Document {i} says that {w} are {c}, naïvely." for i, (w, c) in enumerate(
    (w, c) for w in ("cats", "dogs", "lists", "tuples") for c in ("red", "blue", "mutable")
)]  # fmt: skip


@pytest.mark.parametrize("special", [False, True])
def test_a_text_is_pooled_as_documents_are(tmp_path, special):
    store = actstore.open(str(tmp_path / "store"), create=True)
    import_corpus(store, "texts", TEXTS)
    config = IngestConfig(
        corpus="texts", model=tiny_models.cached("bert"), hook_points=["layers.1.resid_post"], run="r", device="cpu",
        rows_per_unit=128, ray_address=None, keep=("pooled",), pool_special=special,
    )  # fmt: skip
    run_ingest(store, config)
    run = store.run("r")
    for pooling in ("mean", "last", "max", "weighted_mean"):
        for doc_id in (0, 7):
            [first, *_] = nearest_documents(
                run, "layers.1.resid_post", TEXTS[doc_id], 3, pooling=pooling, metric="l2"
            )
            length = float(
                np.linalg.norm(run.pooled("layers.1.resid_post", pooling).documents([doc_id]).vectors)
            )
            assert first["doc_id"] == doc_id
            assert first["value"] < 1e-4 * length
    with pytest.raises(InvalidInputError, match="whole text is the query"):
        run_nearest_with_token(run)


def run_nearest_with_token(run):
    from actstore.query.query_vectors import read_query

    return read_query(run, "layers.1.resid_post", TEXTS[0], token=1, pooling="mean")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """Runs of enough documents for an index to leave some out."""
    folder = tmp_path_factory.mktemp("indexed")
    store, tokenization = tokenized(folder, 700, rows_per_unit=1024)
    kept_run(store, "r", tokenization, keep=("pooled",)).finish()
    build_index(
        store,
        "r",
        H,
        kind="ivf_sq8",
        of="documents",
        metric="cosine",
        n_lists=16,
        recall_floor=0.3,
        shard_rows=300,
    )
    build_index(store, "r", H, kind="flat", of="documents", metric="l2", transform=["centre"])
    return {"run": store.refresh().run("r")}


@pytest.mark.parametrize(
    "options", [{}, {"where": "source = 'web'"}, {"docs": range(100, 500)}, {"where": "n % 50 = 3"}]
)
def test_through_an_index(indexed, options):
    run = indexed["run"]
    hits = total = 0
    for doc_id in range(0, 700, 37):
        if not records(700)[doc_id]["text"]:
            continue
        exact = nearest_documents(run, H, actstore.document(doc_id), 10, exact=True, **options)
        found = nearest_documents(run, H, actstore.document(doc_id), 10, recall=0.5, **options)
        assert len(found) == len(exact)
        assert (found.meta.n_eligible, found.meta.mask) == (exact.meta.n_eligible, exact.meta.mask)
        assert exact.meta.exact
        assert exact.meta.index is None
        [told] = found.meta.index["generations"]
        assert found.meta.exact == (told["effort"] is None)
        values = {r["doc_id"]: r["value"] for r in exact}
        hits += sum(r["doc_id"] in values for r in found)
        total += len(exact)
        for r in found:
            assert values.get(r["doc_id"], r["value"]) == r["value"]  # of shared answers bit by bit
        if found.meta.exact:
            assert found.to_dicts() == exact.to_dicts()
    assert hits >= 0.5 * total


def test_as_many_come_back_as_there_are(indexed):
    """The lists that are probed first have fewer than are asked for."""
    run = indexed["run"]
    exact = nearest_documents(run, H, np.ones(D), 700, exact=True)
    found = nearest_documents(run, H, np.ones(D), 300, recall=0.01)
    [told] = found.meta.index["generations"]
    assert told["effort"] < 16
    assert (len(found), found.meta.exact) == (300, False)
    assert found.meta.recall == told["recall"]
    values = {r["doc_id"]: r["value"] for r in exact}
    assert [r["value"] for r in found] == sorted((values[r["doc_id"]] for r in found), reverse=True)
    all_of_them = nearest_documents(run, H, np.ones(D), 700, recall=0.01)
    assert all_of_them.to_dicts() == exact.to_dicts()
    assert any("of others it may be lower" in w for w in found.meta.warnings)


def test_documents_that_came_after_the_index(tmp_path):
    store, tokenization = tokenized(tmp_path, 700, rows_per_unit=1024)
    kind = kept_run(store, "r", tokenization, keep=("pooled",))
    units = [u.unit for u in tokenization.units]
    kind.finish(without=units[-4:], seal=False)
    build_index(store, "r", H, kind="flat", of="documents")
    run = kind.finish()
    query = np.random.default_rng(7).standard_normal(D)
    exact = nearest_documents(run, H, query, 650, exact=True)
    found = nearest_documents(run, H, query, 650)
    assert found.to_dicts() == exact.to_dicts()
    assert found.meta.n_eligible == exact.meta.n_eligible == len(run.pooled(H).to_numpy())
    assert 0 < found.meta.index["n_scanned"] < 650
    few = nearest_documents(run, H, query, 20)
    assert few.to_dicts() == exact.to_dicts()[:20]
    assert any("in no index" in w for w in few.meta.warnings)


def test_another_metric_has_another_index(indexed, made):
    run, query = indexed["run"], np.random.default_rng(5).standard_normal(D)
    flat = nearest_documents(run, H, query, 5, metric="l2", transform="center")
    assert flat.meta.index["generations"][0]["kind"] == "flat"
    assert (
        flat.to_dicts()
        == nearest_documents(run, H, query, 5, metric="l2", transform="center", exact=True).to_dicts()
    )
    other = nearest_documents(run, H, query, 5, metric="ip")
    assert other.meta.exact
    assert any("index of documents is for metric=" in w for w in other.meta.warnings)
    alone = nearest_documents(made["runs"]["pooled"], H, query, 5, exact=False)
    assert any("no index of documents" in w for w in alone.meta.warnings)


def test_shards_given(indexed):
    run, query = indexed["run"], np.random.default_rng(8).standard_normal(D)
    [cosine] = open_indexes(run, H, of="documents", metric="cosine")
    given = run.nearest(H, query, 5, of="documents", shards=LocalShards(cosine))
    assert given.to_dicts() == run.nearest(H, query, 5, of="documents").to_dicts()
    assert given.meta.index["generations"][0]["id"] == cosine.id
    with pytest.raises(InvalidInputError, match="shards= has shards of index"):
        run.nearest(H, query, 5, of="documents", metric="ip", shards=LocalShards(cosine))


def test_without_faiss(indexed, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    run, query = indexed["run"], np.random.default_rng(9).standard_normal(D)
    found = run.nearest(H, query, 5, of="documents")
    assert any("FAISS is not installed" in w for w in found.meta.warnings)
    assert (found.meta.exact, found.meta.index) == (True, None)
    assert found.to_dicts() == run.nearest(H, query, 5, of="documents", exact=True).to_dicts()


def test_huge_queries(indexed):
    """Beyond float32, which indexes are searched in."""
    run, query = indexed["run"], np.random.default_rng(6).standard_normal(D)
    plain = nearest_documents(run, H, query, 5).table["doc_id"].to_pylist()
    for scale in (1e-200, 1e100):
        assert nearest_documents(run, H, query * scale, 5).table["doc_id"].to_pylist() == plain
    with pytest.raises(InvalidInputError, match="beyond float32"):
        nearest_documents(run, H, query * 1e100, 5, metric="l2", transform="centre")


def test_tiny_queries(tmp_path):
    """Below float32 too; and none at all, to which all documents are alike."""
    store, tokenization = tokenized(tmp_path, 700, rows_per_unit=1024)
    kept_run(store, "r", tokenization, keep=("pooled",)).finish()
    build_index(store, "r", H, kind="flat", of="documents", metric="ip")
    run, query = store.refresh().run("r"), np.random.default_rng(6).standard_normal(D)
    for scale in (1e-44, 1e-60, 0.0):
        found = nearest_documents(run, H, query * scale, 5, metric="ip")
        exact = nearest_documents(run, H, query * scale, 5, metric="ip", exact=True)
        assert found.to_dicts() == exact.to_dicts()
        assert found.meta.exact == (scale == 0)
        assert any("all zeros where the index compares" in w for w in found.meta.warnings) == (scale == 0)
