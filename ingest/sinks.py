"""How do a batch's activations get from the model's device into a unit's arrays?

On the CPU each hook writes its rows into the arrays at once. On another device each hook packs its rows, in the stored
dtype, into one buffer of that device; at the end of the batch one copy brings the buffer to pinned host memory on a stream
of its own, and the rows are spread into the arrays while the model computes the next batch. Two buffers take turns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

if TYPE_CHECKING:
    import torch

Out = Mapping[str, npt.NDArray[Any]]

_MIN_TOKENS_PER_COPY = 8
"""Mean window length from which one copy per window is cheaper than gathering all rows first (measured at widths 64 to 768)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Where one batch's rows come from and go to."""

    shape: tuple[int, int]
    """Windows, and tokens of the longest."""
    places: npt.NDArray[np.int64] | None
    """Of each row its place in the flattened, padded batch; None if nothing is padded."""
    rows: npt.NDArray[np.int64]
    """Of each row its row in the unit's arrays."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each window; a window's rows follow each other."""

    @property
    def span(self) -> tuple[int, int] | None:
        """The range of rows in the arrays if they follow each other, else None."""
        first, last = int(self.rows[0]), int(self.rows[-1])
        in_order = last - first + 1 == len(self.rows) and bool((np.diff(self.rows) == 1).all())
        return (first, last + 1) if in_order else None


class Sink(Protocol):
    """Takes the activations of one unit, batch by batch."""

    def begin(self, batch: Batch) -> None:
        """Expect the activations of `batch`."""

    def put(self, name: str, activations: "torch.Tensor") -> None:
        """Take one hook point's activations of the batch, padded: (windows, tokens, ...) or (windows * tokens, ...)."""

    def end(self) -> None:
        """Take note that the batch is complete."""

    def finish(self) -> None:
        """Return when all rows are in the arrays.

        Raises:
            InvalidInputError: values overflowed the stored dtype.
        """


def torch_dtype(stored_dtype: str) -> "torch.dtype":
    """Return torch's name for a stored dtype."""
    import torch

    dtype: torch.dtype = getattr(torch, stored_dtype)
    return dtype


def as_tensor(array: npt.NDArray[Any], stored_dtype: str) -> "torch.Tensor":
    """Return a tensor over the array's own memory; uint16 is taken for bfloat16 bits."""
    import torch

    if stored_dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def rows_of(activations: "torch.Tensor", batch: Batch, places: "torch.Tensor | None") -> "torch.Tensor":
    """Return the batch's rows without padding, (rows, width), in the model's dtype; a view where nothing is padded."""
    windows, tokens = batch.shape
    flat = activations.reshape(windows * tokens, -1)
    return flat if places is None else flat.index_select(0, places)


class OverflowCount:
    """Counts finite values that became infinite in the stored dtype, and remembers the largest, per hook point.

    The counts stay on the device, so that counting waits for nothing.
    """

    def __init__(self, stored_dtype: str, n_rows: int) -> None:
        import torch

        self._stored_dtype, self._n_rows = stored_dtype, n_rows
        self._limit = torch.finfo(torch_dtype(stored_dtype)).max
        self._found = dict[str, tuple["torch.Tensor", "torch.Tensor"]]()

    def is_possible(self, source: "torch.Tensor") -> bool:
        """Return whether any value is beyond the limit or not finite: one quick look, which waits for the device."""
        if not self._is_wider(source):
            return False
        low, high = source.aminmax()
        # False for a NaN too: it hides whatever is beside it.
        return not (float(low) >= -self._limit and float(high) <= self._limit)

    def add(self, name: str, source: "torch.Tensor", stored: "torch.Tensor") -> None:
        """Compare one hook point's rows before and after conversion; waits for nothing."""
        if not self._is_wider(source):
            return
        bad = stored.isinf().logical_and_(source.isfinite())
        count, largest = bad.sum(), source.abs().masked_fill_(~bad, 0).max().float()
        if name in self._found:
            count, largest = count + self._found[name][0], largest.maximum(self._found[name][1])
        self._found[name] = (count, largest)

    def _is_wider(self, source: "torch.Tensor") -> bool:
        """Return whether values of this type can be beyond the limit. A model's hook points may differ in their types."""
        import torch

        return bool(torch.finfo(source.dtype).max > self._limit)

    def check(self) -> None:
        """Raise if anything overflowed: the one place that waits for the device."""
        found = {name: (int(count), float(largest)) for name, (count, largest) in self._found.items()}
        bad = [
            f"{name}: {count} values, the largest {largest:.6g}"
            for name, (count, largest) in found.items()
            if count
        ]
        if bad:
            wider = "float32" if self._stored_dtype == "bfloat16" else "bfloat16 or float32"
            raise InvalidInputError(
                ErrorKind.OVERFLOW,
                f"in {self._n_rows} rows, finite activations are beyond {self._limit:.6g}, the largest {self._stored_dtype}"
                f" number, and would be stored as infinity ({'; '.join(bad)}): store {wider}",
            )


