"""Pooled vectors of real models, through the whole ingest: RDS+ is the formula of its paper on transformers' own output."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

import actstore
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from tests.ingest import tiny_models

TEXTS = [
    "The quick brown fox.",
    "x",
    "",
    "Naïve café, 東京.",
    "def f(x):\n    return x + 1\n",
    "A tuple cannot be changed.",
]
LONG = "A list is a mutable sequence; a tuple is not. " * 12


def rds_plus(model, ids) -> np.ndarray:
    """Ivison et al. (2025), section 3: the last layer's states h_t weighted by w_t = t / (1 + 2 + ... + n), in float64."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().numpy()
    n = len(ids)
    weights = np.arange(1, n + 1) / (n * (n + 1) / 2)
    return (weights[:, None] * states).sum(axis=0)


@pytest.mark.parametrize(
    ("family", "dtype"), [("gpt2", "float32"), ("llama", "bfloat16"), ("bert", "float32")]
)
def test_rds_plus(tmp_path, family, dtype):
    folder = tiny_models.cached(family)
    store = actstore.open(str(tmp_path / "store"), create=True)
    import_corpus(store, "texts", [*TEXTS, LONG])
    # BERT has no norm behind its last layer.
    last_layer = AutoConfig.from_pretrained(folder).num_hidden_layers - 1
    hook_point = f"layers.{last_layer}.resid_post" if family == "bert" else "final_norm"
    asked = IngestConfig(
        corpus="texts", model=folder, hook_points=[hook_point], run="rds",
        keep=("pooled",), poolings=("weighted_mean", "last"), pool_special=True, compute_dtype=dtype, batch_tokens=1,
        device="cpu", ray_address=None, rows_per_unit=64, window=32,
    )  # fmt: skip
    report = run_ingest(store, asked)
    assert report.is_complete
    run = store.run("rds")
    assert (run.keep, run.poolings) == (("pooled",), ("last", "weighted_mean"))
    (name,) = run.hook_points
    found = run.pooled(name, "weighted_mean").to_numpy(include_empty=True)
    last = run.pooled(name, "last").to_numpy(include_empty=True)
    vectors = dict(zip(found.doc_ids.tolist(), found.vectors, strict=True))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    checked = 0
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        if not ids:
            assert i not in vectors  # a document without any token is in no unit
            continue
        assert len(ids) <= 32
        assert found.n_tokens[found.doc_ids.tolist().index(i)] == len(ids)
        np.testing.assert_array_max_ulp(vectors[i], rds_plus(model, ids).astype(np.float32), maxulp=1)
        with torch.no_grad():
            final = model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1].float().numpy()
        np.testing.assert_array_equal(last.vectors[last.doc_ids.tolist().index(i)], final)
        checked += 1
    assert checked >= 5
    assert found.n_tokens[found.doc_ids.tolist().index(len(TEXTS))] == len(tokenizer(LONG)["input_ids"]) > 64
    with pytest.raises(actstore.errors.InvalidInputError, match="pooled vectors only"):
        run.activations(name)


def test_vectors_are_of_the_dense_rows(tmp_path):
    """With both kept, each vector is made of the stored rows of its document, special tokens left out."""
    folder = tiny_models.cached("bert")
    store = actstore.open(str(tmp_path / "store"), create=True)
    import_corpus(store, "texts", [*TEXTS, LONG])
    asked = IngestConfig(
        corpus="texts", model=folder, hook_points=["layers.*.resid_post"], run="both", keep=("dense", "pooled"),
        device="cpu", ray_address=None, rows_per_unit=64, window=32,
    )  # fmt: skip
    run_ingest(store, asked)
    run = store.run("both")
    tokens = [run.tokenization.unit_table(u.unit).to_pandas() for u in run.tokenization.units]
    for name in run.hook_points:
        acts = run.activations(name)
        found = run.pooled(name).to_numpy(include_empty=True)
        for doc_id, n, vector in zip(found.doc_ids, found.n_tokens, found.vectors, strict=True):
            rows = np.concatenate([t[(t.doc_id == doc_id) & ~t.is_special]["row"].to_numpy() for t in tokens])
            assert n == len(rows)
            if n:
                np.testing.assert_allclose(
                    vector, acts[rows].mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-7
                )
            else:
                assert np.isnan(vector).all()


def test_everything_at_once(tmp_path):
    """Sampled int8 rows, pooled vectors and covariances of one run, through the job and the real model."""
    folder = tiny_models.cached("gpt2")
    store = actstore.open(str(tmp_path / "store"), create=True)
    import_corpus(store, "texts", [*TEXTS, LONG] * 6)
    settings = {
        "corpus": "texts", "model": folder, "hook_points": ["layers.1.resid_post"], "keep": ("dense", "pooled"),
        "device": "cpu", "ray_address": None, "rows_per_unit": 64, "window": 32, "overlap": 8,
    }  # fmt: skip
    run_ingest(store, IngestConfig(run="full", **settings))
    report = run_ingest(
        store, IngestConfig(run="small", dtype="int8", sample=0.5, seed=4, covariance=True, **settings)
    )
    assert report.is_complete
    full, small = store.run("full"), store.run("small")
    name = "layers.1.resid_post"
    assert full.n_rows / 3 < small.n_rows < full.n_rows * 2 / 3
    rows, values = zip(*small.activations(name).scan(), strict=True)
    rows, values = np.concatenate(rows), np.concatenate(values)
    true = full.activations(name)[rows]
    error = small.stats(name).int8_error
    assert len(rows) == small.n_rows == small.stats(name).n_rows == small.covariance(name).n
    assert 0 < error.relative < 0.02
    np.testing.assert_allclose(
        error.squared_error, ((values.astype(np.float64) - true) ** 2).sum(), rtol=1e-6
    )
    for pooling in small.poolings:
        a, b = full.pooled(name, pooling).to_numpy(), small.pooled(name, pooling).to_numpy()
        np.testing.assert_array_equal(a.doc_ids, b.doc_ids)
        np.testing.assert_array_equal(a.n_tokens, b.n_tokens)
        np.testing.assert_array_equal(a.vectors, b.vectors)
