"""What does the store hold of single documents, and what does plain transformers compute on them?

Rows are compared where a run keeps rows; where it keeps pooled vectors only, the first of its poolings is made again from
plain rows, here and not by the code that made what is stored.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore.int8 import Int8Transform
from actstore.pooled import read_columns
from actstore.pooled_tables import (
    PooledSums,
    piece_columns,
    piece_of,
    pooled_column,
    pooled_objects,
    vectors_of,
)
from actstore.run import Run
from actstore.sampling import kept_offsets
from actstore.store import Store
from actstore.tokenization import Tokenization

from .check_rows import Difference, DocumentCheck, compare_rows, int8_bounds, tolerance_of
from .models import LoadedModel
from .plain_forward import PlainModel

_Compared: TypeAlias = tuple[int, dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]
"""Number of rows or vectors; stored and computed ones by hook point."""


def check_documents(
    loaded: LoadedModel, store: Store, run: str, documents: Sequence[int]
) -> list[DocumentCheck]:
    """Return the differences of each document, in order.

    Args:
        loaded: The run's model.
        store: At a version that has the rows.
        run: Name of the run.
        documents: Documents of its corpus, ascending: each token object is then read once.
    """
    checker = _Checker(loaded, store.run(run))
    return [checker.check(int(d)) for d in documents]


class _Checker:
    """Compares documents of one run."""

    def __init__(self, loaded: LoadedModel, run: Run) -> None:
        self._run, self._plain = run, PlainModel(loaded, run.hook_points)
        self._is_dense = "dense" in run.keep
        self._rows = {name: run.activations(name) for name in run.hook_points} if self._is_dense else {}
        self._tokens = DocumentTokens(run.tokenization)
        self._tolerance = tolerance_of(run.config)
        int8 = run.collection.info.get("int8") or {}
        self._int8 = {name: Int8Transform.from_json(stored) for name, stored in int8.items()}
        # Where experts are chosen, one rounding can choose another: a few rows of a document may be anything.
        self._typical = any(name.endswith(".router") for name in loaded.map.sites)

    def check(self, doc_id: int) -> DocumentCheck:
        windows = [(unit, t) for unit, t in self._tokens.windows(doc_id)]
        n_rows, stored, computed = self._dense(windows) if self._is_dense else self._pooled(doc_id, windows)
        if not n_rows:
            return DocumentCheck(doc_id, 0, {})
        differences = {name: self._compare(name, doc_id, stored[name], computed[name]) for name in stored}
        return DocumentCheck(doc_id, n_rows, differences)

    def _dense(self, windows: Sequence[tuple[int, pa.Table]]) -> _Compared:
        stored: dict[str, list[Any]] = {name: [] for name in self._run.hook_points}
        computed: dict[str, list[Any]] = {name: [] for name in self._run.hook_points}
        n_rows = 0
        for unit, table in windows:
            kept = self._kept(unit, table["row"].to_numpy())
            if not kept.any():
                continue
            rows = table["row"].to_numpy()[kept]
            n_rows += len(rows)
            for name, values in self._plain.activations(table["token_id"].to_numpy()):
                computed[name].append(values[kept])
                stored[name].append(self._rows[name][rows].astype(np.float32, copy=False))
        if not n_rows:
            return 0, {}, {}
        return n_rows, _joined(stored), _joined(computed)

    def _pooled(self, doc_id: int, windows: Sequence[tuple[int, pa.Table]]) -> _Compared:
        units = list(dict.fromkeys(unit for unit, _ in windows))
        if not units or any(unit not in self._run.collection.units for unit in units):
            return 0, {}, {}
        stored = {n: stored_vector(self._run, doc_id, units, n) for n in self._run.hook_points}
        if any(vector is None for vector in stored.values()):
            return 0, {}, {}
        rows: dict[str, list[Any]] = {name: [] for name in self._run.hook_points}
        for _, table in windows:
            for name, values in self._plain.activations(table["token_id"].to_numpy()):
                rows[name].append(values)
        tokens = pa.concat_tables([t for _, t in windows])
        pooling, special = self._run.poolings[0], bool(self._run.config.get("pool_special", False))
        computed = {name: pool(tokens, found, pooling, special) for name, found in _joined(rows).items()}
        return 1, {name: vector[None] for name, vector in stored.items() if vector is not None}, computed

    def _kept(self, unit: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of a unit's rows the run stores."""
        if unit not in self._run.collection.units:
            return np.zeros(len(rows), bool)
        sample = self._run.config.get("sample")
        if sample is None:
            return np.ones(len(rows), bool)
        size = self._run.tokenization.rows_per_unit
        offsets = kept_offsets(unit, size, rows_per_unit=size, rate=sample["rate"], seed=sample["seed"])
        return np.isin(rows - unit * size, offsets)

    def _compare(self, name: str, doc_id: int, stored_td: Any, computed_td: Any) -> Difference:
        return compare_rows(
            stored_td.astype(np.float64),
            computed_td.astype(np.float64),
            tolerance=self._tolerance,
            bounds=int8_bounds(computed_td, self._int8[name]) if name in self._int8 else None,
            document=doc_id,
            typical=self._typical,
        )


