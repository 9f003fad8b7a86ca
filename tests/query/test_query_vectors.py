import numpy as np
import pytest

import actstore
from actstore.errors import InvalidInputError, NotFoundError
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.query.query_vectors import check_fit, read_query, transform_queries
from actstore.sampling import Sample
from actstore.transforms import Transform
from tests.ingest import tiny_models
from tests.query.make_store import add_run, make_store, random_values
from tests.query.naive import eligible

H = "layers.0.resid_post"


def mean_of(made, doc_id, run="run", **masks):
    """Mean of the rows that the masks leave, of several at one position the first."""
    rows = {}
    for token, acts in eligible(made, H, run, keep=lambda t: t.doc_id == doc_id, **masks):
        rows.setdefault((token.position, token.is_special), acts)
    return np.mean(list(rows.values()), axis=0) if rows else None


@pytest.mark.parametrize(
    "masks", [{}, {"special": False}, {"sinks": False}, {"special": False, "sinks": False}]
)
def test_a_document_is_the_mean_of_its_rows(made, masks):
    asked = {f"mask_{name}": value for name, value in masks.items()}
    compared = 0
    for doc_id in range(40):
        expected = mean_of(made, doc_id, **masks)
        if expected is None:
            with pytest.raises(InvalidInputError, match="no row in run 'run' that counts"):
                read_query(made.run(), H, actstore.document(doc_id), **asked)
            continue
        found = read_query(made.run(), H, actstore.document(doc_id), **asked)
        np.testing.assert_allclose(found.vectors_qd, expected[None], rtol=1e-12, atol=1e-13)
        assert (found.barred, found.is_batch) == ([(None, None)], False)
        assert found.echo == {"query": "document", "doc_id": doc_id}
        compared += 1
    assert compared > 30


def test_where_windows_overlap_a_position_counts_once(overlapping):
    repeated = 0
    for doc_id in range(30):
        tokens = [t for t in overlapping.tokens if t.doc_id == doc_id]
        repeated += len(tokens) - len({t.position for t in tokens})
        expected = mean_of(overlapping, doc_id)
        if expected is not None:
            found = read_query(overlapping.run(), H, actstore.document(doc_id))
            np.testing.assert_allclose(found.vectors_qd[0], expected, rtol=1e-12, atol=1e-13)
    assert repeated > 50


def test_a_document_of_a_sampled_and_of_a_partial_run(tmp_path):
    made = make_store(str(tmp_path / "s"), seed=5, n_documents=30)
    add_run(made, "sampled", {H: 12}, random_values(1, {H: 12}), sample=Sample(rate=0.5, seed=3))
    add_run(made, "part", {H: 12}, random_values(1, {H: 12}), skip_units=(0,), seal=False)
    for name in ("sampled", "part"):
        compared = 0
        for doc_id in range(30):
            expected = mean_of(made, doc_id, name)
            if expected is not None:
                found = read_query(made.run(name), H, actstore.document(doc_id))
                np.testing.assert_allclose(found.vectors_qd[0], expected, rtol=1e-12, atol=1e-13)
                compared += 1
        assert compared > 10
    with pytest.raises(InvalidInputError, match="no row in run 'part'"):
        read_query(made.run("part"), H, actstore.document(0))


def test_what_is_barred(made):
    run = made.run()
    token = next(t for t in made.tokens if t.doc_id == 10 and t.window_position == 3)
    assert read_query(run, H, token.row).barred == [(token.row, None)]
    assert read_query(run, H, token.row, exclude_own_document=True).barred == [(token.row, 10)]
    assert read_query(run, H, actstore.document(10), exclude_own_document=True).barred == [(None, 10)]
    assert read_query(run, H, np.ones(12)).barred is None
    several = read_query(run, H, np.ones((3, 12)))
    assert several.is_batch
    assert several.echo == {"query": "vectors", "n_queries": 3}


