"""Stores with runs of rows that are made here, imported as a user would import them; and rows of a known sparse dictionary."""

from pathlib import Path

import numpy as np
import pyarrow as pa

import actstore
from actstore.ingest import import_run

SPECIAL = 0


def make_run(
    path: Path, arrays: dict[str, np.ndarray], *, doc_rows: int = 50, rows_per_unit: int = 512, **options
):
    """Return the store of a run "run" with these rows; every document begins with a special token."""
    folder = path / "arrays"
    folder.mkdir(parents=True)
    n = len(next(iter(arrays.values())))
    for i, rows in enumerate(arrays.values()):
        np.save(folder / f"a{i}.npy", rows)
    doc_ids, at = np.divmod(np.arange(n), doc_rows)
    tokens = pa.table(
        {"doc_id": doc_ids, "token_id": np.where(at == 0, SPECIAL, 1 + at % 7).astype(np.int32)}
    )
    import_run(
        str(path / "store"),
        "run",
        str(folder),
        hook_points={f"a{i}": name for i, name in enumerate(arrays)},
        tokens=tokens,
        special_ids=[SPECIAL],
        rows_per_unit=rows_per_unit,
        **options,
    )
    return actstore.open(path / "store")


def sparse_rows(n: int, *, d: int, n_features: int, active: int, seed: int, offset: float = 1.0):
    """Return rows (n, d) and the features (n_features, d) they are sums of: `active` each, with values of 0.5 to 1.5.

    Features are random directions; about `active` of them, chosen evenly, are in each row, besides a constant `offset` and a
    little noise.
    """
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n_features, d))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    rows = np.empty((n, d), np.float32)
    center = offset * rng.standard_normal(d) / d**0.5
    for start in range(0, n, 4096):
        size = min(4096, n - start)
        codes = (rng.random((size, n_features)) < active / n_features) * rng.uniform(
            0.5, 1.5, (size, n_features)
        )
        rows[start : start + size] = codes @ features + center + 0.01 * rng.standard_normal((size, d))
    return rows, features


def recovered(decoder: np.ndarray, features: np.ndarray, at_least: float = 0.9) -> float:
    """Return the share of features that a row of the decoder has a cosine over `at_least` with."""
    norms = np.linalg.norm(decoder, axis=1, keepdims=True)
    cosines = (decoder / np.where(norms > 0, norms, 1)) @ features.T
    return float((cosines.max(axis=0) > at_least).mean())
