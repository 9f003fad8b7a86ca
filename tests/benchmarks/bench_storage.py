"""How close to raw files do shards come? Ratios of medians of interleaved rounds, on this machine's disk.

Every round runs both sides on the same bytes, one after the other, and gives one ratio; the median of the ratios is reported.
More than 1 is faster than the other side.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zarr

from actstore.activations import Activations
from actstore.codec.encode import encode_shard
from actstore.codec.layout import shard_key, sums_key
from actstore.codec.metadata import zarr_json
from actstore.codec.spec import ShardSpec, plan_spec
from actstore.codec.sums import pack_sums
from actstore.log.values import Collection, Unit
from actstore.storage.local import LocalStorage
from actstore.storage.write import write_new

HOOK_POINT = "layers.0.resid_post"
ROWS_PER_UNIT = 65_536
D_MODEL = 768
N_SHARDS = 4
ATTEMPT = "b" * 32


class BenchRow(NamedTuple):
    """One line of the report."""

    name: str
    ratio: float
    """Median over rounds of our speed divided by the other's."""

    absolute: str
    """Our median and theirs."""

    note: str


def bench_storage(*, rounds: int = 7) -> list[BenchRow]:
    """Return all lines. Takes about a minute and 1 GB of disk."""
    spec = plan_spec(rows_per_unit=ROWS_PER_UNIT, d_model=D_MODEL, dtype="bfloat16", codec="hot")
    rng = np.random.default_rng(0)
    units = [
        rng.integers(0, 2**16, (ROWS_PER_UNIT, D_MODEL), dtype=np.uint16) & 0xBFFF for _ in range(N_SHARDS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        lines = [bench_write(Path(folder), spec, units, rounds=rounds)]
        activations = make_activations(Path(folder), spec, units)
        lines += bench_scan(Path(folder), activations, rounds=rounds)
        lines += bench_scattered(Path(folder), activations, spec, rounds=rounds)
    return lines


def bench_write(folder: Path, spec: ShardSpec, units: list[np.ndarray], *, rounds: int) -> BenchRow:
    """Encode, hash and durably write shards with two threads, against writing and syncing the same bytes."""

    def ours(_: int) -> None:
        write_units(LocalStorage(folder / "ours"), spec, units)

    def raw(_: int) -> None:
        (folder / "raw").mkdir()
        for unit, rows in enumerate(units):
            with open(folder / "raw" / str(unit), "wb", buffering=0) as file:
                file.write(rows)
                os.fsync(file.fileno())

    nbytes = sum(rows.nbytes for rows in units)
    times = interleaved([ours, raw], rounds=rounds, before=lambda side: remove(folder, ["ours", "raw"][side]))
    return compare(
        f"write {N_SHARDS} shards, checksums, SHA-256 and fsync",
        times,
        nbytes,
        "against write + fsync per file",
    )


def bench_scan(folder: Path, activations: Activations, *, rounds: int) -> list[BenchRow]:
    """Scan verified rows, against reading the same files with a reused buffer and into fresh memory; page cache warm."""
    paths = [folder / "store" / shard.key for unit in activations.layout.units for shard in unit.shards]
    buffer = bytearray(4 << 20)

    def stored(_: int) -> None:
        for _rows, values in activations.scan(4096, dtype="stored"):
            touch(values)

    def widened(_: int) -> None:
        for _rows, values in activations.scan(4096):
            touch(values)

    def reused(_: int) -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def fresh(_: int) -> None:
        for path in paths:
            path.read_bytes()

    nbytes = sum(path.stat().st_size for path in paths)
    times = interleaved([stored, widened, reused, fresh], rounds=rounds)
    return [
        compare(
            "verified scan, as stored",
            [times[0], times[2]],
            nbytes,
            "against readinto one 4 MiB buffer, warm cache",
        ),
        compare(
            "verified scan, as stored",
            [times[0], times[3]],
            nbytes,
            "against read() of whole files, warm cache",
        ),
        compare(
            "verified scan, widened to float32",
            [times[1], times[2]],
            nbytes,
            "against readinto one 4 MiB buffer, warm cache",
        ),
        compare(
            "verified scan, widened to float32",
            [times[1], times[3]],
            nbytes,
            "against read() of whole files, warm cache",
        ),
    ]


def bench_scattered(
    folder: Path, activations: Activations, spec: ShardSpec, *, rounds: int
) -> list[BenchRow]:
    """Read 2,000 random rows, against zarr-python on the same files; page cache warm."""
    run = folder / "store" / "runs" / "bench" / HOOK_POINT
    (run / "zarr.json").write_bytes(zarr_json(spec, n_shards=N_SHARDS, attributes={}))
    storage, collection = activations.__reduce__()[1][:2]
    array = zarr.open_array(run, mode="r")
    rows = np.random.default_rng(1).integers(0, activations.shape[0], 2000)

    def again(_: int) -> None:
        activations.read(rows, dtype="stored")

    def opened(_: int) -> None:
        Activations(storage, collection, HOOK_POINT).read(rows, dtype="stored")

    def theirs(_: int) -> None:
        array.oindex[rows]

    if not np.array_equal(activations.read(rows, dtype="stored"), array.oindex[rows]):
        raise ValueError("the two readers disagree")
    times = interleaved([again, opened, theirs], rounds=rounds)
    nbytes = len(rows) * spec.row_bytes
    return [
        compare(
            "2,000 scattered rows, verified",
            [times[0], times[2]],
            nbytes,
            "against zarr-python oindex, warm cache",
        ),
        compare(
            "2,000 scattered rows, just opened",
            [times[1], times[2]],
            nbytes,
            "sums and indexes read anew each time",
        ),
    ]


def make_activations(folder: Path, spec: ShardSpec, units: list[np.ndarray]) -> Activations:
    """Write the units as a run and return its activations."""
    storage = LocalStorage(folder / "store")
    written = write_units(storage, spec, units)
    config = {
        "hook_points": [{"name": HOOK_POINT, "d_model": spec.d_model}],
        "dtype": spec.dtype,
        "codec": spec.codec,
        "rows_per_unit": ROWS_PER_UNIT,
        "rows_per_shard": {HOOK_POINT: spec.rows_per_shard},
        "rows_per_chunk": {HOOK_POINT: spec.rows_per_chunk},
    }
    collection = Collection(
        "run",
        "bench",
        config,
        "f" * 64,
        {},
        1,
        units={unit.unit: unit for unit in written},
        rows=len(units) * ROWS_PER_UNIT,
    )
    return Activations(storage, collection, HOOK_POINT)


def write_units(storage: LocalStorage, spec: ShardSpec, units: list[np.ndarray]) -> list[Unit]:
    """Write units as ingest does: two threads, each encoding, hashing and writing a unit of its own."""

    def write_unit(unit: int) -> Unit:
        shard = encode_shard(spec, units[unit])
        stored = write_new(storage, shard_key("bench", HOOK_POINT, unit), shard.buffers)
        key = sums_key("bench", unit, ATTEMPT)
        data, meta = pack_sums(key, {HOOK_POINT: shard.sums})
        sums = write_new(storage, key, [data])
        return Unit(unit, len(units[unit]), 0, ATTEMPT, (stored, sums), {"sums": meta}, 1)

    Path(storage.url).mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(write_unit, range(len(units))))


def interleaved(
    sides: list[Callable[[int], None]], *, rounds: int, before: Callable[[int], None] | None = None
) -> list[list[float]]:
    """Return seconds `[side][round]`, every side once per round in turning order, after one round to warm up.

    `before` runs untimed before each side. It removes what the side wrote in the last round: the system then has as many
    pages and blocks at hand for either side, which on a virtual machine changes a write's time five-fold.
    """
    times: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for side in sorted(range(len(sides)), key=lambda side: (side + number) % len(sides)):
            if before:
                before(side)
            begin = time.perf_counter()
            sides[side](number)
            if number:
                times[side].append(time.perf_counter() - begin)
    return times


def compare(name: str, times: list[list[float]], nbytes: int, note: str) -> BenchRow:
    """Return the line that compares the first side with the second."""
    ratio = statistics.median(theirs / ours for ours, theirs in zip(*times, strict=True))
    ours, theirs = (statistics.median(side) for side in times)
    absolute = f"{nbytes / ours / 1e9:.2f} against {nbytes / theirs / 1e9:.2f} GB/s ({ours * 1e3:.1f}, {theirs * 1e3:.1f} ms)"
    return BenchRow(name, ratio, absolute, note)


def touch(values: np.ndarray) -> None:
    """Look at a batch, as a caller would at least."""
    values[0, 0].item()


def remove(folder: Path, name: str) -> None:
    """Delete a folder if it is there, outside of the timed part."""
    if (folder / name).exists():
        shutil.rmtree(folder / name)


if __name__ == "__main__":
    for line in bench_storage():
        print(f"{line.name:45} {line.ratio:6.2f}x  {line.absolute:45} {line.note}")
