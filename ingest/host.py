"""What does one worker hold: a loaded model, proved to be captured rightly, that runs units?

A `ModelHost` is a plain object; the Ray backend makes an actor of it, the local backend uses it as it is.
"""

import copy
import itertools
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from actstore.dtypes import FLOAT_DTYPES, stored_dtype
from actstore.store import Store, open_store

from .calibrate import Moments, measure_moments
from .capture import Capturer
from .check_documents import check_documents
from .check_rows import DocumentCheck
from .config import DTYPES, IngestConfig
from .encoding.writers import open_writers
from .host_memory import keep_freed_memory, release_freed_memory
from .models import LoadedModel, load_model
from .probe import Probe, run_probe
from .self_test import self_test
from .unit import Rows, RunPlan, UnitWriter, WrittenUnit

_LOGICAL = {stored_dtype(name): name for name in FLOAT_DTYPES}
"""Numpy's type of an array to fill, to the type that it stands for."""


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
    compile: bool = False
    """Whether it computes through torch.compile."""
    heads: Mapping[str, int] = field(default_factory=dict)
    """Hook point to number of attention heads, for those whose columns are heads side by side."""


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

    def __init__(self, config: IngestConfig, *, threads: int | None, streams: int = 1) -> None:
        """Remember what to load.

        Args:
            config: The ingest.
            threads: Threads torch computes with; None leaves torch's own choice.
            streams: Units that may be computed at once on the CPU, sharing the threads; see `_add_streams`.
        """
        self._config = config
        self._threads = threads
        self._n_streams = streams
        self._streams: queue.SimpleQueue[Capturer] = queue.SimpleQueue()
        self._stream_threads: int | None = None
        self._all_threads = 0
        self._lock = threading.Lock()
        self._capturer: Capturer | None = None
        self._description: ModelDescription | None = None
        self._bound: tuple[tuple[str, RunPlan], UnitWriter] | None = None
        self._stop = threading.Event()

    @property
    def in_flight(self) -> int:
        """Units to have at once once the model is loaded: those computed, and one that is written meanwhile."""
        return self._n_streams + 1

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

    def stop(self) -> None:
        """Have units that are being computed end before their next batch with a StorageError INTERRUPTED, and all later ones."""
        self._stop.set()

    def resume(self) -> None:
        """Compute units again after `stop`."""
        self._stop.clear()

    def close(self) -> None:
        """Give back what memory the process kept for the next batch, and torch its threads."""
        if self._stream_threads is not None:
            import torch

            torch.set_num_threads(self._all_threads)
        if self._capturer is not None and self._capturer.loaded.device.type == "cpu":
            release_freed_memory()

    def calibrate(self, token_ids: Rows, window_starts: Rows) -> dict[str, Moments]:
        """Return mean and standard deviation of every hook point's channels; see `calibrate.measure_moments`."""
        self.describe()
        assert self._capturer is not None
        with self._lock:
            return measure_moments(self._capturer, token_ids, window_starts)

    def probe(self, plan: RunPlan, config: Mapping[str, Any], tokens: pa.Table, seconds: float) -> Probe:
        """Return how long a part of a unit takes, and what memory; stores nothing. See `probe.run_probe`."""
        self.describe()
        assert self._capturer is not None
        with self._lock:
            return run_probe(self._capturer, self._capture(), plan, config, tokens, seconds=seconds)

    def check_documents(self, store: Store, run: str, documents: Sequence[int]) -> list[DocumentCheck]:
        """Return how far stored documents are from what the model computes on them alone; see `check_documents`."""
        self.describe()
        assert self._capturer is not None
        with self._lock:
            return check_documents(self._capturer.loaded, store, run, documents)

    @property
    def _device(self) -> str:
        assert self._capturer is not None
        return str(self._capturer.loaded.device)

    def _writer(self, url: str, plan: RunPlan, open_: Callable[[], Store]) -> UnitWriter:
        self.describe()
        with self._lock:
            # The whole plan: two runs of one configuration differ in nothing but the name, and must not share a writer.
            if self._bound is None or self._bound[0] != (url, plan):
                store = open_()
                tokenization = store.tokenization(plan.tokenization)
                codes = open_writers(store, tokenization, plan.codes, device=self._device)
                writer = UnitWriter(
                    store.storage, tokenization, plan, self._capture(), streams=self._n_streams, codes=codes
                )
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
            compile=config.compile,
            device_map=config.device_map,
            hook_points=list(config.hook_points),
        )
        if loaded.device.type == "cpu":
            keep_freed_memory()
        names = loaded.map.resolve(list(config.hook_points))
        report = self_test(loaded, names)
        self._capturer = Capturer(loaded, names, equal_lengths=report.equal_lengths)
        self._add_streams(loaded, names, report.equal_lengths)
        self._description = ModelDescription(
            fingerprint=loaded.fingerprint,
            hook_points=tuple((name, self._capturer.widths[name]) for name in names),
            compute_dtype=loaded.dtype,
            attn_implementation=loaded.attn_implementation,
            context=loaded.context_length,
            vocab_size=loaded.vocab_size,
            equal_lengths=report.equal_lengths,
            compile=config.compile,
            heads=dict(self._capturer.heads),
        )

    def _add_streams(self, loaded: LoadedModel, names: Sequence[str], equal_lengths: bool) -> None:
        """Make ready to compute several units at once on a CPU, each with its share of the threads.

        A unit that is written takes a core now and then. Where all threads compute one unit, all of them wait for the one that
        lost its core; where each computes its own, only that one does. The modules of the model are copied, for their hooks;
        the weights are shared.
        """
        import torch

        assert self._capturer is not None
        self._streams.put(self._capturer)
        n_threads = torch.get_num_threads()
        one_cpu = loaded.device.type == "cpu" and not loaded.is_spread and not loaded.compile
        if n_threads < self._n_streams or not one_cpu:
            self._n_streams = 1
        if self._n_streams == 1:
            return
        self._all_threads, self._stream_threads = n_threads, n_threads // self._n_streams
        for _ in range(self._n_streams - 1):
            shared = {id(t): t for t in itertools.chain(loaded.model.parameters(), loaded.model.buffers())}
            twin = replace(loaded, model=copy.deepcopy(loaded.model, shared))
            self._streams.put(Capturer(twin, names, equal_lengths=equal_lengths))

    def _capture(self) -> "_BoundCapture":
        return _BoundCapture(
            self._streams, self._stream_threads, self._config.batch_tokens, self._stop.is_set
        )


@dataclass(frozen=True, slots=True)
class _BoundCapture:
    """Capturers with a run's settings: what `UnitWriter` calls, at most as many at once as there are."""

    capturers: "queue.SimpleQueue[Capturer]"
    threads: int | None
    """Of torch, for each; None for what is set."""
    batch_tokens: int
    should_stop: Callable[[], bool]

    def __call__(self, token_ids: Rows, window_starts: Rows, out: Mapping[str, Rows]) -> int:
        """Capture a unit, and return how many of its tokens went through the model."""
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)  # of this thread
        seen: list[int] = []
        capturer = self.capturers.get()
        try:
            capturer.capture_unit(
                token_ids,
                window_starts,
                out,
                batch_tokens=self.batch_tokens,
                stored_dtype=_LOGICAL[next(iter(out.values())).dtype],
                should_stop=self.should_stop,
                on_batch=seen.append,
            )
        finally:
            self.capturers.put(capturer)
        return sum(seen)
