"""What is written of a whole run, right before its seal: array metadata, and pooled vectors across units?"""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from actstore.codec.metadata import zarr_json
from actstore.codec.spec import ShardSpec
from actstore.errors import ConflictError, ErrorKind
from actstore.log.values import Collection, StoredObject, Unit
from actstore.objects import ObjectReader
from actstore.pooled import merge_pieces
from actstore.pooled_tables import (
    PooledSums,
    VectorColumns,
    documents_table,
    merged_key,
    pooled_bytes,
    spanning_documents,
)
from actstore.storage import Storage, write_new

from .unit import RunPlan

MERGED_BYTES = 32 << 20
"""Vectors in one object of merged documents."""


def write_array_metadata(
    storage: Storage,
    key: str,
    spec: ShardSpec,
    *,
    n_shards: int,
    attributes: Mapping[str, Any],
    left_out: Sequence[int],
) -> StoredObject:
    """Write a hook point's `zarr.json`, or adopt the one that an interrupted seal left.

    That one may call more units quarantined than are now: those that a later job computed after all.

    Args:
        storage: Where to.
        key: Its fixed key.
        spec: Layout of the shards.
        n_shards: Shards of the whole array.
        attributes: For `attributes.actstore`.
        left_out: Units that are quarantined, ascending: a plain Zarr reader sees fill values there.

    Raises:
        ConflictError: the key holds something else.
    """
    said = {**attributes, "quarantined": list(left_out)} if left_out else dict(attributes)
    data = zarr_json(spec, n_shards=n_shards, attributes=said)
    try:
        return write_new(storage, key, [data])
    except ConflictError as error:
        found = storage.get(key)
        earlier = None if found is None else _quarantined_in(found)
        if found is None or earlier is None or error.kind is not ErrorKind.ALREADY_EXISTS:
            raise
        same = zarr_json(spec, n_shards=n_shards, attributes={**attributes, "quarantined": earlier})
        if found != same or not set(left_out) <= set(earlier):
            raise
        return write_new(storage, key, [found])


def _quarantined_in(data: bytes) -> list[Any] | None:
    """Return the units that array metadata calls quarantined; None where it says nothing of that."""
    try:
        found = json.loads(data)["attributes"]["actstore"]["quarantined"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, list) and all(type(u) is int for u in found) else None


class PooledMerge:
    """Writes the vectors of documents that lie in several units; holds one object's worth."""

    def __init__(
        self, storage: Storage, objects: ObjectReader, plan: RunPlan, *, object_bytes: int = MERGED_BYTES
    ) -> None:
        self._storage = storage
        self._objects = objects
        self._plan = plan
        self._widths = {name: spec.d_model for name, spec in plan.specs.items()}
        vector_bytes = 4 * sum(self._widths.values()) * len(plan.poolings)
        self._per_object = max(1, object_bytes // max(1, vector_bytes))
        self._id = uuid.uuid4().hex
        self.n_documents = 0
        """Documents merged so far."""
        self.n_incomplete = 0
        """Documents without vectors, as not all of their units are there."""

    def write(self, run: Collection, units: Sequence[Unit]) -> Iterator[StoredObject]:
        """Write the merged documents of `run`, whose tokenization has `units`, and yield the objects."""
        self.n_incomplete = sum(
            not all(u in run.units for u in spans) for _, spans in spanning_documents(units)
        )
        batch: list[tuple[int, Mapping[str, PooledSums]]] = []
        for merged in merge_pieces(self._objects, run, units, list(self._widths), self._plan.poolings):
            batch.append(merged)
            if len(batch) == self._per_object:
                yield self._write(batch)
                batch = []
        if batch:
            yield self._write(batch)

    def _write(self, batch: Sequence[tuple[int, Mapping[str, PooledSums]]]) -> StoredObject:
        vectors = {}
        for name, width in self._widths.items():
            vectors[name] = VectorColumns(len(batch), width, self._plan.poolings)
            for i, (_, sums) in enumerate(batch):
                vectors[name].put(i, sums[name])
        table = documents_table(np.array([doc_id for doc_id, _ in batch], np.int64), vectors)
        key = merged_key(self._plan.run, self.n_documents // self._per_object, self._id)
        self.n_documents += len(batch)
        return write_new(self._storage, key, [pooled_bytes(table)])
