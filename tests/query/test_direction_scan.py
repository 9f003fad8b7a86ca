"""examples() through an index for directions: the scan's answer, byte for byte, and proved where it says so."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import actstore
from actstore.errors import FormatError
from actstore.ingest.indexing import build_index
from actstore.query.answer import RowOptions, find_rows
from actstore.query.direction_scan import find_along
from actstore.query.scores import ProjectionScorer
from actstore.sampling import Sample
from actstore.vector_index import open_indexes
from tests.query.make_directions import add_directions
from tests.query.make_store import add_run, make_store, random_values
from tests.query.naive import dot, eligible, top

H = "layers.0.resid_post"
WIDTHS = {H: 12}


def large_values(seed: int, kind: str):
    """Rows enough for several rounds: plain ones, or such that a direction leaves very many open."""

    def values(hook_point, tokens):
        rng = np.random.default_rng([seed, tokens[0].row])
        rows = rng.standard_normal((len(tokens), WIDTHS[hook_point]))
        if kind == "ties":
            rows = rng.integers(-1, 2, rows.shape)
        if kind == "close":  # one axis has nearly the same number everywhere, but for a few rows
            rows[:, 0] = 5 + 1e-5 * rows[:, 0]
            rows[::700, 0] = -5
        if kind == "relu":
            rows = np.maximum(rows - 2.5, 0)
        return rows.astype(np.float32)

    return values


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """NaNs, sinks and rows of zeros; all dtypes, a sample; indexed whole, in part, and in two generations."""
    made = make_store(str(tmp_path_factory.mktemp("directions") / "a.store"), seed=1, n_documents=80)
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        add_run(
            made, dtype, WIDTHS, random_values(1, WIDTHS, nonfinite=dtype != "int8", sinks=True), dtype=dtype
        )
    sample = Sample(rate=0.4, seed=3)
    add_run(made, "sampled", WIDTHS, random_values(4, WIDTHS), sample=sample)
    add_run(made, "unfinished", WIDTHS, random_values(5, WIDTHS), skip_units=(1,), seal=False)
    n = len(made.store.tokenization(made.tokenization).units)
    assert n >= 12
    for name in ("float32", "sampled"):
        add_directions(made.run(name), H, [[(0, 5)], [(5, 6), (8, n)], [(6, 8)]])
    add_directions(made.run("float16"), H, [[(0, 4)], [(6, 7)]])
    add_directions(made.run("bfloat16"), H, [[(0, 6)]])
    add_directions(made.run("bfloat16"), H, [[(7, n)]], generation=1)
    add_directions(made.run("int8"), H, [[(0, n)]])
    add_directions(made.run("unfinished"), H, [[(0, 1), (2, n)]])
    return made


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Some 5,000 rows in two shards."""
    made = make_store(
        str(tmp_path_factory.mktemp("directions") / "b.store"), seed=3, n_documents=260, rows_per_unit=1024
    )
    n = len(made.store.tokenization(made.tokenization).units)
    for kind in ("plain", "ties", "close", "relu"):
        add_run(made, kind, WIDTHS, large_values(6, kind), dtype="float16")
        add_directions(made.run(kind), H, [[(0, 3)], [(3, n)]])
    assert made.run("plain").n_rows > 4500
    return made


def both(run, target, k=10, **options):
    """The answer through the index, after a check that it is the scan's; what is random to no question is equal in `meta`."""
    found = run.examples(target, k, **options)
    scanned = run.examples(target, k, use_index=False, **options)
    assert found.table.schema.equals(scanned.table.schema)
    assert json.dumps(found.to_dicts()) == json.dumps(scanned.to_dicts())  # NaN too, and every digit
    assert (found.meta.exact, found.meta.recall) == (True, 1.0)
    assert found.meta.n_eligible == scanned.meta.n_eligible
    masks = [
        {h: {name: n for name, n in m["removed"].items() if n} for h, m in meta.mask.items()}
        for meta in (found.meta, scanned.meta)
    ]
    assert masks[0] == masks[1]
    assert scanned.meta.index is None
    return found


def directions(seed: int, d: int = 12):
    rng = np.random.default_rng(seed)
    axis = np.zeros(d)
    axis[5] = -2.0
    return {
        "random": rng.standard_normal(d),
        "axis": axis,
        "large": 1e150 * rng.standard_normal(d),
        "tiny": 1e-290 * rng.standard_normal(d),
        "sparse": np.where(rng.random(d) < 0.3, rng.standard_normal(d), 0) + axis,
        "signs": np.sign(rng.standard_normal(d)),
    }


@pytest.mark.parametrize("run", ["float32", "float16", "bfloat16", "int8", "sampled"])
@pytest.mark.parametrize("sign", ["pos", "neg", "abs"])
@pytest.mark.parametrize("fold", ["context", "doc", None])
def test_answers_are_the_scan_s(small, run, sign, fold):
    for w in directions(len(run)).values():
        both(small.run(run), actstore.direction(H, w), sign=sign, fold=fold)
    found = both(small.run(run), actstore.neuron(H, 3), sign=sign, fold=fold)
    assert found.meta.index[H]["certified"]


