"""Which rows are the same answer twice? The keys by which near-duplicate rows are folded into the best of them."""

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Fold: TypeAlias = Literal["context", "doc"] | None

CONTEXT_TOKENS = 8
"""Tokens up to and including the row's own that make its context: what a reader takes for the same example twice."""


def fold_keys(
    fold: Fold,
    *,
    offsets: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    doc_ids: npt.NDArray[np.int64],
    token_ids: npt.NDArray[np.int32],
    window_positions: npt.NDArray[np.int32],
) -> npt.NDArray[Any]:
    """Return one key per wanted row: equal keys are folded.

    Args:
        fold: "context": the token ids of the last `CONTEXT_TOKENS` tokens up to and including the row's own, fewer at the
            start of its window; "doc": its document; None: the row itself.
        offsets: Wanted rows, as offsets into the unit, shape (n,).
        rows: Row numbers of the whole unit, shape (t,); so the other three, in row order.
        doc_ids: Documents.
        token_ids: Token ids.
        window_positions: Index of each token in its model window.
    """
    if fold is None:
        return rows[offsets]
    if fold == "doc":
        return doc_ids[offsets]
    back = np.arange(CONTEXT_TOKENS - 1, -1, -1)
    context_nt = np.full((len(offsets), CONTEXT_TOKENS), -1, dtype=np.int32)
    inside = back[None, :] <= window_positions[offsets][:, None]
    source = offsets[:, None] - back[None, :]
    context_nt[inside] = token_ids[source[inside]]
    return np.ascontiguousarray(context_nt).view(np.dtype((np.void, CONTEXT_TOKENS * 4))).reshape(-1)
