"""Which latents of each row become codes? Exact choices on dense pre-activations, faster than sorting them.

Each function returns coordinates and values, row by row, latents ascending within a row. Of equal values the lowest latent is
chosen. Memory beside the values: a flag for each of them at most, and for each row about the square root of k times n_latents
numbers.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Selected:
    """Codes as coordinates."""

    rows: "torch.Tensor"
    """int64 (nnz,), ascending."""
    latents: "torch.Tensor"
    """int64 (nnz,), ascending within a row."""
    values: "torch.Tensor"
    """(nnz,)."""


def select_top_k(pre_nf: "torch.Tensor", k: int) -> Selected:
    """Return the k largest values of each row, as far as they are above 0.

    The k-th largest maximum of groups of latents bounds the k-th value from below, so only the k groups with the largest
    maxima are looked into: a pass over the values, and two small selections. Rows in which equal values straddle either
    border are chosen again with the tie rule.
    """
    import torch

    n, n_latents = pre_nf.shape
    size = _group_size(n_latents, k)
    n_groups = n_latents // size
    if size < 2 or n_groups <= k:
        top = pre_nf.topk(min(k + 1, n_latents), dim=1)
        latents, values, tied = top.indices[:, :k], top.values[:, :k], _straddles(top.values, k)
    else:
        whole = n_groups * size
        # Group j is every n_groups-th latent from j on: a maximum over rows of a matrix, which needs no shuffling.
        maxima = pre_nf[:, :whole].unflatten(1, (size, n_groups)).amax(1)
        groups = maxima.topk(k + 1, dim=1)
        offsets = torch.arange(0, whole, n_groups, device=pre_nf.device)
        at = (groups.indices[:, :k, None] + offsets).flatten(1)
        if whole < n_latents:  # those that fill no group are looked at in every row
            rest = torch.arange(whole, n_latents, device=pre_nf.device)
            at = torch.cat([at, rest.expand(n, -1)], dim=1)
        top = pre_nf.gather(1, at).topk(k + 1, dim=1)
        latents, values = at.gather(1, top.indices[:, :k]), top.values[:, :k]
        tied = _straddles(groups.values, k) | _straddles(top.values, k)
    latents, order = latents.sort(dim=1)
    values = values.gather(1, order)
    again = tied.nonzero()[:, 0]
    if len(again):
        latents[again], values[again] = _top_k_of_ties(pre_nf[again], values[again].amin(1), k)
    rows, columns = (values > 0).nonzero(as_tuple=True)
    return Selected(rows, latents[rows, columns], values[rows, columns])


def select_group_max(pre_nf: "torch.Tensor", k: int) -> Selected:
    """Return the largest value of each of k groups of neighbouring latents, as far as it is above 0."""
    n, n_latents = pre_nf.shape
    best = pre_nf.view(n, k, n_latents // k).max(2)  # of equal values torch returns the first
    rows, groups = (best.values > 0).nonzero(as_tuple=True)
    latents = groups * (n_latents // k) + best.indices[rows, groups]
    return Selected(rows, latents, best.values[rows, groups])


def select_above(pre_nf: "torch.Tensor", threshold: "torch.Tensor", flags_nf: "torch.Tensor") -> Selected:
    """Return the values above a threshold, one for all latents or one for each, which may let values of 0 and below pass.

    Args:
        pre_nf: Contiguous.
        threshold: Shape (n_latents,) or ().
        flags_nf: Booleans of the shape of `pre_nf`, to be overwritten: new memory for them takes longer than the comparison.
    """
    import torch

    torch.gt(pre_nf, threshold, out=flags_nf)
    flat = _flatnonzero(flags_nf)
    n_latents = pre_nf.shape[1]
    rows = flat.div(n_latents, rounding_mode="floor")
    return Selected(rows, flat - rows * n_latents, pre_nf.reshape(-1)[flat])


def _flatnonzero(flags: "torch.Tensor") -> "torch.Tensor":
    """Return the places of few true flags, as int64."""
    import torch

    if flags.device.type == "cpu":  # numpy skips stretches of false ones, which torch looks at twice
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.reshape(-1).nonzero()[:, 0]


def _group_size(n_latents: int, k: int) -> int:
    """Return the size, a power of two, that makes about as many groups as there are candidates in k of them.

    >>> _group_size(16384, 32), _group_size(64, 32), _group_size(16, 32)
    (16, 1, 1)
    """
    return 1 << max(0, int(math.log2(n_latents / k) / 2)) if n_latents > k else 1


def _straddles(values_nk: "torch.Tensor", k: int) -> "torch.Tensor":
    """Return whether the k-th value of each row, above 0, is also the one behind it."""
    if values_nk.shape[1] <= k:
        return values_nk[:, 0] != values_nk[:, 0]
    return (values_nk[:, k - 1] == values_nk[:, k]) & (values_nk[:, k] > 0)


def _top_k_of_ties(
    pre_nf: "torch.Tensor", smallest_n: "torch.Tensor", k: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return each row's k latents, ascending, and values: all above its k-th value, and the first of those equal to it."""
    above = pre_nf > smallest_n[:, None]
    equal = pre_nf == smallest_n[:, None]
    wanted = k - above.sum(1, keepdim=True)
    keep = above | (equal & (equal.cumsum(1) <= wanted))
    latents = keep.nonzero()[:, 1].view(len(pre_nf), k)
    return latents, pre_nf.gather(1, latents)
