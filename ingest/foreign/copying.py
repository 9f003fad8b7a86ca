"""How do a source's activations become the units of a run?

Units are copied and written two at a time, committed in batches, and sealed when all are there. What was committed before
stays; shards that an earlier call left uncommitted are adopted by `UnitWriter` once they prove to be whole.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from actstore.errors import InvalidInputError
from actstore.ingest.ahead import map_ahead
from actstore.ingest.committer import KIND, Committer, take_over
from actstore.ingest.progress import Progress, ProgressCallback
from actstore.ingest.run_plan import stored_specs
from actstore.ingest.unit import Rows, RunPlan, UnitWriter, WrittenUnit
from actstore.log.values import Collection
from actstore.store import Store
from actstore.tokenization import Tokenization

from .source import ActivationSource

_THREADS = 2
"""One unit is copied while another is written; more would only hold memory."""

_COMMIT_UNITS = 64
_COMMIT_INTERVAL_S = 5.0


def copy_units(
    store: Store,
    collection: Collection,
    tokenization: Tokenization,
    source: ActivationSource,
    *,
    progress: ProgressCallback | None,
) -> int:
    """Copy the run's missing units, commit them and seal the run; return how many there were. Idempotent.

    Raises:
        InvalidInputError: the source is damaged, or holds numbers that are not finite under policy `error`.
        ConflictError: another process has taken the run over, or the source was written to meanwhile.
        StorageError: the storage failed; what is committed is safe.
    """
    plan = RunPlan(
        run=collection.id,
        fingerprint=collection.fingerprint,
        epoch=take_over(store.log, collection.id),
        tokenization=tokenization.id,
        specs=stored_specs(collection.config),
        rows_per_unit=tokenization.rows_per_unit,
        nonfinite=collection.config["nonfinite"],
    )
    done = store.refresh().state.collection(KIND, collection.id).units
    work = [unit for unit in _work(tokenization) if unit.unit not in done]
    n_units = len(tokenization.units)
    committer = Committer(store.log, store.objects, plan)
    lock = threading.Lock()

    def write(unit: _Unit) -> WrittenUnit:
        capture = _CopyUnit(source, unit, collection.config["dtype"], lock)
        return UnitWriter(store.storage, tokenization, plan, capture).run_unit(unit.unit)

    pending: list[WrittenUnit] = []
    since = time.monotonic()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="actstore-import") as pool:
        try:
            for i, written in enumerate(map_ahead(write, work, pool=pool, ahead=_THREADS)):
                pending.append(written)
                if len(pending) == _COMMIT_UNITS or time.monotonic() - since >= _COMMIT_INTERVAL_S:
                    committer.commit(pending)
                    pending, since = [], time.monotonic()
                if progress is not None:
                    progress(Progress("copy", n_units - len(work) + i + 1, n_units, "units"))
        except InvalidInputError:
            if pending:
                committer.commit(pending)
            raise
    if pending:
        committer.commit(pending)
    source.check_unchanged()
    committer.seal(n_units=n_units)
    return len(work)


@dataclass(frozen=True, slots=True)
class _Unit:
    """Where a unit's rows are in the source."""

    unit: int
    first_doc: int
    first_row: int


@dataclass(frozen=True, slots=True)
class _CopyUnit:
    """Copies one unit's rows from the source: what `UnitWriter` calls."""

    source: ActivationSource
    unit: _Unit
    dtype: str
    lock: threading.Lock
    """Held while the source is read: its files have one position each."""

    def __call__(self, token_ids: Rows, window_starts: Rows, out: Mapping[str, Rows]) -> None:
        with self.lock:
            self.source.read(
                self.unit.first_doc, self.unit.first_row, token_ids, window_starts, out, self.dtype
            )


def _work(tokenization: Tokenization) -> Iterator[_Unit]:
    """Yield every unit; its documents are whole, and follow on those of the unit before."""
    first_doc = first_row = 0
    for unit in tokenization.units:
        yield _Unit(unit.unit, first_doc, first_row)
        first_doc, first_row = first_doc + int(unit.meta["n_windows"]), first_row + unit.rows
