"""Building an index on Ray, through the command line, killed, stopped, and on storages that fail: the same in the end."""

import contextlib
import json
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
from actstore.cli import main
from actstore.errors import ActstoreError
from actstore.index_list import list_indexes
from actstore.ingest import build_index
from actstore.log import CommitLog, fsck
from actstore.objects import ObjectReader
from actstore.storage import MemoryStorage
from actstore.store import Store
from actstore.testing.faults import Fault, FaultStorage, Killed
from tests.indexing import indexed
from tests.indexing.indexed import HOOK_POINT

OPTIONS = {"kind": "ivf_sq8", "n_lists": 8, "shard_rows": 100, "n_queries": 20}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store without an index: every test has a copy of it."""
    url = tmp_path_factory.mktemp("made") / "s"
    indexed.make(str(url), n_documents=30, rows_per_unit=64)
    return url


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    """The index that nothing happened to, and its name."""
    store = copied(made, tmp_path_factory.mktemp("undisturbed"))
    report = build_index(store, "run", HOOK_POINT, **OPTIONS)
    assert report.n_shards > 5
    return report.index, complete(store, report.index)


def copied(made: Path, folder: Path) -> Store:
    from shutil import copytree

    return actstore.open(copytree(made, folder / "s"))


def complete(store: Store, id: str) -> dict:
    found = indexed.content(store.refresh(), id)
    assert found["recall"]
    assert not fsck(store.storage, deep=True).n_problems
    return found


def test_a_killed_build_goes_on(made, undisturbed, tmp_path):
    id, expected = undisturbed
    store = copied(made, tmp_path)
    done = tmp_path / "done"
    command = [sys.executable, "-m", "tests.indexing.index_driver", store.url, HOOK_POINT, str(done)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        deadline = time.monotonic() + 100
        while not done.exists() or int(done.read_text() or 0) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    before = {u: unit.attempt for u, unit in store.refresh().state.collection("index", id).units.items()}
    assert 3 <= len(before) < len(expected["units"])
    build_index(store, "run", HOOK_POINT, **OPTIONS)
    assert complete(store, id) == expected
    after = {u: unit.attempt for u, unit in store.state.collection("index", id).units.items()}
    assert before.items() <= after.items()


def test_a_stopped_build_says_so_and_goes_on(made, undisturbed, tmp_path):
    id, expected = undisturbed
    store, stop = copied(made, tmp_path), threading.Event()

    def progress(p) -> None:
        if p.units_done >= 3:
            stop.set()

    first = build_index(store, "run", HOOK_POINT, progress=progress, stop=stop, **OPTIONS)
    assert not first.is_complete
    assert first.recall is None
    assert 2 <= first.n_shards < first.n_shards_planned
    assert first.n_uncovered == store.run("run").n_rows
    second = build_index(store, "run", HOOK_POINT, **OPTIONS)
    assert (second.is_complete, second.index, second.n_uncovered) == (True, id, 0)
    assert second.units_this_job == len(expected["units"]) - first.n_shards - 1
    assert complete(store, id) == expected


def test_stopped_while_it_is_measured(made, undisturbed, tmp_path):
    id, expected = undisturbed
    store, stop = copied(made, tmp_path), threading.Event()
    lines = []

    def notice(line: str) -> None:
        lines.append(line)
        if line.startswith("comparing"):
            stop.set()

    report = build_index(store, "run", HOOK_POINT, notice=notice, stop=stop, **OPTIONS)
    assert not report.is_complete
    assert report.n_shards == report.n_shards_planned
    assert any("lists" in line for line in lines)
    build_index(store, "run", HOOK_POINT, **OPTIONS)
    assert complete(store, id) == expected


def open_on(storage, cache) -> Store:
    log = CommitLog(storage, sleep=lambda _: None)
    return Store(
        storage, log.latest(), log=log, objects=ObjectReader(storage, cache_dir=cache, cache_bytes=1 << 24)
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", [Fault.ERROR_AFTER, Fault.KILL_BEFORE, Fault.TORN])
def test_a_fault_at_some_operations_loses_and_doubles_nothing(made, undisturbed, tmp_path, mode):
    """In a store that is not on a local disk: its objects come through the cache of checked copies."""
    id, expected = undisturbed
    local = actstore.open(made).storage

    def fresh():
        inner = MemoryStorage(f"index-{uuid.uuid4().hex}")
        for key in local.list(""):
            inner.put_new(key, [local.get(key)])
        return inner

    healthy = FaultStorage(fresh(), {})
    build_index(open_on(healthy, tmp_path / "c"), "run", HOOK_POINT, **OPTIONS)
    writes = [k for k, (method, _) in enumerate(healthy.operations) if method == "put_new"]
    for k in writes[:: max(1, len(writes) // 5)]:
        inner = fresh()
        # The job may fail; what it leaves is what counts.
        with contextlib.suppress(ActstoreError, Killed):
            build_index(open_on(FaultStorage(inner, {k: mode}), tmp_path / "c"), "run", HOOK_POINT, **OPTIONS)
        store = open_on(inner, tmp_path / "c")
        build_index(store, "run", HOOK_POINT, **OPTIONS)
        assert complete(store, id) == expected, (k, healthy.operations[k])


@pytest.mark.ray
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_any_number_of_ray_workers_builds_the_same_index(made, undisturbed, tmp_path):
    id, expected = undisturbed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for workers in (1, 2):
            (tmp_path / str(workers)).mkdir()
            store = copied(made, tmp_path / str(workers))
            report = build_index(
                store, "run", HOOK_POINT, ray_address="local", workers=workers, transform=(), **OPTIONS
            )
            assert report.is_complete
            assert complete(store, id) == expected
    finally:
        ray.shutdown()


def test_the_command_line_builds_lists_and_says_so(made, undisturbed, tmp_path, capsys):
    id, _ = undisturbed
    url = copied(made, tmp_path).url
    build = [
        "index",
        "build",
        url,
        "run",
        HOOK_POINT,
        "--kind",
        "ivf_sq8",
        "--lists",
        "8",
        "--shard-rows",
        "100",
    ]
    assert main([*build, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["index"], report["is_complete"], report["kind"]) == (id, True, "ivf_sq8")
    assert report["measured"][0].keys() == {"effort", "k", "share", "recall"}
    assert main(build) == 0
    assert "everything is indexed" in capsys.readouterr().out
    assert main(["index", "build", url, "run", "blocks.0.hook_resid_post", "--metric", "l2"]) == 0
    out = capsys.readouterr().out
    assert ": flat of " in out
    assert "finds 1.0000 of the 10 nearest" in out
    assert main(["index", "list", url, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["indexes"]
    assert listed == list_indexes(actstore.open(url))
    assert [(i["kind"], i["metric"], i["state"], i["coverage"]) for i in listed] == [
        ("ivf_sq8", "cosine", "used", 1.0),
        ("flat", "l2", "used", 1.0),
    ]
    assert main(["index", "list", url, "run"]) == 0
    assert "ivf_sq8" in capsys.readouterr().out
    assert main(["index", "list", url, "nothing"]) == 3
    assert main(["index", "build", url, "run", HOOK_POINT, "--recall-floor", "2"]) == 2
    capsys.readouterr()
    sql = actstore.open(url).sql('SELECT "index", kind, n_rows, coverage FROM indexes ORDER BY generation')
    assert [tuple(row.values()) for row in sql.to_dicts()] == [
        (i["index"], i["kind"], i["n_rows"], i["coverage"]) for i in listed
    ]


def test_a_store_without_indexes(made, capsys):
    assert main(["index", "list", str(made)]) == 0
    assert "no indexes yet" in capsys.readouterr().out
    assert actstore.open(made).sql("SELECT count(*) AS n FROM indexes").to_dicts() == [{"n": 0}]
