"""How long will a unit take, and what will it weigh? Found by doing a part of one, and throwing the result away.

A part of a unit's windows goes through everything that a unit goes through (forward pass, statistics, pooling, encoding,
hashing), with a storage that keeps nothing. What is measured is this machine, this model and these documents.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from actstore.corpus import Corpus
from actstore.log.values import Collection, StoredObject, Unit
from actstore.objects import ObjectReader
from actstore.storage.base import Buffer, PutOutcome
from actstore.tokenization import Tokenization

from .capture import Capturer
from .unit import CaptureUnit, RunPlan, UnitWriter, window_starts

_FIRST_TOKENS = 1_024
"""Enough for a first idea of the speed, little enough for a large model on a CPU."""

_SHARE = 0.6
"""Of the time that is left, for the part that is measured: what is predicted from the first tokens may be wrong by as much."""

_FEWEST_PARTS = 9
_STEADY_S = 5.0
"""A small part is done again, for the middle one, this often and this long: on a busy machine a second says little."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a part of a unit took on one worker."""

    n_tokens: int
    seconds: float
    """All of it, from tokens to objects that could be written."""
    forward_s: float
    """Of that, in the model; what is around it runs beside the next unit's forward pass."""
    objects: Mapping[str, tuple[int, int]]
    """Folder below the run (`stats`, `sums`, `pooled`, ...; a hook point's folder for shards): number and bytes of objects."""
    n_documents: int
    """Documents in the part."""
    parameter_bytes: int
    """Of the model, buffers included, wherever they are."""
    device: str
    peak_device_bytes: int | None
    """Most memory that torch held on the device; None where it does not count it."""
    context: Mapping[str, int]
    """What the model's configuration says of its size: `hidden_size`, `intermediate_size`, `num_attention_heads`."""

    @property
    def rows_per_s(self) -> float:
        """Token rows per second of one worker: passes and writing overlap on a device, and share the cores of a CPU."""
        busy = self.seconds if self.device == "cpu" else max(self.forward_s, self.seconds - self.forward_s)
        return self.n_tokens / busy if busy else 0.0


@dataclass(frozen=True, slots=True)
class _Part:
    """One time that a part of the unit was done."""

    n_tokens: int
    n_documents: int
    seconds: float
    forward_s: float
    objects: Sequence[StoredObject]


def run_probe(
    capturer: Capturer,
    capture: CaptureUnit,
    plan: RunPlan,
    config: Mapping[str, Any],
    tokens: pa.Table,
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Probe:
    """Return what about `seconds` of a unit's work take. Writes nothing.

    A first, small part warms up (compilation, allocations) and says how much fits into the time; no window is cut.

    Args:
        capturer: The model.
        capture: As `UnitWriter` calls it.
        plan: Of the run that there may be.
        config: Of the tokenization.
        tokens: One unit's, all columns.
        seconds: Time for both parts together, about: a window that has begun is finished.
        clock: Tells the time.
    """
    starts = window_starts(tokens["doc_id"].to_numpy(), tokens["window"].to_numpy())
    timed = _TimedCapture(capture, clock)

    def work(n_tokens: int) -> _Part:
        stop = int(starts[max(1, int(np.searchsorted(starts, n_tokens, side="right")) - 1)])
        tokens_part = tokens.slice(0, stop)
        began, timed.seconds = clock(), 0.0
        written = UnitWriter(_Nowhere(), table_tokenization(tokens_part, config), plan, timed).run_unit(0)
        n_documents = len(np.unique(tokens_part["doc_id"].to_numpy()))
        return _Part(stop, n_documents, clock() - began, timed.seconds, written.objects)

    end = clock() + seconds
    work(_FIRST_TOKENS)  # pays for what is paid once
    parts = [work(_FIRST_TOKENS)]
    left = end - clock()
    if parts[0].n_tokens < tokens.num_rows and left * _SHARE > parts[0].seconds:
        _reset_peak(capturer)
        parts = [work(int(parts[0].n_tokens * left * _SHARE / parts[0].seconds))]
    while end - clock() > parts[-1].seconds and (
        len(parts) < _FEWEST_PARTS or sum(p.seconds for p in parts) < _STEADY_S
    ):
        parts.append(work(parts[-1].n_tokens))
    part = sorted(parts, key=lambda p: p.seconds)[len(parts) // 2]
    model = capturer.loaded.model
    sizes = capturer.loaded.config.get_text_config()
    return Probe(
        n_tokens=part.n_tokens,
        seconds=part.seconds,
        forward_s=part.forward_s,
        objects=_by_folder(plan.run, part.objects),
        n_documents=part.n_documents,
        parameter_bytes=sum(t.nbytes for t in [*model.parameters(), *model.buffers()]),
        device=capturer.loaded.device.type,
        peak_device_bytes=_peak(capturer),
        context={
            name: int(value)
            for name in ("hidden_size", "intermediate_size", "num_attention_heads")
            if isinstance(value := getattr(sizes, name, None), int)
        },
    )


def table_tokenization(tokens: pa.Table, config: Mapping[str, Any]) -> Tokenization:
    """Return a tokenization that has one unit, 0, with these tokens, and is in no store."""
    unit = Unit(0, tokens.num_rows, 0, "probe", (StoredObject("tokens", 1, "0" * 64),), {}, 0)
    collection = Collection(
        kind="tokenization",
        id="probe",
        config=config,
        fingerprint="0" * 64,
        info={},
        version=0,
        units={0: unit},
        rows=tokens.num_rows,
    )
    objects = cast(ObjectReader, _OneTable(tokens))
    return Tokenization(collection, Corpus(collection, objects), objects)


class _OneTable:
    """Reads one table, whatever is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def table(self, _obj: StoredObject, columns: Sequence[str] | None = None) -> pa.Table:
        return self._table if columns is None else self._table.select(list(columns))


class _TimedCapture:
    """A capture that notes how long it took."""

    def __init__(self, capture: CaptureUnit, clock: Callable[[], float]) -> None:
        self._capture, self._clock, self.seconds = capture, clock, 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        began = self._clock()
        result = self._capture(*args, **options)
        self.seconds += self._clock() - began
        return result


class _Nowhere:
    """A storage that takes everything and keeps nothing."""

    url = "nowhere"
    writable = True

    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:  # noqa: ARG002
        return PutOutcome.CREATED

    def put_hint(self, key: str, data: bytes) -> None:
        """Keep nothing."""

    def delete(self, key: str) -> None:
        """Have nothing to delete."""

    def get(self, key: str) -> bytes | None:  # noqa: ARG002
        return None

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:  # noqa: ARG002
        return None

    def read_into(self, key: str, start: int, out: memoryview) -> int | None:  # noqa: ARG002
        return None

    def head(self, key: str) -> int | None:  # noqa: ARG002
        return None

    def list(self, prefix: str) -> Iterator[str]:  # noqa: ARG002
        return iter(())

    def local_path(self, key: str) -> str | None:  # noqa: ARG002
        return None


def _by_folder(run: str, objects: Sequence[StoredObject]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for obj in objects:
        folder = obj.key.removeprefix(f"runs/{run}/").partition("/")[0]
        n, nbytes = found.get(folder, (0, 0))
        found[folder] = (n + 1, nbytes + obj.nbytes)
    return found


def _reset_peak(capturer: Capturer) -> None:
    if capturer.loaded.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(capturer.loaded.device)


def _peak(capturer: Capturer) -> int | None:
    if capturer.loaded.device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(capturer.loaded.device))
