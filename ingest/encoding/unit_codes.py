"""What do the rows of one unit become in a dictionary: which objects, and what does the manifest say of them?

The same `CodesWriter` serves both ways to codes: over stored rows (`codes_job.py`) and over rows that were just captured
(`actstore.ingest.unit`). Rows are encoded in blocks that are cut at the same places, so both give the same codes to the bit
where they see the same rows. Objects have keys of their own per attempt; nothing here makes anything visible.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.dtypes import to_float32
from actstore.ingest.encoding.plan import KIND, CodesPlan, codes_key
from actstore.ingest.encoding.pooled_codes import pool_codes, pooled_object, unit_documents
from actstore.ingest.pooling import POOLING_COLUMNS, Mask
from actstore.log.values import Add, StoredObject
from actstore.pooled_codes_table import pooled_codes_key
from actstore.sparse.rows import SparseRows
from actstore.sparse.unit_format import encode_unit
from actstore.storage import Storage, write_new
from actstore.tokenization import Tokenization

BLOCK_ROWS = 4096
"""Rows encoded at a time, counted from the first row of their unit: 12 MiB of float32 at 768 dimensions."""

TOKEN_COLUMNS = POOLING_COLUMNS
"""Columns of a unit's tokens that writing its codes needs."""

Rows = npt.NDArray[Any]
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class EncodesRows(Protocol):
    """A dictionary's encoder; `actstore.ingest.dictionaries.encoder.Encoder` is the real one."""

    def encode(self, rows_nd: npt.NDArray[np.float32], /) -> SparseRows:
        """Return the codes of rows; none for a row that is not finite."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRows:
    """The codes of a unit's stored rows."""

    codes: SparseRows
    norms: npt.NDArray[np.float32]
    """L2 norm of every row; 0 for one that is not finite."""
    finite: Mask | None
    """Which rows are finite; None for all."""
    seconds: float
    """Spent on reading and encoding, without waiting for a turn."""


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """A unit's objects of codes, durable, and what its `meta` says of them."""

    rows: int
    objects: tuple[StoredObject, ...]
    meta: dict[str, Any]


class CodesWriter:
    """Encodes and stores units of the codes of one dictionary. Safe for two threads: one encodes while the other writes.

    Memory: the encoder's, one block of rows, and the codes of two units with as much again while their object is made.
    """

    def __init__(
        self, storage: Storage, tokenization: Tokenization, plan: CodesPlan, encoder: EncodesRows
    ) -> None:
        self._storage = storage
        self._tokenization = tokenization
        self.plan = plan
        """Of the codes."""
        self._encoder = encoder
        self._lock = threading.Lock()

    def encode(self, blocks: Iterable[npt.NDArray[np.float32]]) -> EncodedRows:
        """Return the codes of a unit's rows, given in blocks of `BLOCK_ROWS` from the first one on.

        Raises:
            InvalidInputError: a code too large for the stored dtype.
        """
        with self._lock:
            began = time.perf_counter()
            parts, norms, good = [], [np.empty(0, np.float32)], [np.empty(0, bool)]
            for block in blocks:
                parts.append(self._encoder.encode(block))
                of_block = row_norms(block)
                good.append(np.isfinite(of_block))
                norms.append(np.where(good[-1], np.minimum(of_block, _FLOAT32_MAX), 0).astype(np.float32))
                del block
            seconds = time.perf_counter() - began
        plan = self.plan
        codes = (
            SparseRows.concat(parts)
            if parts
            else SparseRows.empty(0, plan.n_latents, plan.settings.value_dtype)
        )
        finite = np.concatenate(good)
        return EncodedRows(codes, np.concatenate(norms), None if finite.all() else finite, seconds)

    def store(
        self,
        unit: int,
        attempt: str,
        encoded: EncodedRows,
        tokens: pa.Table,
        *,
        kept: npt.NDArray[np.int64] | None,
    ) -> StoredCodes:
        """Write a unit's codes and pooled codes, and return what a commit needs.

        Args:
            unit: Number of the unit.
            attempt: Of whoever writes; goes into the keys.
            encoded: From `encode`.
            tokens: Of the whole unit, at least `TOKEN_COLUMNS`.
            kept: Offsets of the stored rows among the tokens; None for all.

        Raises:
            StorageError: they could not be written.
        """
        plan = self.plan
        data, meta = encode_unit(encoded.codes, encoded.norms)
        objects = [self._put(codes_key(plan.codes, unit, attempt), data)]
        del data
        documents = unit_documents(self._tokenization, unit, tokens, pool_special=plan.settings.pool_special)
        pooled = pool_codes(
            encoded.codes, documents, kept=kept, finite=encoded.finite, top_m=plan.settings.pool_top_m
        )
        data, counts = pooled_object(pooled, documents)
        objects.append(self._put(pooled_codes_key(plan.codes, unit, attempt), data))
        nonfinite = 0 if encoded.finite is None else int((~encoded.finite).sum())
        meta = {**meta, "pooled": counts, **({"nonfinite_rows": nonfinite} if nonfinite else {})}
        return StoredCodes(encoded.codes.n_rows, tuple(objects), meta)

    def add(
        self,
        unit: int,
        attempt: str,
        encoded: EncodedRows,
        tokens: pa.Table,
        *,
        kept: npt.NDArray[np.int64] | None,
    ) -> Add:
        """Do what `store` does, and return the action that makes the unit live at the plan's epoch."""
        stored = self.store(unit, attempt, encoded, tokens, kept=kept)
        return Add(
            kind=KIND,
            id=self.plan.codes,
            epoch=self.plan.epoch,
            fingerprint=self.plan.fingerprint,
            unit=unit,
            rows=stored.rows,
            nonfinite=0,
            attempt=attempt,
            objects=stored.objects,
            meta=stored.meta,
        )

    def _put(self, key: str, data: bytes) -> StoredObject:
        return write_new(self._storage, key, [data])


def blocks_of(
    rows: Rows, dtype: str, kept: npt.NDArray[np.int64] | None
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield captured rows as float32 blocks of `BLOCK_ROWS`.

    Args:
        rows: `(n_rows, d_model)` in the numpy dtype of `dtype`.
        dtype: `float32`, `float16` or `bfloat16`.
        kept: Offsets of those that are wanted; None for all.
    """
    n = len(rows) if kept is None else len(kept)
    for start in range(0, n, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, n)
        yield to_float32(rows[start:stop] if kept is None else rows[kept[start:stop]], dtype)


def row_norms(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the L2 norm of every row, summed in float64; infinite or NaN for a row that is not finite."""
    wide = rows.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity times 0
        norms: npt.NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    return norms