class HostSink:
    """Writes each hook point's rows into the arrays as soon as they are computed, for models on the CPU."""

    def __init__(self, out: Out, stored_dtype: str, overflow: OverflowCount) -> None:
        self._out = {name: as_tensor(array, stored_dtype) for name, array in out.items()}
        self._overflow = overflow

    def begin(self, batch: Batch) -> None:
        """Expect the activations of `batch`."""
        import torch

        self._batch = batch
        self._places = None if batch.places is None else torch.from_numpy(batch.places)
        self._rows = torch.from_numpy(batch.rows)
        self._span = batch.span

    def put(self, name: str, activations: "torch.Tensor") -> None:
        """Convert and write one hook point's rows."""
        out, batch = self._out[name], self._batch
        flat_td = activations.reshape(batch.shape[0] * batch.shape[1], -1)
        if self._span and self._places is None:
            out[self._span[0] : self._span[1]].copy_(flat_td)
        elif len(batch.rows) < _MIN_TOKENS_PER_COPY * len(batch.lengths):
            picked_td = rows_of(activations, batch, self._places)
            out.index_copy_(0, self._rows, picked_td.to(out.dtype))
        else:
            # Window by window: conversion and write in one pass over memory, instead of three.
            stop, longest = 0, batch.shape[1]
            for window, length in enumerate(batch.lengths.tolist()):
                first, stop = int(batch.rows[stop]), stop + length
                out[first : first + length].copy_(flat_td[window * longest : window * longest + length])
        if self._overflow.is_possible(flat_td):
            picked_td = rows_of(activations, batch, self._places)
            self._overflow.add(name, picked_td, picked_td.to(out.dtype))

    def end(self) -> None:
        """Do nothing: all rows are written."""

    def finish(self) -> None:
        """Raise if values overflowed."""
        self._overflow.check()


class CopyStream(Protocol):
    """Brings device memory to the host beside the computation."""

    def host_buffer(self, size: int, dtype: "torch.dtype") -> "torch.Tensor":
        """Return host memory that `copy` can write to."""

    def copy(self, host: "torch.Tensor", device: "torch.Tensor") -> Callable[[], None]:
        """Start to copy what the device has computed up to now; the returned function waits for the copy's end."""


class SynchronousStream:
    """Copies at once: for devices without streams (MPS), and to run the staged path on the CPU."""

    def host_buffer(self, size: int, dtype: "torch.dtype") -> "torch.Tensor":
        """Return ordinary memory."""
        import torch

        return torch.empty(size, dtype=dtype)

    def copy(self, host: "torch.Tensor", device: "torch.Tensor") -> Callable[[], None]:
        """Copy now; nothing is left to wait for."""
        host.copy_(device)
        return lambda: None


class CudaStream:
    """Copies to pinned memory on its own CUDA stream."""

    def __init__(self, device: "torch.device") -> None:
        import torch

        self._device, self._stream = device, torch.cuda.Stream(device)

    def host_buffer(self, size: int, dtype: "torch.dtype") -> "torch.Tensor":
        """Return pinned memory, without which a copy would not run beside the computation."""
        import torch

        return torch.empty(size, dtype=dtype, pin_memory=True)

    def copy(self, host: "torch.Tensor", device: "torch.Tensor") -> Callable[[], None]:
        """Enqueue the copy behind the work that is enqueued now on the computing stream."""
        import torch

        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        wait: Callable[[], None] = done.synchronize
        return wait


@dataclass(slots=True)
class _Slot:
    """One of the two buffers that take turns."""

    device: "torch.Tensor"
    host: "torch.Tensor"
    wait: Callable[[], None] | None = None
    """Waits for the copy under way; None when the host buffer holds nothing."""
    batch: Batch | None = None