def test_documents_answer_questions_about_tokens(made):
    run = made.run()
    found = run.nearest(H, actstore.document(10), 15)
    query = mean_of(made, 10)
    same = run.nearest(H, query, 15)
    assert found.table["row"].to_pylist() == same.table["row"].to_pylist()
    others = run.nearest(H, actstore.document(10), 15, exclude_own_document=True)
    assert 10 not in others.table["doc_id"].to_pylist()
    with pytest.raises(NotFoundError, match=r"documents \[0, 40\)"):
        run.nearest(H, actstore.document(40))


def test_queries_that_do_not_fit():
    with pytest.raises(InvalidInputError, match="5 dimensions"):
        check_fit(np.ones((2, 5)), d_model=6, hook_point=H, metric="ip")
    with pytest.raises(InvalidInputError, match="beyond"):
        check_fit(np.full((1, 6), 1e300), d_model=6, hook_point=H, metric="l2")
    check_fit(np.full((1, 6), 1e300), d_model=6, hook_point=H, metric="cosine")
    with pytest.raises(InvalidInputError, match="query 1 of 2 is all zeros"):
        check_fit(np.array([[1.0, 0], [0, 0]]), d_model=2, hook_point=H, metric="cosine")


def test_transformed_queries():
    mean = np.array([1.0, 2.0])
    centre = Transform(("centre",), 2, None, mean)
    np.testing.assert_array_equal(transform_queries(centre, np.array([[3.0, 3.0]]), "l2"), [[2, 1]])
    with pytest.raises(InvalidInputError, match=r"becomes all zeros by transform=\['centre'\]"):
        transform_queries(centre, mean[None], "cosine")
    np.testing.assert_array_equal(transform_queries(centre, mean[None], "ip"), [[0, 0]])
    with pytest.raises(InvalidInputError, match="beyond float32"):
        transform_queries(centre, np.array([[1e60, 0]]), "l2")
    plain = np.array([[1e60, 0.1]])
    assert transform_queries(Transform((), 2), plain, "l2") is plain


def test_texts(tmp_path):
    """A text's tokens are those of the run's own model, and pooled by hand they are the pooled text."""
    h, text = "layers.1.resid_post", "Cats are red, dogs are blue."
    store = actstore.open(str(tmp_path / "store"), create=True)
    import_corpus(store, "texts", [text, "Lists are mutable."])
    config = IngestConfig(
        corpus="texts", model=tiny_models.cached("bert"), hook_points=[h], run="r", device="cpu", ray_address=None,
        rows_per_unit=64, keep=("dense", "pooled"),
    )  # fmt: skip
    run_ingest(store, config)
    run = store.run("r")
    [encoded] = run.encode_text([text], h)
    body = np.flatnonzero(~encoded.is_special)
    last = read_query(run, h, text)
    assert last.echo == {"query": "text", "text": text, "token": int(body[-1])}
    np.testing.assert_array_equal(last.vectors_qd[0], encoded.activations[body[-1]])
    np.testing.assert_array_equal(read_query(run, h, text, token=-2).vectors_qd[0], encoded.activations[-2])
    rows = encoded.activations[body].astype(np.float64)
    weights = (body + 1.0)[:, None]
    expected = {
        "mean": rows.mean(axis=0),
        "last": rows[-1],
        "max": rows.max(axis=0),
        "weighted_mean": (rows * weights).sum(axis=0) / weights.sum(),
    }
    for pooling, vector in expected.items():
        found = read_query(run, h, text, pooling=pooling)
        np.testing.assert_allclose(found.vectors_qd[0], vector, rtol=1e-6, atol=1e-7)
        assert found.echo == {"query": "text", "text": text}
    for options in ({"token": 99}, {"token": 1.5}, {"token": 0, "pooling": "mean"}):
        with pytest.raises(InvalidInputError, match="token"):
            read_query(run, h, text, **options)
    with pytest.raises(InvalidInputError, match="has a document"):
        read_query(run, h, text, exclude_own_document=True)
    with pytest.raises(InvalidInputError, match="'first'"):
        read_query(run, h, text, pooling="first")
