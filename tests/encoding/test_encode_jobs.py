"""Encoding on Ray, through the command line, killed, and on storages that fail: the same store in the end."""

import contextlib
import json
import signal
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

import pytest

import actstore
from actstore.cli import main
from actstore.errors import ActstoreError
from actstore.ingest import import_corpus
from actstore.ingest.encoding.encode import encode
from actstore.log import CommitLog, fsck
from actstore.objects import ObjectReader
from actstore.storage import MemoryStorage
from actstore.store import Store
from actstore.testing.faults import Fault, FaultStorage, Killed
from tests.encoding.encoded import add_dictionary, content, make_run
from tests.ingest import kept, tiny_models

N_DOCUMENTS = 10


def prepare(store, folder) -> None:
    make_run(store, kept.tokenized(store, folder, n=N_DOCUMENTS))
    add_dictionary(store, activation="topk", k=5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The store's content after an encoding in this process that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    store = actstore.open(folder / "store", create=True)
    prepare(store, folder / "tokenizer")
    encode(store, "sae", "r")
    return complete(store)


def complete(store) -> dict:
    found = content(store.refresh())
    assert found["sealed"]
    assert not fsck(store.storage, deep=True).n_problems
    return found


def test_the_command_line_encodes_and_says_so(tmp_path, undisturbed, capsys):
    url = str(tmp_path / "store")
    prepare(actstore.open(url, create=True), tmp_path / "tokenizer")
    assert main(["sae", "encode", url, "sae", "r", "--no-postings", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["is_complete"], first["has_postings"], first["n_units"]) == (
        True,
        False,
        first["n_units_planned"],
    )
    assert main(["sae", "encode", url, "sae", "r"]) == 0
    assert "codes sae@r: " in capsys.readouterr().out
    assert complete(actstore.open(url)) == undisturbed
    assert actstore.open(url).run("r").codes("sae").postings().n_postings == first["n_codes"]
    assert main(["sae", "encode", url, "sae", "r", "--pool-top-m", "all"]) != 0
    assert "pool_top_m: 512 -> None" in capsys.readouterr().err


def test_a_killed_encoding_goes_on(tmp_path, undisturbed):
    url, done = str(tmp_path / "store"), tmp_path / "done"
    prepare(actstore.open(url, create=True), tmp_path / "tokenizer")
    command = [sys.executable, "-m", "tests.encoding.encode_driver", url, str(done)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        deadline = time.monotonic() + 120
        while "codes" not in {kind for kind, _ in actstore.open(url).state.collections}:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)  # between two units, most likely: wherever it is, nothing may be lost
        process.send_signal(signal.SIGKILL)
    store = actstore.open(url)
    before = {u: unit.attempt for u, unit in store.state.collection("codes", "sae@r").units.items()}
    encode(store, "sae", "r")
    assert complete(store) == undisturbed
    assert (
        before.items()
        <= {u: x.attempt for u, x in store.state.collection("codes", "sae@r").units.items()}.items()
    )


def open_on(storage, cache) -> Store:
    log = CommitLog(storage, sleep=lambda _: None)
    return Store(
        storage, log.latest(), log=log, objects=ObjectReader(storage, cache_dir=cache, cache_bytes=1 << 24)
    )


@pytest.mark.parametrize("mode", [Fault.ERROR_AFTER, Fault.TIMEOUT, Fault.KILL_BEFORE, Fault.TORN])
def test_a_fault_at_some_operations_loses_and_doubles_nothing(tmp_path, undisturbed, mode):
    base = MemoryStorage(f"encode-{uuid.uuid4().hex}")
    CommitLog(base).create()
    prepare(open_on(base, tmp_path / "c"), tmp_path / "tokenizer")

    def fresh():
        inner = MemoryStorage(f"encode-{uuid.uuid4().hex}")
        for key in base.list(""):
            inner.put_new(key, [base.get(key)])
        return inner

    healthy = FaultStorage(fresh(), {})
    encode(open_on(healthy, tmp_path / "c"), "sae", "r", postings=False)
    writes = [k for k, (method, _) in enumerate(healthy.operations) if method == "put_new"]
    for k in writes[:: max(1, len(writes) // 6)]:
        inner = fresh()
        # The job may fail; what it leaves is what counts.
        with contextlib.suppress(ActstoreError, Killed):
            encode(open_on(FaultStorage(inner, {k: mode}), tmp_path / "c"), "sae", "r", postings=False)
        store = open_on(inner, tmp_path / "c")
        encode(store, "sae", "r", postings=False)
        assert complete(store) == undisturbed, (k, healthy.operations[k])


@pytest.mark.ray
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_any_number_of_ray_workers_gives_the_same_store(tmp_path, undisturbed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for workers in (1, 2):
            store = actstore.open(tmp_path / f"store{workers}", create=True)
            prepare(store, tmp_path / f"tokenizer{workers}")
            report = encode(store, "sae", "r", ray_address="local", workers=workers, device="cpu")
            assert report.is_complete
            assert complete(store) == undisturbed
    finally:
        ray.shutdown()


TEXTS = ["The quick brown fox jumps over the lazy dog.", "x", "A list is a sequence. " * 30, ""]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_keeps_the_codes_that_its_stored_rows_have(tmp_path, dtype, capsys):
    url, folder = str(tmp_path / "store"), tiny_models.cached("gpt2", dtype=dtype)
    store = actstore.open(url, create=True)
    import_corpus(store, "c", TEXTS)
    common = [
        url,
        "--corpus",
        "c",
        "--model",
        folder,
        "--hook-points",
        "layers.0.resid_post",
        "--no-ray",
        "--json",
    ]
    assert main(["ingest", *common, "--run", "dense"]) == 0
    width = store.refresh().run("dense").d_model("layers.0.resid_post")
    add_dictionary(store, width=width)
    assert main(["ingest", *common, "--run", "codes", "--keep", "codes", "--dictionary", "sae"]) == 0
    assert main(["sae", "encode", url, "sae", "dense", "--json"]) == 0
    capsys.readouterr()
    store.refresh()
    found = {
        run: {
            u: (unit.rows, dict(unit.meta), [o.sha256 for o in unit.objects])
            for u, unit in store.state.collection("codes", f"sae@{run}").units.items()
        }
        for run in ("dense", "codes")
    }
    assert found["dense"] == found["codes"]
    assert store.run("codes").codes("sae").postings().n_postings > 0
    assert not fsck(store.storage, deep=True).n_problems
