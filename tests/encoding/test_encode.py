"""Codes of stored rows against numbers worked out one by one; what is done is skipped, what is not is finished."""

import threading
import tracemalloc
import uuid

import numpy as np
import pytest

import actstore
from actstore.errors import ConflictError, ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest import import_corpus, tokenize_corpus
from actstore.ingest.encoding import unit_codes
from actstore.ingest.encoding.encode import encode
from actstore.log import fsck
from tests.encoding import encoded
from tests.encoding.encoded import HOOK_POINT, add_dictionary, content, make_run, naive_codes
from tests.ingest import kept


@pytest.fixture
def store():
    return actstore.open(f"memory://encode-{uuid.uuid4().hex}", create=True)


@pytest.fixture
def tokenization(store, tmp_path):
    return kept.tokenized(store, tmp_path / "tokenizer")


def check_codes(store, run: str = "r", dictionary: str = "sae", hook_point: str = HOOK_POINT) -> None:
    """Every stored row's codes and norm are what its stored activations give."""
    acts = store.run(run).activations(hook_point)
    codes = store.run(run).codes(dictionary)
    of = store.dictionary(dictionary)
    rows = acts.rows()
    values = acts.read(rows)
    expected = naive_codes(of, values, codes.value_dtype)
    seen = [(numbers, part.to_dense()) for numbers, part in codes.scan(batch_rows=50)]
    np.testing.assert_array_equal(np.concatenate([n for n, _ in seen]), rows)
    np.testing.assert_array_equal(np.concatenate([d for _, d in seen]), expected.astype(np.float32))
    norms = np.sqrt((values.astype(np.float64) ** 2).sum(1)).astype(np.float32)
    np.testing.assert_array_equal(codes.norms(rows), np.where(np.isfinite(norms), norms, 0))
    assert codes.counts().tolist() == (expected > 0).sum(0).tolist()


@pytest.mark.parametrize(
    ("dictionary", "settings", "run"),
    [
        ({}, {}, {}),
        ({"activation": "topk", "k": 5}, {"value_dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"activation": "topk", "k": 7}, {}, {"rate": 0.4}),
        ({"dead": True}, {}, {}),
        ({"hook_point": "embed"}, {}, {"dtype": "int8"}),
    ],
)
def test_codes_are_those_of_the_stored_rows(store, tokenization, dictionary, settings, run):
    made = make_run(store, tokenization, **run)
    add_dictionary(store, **dictionary)
    report = encode(store, "sae", "r", postings=False, **settings)
    hook_point = dictionary.get("hook_point", HOOK_POINT)
    if run.get("dtype") != "int8":
        check_codes(store, hook_point=hook_point)
    else:  # rows that are no eighths: products round
        acts = store.run("r").activations(hook_point)
        found = store.run("r").codes("sae").rows(acts.rows()).to_dense()
        np.testing.assert_allclose(found, naive_codes(store.dictionary("sae"), acts[:]), atol=4e-3)
    collection = store.state.collection("codes", "sae@r")
    assert collection.is_sealed
    assert report.n_units == report.n_units_planned == len(made.tokenization.units) == report.units_this_job
    assert report.n_rows == store.run("r").n_rows == report.rows_this_job
    assert report.n_codes == store.run("r").codes("sae").counts().sum()
    assert not fsck(store.storage, deep=True).problems


def test_rows_that_are_not_finite_have_no_codes_and_no_norm(store, tokenization):
    def value(tokens, width):
        rows = encoded.eighths(tokens, width)
        rows[3::7, 0], rows[5::11, 1] = np.nan, np.inf
        return rows

    run = make_run(store, tokenization, value=value, nonfinite="mask")
    add_dictionary(store)
    encode(store, "sae", "r", postings=False)
    check_codes(store)
    bad = {u: int((~np.isfinite(x).all(1)).sum()) for u, x in run.captured(HOOK_POINT).items()}
    units = store.state.collection("codes", "sae@r").units
    assert {u: unit.meta.get("nonfinite_rows", 0) for u, unit in units.items()} == bad


def test_encoding_again_changes_nothing(store, tokenization):
    make_run(store, tokenization)
    add_dictionary(store)
    encode(store, "sae", "r", postings=False)
    before = store.version
    again = encode(store, "sae", "r", postings=False)
    assert store.version == before
    assert again.units_this_job == 0
    assert again.n_codes > 0


def test_a_run_is_encoded_as_far_as_it_is_and_then_to_its_end(store, tokenization):
    run = make_run(store, tokenization, finish=False)
    add_dictionary(store)
    run.committer.commit([run.write(u) for u in (0, 2)])
    report = encode(store, "sae", "r", postings=False)
    assert not report.is_complete
    assert (report.n_units, report.n_units_planned) == (2, 2)
    assert not store.state.collection("codes", "sae@r").is_sealed
    check_codes(store)
    run.finish(without=(1,))
    encode(store, "sae", "r", postings=False)
    assert store.state.collection("codes", "sae@r").is_sealed
    assert 1 not in store.state.collection("codes", "sae@r").units
    check_codes(store)


def test_a_stopped_job_goes_on_where_it_was(store, tokenization):
    make_run(store, tokenization)
    add_dictionary(store)
    stop = threading.Event()
    stop.set()
    report = encode(store, "sae", "r", postings=False, stop=stop)
    assert (report.n_units, report.is_complete) == (0, False)
    encode(store, "sae", "r", postings=False)
    check_codes(store)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value_dtype": "float32"}, r"value_dtype: 'float16' -> 'float32'"),
        ({"pool_top_m": 3}, r"pool_top_m: 512 -> 3"),
        ({"pool_special": True}, r"pool_special: False -> True"),
        ({"compute_dtype": "bfloat16"}, r"encoder.compute_dtype: 'float32' -> 'bfloat16'"),
    ],
)
def test_other_settings_under_the_same_name_are_refused(store, tokenization, settings, message):
    make_run(store, tokenization)
    add_dictionary(store)
    encode(store, "sae", "r", postings=False)
    with pytest.raises(ConflictError, match=message) as error:
        encode(store, "sae", "r", postings=False, **settings)
    assert error.value.kind is ErrorKind.CONFIG_DIFFERS


