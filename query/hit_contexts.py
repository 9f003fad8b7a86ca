"""What stands around each answer, and how strongly does every token of it answer the query?

The windows are those of `actstore.query.row_contexts`; the activations of the rows shown are read again. Of a run that keeps a
sample of its rows, most tokens shown have no stored activation: their values are null.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.activations import Activations
from actstore.tokenization import Tokenization

from .row_contexts import Shown, describe_shown, show_rows
from .scores import Scorer

_GATHER_BYTES = 32 << 20
"""Activations gathered at a time."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer: a row, the query it answers, and its rank."""

    query: int
    rank: int
    row: int


def describe_hits(
    tokenization: Tokenization,
    acts: Activations,
    scorer: Scorer,
    hits: Sequence[Hit],
    *,
    before: int,
    after: int,
) -> pa.Table:
    """Return what is to be said about every hit, in the order given.

    Columns: rank, row, doc_id, position, token_id, token, value, context (`actstore.query.context.CONTEXT_TYPE`). Reads the
    tokens around the hits and their documents' text, kept in the process, and the activations of the rows shown.
    """
    rows = np.array([hit.row for hit in hits], np.int64)
    shown = show_rows(tokenization, rows, before=before, after=after)
    is_stored = acts.exist(shown.token_rows)
    values = np.full(len(is_stored), np.nan)
    queries = np.array([hit.query for hit in hits], np.int64)[shown.window_of]
    for some in _batches(shown, is_stored, room=max(1, _GATHER_BYTES // (4 * acts.shape[1]))):
        wanted, places = np.unique(shown.token_rows[some], return_inverse=True)
        acts_td = acts.read(wanted)
        order = np.argsort(queries[some], kind="stable")
        asked, starts = np.unique(queries[some][order], return_index=True)
        for query, own in zip(asked.tolist(), np.split(order, starts[1:]), strict=True):
            values[some[own]] = scorer.value(acts_td[places[own]], query)
    ranks = np.array([hit.rank for hit in hits], np.int64)
    return describe_shown(
        tokenization, shown, values, ranks=ranks, missing=None if is_stored.all() else ~is_stored
    )


def _batches(shown: Shown, is_stored: npt.NDArray[np.bool_], *, room: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield which tokens shown to read at a time, in the order of their rows: neighbouring hits share chunks."""
    order = np.flatnonzero(is_stored)
    order = order[np.argsort(shown.token_rows[order], kind="stable")]
    for start in range(0, len(order), room):
        yield order[start : start + room]
