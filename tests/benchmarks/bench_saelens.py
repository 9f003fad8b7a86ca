"""How does an ingest compare with SAELens' CacheActivationsRunner on the same model, tokens, layer, batch and machine?

`make bench-saelens` builds the peer's virtual environment (build/peers/saelens) and runs this. Each side runs in a process of
its own, in turn, after a first round that warms up; times leave out imports, model loading and, on our side, tokenizing.
SAELens keeps one hook point per run, so four hook points are four of its runs, each stopping at its own layer.
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
from pathlib import Path
from typing import Any

import numpy as np

PEER = Path("build/peers/saelens/bin/python")
CONTEXT, N_WINDOWS, BATCH_ROWS, N_LAYERS, D_MODEL = 128, 2_048, 16, 4, 256
ROUNDS = 3
ROWS_PER_UNIT = 16_384


def make_inputs(folder: Path) -> None:
    """Write the model, its word tokenizer, the token ids and the same as texts."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=D_MODEL, intermediate_size=688, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=2048, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = {f"t{i}": i for i in range(2044)} | {"<s>": 2044, "</s>": 2045, "<pad>": 2046, "<unk>": 2047}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=512,
    ).save_pretrained(folder / "model")  # fmt: skip
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 2044, (N_WINDOWS, CONTEXT)))


