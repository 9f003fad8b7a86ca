"""How does an ingest that keeps codes compare with delphi's LatentCache on the same model, tokens, dictionary, layer and batch?

`make bench-delphi` builds the peer's virtual environment (build/peers/delphi) and runs this. Each side runs in a process of
its own, in turn, after a first round that warms up; times leave out imports, model loading and, on our side, tokenizing. Ours
end when run and codes are sealed, and a second figure has postings and statistics of latents too, of which delphi has none;
delphi's end when `save_splits` has written. delphi computes the whole model whatever the hook point, ours stops behind it, so
both are measured at the second and at the last layer, where both compute all of them. All codes of both sides are compared.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.bench_saelens import (
    BATCH_ROWS,
    CONTEXT,
    D_MODEL,
    N_LAYERS,
    N_WINDOWS,
    ROUNDS,
    ROWS_PER_UNIT,
    make_inputs,
    make_store,
)

PEER = Path("build/peers/delphi/bin/python")
LAYERS = (1, N_LAYERS - 1)
N_LATENTS, K = 2_048, 32
SEED = 1
"""Of the dictionary's weights, which are normal with the standard deviation 1 / sqrt(D_MODEL)."""

TIE = 2e-3
"""Two float16 steps, relative: values further apart than that are different values, and latents no tie."""

Row = tuple[str, str, str]


def make_dictionaries(folder: Path) -> None:
    """Write one random encoder for the peer, and store it as a dictionary of each layer."""
    import actstore
    from actstore.dictionary import make_dictionary
    from actstore.ingest.dictionaries.save import save_dictionary

    drawn_df = np.random.default_rng(SEED).standard_normal((D_MODEL, N_LATENTS))
    encoder_df = (drawn_df / D_MODEL**0.5).astype(np.float32)
    np.save(folder / "encoder.npy", encoder_df)
    store = actstore.open(f"{folder}/store")
    for layer in LAYERS:
        data = make_dictionary(
            {"W_enc": encoder_df, "W_dec": encoder_df.T},
            activation="topk",
            k=K,
            hook_point=f"layers.{layer}.resid_post",
        )
        save_dictionary(store, f"sae{layer}", data)


def peer_command(folder: Path, layer: int, out: Path) -> list[str]:
    """Return the command of one harvest by delphi."""
    script = Path(__file__).parent.absolute() / "peers" / "delphi_harvest.py"
    inputs = [folder / "model", folder / "tokens.npy", folder / "encoder.npy", K]
    return [str(PEER.absolute()), str(script), *map(str, [*inputs, f"layers.{layer}", out, BATCH_ROWS])]


def our_command(folder: Path, run: str, layer: int) -> list[str]:
    """Return the command of one ingest."""
    return [sys.executable, "-m", "tests.benchmarks.bench_delphi", "--child", str(folder), run, str(layer)]


def answer_of(command: list[str]) -> dict[str, Any]:
    """Return what a process says of itself in its last line."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[1:3]} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def child(folder: str, name: str, layer: str) -> None:
    """Ingest and print what it cost: from the moment the units begin until codes, and then postings, are sealed."""
    import actstore
    from actstore.codes import codes_id
    from actstore.ingest import IngestConfig
    from actstore.ingest import run as run_ingest

    store = actstore.open(f"{folder}/store")
    marks: dict[str, tuple[float, int]] = {}

    def notice(line: str) -> None:
        # Codes are sealed, and postings planned, by the time that the latter are announced.
        marks.setdefault(line.split()[0], (time.perf_counter(), peak_mib()))

    config = IngestConfig(
        corpus="words", model=f"{folder}/model", hook_points=[f"layers.{layer}.resid_post"], run=name, dtype="float32",
        keep=("codes",), dictionary=(f"sae{layer}",), window=CONTEXT, batch_tokens=CONTEXT * BATCH_ROWS,
        rows_per_unit=ROWS_PER_UNIT, device="cpu", ray_address=None, commit_interval_s=1.0,
    )  # fmt: skip
    report = run_ingest(store, config, notice=notice)
    ended = time.perf_counter()
    assert report.is_complete
    (began, _), (stored, stored_mib) = marks["computing"], marks["building"]
    found = store.refresh().state
    codes = found.collection("codes", codes_id(f"sae{layer}", name))
    tokenization = store.run(name).tokenization.collection
    print(
        json.dumps(
            {
                "n_tokens": report.n_rows, "redone": report.units_this_job, "n_units": report.n_units,
                "elapsed_s": stored - began, "with_postings_s": ended - began,
                "n_codes": sum(int(unit.meta["nnz"]) for unit in codes.units.values()),
                "codes_nbytes": sum(unit.objects[0].nbytes for unit in codes.units.values()),
                "nbytes": report.nbytes + codes.nbytes + tokenization.nbytes,
                "postings_nbytes": found.collection("postings", codes.id).nbytes,
                "peak_mib": stored_mib, "with_postings_mib": peak_mib(),
                "timings_s": dict(report.timings_s),
            }
        )
    )  # fmt: skip


def peak_mib() -> int:
    """Return the most memory that this program has had so far, in MiB; `getrusage` would count its parent's too."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


