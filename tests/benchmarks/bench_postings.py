"""What do postings and statistics of latents cost to build, and how fast are the statistics of all latents read?

A store of random codes (`bench_latents`: 32 of 16,384 latents at each token, densities like 1/rank up to 10 %) is built into
postings and statistics in a process of its own, whose peak memory is compared with the budget that it was given. The
statistics of all latents, read from their table, are compared with the same computed by DuckDB from a table
`activations(feature_id, sequence_id, token_idx, strength)`, the layout that others publish such codes in.

    python -m tests.benchmarks.bench_postings [N_TOKENS]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import actstore
from actstore.codes import codes_id
from actstore.dictionary import make_dictionary
from actstore.ingest.dictionaries.save import save_dictionary
from actstore.log.values import Add, Create, Seal
from actstore.sparse import encode_unit
from actstore.store import Store
from tests.benchmarks import bench_latents
from tests.query.make_store import commit, fingerprint, write

N_LATENTS, PER_ROW, ROWS_PER_UNIT = 16_384, 32, 65_536
MEMORY_BYTES = 1 << 30

_BUILD = """
import json, sys, time
import actstore
from actstore.ingest.encoding import postings_job
def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))
store = actstore.open(sys.argv[1])
before = memory("VmRSS")
start, cpu = time.perf_counter(), time.process_time()
report = postings_job.build_postings(store, sys.argv[2], memory_bytes=int(sys.argv[3]))
assert report.is_complete
print(json.dumps({
    "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "peak": memory("VmHWM") - before,
    "units": report.n_units, "postings": report.n_postings, "nbytes": report.nbytes,
}))
"""

_DUCKDB = """
SELECT feature_id, count(*) AS n_tokens, count(DISTINCT sequence_id) AS n_docs, avg(strength) AS mean, max(strength) AS max,
       sum(strength) AS sum, quantile_cont(strength, [0.5, 0.9, 0.95, 0.99, 0.999]) AS quantiles
