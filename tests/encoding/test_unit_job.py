"""A job of units of any kind: exactly once, whatever fails, is stopped, killed or fenced off; on one process and on Ray."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from pathlib import Path

import pytest

import actstore
from actstore.errors import (
    ActstoreError,
    ConflictError,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from actstore.ingest.committer import CommitTarget, UnitCommitter, take_over
from actstore.ingest.unit_collection import ensure_collection, seal_collection
from actstore.ingest.unit_job import run_unit_job
from actstore.log import CommitLog, fsck
from actstore.objects import ObjectReader
from actstore.storage import MemoryStorage
from actstore.store import Store
from actstore.testing.faults import Fault, FaultStorage, Killed
from tests.encoding import toy_task
from tests.encoding.toy_task import ToyTask, check, run


@pytest.fixture
def store():
    return actstore.open(f"memory://unit-job-{uuid.uuid4().hex}", create=True)


def test_all_units_are_committed_and_counted(store):
    seen = []
    outcome = run(store, progress=seen.append, commit_units=5)
    check(store)
    n_rows = sum(map(toy_task.rows_of, range(12)))
    assert (outcome.counters.committed, outcome.counters.rows_committed, outcome.stopped) == (
        12,
        n_rows,
        False,
    )
    assert (seen[-1].units_done, seen[-1].units_total, seen[-1].rows_done, seen[-1].rows_total) == (
        12,
        12,
        n_rows,
        n_rows,
    )
    before = store.version
    assert run(store).counters.planned == 0
    assert store.version == before
    assert not fsck(store.storage, deep=True).n_problems


def test_what_is_done_stays_and_the_rest_is_run(store):
    ensure_collection(store, "toy", "t", {"format": 1, "n_units": 12})
    some = {"kind": "toy", "id": "t", "task": ToyTask(), "rows_of": toy_task.rows_of}
    run_unit_job(store, pending=[3, 7, 4], **some)
    before = {u: unit.attempt for u, unit in store.state.collection("toy", "t").units.items()}
    assert sorted(before) == [3, 4, 7]
    seen = []
    run(store, progress=seen.append)
    check(store)
    assert (
        before.items()
        <= {u: unit.attempt for u, unit in store.state.collection("toy", "t").units.items()}.items()
    )
    assert seen[-1].rows_this_job == seen[-1].rows_total - sum(map(toy_task.rows_of, [3, 4, 7]))


def test_units_whose_first_try_fails_are_tried_again(store):
    outcome = run(store, ToyTask(flaky=(2, 5)))
    assert outcome.counters.retries == 2
    check(store)


def test_units_that_can_never_be_are_named_and_all_others_are_there(store):
    with pytest.raises(
        InvalidInputError, match=r"2 of 12 units of toy 't' failed: unit 4 \(1 try\): unit 4 can never be"
    ) as e:
        run(store, ToyTask(broken=(4, 9)))
    assert e.value.kind is ErrorKind.NON_FINITE
    assert sorted(store.state.collection("toy", "t").units) == [u for u in range(12) if u not in (4, 9)]
    run(store)
    check(store)


def test_a_unit_that_counts_wrong_is_not_committed(store):
    with pytest.raises(StorageError, match="unit 6"):
        run(store, ToyTask(wrong=(6,)))
    assert 6 not in store.refresh().state.collection("toy", "t").units


def test_what_cannot_be_is_refused(store):
    with pytest.raises(NotFoundError):
        run_unit_job(store, kind="toy", id="x", task=ToyTask(), pending=[1], rows_of=toy_task.rows_of)
    with pytest.raises(InvalidInputError, match="cannot be opened"):
        run(store, ToyTask(unopenable=True))
    with pytest.raises(InvalidInputError, match="workers must be 1"):
        run(store, workers=2)
    with pytest.raises(InvalidInputError, match="memory://"):
        run(store, ray_address="local")


def test_a_stopped_job_commits_what_runs_and_goes_on_later(store):
    stop = threading.Event()
    outcome = run(store, ToyTask(pause_s=0.02), stop=stop, progress=lambda _: stop.set(), commit_units=1)
    assert outcome.stopped
    n = len(store.state.collection("toy", "t").units)
    assert 0 < n < 12
    run(store)
    check(store)


def test_a_signal_stops_a_job_and_leaves_handlers_as_they_were(store):
    before = signal.getsignal(signal.SIGTERM)
    sent = []

    def kill_once(_):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    outcome = run(store, ToyTask(pause_s=0.02), progress=kill_once, commit_units=1)
    assert outcome.stopped
    assert signal.getsignal(signal.SIGTERM) is before
    run(store)
    check(store)


def test_an_older_job_is_fenced_off(store):
    ensure_collection(store, "toy", "t", {"format": 1, "n_units": 12})
    epoch = take_over(store.log, "t", kind="toy")
    found = store.refresh().state.collection("toy", "t")
    old = UnitCommitter(store.log, CommitTarget("toy", "t", found.fingerprint, epoch))
    unit = ToyTask().open(store)(0)
    run(store)
    with pytest.raises(ConflictError) as error:
        old.commit([unit])
    assert error.value.kind is ErrorKind.FENCED
    check(store)


def test_two_jobs_at_once_leave_each_unit_once(store):
    errors = []

    def job():
        with contextlib.suppress(ConflictError):
            try:
                run(
                    Store(store.storage, store.state, log=store.log, objects=store.objects),
                    ToyTask(pause_s=0.01),
                )
            except ActstoreError as error:
                errors.append(error)
                raise

    threads = [threading.Thread(target=job) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(isinstance(e, ConflictError) for e in errors), errors
    run(store)
    check(store)
    assert not fsck(store.storage, deep=True).n_problems


def test_collections_are_made_once_and_with_one_configuration(store):
    made = ensure_collection(store, "toy", "t", {"format": 1, "n_units": 2}, {"who": "a"})
    again = ensure_collection(store, "toy", "t", {"format": 1, "n_units": 2}, {"who": "b"})
    assert dict(again.info) == dict(made.info) == {"who": "a"}
    with pytest.raises(ConflictError, match="n_units: 2 -> 3") as error:
        ensure_collection(store, "toy", "t", {"format": 1, "n_units": 3})
    assert error.value.kind is ErrorKind.CONFIG_DIFFERS


def test_a_collection_is_sealed_once_and_only_when_it_is_whole(store):
    ensure_collection(store, "toy", "t", {"format": 1, "n_units": 2})
    with pytest.raises(ConflictError, match="0 of 2 units") as error:
        seal_collection(store, "toy", "t", n_units=2)
    assert error.value.kind is ErrorKind.COUNT_DIFFERS
    run_unit_job(store, kind="toy", id="t", task=ToyTask(), pending=[0, 1], rows_of=toy_task.rows_of)
    version = seal_collection(store, "toy", "t", n_units=2, meta={"said": 1})
    assert seal_collection(store, "toy", "t", n_units=2, meta={"said": 2}) == version
    seal = store.state.collection("toy", "t").seal
    assert seal is not None
    assert dict(seal.meta) == {"said": 1}


MODES = [Fault.ERROR_BEFORE, Fault.LOST_ANSWER, Fault.TIMEOUT, Fault.KILL_AFTER, Fault.PERSISTENT]


def open_on(storage, cache) -> Store:
    log = CommitLog(storage, sleep=lambda _: None)
    return Store(
        storage, log.latest(), log=log, objects=ObjectReader(storage, cache_dir=cache, cache_bytes=1 << 20)
    )


def attempt(storage, cache) -> int:
    faulty = FaultStorage(storage, {})
    run(open_on(faulty, cache), n_units=3, commit_units=1, commit_interval_s=0.0, retry_s=0.02)
    return faulty.n_operations


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_at_any_operation_loses_and_doubles_nothing(tmp_path, mode):
    def fresh():
        inner = MemoryStorage(f"unit-job-{uuid.uuid4().hex}")
        CommitLog(inner).create()
        return inner

    n_operations = attempt(fresh(), tmp_path)
    assert n_operations > 10
    for k in range(n_operations):
        inner = fresh()
        # The job may fail; what it leaves is what counts.
        with contextlib.suppress(ActstoreError, Killed):
            faulty = open_on(FaultStorage(inner, {k: mode}), tmp_path)
            run(faulty, n_units=3, commit_units=1, commit_interval_s=0.0, retry_s=0.02)
        store = open_on(inner, tmp_path)
        found = store.state.collections.get(("toy", "t"))
        before = {} if found is None else {u: unit.attempt for u, unit in found.units.items()}
        run(store, n_units=3)
        check(store, 3)
        after = {u: unit.attempt for u, unit in store.state.collection("toy", "t").units.items()}
        assert before.items() <= after.items(), (k, mode)
        assert not fsck(inner, deep=True).n_problems, (k, mode)


def test_a_killed_process_costs_nothing_but_its_units_in_flight(tmp_path):
    url, ready = str(tmp_path / "store"), tmp_path / "done"
    actstore.open(url, create=True)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.encoding.toy_task", url, str(ready)]
    with subprocess.Popen(command, cwd=root) as process:
        deadline = time.monotonic() + 60
        while not (ready.exists() and ready.read_text() not in ("", "0")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    store = actstore.open(url)
    before = {u: unit.attempt for u, unit in store.state.collection("toy", "t").units.items()}
    assert 0 < len(before) < 40
    run(store, n_units=40)
    check(store, 40)
    assert (
        before.items() <= {u: x.attempt for u, x in store.state.collection("toy", "t").units.items()}.items()
    )


@pytest.fixture(scope="module")
def ray():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray import cloudpickle

        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        cloudpickle.register_pickle_by_value(toy_task)  # workers do not have the tests on their path
        yield ray
        cloudpickle.unregister_pickle_by_value(toy_task)
        ray.shutdown()


on_ray = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    # Ray's own imports and sockets warn; what is tested here is what is stored.
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
]


def _on_ray(test):
    for mark in on_ray:
        test = mark(test)
    return test


@_on_ray
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_workers_give_the_same_store(ray, tmp_path, workers):
    store = actstore.open(tmp_path / "store", create=True)
    outcome = run(store, ToyTask(flaky=(3,)), ray_address="local", workers=workers)
    assert outcome.counters.committed == 12
    check(store)


@_on_ray
def test_errors_come_back_from_ray_as_they_are(ray, tmp_path):
    store = actstore.open(tmp_path / "store", create=True)
    with pytest.raises(InvalidInputError, match="cannot be opened"):
        run(store, ToyTask(unopenable=True), ray_address="local")
    with pytest.raises(InvalidInputError, match="unit 4 can never be"):
        run(store, ToyTask(broken=(4,)), ray_address="local")
    run(store, ray_address="local")
    check(store)
