"""Which layers of a model are not needed for what is captured, and does the model do without them?

Layers after the last one with a hook only cost memory. They are taken out of the list of layers before the model goes to its
device; the configuration stays as it is, since other parts of the model read it. Models that insist on all their layers get
them back.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.hook_points import parse_hook_point

if TYPE_CHECKING:
    import torch

    from .architectures import ModelMap


@dataclass(frozen=True, slots=True)
class DroppedLayers:
    """Layers that were taken out, to be put back or forgotten."""

    layers_path: str
    n_kept: int
    layers: tuple[Any, ...]

    def put_back(self, model: Any, device: "torch.device") -> None:
        """Append the layers again."""
        layers = model.get_submodule(self.layers_path)
        layers.extend(layer.to(device) for layer in self.layers)


def layers_needed(model_map: "ModelMap", names: Sequence[str]) -> int:
    """Return how many layers, counted from the first, must run for the named hook points."""
    needed = 1
    for name in names:
        point = parse_hook_point(name)
        if point.layer is not None:
            needed = max(needed, point.layer + 1)
        elif point.part == "final_norm":
            return model_map.n_layers
        elif point.module is not None:
            inside = re.match(rf"{re.escape(str(model_map.layers_path))}\.(\d+)(?:\.|$)", point.module)
            if not inside:
                return model_map.n_layers
            needed = max(needed, int(inside[1]) + 1)
    return min(needed, model_map.n_layers)


def drop_unused_layers(
    model: Any, model_map: "ModelMap", hook_points: Sequence[str] | None
) -> DroppedLayers | None:
    """Take the layers out of `model` that come after all of `hook_points`; None where all are needed or unknown.

    Raises:
        NotFoundError: the model has no such hook point.
    """
    if hook_points is None:
        return None
    names = model_map.resolve(list(hook_points))
    if model_map.layers_path is None:
        return None
    n_kept = layers_needed(model_map, names)
    layers = model.get_submodule(model_map.layers_path)
    if n_kept == len(layers):
        return None
    dropped = DroppedLayers(model_map.layers_path, n_kept, tuple(layers[n_kept:]))
    del layers[n_kept:]
    return dropped


def runs_without_layers(model: Any, device: "torch.device") -> bool:
    """Return whether two tokens still go through the whole model."""
    import torch

    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=device))
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, RuntimeError):
        # Whatever it is that wants the missing layers: with all of them it is the caller's to meet.
        return False
    return True
