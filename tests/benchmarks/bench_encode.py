"""How near does encoding come to the one matrix product that it needs? `x @ W_enc` by torch alone, into memory that is there.

Both sides run in turn on the same threads, rows in batches of the same size; the median of their ratios is reported: 1 is as fast
as the bare product. The size is that of GPT-2 small's dictionaries.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from actstore.ingest.dictionaries import Encoder, make_dictionary

D_IN, N_LATENTS, K, ROWS = 768, 16_384, 32, 2048
FIRING = 2.9
"""Threshold, in standard deviations of a pre-activation, above which as many latents fire as top-k has."""

Line = tuple[str, float, str, str]


def run(*, rounds: int = 9, threads: int = 2, device: str = "cpu") -> Iterator[Line]:
    """Yield for each activation: name, ratio, rows per second, and what it was measured against."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rng = np.random.default_rng(0)
        encoder = rng.normal(size=(D_IN, N_LATENTS)).astype(np.float32) / np.float32(D_IN**0.5)
        rows = torch.from_numpy(rng.normal(size=(ROWS, D_IN)).astype(np.float32)).to(device)
        for activation in ("topk", "batchtopk", "jumprelu", "gated", "relu"):
            yield compare(activation, encoder, rows, rounds=rounds)
    finally:
        torch.set_num_threads(before)


def compare(activation: str, weights: np.ndarray, rows: torch.Tensor, *, rounds: int) -> Line:
    """Return the line of one activation."""
    bias = np.full(N_LATENTS, FIRING, np.float32)
    options = {
        "topk": {},
        "batchtopk": {"threshold": bias},
        "jumprelu": {"threshold": bias},
        "gated": {"b_gate": -bias},
        "relu": {"b_enc": -bias},
    }[activation]
    data = make_dictionary(
        {"W_enc": weights, "W_dec": weights.T, **options},
        activation=activation,
        k=K if activation == "topk" else None,
        hook_point="layers.5.resid_post",
        apply_b_dec_to_input=True,
    )
    encoder = Encoder(data, device=str(rows.device))
    matrix = torch.from_numpy(weights).to(rows.device)
    out = torch.empty(min(ROWS, encoder.batch_rows), N_LATENTS, device=rows.device)

    def ours() -> None:
        encoder.encode(rows)

    def bare() -> None:
        for start in range(0, ROWS, encoder.batch_rows):
            batch = rows[start : start + encoder.batch_rows]
            torch.mm(batch, matrix, out=out[: len(batch)])
        if rows.is_cuda:
            torch.cuda.synchronize()

    sides, times = (ours, bare), ([], [])
    for number in range(rounds + 1):
        for side in sorted((0, 1), key=lambda side: (side + number) % 2):
            seconds = seconds_of(sides[side])
            if number:
                times[side].append(seconds)
    ratio = statistics.median(theirs / mine for mine, theirs in zip(*times, strict=True))
    per_s, bare_per_s = (ROWS / statistics.median(side) for side in times)
    codes = encoder.encode(rows).nnz / ROWS
    note = f"{bare_per_s:,.0f} rows/s of x @ W_enc alone; {D_IN} x {N_LATENTS:,}, {codes:.0f} codes a row"
    return f"encode, {activation}", ratio, f"{per_s:,.0f} rows/s", note


def seconds_of(work: Callable[[], None]) -> float:
    """Return how long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    for name, ratio, absolute, note in run(device="cuda" if torch.cuda.is_available() else "cpu"):
        print(f"{name:20} {ratio:.2f}x  {absolute}; {note}")
