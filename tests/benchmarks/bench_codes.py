"""How many bytes does a code take, token-major and latent-major, and how fast are a latent's strongest rows found?

Against the layout in which others publish such codes, a DuckDB file with the tables `tokens(sequence_id, token_idx, token,
decoded_token)` and `activations(feature_id, sequence_id, token_idx, strength)` (Goodfire's dump of DeepSeek R1's features),
given in the order that suits it best: by feature and falling strength. Both hold the same numbers, 32 of 16,384 latents at
each token with densities from 10 % to 0.05 % that fall like a power of the rank, and float16 values.

    python -m tests.benchmarks.bench_codes [N_TOKENS]

Latencies are medians over latents: the most frequent ones, those in the middle and the rarest. *Warm* is a process that read
the directory, and asks for latents it never asked for; *cold* is a new process, its imports not counted.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from actstore.log.values import Collection, Seal, StoredObject, Unit
from actstore.postings import Postings
from actstore.sparse import SparseRows, UnitCodes, encode_grouped, encode_unit
from actstore.sparse.order import group_postings
from actstore.sparse.parts import clear_caches
from actstore.storage import open_storage, write_new

Row = tuple[str, float, str, str]

N_TOKENS, N_LATENTS, PER_ROW = 262_144, 16_384, 32
DENSITY_LOW, DENSITY_HIGH = 0.0005, 0.1
ROWS_PER_UNIT, LATENTS_PER_SEGMENT, WINDOW = 65_536, 4096, 128
LATENTS_EACH = 15
"""Latents of each kind that are asked for."""

ATTEMPT = "0" * 32


def densities() -> np.ndarray:
    """Return the share of tokens on which each latent fires, most frequent first; they add up to `PER_ROW`."""
    ranks = np.arange(1, N_LATENTS + 1)
    low, high = 0.01, 3.0
    for _ in range(60):
        power = (low + high) / 2
        shares = np.maximum(DENSITY_HIGH * ranks**-power, DENSITY_LOW)
        low, high = (power, high) if shares.sum() > PER_ROW else (low, power)
    return shares


def make_unit(rng: np.random.Generator, n_rows: int, latents: np.ndarray, scales: np.ndarray) -> SparseRows:
    """Return the codes of a unit: `PER_ROW` distinct latents at each row, exponential values with a scale for each latent.

    Args:
        rng: Source of randomness.
        n_rows: Rows wanted.
        latents: A long list of latents, each as often as it is likely.
        scales: Of the latents' values.
    """
    drawn = np.sort(latents[rng.integers(0, len(latents), (n_rows, PER_ROW + 24))], axis=1)
    key = rng.random(drawn.shape, np.float32)
    key[:, 1:][drawn[:, 1:] == drawn[:, :-1]] = 2
    chosen = np.argpartition(key, PER_ROW, axis=1)[:, :PER_ROW]
    found = np.sort(np.take_along_axis(drawn, chosen, axis=1), axis=1).reshape(-1).astype(np.uint32)
    values = np.maximum(rng.exponential(1, found.shape) * scales[found], 1e-3).astype(np.float16)
    return SparseRows(np.arange(n_rows + 1) * PER_ROW, found, values, N_LATENTS)


def build(folder: Path, n_tokens: int) -> Iterator[Row]:
    """Store random codes both ways and in a DuckDB file, and yield what that took."""
    rng = np.random.default_rng(0)
    shares = rng.permutation(densities())
    cdf = np.cumsum(-np.log1p(-shares))
    likely = np.searchsorted(cdf / cdf[-1], (np.arange(1 << 20) + 0.5) / (1 << 20)).astype(np.uint32)
    scales = np.exp(rng.normal(0, 0.5, N_LATENTS))
    storage = open_storage(str(folder / "store"), create=True)
    units, encode_s, decode_s, nbytes = [], 0.0, 0.0, 0
    for unit, start in enumerate(range(0, n_tokens, ROWS_PER_UNIT)):
        rows = make_unit(rng, min(ROWS_PER_UNIT, n_tokens - start), likely, scales)
        begin = time.thread_time()
        data, meta = encode_unit(rows)
        encode_s += time.thread_time() - begin
        obj = write_new(storage, f"codes/c/units/{unit:08}-{ATTEMPT}.bin", [data])
        nbytes += obj.nbytes
        begin = time.thread_time()
        found = [page for _, page in UnitCodes(storage, obj, meta).scan()]
        decode_s += time.thread_time() - begin
        assert all((a == b).all() for a, b in ((SparseRows.concat(found).latents, rows.latents),))
        units.append(rows)
    codes = SparseRows.concat(units)
    yield "codes, bytes each", nbytes / codes.nnz, "bytes", f"{codes.nnz:,} codes; goal 3.2"
    yield "codes, encoding on one core", codes.nnz / encode_s / 1e6, "M/s", "checks, packs, sums; goal 50"
    yield (
        "codes, reading on one core",
        codes.nnz / decode_s / 1e6,
        "M/s",
        "warm page cache; reads, verifies, unpacks",
    )
    yield from _build_postings(folder, storage, codes, nbytes)


def _build_postings(folder: Path, storage: object, codes: SparseRows, codes_nbytes: int) -> Iterator[Row]:
    begin = time.thread_time()
    indptr, rows, values = group_postings(codes.latents, codes.row_numbers(), codes.values, N_LATENTS)
    group_s, begin, entries = time.thread_time() - begin, time.thread_time(), []
    for first in range(0, N_LATENTS, LATENTS_PER_SEGMENT):
        bounds = indptr[first : first + LATENTS_PER_SEGMENT + 1]
        here = slice(bounds[0], bounds[-1])
        data, meta = encode_grouped(first, bounds - bounds[0], rows[here], values[here])
        obj = write_new(storage, f"postings/c/{len(entries):06}-{ATTEMPT}.bin", [data])
        entries.append([obj.key, obj.nbytes, obj.sha256, meta])
    encode_s = time.thread_time() - begin
    (folder / "postings.json").write_text(json.dumps(entries))
    nbytes = sum(entry[1] for entry in entries)
    yield "postings, bytes each", nbytes / codes.nnz, "bytes", "goal 3.2"
    note = f"and {codes.nnz / group_s / 1e6:.0f} M/s to bring them in the order of latents"
    yield "postings, encoding on one core", codes.nnz / encode_s / 1e6, "M/s", note
    table_nbytes = _build_duckdb(folder / "codes.duckdb", indptr, rows, values)
    for name, ours in (("codes", codes_nbytes), ("postings", nbytes)):
        note = f"of DuckDB's table: {table_nbytes / 1e6:,.0f} MB, {table_nbytes / codes.nnz:.2f} bytes each; goal 0.5"
        yield f"{name}, size", ours / table_nbytes, "x", note


def _build_duckdb(path: Path, indptr: np.ndarray, rows: np.ndarray, values: np.ndarray) -> int:
    """Write the published layout, and return how many bytes `activations` takes in it."""
    counts = np.diff(indptr)
    with duckdb.connect(str(path)) as db:
        db.execute("SET threads = 1")
        n_tokens = int(rows.max()) + 1
        db.execute(
            "CREATE TABLE tokens AS SELECT (i // ?)::INTEGER AS sequence_id, (i % ?)::INTEGER AS token_idx, "
            "(hash(i) % 50257)::INTEGER AS token, 'w' || (hash(i) % 50257) AS decoded_token FROM range(?) t(i)",
            [WINDOW, WINDOW, n_tokens],
        )
        db.execute("CHECKPOINT")
        before = path.stat().st_size
        db.execute(
            "CREATE TABLE activations(feature_id INTEGER, sequence_id INTEGER, token_idx INTEGER, strength FLOAT)"
        )
        step = max(1, N_LATENTS // 32)
        for first in range(0, N_LATENTS, step):
            here = slice(indptr[first], indptr[min(first + step, N_LATENTS)])
            feature = np.repeat(np.arange(first, first + step), counts[first : first + step])
            order = np.lexsort((rows[here], -values[here].astype(np.float32), feature))
            found = rows[here][order]
            table = pa.table(
                {
                    "feature_id": feature[order].astype(np.int32),
                    "sequence_id": (found // WINDOW).astype(np.int32),
                    "token_idx": (found % WINDOW).astype(np.int32),
                    "strength": values[here][order].astype(np.float32),
                }
            )
            db.register("part", table)
            db.execute("INSERT INTO activations SELECT * FROM part")
            db.unregister("part")
        db.execute("CHECKPOINT")
    return path.stat().st_size - before


def open_postings(folder: Path) -> Postings:
    """Return the postings in a folder as a store's reader would have them from the manifest."""
    units = {}
    for number, (key, nbytes, sha256, meta) in enumerate(json.loads((folder / "postings.json").read_text())):
        units[number] = Unit(number, meta["nnz"], 0, ATTEMPT, (StoredObject(key, nbytes, sha256),), meta, 1)
    bounds = list(range(0, N_LATENTS + 1, LATENTS_PER_SEGMENT))
    seal = Seal("postings", "c", 0, len(units), 0, ())
    config = {"boundaries": bounds}
    collection = Collection("postings", "c", config, "", {}, 1, units=units, seal=seal)
    return Postings(open_storage(str(folder / "store")), collection)


