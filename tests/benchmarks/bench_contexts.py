"""How long do the twenty strongest contexts of a latent take, beside DuckDB on the layout in which others publish codes?

The layout is that of Goodfire's dump of DeepSeek R1's features: `tokens(sequence_id, token_idx, token, decoded_token)` and
`activations(feature_id, sequence_id, token_idx, strength)`, here with a sequence for every model window. It is given in the order
of a harvest, as it comes to be, and, stricter, sorted by feature and falling strength. Both sides hold the same numbers, those of
`bench_latents.build`, and both give 16 tokens before and 8 after each of the twenty, as text; ours also masks special tokens and
attention sinks, folds near-duplicates, cuts the window out of the document's text and gives the value on every token shown.

    python -m tests.benchmarks.bench_contexts [N_TOKENS]

*Cold* is a new process: opening and one question, imports not counted. *Warm* is a process that was asked about others before.
"""

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

import actstore
from tests.benchmarks.bench_latents import build

Row = tuple[str, float, str, str]

N_TOKENS = 2_000_000
K, BEFORE, AFTER = 20, 16, 8
WARM_UP, EACH_WARM, EACH_COLD = 60, 20, 5
"""Latents of each kind asked about in a process, before and while time is taken, and in processes of their own."""

SORT_MEMORY = "4GB"

SIDES = {"harvest order": "harvest.duckdb", "sorted": "sorted.duckdb"}

QUERY = f"""
WITH top AS (
    SELECT sequence_id, token_idx, strength FROM activations WHERE feature_id = ? ORDER BY strength DESC LIMIT {K}
)
SELECT top.sequence_id, top.token_idx, any_value(top.strength) AS strength,
    list(t.decoded_token ORDER BY t.token_idx) AS tokens
FROM top JOIN tokens t
ON t.sequence_id = top.sequence_id AND t.token_idx BETWEEN top.token_idx - {BEFORE} AND top.token_idx + {AFTER}
GROUP BY 1, 2 ORDER BY any_value(top.strength) DESC
"""

Answer = list[tuple[float, list[str]]]
"""Value and tokens shown of each context."""


def build_duckdb(url: str, folder: Path) -> int:
    """Write the published layout of a store's run in both orders, and return its number of activations."""
    run = actstore.open(url).run("run")
    tokenization = run.tokenization
    tables = [tokenization.unit_table(u.unit, ["token_id", "window_position"]) for u in tokenization.units]
    tokens = pa.concat_tables(tables)
    place = tokens["window_position"].to_numpy()
    sequence = (np.cumsum(place == 0) - 1).astype(np.int32)
    words = tokenization.vocabulary()["token"]
    harvest = folder / SIDES["harvest order"]
    n_postings = 0
    with duckdb.connect(str(harvest)) as db:
        table = pa.table({"sequence_id": sequence, "token_idx": place, "token": tokens["token_id"],
                          "decoded_token": words.take(tokens["token_id"])})  # fmt: skip
        db.register("part", table)
        db.execute("CREATE TABLE tokens AS SELECT * FROM part")
        db.unregister("part")
        db.execute(
            "CREATE TABLE activations(feature_id INTEGER, sequence_id INTEGER, token_idx INTEGER, strength FLOAT)"
        )
        for rows, codes in run.codes("sae").scan():
            at = np.repeat(rows, codes.counts)
            part = pa.table({"feature_id": codes.latents.astype(np.int32), "sequence_id": sequence[at],
                             "token_idx": place[at], "strength": codes.values.astype(np.float32)})  # fmt: skip
            db.register("part", part)
            db.execute("INSERT INTO activations SELECT * FROM part")
            db.unregister("part")
            n_postings += len(at)
    with duckdb.connect(str(folder / SIDES["sorted"])) as db:
        db.execute(f"SET memory_limit = '{SORT_MEMORY}'")
        db.execute(f"ATTACH '{harvest}' AS harvest (READ_ONLY)")
        db.execute("CREATE TABLE tokens AS SELECT * FROM harvest.tokens ORDER BY sequence_id, token_idx")
        db.execute(
            "CREATE TABLE activations AS SELECT * FROM harvest.activations ORDER BY feature_id, strength DESC"
        )
    return n_postings


def ask_ours(place: str, **options: object) -> Callable[[int], pa.Table]:
    """Return what gives the contexts of a latent of a store."""
    run = actstore.open(place).run("run")
    return lambda latent: (
        run.examples(actstore.latent("sae", latent), K, before=BEFORE, after=AFTER, **options).table
    )


def ask_duckdb(place: str) -> Callable[[int], pa.Table]:
    """Return what gives the contexts of a latent from the published layout."""
    db = duckdb.connect(place, read_only=True)
    return lambda latent: db.sql(QUERY, params=[latent]).to_arrow_table()


