"""What is in one shard of an index? A FAISS file, the norms of the rows that it covers, and which rows those are.

A vector's number in its shard is its *ordinal*: the stored rows of the shard's units in row order (or documents with a vector by
number), counted from 0, whether they are indexed or not. (FORMAT.md, section 10)
"""

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore import faiss_file
from actstore.checks import check_whole
from actstore.codec.cache import BytesCache
from actstore.errors import ErrorKind, InvalidInputError
from actstore.log.values import StoredObject
from actstore.objects import ObjectReader

if TYPE_CHECKING:
    from actstore.vector_index import VectorIndex

Float32s: TypeAlias = npt.NDArray[np.float32]
Float64s: TypeAlias = npt.NDArray[np.float64]
Int64s: TypeAlias = npt.NDArray[np.int64]
Bits: TypeAlias = npt.NDArray[np.uint8]

_NORMS: Final[BytesCache[Float64s]] = BytesCache(1 << 30)
"""Of shards, by the hash of their object: 8 bytes for every row."""

_DOCUMENTS: Final[BytesCache[Int64s]] = BytesCache(256 << 20)


class IndexShard:
    """One shard of an index: a FAISS file, and what of the run it has."""

    def __init__(self, index: "VectorIndex", number: int) -> None:
        """Take a shard; reads nothing yet.

        Args:
            index: The index it is of.
            number: Counted from 0.
        """
        self.index = index
        self.number = number
        """Counted from 0 in the index."""
        unit = index.collection.units[number + 1]
        self.n = unit.rows
        """Ordinals: stored rows (documents with a vector) that it covers, indexed or not."""
        try:
            self.n_indexed = int(unit.meta["n_indexed"])
            """Vectors in the FAISS file."""
        except (KeyError, TypeError, ValueError) as error:
            raise index.broken(f"shard {number} does not say how many vectors it has ({error!r})") from error
        self._units: tuple[Int64s, Int64s] | None = None

    def __repr__(self) -> str:
        return f"<IndexShard {self.number} of {self.index.id}: {self.n_indexed} of {self.n} {self.index.of}>"

    def search(
        self, vectors_qd: Float32s, k: int, *, effort: int, bits: Bits | None = None
    ) -> tuple[Float32s, Int64s]:
        """Return the best candidates of each query, as far as the index knows.

        Deterministic; may run in several threads at once (see `faiss_file.faiss_threads`).

        Args:
            vectors_qd: What `VectorIndex.prepare` gave, shape (q, d).
            k: Candidates of a query.
            effort: Lists to probe; nothing to an index without lists.
            bits: Which ordinals may be found: bit i, counted from the lowest of each byte, is ordinal i. All if None.

        Returns:
            Scores, larger is better: the inner product, or minus the squared distance; and ordinals, -1 where there are no more.
            Both of shape (q, min(k, n)), best first.

        Raises:
            InvalidInputError: an array of another shape, numbers that are not finite, `k` or `effort` out of range.
            FormatError: the file is missing or damaged.
            MissingDependencyError: FAISS is not installed.
        """
        vectors = faiss_file.check_vectors(vectors_qd, self.index.d)
        k = min(check_whole(k, what="k", least=1), self.n)
        effort = max(1, check_whole(effort, what="effort", least=0, most=1 << 31))
        if not k or not self.n_indexed or not len(vectors):
            shape = (len(vectors), k)
            return np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        opened = self.open()
        selector = None if bits is None else self._selector(bits)
        with np.errstate(all="ignore"):
            scores, ordinals = opened.search(
                vectors, k, params=faiss_file.parameters(opened, effort=effort, selector=selector)
            )
        if self.index.metric == "l2":
            scores = -scores
        scores[ordinals < 0] = -np.inf
        return scores, ordinals

    def open(self) -> Any:
        """Return the opened FAISS index; see `actstore.faiss_file.open_faiss`."""
        return faiss_file.open_faiss(
            self.file(), kind=self.index.kind, d=self.index.d, n=self.n, n_indexed=self.n_indexed
        )

    def file(self) -> str:
        """Return the path of a local file with the FAISS index, checked against its hash.

        Raises:
            FormatError: it is missing or damaged.
        """
        return self._objects.file(self._object("", ".faiss"))

    def exceptions_file(self) -> str | None:
        """Return the path of the file of rows that the compressed ones leave out, checked; None if the kind has none."""
        obj = self.index.shard_object(self.number, "exceptions-", ".safetensors")
        return None if obj is None else self._objects.file(obj)

    def norms(self) -> Float64s:
        """Return the L2 norm of every stored row, NaN or infinite for one that is not finite: shape (n,), read-only.

        Kept in the process, up to 1 GiB.

        Raises:
            FormatError: its object is missing or damaged.
        """
        return self._numbers("norms-", "<f8", _NORMS)

    def unit_ranges(self) -> list[tuple[int, int, int]]:
        """Return the units that it has, ascending, each with its ordinals: (unit, first, stop).

        Raises:
            InvalidInputError: it has documents, not units.
        """
        if self.index.of == "documents":
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"index {self.index.id!r} is of documents, which have no units"
            )
        units, starts = self._unit_starts()
        return list(zip(units.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True))

    def rows_of(self, ordinals: npt.ArrayLike) -> Int64s:
        """Return the row (document) numbers of ordinals, which are all from 0 on and below `n`; any shape."""
        wanted = np.asarray(ordinals, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.n:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"ordinals from {wanted.min()} to {wanted.max()} were asked for, {self!r} has [0, {self.n})",
            )
        if self.index.of == "documents":
            return self.documents()[wanted]
        layout = self.index.layout()
        units, starts = self._unit_starts()
        place = np.searchsorted(starts, wanted, side="right") - 1
        offsets = wanted - starts[place]
        if layout.kept is None:
            return units[place] * layout.rows_per_unit + offsets
        rows = np.empty_like(wanted)
        stored = {unit.unit: unit for unit in layout.units}
        for at in np.unique(place).tolist():
            here = place == at
            unit = stored[int(units[at])]
            rows[here] = layout.numbers(unit, 0, unit.n_rows)[offsets[here]]
        return rows

    def ordinals_of(self, rows: npt.ArrayLike) -> Int64s:
        """Return the ordinals of rows (document numbers), -1 for those that are not in the shard; any shape."""
        wanted = np.asarray(rows, np.int64)
        flat = wanted.ravel()
        if self.index.of == "documents":
            documents = self.documents()
            place = np.searchsorted(documents, flat)
            found = place < len(documents)
            found[found] = documents[place[found]] == flat[found]
            return np.where(found, place, -1).reshape(wanted.shape)
        layout = self.index.layout()
        ordinals = np.full(flat.shape, -1, np.int64)
        exists = layout.exist(flat)
        unit_of, offset = np.divmod(layout.places(flat[exists]), layout.stored_rows_per_unit)
        units, starts = self._unit_starts()
        place = np.minimum(np.searchsorted(units, unit_of), max(0, len(units) - 1))
        inside = units[place] == unit_of if len(units) else np.zeros(len(unit_of), np.bool_)
        ordinals[exists] = np.where(inside, starts[place] + offset, -1)
        return ordinals.reshape(wanted.shape)

    def documents(self) -> Int64s:
        """Return the numbers of the documents that it has, ascending: ordinal i is the i-th. Shape (n,), read-only."""
        return self._numbers("docs-", "<i8", _DOCUMENTS)

    def objects(self) -> tuple[StoredObject, ...]:
        """Return what is stored of it."""
        return self.index.collection.units[self.number + 1].objects

    @property
    def _objects(self) -> ObjectReader:
        return self.index.run.store.objects

    def _object(self, prefix: str, ending: str) -> StoredObject:
        return self.index.one_object(self.objects(), prefix, ending)

    def _numbers(self, prefix: str, dtype: str, cache: BytesCache[Any]) -> npt.NDArray[Any]:
        """Return an object of `n` numbers of 8 bytes, checked; there is none of no rows."""
        if not self.n:
            return np.empty(0, dtype)
        obj = self._object(prefix, ".bin")
        if obj.nbytes != 8 * self.n:
            raise self.index.broken(f"object {obj.key!r} has {obj.nbytes} bytes for {self.n} rows")
        found: npt.NDArray[Any] = cache.get(
            obj.sha256, lambda: (np.frombuffer(self._objects.read(obj), dtype), obj.nbytes)
        )
        return found

    def _unit_starts(self) -> tuple[Int64s, Int64s]:
        """Return the units of the shard, ascending, and the first ordinal of each, and the end."""
        if self._units is None:
            live = self.index.run.collection.units
            units = [unit for a, b in self.index.unit_ranges[self.number] for unit in range(a, b)]
            missing = [unit for unit in units if unit not in live]
            starts = np.cumsum([0, *(live[unit].rows for unit in units if unit in live)])
            if missing or starts[-1] != self.n:
                raise self.index.broken(
                    f"shard {self.number} has {self.n} rows, and its units of run {self.index.run.id!r} have {starts[-1]}"
                )
            self._units = np.array(units, np.int64), starts.astype(np.int64)
        return self._units

    def _selector(self, bits: Bits) -> Any:
        if bits.dtype != np.uint8 or bits.shape != (-(-self.n // 8),):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"a bitmap of {bits.dtype} and shape {bits.shape} was given for {self.n} ordinals: uint8, ({-(-self.n // 8)},)",
            )
        return faiss_file.load_faiss().IDSelectorBitmap(np.ascontiguousarray(bits))
