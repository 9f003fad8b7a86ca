"""How much slower is training on stored rows than the same loop on rows in memory?

Both loops take the same steps of the same method. One reads, checks, shuffles, masks and widens rows of a run (bfloat16, a
local disk, page cache warm); the other has them as float32 tensors, ready. They take turns, a few steps at a time. The note
gives the time of a step and what share of it the encoder's own matrix product is: the rest of a step is choosing, decoding,
gradients and Adam.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import actstore
from actstore.ingest import import_run
from actstore.ingest.training.config import SaeTrainConfig
from actstore.ingest.training.hook_training import HookTraining
from actstore.ingest.training.masks import TokenMask, norm_limit
from actstore.ingest.training.methods import MethodSetup
from actstore.ingest.training.rows import RowStream

HOOK = "layers.0.resid_post"
D_MODEL, N_ROWS, DOC_ROWS = 768, 49_152, 256
SIZES = ((16_384, 32, 2048), (2048, 16, 2048))
"""Latents, k, rows of a batch. The smaller dictionary leaves the reader less time."""
ROUNDS, STEPS = 5, 4


def run(
    *,
    sizes: tuple[tuple[int, int, int], ...] = SIZES,
    method: str = "topk",
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> Iterator[tuple[str, float, str, str]]:
    """Yield name, ratio of steps per second, steps per second, and what it was measured against."""
    with tempfile.TemporaryDirectory() as folder:
        stored = make_run(Path(folder))
        for n_latents, k, batch_rows in sizes:
            config = SaeTrainConfig(
                name="bench", method=method, n_latents=n_latents, k=k, batch_rows=batch_rows
            ).check()
            yield compare(stored, config, rounds=rounds, steps=steps)


def make_run(folder: Path) -> Any:
    """Return a run of random rows, kept as bfloat16."""
    from safetensors.torch import save_file

    (folder / "arrays").mkdir()
    rows = torch.randn(N_ROWS, D_MODEL, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"rows": rows}, folder / "arrays" / "rows.safetensors")
    doc_ids, at = np.divmod(np.arange(N_ROWS), DOC_ROWS)
    tokens = pa.table({"doc_id": doc_ids, "token_id": (at % 100).astype(np.int32)})
    store = str(folder / "store")
    import_run(
        store, "run", str(folder / "arrays"), hook_points={"rows": HOOK}, tokens=tokens, special_ids=[0]
    )
    return actstore.open(store).run("run")


def compare(stored: Any, config: SaeTrainConfig, *, rounds: int, steps: int) -> tuple[str, float, str, str]:
    """Return the line of one size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    setup = MethodSetup(config, D_MODEL, 10_000, 10_000_000, device, dtype)
    limit = norm_limit(stored, HOOK, sinks=True)
    ours, theirs = (HookTraining(HOOK, "bench", setup, norm_limit=limit) for _ in range(2))
    mask = TokenMask(stored, special=True, sinks=True, held_out=np.empty(0, np.int64))
    stream = RowStream(
        [stored.activations(HOOK)],
        mask,
        batch_rows=config.batch_rows,
        buffer_rows=16_384,
        seed=0,
        pin=device.type == "cuda",
    )
    with stream.reading() as batches:
        kept = [batch.values[HOOK].float().to(device) for batch in itertools.islice(batches, 8)]
        for side in (ours, theirs):
            side.initialise(kept[:2])
        in_memory = itertools.cycle(kept)
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds + 1):
            for side in sorted((0, 1), key=lambda side: (side + number) % 2):
                begin = time.perf_counter()
                for _ in range(steps):
                    if side == 0:
                        batch = next(batches)
                        ours.step(batch.values[HOOK], n_read=batch.n_read, step=1, rate=1.0, progress=0.5)
                    else:
                        rows = next(in_memory)
                        theirs.method.step(rows * theirs.scale, rate=1.0, progress=0.5)
                _wait(device)
                if number:
                    times[side].append((time.perf_counter() - begin) / steps)
    product = _product_time(kept[0], config.n_latents, dtype, rounds)
    mine, other = (statistics.median(side) for side in times)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    note = (
        f"{mine * 1e3:.0f} against {other * 1e3:.0f} ms a step of {config.batch_rows:,} rows on tensors in memory; the "
        f"encoder's product alone takes {product * 1e3:.0f} ms"
    )
    name = f"SAE training, {config.method}, {D_MODEL} x {config.n_latents:,}, k {config.k}, {device.type}"
    return name, ratio, f"{1 / mine:.2f} steps/s", note


def _product_time(rows: torch.Tensor, n_latents: int, dtype: torch.dtype, rounds: int) -> float:
    encoder = torch.randn(n_latents, rows.shape[1], device=rows.device, dtype=dtype)
    rows = rows.to(dtype)
    found = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        rows @ encoder.T
        _wait(rows.device)
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    for name, ratio, absolute, note in run():
        print(f"{name}: {ratio:.2f}x  {absolute}; {note}", flush=True)
