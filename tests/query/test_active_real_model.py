"""Latents of a real (tiny, random) transformer, encoded by the main job: texts, and pooled codes in SQL."""

import numpy as np
import pytest

import actstore
from actstore.dictionary import make_dictionary
from actstore.errors import InvalidInputError, NotFoundError
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.dictionaries.save import save_dictionary
from actstore.ingest.encoding.encode import encode
from actstore.query.active import document
from tests.ingest import tiny_models

H = "layers.1.resid_post"
TEXTS = [f"Document {i} says that {w} are {c}, naïvely." for i, (w, c) in enumerate(
    (w, c) for w in ("cats", "dogs", "lists", "tuples") for c in ("red", "blue", "mutable")
)]  # fmt: skip


def random_dictionary(width: int, hook_point: str, seed: int):
    rng = np.random.default_rng(seed)
    weights = {
        "W_enc": rng.standard_normal((width, 48)), "b_enc": rng.standard_normal(48) - 1,
        "W_dec": rng.standard_normal((48, width)), "b_dec": rng.standard_normal(width) / 8,
    }  # fmt: skip
    return make_dictionary(weights, activation="relu", hook_point=hook_point, apply_b_dec_to_input=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    store = actstore.open(str(folder / "store"), create=True)
    import_corpus(store, "texts", [{"text": t, "n": i} for i, t in enumerate(TEXTS)])
    config = IngestConfig(
        corpus="texts", model=tiny_models.cached("llama"), hook_points=[H], run="r", device="cpu", rows_per_unit=128,
        ray_address=None,
    )  # fmt: skip
    run_ingest(store, config)
    width = store.run("r").d_model(H)
    for name in ("sae", "late"):
        save_dictionary(store, name, random_dictionary(width, H, len(name)))
    save_dictionary(store, "elsewhere", random_dictionary(width, "layers.0.mlp_in", 9))
    encode(store, "sae", "r", device="cpu")
    return store.latest().run("r")


def naive_text(run, text, name):
    """Codes of a text's tokens in float64, and which tokens count."""
    dictionary = run.store.dictionary(name)
    w = {part: dictionary.weight(part).astype(np.float64) for part in ("W_enc", "b_enc", "b_dec")}
    [encoded] = run.encode_text([text], H)
    acts = encoded.activations.astype(np.float64)
    limit = 10 * run.stats(H).norm_quantile(0.5)
    counts = ~encoded.is_special & (np.arange(len(acts)) > 0) & (np.linalg.norm(acts, axis=1) <= limit)
    return np.maximum((acts - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0), counts


@pytest.mark.parametrize("agg", ["max", "mean", "sum", "count"])
def test_a_text(run, agg):
    for text in (TEXTS[4], "Tuples are blue cats."):
        codes, counts = naive_text(run, text, "sae")
        values = {
            "max": codes[counts].max(axis=0), "mean": codes[counts].mean(axis=0), "sum": codes[counts].sum(axis=0),
            "count": (codes[counts] > 0).sum(axis=0),
        }[agg]  # fmt: skip
        result = run.active(text, "sae", 1000, agg=agg, mask_ultra_dense=False, mask_dead=False)
        assert {r["latent"] for r in result} == set(np.flatnonzero(values).tolist())
        for r in result:
            assert r["value"] == pytest.approx(values[r["latent"]], rel=2e-3)
            assert r["position"] == np.where(counts, codes[:, r["latent"]], -1).argmax()
            assert r["row"] is None
        assert result.meta.request["subject"] == "text"


def test_a_text_and_its_stored_document(run):
    """What the model computes on the text now is what was stored of the document, up to the stored dtype."""
    for i in (0, 7):
        options = {"rank": "surprise", "mask_ultra_dense": False}
        now = {r["latent"]: r for r in run.active(TEXTS[i], "sae", 1000, **options)}
        stored = {r["latent"]: r for r in run.active(document(i), "sae", 1000, **options)}
        common = now.keys() & stored.keys()
        assert len(common) > 0.9 * max(len(now), len(stored))
        for latent in common:
            assert now[latent]["score"] == pytest.approx(stored[latent]["score"], rel=0.05, abs=0.05)


def test_a_text_and_a_dictionary_that_the_run_was_not_encoded_with(run):
    result = run.active(TEXTS[2], "late", 1000)
    codes, counts = naive_text(run, TEXTS[2], "late")
    assert {r["latent"] for r in result} == set(np.flatnonzero(codes[counts].any(axis=0)).tolist())
    assert set(result.table["density"].to_pylist()) == {None}
    assert any("not encoded" in w for w in result.meta.warnings)
    for options in ({"rank": "surprise"}, {"where": "density < 1"}):
        with pytest.raises(NotFoundError, match="encode it"):
            run.active(TEXTS[2], "late", **options)
    with pytest.raises(NotFoundError, match="encode it"):
        run.active(0, "late")
    with pytest.raises(InvalidInputError, match=r"layers\.0\.mlp_in"):
        run.active(TEXTS[2], "elsewhere")


def test_a_text_per_token(run):
    codes, counts = naive_text(run, TEXTS[1], "sae")
    result = run.active(TEXTS[1], "sae", 1, per_token=True, mask_ultra_dense=False, mask_dead=False)
    wanted = {int(t): codes[t].max() for t in np.flatnonzero(counts) if codes[t].any()}
    assert {r["position"]: pytest.approx(r["value"], rel=2e-3) for r in result} == wanted
    assert all(r["doc_id"] is None for r in result)


def test_pooled_codes_in_sql(run):
    told = run.store.sql("SELECT * FROM pooled_codes ORDER BY doc_id, latent").to_pandas()
    wanted = run.store.sql("""
        SELECT t.doc_id, latent, max(value) AS max, sum(value::DOUBLE) AS sum, count(*) AS count
        FROM codes JOIN tokens t USING (tokenization, row)
        WHERE NOT t.is_special GROUP BY ALL ORDER BY ALL
    """).to_pandas()
    n_tokens = run.store.sql(
        "SELECT doc_id, count(*) AS n FROM tokens WHERE NOT is_special GROUP BY 1"
    ).to_pandas()
    n = dict(zip(n_tokens["doc_id"], n_tokens["n"], strict=True))
    assert len(told) == len(wanted) > 100
    for name in ("doc_id", "latent", "max", "sum", "count"):
        np.testing.assert_allclose(told[name], wanted[name], rtol=1e-12)
    np.testing.assert_allclose(told["mean"], wanted["sum"] / [n[d] for d in wanted["doc_id"]], rtol=1e-12)
    some = run.store.sql(
        "SELECT latent, sum FROM pooled_codes WHERE dictionary = 'sae' AND doc_id IN (3, 5, 99) ORDER BY doc_id, latent"
    )
    assert some.to_pandas()["sum"].tolist() == told[told["doc_id"].isin([3, 5])]["sum"].tolist()
    assert some.meta.bytes_read > 0
