"""How does the dictionary of one hook point learn from batches of stored rows?

Rows come as they are stored; here they go to the device, sinks and broken rows are taken out, and the rest is scaled to a mean
norm of sqrt(d), a factor measured once on the first rows. What a method learns is in scaled units; `data` folds the factor into
the weights, so that the dictionary works on rows as they are stored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.dictionary_data import DictionaryData, make_dictionary
from actstore.errors import ErrorKind, InvalidInputError

from .methods import Method, MethodSetup, StepRecord, get_method
from .start import row_scale

if TYPE_CHECKING:
    import torch

_CURVE_POINTS = 100
"""Steps whose measurements are kept with the dictionary, evenly spread."""


@dataclass(frozen=True, slots=True)
class StepValues:
    """What a step measured, as numbers."""

    step: int
    fvu: float
    l0: float
    n_dead: int


class HookTraining:
    """One dictionary in training."""

    def __init__(self, hook_point: str, name: str, setup: MethodSetup, *, norm_limit: float) -> None:
        """Make the method; weights are set by `initialise` or `load`.

        Args:
            hook_point: Canonical name.
            name: Of the dictionary.
            setup: For the method.
            norm_limit: Rows of a larger norm are left out.
        """
        self.hook_point, self.name, self.setup, self.norm_limit = hook_point, name, setup, norm_limit
        self.method: Method = get_method(setup.config.method)(setup)
        self.scale = 1.0
        self.n_trained = self.n_read = 0
        self.curve: list[StepValues] = []
        self._last: tuple[int, StepRecord] | None = None
        self._every = max(1, math.ceil(setup.n_steps / _CURVE_POINTS))

    def initialise(self, samples: "Sequence[torch.Tensor]") -> None:
        """Begin: measure the scale and set the weights.

        Raises:
            InvalidInputError: no row is left of the sample.
        """
        import torch

        rows = torch.cat([self._usable(values) for values in samples])
        if not len(rows):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"no row of {self.hook_point} is left to train on: all that were read are special tokens, sinks or not "
                "finite; set mask_special or mask_sinks to false",
            )
        self.scale = row_scale(rows.cpu())
        with torch.no_grad():
            self.method.initialise(rows * self.scale)

    def step(self, values: "torch.Tensor", *, n_read: int, step: int, rate: float, progress: float) -> None:
        """Learn from a batch of stored rows."""
        rows = self._usable(values)
        self.n_read += n_read
        self.n_trained += len(rows)
        if len(rows):
            self._last = step, self.method.step(rows.mul_(self.scale), rate=rate, progress=progress)
            if step % self._every == 0 or step + 1 == self.setup.n_steps:
                self.curve.append(self._checked())

    def values(self) -> StepValues:
        """Return what the last step measured; waits for the device."""
        if self._last is None:
            return StepValues(0, float("nan"), float("nan"), 0)
        step, record = self._last
        return StepValues(step, float(record.fvu), float(record.l0), int(record.n_dead))

    def _checked(self) -> StepValues:
        """Return what the last step measured.

        Raises:
            InvalidInputError: NON_FINITE: the weights have left all bounds.
        """
        found = self.values()
        if not math.isfinite(found.fvu) or not math.isfinite(found.l0):
            raise InvalidInputError(
                ErrorKind.NON_FINITE,
                f"the training of {self.name!r} has diverged before step {found.step} (unexplained variance {found.fvu}): "
                f"delete its checkpoints and take a smaller learning_rate, it is {self.setup.config.learning_rate}",
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the tensors."""
        curve = [[v.step, v.fvu, v.l0, v.n_dead] for v in self.curve]
        return {"scale": self.scale, "n_trained": self.n_trained, "n_read": self.n_read, "curve": curve}

    def load(self, values: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]") -> None:
        """Continue from a checkpoint."""
        import torch

        self.scale = float(values["scale"])
        self.n_trained, self.n_read = int(values["n_trained"]), int(values["n_read"])
        self.curve = [StepValues(*point) for point in values["curve"]]
        with torch.no_grad():
            self.method.load(tensors)

    def data(self, info: Mapping[str, Any], **spec: Any) -> DictionaryData:
        """Return the dictionary as it stands, for rows as they are stored."""
        trained = self.method.export(self.scale)
        return make_dictionary(
            trained.weights,
            activation=trained.activation,
            hook_point=self.hook_point,
            info=info,
            k=trained.k,
            apply_b_dec_to_input=trained.apply_b_dec_to_input,
            **spec,
        )

    def _usable(self, values: "torch.Tensor") -> "torch.Tensor":
        """Return the finite rows that are no sinks, float32, on the device, new memory."""
        rows = values.to(self.setup.device, non_blocking=True).float()
        norms = rows.norm(dim=1)
        keep = norms.isfinite() & (norms <= self.norm_limit)
        return rows[keep]
