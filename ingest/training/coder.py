"""What do all methods of training a sparse autoencoder share: weights, gradients, dead latents, the optimiser's step?

A method says which codes a batch of n rows has; everything else is here. With u = x - b_dec and codes z,

    x_hat = z @ W_dec + b_dec,    loss = sum |x - x_hat|^2 / (n * variance)

where variance is the mean of |x - mean(x)|^2 over the rows that the training began with: the loss of always saying the mean is 1.
The auxiliary loss revives latents that fire on nothing (Gao et al. 2024, appendix A): with e = x - x_hat, held
constant, the `aux_k` largest positive pre-activations of dead latents decode to e_hat without bias, and

    aux_coefficient * min(n_dead / aux_k, 1) * sum |e - e_hat|^2 / sum |e - mean(e)|^2

is added (normalised as in the paper's published code; the factor for few dead latents is sparsify's). Gradients are written
out by hand: only the encoder's own product is dense. Rows of W_dec have norm 1: the part of the gradient along a row is taken
out before Adam's step, and rows are normalised after it (Bricken et al. 2023; Gao et al., appendix A).

Sources: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", arXiv:2406.04093; Bricken et al. (2023), "Towards
Monosemanticity"; EleutherAI sparsify.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from .methods import MethodSetup, StepRecord, Trained
from .sparse_ops import ByLatent, Codes, decode, sum_rows, sum_values
from .start import center_of, random_directions

if TYPE_CHECKING:
    import torch

_BLOCK_VALUES = 1 << 22
"""Pre-activations computed at a time on a CPU: 16 MiB, which choosing then finds in the cache."""
_BLOCK_VALUES_ELSEWHERE = 1 << 28
_WEIGHT_BLOCK = 1 << 19
"""Weights that are normalised at a time: 2 MiB."""
_TINY = 1e-30
_LEAST_SHARE = 1e-6
"""Of the rows' variance: less is no residual that dead latents should explain."""


