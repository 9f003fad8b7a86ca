"""What of a run can be indexed, and how much of it do some shards have? Pure functions of a store's state.

What is indexed are *pieces*: units of the run, or stretches of document numbers.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from actstore.pooled_tables import spanning_documents
from actstore.run import Run
from actstore.vector_index import Of


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of what can be indexed, which no shard cuts."""

    start: int
    """A unit, or a document."""
    stop: int
    n: int
    """Rows, or documents (those without a pooled token included)."""


def all_pieces(run: Run, of: Of) -> list[Piece]:
    """Return everything that a run stores so far, in order."""
    live = run.collection.units
    if of == "tokens":
        return [Piece(unit, unit + 1, live[unit].rows) for unit in sorted(live) if live[unit].rows]
    units = run.tokenization.units
    spanning = dict(spanning_documents(units))
    pieces = [Piece(doc, doc + 1, 1) for doc, spans in spanning.items() if all(u in live for u in spans)]
    for unit in units:
        if unit.unit not in live:
            continue
        first, last = int(unit.meta["first_doc"]), int(unit.meta["last_doc"])
        whole = int(live[unit.unit].meta["pooled"]["documents"])
        start, stop = first + (first in spanning), last + 1 - (last in spanning)
        if whole and start < stop:
            pieces.append(Piece(start, stop, whole))
    return sorted(pieces, key=lambda piece: piece.start)


def rows_of_shards(pieces: Sequence[Piece], shards: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """Return what each shard counts: the pieces that lie in its ranges, of which no two have anything in common.

    >>> rows_of_shards([Piece(0, 1, 5), Piece(1, 2, 7), Piece(4, 5, 2)], [[[0, 1], [4, 5]], [[1, 2]]])
    [7, 7]
    """
    edges = sorted((a, b, number) for number, ranges in enumerate(shards) for a, b in ranges)
    starts = [a for a, _, _ in edges]
    counts = [0] * len(shards)
    for piece in pieces:
        at = bisect_right(starts, piece.start) - 1
        if at >= 0 and piece.start < edges[at][1]:
            counts[edges[at][2]] += piece.n
    return counts
