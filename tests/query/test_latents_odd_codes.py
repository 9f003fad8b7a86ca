"""Asking about codes that are odd: no latent ever fires, one fires everywhere, numbers beyond 16 bits, one word repeated."""

import numpy as np
import pytest

import actstore
from actstore.errors import InvalidInputError
from actstore.query.active import document
from actstore.query.match import fires
from tests.query.make_codes import (
    add_codes,
    dead_codes,
    everywhere_codes,
    random_codes,
    repeated_store,
    stored_rows,
    wide_codes,
)
from tests.query.make_store import add_run, make_store, random_values

WIDTHS = {"layers.0.resid_post": 4}
EVERY_ROW = {"fold": None, "mask_sinks": False, "mask_special": False}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    made = make_store(str(tmp_path_factory.mktemp("odd") / "s"), n_documents=16, seed=11)
    add_run(made, "run", WIDTHS, random_values(1, WIDTHS))
    n = len(stored_rows(made, "run"))
    return {
        "dead": add_codes(made, dead_codes(n, 20), dictionary="dead"),
        "everywhere": add_codes(made, everywhere_codes(n, 20), dictionary="everywhere"),
        "wide": add_codes(made, wide_codes(n), dictionary="wide", postings=False),
    }


def latent(name, index):
    return actstore.latent(name, int(index))


def test_no_latent_ever_fires(odd):
    run = odd["dead"].made.run()
    assert len(run.active(document(3), "dead")) == 0
    assert len(run.active(70, "dead", per_token=True, mask_dead=False)) == 0
    assert len(run.match(fires(latent("dead", 1)) & fires(latent("dead", 2)), within=9)) == 0
    assert len(run.latents("dead")) == 0
    assert len(run.latents("dead", k=None, mask_dead=False)) == 20
    assert len(run.neighbours(latent("dead", 1))) == 0
    assert len(run.neighbours(latent("dead", 1), 50, mask_dead=False)) == 19
    with pytest.raises(InvalidInputError, match="never fires"):
        run.neighbours(latent("dead", 1), by="coactivation")
    assert run.store.sql("SELECT count(*) AS n FROM codes WHERE dictionary = 'dead'").to_dicts() == [{"n": 0}]
    assert run.store.sql("SELECT sum(n_tokens) AS n FROM latents WHERE dictionary = 'dead'").to_dicts() == [
        {"n": 0}
    ]


def test_a_latent_that_fires_everywhere(odd):
    codes = odd["everywhere"]
    run = codes.made.run()
    assert 3 not in run.active(document(2), "everywhere", 50).table["latent"].to_pylist()
    for rank, first in (("activation", None), ("surprise", 3)):
        found = (
            run.active(document(2), "everywhere", 50, rank=rank, mask_ultra_dense=False)
            .table["latent"]
            .to_pylist()
        )
        assert 3 in found
        assert first is None or found[-1] == first  # however strongly it fires, that says nothing
    fires_n = (codes.matrix > 0).toarray()
    other = int(np.argsort(-fires_n.sum(axis=0))[5])
    result = run.neighbours(
        latent("everywhere", 3), 50, by="coactivation", measure="p_this", min_both=1, mask_ultra_dense=False
    )
    assert set(result.table["p_this"].to_pylist()) == {1.0}
    assert set(result.table["npmi"].to_pylist()) == {0.0}
    both = run.match(fires(latent("everywhere", 3)) & fires(latent("everywhere", other)), 5000, **EVERY_ROW)
    assert both.meta.n_eligible == fires_n[:, other].sum()
    never = run.match(fires(latent("everywhere", other)) & ~fires(latent("everywhere", 3)), within=0)
    assert len(never) == 0


def test_latents_beyond_16_bits(odd):
    codes = odd["wide"]
    run, counts = codes.made.run(), np.diff(codes.matrix.tocsc().indptr)
    high = [int(f) for f in np.argsort(-counts)[:40] if f > 65_535][:2]
    rows = codes.rows[100:160]
    sums = np.asarray(codes.matrix[100:160].sum(axis=0)).ravel()
    result = run.active(rows, "wide", 1000, agg="sum", mask_ultra_dense=False)
    assert {r["latent"]: pytest.approx(r["value"]) for r in result} == {
        int(f): sums[f] for f in np.flatnonzero(sums)
    }
    told = run.store.sql(
        "SELECT row, value FROM codes WHERE dictionary = 'wide' AND latent = ? ORDER BY row", [high[0]]
    )
    assert told.table["row"].to_pylist() == codes.firing(high[0])[0].tolist()
    together = run.match(fires(latent("wide", high[0])) & fires(latent("wide", high[1])), 5000, **EVERY_ROW)
    wanted = np.intersect1d(codes.firing(high[0])[0], codes.firing(high[1])[0])
    assert sorted(r["row"] for r in together) == wanted.tolist()


def test_one_word_repeated(tmp_path):
    made = repeated_store(str(tmp_path / "s"))
    add_run(made, "run", WIDTHS, random_values(2, WIDTHS))
    codes = add_codes(made, random_codes(len(stored_rows(made, "run")), 12, ties=True))
    run = made.run()
    a, b = (latent("sae", f) for f in np.argsort(-np.diff(codes.matrix.tocsc().indptr))[:2])
    folded = run.match(fires(a) & fires(b), 100, within=3)
    alone = run.match(fires(a) & fires(b), 100, within=3, fold=None)
    assert len(folded) < len(alone)
    assert set(folded.table["row"].to_pylist()) <= set(alone.table["row"].to_pylist())
    empty, short = 4, 2  # documents of no token and of one
    assert len(run.active(document(empty), "sae")) == 0
    assert len(run.active(document(short), "sae")) == 0  # its only token is the first of a window
    found = run.active(document(short), "sae", mask_sinks=False, mask_ultra_dense=False, k=100)
    row = next(t.row for t in made.tokens if t.doc_id == short)
    assert {r["latent"] for r in found} == set(
        codes.matrix[np.searchsorted(codes.rows, row)].indices.tolist()
    )
    assert (
        len(run.neighbours(a, 50, by="coactivation", unit="document", min_both=1, mask_ultra_dense=False)) > 0
    )
    assert {t for r in run.latents("sae") for t in r["top_tokens_by_count"]} == {"cat"}