@dataclass(frozen=True, slots=True)
class AllCodes:
    """All codes of one side."""

    keys: np.ndarray
    """int64 (nnz,), ascending: token row * N_LATENTS + latent."""
    values: np.ndarray
    """float32 (nnz,)."""

    @classmethod
    def join(cls, keys: list[np.ndarray], values: list[np.ndarray]) -> "AllCodes":
        """Return them in the order of keys."""
        all_keys = np.concatenate(keys)
        order = np.argsort(all_keys)
        return cls(all_keys[order], np.concatenate(values)[order].astype(np.float32))


def read_ours(folder: Path, run: str, layer: int) -> AllCodes:
    """Return the codes that a run stored."""
    import actstore

    keys, values = [], []
    for rows, page in actstore.open(f"{folder}/store").run(run).codes(f"sae{layer}").scan():
        keys.append(rows[page.row_numbers()] * N_LATENTS + page.latents)
        values.append(page.values)
    return AllCodes.join(keys, values)


def read_theirs(out: Path) -> AllCodes:
    """Return the codes in a folder of delphi's, whose locations are (sequence, position, latent of this range)."""
    from safetensors.numpy import load_file

    keys, values = [], []
    for path in sorted(out.rglob("*.safetensors")):
        found = load_file(path)
        sequence, position, latent = found["locations"].astype(np.int64).T
        first = int(path.stem.split("_")[0])
        keys.append((sequence * CONTEXT + position) * N_LATENTS + latent + first)
        values.append(found["activations"])
    return AllCodes.join(keys, values)


def compare(ours: AllCodes, theirs: AllCodes) -> str:
    """Return how far the codes of the two sides agree.

    Raises:
        SystemExit: they are not the codes of the same rows: a value differs, or a latent, by more than rounding explains.
    """
    _, at_ours, at_theirs = np.intersect1d(ours.keys, theirs.keys, assume_unique=True, return_indices=True)
    a, b = ours.values[at_ours], theirs.values[at_theirs]
    difference = np.abs(a - b) / np.maximum(a, b)
    # The rest is of rows in which the sides chose differently: the weaker ones stand against each other.
    alone = [_alone(ours, at_ours), _alone(theirs, at_theirs)]
    (rows, mine), (their_rows, other) = alone
    if not np.array_equal(rows, their_rows):
        raise SystemExit(
            f"rows with latents of one side only: {len(rows):,} codes of ours, {len(their_rows):,}"
        )
    gap = float((np.abs(mine - other) / np.maximum(mine, other)).max(initial=0))
    worst = float(difference.max(initial=0))
    if max(gap, worst) > TIE:
        raise SystemExit(
            f"the codes differ: values by {worst:.2g}, chosen latents by {gap:.2g} of their size"
        )
    return (
        f"values differ by {np.abs(a - b).max(initial=0):.2g} at most ({worst:.2g} of their size), "
        f"{(a != b).sum():,} at all; {len(rows):,} latents swapped in {len(np.unique(rows)):,} of {N_WINDOWS * CONTEXT:,} "
        f"rows, values {gap:.2g} apart at most"
    )


