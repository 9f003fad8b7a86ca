"""The self-check: right runs pass with rounding-sized differences, wrong ones do not become complete."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest import IngestConfig, import_corpus, tokenize_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.backend import LocalBackend
from actstore.ingest.check_documents import DocumentTokens, pool
from actstore.ingest.check_rows import Difference, compare_rows, int8_bounds
from actstore.ingest.dry_run import dry_run
from actstore.ingest.self_check import _drawn, check_run, describe_check
from actstore.ingest.unit import UnitWriter
from actstore.int8 import dequantise, fit_int8, quantise
from tests.ingest import kept, synthetic, tiny_models


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("check") / "store")
    store = actstore.open(url, create=True)
    import_corpus(store, "c", [*synthetic.documents(30, seed=3), {"text": "", "kind": "k0", "n": 99}])
    return url


def config(run, model="gpt2", **changes):
    given = {
        "corpus": "c", "model": tiny_models.cached(model), "hook_points": ["embed", "layers.*.resid_*", "layers.1.mlp_act"],
        "run": run, "window": 16, "rows_per_unit": 128, "batch_tokens": 128, "device": "cpu", "ray_address": None,
        "self_check": 0.2,
    }  # fmt: skip
    return IngestConfig(**{**given, **changes})


class Shared(LocalBackend):
    """Loads each model once for all tests that do not mind."""

    hosts: ClassVar[dict] = {}

    def __init__(self, asked):
        super().__init__(asked)
        key = (asked.model, *asked.hook_points, asked.compute_dtype, asked.batch_tokens)
        self._host = self.hosts.setdefault(key, self._host)


CASES = {
    "dense": {},
    "fp16": {"dtype": "fp16"},
    "bf16": {"compute_dtype": "bf16"},
    "int8": {"dtype": "int8"},
    "sampled": {"sample": 0.3, "seed": 5},
    "sampled8": {"sample": 0.5, "dtype": "int8"},
    "overlap": {"overlap": 5},
    "both": {"keep": ["dense", "pooled"]},
    "pooled": {"keep": ["pooled"]},
    "bert": {"model": "bert", "hook_points": ["layers.*.resid_post", "layers.0.attn_out"]},
    "parallel": {
        "model": "gpt_neox",
        "hook_points": ["layers.*.mlp_out", "final_norm", "layers.2.resid_post"],
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_right_run_passes_and_says_how_near_it_is(made, name):
    asked = config(name, **CASES[name])
    report = run_ingest(made, asked, backend=Shared(asked))
    assert report.is_complete
    run = actstore.open(made).run(name)
    found = run.collection.seal.meta["self_check"]
    assert set(found["hook_points"]) == set(run.hook_points)
    assert found["n_documents"] == 6
    assert found["n_rows"] > 0
    json.dumps(found, allow_nan=False)
    limits = {"fp16": 1e-3, "bf16": 3e-2, "int8": 0.05, "sampled8": 0.05}
    for of_hook_point in found["hook_points"].values():
        assert 0 <= of_hook_point["mean_relative"] <= of_hook_point["max_relative"] < limits.get(name, 1e-4)
        assert np.isfinite(of_hook_point["max_abs"])
    assert "run again alone" in describe_check(found)
    if name in ("fp16", "int8"):
        assert max(h["max_relative"] for h in found["hook_points"].values()) > 1e-5, (
            "stored numbers were compared"
        )


class WrongHost:
    """A model whose rows are stored wrongly in one unit: shifted, of another hook point, or too small."""

    def __init__(self, host, wrong):
        self._host, self._wrong, self._n, self._writer = host, wrong, 0, None

    def __getattr__(self, name):
        return getattr(self._host, name)

    def run_unit(self, store, plan, unit):
        # One writer: its lock is what keeps two units from computing at once.
        tokenization = store.tokenization(plan.tokenization)
        self._writer = self._writer or UnitWriter(store.storage, tokenization, plan, self._capture_wrongly)
        return self._writer.run_unit(unit)

    def _capture_wrongly(self, token_ids, window_starts, out):
        self._n += 1
        n = self._host._capture()(token_ids, window_starts, out)
        if self._n == 2:
            self._wrong(out)
        return n


class WrongBackend(Shared):
    def __init__(self, asked, wrong):
        super().__init__(asked)
        self._host.describe()
        self._host = WrongHost(self._host, wrong)


def shift(out):
    rows = out["layers.1.resid_post"]
    rows[:] = np.roll(rows, 1, axis=0)


def other_layer(out):
    out["layers.1.resid_post"][:] = out["layers.0.resid_post"]


def smaller(out):
    out["layers.1.resid_post"][:] *= np.asarray(0.99, out["layers.1.resid_post"].dtype)


def one_row(out):
    out["layers.1.resid_post"][5] = out["layers.1.resid_post"][4]


@pytest.mark.parametrize(
    ("wrong", "changes"),
    [
        (shift, {}), (other_layer, {}), (smaller, {}), (one_row, {}),
        # Of int8, a hundredth is within rounding; of a document's mean, the order of rows and one row.
        (shift, {"dtype": "int8"}), (other_layer, {"dtype": "int8"}), (shift, {"sample": 0.9}), (smaller, {"sample": 0.9}),
        (other_layer, {"keep": ["pooled"]}), (smaller, {"keep": ["pooled"]}),
    ],
)  # fmt: skip
def test_a_wrong_run_is_not_sealed(made, wrong, changes):
    name = f"wrong-{wrong.__name__}-{'-'.join(changes)}"
    asked = config(name, hook_points=["layers.{0..1}.resid_post"], self_check=1.0, **changes)
    with pytest.raises(
        InvalidInputError, match=r"not sealed: .* Worst is 'layers.1.resid_post', document"
    ) as caught:
        run_ingest(made, asked, backend=WrongBackend(asked, wrong))
    assert caught.value.kind is ErrorKind.SELF_TEST_FAILED
    run = actstore.open(made).run(name)
    assert not run.is_complete
    # Everything is stored; without the check it is sealed as it is.
    assert run.n_units == len(run.tokenization.units)


def test_the_choice_is_seeded_and_at_least_one_with_rows(made):
    run_ingest(made, config("chosen", self_check=0), backend=Shared(config("chosen")))
    store, notices = actstore.open(made), []

    def check(share, seed):
        backend = Recording(config("chosen"))
        return check_run(backend, store, "chosen", share, seed, notices.append), backend.documents

    first, documents = check(0.2, 1)
    again, same = check(0.2, 1)
    _, others = check(0.2, 2)
    assert first == again
    assert documents == same != others
    assert sorted(set(documents)) == documents
    few, documents = check(1e-9, 4)
    assert few["n_documents"] == 1
    assert notices[-1].startswith("checking 1 of 31 documents")
    # Whatever is drawn first, the one document without tokens is never all that was compared.
    assert all(check(1e-9, seed)[0]["n_rows"] > 0 for seed in range(40, 52))


class Recording(Shared):
    def __init__(self, asked):
        super().__init__(asked)
        self.documents = []

    def call(self, method, *args):
        self.documents += args[2]
        return super().call(method, *args)


@given(st.integers(1, 5000), st.floats(0, 1), st.integers(0, 99))
def test_as_many_documents_as_asked_for_from_all_over(n, share, seed):
    k = max(1, round(share * n))
    drawn = list(_drawn(n, k, np.random.default_rng(seed)))
    flat = [d for few in drawn for d in few]
    assert len(flat) == k
    assert flat == sorted(set(flat))
    assert set(flat) <= set(range(n))
    assert max(map(len, drawn)) <= 16


def test_documents_are_found_with_all_their_windows(made):
    run_ingest(made, config("tokens", self_check=0), backend=Shared(config("tokens")))
    tokenization = actstore.open(made).run("tokens").tokenization
    tokens = DocumentTokens(tokenization)
    tables = {u.unit: tokenization.unit_table(u.unit) for u in tokenization.units}
    for doc_id in range(tokenization.corpus.n_documents):
        found = [(unit, row) for unit, t in tokens.windows(doc_id) for row in t["row"].to_pylist()]
        expected = [
            (unit, row)
            for unit, t in tables.items()
            for row, d in zip(t["row"].to_pylist(), t["doc_id"].to_pylist(), strict=True)
            if d == doc_id
        ]
        assert found == expected
        assert all(len(set(t["window"].to_pylist())) == 1 for _, t in tokens.windows(doc_id))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(("window", "overlap"), [(3, 0), (5, 0), (8, 0), (8, 3)])
def test_vectors_are_pooled_again_the_same_way(tmp_path, window, overlap, special):
    """Also where the text itself has special tokens at the edges of windows, beside those that a template puts there."""
    store = actstore.open(f"memory://pool-{window}-{overlap}-{special}", create=True, cache_dir=tmp_path)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["w1", "w2", "[SEP]", "[CLS]"], int(rng.integers(25)))) for _ in range(12)]
    import_corpus(store, "words", texts)
    tokenizer = kept.framed_tokenizer(tmp_path / "tokenizer")
    report = tokenize_corpus(
        store.refresh(), "words", tokenizer, window=window, overlap=overlap, rows_per_unit=32
    )
    tokenization = store.refresh().tokenization(report.id)
    kind = kept.KeptRun(store, "r", tokenization, keep=("pooled",), pool_special=special)
    run, captured, tokens = kind.finish(), kind.captured("embed"), DocumentTokens(tokenization)
    for pooling in run.poolings:
        found = run.pooled("embed", pooling).to_numpy(include_empty=True)
        for doc_id, vector in zip(found.doc_ids.tolist(), found.vectors, strict=True):
            windows = list(tokens.windows(doc_id))
            rows_td = np.concatenate([captured[u][t["row"].to_numpy() - 32 * u] for u, t in windows])
            again = pool(pa.concat_tables([t for _, t in windows]), rows_td, pooling, special)
            np.testing.assert_allclose(again[0], vector, rtol=1e-5, atol=1e-5)


def rows(seed, n=20, d=16):
    return np.random.default_rng(seed).standard_normal((n, d)) * 3


@settings(max_examples=50)
@given(st.integers(0, 1000), st.floats(1e-6, 0.5))
def test_differences_are_what_numpy_says(seed, size):
    computed = rows(seed)
    error = rows(seed + 1) * size
    found = compare_rows(computed + error, computed, tolerance=0.01, bounds=None, document=3, typical=False)
    lengths = np.sqrt((computed**2).sum(1))
    relative = np.sqrt(((computed + error - computed) ** 2).sum(1)) / np.maximum(lengths, np.median(lengths))
    assert found.max_abs == pytest.approx(np.abs(error).max())
    assert found.max_relative == pytest.approx(relative.max())
    assert found.mean_relative == pytest.approx(relative.mean())
    assert found.excess == pytest.approx(relative.max() / 0.01)
    assert found.worst_document == 3
    both = found + dataclasses.replace(found, excess=found.excess + 1, worst_document=8)
    assert both.worst_document == 8
    assert both.mean_relative == pytest.approx(found.mean_relative)


def test_rows_that_are_not_finite_must_be_so_on_both_sides():
    computed = rows(0)
    computed[3] = np.nan
    stored = computed.copy()
    options = {"tolerance": 0.01, "bounds": None, "document": 1, "typical": False}
    assert compare_rows(stored, computed, **options).excess == 0
    stored[4, 2] = np.inf
    assert compare_rows(stored, computed, **options).excess == np.inf
    assert compare_rows(np.full((2, 3), np.nan), np.full((2, 3), np.nan), **options) == Difference(2)


@settings(max_examples=50)
@given(st.integers(0, 1000), st.floats(-8, 8), st.floats(1, 30))
def test_int8_rows_are_within_their_bound_and_not_far_below(seed, offset, spread):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((64, 24)) * rng.lognormal(0, np.log(spread), 24) + offset).astype(np.float32)
    transform = fit_int8(x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64))
    errors = np.linalg.norm(dequantise(quantise(x, transform), transform).astype(np.float64) - x, axis=1)
    bounds = int8_bounds(x, transform)
    assert (errors <= bounds).all()
    assert errors.max() > 0.05 * bounds.max(), "a bound that says something"


def test_an_expert_model_is_judged_by_its_typical_row():
    computed = rows(1)
    stored = computed.copy()
    stored[2] = -stored[2]
    options = {"tolerance": 0.01, "bounds": None, "document": 1}
    assert compare_rows(stored, computed, **options, typical=False).excess > 1
    assert compare_rows(stored, computed, **options, typical=True).excess == 0
    assert compare_rows(-computed, computed, **options, typical=True).excess > 1


@pytest.mark.ray
def test_calibration_probe_and_check_in_an_actor_are_those_of_this_process(made):
    import ray

    asked = config("here", dtype="int8", hook_points=["layers.1.resid_post"])
    assert run_ingest(made, asked, backend=Shared(asked)).is_complete
    there = dataclasses.replace(asked, run="there", ray_address="local")
    found = dry_run(actstore.open(made), there, probe_s=0.1)
    assert found.probe is not None
    assert found.probe.n_tokens > 0
    assert run_ingest(made, there).is_complete
    assert not ray.is_initialized()
    store = actstore.open(made)
    one, other = store.run("here").collection, store.run("there").collection
    assert one.info["int8"] == other.info["int8"]
    assert one.seal.meta["self_check"]["n_rows"] == other.seal.meta["self_check"]["n_rows"] > 0
    dense = sum(o.nbytes for u in other.units.values() for o in u.objects if "/c/" in o.key)
    assert found.cost.dense["layers.1.resid_post"].nbytes == dense
