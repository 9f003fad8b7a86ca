"""Files of unknown origin: damaged, hostile, pickled, half there; and the hub's cache without a network."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest.cli import sae_import
from actstore.ingest.dictionaries import import_dictionary
from actstore.ingest.dictionaries.foreign import place
from actstore.ingest.dictionaries.locate import find_dictionary
from actstore.store import open_store

GOLDENS = Path(__file__).parents[1] / "data" / "dictionaries"
STORE = "memory://foreign-files"
LAYOUTS = {
    "saelens-standard": ("cfg.json", "sae_weights.safetensors"),
    "sparsify-topk/layers.3": ("cfg.json", "sae.safetensors"),
    "dictionary-learning-BatchTopKSAE": ("config.json", "ae.safetensors"),
}


@pytest.fixture(params=LAYOUTS)
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A folder of each library that may be spoilt, its configuration and its weights."""
    folder = tmp_path / Path(request.param).name
    shutil.copytree(GOLDENS / request.param, folder)
    config, weights = LAYOUTS[request.param]
    return folder, folder / config, folder / weights


def refused(folder: Path, message: str, **options: object) -> None:
    with pytest.raises(InvalidInputError, match=message) as error:
        import_dictionary(STORE, folder, "d", **options)
    assert error.value.kind in (ErrorKind.BAD_MODEL, ErrorKind.NON_FINITE, ErrorKind.BAD_ACTIVATIONS)
    assert open_store(STORE, create=True).dictionaries() == []


def test_weights_that_are_damaged(copied: tuple[Path, Path, Path]) -> None:
    folder, _, weights = copied
    whole = weights.read_bytes()
    huge = (1 << 62).to_bytes(8, "little")
    for spoilt in (
        whole[:-4],
        whole[:4],
        b"",
        huge + whole[8:],
        whole + b"\0" * 8,
        b"\x80\x04pickle" + whole,
    ):
        weights.write_bytes(spoilt)
        refused(folder, "safetensors")
    deep = b"[" * 100_000
    weights.write_bytes(len(deep).to_bytes(8, "little") + deep)
    refused(folder, "header")
    lying = json.dumps(
        {"W_enc": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}
    ).encode()
    weights.write_bytes(len(lying).to_bytes(8, "little") + lying + b"\0" * 4)
    refused(folder, "safetensors")


def test_weights_of_something_else(copied: tuple[Path, Path, Path]) -> None:
    folder, _, weights = copied
    tensors = load_file(weights)
    matrix = next(name for name in ("W_dec", "decoder.weight") if name in tensors)
    for name, spoilt, message in (
        (matrix, tensors[matrix][:, :-1].copy(), "shape"),
        (matrix, np.full_like(tensors[matrix], np.nan), "NaN"),
        (matrix, np.full_like(tensors[matrix], -np.inf), "NaN or infinite"),
        (matrix, tensors[matrix].astype(np.int32), "floating-point"),
        ("extra", np.zeros(3, np.float32), "extra"),
    ):
        save_file({**tensors, name: spoilt}, weights)
        refused(folder, message)
    for name in tensors.keys() - {"k"}:
        save_file({k: v for k, v in tensors.items() if k != name}, weights)
        refused(folder, "has no tensor|are missing|shape")


def test_configurations_that_are_damaged(copied: tuple[Path, Path, Path]) -> None:
    folder, config, _ = copied
    for text in ("", "{", "[1]", "null", "[" * 100_000, '{"a": 1'):
        config.write_text(text)
        refused(folder, "cannot be read")


