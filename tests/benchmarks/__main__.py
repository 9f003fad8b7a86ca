"""Run the benchmarks and print them as the table of the README: `python -m tests.benchmarks [PART ...]`, see `PARTS`.

Every figure is a ratio to a floor measured in the same run, or a time; medians, because machines are shared and noisy.
"""

import sys
from collections.abc import Callable, Iterator

from tests.benchmarks import (
    bench_capture,
    bench_codes,
    bench_committer,
    bench_contexts,
    bench_encode,
    bench_ingest,
    bench_latents,
    bench_open,
    bench_postings,
    bench_stats,
    bench_storage,
    bench_train,
    bench_workers,
)

Row = tuple[str, str, str]
"""What was measured, the figure, and what it is measured against."""


def storage() -> Iterator[Row]:
    """Shards: writing, scanning, scattered rows."""
    for row in bench_storage.bench_storage():
        yield row.name, f"{row.ratio:.2f}x", f"{row.absolute}; {row.note}"


def opening() -> Iterator[Row]:
    """Opening a store with a long history."""
    for name, value, unit, note in bench_open.run():
        yield name, f"{value:.3g} {unit}", note


def capture() -> Iterator[Row]:
    """The capture alone against a loop that only computes."""
    for name, ratio, absolute, note in bench_capture.run():
        yield f"capture, {name}", f"{ratio:.2f}x", f"{absolute}; {note}"


def stats() -> Iterator[Row]:
    """Statistics of a unit against numpy's mean and variance; less than 1 is faster."""
    for name, ratio, _, note in bench_stats.run():
        yield name, f"{ratio:.2f}x", note


def ingest() -> Iterator[Row]:
    """The whole ingest against a loop that only computes."""
    for name, ratio, target, note in bench_ingest.run():
        yield name, f"{ratio:.2f}x", f"{note}; target {target}"
    (small, low), (large, high) = bench_ingest.peak_memory()
    yield (
        "peak memory of an ingest",
        f"{high} MiB",
        f"{large:,} tokens, one layer of 256; {low} MiB for {small:,} tokens",
    )


def workers() -> Iterator[Row]:
    """Two workers on two cores against one on one."""
    for name, ratio, target, note in bench_workers.run():
        yield name, f"{ratio:.2f}", f"{note}; target {target}"


def jobs() -> Iterator[Row]:
    """Scheduler and committer with two hundred made-up workers."""
    for name, value, unit, note in bench_committer.run():
        yield name, f"{value:.3g} {unit}", note


def codes() -> Iterator[Row]:
    """Bytes and speed of codes and postings beside a DuckDB table of the same numbers."""
    for name, value, unit, note in bench_codes.run():
        yield name, f"{value:.3g} {unit}", note


def postings() -> Iterator[Row]:
    """Building postings and the statistics of all latents."""
    for name, value, unit, note in bench_postings.run():
        yield name, f"{value:.3g} {unit}", note


def encode() -> Iterator[Row]:
    """Encoding rows in a dictionary against the bare matrix product."""
    for name, ratio, *_, note in bench_encode.run():
        yield name, f"{ratio:.2f}x", note


def train() -> Iterator[Row]:
    """Training on stored rows against the same loop on rows in memory."""
    for name, ratio, *_, note in bench_train.run():
        yield name, f"{ratio:.2f}x", note


def latents() -> Iterator[Row]:
    """Contexts of latents: times, beside DuckDB's, and requests to an object store."""
    for name, value, unit, note in (*bench_latents.run(), *bench_contexts.run()):
        yield name, f"{value:.3g} {unit}", note


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "storage": storage,
    "open": opening,
    "capture": capture,
    "stats": stats,
    "ingest": ingest,
    "workers": workers,
    "jobs": jobs,
    "codes": codes,
    "postings": postings,
    "latents": latents,
    "encode": encode,
    "train": train,
}


def main(names: list[str]) -> None:
    """Print the table, a row as soon as it is measured."""
    print("| measured | figure | against |\n|---|---|---|", flush=True)
    for name in names or list(PARTS):
        for row in PARTS[name]():
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
