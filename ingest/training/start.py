"""Where does a training begin: scale of the rows, center, directions? Functions of a sample of rows and a seed."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MEDIAN_STEPS = 100
_MEDIAN_TOLERANCE = 1e-6
"""Weiszfeld's steps end when one moves by less than this part of the rows' mean distance."""


def row_scale(rows: "torch.Tensor") -> float:
    """Return what rows (n, d) are multiplied with so that their mean norm is sqrt(d); 1 for rows of zeros."""
    mean = float(rows.double().norm(dim=1).mean())
    return math.sqrt(rows.shape[1]) / mean if mean > 0 else 1.0


def center_of(rows: "torch.Tensor", how: str) -> "torch.Tensor":
    """Return where the decoder's bias begins, (d,), float32.

    Args:
        rows: A sample (n, d).
        how: `geometric_median`, `mean` or `zero`.
    """
    import torch

    if how == "zero":
        return torch.zeros_like(rows[0])
    return rows.mean(0) if how == "mean" else geometric_median(rows)


def geometric_median(rows: "torch.Tensor") -> "torch.Tensor":
    """Return the point of least total distance from rows (n, d), float32.

    Source: Weiszfeld (1937), "Sur le point pour lequel la somme des distances de n points donnés est minimum"; rows that a step
    falls on are kept a little away, as Vardi and Zhang (2000) show to be enough in practice.
    """
    guess = rows.mean(0)
    for _ in range(_MEDIAN_STEPS):
        distances = (rows - guess).norm(dim=1)
        typical = distances.mean()
        if not typical > 0:
            break
        weights = 1 / distances.clamp(min=float(typical) * 1e-6)
        better = (weights @ rows) / weights.sum()
        moved = (better - guess).norm()
        guess = better
        if moved <= _MEDIAN_TOLERANCE * typical:
            break
    return guess


def random_directions(n: int, d: int, *, seed: int) -> "torch.Tensor":
    """Return n directions spread evenly over the sphere, (n, d) float32 on the CPU, the same for one seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)
