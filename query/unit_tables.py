"""What are the tokens of a unit, the words of a vocabulary and the texts of documents, when they are asked for again and again?

Decoded tables are kept in one cache for the whole process, bounded in bytes and keyed by the hash of the object they were
decoded from, so that a second question about a run reads and decodes nothing. Stored objects never change, so what is kept
never goes stale; it was checked when it was read. Whoever needs a few rows of many units reads them by row groups
(`actstore.query.token_groups`).
"""

import bisect
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.arrow_arrays import from_numbers, from_texts, take_texts, to_array
from actstore.codec.cache import BytesCache
from actstore.corpus import DOC_ID, TEXT, Corpus
from actstore.errors import ErrorKind, FormatError, NotFoundError
from actstore.log.values import Unit
from actstore.objects import ObjectReader
from actstore.tokenization import Tokenization

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CACHE_BYTES = 256 << 20
"""Bound on what the process keeps: the tokens of about 6 million rows, or the text of 50 million."""

CACHE: BytesCache[Any] = BytesCache(CACHE_BYTES)
"""Decoded tables of all stores that this process asks."""

_THREADS = 16
"""Objects read at a time where they are far away."""

_NEAR_THREADS = 4
"""On a local disk, where the time goes into decoding; no more than there are processors."""

TOKEN_COLUMNS = (
    "doc_id",
    "position",
    "token_id",
    "char_start",
    "char_end",
    "is_special",
    "window_position",
)
"""Those of a token table that answers are made of."""

_ROW = "row"

T = TypeVar("T")
S = TypeVar("S")

_Texts: TypeAlias = tuple[Int64s, pa.Array]
"""Numbers and texts of the documents of a row group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens that follow each other in one unit, in row order; arrays have shape (t,) and are read-only."""

    first_row: int
    """Row number of offset 0."""

    doc_id: Int64s
    position: npt.NDArray[np.int32]
    token_id: npt.NDArray[np.int32]
    char_start: npt.NDArray[np.int32]
    char_end: npt.NDArray[np.int32]
    is_special: Bools
    window_position: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.token_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTokens(Tokens):
    """The tokens of one unit."""

    unit: int
    table: pa.Table
    """All columns but `row`."""

    nbytes: int
    """Stored bytes of the token table."""


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
        if known.all():
            found = take_texts(self.texts, numbers)
            if found.null_count == 0:
                return found
        texts: list[str | None] = [None] * len(numbers)
        for place, text in zip(
            np.flatnonzero(known).tolist(), take_texts(self.texts, numbers[known]).to_pylist(), strict=True
        ):
            texts[place] = text
        told = zip(texts, numbers.tolist(), strict=True)
        return from_texts([f"<{n}>" if text is None else text for text, n in told])


def read_unit(tokenization: Tokenization, unit: int) -> UnitTokens:
    """Return the tokens of one unit.

    Raises:
        NotFoundError: no such unit.
        FormatError: the object is missing or damaged.
    """
    entry = unit_entry(tokenization, unit)
    tokens: UnitTokens = CACHE.get(unit_key(entry), lambda: _load_unit(tokenization, unit))
    return tokens


def read_units(tokenization: Tokenization, units: Iterable[int]) -> dict[int, UnitTokens]:
    """Return the tokens of several units, those that must be read read side by side."""
    wanted = sorted({int(unit) for unit in units})
    kept = {unit: CACHE.find(unit_key(unit_entry(tokenization, unit))) for unit in wanted}
    missing = [unit for unit, tokens in kept.items() if tokens is None]
    loaded = side_by_side(tokenization.objects, lambda unit: read_unit(tokenization, unit), missing)
    found = {unit: tokens for unit, tokens in kept.items() if tokens is not None}
    return found | dict(zip(missing, loaded, strict=True))


def unit_entry(tokenization: Tokenization, unit: int) -> Unit:
    """Return what the manifest says of a unit.

    Raises:
        NotFoundError: no such unit.
    """
    entry = tokenization.collection.units.get(unit)
    if entry is None:
        raise NotFoundError(
            ErrorKind.ROW_NOT_FOUND,
            f"unit {unit} was asked for, tokenization {tokenization.id!r} has {len(tokenization.collection.units)} units",
        )
    return entry


def unit_key(entry: Unit) -> str:
    """Return the name under which the tokens of a unit are kept; what is kept of parts of it has longer ones."""
    return f"tokens:{entry.objects[0].sha256}"


def side_by_side(objects: ObjectReader, load: Callable[[S], T], jobs: Sequence[S]) -> list[T]:
    """Return what `load` makes of every job, in order: several at a time, more of them where the objects are far away."""
    if len(jobs) < 2:
        return [load(job) for job in jobs]
    is_near = objects.storage.local_path("any") is not None
    threads = min(len(jobs), min(_NEAR_THREADS, os.cpu_count() or 1) if is_near else _THREADS)
    if threads < 2:
        return [load(job) for job in jobs]
    with ThreadPoolExecutor(threads, thread_name_prefix="actstore-tables") as pool:
        return list(pool.map(load, jobs))


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
    wanted = sorted({int(doc_id) for doc_id in doc_ids})
    parts = corpus.parts
    firsts = [int(part.meta["first_doc"]) for part in parts]
    by_part: dict[int, list[int]] = {}
    for doc_id in wanted:
        by_part.setdefault(max(0, bisect.bisect_right(firsts, doc_id) - 1), []).append(doc_id)

    def load(at: int) -> dict[int, str]:
        return _load_texts(corpus, parts[at], by_part[at])

    texts: dict[int, str] = {}
    missing = []
    for at, mine in by_part.items():
        kept = _kept_texts(parts[at], mine)
        texts.update(kept or {})
        if kept is None:
            missing.append(at)
    for loaded in side_by_side(corpus.objects, load, missing):
        texts.update(loaded)
    if len(texts) != len(wanted):
        lost = sorted(set(wanted) - set(texts))
        raise FormatError(
            ErrorKind.INVARIANT_BROKEN,
            f"document {lost[0]} has tokens and is not in corpus {corpus.id!r}: run fsck",
        )
    return texts


