"""Questions asked of a run of a real (tiny, random) transformer, made by the main job: a text finds itself."""

import numpy as np
import pytest

import actstore
from actstore.errors import InvalidInputError
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from tests.ingest import tiny_models

H = "layers.1.resid_post"
TEXTS = [f"Document {i} says that {w} are {c}, naïvely." for i, (w, c) in enumerate(
    (w, c) for w in ("cats", "dogs", "lists", "tuples") for c in ("red", "blue", "mutable")
)]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    store = actstore.open(str(folder / "store"), create=True)
    import_corpus(store, "texts", [{"text": t, "n": i} for i, t in enumerate(TEXTS)])
    config = IngestConfig(
        corpus="texts", model=tiny_models.cached("llama"), hook_points=[H, "layers.0.mlp_act"], run="r", device="cpu",
        rows_per_unit=128, ray_address=None,
    )  # fmt: skip
    run_ingest(store, config)
    return store.run("r")


def test_a_text_is_nearest_to_itself(run):
    for i in (0, 5, 11):
        result = run.nearest(H, TEXTS[i], 3)
        [first, *_] = result.to_dicts()
        assert first["doc_id"] == i
        assert first["value"] == pytest.approx(1.0, abs=1e-5)
        assert first["context"]["text"].endswith(TEXTS[i][-8:])
        assert result.meta.request["query"] == "text"


def test_a_token_of_a_text(run):
    last = run.nearest(H, TEXTS[3], 1).meta.request["token"]
    again = run.nearest(H, TEXTS[3], 1, token=-1)
    assert again.meta.request["token"] == last
    [earlier] = run.nearest(H, TEXTS[3], 1, token=last - 2)
    [stored] = run.nearest(H, TEXTS[3], 1)
    assert earlier["row"] == stored["row"] - 2
    with pytest.raises(InvalidInputError, match="tokens, special ones included"):
        run.nearest(H, TEXTS[3], token=10_000)


def test_examples_of_a_neuron_against_sorting(run):
    acts = run.activations("layers.0.mlp_act")[:]
    tokens = run.store.sql("SELECT row, is_special, window_position FROM tokens ORDER BY row").to_pandas()
    keep = ~tokens["is_special"] & (tokens["window_position"] > 0)
    values = np.where(keep, acts[:, 5], -np.inf)
    order = np.argsort(-values, kind="stable")[:8]
    result = run.examples(actstore.neuron("layers.0.mlp_act", 5), 8, fold=None)
    wanted = [int(tokens["row"][i]) for i in order]
    assert result.table["row"].to_pylist() == wanted
    assert all(r["context"]["text"] in TEXTS[r["doc_id"]] for r in result)


def test_sql_over_a_real_run(run):
    [row] = run.store.sql("SELECT * FROM runs")
    assert row["is_complete"]
    assert row["n_units"] == row["n_units_planned"]
    assert row["model"] == "LlamaModel"
    cut = run.store.sql(
        "SELECT DISTINCT char_start, substring(text, char_start + 1, char_end - char_start) AS cut FROM tokens "
        "JOIN documents USING (corpus, doc_id) WHERE NOT is_special AND n = 3 ORDER BY char_start"
    ).to_dicts()
    assert "".join(r["cut"] for r in cut).strip() == TEXTS[3]
