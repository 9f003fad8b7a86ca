"""How do the rows of a unit become one vector for each of its documents?

Pure: tokens and activations in, vectors out. A row enters a document's vectors if it is not a special token (unless asked
for), its activations are finite, and it is not a token's second coming: where windows overlap, and where a window puts
special tokens around a piece from the middle of a document, a position of the document has several rows, and the first
window's counts. A document may go on in the next unit, so what is made for each is a sum (`PooledSums`) that merges with
the sums of its other pieces; a document that lies in one unit becomes its vectors at once.

Source: Muennighoff (2022), "SGPT: GPT Sentence Embeddings for Semantic Search", section 3.1.1 (position-weighted mean);
Ivison et al. (2025), "Large-Scale Data Selection for Instruction Tuning", section 3 (RDS+: the same over the last layer).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.dtypes import row_scales, to_float32
from actstore.pooled_tables import PooledSums

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_BLOCK_BYTES = 1 << 20
"""Of float64 rows widened at a time: they are summed while they are in the core's cache."""

POOLING_COLUMNS = ("doc_id", "position", "window", "window_position", "is_special")
"""Columns of a unit's tokens that `plan_documents` needs."""


@dataclass(frozen=True, slots=True)
class UnitDocuments:
    """The documents of a unit and which of its rows enter their vectors, whatever the activations are."""

    doc_ids: Ints
    """Shape (n,), ascending."""

    starts: Ints
    """Where each document's rows start in the unit, and at the end the number of rows; shape (n + 1,)."""

    is_piece: Mask
    """Whether the document has rows in other units too; shape (n,)."""

    enters: Mask
    """Which rows are pooled, shape (n_rows,)."""

    positions: Ints
    """Position of each row in its document, from 0; shape (n_rows,)."""


def plan_documents(
    tokens: pa.Table, *, window: int, overlap: int, pool_special: bool, goes_on: bool
) -> UnitDocuments:
    """Return the documents of a unit and which rows enter their vectors.

    Args:
        tokens: The unit's tokens, at least `POOLING_COLUMNS`, in row order.
        window: The tokenization's window, in tokens.
        overlap: Text tokens that neighbouring windows share.
        pool_special: Whether special tokens enter.
        goes_on: Whether the last document has rows in the next unit.
    """
    doc_id = tokens["doc_id"].to_numpy()
    edges = np.flatnonzero(doc_id[1:] != doc_id[:-1]) + 1
    starts = np.concatenate([[0], edges, [len(doc_id)]]) if len(doc_id) else np.zeros(1, np.int64)
    doc_ids = doc_id[starts[:-1]]
    is_piece = np.zeros(len(doc_ids), bool)
    if len(doc_ids):
        is_piece[0] = tokens["window"][0].as_py() > 0
        is_piece[-1] |= goes_on
    enters = ~repeated_rows(tokens, window=window, overlap=overlap)
    if not pool_special:
        enters &= ~tokens["is_special"].to_numpy()
    positions = tokens["position"].to_numpy().astype(np.int64)
    return UnitDocuments(doc_ids, starts.astype(np.int64), is_piece, enters, positions)


def repeated_rows(tokens: pa.Table, *, window: int, overlap: int) -> Mask:
    """Return which rows stand at a position of their document that another row, of the text itself or earlier, has.

    These are the text tokens that a window shares with the one before, and the special tokens that the tokenizer's template puts
    at an inner edge of a window, which have their neighbour's position (FORMAT.md, section 7). Every position of a document is
    left exactly once, in whatever unit its windows are.

    Args:
        tokens: Columns position, doc_id, window and window_position of whole windows, in row order.
        window: The tokenization's window, in tokens.
        overlap: Text tokens that neighbouring windows share.

    >>> tokens = pa.table({"doc_id": [0] * 7, "position": [0, 1, 2, 3, 2, 3, 4], "window": [0] * 4 + [1] * 3,
    ...                    "window_position": [0, 1, 2, 3, 0, 1, 2]})
    >>> repeated_rows(tokens, window=4, overlap=2).tolist()
    [False, False, False, False, True, True, False]
    """
    position = tokens["position"].to_numpy().astype(np.int64)
    at = tokens["window_position"].to_numpy().astype(np.int64)
    index = tokens["window"].to_numpy().astype(np.int64)
    if not len(position):
        return np.zeros(0, bool)
    begins = np.flatnonzero(at == 0)
    lengths = np.diff(np.append(begins, len(position)))
    first, number = position[begins], index[begins]
    # A later window starts at the position of its first text token: special tokens before that have it too.
    n_level = _level_lengths(position, begins, lengths)
    n_prefix = n_level - 1
    # All of a full window at one position: it has room for one text token, so its number says where it started.
    level = (n_level == lengths) & (lengths == window) & (lengths > 1)
    n_prefix[level] = first[level] - number[level]
    n_prefix[number == 0] = 0
    rows = np.repeat(np.arange(len(begins)), lengths)
    is_later = number[rows] > 0
    again = is_later & (position < first[rows] + overlap)
    before_text = is_later & (at < n_prefix[rows])
    same = np.zeros(len(position), bool)
    same[1:] = position[1:] == position[:-1]
    behind_text = same & (at > n_prefix[rows])
    repeated: Mask = again | before_text | behind_text
    return repeated


