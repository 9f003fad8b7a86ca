"""Nearest contexts through an index with a measured recall, filters inside the search, directions, and next tokens.

The model is random and tiny, so the answers show form, not insight; put any local folder or hub name in its place.
"""

import pydoc_data.topics
import tempfile
from pathlib import Path

import torch
import transformers

import actstore
from actstore import ingest
from actstore.ingest.demo.train import make_tokenizer

HOOK_POINT = "layers.1.resid_post"
DOCUMENTS = [
    {"text": text[:500], "name": name, "initial": name[0]}
    for name, text in sorted(pydoc_data.topics.topics.items())
]


def make_store(folder: Path) -> actstore.Store:
    tokenizer = make_tokenizer([d["text"] for d in DOCUMENTS], vocab_size=600, window=64)
    config = transformers.GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    store = actstore.open(folder / "my.store", create=True)
    ingest.import_corpus(store, "topics", DOCUMENTS)
    ingest.run(
        store,
        ingest.IngestConfig(
            corpus="topics",
            model=str(folder / "model"),
            hook_points=[HOOK_POINT],
            run="tiny",
            ray_address=None,
        ),
    )
    return store


def main(folder: Path) -> None:
    store = make_store(folder)
    # Published by the version log once its recall is measured against brute force; a second call indexes what is new.
    report = ingest.build_index(store, "tiny", HOOK_POINT, kind="ivf_sq8")
    print(
        f"{report.index}: {report.n_indexed:,} vectors, {report.nbytes / 1e6:.1f} MB, {'; '.join(report.why)}"
    )
    ingest.build_index(store, "tiny", HOOK_POINT, kind="scan_sq8")  # for directions
    run = store.refresh().run("tiny")

    row, where = 1000, "initial = 'c'"
    near = run.nearest(HOOK_POINT, row, k=5, recall=0.95, where=where)
    print(near, near.meta.recall, near.meta.n_eligible)
    exact = run.nearest(HOOK_POINT, row, k=5, exact=True, where=where)
    print("the true answer has the same rows:", [r["row"] for r in near] == [r["row"] for r in exact])
    print(run.nearest(HOOK_POINT, actstore.document(3), k=3, transform=["centre"], fold="doc"))

    acts = run.activations(HOOK_POINT)
    direction = acts[:500].mean(axis=0) - acts[500:1000].mean(axis=0)
    found = run.examples(actstore.direction(HOOK_POINT, direction), k=5)
    print(found, found.meta.index)
    print(run.knn_lm("The import statement", k=64, n_tokens=5))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
