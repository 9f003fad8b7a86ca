"""Does the whole demo run, say true things, and leave what is there alone when it runs again?"""

import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import actstore
from actstore.cli import main
from actstore.ingest.demo import show
from actstore.ingest.demo.corpus import Bounds
from actstore.ingest.demo.facts import NO_TOKEN, read_facts
from actstore.ingest.demo.latents import (
    DENSITY,
    LEAST_DOCUMENTS,
    MOST_SINGLE_TOKEN,
    N_LATENTS,
    strongest_rows,
)
from actstore.ingest.demo.tour import TourConfig, run_tour
from actstore.ingest.demo.train import BOUNDARY, TrainConfig
from actstore.ingest.training import SaeTrainConfig

SHAPE = {"steps": 8, "window": 64, "d_model": 16, "d_mlp": 24, "layers": 2, "heads": 2, "warmup_steps": 2}
CONFIG = TourConfig(
    bounds=Bounds(trained_per_kind=30_000, stored_per_kind=9_000),
    modules=("textwrap", "heapq", "json.decoder", "queue", "shutil", "argparse"),
    vocab_size=320,
    models={"tiny-a": TrainConfig(seed=0, **SHAPE), "tiny-b": TrainConfig(seed=1, **SHAPE)},
    ray_address=None,
    sae=SaeTrainConfig(
        name="sae", n_latents=64, k=4, n_rows=60_000, batch_rows=512, learning_rate=3e-3, loss_rows=512
    ),
)


def tour(path):
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    return run_tour(path, CONFIG, console), console.file.getvalue()


@pytest.fixture(scope="module")
def toured(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.store"
    return path, *tour(path)


def test_the_tour_shows_all_steps_and_its_summary_is_json(toured):
    path, summary, printed = toured
    for number in range(1, 9):
        assert f"\n{number}. " in printed
    assert json.loads(json.dumps(summary))["version"] == actstore.open(path).version
    assert set(summary["training"]) == {"tiny-a", "tiny-b"} == set(summary["ingest"]["runs"])
    assert f"{summary['training']['tiny-a']['held_out_loss']:.2f} on held-out text" in printed
    assert f"actstore runs {path}" in printed


def test_what_the_tour_says_about_the_store_is_so(toured):
    path, summary, _ = toured
    store = actstore.open(path)
    run, other = store.run("tiny-a"), store.run("tiny-b")
    assert run.is_complete
    assert run.tokenization.id == other.tokenization.id
    assert run.hook_points == [f"layers.{i}.{what}" for i in (0, 1) for what in ("mlp_act", "resid_post")]
    assert summary["ingest"]["runs"]["tiny-a"]["n_rows"] == run.n_rows == run.tokenization.n_rows
    assert summary["corpus"]["n_stored"] == store.corpus("python-docs").n_documents

    stored = {row["id"]: row["n_rows"] for row in summary["sql"]["What is stored"]}
    assert stored["tiny-a"] == stored["tiny-b"] == stored[run.tokenization.id] == run.n_rows
    [count] = store.sql("SELECT count(*) AS n FROM documents WHERE n_chars <> length(text)").to_dicts()
    assert count["n"] == 0

    nearest = summary["nearest"]
    acts = run.activations(nearest["hook_point"])
    query = acts[nearest["row"]].astype(np.float64)
    for row in nearest["by_row"]:
        found = acts[row["row"]].astype(np.float64)
        assert row["value"] == pytest.approx(
            query @ found / np.linalg.norm(query) / np.linalg.norm(found), abs=1e-6
        )
    kinds = {row["doc_id"]: row["kind"] for row in store.sql("SELECT doc_id, kind FROM documents").to_dicts()}
    assert summary["direction"]["examples"]
    assert {kinds[row["doc_id"]] for row in summary["direction"]["examples"]} == {"docstring"}
    for neuron in summary["neurons"]:
        acts_td = run.activations(neuron["hook_point"])[:]
        shown = read_facts(store, run).is_shown
        assert neuron["examples"][0]["value"] == pytest.approx(
            acts_td[shown, neuron["neuron"]].max(), rel=1e-6
        )


def test_latents_shown_are_those_that_meet_the_criterion(toured):
    path, summary, printed = toured
    store = actstore.open(path)
    run = store.run("tiny-a")
    facts, codes = read_facts(store, run), run.codes("sae")
    dense_tf = np.zeros((run.n_rows, codes.n_latents), np.float32)
    for rows, found in codes.scan():
        dense_tf[facts.index(rows)] = found.to_dense()
    assert summary["sae"]["criterion"] in printed
    shown = summary["sae"]["latents"]
    assert len({one["latent"] for one in shown}) == len(shown) <= N_LATENTS
    for one in shown:
        values = dense_tf[:, one["latent"]]
        fires = values > 0
        assert one["density"] == pytest.approx(fires.mean())
        assert DENSITY[0] <= fires.mean() <= DENSITY[1]
        assert len(np.unique(facts.doc_ids[fires])) >= LEAST_DOCUMENTS
        by_token = np.bincount(facts.token_ids, weights=values)
        assert by_token.max() / by_token.sum() <= MOST_SINGLE_TOKEN + 1e-6
        assert one["examples"][0]["value"] == pytest.approx(values[facts.is_shown].max(), rel=1e-6)
        assert f"latent {one['latent']}: {one['says']}" in printed

    wanted = np.flatnonzero((dense_tf > 0).any(axis=0))[:20]
    rows_kd = strongest_rows(codes, wanted.tolist(), facts, k=7)
    for column, latent in enumerate(wanted):
        values = np.where(facts.is_shown, dense_tf[:, latent], 0)
        best = np.sort(values)[::-1][:7]
        found = rows_kd[:, column]
        there = values[facts.index(found[found >= 0])]
        assert there.tolist() == best[: len(there)].tolist()
        assert len(there) == 7 or (dense_tf[:, latent] > 0).sum() < 7 * 2


def test_the_commands_to_try_next_work(toured, capsys):
    lines = [line.strip() for line in toured[2].splitlines() if line.startswith("  actstore ")]
    assert len(lines) >= 8
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    assert "\x1b" not in capsys.readouterr().out


def test_pictures_lie_beside_the_store(toured):
    path, summary, printed = toured
    files = summary["sae"]["files"]
    assert bool(files) == bool(summary["sae"]["latents"])
    if files:
        assert files["picture"] == f"{path}.latents.png"
        assert Path(files["picture"]).read_bytes().startswith(b"\x89PNG")
        page = Path(files["page"]).read_text()
        assert page.count("<h2>") == len(summary["sae"]["latents"])
        assert "<script" not in page
        assert files["page"] in printed
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]