def _load_unit(tokenization: Tokenization, unit: int) -> tuple[UnitTokens, int]:
    names = [name for name in tokenization.schema.names if name != _ROW]
    table = tokenization.unit_table(unit, names).select(names).combine_chunks()
    entry = tokenization.collection.units[unit]
    check_rows(unit, entry, table.num_rows)
    tokens = UnitTokens(
        unit=unit,
        first_row=unit * tokenization.rows_per_unit,
        table=table,
        nbytes=entry.objects[0].nbytes,
        **token_arrays(table),
    )
    return tokens, table.nbytes + tokens.is_special.nbytes


def check_rows(unit: int, entry: Unit, n_rows: int) -> None:
    """Check that a unit's token table has as many rows as the manifest says.

    Raises:
        FormatError: it has others.
    """
    if n_rows != entry.rows:
        raise FormatError(
            ErrorKind.INVARIANT_BROKEN,
            f"unit {unit} has {entry.rows} rows in the manifest and {n_rows} in its token table: run fsck",
        )


def token_arrays(table: pa.Table) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of a token table that `Tokens` has, read-only."""
    pieces = table.select(TOKEN_COLUMNS).to_batches()
    columns = pieces[0].columns if len(pieces) == 1 else table.select(TOKEN_COLUMNS).columns
    arrays = dict(zip(TOKEN_COLUMNS, map(to_array, columns), strict=True))
    for values in arrays.values():
        values.setflags(write=False)
    return arrays


def _load_words(tokenization: Tokenization) -> tuple[Words, int]:
    table = tokenization.vocabulary()
    ids = to_array(table["token_id"])
    size = int(ids.max(initial=-1)) + 1
    place = np.full(size, -1, np.int64)
    place[ids] = np.arange(len(ids))
    texts = table["token"].combine_chunks()
    if texts.type != pa.string():
        texts = texts.cast(pa.string())
    if isinstance(texts, pa.ChunkedArray):
        texts = pa.concat_arrays(texts.chunks) if texts.num_chunks else pa.array([], pa.string())
    if not np.array_equal(place, np.arange(len(texts))):
        texts = texts.take(from_numbers(np.maximum(place, 0), pa.int64(), missing=place < 0))
    return Words(texts), texts.nbytes


def _kept_texts(part: Unit, doc_ids: Sequence[int]) -> dict[int, str] | None:
    """Return the texts of documents of one part from the cache; None if something is not there."""
    key = f"texts:{part.objects[0].sha256}"
    starts: list[int] | None = CACHE.find(key)
    if starts is None:
        return None
    by_group = _by_group(starts, doc_ids)
    groups: dict[int, _Texts] = {}
    for group in by_group:
        kept = CACHE.find(f"{key}:{group}")
        if kept is None:
            return None
        groups[group] = kept
    return _pick_texts(groups, by_group)


def _load_texts(corpus: Corpus, part: Unit, doc_ids: Sequence[int]) -> dict[int, str]:
    """Return the texts of documents of one part: what the cache does not have is read by opening the object once."""
    key = f"texts:{part.objects[0].sha256}"
    with corpus.objects.parquet(part.objects[0]) as file:
        counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        starts = list(itertools.accumulate(counts[:-1], initial=int(part.meta["first_doc"])))
        CACHE.put(key, starts, 32 * len(starts))
        by_group = _by_group(starts, doc_ids)
        groups: dict[int, _Texts] = {}
        for group in by_group:
            kept = CACHE.find(f"{key}:{group}")
            if kept is None:
                table = file.read_row_group(group, columns=[DOC_ID, TEXT], use_threads=False).combine_chunks()
                kept = to_array(table[DOC_ID]), table[TEXT]
                CACHE.put(f"{key}:{group}", kept, table.nbytes)
            groups[group] = kept
    return _pick_texts(groups, by_group)


def _by_group(starts: Sequence[int], doc_ids: Sequence[int]) -> dict[int, list[int]]:
    """Return the documents that each row group should hold."""
    found: dict[int, list[int]] = {}
    for doc_id in doc_ids:
        found.setdefault(max(0, bisect.bisect_right(starts, doc_id) - 1), []).append(doc_id)
    return found


def _pick_texts(groups: Mapping[int, "_Texts"], by_group: Mapping[int, Sequence[int]]) -> dict[int, str]:
    """Return the texts of the documents that are in their row groups."""
    texts = {}
    for group, doc_ids in by_group.items():
        numbers, column = groups[group]
        for doc_id, place in zip(doc_ids, np.searchsorted(numbers, doc_ids).tolist(), strict=True):
            if place < len(numbers) and numbers[place] == doc_id:
                texts[doc_id] = column[place].as_py()
    return texts
