"""What are the tokens of a unit, the words of a vocabulary and the texts of documents, when they are asked for again and again?

Decoded tables are kept in one cache for the whole process, bounded in bytes and keyed by the hash of the object they were
decoded from, so that a second question about a run reads and decodes nothing. Stored objects never change, so what is kept
never goes stale; it was checked when it was read.
"""

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.arrow_arrays import from_numbers, from_texts, to_array
from actstore.codec.cache import BytesCache
from actstore.corpus import DOC_ID, TEXT, Corpus
from actstore.errors import ErrorKind, FormatError, NotFoundError
from actstore.tokenization import TOKEN_SCHEMA, Tokenization

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CACHE_BYTES = 256 << 20
"""Bound on what the process keeps: the tokens of about 6 million rows, or the text of 50 million."""

CACHE: BytesCache[Any] = BytesCache(CACHE_BYTES)
"""Decoded tables of all stores that this process asks."""

_THREADS = 16
"""Objects read at a time where they are far away."""

_ROW = "row"


@dataclass(frozen=True, slots=True)
class UnitTokens:
    """The tokens of one unit, in row order; arrays have shape (t,) and are read-only."""

    unit: int
    first_row: int
    """Row number of offset 0."""

    table: pa.Table
    """All columns but `row`."""

    doc_id: Int64s
    position: npt.NDArray[np.int32]
    token_id: npt.NDArray[np.int32]
    char_start: npt.NDArray[np.int32]
    char_end: npt.NDArray[np.int32]
    is_special: Bools
    window_position: npt.NDArray[np.int32]
    nbytes: int
    """Stored bytes of the token table."""

    def __len__(self) -> int:
        return len(self.token_id)


@dataclass(frozen=True, slots=True)
class Words:
    """The readable text of tokens, by number."""

    texts: pa.Array
    """Text of token 0, 1, ...; null for a number the vocabulary lacks."""

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, token_ids: npt.NDArray[np.integer[Any]]) -> pa.Array:
        """Return the tokens' texts; a number the vocabulary lacks reads as `<number>`."""
        numbers = np.asarray(token_ids, np.int64)
        known = (numbers >= 0) & (numbers < len(self.texts))
        places = from_numbers(
            np.where(known, numbers, 0), pa.int64(), missing=None if known.all() else ~known
        )
        found = self.texts.take(places)
        if found.null_count == 0:
            return found
        told = zip(found.to_pylist(), numbers.tolist(), strict=True)
        return from_texts([f"<{n}>" if text is None else text for text, n in told])


def read_unit(tokenization: Tokenization, unit: int) -> UnitTokens:
    """Return the tokens of one unit.

    Raises:
        NotFoundError: no such unit.
        FormatError: the object is missing or damaged.
    """
    entry = tokenization.collection.units.get(unit)
    if entry is None:
        raise NotFoundError(
            ErrorKind.ROW_NOT_FOUND,
            f"unit {unit} was asked for, tokenization {tokenization.id!r} has {len(tokenization.collection.units)} units",
        )
    tokens: UnitTokens = CACHE.get(
        f"tokens:{entry.objects[0].sha256}", lambda: _load_unit(tokenization, unit)
    )
    return tokens


def read_units(tokenization: Tokenization, units: Iterable[int]) -> dict[int, UnitTokens]:
    """Return the tokens of several units, those that must be read read side by side."""
    wanted = sorted({int(unit) for unit in units})
    entries = tokenization.collection.units
    found, missing = {}, []
    for unit in wanted:
        entry = entries.get(unit)
        kept = None if entry is None else CACHE.find(f"tokens:{entry.objects[0].sha256}")
        if kept is None:
            missing.append(unit)
        else:
            found[unit] = kept
    if len(missing) < 2:
        return found | {unit: read_unit(tokenization, unit) for unit in missing}
    with ThreadPoolExecutor(min(_THREADS, len(missing)), thread_name_prefix="actstore-tokens") as pool:
        loaded = pool.map(lambda unit: read_unit(tokenization, unit), missing)
        return found | dict(zip(missing, loaded, strict=True))


def read_words(tokenization: Tokenization) -> Words:
    """Return the vocabulary's texts, by token number."""
    seal = tokenization.collection.seal
    if seal is None:  # the error that tells what to do
        tokenization.vocabulary()
        raise AssertionError("a tokenization that is not sealed has no vocabulary")
    stored = [o.sha256 for o in seal.objects if "/vocabulary-" in o.key]
    if not stored:
        return _load_words(tokenization)[0]
    words: Words = CACHE.get(f"words:{stored[0]}", lambda: _load_words(tokenization))
    return words


