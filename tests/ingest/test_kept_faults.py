"""A fault at every storage operation of runs that keep pooled vectors, samples or int8: the same job again finishes them right.

As in `test_ingest_faults`, but with the kinds of runs that write more sorts of objects; what is compared is what readers get.
"""

import contextlib
import itertools
from pathlib import Path

import pytest

from actstore.errors import ActstoreError
from actstore.log import CommitLog, fsck
from actstore.objects import ObjectReader
from actstore.pooled_tables import spanning_documents
from actstore.storage import MemoryStorage, Storage
from actstore.store import Store
from actstore.testing.faults import Fault, FaultStorage, Killed
from tests.ingest import kept
from tests.ingest.kept import HOOK_POINTS, KeptRun

COUNT = itertools.count()

KINDS = {
    "pooled": {"keep": ("pooled",), "covariance": True},
    "both, sampled int8": {"keep": ("dense", "pooled"), "rate": 0.5, "dtype": "int8"},
}


def open_on(storage: Storage, cache: Path) -> Store:
    log = CommitLog(storage, sleep=lambda seconds: None)
    objects = ObjectReader(storage, cache_dir=cache, cache_bytes=1 << 30)
    return Store(storage, log.latest(), log=log, objects=objects)


def ingest(store: Store, settings: dict):
    (tokenization,) = store.tokenizations()
    run = KeptRun(store, "r", tokenization, **settings)
    for unit in tokenization.units:
        if unit.unit not in store.refresh().run("r").collection.units:
            run.committer.commit([run.write(unit.unit)])
    return run.finish()


def content(run) -> dict[str, object]:
    """Everything that can be read of a run."""
    found: dict[str, object] = {"rows": run.n_rows, "sealed": run.is_complete}
    for name in HOOK_POINTS:
        stats = run.stats(name)
        found[name] = (stats.n_rows, stats.mean.tolist(), stats.m2.tolist(), stats.int8_error)
        if "dense" in run.keep:
            found[f"{name} rows"] = run.activations(name)[:].tolist()
        if run.config.get("covariance"):
            found[f"{name} covariance"] = run.covariance(name).packed.tolist()
        for pooling in run.poolings:
            pooled = run.pooled(name, pooling).to_numpy()
            found[f"{name} {pooling}"] = (
                pooled.doc_ids.tolist(),
                pooled.n_tokens.tolist(),
                pooled.vectors.tolist(),
            )
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    base = MemoryStorage(f"kept-{next(COUNT)}")
    CommitLog(base).create()
    tokenization = kept.tokenized(open_on(base, folder / "cache"), folder / "tokenizer", n=5)
    assert len(tokenization.units) == 4
    assert [len(units) for _, units in spanning_documents(tokenization.units)] == [4]
    return folder, base


def copy_of(base: Storage) -> Storage:
    copy = MemoryStorage(f"kept-{next(COUNT)}")
    for key in base.list(""):
        copy.put_new(key, [base.get(key)])
    return copy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(600)
def test_one_mode_at_each_operation(prepared, kind):
    campaign(prepared, KINDS[kind], lambda k, mode: list(Fault)[k % len(Fault)] is mode, least=40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(3600)
def test_every_mode_at_each_operation(prepared, kind):
    campaign(prepared, KINDS[kind], lambda k, mode: True, least=300)


def campaign(prepared, settings, wanted, *, least: int) -> None:
    folder, base = prepared
    cache = folder / "cache"
    undisturbed = content(ingest(open_on(copy_of(base), cache), settings))
    assert undisturbed["embed mean"][0], "vectors are compared"
    probe = FaultStorage(copy_of(base), {})
    ingest(open_on(probe, cache), settings)
    n_cases = 0
    for k, mode in itertools.product(range(probe.n_operations), Fault):
        if not wanted(k, mode):
            continue
        what = f"operation {k} {probe.operations[k]}, {mode}"
        inner = copy_of(base)
        with contextlib.suppress(ActstoreError, Killed):
            ingest(open_on(FaultStorage(inner, {k: mode}), cache), settings)
        assert fsck(inner, deep=False).is_clean, what
        assert content(ingest(open_on(inner, cache), settings)) == undisturbed, what
        assert fsck(inner, deep=True).is_clean, what
        n_cases += 1
    print(f"{n_cases} cases")
    assert n_cases >= least
