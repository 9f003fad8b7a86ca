"""Channel moments for int8 against numpy over plain forward passes; and the windows that stand for a corpus."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

import actstore
from actstore.ingest import IngestConfig, import_corpus, tokenize_corpus
from actstore.ingest.backend import LocalBackend
from actstore.ingest.calibrate import _Sums, calibrate
from actstore.ingest.unit import window_starts
from actstore.ingest.window_sample import sample_windows, stratified
from actstore.int8 import Int8Transform, fit_int8
from tests.ingest import synthetic, tiny_models


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    store = actstore.open(str(tmp_path_factory.mktemp("calibrate") / "store"), create=True)
    import_corpus(store, "c", synthetic.documents(120, seed=2))
    report = tokenize_corpus(
        store.refresh(), "c", tiny_models.cached("llama"), window=32, overlap=0, rows_per_unit=256
    )
    return store.refresh(), store.tokenization(report.id)


def test_transforms_are_those_of_the_moments_that_plain_transformers_give(tokenized):
    store, tokenization = tokenized
    folder = tiny_models.cached("llama")
    asked = IngestConfig(
        "c", folder, ["layers.*.resid_post"], "r", device="cpu", ray_address=None, dtype="int8", seed=9
    )
    backend = LocalBackend(asked)
    description = backend.describe()
    found = calibrate(backend, store, tokenization, description, asked)
    assert found == calibrate(backend, store, tokenization, description, asked)
    assert list(found) == [name for name, _ in description.hook_points]

    token_ids, starts = sample_windows(tokenization, n_tokens=8192, n_units=8, seed=9)
    moments = backend.call("calibrate", token_ids, starts)
    model = AutoModel.from_pretrained(folder).eval()
    rows = []
    with torch.inference_mode():
        for low, high in itertools.pairwise(starts):
            ids = torch.from_numpy(token_ids[None, low:high].astype(np.int64))
            rows.append(model(ids, output_hidden_states=True).hidden_states[1][0].numpy())
    expected = np.concatenate(rows).astype(np.float64)
    mean, std = moments["layers.0.resid_post"]
    np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(std, expected.std(0), rtol=1e-4)
    assert isinstance(found["layers.0.resid_post"], Int8Transform)
    assert found["layers.0.resid_post"] == fit_int8(mean, std)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 999))
def test_moments_in_pieces_are_those_of_all_rows(sizes, seed):
    rng = np.random.default_rng(seed)
    blocks = [
        (rng.standard_normal((n, 5)) * [1, 1e-3, 1e3, 1, 0] + [0, 1, 1e4, -5, 2]).astype(np.float32)
        for n in sizes
    ]
    for block in blocks:
        block[rng.random(len(block)) < 0.1] = np.nan
    sums = _Sums.empty(5)
    for block in blocks:
        sums.add(block)
    mean, std = sums.moments()
    rows = np.concatenate(blocks).astype(np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if len(rows):
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(std, rows.std(0), rtol=1e-6, atol=1e-9)
    else:
        assert (mean == 0).all()
        assert (std == 1).all()


@settings(max_examples=40, deadline=None)
@given(n_tokens=st.integers(1, 6000), n_units=st.integers(1, 30), seed=st.integers(0, 50))
def test_a_sample_is_whole_windows_of_several_units(tokenized, n_tokens, n_units, seed):
    _, tokenization = tokenized
    ids, starts = sample_windows(tokenization, n_tokens=n_tokens, n_units=n_units, seed=seed)
    again, same = sample_windows(tokenization, n_tokens=n_tokens, n_units=n_units, seed=seed)
    np.testing.assert_array_equal(ids, again)
    np.testing.assert_array_equal(starts, same)
    assert starts[0] == 0
    assert starts[-1] == len(ids)
    assert (np.diff(starts) > 0).all()
    windows = set()
    for unit in tokenization.units:
        t = tokenization.unit_table(unit.unit)
        of_unit = window_starts(t["doc_id"].to_numpy(), t["window"].to_numpy())
        token_ids = t["token_id"].to_numpy()
        windows |= {tuple(token_ids[a:b].tolist()) for a, b in itertools.pairwise(of_unit)}
    assert {tuple(ids[a:b].tolist()) for a, b in itertools.pairwise(starts)} <= windows
    # Enough of them, unless the units drawn have no more; never more than a window too many for each unit.
    most = sum(sorted((u.rows for u in tokenization.units), reverse=True)[:n_units])
    assert len(ids) <= n_tokens + 32 * n_units
    assert len(ids) >= min(n_tokens, most // 4)


@given(st.integers(1, 10_000), st.data())
def test_one_of_each_stretch(n, data):
    k = data.draw(st.integers(1, n))
    drawn = stratified(n, k, np.random.default_rng(0))
    assert len(drawn) == k
    assert all(i * n // k <= d < (i + 1) * n // k for i, d in enumerate(drawn))
