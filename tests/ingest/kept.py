"""Runs of every kind (dense, pooled, sampled, int8) written by the real writer and committer, without a job or a model.

The "model" computes seeded random numbers of a row's document, window and position in it, so that a token that two windows
share has two rows that differ, as in a real model.
"""

import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from actstore.codec.spec import plan_spec
from actstore.dtypes import to_float32, to_stored
from actstore.ingest import import_corpus, tokenize_corpus
from actstore.ingest.committer import Committer, take_over
from actstore.ingest.run_plan import make_plan
from actstore.ingest.unit import UnitWriter
from actstore.int8 import fit_int8
from actstore.log.values import Create
from actstore.pooled_tables import POOLINGS
from actstore.sampling import most_kept, plan_stored_rows

HOOK_POINTS = {"embed": 6, "layers.0.resid_post": 20}
WORDS = [f"w{i}" for i in range(30)]


def texts(n: int, seed: int = 0, longest: int = 90) -> list[str]:
    """Documents of 0 to `longest` words: many end in the middle of a unit, some go over two or more."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / 20, n) - 1, longest)
    lengths[n // 2] = longest
    return [" ".join(rng.choice(WORDS, k)) for k in lengths]


def framed_tokenizer(folder: Path) -> str:
    """A tokenizer of words that puts [CLS] before and [SEP] behind."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=16,
    )
    fast.save_pretrained(folder)
    return str(folder)


def tokenized(
    store,
    folder: Path,
    *,
    n: int = 24,
    seed: int = 0,
    window: int = 16,
    overlap: int = 5,
    rows_per_unit: int = 64,
):
    """Import and tokenize documents; return the tokenization."""
    import_corpus(store, "words", texts(n, seed))
    report = tokenize_corpus(
        store.refresh(),
        "words",
        framed_tokenizer(folder),
        window=window,
        overlap=overlap,
        rows_per_unit=rows_per_unit,
    )
    return store.refresh().tokenization(report.id)


def activations(tokens, width: int, seed: int = 0) -> np.ndarray:
    """What the model computes for a unit's tokens: float32 (n_rows, width)."""
    rows = np.empty((tokens.num_rows, width), np.float32)
    columns = (tokens[name].to_numpy() for name in ("doc_id", "window", "window_position"))
    for i, key in enumerate(zip(*columns, strict=True)):
        rows[i] = np.random.default_rng((seed, width, *map(int, key))).standard_normal(width) * 4 + 1
    return rows


def run_config(tokenization, *, dtype="float32", compute_dtype="float32", keep=("dense",), poolings=POOLINGS,
               pool_special=False, rate=1.0, seed=0, covariance=False, nonfinite="error", codec="hot"):  # fmt: skip
    """What a run of these settings has for a configuration."""
    places = tokenization.rows_per_unit
    config = {}
    if rate < 1:
        units = tokenization.collection.units
        most = most_kept(((u, units[u].rows) for u in units), rows_per_unit=places, rate=rate, seed=seed)
        places = plan_stored_rows(most, widths=HOOK_POINTS.values(), dtype=dtype, codec=codec)
        config |= {"sample": {"rate": rate, "seed": seed}, "stored_rows_per_unit": places}
    if "pooled" in keep:
        config |= {
            "keep": list(keep),
            "poolings": list(poolings),
            **({"pool_special": True} if pool_special else {}),
        }
    specs = {
        name: plan_spec(rows_per_unit=places, d_model=d, dtype=dtype, codec=codec)
        for name, d in HOOK_POINTS.items()
    }
    return config | {
        "format": 1,
        "model": {"kept": 1},
        "tokenization": tokenization.id,
        "tokenization_fingerprint": tokenization.collection.fingerprint,
        "rows_per_unit": tokenization.rows_per_unit,
        "hook_points": [{"name": name, "d_model": d} for name, d in HOOK_POINTS.items()],
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "codec": codec,
        "rows_per_shard": {name: spec.rows_per_shard for name, spec in specs.items()},
        "rows_per_chunk": {name: spec.rows_per_chunk for name, spec in specs.items()},
        "nonfinite": nonfinite,
        **({"covariance": True} if covariance else {}),
    }  # fmt: skip


