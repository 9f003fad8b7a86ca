"""Sealing a run: what is written of the whole of it, with units left out, and after a seal that was interrupted."""

import itertools
import json

import pytest
import zarr

import actstore
from actstore.errors import ConflictError, ErrorKind, NotFoundError
from actstore.log import fsck
from tests.ingest import kept
from tests.ingest.kept import HOOK_POINTS, KeptRun

COUNT = itertools.count()


@pytest.fixture
def store(tmp_path):
    return actstore.open(str(tmp_path / "store"), create=True)


@pytest.fixture
def tokenization(store, tmp_path):
    return kept.tokenized(store, tmp_path / "tokenizer", n=8)


def attributes(store, name="embed"):
    data = json.loads(store.storage.get(f"runs/r/{name}/zarr.json"))
    return data["attributes"]["actstore"]


def test_units_are_missing(store, tokenization):
    kind = KeptRun(store, "r", tokenization)
    n_units = len(tokenization.units)
    kind.finish(without=[1, 2], seal=False)
    for quarantined in ({}, {1: "failed"}, {0: "is there", 1: "failed"}):
        with pytest.raises(ConflictError, match=f"{n_units - 2} of its {n_units} units") as caught:
            kind.committer.seal(n_units=n_units, quarantined=quarantined)
        assert caught.value.kind is ErrorKind.COUNT_DIFFERS
    assert not store.refresh().run("r").is_complete
    assert store.storage.get("runs/r/embed/zarr.json") is None


def test_quarantined_units(store, tokenization):
    """They are listed wherever somebody could miss that their rows are not there; a live one is none, whatever a job thought."""
    kind = KeptRun(store, "r", tokenization)
    n_units = len(tokenization.units)
    kind.finish(without=[2], seal=False)
    meta = {"self_check": {"largest": 0.5}}
    version = kind.committer.seal(
        n_units=n_units, quarantined={2: "NaN in document 7", 0: "lost an answer"}, meta=meta
    )
    assert kind.committer.seal(n_units=n_units) == version, "a sealed run stays as it is"
    run = store.refresh().run("r")
    assert run.is_complete
    assert run.quarantined == {2: "NaN in document 7"}
    assert run.collection.seal.meta == {
        "nonfinite": 0, "quarantined": {"2": "NaN in document 7"}, "self_check": {"largest": 0.5}
    }  # fmt: skip
    assert run.n_rows == tokenization.n_rows - tokenization.collection.units[2].rows
    with pytest.raises(NotFoundError):
        run.activations("embed")[2 * tokenization.rows_per_unit]
    for name in HOOK_POINTS:
        assert attributes(store, name)["quarantined"] == [2]
        array = zarr.open_array(f"{store.url}/{run.array_path(name)}", mode="r")
        assert array.shape[0] == n_units * tokenization.rows_per_unit
    assert fsck(store.storage, deep=True).is_clean


def test_a_complete_run_says_nothing_of_quarantine(store, tokenization):
    run = KeptRun(store, "r", tokenization).finish()
    assert run.quarantined == {}
    assert "quarantined" not in attributes(store)
    assert run.collection.seal.meta == {"nonfinite": 0}


def test_after_an_interrupted_seal(store, tokenization):
    """Its zarr.json is kept although one of the units it calls quarantined was computed since; a foreign one is not."""
    kind = KeptRun(store, "r", tokenization)
    n_units = len(tokenization.units)
    kind.finish(without=[0, 2], seal=False)
    list(kind.committer._write_array_metadata(n_units, [0, 2]))  # then it died
    later = KeptRun(store, "r", tokenization)
    run = later.finish(without=[2])
    assert run.quarantined.keys() == {2}
    assert attributes(store)["quarantined"] == [0, 2]
    assert fsck(store.storage, deep=True).is_clean


@pytest.mark.parametrize("found", [b"{}", b"not json", b'{"attributes": {"actstore": {"quarantined": [0]}}}'])
def test_foreign_array_metadata(store, tokenization, found):
    kind = KeptRun(store, "r", tokenization)
    kind.finish(without=[0], seal=False)
    store.storage.put_new("runs/r/embed/zarr.json", [found])
    with pytest.raises(ConflictError, match=r"zarr\.json") as caught:
        kind.finish(without=[0])
    assert caught.value.kind is ErrorKind.ALREADY_EXISTS


def test_quarantine_cannot_grow(store, tokenization):
    """Array metadata that says a unit is there must not stay if it is not."""
    kind = KeptRun(store, "r", tokenization)
    n_units = len(tokenization.units)
    kind.finish(without=[0, 2], seal=False)
    list(kind.committer._write_array_metadata(n_units, [2]))
    with pytest.raises(ConflictError, match=r"zarr\.json"):
        kind.finish(without=[0, 2])


def test_sampled_arrays_have_their_own_grid(store, tokenization):
    """Places of a sampled run's array: as many for each unit as the fullest one needs."""
    kind = KeptRun(store, "r", tokenization, rate=0.3)
    run = kind.finish()
    places = run.config["stored_rows_per_unit"]
    assert places < tokenization.rows_per_unit
    array = zarr.open_array(f"{store.url}/{run.array_path('embed')}", mode="r")
    assert array.shape == (len(tokenization.units) * places, HOOK_POINTS["embed"])
    acts = run.activations("embed")
    unit = max(run.collection.units.values(), key=lambda u: u.rows)
    start = unit.unit * tokenization.rows_per_unit
    stored = array[unit.unit * places : unit.unit * places + unit.rows]
    assert (stored == acts[start : start + tokenization.rows_per_unit]).all()
