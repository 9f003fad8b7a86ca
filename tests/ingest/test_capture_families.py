"""What is captured of every family, in padded batches, against transformers' own outputs and arithmetic done by hand here.

Nothing is compared with hooks: the residual stream is `output_hidden_states`, routers are `output_router_logits`, and everything
between is recomputed in float64 from the weights, by the reading of each model's source.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel
from transformers.activations import ACT2FN

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest.architectures import map_model
from actstore.ingest.capture import Capturer
from actstore.ingest.models import load_model
from tests.ingest.tiny_models import ALL_FAMILIES, MOE_FAMILIES, cached

LENGTHS = (9, 3, 1, 14, 14, 2)
TOLERANCE = 3e-5
"""Of a row's norm: float32, in batches of other shapes."""


class Tree(NamedTuple):
    """Where the weights are, from one layer."""

    layers: str
    z_to_attn: str
    norm: str | None
    """Before the MLP."""
    up: tuple[str, ...]
    """Gate and up, one matrix for both after `fused`, or one plain matrix."""
    down: str
    final: str | None
    kind: str = "sequential"
    attn_post: str | None = None
    mlp_post: str | None = None
    norms: str = "rms"


GATED = ("mlp.gate_proj", "mlp.up_proj")
LLAMA = Tree("layers", "self_attn.o_proj", "post_attention_layernorm", GATED, "mlp.down_proj", "norm")
GEMMA2 = LLAMA._replace(
    norm="pre_feedforward_layernorm",
    attn_post="post_attention_layernorm",
    mlp_post="post_feedforward_layernorm",
    norms="gemma",
)
OLMO2 = GEMMA2._replace(norm=None, norms="rms")
GPT2 = Tree("h", "attn.c_proj", "ln_2", ("mlp.c_fc",), "mlp.c_proj", "ln_f", norms="ln")
NEOX = Tree(
    "layers", "attention.dense", "post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h",
    "final_layer_norm", norms="ln",
)  # fmt: skip
FALCON = Tree(
    "h", "self_attention.dense", "input_layernorm", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "ln_f",
    "parallel", norms="ln",
)  # fmt: skip
OPT = Tree(
    "decoder.layers", "self_attn.out_proj", "final_layer_norm", ("fc1",), "fc2", "decoder.final_layer_norm",
    norms="ln",
)  # fmt: skip
BERT = Tree(
    "encoder.layer", "attention.output.dense", None, ("intermediate.dense",), "output.dense", None,
    "post_norm", "attention.output.LayerNorm", "output.LayerNorm", "ln",
)  # fmt: skip
COHERE = LLAMA._replace(norm="input_layernorm", kind="parallel", norms="ln")
GLM = LLAMA._replace(up=("fused", "mlp.gate_up_proj"))
TREES = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "granite", "smollm3"), LLAMA),
    **dict.fromkeys(MOE_FAMILIES, LLAMA),
    "phimoe": LLAMA._replace(norms="ln"),
    "llama4": LLAMA._replace(
        up=("feed_forward.gate_proj", "feed_forward.up_proj"), down="feed_forward.down_proj"
    ),
    "gemma": LLAMA._replace(norms="gemma"),
    "gemma2": GEMMA2,
    "gemma3": GEMMA2,
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), OLMO2),
    "olmo": LLAMA._replace(norms="ln"),
    "stablelm": LLAMA._replace(norms="ln"),
    "stablelm_parallel": LLAMA._replace(norm="input_layernorm", kind="parallel", norms="ln"),
    "nemotron": LLAMA._replace(up=("mlp.up_proj",), norms="ln1p"),
    "starcoder2": LLAMA._replace(up=("mlp.c_fc",), down="mlp.c_proj", norms="ln"),
    "glm": GLM,
    "phi3": GLM,
    "glm4": GLM._replace(attn_post="post_self_attn_layernorm", mlp_post="post_mlp_layernorm"),
    "cohere": COHERE,
    "cohere2": COHERE,
    "phi": Tree(
        "layers", "self_attn.dense", "input_layernorm", ("mlp.fc1",), "mlp.fc2", "final_layernorm",
        "parallel", norms="ln",
    ),
    "persimmon": NEOX._replace(z_to_attn="self_attn.dense", final="final_layernorm"),
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": GPT2._replace(z_to_attn="attn.attention.out_proj"),
    "gptj": Tree("h", "attn.out_proj", "ln_1", ("mlp.fc_in",), "mlp.fc_out", "ln_f", "parallel", norms="ln"),
    "gpt_neox": NEOX._replace(kind="parallel"),
    "gpt_neox_serial": NEOX,
    "mpt": Tree("blocks", "attn.out_proj", "norm_2", ("ffn.up_proj",), "ffn.down_proj", "norm_f", norms="ln"),
    "falcon": FALCON,
    "falcon_new": FALCON._replace(norm="ln_mlp"),
    "falcon_serial": FALCON._replace(norm="post_attention_layernorm", kind="sequential"),
    "bloom": FALCON._replace(norm="post_attention_layernorm", kind="sequential"),
    "opt": OPT,
    "opt_post_norm": OPT._replace(
        norm=None, kind="post_norm", attn_post="self_attn_layer_norm", mlp_post="final_layer_norm", final=None
    ),
    "xglm": OPT._replace(layers="layers", final="layer_norm"),
    **dict.fromkeys(("bert", "roberta", "xlm_roberta", "electra", "deberta", "deberta_v2"), BERT),
    "roberta_prelayernorm": BERT._replace(
        norm="intermediate.LayerNorm", kind="sequential", attn_post=None, mlp_post=None, final="LayerNorm"
    ),
    "distilbert": Tree(
        "transformer.layer", "attention.out_lin", None, ("ffn.lin1",), "ffn.lin2", None, "post_norm",
        "sa_layer_norm", "output_layer_norm", "ln",
    ),
    "modernbert": Tree("layers", "attn.Wo", "mlp_norm", ("fused", "mlp.Wi"), "mlp.Wo", "final_norm", norms="ln"),
}  # fmt: skip


