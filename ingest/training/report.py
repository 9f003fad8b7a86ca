"""What came out of a training, as values that JSON can hold?"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LossRecovered:
    """Cross-entropy of the model's next-token predictions, in nats, when a hook point's activations are replaced.

    At all tokens that the dictionary was trained for (special tokens, sinks as the training masked them, stay as they are);
    all predictions within the windows count.
    """

    n_predictions: int
    clean: float
    """Nothing replaced."""

    spliced: float
    """By what the dictionary makes of them."""

    mean_ablated: float
    """By their mean over the rows of the evaluation."""

    zero_ablated: float
    """By zeros."""

    @property
    def recovered(self) -> float:
        """`(zero_ablated - spliced) / (zero_ablated - clean)`: 1 is all of the loss; NaN where zeros do not matter."""
        return _share(self.zero_ablated, self.spliced, self.clean)

    @property
    def recovered_of_mean(self) -> float:
        """The same against the mean, which is stricter where the mean is large."""
        return _share(self.mean_ablated, self.spliced, self.clean)


@dataclass(frozen=True, slots=True)
class HookPointReport:
    """One trained dictionary, measured on rows as they are stored, by the stored dictionary's own encoder."""

    hook_point: str
    dictionary: str
    """Its name in the store."""

    explained_variance: float
    """`1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2` over the rows of the evaluation, summed in float64."""

    mse: float
    """`mean |x - x_hat|^2 / d`: per number, in the units of the stored rows."""

    l0: float
    """Latents that fire on a row, on average."""

    dead_share: float
    """Share of the latents that fired in none of the last `dead_after_rows` rows of the training."""

    n_eval_rows: int
    is_held_out: bool
    """Whether the documents of the evaluation were left out of the training; false in corpora of fewer than 10 documents."""

    n_trained_rows: int
    """Rows learned from; those of several epochs count each time."""

    n_masked_rows: int
    """Rows left out: special tokens, sinks, held-out documents, rows that are not finite."""

    loss: LossRecovered | None
    """None where it could not be measured; `loss_note` says why."""

    loss_note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything, as the dictionary's `info` keeps it."""
        values = asdict(self)
        if self.loss is not None:
            values["loss"]["recovered"] = self.loss.recovered
            values["loss"]["recovered_of_mean"] = self.loss.recovered_of_mean
        found: dict[str, Any] = _finite(values)
        return found

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "HookPointReport":
        """Return what `to_json` gave."""
        numbers: dict[str, Any] = {
            k: float("nan") if v is None and k not in ("loss", "loss_note") else v for k, v in values.items()
        }
        loss = values.get("loss")
        if loss is not None:
            kept: dict[str, Any] = {
                k: float("nan") if v is None else v for k, v in loss.items() if not k.startswith("recovered")
            }
            numbers["loss"] = LossRecovered(**kept)
        return cls(**numbers)


@dataclass(frozen=True, slots=True)
class SaeTrainReport:
    """What a call of `train_sae` did."""

    run: str
    is_complete: bool
    """Whether the dictionaries are stored; false if the training was stopped, and goes on when it is called again."""

    n_steps: int
    """Steps of the whole training."""

    steps_done: int
    steps_this_job: int
    elapsed_s: float
    """Of this job's steps."""

    rows_per_s: float
    """Stored rows gone through per second, all hook points together in one pass; 0 if none."""

    version: int
    """Of the store, with the dictionaries in it."""

    hook_points: tuple[HookPointReport, ...]
    """Empty until it is complete."""

    checkpoint_dir: str | None
    """Where a stopped training goes on from."""


def _share(ablated: float, spliced: float, clean: float) -> float:
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("nan")


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for a number that is none."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
