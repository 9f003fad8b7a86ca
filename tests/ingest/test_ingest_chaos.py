"""Workers, machines and drivers that die, hang or come late: every time the store ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

import actstore
from actstore.errors import ErrorKind, StorageError
from actstore.ingest import run as run_ingest
from actstore.log import fsck
from tests.ingest import chaos_driver, synthetic

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
]

ROOT = Path(__file__).resolve().parents[2]
FAST = {  # Ray looks for dead machines every five seconds otherwise, six times
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="module")
def cluster():
    """A head that computes nothing, and two machines with four CPUs and a GPU (in name) each."""
    old = {name: os.environ.get(name) for name in FAST}
    os.environ.update(FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=4, num_gpus=1)
        chaos_driver.connect(cluster.address)
        yield cluster
        ray.shutdown()
        cluster.shutdown()
    for name, value in old.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    url = str(folder / "store")
    tokenizer = synthetic.make_corpus(url, folder / "tokenizer", n_documents=130)
    return url, tokenizer, folder


@pytest.fixture(scope="module")
def undisturbed(made):
    """One process, no Ray."""
    url, tokenizer, _ = made
    assert run_ingest(
        url, synthetic.config(tokenizer, run="alone"), backend=synthetic.SyntheticBackend()
    ).is_complete
    return units_of(url, "alone")


def units_of(url, run):
    """Rows and shard hashes of every unit, whatever the run's name."""
    found = synthetic.content(actstore.open(url), run)["units"]
    return {u: (rows, bad, tuple((n, s) for _, n, s in objects)) for u, (rows, bad, objects) in found.items()}


def check(url, run, undisturbed):
    assert units_of(url, run) == undisturbed
    synthetic.check_complete(actstore.open(url), run)
    assert fsck(actstore.open(url).storage, deep=True).is_clean


