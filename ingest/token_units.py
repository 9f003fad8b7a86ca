"""How do encoded documents become the units of a tokenization? (FORMAT.md, section 7)

Values in, values out: `UnitPacker` takes encoded documents in order and hands back every unit that is full, as the table
that is stored. What it holds is the open unit and nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.tokenization import CHAT_TOKEN_SCHEMA, ROLE, TOKEN_SCHEMA

from .token_encoding import EncodedBatch, Template, is_special, special_lookup
from .token_roles import TokenRoles
from .windows import pack_units, plan_rows, plan_windows

Columns = dict[str, npt.NDArray[Any]]

ROWS_PER_GROUP = 8192
"""Rows of a row group: whoever shows a context reads one. Half as many are hardly faster to read, and a twelfth larger."""

_DELTA = ("row", "doc_id", "position", "char_start", "char_end", "window", "window_position")


@dataclass(frozen=True, slots=True)
class TokenUnit:
    """One unit, ready to be stored."""

    unit: int
    table: pa.Table
    meta: dict[str, int]
    """`first_doc`, `last_doc`, `n_windows`; `n_documents` that start in it, `last_window` of the last document."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What shapes windows and units."""

    template: Template
    window: int
    overlap: int
    rows_per_unit: int
    special_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """Where to go on: the first unit that is missing, and the first window that goes into it."""

    unit: int = 0
    doc: int = 0
    window: int = 0


class _RoleNames:
    """One numbering of roles for all batches."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}

    def codes(self, roles: TokenRoles) -> npt.NDArray[np.int16]:
        """Return a batch's codes in this numbering; -1 stays."""
        own = [self._index.setdefault(name, len(self._index)) for name in roles.names]
        return np.array([*own, -1], np.int16)[roles.codes]

    def strings(self, codes: npt.NDArray[np.int16]) -> pa.Array:
        """Return the names; null for -1."""
        indices = pa.array(codes, mask=codes < 0)
        return pa.DictionaryArray.from_arrays(indices, pa.array(self._index, pa.string())).cast(pa.string())


class UnitPacker:
    """Packs windows of documents into units, in order."""

    def __init__(self, cut: Cut, start: Start) -> None:
        self._cut = cut
        self._start = start
        self._unit = start.unit
        self._special = special_lookup(cut.special_ids)
        self._roles = _RoleNames()
        self._pending: list[Columns] = []
        self._filled = 0

    def add(self, encoded: EncodedBatch) -> Iterator[TokenUnit]:
        """Take the next documents (from the start's document on) and yield every unit that they fill."""
        docs, windows, spans = self._windows(encoded)
        if not len(docs):
            return
        columns, lengths = self._rows(encoded, docs, windows, spans)
        edges = np.concatenate([[0], np.cumsum(lengths)])
        ranges = pack_units(lengths.tolist(), self._cut.rows_per_unit, filled=self._filled)
        for i, (start, stop) in enumerate(ranges):
            if i:
                yield self._close()
            a, b = int(edges[start]), int(edges[stop])
            if b > a:
                # Copies, not views: a view would keep the whole batch alive while the unit waits to be full.
                self._pending.append({name: column[a:b].copy() for name, column in columns.items()})
                self._filled += b - a

    def finish(self) -> Iterator[TokenUnit]:
        """Yield the last unit, if it has any row."""
        if self._filled:
            yield self._close()

    def _windows(self, encoded: EncodedBatch) -> tuple[Any, Any, Any]:
        """Return document (in the batch), index and body range of each window."""
        cut, start = self._cut, self._start
        docs, windows, spans = [], [], []
        around = cut.template.prefix + cut.template.suffix
        for d, length in enumerate(encoded.lengths.tolist()):
            if length == 0:
                continue
            planned = plan_windows(
                length - around,
                prefix=cut.template.prefix,
                suffix=cut.template.suffix,
                window=cut.window,
                overlap=cut.overlap,
            )
            first = start.window if encoded.first_doc + d == start.doc else 0
            for w in range(first, len(planned)):
                docs.append(d)
                windows.append(w)
                spans.append(planned[w])
        return np.array(docs, np.int64), np.array(windows, np.int64), np.array(spans, np.int64).reshape(-1, 2)

    def _rows(self, encoded: EncodedBatch, docs: Any, windows: Any, spans: Any) -> tuple[Columns, Any]:
        template = self._cut.template
        offsets = np.cumsum(encoded.lengths) - encoded.lengths
        bodies = encoded.lengths - template.prefix - template.suffix
        plan = plan_rows(
            spans[:, 0],
            spans[:, 1],
            offsets[docs],
            bodies[docs],
            prefix=template.prefix,
            suffix=template.suffix,
        )
        token_id = encoded.ids[plan.source]
        # A special token of the template covers no character: it stands at the edge of the token that it leans on.
        starts, ends = encoded.starts[plan.anchor], encoded.ends[plan.anchor]
        before = plan.is_template & ~plan.after_anchor
        columns = {
            "doc_id": np.repeat(encoded.first_doc + docs, plan.lengths),
            "position": plan.position,
            "token_id": token_id,
            "char_start": np.where(plan.after_anchor, ends, starts),
            "char_end": np.where(before, starts, ends),
            "is_special": plan.is_template | is_special(token_id, self._special),
            "window": np.repeat(windows, plan.lengths),
            "window_position": plan.window_position,
        }
        if encoded.roles is not None:
            columns[ROLE] = self._roles.codes(encoded.roles)[plan.source]
        return columns, plan.lengths

    def _close(self) -> TokenUnit:
        columns = {name: np.concatenate([p[name] for p in self._pending]) for name in self._pending[0]}
        first_row = self._unit * self._cut.rows_per_unit
        columns["row"] = np.arange(first_row, first_row + self._filled, dtype=np.int64)
        starts = columns["window_position"] == 0
        meta = {
            "first_doc": int(columns["doc_id"][0]),
            "last_doc": int(columns["doc_id"][-1]),
            "n_windows": int(starts.sum()),
            "n_documents": int((starts & (columns["window"] == 0)).sum()),
            "last_window": int(columns["window"][-1]),
        }
        arrays = [pa.array(columns[field.name], field.type) for field in TOKEN_SCHEMA]
        schema = TOKEN_SCHEMA
        if ROLE in columns:
            arrays.append(self._roles.strings(columns[ROLE]))
            schema = CHAT_TOKEN_SCHEMA
        unit = TokenUnit(self._unit, pa.Table.from_arrays(arrays, schema=schema), meta)
        self._unit += 1
        self._pending, self._filled = [], 0
        return unit


def unit_bytes(table: pa.Table) -> memoryview:
    """Return the Parquet file of a unit, with page checksums; differences of what counts up, about 3.5 bytes a row.

    zstd makes token ids a quarter smaller. On small pages of the other columns it saves next to nothing, and takes longer to
    start than Snappy takes for all.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression={name: "zstd" if name == "token_id" else "snappy" for name in table.column_names},
        use_dictionary=["token_id", *({ROLE} & {*table.column_names})],
        column_encoding=dict.fromkeys(_DELTA, "DELTA_BINARY_PACKED"),
        write_page_checksum=True,
        row_group_size=ROWS_PER_GROUP,
    )
    return memoryview(sink.getvalue())


def vocabulary_bytes(table: pa.Table) -> memoryview:
    """Return the Parquet file of a vocabulary, with page checksums.

    No two tokens are alike: a dictionary of them would save nothing, and take twice as long to read.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"token_id": "DELTA_BINARY_PACKED", "token": "DELTA_LENGTH_BYTE_ARRAY"},
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue())
