"""What are the sparse codes of a run's rows in a dictionary? They are read like an array of sparse rows. (FORMAT.md, section 8)

    codes = run.codes("sae")
    codes.rows([5, 9]).to_dense()
    codes.postings().top(12, 20)

Row numbers are the run's. Every page that is read is compared with a checksum that the manifest vouches for.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from actstore.checks import check_whole
from actstore.codec.cache import BytesCache
from actstore.codec.layout import RowLayout, UnitRows
from actstore.codec.spec import ShardSpec
from actstore.errors import ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.log.values import Collection, StoredObject, Unit
from actstore.names import check_name
from actstore.postings import Postings, open_postings
from actstore.row_requests import as_numbers
from actstore.sampling import KeptRows, parse_kept
from actstore.sparse.rows import VALUE_DTYPES, SparseRows
from actstore.sparse.unit_codes import UnitCodes

if TYPE_CHECKING:
    import pyarrow as pa

    from actstore.pooled_codes import PooledCodes
    from actstore.run import Run

Int64s = npt.NDArray[np.int64]

MAX_ID: Final = 64
"""Characters of a collection's id (FORMAT.md, section 2)."""

SCAN_ROWS: Final = 65_536
"""Rows that a scan gives at once: about 13 MB of codes with 32 per row."""

