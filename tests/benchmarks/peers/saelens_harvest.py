"""Harvest with SAELens' CacheActivationsRunner. Runs in a virtual environment of its own, which has sae-lens and not actstore.

Usage: python saelens_harvest.py MODEL TOKENS.npy HOOK_NAME OUT CONTEXT BATCH_ROWS; prints one line of JSON.
The configuration is SAELens' own for speed: no shuffling, one buffer per 131,072 tokens, float32 (it cannot store bf16).
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

BUFFER_TOKENS = 131_072


def main(model: str, tokens: str, hook_name: str, out: str, context: int, batch_rows: int) -> None:
    """Harvest one hook point and print what it cost."""
    ids_bt = np.load(tokens, allow_pickle=False)
    d_model = json.loads((Path(model) / "config.json").read_text())["hidden_size"]
    config = CacheActivationsRunnerConfig(
        dataset_path="local",
        model_name=model,
        model_class_name="AutoModelForCausalLM",
        hook_name=hook_name,
        d_in=d_model,
        context_size=context,
        model_batch_size=batch_rows,
        training_tokens=ids_bt.size,
        buffer_size_gb=BUFFER_TOKENS * d_model * 4 / 1e9 * 1.0001,
        new_cached_activations_path=out,
        dtype="float32",
        device="cpu",
        shuffle=False,
        prepend_bos=False,
        streaming=False,
    )
    runner = CacheActivationsRunner(
        config, override_dataset=Dataset.from_dict({"input_ids": ids_bt.tolist()})
    )
    print("started", flush=True)
    started = time.perf_counter()
    dataset = runner.run()
    elapsed_s = time.perf_counter() - started
    n_tokens = len(dataset) * context
    nbytes = sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file())
    print(
        json.dumps(
            {
                "n_tokens": n_tokens,
                "elapsed_s": elapsed_s,
                "nbytes": nbytes,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(int, sys.argv[5:7]))
