"""What does the user ask of a training, and what of it decides the weights?"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from actstore.checks import check_whole
from actstore.errors import ErrorKind, InvalidInputError
from actstore.names import check_name

BIAS_INITS = ("geometric_median", "mean", "zero")
DTYPES = ("auto", "float32", "bfloat16")
_WHERE = ("name", "device", "checkpoint_dir", "checkpoint_every_s", "loss_rows")
"""Fields that do not decide what the weights become; `eval_rows` does: documents are left out of the training for them."""


@dataclass(frozen=True, slots=True)
class SaeTrainConfig:
    """One training: a dictionary for every hook point, all in one pass over the stored rows.

    >>> SaeTrainConfig(name="sae", n_latents=4096, k=16).check().method
    'topk'
    """

    name: str
    """Of the dictionary; with several hook points the hook point's name is put behind it: `sae.layers.2.resid_post`."""

    method: str = "topk"
    """`topk`, `batchtopk`, `jumprelu`, or one that was registered (`actstore.ingest.training.methods`)."""

    n_latents: int = 16_384
    """Latents of the dictionary."""

    k: int = 32
    """Latents that fire on a row: exactly (topk), on average (batchtopk), or the average that the penalty aims at
    (jumprelu)."""

    n_rows: int | None = None
    """Stored rows to go through, those that are masked included; more than the run has means several epochs. None for one."""

    batch_rows: int = 4096
    """Rows of a step before masks."""

    seed: int = 0
    """Of the initial weights, of the order of the rows, and of the choice of documents to evaluate on."""

    learning_rate: float | None = None
    """Peak; None for 2e-4 / sqrt(n_latents / 2^14): the scaling of Gao et al. (2024), figure 3, with sparsify's constant, and at
    2^17 latents the 7e-5 of Rajamanoharan et al. (2024). For a few thousand steps 1e-3 and more are better."""

    warmup_share: float = 0.02
    """Share of the steps over which the learning rate rises linearly."""

    decay_share: float = 0.2
    """Share of the steps, at the end, over which it falls linearly to zero."""

    gradient_clip: float | None = 1.0
    """Largest norm of all gradients together; None for no limit."""

    bias_init: str = "geometric_median"
    """Where the decoder's bias begins: geometric median of rows (Bricken et al. 2023), `mean`, or `zero`."""

    aux_k: int | None = None
    """Dead latents that try to explain what is left of a row; None for the power of two nearest to d_model / 2."""

    aux_coefficient: float = 1 / 32
    """Weight of that loss (Gao et al. 2024, appendix A); 0 turns it off."""

    dead_after_rows: int | None = None
    """A latent is dead when it fired in none of so many rows; None for 10,000,000 (Gao et al. 2024), but at most an eighth of
    the training."""

    bandwidth: float = 0.05
    """jumprelu: width of the kernel of its straight-through estimators, for rows of mean norm 1. Rajamanoharan et al. (2024)
    take 0.001 in trainings of billions of rows; in short ones that leaves most latents dead."""

    sparsity_coefficient: float = 1.0
    """jumprelu: weight of `(L0 / k - 1)^2`."""

    threshold_decay: float | None = None
    """batchtopk: of the running mean of the smallest value that fires; None for 0.999, or less in a short training, so that the
    mean is that of its last twentieth."""

    mask_special: bool = True
    """Do not train on special tokens."""

    mask_sinks: bool = True
    """Do not train on attention sinks: the first token of each window, and rows of over 10 times the median norm."""

    buffer_rows: int = 131_072
    """Rows that are mixed with each other; twice as many of every hook point are in memory, as they are stored."""

    dtype: str = "auto"
    """Of the encoder's matrix product: `bfloat16` on a GPU and `float32` elsewhere, unless named. Weights, gradients and Adam's
    moments are float32."""

    eval_rows: int = 16_384
    """Rows of documents that are left out of the training to measure on; at most a tenth of the documents."""

    loss_rows: int = 4096
    """Rows of those on which the model is run with spliced activations; 0 leaves this out."""

    device: str = "auto"
    """`auto` for CUDA where there is a GPU, else the CPU; `cuda:1`, ..."""

    checkpoint_dir: str | None = None
    """Folder of checkpoints; None for one in the user's cache folder, named by store and dictionary."""

    checkpoint_every_s: float = 600.0
    """Seconds between checkpoints; one is also made when the training is stopped."""

    def check(self) -> "SaeTrainConfig":
        """Return this configuration if every field can work alone.

        Raises:
            InvalidInputError: a field that cannot; the message names it.
        """
        from .methods import get_method

        check_name(self.name, what="dictionary name")
        if "@" in self.name:
            raise _bad("name", self.name, "a name without '@', which separates dictionary and run")
        get_method(self.method)
        for field in ("n_latents", "k", "batch_rows", "buffer_rows", "eval_rows"):
            check_whole(getattr(self, field), what=field, least=1)
        for field in ("n_rows", "aux_k", "dead_after_rows"):
            if getattr(self, field) is not None:
                check_whole(getattr(self, field), what=field, least=1)
        check_whole(self.seed, what="seed", least=0, most=(1 << 63) - 1)
        check_whole(self.loss_rows, what="loss_rows", least=0)
        if self.k > self.n_latents:
            raise _bad("k", self.k, f"at most n_latents, which is {self.n_latents}")
        self._check_reals()
        for field, known in (("bias_init", BIAS_INITS), ("dtype", DTYPES)):
            if getattr(self, field) not in known:
                raise _bad(field, getattr(self, field), f"one of {', '.join(known)}")
        for field in ("mask_special", "mask_sinks"):
            if not isinstance(getattr(self, field), bool):
                raise _bad(field, getattr(self, field), "true or false")
        return self

    def _check_reals(self) -> None:
        shares = ("warmup_share", "decay_share")
        for field in (*shares, "aux_coefficient", "sparsity_coefficient", "checkpoint_every_s"):
            _check_real(field, getattr(self, field), least=0.0)
        if self.warmup_share + self.decay_share > 1:
            raise _bad(
                "decay_share", self.decay_share, f"at most 1 - warmup_share, {1 - self.warmup_share:g}"
            )
        for field in ("learning_rate", "gradient_clip", "bandwidth"):
            value = getattr(self, field)
            if value is not None or field == "bandwidth":
                _check_real(field, value, least=0.0, above=True)
        if self.threshold_decay is not None:
            _check_real("threshold_decay", self.threshold_decay, least=0.0)
            if self.threshold_decay >= 1:
                raise _bad("threshold_decay", self.threshold_decay, "below 1")

    def identity(self) -> dict[str, Any]:
        """Return what decides the weights, as JSON: two trainings of one identity on one machine give the same."""
        return {k: v for k, v in asdict(self).items() if k not in _WHERE}


def _check_real(field: str, value: Any, *, least: float, above: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < least or (above and value <= least):
        raise _bad(field, value, f"a number {'above' if above else 'of at least'} {least:g}")


def _bad(field: str, value: object, expected: str) -> InvalidInputError:
    return InvalidInputError(ErrorKind.BAD_ARGUMENT, f"{field} must be {expected}, got {value!r:.80}")
