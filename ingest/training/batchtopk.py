"""Training a BatchTopK dictionary: the k * n largest positive pre-activations of a batch of n rows fire, wherever they are.

Rows may have more or fewer than k codes. To encode rows one by one, a latent fires when its pre-activation is above a
threshold: the running mean over steps of the smallest value that fired.

Source: Bussmann, Leask, Nanda (2024), "BatchTopK Sparse Autoencoders", arXiv:2412.06410, section 3. The paper's
threshold is an expectation over batches, which the running mean estimates.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .coder import SparseCoder
from .methods import MethodSetup, Trained, register_method
from .sparse_ops import Codes

if TYPE_CHECKING:
    import torch

_DECAY, _TAIL = 0.999, 20
"""Of the running mean: over about 1,000 steps, but at most the last twentieth of them, when codes have settled."""
_MARGIN = 4
"""Candidates per row are first this many times k; a row of which all fire is looked at again, with more."""


@register_method("batchtopk")
class BatchTopK(SparseCoder):
    """See the module."""

    def __init__(self, setup: MethodSetup) -> None:
        import torch

        super().__init__(setup)
        self.smallest = torch.zeros(2, dtype=torch.float64, device=setup.device)
        """Running mean of the smallest value that fired, and the weight of all steps in it so far."""
        usual = max(0.0, min(_DECAY, 1 - _TAIL / setup.n_steps))
        self._decay = usual if setup.config.threshold_decay is None else setup.config.threshold_decay

    def encode(self, u: "torch.Tensor") -> Codes:
        """Return the k * n largest positive pre-activations of the batch, by row and latent; exact."""
        import torch

        per_row = min(_MARGIN * self.config.k, self.config.n_latents)
        values, latents = self._candidates(u, per_row)
        wanted = self.config.k * len(u)
        while True:
            least = _kth_largest(values, wanted)
            # A row whose every candidate fires may have more that should.
            full = (values[:, -1] >= least) & (values[:, -1] > 0)
            if per_row == self.config.n_latents or not bool(full.any()):
                break
            per_row = min(2 * per_row, self.config.n_latents)
            values, latents = self._candidates(u, per_row)
        keep = _first_largest(values, least, wanted)
        rows, columns = keep.nonzero(as_tuple=True)
        found = Codes(rows, latents[rows, columns], values[rows, columns], len(u))
        self._remember(found.values)
        order = torch.argsort(found.rows * self.config.n_latents + found.latents)
        return Codes(rows, found.latents[order], found.values[order], len(u))

    def threshold(self) -> float:
        """Return what a pre-activation must exceed to fire on a row alone, in scaled units."""
        mean, weight = self.smallest.tolist()
        return mean / weight if weight > 0 else 0.0

    def tensors(self) -> dict[str, "torch.Tensor"]:
        """Return what `SparseCoder.tensors` does, and the running threshold."""
        return super().tensors() | {"smallest": self.smallest}

    def load(self, tensors: Mapping[str, "torch.Tensor"]) -> None:
        """Continue where `tensors()` was taken."""
        super().load(tensors)
        self.smallest.copy_(tensors["smallest"])

    def export(self, scale: float) -> Trained:
        """Return the dictionary for rows before they were scaled."""
        import numpy as np

        weights = {name: w.cpu().numpy() for name, w in self.folded(scale).items()}
        weights["threshold"] = np.full(self.config.n_latents, self.threshold() / scale, np.float32)
        return Trained("batchtopk", self.config.k, weights)

    def _candidates(self, u: "torch.Tensor", per_row: int) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return the largest pre-activations of each row, 0 where negative, descending, and their latents."""
        import torch

        size = self.block_rows()
        values, latents = [], []
        for start in range(0, len(u), size):
            pre = self.pre_activations(u[start : start + size], self.weights["W_enc"], self.weights["b_enc"])
            top = pre.topk(per_row, dim=1)
            values.append(top.values.clamp_(min=0))
            latents.append(top.indices)
        return torch.cat(values), torch.cat(latents)

    def _remember(self, fired: "torch.Tensor") -> None:
        """Take the smallest value that fired into the running mean, whose start at 0 is divided out as Adam's is."""
        if not len(fired):
            return
        decay = self._decay
        self.smallest.mul_(decay)
        self.smallest[0] += (1 - decay) * fired.min()
        self.smallest[1] += 1 - decay


def _kth_largest(values: "torch.Tensor", k: int) -> "torch.Tensor":
    flat = values.flatten()
    return flat.topk(min(k, len(flat)), sorted=False).values.min()


def _first_largest(values: "torch.Tensor", least: "torch.Tensor", wanted: int) -> "torch.Tensor":
    """Return which values are among the `wanted` largest and positive; of those equal to the least, the first in order."""
    above = values > least
    equal = values == least
    room = wanted - above.sum()
    keep: torch.Tensor = (above | (equal & (equal.flatten().cumsum(0).view_as(equal) <= room))) & (values > 0)
    return keep