def linear(family, module, x):
    weight = module.weight.double()
    y = x @ (weight if family == "gpt2" else weight.T)  # GPT-2 keeps its matrices the other way round
    return y if getattr(module, "bias", None) is None else y + module.bias.double()


def norm(kind, module, x):
    eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None)
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    if kind.startswith("ln"):
        weight = None if weight is None else weight.double() + (kind == "ln1p")
        return F.layer_norm(x, x.shape[-1:], weight, None if bias is None else bias.double(), eps or 1e-5)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight.double() + (kind == "gemma"))


def activation(family, config, x):
    if family == "bloom":
        return 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))
    if family == "mpt":
        return F.gelu(x)
    names = ("hidden_activation", "hidden_act", "activation_function", "activation")
    return ACT2FN[next(v for v in (getattr(config, name, None) for name in names) if v)](x)


def neurons(family, config, tree, layer, mlp_in):
    """Return the MLP's hidden activations, by hand."""
    kind, *paths = tree.up if tree.up[0] == "fused" else ("", *tree.up)
    hidden = [linear(family, layer.get_submodule(path), mlp_in) for path in paths]
    if kind == "fused":
        hidden = list(hidden[0].chunk(2, dim=-1))
    first = activation(family, config, hidden[0])
    return first * hidden[1] if len(hidden) == 2 else first


def capture(loaded, documents, batch_tokens=64):
    capturer = Capturer(loaded, ["*"])
    ids = np.array([t for d in documents for t in d], np.int32)
    starts = np.cumsum([0, *map(len, documents)])
    out = {name: np.full((len(ids), w), np.nan, np.float32) for name, w in capturer.widths.items()}
    stats = capturer.capture_unit(ids, starts, out, batch_tokens=batch_tokens, stored_dtype="float32")
    assert stats.n_padded > len(ids)
    return capturer, {name: torch.from_numpy(a).double() for name, a in out.items()}


