"""An ingest without torch: a backend whose "model" writes numbers that say which token they belong to.

`acts[row, d] = token_id[row] * 8 + offset of the row in its unit % 7 + d / 4`, so that a wrong shard, row or column shows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import actstore
from actstore.dtypes import to_stored
from actstore.ingest import IngestConfig, import_corpus, tokenize_corpus
from actstore.ingest.committer import Committer
from actstore.ingest.host import ModelDescription
from actstore.ingest.local_pool import LocalPool
from actstore.ingest.unit import UnitWriter

HOOK_POINTS = (("layers.0.resid_post", 8), ("layers.1.mlp_act", 24))


def numbers(token_ids, width: int) -> np.ndarray:
    offsets = np.arange(len(token_ids)) % 7
    return (np.asarray(token_ids)[:, None] * 8.0 + offsets[:, None] + np.arange(width) / 4).astype(np.float32)


def word_tokenizer(folder: Path, texts: Sequence[str]) -> str:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=16)
    fast.save_pretrained(folder)
    return str(folder)


def documents(n: int, seed: int = 0) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(50)]
    return [
        {"text": " ".join(rng.choice(words, int(rng.integers(1, 40)))), "kind": f"k{i % 3}", "n": i}
        for i in range(n)
    ]


def make_corpus(url: str, folder: Path, n_documents: int = 60, rows_per_unit: int = 64) -> str:
    """Make a store with a tokenized corpus; return the tokenizer's folder."""
    docs = documents(n_documents)
    store = actstore.open(url, create=True)
    import_corpus(store, "words", docs)
    tokenizer = word_tokenizer(folder, [str(d["text"]) for d in docs])
    tokenize_corpus(store.refresh(), "words", tokenizer, window=16, rows_per_unit=rows_per_unit)
    return tokenizer


DESCRIPTION = ModelDescription(
    fingerprint={"synthetic": 1},
    hook_points=HOOK_POINTS,
    compute_dtype="float32",
    attn_implementation="none",
    context=16,
    vocab_size=None,
)


def make_writer(store, plan, value=numbers) -> UnitWriter:
    def capture(token_ids, window_starts, out: Mapping[str, np.ndarray]) -> None:
        for rows in out.values():
            rows[:] = to_stored(value(token_ids, rows.shape[1]), plan.capture_dtype)

    return UnitWriter(store.storage, store.tokenization(plan.tokenization), plan, capture)


class SyntheticHost:
    """What a Ray actor holds here instead of a model."""

    def __init__(self, config, *, threads) -> None:
        self._writer = None

    def describe(self) -> ModelDescription:
        return DESCRIPTION

    def run_job_unit(self, job, unit):
        self._writer = self._writer or make_writer(job.open_store(), job.plan)
        return self._writer.run_unit(unit)


class SyntheticBackend:
    """Runs units in this process with numbers instead of a model."""

    def __init__(
        self,
        *,
        fault=lambda unit: None,
        threads: int = 2,
        value=numbers,
        change=lambda written: written,
        interrupt=lambda: None,
    ) -> None:
        self.fault = fault
        self.threads = threads
        self.value = value
        self.change = change
        self.interrupt = interrupt
        self._pool = None

    def describe(self) -> ModelDescription:
        return DESCRIPTION

    def start(self, store, plan):
        self._committer = Committer(store.log, store.objects, plan)
        writer = make_writer(store, plan, self.value)

        def run_unit(unit):
            self.fault(unit)
            return self.change(writer.run_unit(unit))

        self._pool = LocalPool(run_unit, threads=self.threads, interrupt=self.interrupt)
        return self._pool

    def commit(self, units) -> None:
        self._committer.commit(units)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def config(tokenizer: str, **changes) -> IngestConfig:
    settings = {
        "corpus": "words",
        "model": "synthetic",
        "hook_points": [name for name, _ in HOOK_POINTS],
        "run": "syn",
        "tokenizer": tokenizer,
        "window": 16,
        "rows_per_unit": 64,
        "ray_address": None,
        "retry_s": 0.1,
    }
    return IngestConfig(**{**settings, **changes})


def check_complete(store, run: str = "syn", dtype: str = "float32") -> None:
    """Every row of every unit is there once, and holds its own token's numbers."""
    found = store.run(run)
    assert found.is_complete
    tokenization = found.tokenization
    assert sorted(found.collection.units) == [u.unit for u in tokenization.units]
    assert found.n_rows == tokenization.n_rows
    for name, width in HOOK_POINTS:
        acts = found.activations(name)
        for unit in tokenization.units:
            table = tokenization.unit_table(unit.unit)
            expected = numbers(table["token_id"].to_numpy(), width)
            np.testing.assert_array_equal(acts[table["row"].to_numpy()], expected)


def content(store, run: str = "syn") -> dict[str, object]:
    """What two stores must agree in to be equal: shard bytes and rows, by unit and key; not attempts, times or versions."""
    collection = store.run(run).collection
    return {
        "config": collection.config,
        "sealed": collection.is_sealed,
        "units": {
            u: (
                unit.rows,
                unit.nonfinite,
                tuple((o.key, o.nbytes, o.sha256) for o in unit.objects if "/c/" in o.key),
            )
            for u, unit in collection.units.items()
        },
    }