def test_a_run_that_is_not_finished(small):
    found = both(small.run("unfinished"), actstore.direction(H, directions(1)["random"]))
    assert any("not complete" in w for w in found.meta.warnings)


@pytest.mark.parametrize("run", ["float32", "float16", "sampled"])
@pytest.mark.parametrize(
    "options",
    [
        {"mask_special": False, "mask_sinks": False},
        {"mask_sinks": False, "fold": None, "k": 2000},
        {"where": "source = 'web' AND position > 2"},
        {"where": "n < 0"},
        {"regex": "^ w1", "fold": "doc"},
        {"rows": range(10, 300, 3)},
        {"docs": [3, 4, 30, 31], "sign": "abs"},
        {"k": 1},
        {"memory_bytes": 1 << 20},
    ],
    ids=lambda o: "-".join(o),
)
def test_masks_are_the_scan_s(small, run, options):
    options = dict(options)
    k = options.pop("k", 15)
    both(small.run(run), actstore.direction(H, directions(2)["random"]), k, **options)
    both(small.run(run), actstore.neuron(H, 7), k, **options)


@pytest.mark.parametrize("n_targets", [3, 12])
def test_many_directions_at_once_answer_as_alone(small, n_targets):
    run = small.run("float32")
    rng = np.random.default_rng(n_targets)
    targets = [
        actstore.direction(H, w, name=f"w{i}") for i, w in enumerate(rng.standard_normal((n_targets, 12)))
    ]
    targets[1] = actstore.neuron(H, 2)
    together = both(run, targets, 5, sign="abs")
    alone = [r for t in targets for r in run.examples(t, 5, sign="abs").to_dicts()]
    rows = together.to_dicts()
    assert [r.pop("target") for r in rows] == [t.label for t in targets for _ in range(5)]
    assert json.dumps(rows) == json.dumps(alone)


def test_against_a_plain_loop(small):
    w = directions(9)["random"]
    found = small.run("float16").examples(actstore.direction(H, w), 25, fold="doc")
    wanted = top(small, list(eligible(small, H, "float16")), lambda a: dot(a, w), 25, "doc")
    assert [r["row"] for r in found] == [row for row, _ in wanted]
    assert [r["value"] for r in found] == pytest.approx([value for _, value in wanted], rel=1e-12)


def test_what_no_index_has_is_scanned_and_told(small):
    run = small.run("float16")
    n_indexed = sum(run.collection.units[u].rows for u in (0, 1, 2, 3, 6))
    found = both(run, actstore.direction(H, directions(1)["random"]))
    told = found.meta.index[H]
    assert told["n_scanned"] == run.n_rows - n_indexed
    assert [g["n_indexed"] for g in told["generations"]] == [n_indexed]
    assert any(f"{run.n_rows - n_indexed} rows are in no index" in w for w in found.meta.warnings)
    two = both(small.run("bfloat16"), actstore.neuron(H, 0))
    assert sorted(g["generation"] for g in two.meta.index[H]["generations"]) == [0, 1]
    assert two.meta.index[H]["n_scanned"] == small.run("bfloat16").collection.units[6].rows


def test_sinks_are_exceptions_and_are_found(small):
    run = small.run("float32")
    found = both(run, actstore.neuron(H, 0), 5, mask_sinks=False, mask_special=False)
    assert found.meta.index[H]["n_exceptions"] >= 5
    assert found.table["value"].to_numpy().min() > 20


@pytest.mark.parametrize("sign", ["pos", "neg", "abs"])
@pytest.mark.parametrize("fold", ["context", "doc", None])
def test_few_rows_prove_the_best_of_many(large, sign, fold):
    run = large.run("plain")
    for w in directions(4).values():
        found = both(run, actstore.direction(H, w), 3, sign=sign, fold=fold)
        told = found.meta.index[H]
        assert told["certified"]
        assert told["n_rounds"] == 1
        assert told["n_verified"] < 200
        assert told["n_scanned"] == 0


def answer(run, w, *, k, fold=None, sign="pos", **knobs):
    """What `find_along` says, and the scan's (score, row) and its own of the direction."""
    acts, options = run.activations(H), RowOptions(fold=fold)
    scorer = ProjectionScorer(np.asarray(w, np.float64)[None], sign)
    indexes = open_indexes(run, H, purpose="directions")
    found = find_along(run, acts, scorer, options, k=k, indexes=indexes, **knobs)
    return found, found.report.best[0].ranked(), find_rows(run, acts, scorer, options, k=k).best[0].ranked()


@pytest.mark.parametrize("sign", ["pos", "neg", "abs"])
@pytest.mark.parametrize("fold", ["doc", None])
def test_more_rounds_where_the_first_proves_nothing(large, sign, fold):
    w = directions(4)["random"]
    found, ours, scanned = answer(
        large.run("plain"), w, k=3, fold=fold, sign=sign, first=-23
    )  # one row of each shard
    assert ours == scanned
    assert found.index["certified"]
    assert found.index["n_rounds"] > 1
    assert found.index["n_verified"] < 300


