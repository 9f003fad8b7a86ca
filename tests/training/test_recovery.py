"""A known sparse dictionary is found again in the rows that it made."""

import pytest
import torch

from actstore.ingest.training import SaeTrainConfig, train_sae
from tests.training.stores import make_run, recovered, sparse_rows

HOOK = "layers.0.resid_post"


@pytest.mark.parametrize(("method", "least"), [("topk", 0.95), ("batchtopk", 0.85), ("jumprelu", 0.8)])
def test_small(tmp_path, method, least):
    rows, features = sparse_rows(60_000, d=64, n_features=96, active=4, seed=0)
    store = make_run(tmp_path, {HOOK: rows}, rows_per_unit=8192)
    config = SaeTrainConfig(
        name="sae", method=method, n_latents=192, k=4, n_rows=300_000, batch_rows=1024, learning_rate=0.003,
        checkpoint_dir=str(tmp_path / "c"), eval_rows=4096,
    )  # fmt: skip
    report = train_sae(store, "run", HOOK, config).hook_points[0]
    assert recovered(store.dictionary("sae").decoder(), features) >= least
    assert report.explained_variance > 0.85
    assert report.l0 == pytest.approx(4, rel=0.1)
    # As many random directions find none.
    noise = torch.randn(192, 64, generator=torch.Generator().manual_seed(0)).numpy()
    assert recovered(noise, features) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_size(tmp_path):
    """1,024 features in 256 dimensions, 16 in each row."""
    rows, features = sparse_rows(400_000, d=256, n_features=1024, active=16, seed=0)
    store = make_run(tmp_path, {HOOK: rows}, rows_per_unit=32_768)
    config = SaeTrainConfig(
        name="sae", n_latents=2048, k=16, n_rows=1_200_000, batch_rows=2048, learning_rate=0.002,
        checkpoint_dir=str(tmp_path / "c"),
    )  # fmt: skip
    report = train_sae(store, "run", HOOK, config).hook_points[0]
    assert recovered(store.dictionary("sae").decoder(), features) >= 0.95
    assert report.explained_variance > 0.8