class KeptRun:
    """A run that is written unit by unit, as a job would."""

    def __init__(self, store, name: str, tokenization, *, value=activations, **settings) -> None:
        self.store, self.name, self.tokenization, self.value = store, name, tokenization, value
        config = run_config(tokenization, **settings)
        info = {}
        if config["dtype"] == "int8":
            info["int8"] = {
                n: fit_int8(np.full(d, 1.0), np.full(d, 4.0)).to_json() for n, d in HOOK_POINTS.items()
            }
        if ("run", name) not in store.state.collections:
            store.log.commit([Create("run", name, config, info)], txn=uuid.uuid4().hex)
        self.plan = make_plan(store.refresh().state.collection("run", name), epoch=take_over(store.log, name))
        self.writer = UnitWriter(store.storage, tokenization, self.plan, self._capture)
        self.committer = Committer(store.log, store.objects, self.plan)
        self._unit = -1

    def _capture(self, token_ids, window_starts, out: Mapping[str, np.ndarray]) -> int:
        tokens = self.tokenization.unit_table(self._unit)
        for name, rows in out.items():
            rows[:] = to_stored(self.value(tokens, HOOK_POINTS[name]), self.plan.capture_dtype)
        return len(token_ids)

    def write(self, unit: int):
        self._unit = unit
        return self.writer.run_unit(unit)

    def finish(self, *, without=(), seal=True):
        """Write and commit all units that are missing but `without`; return the run."""
        collection = self.store.refresh().state.collection("run", self.name)
        missing = [
            u.unit
            for u in self.tokenization.units
            if u.unit not in without and u.unit not in collection.units
        ]
        if missing:
            self.committer.commit([self.write(unit) for unit in missing])
        if seal:
            reasons = dict.fromkeys(without, "broken for a test")
            self.committer.seal(n_units=len(self.tokenization.units), quarantined=reasons)
        return self.store.refresh().run(self.name)

    def captured(self, name: str) -> dict[int, np.ndarray]:
        """What the model gave for every unit, as float32 of the dtype it was captured in."""
        dtype = self.plan.capture_dtype
        return {
            u.unit: to_float32(
                to_stored(self.value(self.tokenization.unit_table(u.unit), HOOK_POINTS[name]), dtype), dtype
            )
            for u in self.tokenization.units
        }


def replanned(run: KeptRun, **changes) -> KeptRun:
    """The same run, written by another plan: as a faulty or foreign writer would."""
    run.plan = replace(run.plan, **changes)
    run.writer = UnitWriter(run.store.storage, run.tokenization, run.plan, run._capture)
    return run


def naive_pooled(
    run: KeptRun, name: str, *, pool_special: bool = False, without=()
) -> dict[int, tuple[int, dict | None]]:
    """Pool every document from all its rows, with loops: each position of the text once, as its first window has it.

    Which rows those are is told by the tokenizer alone: a row stands for a position if it has the id that the whole
    document's sequence has there.
    """
    tokenization = run.tokenization
    tokenizer = Tokenizer.from_str(tokenization.tokenizer_json().decode())
    parts = run.store.objects
    sequences = []
    for part in tokenization.corpus.parts:
        sequences += [tokenizer.encode(t).ids for t in parts.table(part.objects[0])["text"].to_pylist()]
    rows: dict[int, dict[int, tuple[bool, np.ndarray]]] = {}
    broken = set()
    captured = run.captured(name)
    for unit in tokenization.units:
        for token, x in zip(tokenization.unit_table(unit.unit).to_pylist(), captured[unit.unit], strict=True):
            document = rows.setdefault(token["doc_id"], {})
            if unit.unit in without:
                broken.add(token["doc_id"])
            is_outer = sequences[token["doc_id"]][token["position"]] == token["token_id"]
            if is_outer and token["position"] not in document:
                document[token["position"]] = (token["is_special"], x.astype(np.float64))
    found = {}
    for doc_id, document in rows.items():
        if doc_id in broken:
            continue
        assert sorted(document) == list(range(len(sequences[doc_id])))
        used = [
            (p, x)
            for p, (special, x) in document.items()
            if (pool_special or not special) and np.isfinite(x).all()
        ]
        weight = sum(p + 1 for p, _ in used)
        found[doc_id] = (len(used), None) if not used else (len(used), {
            "mean": sum(x for _, x in used) / len(used),
            "weighted_mean": sum((p + 1) * x for p, x in used) / weight,
            "max": np.max([x for _, x in used], axis=0),
            "last": max(used, key=lambda pair: pair[0])[1],
        })  # fmt: skip
    return found