class SparseCoder:
    """A sparse autoencoder in training: encoder and decoder as (n_latents, d) float32, tied at the start."""

    learning_rate: ClassVar[float] = 2e-4
    """Peak at 2^14 latents; it falls with the root of their number."""
    rate_factors: ClassVar[dict[str, float]] = {}
    """What the learning rate of single weights is multiplied with."""
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    eps: ClassVar[float] = 6.25e-10
    """Of Adam (Gao et al. 2024, appendix A)."""

    def __init__(self, setup: MethodSetup) -> None:
        import torch

        config, shape = setup.config, (setup.config.n_latents, setup.d_in)
        self.setup = setup
        self.config = config
        device = setup.device
        self.weights: dict[str, torch.Tensor] = {
            "W_enc": torch.zeros(shape, device=device),
            "W_dec": torch.zeros(shape, device=device),
            "b_enc": torch.zeros(shape[0], device=device),
            "b_dec": torch.zeros(shape[1], device=device),
        }
        self.since_fired = torch.zeros(shape[0], dtype=torch.int64, device=device)
        """Rows since each latent fired."""
        self.variance = torch.ones((), device=device)
        """Mean squared distance of a row from the mean, of the sample."""
        self._peak = config.learning_rate or self._usual_rate()
        wanted = config.aux_k or 1 << max(0, round(setup.d_in / 2).bit_length() - 1)
        self._aux_k = min(wanted, config.n_latents)
        self._adam: torch.optim.Adam | None = None

    @property
    def n_dead(self) -> int:
        """Latents that fired in none of the last `dead_after_rows` rows."""
        return int((self.since_fired >= self.setup.dead_after_rows).sum())

    def initialise(self, rows: "torch.Tensor") -> None:
        """Set the bias to where rows lie, the decoder to random directions and the encoder to the same."""
        config, weights = self.config, self.weights
        directions = random_directions(config.n_latents, self.setup.d_in, seed=config.seed)
        weights["W_dec"].copy_(directions)
        weights["W_enc"].copy_(directions)
        weights["b_dec"].copy_(center_of(rows, config.bias_init))
        variance = total_variance(rows) / len(rows)
        self.variance.fill_(1.0).mul_(variance if bool(variance > 0) else 1.0)

    def step(self, rows: "torch.Tensor", *, rate: float, progress: float) -> StepRecord:  # noqa: ARG002
        """Learn from scaled rows (n, d)."""
        import torch

        with torch.no_grad():
            record, gradients = self.gradients(rows)
            for name, gradient in gradients.items():
                self.weights[name].grad = gradient
            self._remove_parallel(gradients["W_dec"])
            if self.config.gradient_clip is not None:
                torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.config.gradient_clip)
            adam = self._optimiser()
            for name, group in zip(self.weights, adam.param_groups, strict=True):
                group["lr"] = self._peak * rate * self.rate_factors.get(name, 1.0)
            adam.step()
            for weight in self.weights.values():
                weight.grad = None
            self._normalise_decoder()
        return record

    def gradients(self, rows: "torch.Tensor") -> tuple[StepRecord, dict[str, "torch.Tensor"]]:
        """Return what a batch measures, and the gradient of the loss by every weight; counts which latents fired."""
        u = rows - self.weights["b_dec"]
        codes = self.encode(u)
        values = self.fired_values(codes)
        summed, back = decode(Codes(codes.rows, codes.latents, values, codes.n_rows), self.weights["W_dec"])
        error = summed - u  # x_hat - x: both have b_dec
        variance = self.variance * len(rows)
        fvu = error.square().sum() / variance
        output_gradient = error * (2 / variance)
        d_values = back(output_gradient)
        places = codes.by_latent(self.config.n_latents)
        loss, d_pre, more = self.pre_gradients(codes, d_values, places)
        gradients = self._encoder_gradients(places, d_pre, u)
        gradients["W_dec"] = sum_rows(places, values, output_gradient)
        gradients["b_dec"] += output_gradient.sum(0)
        gradients |= more
        fired = self.count_fired(codes, places)
        is_dead = self._track(fired, len(rows))
        aux = self._add_auxiliary(gradients, u, error.neg_(), is_dead)
        l0 = fired.sum() / len(rows)
        return StepRecord(fvu + loss + aux, fvu, l0, is_dead.sum()), gradients

    # What a method decides.

    def encode(self, u: "torch.Tensor") -> Codes:
        """Return the codes of centred rows."""
        raise NotImplementedError

    def fired_values(self, codes: Codes) -> "torch.Tensor":
        """Return the values that are decoded, 0 for codes that only have a gradient."""
        return codes.values

    def pre_gradients(
        self,
        codes: Codes,  # noqa: ARG002 - for methods that look at them
        d_values: "torch.Tensor",
        places: ByLatent,  # noqa: ARG002
    ) -> tuple["torch.Tensor | float", "torch.Tensor", dict[str, "torch.Tensor"]]:
        """Return the loss besides the error, the gradient by the pre-activations (nnz,), and by weights of the method's own."""
        return 0.0, d_values, {}

    def count_fired(self, codes: Codes, places: ByLatent) -> "torch.Tensor":  # noqa: ARG002
        """Return on how many rows each latent fired, (n_latents,)."""
        return places.counts

    def export(self, scale: float) -> Trained:
        """Return the dictionary for rows before they were scaled."""
        raise NotImplementedError

    # What they share.

    def block_rows(self) -> int:
        """Return how many rows' pre-activations are computed at a time."""
        values = _BLOCK_VALUES if self.setup.device.type == "cpu" else _BLOCK_VALUES_ELSEWHERE
        return max(64, values // self.config.n_latents)

    def pre_activations(
        self, u: "torch.Tensor", encoder: "torch.Tensor", bias: "torch.Tensor"
    ) -> "torch.Tensor":
        """Return `u @ encoder.T + bias`, float32; the product in the dtype that was asked for."""
        import torch

        if self.setup.matmul_dtype == torch.float32:
            return torch.addmm(bias, u, encoder.T)
        dtype = self.setup.matmul_dtype
        return (u.to(dtype) @ encoder.to(dtype).T).float().add_(bias)

    def folded(self, scale: float) -> dict[str, "torch.Tensor"]:
        """Return weights that act on rows before they were multiplied with `scale`, in the layout of a dictionary.

        Directions stay as they are, so that W_dec keeps its rows of norm 1; biases, and with them the codes, are divided. This
        is exact for activations that are positively homogeneous, as all here are.
        """
        return {
            "W_enc": self.weights["W_enc"].T,
            "W_dec": self.weights["W_dec"],
            "b_enc": self.weights["b_enc"] / scale,
            "b_dec": self.weights["b_dec"] / scale,
        }

    def tensors(self) -> dict[str, "torch.Tensor"]:
        """Return weights, Adam's moments and steps, and the counters of dead latents."""
        adam = self._optimiser()
        found = {f"weight.{name}": weight for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            found |= {f"adam.{name}.{key}": value for key, value in adam.state.get(weight, {}).items()}
        return found | {"since_fired": self.since_fired, "variance": self.variance}

    def load(self, tensors: Mapping[str, "torch.Tensor"]) -> None:
        """Continue where `tensors()` was taken."""
        adam = self._optimiser()
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            state = {
                key.rpartition(".")[2]: value.to(weight.device).clone()
                for key, value in tensors.items()
                if key.startswith(f"adam.{name}.")
            }
            if state:
                adam.state[weight] = state
        self.since_fired.copy_(tensors["since_fired"])
        self.variance.copy_(tensors["variance"])

    def _usual_rate(self) -> float:
        return float(self.learning_rate / (self.config.n_latents / (1 << 14)) ** 0.5)

    def _optimiser(self) -> "torch.optim.Adam":
        import torch

        if self._adam is None:
            fused = self.setup.device.type in ("cpu", "cuda")
            groups = [{"params": [weight]} for weight in self.weights.values()]
            self._adam = torch.optim.Adam(groups, lr=self._peak, betas=self.betas, eps=self.eps, fused=fused)
        return self._adam

    def _encoder_gradients(
        self, places: ByLatent, d_pre: "torch.Tensor", u: "torch.Tensor"
    ) -> dict[str, "torch.Tensor"]:
        """Return the gradients by W_enc and b_enc, and by b_dec as far as it is subtracted from the rows."""
        d_bias = sum_values(places, d_pre)
        return {
            "W_enc": sum_rows(places, d_pre, u),
            "b_enc": d_bias,
            "b_dec": -(d_bias @ self.weights["W_enc"]),
        }

    def _track(self, fired: "torch.Tensor", n_rows: int) -> "torch.Tensor":
        """Count the batch, and return which latents are dead, (n_latents,)."""
        self.since_fired.add_(n_rows).masked_fill_(fired > 0, 0)
        return self.since_fired >= self.setup.dead_after_rows

    def _add_auxiliary(
        self,
        gradients: dict[str, "torch.Tensor"],
        u: "torch.Tensor",
        residual: "torch.Tensor",
        is_dead: "torch.Tensor",
    ) -> "torch.Tensor | float":
        """Add the auxiliary loss's gradients and return it; `residual` is x - x_hat."""
        if self.config.aux_coefficient == 0:
            return 0.0
        dead = is_dead.nonzero()[:, 0]
        if not len(dead):
            return 0.0
        weights = self.weights
        encoder, decoder, bias = weights["W_enc"][dead], weights["W_dec"][dead], weights["b_enc"][dead]
        k = min(self._aux_k, len(dead))
        # A residual without variance, of a single row or of perfect codes, must not make the weight infinite.
        variance = total_variance(residual).clamp(min=_LEAST_SHARE * self.variance * len(u))
        weight = self.config.aux_coefficient * min(len(dead) / self._aux_k, 1.0) / variance
        d_encoder, d_decoder, d_bias = encoder.new_zeros(encoder.shape), decoder.new_zeros(decoder.shape), 0.0
        total = residual.new_zeros(())
        size = max(64, self.block_rows() * self.config.n_latents // len(dead))
        for start in range(0, len(u), size):
            block, left = u[start : start + size], residual[start : start + size]
            z = _largest(self.pre_activations(block, encoder, bias), k)
            error = (z @ decoder).sub_(left)
            total += error.square().sum()
            d_out = error.mul_(2 * weight)
            d_pre = (d_out @ decoder.T).mul_(z > 0)
            d_decoder.addmm_(z.T, d_out)
            d_encoder.addmm_(d_pre.T, block)
            d_bias = d_bias + d_pre.sum(0)
        gradients["W_enc"].index_add_(0, dead, d_encoder)
        gradients["W_dec"].index_add_(0, dead, d_decoder)
        gradients["b_enc"].index_add_(0, dead, d_bias)
        gradients["b_dec"] -= d_bias @ encoder
        return total * weight

    def _remove_parallel(self, gradient: "torch.Tensor") -> None:
        """Take from every row of a gradient of W_dec its part along the weights' row, which normalising would undo."""
        size = max(1, _WEIGHT_BLOCK // self.setup.d_in)
        for rows, weights in zip(gradient.split(size), self.weights["W_dec"].split(size), strict=True):
            rows.addcmul_(weights, (rows * weights).sum(1, keepdim=True), value=-1)

    def _normalise_decoder(self) -> None:
        size = max(1, _WEIGHT_BLOCK // self.setup.d_in)
        for rows in self.weights["W_dec"].split(size):
            rows.div_(rows.norm(dim=1, keepdim=True).clamp_(min=_TINY))


def total_variance(rows: "torch.Tensor") -> "torch.Tensor":
    """Return the sum of squared distances of rows from their mean."""
    found: torch.Tensor = (rows - rows.mean(0)).square().sum()
    return found


def _largest(pre: "torch.Tensor", k: int) -> "torch.Tensor":
    """Return a matrix with each row's k largest values where they are positive, 0 elsewhere."""
    pre.clamp_(min=0)
    if k >= pre.shape[1]:
        return pre
    found = pre.topk(k, dim=1, sorted=False)
    return pre.zero_().scatter_(1, found.indices, found.values)
