"""What is there to index, cut into shards, and is there a generation to finish? Pure functions of a store's state.

What is indexed are *pieces*: units of the run, or stretches of document numbers. A generation takes all pieces, or those that
no sealed one of its family has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actstore.log.values import Collection
from actstore.pooled_tables import spanning_documents
from actstore.run import Run
from actstore.vector_index import Of, Purpose, VectorIndex, index_collections, open_indexes


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of what can be indexed, which no shard cuts."""

    start: int
    """A unit, or a document."""
    stop: int
    n: int
    """Rows, or documents (those without a pooled token included)."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an index is to be; with the kind and its parameters this is a collection's identity."""

    hook_point: str
    """Canonical name."""
    of: Of
    purpose: Purpose
    pooling: str | None
    metric: str
    transform: tuple[str, ...]
    first_dims: int | None
    seed: int

    def config(self) -> dict[str, Any]:
        """Return its part of a collection's configuration."""
        return {
            "hook_point": self.hook_point,
            "of": self.of,
            "pooling": self.pooling,
            "metric": self.metric,
            "transform": list(self.transform),
            "first_dims": self.first_dims,
            "seed": self.seed,
        }


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


def covered_by(run: Run, wanted: Wanted) -> list[VectorIndex]:
    """Return the sealed generations that a new one of what is wanted would stand beside, newest first."""
    found = open_indexes(
        run,
        wanted.hook_point,
        of=wanted.of,
        purpose=wanted.purpose,
        metric=wanted.metric,
        transform_steps=wanted.transform,
        pooling=wanted.pooling,
    )
    return [index for index in found if index.first_dims == wanted.first_dims]


def uncovered(pieces: Sequence[Piece], indexes: Sequence[VectorIndex]) -> list[Piece]:
    """Return the pieces that no index has."""
    left = list(pieces)
    for index in indexes:
        covered = index.covered()
        if index.of == "tokens":
            has = set(covered.tolist())
            left = [piece for piece in left if piece.start not in has]
        elif len(covered):
            place = np.searchsorted(covered[:, 1], [piece.start for piece in left], side="right")
            left = [
                piece
                for piece, at in zip(left, place.tolist(), strict=True)
                if at == len(covered) or piece.start < covered[at, 0]
            ]
    return left


def cut_shards(pieces: Sequence[Piece], *, shard_rows: int) -> list[list[list[int]]]:
    """Return for each shard its ranges `[start, stop)`; a shard has at most `shard_rows` rows, or one piece.

    >>> cut_shards([Piece(0, 1, 5), Piece(1, 2, 5), Piece(4, 5, 5)], shard_rows=10)
    [[[0, 2]], [[4, 5]]]
    """
    shards: list[list[list[int]]] = []
    n = 0
    for piece in pieces:
        if not shards or n + piece.n > shard_rows:
            shards.append([])
            n = 0
        n += piece.n
        ranges = shards[-1]
        if ranges and ranges[-1][1] == piece.start:
            ranges[-1][1] = piece.stop
        else:
            ranges.append([piece.start, piece.stop])
    return shards


def rows_of_shards(pieces: Sequence[Piece], shards: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """Return what each shard counts: the pieces that lie in it."""
    return [
        sum(piece.n for piece in pieces if any(a <= piece.start < b for a, b in ranges)) for ranges in shards
    ]


def generations(run: Run, wanted: Wanted) -> list[Collection]:
    """Return all generations that share the names of what is wanted, oldest first."""
    return index_collections(run, wanted.hook_point, of=wanted.of, purpose=wanted.purpose)


def find_unfinished(
    found: Sequence[Collection],
    wanted: Wanted,
    pieces: Sequence[Piece],
    *,
    kind: str,
    n_lists: int | None,
    rebuild: bool,
) -> Collection | None:
    """Return the newest generation if it was begun as this one would be, and not sealed.

    Args:
        found: All generations, oldest first.
        wanted: What is asked for.
        pieces: What would be indexed.
        kind: What was asked for; `auto` is any.
        n_lists: What was asked for; None is any.
        rebuild: Whether all pieces are to be in it; otherwise some are enough.
    """
    if not found or found[-1].is_sealed:
        return None
    config = found[-1].config
    same = all(config.get(name) == value for name, value in wanted.config().items())
    same = same and kind in ("auto", config.get("kind"))
    same = same and n_lists in (None, config.get("params", {}).get("n_lists"))
    begun = {start for ranges in config.get("shards", []) for a, b in ranges for start in range(a, b)}
    there = {start for piece in pieces for start in range(piece.start, piece.stop)}
    same = same and (begun == there if rebuild else begun <= there)
    return found[-1] if same else None
