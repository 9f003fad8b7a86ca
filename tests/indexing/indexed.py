"""Runs to index: clustered rows, as activations are, over a corpus of made-up words; and what is asked of their indexes."""

import numpy as np

from actstore.vector_index import open_indexes
from tests.query.make_store import Made, add_run, make_store

HOOK_POINT = "layers.0.resid_post"


def clustered(width: int, *, n_clusters: int = 40, noise: float = 0.5, seed: int = 0, odd: bool = False):
    """Rows around the same centres in every unit, off zero together, and a few dimensions larger than the others.

    With `odd`, every unit begins with a row of NaN, an infinite one, a row of zeros and two that are equal.
    """
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n_clusters, width)) + 0.5
    centres[:, : max(1, width // 16)] *= 4

    def values(hook_point, tokens):
        own = np.random.default_rng([seed, tokens[0].row])
        rows = centres[own.integers(0, n_clusters, len(tokens))]
        rows = (rows + noise * own.standard_normal(rows.shape)).astype(np.float32)
        if odd:
            rows[0:1, 0], rows[1:2, 0] = np.nan, np.inf
            rows[2:3] = 0
            rows[4:5] = rows[3:4]
        return rows

    return values


def make(
    url: str, *, n_documents: int = 60, width: int = 16, values=None, rows_per_unit: int = 256, **options
) -> Made:
    made = make_store(url, n_documents=n_documents, rows_per_unit=rows_per_unit)
    add_run(made, "run", {HOOK_POINT: width}, values or clustered(width), **options)
    return made


def candidates(run, queries: np.ndarray, k: int, *, effort: int = 1 << 20, **which) -> np.ndarray:
    """Rows that all usable indexes give together for some stored or foreign rows, best first, -1 for none; (q, k)."""
    scores, rows = [], []
    for index in open_indexes(run, HOOK_POINT, **which):
        for shard in index.shards:
            found, ordinals = shard.search(index.prepare(queries), k, effort=effort)
            scores.append(found)
            rows.append(np.where(ordinals >= 0, shard.rows_of(np.maximum(ordinals, 0)), -1))
    order = np.argsort(-np.concatenate(scores, axis=1), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(np.concatenate(rows, axis=1), order, axis=1)


def content(store, id: str) -> dict:
    """What two builds of one index must agree in: bytes of all objects, not attempts or versions."""
    collection = store.state.collection("index", id)
    strip = lambda key: key.rsplit("-", 1)[0]  # noqa: E731 - the attempt
    return {
        "config": collection.config,
        "recall": None if collection.seal is None else collection.seal.meta["recall"],
        "units": {
            u: (unit.rows, dict(unit.meta), sorted((strip(o.key), o.nbytes, o.sha256) for o in unit.objects))
            for u, unit in collection.units.items()
        },
    }