def top_of(folder: Path, side: str) -> Callable[[int], list[float]]:
    """Return a call that gives the values of a latent's 20 strongest postings, with their rows read too."""
    if side == "ours":
        postings = open_postings(folder)
        return lambda latent: postings.top(latent, 20)[1].tolist()
    db = duckdb.connect(str(folder / "codes.duckdb"), read_only=True)
    query = "SELECT sequence_id, token_idx, strength FROM activations WHERE feature_id = ? ORDER BY strength DESC LIMIT 20"
    return lambda latent: [row[2] for row in db.execute(query, [latent]).fetchall()]


def cold(folder: Path, side: str, latent: int) -> float:
    """Print how long opening and one question take."""
    begin = time.perf_counter()
    top_of(folder, side)(latent)
    return time.perf_counter() - begin


def measure(folder: Path) -> Iterator[Row]:
    """Yield the latencies of both sides."""
    counts = open_postings(folder).counts()
    order = np.argsort(-counts)
    # Apart from each other, so that no page has two of them.
    middle, apart = len(order) // 2, len(order) // (4 * LATENTS_EACH)
    picks = {
        "head": order[: 4 * LATENTS_EACH : 4],
        "mid": order[middle : middle + apart * LATENTS_EACH : apart],
        "tail": order[-apart * LATENTS_EACH :: apart],
    }
    ours, theirs = top_of(folder, "ours"), top_of(folder, "theirs")
    for name, latents in picks.items():
        assert all(ours(int(latent)) == theirs(int(latent)) for latent in latents[:3])
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        clear_caches()
        open_postings(folder).counts()
        for latent in latents.tolist():
            for side, top in (("ours", ours), ("theirs", theirs)):
                begin = time.perf_counter()
                top(latent)
                times[side].append(time.perf_counter() - begin)
        mine, other = (statistics.median(times[side]) * 1e3 for side in ("ours", "theirs"))
        yield (
            f"top-20 of a {name} latent, warm",
            mine,
            "ms",
            f"DuckDB {other:.1f} ms; {int(counts[latents].mean()):,} postings",
        )
    for name, latents in picks.items():
        mine, other = (
            statistics.median(_cold_ms(folder, side, int(latent)) for latent in latents[:3])
            for side in ("ours", "theirs")
        )
        yield f"top-20 of a {name} latent, cold process", mine, "ms", f"DuckDB {other:.1f} ms"
    postings = open_postings(folder)
    begin = time.perf_counter()
    rows, _ = postings.latent(int(order[0]))
    note = f"of the most frequent latent, {len(rows):,}"
    yield "all postings, ascending by row", (time.perf_counter() - begin) * 1e3, "ms", note


def _cold_ms(folder: Path, side: str, latent: int) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.bench_codes", "--cold", str(folder), side, str(latent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout) * 1e3


def run(n_tokens: int = N_TOKENS) -> Iterator[Row]:
    """Yield what was measured, the figure, its unit, and what it is measured against."""
    with tempfile.TemporaryDirectory() as tmp:
        yield from build(Path(tmp), n_tokens)
        yield from measure(Path(tmp))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cold"]:
        print(cold(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
        sys.exit()
    for name, figure, unit, note in run(*(int(n) for n in sys.argv[1:])):
        print(f"{name:40} {figure:8.3g} {unit:6} {note}", flush=True)
