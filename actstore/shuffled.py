"""In which random order do rows come for training, and how does a reader resume in the middle of it?

Reading single random rows costs 100 times the bytes, so whole chunks are drawn: all chunks of all units are permuted, runs of
`buffer_bytes` of them form a *group*, the rows of a group are permuted, and the stream of all groups' rows is cut into
batches. Batch `i` of an epoch is therefore a function of the seed, the epoch, the sizes and the stored rows, whoever reads it
and with how many threads or workers, and it can be reached without reading the groups before it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore.checks import check_whole
from actstore.codec.plan import Int64s, Piece, plan_pieces
from actstore.codec.read import RowReader, wait_for
from actstore.dtypes import StoredArray, stored_dtype
from actstore.errors import ErrorKind, InvalidInputError

_STATE_FORMAT: Final = 1
_CHUNKS: Final = 0
_ROWS: Final = 1


@dataclass(frozen=True, slots=True)
class ShufflePlan:
    """The order of one epoch, without its rows: which chunks form which group."""

    chunk_order: Int64s
    """Chunks, numbered through all units in order, as they are drawn."""

    chunk_cuts: Int64s
    """`[n_groups + 1]`: group `g` is the chunks `chunk_order[chunk_cuts[g] : chunk_cuts[g + 1]]`."""

    row_cuts: Int64s
    """`[n_groups + 1]`: rows of all groups before each."""


def plan_shuffle(chunk_rows: Int64s, *, rows_per_group: int, seed: int, epoch: int) -> ShufflePlan:
    """Return the order of an epoch.

    Args:
        chunk_rows: Rows of each chunk, at least 1.
        rows_per_group: A group ends with the chunk that reaches this many.
        seed: Of the run of epochs.
        epoch: From 0.

    >>> plan_shuffle(np.array([4, 4, 2]), rows_per_group=5, seed=0, epoch=0).row_cuts.tolist()
    [0, 6, 10]
    """
    order = _permutation(len(chunk_rows), seed, epoch, _CHUNKS, 0)
    ends = np.cumsum(chunk_rows[order])
    chunk_cuts, row_cuts = [0], [0]
    while row_cuts[-1] < (ends[-1] if len(ends) else 0):
        last = min(int(np.searchsorted(ends, row_cuts[-1] + rows_per_group)), len(ends) - 1)
        chunk_cuts.append(last + 1)
        row_cuts.append(int(ends[last]))
    return ShufflePlan(order, np.array(chunk_cuts), np.array(row_cuts))


def _permutation(n: int, seed: int, epoch: int, purpose: int, number: int) -> Int64s:
    """Return a random order of `range(n)`: sorted raw Philox words, which numpy promises never to change."""
    words = [seed & 0xFFFFFFFF, seed >> 32, epoch, purpose, number]
    drawn = np.random.Philox(np.random.SeedSequence(words)).random_raw(n)
    return np.argsort(drawn, kind="stable").astype(np.int64, copy=False)


class Shuffled:
    """Iterates over all rows in a random order; each `for` loop goes on where the last one stopped.

    A loop ends with the epoch; the next loop is the next epoch, in another order. `state()` after a batch and
    `load_state()` in another process continue with the batch after it. Two groups are in memory, `2 * buffer_bytes` of stored
    numbers, whatever the number of readers. Not for use from several threads at once.
    """

    def __init__(
        self,
        reader: RowReader,
        *,
        version: str,
        batch_rows: int,
        seed: int,
        buffer_bytes: int,
        drop_last: bool,
        n_readers: int | None,
        worker_index: int,
        num_workers: int,
        dtype: np.dtype[Any],
        chunk_rows: int | None = None,
        rows_per_group: int | None = None,
    ) -> None:
        """See `actstore.activations.Activations.shuffled`, which makes these.

        With the same seed, `chunk_rows` and `rows_per_group`, several hook points of one run come in one order, whatever their
        widths: `chunk_rows` is drawn at a time instead of a stored chunk, `rows_per_group` instead of what fills `buffer_bytes`.

        Raises:
            InvalidInputError: an argument out of range.
        """
        batch_rows = check_whole(batch_rows, what="batch_rows", least=1)
        buffer_bytes = check_whole(buffer_bytes, what="buffer_bytes", least=1)
        readers = reader.threads if n_readers is None else check_whole(n_readers, what="n_readers", least=1)
        num_workers = check_whole(num_workers, what="num_workers", least=1)
        worker_index = check_whole(worker_index, what="worker_index", least=0, most=num_workers - 1)
        seed = check_whole(seed, what="seed", least=0, most=(1 << 63) - 1)
        self._reader = reader
        self._dtype = dtype
        self._threads = readers
        self._worker = (worker_index, num_workers)
        self._drop_last = drop_last
        self._batch_rows = batch_rows
        self._seed = seed
        self._rows_per_group = max(1, buffer_bytes // reader.layout.spec.row_bytes)
        if rows_per_group is not None:
            self._rows_per_group = check_whole(rows_per_group, what="rows_per_group", least=1)
        self._chunk_rows = chunk_rows
        if chunk_rows is not None:
            check_whole(chunk_rows, what="chunk_rows", least=1)
        self._chunks = _all_chunks(reader, chunk_rows or reader.layout.spec.rows_per_chunk)
        self._version = version
        self._epoch = 0
        self._next_batch = 0

    @property
    def n_batches(self) -> int:
        """Batches of an epoch, all workers together."""
        n_rows = self._reader.layout.n_rows
        return n_rows // self._batch_rows if self._drop_last else -(-n_rows // self._batch_rows)

    def state(self) -> dict[str, Any]:
        """Return where the iteration stands, a small JSON object: the next batch is the one after the last yielded."""
        return {**self._identity(), "epoch": self._epoch, "next_batch": self._next_batch}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state()` was taken. The number of workers and readers may differ.

        Raises:
            InvalidInputError: the state is of other rows, another seed or other sizes, or not a state at all.
        """
        identity = self._identity()
        if not isinstance(state, Mapping):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"a state is the dictionary that state() gave, got {state!r:.80}"
            )
        different = [key for key in identity if state.get(key) != identity[key]]
        if different:
            key = different[0]
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"this state belongs to another shuffle: its {key} is {state.get(key)!r}, here it is {identity[key]!r}; "
                "open the same version and give the same arguments",
            )
        epoch, next_batch = state.get("epoch"), state.get("next_batch")
        if (
            type(epoch) is not int
            or type(next_batch) is not int
            or epoch < 0
            or not 0 <= next_batch <= self.n_batches
        ):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"epoch {epoch!r} and next_batch {next_batch!r} are no position in epochs of {self.n_batches} batches",
            )
        self._epoch, self._next_batch = epoch, next_batch

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
        """Yield `(rows, values)` of this worker's remaining batches of the epoch; both arrays are the caller's own."""
        epoch = self._epoch
        plan = plan_shuffle(
            self._chunks[:, 3], rows_per_group=self._rows_per_group, seed=self._seed, epoch=epoch
        )
        index, step = self._worker
        mine = range(self._next_batch + (index - self._next_batch) % step, self.n_batches, step)
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                groups = _Groups(self._reader, self._chunks, plan, pool, seed=self._seed, epoch=epoch)
                for batch in mine:
                    rows, stored = groups.take(batch * self._batch_rows, (batch + 1) * self._batch_rows)
                    self._next_batch = batch + 1
                    yield rows, self._answer(stored)
            finally:
                pool.shutdown(cancel_futures=True)
        self._epoch, self._next_batch = epoch + 1, 0

    def _answer(self, stored: StoredArray) -> npt.NDArray[Any]:
        return stored if stored.dtype == self._dtype else self._reader.widen(stored)

    def _identity(self) -> dict[str, Any]:
        layout = self._reader.layout
        rows = [[unit.unit, unit.n_rows, [shard.sha256 for shard in unit.shards]] for unit in layout.units]
        of_rows = json.dumps([self._version, layout.hook_point, layout.rows_per_unit, rows])
        return {
            "format": _STATE_FORMAT,
            "rows": hashlib.sha256(of_rows.encode()).hexdigest(),
            "seed": self._seed,
            "batch_rows": self._batch_rows,
            "rows_per_group": self._rows_per_group,
            "drop_last": self._drop_last,
            **({} if self._chunk_rows is None else {"chunk_rows": self._chunk_rows}),
        }