def _level_lengths(position: Ints, begins: Ints, lengths: Ints) -> Ints:
    """Return how many rows at the beginning of each window have the position of its first row, shape (n_windows,)."""
    changes = np.zeros(len(position), bool)
    changes[1:] = position[1:] != position[:-1]
    changes[begins] = False
    at = np.append(np.flatnonzero(changes), np.iinfo(np.int64).max)
    found = at[np.searchsorted(at, begins)]
    return np.minimum(found - begins, lengths)


def finite_rows(rows: npt.NDArray[Any], dtype: str) -> Mask | None:
    """Return which rows have neither NaN nor infinity, shape (n_rows,); None when all are so.

    Args:
        rows: `(n_rows, stored_width)` in the numpy dtype of `dtype`.
        dtype: `float32`, `float16`, `bfloat16`, or `int8`, where the row's scale says it.
    """
    if dtype == "int8":
        scales_are_finite = np.isfinite(row_scales(rows))
        return None if scales_are_finite.all() else scales_are_finite
    finite: Mask | None = None
    step = max(1, _BLOCK_BYTES // (8 * max(1, rows.shape[1])))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        good = (block & 0x7F80) != 0x7F80 if dtype == "bfloat16" else np.isfinite(block)
        if good.all():
            continue
        if finite is None:
            finite = np.ones(len(rows), bool)
        finite[start : start + step] = good.all(axis=1)
    return finite


def pool_rows(
    rows: npt.NDArray[Any],
    dtype: str,
    documents: UnitDocuments,
    *,
    poolings: Sequence[str],
    finite: Mask | None = None,
) -> Iterator[PooledSums]:
    """Yield what each document's rows come to, in order.

    Costs about 0.3 us a row at 768 dimensions for the means together and 0.15 us for the maximum; holds one document.

    Args:
        rows: Activations of one hook point, `(n_rows, d_model)`, in the numpy dtype of `dtype`.
        dtype: `float32`, `float16` or `bfloat16`.
        documents: From `plan_documents`.
        poolings: Which of mean, last, max and weighted_mean are wanted.
        finite: Rows whose activations are finite; None for all.
    """
    enters = documents.enters if finite is None else documents.enters & finite
    weights = documents.positions + 1
    step = max(1, _BLOCK_BYTES // (8 * rows.shape[1]))
    buffer = np.empty((min(step, max(1, len(rows))), rows.shape[1]))
    for start, stop in zip(documents.starts[:-1].tolist(), documents.starts[1:].tolist(), strict=True):
        picked = _rows_of(start, enters[start:stop])
        total = PooledSums.empty(rows.shape[1], poolings)
        n_picked = picked.stop - picked.start if isinstance(picked, slice) else len(picked)
        for low in range(0, n_picked, step):
            part = (
                slice(picked.start + low, min(picked.start + low + step, picked.stop))
                if isinstance(picked, slice)
                else picked[low : low + step]
            )
            total = total + _block_sums(rows[part], dtype, weights[part], poolings, buffer)
        yield total


def _rows_of(start: int, enters: Mask) -> slice | Ints:
    """Return the rows of a document that enter: as a slice, which copies nothing, if they follow each other."""
    at = np.flatnonzero(enters)
    if not len(at):
        return slice(start, start)
    if at[-1] - at[0] + 1 == len(at):
        return slice(start + int(at[0]), start + int(at[-1]) + 1)
    return at + start


def _block_sums(
    stored_td: npt.NDArray[Any],
    dtype: str,
    weights_t: Ints,
    poolings: Sequence[str],
    buffer: npt.NDArray[Any],
) -> PooledSums:
    block_td = stored_td if dtype == "float32" else to_float32(stored_td, dtype)
    mean, weighted = "mean" in poolings, "weighted_mean" in poolings
    sums: list[npt.NDArray[np.float64]] = []
    if mean or weighted:
        wide_td = buffer[: len(block_td)]
        np.copyto(wide_td, block_td)
        kinds = [np.ones(len(weights_t))] * mean + [weights_t.astype(np.float64)] * weighted
        sums = list(np.stack(kinds) @ wide_td)
    return PooledSums(
        n_tokens=len(block_td),
        weight_sum=int(weights_t.sum()),
        last_position=int(weights_t[-1]) - 1,
        sum=sums[0] if mean else None,
        weighted_sum=sums[-1] if weighted else None,
        max=block_td.max(axis=0) if "max" in poolings else None,
        last=block_td[-1].copy() if "last" in poolings else None,
    )