_DOCUMENTS: BytesCache[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = BytesCache(16 << 20)
"""Of tokenizations' units: their documents, and where each one's rows begin."""


def codes_id(dictionary: str, run: str) -> str:
    """Return the id of the codes of a run in a dictionary.

    Names that hold an `@`, or are too long together, are followed by a hash of both, so that no two pairs have one id.

    >>> codes_id("sae", "pythia")
    'sae@pythia'
    >>> codes_id("sae", "pythia@demo")
    'sae@pythia@demo.8125fecfd7'
    """
    plain = f"{dictionary}@{run}"
    if len(plain) <= MAX_ID and plain.count("@") == 1:
        return check_name(plain, what="id of codes")
    digest = hashlib.sha256(f"{dictionary}\n{run}".encode()).hexdigest()[:10]
    cut = plain[: MAX_ID - len(digest) - 1].rstrip(".")
    return check_name(f"{cut}.{digest}", what="id of codes")


def open_codes(run: "Run", dictionary: Any) -> "Codes":
    """Return the codes of a run in a dictionary, given by name or as a `Dictionary`.

    Raises:
        NotFoundError: the run was not encoded with that dictionary; the message lists those it was.
        FormatError: the manifest's entry of the codes is damaged.
    """
    name = getattr(dictionary, "id", dictionary)
    if not isinstance(name, str):
        raise InvalidInputError(
            ErrorKind.BAD_NAME, f"the name of a dictionary is text, got {dictionary!r:.80}"
        )
    state = run.store.state
    collection = state.collections.get(("codes", codes_id(name, run.id)))
    if collection is None:
        known = sorted(
            str(c.config["dictionary"])
            for (kind, _), c in state.collections.items()
            if kind == "codes" and c.config.get("run") == run.id
        )
        have = f"it was encoded with {known}" if known else "it was encoded with none"
        stored = sorted(id for kind, id in state.collections if kind == "dictionary")
        advice = f"encode it: actstore sae encode STORE {name} {run.id}"
        if stored and name not in stored:
            advice = f"the store has no dictionary of that name, but {stored}"
        raise NotFoundError(
            ErrorKind.COLLECTION_NOT_FOUND,
            f"run {run.id!r} has no codes in dictionary {name!r} at version {state.version}: {have}; {advice}",
        )
    return Codes(run, collection)


class Codes:
    """The codes of a run in a dictionary, at one version of the store; safe for use from many threads, and pickles."""

    def __init__(self, run: "Run", collection: Collection) -> None:
        """Take codes; reads nothing yet.

        Args:
            run: The run that was encoded.
            collection: The codes at the same version of the store.

        Raises:
            FormatError: the manifest's entry of the codes is damaged, or of another run.
        """
        self.run = run
        """The run that was encoded."""
        self.collection = collection
        """The codes as the version log has them."""
        config = collection.config
        try:
            self.dictionary = str(config["dictionary"])
            """Name of the dictionary."""
            self.hook_point = str(config["hook_point"])
            """Canonical name of the hook point that was encoded."""
            self.n_latents = int(config["n_latents"])
            """Latents of the dictionary."""
            self.value_dtype = str(config["value_dtype"])
            """`float16` or `float32`."""
            self.rows_per_unit = int(config["rows_per_unit"])
            """Distance between the row numbers of neighbouring units' first rows."""
            encoded = str(config["run"]), str(config["run_fingerprint"])
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(collection, f"its configuration does not describe codes ({error!r})") from error
        if encoded != (run.id, run.collection.fingerprint):
            raise _broken(
                collection, f"it is of run {encoded[0]!r} and another configuration than run {run.id!r} has"
            )
        if self.value_dtype not in VALUE_DTYPES or min(self.n_latents, self.rows_per_unit) < 1:
            raise _broken(collection, f"values of {self.value_dtype!r}, {self.n_latents} latents")
        self._kept = _parse_kept(collection, run)
        self._units: dict[int, UnitCodes] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Codes, (self.run, self.collection))

    @cached_property
    def _layout(self) -> RowLayout:
        # Every unit's entry is taken apart for it, and what postings answer does without.
        return _layout(self, self._kept)

    @cached_property
    def _layout_units(self) -> dict[int, UnitRows]:
        return {unit.unit: unit for unit in self._layout.units}

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else f"{len(self.collection.units)} units so far"
        return f"<Codes {self.id}: {self.n_rows} rows, {self.n_codes} codes of {self.n_latents} latents, {state}>"

    @property
    def id(self) -> str:
        """That of the collection: the names of dictionary and run."""
        return self.collection.id

    @property
    def n_rows(self) -> int:
        """Rows that are encoded at this version."""
        return self._layout.n_rows

    @property
    def n_codes(self) -> int:
        """Codes of all of them together."""
        return sum(int(unit.meta.get("nnz", 0)) for unit in self.collection.units.values())

    @property
    def is_complete(self) -> bool:
        """Whether every stored row of the run is encoded."""
        return self.collection.is_sealed

    @property
    def row_ranges(self) -> list[tuple[int, int]]:
        """Half-open ranges of row numbers that cover all rows; as `Activations.row_ranges`."""
        return self._layout.row_ranges()

    def rows(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> SparseRows:
        """Return the codes of some rows, in the order asked, repeats allowed.

        Reads the pages that they lie in, about 0.19 MB each with 32 codes per row; decoded pages are kept in a cache of 64 MiB.

        Raises:
            NotFoundError: a row that the run does not store, or that is not encoded yet.
            InvalidInputError: no list of whole numbers.
            FormatError: an object is missing or damaged.
        """
        return self._by_unit(as_numbers(rows, what="rows"))

    def norms(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """Return the L2 norms of some rows' activations, in the order asked; raises as `rows` does."""
        places = self._layout.places(as_numbers(rows, what="rows"))
        units, offsets = np.divmod(places, self._layout.stored_rows_per_unit)
        norms = np.empty(len(places), np.float32)
        for number in np.unique(units).tolist():
            here = units == number
            norms[here] = self.unit(number).norms(offsets[here])
        return norms

    def scan(self, batch_rows: int = SCAN_ROWS) -> Iterator[tuple[Int64s, SparseRows]]:
        """Yield row numbers, ascending, and codes of all rows, at most `batch_rows` of one unit at a time.

        Reads every object once. Memory: two batches and 32 MiB of encoded pages.

        Raises:
            InvalidInputError: `batch_rows` is no whole number from 1 on.
            FormatError: an object is missing or damaged.
        """
        batch_rows = check_whole(batch_rows, what="batch_rows", least=1)
        for unit in self._layout.units:
            first, held, n_held = 0, list[SparseRows](), 0
            for _, page in self.unit(unit.unit).scan():
                start = 0
                while start < page.n_rows:
                    stop = min(page.n_rows, start + batch_rows - n_held)
                    held.append(page.slice(start, stop))
                    n_held += stop - start
                    start = stop
                    if n_held == batch_rows:
                        yield self._layout.numbers(unit, first, first + n_held), SparseRows.concat(held)
                        first, held, n_held = first + n_held, [], 0
            if held:
                yield self._layout.numbers(unit, first, first + n_held), SparseRows.concat(held)

    def document(self, doc_id: int) -> tuple[Int64s, SparseRows]:
        """Return row numbers, ascending, and codes of a document's stored rows; none of a document without tokens.

        Reads the units' tables of tokens (kept in a small cache) and the pages that the document lies in.

        Raises:
            NotFoundError: no such document, or one that lies in a unit that is not encoded.
            FormatError: an object is missing or damaged.
        """
        rows = self._document_rows(doc_id)
        return rows, self._by_unit(rows)

    def unit(self, number: int) -> UnitCodes:
        """Return the codes of a unit: row k is the k-th row that the run stores of it.

        Raises:
            NotFoundError: the unit is not encoded at this version.
            FormatError: the manifest's entry of the unit is damaged.
        """
        if number not in self._units:
            unit = self.collection.units.get(number)
            if unit is None:
                raise NotFoundError(
                    ErrorKind.ROW_NOT_FOUND,
                    f"unit {number!r:.80} was asked for, codes {self.id!r} have {len(self.collection.units)} units: "
                    "finish them with actstore sae encode",
                )
            self._units[number] = UnitCodes(
                self.run.store.storage,
                unit_object(self.collection, unit),
                unit.meta,
                n_rows=unit.rows,
                n_latents=self.n_latents,
            )
        return self._units[number]

    def unit_rows(self, number: int) -> Int64s:
        """Return the row numbers of a unit's codes, ascending; raises as `unit` does."""
        found = self._layout_units.get(number)
        if found is None:
            self.unit(number)
            return np.empty(0, np.int64)
        return self._layout.numbers(found, 0, found.n_rows)

    def counts(self) -> Int64s:
        """Return in how many rows each latent fires, shape (n_latents,).

        Reads the directories of the postings' segments where those are complete, otherwise that of every unit.
        """
        postings = self.run.store.state.collections.get(("postings", self.id))
        if postings is not None and postings.is_sealed:
            return self.postings().counts()
        total = np.zeros(self.n_latents, np.int64)
        for unit in self._layout.units:
            latents, counts = self.unit(unit.unit).counts()
            total[latents] += counts
        return total

    def postings(self) -> Postings:
        """Return the same codes latent by latent.

        Raises:
            NotFoundError: there are none.
            InvalidInputError: they are not complete.
        """
        return open_postings(
            self.run.store.storage, self.run.store.state.collections.get(("postings", self.id)), self.id
        )

    def pooled(self) -> "PooledCodes":
        """Return what the codes of each document come to; see `actstore.pooled_codes`."""
        from actstore.pooled_codes import PooledCodes

        return PooledCodes(self.run.store.objects, self.collection, self.run.tokenization.units)

    def stats(self, latents: Sequence[int] | None = None, columns: Sequence[str] | None = None) -> "pa.Table":
        """Return statistics of latents on the run, one table row each; see `actstore.latent_stats.read_latent_stats`."""
        from actstore.latent_stats import read_latent_stats

        return read_latent_stats(self, latents, columns)

    def _by_unit(self, rows: Int64s) -> SparseRows:
        """Return the codes of rows in the order asked, read unit by unit."""
        places = self._layout.places(rows)
        units, offsets = np.divmod(places, self._layout.stored_rows_per_unit)
        numbers = np.unique(units)
        if not len(numbers):
            return SparseRows.empty(0, self.n_latents, self.value_dtype)
        if len(numbers) == 1:
            return self.unit(int(numbers[0])).rows(offsets)
        order = np.argsort(units, kind="stable")
        cuts = np.append(np.searchsorted(units[order], numbers), len(order))
        parts = [
            self.unit(number).rows(offsets[order[low:high]])
            for number, low, high in zip(numbers.tolist(), cuts[:-1], cuts[1:], strict=True)
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return SparseRows.concat(parts).take(back)

    def _document_rows(self, doc_id: int) -> Int64s:
        tokenization = self.run.tokenization
        n_documents = tokenization.corpus.n_documents
        doc_id = check_whole(doc_id, what="doc_id", least=0)
        if doc_id >= n_documents:
            raise NotFoundError(
                ErrorKind.ROW_NOT_FOUND,
                f"document {doc_id} was asked for, corpus {tokenization.corpus.id!r} has {n_documents}",
            )
        units = tokenization.collection.units
        number = bisect.bisect_left(range(len(units)), doc_id, key=lambda u: int(units[u].meta["last_doc"]))
        parts = []
        while number < len(units) and units[number].meta["first_doc"] <= doc_id:
            docs, starts = self._documents(number)
            place = int(np.searchsorted(docs, doc_id))
            if place < len(docs) and docs[place] == doc_id:
                self.unit(number)
                first = number * tokenization.rows_per_unit
                parts.append(
                    self._layout.existing(first + int(starts[place]), first + int(starts[place + 1]))
                )
            number += 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _documents(self, number: int) -> tuple[Int64s, Int64s]:
        """Return the documents in a unit of the tokenization, and the offset of each one's first row, and of the end."""
        tokenization = self.run.tokenization

        def load() -> tuple[tuple[Int64s, Int64s], int]:
            docs = tokenization.unit_table(number, ["doc_id"])["doc_id"].to_numpy()
            found, starts = np.unique(docs, return_index=True)
            starts = np.append(starts, len(docs)).astype(np.int64)
            return (found.astype(np.int64), starts), found.nbytes + starts.nbytes

        return _DOCUMENTS.get(tokenization.collection.units[number].objects[0].sha256, load)


def unit_object(collection: Collection, unit: Unit) -> StoredObject:
    """Return the object that holds a unit's token-major codes.

    Raises:
        FormatError: the unit does not list exactly one.
    """
    prefix = f"codes/{collection.id}/units/"
    found = [obj for obj in unit.objects if obj.key.startswith(prefix)]
    if len(found) != 1:
        raise _broken(collection, f"unit {unit.unit} lists {len(found)} objects of codes")
    return found[0]


def _parse_kept(collection: Collection, run: "Run") -> KeptRows | None:
    """Return which rows the run keeps, if not all.

    Raises:
        FormatError: the run's configuration does not say.
    """
    config = run.collection.config
    try:
        kept = parse_kept(config)
        if kept is not None:
            int(config["stored_rows_per_unit"])
    except (KeyError, TypeError, ValueError, InvalidInputError) as error:
        raise _broken(collection, f"run {run.id!r} does not say which rows it keeps ({error!r})") from error
    return kept


def _layout(codes: Codes, kept: KeptRows | None) -> RowLayout:
    """Return which rows are encoded; codes have the run's row numbers, but no shards."""
    per_unit = codes.rows_per_unit
    if kept is not None:
        per_unit = int(codes.run.collection.config["stored_rows_per_unit"])
    live = ((number, codes.collection.units[number].rows) for number in sorted(codes.collection.units))
    units = tuple(UnitRows(number, rows, (), None) for number, rows in live if rows)
    no_shards = ShardSpec(1, 1, 1, "float32", "hot")
    return RowLayout(codes.hook_point, no_shards, codes.rows_per_unit, per_unit, units, kept)


def _broken(collection: Collection, found: str) -> FormatError:
    return FormatError(
        ErrorKind.INVARIANT_BROKEN, f"codes {collection.id!r} cannot be read: {found}; see fsck"
    )
