"""How much worse does the model predict when a hook point's activations are replaced by what a dictionary makes of them?

Four passes over the windows of the evaluation: nothing replaced, replaced by the reconstruction, by the mean, and by zeros. The
share of the loss that a dictionary recovers is the usual measure of how much of what matters to the model it keeps.

Source: Bricken et al. (2023), "Towards Monosemanticity"; Gao et al. (2024), arXiv:2406.04093, section 4.1.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.errors import ErrorKind, InvalidInputError
from actstore.hook_points import parse_hook_point

from .language_model import LanguageModel
from .masks import Window
from .report import LossRecovered

if TYPE_CHECKING:
    import torch

Replace = Callable[["torch.Tensor"], "torch.Tensor"]
"""Takes rows (n, d) and returns what stands in for them."""

_BATCH_TOKENS = 2048


def why_not_spliced(hook_point: str) -> str | None:
    """Return why replacing what is seen at a hook point is not replacing the activation, or None if it is.

    >>> why_not_spliced("layers.2.resid_post") is None, why_not_spliced("layers.2.resid_mid") is None
    (True, False)
    """
    if parse_hook_point(hook_point).part == "resid_mid":
        return "resid_mid is read where the MLP's branch leaves the stream: replacing it there would not change the stream"
    return None


def loss_recovered(
    loaded: LanguageModel,
    hook_point: str,
    windows: Sequence[Window],
    *,
    reconstruct: Replace,
    mean: "torch.Tensor",
    norm_limit: float,
) -> LossRecovered:
    """Return the model's losses on windows.

    Args:
        loaded: The run's model.
        hook_point: Canonical name, one that `why_not_spliced` has nothing against.
        windows: At least one of two tokens or more.
        reconstruct: What the dictionary makes of rows (n, d), float32 in and out.
        mean: What rows are replaced with for `mean_ablated`, (d,) float32.
        norm_limit: Rows of a larger norm are sinks and stay.

    Raises:
        InvalidInputError: no window has a prediction, or the model's activations there are no rows of this width.
    """
    import torch

    ways: dict[str, Replace | None] = {
        "clean": None,
        "spliced": reconstruct,
        "mean_ablated": mean.expand_as,
        "zero_ablated": torch.zeros_like,
    }
    n_predictions = sum(max(0, len(w.token_ids) - 1) for w in windows)
    if not n_predictions:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, "no window of the evaluation has two tokens to predict one by the other"
        )
    losses = {}
    with torch.inference_mode():
        for name, replace in ways.items():
            total = sum(_loss(loaded, hook_point, batch, replace, norm_limit) for batch in _batches(windows))
            losses[name] = total / n_predictions
    return LossRecovered(n_predictions, **losses)


def _batches(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Yield windows of one length together: no padding, so that every window is computed as if alone."""
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(len(window.token_ids), []).append(window)
    for length, group in sorted(by_length.items()):
        size = max(1, _BATCH_TOKENS // length)
        for start in range(0, len(group) if length > 1 else 0, size):
            yield group[start : start + size]


def _loss(
    loaded: LanguageModel,
    hook_point: str,
    batch: Sequence[Window],
    replace: Replace | None,
    norm_limit: float,
) -> float:
    """Return the summed cross-entropy of a batch's predictions, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    ids = torch.from_numpy(np.stack([w.token_ids for w in batch]).astype(np.int64)).to(loaded.device)
    keep = torch.from_numpy(np.stack([w.keep for w in batch])).to(loaded.device)
    with _replaced(loaded, hook_point, keep, replace, norm_limit):
        logits = loaded.logits(ids)
    each = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return float(each.double().sum())


@contextlib.contextmanager
def _replaced(
    loaded: LanguageModel, hook_point: str, keep: "torch.Tensor", replace: Replace | None, norm_limit: float
) -> Iterator[None]:
    """Replace activations at the kept tokens while the block runs."""
    if replace is None:
        yield
        return
    site = loaded.map.site(hook_point)
    module = loaded.base.get_submodule(site.path)

    def changed(activations: Any) -> Any:
        return _change(activations, keep, replace, norm_limit)

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, {**kwargs, name: changed(kwargs[name])}

    def after(_module: Any, _args: Any, output: Any) -> Any:
        if not isinstance(output, tuple | list):
            return changed(output)
        values = list(output)
        values[site.index] = changed(values[site.index])
        return type(output)(values)

    if site.side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _change(
    activations: "torch.Tensor", keep: "torch.Tensor", replace: Replace, norm_limit: float
) -> "torch.Tensor":
    if activations.numel() % keep.numel():
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"activations of shape {tuple(activations.shape)} have no row for each of {keep.numel()} tokens",
        )
    rows = activations.reshape(keep.numel(), -1)
    found = rows.float()
    norms = found.norm(dim=1)
    chosen = keep.flatten() & norms.isfinite() & (norms <= norm_limit)
    changed = rows.clone()
    changed[chosen] = replace(found[chosen]).to(rows.dtype)
    return changed.view_as(activations)
