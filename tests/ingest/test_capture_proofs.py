"""Every proof passes good models of every family, fails for the place it is about, and refuses nothing else."""

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, AutoModel, MambaConfig, MPNetConfig

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest.capture import Capturer
from actstore.ingest.models import load_model
from actstore.ingest.self_test import self_test
from tests.ingest.tiny_models import OTHER_FAMILIES, cached


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_good_models_pass_in_half_precision(family):
    loaded = load_model(cached(family), dtype="bfloat16")
    if family == "deberta":
        # Its attention multiplies a float32 tensor with the others, whatever the weights are.
        with pytest.raises(InvalidInputError, match="DebertaModel fails on 5 tokens, in bfloat16") as caught:
            self_test(loaded, ["*"])
        assert caught.value.kind is ErrorKind.BAD_MODEL
        return
    report = self_test(loaded, ["*"])
    assert not report.equal_lengths
    if report.addition_error is None:
        assert family in ("opt_post_norm", "distilbert", "electra", "deberta", "deberta_v2", "xlm_roberta")
    else:
        assert 0 < report.addition_error < 0.5


def scale(output):
    if isinstance(output, tuple):
        return (output[0] * 1.1, *output[1:])
    return output * 1.1


def scale_inputs(_module, args, kwargs):
    if args:
        return (args[0] * 1.1, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.1}


def softmaxed(_module, _args, output):
    return (output[0].softmax(dim=-1), *output[1:])