@pytest.mark.parametrize("value", [None, -3, 0, 2.5, "x", [1], {}, True, 10**30])
def test_numbers_that_are_none(copied: tuple[Path, Path, Path], value: object) -> None:
    folder, config, _ = copied
    found = json.loads(config.read_text())
    inner = found.get("trainer", found)
    name = next(n for n in ("d_sae", "num_latents", "dict_size") if n in inner)
    inner[name] = value
    config.write_text(json.dumps(found))
    if name == "dict_size" and value is None:
        return  # the weights say it
    refused(folder, "d_sae|num_latents|dict_size|expansion_factor|shape")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "abstopk"}, "negative"),
        ({"architecture": "temporal"}, "other rows"),
        ({"architecture": "sorcery"}, "'sorcery' of cfg.json is not known"),
        ({"normalize_activations": "covariance_whitening"}, "save_inference_model"),
        ({"normalize_activations": "constant_scalar_rescale"}, "factor"),
        ({"normalize_activations": 3}, "not text"),
        ({"apply_b_dec_to_input": "yes"}, "true or false"),
        (
            {"metadata": {"sae_lens_version": "6.0", "hook_name": "blocks.3.ln2.hook_normalized"}},
            "--hook-point",
        ),
        ({"metadata": {"sae_lens_version": "6.0"}}, "--hook-point"),
        ({"metadata": {"sae_lens_version": "6.0", "hook_name": "embed", "hook_head_index": 3}}, "head 3"),
        ({"metadata": []}, "an object"),
        ({"metadata": None, "activation_fn": "tanh-relu"}, "tanh-relu"),
        ({"sae_lens_version": "\u00b2.1", "metadata": None, "activation_fn": "tanh-relu"}, "tanh-relu"),
        ({"d_in": 13}, "do not belong together"),
    ],
)
def test_settings_of_saelens(tmp_path: Path, change: dict, message: str) -> None:
    folder = tmp_path / "s"
    shutil.copytree(GOLDENS / "saelens-standard", folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, **change}))
    refused(folder, message)


def test_settings_of_others(tmp_path: Path) -> None:
    for source, name, change, message in (
        ("sparsify-topk/layers.3", "cfg.json", {"signed": True}, "signed"),
        ("sparsify-topk/layers.3", "cfg.json", {"activation": "gelu"}, "gelu"),
        ("sparsify-topk/layers.3", "cfg.json", {"k": 41}, "41"),
        (
            "dictionary-learning-BatchTopKSAE",
            "config.json",
            {"trainer": {"dict_class": "IdentityDict"}},
            "Identity",
        ),
        (
            "dictionary-learning-AutoEncoderTopK",
            "config.json",
            {"trainer": {"dict_class": "AutoEncoderTopK", "k": 6}},
            "k is 6",
        ),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "layers.3"
        shutil.copytree(GOLDENS / source, folder)
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **change}))
        refused(folder, message)
    refused(GOLDENS / "sparsify-topk" / "layers.3", "factor", norm_factor=2.0)
    refused(GOLDENS / "saelens-standard", "factor", norm_factor=2.0)
    refused(GOLDENS / "saelens-standard-average", "factor", norm_factor=-2.0)


def test_folders_without_a_dictionary(tmp_path: Path) -> None:
    refused(tmp_path, "holds no dictionary")
    (tmp_path / "ae.pt").write_bytes(b"\x80")
    refused(tmp_path, "can run code when read")
    refused(GOLDENS / "saelens-standard", "holds no dictionary", format="sparsify")
    for source in ("no/such/folder/here/", "/absolute", "./here", "~/x", "one", "a/../b", "a//b"):
        with pytest.raises(NotFoundError):
            import_dictionary(STORE, source, "d")
    with pytest.raises(InvalidInputError, match="local folder"):
        import_dictionary(STORE, GOLDENS / "saelens-standard", "d", revision="main")
    with pytest.raises(InvalidInputError, match="auto"):
        import_dictionary(STORE, GOLDENS / "saelens-standard", "d", format="onnx")


def hub_cache(root: Path, source: Path, *, commit: str, folder: str, revision: str = "main") -> None:
    """Lay out files as the hub's client does after a download."""
    repository = root / "models--owner--saes"
    target = repository / "snapshots" / commit / folder
    shutil.copytree(source, target)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


