"""What is left to index, cut into shards, and is there a generation to finish? Pure functions of a store's state.

A generation takes all pieces (`actstore.index_pieces`) of what a run stores, or those that no sealed one of its family has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actstore.index_pieces import Piece
from actstore.log.values import Collection
from actstore.run import Run
from actstore.vector_index import Of, Purpose, VectorIndex, index_collections, open_indexes


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
