"""What a training reports: reconstruction against numpy, losses against a forward pass that is written out by hand."""

import math

import numpy as np
import pytest
import torch

import actstore
from actstore.dictionary_data import make_dictionary
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.dictionaries.encoder import Encoder
from actstore.ingest.training import HookPointReport, SaeTrainConfig, train_sae
from actstore.ingest.training.language_model import load_language_model
from actstore.ingest.training.masks import TokenMask, choose_evaluation, norm_limit
from actstore.ingest.training.measure import measure_reconstruction
from actstore.ingest.training.splice import loss_recovered, why_not_spliced
from actstore.ingest.training.start import geometric_median, random_directions, row_scale
from tests.ingest import synthetic, tiny_models

HOOKS = [
    "embed",
    "layers.*.resid_pre",
    "layers.*.resid_post",
    "layers.1.mlp_out",
    "layers.1.mlp_act",
    "layers.0.resid_mid",
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A run of a GPT-2, whose head is its embedding."""
    store = actstore.open(str(tmp_path_factory.mktemp("measure") / "store"), create=True)
    import_corpus(store, "c", list(synthetic.documents(60, seed=3)))
    for model in ("gpt2", "bert", "llama"):
        config = IngestConfig(
            corpus="c", model=tiny_models.cached(model), hook_points=HOOKS if model == "gpt2" else ["layers.1.resid_post"],
            run=model, window=16, rows_per_unit=128, device="cpu", ray_address=None,
        )  # fmt: skip
        run_ingest(store, config)
    return store.refresh()


def evaluation_of(run, **options):
    return choose_evaluation(run, **{"n_rows": 120, "seed": 0, "special": True, "sinks": True, **options})


def model_of(run):
    config = run.collection.config
    return load_language_model(
        run.model["source"], config["model"], compute_dtype="float32", attn_implementation=config["attn_implementation"],
        device=torch.device("cpu"),
    )  # fmt: skip


def by_hand(model, window, layer, change):
    """Cross-entropies of one window of a GPT-2, layer by layer, with the stream behind `layer` changed at kept tokens."""
    ids = torch.from_numpy(window.token_ids.astype(np.int64))[None]
    base = model.transformer
    stream = base.wte(ids) + base.wpe(torch.arange(ids.shape[1]))[None]
    for i, block in enumerate(base.h):
        stream = block(stream)
        stream = stream if isinstance(stream, torch.Tensor) else stream[0]
        if i == layer:
            keep = torch.from_numpy(window.keep)
            stream[0, keep] = change(stream[0, keep])
    logits = base.ln_f(stream)[0] @ base.wte.weight.T
    probabilities = logits.double().softmax(1)[:-1]
    return (-probabilities[torch.arange(ids.shape[1] - 1), ids[0, 1:]].log()).tolist()


@pytest.mark.parametrize("layer", [0, 2])
def test_losses_against_a_forward_pass_by_hand(gpt2, layer):
    run = gpt2.run("gpt2")
    windows = evaluation_of(run).windows
    loaded = model_of(run)
    mean = torch.randn(32, generator=torch.Generator().manual_seed(0))
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)) / 6
    found = loss_recovered(
        loaded,
        f"layers.{layer}.resid_post",
        windows,
        reconstruct=lambda x: x @ matrix,
        mean=mean,
        norm_limit=math.inf,
    )
    ways = {
        "clean": lambda x: x,
        "spliced": lambda x: x @ matrix,
        "mean_ablated": lambda x: mean.expand_as(x),
        "zero_ablated": torch.zeros_like,
    }
    with torch.no_grad():
        for name, change in ways.items():
            each = [loss for w in windows for loss in by_hand(loaded.model, w, layer, change)]
            assert getattr(found, name) == pytest.approx(np.mean(each), rel=1e-4), name
            assert found.n_predictions == len(each)
    assert found.recovered == (found.zero_ablated - found.spliced) / (found.zero_ablated - found.clean)


@pytest.mark.parametrize(
    "hook_point", ["embed", "layers.1.resid_pre", "layers.1.mlp_out", "layers.1.mlp_act", "final_norm"]
)
def test_what_is_put_back_unchanged_changes_nothing(gpt2, hook_point):
    run = gpt2.run("gpt2")
    loaded = model_of(run)
    width = 128 if hook_point.endswith("mlp_act") else 32
    windows = evaluation_of(run).windows
    found = loss_recovered(
        loaded,
        hook_point,
        windows,
        reconstruct=lambda x: x.clone(),
        mean=torch.zeros(width),
        norm_limit=math.inf,
    )
    assert found.spliced == found.clean
    assert found.zero_ablated == found.mean_ablated != found.clean
    assert found.recovered == 1.0


def test_sinks_stay_when_the_rest_is_replaced(gpt2):
    run = gpt2.run("gpt2")
    loaded, windows = model_of(run), evaluation_of(run).windows
    found = loss_recovered(
        loaded,
        "layers.1.resid_post",
        windows,
        reconstruct=torch.zeros_like,
        mean=torch.zeros(32),
        norm_limit=0.0,
    )
    assert found.clean == found.spliced == found.zero_ablated
    assert math.isnan(found.recovered)


def test_resid_mid_is_not_replaced_where_it_is_read():
    assert why_not_spliced("layers.0.resid_mid") is not None
    assert why_not_spliced("blocks.0.hook_resid_mid") is not None
    assert why_not_spliced("layers.0.attn_out") is None


@pytest.mark.parametrize(
    ("run", "hook_point", "note"),
    [
        ("gpt2", "layers.1.resid_post", None),
        ("gpt2", "layers.0.resid_mid", "would not change the stream"),
        ("llama", "layers.1.resid_post", "no head that predicts tokens"),
        ("bert", "layers.1.resid_post", "head|looks ahead"),
    ],
)
def test_training_on_a_models_run(gpt2, tmp_path, run, hook_point, note):
    import re

    config = SaeTrainConfig(
        name=f"{run}-{hook_point}", n_latents=64, k=8, batch_rows=128, n_rows=4000, learning_rate=0.003, eval_rows=200,
        checkpoint_dir=str(tmp_path), buffer_rows=500,
    )  # fmt: skip
    report = train_sae(gpt2, run, hook_point, config).hook_points[0]
    assert (report.loss is None) == (note is not None)
    if note:
        assert re.search(note, report.loss_note)
    else:
        assert report.loss.n_predictions > 100
        assert (
            len({report.loss.clean, report.loss.spliced, report.loss.mean_ablated, report.loss.zero_ablated})
            == 4
        )
    stored = gpt2.dictionary(config.name)
    assert stored.config["prepend_bos"] is (
        run == "bert"
    )  # the only one whose tokenizer puts a token in front
    assert stored.config["model"] == gpt2.run(run).collection.config["model"]
    assert HookPointReport.from_json(stored.info["training"]["report"]) == report
    # What is reported is what the stored dictionary does on the rows of the documents that were left out.
    evaluation = choose_evaluation(gpt2.run(run), n_rows=200, seed=0, special=True, sinks=True)
    x = gpt2.run(run).activations(hook_point)[evaluation.rows()].astype(np.float64)
    x = x[np.linalg.norm(x, axis=1) <= norm_limit(gpt2.run(run), hook_point, sinks=True)]
    encoder = Encoder(stored, value_dtype="float32")
    codes = encoder.encode(x.astype(np.float32))
    error = encoder.decode(codes) - x
    assert report.n_eval_rows == len(x)
    assert report.explained_variance == pytest.approx(
        1 - (error**2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-5
    )
    assert report.mse == pytest.approx((error**2).mean(), rel=1e-5)
    assert report.l0 == pytest.approx(np.mean(np.diff(codes.indptr)))


def test_a_model_that_is_not_the_runs_own_is_refused(gpt2):
    from actstore.errors import ConflictError

    config = gpt2.run("gpt2").collection.config
    with pytest.raises(ConflictError, match="is not the one"):
        load_language_model(
            tiny_models.cached("llama"), config["model"], compute_dtype="float32", attn_implementation=None,
            device=torch.device("cpu"),
        )  # fmt: skip


def test_reconstruction_against_numpy():
    rng = np.random.default_rng(0)
    weights = {
        "W_enc": rng.standard_normal((6, 20)), "W_dec": rng.standard_normal((20, 6)), "b_enc": rng.standard_normal(20),
        "b_dec": rng.standard_normal(6),
    }  # fmt: skip
    data = make_dictionary(weights, activation="relu", hook_point="layers.0.resid_post")
    rows = rng.standard_normal((9000, 6)).astype(np.float32)
    rows[5] *= 100
    rows[8, 2] = np.inf
    found, mean = measure_reconstruction(Encoder(data, value_dtype="float32"), rows, norm_limit=50.0)
    x = np.delete(rows, [5, 8], axis=0).astype(np.float64)
    z = np.maximum(x @ weights["W_enc"] + weights["b_enc"], 0)
    error = z @ weights["W_dec"] + weights["b_dec"] - x
    assert found.n_rows == 8998
    assert found.explained_variance == pytest.approx(
        1 - (error**2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-5
    )
    assert found.mse == pytest.approx((error**2).mean(), rel=1e-5)
    assert found.l0 == pytest.approx((z > 0).sum(1).mean(), rel=1e-4)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-6)
    empty, _ = measure_reconstruction(Encoder(data), rows[8:9], norm_limit=50.0)
    assert empty.n_rows == 0
    assert math.isnan(empty.explained_variance)


def test_masks_against_the_token_tables(gpt2):
    run = gpt2.run("gpt2")
    tables = [run.tokenization.unit_table(u.unit) for u in run.tokenization.units]
    tokens = [row for table in tables for row in table.to_pylist()]
    rows = np.random.default_rng(0).permutation([t["row"] for t in tokens])
    by_row = {t["row"]: t for t in tokens}
    for special in (True, False):
        for sinks in (True, False):
            held_out = np.array([3, 17])
            mask = TokenMask(run, special=special, sinks=sinks, held_out=held_out)
            wanted = [
                not (special and t["is_special"]) and not (sinks and t["window_position"] == 0) and t["doc_id"] not in held_out
                for t in (by_row[r] for r in rows.tolist())
            ]  # fmt: skip
            found = np.concatenate([mask.keep(part) for part in np.array_split(rows, 9)])
            assert found.tolist() == wanted


def test_the_documents_of_the_evaluation(gpt2):
    run = gpt2.run("gpt2")
    found = evaluation_of(run)
    assert found.is_held_out
    assert not found.begins_with_special
    assert evaluation_of(gpt2.run("bert")).begins_with_special
    assert 1 <= len(found.documents) <= 6
    assert found.documents.tolist() == evaluation_of(run).documents.tolist()
    assert any(found.documents.tolist() != evaluation_of(run, seed=s).documents.tolist() for s in (1, 2, 3))
    tables = [run.tokenization.unit_table(u.unit) for u in run.tokenization.units]
    tokens = {t["row"]: t for table in tables for t in table.to_pylist()}
    for window in found.windows:
        assert {tokens[r]["doc_id"] for r in window.rows.tolist()} <= set(found.documents.tolist())
        assert window.token_ids.tolist() == [tokens[r]["token_id"] for r in window.rows.tolist()]
        of_window = [tokens[r] for r in window.rows.tolist()]
        assert window.keep.tolist() == [not t["is_special"] and t["window_position"] > 0 for t in of_window]
    assert sum(len(w.rows) for w in found.windows) >= min(
        120, sum(tokens[r]["doc_id"] in found.documents for r in tokens)
    )


def test_geometric_median_is_the_point_of_least_distance():
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.standard_normal((200, 3)), 50 + rng.standard_normal((40, 3))])
    best = minimize(lambda p: np.linalg.norm(rows - p, axis=1).sum(), rows.mean(0), tol=1e-10).x
    found = geometric_median(torch.from_numpy(rows).float())
    np.testing.assert_allclose(found, best, atol=1e-3)
    assert np.linalg.norm(rows.mean(0) - best) > 5
    same = torch.ones(7, 4)
    assert torch.equal(geometric_median(same), same[0])
    # On one of the rows: the median of five points of which three are the same.
    points = torch.tensor([[0.0, 0], [0, 0], [0, 0], [1, 5], [2, -7]])
    np.testing.assert_allclose(geometric_median(points), [0, 0], atol=1e-3)


def test_scale_and_directions():
    rows = torch.tensor([[3.0, 4.0], [0.0, 15.0]])
    assert row_scale(rows) == pytest.approx(math.sqrt(2) / 10)
    assert row_scale(torch.zeros(3, 4)) == 1.0
    a, b, c = (
        random_directions(5, 8, seed=0),
        random_directions(5, 8, seed=0),
        random_directions(5, 8, seed=1),
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(5))
