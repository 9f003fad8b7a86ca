"""How do the rows of several hook points come to the trainer, shuffled, in one order, while the last step still computes?

One thread reads ahead: groups of chunks of every hook point, mixed alike (`actstore.shuffled`), cut into batches, and rows
taken out that the tokens rule out. Where it stands travels with each batch, so that a checkpoint behind a step is exactly
behind that step, whatever was read ahead.
"""

import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.activations import Activations
from actstore.dtypes import stored_dtype
from actstore.shuffled import Shuffled

from .masks import TokenMask

if TYPE_CHECKING:
    import torch

_AHEAD = 3
"""Batches that wait for the trainer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one step."""

    rows: npt.NDArray[np.int64]
    """Numbers of the rows that are left."""

    n_read: int
    """Rows before any was taken out."""

    values: Mapping[str, "torch.Tensor"]
    """Hook point to rows (n, d) on the CPU, in a float type that holds what is stored."""

    state: Mapping[str, Any]
    """Where the next batch is, of the first hook point's shuffle."""


class RowStream:
    """Batches of the same rows at several hook points, over and over. Memory: two groups of each, and a few batches."""

    def __init__(
        self,
        activations: Sequence[Activations],
        mask: TokenMask,
        *,
        batch_rows: int,
        buffer_rows: int,
        seed: int,
        pin: bool,
    ) -> None:
        """Plan the order; reads nothing yet.

        Args:
            activations: Of one run.
            mask: Rows to take out.
            batch_rows: Rows of a batch before that.
            buffer_rows: Rows that are mixed with each other.
            seed: Of the order.
            pin: Whether batches go into page-locked memory, for a GPU.
        """
        self._mask, self._pin = mask, pin
        self._dtypes = [acts.stored_dtype for acts in activations]
        # Of one width all have one chunk size already, so that training them alone or together is the same.
        chunk_rows = math.lcm(*(acts.layout.spec.rows_per_chunk for acts in activations))
        self._parts = {
            acts.hook_point: self._shuffled(acts, chunk_rows, batch_rows, buffer_rows, seed)
            for acts in activations
        }
        self._first = next(iter(self._parts.values()))

    @staticmethod
    def _shuffled(
        acts: Activations, chunk_rows: int, batch_rows: int, buffer_rows: int, seed: int
    ) -> Shuffled:
        # int8 stands for numbers only after its transform; the others travel as they are stored.
        dtype = np.dtype(np.float32) if acts.stored_dtype == "int8" else stored_dtype(acts.stored_dtype)
        return Shuffled(
            acts.reader,
            version=acts.fingerprint,
            batch_rows=batch_rows,
            seed=seed,
            buffer_bytes=1,
            drop_last=False,
            n_readers=None,
            worker_index=0,
            num_workers=1,
            dtype=dtype,
            chunk_rows=chunk_rows,
            rows_per_group=buffer_rows,
        )

    @property
    def n_batches(self) -> int:
        """Batches of an epoch."""
        return self._first.n_batches

    def state(self) -> dict[str, Any]:
        """Return where the stream begins, or was told to begin."""
        return self._first.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Begin where a batch's `state` says.

        Raises:
            InvalidInputError: it belongs to other rows, or another order.
        """
        self._first.load_state(state)
        for part in self._parts.values():
            part.load_state({**part.state(), "epoch": state["epoch"], "next_batch": state["next_batch"]})

    @contextmanager
    def reading(self) -> Iterator[Iterator[Batch]]:
        """Give an endless iterator of batches, one epoch after the other; what it reads ahead ends with the block."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(_AHEAD)
        stop = threading.Event()

        def put(item: "Batch | BaseException") -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                except queue.Full:
                    continue
                return True
            return False

        def read() -> None:
            try:
                while not stop.is_set():
                    for batch in self._epoch():
                        if not put(batch):
                            return
            except BaseException as error:  # noqa: BLE001 - raised again where the batch is asked for
                put(error)

        def take() -> Iterator[Batch]:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item

        thread = threading.Thread(target=read, name="actstore-training-rows", daemon=True)
        thread.start()
        try:
            yield take()
        finally:
            stop.set()
            thread.join()

    def _epoch(self) -> Iterator[Batch]:
        parts = zip(*self._parts.values(), strict=True)
        for found in parts:
            rows = found[0][0]
            assert all(np.array_equal(rows, other) for other, _ in found[1:]), (
                "hook points left the common order"
            )
            keep = self._mask.keep(rows)
            places = None if keep.all() else np.flatnonzero(keep)
            values = {
                name: self._tensor(stored, dtype, places)
                for name, dtype, (_, stored) in zip(self._parts, self._dtypes, found, strict=True)
            }
            left = rows if places is None else rows[places]
            yield Batch(left, len(rows), values, self._first.state())

    def _tensor(
        self, stored: npt.NDArray[Any], dtype: str, places: npt.NDArray[np.int64] | None
    ) -> "torch.Tensor":
        import torch

        if places is not None:
            stored = stored[places]
        is_bits = dtype == "bfloat16"  # numpy has no such type, and torch no uint16 to view as one
        tensor = torch.from_numpy(stored.view(np.int16) if is_bits else stored)
        tensor = tensor.view(torch.bfloat16) if is_bits else tensor
        return tensor.pin_memory() if self._pin else tensor