def test_the_hub_at_a_pinned_revision(tmp_path: Path) -> None:
    old, new = "a" * 40, "b" * 40
    cache = str(tmp_path)
    hub_cache(tmp_path, GOLDENS / "saelens-standard", commit=old, folder="layer_3/width_40", revision="v1")
    hub_cache(tmp_path, GOLDENS / "saelens-gated", commit=new, folder="layer_3/width_40")
    hub_cache(tmp_path, GOLDENS / "dictionary-learning-AutoEncoder", commit=new, folder="dl/trainer_0")
    hub_cache(tmp_path, GOLDENS / "sparsify-topk" / "layers.3", commit=new, folder="layers.3")
    store = open_store("memory://hub", create=True)
    options = {"cache_dir": cache, "offline": True}
    for name, revision, commit, activation in (
        ("v1", "v1", old, "relu"),
        ("main", None, new, "gated"),
        ("commit", old, old, "relu"),
    ):
        report = import_dictionary(store, "owner/saes/layer_3/width_40", name, revision=revision, **options)
        assert (report.commit, report.activation) == (commit, activation)
        assert store.dictionary(name).info["commit"] == commit
        assert store.dictionary(name).info["source"] == "owner/saes/layer_3/width_40"
    # The same files at another commit are the same dictionary.
    assert store.dictionary("v1").fingerprint == store.dictionary("commit").fingerprint
    assert (
        import_dictionary(store, "owner/saes/dl/trainer_0", "dl", **options).format == "dictionary_learning"
    )
    assert import_dictionary(store, "owner/saes/layers.3", "sp", **options).format == "sparsify"
    for source, revision in (
        ("owner/saes", None),
        ("owner/saes/layer_3/width_40", "v2"),
        ("owner/other", None),
    ):
        with pytest.raises(NotFoundError, match="hub") as error:
            find_dictionary(source, revision=revision, **options)
        assert error.value.kind is ErrorKind.SOURCE_NOT_FOUND


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.3.hook_resid_post", "layers.3.resid_post"),
        ("blocks.0.hook_resid_pre", "layers.0.resid_pre"),
        ("blocks.11.attn.hook_z", "layers.11.attn_z"),
        ("blocks.11.hook_mlp_out", "layers.11.mlp_out"),
        ("hook_embed", "embed"),
        ("model.embed_tokens", "embed"),
        ("layers.3", "layers.3.resid_post"),
        ("model.layers.3", "layers.3.resid_post"),
        ("transformer.h.3", "layers.3.resid_post"),
        ("gpt_neox.layers.3.mlp", "layers.3.mlp_out"),
        ("transformer.blocks.3", "layers.3.resid_post"),
        ("model.layers.3.self_attn", "module:layers.3.self_attn:output"),
        ("layers.3.resid_mid", "layers.3.resid_mid"),
        ("module:layers.3.mlp:input", "module:layers.3.mlp:input"),
    ],
)
def test_names_of_places(name: str, expected: str) -> None:
    assert place(name, None, what="x") == expected


@pytest.mark.parametrize(
    "name", [None, "", 3, "blocks.3.ln2.hook_normalized", "resid_post", "x" * 1000, "layers.3..mlp"]
)
def test_names_of_no_place(name: object) -> None:
    with pytest.raises(InvalidInputError, match="--hook-point"):
        place(name, None, what="x")


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    sae_import.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    store = str(tmp_path / "s")
    source = str(GOLDENS / "saelens-jumprelu-transcoder")
    assert sae_import.run(parser.parse_args([store, source, "--name", "t"])) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("imported dictionary t: jumprelu transcoder of 40 latents")
    assert "layers.3.mlp_in (12) to layers.3.mlp_out (8), from saelens" in printed
    assert sae_import.run(parser.parse_args([store, source, "--name", "t", "--json"])) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["is_new"], report["version"], report["d_out"]) == (False, 1, 8)
    other = [store, str(GOLDENS / "saelens-topk"), "--name", "k", "--hook-point", "layers.1.mlp_out"]
    assert sae_import.run(parser.parse_args(other)) == 0
    assert "topk sae of 40 latents, k 5" in capsys.readouterr().out
    assert open_store(store).dictionary("k").hook_point == "layers.1.mlp_out"


def test_a_configuration_that_no_manifest_can_hold(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(GOLDENS / "saelens-standard", folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    store = open_store("memory://long-configurations", create=True)
    for name, extra in (("long", "x" * 100_000), ("wide", 10**400), ("surrogate", "\ud800")):
        (folder / "cfg.json").write_text(json.dumps({**cfg, "extra": extra}))
        import_dictionary(store, folder, name)
        assert "cfg" not in store.dictionary(name).info
    (folder / "cfg.json").write_text(json.dumps({**cfg, "extra": float("nan")}))
    refused(folder, "NaN")
    for factor in (10**400, "1", None, 0, True):
        shutil.copy(GOLDENS / "saelens-standard-average" / "cfg.json", folder / "cfg.json")
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
        if factor is None:
            assert import_dictionary(store, folder, "none").notes
        else:
            refused(folder, "factor")
