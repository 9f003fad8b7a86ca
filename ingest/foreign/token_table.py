"""Which token stands at each row of a table of tokens, and to which document does it belong?

A table has the columns `doc_id` and `token_id`, and may have `position`, `token` (the token's text), and `char_start` and
`char_end`. Its rows are in the order of the activations; the rows of a document are adjacent. It is read as a stream; what
is kept is a hash of 8 bytes per document, which finds documents that come back.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.content_hash import TableHasher

from .content import SourceFiles
from .source import MAX_TOKEN_ID, Array, TokenBatch, check_ids, refuse

DOC_ID, TOKEN_ID, POSITION, TOKEN = "doc_id", "token_id", "position", "token"
CHAR_START, CHAR_END = "char_start", "char_end"
COLUMNS = (DOC_ID, TOKEN_ID, POSITION, TOKEN, CHAR_START, CHAR_END)
SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson", ".json")
_INTEGERS = {name: pa.int64() for name in (TOKEN_ID, POSITION, CHAR_START, CHAR_END)}
_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class TokenTable:
    """A table of tokens, in a file or in memory."""

    source: Path | pa.Table
    columns: tuple[str, ...]
    """Those of `COLUMNS` that it has."""

    @property
    def description(self) -> str:
        """Where it is."""
        return str(self.source) if isinstance(self.source, Path) else "the table of tokens"

    def files(self) -> SourceFiles:
        """Return the file, for its hash; nothing for a table in memory."""
        if isinstance(self.source, Path):
            return SourceFiles(self.source.parent, [self.source.name])
        return SourceFiles(Path(), [])

    def memory_hash(self) -> str:
        """Return the hash of a table in memory, empty for a file."""
        if isinstance(self.source, Path):
            return ""
        hasher = TableHasher(self.source.schema)
        for batch in self.source.to_batches():
            hasher.update(batch)
        return hasher.hexdigest()

    def documents(self) -> Iterator[TokenBatch]:
        """Yield all documents' tokens, whole documents at a time.

        Raises:
            InvalidInputError: the table is damaged, a value is missing, or a document's rows are not adjacent.
        """
        carry: pa.Table | None = None
        doc, row = 0, 0
        hashes: list[npt.NDArray[np.uint64]] = []
        for table in self._tables():
            carry = table if carry is None else pa.concat_tables([carry, table]).combine_chunks()
            changes = _changes(carry[DOC_ID])
            if len(changes):
                whole = int(changes[-1])
                yield self._batch(carry.slice(0, whole), changes[:-1], doc, row, hashes)
                doc, row, carry = doc + len(changes), row + whole, carry.slice(whole)
        if carry is not None and carry.num_rows:
            yield self._batch(carry, np.zeros(0, np.int64), doc, row, hashes)
        self._check_adjacent(hashes)

    def _batch(
        self,
        table: pa.Table,
        changes: Array,
        first_doc: int,
        first_row: int,
        hashes: list[npt.NDArray[np.uint64]],
    ) -> TokenBatch:
        for name in table.column_names:
            if table[name].null_count:
                bad = first_row + int(np.argmax(table[name].is_null().to_numpy(zero_copy_only=False)))
                refuse(f"{self.description}, row {bad}: {name!r} is missing", "fill in every row")
        starts = np.concatenate([np.zeros(1, np.int64), changes])
        lengths = np.diff(np.concatenate([starts, np.full(1, table.num_rows, np.int64)]))
        keys = [str(key) for key in table[DOC_ID].take(pa.array(starts)).to_pylist()]
        hashes.append(_hashes(keys))
        return TokenBatch(
            first_doc=first_doc,
            keys=keys,
            lengths=lengths,
            ids=check_ids(
                self._integers(table, TOKEN_ID, first_row),
                place=lambda i: f"{self.description}, row {first_row + i}",
            ),
            positions=self._positions(table, starts, first_row),
            words=table[TOKEN].to_pylist() if TOKEN in self.columns else None,
            spans=self._spans(table, first_row),
        )

    def _positions(self, table: pa.Table, starts: Array, first_row: int) -> npt.NDArray[np.int32] | None:
        if POSITION not in self.columns:
            return None
        positions = self._integers(table, POSITION, first_row)
        step = np.diff(positions, prepend=-1)
        step[starts] = 1
        bad = (positions < 0) | (positions > MAX_TOKEN_ID) | (step < 1)
        if bad.any():
            i = int(bad.argmax())
            refuse(
                f"{self.description}, row {first_row + i}: position {int(positions[i])} does not come after the position "
                "before it",
                "sort each document's rows by position; two windows of a document are two documents",
            )
        return positions.astype(np.int32)

    def _spans(self, table: pa.Table, first_row: int) -> npt.NDArray[np.int32] | None:
        if CHAR_START not in self.columns:
            return None
        spans = np.stack([self._integers(table, name, first_row) for name in (CHAR_START, CHAR_END)], axis=1)
        bad = (spans[:, 0] < 0) | (spans[:, 0] > spans[:, 1]) | (spans[:, 1] > MAX_TOKEN_ID)
        if bad.any():
            i = int(bad.argmax())
            refuse(
                f"{self.description}, row {first_row + i}: characters {spans[i].tolist()} are no range",
                "char_start must be at least 0 and at most char_end",
            )
        return spans.astype(np.int32)

    def _integers(self, table: pa.Table, name: str, first_row: int) -> Array:
        column = table[name]
        if not pa.types.is_integer(column.type):
            refuse(
                f"{self.description}, row {first_row} on: {name!r} is {column.type}, not integers",
                "store numbers",
            )
        values: Array = column.to_numpy()
        return values.astype(np.int64) if values.dtype.itemsize < 8 else values

    def _tables(self) -> Iterator[pa.Table]:
        try:
            for batch in self._record_batches():
                if batch.num_rows:
                    yield pa.Table.from_batches([batch]).select(list(self.columns))
        except (pa.ArrowException, OSError, KeyError) as error:
            refuse(f"{self.description} cannot be read to its end ({error})", "write or copy it again")

    def _record_batches(self) -> Iterable[pa.RecordBatch]:
        if not isinstance(self.source, Path):
            yield from self.source.to_batches(max_chunksize=_ROWS)
            return
        if self.source.suffix == ".parquet":
            with pq.ParquetFile(self.source) as file:
                yield from file.iter_batches(batch_size=_ROWS, columns=list(self.columns))
        else:
            with _open_text(self.source) as reader:
                yield from reader

    def _check_adjacent(self, hashes: list[npt.NDArray[np.uint64]]) -> None:
        ordered = np.sort(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)
        if (ordered[1:] == ordered[:-1]).any():
            refuse(
                f"{self.description}: a {DOC_ID!r} comes back after another document's rows",
                "keep each document's rows together, or number the pieces as documents of their own",
            )


def open_token_table(tokens: Any) -> TokenTable:
    """Return a table of tokens.

    Args:
        tokens: Path of a Parquet, CSV or JSONL file, a pyarrow or pandas table, or a mapping from names to columns.

    Raises:
        InvalidInputError: no table, or a column is missing.
    """
    if isinstance(tokens, str | os.PathLike):
        path = Path(tokens)
        if path.suffix not in SUFFIXES:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"the table of tokens is {str(tokens)!r}: give a file that ends in {', '.join(SUFFIXES[:3])}",
            )
        return TokenTable(path, _check_columns(_names(path), str(path)))
    try:
        table = pa.table(dict(tokens) if isinstance(tokens, Mapping) else tokens)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"tokens= is a {type(tokens).__name__} that is no table ({error}): give a file, a table, or columns by name",
        ) from error
    columns = _check_columns(table.column_names, "the table of tokens")
    return TokenTable(table.select(list(columns)), columns)


def _names(path: Path) -> list[str]:
    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        with _open_text(path) as reader:
            return list(reader.schema.names)
    except (pa.ArrowException, OSError) as error:
        refuse(f"the table of tokens {path} cannot be read ({error})", "check the path and write it again")


def _check_columns(names: Iterable[str], where: str) -> tuple[str, ...]:
    found = set(names)
    missing = [name for name in (DOC_ID, TOKEN_ID) if name not in found]
    if (CHAR_START in found) != (CHAR_END in found):
        missing.append(CHAR_END if CHAR_START in found else CHAR_START)
    if missing:
        raise InvalidInputError(
            ErrorKind.MISSING_COLUMN,
            f"{where} has the columns {', '.join(sorted(found)) or 'none'} and lacks {', '.join(missing)}: every row needs its "
            "document and its token id",
        )
    return tuple(name for name in COLUMNS if name in found)


def _open_text(path: Path) -> Any:
    if path.suffix == ".csv":
        return pyarrow.csv.open_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types={**_INTEGERS, TOKEN: pa.string()}),
        )
    return pyarrow.json.open_json(path)


def _changes(doc_ids: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return the rows at which another document begins, the first row not counted."""
    column = doc_ids.combine_chunks()
    differs = pc.not_equal(column.slice(1), column.slice(0, len(column) - 1)).fill_null(True)
    return np.flatnonzero(differs.to_numpy(zero_copy_only=False)) + 1


def _hashes(keys: list[str]) -> npt.NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)