def own_outputs(model, documents, **options):
    """Return each document's plain output, alone and without a mask."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor(d)[None], use_cache=False, **options) for d in documents]


def assert_close(got, expected, what):
    assert got.shape == expected.shape, what
    error = ((got - expected.double()).norm(dim=1) / expected.double().norm(dim=1)).max()
    assert error < TOLERANCE, f"{what}: {error}"


def check_layer(family, model, i, acts, before, after):
    """Follow one layer by hand from transformers' hidden state before it to the one after it."""
    tree = TREES[family]
    layer = model.get_submodule(f"{tree.layers}.{i}")
    here = {name.split(".")[2]: a for name, a in acts.items() if name.startswith(f"layers.{i}.")}

    def post(path, x):
        return norm(tree.norms, layer.get_submodule(path), x) if path else x

    after_sum = tree.kind == "post_norm"
    assert_close(here["resid_pre"], before, f"{i} resid_pre")
    attn_out = linear(family, layer.get_submodule(tree.z_to_attn), here["attn_z"])
    attn_out = attn_out if after_sum else post(tree.attn_post, attn_out)
    assert_close(here["attn_out"], attn_out, f"{i} attn_out")
    mid = before.double() + attn_out
    mid = post(tree.attn_post, mid) if after_sum else mid
    if tree.kind == "parallel":
        assert "resid_mid" not in here
    else:
        assert_close(here["resid_mid"], mid, f"{i} resid_mid")
    mlp_in = post(tree.norm, before.double() if tree.kind == "parallel" else mid)
    assert_close(here["mlp_in"], mlp_in, f"{i} mlp_in")
    assert ("router" in here) != ("mlp_act" in here)
    if "mlp_act" in here:
        assert_close(here["mlp_act"], neurons(family, model.config, tree, layer, mlp_in), f"{i} mlp_act")
        mlp_out = linear(family, layer.get_submodule(tree.down), here["mlp_act"])
        mlp_out = mlp_out if after_sum else post(tree.mlp_post, mlp_out)
        assert_close(here["mlp_out"], mlp_out, f"{i} mlp_out")
    else:
        mlp_out = here["mlp_out"]
    result = mid + mlp_out
    result = post(tree.mlp_post, result) if after_sum else result
    assert_close(here["resid_post"], result, f"{i} resid_post")
    if after is not None:
        assert_close(here["resid_post"], after, f"{i} resid_post, hidden_states")
    return here["resid_post"]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_hook_point_of_every_family(family):
    loaded = load_model(cached(family))
    rng = np.random.default_rng(len(family))
    documents = [rng.integers(3, 512, n).tolist() for n in LENGTHS]
    capturer, acts = capture(loaded, documents)
    model = AutoModel.from_pretrained(cached(family)).eval()
    outputs = own_outputs(model, documents, output_hidden_states=True)
    states = [
        torch.cat(parts).double()
        for parts in zip(*([s[0] for s in o.hidden_states] for o in outputs), strict=True)
    ]
    last = torch.cat([o.last_hidden_state[0] for o in outputs])
    n_layers = len(states) - 1
    tree = TREES[family]
    for i in range(n_layers):
        after = states[i + 1] if i + 1 < n_layers or tree.kind == "post_norm" else None
        output = check_layer(family, model, i, acts, states[i], after)
    if tree.final is None:
        assert "final_norm" not in acts
        assert_close(output, last, "last resid_post")
    else:
        assert_close(acts["final_norm"], last, "final_norm")
        assert_close(
            acts["final_norm"], norm(tree.norms, model.get_submodule(tree.final), output), "final norm"
        )
        assert (output - last).norm() > 0.1 * last.norm()
    embedding = model.get_input_embeddings()
    ids = torch.tensor([t for d in documents for t in d])
    assert_close(acts["embed"], embedding(ids), "embed")
    assert capturer.heads == {name: 4 for name in acts if name.endswith("attn_z")}
    assert len(capturer.heads) == n_layers


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_router_logits_are_transformers_own(family):
    """Of every token, padded batches or not, before softmax, choice or bias for the choice."""
    loaded = load_model(cached(family))
    rng = np.random.default_rng(1)
    documents = [rng.integers(3, 512, n).tolist() for n in LENGTHS]
    _, acts = capture(loaded, documents)
    model = AutoModel.from_pretrained(cached(family)).eval()
    outputs = own_outputs(model, documents, output_router_logits=True)
    layers = [name for name in acts if name.endswith(".router")]
    assert layers
    per_layer = list(zip(*(o.router_logits for o in outputs), strict=True))
    assert len(per_layer) == len(layers)
    for name, parts in zip(layers, per_layer, strict=True):
        expected = torch.cat([p.reshape(-1, p.shape[-1]) for p in parts])
        assert expected.shape[1] == 4
        assert_close(acts[name], expected, name)
        by_hand = linear(family, _router(model, name), acts[name.replace("router", "mlp_in")])
        assert_close(acts[name], by_hand, name)


