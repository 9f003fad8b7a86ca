"""How much of the forward pass's speed is left when its activations are captured?

The floor runs the same batches, built beforehand, through the same model with the layers after the last hooked one taken off,
and keeps nothing. Both sides run in interleaved rounds on this machine's CPU; the ratio is the floor's time over capture's.
"""

import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch

from actstore.ingest.batches import plan_batches
from actstore.ingest.capture import Capturer, make_batch
from actstore.ingest.models import load_model
from tests.ingest import tiny_models

TARGET = 0.95
BATCH_TOKENS = 4096

CASES: tuple[tuple[str, dict[str, int], list[str], int, int, str], ...] = (
    (
        "capture, 4 layers x 256, layer 2",
        {"n_layers": 4, "d_model": 256},
        ["layers.2.resid_post"],
        3,
        8_000,
        "float32",
    ),
    (
        "capture, 4 layers x 256, layer 2 as bf16",
        {"n_layers": 4, "d_model": 256},
        ["layers.2.resid_post"],
        3,
        8_000,
        "bfloat16",
    ),
    ("capture, 4 layers x 256, all 34", {"n_layers": 4, "d_model": 256}, ["*"], 4, 8_000, "bfloat16"),
    (
        "capture, 12 layers x 768, layer 8",
        {"n_layers": 12, "d_model": 768},
        ["layers.8.resid_post"],
        9,
        2_000,
        "float16",
    ),
)


def windows(n_tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and window starts like a text corpus's: lognormal lengths, cut at 128."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.5, 0.8, n_tokens // 64), 1, 128).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    starts = starts[starts <= n_tokens]
    return rng.integers(0, 512, int(starts[-1])).astype(np.int32), starts


def floor_s(model: Any, inputs: list[dict[str, torch.Tensor]]) -> float:
    """Return the seconds of the forward passes alone."""
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in inputs:
            model(**batch)
    return time.perf_counter() - started


def run(rounds: int = 7) -> list[tuple[str, float, str, str]]:
    """Return (name, median ratio, absolute speeds, note) of each case."""
    rows = []
    for name, shape, hook_points, n_layers, n_tokens, stored in CASES:
        with tempfile.TemporaryDirectory() as folder:
            tiny_models.build("gpt2", folder, context=128, std=0.02, **shape)
            loaded, stripped = load_model(folder, device="cpu"), load_model(folder, device="cpu").model
        stripped.h = stripped.h[:n_layers]
        ids, starts = windows(n_tokens, seed=0)
        inputs = []
        for batch in plan_batches(np.diff(starts), BATCH_TOKENS):
            _, ids_bt, mask_bt = make_batch(ids, starts, batch)
            mask = {} if mask_bt is None else {"attention_mask": torch.from_numpy(mask_bt)}
            inputs.append({"input_ids": torch.from_numpy(ids_bt), **mask})
        capturer = Capturer(loaded, hook_points)
        dtype = np.uint16 if stored == "bfloat16" else stored
        out = {hook: np.zeros((len(ids), width), dtype) for hook, width in capturer.widths.items()}
        ours, floors = [], []
        for i in range(rounds + 1):
            floor = floor_s(stripped, inputs)
            started = time.perf_counter()
            capturer.capture_unit(ids, starts, out, batch_tokens=BATCH_TOKENS, stored_dtype=stored)
            if i:  # the first round warms up
                ours.append(time.perf_counter() - started)
                floors.append(floor)
        ratio = statistics.median(f / o for f, o in zip(floors, ours, strict=True))
        speed, best = (len(ids) / statistics.median(times) for times in (ours, floors))
        note = f"{len(out)} hook points, {stored}; target {TARGET} of a loop that only computes"
        rows.append((name, ratio, f"{speed:,.0f} of {best:,.0f} tokens/s", note))
    return rows
