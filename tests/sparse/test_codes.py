"""Codes and postings of a whole run, read through a store, against the matrix they were made of."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

import actstore
from actstore.codes import Codes, codes_id
from actstore.errors import ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.postings import Postings
from actstore.sampling import Sample
from actstore.sparse.parts import clear_caches
from tests.query.make_codes import add_codes, everywhere_codes, random_codes, stored_rows, wide_codes
from tests.query.make_store import add_run, make_store, random_values

WIDTHS = {"layers.0.resid_post": 6}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Stores' codes by name: of a whole run, of a sampled one, wide, of one that lacks units, without postings."""
    made = make_store(str(tmp_path_factory.mktemp("sparse") / "a.store"), seed=5, n_documents=40)
    add_run(made, "run", WIDTHS, random_values(1, WIDTHS))
    add_run(made, "some", WIDTHS, random_values(2, WIDTHS), sample=Sample(0.4, 3))
    add_run(made, "part", WIDTHS, random_values(3, WIDTHS), skip_units=(1,), seal=False)
    add_run(made, "fresh", WIDTHS, random_values(4, WIDTHS))
    n = len(stored_rows(made, "run"))
    return {
        "whole": add_codes(made, random_codes(n, 40, seed=1, ties=True)),
        "float32": add_codes(
            made, everywhere_codes(n, 30), dictionary="f32", value_dtype="float32", n_segments=1
        ),
        "wide": add_codes(made, wide_codes(n), dictionary="wide", n_segments=2),
        "bare": add_codes(made, random_codes(n, 20, seed=2), dictionary="bare", postings=False),
        "sampled": add_codes(made, random_codes(len(stored_rows(made, "some")), 30, seed=3), run="some"),
        "partial": add_codes(made, random_codes(len(stored_rows(made, "part")), 30, seed=4), run="part"),
    }


EVERY = ["whole", "float32", "wide", "bare", "sampled", "partial"]
WITH_POSTINGS = ["whole", "float32", "wide", "sampled"]


def csr(found):
    return sp.csr_matrix(found.to_scipy().astype(np.float64))


def check(found, expected):
    assert (found.n_rows, found.n_latents, found.nnz) == (*expected.shape, expected.nnz)
    assert abs(csr(found) - expected).max() == 0 if expected.nnz else True


@pytest.mark.parametrize("name", EVERY)
def test_rows_in_any_order(told, name):
    told = told[name]
    codes = told.codes
    assert codes.n_rows == len(told.rows)
    assert codes.n_codes == told.matrix.nnz
    check(codes.rows(told.rows), told.matrix)
    some = np.random.default_rng(0).integers(0, len(told.rows), 200)
    check(codes.rows(told.rows[some]), told.matrix[some])
    check(codes.rows([]), told.matrix[:0])
    assert (codes.norms(told.rows[some]) == told.norms[some]).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("batch_rows", [1, 7, 1 << 20])
def test_scan(told, name, batch_rows):
    told = told[name]
    rows, parts = [], []
    for numbers, found in told.codes.scan(batch_rows):
        assert len(numbers) == found.n_rows <= batch_rows
        rows.append(numbers)
        parts.append(csr(found))
    assert np.concatenate(rows).tolist() == told.rows.tolist()
    assert abs(sp.vstack(parts) - told.matrix).max() == 0


@pytest.mark.parametrize("name", EVERY)
def test_units_and_counts(told, name):
    told = told[name]
    codes = told.codes
    rows = [codes.unit_rows(u) for u in sorted(codes.collection.units)]
    assert np.concatenate(rows).tolist() == told.rows.tolist()
    assert codes.counts().tolist() == np.diff(told.matrix.tocsc().indptr).tolist()
    total = np.zeros(told.n_latents, np.int64)
    for u in codes.collection.units:
        latents, counts = codes.unit(u).counts()
        total[latents] += counts
    assert total.tolist() == codes.counts().tolist()


