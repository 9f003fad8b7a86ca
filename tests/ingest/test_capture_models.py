"""Loading: which files, which identity, and what is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GPT2LMHeadModel, T5Config

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest.models import load_model
from actstore.ingest.weights import weights_sha256
from tests.ingest.tiny_models import FAMILIES, MORE_FAMILIES, build, cached


@pytest.fixture
def folder(tmp_path):
    """A folder that the test may change."""
    return Path(shutil.copytree(cached("gpt2"), tmp_path / "model"))


def refused(source, **options):
    with pytest.raises(InvalidInputError) as caught:
        load_model(str(source), **options)
    return caught.value


def test_what_is_known_of_a_model():
    loaded = load_model(cached("gpt2"))
    assert (loaded.d_model, loaded.context_length, loaded.vocab_size, loaded.map.n_layers) == (32, 64, 512, 3)
    assert (loaded.dtype, loaded.revision, str(loaded.device), loaded.attn_implementation) == (
        "float32",
        None,
        "cpu",
        "sdpa",
    )
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert set(loaded.fingerprint) == {
        "architecture",
        "config_sha256",
        "weights_sha256",
        "dtype",
        "attn_implementation",
    }
    assert cached("gpt2") not in json.dumps(loaded.fingerprint)
    eager = load_model(cached("gpt2"), attn_implementation="eager", dtype="bfloat16")
    assert (eager.dtype, eager.attn_implementation, eager.fingerprint["dtype"]) == (
        "bfloat16",
        "eager",
        "bfloat16",
    )


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_hook_points_of_every_family(family):
    loaded = load_model(cached(family))
    is_parallel = family in ("gpt_neox", "gptj", "falcon")
    is_post_norm = family in ("bert", "roberta")
    # All parts but router or mlp_act, and what such a model has not.
    assert len(loaded.map.sites) == 1 + 3 * (7 if is_parallel else 8) + (0 if is_post_norm else 1)
    assert loaded.map.is_additive == (family not in ("bert", "roberta"))
    # BLOOM and Falcon have no limit of positions in their configuration or one of their own.
    assert loaded.context_length == {"bloom": None, "falcon": 2048}.get(family, 64)


def test_the_fingerprint_is_of_the_content(folder, tmp_path):
    reference = load_model(str(folder)).fingerprint
    # Saved again in several files and with other metadata, by another version, under another path: the same model.
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt", "by": "test"})
    index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(dict(reversed(config.items())) | {"transformers_version": "9"}, indent=7)
    )
    assert load_model(str(folder)).fingerprint == reference
    # One bit of one weight, or one setting: another model.
    changed = {n: t.clone() for n, t in tensors.items()}
    changed["wpe.weight"].view(torch.int32)[3, 4] ^= 1
    save_file(
        {n: changed[n] for n in parts["model-00002-of-00002.safetensors"]},
        folder / "model-00002-of-00002.safetensors",
        metadata={"format": "pt"},
    )
    save_file(
        {n: changed[n] for n in parts["model-00001-of-00002.safetensors"]},
        folder / "model-00001-of-00002.safetensors",
        metadata={"format": "pt"},
    )
    other = load_model(str(folder)).fingerprint
    assert {k for k in reference if reference[k] != other[k]} == {"weights_sha256"}
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-6}))
    assert load_model(str(folder)).fingerprint["config_sha256"] != reference["config_sha256"]


def test_the_weights_hash_is_as_documented(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.tensor([1.5, -2.0]),
        "empty": torch.zeros(0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    lines = ""
    for name, dtype, data in [
        ("a", "F32", np.array([1.5, -2.0], np.float32).tobytes()),
        ("b", "BF16", tensors["b"].view(torch.int16).numpy().tobytes()),
        ("empty", "F32", b""),
    ]:
        lines += (
            f"{json.dumps([name, dtype, list(tensors[name].shape)])} {hashlib.sha256(data).hexdigest()}\n"
        )
    assert weights_sha256([tmp_path / "model.safetensors"]) == hashlib.sha256(lines.encode()).hexdigest()


def test_a_head_is_left_off_and_a_missing_pooler_is_no_pooler(tmp_path, folder):
    head = GPT2LMHeadModel.from_pretrained(folder)
    head.save_pretrained(tmp_path / "head")
    assert type(load_model(str(tmp_path / "head")).model).__name__ == "GPT2Model"
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=512
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    assert load_model(str(tmp_path / "bert")).model.pooler is None


def test_made_up_weights_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 4}))
    error = refused(folder)
    assert error.kind is ErrorKind.BAD_MODEL
    assert "lack 12 of its weights (h.3.attn.c_attn.bias" in str(error)


def test_pickled_weights_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    error = refused(folder)
    assert error.kind is ErrorKind.BAD_MODEL
    assert "pytorch_model.bin" in str(error)
    assert "save_pretrained" in str(error)


def test_code_that_comes_along_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"},
        "architectures": ["M"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    assert refused(folder).kind is ErrorKind.BAD_MODEL
    assert not (folder / "ran").exists()


def test_broken_folders_are_refused(folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "config.json" in str(refused(tmp_path / "nothing"))
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:-1], whole[:5], b"\xff" * 64, b""):
        (folder / "model.safetensors").write_bytes(damaged)
        assert refused(folder).kind is ErrorKind.BAD_MODEL
    (folder / "model.safetensors").unlink()
    for index in (
        "{",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../../x.safetensors"}}',
        '{"weight_map": {"a": "b.safetensors"}}',
    ):
        (folder / "model.safetensors.index.json").write_text(index)
        assert refused(folder).kind is ErrorKind.BAD_MODEL
    (folder / "config.json").write_text("{")
    assert refused(folder).kind is ErrorKind.BAD_MODEL


def test_unfit_models_and_arguments(tmp_path, folder):
    T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64, vocab_size=512).save_pretrained(
        tmp_path / "t5"
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "t5" / "model.safetensors")
    assert "encoder and a decoder" in str(refused(tmp_path / "t5"))
    for options in ({"dtype": "int8"}, {"device": "tpu:9"}, {"device": "nonsense"}, {"revision": "main"}):
        assert refused(folder, **options).kind is ErrorKind.BAD_ARGUMENT
    assert "nonsense" in str(refused(folder, attn_implementation="nonsense"))


@pytest.mark.parametrize("source", ["/no/such/folder", "./none", "nobody/nothing", "a/b/c", "bad name!!"])
def test_no_such_model(source, tmp_path):
    with pytest.raises(NotFoundError) as caught:
        load_model(source, cache_dir=str(tmp_path), offline=True)
    assert caught.value.kind is ErrorKind.MODEL_NOT_FOUND
    assert source in str(caught.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_hub_models_are_pinned_to_their_commit(tmp_path):
    """The hub's cache, laid out as its client does: a branch names a commit, a commit has files."""
    repo = tmp_path / "models--lab--tiny"
    build("llama", repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for revision in (None, "main", COMMIT):
        loaded = load_model("lab/tiny", revision=revision, cache_dir=str(tmp_path), offline=True)
        assert loaded.revision == loaded.fingerprint["revision"] == COMMIT
        assert "weights_sha256" not in loaded.fingerprint
    for source, revision in (("lab/tiny", "other"), ("lab/other", None)):
        with pytest.raises(NotFoundError) as caught:
            load_model(source, revision=revision, cache_dir=str(tmp_path), offline=True)
        assert caught.value.kind is ErrorKind.MODEL_NOT_FOUND
