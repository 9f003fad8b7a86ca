"""What a new user stumbled over: each once, so that it does not come back."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import actstore
from actstore.cli import main
from actstore.errors import ConflictError, FormatError, InvalidInputError
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.config_file import parse_config
from actstore.ingest.dry_run import dry_run
from actstore.ingest.models import load_model
from actstore.stats import run_stats
from tests.ingest import synthetic, tiny_models


def test_a_complete_run_costs_nothing_more(tmp_path, capsys):
    """Neither the seal's objects nor manifests, as running it again shows; and nothing is computed to say so."""
    url = str(tmp_path / "store")
    store = actstore.open(url, create=True)
    import_corpus(store, "c", synthetic.documents(6, seed=1))
    config = IngestConfig(
        "c", tiny_models.cached("gpt2"), ["embed"], "r", covariance=True, device="cpu", ray_address=None
    )
    assert run_ingest(store, config).is_complete
    version = store.refresh().version
    found = dry_run(store, config)
    assert (found.n_units_done, found.n_objects, found.nbytes, found.puts, found.gets) == (
        found.n_units,
        0,
        0,
        0,
        0,
    )
    assert found.probe is None
    assert found.seconds is None
    assert found.notes == ("the run is complete: nothing is left to do",)
    words = ["ingest", url, "--corpus=c", f"--model={config.model}", "--hook-points=embed", "--run=r"]
    assert main([*words, "--covariance", "--device=cpu", "--no-ray", "--dry-run"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert run_ingest(store, config).is_complete
    assert store.refresh().version == version


@pytest.mark.parametrize("key", ["no_ray", "'no-ray'"])
def test_the_option_no_ray_in_a_file_names_its_key(key):
    with pytest.raises(InvalidInputError, match="write ray_address = 'none'"):
        parse_config(f"{key} = true".encode(), name="run.toml")


@pytest.mark.parametrize("words", [["--no-wait"], ["--entrypoint-python", "python3"]])
def test_options_of_a_submission_need_one(tmp_path, capsys, words):
    """Or a job that was to be sent away would run here."""
    needed = ["--corpus", "c", "--model", "m", "--hook-points", "embed", "--run", "r"]
    assert main(["ingest", str(tmp_path / "store"), *needed, *words]) == 2
    assert f"{words[0]} is for a job that is submitted" in capsys.readouterr().err


def test_switches_of_a_template_that_are_not_json(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["import", str(tmp_path / "store"), "c", "x.jsonl", "--chat-variables", "x"])
    assert "not a JSON object: x" in capsys.readouterr().err


def test_an_imported_run_has_no_model_rather_than_one_called_none(tmp_path, capsys):
    np.save(tmp_path / "acts.npy", np.ones((4, 3), np.float32))
    tokens = {"doc_id": [0, 0, 1, 1], "token_id": [1, 2, 3, 4]}
    pq.write_table(pa.table(tokens), tmp_path / "tokens.parquet")
    url = str(tmp_path / "store")
    words = ["--hook-point", "acts=embed", "--tokens", str(tmp_path / "tokens.parquet")]
    assert main(["import-run", url, "r", str(tmp_path / "acts.npy"), *words]) == 0
    capsys.readouterr()
    assert main(["runs", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["model"] is None
    for command in (["runs", url], ["info", url, "r"]):
        assert main(command) == 0
        assert "None" not in capsys.readouterr().out


def test_a_reader_that_left_before_an_error_was_printed(tmp_path):
    """The exit code still says what went wrong, and no traceback is shown."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "actstore.cli", "runs", str(tmp_path / "none"), "--json"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write)
    assert done.returncode == 3
    assert done.stderr == ""


def test_a_model_that_does_not_load_leaves_no_folder(tmp_path, monkeypatch):
    """The one for weights on disk; with a model that loads, it goes when the model does."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InvalidInputError, match="cannot be loaded"):
        load_model(tiny_models.cached("gpt2"), device_map="auto", attn_implementation="no-such")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pooled")
    url = str(folder / "store")
    tokenizer = synthetic.make_corpus(url, folder / "tokenizer")
    config = synthetic.config(tokenizer, run="r", keep=["dense", "pooled"])
    assert run_ingest(url, config, backend=synthetic.SyntheticBackend()).is_complete
    return url, config


@pytest.mark.parametrize("change", [{"window": 8}, {"rows_per_unit": 128}], ids=str)
def test_a_run_over_another_tokenization_is_refused_before_anything_is_tokenized(pooled, change):
    url, config = pooled
    other = dataclasses.replace(config, **change)
    before = actstore.open(url).version
    (name, value), *_ = change.items()
    with pytest.raises(
        ConflictError, match=rf"exists over another tokenization.*\n  .*{name}: \d+ -> {value}"
    ):
        run_ingest(url, other, backend=synthetic.SyntheticBackend())
    assert actstore.open(url).version == before


def test_pooled_vectors_go_to_other_processes(pooled):
    run = actstore.open(pooled[0]).run("r")
    here = run.pooled("layers.0.resid_post", "max")
    there = pickle.loads(pickle.dumps(here))
    np.testing.assert_array_equal(there.to_numpy().vectors, here.to_numpy().vectors)


def test_statistics_without_a_hook_point_are_named(pooled, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(pooled[0], folder)
    run = actstore.open(str(folder)).run("r")
    with pytest.raises(FormatError, match=r"stats/all-.* has no statistics of layers\.9"):
        run_stats(_with_hook_point(run, "layers.9.resid_post"), ["layers.9.resid_post"])


def _with_hook_point(run, name):
    """The run as a faulty writer's manifest would have it: with a hook point that its statistics lack."""
    config = {**run.config, "hook_points": [*run.config["hook_points"], {"name": name, "d_model": 8}]}
    return dataclasses.replace(run, collection=dataclasses.replace(run.collection, config=config))
