"""Is what the hooks see what their names promise, in this model, with these weights, on this machine?

Two checks on a few tokens, before a run starts:
1. Padding: windows of several lengths, padded together, give the rows that each gives alone. A model that fails (it ignores
   the mask, say) is captured without padding, in batches of one length.
2. Wiring: the places of every asked layer hang together (`proofs.py`), so the hooks are on the right modules. A model that
   fails is refused, unless only places that need no such knowledge are asked for.
Values that are not finite are left out of both: broken weights are the caller's to report, with their rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .capture import Capturer, probe_ids
from .models import LoadedModel
from .proofs import prove

_PROBE_LENGTHS = (13, 5, 1, 8)
"""Tokens of the probe's windows, cut to the model's context: none as long as another, one of a single token."""

_PADDING_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2}
"""Largest difference between a row computed with and without padding, as a part of the row's norm. Rounding alone gives
about 1e-6, 1e-3 and 1e-2 in models of 30 layers; documents that see each other's tokens differ by 0.1 and more."""


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
    """Return whether padding is safe and how well the layers add up. Costs nine passes of a few tokens.

    Raises:
        InvalidInputError: SELF_TEST_FAILED: a place that is asked for is not what its name says.
        NotFoundError: the model has no such hook point.
    """
    names = loaded.map.resolve(list(hook_points))
    padding_error = _padding_error(loaded, names)
    return SelfTest(
        equal_lengths=padding_error > _PADDING_TOLERANCE[loaded.dtype],
        padding_error=padding_error,
        addition_error=prove(loaded, names),
    )


def _padding_error(loaded: LoadedModel, names: Sequence[str]) -> float:
    lengths = [min(n, loaded.context_length or n) for n in _PROBE_LENGTHS]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = probe_ids(loaded, (1, int(starts[-1])))[0].astype(np.int32)
    capturer = Capturer(loaded, names)
    has_experts = any(name.endswith(".router") for name in loaded.map.sites)
    # One pass for all windows, and one for each alone.
    together, alone = (
        {name: np.zeros((len(ids), width), np.float32) for name, width in capturer.widths.items()}
        for _ in range(2)
    )
    capturer.capture_unit(
        ids, starts, together, batch_tokens=len(lengths) * max(lengths), stored_dtype="float32"
    )
    capturer.capture_unit(ids, starts, alone, batch_tokens=1, stored_dtype="float32")
    errors = [0.0]
    padded = np.repeat(lengths, lengths) < max(lengths)
    for name in names:
        finite = np.isfinite(alone[name]).all(axis=1) & np.isfinite(together[name]).all(axis=1)
        # Finite alone and not together is as wrong as a difference.
        if np.isfinite(alone[name]).all() and not finite.all():
            return float("inf")
        a, b = alone[name][finite].astype(np.float64), together[name][finite].astype(np.float64)
        norms = np.linalg.norm(a, axis=1)
        differences = np.linalg.norm(a - b, axis=1)[norms > 0] / norms[norms > 0]
        in_padded = padded[finite][norms > 0]
        if has_experts and in_padded.any():
            # Rounding sends single tokens to another expert, and then their rows differ much. Padding that is not invisible
            # changes all rows of the padded windows.
            differences = np.atleast_1d(np.median(differences[in_padded]))
        errors.append(float(differences.max(initial=0.0)))
    return max(errors)
