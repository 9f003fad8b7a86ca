"""Where do documents wait until the whole source has been read?

A corpus has one schema and is published whole, but a stream shows its last type, its last bad record and its hash only at
its end. So documents are first written to temporary Arrow files on local disk (compressed; about a third of the text), and
read back once with the final schema. Memory stays at one batch plus 16 bytes per document, the hashes that find duplicates.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore.corpus import SOURCE_KEY, TEXT
from actstore.errors import ErrorKind, StorageError

from .columns import conform, final_type, unify_schemas
from .documents import Documents

_HASH_BYTES = 16
"""128 bits: a chance of 1e-18 that any two of 1e10 different documents share a hash."""


class Spool:
    """Documents of one import on their way to the store. Use as a context manager; the files go with it."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        """Make an empty spool in a temporary folder below `folder` (default: the system's)."""
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="actstore-import-")
        self._schema = pa.schema([(TEXT, pa.large_string()), (SOURCE_KEY, pa.string())])
        self._files: list[Path] = []
        self._writer: pa.RecordBatchFileWriter | None = None
        self._hashes = bytearray()
        self.n_documents = 0
        self.n_empty = 0
        self.n_nul = 0
        self.text_bytes = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(
            OSError
        ):  # of a full disk: the error that ends the import is already on its way
            self._close_file()
        self._folder.cleanup()

    def add(self, documents: Documents) -> None:
        """Append documents and count them.

        Raises:
            InvalidInputError: a column whose type does not go with what it held before.
            StorageError: the temporary folder is full.
        """
        rows = documents.rows
        schema = unify_schemas(self._schema, rows.schema, place_of=partial(_first_place, documents))
        if schema != self._schema or self._writer is None:
            self._close_file()
            self._schema = schema
        text = rows.column(TEXT)
        self._count(text)
        try:
            self._open_file().write_batch(_conformed(rows, self._schema))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise StorageError(
                ErrorKind.STORAGE_FULL,
                f"the temporary folder {self._folder.name} is full after {self.n_documents} documents: name a larger one "
                "with spool_dir= or TMPDIR",
            ) from error

    @property
    def schema(self) -> pa.Schema:
        """The schema that all documents fit, as they will be stored."""
        return pa.schema([(field.name, final_type(field.type)) for field in self._schema])

    def first_occurrences(self) -> npt.NDArray[np.bool_]:
        """Return which documents are the first with their text, shape (n_documents,)."""
        pairs = np.frombuffer(self._hashes, "<u8").reshape(-1, 2)
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # stable: equal hashes stay in document order
        ordered = pairs[order]
        first = np.ones(len(pairs), bool)
        first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
        return first

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield all documents in order, with the final schema. Ends the adding."""
        self._close_file()
        schema = self.schema
        for path in self._files:
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                for i in range(reader.num_record_batches):
                    yield _conformed(reader.get_batch(i), schema)

    def _count(self, text: pa.Array) -> None:
        views = _values(text)
        for view in views:
            self._hashes += hashlib.blake2b(view, digest_size=_HASH_BYTES).digest()
        self.n_documents += len(views)
        self.text_bytes += sum(map(len, views))
        is_empty = pc.or_(pc.utf8_is_space(text), pc.equal(pc.binary_length(text), 0))
        self.n_empty += pc.sum(is_empty).as_py() or 0
        self.n_nul += pc.sum(pc.match_substring(text, "\0")).as_py() or 0

    def _open_file(self) -> pa.RecordBatchFileWriter:
        if self._writer is None:
            path = Path(self._folder.name) / f"{len(self._files):06}.arrow"
            self._files.append(path)
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writer = pa.ipc.new_file(str(path), self._schema, options=options)
        return self._writer

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _values(text: pa.Array) -> list[Any]:
    """Return the bytes of each string of a large_string array, without copying them."""
    offsets = np.frombuffer(text.buffers()[1], np.int64, len(text) + 1, 8 * text.offset).tolist()
    data = memoryview(text.buffers()[2] or b"")
    return [data[a:b] for a, b in itertools.pairwise(offsets)]


def _conformed(rows: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    present = set(rows.schema.names)
    arrays = [
        conform(f.name, rows.column(f.name), f.type) if f.name in present else pa.nulls(rows.num_rows, f.type)
        for f in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _first_place(documents: Documents, column: str) -> str:
    """Return where the first document stands that has a value in the column."""
    valid = documents.rows.column(column).is_valid().to_numpy(zero_copy_only=False)
    return documents.places[int(valid.argmax())]
