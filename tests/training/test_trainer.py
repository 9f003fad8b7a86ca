"""Training on stored rows: order, masks, resuming, several hook points, what is refused, what is kept."""

import argparse
import dataclasses
import functools
import json
import os
import signal
import threading

import numpy as np
import pytest
import torch

import actstore
from actstore.errors import ConflictError, FormatError, InvalidInputError, NotFoundError
from actstore.ingest.cli import sae_train
from actstore.ingest.dictionaries.encoder import Encoder
from actstore.ingest.training import SaeTrainConfig, train_sae
from actstore.ingest.training.checkpoint import CheckpointFolder
from actstore.ingest.training.job import learning_rate_factor
from tests.training.stores import make_run, sparse_rows

HOOKS = ("layers.0.resid_post", "layers.1.resid_post")
D = 16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(tmp_path):
    arrays = {
        hook: sparse_rows(3000, d=D, n_features=24, active=3, seed=i)[0] for i, hook in enumerate(HOOKS)
    }
    return make_run(tmp_path, arrays)


def config_of(tmp_path, **options):
    usual = {
        "name": "sae", "n_latents": 32, "k": 3, "batch_rows": 128, "n_rows": 5000, "buffer_rows": 700, "learning_rate": 0.01,
        "eval_rows": 200, "dead_after_rows": 500, "checkpoint_dir": str(tmp_path / "checkpoints"),
    }  # fmt: skip
    return SaeTrainConfig(**{**usual, **options})


