"""The self-test passes good models and catches a model that ignores the mask and one whose layers do not add up."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoModel, GraniteConfig

from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.architectures import map_model
from actstore.ingest.capture import Capturer
from actstore.ingest.models import load_model
from actstore.ingest.self_test import self_test
from tests.ingest.tiny_models import FAMILIES, MORE_FAMILIES, cached


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_good_models_pass(family, dtype):
    report = self_test(load_model(cached(family), dtype=dtype), ["*"])
    assert not report.equal_lengths
    if family in ("bert", "roberta"):
        assert report.addition_error is None
    else:
        assert 0 < report.addition_error < 0.5


def blind_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attends to all tokens, padding too."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(
        1, 2
    ), None


def test_a_model_that_sees_padding_is_captured_without():
    AttentionInterface.register("blind", blind_attention)
    loaded = load_model(cached("bert"), attn_implementation="blind")
    assert loaded.attn_implementation == "blind"
    report = self_test(loaded, ["layers.*.resid_post"])
    assert report.equal_lengths
    assert report.padding_error > 0.05
    capturer = Capturer(loaded, ["layers.2.resid_post"], equal_lengths=report.equal_lengths)
    lengths = (9, 4, 9, 4, 4, 2)
    print("seed 1")
    ids = np.random.default_rng(1).integers(0, 512, sum(lengths)).astype(np.int32)
    starts = np.cumsum([0, *lengths])
    out = {"layers.2.resid_post": np.zeros((len(ids), 32), np.float32)}
    stats = capturer.capture_unit(ids, starts, out, batch_tokens=4096, stored_dtype="float32")
    assert (stats.n_batches, stats.n_padded) == (3, len(ids))
    for a, b in itertools.pairwise(starts):
        with torch.no_grad():
            alone = loaded.model(
                input_ids=torch.from_numpy(ids[a:b].astype(np.int64))[None]
            ).last_hidden_state[0]
        np.testing.assert_allclose(out["layers.2.resid_post"][a:b], alone, atol=1e-5)


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    """A real architecture that scales what it adds: attn_out and mlp_out are not what their names promise."""
    folder = tmp_path_factory.mktemp("granite")
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, residual_multiplier=0.25,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder)
    return load_model(str(folder))


@pytest.mark.parametrize(
    "hooks", [["layers.1.attn_out"], ["layers.1.mlp_out", "layers.0.resid_pre"], ["*"], ["layers.2.mlp_act"]]
)
def test_layers_that_do_not_add_up_are_refused(granite, hooks):
    with pytest.raises(InvalidInputError) as caught:
        self_test(granite, hooks)
    assert caught.value.kind is ErrorKind.SELF_TEST_FAILED
    assert "layer " in str(caught.value)
    assert "module:<path>" in str(caught.value)
    assert "layers.0.self_attn" in str(caught.value)


@pytest.mark.parametrize(
    "hooks", [["embed"], ["layers.*.resid_post", "layers.0.resid_pre"], ["module:layers.1.self_attn"]]
)
def test_other_places_of_such_a_model_are_captured(granite, hooks):
    report = self_test(granite, hooks)
    assert not report.equal_lengths
    asks_layers = any(hook.startswith("layers") for hook in hooks)
    assert (
        (report.addition_error is not None and report.addition_error > 100)
        if asks_layers
        else report.addition_error is None
    )


def test_one_wrong_layer_is_named():
    loaded = load_model(cached("llama"))
    layer = loaded.model.layers[1]
    layer.register_forward_hook(lambda m, a, output: output * 1.001)
    with pytest.raises(InvalidInputError, match="resid_post in layer 1 of this LlamaModel"):
        self_test(loaded, ["layers.*.mlp_out"])
    # Only asked layers count.
    self_test(loaded, ["layers.{0,2}.mlp_out"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_broken_weights_are_data(dtype):
    """NaN and infinity reach the caller as rows; they do not fail the test or hide a failure elsewhere."""
    loaded = load_model(cached("gpt2"), dtype=dtype)
    loaded.model.wte.weight[:, 3] = torch.nan
    assert not self_test(loaded, ["*"]).equal_lengths
    loaded = load_model(cached("gpt2"), dtype=dtype)
    loaded.model.h[1].mlp.c_proj.bias[5] = torch.inf
    assert not self_test(loaded, ["*"]).equal_lengths


def test_the_additive_flag_is_read_from_the_layers():
    loaded = load_model(cached("opt"))
    for layer in loaded.model.decoder.layers:
        layer.do_layer_norm_before = False
    assert not map_model(loaded.model).is_additive