def until(condition, what, timeout_s=180.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


def once(action, at):
    """Do something at the first progress with that many units done."""
    done = []

    def progress(backend, p):
        if not done and p.units_done >= at:
            done.append(p.units_done)
            action(backend)

    return progress


def drive(cluster, made, run, *, workers=1):
    """Start the job in a process of its own; return the process and where its workers leave their ids."""
    url, tokenizer, folder = made
    arguments = [cluster.address, url, tokenizer, run, str(folder / run), str(workers)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ingest.chaos_driver", *arguments], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return process, folder / run


def committed(url, run):
    found = actstore.open(url).state.collections.get(("run", run))
    return {} if found is None else {u: unit.attempt for u, unit in found.units.items()}


def test_a_killed_worker(cluster, made, undisturbed):
    url, tokenizer, folder = made
    config = chaos_driver.make_config(tokenizer, "worker", folder / "worker")
    killed = []

    def kill(backend):
        killed.append(max(chaos_driver.pids(folder / "worker").items(), key=lambda p: p[1])[0])
        os.kill(killed[0], signal.SIGKILL)

    report = chaos_driver.run_job(url, config, progress=once(kill, 5))
    assert report.is_complete
    assert report.counters.imbalance() is None
    assert 1 <= report.retries <= 2, "the two units that the worker had were not run again"
    assert killed
    check(url, "worker", undisturbed)


def test_a_killed_machine(cluster, made, undisturbed):
    url, tokenizer, folder = made
    config = chaos_driver.make_config(
        tokenizer, "machine", folder / "machine", workers=3, min_workers=3, gpus_per_worker=1
    )
    victim = cluster.add_node(num_cpus=4, num_gpus=1)
    ready = []

    def kill(backend):
        ready.append(len(backend.workers.ready))
        cluster.remove_node(victim, allow_graceful=False)

    report = chaos_driver.run_job(url, config, progress=once(kill, 5))
    assert ready == [3]
    assert report.is_complete
    assert report.retries <= 4  # its worker may have ended its two units before it noticed
    check(url, "machine", undisturbed)
    until(lambda: len(ray_nodes()) == 3, "Ray to see that the machine is gone")


def test_a_machine_that_joins_gives_a_worker_to_a_running_job(cluster, made, undisturbed):
    url, tokenizer, folder = made
    gpus = sum(n["Resources"].get("GPU", 0) for n in ray_nodes())
    config = chaos_driver.make_config(
        tokenizer, "joined", folder / "joined", workers=int(gpus) + 1, min_workers=1, gpus_per_worker=1
    )
    joined = threading.Event()

    def join(backend):
        cluster.add_node(num_cpus=4, num_gpus=1)
        until(lambda: backend.workers.poll(0.2) or len(backend.workers.ready) == gpus + 1, "the new worker")
        joined.set()

    report = chaos_driver.run_job(url, config, progress=once(join, 4))
    assert joined.is_set()
    assert report.is_complete
    assert len(chaos_driver.pids(folder / "joined")) == gpus + 1
    check(url, "joined", undisturbed)


def test_a_worker_that_hangs_holds_nothing_up(cluster, made, undisturbed):
    url, tokenizer, folder = made
    config = chaos_driver.make_config(tokenizer, "hung", folder / "hung")
    hung = []

    def stop(backend):
        hung.append(max(chaos_driver.pids(folder / "hung").items(), key=lambda p: p[1])[0])
        os.kill(hung[0], signal.SIGSTOP)

    report = chaos_driver.run_job(url, config, progress=once(stop, 5))
    assert report.is_complete
    assert 1 <= report.counters.copies <= 4
    assert report.counters.failed == 0
    check(url, "hung", undisturbed)


def test_a_terminated_and_then_a_killed_driver(cluster, made, undisturbed):
    url, _, _ = made
    process, _ = drive(cluster, made, "driver")
    until(lambda: len(committed(url, "driver")) >= 2, "commits")
    process.send_signal(signal.SIGTERM)
    found = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 0
    assert not found["complete"]
    first = committed(url, "driver")
    assert 2 <= found["units"] == len(first) < len(undisturbed)

    process, _ = drive(cluster, made, "driver")
    until(lambda: len(committed(url, "driver")) > len(first), "more commits")
    process.kill()
    process.communicate()
    second = committed(url, "driver")
    assert {u: second[u] for u in first} == first, "a committed unit changed"
    assert len(second) < len(undisturbed)

    process, _ = drive(cluster, made, "driver")
    found = json.loads(process.communicate(timeout=120)[0])
    assert found["complete"]
    assert found["counters"] <= len(undisturbed) - len(second)
    last = committed(url, "driver")
    assert {u: last[u] for u in second} == second, "a committed unit changed"
    check(url, "driver", undisturbed)


def test_a_job_that_sleeps_through_its_successor_is_fenced_off(cluster, made, undisturbed):
    """Driver and workers are stopped, a new job completes the run, the old ones wake up and go on writing."""
    url, tokenizer, folder = made
    old, ids = drive(cluster, made, "fenced")
    until(lambda: len(committed(url, "fenced")) >= 3, "commits")
    workers = list(chaos_driver.pids(ids))
    for pid in [old.pid, *workers]:
        os.kill(pid, signal.SIGSTOP)
    n_before = len(committed(url, "fenced"))
    config = chaos_driver.make_config(tokenizer, "fenced", folder / "successor", workers=1)
    # The same configuration but for where the workers leave their ids, which is no part of it.
    report = chaos_driver.run_job(url, config)
    assert report.is_complete
    assert 0 < report.units_this_job <= len(undisturbed) - n_before
    sealed = committed(url, "fenced")
    version = actstore.open(url).version
    for pid in [*workers, old.pid]:
        os.kill(pid, signal.SIGCONT)
    found = json.loads(old.communicate(timeout=60)[0])
    assert found == {"error": ErrorKind.FENCED}
    assert committed(url, "fenced") == sealed
    assert actstore.open(url).version == version
    check(url, "fenced", undisturbed)


def test_workers_that_find_no_place_are_told_apart_from_slow_ones(cluster, made):
    url, tokenizer, folder = made
    config = chaos_driver.make_config(
        tokenizer, "nowhere", folder / "nowhere", workers=1, gpus_per_worker=64, start_timeout_s=2.0
    )
    with pytest.raises(
        StorageError, match=r"0 ready, 0 loading, 1 not placed.*GPU 64; the cluster has \d+ nodes.*GPU 1"
    ) as caught:
        chaos_driver.run_job(url, config)
    assert caught.value.kind is ErrorKind.WORKER_FAILED
    assert committed(url, "nowhere") == {}


def ray_nodes():
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
