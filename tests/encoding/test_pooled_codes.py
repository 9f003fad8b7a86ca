"""Pooled codes of documents against sums over their tokens, one by one; however documents are cut into units."""

import itertools
import uuid

import numpy as np
import pytest

import actstore
from actstore.errors import FormatError, InvalidInputError, NotFoundError
from actstore.ingest import import_corpus, tokenize_corpus
from actstore.ingest.encoding import pooled_codes
from actstore.ingest.encoding.encode import encode
from actstore.pooled_codes_table import PooledBatch, add_pieces, keep_top, pooled_from_table, pooled_to_bytes
from tests.encoding import encoded
from tests.encoding.encoded import (
    HOOK_POINT,
    add_dictionary,
    make_run,
    naive_codes,
    naive_pooled,
    pooled_documents,
)
from tests.ingest import kept, synthetic


@pytest.fixture
def store():
    return actstore.open(f"memory://pooled-codes-{uuid.uuid4().hex}", create=True)


def dense_codes(run, value_dtype: str = "float16") -> dict:
    """Codes of every stored and finite row, by unit and offset of its token row."""
    dictionary = run.store.dictionary("sae")
    acts = run.store.refresh().run(run.name).activations(HOOK_POINT)
    found = {}
    for unit in run.tokenization.units:
        low = unit.unit * run.tokenization.rows_per_unit
        rows = acts.rows(low, low + run.tokenization.rows_per_unit)
        values = acts.read(rows)
        codes = naive_codes(dictionary, values, value_dtype)
        for row, x, code in zip(rows.tolist(), values, codes, strict=True):
            if np.isfinite(x).all():
                found[unit.unit, row - low] = code
    return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("settings", "run_settings"),
    [
        ({"pool_top_m": None}, {}),
        ({"pool_top_m": 3}, {}),
        ({"pool_top_m": 4, "pool_special": True, "value_dtype": "float32"}, {}),
        ({}, {"rate": 0.3}),
    ],
)
def test_pooled_codes_are_sums_over_the_documents_tokens(store, tmp_path, seed, settings, run_settings):
    tokenization = kept.tokenized(store, tmp_path / "tokenizer", n=20, seed=seed, rows_per_unit=32)
    run = make_run(store, tokenization, **run_settings)
    add_dictionary(store, seed=seed)
    encode(store, "sae", "r", postings=False, **settings)
    pooled = store.run("r").codes("sae").pooled()
    expected = naive_pooled(
        run,
        dense_codes(run, settings.get("value_dtype", "float16")),
        top_m=settings.get("pool_top_m", 512),
        pool_special=settings.get("pool_special", False),
    )
    assert pooled_documents(pooled.scan()) == expected
    assert pooled.n_documents == len(expected)
    assert max(len(batch) for batch in pooled.scan(batch_docs=2)) <= 2
    assert pooled_documents(pooled.scan(batch_docs=2)) == expected
    rng = np.random.default_rng(seed)
    asked = rng.choice(sorted(expected), 7)
    batch = pooled.documents(asked)
    assert batch.doc_ids.tolist() == asked.tolist()
    for i, doc_id in enumerate(asked.tolist()):
        assert pooled_documents([batch.slice(i, i + 1)]) == {doc_id: expected[doc_id]}
    np.testing.assert_allclose(
        batch.mean * np.repeat(np.maximum(batch.n_tokens, 1), np.diff(batch.indptr)), batch.sum
    )


def test_documents_of_missing_units_are_not_there(store, tmp_path):
    tokenization = kept.tokenized(store, tmp_path / "tokenizer", n=20, rows_per_unit=32)
    run = make_run(store, tokenization, finish=False)
    run.finish(without=(2,))
    add_dictionary(store)
    encode(store, "sae", "r", postings=False)
    pooled = store.run("r").codes("sae").pooled()
    dense = dense_codes(run)
    expected = naive_pooled(run, dense, without=(2,))
    assert pooled_documents(pooled.scan()) == expected
    assert pooled.n_documents == len(expected)
    there = set(encoded.token_rows(run))
    gone = sorted(there - set(expected))
    assert gone
    with pytest.raises(NotFoundError, match=r"units \[2\] are not encoded"):
        pooled.documents([gone[0]])
    empty = sorted(set(range(20)) - there)
    for doc_id in [*empty[:1], 20, -1]:
        with pytest.raises(NotFoundError, match="no token"):
            pooled.documents([doc_id])
    with pytest.raises(InvalidInputError):
        pooled.documents([0.5])
    assert len(pooled.documents([])) == 0


