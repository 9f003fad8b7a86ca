"""A dry run's numbers against what an ingest then really stores; and that it stores nothing itself."""

import collections
import dataclasses
import json
import os

import numpy as np
import pytest

import actstore
from actstore.cli import main
from actstore.dictionary import make_dictionary
from actstore.errors import ConflictError, ErrorKind, NotFoundError, StorageError
from actstore.ingest import IngestConfig, import_corpus, tokenize_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.cost import Amount, check_room, check_run_room, free_bytes
from actstore.ingest.dictionaries.save import save_dictionary
from actstore.ingest.dry_run import check_fits, dry_run
from actstore.ingest.host import ModelHost
from actstore.ingest.planned_tokens import _estimated, plan_tokens, ratio_estimate
from actstore.ingest.probe import Probe
from actstore.ingest.run_plan import make_plan
from actstore.ingest.tokenization_plan import plan_tokenization
from tests.ingest import synthetic, tiny_models

PROBE_S = 0.1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with one corpus, tokenized into several units, some documents in two of them, and the model's folder."""
    url = str(tmp_path_factory.mktemp("dry") / "store")
    model = tiny_models.cached("gpt2")
    store = actstore.open(url, create=True)
    import_corpus(store, "c", synthetic.documents(60, seed=3))
    tokenize_corpus(store.refresh(), "c", model, window=16, overlap=2, rows_per_unit=128)
    return url, model


def config(made, run, **changes):
    settings = {
        "corpus": "c",
        "model": made[1],
        "hook_points": ["embed", "layers.{0..1}.resid_post", "layers.1.mlp_act"],
        "run": run,
        "window": 16,
        "overlap": 2,
        "rows_per_unit": 128,
        "batch_tokens": 128,
        "device": "cpu",
        "ray_address": None,
    }
    return IngestConfig(**{**settings, **changes})


def files(url):
    return sorted(os.path.join(folder, f) for folder, _, names in os.walk(url) for f in names)


def stored(store, run):
    """Objects and bytes of a run by the folder that they lie in, from the manifest."""
    collection = store.refresh().run(run).collection
    objects, nbytes = collections.Counter(), collections.Counter()
    seal = collection.seal.objects if collection.seal else ()
    for obj in [*(o for u in collection.units.values() for o in u.objects), *seal]:
        folder = "metadata" if obj.key.endswith("zarr.json") else obj.key.split("/")[2]
        objects[folder] += 1
        nbytes[folder] += obj.nbytes
    return objects, nbytes


