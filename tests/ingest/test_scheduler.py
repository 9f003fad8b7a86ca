"""The scheduler against a pool whose every event the test decides."""

import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ConflictError, ErrorKind, InvalidInputError, StorageError
from actstore.ingest.events import JobEvents
from actstore.ingest.failures import IN_A_ROW
from actstore.ingest.flow import Completion
from actstore.ingest.local_pool import LocalPool
from actstore.ingest.scheduler import Limits, Scheduler
from actstore.ingest.unit import WrittenUnit

PASSING = StorageError(ErrorKind.STORAGE_FAILED, "a passing fault")


def rows_of(unit: int) -> int:
    return 10 * unit + 3


def written(unit: int, **changes) -> WrittenUnit:
    n = rows_of(unit)
    values = {
        "attempt": "a",
        "rows": n,
        "rows_read": n,
        "rows_forwarded": n,
        "nbytes": 7 * n,
        "timings_s": {"forward": 0.5},
    }
    return WrittenUnit(unit=unit, nonfinite=0, objects=(), **{**values, **changes})


class ScriptedPool:
    """Ends units in an order drawn by the test; fails those it is told to, as often as it is told to."""

    n_workers = 1

    def __init__(self, capacity, order=lambda size: 0, failures=None, error=PASSING, *, lost=False):
        self.capacity = capacity
        self.failures = dict(failures or {})
        self.error = error
        self.lost = lost
        self.order = order
        self.in_flight = []
        self.most_in_flight = 0
        self.submitted = []
        self.abandoned = False

    def submit(self, unit):
        self.submitted.append(unit)
        self.in_flight.append(unit)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))

    def submit_copy(self, unit):
        return False

    def wait(self, timeout_s):
        unit = self.in_flight.pop(self.order(len(self.in_flight)))
        if self.failures.get(unit, 0):
            self.failures[unit] -= 1
            return [Completion(unit, error=self.error, worker_lost=self.lost)]
        return [Completion(unit, written=written(unit))]

    def abandon(self):
        self.abandoned = True

    def close(self):
        pass


def schedule(
    pool, pending, *, stop=None, on_batch=lambda batch: None, clock=lambda: 0.0, events=None, **limits
):
    batches = []

    def commit(batch):
        on_batch(batch)
        batches.append([u.unit for u in batch])

    limits = {"commit_units": 3, "retry_s": 0.0, **limits}
    scheduler = Scheduler(
        pool, commit, rows_of=rows_of, limits=Limits(**limits), stop=stop or threading.Event(),
        on_commit=lambda batch, counters: None, events=events or JobEvents("r"), clock=clock,
    )  # fmt: skip
    return batches, lambda: scheduler.run(pending)


def flat(batches):
    return [u for b in batches for u in b]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 30), st.integers(1, 6))
def test_every_unit_is_committed_once_whatever_the_order_and_the_faults(data, n, capacity):
    failures = data.draw(st.dictionaries(st.integers(0, max(0, n - 1)), st.integers(0, 2)))
    backlog = data.draw(st.integers(1, 8))
    pool = ScriptedPool(capacity, lambda size: data.draw(st.integers(0, size - 1)), failures)
    # A row of failures without a success ends the job after `retry_s`: only fewer are sure to pass in that time.
    retry_s = 60.0 if sum(failures.values()) < IN_A_ROW else 1e9
    batches, run = schedule(
        pool, range(n), backlog_units=backlog, retry_s=retry_s, clock=iter(range(10**9)).__next__
    )
    counters = run().counters
    assert sorted(flat(batches)) == list(range(n))
    assert all(len(b) <= 3 for b in batches)
    assert pool.most_in_flight <= capacity
    assert (counters.planned, counters.committed, counters.failed, counters.abandoned) == (n, n, 0, 0)
    assert counters.retries == sum(v for u, v in failures.items() if u < n)
    total = sum(map(rows_of, range(n)))
    assert (counters.rows_planned, counters.rows_read, counters.rows_forwarded, counters.rows_committed) == (
        total,
    ) * 4
    assert counters.nbytes == 7 * total


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 5))
def test_units_that_fail_for_good_are_left_out_and_everything_adds_up(data, n, capacity):
    # Fewer than a row of failures that ends the job.
    bad = data.draw(st.sets(st.integers(0, n - 1), max_size=IN_A_ROW - 1))
    error = data.draw(st.sampled_from([InvalidInputError(ErrorKind.NON_FINITE, "NaN"), RuntimeError("CUDA")]))
    pool = ScriptedPool(
        capacity, lambda size: data.draw(st.integers(0, size - 1)), dict.fromkeys(bad, 99), error
    )
    batches, run = schedule(pool, range(n))
    outcome = run()
    counters = outcome.counters
    assert sorted(flat(batches)) == sorted(set(range(n)) - bad)
    assert {f.unit for f in outcome.failed} == bad
    tries = 1 if isinstance(error, InvalidInputError) else 3
    assert all(f.tries == tries and pool.submitted.count(f.unit) == tries for f in outcome.failed)
    assert all(f.rows == rows_of(f.unit) for f in outcome.failed)
    assert (counters.failed, counters.rows_failed) == (len(bad), sum(map(rows_of, bad)))
    assert counters.imbalance() is None
    assert not outcome.stopped