def run_peer(folder: Path, layer: int, out: Path) -> dict[str, Any]:
    """Return what one SAELens run cost."""
    command = [str(PEER.absolute()), str(Path(__file__).parent.absolute() / "peers" / "saelens_harvest.py")]
    arguments = [folder / "model", folder / "tokens.npy", f"model.layers.{layer}", out, CONTEXT, BATCH_ROWS]
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, cwd=folder, check=False
    )
    if done.returncode:
        raise SystemExit(f"SAELens failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def run_ours(folder: Path, name: str, hook_points: list[str], dtype: str) -> dict[str, Any]:
    """Return what one ingest cost, in a process of its own."""
    arguments = [str(folder), name, ",".join(hook_points), dtype]
    command = [sys.executable, "-m", "tests.benchmarks.bench_saelens", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the ingest failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def child(folder: str, name: str, hook_points: str, dtype: str) -> None:
    """Ingest and print what it cost: from the moment the units begin until the run is sealed."""
    import resource

    import actstore
    from actstore.ingest import IngestConfig
    from actstore.ingest import run as run_ingest

    store = actstore.open(f"{folder}/store")
    began = [0.0]

    def notice(line: str) -> None:
        if line.startswith("computing"):
            print("started", flush=True)
            began[0] = time.perf_counter()

    config = IngestConfig(
        corpus="words", model=f"{folder}/model", hook_points=hook_points.split(","), run=name, dtype=dtype, window=CONTEXT,
        batch_tokens=CONTEXT * BATCH_ROWS, rows_per_unit=ROWS_PER_UNIT, device="cpu", ray_address=None, commit_interval_s=1.0,
    )  # fmt: skip
    report = run_ingest(store, config, notice=notice)
    elapsed_s = time.perf_counter() - began[0]
    # The peer's rows have their token ids beside them: ours are in the tokenization, with documents, positions and characters.
    nbytes = report.nbytes + store.refresh().run(name).tokenization.collection.nbytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        json.dumps(
            {
                "n_tokens": report.n_rows, "elapsed_s": elapsed_s, "nbytes": nbytes, "peak_mib": peak,
                "redone": report.units_this_job, "n_units": report.n_units,
            }
        )
    )  # fmt: skip


def make_store(folder: Path) -> None:
    """Import the windows as documents: the tokens are then the same rows."""
    import actstore
    from actstore.ingest import import_corpus, tokenize_corpus

    store = actstore.open(f"{folder}/store", create=True)
    ids_bt = np.load(folder / "tokens.npy", allow_pickle=False)
    import_corpus(store, "words", ({"text": " ".join(f"t{i}" for i in row)} for row in ids_bt))
    report = tokenize_corpus(
        store.refresh(), "words", str(folder / "model"), window=CONTEXT, rows_per_unit=ROWS_PER_UNIT
    )
    tokenization = store.refresh().tokenization(report.id)
    found = np.concatenate(
        [tokenization.unit_table(u.unit)["token_id"].to_numpy() for u in tokenization.units]
    )
    assert np.array_equal(found, ids_bt.reshape(-1)), "the two sides would run on different tokens"


def killed_half_way(folder: Path) -> tuple[str, str]:
    """Return what each side does when it is killed half way and started again."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_saelens", "--child", str(folder), "killed",
               "layers.1.resid_post", "float32"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    import actstore

    store, n_done = actstore.open(f"{folder}/store"), 0
    while process.poll() is None:
        found = store.refresh().state.collections.get(("run", "killed"))
        n_done = len(found.units) if found else 0
        if n_done >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = store.refresh().state.collections[("run", "killed")]
    again = run_ours(folder, "killed", ["layers.1.resid_post"], "float32")
    ours = f"{len(found.units)} of {again['n_units']} units committed at the kill, {again['redone']} computed by the rerun"

    out = folder / "killed"
    script = str(Path(__file__).parent.absolute() / "peers" / "saelens_harvest.py")
    arguments = [folder / "model", folder / "tokens.npy", "model.layers.1", out, CONTEXT, BATCH_ROWS]
    peer = [str(PEER.absolute()), script, *map(str, arguments)]
    process = subprocess.Popen(peer, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    while process.poll() is None and not list(out.rglob("data-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(peer, capture_output=True, text=True, cwd=folder, check=False)
    theirs = "started over" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]
    return ours, f"exit {done.returncode}: {theirs[:160].replace(str(folder), '.')}"


def run() -> list[tuple[str, str, str]]:
    """Return (what, figure, note) rows."""
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        make_inputs(folder)
        make_store(folder)
        one, four, ours_1, ours_4, peers = [], [], {}, {}, {}
        layers = [f"layers.{i}.resid_post" for i in range(N_LAYERS)]
        for i in range(ROUNDS + 1):
            peers = {layer: run_peer(folder, layer, folder / "peer") for layer in range(N_LAYERS)}
            ours_1 = run_ours(folder, f"one{i}", layers[1:2], "bfloat16")
            ours_4 = run_ours(folder, f"four{i}", layers, "bfloat16")
            assert all(p["n_tokens"] == ours_1["n_tokens"] for p in peers.values())
            if i:
                one.append(peers[1]["elapsed_s"] / ours_1["elapsed_s"])
                four.append(sum(p["elapsed_s"] for p in peers.values()) / ours_4["elapsed_s"])
        speed = ours_1["n_tokens"] / ours_1["elapsed_s"], peers[1]["n_tokens"] / peers[1]["elapsed_s"]
        rows.append(("side by side with SAELens 6.54, 1 hook point", f"{statistics.median(one):.2f}x",
                     f"{speed[0]:,.0f} against {speed[1]:,.0f} tokens/s (last round); target 1.1"))  # fmt: skip
        rows.append(("the same, 4 hook points", f"{statistics.median(four):.2f}x",
                     "one pass against its four runs; target 2.5"))  # fmt: skip
        per_token = ours_1["nbytes"] / ours_1["n_tokens"], peers[1]["nbytes"] / peers[1]["n_tokens"]
        rows.append(("bytes per token of width 256", f"{per_token[0]:,.0f}",
                     f"bf16, tokens, statistics, checksums; against its float32: {per_token[1]:,.0f}; target half"))  # fmt: skip
        rows.append(
            ("peak memory of the process", f"{ours_1['peak_mib']} MiB", f"against {peers[1]['peak_mib']} MiB")
        )
        ours, theirs = killed_half_way(folder)
        rows.append(("killed half way and started again", ours, f"SAELens: {theirs}"))
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    elif not PEER.exists():
        raise SystemExit(f"{PEER} is missing: make bench-saelens builds it")
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        print("| measured | figure | against |\n|---|---|---|")
        for row in run():
            print("| " + " | ".join(row) + " |", flush=True)
