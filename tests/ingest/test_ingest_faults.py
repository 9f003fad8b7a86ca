"""A fault at every storage operation of an ingest, in every mode: nothing is lost, doubled or torn.

For each operation k and each mode a job runs on a storage that fails there; then a healthy job finishes what is left, and
the store must equal that of a job nothing happened to. What was committed before stays as it was committed.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest

import actstore
from actstore.errors import ActstoreError
from actstore.ingest import import_corpus, tokenize_corpus
from actstore.ingest import run as run_ingest
from actstore.log import CommitLog, fsck
from actstore.objects import ObjectReader
from actstore.storage import MemoryStorage, Storage, open_storage
from actstore.store import Store
from actstore.testing.faults import Fault, FaultStorage, Killed
from tests.ingest import synthetic
from tests.s3_server import S3Server

N_DOCUMENTS = 9


def open_on(storage: Storage, cache: Path) -> Store:
    log = CommitLog(storage, sleep=lambda seconds: None)
    objects = ObjectReader(storage, cache_dir=cache, cache_bytes=1 << 30)
    return Store(storage, log.latest(), log=log, objects=objects)


def prepare(storage: Storage, cache: Path, tokenizer: Path) -> str:
    """Put a tokenized corpus of three units into an empty store; return the tokenizer's folder."""
    CommitLog(storage).create()
    store = open_on(storage, cache)
    docs = synthetic.documents(N_DOCUMENTS)
    import_corpus(store, "words", docs)
    folder = synthetic.word_tokenizer(tokenizer, [str(d["text"]) for d in docs])
    tokenize_corpus(store.refresh(), "words", folder, window=16, rows_per_unit=64)
    return folder


def ingest(store: Store, tokenizer: str) -> None:
    asked = synthetic.config(tokenizer, commit_units=1, commit_interval_s=0.0, retry_s=0.02)
    run_ingest(store, asked, backend=synthetic.SyntheticBackend(threads=1))


def committed(store: Store) -> dict[int, str]:
    run = store.state.collections.get(("run", "syn"))
    return {} if run is None else {u: unit.attempt for u, unit in run.units.items()}


def check_after(inner: Storage, cache: Path, tokenizer: str, undisturbed: dict, what: str) -> None:
    """Reopen, check, finish, compare."""
    store = open_on(inner, cache)
    before = committed(store)
    assert fsck(inner, deep=False).is_clean, what
    ingest(store, tokenizer)
    after = open_on(inner, cache)
    assert {u: committed(after)[u] for u in before} == before, f"{what}: a committed unit changed"
    assert synthetic.content(after) == undisturbed, what
    assert fsck(inner, deep=True).is_clean, what


def campaign(make_inner, cache, tokenizer, undisturbed, *, keep=lambda k, mode: True) -> int:
    """Run every kept case; `make_inner()` gives a fresh prepared storage. Returns how many cases ran."""
    probe = FaultStorage(make_inner(), {})
    ingest(open_on(probe, cache), tokenizer)
    n_cases = 0
    for k in range(probe.n_operations):
        for mode in Fault:
            if not keep(k, mode):
                continue
            what = f"operation {k} {probe.operations[k]}, {mode}"
            inner = make_inner()
            with contextlib.suppress(
                ActstoreError, Killed
            ):  # the job may fail; what it leaves is what counts
                ingest(open_on(FaultStorage(inner, {k: mode}), cache), tokenizer)
            check_after(inner, cache, tokenizer, undisturbed, what)
            n_cases += 1
    return n_cases


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    base = folder / "base"
    tokenizer = prepare(open_storage(str(base), create=True), folder / "cache", folder / "tokenizer")
    shutil.copytree(base, folder / "undisturbed")
    ingest(open_on(open_storage(str(folder / "undisturbed")), folder / "cache"), tokenizer)
    undisturbed = synthetic.content(actstore.open(str(folder / "undisturbed")))
    assert len(undisturbed["units"]) >= 3
    return folder, base, tokenizer, undisturbed


def copy_into(base: Path, inner: Storage) -> Storage:
    source = open_storage(str(base))
    for key in source.list(""):
        inner.put_new(key, [source.get(key)])
    return inner


@pytest.mark.timeout(600)
def test_memory(prepared):
    folder, base, tokenizer, undisturbed = prepared
    count = iter(range(10**6))
    make = lambda: copy_into(base, MemoryStorage(f"faults-{next(count)}"))  # noqa: E731
    n_cases = campaign(make, folder / "cache", tokenizer, undisturbed)
    print(f"{n_cases} cases")
    assert n_cases >= 200


@pytest.mark.timeout(600)
def test_local_disk(prepared):
    folder, base, tokenizer, undisturbed = prepared
    # A disk of memory where there is one: the calls are the same, and each fsync does not cost milliseconds.
    disk = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=disk) as tmp:

        def make():
            shutil.rmtree(f"{tmp}/s", ignore_errors=True)
            shutil.copytree(base, f"{tmp}/s")
            return open_storage(f"{tmp}/s")

        n_cases = campaign(make, folder / "cache", tokenizer, undisturbed)
    print(f"{n_cases} cases")
    assert n_cases >= 200


def s3_campaign(prepared, *, keep) -> int:
    folder, base, tokenizer, undisturbed = prepared
    with S3Server() as server:
        bucket = server.make_bucket()
        count = iter(range(10**6))

        def make():
            url = f"s3://{bucket}/{next(count)}"
            return copy_into(base, open_storage(url, create=True, storage_options=server.storage_options))

        return campaign(make, folder / "cache", tokenizer, undisturbed, keep=keep)


@pytest.mark.s3
@pytest.mark.timeout(600)
def test_s3_one_mode_at_each_operation(prepared):
    """Every operation, the modes in turn: with `test_s3_every_mode` all pairs, here a ninth of them."""
    modes = list(Fault)
    n_cases = s3_campaign(prepared, keep=lambda k, mode: modes[k % len(modes)] is mode)
    print(f"{n_cases} cases")
    assert n_cases >= 20


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_s3_every_mode(prepared):
    n_cases = s3_campaign(prepared, keep=lambda k, mode: True)
    print(f"{n_cases} cases")
    assert n_cases >= 200
