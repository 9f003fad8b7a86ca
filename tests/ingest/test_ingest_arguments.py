"""Settings of the writing side that cannot work: refused with their name and value, before any work is done."""

import argparse
from pathlib import Path

import pytest

import actstore
from actstore.errors import ErrorKind, InvalidInputError, StorageError
from actstore.ingest import IngestConfig, import_corpus, tokenize_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.cli.bars import auto_or_int
from actstore.ingest.cli.ingest import ingest_with_bar
from actstore.ingest.encode_text import _check_texts
from actstore.ingest.ray_backend import start_ray
from tests.ingest import synthetic, tiny_models

WRONG = {
    "workers": ["2", 0, 1.5, None, True],
    "batch_tokens": ["8192", 0, -1],
    "window": ["16", 1, 2.0],
    "overlap": ["1", -1, None],
    "rows_per_unit": ["64", 0, 64.0, None],
    "max_attempts": [0, "3"],
    "commit_interval_s": ["5", -1, float("nan")],
    "dtype": ["bf17", None, 16],
    "codec": ["zip", None],
    "nonfinite": ["ignore", None],
    "hook_points": ["embed", [], None, 3],
    "model": [None, Path("model")],
    "tokenizer": [3],
    "device": [None, 0],
    "ray_address": [6379],
    "run": ["../up", None, 3],
    "corpus": ["", None],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG.items() for v in values])
def test_a_setting_of_the_wrong_type_or_size_is_named(field, value):
    good = {"corpus": "c", "model": "m", "hook_points": ["embed"], "run": "r", "ray_address": None}
    IngestConfig(**good).check()
    with pytest.raises(InvalidInputError, match=field.replace("_", "[ _]")) as caught:
        IngestConfig(**{**good, field: value}).check()
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "setting", [{"window": "16"}, {"overlap": 1.5}, {"rows_per_unit": 1 << 40}, {"rows_per_unit": 64.5}]
)
def test_a_tokenization_of_the_wrong_size_is_refused(tmp_path, setting):
    url = str(tmp_path / "store")
    tokenizer = synthetic.make_corpus(url, tmp_path / "tokenizer", n_documents=3)
    with pytest.raises(InvalidInputError, match=next(iter(setting))):
        tokenize_corpus(url, "words", tokenizer, **setting)


def test_a_codec_that_cannot_be_is_told_before_the_corpus_is_tokenized(tmp_path):
    url = str(tmp_path / "store")
    tokenizer = synthetic.make_corpus(url, tmp_path / "tokenizer", n_documents=3)
    before = actstore.open(url).version
    with pytest.raises(InvalidInputError, match="'cold' is for bfloat16"):
        run_ingest(
            url, synthetic.config(tokenizer, codec="cold", window=8), backend=synthetic.SyntheticBackend()
        )
    assert actstore.open(url).version == before


def test_a_model_in_a_relative_folder_is_found_again_from_elsewhere(tmp_path, monkeypatch):
    folder = Path(tiny_models.cached("gpt2"))
    url = str(tmp_path / "store")
    import_corpus(actstore.open(url, create=True), "c", ["one two three", "four five"])
    monkeypatch.chdir(folder.parent)
    config = IngestConfig(
        corpus="c", model=folder.name, hook_points=["embed"], run="r", ray_address=None, device="cpu"
    )
    assert run_ingest(url, config).is_complete
    monkeypatch.chdir(tmp_path)
    run = actstore.open(url).run("r")
    assert run.model["source"] == str(folder)
    assert len(run.encode_text(["one two"], "embed")) == 1


def test_an_address_that_ray_cannot_parse():
    class Ray:
        def is_initialized(self):
            return False

        def init(self, address, **options):
            raise ValueError(f"Invalid address format: {address}")

    with pytest.raises(StorageError, match="cannot reach Ray at 'bogus'"):
        start_ray(Ray(), "bogus")


@pytest.mark.parametrize("text", ["a\udcffb", None, 3])
def test_texts_that_are_none(text):
    with pytest.raises(InvalidInputError):
        _check_texts(["fine", text])


def test_what_is_refused_or_done_already_draws_no_bar(tmp_path, capsys):
    url = str(tmp_path / "store")
    actstore.open(url, create=True)
    config = IngestConfig(corpus="none", model="m", hook_points=["embed"], run="r", ray_address=None)
    with pytest.raises(actstore.NotFoundError):
        ingest_with_bar(url, config, quiet=False)
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""


def test_auto_or_a_number():
    assert auto_or_int("auto") == "auto"
    assert auto_or_int("64") == 64
    with pytest.raises(argparse.ArgumentTypeError, match="auto or a whole number, got 'x'"):
        auto_or_int("x")


@pytest.mark.parametrize("argument", ["split", "subset", "revision"])
def test_settings_of_datasets_are_refused_for_files(tmp_path, argument):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InvalidInputError, match=f"{argument}='x' is for datasets"):
        import_corpus(f"memory://arguments-{argument}", "c", tmp_path / "a.jsonl", **{argument: "x"})


@pytest.mark.parametrize(
    "url", ["http://me:secret@127.0.0.1:1/a.jsonl?key=secret", "ftp://127.0.0.1:1/a.jsonl"]
)
def test_a_source_that_cannot_be_reached_is_named_without_its_secrets(url):
    with pytest.raises(StorageError, match=r"127.0.0.1:1/a.jsonl' cannot be listed") as caught:
        import_corpus("memory://arguments-unreachable", "c", url)
    assert caught.value.kind is ErrorKind.STORAGE_FAILED
    assert "secret" not in str(caught.value)
