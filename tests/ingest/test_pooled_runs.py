"""Runs that keep pooled vectors: what is read is what a loop over all tokens gives, by every way of reading."""

import itertools

import numpy as np
import pytest

import actstore
from actstore.errors import ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.ingest.seal_objects import PooledMerge
from actstore.log import fsck
from actstore.pooled_tables import POOLINGS, spanning_documents
from tests.ingest import kept
from tests.ingest.kept import HOOK_POINTS, KeptRun, naive_pooled

COUNT = itertools.count()


@pytest.fixture
def store(tmp_path, request):
    if "damage" in request.fixturenames:
        return actstore.open(str(tmp_path / "store"), create=True)
    return actstore.open(f"memory://pooled-{next(COUNT)}", create=True, cache_dir=tmp_path / "cache")


@pytest.fixture
def tokenization(store, tmp_path):
    found = kept.tokenized(store, tmp_path / "tokenizer")
    spans = list(spanning_documents(found.units))
    assert len(spans) >= 4
    assert max(len(units) for _, units in spans) >= 3
    return found


def check_pooled(run, expected, name, poolings=POOLINGS):
    """Everything that `run.pooled` gives equals what is expected, and nothing else is there."""
    with_vectors = [d for d in sorted(expected) if expected[d][0]]
    assert len(with_vectors) < len(expected), "the test needs a document without a token"
    for pooling in poolings:
        pooled = run.pooled(name, pooling)
        found = pooled.to_numpy()
        assert found.doc_ids.tolist() == with_vectors
        assert found.n_tokens.tolist() == [expected[d][0] for d in with_vectors]
        assert found.vectors.dtype == np.float32
        wanted = np.stack([expected[d][1][pooling] for d in with_vectors])
        np.testing.assert_allclose(found.vectors, wanted, rtol=1e-6, atol=1e-6)
        everything = pooled.to_numpy(include_empty=True)
        assert everything.doc_ids.tolist() == sorted(expected)
        assert pooled.n_documents == len(expected)
        empty = everything.n_tokens == 0
        assert np.isnan(everything.vectors[empty]).all()
        np.testing.assert_array_equal(everything.vectors[~empty], found.vectors)
        parts = list(pooled.scan())
        assert len(parts) > 1
        np.testing.assert_array_equal(np.concatenate([p.vectors for p in parts]), found.vectors)


def sql_vectors(store, run, name, pooling):
    rows = store.sql(
        "SELECT doc_id, n_tokens, vector FROM pooled WHERE run = ? AND hook_point = ? AND pooling = ? ORDER BY doc_id",
        params=[run, name, pooling],
    ).to_dicts()
    return {row["doc_id"]: (row["n_tokens"], row["vector"]) for row in rows}


