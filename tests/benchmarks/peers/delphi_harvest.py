"""Harvest with delphi's LatentCache. Runs in a virtual environment of its own, which has eai-delphi and not actstore.

Usage: python delphi_harvest.py MODEL TOKENS.npy ENCODER.npy K HOOKPOINT OUT BATCH_ROWS; prints one line of JSON, and before it
`started` and, once half of the batches are in its memory, `half`. Model class, dense latents, number of splits and stored tokens
are those of delphi's own pipeline (`delphi/__main__.py`, `delphi/sparse_coders/load_sparsify.py`, `CacheConfig`); the choice of
latents is that of sparsify's encoder, without the bias that this dictionary does not have.
"""

import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

# delphi imports it for embeddings of its contrastive examples, which a harvest does not make.
sys.modules["sentence_transformers"] = types.SimpleNamespace(SentenceTransformer=object)

from delphi.config import CacheConfig  # noqa: E402
from delphi.latents import LatentCache  # noqa: E402


class Encoder:
    """Makes dense latents (batch, sequence, latents) of activations, and counts the tokens that it was given."""

    def __init__(self, weights_df: np.ndarray, k: int, n_tokens: int) -> None:
        self._weights_fd = torch.from_numpy(np.ascontiguousarray(weights_df.T))
        self._k, self._half = k, n_tokens // 2
        self.n_tokens = 0

    def __call__(self, acts_btd: torch.Tensor) -> torch.Tensor:
        acts_td = acts_btd.reshape(-1, acts_btd.shape[-1])
        if self.n_tokens < self._half <= self.n_tokens + len(acts_td):
            print("half", flush=True)
        self.n_tokens += len(acts_td)
        pre_tf = torch.relu(torch.nn.functional.linear(acts_td, self._weights_fd))
        top = pre_tf.topk(self._k, dim=-1, sorted=False)
        latents_tf = torch.zeros(pre_tf.shape, dtype=acts_td.dtype)
        latents_tf = latents_tf.scatter_(-1, top.indices, top.values)
        return latents_tf.reshape(*acts_btd.shape[:-1], -1)


def peak_mib() -> int:
    """Return the most memory that this program has had, in MiB; `getrusage` would count the process that started it too."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def main(model: str, tokens: str, encoder: str, k: str, hookpoint: str, out: str, batch_rows: str) -> None:
    """Harvest one hook point and print what it cost."""
    ids_bt = torch.from_numpy(np.load(tokens, allow_pickle=False))
    encode = Encoder(np.load(encoder, allow_pickle=False), int(k), ids_bt.numel())
    cache = LatentCache(
        AutoModel.from_pretrained(model, dtype=torch.float32).eval(),
        {hookpoint: encode},
        batch_size=int(batch_rows),
    )
    print("started", flush=True)
    started = time.perf_counter()
    cache.run(ids_bt.numel(), ids_bt)
    in_memory_s = time.perf_counter() - started
    cache.save_splits(n_splits=CacheConfig.n_splits, save_dir=Path(out))
    elapsed_s = time.perf_counter() - started
    n_codes = len(cache.cache.latent_activations[hookpoint])
    print(
        json.dumps(
            {
                "n_tokens": encode.n_tokens,
                "elapsed_s": elapsed_s,
                "in_memory_s": in_memory_s,
                "n_codes": n_codes,
                "nbytes": sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file()),
                "peak_mib": peak_mib(),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:8])
