"""Where in a Hugging Face model do the hook points lie?

Families are recognised by the shape of their module tree, not by class names, so that a new model built like a known one
works at once: `layer_map.py` reads one layer, this module finds the layers and what is around them. What was read from the
shape is proved by numbers before a run starts (`self_test.py`).

`resid_pre` and `resid_post` are the layer's input and output everywhere. `embed` is the output of the token embedding
module: positions, token types and norms come after it, in layer 0's resid_pre. `final_norm` is the norm behind the layers.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from actstore.errors import ErrorKind, NotFoundError
from actstore.hook_points import (
    canonical_hook_point,
    describe_hook_points,
    expand_hook_points,
    parse_hook_point,
)

from .layer_map import LayerMap, Side, map_layer

if TYPE_CHECKING:
    from torch import nn

_FINAL_NORMS = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "norm_f",
    "final_norm",
    "layer_norm",
    "LayerNorm",
)
_TREE_LINES = 40
"""Lines of a module tree shown in an error: enough for one layer and what is around the layers."""


@dataclass(frozen=True, slots=True)
class Site:
    """One side of one module: where a hook is put."""

    path: str
    """Path of the module from the base model."""
    side: Side
    index: int = 0
    """Which of the tensors that the module returns."""


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
    """Layers of the model; 0 where no list of layers was recognised."""
    layers: tuple[LayerMap, ...]
    """What was read from each layer that is there."""
    layers_path: str | None
    """Path of the list of layers."""
    n_heads: int | None
    """Attention heads, as the configuration has them."""
    absent: Mapping[str, str]
    """Canonical names that models may have and this one has not, to the reason."""
    tree: str = field(repr=False)
    """The module tree in short, for errors."""

    @property
    def is_additive(self) -> bool:
        """Whether resid_pre + attn_out + mlp_out should equal resid_post in every layer."""
        return all(layer.kind != "post_norm" for layer in self.layers)

    def resolve(self, patterns: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
        """Return the canonical names that `patterns` mean in this model, each once, in layer order.

        Raises:
            NotFoundError: a pattern matches nothing; says why the model has no such place, what is close, what there is, and
                how to reach other modules.
            InvalidInputError: a malformed pattern.
        """
        try:
            return expand_hook_points(
                patterns, tuple(self.sites), modules=self.modules, module_prefix=self.module_prefix
            )
        except NotFoundError as error:
            found = "" if self.n_layers else " No list of layers was recognised in this model."
            message = (
                f"{error.message}.{found}{self._why_absent(patterns)} Any other place is module:<path>[:input|:output],"
                f" of these:\n{self.tree}"
            )
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
            f"hook point {name!r} is not in this model, which has {describe_hook_points(tuple(self.sites))}."
            f"{self._why_absent([name])} Its modules are:\n{self.tree}",
        )

    def module(self, layer: int, what: str) -> str | None:
        """Return the path from the base model of one of `LayerMap.modules`, or None."""
        path = self.layers[layer].modules.get(what)
        return None if path is None else f"{self.layers_path}.{layer}.{path}"

    def without_layers_from(self, n_kept: int) -> "ModelMap":
        """Return the map of the same model after all layers from `n_kept` on were taken out of it."""
        gone = re.compile(rf"{re.escape(str(self.layers_path))}\.(\d+)(?:\.|$)")

        def is_kept(path: str) -> bool:
            return not (found := gone.match(path)) or int(found[1]) < n_kept

        reason = f"the model was loaded with its first {n_kept} of {self.n_layers} layers only"
        lost = [name for name, site in self.sites.items() if not is_kept(site.path)]
        return replace(
            self,
            sites={name: site for name, site in self.sites.items() if name not in lost},
            modules=tuple(path for path in self.modules if is_kept(path)),
            layers=self.layers[:n_kept],
            absent={**self.absent, **dict.fromkeys(lost, reason)},
        )

    def _why_absent(self, patterns: str | list[str] | tuple[str, ...]) -> str:
        """Return a sentence for each reason why named places do not exist here."""
        text = patterns if isinstance(patterns, str) else ",".join(patterns)
        asked = {canonical_hook_point(pattern) for pattern in text.split(",") if pattern.strip()}
        words = {word for pattern in asked for word in re.findall(r"[a-z_]+", pattern.rpartition(".")[2])}
        reasons = dict[str, str]()
        for name, reason in self.absent.items():
            part = name.rpartition(".")[2]
            # A part that other layers have is only missing where that very layer was asked for.
            if name in asked or (part in words and not any(site.endswith(f".{part}") for site in self.sites)):
                reasons.setdefault(reason, part)
        return "".join(f" It has no {part}: {reason}." for reason, part in reasons.items())


def map_model(model: "nn.Module") -> ModelMap:
    """Return the hook points of a base model (without a head), read from its module tree. Computes nothing."""
    modules = dict(model.named_modules())
    paths_of = {id(module): path for path, module in reversed(modules.items())}
    sites = dict[str, Site]()
    absent = dict[str, str]()
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if id(embeddings) in paths_of:
        sites["embed"] = Site(paths_of[id(embeddings)], "output")
    layers_path = find_layers(model)
    layers = list[LayerMap]()
    for path, module in modules.items() if layers_path is not None else ():
        if path.rpartition(".")[0] != layers_path:
            continue
        i, layer = len(layers), map_layer(module)
        layers.append(layer)
        absent |= {f"layers.{i}.{part}": reason for part, reason in layer.absent.items()}
        for part, place in layer.places.items():
            full = f"{path}.{place.path}" if place.path else path
            index = _logits_index(model, modules[full]) if part == "router" else 0
            sites[f"layers.{i}.{part}"] = Site(full, place.side, index)
    n_heads = _n_heads(model)
    if n_heads is None:
        _drop_heads(sites, absent)
    final_norm = _final_norm(modules, layers_path, layers)
    if isinstance(final_norm, Site):
        sites["final_norm"] = final_norm
    else:
        absent["final_norm"] = final_norm
    return ModelMap(
        sites=sites,
        modules=tuple(path for path in modules if path),
        module_prefix=str(getattr(model, "base_model_prefix", "")),
        n_layers=len(layers),
        layers=tuple(layers),
        layers_path=layers_path,
        n_heads=n_heads,
        absent=absent,
        tree=module_tree(model),
    )


def _final_norm(
    modules: Mapping[str, "nn.Module"], layers_path: str | None, layers: list[LayerMap]
) -> Site | str:
    """Return the norm behind the layers, or why there is none."""
    if layers_path is None:
        return "no list of layers was recognised"
    if any(layer.kind == "post_norm" for layer in layers):
        return "its layers normalise their own output, so that the last resid_post is what the model returns"
    parents = dict.fromkeys((layers_path.rpartition(".")[0], ""))
    candidates = (f"{parent}.{name}" if parent else name for parent in parents for name in _FINAL_NORMS)
    path = next((path for path in candidates if path in modules), None)
    return Site(path, "output") if path else "no norm was recognised behind its layers"


def _n_heads(model: "nn.Module") -> int | None:
    config = _text_config(model)
    n_heads = getattr(config, "num_attention_heads", None)
    return n_heads if isinstance(n_heads, int) and n_heads > 0 else None


def _drop_heads(sites: dict[str, Site], absent: dict[str, str]) -> None:
    for name in [name for name in sites if name.endswith(".attn_z")]:
        del sites[name]
        absent[name] = "its configuration does not say how many heads it has"


def _logits_index(model: "nn.Module", router: "nn.Module") -> int:
    """Return which of a router's outputs are the logits: transformers declares it for what it records; the first elsewhere."""
    recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    target = getattr(recorder, "target_class", None)
    index = getattr(recorder, "index", None)
    return index if target is not None and isinstance(router, target) and isinstance(index, int) else 0


def _text_config(model: "nn.Module") -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_layers(model: "nn.Module") -> str | None:
    """Return the path of the list of transformer layers, or None where there is no such list or several.

    It is the outermost `ModuleList` with as many modules as the configuration says there are layers.
    """
    from torch import nn

    n_layers = getattr(_text_config(model), "num_hidden_layers", None)
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    depth = min((path.count(".") for path in lists), default=0)
    outermost = [path for path in lists if path.count(".") == depth]
    return outermost[0] if len(outermost) == 1 else None


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
