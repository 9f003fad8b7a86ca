"""Workers that make codes of synthetic activations, slowly, leaving the process ids that a test may kill.

Nothing here imports the tests' own settings: Ray gets it by value.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from actstore.ingest.encoding.writers import open_writers
from actstore.ingest.task_host import UnitTask
from actstore.ingest.unit import UnitWriter
from tests.ingest import synthetic


def make_writer(store, plan, value=synthetic.numbers) -> UnitWriter:
    """The synthetic model with dictionaries behind it, as a real worker has them."""
    made = synthetic.make_writer(store, plan, value)
    tokenization = store.tokenization(plan.tokenization)
    codes = open_writers(store, tokenization, plan.codes, device="cpu")
    return UnitWriter(store.storage, tokenization, plan, made._capture, codes=codes)


class CodesHost(synthetic.SyntheticHost):
    """What a Ray actor holds instead of a model; `FOLDER/begun-UNIT-PID` says who began what. `FOLDER` is `config.model`."""

    def __init__(self, config, *, threads) -> None:
        super().__init__(config, threads=threads)
        self._folder = Path(config.model)

    def run_job_unit(self, job, unit):
        begin(self._folder, unit)
        self._writer = self._writer or make_writer(job.open_store(), job.plan)
        return self._writer.run_unit(unit)


@dataclass(frozen=True)
class SlowTask:
    """Another task, slowly."""

    task: UnitTask
    folder: str

    def open(self, store):
        run_unit = self.task.open(store)

        def run_slowly(unit):
            begin(Path(self.folder), unit)
            return run_unit(unit)

        return run_slowly


def begin(folder: Path, unit: int) -> None:
    (folder / f"begun-{unit:04}-{os.getpid()}").touch()
    time.sleep(0.2)


def busiest(folder: Path) -> int:
    """The process that began most units and is still there."""
    counts: dict[int, int] = {}
    for path in folder.glob("begun-*"):
        pid = int(path.name.rsplit("-", 1)[1])
        counts[pid] = counts.get(pid, 0) + 1
    return max(counts, key=lambda pid: counts[pid])
