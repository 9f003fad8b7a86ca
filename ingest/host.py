"""What does one worker hold: a loaded model, proved to be captured rightly, that runs units?

A `ModelHost` is a plain object; the Ray backend makes an actor of it, the local backend uses it as it is.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actstore.store import Store, open_store

from .capture import Capturer
from .config import DTYPES, IngestConfig
from .models import load_model
from .self_test import self_test
from .unit import Rows, RunPlan, UnitWriter, WrittenUnit


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a job must know of the model to plan a run; small and free of torch."""

    fingerprint: Mapping[str, Any]
    hook_points: tuple[tuple[str, int], ...]
    """Canonical name and width of every hook point asked for, in layer order."""
    compute_dtype: str
    attn_implementation: str
    context: int | None
    """Most tokens in one window; None where positions are unlimited."""
    vocab_size: int | None
    """Token ids must be below this."""
    equal_lengths: bool = False
    """Whether batches hold windows of one length only, as padding is not invisible to this model."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run's work for workers elsewhere. Opens nothing by itself: it arrives with every unit, the store is opened once."""

    url: str
    version: int
    storage_options: Mapping[str, Any] | None = field(repr=False)
    plan: RunPlan

    def open_store(self) -> Store:
        """Return the store at the version that the job was planned for."""
        return open_store(self.url, version=self.version, storage_options=self.storage_options)


class ModelHost:
    """One copy of the model, loaded when first needed. Two threads may run units at once."""

    def __init__(self, config: IngestConfig, *, threads: int | None) -> None:
        """Remember what to load.

        Args:
            config: The ingest.
            threads: Threads torch computes with; None leaves torch's own choice.
        """
        self._config = config
        self._threads = threads
        self._lock = threading.Lock()
        self._capturer: Capturer | None = None
        self._description: ModelDescription | None = None
        self._bound: tuple[tuple[str, RunPlan], UnitWriter] | None = None

    def describe(self) -> ModelDescription:
        """Load the model, find the hook points, and prove on a probe batch that they are captured rightly.

        Raises:
            NotFoundError: no such model or hook point.
            InvalidInputError: the model cannot be used, or the proof failed.
        """
        with self._lock:
            if self._description is None:
                self._load()
            assert self._description is not None
            return self._description

    def run_unit(self, store: Store, plan: RunPlan, unit: int) -> WrittenUnit:
        """Compute and store one unit of a run; see `UnitWriter.run_unit`."""
        return self._writer(store.url, plan, lambda: store).run_unit(unit)

    def run_job_unit(self, job: Job, unit: int) -> WrittenUnit:
        """Do the same with store and plan as one argument, which Ray keeps once per machine."""
        return self._writer(job.url, job.plan, job.open_store).run_unit(unit)

    def _writer(self, url: str, plan: RunPlan, open_: Callable[[], Store]) -> UnitWriter:
        self.describe()
        with self._lock:
            # The whole plan: two runs of one configuration differ in nothing but the name, and must not share a writer.
            if self._bound is None or self._bound[0] != (url, plan):
                store = open_()
                tokenization = store.tokenization(plan.tokenization)
                writer = UnitWriter(store.storage, tokenization, plan, self._capture_for(plan))
                self._bound = (url, plan), writer
            return self._bound[1]

    def _load(self) -> None:
        import torch

        config = self._config
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        loaded = load_model(
            config.model,
            revision=config.revision,
            dtype=DTYPES.get(config.compute_dtype, "auto"),
            device=config.device,
            attn_implementation=config.attn_implementation,
        )
        names = loaded.map.resolve(list(config.hook_points))
        report = self_test(loaded, names)
        self._capturer = Capturer(loaded, names, equal_lengths=report.equal_lengths)
        self._description = ModelDescription(
            fingerprint=loaded.fingerprint,
            hook_points=tuple((name, self._capturer.widths[name]) for name in names),
            compute_dtype=loaded.dtype,
            attn_implementation=loaded.attn_implementation,
            context=loaded.context_length,
            vocab_size=loaded.vocab_size,
            equal_lengths=report.equal_lengths,
        )

    def _capture_for(self, plan: RunPlan) -> "_BoundCapture":
        assert self._capturer is not None
        stored = next(iter(plan.specs.values())).dtype
        return _BoundCapture(self._capturer, stored_dtype=stored, batch_tokens=self._config.batch_tokens)


@dataclass(frozen=True, slots=True)
class _BoundCapture:
    """A capturer with a run's settings: what `UnitWriter` calls."""

    capturer: Capturer
    stored_dtype: str
    batch_tokens: int

    def __call__(self, token_ids: Rows, window_starts: Rows, out: Mapping[str, Rows]) -> None:
        self.capturer.capture_unit(
            token_ids, window_starts, out, batch_tokens=self.batch_tokens, stored_dtype=self.stored_dtype
        )