def contexts_of(table: pa.Table) -> Answer:
    """Return an answer of either side in plain values."""
    if "context" in table.column_names:
        return [(row["value"], row["context"]["tokens"]) for row in table.to_pylist()]
    return list(zip(table["strength"].to_pylist(), table["tokens"].to_pylist(), strict=True))


def cold(side: str, place: str, latent: int) -> float:
    """Return the seconds that opening and one question take in this process."""
    begin = time.perf_counter()
    answer = (ask_ours if side == "ours" else ask_duckdb)(place)(latent)
    seconds = time.perf_counter() - begin
    if len(answer) != K:
        raise RuntimeError(f"latent {latent}: {len(answer)} contexts")
    return seconds


def pick(counts: np.ndarray) -> dict[str, list[int]]:
    """Return latents of three kinds, in a random order: the most frequent, those in the middle, the rarest with enough rows."""
    alive = np.flatnonzero(counts >= 2 * K)
    order = alive[np.argsort(-counts[alive], kind="stable")]
    n = WARM_UP // 3 + EACH_WARM + EACH_COLD
    middle = len(order) // 2
    kinds = {"frequent": order[:n], "middling": order[middle : middle + n], "rare": order[-n:]}
    return {kind: np.random.default_rng(0).permutation(some).tolist() for kind, some in kinds.items()}


def check_same(asks: dict[str, Callable[[int], pa.Table]], latents: list[int]) -> None:
    """Check that all sides give the same values, and the same tokens around a value that only one row has.

    Raises:
        RuntimeError: they do not.
    """
    for latent in latents:
        wanted = contexts_of(asks["ours"](latent))
        for side, ask in asks.items():
            found = contexts_of(ask(latent))
            values = [value for value, _ in wanted]
            same = [value for value, _ in found] == values and len(values) == K
            # Rows of equal values come in any order from DuckDB, and of those of the smallest any may be left out.
            alone = {value for value in values[:-1] if values.count(value) == 1 and value > values[-1]}
            if not same or [c for c in found if c[0] in alone] != [c for c in wanted if c[0] in alone]:
                raise RuntimeError(f"latent {latent}: {side} gives {found}, ours is {wanted}")


def measure(url: str, folder: Path) -> Iterator[Row]:
    """Yield the times of ours for each kind of latent, beside those of DuckDB in both orders."""
    counts = actstore.open(url).run("run").codes("sae").postings().counts()
    kinds = pick(counts)
    places = {"ours": url, **{side: str(folder / name) for side, name in SIDES.items()}}
    asks = {side: ask_duckdb(place) for side, place in places.items() if side != "ours"}
    plain = {"fold": None, "mask_special": False, "mask_sinks": False}
    check_same(
        {"ours": ask_ours(url, **plain)} | asks, [latent for some in kinds.values() for latent in some[:3]]
    )
    for kind, latents in kinds.items():
        times: dict[str, list[float]] = {side: [] for side in places}
        for latent in latents[:EACH_COLD]:
            for side, place in places.items():
                times[side].append(_cold_ms(side, place, latent))
        yield from _rows(f"top {K} of a {kind} latent, new process", times, counts[latents])
    asks["ours"] = ask_ours(url)
    for latents in kinds.values():
        for latent in latents[EACH_COLD : EACH_COLD + WARM_UP // 3]:
            for side in places:
                asks[side](latent)
    for kind, latents in kinds.items():
        times = {side: [] for side in places}
        for latent in latents[-EACH_WARM:]:
            for side in places:
                begin = time.perf_counter()
                asks[side](latent)
                times[side].append((time.perf_counter() - begin) * 1e3)
        yield from _rows(f"top {K} of a {kind} latent, warm", times, counts[latents])


def _rows(name: str, times: dict[str, list[float]], counts: np.ndarray) -> Iterator[Row]:
    found = {side: statistics.median(some) for side, some in times.items()}
    yield name, found["ours"], "ms", f"fires on {int(np.median(counts)):,} rows"
    for side in SIDES:
        yield f"{name}, DuckDB {side}", found[side] / found["ours"], "x", f"{found[side]:.1f} ms"


def _cold_ms(side: str, place: str, latent: int) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.bench_contexts", "--cold", side, place, str(latent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout) * 1e3


def run(n_tokens: int = N_TOKENS) -> Iterator[Row]:
    """Yield what was measured, the figure, its unit, and a note."""
    with tempfile.TemporaryDirectory() as tmp:
        url = str(Path(tmp) / "bench.store")
        build(url, n_tokens=n_tokens)
        build_duckdb(url, Path(tmp))
        yield from measure(url, Path(tmp))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cold"]:
        print(cold(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        sys.exit()
    for name, figure, unit, note in run(*map(int, sys.argv[1:])):
        print(f"{name:60} {figure:9.2f} {unit:3} {note}", flush=True)