@pytest.mark.parametrize("name", ["whole", "sampled"])
def test_documents(told, name):
    told = told[name]
    docs = {token.row: token.doc_id for token in told.made.tokens}
    of_row = np.array([docs[int(row)] for row in told.rows])
    for doc_id in range(len(told.made.texts)):
        rows, found = told.codes.document(doc_id)
        here = of_row == doc_id
        assert rows.tolist() == told.rows[here].tolist()
        check(found, told.matrix[np.flatnonzero(here)])
    with pytest.raises(NotFoundError, match=str(len(told.made.texts))):
        told.codes.document(len(told.made.texts))
    with pytest.raises(InvalidInputError):
        told.codes.document(-1)


def test_documents_of_units_that_are_not_encoded(told):
    told = told["partial"]
    units = told.made.store.tokenization(told.made.tokenization).units
    with pytest.raises(NotFoundError, match="unit 1"):
        told.codes.document(units[1].meta["last_doc"])


@pytest.mark.parametrize("name", WITH_POSTINGS)
def test_postings(told, name):
    told = told[name]
    postings = told.codes.postings()
    assert postings.n_latents == told.n_latents
    assert postings.n_postings == told.matrix.nnz
    counts = np.diff(told.matrix.tocsc().indptr)
    assert postings.counts().tolist() == counts.tolist()
    firing = np.flatnonzero(counts)[:40]
    asked = np.append(firing, np.flatnonzero(counts == 0)[:2])[::-1]
    for latent, (rows, values) in zip(asked.tolist(), postings.read_many(asked), strict=True):
        expected_rows, expected = told.firing(latent)
        assert postings.count(latent) == len(expected_rows)
        assert rows.tolist() == expected_rows.tolist()
        assert values.astype(np.float64).tolist() == expected.tolist()
        again = postings.latent(latent)
        assert again[0].tolist() == rows.tolist()
        order = np.lexsort((expected_rows, -expected))
        for n in (0, 1, 3, 10_000):
            top, _ = postings.top(latent, n)
            assert top.tolist() == expected_rows[order][:n].tolist()
        low, high = (0.5, 2.0) if len(rows) else (0, 1)
        found, between = postings.value_range(latent, low, high)
        inside = (expected[order] >= low) & (expected[order] < high)
        assert found.tolist() == expected_rows[order][inside].tolist()
        assert between.astype(np.float64).tolist() == expected[order][inside].tolist()
        assert postings.value_range(latent, 0)[0].tolist() == expected_rows[order].tolist()
        some = told.rows[:: max(1, len(told.rows) // 50)]
        assert postings.values_at(latent, some).tolist() == [told.value(r, latent) for r in some]
    sealed = [o.key for u in postings.collection.units.values() for o in u.objects if o.key.endswith(".bin")]
    assert [o.key for o in postings.objects_of(range(told.n_latents))] == sealed
    assert [o.key for o in postings.objects_of([0])] == sealed[:1]


def test_rows_that_do_not_exist(told):
    codes = told["whole"].codes
    rows = told["whole"].rows
    gap = next(r for r in range(int(rows[-1])) if r not in set(rows.tolist()))
    for bad in (gap, int(rows[-1]) + 1, -1):
        with pytest.raises(NotFoundError) as error:
            codes.rows([int(rows[0]), bad])
        assert error.value.kind is ErrorKind.ROW_NOT_FOUND
    with pytest.raises(InvalidInputError):
        codes.rows([0.5])
    with pytest.raises(NotFoundError, match="unit 99"):
        codes.unit(99)
    with pytest.raises(NotFoundError):
        told["partial"].codes.unit_rows(1)


def test_latents_that_do_not_exist(told):
    postings = told["whole"].codes.postings()
    for bad in (40, -1):
        with pytest.raises(NotFoundError, match=r"\[0, 40\)"):
            postings.latent(bad)
        with pytest.raises(NotFoundError):
            postings.read_many([0, bad])
    for wrong in (True, 1.0, "3", None):
        with pytest.raises(InvalidInputError):
            postings.top(wrong, 5)
    with pytest.raises(InvalidInputError):
        postings.top(0, -1)


def test_codes_that_are_not_there(told):
    run = told["whole"].made.run("run")
    with pytest.raises(NotFoundError) as error:
        run.codes("nope")
    assert "'bare'" in error.value.message
    assert "no dictionary of that name, but" in error.value.message
    with pytest.raises(NotFoundError, match="actstore sae encode STORE sae fresh"):
        told["whole"].made.run("fresh").codes("sae")
    with pytest.raises(NotFoundError, match="none"):
        told["whole"].made.run("fresh").codes("nope")
    with pytest.raises(InvalidInputError):
        run.codes(5)
    with pytest.raises(NotFoundError, match="sae encode"):
        told["bare"].codes.postings()
    assert not told["partial"].codes.is_complete
    assert told["whole"].codes.is_complete


def test_a_dictionary_may_stand_for_its_name(told):
    made = told["whole"].made
    run = made.run("run")
    assert run.codes(run.store.dictionary("sae")).id == run.codes("sae").id


def test_pickled_readers_read(told):
    codes = pickle.loads(pickle.dumps(told["whole"].codes))
    check(codes.rows(told["whole"].rows), told["whole"].matrix)
    postings = pickle.loads(pickle.dumps(codes.postings()))
    assert postings.counts().tolist() == codes.counts().tolist()


def test_entries_of_a_faulty_writer(told):
    run, found = told["whole"].made.run("run"), told["whole"].codes.collection
    for change in (
        {"run_fingerprint": "0" * 64},
        {"run": "other"},
        {"n_latents": 0},
        {"value_dtype": "int8"},
        {"n_latents": "many"},
    ):
        with pytest.raises(FormatError) as error:
            Codes(run, replace(found, config={**found.config, **change}))
        assert error.value.kind is ErrorKind.INVARIANT_BROKEN
    with pytest.raises(FormatError):
        Codes(run, replace(found, config={}))
    without = {u: replace(unit, objects=()) for u, unit in found.units.items()}
    with pytest.raises(FormatError, match="lists 0"):
        Codes(run, replace(found, units=without)).rows([int(told["whole"].rows[0])])


def test_postings_of_a_faulty_writer(told):
    postings = told["whole"].codes.postings()
    found, storage = postings.collection, told["whole"].made.store.storage
    for bounds in ([0], [1, 40], [0, 40, 40], "x", [0, 10, 5, 40], [0, 40]):
        with pytest.raises(FormatError):
            Postings(storage, replace(found, config={**found.config, "boundaries": bounds}))
    with pytest.raises(InvalidInputError, match="3 of 3"):
        Postings(storage, replace(found, seal=None))


def test_a_damaged_page_is_an_error_that_names_the_object(tmp_path):
    made = make_store(str(tmp_path / "s.store"), seed=5, n_documents=12)
    add_run(made, "run", WIDTHS, random_values(1, WIDTHS))
    told = add_codes(made, random_codes(len(stored_rows(made, "run")), 30, seed=1))
    codes = actstore.open(made.url).run("run").codes("sae")
    [units, postings] = [
        next(o for o in c.units[0].objects if o.key.endswith(".bin"))
        for c in (codes.collection, codes.postings().collection)
    ]
    for obj in (units, postings):
        path = tmp_path / "s.store" / obj.key
        data = bytearray(path.read_bytes())
        data[12] ^= 4
        path.write_bytes(data)
    clear_caches()
    with pytest.raises(FormatError, match=units.key):
        list(codes.scan())
    with pytest.raises(FormatError, match=units.key):
        codes.rows(told.rows)
    with pytest.raises(FormatError, match=postings.key):
        codes.postings().read_many(range(10))


@pytest.mark.parametrize(
    ("dictionary", "run"),
    [
        ("sae", "run"),
        ("a@b", "c"),
        ("a", "b@c"),
        ("x" * 60, "y" * 60),
        ("s" * 32, "r" * 31),
        ("s" * 33, "r" * 31),
    ],
)
def test_ids_are_names_and_differ(dictionary, run):
    found = codes_id(dictionary, run)
    assert len(found) <= 64
    assert (found == f"{dictionary}@{run}") == (len(dictionary + run) < 64 and "@" not in dictionary + run)


def test_ids_of_different_pairs_differ():
    names = ["a", "a@b", "b", "b@c", "c", "x" * 63, "x" * 64, "a.b", "a" * 31, "a" * 32]
    ids = {codes_id(d, r) for d in names for r in names}
    assert len(ids) == len(names) ** 2
