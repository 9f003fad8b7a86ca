"""How are the rows of a shard read, from first to last or a few of them? Rows of a hook point, or documents' pooled vectors.

Blocks come in the order of ordinals. All of this is bounded by a block of rows and, for documents, one unit's vectors and 8 bytes
for each document of the shard.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.pooled import Pooled
from actstore.run import Run
from actstore.vector_index import IndexShard, Of

Float32s: TypeAlias = npt.NDArray[np.float32]
Int64s: TypeAlias = npt.NDArray[np.int64]
Ranges: TypeAlias = Sequence[tuple[int, int]]

BLOCK_BYTES = 32 << 20
"""Of float32 rows handled at once."""

_RUN_ROWS = 128
"""Rows that a sample reads together: the requests of scattered rows cost more than their bytes."""


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where the vectors of an index come from; pickles."""

    run: Run
    hook_point: str
    of: Of
    pooling: str | None

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return max(1, BLOCK_BYTES // (4 * self.run.d_model(self.hook_point)))

    def blocks(self, ranges: Ranges) -> Iterator[tuple[Int64s, Float32s]]:
        """Yield numbers, ascending, and vectors of what lies in some ranges of units or documents.

        Raises:
            FormatError: an object is missing or damaged.
        """
        if self.of == "tokens":
            units = {unit for start, stop in ranges for unit in range(start, stop)}
            yield from self.run.activations(self.hook_point).scan(self.block_rows, units=units)
            return
        for part in self._pooled().scan(docs=_numbers(ranges)):
            for start in range(0, len(part), self.block_rows):
                stop = start + self.block_rows
                yield part.doc_ids[start:stop], part.vectors[start:stop]

    def some(self, numbers: Int64s) -> Float32s:
        """Return the vectors of some rows or documents, ascending and each once; all of them exist."""
        if self.of == "tokens":
            return self.run.activations(self.hook_point).read(numbers)
        return self._pooled().documents(numbers).vectors

    def sample(self, ranges: Ranges, n: int, *, seed: int) -> Float32s:
        """Return about `n` vectors, at random but for lying side by side in short runs; all if there are no more.

        Of documents it is chosen among their numbers. Memory: the answer, and 8 bytes for each 128 rows, or each document.
        """
        rng = np.random.default_rng([seed, 1])
        if self.of == "documents":
            numbers = _numbers(ranges)
            if n < len(numbers):
                numbers = np.sort(rng.choice(numbers, n, replace=False))
            return self._pooled().documents(numbers).vectors
        acts = self.run.activations(self.hook_point)
        units = {unit for start, stop in ranges for unit in range(start, stop)}
        layout = acts.layout
        stored = [unit for unit in layout.units if unit.unit in units]
        n_runs = np.cumsum([0, *(-(-unit.n_rows // _RUN_ROWS) for unit in stored)])
        chosen = np.arange(n_runs[-1])
        if n < sum(unit.n_rows for unit in stored):
            chosen = np.sort(rng.permutation(n_runs[-1])[: -(-n // _RUN_ROWS)])
        at = np.searchsorted(n_runs, chosen, side="right") - 1
        firsts = (chosen - n_runs[at]) * _RUN_ROWS
        parts = [np.empty(0, np.int64)]
        for unit, first in zip((stored[i] for i in at.tolist()), firsts.tolist(), strict=True):
            parts.append(layout.numbers(unit, first, min(first + _RUN_ROWS, unit.n_rows)))
        return acts.read(np.concatenate(parts))

    def _pooled(self) -> Pooled:
        assert self.pooling is not None, "documents have a pooling"
        return self.run.pooled(self.hook_point, self.pooling)


def shard_blocks(source: RowSource, shard: IndexShard) -> Iterator[tuple[int, Int64s, Float32s]]:
    """Yield the first ordinal, the row numbers and the vectors of each block of a built shard.

    Raises:
        FormatError: it does not have as many rows as when it was built.
    """
    first = 0
    for numbers, vectors in source.blocks(shard.index.unit_ranges[shard.number]):
        yield first, numbers, vectors
        first += len(numbers)
    if first != shard.n:
        raise shard.index.broken(f"shard {shard.number} has {shard.n} rows, and {first} are stored")


def _numbers(ranges: Ranges) -> Int64s:
    """Return the numbers in some half-open ranges, which have none in common, ascending."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(a, b) for a, b in sorted(ranges))])
