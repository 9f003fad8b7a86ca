"""A unit job whose units say their number: for tests of the job itself. Also run as a process of its own, to be killed."""

import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import actstore
from actstore.errors import ErrorKind, InvalidInputError, StorageError
from actstore.ingest.unit import WrittenUnit
from actstore.ingest.unit_collection import ensure_collection, seal_collection
from actstore.ingest.unit_job import run_unit_job
from actstore.storage import write_new


def rows_of(unit: int) -> int:
    return unit % 5 + 1


def body(unit: int) -> bytes:
    return b"unit %d" % unit * 100


@dataclass(frozen=True)
class ToyTask:
    """Writes what `body` says of a unit."""

    pause_s: float = 0.0
    broken: tuple[int, ...] = ()
    """Units that can never be."""
    flaky: tuple[int, ...] = ()
    """Units whose first try in a process fails."""
    wrong: tuple[int, ...] = ()
    """Units that count a row too few."""
    unopenable: bool = False

    def open(self, store):
        if self.unopenable:
            raise InvalidInputError(ErrorKind.BAD_ARGUMENT, "the task cannot be opened")
        return ToyRunner(store, self)


class ToyRunner:
    def __init__(self, store, task: ToyTask) -> None:
        self.store, self.task, self.tried, self.is_stopped = store, task, set(), False

    def __call__(self, unit: int) -> WrittenUnit:
        task = self.task
        end = time.monotonic() + task.pause_s
        while time.monotonic() < end and not self.is_stopped:
            time.sleep(0.005)
        if self.is_stopped:
            raise StorageError(ErrorKind.INTERRUPTED, "stopped")
        if unit in task.broken:
            raise InvalidInputError(ErrorKind.NON_FINITE, f"unit {unit} can never be")
        if unit in task.flaky and unit not in self.tried:
            self.tried.add(unit)
            raise StorageError(ErrorKind.STORAGE_FAILED, "the first try fails")
        attempt = uuid.uuid4().hex
        obj = write_new(self.store.storage, f"toys/t/{unit:08}-{attempt}.bin", [body(unit)])
        rows = rows_of(unit) - (unit in task.wrong)
        return WrittenUnit(
            unit=unit,
            rows=rows,
            nonfinite=0,
            attempt=attempt,
            objects=(obj,),
            meta={"unit": unit},
            nbytes=obj.nbytes,
            rows_read=rows,
            rows_forwarded=rows,
        )

    def stop(self) -> None:
        self.is_stopped = True


def run(store, task=None, *, n_units: int = 12, **options):
    """Run what is pending of `n_units` and seal the collection when all is there."""
    collection = ensure_collection(store, "toy", "t", {"format": 1, "n_units": n_units})
    pending = [u for u in range(n_units) if u not in collection.units]
    outcome = run_unit_job(
        store, kind="toy", id="t", task=task or ToyTask(), pending=pending, rows_of=rows_of,
        **{"commit_interval_s": 0.05, "retry_s": 0.2, **options},
    )  # fmt: skip
    if not outcome.stopped:
        seal_collection(store, "toy", "t", n_units=n_units)
    return outcome


def check(store, n_units: int = 12) -> None:
    found = store.refresh().state.collection("toy", "t")
    assert found.is_sealed
    assert sorted(found.units) == list(range(n_units))
    for u, unit in found.units.items():
        assert unit.rows == rows_of(u)
        assert dict(unit.meta) == {"unit": u}
        assert store.objects.read(unit.objects[0]) == body(u)


def main() -> None:
    url, ready = sys.argv[1:3]

    def progress(p) -> None:
        Path(ready).write_text(str(p.units_done))

    run(actstore.open(url), ToyTask(pause_s=0.15), n_units=40, progress=progress, commit_units=1)


if __name__ == "__main__":
    main()
