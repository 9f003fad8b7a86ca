"""How are rows read from the first to the last at the speed of the disk, in little memory?

Rows are read in *slabs*, runs of a few MiB within one unit. While the caller works on one slab, threads read and verify the
next ones. Slabs live in a ring of buffers that are reused as the caller drops them.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore.codec.buffers import BufferRing
from actstore.codec.layout import UnitRows
from actstore.codec.plan import Int64s, plan_pieces, plan_slabs
from actstore.codec.read import RowReader, wait_for

_SLAB_BYTES_LOCAL: Final = 4 << 20
"""A few of them stay in the processor's cache."""

_SLAB_BYTES_REMOTE: Final = 16 << 20
"""Two requests; with `memory_bytes` of 256 MiB 16 slabs are on their way."""

_MAX_AHEAD_LOCAL: Final = 3


def scan_slabs(
    reader: RowReader,
    *,
    batch_rows: int,
    start: int,
    stop: int,
    dtype: np.dtype[Any],
    columns: Int64s | None,
    units: frozenset[int] | None,
) -> Iterator[tuple[UnitRows, int, npt.NDArray[Any]]]:
    """Yield existing rows of `[start, stop)` in order, as runs of one unit's stored rows.

    Args:
        reader: Of the hook point.
        batch_rows: Rows of a run are at most a multiple of it, a slab's worth.
        start: First row.
        stop: End of the rows.
        dtype: float32, or the stored dtype.
        columns: Of the numbers of a row in that dtype; all of them if None.
        units: The only units to read; all of them if None.

    Yields:
        The unit, its first stored row in the run, and the run's values `[rows, width]` or `[rows, len(columns)]`.

    Raises:
        FormatError: an object is missing or damaged; rows before it have been yielded.
    """
    layout = reader.layout
    all_columns = layout.spec.d_model if dtype == np.float32 else layout.spec.stored_width
    width = all_columns if columns is None else len(columns)
    row_bytes = max(1, width * dtype.itemsize)
    target = _SLAB_BYTES_LOCAL if reader.is_local else _SLAB_BYTES_REMOTE
    slab_rows = batch_rows * max(1, target // (batch_rows * max(row_bytes, layout.spec.row_bytes)))
    affordable = max(1, reader.memory_bytes // (2 * slab_rows * row_bytes))
    ahead = min(affordable, _MAX_AHEAD_LOCAL) if reader.is_local else affordable
    ring = BufferRing(slab_rows * row_bytes, capacity=ahead + 2)
    slabs = plan_slabs(layout, start=start, stop=stop, slab_rows=slab_rows, units=units)
    waiting: deque[tuple[UnitRows, int, npt.NDArray[Any], list[Future[None]]]] = deque()
    with ThreadPoolExecutor(reader.threads) as pool:
        try:
            more = True
            while more or waiting:
                while more and len(waiting) < ahead:
                    slab = next(slabs, None)
                    if slab is None:
                        more = False
                        break
                    unit, first, end = slab
                    out = ring.take((end - first, width), dtype)
                    tasks = reader.tasks(plan_pieces(layout, unit, first, end), out, columns)
                    waiting.append((unit, first, out, [pool.submit(task) for task in tasks]))
                    del out
                if waiting:
                    unit, first, values, futures = waiting.popleft()
                    wait_for(futures)
                    del futures
                    yield unit, first, values
                    del values
        finally:
            pool.shutdown(cancel_futures=True)
