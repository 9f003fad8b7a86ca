"""Where do real activations come from that are wide and many enough? A small transformer, trained here, over real text.

    python -m tests.benchmarks.real_rows FOLDER [N_TOKENS]

makes FOLDER/rows.store with the run `run`: `layers.1.resid_post` (768 numbers, bfloat16) of a GPT-NeoX of two layers, trained
for a few minutes on the texts of `botocore_docs`, whose labels are columns of the documents. A folder that is there is used.
"""

import random
import sys
from itertools import islice
from pathlib import Path

import actstore
from actstore import ingest
from actstore.ingest.demo.train import (
    TrainConfig,
    encode_stream,
    make_tokenizer,
    save_model,
    saved_report,
    train_model,
)
from tests.benchmarks.botocore_docs import botocore_documents

H = "layers.1.resid_post"
RUN = "run"
DEFAULT_FOLDER = Path("build/bench/rows")
N_TOKENS = 500_000
_CONFIG = TrainConfig(
    seed=0, steps=250, batch_windows=8, window=128, d_model=768, d_mlp=2048, layers=2, heads=12, learning_rate=1e-3
)  # fmt: skip
_VOCAB = 4096


def make_run(folder: Path = DEFAULT_FOLDER, n_tokens: int = N_TOKENS) -> actstore.Store:
    """Return the store, made if it is not there."""
    url = str(folder / f"rows-{n_tokens}.store")
    return fill_store(actstore.open(url, create=not Path(url).exists()), folder, n_tokens)


def fill_store(store: actstore.Store, folder: Path, n_tokens: int) -> actstore.Store:
    """Return the store with the run in it, ingested as far as it is not."""
    documents = list(botocore_documents())
    random.Random(0).shuffle(documents)
    model = folder / "model"
    if saved_report(model, config=_CONFIG, text_sha256="botocore") is None:
        folder.mkdir(parents=True, exist_ok=True)
        _train(model, [d["text"] for d in documents])
    ingest.import_corpus(store, "docs", _few(documents, n_tokens))
    config = ingest.IngestConfig(
        corpus="docs", model=str(model), hook_points=[H], run=RUN, dtype="bfloat16", ray_address=None
    )
    ingest.run(store, config)
    return store.refresh()


def _few(documents: list[dict], n_tokens: int) -> list[dict]:
    # About 4.4 characters a token: measured with this tokenizer; the run says how many there are.
    n_chars, few = 0, []
    for document in documents:
        if n_chars > 4.4 * n_tokens:
            break
        few.append(document)
        n_chars += len(document["text"])
    return few


def _train(folder: Path, texts: list[str]) -> None:
    tokenizer = make_tokenizer(texts, vocab_size=_VOCAB, window=_CONFIG.window)
    held_out = encode_stream(tokenizer, list(islice(texts, 500)))
    trained = encode_stream(tokenizer, texts[500:20_000])
    model, report = train_model(
        trained, held_out, vocab_size=_VOCAB, boundary_id=tokenizer.bos_token_id, config=_CONFIG,
        on_step=lambda step, loss: print(f"step {step} loss {loss:.2f}", file=sys.stderr) if step % 25 == 0 else None,
    )  # fmt: skip
    save_model(folder, model, tokenizer, config=_CONFIG, text_sha256="botocore", report=report)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER
    found = make_run(folder, *map(int, sys.argv[2:]))
    print(found.run(RUN))
