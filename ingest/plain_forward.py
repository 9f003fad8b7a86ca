"""What does a model compute on one window, as plainly as transformers can be asked?

This is the second opinion of the self-check, so it shares as little as can be with the capture: one window at a time, no
padding and no mask, the whole model, uncompiled. The residual stream is taken from transformers' own `hidden_states`; only
places that transformers does not give out are read by hooks, which are registered here.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.hook_points import parse_hook_point

from .models import LoadedModel


class PlainModel:
    """Computes windows alone. Not safe for use beside a capture of the same model."""

    def __init__(self, loaded: LoadedModel, hook_points: Sequence[str]) -> None:
        """Say which places are wanted, by canonical name."""
        self._loaded = loaded
        self._names = list(hook_points)

    def activations(self, token_ids: npt.NDArray[np.int32]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Yield what the model computes on one window (t,): hook point and float32 (t, width)."""
        import torch

        loaded, found = self._loaded, dict[str, Any]()
        hooked = [name for name in self._names if self._hidden_state(name) is None]
        # Compiled code is put in by the capture, for as long as it captures: this is the model as it was loaded.
        with torch.inference_mode(), self._hooks(hooked, found):
            ids = torch.from_numpy(token_ids[None].astype(np.int64)).to(loaded.device)
            output = loaded.model(input_ids=ids, output_hidden_states=True, return_dict=True)
        for name in self._names:
            tensor = found.pop(name) if name in found else output.hidden_states[self._hidden_state(name)]
            yield name, _rows(tensor, len(token_ids))

    def _hidden_state(self, name: str) -> int | None:
        """Return which of transformers' hidden states a hook point is, if any.

        They are the embeddings, then every layer's output; the last one has been through the final norm.
        """
        # Layers behind the last one that is wanted may not have been loaded.
        point, n_layers = parse_hook_point(name), len(self._loaded.map.layers)
        if point.layer is None:
            return None
        if point.part == "resid_pre":
            return int(point.layer)
        if point.part == "resid_post" and point.layer < n_layers - 1:
            return int(point.layer) + 1
        return None

    @contextlib.contextmanager
    def _hooks(self, names: Sequence[str], found: dict[str, Any]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in names:
                site = self._loaded.map.site(name)
                module = self._loaded.model.get_submodule(site.path)
                if site.side == "input":
                    handle = module.register_forward_pre_hook(_input_hook(name, found), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(_output_hook(name, site.index, found))
                stack.callback(handle.remove)
            yield


def _input_hook(name: str, found: dict[str, Any]) -> Any:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found[name] = _copy(
            args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        )

    return hook


def _output_hook(name: str, index: int, found: dict[str, Any]) -> Any:
    def hook(_module: Any, _args: tuple[Any, ...], output: Any) -> None:
        found[name] = _copy(output[index] if isinstance(output, tuple | list) else output)

    return hook


def _copy(tensor: Any) -> Any:
    """What follows in the model may add to it in place."""
    return tensor.detach().clone()


def _rows(tensor: Any, n_tokens: int) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = tensor.detach().float().cpu().numpy().reshape(n_tokens, -1)
    return rows
