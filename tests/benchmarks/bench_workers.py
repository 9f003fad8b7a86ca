"""How well do two workers on two cores compare with one on one core?

Each side is a process of its own with its Ray and its cores: one core and one worker, or two cores and two workers. The figure
is tokens/s of two over twice the tokens/s of one; times run from the first unit's start to the last commit, models loaded.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 3
N_TOKENS = 160_000


def child(folder: str, name: str, workers: int) -> None:
    """Ingest with as many cores as workers and print the tokens per second."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    import ray

    import actstore
    from actstore.ingest import IngestConfig
    from actstore.ingest import run as run_ingest

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    config = IngestConfig(
        corpus="topics", model=f"{folder}/model", hook_points=["layers.2.resid_post"], run=name, window=128,
        batch_tokens=4096, rows_per_unit=4096, device="cpu", workers=workers, min_workers=workers,
    )  # fmt: skip
    report = run_ingest(actstore.open(f"{folder}/store"), config)
    ray.shutdown()
    print(json.dumps({"rows_per_s": report.rows_per_s}))


def tokens_per_s(folder: Path, name: str, workers: int) -> float:
    """Return the speed of one ingest in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_workers", str(folder), name, str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the ingest failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["rows_per_s"])


def run() -> list[tuple[str, float, float, str]]:
    """Return (name, median efficiency, target, note)."""
    import actstore
    from actstore.ingest import import_corpus
    from tests.benchmarks.bench_ingest import documents
    from tests.ingest import tiny_models

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        tiny_models.build("gpt2", str(folder / "model"), context=128, n_heads=4, n_layers=4, d_model=256)
        store = actstore.open(f"{folder}/store", create=True)
        import_corpus(store, "topics", documents(N_TOKENS))
        pairs = []
        for i in range(ROUNDS + 1):
            one = tokens_per_s(folder, f"one{i}", 1)
            two = tokens_per_s(folder, f"two{i}", 2)
            if i:  # the first round warms up, and tokenizes
                pairs.append((one, two))
        efficiency = statistics.median(two / (2 * one) for one, two in pairs)
        note = f"{pairs[-1][1]:,.0f} against twice {pairs[-1][0]:,.0f} tokens/s (last round)"
        return [("two Ray workers on two cores against one on one", efficiency, 0.85, note)]


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], int(sys.argv[3]))
