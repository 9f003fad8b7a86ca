"""Where in a Hugging Face model do the hook points lie?

Families are recognised by the shape of their module tree, not by class names, so that a new model built like a known one
works at once. What was read from the shape is proved by numbers before a run starts (`self_test.py`).

| built like | attn_out | mlp_out | mlp_act |
|---|---|---|---|
| GPT-2, -J, -NeoX, Llama, Mistral, Qwen, Gemma, ModernBERT | attention module | MLP module | input of the last projection |
| Gemma 2 and 3, OLMo 2, GLM-4 | post-attention norm | post-MLP norm | the same |
| BLOOM, Falcon | `self_attention.dense` | `mlp.dense_4h_to_h` | the same |
| OPT | attention module | `fc2` | input of `fc2` |
| BERT, RoBERTa | `attention.output.dense` | `output.dense` | input of `output.dense` (the intermediate's output) |

In BERT's post-norm layers the outputs are taken before add-and-norm, where they are well defined, and
resid_pre + attn_out + mlp_out is not resid_post. `resid_pre` and `resid_post` are the layer's input and output everywhere.
`embed` is the output of the token embedding module: positions, token types and norms come after it, in layer 0's resid_pre.
A mixture of experts has no single mlp_act.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from actstore.errors import ErrorKind, NotFoundError
from actstore.hook_points import describe_hook_points, expand_hook_points, parse_hook_point

if TYPE_CHECKING:
    from torch import nn

Side = Literal["input", "output"]

_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_DOWN_PROJECTION = ("c_proj", "dense_4h_to_h", "down_proj", "fc_out", "fc2", "Wo", "w2", "lin2")
_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
_TREE_LINES = 40
"""Lines of a module tree shown in an error: enough for one layer and what is around the layers."""


@dataclass(frozen=True, slots=True)
class Site:
    """One side of one module: where a hook is put."""

    path: str
    """Path of the module from the base model."""
    side: Side


@dataclass(frozen=True, slots=True)
class ModelMap:
    """The hook points of one model."""

    sites: Mapping[str, Site]
    """Canonical name to place, in layer order; `module:` names are not listed."""
    modules: tuple[str, ...]
    """Paths of all modules."""
    module_prefix: str
    """What checkpoints with a head put before those paths."""
    n_layers: int
    """Layers found; 0 where no list of layers was recognised."""
    is_additive: bool
    """Whether resid_pre + attn_out + mlp_out should equal resid_post in every layer."""
    tree: str
    """The module tree in short, for errors."""

    def resolve(self, patterns: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
        """Return the canonical names that `patterns` mean in this model, each once, in layer order.

        Raises:
            NotFoundError: a pattern matches nothing; says what is close, what there is, and how to reach other modules.
            InvalidInputError: a malformed pattern.
        """
        try:
            return expand_hook_points(
                patterns, tuple(self.sites), modules=self.modules, module_prefix=self.module_prefix
            )
        except NotFoundError as error:
            found = "" if self.n_layers else " No list of layers was recognised in this model."
            message = f"{error.message}.{found} Any other place is module:<path>[:input|:output], of these:\n{self.tree}"
            raise NotFoundError(error.kind, message) from None

    def site(self, name: str) -> Site:
        """Return where the hook point with this canonical name lies.

        Raises:
            NotFoundError: this model has no such place.
        """
        if name in self.sites:
            return self.sites[name]
        point = parse_hook_point(name)
        if point.module in self.modules and point.module is not None:
            return Site(point.module, point.side)
        raise NotFoundError(
            ErrorKind.HOOK_POINT_NOT_FOUND,
            f"hook point {name!r} is not in this model, which has {describe_hook_points(tuple(self.sites))} and modules:\n"
            f"{self.tree}",
        )


def map_model(model: "nn.Module") -> ModelMap:
    """Return the hook points of a base model (without a head), read from its module tree. Computes nothing."""
    modules = dict(model.named_modules())
    paths_of = {id(module): path for path, module in reversed(modules.items())}
    sites = dict[str, Site]()
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if id(embeddings) in paths_of:
        sites["embed"] = Site(paths_of[id(embeddings)], "output")
    layers_path = find_layers(model)
    is_additive, n_layers = True, 0
    if layers_path is not None:
        layers = [(path, m) for path, m in modules.items() if path.rpartition(".")[0] == layers_path]
        n_layers = len(layers)
        for i, (path, layer) in enumerate(layers):
            parts, additive = _layer_sites(layer)
            is_additive &= additive
            for part, (child, side) in parts.items():
                sites[f"layers.{i}.{part}"] = Site(f"{path}.{child}" if child else path, side)
    return ModelMap(
        sites=sites,
        modules=tuple(path for path in modules if path),
        module_prefix=str(getattr(model, "base_model_prefix", "")),
        n_layers=n_layers,
        is_additive=is_additive,
        tree=module_tree(model),
    )


def find_layers(model: "nn.Module") -> str | None:
    """Return the path of the list of transformer layers, or None where there is no such list or several.

    It is the outermost `ModuleList` with as many modules as the configuration says there are layers.
    """
    from torch import nn

    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_layers = getattr(text_config, "num_hidden_layers", None)
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    depth = min((path.count(".") for path in lists), default=0)
    outermost = [path for path in lists if path.count(".") == depth]
    return outermost[0] if len(outermost) == 1 else None


def _layer_sites(layer: "nn.Module") -> tuple[dict[str, tuple[str, Side]], bool]:
    """Return part -> (path in the layer, side) in canonical order, and whether the parts should add up."""
    attn, mlp_out, mlp_act, additive = _branches(layer)
    parts: dict[str, tuple[str, Side]] = {"resid_pre": ("", "input")}
    if attn:
        parts["attn_out"] = (attn, "output")
    if mlp_act:
        parts["mlp_act"] = (mlp_act, "input")
    if mlp_out:
        parts["mlp_out"] = (mlp_out, "output")
    parts["resid_post"] = ("", "output")
    return parts, additive


def _branches(layer: "nn.Module") -> tuple[str | None, str | None, str | None, bool]:
    """Return the modules whose outputs are attn_out and mlp_out and whose input is mlp_act, and additivity."""
    names = {path for path, _ in layer.named_modules()}
    if {"attention.output.dense", "intermediate", "output.dense"} <= names:
        post_norm = "output.LayerNorm" in names
        return "attention.output.dense", "output.dense", "output.dense", not post_norm
    attn = _first(_ATTENTION, names)
    if {"fc1", "fc2"} <= names:
        return attn, "fc2", "fc2", bool(getattr(layer, "do_layer_norm_before", True))
    mlp = _first(_MLP, names)
    down = _first(tuple(f"{mlp}.{name}" for name in _DOWN_PROJECTION), names) if mlp else None
    if attn == "self_attention" and "self_attention.dense" in names and down:
        # Here the modules around these two add the residual stream themselves.
        return "self_attention.dense", down, down, True
    for attn_norm, mlp_norm in _POST_NORMS:
        if {attn_norm, mlp_norm} <= names:
            return attn_norm, mlp_norm, down, True
    return attn, mlp, down, "sa_layer_norm" not in names


def _first(candidates: tuple[str, ...], names: set[str]) -> str | None:
    return next((name for name in candidates if name in names), None)


def module_tree(model: "nn.Module") -> str:
    """Return the module tree as indented lines, one layer standing for all of them, cut after `_TREE_LINES`."""
    lines = list(_tree_lines(model))
    cut = [f"... and {len(lines) - _TREE_LINES} more"] if len(lines) > _TREE_LINES else []
    return "\n".join(lines[:_TREE_LINES] + cut)


def _tree_lines(model: "nn.Module") -> Iterator[str]:
    for path, module in model.named_modules():
        numbers = [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.|$)", f".{path}")]
        if path and not any(numbers):
            yield f"{'  ' * (path.count('.') + 1)}{path} ({type(module).__name__})"