def test_documents_without_tokens_between_others_are_not_there(store, tmp_path):
    texts = ["w1 w2" if i % 2 else "" for i in range(40)]
    import_corpus(store, "words", [{"text": text} for text in texts])
    tokenizer = synthetic.word_tokenizer(tmp_path / "tokenizer", texts)
    report = tokenize_corpus(store.refresh(), "words", tokenizer, window=16, rows_per_unit=16)
    make_run(store, store.refresh().tokenization(report.id))
    add_dictionary(store)
    encode(store, "sae", "r", postings=False)
    pooled = store.run("r").codes("sae").pooled()
    assert pooled.documents(range(1, 40, 2)).doc_ids.tolist() == list(range(1, 40, 2))
    for doc_id in range(0, 40, 2):
        with pytest.raises(NotFoundError, match="no token"):
            pooled.documents([doc_id])


def test_blocks_of_any_size_give_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(0, 9, 30).tolist(), 40, 0, 1]
    n = sum(lengths)
    dense = np.where(rng.random((n, 12)) < 0.3, rng.random((n, 12)), 0).astype(np.float32)
    codes = pooled_codes.SparseRows.from_dense(dense, "float32")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    is_piece = np.zeros(len(lengths), bool)
    is_piece[[0, -1]] = True
    enters = rng.random(n) < 0.8
    documents = pooled_codes.UnitDocuments(
        np.arange(len(lengths)) * 3, starts, is_piece, enters, np.zeros(n, np.int64)
    )
    answers = []
    for block in (1, 7, 50, 1 << 20):
        monkeypatch.setattr(pooled_codes, "_BLOCK_CODES", block)
        answers.append(pooled_codes.pool_codes(codes, documents, top_m=4))
    for other in answers[1:]:
        assert_same(answers[0], other)
    sums = dense.astype(np.float64)
    for i, (a, b) in enumerate(itertools.pairwise(starts.tolist())):
        used = sums[a:b][enters[a:b]]
        one = answers[0].slice(i, i + 1)
        np.testing.assert_allclose(one.total_sum, used.sum(), rtol=1e-12)
        assert one.n_fired.item() == (used > 0).any(axis=0).sum()
        assert len(one.latents) == (one.n_fired.item() if is_piece[i] else min(4, one.n_fired.item()))


def test_equal_sums_are_cut_at_the_lower_latents():
    batch = one_document({3: (2.0, 4.0, 2), 1: (1.0, 4.0, 4), 7: (5.0, 5.0, 1), 9: (4.0, 4.0, 1)})
    assert keep_top(batch, 2).latents.tolist() == [1, 7]
    assert keep_top(batch, 3).latents.tolist() == [1, 3, 7]
    assert keep_top(batch, 4) is batch
    assert keep_top(batch, None) is batch


def test_pieces_add_up():
    both = add_pieces([
        one_document({1: (1.0, 4.0, 4), 3: (2.0, 4.0, 2)}), one_document({3: (3.0, 3.0, 1), 4: (0.5, 0.5, 1)}), one_document({})
    ])  # fmt: skip
    assert pooled_documents([both]) == {
        5: (30, 3, 11.5, 3.0, 8, {1: (1.0, 4.0, 4), 3: (3.0, 7.0, 3), 4: (0.5, 0.5, 1)})
    }


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_is_read(dtype):
    some = [one_document({1: (1.0, 4.0, 4), 3: (2.0, 4.0, 2)}, dtype), one_document({}, dtype)]
    batch = pooled_codes.concat_batches(some, value_dtype=dtype)
    for one in (batch, batch.take([]), batch.take([1, 1])):
        table = read_parquet(pooled_to_bytes(one, np.ones(len(one), bool)))
        found, is_piece = pooled_from_table(table, value_dtype=dtype, key="k")
        assert_same(found, one)
        assert is_piece.all()
    with pytest.raises(FormatError, match="not a table of pooled codes"):
        pooled_from_table(table, value_dtype={"float16": "float32"}.get(dtype, "float16"), key="k")
    with pytest.raises(FormatError, match="not a table of pooled codes"):
        pooled_from_table(table.drop_columns(["n_fired"]), value_dtype=dtype, key="k")


def one_document(entries: dict, dtype: str = "float16") -> PooledBatch:
    entries = dict(sorted(entries.items()))
    column = lambda i, kind: np.array([v[i] for v in entries.values()], kind)  # noqa: E731
    return PooledBatch(
        doc_ids=np.array([5]),
        indptr=np.array([0, len(entries)]),
        latents=np.array(list(entries), np.uint32),
        max=column(0, dtype),
        sum=column(1, np.float64),
        count=column(2, np.uint32),
        n_tokens=np.array([10]),
        n_fired=np.array([len(entries)]),
        total_sum=np.array([column(1, np.float64).sum()]),
        total_max=np.array([column(0, np.float32).max(initial=0)]),
        total_count=np.array([column(2, np.int64).sum()]),
    )


def assert_same(a: PooledBatch, b: PooledBatch) -> None:
    for name in PooledBatch.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


def read_parquet(data: bytes):
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(data))