def _router(model, name):
    layer = model.layers[int(name.split(".")[1])]
    names = {path: module for path, module in layer.named_modules() if path.endswith((".gate", ".router"))}
    (module,) = names.values()
    return module


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "distilbert", "phi", "gemma3"])
def test_attn_z_is_each_heads_values_weighed_by_its_attention(family):
    """By hand from transformers' own attention weights, head by head: the order of heads in a row is shown too."""
    rng = np.random.default_rng(2)
    documents = [rng.integers(3, 512, n).tolist() for n in LENGTHS]
    capturer, acts = capture(load_model(cached(family), attn_implementation="eager"), documents)
    model = AutoModel.from_pretrained(cached(family), attn_implementation="eager").eval()
    tree = TREES[family]
    attention = tree.z_to_attn.rpartition(".")[0].removesuffix(".output")
    value = {"bert": "self.value", "distilbert": "v_lin"}.get(family, "v_proj")
    before = {"opt": "self_attn_layer_norm", "bert": None, "distilbert": None}.get(family, "input_layernorm")
    outputs = own_outputs(model, documents, output_attentions=True, output_hidden_states=True)
    for i in range(3):
        layer = model.get_submodule(f"{tree.layers}.{i}")
        rows = []
        for output in outputs:
            x = output.hidden_states[i][0].double()
            x = norm(tree.norms, layer.get_submodule(before), x) if before else x
            values = linear(family, layer.get_submodule(f"{attention}.{value}"), x)
            n_groups = values.shape[1] // 8
            v_gtd = values.reshape(-1, n_groups, 8).transpose(0, 1)
            v_htd = v_gtd.repeat_interleave(4 // n_groups, dim=0)
            z_htd = output.attentions[i][0].double() @ v_htd
            rows.append(torch.cat(list(z_htd), dim=1))
        name = f"layers.{i}.attn_z"
        assert_close(acts[name], torch.cat(rows), name)
        assert capturer.heads[name] == 4


def test_heads_that_do_not_divide_a_row_are_refused():
    loaded = load_model(cached("llama"))
    odd = dataclasses.replace(loaded, map=dataclasses.replace(loaded.map, n_heads=5))
    assert Capturer(odd, ["layers.*.attn_out"]).heads == {}
    with pytest.raises(InvalidInputError, match="32 wide, which is not 5 heads") as caught:
        Capturer(odd, ["layers.*.attn_z"])
    assert caught.value.kind is ErrorKind.BAD_ARGUMENT
    loaded.config.num_attention_heads = 0
    with pytest.raises(NotFoundError, match="does not say how many heads"):
        map_model(loaded.model).resolve("layers.1.attn_z")
