"""How many units a minute do one scheduler and one committer keep up with, and what do they hold for it?

Two hundred workers are made up: each takes two units at a time and "computes" for a fixed time, here none at all for the
limit. Scheduler, committer, commit log and disk are the real ones; units promise the objects of four hook points, sums
and statistics, which are not made: a look at one answers what it should.
"""

import hashlib
import heapq
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import uuid
from collections.abc import Sequence
from pathlib import Path

from actstore.codec.spec import plan_spec
from actstore.ingest.committer import KIND, Committer, take_over
from actstore.ingest.events import JobEvents
from actstore.ingest.flow import Completion
from actstore.ingest.scheduler import Limits, Scheduler
from actstore.ingest.unit import RunPlan, WrittenUnit
from actstore.log import CommitLog
from actstore.log.values import Create, StoredObject
from actstore.names import hook_point_folder
from actstore.objects import ObjectReader
from actstore.storage.local import LocalStorage

HOOK_POINTS = [f"layers.{i}.resid_post" for i in (4, 8, 12, 16)]
D_MODEL, ROWS = 768, 65_536
LENGTHS = {"bin": 5, "parquet": 7}
WORKERS = 200
TARGET_PER_MINUTE = 2_000
SIZES = (1_000, 20_000)


def object_keys(run: str, unit: int) -> list[str]:
    """Return the keys of what a unit stores."""
    shards = [f"runs/{run}/{hook_point_folder(name)}/c/{unit}/0" for name in HOOK_POINTS]
    small = [
        f"runs/{run}/{kind}/{unit:08}-{uuid.uuid4().hex}.{end}"
        for kind, end in (("sums", "bin"), ("stats", "parquet"))
    ]
    return [*shards, *small]


def written(run: str, unit: int) -> WrittenUnit:
    """Return what a worker would report."""
    objects = tuple(
        StoredObject(key, LENGTHS.get(key.rsplit(".", 1)[-1], 9), hashlib.sha256(key.encode()).hexdigest())
        for key in object_keys(run, unit)
    )
    sums = {name: {"start": 0, "count": 1024, "crc": 123456789} for name in HOOK_POINTS}
    meta = {"nonfinite": dict.fromkeys(HOOK_POINTS, 0), "sums": sums}
    timings = {"read": 0.1, "forward": 2.0, "statistics": 0.5, "encode": 0.5, "write": 1.0}
    return WrittenUnit(unit, ROWS, 0, uuid.uuid4().hex, objects, meta, 400 << 20, ROWS, ROWS, timings)