@pytest.mark.parametrize(
    "settings",
    [
        {"value_dtype": "float64"},
        {"pool_top_m": 0},
        {"pool_top_m": 1.5},
        {"pool_special": 1},
        {"compute_dtype": "float16"},
        {"workers": 2},
        {"device": "abacus"},
    ],
)
def test_settings_that_cannot_be_are_refused(store, tokenization, settings):
    make_run(store, tokenization)
    add_dictionary(store)
    with pytest.raises(InvalidInputError):
        encode(store, "sae", "r", postings=False, **settings)


def test_what_does_not_fit_is_refused_before_anything_is_made(store, tokenization):
    make_run(store, tokenization)
    make_run(store, tokenization, "p", keep=("pooled",))
    add_dictionary(store)
    add_dictionary(store, "elsewhere", hook_point="embed", seed=1)
    with pytest.raises(NotFoundError, match="nothing"):
        encode(store, "sae", "nothing")
    with pytest.raises(NotFoundError, match="nothing"):
        encode(store, "nothing", "r")
    with pytest.raises(InvalidInputError, match="no dense rows"):
        encode(store, "sae", "p")
    assert not [kind for kind, _ in store.state.collections if kind == "codes"]


def test_codes_too_large_for_float16_say_what_to_do_and_the_rest_is_kept(store, tokenization):
    def value(tokens, width):
        rows = encoded.eighths(tokens, width)
        if tokens["row"][0].as_py() == 64 and width == encoded.WIDTH:
            rows[0] = 1e6 * np.asarray(store.dictionary("sae").weight("W_enc")[:, 0])
        return rows

    add_dictionary(store)
    make_run(store, tokenization, value=value)
    with pytest.raises(InvalidInputError, match="float32") as error:
        encode(store, "sae", "r", postings=False)
    assert error.value.kind is ErrorKind.OVERFLOW
    assert sorted(store.refresh().state.collection("codes", "sae@r").units) == [
        u.unit for u in tokenization.units if u.unit != 1
    ]


@pytest.mark.parametrize(
    "texts",
    [
        ["", "", "a"],
        ["a", "b", "", "a", "c", ""],
        ["w " * 300, "w", "", "w " * 5],
    ],
    ids=["empty", "one-token", "one-word"],
)
@pytest.mark.parametrize("dead", [False, True])
def test_odd_corpora(store, tmp_path, texts, dead):
    import_corpus(store, "odd", texts)
    tokenizer = kept.framed_tokenizer(tmp_path / "tokenizer")
    made = tokenize_corpus(store.refresh(), "odd", tokenizer, window=16, overlap=5, rows_per_unit=64)
    run = make_run(store, store.refresh().tokenization(made.id))
    add_dictionary(store, dead=dead)
    encode(store, "sae", "r", postings=False)
    check_codes(store)
    of_rows = dense_of(run, store)
    pooled = store.run("r").codes("sae").pooled()
    assert encoded.pooled_documents(pooled.scan()) == encoded.naive_pooled(run, of_rows)


def dense_of(run, store):
    dictionary = store.dictionary("sae")
    return {
        (u, i): row
        for u, x in run.captured(HOOK_POINT).items()
        for i, row in enumerate(naive_codes(dictionary, x))
    }


def test_blocks_are_cut_alike_whatever_the_memory(store, tokenization, monkeypatch):
    """The encoder sees the same rows together, so that last bits agree between ways to codes."""
    monkeypatch.setattr(unit_codes, "BLOCK_ROWS", 7)
    monkeypatch.setattr("actstore.ingest.encoding.codes_job.BLOCK_ROWS", 7)
    run = make_run(store, tokenization)
    for unit in tokenization.units[:3]:
        stored = run.captured(HOOK_POINT)[unit.unit]
        acts = store.refresh().run("r").activations(HOOK_POINT)
        read = [b.copy() for _, b in acts.scan(7, units=[unit.unit])]
        given = list(unit_codes.blocks_of(stored, "float32", None))
        assert [len(b) for b in read] == [len(b) for b in given]
        np.testing.assert_array_equal(np.concatenate(read), np.concatenate(given))


def test_memory_does_not_grow_with_the_rows(tmp_path):
    peaks = {}
    for n in (8, 80):
        store = actstore.open(tmp_path / f"store{n}", create=True)
        make_run(store, kept.tokenized(store, tmp_path / f"tokenizer{n}", n=n))
        add_dictionary(store)
        add_dictionary(store, "other", seed=1)
        encode(store, "other", "r", postings=False)  # imports, and what is remembered for good
        tracemalloc.start()
        encode(store, "sae", "r", postings=False)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[80] < peaks[8] + (1 << 20), peaks


def test_another_runs_codes_are_its_own(store, tokenization):
    make_run(store, tokenization)
    make_run(store, tokenization, "s", dtype="float16")
    add_dictionary(store)
    encode(store, "sae", "r", postings=False)
    encode(store, "sae", "s", postings=False)
    check_codes(store, "s")
    assert content(store, "sae@s")["config"]["encoder"]["rows_dtype"] == "float16"
