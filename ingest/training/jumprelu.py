"""Training a JumpReLU dictionary: a latent fires where its pre-activation is above a threshold of its own, which is learned.

    f = pre * (pre > threshold),    loss = error + sparsity_coefficient * (L0 / k - 1)^2,    L0 = mean number that fire

Neither f nor L0 has a useful gradient by the threshold; both get that of a smoothed step, through a kernel of width
`bandwidth` around it (straight-through estimators): with g = d loss / d f and K = 1 within half a bandwidth of it,

    d f / d threshold = -threshold / bandwidth * K,    d L0 / d threshold = -1 / bandwidth * K  (per row)

while pre-activations get g where they fire, and nothing from L0.

Thresholds are exp of what is learned, as in the paper, whose trainings are of billions of rows. Four things are ours, so that
shorter ones get there (`bandwidth=0.001`, `aux_coefficient=0` and a long training are the paper's):

- Thresholds begin, per latent, where on a sample of rows 4 k of all latents fire on average, not at 0.001.
- Their learning rate is ten times the weights'.
- The kernel is wider: with the paper's a threshold hears of one row in thousands, and most latents die.
- Dead latents get the auxiliary loss of `coder.py`, and their thresholds fall by a learning rate per step until they fire.

On 800,000 rows of a small model (1,024 latents of 64 dimensions, L0 16) the kernel takes the share of dead latents from 81 to
27 % and the last of these to 16 %, at the same explained variance.

Source: Rajamanoharan et al. (2024), "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders",
arXiv:2407.14435, section 3 and appendices; the target of L0 is their appendix on fixing the sparsity.
"""

import math
from typing import TYPE_CHECKING, ClassVar

from .coder import SparseCoder
from .methods import MethodSetup, StepRecord, Trained, register_method
from .sparse_ops import ByLatent, Codes, sum_values

if TYPE_CHECKING:
    import torch

_LEAST = 1e-3
"""Smallest threshold to begin with: the paper's initial one."""
_START_TIMES_K = 4
_WARMUP_SHARE = 0.1
"""Share of the steps over which the sparsity's weight rises linearly, so that few latents die early."""


@register_method("jumprelu")
class JumpReLU(SparseCoder):
    """See the module."""

    rate_factors: ClassVar[dict[str, float]] = {"log_threshold": 10.0}
    betas: ClassVar[tuple[float, float]] = (0.0, 0.999)
    eps: ClassVar[float] = 1e-8
    """Of Adam (Rajamanoharan et al. 2024, appendix)."""

    def __init__(self, setup: MethodSetup) -> None:
        import torch

        super().__init__(setup)
        start = math.log(_LEAST * math.sqrt(setup.d_in))
        self.weights["log_threshold"] = torch.full_like(self.weights["b_enc"], start)
        self.bandwidth = setup.config.bandwidth * math.sqrt(setup.d_in)
        """Of rows of mean norm sqrt(d)."""
        self._progress = 0.0

    def initialise(self, rows: "torch.Tensor") -> None:
        """Set directions and bias as all do, and each threshold to a quantile of its latent on the sample."""
        super().initialise(rows)
        weights = self.weights
        u = rows - weights["b_dec"]
        share = min(_START_TIMES_K * self.config.k / self.config.n_latents, 0.5)
        rank = max(1, math.ceil(share * len(u)))
        size = max(1, self.block_rows() * self.config.n_latents // len(u))
        for start in range(0, self.config.n_latents, size):
            here = slice(start, start + size)
            pre = self.pre_activations(u, weights["W_enc"][here], weights["b_enc"][here])
            quantile = pre.topk(rank, dim=0, sorted=False).values.amin(0)
            weights["log_threshold"][here] = quantile.clamp(min=_LEAST * math.sqrt(self.setup.d_in)).log()

    def step(self, rows: "torch.Tensor", *, rate: float, progress: float) -> StepRecord:
        """Learn from scaled rows (n, d)."""
        import torch

        self._progress = progress
        record = super().step(rows, rate=rate, progress=progress)
        if self.config.aux_coefficient > 0:
            fall = self._peak * rate * self.rate_factors["log_threshold"]
            with torch.no_grad():
                is_dead = self.since_fired >= self.setup.dead_after_rows
                self.weights["log_threshold"].sub_(is_dead * fall)
        return record

    def encode(self, u: "torch.Tensor") -> Codes:
        """Return positive pre-activations that fire or are at most half a bandwidth below their threshold."""
        import torch

        size, weights = self.block_rows(), self.weights
        floor = (weights["log_threshold"].exp() - self.bandwidth / 2).clamp(min=0)
        rows, latents, values = [], [], []
        for start in range(0, len(u), size):
            pre = self.pre_activations(u[start : start + size], weights["W_enc"], weights["b_enc"])
            of_block, of_latent = (pre > floor).nonzero(as_tuple=True)
            rows.append(of_block + start)
            latents.append(of_latent)
            values.append(pre[of_block, of_latent])
        return Codes(torch.cat(rows), torch.cat(latents), torch.cat(values), len(u))

    def fired_values(self, codes: Codes) -> "torch.Tensor":
        """Return the values above their threshold, 0 for the others."""
        return codes.values * self._fires(codes)

    def pre_gradients(
        self, codes: Codes, d_values: "torch.Tensor", places: ByLatent
    ) -> tuple["torch.Tensor | float", "torch.Tensor", dict[str, "torch.Tensor"]]:
        """Return the penalty, and the gradients by pre-activations and by the logarithms of thresholds."""
        fires = self._fires(codes)
        thresholds = self.weights["log_threshold"].exp()
        weight = self.config.sparsity_coefficient * min(1.0, self._progress / _WARMUP_SHARE)
        excess = fires.sum() / codes.n_rows / self.config.k - 1
        d_count = weight * 2 * excess / (self.config.k * codes.n_rows)
        theta = thresholds[codes.latents]
        near = (codes.values - theta).abs() < self.bandwidth / 2
        d_theta = near * (d_values * theta + d_count) * (-1 / self.bandwidth)
        d_log = sum_values(places, d_theta) * thresholds
        return weight * excess.square(), d_values * fires, {"log_threshold": d_log}

    def count_fired(self, codes: Codes, places: ByLatent) -> "torch.Tensor":
        """Return on how many rows each latent fired, (n_latents,)."""
        return sum_values(places, self._fires(codes).float())

    def export(self, scale: float) -> Trained:
        """Return the dictionary for rows before they were scaled."""
        weights = {name: w.cpu().numpy() for name, w in self.folded(scale).items()}
        weights["threshold"] = (self.weights["log_threshold"].exp() / scale).cpu().numpy()
        return Trained("jumprelu", None, weights)

    def _fires(self, codes: Codes) -> "torch.Tensor":
        return codes.values > self.weights["log_threshold"].exp()[codes.latents]