class MadeUpWorkers:
    """Two hundred workers that sleep; no threads, a heap of when what ends."""

    n_workers = WORKERS
    capacity = 2 * WORKERS

    def __init__(self, run: str, seconds: float) -> None:
        self._run, self._seconds = run, seconds
        self._free_s = [(0.0, i) for i in range(WORKERS)]
        self._ends: list[tuple[float, int]] = []
        self.most_in_flight = 0

    def submit(self, unit: int) -> None:
        """Give the unit to the worker that is free first."""
        free_s, worker = heapq.heappop(self._free_s)
        end_s = max(free_s, time.monotonic()) + self._seconds
        heapq.heappush(self._free_s, (end_s, worker))
        heapq.heappush(self._ends, (end_s, unit))
        self.most_in_flight = max(self.most_in_flight, len(self._ends))

    def submit_copy(self, unit: int) -> bool:
        """Never."""
        return False

    def wait(self, timeout_s: float) -> Sequence[Completion]:
        """Return the units whose time has come."""
        if self._ends:
            time.sleep(max(0.0, min(timeout_s, self._ends[0][0] - time.monotonic())))
        done = []
        while self._ends and self._ends[0][0] <= time.monotonic():
            unit = heapq.heappop(self._ends)[1]
            done.append(Completion(unit, written=written(self._run, unit)))
        return done

    def abandon(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing runs."""


class PromisedObjects(LocalStorage):
    """A local disk on which every object that a unit promises is there: 120,000 files would only be made for their names."""

    def head(self, key: str) -> int | None:
        """Return the length of a promised object, or look."""
        return LENGTHS.get(key.rsplit(".", 1)[-1], 9) if key.startswith("runs/bench/") else super().head(key)


def make_log(folder: str) -> tuple[CommitLog, RunPlan]:
    """Make the log of a store with a run to be filled."""
    log = CommitLog(PromisedObjects(Path(folder)))
    log.create()
    spec = plan_spec(rows_per_unit=ROWS, d_model=D_MODEL, dtype="bfloat16", codec="hot")
    config = {"hook_points": [{"name": n, "d_model": D_MODEL} for n in HOOK_POINTS], "rows_per_unit": ROWS}
    log.commit([Create(KIND, "bench", config, {})], txn=uuid.uuid4().hex)
    fingerprint = log.latest().collection(KIND, "bench").fingerprint
    specs = dict.fromkeys(HOOK_POINTS, spec)
    return log, RunPlan("bench", fingerprint, take_over(log, "bench"), "t", specs, ROWS, "error")


def committer(log: CommitLog, plan: RunPlan) -> Committer:
    """Return a committer of that run."""
    return Committer(log, ObjectReader(log.storage, cache_dir=None, cache_bytes=0), plan)


def run_job(pool: MadeUpWorkers, commit, n_units: int) -> tuple[float, JobEvents]:
    """Run all units; return the seconds and the numbers."""
    events = JobEvents("bench")
    scheduler = Scheduler(
        pool, commit, rows_of=lambda unit: ROWS, limits=Limits(), stop=threading.Event(),
        on_commit=lambda batch, counters: None, events=events,
    )  # fmt: skip
    began = time.perf_counter()
    counters = scheduler.run(range(n_units)).counters
    assert counters.committed == n_units
    return time.perf_counter() - began, events


def measure(n_units: int) -> dict[str, float]:
    """Commit so many units with workers that need no time; figures of this process."""
    with tempfile.TemporaryDirectory() as folder:
        log, plan = make_log(folder)
        before = rss_bytes()
        spent, events = run_job(MadeUpWorkers("bench", 0.0), committer(log, plan).commit, n_units)
        sizes = [p.stat().st_size for p in Path(folder, "manifests").iterdir()]
        return {
            "per_minute": n_units / spent * 60,
            "grown_bytes": rss_bytes() - before,
            "commit_s": events.collector.value("commit_seconds") / len(sizes),
            "manifests": len(sizes),
            "manifest_bytes": statistics.median(sizes),
            "log_bytes_per_unit": sum(sizes) / n_units,
        }


def rss_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def scheduler_peak_bytes(n_units: int) -> int:
    """Return the most that a scheduler holds by itself: its commits go nowhere."""
    tracemalloc.start()
    run_job(MadeUpWorkers("bench", 0.0), lambda batch: None, n_units)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def paced(rounds: int = 3) -> tuple[float, float]:
    """Run at the target rate; return units a minute and the seconds that the last commit came after the last unit."""
    n_units = rounds * WORKERS
    per_unit_s = WORKERS * 60 / TARGET_PER_MINUTE
    with tempfile.TemporaryDirectory() as folder:
        log, plan = make_log(folder)
        pool = MadeUpWorkers("bench", per_unit_s)
        spent, _ = run_job(pool, committer(log, plan).commit, n_units)
    return n_units / spent * 60, spent - rounds * per_unit_s


def run(sizes: tuple[int, ...] = SIZES) -> list[tuple[str, float, str, str]]:
    """Return rows of (name, value, unit, note)."""
    rows: list[tuple[str, float, str, str]] = []
    for n in sizes:
        # A process of its own for each: memory that one has returned to the allocator would hide the next one's.
        code = f"from tests.benchmarks.bench_committer import *; print(measure({n}))"
        found = eval(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        )
        note = f"{WORKERS} workers that need no time; {found['manifests']} commits, {found['commit_s'] * 1e3:.0f} ms each"
        rows.append(
            (
                f"units committed, of {n:,}",
                found["per_minute"],
                "a minute",
                f"{note}; target {TARGET_PER_MINUTE:,}",
            )
        )
        size = f"{found['log_bytes_per_unit']:.0f} bytes of log a unit"
        rows.append(
            (f"manifest, {n:,} units", found["manifest_bytes"] / 1e3, "kB", f"median of 64 units; {size}")
        )
        rows.append(
            (
                f"driver with committer grew by, {n:,} units",
                found["grown_bytes"] / 1e6,
                "MB",
                "the state lists every object",
            )
        )
        peak = scheduler_peak_bytes(n)
        rows.append((f"scheduler alone, {n:,} units", peak / 1e6, "MB", "peak by tracemalloc: must not grow"))
    rate, lag = paced()
    rows.append(
        ("units at the target rate", rate, "a minute", f"the last commit {lag:.1f} s after the last unit")
    )
    return rows


if __name__ == "__main__":
    for row in run():
        print(*row, sep=" | ")