def test_facts_are_those_of_the_stored_tables(toured):
    store = actstore.open(toured[0])
    run = store.run("tiny-a")
    facts = read_facts(store, run)
    documents = store.corpus("python-docs").documents(
        range(store.corpus("python-docs").n_documents), ["kind", "split"]
    )
    at = 0
    for unit in run.tokenization.units:
        previous, place = NO_TOKEN, None
        for row in run.tokenization.unit_table(unit.unit).to_pylist():
            if (row["doc_id"], row["window"]) != place:
                previous, place = NO_TOKEN, (row["doc_id"], row["window"])
            assert facts.rows[at] == row["row"]
            assert facts.token_ids[at] == row["token_id"]
            assert facts.previous_ids[at] == previous
            assert facts.kinds[facts.kind_codes[at]] == documents["kind"][row["doc_id"]].as_py()
            assert facts.is_held_out[at] == (documents["split"][row["doc_id"]].as_py() == "held-out")
            assert facts.is_shown[at] == (not row["is_special"] and row["window_position"] > 0)
            previous, at = NO_TOKEN if row["is_special"] else row["token_id"], at + 1
    assert at == len(facts.rows) == run.n_rows
    assert facts.index(facts.rows).tolist() == list(range(at))


def test_the_tour_again_trains_and_stores_nothing(toured):
    path, before, _ = toured
    files = {file: file.stat().st_mtime_ns for file in path.parent.rglob("*") if file.is_file()}
    summary, printed = tour(path)
    assert {file: file.stat().st_mtime_ns for file in path.parent.rglob("*") if file.is_file()} == files
    assert "trained before" in printed
    assert "complete already" in printed
    for key in ("version", "sql", "neurons", "direction", "nearest", "training", "sae", "index"):
        assert summary[key] == before[key]


def test_a_context_is_shown_without_acting_on_the_terminal():
    context = {
        "text": "",
        "tokens": [BOUNDARY, "\x1b[31mred", "[bold]", "\n        x", "\u202e"],
        "values": [9.0, 1.0, -1.0, 4.0, float("nan")],
        "token_index": 3,
        "token_start": 0,
        "token_end": 0,
    }
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    show.contexts(console, [{"value": 4.0, "context": context}])
    assert console.file.getvalue() == "     4.000  \\x1b[31mred[bold]«\\n x»\\u202e\n"
    shown = show.context_text(context)
    styles = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert styles == {"\\x1b[31mred": "black on #ffe0b0", "«\\n x»": "bold black on #ff9f1a"}
