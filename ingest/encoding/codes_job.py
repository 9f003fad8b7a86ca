"""How does a worker compute the codes of a unit from its stored rows?"""

import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore.activations import Activations
from actstore.errors import ErrorKind, StorageError
from actstore.ingest.encoding.plan import CodesPlan
from actstore.ingest.encoding.unit_codes import BLOCK_ROWS, TOKEN_COLUMNS, CodesWriter
from actstore.ingest.unit import WrittenUnit
from actstore.store import Store


@dataclass(frozen=True, slots=True)
class CodesTask:
    """Encodes units of a run; a `UnitTask`."""

    plan: CodesPlan
    device: str
    """As torch names it, or `auto`."""
    memory_bytes: int
    """For rows on their way from the storage."""

    def open(self, store: Store) -> "UnitEncoder":
        """Load the dictionary."""
        return UnitEncoder(store, self)


class UnitEncoder:
    """A worker's dictionary and run. Two threads may run units at once: one reads and encodes, the other pools and writes.

    Memory: see `CodesWriter`, and `memory_bytes` of rows that are read ahead; whatever the number of rows.
    """

    def __init__(self, store: Store, task: CodesTask) -> None:
        from actstore.ingest.dictionaries.encoder import Encoder
        from actstore.ingest.models import pick_device

        plan = task.plan
        run = store.run(plan.run)
        self._tokenization = run.tokenization
        self._acts = Activations(
            store.storage, run.collection, plan.hook_point, memory_bytes=task.memory_bytes
        )
        encoder = Encoder(
            store.dictionary(plan.dictionary),
            device=str(pick_device(task.device)),
            dtype=plan.settings.compute_dtype,
            value_dtype=plan.settings.value_dtype,
        )
        self._writer = CodesWriter(store.storage, self._tokenization, plan, encoder)
        self._stop = threading.Event()

    def __call__(self, unit: int) -> WrittenUnit:
        """Encode and store one unit; safe to repeat.

        Raises:
            InvalidInputError: a code too large for the stored dtype.
            StorageError: the storage failed, or `stop` was called.
            FormatError: stored rows are missing or damaged.
        """
        tokens = self._tokenization.unit_table(unit, TOKEN_COLUMNS)
        encoded = self._writer.encode(self._blocks(unit))
        n_rows = encoded.codes.n_rows
        kept = None
        if self._acts.layout.kept is not None:
            kept = self._acts.layout.kept.offsets(unit, n_rows)
        began = time.perf_counter()
        attempt = uuid.uuid4().hex
        stored = self._writer.store(unit, attempt, encoded, tokens, kept=kept)
        return WrittenUnit(
            unit=unit,
            rows=stored.rows,
            nonfinite=0,
            attempt=attempt,
            objects=stored.objects,
            meta=stored.meta,
            nbytes=sum(o.nbytes for o in stored.objects),
            rows_read=n_rows,
            rows_forwarded=n_rows,
            timings_s={"forward": encoded.seconds, "write": time.perf_counter() - began},
        )

    def stop(self) -> None:
        """Have units end before their next block."""
        self._stop.set()

    def _blocks(self, unit: int) -> Iterator[npt.NDArray[np.float32]]:
        for _, block in self._acts.scan(BLOCK_ROWS, units=[unit]):
            if self._stop.is_set():
                raise StorageError(
                    ErrorKind.INTERRUPTED, f"unit {unit} was given up as the job ends: run the same again"
                )
            yield block
            del block  # its memory is read into again
