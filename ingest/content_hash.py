"""Do two corpora hold the same documents, however they were cut into batches, parts and files?

The hash of a table is over its columns' values alone (FORMAT.md, section 7): per column, name and type; per array of it,
which values are null, how long the variable ones are, and the values' bytes, each as one stream over the whole corpus.
Nothing of it depends on batch boundaries, offsets, compression or library versions.
"""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class TableHasher:
    """SHA-256 over the values of tables of one schema, fed in pieces.

    >>> schema = pa.schema([("x", pa.string())])
    >>> def digest(*pieces):
    ...     hasher = TableHasher(schema)
    ...     for piece in pieces:
    ...         hasher.update(pa.record_batch({"x": piece}))
    ...     return hasher.hexdigest()
    >>> digest(["a", None], ["b"]) == digest(["a"], [None, "b"]) != digest(["a", None, "b", ""])
    True
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._names = schema.names
        self._columns = [_ArrayHasher(field.type) for field in schema]

    def update(self, batch: pa.RecordBatch) -> None:
        """Add the rows of one batch of the same schema."""
        for name, hasher in zip(self._names, self._columns, strict=True):
            hasher.update(batch.column(name))

    def hexdigest(self) -> str:
        """Return the hash of all rows so far, 64 hex digits."""
        total = hashlib.sha256()
        for name, hasher in zip(self._names, self._columns, strict=True):
            total.update(hashlib.sha256(name.encode()).digest())
            for digest in hasher.digests():
                total.update(digest)
        return total.hexdigest()


class _ArrayHasher:
    """The three streams of one array, and those of its children."""

    def __init__(self, kind: pa.DataType) -> None:
        self._kind = kind
        self._nulls = hashlib.sha256(str(kind).encode())
        self._lengths = hashlib.sha256()
        self._values = hashlib.sha256()
        self._children: list[_ArrayHasher] = []
        t = pa.types
        if t.is_struct(kind):
            self._children = [_ArrayHasher(field.type) for field in kind]
        elif t.is_map(kind):
            self._children = [_ArrayHasher(pa.struct([("key", kind.key_type), ("value", kind.item_type)]))]
        elif t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
            self._children = [_ArrayHasher(kind.value_type)]

    def update(self, array: pa.Array) -> None:
        t, kind = pa.types, self._kind
        self._nulls.update(array.is_null().to_numpy(zero_copy_only=False).tobytes())
        if t.is_struct(kind):
            for hasher, child in zip(self._children, array.flatten(), strict=True):
                hasher.update(child)
        elif t.is_map(kind):
            pairs = array.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)])))
            self._update_list(pairs)
        elif self._children:
            self._update_list(array)
        elif t.is_binary(kind) or t.is_large_binary(kind) or t.is_string(kind) or t.is_large_string(kind):
            self._update_bytes(array)
        elif not t.is_null(kind):
            self._update_fixed(array)

    def digests(self) -> list[bytes]:
        own = [self._nulls.digest(), self._lengths.digest(), self._values.digest()]
        return own + [digest for child in self._children for digest in child.digests()]

    def _update_list(self, array: pa.Array) -> None:
        lengths = pc.list_value_length(array).fill_null(0)
        self._lengths.update(_int64(lengths))
        self._children[0].update(array.flatten())

    def _update_bytes(self, array: pa.Array) -> None:
        array = array.fill_null(b"" if "binary" in str(array.type) else "")
        self._lengths.update(_int64(pc.binary_length(array)))
        large = array.cast(pa.large_binary())
        offsets = np.frombuffer(large.buffers()[1], np.int64, len(large) + 1, 8 * large.offset)
        data = large.buffers()[2]
        if len(large) and data is not None:
            self._values.update(memoryview(data)[int(offsets[0]) : int(offsets[-1])])

    def _update_fixed(self, array: pa.Array) -> None:
        t, kind = pa.types, self._kind
        if t.is_boolean(kind):
            self._values.update(array.fill_null(False).to_numpy(zero_copy_only=False).tobytes())
            return
        width = kind.bit_width // 8
        # What lies under a null is nobody's value and may be anything.
        dense = array.drop_null()
        if len(dense):
            dense = pa.concat_arrays([dense])
            data = memoryview(dense.buffers()[1])
            self._values.update(data[dense.offset * width : (dense.offset + len(dense)) * width])


def _int64(array: pa.Array) -> bytes:
    data: bytes = array.cast(pa.int64()).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
    return data