# What is changed in layer 1, and which of its places are no longer what they are called.
OUTPUT, INPUT = "output", "input"
WRONG = {
    "MLP's output is scaled after its projection": ("llama", "mlp", OUTPUT, {"mlp_act"}),
    "attention's output is scaled after its projection": ("llama", "self_attn", OUTPUT, {"attn_z"}),
    "MLP receives something else than its norm": ("llama", "mlp", INPUT, {"mlp_in"}),
    "the norm reads something else than the stream": (
        "llama", "post_attention_layernorm", INPUT, {"attn_z", "attn_out", "resid_mid", "mlp_act", "mlp_out"},
    ),
    "the layer's output is scaled": (
        "gpt2", "", OUTPUT, {"attn_z", "attn_out", "resid_mid", "mlp_act", "mlp_out"},
    ),
    "the same, in a parallel block": ("gpt_neox", "", OUTPUT, {"attn_z", "attn_out", "mlp_act", "mlp_out"}),
    "another input of a parallel block's MLP": ("gpt_neox", "mlp", INPUT, {"mlp_in"}),
    "a post-norm is followed by more": (
        "gemma2", "pre_feedforward_layernorm", INPUT, {"attn_z", "attn_out", "resid_mid", "mlp_act", "mlp_out"},
    ),
    "the stream behind BERT's first norm is scaled": (
        "bert", "attention.output", OUTPUT, {"attn_z", "attn_out", "resid_mid", "mlp_act", "mlp_out"},
    ),
    "the router reads something else": ("mixtral", "mlp.gate", INPUT, {"router"}),
    "the router's first output is after softmax": ("olmoe", "mlp.gate", softmaxed, {"router"}),
    "the layer's mixture receives something else": ("qwen3_moe", "mlp", INPUT, {"mlp_in"}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_fails_its_proof_is_refused_and_nothing_else(case):
    family, path, change, wrong = WRONG[case]
    loaded = load_model(cached(family))
    layer = loaded.model.get_submodule(f"{loaded.map.layers_path}.1")
    module = layer.get_submodule(path) if path else layer
    if change == INPUT:
        module.register_forward_pre_hook(scale_inputs, with_kwargs=True)
    elif change == OUTPUT:
        module.register_forward_hook(lambda m, a, output: scale(output))
    else:
        module.register_forward_hook(change)
    parts = [name.split(".")[2] for name in loaded.map.sites if name.startswith("layers.1.")]
    assert wrong <= set(parts)
    for part in parts:
        names = [f"layers.1.{part}", "layers.0.resid_post"]
        if part not in wrong:
            self_test(loaded, names)
            continue
        with pytest.raises(InvalidInputError, match="in layer 1 of this") as caught:
            self_test(loaded, names)
        assert caught.value.kind is ErrorKind.SELF_TEST_FAILED
        assert f"{part} is not where this version looks" in str(caught.value)
        assert "module:<path>" in str(caught.value)
    # Other layers are not concerned.
    self_test(loaded, [name for name in loaded.map.sites if ".1." not in name])


def test_a_model_that_does_more_after_its_final_norm():
    loaded = load_model(cached("qwen3"))
    loaded.model.register_forward_hook(
        lambda m, a, output: type(output)(last_hidden_state=output.last_hidden_state * 2)
    )
    self_test(loaded, ["layers.*.resid_post"])
    with pytest.raises(
        InvalidInputError, match="last_hidden_state is not final_norm of this Qwen3Model"
    ) as caught:
        self_test(loaded, ["final_norm"])
    assert caught.value.kind is ErrorKind.SELF_TEST_FAILED


@pytest.mark.parametrize(
    ("family", "asked", "reason"),
    [
        ("gpt_neox", "layers.0.resid_mid", "read the same residual stream"),
        ("falcon", "blocks.*.hook_resid_mid", "read the same residual stream"),
        ("cohere", "embed,layers.{0,1}.{resid_pre,resid_mid}", "read the same residual stream"),
        ("bert", "final_norm", "normalise their own output"),
        ("deberta_v2", "ln_final.hook_normalized", "normalise their own output"),
        ("llama", "layers.*.router", "one MLP and no mixture of experts"),
        ("mixtral", "layers.2.mlp_act", "a mixture of experts has many"),
        ("deepseek_v3", "layers.0.router", "one MLP and no mixture of experts"),
        ("deepseek_v3", "layers.1.mlp_act", "a mixture of experts has many"),
    ],
)
def test_why_a_model_has_no_such_place(family, asked, reason):
    loaded = load_model(cached(family))
    with pytest.raises(NotFoundError, match=reason) as caught:
        loaded.map.resolve(asked)
    assert caught.value.kind is ErrorKind.HOOK_POINT_NOT_FOUND
    assert "module:<path>" in str(caught.value)
    # The reason is given where it explains something.
    with pytest.raises(NotFoundError) as caught:
        loaded.map.resolve("layers.7.resid_post")
    assert "It has no" not in str(caught.value)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Models whose layers are not of attention and MLP as this version knows them."""
    common = {
        "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 1,
    }  # fmt: skip
    configs = {
        "mamba": MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=3),
        "mpnet": MPNetConfig(**common),
        "albert": AlbertConfig(**common, embedding_size=16),
    }
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("others")
    for name, config in configs.items():
        AutoModel.from_config(config).save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "no attention and MLP module was recognised"),
        ("mpnet", "no MLP module was recognised"),
        ("albert", "No list of layers was recognised"),
    ],
)
def test_layers_of_another_kind(others, name, reason):
    """Their input and output are captured, everything else is reached by module path, and the error shows the paths."""
    loaded = load_model(str(others / name))
    for part in ("attn_out", "attn_z", "mlp_in", "mlp_out", "resid_mid"):
        with pytest.raises(NotFoundError, match=reason) as caught:
            loaded.map.resolve(f"layers.0.{part}")
        tree = {
            "mamba": "mixer.conv1d (Conv1d)",
            "mpnet": "attention.attn.q (Linear)",
            "albert": "AlbertLayer",
        }
        assert tree[name] in str(caught.value)
        assert "module:<path>" in str(caught.value)
    if name == "albert":
        assert list(loaded.map.sites) == ["embed"]
        return
    hooks = ["layers.*.resid_pre", "layers.*.resid_post"]
    assert self_test(loaded, hooks).addition_error is None
    ids = np.arange(5, 17, dtype=np.int32)
    capturer = Capturer(loaded, hooks)
    out = {name: np.zeros((12, 32), np.float32) for name in capturer.widths}
    capturer.capture_unit(ids, np.array([0, 12]), out, batch_tokens=64, stored_dtype="float32")
    model = AutoModel.from_pretrained(others / name).eval()
    with torch.no_grad():
        states = model(input_ids=torch.arange(5, 17)[None], output_hidden_states=True).hidden_states
    # Mamba's states begin behind its first layer.
    part = "resid_post" if name == "mamba" else "resid_pre"
    for i in range(3):
        np.testing.assert_allclose(out[f"layers.{i}.{part}"], states[i][0], atol=1e-5)


def test_a_mixture_is_not_taken_for_sensitive_to_padding():
    """Single tokens that rounding sends to other experts are no leak; a leak is in all rows of a padded window."""
    loaded = load_model(cached("mixtral"))
    assert not self_test(loaded, ["layers.*.mlp_out"]).equal_lengths
    calls = []

    def flip_one_row(_module, args):
        # The first token of each pass is sent elsewhere in every other pass.
        calls.append(None)
        logits = args[0].clone()
        if len(calls) % 2:
            logits[:1] = -logits[:1]
        return (logits, *args[1:])

    loaded.model.layers[2].mlp.gate.register_forward_pre_hook(flip_one_row)
    assert not self_test(loaded, ["layers.*.mlp_out"]).equal_lengths


def test_a_mixture_that_sees_padding_is_found():
    loaded = load_model(cached("mixtral"))

    def crowd(_module, _args, output):
        # An expert's share depends on how many tokens there are, padding too: what a fixed capacity does.
        return (output[0], output[1] * (1 + 0.02 * output[0].shape[0]), output[2])

    loaded.model.layers[0].mlp.gate.register_forward_hook(crowd)
    report = self_test(loaded, ["layers.*.mlp_out"])
    assert report.equal_lengths
    assert report.padding_error > 0.01
