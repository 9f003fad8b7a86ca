"""What fires where: train a small sparse autoencoder on a run, encode the run, and ask its latents everything.

Model and autoencoder are tiny, so the answers show form, not insight; the calls are the same for a model of billions.
"""

import tempfile
from pathlib import Path

import torch
import transformers

import actstore
from actstore import ingest
from actstore.ingest.demo.train import make_tokenizer
from actstore.query import bands, plots
from actstore.query.latent_page import save_latent_page

HOOK_POINT = "layers.1.resid_post"
DOCUMENTS = [
    {"text": f"def {name}_{i}(x, y):\n    return {'y' if i % 3 else 'x'} {sign} {i}\n", "topic": topic}
    for name, sign, topic in [("add", "+", "sums"), ("sub", "-", "sums"), ("mul", "*", "products")]
    for i in range(60)
]


def make_run(folder: Path) -> actstore.Store:
    """Return a store with one run: a random model over made-up text."""
    tokenizer = make_tokenizer([d["text"] for d in DOCUMENTS], vocab_size=320, window=64)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(vocab_size=len(tokenizer), **shape)
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    store = actstore.open(folder / "my.store", create=True)
    ingest.import_corpus(store, "arithmetic", DOCUMENTS)
    config = ingest.IngestConfig(
        corpus="arithmetic",
        model=str(folder / "model"),
        hook_points=[HOOK_POINT],
        run="tiny",
        ray_address=None,
    )
    ingest.run(store, config)
    return store


def main(folder: Path) -> None:
    store = make_run(folder)
    config = ingest.SaeTrainConfig(
        name="sae",
        n_latents=128,
        k=4,
        n_rows=40_000,
        batch_rows=512,
        checkpoint_dir=str(folder / "checkpoint"),
    )
    report = ingest.train_sae(store, "tiny", HOOK_POINT, config)
    print(f"explained variance {report.hook_points[0].explained_variance:.1%}")
    encoded = ingest.encode(store, "sae", "tiny")  # token-major codes, then postings and statistics
    print(f"{encoded.n_codes} codes in {encoded.nbytes} bytes")

    run = store.run("tiny")
    found = run.latents("sae", k=5, where="density < 0.2 AND n_docs >= 10", order_by="max DESC")
    print(found)
    best = actstore.latent("sae", found.to_dicts()[0]["latent"])
    run.examples(best, k=3).show()  # in a notebook the same call shows HTML
    run.examples(best, bands=bands.top(2) + bands.rank(3, per=1) + bands.random(2), before=6, after=4).show()
    print(run.active("def mul_7(x, y):", "sae", k=5))
    print(run.neighbours(best, k=3))

    codes = run.codes("sae")
    print(codes.rows([3, 4]).to_dense().shape, codes.postings().top(best.index, 3))

    run.examples(best, k=50).to_html(folder / "examples.html")
    save_latent_page(folder / "latents.html", run, "sae", [row["latent"] for row in found])
    plots.save_figure(plots.density_plot(codes.stats()), folder / "densities.png")
    plots.save_figure(plots.latent_histogram(codes.stats([best.index])), folder / "histogram.png")
    print(sorted(path.name for path in folder.glob("*.*") if path.is_file()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