class StopAfter(threading.Event):
    """Set from the n-th time on that it is asked about."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def is_set(self):
        self.left -= 1
        return self.left < 0 or super().is_set()


def weights_of(store, name):
    dictionary = store.dictionary(name)
    return {w: dictionary.weight(w).copy() for w in dictionary.weights()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].view(np.uint32), b[name].view(np.uint32), err_msg=name)


@pytest.mark.parametrize("method", ["topk", "batchtopk", "jumprelu"])
def test_stopped_and_resumed_is_the_same_as_in_one_go(store, tmp_path, method):
    config = config_of(tmp_path, method=method)
    whole = train_sae(store, "run", HOOKS[0], dataclasses.replace(config, name="whole"))
    assert whole.is_complete
    assert whole.n_steps == whole.steps_done == whole.steps_this_job == 24 + 16
    assert not (tmp_path / "checkpoints").exists()
    for n in (1, 14, 1, 10):  # stops in both epochs, and behind an epoch's last batch
        part = train_sae(store, "run", HOOKS[0], config, stop=StopAfter(n - 1))
        assert not part.is_complete
        assert part.steps_this_job == n
        assert part.hook_points == ()
        assert "sae" not in [d.id for d in store.dictionaries()]
    last = train_sae(store, "run", HOOKS[0], config)
    assert last.is_complete
    assert last.steps_this_job == 40 - 26
    assert_same(weights_of(store, "whole"), weights_of(store, "sae"))
    whole, resumed = (store.dictionary(name).info["training"] for name in ("whole", "sae"))
    assert whole["curve"] == resumed["curve"]
    assert len(whole["curve"]["points"]) == 40
    a, b = (dict(x["report"]) for x in (whole, resumed))
    assert a.pop("dictionary") != b.pop("dictionary")
    assert a == b


def test_a_checkpoint_at_the_end_of_an_epoch(store, tmp_path):
    config = config_of(tmp_path)
    train_sae(store, "run", HOOKS[0], dataclasses.replace(config, name="whole"))
    train_sae(store, "run", HOOKS[0], config, stop=StopAfter(23))
    train_sae(store, "run", HOOKS[0], config)
    assert_same(weights_of(store, "whole"), weights_of(store, "sae"))


def test_several_hook_points_in_one_pass_are_the_same_as_each_alone(store, tmp_path):
    config = config_of(tmp_path)
    both = train_sae(store, "run", "layers.*.resid_post", dataclasses.replace(config, name="both"))
    assert [r.dictionary for r in both.hook_points] == [f"both.{hook}" for hook in HOOKS]
    for i, hook in enumerate(HOOKS):
        alone = train_sae(store, "run", hook, dataclasses.replace(config, name=f"alone{i}"))
        assert_same(weights_of(store, f"both.{hook}"), weights_of(store, f"alone{i}"))
        assert dataclasses.replace(alone.hook_points[0], dictionary="") == dataclasses.replace(
            both.hook_points[i], dictionary=""
        )


def test_hook_points_of_other_widths_share_the_order(tmp_path):
    rng = np.random.default_rng(0)
    rows = np.arange(2000)
    arrays = {
        "layers.0.resid_post": np.column_stack([rows, *rng.standard_normal((3, 2000))]).astype(np.float32),
        "layers.0.mlp_act": np.column_stack([rows, *rng.standard_normal((40, 2000))]).astype(np.float32),
    }
    store = make_run(tmp_path, arrays, rows_per_unit=256)
    from actstore.ingest.training.masks import TokenMask
    from actstore.ingest.training.rows import RowStream

    run = store.run("run")
    mask = TokenMask(run, special=True, sinks=True, held_out=np.array([2, 5]))
    stream = RowStream(
        [run.activations(h) for h in run.hook_points],
        mask,
        batch_rows=100,
        buffer_rows=300,
        seed=3,
        pin=False,
    )
    tokens = run.tokenization
    table = {r: (d, s) for u in tokens.units for d, r, s in zip(*(tokens.unit_table(u.unit)[c].to_pylist()
             for c in ("doc_id", "row", "is_special")), strict=True)}  # fmt: skip
    dense = sorted(table)
    seen, states = [], []
    with stream.reading() as batches:
        for batch in batches:
            for values in batch.values.values():
                assert values[:, 0].tolist() == [dense.index(r) for r in batch.rows.tolist()]
            seen += batch.rows.tolist()
            states.append((batch.state, len(seen)))
            if batch.state["next_batch"] == stream.n_batches:
                break
    assert len(states) == 20
    assert sorted(seen) == [r for r in dense if not table[r][1] and table[r][0] not in (2, 5)]
    assert seen != sorted(seen)
    state, at = states[6]
    stream.load_state(json.loads(json.dumps(state)))
    with stream.reading() as batches:
        assert next(batches).rows.tolist() == seen[at : states[7][1]]


def test_a_training_that_ended_between_two_dictionaries(store, tmp_path):
    """One is stored and the other not: it is all done again, and the first found to be the same."""
    config = config_of(tmp_path)
    train_sae(store, "run", HOOKS[0], dataclasses.replace(config, name=f"sae.{HOOKS[0]}"))
    assert train_sae(store, "run", list(HOOKS), config).is_complete
    assert len(store.dictionaries()) == 2


def test_a_batch_of_one_row(tmp_path):
    rows = sparse_rows(1025, d=D, n_features=24, active=3, seed=0)[0]
    store = make_run(tmp_path, {HOOKS[0]: rows})
    options = {
        "mask_special": False,
        "mask_sinks": False,
        "n_rows": 10_250,
        "batch_rows": 64,
        "dead_after_rows": 64,
    }
    report = train_sae(store, "run", HOOKS[0], config_of(tmp_path, **options)).hook_points[0]
    assert report.explained_variance > 0.5


def test_a_training_that_diverges_says_so(store, tmp_path):
    with pytest.raises(InvalidInputError, match="has diverged before step"):
        train_sae(store, "run", HOOKS[0], config_of(tmp_path, learning_rate=1e30))
    assert store.dictionaries() == []


def test_rows_that_are_all_the_same(tmp_path):
    store = make_run(tmp_path, {HOOKS[0]: np.full((1000, D), 2.5, np.float32)})
    report = train_sae(store, "run", HOOKS[0], config_of(tmp_path)).hook_points[0]
    assert report.mse == pytest.approx(0, abs=1e-6)
    assert np.isnan(report.explained_variance)
    zeros = make_run(tmp_path / "zeros", {HOOKS[0]: np.zeros((1000, D), np.float32)})
    assert train_sae(zeros, "run", HOOKS[0], config_of(tmp_path)).hook_points[0].mse == 0


def test_calling_it_again_reports_what_is_there(store, tmp_path):
    config = config_of(tmp_path)
    first = train_sae(store, "run", list(HOOKS), config)
    lines = []
    again = train_sae(store, "run", list(HOOKS), config, notice=lines.append)
    assert again.is_complete
    assert again.steps_this_job == 0
    assert again.hook_points == first.hook_points
    assert lines == [f"sae.{HOOKS[0]}, sae.{HOOKS[1]}: trained before"]
    assert again.version == first.version
    for other in ({"seed": 1}, {"k": 4}, {"method": "batchtopk"}):
        with pytest.raises(ConflictError, match="was not trained with these settings"):
            train_sae(store, "run", list(HOOKS), dataclasses.replace(config, **other))


def test_a_checkpoint_of_another_training_is_refused(store, tmp_path):
    config = config_of(tmp_path)
    train_sae(store, "run", HOOKS[0], config, stop=StopAfter(3))
    with pytest.raises(ConflictError, match=r"another training[\s\S]*seed: 0 -> 1"):
        train_sae(store, "run", HOOKS[0], dataclasses.replace(config, seed=1))
    with pytest.raises(ConflictError, match="dictionaries"):
        train_sae(store, "run", HOOKS[1], config)
    with (
        CheckpointFolder(tmp_path / "checkpoints").locked(),
        pytest.raises(ConflictError, match="another process"),
    ):
        train_sae(store, "run", HOOKS[0], config)
    (path,) = (tmp_path / "checkpoints").glob("step-*")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="cannot be read"):
        train_sae(store, "run", HOOKS[0], config)


def test_a_training_goes_on_at_the_version_that_it_began_with(store, tmp_path):
    config = config_of(tmp_path)
    train_sae(store, "run", HOOKS[0], config, stop=StopAfter(3))
    version = store.version
    train_sae(
        store, "run", HOOKS[0], dataclasses.replace(config, name="x", checkpoint_dir=str(tmp_path / "x"))
    )
    assert store.version > version
    assert train_sae(store, "run", HOOKS[0], config).is_complete
    assert_same(weights_of(store, "x"), weights_of(store, "sae"))
    assert store.dictionary("sae").info["training"]["version"] == version


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_stored_dtype(tmp_path, dtype):
    rows = sparse_rows(2000, d=D, n_features=24, active=3, seed=0)[0]
    if dtype == "bfloat16":
        import pyarrow as pa
        from safetensors.torch import save_file

        from actstore.ingest import import_run

        (tmp_path / "a").mkdir()
        save_file({"x": torch.from_numpy(rows).bfloat16()}, tmp_path / "a" / "x.safetensors")
        tokens = pa.table({"doc_id": np.arange(2000) // 40, "token_id": np.full(2000, 3, np.int32)})
        import_run(
            str(tmp_path / "store"), "run", str(tmp_path / "a"), hook_points={"x": HOOKS[0]}, tokens=tokens
        )
        store = actstore.open(tmp_path / "store")
    else:
        store = make_run(tmp_path, {HOOKS[0]: rows.astype(dtype)})
    assert store.run("run").activations(HOOKS[0]).stored_dtype == dtype
    report = train_sae(store, "run", HOOKS[0], config_of(tmp_path, n_rows=10_000))
    assert report.hook_points[0].explained_variance > 0.6


def test_what_is_masked(tmp_path):
    """Special tokens and first tokens by the tokens; huge and broken rows by their numbers; all of it counted."""
    rows = sparse_rows(3000, d=D, n_features=24, active=3, seed=0)[0]
    rows[[77, 1234]] *= 1000
    rows[500, 3] = np.nan
    store = make_run(tmp_path, {HOOKS[0]: rows}, nonfinite="mask")
    report = train_sae(store, "run", HOOKS[0], config_of(tmp_path, n_rows=3000)).hook_points[0]
    held_out = 4 * 50  # 200 rows of documents of 50
    documents = {77 // 50, 1234 // 50, 500 // 50}
    record = store.dictionary("sae").info["training"]["report"]
    assert record["is_held_out"]
    assert report.n_trained_rows + report.n_masked_rows == 3000
    assert 3000 - 60 - 3 - held_out <= report.n_trained_rows <= 3000 - 60 - held_out + 4 + len(documents)
    assert np.isfinite(store.dictionary("sae").decoder()).all()
    kept = train_sae(
        store,
        "run",
        HOOKS[0],
        config_of(tmp_path, name="all", n_rows=3000, mask_special=False, mask_sinks=False),
    ).hook_points[0]
    assert 3000 - held_out - 1 <= kept.n_trained_rows <= 3000 - held_out


def test_the_dictionary_works_on_rows_as_they_are_stored(store, tmp_path):
    """Codes of the stored dictionary are those of the method on scaled rows, divided by the scale."""
    from actstore.ingest.training.methods import MethodSetup, get_method

    run = store.run("run")
    values = 300 * run.activations(HOOKS[0])[:100]
    for method in ("topk", "batchtopk", "jumprelu"):
        config = config_of(tmp_path, method=method).check()
        trained = get_method(method)(MethodSetup(config, D, 10, 500, torch.device("cpu"), torch.float32))
        scaled = torch.from_numpy(values) * 0.02
        trained.initialise(scaled)
        for _ in range(5):
            trained.step(scaled, rate=1.0, progress=0.9)
        from actstore.dictionary_data import make_dictionary

        found = trained.export(0.02)
        data = make_dictionary(
            found.weights,
            activation=found.activation,
            k=found.k,
            hook_point=HOOKS[0],
            apply_b_dec_to_input=True,
        )
        encoder = Encoder(data, value_dtype="float32")
        codes = encoder.encode(values)
        u = scaled - trained.weights["b_dec"]
        pre = u @ trained.weights["W_enc"].T + trained.weights["b_enc"]
        if method == "topk":
            wanted = torch.where(pre >= pre.sort(dim=1).values[:, -3:-2], pre.relu(), 0)
        else:
            limit = trained.threshold() if method == "batchtopk" else trained.weights["log_threshold"].exp()
            wanted = torch.where(pre > limit, pre, 0)
        np.testing.assert_allclose(codes.to_scipy().toarray() * 0.02, wanted, rtol=1e-4, atol=1e-5)
        x_hat = wanted @ trained.weights["W_dec"] + trained.weights["b_dec"]
        np.testing.assert_allclose(encoder.decode(codes) * 0.02, x_hat, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(data.weights["W_dec"], axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "batchtopk, jumprelu, topk"),
        ({"name": "a@b"}, "without '@'"),
        ({"name": "../x"}, "dictionary name"),
        ({"k": 33}, "at most n_latents"),
        ({"k": 0}, "k must be"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": float("nan")}, "above 0"),
        ({"warmup_share": 0.6, "decay_share": 0.6}, "decay_share"),
        ({"bias_init": "median"}, "geometric_median, mean, zero"),
        ({"dtype": "float16"}, "dtype"),
        ({"mask_sinks": 1}, "true or false"),
        ({"threshold_decay": 1.0}, "below 1"),
        ({"device": "warp"}, "device"),
        ({"n_rows": 0}, "n_rows"),
    ],
)
def test_settings_that_cannot_work(store, tmp_path, options, message):
    with pytest.raises(InvalidInputError, match=message):
        train_sae(store, "run", HOOKS[0], config_of(tmp_path, **options))
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_what_is_not_there(store, tmp_path):
    with pytest.raises(NotFoundError, match="run"):
        train_sae(store, "walk", HOOKS[0], config_of(tmp_path))
    with pytest.raises(NotFoundError, match="resid_post"):
        train_sae(store, "run", "layers.7.resid_post", config_of(tmp_path))
    with pytest.raises(InvalidInputError, match="dictionary name"):
        train_sae(store, "run", list(HOOKS), config_of(tmp_path, name="a" * 60))


def test_a_run_of_special_tokens_only(tmp_path):
    store = make_run(tmp_path, {HOOKS[0]: np.ones((40, D), np.float32)}, doc_rows=1)
    with pytest.raises(InvalidInputError, match="is left to train on"):
        train_sae(store, "run", HOOKS[0], config_of(tmp_path))


def test_another_method_slots_in(store, tmp_path):
    from actstore.ingest.training.methods import _METHODS, Trained, register_method
    from actstore.ingest.training.topk import TopK

    @register_method("relu-of-topk")
    class Other(TopK):
        def export(self, scale):
            found = super().export(scale)
            return Trained("relu", None, found.weights)

    try:
        with pytest.raises(InvalidInputError, match="already"):
            register_method("relu-of-topk")(TopK)
        report = train_sae(store, "run", HOOKS[0], config_of(tmp_path, method="relu-of-topk"))
        assert report.hook_points[0].l0 > 3
        assert store.dictionary("sae").activation == "relu"
    finally:
        del _METHODS["relu-of-topk"]


def test_progress_and_notices(store, tmp_path):
    seen, lines = [], []
    report = train_sae(
        store, store.run("run"), HOOKS[0], config_of(tmp_path), progress=seen.append, notice=lines.append
    )
    assert seen[-1].steps_done == seen[-1].n_steps == report.n_steps
    latest = seen[-1].latest[HOOKS[0]]
    assert latest.step == report.n_steps - 1
    assert 0 < latest.fvu < 1
    assert latest.l0 == pytest.approx(3, abs=0.1)
    assert any("32 latents (topk, k 3) on cpu" in line for line in lines)
    assert report.rows_per_s > 0


def test_schedule():
    rates = [learning_rate_factor(s, n_steps=100, warmup=0.05, decay=0.2) for s in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(rates[5:81]) == {1.0}
    assert rates[80:] == pytest.approx([i / 20 for i in range(20, 0, -1)])
    assert learning_rate_factor(0, n_steps=1, warmup=0.0, decay=0.0) == 1.0


def command(store, tmp_path, *more):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    sae_train.add_arguments(parser)
    arguments = [
        store.url,
        "run",
        HOOKS[0],
        "--name",
        "sae",
        "--latents",
        "32",
        "--k",
        "3",
        "--batch-rows",
        "128",
    ]
    arguments += ["--checkpoint-dir", str(tmp_path / "c"), "--eval-rows", "200", *more]
    return sae_train.run(parser.parse_args(arguments))


def test_command(store, tmp_path, capsys):
    assert command(store, tmp_path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_complete"]
    assert report["hook_points"][0]["dictionary"] == "sae"
    assert report["hook_points"][0]["loss"] is None
    assert command(store, tmp_path) == 0
    out = capsys.readouterr().out
    assert "dictionary sae: explained variance 0." in out
    assert "held-out rows" in out
    assert "imported and has no model" in out


def test_command_that_is_stopped(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sae_train, "train_sae", functools.partial(train_sae, stop=StopAfter(3)))
    assert command(store, tmp_path) == 130
    assert "stopped behind step 4 of 24" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_makes_a_checkpoint(store, tmp_path, number):
    """The same weights come of a training that a signal stopped somewhere, and that was called again."""
    config = config_of(tmp_path, n_rows=200_000)
    lines, before = [], signal.getsignal(number)
    part = train_sae(
        store, "run", HOOKS[0], config, notice=lines.append, progress=lambda _: os.kill(os.getpid(), number)
    )
    assert not part.is_complete
    assert 0 < part.steps_done < part.n_steps
    assert "interrupt once more" in lines[-1]
    assert signal.getsignal(number) is before
    report = train_sae(store, "run", HOOKS[0], config)
    assert report.is_complete
    assert report.steps_done - report.steps_this_job == part.steps_done
    train_sae(store, "run", HOOKS[0], dataclasses.replace(config, name="whole"))
    assert_same(weights_of(store, "whole"), weights_of(store, "sae"))
