"""Latents like one another: cosines by numpy, co-firing counts by scipy, measures by scikit-learn and by hand."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import jaccard_score, matthews_corrcoef

import actstore
from actstore.cli import main
from actstore.errors import InvalidInputError, NotFoundError
from actstore.query.coactivation import Counts, measure_all


def shown(result):
    return [(r["latent"], r["value"]) for r in result]


@pytest.mark.parametrize("by", ["decoder", "encoder"])
def test_weights(coded, by):
    codes = coded["sae"]
    made = codes.made
    dictionary = made.store.dictionary("sae")
    weights = dictionary.weight("W_dec") if by == "decoder" else dictionary.weight("W_enc").T
    unit = weights / np.linalg.norm(weights.astype(np.float64), axis=1, keepdims=True)
    n = np.diff(codes.matrix.tocsc().indptr)
    for latent in (0, 17, 59):
        cosines = unit @ unit[latent]
        for masked in (True, False):
            keep = [
                f for f in range(60)
                if f != latent and (not masked or (n[f] > 0 and n[f] / len(codes.rows) <= 0.1))
            ]  # fmt: skip
            keep.sort(key=lambda f: (-cosines[f], f))
            result = made.run().neighbours(
                actstore.latent("sae", latent), 7, by=by, mask_dead=masked, mask_ultra_dense=masked,
                memory_bytes=3000,  # blocks of a few latents
            )  # fmt: skip
            assert shown(result) == [(f, pytest.approx(cosines[f], abs=1e-6)) for f in keep[:7]]
            assert result.meta.n_eligible == len(keep)
            blocks = made.run().neighbours(
                f"latent:sae:{latent}", 7, by=by, mask_dead=masked, mask_ultra_dense=masked
            )
            assert shown(blocks) == shown(result)


def indicators(codes, unit):
    """Which rows or documents each latent fires in, shape (n, f)."""
    fires = codes.matrix.toarray() > 0
    if unit == "token":
        return fires
    tokens = codes.made.by_row
    docs = np.array([tokens[r].doc_id for r in codes.rows.tolist()])
    return np.stack([fires[docs == d].any(axis=0) for d in np.unique(docs)])


def by_hand(one, other):
    """Measures of two columns of indicators."""
    n, both = len(one), int((one & other).sum())
    p, q, r = one.mean(), other.mean(), both / n
    npmi = -1.0 if not both else 1.0 if r == 1 else math.log(r / (p * q)) / -math.log(r)
    return {
        "n_both": both, "n_this": int(one.sum()), "n_other": int(other.sum()), "n_expected": p * q * n,
        "jaccard": jaccard_score(one, other), "npmi": npmi, "phi": matthews_corrcoef(one, other), "lift": r / (p * q),
        "p_other": both / one.sum(), "p_this": both / other.sum(),
    }  # fmt: skip


@pytest.mark.parametrize("unit", ["token", "document"])
@pytest.mark.parametrize("measure", ["jaccard", "npmi", "phi", "lift", "p_other", "p_this"])
def test_firing_together(coded, unit, measure):
    codes = coded["sae"]
    fires = indicators(codes, unit)
    n = np.diff(codes.matrix.tocsc().indptr)
    latent = int(np.argsort(-n)[8])
    for min_both in (1, 4):
        wanted = {
            f: by_hand(fires[:, latent], fires[:, f])
            for f in range(60)
            if f != latent and n[f] > 0 and int((fires[:, latent] & fires[:, f]).sum()) >= min_both
        }
        result = codes.made.run().neighbours(
            actstore.latent("sae", latent), 1000, by="coactivation", measure=measure, unit=unit, min_both=min_both,
            mask_ultra_dense=False,
        )  # fmt: skip
        assert {r["latent"] for r in result} == set(wanted)
        for r in result:
            for name, value in wanted[r["latent"]].items():
                assert r[name] == pytest.approx(value, rel=1e-9, abs=1e-9), (r["latent"], name)
            assert r["value"] == r[measure]
        order = [(-r["value"], r["latent"]) for r in result]
        assert order == sorted(order)
        assert [r["rank"] for r in result] == list(range(1, len(result) + 1))


def test_masks(coded):
    codes = coded["sae"]
    fires = indicators(codes, "token")
    density = fires.mean(axis=0)
    latent = int(np.argsort(-density)[3])
    run = codes.made.run()
    options = {"by": "coactivation", "min_both": 1}
    result = run.neighbours(actstore.latent("sae", latent), 1000, **options)
    together = {f for f in range(60) if f != latent and (fires[:, f] & fires[:, latent]).any()}
    assert {r["latent"] for r in result} == {f for f in together if density[f] <= 0.1}
    options |= {"where": "latent < 30", "density": (0.01, 0.2), "mask_ultra_dense": False}
    result = run.neighbours(actstore.latent("sae", latent), 1000, **options)
    assert {r["latent"] for r in result} == {f for f in together if f < 30 and 0.01 <= density[f] <= 0.2}
    assert result.meta.mask["removed"]["itself"] <= 1
    assert result.meta.request["measure"] == "npmi"


def test_measures_at_their_limits():
    """Never together, always together, everywhere; and independence is exactly 0."""
    counts = Counts(100, 10, np.array([10, 10, 0, 100, 50]), np.array([0, 10, 0, 10, 5]))
    found = measure_all(counts)
    assert found["npmi"].tolist() == [-1, 1, -1, 0, 0]
    assert found["jaccard"].tolist() == [0, 1, 0, 0.1, pytest.approx(5 / 55)]
    assert found["phi"].tolist() == [pytest.approx(-1 / 9), 1, 0, 0, 0]
    assert found["lift"].tolist() == [0, 10, 0, 1, 1]
    everywhere = measure_all(Counts(7, 7, np.array([7]), np.array([7])))
    assert {name: values.tolist() for name, values in everywhere.items()} == {
        "jaccard": [1], "npmi": [1], "phi": [0], "lift": [1], "p_other": [1], "p_this": [1],
    }  # fmt: skip


def test_errors(coded):
    run = coded["sae"].made.run()
    n = np.diff(coded["sae"].matrix.tocsc().indptr)
    dead = actstore.latent("sae", int(np.flatnonzero(n == 0)[0]))
    one = actstore.latent("sae", 0)
    for error, latent, options in (
        (NotFoundError, actstore.latent("sae", 60), {}),
        (NotFoundError, actstore.latent("absent", 0), {}),
        (NotFoundError, actstore.latent("bare", 0), {"by": "coactivation"}),
        (InvalidInputError, dead, {"by": "coactivation"}),
        (InvalidInputError, actstore.neuron("layers.0.resid_post", 0), {}),
        (InvalidInputError, 3, {}),
        (InvalidInputError, one, {"by": "label"}),
        (InvalidInputError, one, {"measure": "npmi"}),
        (InvalidInputError, one, {"by": "coactivation", "measure": "cosine"}),
        (InvalidInputError, one, {"unit": "window"}),
        (InvalidInputError, one, {"min_both": 0}),
        (InvalidInputError, one, {"where": "1; SELECT 1"}),
    ):
        with pytest.raises(error):
            run.neighbours(latent, **options)


def test_command(coded, capsys):
    made = coded["sae"].made
    command = ["neighbours", made.url, "run", "latent:sae:3", "-k", "4", "--by", "coactivation", "--measure", "jaccard",
               "--min-both", "1", "--keep-ultra-dense", "--json"]  # fmt: skip
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    wanted = made.run().neighbours(
        "latent:sae:3", 4, by="coactivation", measure="jaccard", min_both=1, mask_ultra_dense=False
    )
    assert answer["rows"] == json.loads(wanted.to_json())["rows"]
    assert main(["neighbours", made.url, "run", "latent:sae:99"]) == 3
    assert "60" in capsys.readouterr().err
