"""How is a folder read that SAELens's `CacheActivationsRunner` wrote?

The folder is a Hugging Face dataset: Arrow streams, one row per context, a column of `[context, d_in]` numbers named after
the hook and a column `token_ids`. The streams are memory-mapped and read with pyarrow; of a stream only the places of its
record batches are kept in memory, 24 bytes each. Checked with the output of sae-lens 6.54.12.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .content import SourceFiles
from .source import (
    Array,
    HookPointNames,
    SourceHookPoint,
    TokenBatch,
    check_ids,
    copy_rows,
    refuse,
    resolve_names,
    same_tokens,
)

STATE = "state.json"
TOKENS = "token_ids"
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""End of an Arrow stream. Source: the Arrow columnar format, "IPC Streaming Format"."""

_OPEN_FILES = 8
_DTYPES = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}


def is_saelens(folder: Path) -> bool:
    """Return whether a folder is a saved Hugging Face dataset."""
    return (folder / STATE).is_file()


@dataclass(frozen=True, slots=True)
class _Batches:
    """Where the record batches of all files are, one entry each, in reading order."""

    file: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    first_doc: npt.NDArray[np.int64]
    """And the number of documents at the end: one entry more."""


class SaelensSource:
    """Contexts of one dataset folder; every context is a document."""

    format = "saelens"
    has_words = False
    has_spans = False

    def __init__(self, folder: Path, *, hook_points: HookPointNames) -> None:
        """Find all record batches and check that the columns are there.

        Raises:
            InvalidInputError: no such dataset, a column is missing or of another type, or a file is cut short.
        """
        self._files = SourceFiles(folder, _data_files(folder))
        self.description = str(folder)
        self._maps: OrderedDict[int, pa.MemoryMappedFile] = OrderedDict()
        self._schema, self._batches = self._index()
        self.hook_points = self._find_hook_points(hook_points)

    def fingerprint(self, *, full: bool) -> str:
        """Return the hash of the Arrow files."""
        return self._files.fingerprint(full=full)

    def check_unchanged(self) -> None:
        """Check the Arrow files' sizes and times."""
        self._files.check_unchanged()

    def tokens(self, first_doc: int = 0) -> Iterator[TokenBatch]:
        """Yield the contexts' tokens, one record batch at a time."""
        n_docs = int(self._batches.first_doc[-1])
        doc = first_doc
        while doc < n_docs:
            index, rows = self._batch_at(doc)
            stop = int(self._batches.first_doc[index + 1])
            ids, lengths = self._token_column(rows.slice(doc - int(self._batches.first_doc[index])), doc)
            yield TokenBatch(doc, [str(d) for d in range(doc, stop)], lengths, ids)
            doc = stop

    def read(
        self,
        first_doc: int,
        first_row: int,
        token_ids: Array,
        starts: Array,
        out: Mapping[str, Array],
        dtype: str,
    ) -> None:
        """Copy contexts, a record batch's share of them at a time."""
        del first_row
        doc, last, at = first_doc, first_doc + len(starts) - 1, 0
        while doc < last:
            index, rows = self._batch_at(doc)
            stop = min(int(self._batches.first_doc[index + 1]), last)
            part = rows.slice(doc - int(self._batches.first_doc[index]), stop - doc)
            ids, lengths = self._token_column(part, doc)
            same_tokens(f"{self._place(doc)} and the following", ids, token_ids[at : at + len(ids)])
            for point in self.hook_points:
                values = self._values(part, point, lengths, doc)
                copy_rows(values, out[point.name][at : at + len(ids)], dtype)
            doc, at = stop, at + len(ids)
        same_tokens(f"{self.description} from context {first_doc} on", token_ids[:at], token_ids)

    def _index(self) -> tuple[pa.Schema, _Batches]:
        schema: pa.Schema | None = None
        files: list[int] = []
        offsets: list[int] = []
        counts: list[int] = []
        for index, path in enumerate(self._files.paths()):
            source = self._map(index)
            try:
                own = pa.ipc.read_schema(pa.ipc.read_message(source))
                if schema is not None and not own.equals(schema):
                    refuse(
                        f"{path} has other columns than the files before it", "import one dataset at a time"
                    )
                schema = own
                for offset, rows in _record_batches(source, own):
                    files.append(index)
                    offsets.append(offset)
                    counts.append(rows.num_rows)
                whole = _ends(source)
            except (pa.ArrowException, OSError, EOFError) as error:
                refuse(f"{path} is no whole Arrow stream ({error})", "write or copy the dataset again")
            if not whole:
                refuse(f"{path} has no end mark: it was cut short", "write or copy the dataset again")
        if schema is None or not sum(counts):
            refuse(f"{self.description} has no context", "give the folder of a finished dataset")
        first_doc = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(counts, np.int64))])
        return schema, _Batches(np.array(files, np.int32), np.array(offsets, np.int64), first_doc)

    def _find_hook_points(self, asked: HookPointNames) -> tuple[SourceHookPoint, ...]:
        if TOKENS not in self._schema.names:
            refuse(
                f"{self.description} has no column {TOKENS!r}, only {', '.join(self._schema.names)}",
                "cache the activations with a version of SAELens that stores token ids",
            )
        found = {f.name: kind for f in self._schema if (kind := _number_type(f.type)) is not None}
        if not found:
            refuse(
                f"{self.description} has no column of [context, d_in] numbers, only {', '.join(self._schema.names)}",
                "give the folder that CacheActivationsRunner wrote",
            )
        names = list(found)
        rows = self._batch_at(0)[1].slice(0, 1)
        points = []
        for i, name in resolve_names(names, asked, where=self.description).items():
            width = pc.list_value_length(_storage(rows.column(names[i])).flatten()).to_pylist()[:1]
            if width in ([], [None], [0]):
                refuse(f"{self._place(0)} has no activation of {names[i]!r}", "leave empty contexts out")
            points.append(SourceHookPoint(names[i], name, width[0], found[names[i]]))
        return tuple(points)

    def _token_column(
        self, rows: pa.RecordBatch, first_doc: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        column = _storage(rows.column(TOKENS))
        kind = column.type
        if not _is_list(kind) or not pa.types.is_integer(kind.value_type):
            refuse(
                f"{self.description}: column {TOKENS!r} is {kind}, not lists of integers",
                "store token ids",
            )
        flat = column.flatten()
        if column.null_count or flat.null_count:
            refuse(f"{self._place(first_doc)} or one after it lacks tokens (null)", "write the dataset again")
        lengths = np.asarray(pc.list_value_length(column).to_numpy(zero_copy_only=False), np.int64)
        empty = np.flatnonzero(lengths == 0)
        if empty.size:
            refuse(f"{self._place(first_doc + int(empty[0]))} has no token", "leave empty contexts out")
        ids = check_ids(
            flat.to_numpy(zero_copy_only=False),
            place=lambda i: f"{self._place(first_doc)}, token {i} from it",
        )
        return ids, lengths

    def _values(
        self, rows: pa.RecordBatch, point: SourceHookPoint, lengths: npt.NDArray[np.int64], first_doc: int
    ) -> Array:
        """Return a column as (n, d_model), without copying, once every list has the length that it should have."""
        column = _storage(rows.column(point.source))
        contexts = column.flatten()
        numbers = contexts.flatten()
        if column.null_count or contexts.null_count or numbers.null_count:
            refuse(
                f"{self._place(first_doc)} or one after it lacks numbers (null)", "write the dataset again"
            )
        n_rows = np.asarray(pc.list_value_length(column).to_numpy(zero_copy_only=False), np.int64)
        wrong = np.flatnonzero(n_rows != lengths)
        if wrong.size:
            i = int(wrong[0])
            refuse(
                f"{self._place(first_doc + i)} has {lengths[i]} tokens and {n_rows[i]} activations of {point.source!r}",
                "every token needs one; write the dataset again",
            )
        widths = pc.min_max(pc.list_value_length(contexts)).as_py()
        if set(widths.values()) != {point.d_model}:
            refuse(
                f"{self._place(first_doc)} and those after it have activations of {point.source!r} of {widths['min']} to "
                f"{widths['max']} numbers, the first context {point.d_model}",
                "write the dataset again",
            )
        values: Array = numbers.to_numpy(zero_copy_only=True).reshape(-1, point.d_model)
        return values

    def _place(self, doc: int) -> str:
        return f"{self.description}, context {doc}"

    def _batch_at(self, doc: int) -> tuple[int, pa.RecordBatch]:
        batches = self._batches
        index = int(np.searchsorted(batches.first_doc, doc, side="right")) - 1
        source = self._map(int(batches.file[index]))
        source.seek(int(batches.offset[index]))
        rows = pa.ipc.read_record_batch(pa.ipc.read_message(source), self._schema)
        return index, rows

    def _map(self, index: int) -> pa.MemoryMappedFile:
        """Return a file's map; the ones used last stay open."""
        if index not in self._maps:
            try:
                self._maps[index] = pa.memory_map(str(self._files.paths()[index]))
            except (OSError, pa.ArrowException) as error:
                refuse(
                    f"{self._files.paths()[index]} cannot be read ({error})",
                    "the dataset names it; copy it again",
                )
            if len(self._maps) > _OPEN_FILES:
                self._maps.popitem(last=False)
        self._maps.move_to_end(index)
        return self._maps[index]


def _data_files(folder: Path) -> list[str]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(
            f"{folder / STATE} cannot be read ({type(error).__name__}: {error})",
            "give the folder of a finished dataset; one that holds .tmp_shards is not",
        )
    if state.get("_indices_data_files"):
        refuse(f"{folder} is a view of another order", "save it with flatten_indices()")
    for name in names:
        if Path(name).name != name:
            refuse(f"{folder / STATE} names a file outside of its folder, {name!r}", "copy the dataset again")
    if not names:
        refuse(f"{folder} has no data file", "give the folder of a finished dataset")
    return names


def _record_batches(source: pa.MemoryMappedFile, schema: pa.Schema) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield where each record batch begins, and the batch; of its numbers nothing is read."""
    while True:
        offset = source.tell()
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            return
        if message is None:
            return
        yield offset, pa.ipc.read_record_batch(message, schema)


def _ends(source: pa.MemoryMappedFile) -> bool:
    size = source.size()
    if size < len(_END):
        return False
    source.seek(size - len(_END))
    return bool(source.read(len(_END)) == _END)


def _storage(column: pa.Array) -> pa.Array:
    """Return what an extension array is stored as; `datasets` registers its own type once it is imported."""
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _is_list(kind: pa.DataType) -> bool:
    t = pa.types
    return bool(t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind))


def _number_type(kind: Any) -> str | None:
    """Return the dtype of a column of [context, d_in] numbers, None for any other column."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if not _is_list(kind) or not _is_list(kind.value_type):
        return None
    return _DTYPES.get(kind.value_type.value_type)