class _Groups:
    """The groups of an epoch, read in order: one in use, the next on its way."""

    def __init__(
        self,
        reader: RowReader,
        chunks: Int64s,
        plan: ShufflePlan,
        pool: ThreadPoolExecutor,
        *,
        seed: int,
        epoch: int,
    ) -> None:
        self._reader = reader
        self._chunks = chunks
        self._plan = plan
        self._pool = pool
        self._key = (seed, epoch)
        self._units = {unit.unit: unit for unit in reader.layout.units}
        self._reading: tuple[int, _Reading] | None = None
        self._held: tuple[int, Int64s, StoredArray, Int64s] | None = None

    def take(self, start: int, stop: int) -> tuple[Int64s, StoredArray]:
        """Return rows `[start, stop)` of the epoch's stream, fewer at its end, and their stored values."""
        cuts = self._plan.row_cuts
        stop = min(stop, int(cuts[-1]))
        rows, values = [], []
        while start < stop:
            group = int(np.searchsorted(cuts, start, "right")) - 1
            end = min(stop, int(cuts[group + 1]))
            of_group, stored, order = self._group(group)
            picked = order[start - cuts[group] : end - cuts[group]]
            rows.append(of_group[picked])
            values.append(stored[picked])
            start = end
            del stored  # or a batch that spans two groups would hold a third one
        if len(rows) == 1:
            return rows[0], values[0]
        return np.concatenate(rows), np.concatenate(values)

    def _group(self, group: int) -> tuple[Int64s, StoredArray, Int64s]:
        """Return a group's row numbers, values and order; waits for it, and sends for the next."""
        if self._held is None or self._held[0] != group:
            self._held = None  # before the next is begun: two groups are the limit
            if self._reading is None or self._reading[0] != group:
                self._reading = (group, self._begin(group))
            reading = self._reading[1]
            wait_for(reading.futures)
            order = _permutation(len(reading.rows), *self._key, _ROWS, group)
            self._held = (group, reading.rows, reading.values, order)
            last = group + 1 >= len(self._plan.row_cuts) - 1
            self._reading = None if last else (group + 1, self._begin(group + 1))
        return self._held[1:]

    def _begin(self, group: int) -> "_Reading":
        layout = self._reader.layout
        cuts = self._plan.chunk_cuts
        chosen = self._chunks[self._plan.chunk_order[cuts[group] : cuts[group + 1]]]
        n_rows = int(chosen[:, 3].sum())
        values = np.empty((n_rows, layout.spec.stored_width), stored_dtype(layout.spec.dtype))
        rows, pieces, target = np.empty(n_rows, np.int64), list[Piece](), 0
        for number, start, stop, count in chosen.tolist():
            unit = self._units[number]
            rows[target : target + count] = layout.numbers(unit, start, stop)
            pieces += plan_pieces(layout, unit, start, stop, target=target)
            target += count
        futures = [self._pool.submit(task) for task in self._reader.tasks(pieces, values)]
        return _Reading(rows, values, futures)


@dataclass(frozen=True, slots=True)
class _Reading:
    """A group on its way."""

    rows: Int64s
    values: StoredArray
    futures: list[Future[None]]


def _all_chunks(reader: RowReader, chunk_rows: int) -> Int64s:
    """Return `[n_chunks, 4]`: unit, first row and end in its stored rows, and number of rows of every chunk, in order."""
    layout, parts = reader.layout, []
    for unit in layout.units:
        starts = np.arange(0, unit.n_rows, chunk_rows, dtype=np.int64)
        stops = np.minimum(starts + chunk_rows, unit.n_rows)
        parts.append(np.stack([np.full_like(starts, unit.unit), starts, stops, stops - starts], axis=1))
    return np.concatenate(parts) if parts else np.empty((0, 4), np.int64)
