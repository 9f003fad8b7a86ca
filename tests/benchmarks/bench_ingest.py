"""How much of the model's own speed is left when its activations are stored?

The floor is a loop that only runs the model, as one would write it, in a process of its own: the same windows in the same
batches, layers after the last hooked one taken off, nothing captured and nothing written. The ratio is the whole ingest's
tokens per second (tokens read, forward, capture, statistics, checksums, durable writes, commits) over that loop's. Workers on
the CPU have the allocator keep freed memory (`actstore.ingest.host_memory`); a loop can do that too, and the note gives the
ratio to one that does.
"""

import itertools
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import actstore
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.batches import plan_batches
from actstore.ingest.host_memory import keep_freed_memory
from actstore.ingest.unit import window_starts
from tests.ingest import tiny_models

ROUNDS = 3
BATCH_TOKENS = 4096

SMALL, LARGE = {"n_layers": 4, "d_model": 256}, {"n_layers": 12, "d_model": 768}

CASES = (
    ("ingest, 4 layers x 256, 1 hook point", SMALL, ["layers.2.resid_post"], 3, 160_000, 4096),
    ("ingest, 4 layers x 256, 4 hook points", SMALL, ["layers.*.resid_post"], 4, 160_000, 4096),
    ("ingest, 12 layers x 768, 1 hook point", LARGE, ["layers.8.resid_post"], 9, 16_000, 2048),
    ("ingest, 12 layers x 768, 4 hook points", LARGE, ["layers.{2,5,8,11}.resid_post"], 12, 16_000, 2048),
)
"""Name, model, hook points, layers that the floor runs, tokens, rows per unit."""

MEMORY_TOKENS = (40_000, 320_000)


def floor_s(url: str, run: str, folder: str, n_layers: int, *, keep_memory: bool = False) -> float:
    """Return the seconds of the forward passes alone, measured in another process."""
    arguments = ["--floor", url, run, folder, str(n_layers), str(int(keep_memory))]
    command = [sys.executable, "-m", "tests.benchmarks.bench_ingest", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def forward_only(url: str, run: str, folder: str, n_layers: int, keep_memory: bool) -> float:
    """Run the model over a run's windows and return the seconds that took."""
    import torch
    from transformers import AutoModel

    if keep_memory:
        keep_freed_memory()
    tokenization = actstore.open(url).run(run).tokenization
    model = AutoModel.from_pretrained(folder).eval()
    model.h = model.h[:n_layers]
    units = []
    for unit in tokenization.units:
        table = tokenization.unit_table(unit.unit)
        ids = table["token_id"].to_numpy().astype(np.int64)
        units.append((ids, window_starts(table["doc_id"].to_numpy(), table["window"].to_numpy())))

    def forward(ids: Any, starts: Any) -> None:
        lengths = np.diff(starts)
        for batch in plan_batches(lengths, BATCH_TOKENS):
            longest = int(lengths[batch].max())
            padded = np.zeros((len(batch), longest), np.int64)
            mask = np.zeros((len(batch), longest), np.int64)
            for i, w in enumerate(batch):
                padded[i, : lengths[w]] = ids[starts[w] : starts[w + 1]]
                mask[i, : lengths[w]] = 1
            attention = None if mask.all() else torch.from_numpy(mask)
            model(input_ids=torch.from_numpy(padded), attention_mask=attention, use_cache=False)

    with torch.inference_mode():
        forward(*units[0])  # warms up, as the self-test of an ingest does
        started = time.perf_counter()
        for ids, starts in units:
            forward(ids, starts)
    return time.perf_counter() - started


def documents(n_tokens: int) -> Iterator[dict[str, str]]:
    """Python's own help texts, over and over, until there are about `n_tokens` tokens of 2.5 characters."""
    left = n_tokens * 2.5
    for text in itertools.cycle(pydoc_data.topics.topics.values()):
        if left <= 0:
            return
        left -= len(text)
        yield {"text": text}


def run() -> list[tuple[str, float, float, str]]:
    """Return (name, median ratio, target, note) of each case."""
    rows = []
    for name, shape, hook_points, n_layers, n_tokens, rows_per_unit in CASES:
        with tempfile.TemporaryDirectory() as tmp:
            folder = str(Path(tmp) / "model")
            tiny_models.build("gpt2", folder, context=128, n_heads=4, **shape)
            store = actstore.open(f"{tmp}/store", create=True)
            import_corpus(store, "topics", documents(n_tokens))
            ratios, kept_ratios, speeds = [], [], []
            for i in range(ROUNDS + 1):
                config = IngestConfig(
                    corpus="topics", model=folder, hook_points=hook_points, run=f"r{i}", batch_tokens=BATCH_TOKENS,
                    device="cpu", ray_address=None, window=128, rows_per_unit=rows_per_unit,
                )  # fmt: skip
                report = run_ingest(store, config)
                if i:  # the first round warms up
                    ratios.append(floor_s(store.url, f"r{i}", folder, n_layers) / report.elapsed_s)
                    kept_s = floor_s(store.url, f"r{i}", folder, n_layers, keep_memory=True)
                    kept_ratios.append(kept_s / report.elapsed_s)
                    speeds.append(report.rows_per_s)
            kept = statistics.median(kept_ratios)
            note = (
                f"{statistics.median(speeds):,.0f} tokens/s; {kept:.2f} of a loop that keeps freed memory too"
            )
            rows.append((name, statistics.median(ratios), 0.95, note))
    return rows


def peak_memory() -> list[tuple[int, int]]:
    """Return (tokens, peak MiB of the process) of ingests that differ in nothing but the corpus's size."""
    peaks = []
    for n_tokens in MEMORY_TOKENS:
        with tempfile.TemporaryDirectory() as tmp:
            command = [sys.executable, "-m", "tests.benchmarks.bench_ingest", tmp, str(n_tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append((n_tokens, int(done.stdout.splitlines()[-1])))
    return peaks


def ingest_once(tmp: str, n_tokens: int) -> None:
    """Ingest a corpus into a new store and print the peak memory in MiB."""
    folder = str(Path(tmp) / "model")
    tiny_models.build("gpt2", folder, context=128, n_heads=4, n_layers=1, d_model=256)
    store = actstore.open(f"{tmp}/store", create=True)
    import_corpus(store, "topics", documents(n_tokens))
    config = IngestConfig(
        corpus="topics", model=folder, hook_points=["layers.*.resid_post"], run="r", batch_tokens=BATCH_TOKENS,
        device="cpu", ray_address=None, window=128, rows_per_unit=4096,
    )  # fmt: skip
    run_ingest(store, config)
    # Not ru_maxrss: a child begins with its parent's.
    peak = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    print(int(peak.split()[1]) // 1024)


if __name__ == "__main__":
    if sys.argv[1] == "--floor":
        print(forward_only(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), sys.argv[6] == "1"))
        sys.exit()
    ingest_once(sys.argv[1], int(sys.argv[2]))