class DocumentTokens:
    """Finds the windows of documents in a tokenization; holds one unit's tokens."""

    def __init__(self, tokenization: Tokenization) -> None:
        self._tokenization = tokenization
        self._units = tokenization.units
        self._last = [int(u.meta["last_doc"]) for u in self._units]
        self._table: tuple[int, pa.Table] | None = None

    def windows(self, doc_id: int) -> Iterator[tuple[int, pa.Table]]:
        """Yield the unit and the tokens of every window of a document, in order; nothing if it has no token."""
        at = bisect.bisect_left(self._last, doc_id)
        while at < len(self._units) and int(self._units[at].meta["first_doc"]) <= doc_id:
            unit = self._units[at].unit
            if self._table is None or self._table[0] != unit:
                self._table = unit, self._tokenization.unit_table(unit)
            table = self._table[1].filter(pc.equal(self._table[1]["doc_id"], doc_id))
            for window in dict.fromkeys(table["window"].to_pylist()):
                yield unit, table.filter(pc.equal(table["window"], window))
            at += 1


def stored_vector(
    run: Run, doc_id: int, units: Sequence[int], hook_point: str
) -> npt.NDArray[np.float32] | None:
    """Return the stored vector of a document, of the run's first pooling; None if no token of it is pooled.

    Args:
        run: Keeps pooled vectors.
        doc_id: The document.
        units: Those that it lies in, all of them stored.
        hook_point: Canonical name.
    """
    pooling, objects = run.poolings[0], run.store.objects
    total: PooledSums | None = None
    for unit in units:
        live = run.collection.units[unit].objects
        for obj in pooled_objects(run.collection, live, pieces=len(units) > 1):
            if len(units) > 1:
                table = read_columns(objects, obj, piece_columns([hook_point], [pooling]))
                piece = piece_of(table, doc_id, hook_point, [pooling], key=obj.key)
                total = piece if total is None else total + piece
                continue
            columns = ["doc_id", *(pooled_column(hook_point, part) for part in ("n_tokens", pooling))]
            table = read_columns(objects, obj, columns)
            doc_ids, n_tokens, vectors = vectors_of(
                table, hook_point, pooling, run.d_model(hook_point), key=obj.key
            )
            # Documents without a pooled token have no vector.
            found = np.flatnonzero(doc_ids[n_tokens > 0] == doc_id)
            return vectors[found[0]] if len(found) else None
    return None if total is None else total.vector(pooling)


def pool(
    tokens: pa.Table, rows_td: npt.NDArray[np.float32], pooling: str, special: bool
) -> npt.NDArray[np.float64]:
    """Return one document's vector (1, d) from its rows in all windows: every position once, at its first text token.

    Args:
        tokens: The document's tokens in order; columns position, is_special, char_start and char_end.
        rows_td: Their activations.
        pooling: `mean`, `last`, `max` or `weighted_mean`.
        special: Whether special tokens enter.
    """
    position, is_special = tokens["position"].to_numpy(), tokens["is_special"].to_numpy()
    # A special token that is written in the text stands for characters, one around it for none.
    is_around = is_special & (tokens["char_start"].to_numpy() == tokens["char_end"].to_numpy())
    order = np.lexsort((np.arange(len(position)), is_around, position))
    _, first = np.unique(position[order], return_index=True)
    at = order[first]
    at = at[np.isfinite(rows_td[at]).all(axis=1) & (special | ~is_special[at])]
    rows: npt.NDArray[np.float64] = rows_td[at].astype(np.float64)
    if not len(rows):
        return np.full((1, rows_td.shape[1]), np.nan)
    weights = position[at] + 1.0 if pooling == "weighted_mean" else np.ones(len(rows))
    vector: npt.NDArray[np.float64] = (
        rows.max(axis=0)
        if pooling == "max"
        else rows[-1]
        if pooling == "last"
        else weights @ rows / weights.sum()
    )
    return vector[None]


def _joined(parts: Mapping[str, Sequence[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
