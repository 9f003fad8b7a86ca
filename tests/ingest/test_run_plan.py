"""What a run's stored configuration says, and that a run is finished as it was begun."""

import dataclasses

import numpy as np
import pytest

import actstore
from actstore.errors import ErrorKind, InvalidInputError, StorageError
from actstore.ingest import run as run_ingest
from actstore.ingest.run_plan import make_plan, run_config
from actstore.int8 import fit_int8
from actstore.log import fsck
from actstore.sampling import kept_offsets
from tests.ingest import synthetic

OLD_KEYS = {
    "format", "model", "tokenization", "tokenization_fingerprint", "rows_per_unit", "hook_points", "dtype", "compute_dtype",
    "codec", "rows_per_shard", "rows_per_chunk", "batch_tokens", "batch_plan", "equal_lengths", "attn_implementation",
    "nonfinite",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    url = str(folder / "store")
    return url, synthetic.make_corpus(url, folder / "tokenizer")


def config_of(made, description=synthetic.DESCRIPTION, *, existing=None, **changes):
    url, tokenizer = made
    (tokenization,) = actstore.open(url).tokenizations()
    return run_config(synthetic.config(tokenizer, **changes), description, tokenization, existing=existing)[0]


def test_defaults_add_no_key(made):
    config = config_of(made, seed=9, allow_failed=3, self_check=0.5, straggler_factor=0.0, pool_special=False)
    assert set(config) == OLD_KEYS
    assert config["hook_points"] == [{"name": n, "d_model": w} for n, w in synthetic.HOOK_POINTS]


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"covariance": True}, {"covariance": True}),
        (
            {"keep": ["pooled"], "poolings": ["max", "mean"]},
            {"keep": ["pooled"], "poolings": ["mean", "max"]},
        ),
        (
            {"keep": ["pooled", "dense"], "pool_special": True},
            {
                "keep": ["dense", "pooled"],
                "poolings": ["mean", "last", "max", "weighted_mean"],
                "pool_special": True,
            },
        ),
    ],
)
def test_settings_add_their_keys(made, changes, added):
    config = config_of(made, **changes)
    assert {k: v for k, v in config.items() if k not in OLD_KEYS} == added


def test_what_the_model_says_of_itself_is_stored(made):
    description = dataclasses.replace(synthetic.DESCRIPTION, compile=True, heads={"layers.1.mlp_act": 4})
    config = config_of(made, description)
    assert config["compile"] is True
    assert [h.get("n_heads") for h in config["hook_points"]] == [None, 4]


def test_places_for_a_sample_are_planned_once(made):
    url, _ = made
    (tokenization,) = actstore.open(url).tokenizations()
    config = config_of(made, sample=0.4, seed=3)
    assert config["sample"] == {"rate": 0.4, "seed": 3}
    most = max(
        len(kept_offsets(u.unit, u.rows, rows_per_unit=64, rate=0.4, seed=3)) for u in tokenization.units
    )
    assert config["stored_rows_per_unit"] >= most
    again = config_of(made, sample=0.4, seed=3, existing={**config, "stored_rows_per_unit": 64})
    assert again["stored_rows_per_unit"] == 64, "a run that exists is not planned anew"
    assert all(64 % n == 0 for n in again["rows_per_shard"].values())


def test_a_sampled_run_that_was_interrupted_is_finished_alike(made):
    url, tokenizer = made
    seen = []

    def fault(unit):
        seen.append(unit)
        if unit == 2:
            raise InvalidInputError(ErrorKind.NON_FINITE, "planted")

    asked = synthetic.config(tokenizer, run="sampled", sample=0.4, seed=3, dtype="fp16")
    with pytest.raises(InvalidInputError, match="planted"):
        run_ingest(url, asked, backend=synthetic.SyntheticBackend(fault=fault, value=small))
    report = run_ingest(url, asked, backend=synthetic.SyntheticBackend(value=small))
    assert report.units_this_job == 1
    run = actstore.open(url).run("sampled")
    stored = 0
    for unit in run.tokenization.units:
        table = run.tokenization.unit_table(unit.unit)
        kept = kept_offsets(unit.unit, unit.rows, rows_per_unit=64, rate=0.4, seed=3)
        expected = small(table["token_id"].to_numpy(), 24)[kept]
        rows = table["row"].to_numpy()[kept]
        np.testing.assert_array_equal(run.activations("layers.1.mlp_act")[rows], expected)
        stored += len(kept)
    assert report.n_rows == stored < run.tokenization.n_rows
    assert report.rows_this_job == run.tokenization.units[2].rows
    assert fsck(actstore.open(url).storage, deep=True).is_clean


def small(token_ids, width):
    """Numbers that fp16 holds exactly."""
    return (np.asarray(token_ids)[:, None] % 60 + np.arange(width)).astype(np.float32)


class Calibrated(synthetic.SyntheticBackend):
    """Gives other moments at every call: a run must keep those of its creation."""

    calls = 0

    def call(self, method, *args):
        assert method == "calibrate"
        Calibrated.calls += 1
        return {
            name: (np.full(width, 100.0 * self.calls), np.full(width, 50.0 * self.calls))
            for name, width in synthetic.HOOK_POINTS
        }


def test_int8_is_measured_when_a_run_is_created_and_never_again(made):
    url, tokenizer = made
    Calibrated.calls = 0

    def fault(unit):
        if unit > 3:
            raise StorageError(ErrorKind.STORAGE_FAILED, "planted")

    asked = synthetic.config(tokenizer, run="int8", dtype="int8", max_attempts=1)
    with pytest.raises(StorageError):
        run_ingest(url, asked, backend=Calibrated(fault=fault, value=small))
    assert run_ingest(url, asked, backend=Calibrated(value=small)).is_complete
    assert Calibrated.calls == 1
    run = actstore.open(url).run("int8")
    plan = make_plan(run.collection, epoch=1)
    for name, width in synthetic.HOOK_POINTS:
        assert plan.int8[name] == fit_int8(np.full(width, 100.0), np.full(width, 50.0))
        acts = run.activations(name)
        for unit in run.tokenization.units:
            table = run.tokenization.unit_table(unit.unit)
            expected = small(table["token_id"].to_numpy(), width)
            got = acts[table["row"].to_numpy()]
            # Half a step of a row's scale: the largest |x - mean| over 127.
            step = np.abs(expected - 100.0).max(axis=1, keepdims=True) / 127
            assert (np.abs(got - expected) <= 0.51 * step).all()


def test_a_plan_says_what_the_configuration_says(made):
    url, tokenizer = made
    asked = synthetic.config(
        tokenizer, run="both", keep=["dense", "pooled"], poolings=["max"], covariance=True, nonfinite="mask"
    )
    assert run_ingest(url, asked, backend=synthetic.SyntheticBackend()).is_complete
    collection = actstore.open(url).run("both").collection
    plan = make_plan(collection, epoch=7)
    assert (plan.run, plan.epoch, plan.fingerprint) == ("both", 7, collection.fingerprint)
    assert (plan.keep, plan.poolings, plan.pool_special) == (("dense", "pooled"), ("max",), False)
    assert (plan.covariance, plan.nonfinite, plan.sample, plan.int8) == (True, "mask", 1.0, None)
    assert (plan.rows_per_unit, plan.stored_rows_per_unit) == (64, None)
    assert [(n, s.d_model, s.dtype) for n, s in plan.specs.items()] == [
        (n, w, "float32") for n, w in synthetic.HOOK_POINTS
    ]