@pytest.mark.parametrize("pool_special", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pooled_alone(store, tokenization, pool_special, dtype):
    kind = KeptRun(store, "p", tokenization, keep=("pooled",), pool_special=pool_special, dtype=dtype)
    run = kind.finish()
    assert (run.keep, run.poolings, run.is_complete) == (("pooled",), POOLINGS, True)
    assert run.n_rows == tokenization.n_rows
    keys = list(store.storage.list("runs/p/"))
    assert {key.split("/")[2] for key in keys} == {"pooled", "stats"}
    for name in HOOK_POINTS:
        expected = naive_pooled(kind, name, pool_special=pool_special)
        if pool_special:  # an empty text has its [CLS] and [SEP]
            assert min(n for n, _ in expected.values()) == 2
            found = run.pooled(name, "weighted_mean").to_numpy()
            wanted = np.stack([expected[d][1]["weighted_mean"] for d in sorted(expected)])
            np.testing.assert_allclose(found.vectors, wanted, rtol=1e-6, atol=1e-6)
        else:
            check_pooled(run, expected, name)
        everything = np.concatenate(list(kind.captured(name).values()))
        assert run.stats(name).n_rows == tokenization.n_rows
        np.testing.assert_allclose(
            run.stats(name).mean, everything.mean(axis=0, dtype=np.float64), rtol=1e-9, atol=1e-9
        )
    assert fsck(store.storage, deep=True).is_clean


def test_sql_gives_the_same(store, tokenization):
    kind = KeptRun(store, "p", tokenization, keep=("pooled",), poolings=("mean", "last"))
    run = kind.finish()
    dense = KeptRun(store, "dense", tokenization).finish()
    for name in HOOK_POINTS:
        expected = naive_pooled(kind, name)
        for pooling in ("mean", "last"):
            found = sql_vectors(store, "p", name, pooling)
            vectors = run.pooled(name, pooling).to_numpy()
            assert {d: n for d, (n, _) in found.items()} == {d: n for d, (n, _) in expected.items()}
            assert all((v is None) == (n == 0) for n, v in found.values())
            np.testing.assert_array_equal([found[d][1] for d in vectors.doc_ids.tolist()], vectors.vectors)
    assert not sql_vectors(store, "p", "embed", "max")
    n = store.sql("SELECT run, count(*) AS n FROM pooled GROUP BY run").to_dicts()
    assert n == [{"run": "p", "n": 2 * 2 * run.pooled("embed").n_documents}]
    joined = store.sql(
        "SELECT count(*) AS n FROM pooled JOIN runs USING (run) JOIN documents USING (corpus, doc_id)"
    ).to_dicts()
    assert joined[0]["n"] == n[0]["n"]
    kinds = store.sql("SELECT run, keep FROM runs ORDER BY run").to_dicts()
    assert kinds == [{"run": "dense", "keep": "dense"}, {"run": "p", "keep": "pooled"}]
    described = store.sql("DESCRIBE pooled").to_dicts()
    assert [row["column_name"] for row in described] == [
        "run",
        "hook_point",
        "pooling",
        "doc_id",
        "n_tokens",
        "vector",
    ]
    assert described[-1]["column_type"] == "FLOAT[]"
    assert dense.poolings == ()


def test_before_the_seal(store, tokenization):
    """Documents are there as soon as all of their units are; SQL has those of one unit only."""
    kind = KeptRun(store, "p", tokenization, keep=("pooled",))
    spans = dict(spanning_documents(tokenization.units))
    longest = max(spans.values(), key=len)
    missing = longest[1]
    run = kind.finish(without=[missing], seal=False)
    assert not run.is_complete
    expected = naive_pooled(kind, "embed", without=[missing])
    check_pooled(run, expected, "embed")
    assert set(sql_vectors(store, "p", "embed", "max")) == expected.keys() - spans.keys()
    run = kind.finish()
    expected = naive_pooled(kind, "embed")
    check_pooled(run, expected, "embed")
    assert set(sql_vectors(store, "p", "embed", "max")) == expected.keys()
    assert run.collection.seal.meta["pooled"] == {"documents": len(spans), "incomplete": 0}


def test_without_quarantined_units(store, tokenization):
    """Documents that have rows in such a unit have no vector, and are counted; nothing is made of half a document."""
    kind = KeptRun(store, "q", tokenization, keep=("dense", "pooled"))
    without = [1, len(tokenization.units) - 2]
    run = kind.finish(without=without)
    assert run.is_complete
    assert run.quarantined == dict.fromkeys(without, "broken for a test")
    expected = naive_pooled(kind, "embed", without=without)
    check_pooled(run, expected, "embed")
    assert set(sql_vectors(store, "q", "embed", "max")) == expected.keys()
    spans = dict(spanning_documents(tokenization.units))
    cut = sum(any(u in without for u in units) for units in spans.values())
    assert cut
    assert run.collection.seal.meta["pooled"] == {"documents": len(spans) - cut, "incomplete": cut}


def test_other_rows_do_not_enter(store, tokenization):
    """A NaN takes its row out at its own hook point, and the counts there say so."""

    def value(tokens, width):
        rows = kept.activations(tokens, width)
        if width == HOOK_POINTS["embed"]:
            rows[tokens["window_position"].to_numpy() % 4 == 2, 1] = np.nan
            rows[tokens["doc_id"].to_numpy() == 4] = np.inf
        return rows

    kind = KeptRun(store, "m", tokenization, value=value, keep=("dense", "pooled"), nonfinite="mask")
    run = kind.finish()
    for name in HOOK_POINTS:
        check_pooled(run, naive_pooled(kind, name), name)
    assert 4 not in run.pooled("embed").to_numpy().doc_ids
    assert 4 in run.pooled("layers.0.resid_post").to_numpy().doc_ids
    assert run.stats("embed").nonfinite == run.collection.nonfinite > 0


@pytest.mark.parametrize("settings", [{}, {"rate": 0.3, "seed": 5}, {"dtype": "int8"}])
def test_beside_dense_rows(store, tokenization, settings):
    """Pooled vectors are of all rows as captured, whatever dense storage keeps of them."""
    kind = KeptRun(store, "both", tokenization, keep=("dense", "pooled"), **settings)
    run = kind.finish()
    assert run.keep == ("dense", "pooled")
    for name in HOOK_POINTS:
        check_pooled(run, naive_pooled(kind, name), name)
        assert len(run.activations(name)) == run.n_rows
        assert run.stats(name).n_rows == run.n_rows
    assert fsck(store.storage, deep=True).is_clean


def test_merged_vectors_in_several_objects(store, tokenization):
    """They are cut when they are many, and say the same as one object."""
    kind = KeptRun(store, "p", tokenization, keep=("pooled",))
    run = kind.finish(seal=False)
    merge = PooledMerge(store.storage, store.objects, kind.plan, object_bytes=900)
    objects = list(merge.write(run.collection, tokenization.units))
    assert len(objects) > 2
    spans = dict(spanning_documents(tokenization.units))
    assert merge.n_documents == len(spans)
    tables = [store.objects.table(obj) for obj in objects]
    assert [d for table in tables for d in table["doc_id"].to_pylist()] == sorted(spans)
    expected = naive_pooled(kind, "embed")
    for row in (row for table in tables for row in table.to_pylist()):
        n, vectors = expected[row["doc_id"]]
        assert row["embed/n_tokens"] == n
        np.testing.assert_allclose(row["embed/max"], vectors["max"], rtol=1e-6)


def test_what_is_not_there(store, tokenization):
    pooled = KeptRun(store, "p", tokenization, keep=("pooled",), poolings=("mean",)).finish()
    dense = KeptRun(store, "d", tokenization).finish()
    with pytest.raises(InvalidInputError, match=r"keeps mean: ") as caught:
        pooled.pooled("embed", "last")
    assert caught.value.kind is ErrorKind.BAD_ARGUMENT
    with pytest.raises(InvalidInputError, match="keeps dense rows only"):
        dense.pooled("embed")
    for ask in (pooled.activations, pooled.array_path):
        with pytest.raises(InvalidInputError, match="keeps pooled vectors only") as caught:
            ask("embed")
        assert caught.value.kind is ErrorKind.BAD_ARGUMENT
    with pytest.raises(NotFoundError, match="not stored"):
        pooled.pooled("layers.7.resid_post")


@pytest.mark.parametrize("which", ["pooled/0", "pooled/pieces-", "pooled/merged-"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_named(store, tokenization, which, damage):
    """Any pooled object that is not what was promised is an error that names it, read in whatever way."""
    run = KeptRun(store, "p", tokenization, keep=("pooled",)).finish(seal=which != "pooled/pieces-")
    key = next(k for k in store.storage.list("runs/p/") if which in k)
    path = store.storage.local_path(key)
    with open(path, "rb") as file:
        data = bytearray(file.read())
    if damage == "gone":
        store.storage.delete(key)
    else:
        data = data[:-7] if damage == "cut" else data
        data[len(data) // 3] ^= 4 if damage == "flip" else 0
        with open(path, "wb") as file:
            file.write(data)
    fresh = actstore.open(store.url)
    with pytest.raises(FormatError, match=key):
        fresh.run(run.id).pooled("embed").to_numpy()
    if which != "pooled/pieces-":
        with pytest.raises(FormatError, match=key):
            fresh.sql("SELECT count(*) FROM pooled")