def read_texts(corpus: Corpus, doc_ids: Sequence[int] | Int64s) -> dict[int, str]:
    """Return the texts of documents by number; reads and keeps the row groups that hold them.

    Raises:
        FormatError: a part is missing or damaged, or lacks a document that the manifest promises.
    """
    wanted = np.unique(np.asarray(doc_ids, np.int64))
    parts = corpus.parts
    firsts = np.array([int(part.meta["first_doc"]) for part in parts], np.int64)
    texts: dict[int, str] = {}
    for at in np.unique(np.searchsorted(firsts, wanted, side="right") - 1).tolist():
        part = parts[at]
        stop = int(firsts[at]) + part.rows
        mine = wanted[(wanted >= firsts[at]) & (wanted < stop)]
        texts.update(_part_texts(corpus, at, mine))
    if len(texts) != len(wanted):
        lost = sorted(set(wanted.tolist()) - set(texts))
        raise FormatError(
            ErrorKind.INVARIANT_BROKEN,
            f"document {lost[0]} has tokens and is not in corpus {corpus.id!r}: run fsck",
        )
    return texts


def _load_unit(tokenization: Tokenization, unit: int) -> tuple[UnitTokens, int]:
    names = [name for name in tokenization.schema.names if name != _ROW]
    table = tokenization.unit_table(unit, names).select(names).combine_chunks()
    entry = tokenization.collection.units[unit]
    if table.num_rows != entry.rows:
        raise FormatError(
            ErrorKind.INVARIANT_BROKEN,
            f"unit {unit} has {entry.rows} rows in the manifest and {table.num_rows} in its token table: run fsck",
        )
    arrays = {name: _array(table[name]) for name in names if name in TOKEN_SCHEMA.names and name != "window"}
    tokens = UnitTokens(
        unit=unit,
        first_row=unit * tokenization.rows_per_unit,
        table=table,
        nbytes=entry.objects[0].nbytes,
        **arrays,
    )
    return tokens, table.nbytes + tokens.is_special.nbytes


def _array(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    values = to_array(column)
    values.setflags(write=False)
    return values


def _load_words(tokenization: Tokenization) -> tuple[Words, int]:
    table = tokenization.vocabulary()
    ids = to_array(table["token_id"])
    size = int(ids.max(initial=-1)) + 1
    place = np.full(size, -1, np.int64)
    place[ids] = np.arange(len(ids))
    texts = table["token"].combine_chunks().cast(pa.string())
    if isinstance(texts, pa.ChunkedArray):
        texts = pa.concat_arrays(texts.chunks) if texts.num_chunks else pa.array([], pa.string())
    if not np.array_equal(place, np.arange(len(texts))):
        texts = texts.take(from_numbers(np.maximum(place, 0), pa.int64(), missing=place < 0))
    return Words(texts), texts.nbytes


def _part_texts(corpus: Corpus, at: int, doc_ids: Int64s) -> dict[int, str]:
    """Return the texts of documents of one part."""
    obj = corpus.parts[at].objects[0]
    bounds: Int64s = CACHE.get(f"groups:{obj.sha256}", lambda: _load_groups(corpus, at))
    groups = np.searchsorted(bounds[:, 0], doc_ids, side="right") - 1
    texts: dict[int, str] = {}
    for group in np.unique(groups).tolist():
        load = functools.partial(_load_texts, corpus, at, group)
        ids, column = CACHE.get(f"texts:{obj.sha256}:{group}", load)
        mine = doc_ids[groups == group]
        places = np.searchsorted(ids, mine)
        for doc_id, place in zip(mine.tolist(), places.tolist(), strict=True):
            if place < len(ids) and ids[place] == doc_id:
                texts[doc_id] = column[place].as_py()
    return texts


def _load_groups(corpus: Corpus, at: int) -> tuple[Int64s, int]:
    """Return the first and last document of every row group of a part, shape (g, 2)."""
    part = corpus.parts[at]
    with pq.ParquetFile(corpus.objects.file(part.objects[0])) as file:
        counts = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
    stops = int(part.meta["first_doc"]) + np.cumsum(counts, dtype=np.int64)
    bounds = np.stack([stops - counts, stops - 1], axis=1).reshape(-1, 2)
    return bounds, bounds.nbytes


def _load_texts(corpus: Corpus, at: int, group: int) -> tuple[tuple[Int64s, pa.Array], int]:
    path = corpus.objects.file(corpus.parts[at].objects[0])
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read_row_group(group, columns=[DOC_ID, TEXT]).combine_chunks()
    ids: Int64s = to_array(table[DOC_ID])
    return (ids, table[TEXT]), table.nbytes
