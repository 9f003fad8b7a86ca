"""Runs that keep pooled vectors, over documents with metadata: empty ones, ones over several units, and ones alike."""

import numpy as np

import actstore
from actstore.ingest import import_corpus, tokenize_corpus
from tests.ingest.kept import HOOK_POINTS, WORDS, KeptRun, framed_tokenizer

H = "layers.0.resid_post"
D = HOOK_POINTS[H]


def records(n: int, seed: int = 0) -> list[dict]:
    """Documents of 0 to 150 words; every fifth has the text of the one before."""
    rng = np.random.default_rng(seed)
    found: list[dict] = []
    for i in range(n):
        n_words = 0 if i % 11 == 6 else 150 if i % 13 == 4 else int(rng.integers(1, 30))
        text = " ".join(rng.choice(WORDS, n_words)) if i % 5 != 4 else found[-1]["text"]
        found.append(
            {
                "text": text,
                "source": ["web", "book", "code"][i % 3],
                "n": i,
                "score": None if i % 4 == 0 else i / 2,
            }
        )
    return found


def alike(tokens, width: int, seed: int = 0) -> np.ndarray:
    """Rows that depend on the token and its position alone: equal texts have equal vectors."""
    rows = np.empty((tokens.num_rows, width), np.float32)
    columns = (tokens[name].to_numpy() for name in ("token_id", "position"))
    for i, key in enumerate(zip(*columns, strict=True)):
        rows[i] = np.random.default_rng((seed, width, *map(int, key))).standard_normal(width) * 3 + 1
    return rows


def tokenized(folder, n: int = 60, **settings):
    """A store with the documents, and their tokenization."""
    store = actstore.open(str(folder / "store"), create=True)
    import_corpus(store, "docs", records(n))
    settings = {"window": 16, "overlap": 4, "rows_per_unit": 128} | settings
    report = tokenize_corpus(store.refresh(), "docs", framed_tokenizer(folder / "tokenizer"), **settings)
    return store, store.refresh().tokenization(report.id)


def kept_run(store, name: str, tokenization, **settings) -> KeptRun:
    """A run of these rows, to be finished."""
    return KeptRun(store, name, tokenization, **({"value": alike} | settings))
