"""What does one call do of a training: its steps, its checkpoints, and at the end the measuring and the storing?"""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from actstore.dictionary_data import DictionaryData
from actstore.ingest.dictionaries.encoder import Encoder
from actstore.ingest.dictionaries.save import save_dictionary
from actstore.ingest.models import pick_device
from actstore.log.canonical import canonical_json
from actstore.run import Run
from actstore.store import Store

from .checkpoint import Checkpoint, CheckpointFolder
from .config import SaeTrainConfig
from .hook_training import HookTraining, StepValues
from .masks import TokenMask, choose_evaluation, norm_limit
from .measure import LossMeter, measure_reconstruction
from .methods import MethodSetup
from .report import HookPointReport, SaeTrainReport
from .rows import Batch, RowStream

if TYPE_CHECKING:
    import torch

_DEAD_AFTER_ROWS = 10_000_000
_DEAD_SHARE = 8
_INIT_ROWS = 16_384
"""Rows that scale, bias and thresholds begin from."""
_PROGRESS_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """How far a training has come."""

    steps_done: int
    n_steps: int
    elapsed_s: float
    """Of this job."""

    rows_this_job: int
    latest: dict[str, StepValues]
    """Hook point to what its last step measured."""


ProgressCallback = Callable[[TrainProgress], None]
Notice = Callable[[str], None]


def training_id(config: SaeTrainConfig, run: Run, hook_point: str) -> str:
    """Return the hash of everything that decides a dictionary, but the rows that the run had."""
    of = {**config.identity(), "run": run.collection.fingerprint, "hook_point": hook_point}
    return hashlib.sha256(canonical_json(of)).hexdigest()


def job_identity(config: SaeTrainConfig, run: Run, names: dict[str, str]) -> dict[str, Any]:
    """Return what a checkpoint must agree on with the training that goes on from it, as JSON."""
    return {
        **config.identity(),
        "run": run.id,
        "run_fingerprint": run.collection.fingerprint,
        "dictionaries": names,
    }


