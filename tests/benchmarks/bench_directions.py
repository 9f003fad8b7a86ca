"""How long does the answer to a direction take through compressed rows, against a scan of the stored ones?

    python -m tests.benchmarks.bench_directions [FOLDER [N_TOKENS]]    the store of `real_rows`, made if it is not there

500,000 x 768 rows in bfloat16. Questions: the 20 best with their contexts, each side of a pair asked in turn; the answers are
compared, too. Directions: what sets a row apart from the mean (as rare latents do), random ones, axes, a difference of two means,
a linear discriminant of the same, and an axis of little variance. Floors: reading the file of compressed bytes into a buffer from
the system's cache, summing its words where they are mapped, and FAISS's own search of the same file.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np

import actstore
from actstore.ingest.indexing import build_index
from actstore.query.code_scan import CompressedRows
from actstore.targets import Direction, Neuron
from actstore.vector_index import VectorIndex, open_indexes
from tests.benchmarks.real_rows import DEFAULT_FOLDER, N_TOKENS, RUN, H, make_run

Row = tuple[str, float, str, str]

K, ROUNDS = 20, 7


def make_directions(run: actstore.Run) -> dict[str, list[Direction | Neuron]]:
    """Return directions of every sort."""
    rng = np.random.default_rng(0)
    acts = run.activations(H)
    rows = acts.read(np.sort(rng.choice(acts.rows(), 20_000, replace=False))).astype(np.float64)
    mean, variances, axes = rows.mean(axis=0), *np.linalg.eigh(np.cov(rows.T))
    apart = rows[:1000].mean(axis=0) - rows[5000:9000].mean(axis=0)
    found = {
        "features": [rows[i] - mean for i in range(4)],
        "random directions": list(rng.standard_normal((4, rows.shape[1]))),
        "a difference of means": [apart],
        "a linear discriminant": [axes @ ((axes.T @ apart) / (variances + 1e-3 * variances.mean()))],
        "axes of little variance": [axes[:, 0], axes[:, 100]],
    }
    sorts = {
        sort: [actstore.direction(H, w, name=f"w{i}") for i, w in enumerate(ws)] for sort, ws in found.items()
    }
    return {**sorts, "neurons": [actstore.neuron(H, i) for i in (3, 300, 700)]}


def times_of(*sides: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Return the median seconds of every side, asked in turn; the first round does not count."""
    spent: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 1):
        for side, mine in zip(sides, spent, strict=True):
            start = time.perf_counter()
            side()
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine[1:]) for mine in spent]


def questions(run: actstore.Run) -> Iterator[Row]:
    """Yield how much sooner the answer is there, for every sort of direction."""
    for sort, targets in make_directions(run).items():
        ratios, ours_ms, verified = [], [], []
        for target in targets:
            found = run.examples(target, K)
            if found.table != run.examples(target, K, use_index=False).table:
                raise SystemExit(f"the answers to {target.label} differ")
            ours, scan = times_of(
                lambda t=target: run.examples(t, K),
                lambda t=target: run.examples(t, K, use_index=False),
                rounds=5,
            )
            ratios.append(scan / ours)
            ours_ms.append(ours * 1e3)
            verified.append(found.meta.index[H]["n_verified"])
        note = f"{statistics.median(ours_ms):.0f} ms; {max(verified)} rows verified at most; goal 2"
        yield f"20 examples along {sort}, against a scan", statistics.median(ratios), "x", note
    many = [
        actstore.direction(H, w, name=f"{i}")
        for i, w in enumerate(np.random.default_rng(1).standard_normal((32, run.d_model(H))))
    ]
    ours, scan = times_of(
        lambda: run.examples(many, K), lambda: run.examples(many, K, use_index=False), rounds=3
    )
    yield "the same along 32 at once, against a scan", scan / ours, "x", f"{ours * 1e3:.0f} ms for all"


def floors(index: VectorIndex) -> Iterator[Row]:
    """Yield what a scan of the compressed rows takes, against reading them."""
    shard = index.shards[0]
    path, opened = Path(shard.file()), shard.open()
    rows = CompressedRows(opened)
    bits = np.full(-(-shard.n // 8), 255, np.uint8)
    w = np.random.default_rng(2).standard_normal((1, index.d))
    w32 = w.astype(np.float32)
    words = np.memmap(path, np.uint64, "r", shape=(path.stat().st_size // 8,))
    buffer = np.empty(8 << 20, np.uint8)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    faiss.omp_set_num_threads(1)
    one, two, raw, total, its = times_of(
        lambda: rows.best(w, 672, bits=bits, threads=1),
        lambda: rows.best(w, 672, bits=bits, threads=2),
        read,
        words.sum,
        lambda: opened.search(w32, 672),
    )
    size = f"{rows.nbytes / 1e6:.0f} MB"
    yield (
        "scan of compressed rows against reading them",
        one / raw,
        "x",
        f"{one * 1e3:.0f} ms, {size}; goal 1.3",
    )
    yield "the same on two threads", two / raw, "x", f"{two * 1e3:.0f} ms"
    yield "the same against summing mapped words", one / total, "x", f"{total * 1e3:.0f} ms; one thread"
    yield "the same against FAISS's search of the file", one / its, "x", f"{its * 1e3:.0f} ms; one thread"


def run(folder: Path = DEFAULT_FOLDER, n_tokens: int = N_TOKENS) -> Iterator[Row]:
    """Yield rows of (name, value, unit, note)."""
    store = make_run(folder, n_tokens)
    start = time.perf_counter()
    report = build_index(store, RUN, H, kind="scan_sq8", rebuild=True)
    seconds = time.perf_counter() - start
    asked = store.refresh().run(RUN)
    stored = sum(s.nbytes for u in asked.activations(H).layout.units for s in u.shards)
    yield (
        "building the index",
        seconds,
        "s",
        f"{report.n_rows:,} rows, {report.nbytes / stored:.2f} of the run's bytes",
    )
    yield from questions(asked)
    yield from floors(open_indexes(asked, H, purpose="directions")[0])


if __name__ == "__main__":
    for name, value, unit, note in run(*(Path(a) for a in sys.argv[1:2]), *map(int, sys.argv[2:3])):
        print(f"{name:60} {value:8.2f} {unit:3} {note}", flush=True)
