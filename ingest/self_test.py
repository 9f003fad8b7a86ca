"""Is what the hooks see what their names promise, in this model, with these weights, on this machine?

Two checks on a few tokens, before a run starts:
1. Padding: windows of several lengths, padded together, give the rows that each gives alone. A model that fails (it ignores
   the mask, say) is captured without padding, in batches of one length.
2. Addition: resid_pre + attn_out + mlp_out is resid_post in every asked layer, so the hooks are on the right modules. A
   model that fails is refused, unless only places that need no such knowledge are asked for.
Values that are not finite are left out of both: broken weights are the caller's to report, with their rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actstore.errors import ErrorKind, InvalidInputError
from actstore.hook_points import parse_hook_point

from .capture import Capturer, probe_ids
from .models import LoadedModel

if TYPE_CHECKING:
    import torch

_BRANCHES = ("attn_out", "mlp_act", "mlp_out")

_PROBE_LENGTHS = (13, 5, 1, 8)
"""Tokens of the probe's windows, cut to the model's context: none as long as another, one of a single token."""

_PADDING_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2}
"""Largest difference between a row computed with and without padding, as a part of the row's norm. Rounding alone gives
about 1e-6, 1e-3 and 1e-2 in models of 30 layers; documents that see each other's tokens differ by 0.1 and more."""

_ADDITION_ROUNDINGS = 4
"""Half-units in the last place, per summed term: the model rounds after each of two or three additions."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What the self-test found."""

    equal_lengths: bool
    """Whether batches must be of one window length: padding is not invisible to this model."""
    padding_error: float
    """Largest relative difference that padding made to a row."""
    addition_error: float | None
    """Largest difference of the sum from resid_post, as a part of what rounding explains (at most 1 in a good model); None
    where the architecture does not add up by design or has unknown branches."""


def self_test(loaded: LoadedModel, hook_points: Sequence[str]) -> SelfTest:
    """Return whether padding is safe and how well the layers add up. Costs seven passes of a few tokens.

    Raises:
        InvalidInputError: SELF_TEST_FAILED: attn_out, mlp_act or mlp_out is asked for, and a layer does not add up.
        NotFoundError: the model has no such hook point.
    """
    names = loaded.map.resolve(list(hook_points))
    padding_error = _padding_error(loaded, names)
    return SelfTest(
        equal_lengths=padding_error > _PADDING_TOLERANCE[loaded.dtype],
        padding_error=padding_error,
        addition_error=_addition_error(loaded, names),
    )


def _padding_error(loaded: LoadedModel, names: Sequence[str]) -> float:
    lengths = [min(n, loaded.context_length or n) for n in _PROBE_LENGTHS]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = probe_ids(loaded, (1, int(starts[-1])))[0].astype(np.int32)
    capturer = Capturer(loaded, names)
    # One pass for all windows, and one for each alone.
    together, alone = (
        {name: np.zeros((len(ids), width), np.float32) for name, width in capturer.widths.items()}
        for _ in range(2)
    )
    capturer.capture_unit(
        ids, starts, together, batch_tokens=len(lengths) * max(lengths), stored_dtype="float32"
    )
    capturer.capture_unit(ids, starts, alone, batch_tokens=1, stored_dtype="float32")
    worst = 0.0
    for name in names:
        finite = np.isfinite(alone[name]).all(axis=1) & np.isfinite(together[name]).all(axis=1)
        # Finite alone and not together is as wrong as a difference.
        if np.isfinite(alone[name]).all() and not finite.all():
            return float("inf")
        a, b = alone[name][finite].astype(np.float64), together[name][finite].astype(np.float64)
        norms = np.linalg.norm(a, axis=1)
        differences = np.linalg.norm(a - b, axis=1)[norms > 0]
        worst = max(worst, float((differences / norms[norms > 0]).max(initial=0.0)))
    return worst


def _addition_error(loaded: LoadedModel, names: Sequence[str]) -> float | None:
    points = [parse_hook_point(name) for name in names]
    layers = sorted({p.layer for p in points if p.layer is not None})
    parts = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    wanted = {i: [f"layers.{i}.{part}" for part in parts] for i in layers}
    known = {i: hooks for i, hooks in wanted.items() if set(hooks) <= set(loaded.map.sites)}
    if not loaded.map.is_additive or not known:
        return None
    seen: dict[str, torch.Tensor] = {}
    capturer = Capturer(loaded, [name for hooks in known.values() for name in hooks])
    n_tokens = min(_PROBE_LENGTHS[0], loaded.context_length or _PROBE_LENGTHS[0])
    with capturer.hooked(
        lambda name, x: seen.update({name: x.double() if x.device.type != "mps" else x.float()})
    ) as run:
        run(probe_ids(loaded, (2, n_tokens)), None)
    worst, worst_layer = 0.0, layers[0]
    for i, hooks in known.items():
        error = _one_layer([seen[name].reshape(-1) for name in hooks], loaded.dtype)
        if error > worst:
            worst, worst_layer = error, i
    if worst > 1.0 and any(p.part in _BRANCHES for p in points):
        raise InvalidInputError(
            ErrorKind.SELF_TEST_FAILED,
            f"resid_pre + attn_out + mlp_out differs from resid_post in layer {worst_layer} of this"
            f" {loaded.fingerprint['architecture']} by {worst:.3g} times what {loaded.dtype} rounding explains: its"
            " attention or MLP output is not where this version looks. Ask for resid_pre, resid_post and"
            f" module:<path>[:input|:output] places instead, of:\n{loaded.map.tree}",
        )
    return worst


def _one_layer(terms: Sequence["torch.Tensor"], dtype: str) -> float:
    """Return the largest |pre + attn + mlp - post| as a part of what rounding each sum can make of it."""
    import torch

    pre, attn, mlp, post = terms
    unit = torch.finfo(getattr(torch, dtype)).eps / 2
    bound = _ADDITION_ROUNDINGS * unit * (pre.abs() + attn.abs() + mlp.abs() + post.abs())
    error = (pre + attn + mlp - post).abs()
    ratio = torch.where(error == 0, 0.0, error / bound)
    # Not finite: a NaN or an infinity in the terms, or 0 / 0.
    return float(ratio[ratio.isfinite()].max()) if bool(ratio.isfinite().any()) else 0.0
