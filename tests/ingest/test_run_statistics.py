"""Statistics and covariances of whole runs, through storage: as numpy has them of all rows, and as `info` shows them."""

import json

import numpy as np
import pandas as pd
import pytest

import actstore
from actstore.cli import main
from actstore.errors import InvalidInputError, NotFoundError
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.int8 import Int8Transform
from actstore.stats import run_stats
from tests.ingest import synthetic, tiny_models

LOUD = 7
"""Token whose activations are massive."""


def loud_numbers(token_ids, width):
    """Small random numbers that belong to their token, and huge ones for one token in one dimension."""
    rng = np.random.default_rng(0)
    acts = rng.normal(1.0, 1.0, (100, width)).astype(np.float32)[token_ids]
    acts[token_ids == LOUD, 3] = 2000
    return acts


@pytest.fixture
def made(tmp_path):
    url = str(tmp_path / "store")
    return url, synthetic.make_corpus(url, tmp_path / "tokenizer")


def ingest(made, **changes):
    url, tokenizer = made
    backend = changes.pop("backend", None) or synthetic.SyntheticBackend(value=loud_numbers)
    run_ingest(url, synthetic.config(tokenizer, **changes), backend=backend)
    return actstore.open(url).run("syn")


def stored_rows(run, hook_point):
    """Tokens of the stored units, with their rows of activations in float64."""
    tokens = pd.concat(
        run.tokenization.unit_table(unit).to_pandas() for unit in sorted(run.collection.units)
    ).reset_index(drop=True)
    return tokens, run.activations(hook_point).read(tokens.row.to_numpy()).astype(np.float64)


def check(run, *, covariance=True):
    for name in run.hook_points:
        stats, (tokens, acts) = run.stats(name), stored_rows(run, name)
        assert stats.n_rows == len(acts) == run.n_rows
        np.testing.assert_allclose(stats.mean, acts.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(stats.std, acts.std(axis=0), rtol=1e-10)
        norms = np.linalg.norm(acts, axis=1)
        order = np.lexsort((tokens.row, -norms))[:64]
        assert [r.row for r in stats.sinks().largest] == tokens.row.to_numpy()[order].tolist()
        loud = tokens[tokens.token_id == LOUD]
        assert stats.sinks().n_over == len(loud) > 0
        at = np.bincount(np.minimum(loud.window_position, 8), minlength=9)
        assert [p.n_over for p in stats.sinks().by_position] == at.tolist()
        assert list(stats.sinks().token_ids) == [LOUD]
        assert stats.outlier_dims("massive").tolist() == [3]
        if covariance:
            exact = np.cov(acts.T, bias=True)
            deviation = np.sqrt(np.diag(exact))
            found = run.covariance(name)
            assert found.n == len(acts)
            assert (np.abs(found.covariance - exact) <= 1e-11 * np.outer(deviation, deviation)).all()


def test_a_complete_run(made):
    run = ingest(made, covariance=True)
    assert run.is_complete
    check(run)
    assert list(run_stats(run)) == run.hook_points
    keys = [o.key for o in run.collection.seal.objects if "/covariance/" in o.key]
    assert len(keys) == len(run.hook_points)


def test_a_run_that_is_not_complete(made):
    def fault(unit):
        if unit >= 4:
            raise RuntimeError("stop here")

    backend = synthetic.SyntheticBackend(value=loud_numbers, fault=fault)
    with pytest.raises(actstore.ActstoreError):
        ingest(made, covariance=True, backend=backend)
    run = actstore.open(made[0]).run("syn")
    assert not run.is_complete
    assert run.n_units > 0
    check(run)


def test_without_covariances_they_are_refused_not_made_up(made):
    run = ingest(made)
    check(run, covariance=False)
    with pytest.raises(InvalidInputError, match="keeps none"):
        run.covariance(run.hook_points[0])
    with pytest.raises(NotFoundError):
        run.covariance("layers.9.resid_post")


def test_int8_rows_say_how_far_they_are_from_what_the_model_computed(tmp_path, capsys):
    url = str(tmp_path / "store")
    import_corpus(actstore.open(url, create=True), "t", synthetic.documents(40))
    for name, dtype in (("full", "float32"), ("small", "int8")):
        config = IngestConfig(
            corpus="t", model=tiny_models.cached("gpt2"), hook_points=["layers.1.resid_post"], run=name, dtype=dtype,
            ray_address=None, rows_per_unit=256,
        )  # fmt: skip
        run_ingest(url, config)
    full, small = (actstore.open(url).run(name) for name in ("full", "small"))
    [hook_point] = full.hook_points
    (_, true), (_, near) = (stored_rows(run, hook_point) for run in (full, small))
    mean = Int8Transform.from_json(small.collection.info["int8"][hook_point]).mean
    error = small.stats(hook_point).int8_error
    assert error.n_values == true.size
    assert error.squared_error == pytest.approx(((near - true) ** 2).sum(), rel=1e-6)
    assert error.squared_deviation == pytest.approx(((true - mean) ** 2).sum(), rel=1e-6)
    assert error.largest == pytest.approx(np.abs(near - true).max(), rel=1e-6)
    np.testing.assert_allclose(small.stats(hook_point).mean, near.mean(axis=0), rtol=1e-9, atol=1e-12)
    assert full.stats(hook_point).int8_error is None
    shown = {}
    for name in ("full", "small"):
        assert main(["info", url, name]) == 0
        shown[name] = capsys.readouterr().out
    assert "int8 error" not in shown["full"]
    assert "int8 error" in shown["small"]
    assert f"{error.relative:.2%}" in shown["small"]


def test_info_says_what_the_statistics_say(made, capsys):
    run = ingest(made)
    assert main(["info", made[0], "syn", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["hook_points"]
    assert main(["info", made[0], "syn"]) == 0
    text = capsys.readouterr().out
    words = dict(
        zip(*(run.tokenization.vocabulary()[c].to_pylist() for c in ("token_id", "token")), strict=True)
    )
    for row, name in zip(rows, run.hook_points, strict=True):
        tokens, acts = stored_rows(run, name)
        norms = np.linalg.norm(acts, axis=1)
        n_loud = int((tokens.token_id == LOUD).sum())
        assert row["hook_point"] == name
        assert (row["rows"], row["nonfinite"], row["min"], row["max"]) == (len(acts), 0, acts.min(), 2000.0)
        assert row["norm_median"] == pytest.approx(np.quantile(norms, 0.5, method="lower"), rel=0.0101)
        assert row["norm_p99"] == pytest.approx(np.quantile(norms, 0.99, method="lower"), rel=0.0101)
        assert row["outlier_dims"]["massive"] == 1
        assert row["sinks"]["rows"] == n_loud
        assert row["sinks"]["tokens"] == [
            {"token_id": LOUD, "token": words[LOUD], "rows_of_largest": min(n_loud, 64)}
        ]
        first = (tokens.window_position[tokens.token_id == LOUD] == 0).mean()
        assert f"{n_loud:,} ({first:.0%} at 0): '{words[LOUD]}'" in text
        assert row["array"] in text
        quantiles = row["value_quantiles"]
        assert list(quantiles) == ["0.001", "0.01", "0.5", "0.99", "0.999"]
        assert sorted(quantiles.values()) == list(quantiles.values())