class StagingBuffers:
    """The buffers and the stream of a device, kept from unit to unit; they grow to the largest batch."""

    def __init__(self, device: "torch.device", stream: CopyStream) -> None:
        self.device, self.stream = device, stream
        self.slots = list[_Slot]()

    def reserve(self, size: int, dtype: "torch.dtype") -> None:
        """Have two empty buffers of at least `size` values."""
        import torch

        if self.slots and self.slots[0].device.dtype == dtype and len(self.slots[0].device) >= size:
            for slot in self.slots:
                # A unit that was given up may have left a copy under way.
                if slot.wait:
                    slot.wait()
                slot.wait = slot.batch = None
            return
        for slot in self.slots:
            if slot.wait:
                slot.wait()
        self.slots.clear()
        self.slots += [
            _Slot(torch.empty(size, dtype=dtype, device=self.device), self.stream.host_buffer(size, dtype))
            for _ in range(2)
        ]


class StagedSink:
    """Packs a batch's rows on the device and brings them over in one copy, for models that are not on the CPU.

    The order of things for batch k: `begin` waits for the copy of batch k - 2 (long done) only if it was not spread yet; the
    hooks enqueue packing behind the model's own kernels; `end` enqueues the copy and then spreads batch k - 1, whose copy
    ran while batch k was being enqueued. The host waits for nothing that the device has not been given long before.
    """

    def __init__(
        self, out: Out, stored_dtype: str, overflow: OverflowCount, buffers: StagingBuffers, max_rows: int
    ) -> None:
        self._out = {name: as_tensor(array, stored_dtype) for name, array in out.items()}
        self._overflow, self._buffers = overflow, buffers
        self._width = sum(array.shape[1] for array in out.values())
        self._dtype = torch_dtype(stored_dtype)
        buffers.reserve(max_rows * self._width, self._dtype)
        self._n_batches = 0

    def begin(self, batch: Batch) -> None:
        """Expect the activations of `batch`, in the buffer whose turn it is."""
        import torch

        self._slot = self._buffers.slots[self._n_batches % 2]
        self._spread(self._slot)
        self._slot.batch = batch
        self._places = None
        if batch.places is not None:
            self._places = torch.from_numpy(batch.places).to(self._buffers.device, non_blocking=True)
        # Each hook point has its own range of the buffer, whatever order the hooks fire in.
        starts = np.cumsum([0, *(len(batch.rows) * out.shape[1] for out in self._out.values())])
        self._ranges = {name: (int(starts[i]), int(starts[i + 1])) for i, name in enumerate(self._out)}

    def put(self, name: str, activations: "torch.Tensor") -> None:
        """Convert one hook point's rows into its range of the device buffer."""
        assert self._slot.batch is not None  # set by begin()
        start, stop = self._ranges[name]
        packed = self._slot.device[start:stop].view(-1, self._out[name].shape[1])
        picked = rows_of(activations.to(self._buffers.device), self._slot.batch, self._places)
        packed.copy_(picked)
        self._overflow.add(name, picked, packed)

    def end(self) -> None:
        """Start this batch's copy, then spread the batch before it."""
        assert self._slot.batch is not None  # set by begin()
        used = len(self._slot.batch.rows) * self._width
        self._slot.wait = self._buffers.stream.copy(self._slot.host[:used], self._slot.device[:used])
        self._n_batches += 1
        self._spread(self._buffers.slots[self._n_batches % 2])

    def finish(self) -> None:
        """Spread the last batch and raise if values overflowed."""
        for slot in self._buffers.slots:
            self._spread(slot)
        self._overflow.check()

    def _spread(self, slot: _Slot) -> None:
        """Wait for a buffer's copy and write its rows into the arrays; then it is empty."""
        import torch

        if slot.wait is None or slot.batch is None:
            return
        slot.wait()
        rows, start = torch.from_numpy(slot.batch.rows), 0
        for out in self._out.values():
            stop = start + len(rows) * out.shape[1]
            packed = slot.host[start:stop].view(-1, out.shape[1])
            if span := slot.batch.span:
                out[span[0] : span[1]].copy_(packed)
            else:
                out.index_copy_(0, rows, packed)
            start = stop
        slot.wait = slot.batch = None
