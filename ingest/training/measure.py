"""How good is a trained dictionary, by the encoder that everyone will use it through?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.dictionary_data import DictionaryData
from actstore.errors import ActstoreError, ConflictError, InvalidInputError, NotFoundError
from actstore.ingest.dictionaries.encoder import Encoder
from actstore.run import Run

from .language_model import LanguageModel, load_language_model
from .masks import Evaluation, Window
from .report import LossRecovered
from .splice import loss_recovered, why_not_spliced

if TYPE_CHECKING:
    import torch

_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """How well rows are told from their codes."""

    explained_variance: float
    mse: float
    l0: float
    n_rows: int


def measure_reconstruction(
    encoder: Encoder, rows: npt.NDArray[np.float32], *, norm_limit: float
) -> tuple[Reconstruction, npt.NDArray[np.float32]]:
    """Return how well a dictionary reconstructs rows (n, d), and their mean (d,).

    Sums are made in float64. Rows that are not finite or over `norm_limit` are left out. NaN without rows.

    Args:
        encoder: Of the dictionary.
        rows: As they are stored.
        norm_limit: Norm of sinks.
    """
    norms = np.linalg.norm(rows, axis=1)
    rows = rows[np.isfinite(norms) & (norms <= norm_limit)]
    n, d = rows.shape
    if not n:
        return Reconstruction(float("nan"), float("nan"), float("nan"), 0), np.zeros(d, np.float32)
    mean = rows.mean(axis=0, dtype=np.float64)
    error = variance = 0.0
    n_codes = 0
    for start in range(0, n, _BATCH_ROWS):
        block = rows[start : start + _BATCH_ROWS]
        codes = encoder.encode(block)
        n_codes += codes.nnz
        error += float(np.square(encoder.decode(codes).astype(np.float64) - block).sum())
        variance += float(np.square(block - mean).sum())
    explained = 1 - error / variance if variance > 0 else float("nan")
    return Reconstruction(explained, error / (n * d), n_codes / n, n), mean.astype(np.float32)


class LossMeter:
    """Measures the loss recovered at hook points of one run; loads the model when first asked."""

    def __init__(
        self,
        run: Run,
        evaluation: Evaluation,
        *,
        n_rows: int,
        device: "torch.device",
        notice: Callable[[str], None],
    ) -> None:
        """Choose the windows.

        Args:
            run: The run.
            evaluation: Its windows are taken until there are `n_rows` tokens.
            n_rows: 0 for no measuring.
            device: Where the model runs.
            notice: Told what is being done.
        """
        self._run, self._device, self._notice = run, device, notice
        self._windows: list[Window] = []
        found = 0
        for window in evaluation.windows:
            if found < n_rows:
                self._windows.append(window)
                found += len(window.token_ids)
        self._model: LanguageModel | str | None = None if n_rows else "it was not asked for"

    def measure(
        self, hook_point: str, data: DictionaryData, *, mean: npt.NDArray[np.float32], norm_limit: float
    ) -> tuple[LossRecovered | None, str | None]:
        """Return the losses, or None and why there are none."""
        import torch

        why = why_not_spliced(hook_point)
        model = self._loaded() if why is None else why
        if isinstance(model, str):
            return None, model
        encoder = Encoder(data, device=str(self._device), value_dtype="float32")

        def reconstruct(rows: "torch.Tensor") -> "torch.Tensor":
            return torch.from_numpy(encoder.decode(encoder.encode(rows))).to(rows.device)

        self._notice(f"measuring the loss recovered at {hook_point}")
        try:
            found = loss_recovered(
                model,
                hook_point,
                self._windows,
                reconstruct=reconstruct,
                mean=torch.from_numpy(mean).to(self._device),
                norm_limit=norm_limit,
            )
        except InvalidInputError as error:
            return None, error.message
        return found, None

    def _loaded(self) -> LanguageModel | str:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> LanguageModel | str:
        config = self._run.collection.config
        source = self._run.collection.info.get("model_source")
        if "imported" in config["model"] or not source:
            return f"run {self._run.id!r} was imported and has no model"
        self._notice(f"loading {source} with its head")
        try:
            return load_language_model(
                str(source),
                config["model"],
                compute_dtype=str(config["compute_dtype"]),
                attn_implementation=config["attn_implementation"],
                device=self._device,
            )
        except (NotFoundError, InvalidInputError, ConflictError) as error:
            return _message(error)


def _message(error: ActstoreError) -> str:
    return error.message
