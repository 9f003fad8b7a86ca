"""What do a unit's statistics cost? Against the mean and variance in float64 that numpy alone would give.

Both sides run on the calling thread and take the same stored rows, which are cold: a unit is larger than the caches. Every round
runs both, in turning order, and gives one ratio; the median is reported. Less than 1 is faster than numpy. Seconds are of the
processor, because a machine that does something else would not change them much.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from actstore.codec.spec import plan_spec
from actstore.dtypes import to_float32, to_stored
from actstore.ingest.unit_stats import unit_covariance, unit_stats

ROWS = 65_536
WINDOW = 128
NUMPY_ROWS = 4096
"""Rows that numpy widens at a time."""


def run(*, rounds: int = 9) -> Iterator[tuple[str, float, float, str]]:
    """Yield name, ratio of the two times, microseconds per row, and what it was measured against."""
    for d_model, dtype in ((256, "float32"), (256, "bfloat16"), (768, "float32"), (768, "bfloat16")):
        yield compare(d_model, dtype, rounds=rounds)
    yield covariance(768, "bfloat16")


def compare(d_model: int, dtype: str, *, rounds: int) -> tuple[str, float, float, str]:
    """Return the line of one width and dtype."""
    spec = plan_spec(rows_per_unit=ROWS, d_model=d_model, dtype=dtype, codec="hot")
    rows, tokens = make_rows(d_model, dtype), make_tokens()

    def ours() -> None:
        unit_stats("layers.0.resid_post", spec, rows, tokens)

    def theirs() -> None:
        for start in range(0, ROWS, NUMPY_ROWS):
            wide = to_float32(rows[start : start + NUMPY_ROWS], dtype).astype(np.float64)
            wide.mean(axis=0)
            wide.var(axis=0)

    sides, times = (ours, theirs), ([], [])
    for number in range(rounds + 1):
        for side in sorted((0, 1), key=lambda side: (side + number) % 2):
            seconds = seconds_of(sides[side])
            if number:
                times[side].append(seconds)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    per_row, numpy_per_row = (statistics.median(side) / ROWS * 1e6 for side in times)
    note = f"{per_row:.3f} against {numpy_per_row:.3f} us/row of mean and variance with numpy in float64"
    return f"statistics, {d_model} x {dtype}", ratio, per_row, note


def covariance(d_model: int, dtype: str) -> tuple[str, float, float, str]:
    """Return what the optional covariance costs, against one product of that size."""
    spec = plan_spec(rows_per_unit=ROWS, d_model=d_model, dtype=dtype, codec="hot")
    rows = make_rows(d_model, dtype)
    wide = to_float32(rows[:NUMPY_ROWS], dtype).astype(np.float64)
    ours = seconds_of(lambda: unit_covariance(spec, rows)) / ROWS * 1e6
    theirs = seconds_of(lambda: np.matmul(wide[:, ::-1].T.copy(), wide)) / NUMPY_ROWS * 1e6
    note = f"{ours:.1f} against {theirs:.1f} us/row of a float64 product X'Y with numpy"
    return f"covariance, {d_model} x {dtype}", ours / theirs, ours, note


def make_rows(d_model: int, dtype: str) -> np.ndarray:
    """Return rows like a residual stream's: a few large dimensions, massive in the first row of every window."""
    rng = np.random.default_rng(0)
    acts = rng.normal(size=(ROWS, d_model)).astype(np.float32)
    acts[:, : d_model // 100] *= 30
    acts[::WINDOW, : d_model // 100] *= 20
    return to_stored(acts, dtype)


def make_tokens() -> pa.Table:
    """Return what the rows stand for."""
    rows = np.arange(ROWS)
    return pa.table(
        {
            "row": rows,
            "token_id": (rows * 7919 % 50_257).astype(np.int32),
            "window_position": (rows % WINDOW).astype(np.int32),
        }
    )


def seconds_of(work: Callable[[], object]) -> float:
    """Return the processor seconds that a call takes on this thread."""
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


if __name__ == "__main__":
    for name, ratio, per_row, note in run():
        print(f"{name:32} {ratio:.2f}x  {per_row:7.3f} us/row  {note}")
