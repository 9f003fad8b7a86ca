"""Indexes without a builder: FAISS files written as FORMAT.md has them, with whatever lists, shards and recall a test wants."""

import io
import uuid

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.log.values import Add, Create, Seal
from actstore.row_norms import row_norms
from actstore.transforms import fit_transform
from actstore.vector_index import PURPOSES, index_id
from tests.query.make_store import commit, write

EFFORTS = (1, 2, 4, 8, 16, 32, 64)


def add_index(
    run,
    hook_point,
    *,
    shards,
    kind="ivf_sq8",
    metric="cosine",
    transform=(),
    n_lists=8,
    generation=0,
    recall=None,
):
    """Write and seal an index of some units of a run.

    Args:
        run: The run; its store is moved to the new version.
        hook_point: Canonical name.
        shards: For each shard the half-open ranges of its units.
        kind: `flat` or `ivf_sq8`.
        metric: Of the index.
        transform: Steps.
        n_lists: Of `ivf_sq8`.
        generation: Its number.
        recall: What its seal says was measured, by effort and k and share; None: 1.0 everywhere.
    """
    acts, store = run.activations(hook_point), run.store
    name = index_id(run.id, hook_point, "tokens", PURPOSES[kind], generation)
    moved = fit_transform(run, hook_point, transform)
    parts = [[acts.read(unit_rows(acts, u)) for a, b in ranges for u in range(a, b)] for ranges in shards]
    kept = [np.concatenate(part) if part else np.empty((0, acts.shape[1]), np.float32) for part in parts]
    vectors = [prepared(moved.apply(raw), metric) for raw in kept]
    d = moved.d_out
    config = {
        "format": 1, "run": run.id, "run_fingerprint": run.collection.fingerprint, "hook_point": hook_point, "of": "tokens",
        "pooling": None, "kind": kind, "metric": metric, "transform": list(transform), "first_dims": None, "d": d,
        "shards": [[list(r) for r in ranges] for ranges in shards], "params": {"n_lists": n_lists} if kind != "flat" else {},
        "seed": 0, "generation": generation,
    }  # fmt: skip
    commit(store, Create("index", name, config, {}))
    mark = store.state.collection("index", name).fingerprint
    good = [fit(v, raw, metric) for v, raw in zip(vectors, kept, strict=True)]
    empty = train(
        kind, metric, d, n_lists, np.concatenate([v[g] for v, g in zip(vectors, good, strict=True)])
    )
    attempt = uuid.uuid4().hex
    objects = [
        write(store, f"indexes/{name}/trained-{attempt}.faiss", faiss.serialize_index(empty).tobytes())
    ]
    if transform:
        objects.append(write(store, f"indexes/{name}/transform-{attempt}.safetensors", moved.to_bytes()))
    actions = [Add("index", name, 0, mark, 0, 0, 0, attempt, tuple(objects), {})]
    for s, (raw, v, g) in enumerate(zip(kept, vectors, good, strict=True)):
        filled = faiss.deserialize_index(faiss.serialize_index(empty))
        filled.add_with_ids(np.ascontiguousarray(v[g]), np.flatnonzero(g))
        attempt = uuid.uuid4().hex
        folder = f"indexes/{name}/shards"
        objects = (write(store, f"{folder}/{s:06}-{attempt}.faiss", faiss.serialize_index(filled).tobytes()),)
        if len(raw):
            norms = row_norms(raw)[0].astype("<f8").tobytes()
            objects = (*objects, write(store, f"{folder}/norms-{s:06}-{attempt}.bin", norms))
        meta = {"n_indexed": int(g.sum())}
        actions.append(Add("index", name, 0, mark, s + 1, len(raw), 0, attempt, objects, meta))
    table = [
        {"effort": e, "k": k, "share": share, "recall": 1.0 if recall is None else recall(e, k, share)}
        for e in ((0,) if kind == "flat" else [e for e in EFFORTS if e <= n_lists])
        for k in (10, 100)
        for share in (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.table({"row": pa.array([], pa.int64())}), sink)
    queries = write(store, f"indexes/{name}/queries-{uuid.uuid4().hex}.parquet", sink.getvalue())
    n_rows = sum(map(len, kept))
    seal = Seal(
        "index", name, 0, len(actions), n_rows, (queries,), {"recall": table, "floor": 0.0, "why": []}
    )
    commit(store, *actions, seal)
    return store.run(run.id)


def unit_rows(acts, unit):
    """Rows of a unit that are stored."""
    return acts.rows(unit * acts.rows_per_unit, (unit + 1) * acts.rows_per_unit)


def prepared(vectors, metric):
    """Vectors as FAISS sees them."""
    if metric != "cosine":
        return vectors
    wide = vectors.astype(np.float64)
    with np.errstate(all="ignore"):
        length = np.sqrt((wide**2).sum(axis=1, keepdims=True))
        return (wide / np.where(length > 0, length, 1)).astype(np.float32)


def fit(vectors, raw, metric):
    """Which vectors are indexed."""
    good = np.isfinite(vectors).all(axis=1) & np.isfinite(raw).all(axis=1)
    return good & vectors.any(axis=1) if metric == "cosine" else good


def train(kind, metric, d, n_lists, sample):
    number = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    if kind == "flat":
        return faiss.IndexIDMap(faiss.IndexFlat(d, number))
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlat(d, number), d, n_lists, faiss.ScalarQuantizer.QT_8bit, number, True
    )
    index.cp.min_points_per_centroid = 1
    index.train(np.ascontiguousarray(sample))
    return index
