"""What is the one vector of each document of a run, at a hook point?

    vectors = run.pooled("layers.3.resid_post", "mean").to_numpy()
    vectors.doc_ids, vectors.n_tokens, vectors.vectors

A unit's documents are in its own tables. Those that are spread over several units are merged from their pieces: once for
all when the run is complete, by the reader before that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.codec.cache import BytesCache
from actstore.errors import ErrorKind, FormatError
from actstore.log.values import Collection, StoredObject, Unit
from actstore.objects import ObjectReader
from actstore.pooled_tables import (
    PooledSums,
    piece_columns,
    piece_of,
    pooled_column,
    pooled_objects,
    spanning_documents,
    vectors_of,
)

Int64Array = npt.NDArray[np.int64]

_MERGE_DOCUMENTS = 256
"""Documents merged from pieces that a scan gives out together."""

_CACHE_BYTES = 256 << 20

_CACHE: "BytesCache[PooledVectors]" = BytesCache(_CACHE_BYTES)
"""Decoded vectors, by the hash of their object: of hook points that take no more than half of this altogether, and of documents
that were asked for by number. Decoding takes ten times as long as comparing."""


@dataclass(frozen=True, slots=True, eq=False)
class PooledVectors:
    """Some documents and their vectors, by ascending `doc_ids`."""

    doc_ids: Int64Array
    """Shape (n,)."""

    n_tokens: Int64Array
    """Tokens that entered each vector, shape (n,)."""

    vectors: npt.NDArray[np.float32]
    """Shape (n, d_model); rows of NaN for documents without a pooled token, which only `include_empty=True` gives."""

    def __len__(self) -> int:
        return len(self.doc_ids)


class Pooled:
    """The pooled vectors of one hook point of a run, at one version of the store; reads nothing until asked."""

    def __init__(
        self,
        objects: ObjectReader,
        collection: Collection,
        units: Sequence[Unit],
        *,
        hook_point: str,
        d_model: int,
        pooling: str,
    ) -> None:
        """Make a reader.

        Args:
            objects: Of the store.
            collection: The run.
            units: Of the run's tokenization, ascending.
            hook_point: Canonical name.
            d_model: Its width.
            pooling: A pooling that the run keeps.
        """
        self._objects = objects
        self._collection = collection
        self._units = units
        self.hook_point = hook_point
        """Canonical name of the hook point."""
        self.pooling = pooling
        """`mean`, `last`, `max` or `weighted_mean`."""
        self.d_model = d_model
        """Numbers of a vector."""

    def __repr__(self) -> str:
        return (
            f"<Pooled {self.pooling} of {self._collection.id}/{self.hook_point}: {self.n_documents} documents, "
            f"{self.d_model} numbers each>"
        )

    @property
    def n_documents(self) -> int:
        """Documents that are there, those without a pooled token included. Reads nothing."""
        whole = sum(int(unit.meta["pooled"]["documents"]) for unit in self._collection.units.values())
        live = self._collection.units
        return whole + sum(all(u in live for u in spans) for _, spans in spanning_documents(self._units))

    def scan(self, *, include_empty: bool = False, docs: Int64Array | None = None) -> Iterator[PooledVectors]:
        """Yield the documents in ascending order, about a unit's at a time.

        A document is there once all units that it lies in are stored. Reads each unit's object once, only this vector's columns,
        and holds one; what is read of few documents is kept for the next time, 256 MiB in the process. Arrays may be read-only.

        Args:
            include_empty: Also give documents without a pooled token, with NaN for a vector; they are left out otherwise.
            docs: Only these documents, ascending and each once; units that hold none of them are not read. All if None.

        Raises:
            FormatError: an object is missing or damaged.
        """
        units, groups = self._plan(docs)
        spanning = (part for part in map(_those(docs), self._spanning(groups, docs)) if len(part))
        waiting = next(spanning, None)
        for number in units:
            for obj in pooled_objects(self._collection, self._collection.units[number].objects):
                found = _those(docs)(self._read(obj, docs))
                while waiting is not None and len(found) and waiting.doc_ids[0] < found.doc_ids[0]:
                    # Documents that lie in several units are never among those of one: the stretches do not interleave.
                    before = int(np.searchsorted(waiting.doc_ids, found.doc_ids[0]))
                    yield from _given(_cut(waiting, 0, before), include_empty=include_empty)
                    rest = _cut(waiting, before, len(waiting))
                    waiting = rest if len(rest) else next(spanning, None)
                yield from _given(found, include_empty=include_empty)
        while waiting is not None:
            yield from _given(waiting, include_empty=include_empty)
            waiting = next(spanning, None)

    def to_numpy(self, *, include_empty: bool = False) -> PooledVectors:
        """Return all documents at once: `n_documents * d_model * 4` bytes; see `scan`."""
        n, at = self.n_documents, 0
        doc_ids, n_tokens = np.empty(n, np.int64), np.empty(n, np.int64)
        vectors = np.empty((n, self.d_model), np.float32)
        for part in self.scan(include_empty=include_empty):
            end = at + len(part)
            doc_ids[at:end], n_tokens[at:end], vectors[at:end] = part.doc_ids, part.n_tokens, part.vectors
            at = end
        return PooledVectors(doc_ids[:at], n_tokens[:at], vectors[:at])

    def documents(self, doc_ids: Sequence[int] | Int64Array) -> PooledVectors:
        """Return those of some documents that are there with a vector, by ascending number, each once.

        Reads the objects that hold them; see `scan`.
        """
        parts = list(self.scan(docs=np.unique(np.asarray(doc_ids, np.int64))))
        nothing = PooledVectors(
            np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, self.d_model), np.float32)
        )
        return PooledVectors(
            np.concatenate([part.doc_ids for part in (nothing, *parts)]),
            np.concatenate([part.n_tokens for part in (nothing, *parts)]),
            np.concatenate([part.vectors for part in (nothing, *parts)]),
        )

    def objects(self, docs: Int64Array | None = None) -> list[StoredObject]:
        """Return the stored objects that `scan` reads for these documents, all if None."""
        units, groups = self._plan(docs)
        found = [
            o for u in units for o in pooled_objects(self._collection, self._collection.units[u].objects)
        ]
        if self._collection.seal is not None:
            return found + (pooled_objects(self._collection, self._collection.seal.objects) if groups else [])
        pieces = {u.unit for group in groups for u in group} & self._collection.units.keys()
        live = (self._collection.units[u].objects for u in sorted(pieces))
        return found + [o for objects in live for o in pooled_objects(self._collection, objects, pieces=True)]

    def _plan(self, docs: Int64Array | None) -> tuple[list[int], list[Sequence[Unit]]]:
        """Return the stored units to read, ascending, and stretches of units that wanted documents lie in, several each."""
        if docs is None:
            return sorted(self._collection.units), [self._units]
        firsts = np.array([int(unit.meta["first_doc"]) for unit in self._units], np.int64)
        lasts = np.array([int(unit.meta["last_doc"]) for unit in self._units], np.int64)
        # The units of a document are those that end with it or later and begin with it or earlier.
        low, high = np.searchsorted(lasts, docs), np.searchsorted(firsts, docs, side="right")
        units = [self._units[i].unit for i in np.unique(low[high - low == 1]).tolist()]
        several = np.unique(np.stack([low, high])[:, high - low > 1], axis=1).T.tolist()
        return [u for u in units if u in self._collection.units], [self._units[a:b] for a, b in several]

    def _spanning(self, groups: Sequence[Sequence[Unit]], docs: Int64Array | None) -> Iterator[PooledVectors]:
        """Yield the documents that lie in several units, some at a time; when the run is not complete those of `groups`."""
        if self._collection.seal is not None:
            for obj in pooled_objects(self._collection, self._collection.seal.objects) if groups else ():
                yield self._read(obj, docs)
            return
        for units in groups:
            yield from self._merged(units)

    def _merged(self, units: Sequence[Unit]) -> Iterator[PooledVectors]:
        """Yield the documents that lie in several of some units, merged from their pieces, some at a time."""
        doc_ids, sums = list[int](), list[PooledSums]()
        merged = merge_pieces(self._objects, self._collection, units, [self.hook_point], [self.pooling])
        for doc_id, pieces in merged:
            doc_ids.append(doc_id)
            sums.append(pieces[self.hook_point])
            if len(doc_ids) == _MERGE_DOCUMENTS:
                yield self._finished(doc_ids, sums)
                doc_ids, sums = [], []
        if doc_ids:
            yield self._finished(doc_ids, sums)

    def _finished(self, doc_ids: Sequence[int], sums: Sequence[PooledSums]) -> PooledVectors:
        vectors = np.full((len(doc_ids), self.d_model), np.nan, np.float32)
        for i, one in enumerate(sums):
            if (vector := one.vector(self.pooling)) is not None:
                vectors[i] = vector
        return PooledVectors(
            np.array(doc_ids, np.int64), np.array([one.n_tokens for one in sums], np.int64), vectors
        )

    def _read(self, obj: StoredObject, docs: Int64Array | None) -> PooledVectors:
        """Return the documents of an object, kept for the next time if they are few or `docs` were asked for."""
        if docs is None and 4 * self.n_documents * self.d_model > _CACHE_BYTES // 2:
            return self._load(obj)

        def load() -> tuple[PooledVectors, int]:
            part = self._load(obj)
            for array in (part.doc_ids, part.n_tokens, part.vectors):
                array.setflags(write=False)
            return part, part.doc_ids.nbytes + part.n_tokens.nbytes + part.vectors.nbytes

        # That it is missing or damaged by now is told, although it may not be decoded again.
        self._objects.file(obj)
        return _CACHE.get(f"{obj.sha256}:{self.hook_point}:{self.pooling}", load)

    def _load(self, obj: StoredObject) -> PooledVectors:
        names = ["n_tokens", self.pooling]
        table = read_columns(
            self._objects, obj, ["doc_id", *(pooled_column(self.hook_point, n) for n in names)]
        )
        doc_ids, n_tokens, found = vectors_of(table, self.hook_point, self.pooling, self.d_model, key=obj.key)
        if len(found) == len(doc_ids):
            return PooledVectors(doc_ids, n_tokens, found)
        vectors = np.full((len(doc_ids), self.d_model), np.nan, np.float32)
        vectors[n_tokens > 0] = found
        return PooledVectors(doc_ids, n_tokens, vectors)


def read_columns(objects: ObjectReader, obj: StoredObject, columns: Sequence[str]) -> pa.Table:
    """Return some columns of a stored table, checked.

    Raises:
        FormatError: the object is missing, damaged, or no table.
    """
    try:
        return objects.table(obj, columns)
    except pa.ArrowException as error:
        raise FormatError(
            ErrorKind.OBJECT_DAMAGED,
            f"object {obj.key!r} is not a table of pooled vectors ({error}): it was written by a faulty program; see fsck",
        ) from error


def merge_pieces(
    objects: ObjectReader,
    collection: Collection,
    units: Sequence[Unit],
    hook_points: Sequence[str],
    poolings: Sequence[str],
) -> Iterator[tuple[int, Mapping[str, PooledSums]]]:
    """Yield each document that lies in several units, all of them live, with its merged sums by hook point; ascending.

    Reads one unit's table of pieces at a time, and only the columns that `poolings` need.

    Args:
        objects: Of the store.
        collection: The run.
        units: Of the run's tokenization, all of them, ascending.
        hook_points: Of which hook points.
        poolings: For which vectors.

    Raises:
        FormatError: an object is missing, damaged, or lacks a piece.
    """
    wanted = piece_columns(hook_points, poolings)
    last: tuple[str, pa.Table] = "", None
    for doc_id, spans in spanning_documents(units):
        if not all(u in collection.units for u in spans):
            continue
        total: dict[str, PooledSums] = {}
        for u in spans:
            found = pooled_objects(collection, collection.units[u].objects, pieces=True)
            if len(found) != 1:
                raise FormatError(
                    ErrorKind.INVARIANT_BROKEN,
                    f"unit {u} of run {collection.id!r} lists {len(found)} tables of pieces, and holds a piece of document "
                    f"{doc_id}; see fsck",
                )
            if last[0] != found[0].key:  # a unit may end one document and begin another
                last = found[0].key, read_columns(objects, found[0], wanted)
            for name in hook_points:
                piece = piece_of(last[1], doc_id, name, poolings, key=last[0])
                total[name] = total[name] + piece if name in total else piece
        yield doc_id, total


def _cut(part: PooledVectors, start: int, stop: int) -> PooledVectors:
    return PooledVectors(part.doc_ids[start:stop], part.n_tokens[start:stop], part.vectors[start:stop])


def _those(docs: Int64Array | None) -> Callable[[PooledVectors], PooledVectors]:
    """Return what leaves of a part the documents that are wanted."""
    if docs is None:
        return lambda part: part
    wanted = docs

    def pick(part: PooledVectors) -> PooledVectors:
        some = np.isin(part.doc_ids, wanted, assume_unique=True)
        return PooledVectors(part.doc_ids[some], part.n_tokens[some], part.vectors[some])

    return pick


def _given(part: PooledVectors, *, include_empty: bool) -> Iterator[PooledVectors]:
    """Yield what of a stretch of documents is asked for, unless that is nothing."""
    if not include_empty and not (part.n_tokens > 0).all():
        some = part.n_tokens > 0
        part = PooledVectors(part.doc_ids[some], part.n_tokens[some], part.vectors[some])
    if len(part):
        yield part