class TrainingJob:
    """One call's part of a training."""

    def __init__(
        self,
        run: Run,
        names: dict[str, str],
        config: SaeTrainConfig,
        folder: CheckpointFolder,
        checkpoint: Checkpoint | None,
        say: Notice,
        progress: ProgressCallback | None,
    ) -> None:
        self._run, self._names, self._config, self._folder = run, names, config, folder
        self._say, self._progress = say, progress
        self._device = _device(config.device)
        masks = {"special": config.mask_special, "sinks": config.mask_sinks}
        say("choosing documents to measure on")
        self._evaluation = choose_evaluation(run, n_rows=config.eval_rows, seed=config.seed, **masks)
        held_out = self._evaluation.documents[: None if self._evaluation.is_held_out else 0]
        self._stream = RowStream(
            [run.activations(name) for name in names],
            TokenMask(run, held_out=held_out, **masks),
            batch_rows=config.batch_rows,
            buffer_rows=config.buffer_rows,
            seed=config.seed,
            pin=self._device.type == "cuda",
        )
        self._n_steps = self._count_steps()
        self._trainings = [self._training(hook_point) for hook_point in names]
        self._state = self._stream.state()
        self._done = self._first = 0
        self._elapsed = 0.0
        self._rows_this_job = 0
        self._checkpoint = checkpoint
        if checkpoint is not None:
            self._load(checkpoint)

    def train(self, stop: threading.Event) -> bool:
        """Take the steps that are left; return whether all are done. A checkpoint is made in any case."""
        config = self._config
        if self._done < self._n_steps:
            self._say(
                f"training {len(self._trainings)} x {config.n_latents:,} latents ({config.method}, k {config.k}) on "
                f"{self._device}, steps {self._done:,} to {self._n_steps:,} of {config.batch_rows:,} rows"
            )
        started = saved = shown = time.monotonic()
        with self._stream.reading() as batches:
            for batch in islice(self._batches(batches), self._n_steps - self._done):
                self._step(batch)
                now = time.monotonic()
                self._elapsed = now - started
                is_last = self._done == self._n_steps
                if self._progress is not None and (is_last or now - shown >= _PROGRESS_EVERY_S):
                    self._progress(self._progress_now())
                    shown = time.monotonic()
                if stop.is_set():
                    break
                if now - saved >= config.checkpoint_every_s:
                    self._save()
                    saved = time.monotonic()
        if self._done > self._first:
            self._save()
        return self._done == self._n_steps

    def finish(self, store: Store) -> tuple[HookPointReport, ...]:
        """Measure and store the dictionaries."""
        meter = LossMeter(
            self._run, self._evaluation, n_rows=self._config.loss_rows, device=self._device, notice=self._say
        )
        rows = self._evaluation_rows()
        reports = []
        for training in self._trainings:
            self._say(f"measuring {training.name} on {len(rows):,} rows")
            report = self._measure(training, meter, rows)
            data = self._data(training, report)
            save_dictionary(store, training.name, data)
            reports.append(report)
        return tuple(reports)

    def report(self, version: int, hook_points: tuple[HookPointReport, ...]) -> SaeTrainReport:
        """Return what was done."""
        rate = self._rows_this_job / self._elapsed if self._elapsed > 0 else 0.0
        return SaeTrainReport(
            run=self._run.id,
            is_complete=bool(hook_points),
            n_steps=self._n_steps,
            steps_done=self._done,
            steps_this_job=self._done - self._first,
            elapsed_s=self._elapsed,
            rows_per_s=rate,
            version=version,
            hook_points=hook_points,
            checkpoint_dir=None if hook_points else str(self._folder.folder),
        )

    def _count_steps(self) -> int:
        n_stored = self._run.n_rows
        epochs, rest = divmod(self._config.n_rows or n_stored, n_stored)
        return epochs * self._stream.n_batches + -(-rest // self._config.batch_rows)

    def _training(self, hook_point: str) -> HookTraining:
        import torch

        config = self._config
        n_rows = config.n_rows or self._run.n_rows
        usual = max(config.batch_rows, min(_DEAD_AFTER_ROWS, n_rows // _DEAD_SHARE))
        is_half = config.dtype == "bfloat16" or (config.dtype == "auto" and self._device.type == "cuda")
        setup = MethodSetup(
            config=config,
            d_in=self._run.d_model(hook_point),
            n_steps=self._n_steps,
            dead_after_rows=config.dead_after_rows or usual,
            device=self._device,
            matmul_dtype=torch.bfloat16 if is_half else torch.float32,
        )
        limit = norm_limit(self._run, hook_point, sinks=config.mask_sinks)
        return HookTraining(hook_point, self._names[hook_point], setup, norm_limit=limit)

    def _batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; at the very beginning, the weights are set from the first of them."""
        if self._checkpoint is None:
            first: list[Batch] = []
            for batch in islice(batches, min(self._n_steps, self._stream.n_batches)):
                first.append(batch)
                if sum(len(b.rows) for b in first) >= _INIT_ROWS:
                    break
            for training in self._trainings:
                training.initialise([b.values[training.hook_point] for b in first])
            yield from first
        yield from batches

    def _step(self, batch: Batch) -> None:
        rate = learning_rate_factor(
            self._done,
            n_steps=self._n_steps,
            warmup=self._config.warmup_share,
            decay=self._config.decay_share,
        )
        for training in self._trainings:
            training.step(
                batch.values[training.hook_point],
                n_read=batch.n_read,
                step=self._done,
                rate=rate,
                progress=self._done / self._n_steps,
            )
        self._state = dict(batch.state)
        self._rows_this_job += batch.n_read
        self._done += 1

    def _progress_now(self) -> TrainProgress:
        latest = {t.hook_point: t.values() for t in self._trainings}
        return TrainProgress(self._done, self._n_steps, self._elapsed, self._rows_this_job, latest)

    def _save(self) -> None:
        values = {
            "identity": job_identity(self._config, self._run, self._names),
            "version": self._run.store.version,
            "rows": self._state,
            "trainings": [training.to_json() for training in self._trainings],
        }
        tensors = {
            f"{i}/{name}": tensor
            for i, training in enumerate(self._trainings)
            for name, tensor in training.method.tensors().items()
        }
        self._folder.save(Checkpoint(self._done, values, tensors))

    def _load(self, checkpoint: Checkpoint) -> None:
        self._stream.load_state(checkpoint.values["rows"])
        self._state = checkpoint.values["rows"]
        self._done = self._first = checkpoint.step
        for i, training in enumerate(self._trainings):
            prefix = f"{i}/"
            tensors = {
                k.removeprefix(prefix): t for k, t in checkpoint.tensors.items() if k.startswith(prefix)
            }
            training.load(checkpoint.values["trainings"][i], tensors)

    def _evaluation_rows(self) -> Any:
        rows = self._evaluation.rows()
        return rows[self._run.activations(next(iter(self._names))).exist(rows)]

    def _measure(self, training: HookTraining, meter: LossMeter, rows: Any) -> HookPointReport:
        data = self._data(training, None)
        values = self._run.activations(training.hook_point).read(rows)
        encoder = Encoder(data, device=str(self._device), value_dtype="float32")
        found, mean = measure_reconstruction(encoder, values, norm_limit=training.norm_limit)
        loss, note = meter.measure(training.hook_point, data, mean=mean, norm_limit=training.norm_limit)
        return HookPointReport(
            hook_point=training.hook_point,
            dictionary=training.name,
            explained_variance=found.explained_variance,
            mse=found.mse,
            l0=found.l0,
            dead_share=training.method.n_dead / self._config.n_latents,
            n_eval_rows=found.n_rows,
            is_held_out=self._evaluation.is_held_out,
            n_trained_rows=training.n_trained,
            n_masked_rows=training.n_read - training.n_trained,
            loss=loss,
            loss_note=note,
        )

    def _data(self, training: HookTraining, report: HookPointReport | None) -> DictionaryData:
        config = self._config
        record = {
            "config": config.identity(),
            "run": self._run.id,
            "version": self._run.store.version,
            "n_steps": self._n_steps,
            "scale": training.scale,
            "dead_after_rows": training.setup.dead_after_rows,
            "curve": {"columns": ["step", "fvu", "l0", "n_dead"], "points": training.to_json()["curve"]},
            "report": None if report is None else report.to_json(),
        }
        return training.data(
            {"training": record},
            prepend_bos=self._evaluation.begins_with_special,
            model=dict(self._run.collection.config["model"]),
            source={
                "format": "actstore",
                "method": config.method,
                "training": training_id(config, self._run, training.hook_point),
            },
        )


def learning_rate_factor(step: int, *, n_steps: int, warmup: float, decay: float) -> float:
    """Return the share of the peak learning rate at a step: a linear rise, level, a linear fall that ends above 0.

    >>> [learning_rate_factor(s, n_steps=10, warmup=0.2, decay=0.4) for s in (0, 1, 5, 6, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.25]
    """
    rising, falling = math.ceil(warmup * n_steps), math.ceil(decay * n_steps)
    up = (step + 1) / rising if step < rising else 1.0
    down = (n_steps - step) / falling if falling else 1.0
    return min(up, down, 1.0)


def _device(asked: str) -> "torch.device":
    import torch

    # Not `auto` of models: nothing here was ever tried on Apple's GPUs.
    return pick_device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)
