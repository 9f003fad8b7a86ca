"""The scheduler against a pool whose every event the test decides."""

import threading
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ErrorKind, InvalidInputError, StorageError
from actstore.ingest.local_pool import LocalPool
from actstore.ingest.scheduler import Completion, Scheduler
from actstore.ingest.unit import WrittenUnit


def written(unit: int) -> WrittenUnit:
    return WrittenUnit(unit=unit, rows=unit + 1, nonfinite=0, attempt="a", objects=())


class ScriptedPool:
    """Ends units in an order drawn by the test; fails those it is told to, as often as it is told to."""

    def __init__(self, capacity, order, failures=None, error=None):
        self.capacity = capacity
        self.failures = dict(failures or {})
        self.error = error or StorageError(ErrorKind.STORAGE_FAILED, "a passing fault")
        self.order = order
        self.in_flight = []
        self.most_in_flight = 0
        self.submitted = []

    def submit(self, unit):
        self.submitted.append(unit)
        self.in_flight.append(unit)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))

    def wait(self, timeout_s):
        unit = self.in_flight.pop(self.order(len(self.in_flight)))
        if self.failures.get(unit, 0):
            self.failures[unit] -= 1
            return [Completion(unit, error=self.error)]
        return [Completion(unit, written=written(unit))]

    def close(self):
        pass


def schedule(pool, pending, *, stop=None, commit_units=3, on_batch=lambda batch: None, clock=lambda: 0.0):
    batches = []

    def commit(batch):
        on_batch(batch)
        batches.append([u.unit for u in batch])

    scheduler = Scheduler(
        pool, commit, max_attempts=3, commit_units=commit_units, commit_interval_s=5.0,
        stop=stop or threading.Event(), on_commit=lambda batch, counters: None, clock=clock,
    )  # fmt: skip
    return batches, lambda: scheduler.run(pending)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 30), st.integers(1, 6))
def test_every_unit_is_committed_once_whatever_the_order_and_the_faults(data, n, capacity):
    failures = data.draw(st.dictionaries(st.integers(0, max(0, n - 1)), st.integers(0, 2)))
    pool = ScriptedPool(capacity, lambda size: data.draw(st.integers(0, size - 1)), failures)
    batches, run = schedule(pool, range(n))
    counters = run()
    assert sorted(u for b in batches for u in b) == list(range(n))
    assert all(len(b) <= 3 for b in batches)
    assert pool.most_in_flight <= capacity
    assert (counters.planned, counters.committed, counters.failed, counters.abandoned) == (n, n, 0, 0)
    assert counters.retries == sum(v for u, v in failures.items() if u < n)


def test_a_unit_that_keeps_failing_ends_the_job_after_what_was_written_is_committed():
    pool = ScriptedPool(2, lambda size: 0, {4: 99})
    batches, run = schedule(pool, range(10))
    with pytest.raises(StorageError, match="a passing fault"):
        run()
    committed = [u for b in batches for u in b]
    assert {0, 1, 2, 3} <= set(committed)
    assert 4 not in committed
    assert pool.submitted.count(4) == 3


def test_bad_data_is_not_tried_again():
    pool = ScriptedPool(1, lambda size: 0, {1: 1}, InvalidInputError(ErrorKind.NON_FINITE, "NaN"))
    batches, run = schedule(pool, range(3))
    with pytest.raises(InvalidInputError, match="NaN"):
        run()
    assert batches == [[0]]
    assert pool.submitted == [0, 1]


def test_a_foreign_exception_becomes_one_of_the_tree_with_its_cause():
    pool = ScriptedPool(1, lambda size: 0, {0: 99}, RuntimeError("the actor died"))
    _, run = schedule(pool, range(1))
    with pytest.raises(StorageError, match=r"unit 0 failed 3 times.*the actor died") as caught:
        run()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_stop_finishes_what_runs_and_begins_nothing():
    stop = threading.Event()
    pool = ScriptedPool(2, lambda size: 0)
    batches, run = schedule(pool, range(10), stop=stop, commit_units=1, on_batch=lambda batch: stop.set())
    counters = run()
    assert sorted(u for b in batches for u in b) == sorted(pool.submitted)
    assert len(pool.submitted) < 10
    assert counters.abandoned == 10 - len(pool.submitted)


def test_commits_are_due_by_time_too():
    now = [0.0]
    pool = ScriptedPool(1, lambda size: 0)
    wait = pool.wait

    def slow_wait(timeout_s):
        now[0] += 4.0
        return wait(timeout_s)

    pool.wait = slow_wait
    batches, run = schedule(pool, range(4), commit_units=100, clock=lambda: now[0])
    run()
    assert [len(b) for b in batches] == [3, 1]


def test_a_failed_unit_does_not_hold_its_rows():
    rows = []

    def run_unit(unit):
        held = np.zeros(1000)
        rows.append(weakref.ref(held))
        try:
            raise MemoryError("out of memory")
        except MemoryError as error:
            raise StorageError(ErrorKind.STORAGE_FAILED, f"unit {unit}") from error

    pool = LocalPool(run_unit, threads=1)
    pool.submit(3)
    (done,) = pool.wait(60.0)
    pool.close()
    assert done.unit == 3
    assert done.error.message == "unit 3"
    assert isinstance(done.error.__cause__, MemoryError)
    assert rows[0]() is None
