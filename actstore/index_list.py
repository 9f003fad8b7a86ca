"""Which indexes does a store have, and which of them answer questions? One entry each, from the version log alone."""

from typing import Any

from actstore.index_pieces import all_pieces, rows_of_shards
from actstore.run import Run
from actstore.store import Store
from actstore.vector_index import KIND, VectorIndex, open_indexes

_SHOWN_K = 10
_SHOWN_RECALL = 0.95


def list_indexes(store: Store, run: str | None = None) -> list[dict[str, Any]]:
    """Return what is known of every index, by run, hook point and generation.

    `state` is `used`, `superseded` (a newer one has its rows) or `unfinished`; `coverage` the share of the run's stored rows (its
    documents) that it covers; `recall` that of the 10 nearest at the largest effort measured, null of directions, whose answers
    are exact; `effort_95` the least effort that finds 95 % of them.

    Args:
        store: The store.
        run: Only of this run.

    Raises:
        NotFoundError: no such run.
        FormatError: the manifest's entry of an index is damaged.
    """
    if run is not None:
        store.run(run)
    runs: dict[str, Run] = {}
    indexes = []
    for (kind, _), collection in store.state.collections.items():
        if kind == KIND and run in (None, collection.config.get("run")):
            name = str(collection.config.get("run"))
            runs.setdefault(name, store.run(name))
            indexes.append(VectorIndex(runs[name], collection))
    indexes.sort(
        key=lambda index: (index.run.id, index.hook_point, index.of, index.purpose, index.generation)
    )
    return [_describe(index) for index in indexes]


def _describe(index: VectorIndex) -> dict[str, Any]:
    at_all = [m for m in index.measured if m.k == _SHOWN_K and m.share == 1.0]
    return {
        "index": index.id,
        "run": index.run.id,
        "hook_point": index.hook_point,
        "of": index.of,
        "pooling": index.pooling,
        "purpose": index.purpose,
        "kind": index.kind,
        "metric": index.metric,
        "transform": ",".join(index.transform_steps),
        "first_dims": index.first_dims,
        "generation": index.generation,
        "state": _state(index),
        "n_rows": index.n_rows,
        "n_indexed": index.n_indexed,
        "n_shards": len(index.shards),
        "coverage": _coverage(index),
        "recall": max(at_all, key=lambda m: m.effort).recall if at_all else None,
        "effort_95": index.effort_for(_SHOWN_RECALL, _SHOWN_K) if at_all else None,
        "nbytes": index.nbytes,
        "created_version": index.collection.version,
    }


def _state(index: VectorIndex) -> str:
    if not index.collection.is_sealed:
        return "unfinished"
    used = open_indexes(
        index.run,
        index.hook_point,
        of=index.of,
        purpose=index.purpose,
        metric=index.metric,
        transform_steps=index.transform_steps,
        pooling=index.pooling,
    )
    return "used" if index.id in {other.id for other in used} else "superseded"


def _coverage(index: VectorIndex) -> float:
    """Return the share of what the run stores; of documents, those without a vector counted on both sides."""
    pieces = all_pieces(index.run, index.of)
    n = sum(piece.n for piece in pieces)
    built = [index.unit_ranges[shard.number] for shard in index.shards]
    return sum(rows_of_shards(pieces, built)) / n if n else 1.0
