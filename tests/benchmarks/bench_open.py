"""How long does it take to open a store with a long history, and to ask whether anything is new?

A store of one collection and one unit per version is built in memory, the way a committer builds it, checkpoints included,
and copied to a local folder; what is timed is a process that opens the folder and knows nothing.
"""

import hashlib
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actstore.log import CommitLog, fingerprint
from actstore.log.checkpoint import CHECKPOINTS
from actstore.log.values import Add, Create, StoredObject
from actstore.storage.base import Storage
from actstore.storage.local import LocalStorage
from actstore.storage.memory import MemoryStorage

VERSIONS = (10, 1_000, 100_000)
CONFIG = {"model": {"sha256": "0" * 64}, "dtype": "float16", "rows_per_unit": 65_536}


def build(storage: Storage, n_versions: int) -> None:
    """Commit one collection and `n_versions` units of two objects, one unit a version."""
    # At 100,000 units checkpoints are 2,500 versions apart by their size; fewer of them at the start fill less memory.
    log = CommitLog(storage, checkpoint_every=max(64, n_versions // 40))
    log.create()
    log.commit([Create("run", "bench", CONFIG, {})], txn=uuid.uuid4().hex)
    for unit in range(n_versions):
        objects = []
        for key in (f"runs/bench/layers.3.resid_post/c/{unit}/0", f"runs/bench/stats/{unit:08}.parquet"):
            storage.put_new(key, [b"x"])
            objects.append(StoredObject(key, 1, hashlib.sha256(key.encode()).hexdigest()))
        add = Add(
            "run",
            "bench",
            0,
            fingerprint(CONFIG),
            unit,
            65_536,
            0,
            uuid.uuid4().hex,
            tuple(objects),
            {"m": 1},
        )
        log.commit([add], txn=uuid.uuid4().hex)


def copy_log(source: Storage, folder: Path) -> None:
    """Copy the version log, without its data, into a folder."""
    for key in [*source.list("manifests/"), *source.list("checkpoints/"), "_hint"]:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.get(key) or b"")


def median_s(call: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of `call`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run(versions: tuple[int, ...] = VERSIONS) -> list[tuple[str, float, str, str]]:
    """Return rows of (name, value, unit, note)."""
    rows: list[tuple[str, float, str, str]] = []
    for n in versions:
        memory = MemoryStorage(f"bench-open-{n}")
        start = time.perf_counter()
        build(memory, n)
        per_commit_us = (time.perf_counter() - start) / n * 1e6
        with tempfile.TemporaryDirectory() as folder:
            copy_log(memory, Path(folder))
            storage = LocalStorage(folder)
            state = CommitLog(storage).latest()
            if state.n_units != n:
                raise RuntimeError(f"built {n} units, found {state.n_units}")
            log = CommitLog(storage)
            log.latest()
            checkpoints = [storage.head(key) or 0 for key in storage.list(CHECKPOINTS)]
            note = f"newest checkpoint {max([0, *checkpoints]) / 1e6:.1f} MB"
            rows += [
                (f"open, {n} versions", median_s(lambda s=storage: CommitLog(s).latest(), 5), "s", note),
                (f"nothing new, {n} versions", median_s(log.latest, 50) * 1e6, "us", "one read"),
                (f"state half way, {n} versions", median_s(lambda lg=log, v=n // 2: lg.at(v), 3), "s", ""),
                (f"commit, {n} versions", per_commit_us, "us", "in memory, mean, checkpoints included"),
            ]
    return rows


if __name__ == "__main__":
    for name, value, unit, note in run():
        print(f"{name:32} {value:12.4f} {unit:3} {note}")