CASES = {
    "several": {},
    "one": {"hook_points": ["layers.0.attn_out"]},
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16", "hook_points": ["layers.*.resid_post"]},
    "int8": {"dtype": "int8"},
    "sampled": {"sample": 0.3, "seed": 7},
    "sampled8": {"sample": 0.2, "dtype": "int8", "seed": 1},
    "pooled": {"keep": ["pooled"], "poolings": ["mean", "last"]},
    "both": {"keep": ["dense", "pooled"]},
    "covariance": {"covariance": True, "hook_points": ["layers.1.resid_pre"]},
    "lz4": {"codec": "lz4"},
    "cold": {"codec": "cold", "dtype": "bf16"},
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_predicted_is_what_is_stored(made, name):
    store = actstore.open(made[0])
    asked = config(made, name, **CASES[name])
    before = files(made[0])
    found = dry_run(store, asked, probe_s=PROBE_S)
    assert files(made[0]) == before, "a dry run writes nothing"
    assert found.tokens_are == "stored"
    assert found.tokens_error == 0
    assert found.tokens == Amount()

    report = run_ingest(store, asked)
    assert report.is_complete
    assert (found.n_tokens, found.n_units) == (store.tokenizations()[0].n_rows, report.n_units)
    objects, nbytes = stored(store, name)
    cost = found.cost
    for hook_point, amount in cost.dense.items():
        assert amount.objects == objects[hook_point]
        if asked.codec == "hot":
            assert amount.nbytes == nbytes[hook_point], hook_point
        else:
            assert 0.7 * nbytes[hook_point] < amount.nbytes < 1.4 * nbytes[hook_point]
    for folder in ("sums", "metadata", "covariance"):
        if folder in cost.other:
            assert cost.other[folder] == Amount(objects[folder], nbytes[folder])
    for folder in ("stats", "covariance", "pooled"):
        assert (folder in cost.other) == (folder in objects)
        if folder in cost.other and folder != "pooled":
            assert cost.other[folder].objects == objects[folder]
        if folder in cost.other:
            assert 0.5 * nbytes[folder] < cost.other[folder].nbytes < 2 * nbytes[folder]
    assert set(objects) == set(cost.dense) | set(cost.other) - {"manifests"}
    # All but manifests, which depend on the time that it takes.
    predicted = cost.total.nbytes - cost.other["manifests"].nbytes
    assert 0.8 * report.nbytes < predicted < 1.25 * report.nbytes


def test_codes_are_asked_for_and_counted(made):
    store = actstore.open(made[0])
    hook_point = "layers.1.mlp_act"
    width = store_width(made, hook_point)
    rng = np.random.default_rng(0)
    data = make_dictionary(
        {"W_enc": rng.normal(size=(width, 2000)), "W_dec": rng.normal(size=(2000, width))},
        activation="topk",
        k=16,
        hook_point=hook_point,
    )
    save_dictionary(store, "counted", data)
    settings = {"keep": ("codes",), "hook_points": [hook_point], "rows_per_unit": 512}
    with pytest.raises(NotFoundError, match="none-such"):
        dry_run(store, config(made, "coded", dictionary=("none-such",), **settings), probe_s=0)
    asked = config(made, "coded", dictionary=("counted",), **settings)
    found = dry_run(store, asked, probe_s=PROBE_S)
    assert any("codes" in note for note in found.notes)
    assert run_ingest(store, asked).is_complete
    state = store.refresh().state
    codes, postings = (state.collection(kind, "counted@coded") for kind in ("codes", "postings"))
    objects = sum(len(unit.objects) for c in (codes, postings) for unit in c.units.values())
    assert found.cost.other["codes"].objects == objects
    nbytes = codes.nbytes + postings.nbytes
    assert 0.5 * nbytes < found.cost.other["codes"].nbytes < 2 * nbytes


def store_width(made, hook_point):
    """Return how wide a hook point of the model is."""
    host = ModelHost(config(made, "width", hook_points=[hook_point]), threads=None)
    return dict(host.describe().hook_points)[hook_point]


def test_an_interrupted_run_costs_what_is_missing(made):
    store = actstore.open(made[0])
    asked = config(made, "half", commit_units=1, commit_interval_s=0.0)
    import threading

    stop = threading.Event()
    first = run_ingest(store, asked, stop=stop, progress=lambda _: stop.set())
    assert not first.is_complete
    found = dry_run(store, asked, probe_s=0)
    assert found.n_units_done == first.n_units
    before = stored(store, "half")[1]
    assert run_ingest(store, asked).is_complete
    after = stored(store, "half")[1]
    for hook_point, amount in found.cost.dense.items():
        assert amount.nbytes == after[hook_point] - before[hook_point]
    with pytest.raises(ConflictError, match="batch_tokens: 128 -> 64") as caught:
        dry_run(store, dataclasses.replace(asked, batch_tokens=64), probe_s=0)
    assert caught.value.kind is ErrorKind.CONFIG_DIFFERS


@pytest.mark.parametrize("overlap", [0, 3])
def test_tokens_are_counted_where_they_are_not_stored(made, tmp_path, overlap):
    """Counted in memory: the same units that tokenize_corpus then makes, in number, rows and what they say of documents."""
    url = str(tmp_path / "store")
    store = actstore.open(url, create=True)
    import_corpus(store, "c", synthetic.documents(50, seed=overlap))
    before = files(url)
    asked = config((url, made[1]), "r", overlap=overlap)
    found = dry_run(store, asked, probe_s=PROBE_S)
    assert files(url) == before
    assert found.tokens_are == "counted"
    planned = plan_tokens(store, "c", made[1], seed=0, window=16, overlap=overlap, rows_per_unit=128)
    report = tokenize_corpus(store, "c", made[1], window=16, overlap=overlap, rows_per_unit=128)
    real = store.refresh().tokenization(report.id)
    assert planned.tokenization.id == report.id == found.tokenization
    assert [(u.unit, u.rows, u.meta) for u in planned.tokenization.units] == [
        (u.unit, u.rows, u.meta) for u in real.units
    ]
    assert (found.n_tokens, found.n_windows, found.n_units) == (
        report.n_rows,
        report.n_windows,
        report.n_units,
    )
    assert planned.table.equals(real.unit_table(planned.table_unit))
    again = dry_run(store, asked, probe_s=0)
    assert again.cost.dense == found.cost.dense
    assert again.tokens_are == "stored"
    assert found.tokens.objects == len(real.units) + len(real.collection.seal.objects)


def test_an_estimate_is_near_and_says_how_far_it_may_be(made, tmp_path):
    """Documents of very different lengths; the truth lies within four standard errors, and the error is not absurd."""
    rng = np.random.default_rng(5)
    store = actstore.open(str(tmp_path / "store"), create=True)
    import_corpus(store, "c", [{"text": " ".join(["word"] * int(rng.integers(1, 200)))} for _ in range(300)])
    settings = {"window": 64, "overlap": 0, "rows_per_unit": 1024}
    plan = plan_tokenization(store, "c", made[1], **settings)
    found = _estimated(plan, np.random.default_rng(0))
    truth = tokenize_corpus(store, "c", made[1], **settings)
    assert found.source == "estimated"
    assert abs(found.n_rows - truth.n_rows) <= max(2 * found.error_rows, 1)
    assert found.error_rows < 0.2 * truth.n_rows
    assert found.n_units == pytest.approx(truth.n_units, rel=0.15)
    assert found.table.num_rows > 0


def test_ratio_estimate_against_many_draws():
    """Two standard errors hold the truth in about 95 of 100 samples of a skewed population."""
    rng = np.random.default_rng(0)
    nbytes = rng.lognormal(8, 1, 20_000)
    rows = nbytes / rng.normal(4, 0.6, len(nbytes))
    inside = 0
    for _ in range(300):
        some = rng.integers(len(nbytes), size=16)
        estimate, error = ratio_estimate(rows[some], nbytes[some], total=int(nbytes.sum()))
        inside += abs(estimate - rows.sum()) <= error
    assert 0.85 < inside / 300 < 0.99
    assert ratio_estimate([], [], total=10) == (0, None)
    assert ratio_estimate([5], [10], total=100) == (50, None)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_stored(made, tmp_path, capsys):
    store = actstore.open(made[0])
    room = free_bytes(store)
    usage = os.statvfs(made[0])
    assert room == pytest.approx(
        usage.f_bavail * usage.f_frsize - 0.05 * usage.f_blocks * usage.f_frsize, abs=1 << 30
    )
    check_room(store, max(0, room) // 2, what="half")
    with pytest.raises(StorageError, match=r"run 'big' needs .* bytes in .* and its disk has") as caught:
        check_room(store, room + (1 << 40), what="run 'big'")
    assert caught.value.kind is ErrorKind.STORAGE_FULL

    found = dry_run(store, config(made, "small"), probe_s=0)
    assert found.fits
    check_fits(store, found)
    huge = Amount(1, room + (1 << 40))
    too_big = dataclasses.replace(found, cost=dataclasses.replace(found.cost, dense={"embed": huge}))
    assert too_big.fits is False
    with pytest.raises(StorageError, match="run 'small' needs"):
        check_fits(store, too_big)


def test_a_job_asks_for_room_with_its_own_plan(made):
    store = actstore.open(made[0])
    run_ingest(store, config(made, "asks"))
    run = store.refresh().run("asks")
    plan = make_plan(run.collection, epoch=1)
    units = [u.unit for u in run.tokenization.units]
    check_run_room(store, plan, run.tokenization, units)
    wide = {name: dataclasses.replace(s, d_model=1 << 26, rows_per_chunk=1) for name, s in plan.specs.items()}
    with pytest.raises(StorageError, match="run 'asks' needs"):
        check_run_room(store, dataclasses.replace(plan, specs=wide), run.tokenization, units)
    check_run_room(store, dataclasses.replace(plan, specs=wide), run.tokenization, [])


def test_other_storages_are_not_asked_for_room(made):
    store = actstore.open("memory://dry-run-room", create=True)
    import_corpus(store, "c", ["one two three"])
    found = dry_run(store, config(("", made[1]), "r"), probe_s=0)
    assert found.free_bytes is None
    assert found.fits is None
    check_room(store, 1 << 80, what="anything")


def test_the_command_prints_it_and_writes_nothing(made, capsys):
    words = ["--corpus", "c", "--model", made[1], "--hook-points", "embed", "--run", "dry", "--window", "16"]
    words += ["--overlap", "2", "--rows-per-unit", "128", "--device", "cpu", "--no-ray", "--dry-run"]
    before = files(made[0])
    assert main(["ingest", made[0], *words]) == 0
    text = capsys.readouterr().out
    tokenization = actstore.open(made[0]).tokenizations()[0]
    assert f"{tokenization.n_rows:,} (exact)" in text
    assert "nothing was written" in text
    assert main(["ingest", made[0], *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_tokens"] == tokenization.n_rows
    assert found["fits"] is True
    assert found["probe"]["n_tokens"] > 0
    assert found["seconds"] > 0
    assert found["memory"]["parameters"] > 0
    assert found["nbytes"] == sum(a["nbytes"] for part in found["cost"].values() for a in part.values())
    assert files(made[0]) == before


def test_speed_counts_what_overlaps():
    probe = Probe(1000, 4.0, 3.0, {}, 1, 0, "cpu", None, {})
    assert probe.rows_per_s == 250
    assert dataclasses.replace(probe, device="cuda").rows_per_s == pytest.approx(1000 / 3)
    assert dataclasses.replace(probe, device="cuda", forward_s=1.0).rows_per_s == pytest.approx(1000 / 3)
