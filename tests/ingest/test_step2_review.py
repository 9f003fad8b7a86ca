"""What a new user stumbled over: each once, so that it does not come back."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import actstore
from actstore.cli import main
from actstore.errors import InvalidInputError
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.config_file import parse_config
from actstore.ingest.dry_run import dry_run
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
