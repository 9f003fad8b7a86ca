"""From a few documents and a model to answers: import, ingest, then every question, on a laptop and offline.

The model is random and tiny, so the answers show form, not insight; put any local folder or hub name in its place.
"""

import tempfile
from pathlib import Path

import torch
import transformers

import actstore
from actstore import ingest
from actstore.ingest.demo.train import make_tokenizer

DOCUMENTS = [
    {"text": f"def {name}(x):\n    return x {sign} {i}\n", "topic": topic}
    for name, sign, topic in [("add", "+", "sums"), ("sub", "-", "sums"), ("mul", "*", "products")]
    for i in range(20)
]


def make_model(folder: Path) -> None:
    tokenizer = make_tokenizer([d["text"] for d in DOCUMENTS], vocab_size=320, window=64)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **shape)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(folder: Path) -> None:
    make_model(folder / "model")
    store = actstore.open(folder / "my.store", create=True)
    ingest.import_corpus(store, "arithmetic", DOCUMENTS)
    config = ingest.IngestConfig(
        corpus="arithmetic",
        model=str(folder / "model"),
        hook_points=["layers.*.resid_post", "layers.*.mlp_act"],
        run="tiny",
        ray_address=None,  # in this process; "local" starts Ray, "auto" joins a cluster
    )
    print(ingest.run(store, config))

    run = store.run("tiny")
    print(run, run.stats("layers.1.resid_post").n_rows)
    acts = run.activations("layers.1.resid_post")
    print(run.examples(actstore.neuron("layers.1.mlp_act", 7), k=5))
    print(run.examples(actstore.direction("layers.1.resid_post", acts[3]), k=5, where="topic = 'products'"))
    print(run.nearest("layers.1.resid_post", 5, k=5, exclude_own_document=True))
    print(run.nearest("layers.1.resid_post", "def mul(x):", k=5))
    print(
        store.sql("SELECT topic, count(*) FROM tokens JOIN documents USING (corpus, doc_id) GROUP BY topic")
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