def test_a_foreign_exception_becomes_one_of_the_tree_with_its_cause():
    pool = ScriptedPool(1, failures={0: 99}, error=RuntimeError("the kernel failed"))
    _, run = schedule(pool, range(1))
    (failed,) = run().failed
    assert failed.error.kind is ErrorKind.WORKER_FAILED
    assert "unit 0 failed 3 times" in failed.error.message
    assert "the kernel failed" in failed.reason
    assert isinstance(failed.error.__cause__, RuntimeError)


def test_a_unit_may_lose_its_worker_three_times_as_often():
    pool = ScriptedPool(1, failures={0: 8, 1: 9}, error=RuntimeError("gone"), lost=True)
    batches, run = schedule(
        pool, range(12), max_attempts=3, retry_s=1e9, clock=iter(range(0, 10**9, 100)).__next__
    )
    outcome = run()
    assert [(f.unit, f.tries) for f in outcome.failed] == [(1, 9)]
    assert 0 in flat(batches)


def test_a_broken_job_gives_up_early():
    pool = ScriptedPool(
        2, failures=dict.fromkeys(range(4, 1000), 99), error=InvalidInputError(ErrorKind.NON_FINITE, "NaN")
    )
    batches, run = schedule(pool, range(1000))
    with pytest.raises(InvalidInputError, match=f"{IN_A_ROW} units failed in a row.*NaN"):
        run()
    assert flat(batches) == [0, 1, 2, 3]
    assert len(pool.submitted) <= 4 + IN_A_ROW + 2


def test_failures_with_a_success_in_between_do_not_end_the_job():
    bad = [u for u in range(100) if u % 2]
    pool = ScriptedPool(
        1, failures=dict.fromkeys(bad, 99), error=InvalidInputError(ErrorKind.NON_FINITE, "NaN")
    )
    batches, run = schedule(pool, range(100), failed_kept=10)
    outcome = run()
    assert len(flat(batches)) == 50
    assert outcome.counters.failed == 50
    assert [f.unit for f in outcome.failed] == bad[:10]


class Clock:
    """Seconds that pass where the test says."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Outage(ScriptedPool):
    """Everything fails until a time; a try takes a tenth of a second."""

    def __init__(self, clock, until_s, capacity=4):
        super().__init__(capacity)
        self.clock, self.until_s = clock, until_s

    def wait(self, timeout_s):
        self.clock.now += 0.1
        unit = self.in_flight.pop(0)
        if self.clock.now < self.until_s:
            return [Completion(unit, error=PASSING)]
        return [Completion(unit, written=written(unit))]


class WaitingStop(threading.Event):
    """A stop whose waiting moves the test's clock."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def wait(self, timeout=None):
        self.clock.now += timeout
        return self.is_set()


def test_a_storage_that_fails_for_a_while_costs_no_unit():
    clock = Clock()
    pool = Outage(clock, until_s=60.0)
    batches, run = schedule(pool, range(200), clock=clock, stop=WaitingStop(clock), retry_s=120.0)
    outcome = run()
    assert sorted(flat(batches)) == list(range(200))
    assert outcome.counters.failed == 0
    assert outcome.counters.retries < 40, "units were burned on a storage that was down"


def test_a_storage_that_is_down_for_good_ends_the_job():
    clock = Clock()
    pool = Outage(clock, until_s=1e9)
    batches, run = schedule(pool, range(200), clock=clock, stop=WaitingStop(clock), retry_s=120.0)
    with pytest.raises(StorageError, match=r"nothing has succeeded for 1\d\d s"):
        run()
    assert batches == []
    assert 120 <= clock.now < 180
    assert len(pool.submitted) < 40


