"""How long do the top contexts of a latent take, windows included, and how many requests does that send to an object store?

A store is made of random words and random codes: documents of 64 to 1,024 tokens, `per_row` codes for each token out of
`n_latents` whose densities fall like 1/rank up to 10 %. Latents that are asked for were never asked for before: what is warm is
the process (decoded tokens, texts and directories), not the answer.

    python -m tests.benchmarks.bench_latents [N_TOKENS]
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa

import actstore
from actstore.codes import codes_id
from actstore.dictionary_data import make_dictionary
from actstore.ingest.corpus_parts import part_bytes_of
from actstore.ingest.dictionaries.save import save_dictionary
from actstore.ingest.token_units import unit_bytes, vocabulary_bytes
from actstore.log.values import Add, Create, Seal
from actstore.query import bands
from actstore.sparse import SparseRows, encode_segment, encode_unit
from actstore.stats import RowTokens, block_stats, merge_stats, stats_to_table
from actstore.store import Store
from actstore.tokenization import TOKEN_SCHEMA
from tests.query.make_store import commit, fingerprint, parquet, write
from tests.s3_server import FaultyProxy, S3Server

H = "layers.0.resid_post"
VOCABULARY = 50_000
WINDOW = 256


def build(
    url: str,
    *,
    n_tokens: int,
    n_latents: int = 16_384,
    per_row: int = 32,
    rows_per_unit: int = 65_536,
    storage_options: dict | None = None,
) -> None:
    """Make a store with a run of which only the statistics are real, a dictionary, and its codes and postings."""
    store = actstore.open(url, create=True, storage_options=storage_options)
    rng = np.random.default_rng(n_tokens)
    lengths = rng.integers(64, 1025, n_tokens // 544 + 1)
    doc_of = np.repeat(np.arange(len(lengths)), lengths)
    tokens = rng.zipf(1.2, len(doc_of)) % VOCABULARY
    _add_corpus(store, tokens, lengths)
    n_rows = _add_tokenization(store, tokens, doc_of, lengths, rows_per_unit)
    _add_run(store, n_rows, rows_per_unit)
    weights = {"W_enc": rng.standard_normal((8, n_latents)), "W_dec": rng.standard_normal((n_latents, 8))}
    save_dictionary(store, "sae", make_dictionary(weights, activation="topk", k=per_row, hook_point=H))
    _add_codes(store, n_rows, rows_per_unit, n_latents, per_row)


def _word(token_id: int) -> str:
    return f"w{token_id}"


def _add_corpus(store: Store, tokens: np.ndarray, lengths: np.ndarray) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    texts = [" ".join(map(_word, tokens[a:b].tolist())) for a, b in itertools.pairwise(starts)]
    table = pa.table(
        {
            "doc_id": pa.array(range(len(texts)), pa.int64()),
            "text": pa.array(texts, pa.large_string()),
            "source_key": pa.array([f"k{i}" for i in range(len(texts))]),
        }
    )
    config = {"content_sha256": "00" * 32, "n_documents": len(texts), "text_bytes": sum(map(len, texts)),
              "columns": {f.name: str(f.type) for f in table.schema}}  # fmt: skip
    commit(store, Create("corpus", "docs", config, {}))
    attempt, actions = uuid.uuid4().hex, []
    for part, first in enumerate(range(0, len(texts), 100_000)):
        piece = table.slice(first, 100_000)
        data = bytes(part_bytes_of(piece))
        obj = write(store, f"corpora/docs/documents/{part:06}-{attempt}.parquet", data)
        mark = fingerprint(store, "corpus", "docs")
        meta = {"first_doc": first, "text_bytes": 1}
        actions.append(Add("corpus", "docs", 0, mark, part, len(piece), 0, attempt, (obj,), meta))
    commit(store, *actions, Seal("corpus", "docs", 0, len(actions), len(texts), ()))


def _add_tokenization(
    store: Store, tokens: np.ndarray, doc_of: np.ndarray, lengths: np.ndarray, rows_per_unit: int
) -> int:
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    position = np.arange(len(tokens)) - starts[doc_of]
    widths = np.char.str_len(np.char.mod("w%d", tokens)) + 1
    ends = np.cumsum(widths) - 1
    char_start = ends - widths + 1 - (ends - widths + 1)[starts][doc_of]
    config = {"corpus": "docs", "corpus_fingerprint": fingerprint(store, "corpus", "docs"), "tokenizer_sha256": "00" * 32,
              "window": WINDOW, "overlap": 0, "add_special_tokens": False, "rows_per_unit": rows_per_unit,
              "format": 1}  # fmt: skip
    commit(store, Create("tokenization", "docs.t", config, {}))
    mark, attempt, actions = fingerprint(store, "tokenization", "docs.t"), uuid.uuid4().hex, []
    columns = {
        "row": np.arange(len(tokens)), "doc_id": doc_of, "position": position, "token_id": tokens,
        "char_start": char_start, "char_end": char_start + widths - 1, "is_special": np.zeros(len(tokens), bool),
        "window": position // WINDOW, "window_position": position % WINDOW,
    }  # fmt: skip
    table = pa.table(
        {f.name: pa.array(columns[f.name]).cast(f.type) for f in TOKEN_SCHEMA}, schema=TOKEN_SCHEMA
    )
    for unit, first in enumerate(range(0, len(tokens), rows_per_unit)):
        piece = table.slice(first, rows_per_unit)
        obj = write(
            store, f"tokenizations/docs.t/tokens/{unit:08}-{attempt}.parquet", bytes(unit_bytes(piece))
        )
        meta = {"first_doc": int(doc_of[first]), "last_doc": piece["doc_id"][-1].as_py(), "n_windows": 1}
        actions.append(Add("tokenization", "docs.t", 0, mark, unit, len(piece), 0, attempt, (obj,), meta))
    words = pa.table(
        {"token_id": pa.array(range(VOCABULARY), pa.int32()), "token": [_word(i) for i in range(VOCABULARY)]}
    )
    sealed = (
        write(store, f"tokenizations/docs.t/tokenizer-{attempt}.json", b"{}"),
        write(store, f"tokenizations/docs.t/vocabulary-{attempt}.parquet", bytes(vocabulary_bytes(words))),
    )
    meta = {"n_documents": len(lengths), "n_empty": 0, "n_windows": 1, "tokenizer_config": {}}
    commit(store, *actions, Seal("tokenization", "docs.t", 0, len(actions), len(tokens), sealed, meta))
    return len(tokens)


def _add_run(store: Store, n_rows: int, rows_per_unit: int) -> None:
    """A run that keeps no rows, as one of codes alone does."""
    config = {
        "model": {"architecture": "Synthetic", "revision": None}, "tokenization": "docs.t",
        "tokenization_fingerprint": fingerprint(store, "tokenization", "docs.t"), "rows_per_unit": rows_per_unit,
        "hook_points": [{"name": H, "d_model": 8}], "dtype": "float16", "compute_dtype": "float32", "codec": "hot",
        "keep": ["codes"], "batch_tokens": 1, "attn_implementation": "eager", "nonfinite": "mask", "format": 1,
    }  # fmt: skip
    commit(store, Create("run", "run", config, {"model_source": "none"}))
    mark, attempt, actions, total = fingerprint(store, "run", "run"), uuid.uuid4().hex, [], None
    for unit, first in enumerate(range(0, n_rows, rows_per_unit)):
        n = min(rows_per_unit, n_rows - first)
        acts = np.random.default_rng(unit).standard_normal((n, 8)).astype(np.float32)
        rows = np.arange(first, first + n)
        acts[rows % WINDOW == 0] *= 30  # attention sinks
        ids, places = (rows % VOCABULARY).astype(np.int32), (rows % WINDOW).astype(np.int32)
        some = block_stats(H, acts, tokens=RowTokens(rows, ids, places))
        total = some if total is None else merge_stats(total, some)
        obj = write(store, f"runs/run/stats/{unit:08}-{attempt}.parquet", parquet(stats_to_table([some])))
        actions.append(Add("run", "run", 0, mark, unit, n, 0, attempt, (obj,), {}))
    obj = write(store, f"runs/run/stats/all-{attempt}.parquet", parquet(stats_to_table([total])))
    commit(store, *actions, Seal("run", "run", 0, len(actions), n_rows, (obj,)))


def random_rows(n_rows: int, n_latents: int, per_row: int, *, seed: int) -> SparseRows:
    """Codes of `n_rows` rows: nearly `per_row` each, latents with densities like 1/rank up to 10 %."""
    rng = np.random.default_rng([seed, n_latents])
    share = 1 / (np.arange(n_latents) + 4.0)
    share = np.minimum(share * per_row / share.sum(), 0.1)
    cumulative = np.cumsum(share * per_row / share.sum()) / per_row
    drawn = np.searchsorted(cumulative, rng.random(n_rows * per_row)).clip(max=n_latents - 1)
    keys = np.unique(np.repeat(np.arange(n_rows), per_row) * n_latents + drawn)
    rows, latents = np.divmod(keys, n_latents)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_rows))])
    values = np.exp(rng.standard_normal(len(keys), dtype=np.float32)).astype(np.float16)
    return SparseRows(indptr.astype(np.int64), latents.astype(np.uint32), values, n_latents)


def _add_codes(store: Store, n_rows: int, rows_per_unit: int, n_latents: int, per_row: int) -> None:
    name, run = codes_id("sae", "run"), store.run("run")
    config = {
        "format": 1, "dictionary": "sae", "dictionary_fingerprint": store.dictionary("sae").fingerprint, "run": "run",
        "run_fingerprint": run.collection.fingerprint, "tokenization": "docs.t", "hook_point": H, "n_latents": n_latents,
        "value_dtype": "float16", "rows_per_unit": rows_per_unit, "pool_top_m": None, "pool_special": False,
        "encoder": {"compute_dtype": "float32", "rows_dtype": "float16"},
    }  # fmt: skip
    commit(store, Create("codes", name, config, {}))
    mark, attempt, actions = fingerprint(store, "codes", name), uuid.uuid4().hex, []
    latents, values, rows = [], [], []
    for unit, first in enumerate(range(0, n_rows, rows_per_unit)):
        n = min(rows_per_unit, n_rows - first)
        codes = random_rows(n, n_latents, per_row, seed=unit)
        data, meta = encode_unit(codes, np.ones(n, np.float32))
        obj = write(store, f"codes/{name}/units/{unit:08}-{attempt}.bin", data)
        actions.append(Add("codes", name, 0, mark, unit, n, 0, attempt, (obj,), meta))
        latents.append(codes.latents)
        values.append(codes.values)
        rows.append(np.repeat(np.arange(first, first + n, dtype=np.int64), codes.counts))
    commit(store, *actions, Seal("codes", name, 0, len(actions), n_rows, ()))
    _add_postings(store, name, n_latents, *map(np.concatenate, (latents, rows, values)))


def _add_postings(
    store: Store, name: str, n_latents: int, latents: np.ndarray, rows: np.ndarray, values: np.ndarray
) -> None:
    counts = np.concatenate([[0], np.cumsum(np.bincount(latents, minlength=n_latents))])
    # Segments of about 16 million postings.
    wanted = np.arange(0, len(latents), 1 << 24)
    cuts = sorted({0, n_latents, *np.searchsorted(counts, wanted[1:]).tolist()})
    config = {"format": 1, "codes": name, "codes_fingerprint": fingerprint(store, "codes", name), "n_latents": n_latents,
              "boundaries": cuts}  # fmt: skip
    commit(store, Create("postings", name, config, {}))
    mark, attempt, actions = fingerprint(store, "postings", name), uuid.uuid4().hex, []
    for unit, (first, stop) in enumerate(itertools.pairwise(cuts)):
        mine = np.flatnonzero((latents >= first) & (latents < stop))
        data, meta = encode_segment(first, stop - first, latents[mine], rows[mine], values[mine])
        obj = write(store, f"postings/{name}/{unit:06}-{attempt}.bin", data)
        actions.append(Add("postings", name, 0, mark, unit, len(mine), 0, attempt, (obj,), meta))
    commit(store, *actions, Seal("postings", name, 0, len(actions), len(latents), ()))


def time_warm(url: str, *, n: int = 200, **options: object) -> list[float]:
    """Return the milliseconds of `n` questions, each about another latent, after 50 about others."""
    run = actstore.open(url).run("run")
    counts = run.codes("sae").postings().counts()
    alive = np.flatnonzero(counts >= 20)
    asked = np.random.default_rng(0).permutation(alive)[: n + 50].tolist()
    times = []
    for latent in asked:
        start = time.perf_counter()
        answer = run.examples(actstore.latent("sae", latent), 20, **options)
        times.append((time.perf_counter() - start) * 1e3)
        if len(answer) != 20 and not options:
            raise RuntimeError(f"latent {latent} fires on {counts[latent]} rows and gave {len(answer)}")
    return times[50:]


_COLD = """
import sys, time
import actstore, actstore.query.examples
start = time.perf_counter()
answer = actstore.open(sys.argv[1]).run("run").examples(actstore.latent("sae", int(sys.argv[2])), 20)
assert len(answer) == 20
print((time.perf_counter() - start) * 1e3)
"""


def time_cold(url: str, latents: list[int]) -> list[float]:
    """Return the milliseconds of one question in a process of its own: opening the store included, imports not."""
    times = []
    for latent in latents:
        done = subprocess.run(
            [sys.executable, "-c", _COLD, url, str(latent)], capture_output=True, text=True, check=True
        )
        times.append(float(done.stdout))
    return times


def count_requests(n_tokens: int = 250_000, rows_per_unit: int = 8192) -> tuple[int, list[int]]:
    """Return the S3 requests of a first question, in a process that knows nothing, and of later ones about other latents."""
    with S3Server() as s3, tempfile.TemporaryDirectory() as cache:
        url = f"s3://{s3.make_bucket()}/bench.store"
        build(url, n_tokens=n_tokens, rows_per_unit=rows_per_unit, storage_options=s3.storage_options)
        with FaultyProxy(s3.endpoint_url) as proxy:
            options = {**s3.storage_options, "endpoint_url": proxy.endpoint_url}
            run = actstore.open(url, storage_options=options, cache_dir=cache).run("run")
            proxy.clear()
            seen = []
            for latent in range(200, 240):
                run.examples(actstore.latent("sae", latent), 20)
                seen.append(len(proxy.requests))
                proxy.clear()
    return seen[0], seen[10:]


def run(n_tokens: int = 200_000) -> list[tuple[str, float, str, str]]:
    """Return rows of (name, value, unit, note)."""
    found: list[tuple[str, float, str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        url = str(Path(folder) / "bench.store")
        build(url, n_tokens=n_tokens)
        note = f"{n_tokens:,} tokens x 32 codes of 16,384; latents not asked before"
        for name, options in (
            ("top 20", {}),
            ("top 20, not folded, no masks", {"fold": None, "mask_special": False, "mask_sinks": False}),
            (
                "8 bands",
                {"bands": bands.top(5) + bands.rank(5, 3) + bands.random(5) + bands.nonactivating(5)},
            ),
        ):
            times = time_warm(url, **options)
            found.append((f"{name}, warm, median", statistics.median(times), "ms", note))
            found.append((f"{name}, warm, 95 %", float(np.quantile(times, 0.95)), "ms", note))
        cold = time_cold(url, list(range(300, 305)))
        found.append(("top 20, new process", statistics.median(cold), "ms", "opening included, imports not"))
    first, later = count_requests()
    found.append(
        ("requests, first question", first, "", "250,000 tokens in 31 units over S3, nothing cached")
    )
    found.append(
        ("requests, later questions", statistics.mean(later), "", f"other latents; at most {max(later)}")
    )
    return found


if __name__ == "__main__":
    for name, value, unit, note in run(*map(int, sys.argv[1:])):
        print(f"{name:32} {value:10.2f} {unit:3} {note}")