def _alone(codes: AllCodes, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return row and value of the codes that the other side does not have, by row and value."""
    keys, values = np.delete(codes.keys, shared), np.delete(codes.values, shared)
    order = np.lexsort((values, keys // N_LATENTS))
    return keys[order] // N_LATENTS, values[order]


def kill_ours(folder: Path) -> str:
    """Return what an ingest leaves that is killed half way, and what starting it again computes."""
    import actstore

    command = our_command(folder, "killed", LAYERS[0])
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    half = N_WINDOWS * CONTEXT // ROWS_PER_UNIT // 2
    store = actstore.open(f"{folder}/store")
    while process.poll() is None:
        found = store.refresh().state.collections.get(("run", "killed"))
        if found and len(found.units) >= half:
            break
        time.sleep(0.05)
    _kill(process)
    state = store.refresh().state
    n_run = len(state.collection("run", "killed").units)
    n_codes = len(store.run("killed").codes(f"sae{LAYERS[0]}").collection.units)
    again = answer_of(command)
    return f"{n_run} of {again['n_units']} units committed with their codes ({n_codes}), {again['redone']} computed by the rerun"


def kill_theirs(folder: Path) -> str:
    """Return the same of delphi, killed once half of the batches are in its memory."""
    out = folder / "killed"
    command = peer_command(folder, LAYERS[0], out)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "half":
            break
    _kill(process)
    n_files = sum(path.is_file() for path in out.rglob("*"))
    again = answer_of(command)
    return f"delphi: {n_files} files left, {again['n_tokens']:,} of {N_WINDOWS * CONTEXT:,} tokens computed again"


def _kill(process: subprocess.Popen[Any]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def measure(folder: Path) -> Iterator[Row]:
    """Yield the rows of all layers, the sides in turn."""
    ours: dict[int, list[dict[str, Any]]] = {layer: [] for layer in LAYERS}
    theirs: dict[int, list[dict[str, Any]]] = {layer: [] for layer in LAYERS}
    agreement = {}
    for i in range(ROUNDS + 1):
        for layer in LAYERS:
            shutil.rmtree(folder / "peer", ignore_errors=True)
            other = answer_of(peer_command(folder, layer, folder / "peer"))
            mine = answer_of(our_command(folder, f"layer{layer}-{i}", layer))
            assert mine["n_tokens"] == other["n_tokens"] == N_WINDOWS * CONTEXT
            if i:
                ours[layer].append(mine)
                theirs[layer].append(other)
            else:
                agreement[layer] = compare(
                    read_ours(folder, f"layer{layer}-{i}", layer), read_theirs(folder / "peer")
                )
    for layer in LAYERS:
        yield from _rows(layer, ours[layer], theirs[layer])
        n_codes = [f"{side[layer][-1]['n_codes']:,}" for side in (ours, theirs)]
        yield f"the codes of layer {layer}", " against ".join(n_codes), agreement[layer]


def _rows(layer: int, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[Row]:
    """Yield what one layer cost: ratios are medians over rounds of theirs against ours in the same round."""

    def median(side: list[dict[str, Any]], key: str) -> float:
        return statistics.median(one[key] for one in side)

    def ratio(key: str) -> str:
        pairs = zip(ours, theirs, strict=True)
        return f"{statistics.median(other['elapsed_s'] / mine[key] for mine, other in pairs):.2f}x"

    n_tokens, n_codes = N_WINDOWS * CONTEXT, ours[-1]["n_codes"]
    mine, other = (n_tokens / median(side, "elapsed_s") for side in (ours, theirs))
    with_postings = n_tokens / median(ours, "with_postings_s")
    all_layers = (
        "both compute all layers" if layer == N_LAYERS - 1 else f"which computes all {N_LAYERS} layers"
    )
    yield (f"side by side with delphi 0.1.3, codes of layer {layer}", ratio("elapsed_s"),
           f"{mine:,.0f} against {other:,.0f} tokens/s; {all_layers}")  # fmt: skip
    yield (f"the same, with postings and statistics of latents, layer {layer}", ratio("with_postings_s"),
           f"{with_postings:,.0f} tokens/s; delphi has no postings")  # fmt: skip
    save_s = statistics.median(one["elapsed_s"] - one["in_memory_s"] for one in theirs)
    last, other_last = ours[-1], theirs[-1]
    yield (f"bytes per token, layer {layer}", f"{last['nbytes'] / n_tokens:,.0f}",
           f"with tokens, statistics, pooled codes; postings {last['postings_nbytes'] / n_tokens:,.0f} more; against "
           f"{other_last['nbytes'] / n_tokens:,.0f}")  # fmt: skip
    tokens_nbytes = 5 * 8 * n_tokens  # int64, in each of its splits
    yield (f"bytes per code, layer {layer}", f"{last['codes_nbytes'] / n_codes:.2f}",
           f"against {(other_last['nbytes'] - tokens_nbytes) / other_last['n_codes']:.2f}, its tokens left out")  # fmt: skip
    peaks = [one["peak_mib"] for one in theirs]
    yield (f"peak memory of the process, layer {layer}", f"{median(ours, 'peak_mib'):,.0f} MiB",
           f"with postings {median(ours, 'with_postings_mib'):,.0f}; against {min(peaks):,} to {max(peaks):,} MiB from round to "
           f"round, all codes until the end; its save_splits took {save_s:.1f} s")  # fmt: skip


def run() -> Iterator[Row]:
    """Yield (what, figure, note) rows."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        make_inputs(folder)
        make_store(folder)
        make_dictionaries(folder)
        yield from measure(folder)
        yield "killed half way and started again", kill_ours(folder), kill_theirs(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    elif not PEER.exists():
        raise SystemExit(f"{PEER} is missing: make bench-delphi builds it")
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        print("| measured | figure | against |\n|---|---|---|")
        for row in run():
            print("| " + " | ".join(row) + " |", flush=True)
