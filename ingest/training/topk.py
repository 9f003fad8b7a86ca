"""Training a TopK dictionary: on each row the k latents of largest pre-activation fire, as far as they are positive.

Source: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", arXiv:2406.04093, section 2.3. There is a bias of the
encoder besides (b_enc, from 0), as in the paper's code.
"""

from typing import TYPE_CHECKING

from .coder import SparseCoder
from .methods import Trained, register_method
from .sparse_ops import Codes

if TYPE_CHECKING:
    import torch


@register_method("topk")
class TopK(SparseCoder):
    """See the module."""

    def encode(self, u: "torch.Tensor") -> Codes:
        """Return the k largest positive pre-activations of each row."""
        import torch

        size = self.block_rows()
        rows, latents, values = [], [], []
        for start in range(0, len(u), size):
            pre = self.pre_activations(u[start : start + size], self.weights["W_enc"], self.weights["b_enc"])
            top = pre.topk(self.config.k, dim=1, sorted=False)
            of_block, columns = (top.values > 0).nonzero(as_tuple=True)
            rows.append(of_block + start)
            latents.append(top.indices[of_block, columns])
            values.append(top.values[of_block, columns])
        return Codes(torch.cat(rows), torch.cat(latents), torch.cat(values), len(u))

    def export(self, scale: float) -> Trained:
        """Return the dictionary for rows before they were scaled."""
        return Trained(
            "topk", self.config.k, {name: w.cpu().numpy() for name, w in self.folded(scale).items()}
        )
