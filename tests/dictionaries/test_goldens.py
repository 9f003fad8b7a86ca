"""Codes and reconstructions of imported dictionaries against those of the libraries that made them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from actstore.ingest.dictionaries import Encoder, import_dictionary
from actstore.store import open_store

GOLDENS = Path(__file__).parents[1] / "data" / "dictionaries"
FOLDERS = sorted({path.parent for path in GOLDENS.rglob("expected.safetensors")})
TOLERANCE = 1e-5


def wrong(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to values above 1."""
    return float((np.abs(found - expected) / np.maximum(1, np.abs(expected))).max())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: str(f.relative_to(GOLDENS)).replace("/", "-"))
def test_codes_are_those_of_the_library(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    store = open_store("memory://goldens-" + str(folder.relative_to(GOLDENS)).replace("/", "-"), create=True)
    report = import_dictionary(store, folder, "d")
    dictionary = store.dictionary("d")
    encoder = Encoder(dictionary, value_dtype="float32")
    codes = encoder.encode(expected["rows"]).check()
    dense = codes.to_dense()
    np.testing.assert_array_equal(dense > 0, expected["codes"] > 0)
    assert wrong(dense, expected["codes"]) <= TOLERANCE
    decoded = encoder.decode(codes, expected["rows"])
    assert wrong(decoded, expected["decoded"]) <= TOLERANCE
    assert (report.d_in, report.n_latents) == (dense.shape[1] and expected["rows"].shape[1], dense.shape[1])
    assert report.d_out == decoded.shape[1]
    # In the stored dtype: the same numbers, rounded once.
    stored = Encoder(dictionary).encode(expected["rows"])
    np.testing.assert_array_equal(stored.to_dense(), dense.astype(np.float16).astype(np.float32))
    assert import_dictionary(store, folder, "d").is_new is False


def test_every_architecture_has_a_golden() -> None:
    seen = set()
    for folder in FOLDERS:
        name = "config.json" if (folder / "config.json").exists() else "cfg.json"
        cfg = json.loads((folder / name).read_text())
        seen.add(cfg.get("architecture") or cfg.get("trainer", {}).get("dict_class") or cfg.get("activation"))
    from actstore.ingest.dictionaries.dictionary_learning import _ACTIVATIONS
    from actstore.ingest.dictionaries.saelens import _ARCHITECTURES

    assert {*_ACTIVATIONS, *_ARCHITECTURES, "topk", "groupmax"} - {"matryoshka_batchtopk"} <= seen


@pytest.mark.parametrize(
    ("folder", "hook_point", "out"),
    [
        ("saelens-standard", "layers.3.resid_post", None),
        ("saelens-standard-hook-z", "layers.3.attn_z", None),
        ("saelens-transcoder", "layers.3.mlp_in", "layers.3.mlp_out"),
        ("saelens-old-topk", "layers.3.resid_post", None),
        ("sparsify-topk/layers.3", "layers.3.resid_post", None),
        ("sparsify-groupmax/layers.3.mlp", "layers.3.mlp_out", None),
        ("sparsify-transcode/layers.3.mlp", "layers.3.mlp_in", "layers.3.mlp_out"),
        ("sparsify-skip/h.3.attn", "module:h.3.attn:input", "module:h.3.attn:output"),
        ("dictionary-learning-BatchTopKSAE", "layers.3.resid_post", None),
    ],
)
def test_places(folder: str, hook_point: str, out: str | None) -> None:
    report = import_dictionary("memory://places-" + folder.replace("/", "-"), GOLDENS / folder, "d")
    assert (report.hook_point, report.hook_point_out) == (hook_point, out)


def test_what_is_kept_of_the_conventions() -> None:
    store = open_store("memory://conventions", create=True)
    import_dictionary(store, GOLDENS / "saelens-standard-scaler", "scaled")
    report = import_dictionary(store, GOLDENS / "saelens-standard-average", "average")
    assert "--norm-factor" in report.notes[0]
    import_dictionary(store, GOLDENS / "saelens-standard-average", "given", norm_factor=0.25)
    rows = load_file(GOLDENS / "saelens-standard" / "expected.safetensors")["rows"]
    scaled, given = (Encoder(store.dictionary(n)).encode(rows).to_dense() for n in ("scaled", "given"))
    np.testing.assert_array_equal(scaled, given)
    config = store.dictionary("scaled").config
    assert config["normalize"] == {"kind": "scale", "factor": 0.25}
    assert config["prepend_bos"] is True
    assert config["model"] == {"name": "tiny"}
    assert store.dictionary("scaled").info["cfg"]["normalize_activations"] == "expected_average_only_in"
    checkpoint = import_dictionary(store, GOLDENS / "saelens-batchtopk-checkpoint", "checkpoint")
    assert (checkpoint.activation, checkpoint.k) == ("batchtopk", 4.5)


def test_centre_takes_the_mean_away_first() -> None:
    store = open_store("memory://centre", create=True)
    for name in ("saelens-standard", "saelens-standard-layer-norm", "saelens-standard-constant-norm"):
        expected = load_file(GOLDENS / name / "expected.safetensors")
        import_dictionary(store, GOLDENS / name, name)
        import_dictionary(store, GOLDENS / name, name + "-c", center=True)
        plain, centred = (Encoder(store.dictionary(n), value_dtype="float32") for n in (name, name + "-c"))
        rows = expected["rows"]
        mean = rows.mean(1, keepdims=True)
        codes = centred.encode(rows)
        np.testing.assert_allclose(
            codes.to_dense(), plain.encode(rows - mean).to_dense(), atol=2e-6, rtol=2e-6
        )
        np.testing.assert_allclose(
            centred.decode(codes, rows), plain.decode(codes, rows - mean) + mean, atol=1e-5, rtol=1e-5
        )
