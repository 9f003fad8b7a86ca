"""Indexes for directions over chosen units of a run, with shards as a test wants them; and stores worth asking with one."""

import uuid
from pathlib import Path

import faiss
import numpy as np

from actstore.ingest.indexing.scan_sq8 import ScanSq8
from actstore.log.values import Add, Create, Seal
from actstore.row_norms import row_norms
from actstore.vector_index import index_id
from tests.query.make_store import commit, write


def make_rows(kind: str, n: int = 3000, d: int = 24) -> np.ndarray:
    rng = np.random.default_rng(len(kind))
    rows = rng.standard_normal((n, d))
    rows = {
        "plain": lambda: rows,
        "correlated": lambda: rows @ rng.standard_normal((d, d)) * np.exp(-np.arange(d)) + 100,
        "scales": lambda: rows * 10.0 ** rng.integers(-30, 30, d),
        "constant": lambda: np.where(np.arange(d) % 3 == 0, 2.5, rows),
        "all constant": lambda: np.full((n, d), -7.25),
        "zeros": lambda: np.zeros((n, d)),
        "denormal": lambda: rows * 1e-41,
        "huge": lambda: rows * 3e37,
        "sparse": lambda: np.maximum(rows - 2, 0),
        "heavy": lambda: rows * np.exp(2 * rng.standard_normal((n, d))),
        "float16": lambda: rows.astype(np.float16),
        "bfloat16": lambda: (rows.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32),
        "few": lambda: rows[:20],
        "one": lambda: rows[:1],
        "none": lambda: rows[:0],
    }[kind]()
    return np.ascontiguousarray(rows, np.float32)


KINDS = ["plain", "correlated", "scales", "constant", "all constant", "zeros", "denormal", "huge", "sparse", "heavy", "float16",
         "bfloat16", "few", "one", "none"]  # fmt: skip


def compress(rows: np.ndarray, *, n_rows: int | None = None, block: int = 777) -> dict[str, bytes]:
    """The files of one shard that holds some rows, its sample all of them that are finite."""
    kind = ScanSq8()
    sample = rows[np.isfinite(rows).all(axis=1)]
    trained = kind.train(sample, n_rows=n_rows or len(rows), metric="ip", seed=0, params={})
    return fill(trained, rows, block=block)


def fill(trained: bytes, rows: np.ndarray, *, block: int = 777) -> dict[str, bytes]:
    numbers = np.arange(len(rows))
    blocks = ((numbers[at : at + block], rows[at : at + block]) for at in range(0, len(rows), block))
    found = {}
    for name, part in ScanSq8().build_shard(trained, blocks, len(rows)).items():
        assert isinstance(part, Path)
        found[name] = part.read_bytes()
        part.unlink()
    return found


def opened(data: bytes):
    """A FAISS index from the bytes of its file."""
    return faiss.deserialize_index(np.frombuffer(data, np.uint8))


def add_directions(run, hook_point: str, shards, *, generation: int = 0):
    """Write and seal an index of some units of a run, trained on all rows that it holds; return the run at the new version.

    `shards`: for each shard the half-open ranges of its units.
    """
    acts, store = run.activations(hook_point), run.store
    name, attempt = index_id(run.id, hook_point, "tokens", "directions", generation), uuid.uuid4().hex
    step = acts.rows_per_unit
    units = [[u for a, b in ranges for u in range(a, b)] for ranges in shards]
    parts = [np.concatenate([acts[u * step : (u + 1) * step] for u in some]) for some in units]
    parts = [np.ascontiguousarray(rows, np.float32) for rows in parts]
    together = np.concatenate(parts)
    sample = together[np.isfinite(together).all(axis=1)]
    trained = ScanSq8().train(sample, n_rows=len(sample), metric="ip", seed=0, params={})
    config = {
        "format": 1, "run": run.id, "run_fingerprint": run.collection.fingerprint, "hook_point": hook_point, "of": "tokens",
        "pooling": None, "kind": "scan_sq8", "metric": "ip", "transform": [], "first_dims": None, "d": acts.shape[1],
        "shards": [[list(r) for r in ranges] for ranges in shards], "params": {}, "seed": 0, "generation": generation,
    }  # fmt: skip
    commit(store, Create("index", name, config, {}))
    mark, folder = store.state.collection("index", name).fingerprint, f"indexes/{name}"
    first = write(store, f"{folder}/trained-{attempt}.faiss", trained)
    actions = [Add("index", name, 0, mark, 0, 0, 0, attempt, (first,), {})]
    for s, rows in enumerate(parts):
        files = fill(trained, rows)
        objects = (
            write(store, f"{folder}/shards/{s:06}-{attempt}.faiss", files["faiss"]),
            write(store, f"{folder}/shards/exceptions-{s:06}-{attempt}.safetensors", files["exceptions"]),
            write(
                store,
                f"{folder}/shards/norms-{s:06}-{attempt}.bin",
                row_norms(rows)[0].astype("<f8").tobytes(),
            ),
        )
        actions.append(
            Add("index", name, 0, mark, s + 1, len(rows), 0, attempt, objects, {"n_indexed": len(rows)})
        )
    meta = {"recall": [], "floor": 0.0, "why": []}
    commit(store, *actions, Seal("index", name, 0, len(actions), sum(a.rows for a in actions), (), meta))
    return store.run(run.id)
