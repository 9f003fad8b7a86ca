"""Where in one transformer layer do its hook points lie, and how should their numbers hang together?

Read from the shape of the layer's module tree alone; `proofs.py` holds the numbers against it.

| built like | attn_out | mlp_out | resid_mid | mlp_in |
|---|---|---|---|---|
| GPT-2, Llama, Mistral, Qwen, OLMo, ModernBERT | attention module | MLP module | input of its norm | input of the MLP |
| Gemma 2 and 3, GLM-4 | post-attention norm | post-MLP norm | the same | the same |
| OLMo 2 and 3, EXAONE 4 (no norm before the MLP) | post-attention norm | post-MLP norm | input of the MLP | the same |
| GPT-J, GPT-NeoX, Phi, Cohere (parallel branches) | attention module | MLP module | none | the same |
| BLOOM, Falcon, MPT (their modules add the stream) | output projection | last projection | as its block | the same |
| OPT | attention module | `fc2` | input of the second norm | input of `fc1` |
| BERT, RoBERTa, ELECTRA, DeBERTa, DistilBERT | output projection | last projection | behind the first norm | the same |

Everywhere mlp_act is the input of the MLP's last projection and attn_z that of attention's; a mixture of experts has no
single mlp_act, but a router. In layers that normalise after adding, attn_out and mlp_out are taken before add-and-norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import nn

Side = Literal["input", "output"]
Kind = Literal["sequential", "parallel", "post_norm", "unknown"]

_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_ATTENTION_PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "Wo", "attention.out_proj")
_DOWN_PROJECTION = ("c_proj", "dense_4h_to_h", "down_proj", "fc_out", "fc2", "Wo", "w2", "lin2")
_ROUTERS = ("router.layer", "gate", "router")
_INPUT_NORMS = ("input_layernorm", "ln_1", "norm_1", "self_attn_layer_norm", "attn_norm", "ln_attn")
_MLP_NORMS = (
    "pre_feedforward_layernorm",
    "ln_2",
    "norm_2",
    "mlp_norm",
    "ln_mlp",
    "post_attention_layernorm",
)
_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)

_PARALLEL = "attention and MLP of its layers read the same residual stream (a parallel block), so none lies between them"
_NO_EXPERTS = "its layer has one MLP and no mixture of experts with a router"
_MANY_MLPS = "its layer has no MLP with one last projection (a mixture of experts has many)"


class Place(NamedTuple):
    """One side of one module of the layer."""

    path: str
    """From the layer; empty for the layer itself."""
    side: Side


@dataclass(frozen=True, slots=True)
class LayerMap:
    """The hook points of one layer and the modules between them. All paths are from the layer."""

    places: Mapping[str, Place]
    """Part to place, in canonical order."""
    absent: Mapping[str, str]
    """Every other part to the reason why it is none."""
    kind: Kind
    """How attention and MLP are added: `sequential` (mid = pre + attn, post = mid + mlp), `parallel` (post = pre + attn +
    mlp), `post_norm` (each sum goes through a norm), or `unknown`."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """What lies between hook points: `attn_projection` (attn_z to attention's output), `attn_norm` (that to attn_out),
    `mlp_norm` (resid_mid, or resid_pre in parallel blocks, to mlp_in), `mlp_projection` (mlp_act to the MLP's output),
    `mlp_out_norm` (that to mlp_out), `attn_sum_norm` and `mlp_sum_norm` (of post-norm layers), `router`."""


def map_layer(layer: "nn.Module") -> LayerMap:
    """Return the hook points of one layer. Computes nothing."""
    names = {path for path, _ in layer.named_modules()}
    if {"attention.output.dense", "intermediate.dense", "output.dense"} <= names:
        return _bert(names)
    attn = _first(_ATTENTION, names)
    has_fc = {"fc1", "fc2"} <= names
    mlp = None if has_fc else _first(_MLP, names)
    if attn is None or not (mlp or has_fc):
        return _partial(attn, has_mlp=bool(mlp or has_fc))
    modules = _projections(attn, mlp, has_fc, names)
    kind, norms = _arrangement(layer, names, has_fc)
    modules |= norms
    down, router = modules.get("mlp_projection"), modules.get("router")
    mlp_in = Place("fc1" if has_fc else str(mlp), "input")
    # Modules named like this add the residual stream themselves in some families: what is added comes out of the projection.
    adds_itself = attn == "self_attention" and "attn_projection" in modules
    attn_out = modules["attn_projection"] if adds_itself else attn
    mlp_out = down if down and (adds_itself or has_fc or mlp == "ffn") else str(mlp)
    mid = _resid_mid(kind, modules, mlp_in)
    places = {
        "resid_pre": Place("", "input"),
        "attn_z": Place(modules["attn_projection"], "input") if "attn_projection" in modules else None,
        "attn_out": Place(modules.get("attn_norm", attn_out), "output"),
        "resid_mid": mid,
        "mlp_in": mlp_in,
        "router": Place(router, "output") if router else None,
        "mlp_act": Place(down, "input") if down else None,
        "mlp_out": Place(modules.get("mlp_out_norm", mlp_out), "output"),
        "resid_post": Place("", "output"),
    }
    reasons = {
        "attn_z": f"no output projection was recognised in its attention module ({attn})",
        "resid_mid": _PARALLEL if kind == "parallel" else "the norm before its MLP was not recognised",
        "router": _NO_EXPERTS,
        "mlp_act": _MANY_MLPS,
    }
    return _layer_map(places, reasons, kind, modules)


def _bert(names: set[str]) -> LayerMap:
    modules = {"attn_projection": "attention.output.dense", "mlp_projection": "output.dense"}
    kind: Kind = "sequential"
    if "output.LayerNorm" in names:
        kind = "post_norm"
        modules |= {"attn_sum_norm": "attention.output.LayerNorm", "mlp_sum_norm": "output.LayerNorm"}
    elif norm := _first(("intermediate.LayerNorm", "LayerNorm"), names):
        modules["mlp_norm"] = norm
    places: dict[str, Place | None] = {
        "resid_pre": Place("", "input"),
        "attn_z": Place("attention.output.dense", "input"),
        "attn_out": Place("attention.output.dense", "output"),
        "resid_mid": Place("attention.output", "output"),
        "mlp_in": Place("intermediate.dense", "input"),
        "router": None,
        "mlp_act": Place("output.dense", "input"),
        "mlp_out": Place("output.dense", "output"),
        "resid_post": Place("", "output"),
    }
    return _layer_map(places, {"router": _NO_EXPERTS}, kind, modules)


def _partial(attn: str | None, *, has_mlp: bool) -> LayerMap:
    """Return a layer of which only its input and output are known: nothing could prove the rest."""
    missing = " and ".join(
        what for what, found in (("attention", attn is not None), ("MLP", has_mlp)) if not found
    )
    reason = f"no {missing} module was recognised in its layer"
    places: dict[str, Place | None] = {"resid_pre": Place("", "input"), "resid_post": Place("", "output")}
    parts = ("attn_z", "attn_out", "resid_mid", "mlp_in", "router", "mlp_act", "mlp_out")
    return _layer_map(places, dict.fromkeys(parts, reason), "unknown", {})


def _layer_map(
    places: Mapping[str, Place | None], reasons: Mapping[str, str], kind: Kind, modules: Mapping[str, str]
) -> LayerMap:
    found = {part: place for part, place in places.items() if place is not None}
    absent = {part: reason for part, reason in reasons.items() if part not in found}
    return LayerMap(found, absent, kind, modules)


def _projections(attn: str, mlp: str | None, has_fc: bool, names: set[str]) -> dict[str, str]:
    """Return the projections behind attn_z and mlp_act and the router, as far as the layer has them."""
    found = dict[str, str | None]()
    # What goes into the output projection of linear attention is gated and normed, in heads that the config counts elsewhere.
    if attn != "linear_attn":
        found["attn_projection"] = _first(tuple(f"{attn}.{name}" for name in _ATTENTION_PROJECTION), names)
    found["mlp_projection"] = (
        "fc2" if has_fc else _first(tuple(f"{mlp}.{name}" for name in _DOWN_PROJECTION), names)
    )
    if f"{mlp}.experts" in names or f"{mlp}.router.layer" in names:
        found["router"] = _first(tuple(f"{mlp}.{name}" for name in _ROUTERS), names)
    return {what: path for what, path in found.items() if path}


def _arrangement(layer: "nn.Module", names: set[str], has_fc: bool) -> tuple[Kind, dict[str, str]]:
    """Return how the layer adds its branches, and its norms."""
    if {"sa_layer_norm", "output_layer_norm"} <= names:
        return "post_norm", {"attn_sum_norm": "sa_layer_norm", "mlp_sum_norm": "output_layer_norm"}
    if has_fc:
        norms = ("self_attn_layer_norm", "final_layer_norm")
        if not set(norms) <= names:
            return "unknown", {}
        if getattr(layer, "do_layer_norm_before", True):
            return "sequential", {"mlp_norm": norms[1]}
        return "post_norm", {"attn_sum_norm": norms[0], "mlp_sum_norm": norms[1]}
    found = dict[str, str]()
    for attn_norm, mlp_out_norm in _POST_NORMS:
        if {attn_norm, mlp_out_norm} <= names:
            found |= {"attn_norm": attn_norm, "mlp_out_norm": mlp_out_norm}
    if norm := _first(tuple(name for name in _MLP_NORMS if name not in found.values()), names):
        found["mlp_norm"] = norm
    own_norms = {name for name in names if "." not in name and ("norm" in name or name.startswith("ln"))}
    input_norm = _first(_INPUT_NORMS, names)
    flag = getattr(layer, "use_parallel_residual", None)
    # With one norm in front of both branches, or one for each that both read the layer's input, the branches are parallel.
    if flag or own_norms == {input_norm} or {"ln_attn", "ln_mlp"} <= names:
        return "parallel", {**({"mlp_norm": input_norm} if input_norm else {}), **found}
    if "mlp_norm" in found or found:
        return "sequential", found
    return "unknown", {}


def _resid_mid(kind: Kind, modules: Mapping[str, str], mlp_in: Place) -> Place | None:
    if kind == "post_norm":
        return Place(modules["attn_sum_norm"], "output")
    if kind == "sequential":
        return Place(modules["mlp_norm"], "input") if "mlp_norm" in modules else mlp_in
    return None


def _first(candidates: tuple[str, ...], names: set[str]) -> str | None:
    return next((name for name in candidates if name in names), None)