def test_being_fenced_off_ends_the_job_at_once():
    fenced = ConflictError(ErrorKind.FENCED, "a newer job")
    pool = ScriptedPool(1, failures={2: 1}, error=fenced)
    batches, run = schedule(pool, range(10))
    with pytest.raises(ConflictError, match="a newer job"):
        run()
    assert flat(batches) == [0, 1]
    assert pool.submitted == [0, 1, 2]

    def refuse(batch):
        raise fenced

    pool = ScriptedPool(1)
    _, run = schedule(pool, range(1000), commit_units=1, backlog_units=1, on_batch=refuse)
    with pytest.raises(ConflictError, match="a newer job"):
        run()
    assert len(pool.submitted) < 10


@settings(max_examples=50, deadline=None)
@given(capacity=st.integers(1, 6), backlog=st.integers(1, 9), commit_units=st.integers(1, 5))
def test_slow_commits_stop_the_feeding(capacity, backlog, commit_units):
    """What is in flight and written and not committed is bounded, however slow the commits."""
    pool = ScriptedPool(capacity)
    seen = []
    committed = [0]
    release = threading.Semaphore(0)

    def commit(batch):
        release.acquire(timeout=0.002)  # slower than the pool, which needs no time at all
        seen.append(len(pool.submitted) - committed[0])
        committed[0] += len(batch)

    _, run = schedule(pool, range(40), commit_units=commit_units, backlog_units=backlog, on_batch=commit)
    run()
    assert committed == [40]
    assert max(seen) <= backlog + capacity


def test_a_commit_that_fails_is_tried_again_and_nothing_is_lost():
    tries = []

    def flaky(batch):
        tries.append([u.unit for u in batch])
        if len(tries) < 3:
            raise PASSING

    events = JobEvents("r")
    pool = ScriptedPool(2)
    batches, run = schedule(pool, range(4), on_batch=flaky, retry_s=30.0, clock=time.monotonic, events=events)
    run()
    assert tries[0] == tries[1] == tries[2]
    assert sorted(flat(batches)) == [0, 1, 2, 3]
    assert events.collector.value("commit_retries") == 2


def test_a_commit_that_keeps_failing_ends_the_job():
    tries = []

    def broken(batch):
        tries.append(batch)
        raise PASSING

    _, run = schedule(ScriptedPool(1), range(4), on_batch=broken, retry_s=0.3, clock=time.monotonic)
    with pytest.raises(StorageError, match="a passing fault"):
        run()
    assert len(tries) > 1


def test_stop_finishes_what_runs_and_begins_nothing():
    stop = threading.Event()
    pool = ScriptedPool(2)
    batches, run = schedule(
        pool, range(100), stop=stop, commit_units=1, backlog_units=2, on_batch=lambda batch: stop.set()
    )
    outcome = run()
    assert sorted(flat(batches)) == sorted(pool.submitted)
    assert len(pool.submitted) < 10
    assert outcome.stopped
    assert outcome.counters.abandoned == 100 - len(pool.submitted)
    assert outcome.counters.rows_abandoned == sum(map(rows_of, range(100))) - sum(
        map(rows_of, pool.submitted)
    )
    assert not pool.abandoned


def test_units_that_do_not_end_within_the_grace_are_abandoned():
    clock = Clock()
    stop = threading.Event()

    class Hanging(ScriptedPool):
        def wait(self, timeout_s):
            if self.submitted[0] in self.in_flight:
                return super().wait(timeout_s)
            stop.set()
            clock.now += timeout_s
            return []

    pool = Hanging(2)
    batches, run = schedule(pool, range(5), stop=stop, clock=clock, grace_s=25.0)
    outcome = run()
    assert flat(batches) == [0]
    assert outcome.counters.abandoned == 4
    assert pool.abandoned
    assert 25.0 <= clock.now <= 26.0


@pytest.mark.parametrize(
    "changes", [{"rows_read": 12}, {"rows_forwarded": 14}, {"rows_read": 0, "rows_forwarded": 0}]
)
def test_a_unit_whose_rows_do_not_add_up_fails_the_job_and_is_not_committed(changes):
    class Forgetful(ScriptedPool):
        def wait(self, timeout_s):
            (done,) = super().wait(timeout_s)
            return [Completion(1, written=written(1, **changes))] if done.unit == 1 else [done]

    batches, run = schedule(Forgetful(1), range(3))
    with pytest.raises(StorageError, match="unit 1 has 13 token rows"):
        run()
    assert flat(batches) == [0]