FROM activations GROUP BY feature_id ORDER BY feature_id
"""
COLUMNS = ["latent", "n_tokens", "n_docs", "mean", "max", "sum", "quantiles"]


def build_store(url: str, n_tokens: int) -> str:
    """Make a store with complete codes and no postings; return the id of the codes."""
    store = actstore.open(url, create=True)
    rng = np.random.default_rng(n_tokens)
    lengths = rng.integers(64, 1025, n_tokens // 544 + 1)
    doc_of = np.repeat(np.arange(len(lengths)), lengths)
    tokens = rng.zipf(1.2, len(doc_of)) % bench_latents.VOCABULARY
    bench_latents._add_corpus(store, tokens, lengths)
    n_rows = bench_latents._add_tokenization(store, tokens, doc_of, lengths, ROWS_PER_UNIT)
    bench_latents._add_run(store, n_rows, ROWS_PER_UNIT)
    weights = {"W_enc": rng.standard_normal((8, N_LATENTS)), "W_dec": rng.standard_normal((N_LATENTS, 8))}
    save_dictionary(
        store, "sae", make_dictionary(weights, activation="topk", k=PER_ROW, hook_point=bench_latents.H)
    )
    return add_codes(store, n_rows)


def add_codes(store: Store, n_rows: int) -> str:
    """Store random codes of all rows."""
    name, run = codes_id("sae", "run"), store.run("run")
    config = {
        "format": 1, "dictionary": "sae", "dictionary_fingerprint": store.dictionary("sae").fingerprint, "run": "run",
        "run_fingerprint": run.collection.fingerprint, "tokenization": "docs.t", "hook_point": bench_latents.H,
        "n_latents": N_LATENTS, "value_dtype": "float16", "rows_per_unit": ROWS_PER_UNIT, "pool_top_m": None,
        "pool_special": False, "encoder": {"compute_dtype": "float32", "rows_dtype": "float16"},
    }  # fmt: skip
    commit(store, Create("codes", name, config, {}))
    mark, attempt, actions = fingerprint(store, "codes", name), uuid.uuid4().hex, []
    for unit, first in enumerate(range(0, n_rows, ROWS_PER_UNIT)):
        n = min(ROWS_PER_UNIT, n_rows - first)
        codes = bench_latents.random_rows(n, N_LATENTS, PER_ROW, seed=unit)
        data, meta = encode_unit(codes, np.ones(n, np.float32))
        obj = write(store, f"codes/{name}/units/{unit:08}-{attempt}.bin", data)
        actions.append(Add("codes", name, 0, mark, unit, n, 0, attempt, (obj,), meta))
    commit(store, *actions, Seal("codes", name, 0, len(actions), n_rows, ()))
    return name


def built(url: str, codes: str, memory_bytes: int = MEMORY_BYTES) -> dict[str, float]:
    """Build the postings in a process of its own; return what it took."""
    command = [sys.executable, "-c", _BUILD, url, codes, str(memory_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def duckdb_tables(path: Path, store: Store) -> duckdb.DuckDBPyConnection:
    """Write all codes into a DuckDB file of the published layout."""
    codes = store.run("run").codes("sae")
    tokenization = store.run("run").tokenization
    connection = duckdb.connect(str(path))
    connection.execute(
        "CREATE TABLE activations(feature_id INTEGER, sequence_id INTEGER, token_idx INTEGER, strength FLOAT)"
    )
    for unit in tokenization.units:
        tokens = tokenization.unit_table(unit.unit, ["doc_id", "position"])
        part = codes.unit(unit.unit).slice(0, unit.rows)
        at = part.row_numbers()
        table = pa.table({
            "feature_id": part.latents.astype(np.int32), "sequence_id": tokens["doc_id"].to_numpy()[at].astype(np.int32),
            "token_idx": tokens["position"].to_numpy()[at], "strength": part.values.astype(np.float32),
        })  # fmt: skip
        connection.register("part_of_unit", table)
        connection.execute("INSERT INTO activations SELECT * FROM part_of_unit")
    return connection


def compare_reading(url: str, folder: Path, *, rounds: int = 5) -> tuple[float, float, float]:
    """Return seconds of the first read of all statistics, of later ones (median), and of DuckDB computing them (median)."""
    store = actstore.open(url)
    connection = duckdb_tables(folder / "codes.duckdb", store)
    codes = actstore.open(url).run("run").codes("sae")
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        ours = codes.stats(columns=COLUMNS)
        times.append(time.perf_counter() - start)
    theirs = []
    for _ in range(rounds):
        start = time.perf_counter()
        table = connection.sql(_DUCKDB).to_arrow_table()
        theirs.append(time.perf_counter() - start)
    alive = ours.filter(pc.greater(ours["n_tokens"], 0))
    for mine, other in zip(COLUMNS[:3], ("feature_id", "n_tokens", "n_docs"), strict=True):
        if alive[mine].to_pylist() != table[other].to_pylist():
            raise RuntimeError(f"{mine} differs from DuckDB's")
    quantiles = (np.array(t["quantiles"].to_pylist(), np.float64) for t in (alive, table))
    np.testing.assert_allclose(*quantiles, rtol=1e-6)
    return times[0], statistics.median(times[1:]), statistics.median(theirs)


def run(n_tokens: int = 200_000) -> Iterator[tuple[str, float, str, str]]:
    """Yield rows of (name, value, unit, note)."""
    with tempfile.TemporaryDirectory() as folder:
        url = str(Path(folder) / "bench.store")
        codes = build_store(url, n_tokens)
        took = built(url, codes)
        note = f"{took['postings']:,} postings of {N_LATENTS:,} latents in {took['units']} ranges, {took['cpu']:.1f} s of CPU"
        yield "building postings and statistics", took["seconds"], "s", note
        budget = MEMORY_BYTES / 2**20
        yield (
            "peak memory of building",
            took["peak"] / 2**20,
            "MiB",
            f"above the process before; budget {budget:.0f} MiB",
        )
        yield "bytes per posting", took["nbytes"] / took["postings"], "", "statistics included"
        first, later, theirs = compare_reading(url, Path(folder))
        yield (
            "all statistics, first read",
            theirs / first,
            "x",
            f"{first * 1e3:.0f} ms; DuckDB computes them in {theirs:.2f} s",
        )
        yield "all statistics, later reads", theirs / later, "x", f"{later * 1e3:.0f} ms"


if __name__ == "__main__":
    for name, value, unit, note in run(*map(int, sys.argv[1:])):
        print(f"{name:36} {value:10.2f} {unit:3} {note}", flush=True)
