"""How fast do LanceDB and DuckDB answer the questions of `bench_index`? Runs in the environment build/peers/lancedb.

    python vector_search.py lancedb|duckdb FOLDER

FOLDER holds what `bench_index` wrote: vectors.npy (n, d) float32, meta.parquet (row, service, kind, context), queries.npy
(q, d) and questions.json ({name: {"where": SQL or null, "truth": [rows of each query]}}). Prints one JSON line: for each
question the median and 95 % latency in milliseconds, the recall, and how it was searched. LanceDB: every kind of index below is
built, for each question its probes are raised until the recall is 0.95, and the fastest kind counts.
"""

import functools
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

K, RECALL, TIMED = 20, 0.95, 60
KINDS = ("IVF_SQ", "IVF_PQ", "IVF_RQ")
"""Not IVF_HNSW_SQ: building it took half an hour here."""


class Truth:
    """How much of the true answers was found: rows as near as the K-th true one count, whichever of equal ones they are."""

    def __init__(self, folder, queries):
        self._vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        self._rows = pq.read_table(folder / "meta.parquet", columns=["row"])["row"].to_numpy()
        self._queries = queries

    def _cosines(self, query, rows):
        found = self._vectors[np.searchsorted(self._rows, rows)].astype(np.float64)
        vector = self._queries[query].astype(np.float64)
        return found @ vector / np.linalg.norm(found, axis=1) / np.linalg.norm(vector)

    def recall(self, found, truth):
        """Return the mean over queries; `found` and `truth` are lists of row numbers, of the first queries."""
        shares = []
        for query, (mine, true) in enumerate(zip(found, truth, strict=False)):
            least = self._cosines(query, true).min() - 1e-6
            shares.append((self._cosines(query, mine) >= least).sum() / len(true) if mine else 0.0)
        return float(np.mean(shares))


def timed(ask, queries):
    for query in queries[:5]:
        ask(query)
    times, rows = [], []
    for query in queries[:TIMED]:
        start = time.perf_counter()
        found = ask(query)
        times.append((time.perf_counter() - start) * 1e3)
        rows.append(found["row"].to_pylist())
    return times, rows


def answer(times, recall, how):
    return {
        "median_ms": statistics.median(times),
        "p95_ms": float(np.quantile(times, 0.95)),
        "recall": recall,
        "how": how,
    }


def batches(folder, step=50_000):
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    meta = pq.read_table(folder / "meta.parquet")
    for first in range(0, len(vectors), step):
        flat = pa.array(np.asarray(vectors[first : first + step]).reshape(-1))
        piece = meta.slice(first, step)
        yield piece.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))


def open_lancedb(folder, kind, lists, width):
    """Return the table with an index of a kind, made if it is not there: that takes minutes and is not what is timed."""
    import lancedb

    path, done = folder / f"lance-{kind}", folder / f"lance-{kind}.done"
    if done.exists():
        return lancedb.connect(str(path)).open_table("t")
    shutil.rmtree(path, ignore_errors=True)
    db, table = lancedb.connect(str(path)), None
    for piece in batches(folder):
        if table is None:
            table = db.create_table("t", piece)
        else:
            table.add(piece)
    for column in ("service", "kind"):
        table.create_scalar_index(column, index_type="BITMAP")
    more = {"num_sub_vectors": width // 8} if kind == "IVF_PQ" else {}
    table.create_index(metric="cosine", num_partitions=lists, index_type=kind, **more)
    table.optimize()
    done.write_text("")
    return table


def run_lancedb(folder, queries, questions):
    found = {"questions": {}}
    truth = Truth(folder, queries)
    n_lists = int(len(np.load(folder / "vectors.npy", mmap_mode="r")) ** 0.5)
    for kind in KINDS:
        table = open_lancedb(folder, kind, n_lists, queries.shape[1])
        for name, question in questions.items():
            best = search_lancedb(table, queries, question, truth, kind, n_lists)
            known = found["questions"].get(name)
            if best and (known is None or best["median_ms"] < known["median_ms"]):
                found["questions"][name] = best
    return found


def ask_lancedb(table, where, probes, refine, query):
    builder = table.search(query).distance_type("cosine").limit(K).nprobes(probes).refine_factor(refine)
    if where:
        builder = builder.where(where, prefilter=True)
    return builder.select(["row", "service", "kind", "context"]).to_arrow()


def search_lancedb(table, queries, question, truth, kind, lists):
    for refine in (1, 4) if kind == "IVF_SQ" else (4, 10):
        for probes in (4, 8, 16, 32, 64, 128, 256, lists):
            if probes > lists:
                continue

            ask = functools.partial(ask_lancedb, table, question["where"], probes, refine)
            some = [ask(query)["row"].to_pylist() for query in queries[:30]]
            if truth.recall(some, question["truth"]) >= RECALL:
                times, rows = timed(ask, queries)
                found = truth.recall(rows, question["truth"])
                return answer(times, found, f"{kind}, {probes} of {lists} lists, refine {refine}")
    return None


def ask_duckdb(db, sql, query):
    return db.execute(sql, [query.tolist()]).to_arrow_table()


def run_duckdb(folder, queries, questions):
    import duckdb

    path = folder / "vectors.duckdb"
    path.unlink(missing_ok=True)
    db = duckdb.connect(str(path))
    start = time.perf_counter()
    for first, piece in enumerate(batches(folder)):
        db.register("piece", piece)
        db.execute(
            "CREATE TABLE t AS SELECT * FROM piece" if first == 0 else "INSERT INTO t SELECT * FROM piece"
        )
        db.unregister("piece")
    db.execute("CHECKPOINT")
    found, truth = {"load_s": time.perf_counter() - start, "questions": {}}, Truth(folder, queries)
    for name, question in questions.items():
        where = f"WHERE {question['where']}" if question["where"] else ""
        sql = (
            f"SELECT row, service, kind, context, array_cosine_similarity(vector, ?::FLOAT[{queries.shape[1]}]) AS s "
            f"FROM t {where} ORDER BY s DESC LIMIT {K}"
        )
        ask = functools.partial(ask_duckdb, db, sql)
        times, rows = timed(ask, queries[:25])
        found["questions"][name] = answer(times, truth.recall(rows, question["truth"]), "brute force")
    return found


if __name__ == "__main__":
    side, folder = sys.argv[1], Path(sys.argv[2])
    queries, questions = np.load(folder / "queries.npy"), json.loads((folder / "questions.json").read_text())
    result = {"lancedb": run_lancedb, "duckdb": run_duckdb}[side](folder, queries, questions)
    print(json.dumps(result))