def test_a_pool_that_forgets_a_unit_is_found_out():
    class Doubling(ScriptedPool):
        def wait(self, timeout_s):
            done = super().wait(timeout_s)
            return [*done, *done]  # an answer given twice is not counted twice

    batches, run = schedule(Doubling(1), range(3))
    assert run().counters.committed == 3
    assert flat(batches) == [0, 1, 2]


class Stragglers(ScriptedPool):
    """Two workers: each unit takes a second of the test's clock; unit 5 hangs on the first worker, and on no other."""

    n_workers = 2

    def __init__(self, clock, *, copies_work=True):
        super().__init__(4)
        self.clock = clock
        self.copies = []
        self.copies_work = copies_work

    def submit_copy(self, unit):
        self.copies.append(unit)
        self.in_flight.append(("copy", unit))
        return True

    def wait(self, timeout_s):
        self.clock.now += 1.0
        for i, entry in enumerate(self.in_flight):
            if entry == ("copy", 5):
                del self.in_flight[i]
                if self.copies_work:
                    return [Completion(5, written=written(5, attempt="copy"))]
                return [Completion(5, error=PASSING)]
            if entry != 5:
                del self.in_flight[i]
                return [Completion(entry, written=written(entry))]
        if self.clock.now > 500 and 5 in self.in_flight:  # the hanging one after all
            self.in_flight.remove(5)
            return [Completion(5, written=written(5))]
        return []


def test_a_slow_unit_is_given_to_another_worker_and_the_first_result_wins():
    clock = Clock()
    pool = Stragglers(clock)
    got = []
    batches, run = schedule(pool, range(8), clock=clock, on_batch=got.extend, straggler_factor=4.0)
    outcome = run()
    assert pool.copies == [5]
    assert clock.now < 100, "the job waited for the slow copy"
    assert sorted(flat(batches)) == list(range(8))
    assert [u.attempt for u in got if u.unit == 5] == ["copy"]
    assert outcome.counters.copies == 1
    assert outcome.counters.failed == 0


def test_a_copy_that_fails_costs_nothing():
    clock = Clock()
    pool = Stragglers(clock, copies_work=False)
    batches, run = schedule(pool, range(8), clock=clock, max_attempts=10)
    outcome = run()
    assert clock.now > 500
    assert pool.copies == [5, 5]
    assert sorted(flat(batches)) == list(range(8))
    assert outcome.counters.failed == 0


def test_no_copies_are_made_when_that_is_switched_off():
    clock = Clock()
    pool = Stragglers(clock)
    _, run = schedule(pool, range(8), clock=clock, straggler_factor=0.0)
    run()
    assert pool.copies == []
    assert clock.now > 500


def test_a_pool_that_has_no_workers_left_ends_the_job_after_the_commit():
    class Empty(ScriptedPool):
        def wait(self, timeout_s):
            if len(self.submitted) > 4:
                raise StorageError(ErrorKind.WORKER_FAILED, "no place for the workers")
            return super().wait(timeout_s)

    batches, run = schedule(Empty(1), range(9))
    with pytest.raises(StorageError, match="no place"):
        run()
    assert flat(batches) == [0, 1, 2, 3]


def test_commits_are_due_by_time_too():
    clock = Clock()

    class Slow(ScriptedPool):
        def wait(self, timeout_s):
            clock.now += 4.0
            return super().wait(timeout_s)

    batches, run = schedule(Slow(1), range(4), commit_units=100, commit_interval_s=5.0, clock=clock)
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


def test_a_local_pool_interrupts_what_runs_and_forgets_what_waits():
    interrupted = threading.Event()
    begun = []

    def run_unit(unit):
        begun.append(unit)
        assert interrupted.wait(60)
        raise StorageError(ErrorKind.INTERRUPTED, "stopped")

    pool = LocalPool(run_unit, threads=1, interrupt=interrupted.set)
    pool.submit(1)
    pool.submit(2)
    while not begun:
        time.sleep(0.001)
    pool.close()
    assert interrupted.is_set()
    assert begun == [1]
    assert not any(t.name.startswith("actstore-unit") and t.is_alive() for t in threading.enumerate())
