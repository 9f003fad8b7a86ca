"""What must a training method be able to do, and which are there?

The trainer owns the rows (order, masks, scale), the schedule, the checkpoints and the measuring. A *method* owns weights and
one optimiser step. Another method slots in with `register_method`:

    @register_method("mine")
    class Mine:
        def __init__(self, setup): ...
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

if TYPE_CHECKING:
    import torch

    from .config import SaeTrainConfig


@dataclass(frozen=True, slots=True)
class MethodSetup:
    """What a method is made from."""

    config: "SaeTrainConfig"
    d_in: int
    n_steps: int
    """Steps of the whole training."""

    dead_after_rows: int
    device: "torch.device"
    matmul_dtype: "torch.dtype"
    """Of large products; float32 or bfloat16."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step measured on its batch; scalar tensors on the device, so that no step waits for it."""

    loss: "torch.Tensor"
    """Everything that was minimised."""

    fvu: "torch.Tensor"
    """Share of the variance that is not explained, of the batch before the step."""

    l0: "torch.Tensor"
    """Latents that fired on a row, on average."""

    n_dead: "torch.Tensor"
    """Latents that fired in none of the last `dead_after_rows` rows."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A dictionary in the units of the stored rows, as `save_dictionary` takes it."""

    activation: str
    """`topk`, `batchtopk`, `jumprelu`, `relu` or `gated`."""

    k: int | None
    weights: Mapping[str, npt.NDArray[np.float32]]
    """`W_enc (d_in, n_latents)`, `b_enc`, `W_dec (n_latents, d_in)`, `b_dec`, and `threshold (n_latents,)` where there is
    one."""

    apply_b_dec_to_input: bool = True


class Method(Protocol):
    """A way to train one dictionary. Rows come in scaled to a mean norm of `sqrt(d_in)`."""

    def __init__(self, setup: MethodSetup) -> None: ...

    @property
    def n_dead(self) -> int:
        """Latents that fired in none of the last `dead_after_rows` rows."""

    def initialise(self, rows: "torch.Tensor") -> None:
        """Set the weights before the first step, from a sample (n, d_in) of scaled rows; a function of it and the seed."""

    def step(self, rows: "torch.Tensor", *, rate: float, progress: float) -> StepRecord:
        """Learn from scaled rows (n, d_in), float32.

        Args:
            rows: At least one.
            rate: Share of the peak learning rate, by the schedule.
            progress: Share of the training that is done, 0 at the first step.
        """

    def tensors(self) -> dict[str, "torch.Tensor"]:
        """Return everything that the next step depends on: weights, moments, counters. Not copied."""

    def load(self, tensors: Mapping[str, "torch.Tensor"]) -> None:
        """Continue where `tensors()` was taken."""

    def export(self, scale: float) -> Trained:
        """Return the dictionary for rows before they were multiplied with `scale`."""


_M = TypeVar("_M", bound=type[Any])
_METHODS: dict[str, Callable[[MethodSetup], Method]] = {}


def register_method(name: str) -> Callable[[_M], _M]:
    """Return a decorator that makes a class a training method of that name.

    Raises:
        InvalidInputError: there is another one of that name.
    """

    def register(method: _M) -> _M:
        if _METHODS.get(name, method) is not method:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"there is a training method {name!r} already: choose another name"
            )
        _METHODS[name] = method
        return method

    return register


def method_names() -> list[str]:
    """Return the names of all methods."""
    _load_ours()
    return sorted(_METHODS)


def get_method(name: str) -> Callable[[MethodSetup], Method]:
    """Return the method of that name.

    Raises:
        InvalidInputError: there is none; the message lists what there is.
    """
    _load_ours()
    if name not in _METHODS:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"training method {name!r} is unknown: use one of {', '.join(method_names())}",
        )
    return _METHODS[name]


def _load_ours() -> None:
    from . import batchtopk, jumprelu, topk  # noqa: F401 - they register themselves
