"""Damage any object of an index in any way: a named error or the right answer, never a wrong one, and the process lives."""

import random
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest

import actstore
from actstore import FormatError, index_shard, vector_index
from actstore.errors import ErrorKind
from actstore.faiss_file import open_faiss
from actstore.ingest import build_index
from actstore.log import fsck
from actstore.storage import open_storage
from actstore.vector_index import open_indexes
from tests.indexing import indexed
from tests.indexing.indexed import HOOK_POINT
from tests.ingest import kept
from tests.test_corruption import mutations, replace

KINDS = ("flat", "ivf_sq8", "ivf_rabitq")
STEPS = {"flat": "centre", "ivf_sq8": "standardise", "ivf_rabitq": "drop_outliers,centre"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with an index of each kind, one of documents, and what they all answer."""
    folder = tmp_path_factory.mktemp("whole")
    store = actstore.open(folder / "s", create=True)
    run = kept.KeptRun(store, "run", kept.tokenized(store, folder / "tokenizer"), keep=("dense", "pooled"))
    run.finish()
    # Shards of other sizes each: objects of the same bytes are known by their hash, whichever was read.
    for kind, metric, shard_rows in zip(KINDS, ("cosine", "l2", "ip"), (150, 260, 330), strict=True):
        build_index(
            store, "run", HOOK_POINT, kind=kind, metric=metric, transform=STEPS[kind], shard_rows=shard_rows, n_queries=20,
            recall_floor=0.0,
        )  # fmt: skip
    build_index(store, "run", HOOK_POINT, of="documents", kind="flat", shard_rows=10, n_queries=20)
    units = [
        u for (kind, _), c in store.state.collections.items() if kind == "index" for u in c.units.values()
    ]
    norms = [obj.sha256 for unit in units for obj in unit.objects if "/norms-" in obj.key]
    assert len(set(norms)) == len(norms), (
        "or damage to one of two may go unnoticed, as the other is what was read"
    )
    return Path(store.url), answers(store)


def answers(store) -> dict[str, object]:
    """Everything that indexes say, in plain values, read anew: what the process keeps was checked when it was read."""
    for cache in (index_shard._NORMS, index_shard._DOCUMENTS, vector_index._TRANSFORMS):
        cache.clear()
    run = store.run("run")
    queries = np.random.default_rng(0).standard_normal((3, run.d_model(HOOK_POINT))).astype(np.float32)
    found: dict[str, object] = {}
    for metric in ("cosine", "l2", "ip"):
        found[metric] = indexed.candidates(run, queries, 6, metric=metric).tolist()
    found["documents"] = indexed.candidates(run, queries, 6, of="documents").tolist()
    for of in ("tokens", "documents"):
        for metric in ("cosine", "l2", "ip"):
            for index in open_indexes(run, HOOK_POINT, of=of, metric=metric):
                found[f"norms {index.id}"] = [shard.norms().tobytes() for shard in index.shards]
                found[f"trained {index.id}"] = Path(index.trained_file()).read_bytes()
                found[f"queries {index.id}"] = [
                    store.objects.table(obj).to_pylist() for obj in index.collection.seal.objects
                ]
    return found


def kind_of(path: Path, store: Path) -> str:
    parts = path.relative_to(store).parts
    place = "/".join(parts[2:-1])
    name = path.name.split("-")[0]
    return f"{parts[1]}/{place}/{name if not name.isdigit() else 'vectors'}"


@pytest.mark.timeout(300)
def test_no_damage_gives_a_wrong_answer(whole, tmp_path):
    store, truth = whole
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    by_kind: dict[str, list[Path]] = {}
    for path in sorted((copy / "indexes").rglob("*")):
        if path.is_file():
            by_kind.setdefault(kind_of(path, copy), []).append(path)
    names = {name.rsplit("/", 1)[1] for name in by_kind}
    assert names == {"trained", "transform", "vectors", "norms", "docs", "queries"}
    caught = 0
    for paths in by_kind.values():
        path = rng.choice(paths)
        data = path.read_bytes()
        sibling = next((p.read_bytes() for p in paths if p != path), b"other")
        for what, changed in mutations(data, rng, sibling):
            if changed == data:
                continue
            replace(path, changed)
            with pytest.raises(FormatError) as error:
                answers(actstore.open(copy))
            assert error.value.kind in (ErrorKind.OBJECT_DAMAGED, ErrorKind.OBJECT_MISSING), what
            assert path.name in str(error.value), "the error names the object"
            assert not fsck(open_storage(str(copy)), deep=True).is_clean
            caught += 1
            replace(path, data)
    assert caught > 5 * len(by_kind)
    assert answers(actstore.open(copy)) == truth


def write(folder: Path, index) -> str:
    path = str(folder / "file.faiss")
    faiss.write_index(index, path)
    return path


def filled(index, n: int = 40, ids=None):
    vectors = np.random.default_rng(0).standard_normal((n, index.d)).astype(np.float32)
    if not index.is_trained:
        index.train(vectors)
    index.add_with_ids(vectors, np.arange(n) if ids is None else ids)
    return index


def flat(d: int = 8):
    return faiss.IndexIDMap(faiss.IndexFlat(d, faiss.METRIC_L2))


def ivf(d: int = 8, kind=faiss.ScalarQuantizer.QT_8bit):
    return faiss.IndexIVFScalarQuantizer(faiss.IndexFlat(d), d, 1, kind, faiss.METRIC_L2, True)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: filled(flat()), "ivf_sq8", "IndexIDMap, which is not of kind ivf_sq8"),
        (lambda: filled(ivf()), "flat", "which is not of kind flat"),
        (lambda: filled(ivf()), "ivf_rabitq", "which is not of kind ivf_rabitq"),
        (lambda: filled(ivf()), "scan_sq8", "which is not of kind scan_sq8"),
        (lambda: filled(ivf(kind=faiss.ScalarQuantizer.QT_4bit)), "ivf_sq8", "not of kind ivf_sq8"),
        (lambda: filled(flat()), "hnsw", "does not know, 'hnsw'"),
        (lambda: filled(flat(9)), "flat", "vectors of 9 numbers instead of 8"),
        (lambda: filled(flat(), 39), "flat", "39 vectors instead of 40"),
        (lambda: filled(flat(), ids=np.arange(1, 41)), "flat", r"not all in \[0, 40\)"),
        (lambda: filled(ivf(), ids=np.arange(-1, 39)), "ivf_sq8", r"not all in \[0, 40\)"),
        (lambda: ivf(), "ivf_sq8", "0 vectors instead of 40"),
    ],
)
def test_a_file_of_another_index_is_refused(tmp_path, make, kind, message):
    """Whole and readable, but not what the collection says: as a faulty writer would leave it."""
    with pytest.raises(FormatError, match=message) as error:
        open_faiss(write(tmp_path, make()), kind=kind, d=8, n=40, n_indexed=40)
    assert error.value.kind is ErrorKind.INVARIANT_BROKEN


def test_what_is_no_index_is_an_error(tmp_path):
    for data in (b"", b"no index", bytes(1000), b"IwSq" + bytes(100), b"IxMp" + b"\xff" * 100):
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(FormatError, match="no index that this FAISS reads") as error:
            open_faiss(str(tmp_path / "file"), kind="flat", d=8, n=40)
        assert error.value.kind is ErrorKind.OBJECT_DAMAGED


@pytest.mark.parametrize("size", [1e-30, 1e18, 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_queries_of_any_size_are_answered(whole, kind, size):
    store = actstore.open(whole[0])
    metric = dict(zip(KINDS, ("cosine", "l2", "ip"), strict=True))[kind]
    [index] = open_indexes(store.run("run"), HOOK_POINT, metric=metric)
    query = np.random.default_rng(1).standard_normal((2, index.d)).astype(np.float32)
    query *= np.float32(size) / np.abs(query).max()
    for shard in index.shards:
        scores, ordinals = shard.search(query, 5, effort=4)
        assert ordinals.shape == (2, 5)
        assert (ordinals < shard.n).all()
        assert not np.isnan(scores[ordinals >= 0]).any() or size > 1


def test_fsck_finds_an_index_over_units_that_are_not_live(whole):
    """Checked on the state: a store whose writer listed a unit that the run does not have."""
    import dataclasses

    from actstore.log.index_invariants import broken_indexes

    state = actstore.open(whole[0]).state
    assert list(broken_indexes(state)) == []
    [(key, index)] = [
        (k, c) for k, c in state.collections.items() if k[0] == "index" and c.config["kind"] == "ivf_sq8"
    ]
    n_units = len(state.collections["run", "run"].units)

    def broken(**changes) -> list[str]:
        changed = dataclasses.replace(index, config={**index.config, **changes})
        with_it = dataclasses.replace(state, collections={**state.collections, key: changed})
        return [message for folder, message in broken_indexes(with_it) if folder == f"indexes/{index.id}"]

    shards = index.config["shards"]
    assert "units that are not live" in broken(shards=[*shards[:-1], [[shards[-1][0][0], n_units + 3]]])[0]
    assert "rows where the others have" in broken(shards=[*shards[:-1], [[n_units - 1, n_units]]])[0]
    assert "ranges in common" in broken(shards=[shards[0], shards[0], *shards[2:]])[0]
    assert "does not have" in broken(run="other")[0]
    assert "does not describe" in broken(shards=3)[0]
    assert "has a unit" in broken(shards=shards[:-1])[0]