def test_where_rows_are_too_close_to_be_told_apart_all_are_scanned(large):
    run, axis = large.run("close"), np.eye(12)[0]
    found, ours, scanned = answer(run, axis, k=2, first=20, enough=100)
    assert ours == scanned
    assert not found.index["certified"]
    assert found.index["n_scanned"] == run.n_rows == found.report.removed.n_seen
    found, ours, scanned = answer(
        run, axis, k=2, first=20, enough=100, sign="neg"
    )  # the few that are far off
    assert ours == scanned
    assert found.index["certified"]
    assert both(run, actstore.direction(H, axis), 2).meta.exact


@pytest.mark.parametrize("run", ["ties", "relu"])
@pytest.mark.parametrize("sign", ["pos", "neg", "abs"])
def test_ties_are_in_row_order(large, run, sign):
    for target in (actstore.neuron(H, 4), actstore.direction(H, directions(3)["signs"])):
        for k in (1, 40):
            both(large.run(run), target, k, sign=sign, fold=None)
            both(large.run(run), target, k, sign=sign)


@pytest.mark.parametrize("seed", range(6))
def test_random_questions(large, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((int(rng.integers(1, 11)), 12)) * np.exp(3 * rng.standard_normal(12))
    targets = [actstore.direction(H, one, name=f"w{i}") for i, one in enumerate(w)]
    options = {
        "sign": str(rng.choice(["pos", "neg", "abs"])),
        "fold": [None, "doc", "context"][int(rng.integers(3))],
        "mask_special": bool(rng.integers(2)),
        "mask_sinks": bool(rng.integers(2)),
        "where": None if rng.random() < 0.5 else f"n % 7 < {int(rng.integers(1, 7))}",
    }
    both(large.run("plain"), targets, int(rng.integers(1, 60)), **options)


def test_an_index_that_was_built(tmp_path):
    made = make_store(str(tmp_path / "s.store"), seed=5, n_documents=120, rows_per_unit=256)
    add_run(made, "run", WIDTHS, random_values(7, WIDTHS, nonfinite=True, sinks=True), dtype="bfloat16")
    report = build_index(made.store, "run", H, kind="scan_sq8", shard_rows=600)
    assert report.is_complete
    run = made.run()
    [index] = open_indexes(run, H, purpose="directions")
    assert len(index.shards) > 1
    for w in directions(6).values():
        told = both(run, actstore.direction(H, w), 12, sign="abs").meta.index[H]
        assert [g["id"] for g in told["generations"]] == [index.id]
        assert told["n_scanned"] == 0
    assert open_indexes(run, H) == []  # it is for nothing else


def test_a_file_of_exceptions_that_is_something_else_is_told(small, tmp_path):
    made = make_store(str(tmp_path / "s.store"), seed=6, n_documents=30)
    add_run(made, "run", WIDTHS, random_values(8, WIDTHS, sinks=True))
    run = add_directions(made.run(), H, [[(0, 3)]])
    [exceptions] = Path(made.url, "indexes").rglob("exceptions-*")
    data = bytearray(exceptions.read_bytes())
    data[-3] ^= 1
    exceptions.write_bytes(data)
    with pytest.raises(FormatError, match="SHA-256"):
        actstore.open(made.url).run("run").examples(actstore.neuron(H, 0))
    assert run.examples(actstore.neuron(H, 0), use_index=False).meta.index is None


def test_without_faiss(small, monkeypatch):
    run, target = small.run("float32"), actstore.neuron(H, 3)
    wanted = run.examples(target, 8).to_dicts()
    monkeypatch.setitem(sys.modules, "faiss", None)
    found = run.examples(target, 8)
    assert json.dumps(found.to_dicts()) == json.dumps(wanted)
    assert found.meta.index is None
    assert any("FAISS is not installed" in w for w in found.meta.warnings)


@pytest.mark.parametrize(("memory", "is_proved"), [(4 << 20, True), (400_000, True), (20_000, False)])
def test_many_directions_in_little_memory(large, memory, is_proved):
    """They are looked at in groups, or, where the rows of one do not fit, found by a scan."""
    run = large.run("plain")
    acts = run.activations(H)
    vectors_qd = np.random.default_rng(4).standard_normal((40, WIDTHS[H]))
    indexes = open_indexes(run, H, purpose="directions")
    scorer = ProjectionScorer(vectors_qd, "abs")
    options = RowOptions(memory_bytes=memory)
    found = find_along(run, acts, scorer, options, k=10, indexes=indexes)
    wanted = find_rows(run, acts, scorer, RowOptions(), k=10)
    assert [b.ranked() for b in found.report.best] == [b.ranked() for b in wanted.best]
    assert found.index["certified"] is is_proved
