"""Rows as 8 bits a number: what FAISS reads in the files is within half a bin of the rows, or the row is an exception."""

import faiss
import numpy as np
import pytest
from safetensors.numpy import load

from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.indexing.scan_sq8 import ScanSq8, fit_compression
from tests.query.make_directions import KINDS, compress, fill, make_rows, opened


def parts_of(index):
    """Turn (d, d), lowest number and width (d,), all float64, and bytes (n, d), as FAISS has them."""
    turn, inner = np.eye(index.d), index
    if isinstance(index, faiss.IndexPreTransform):
        inner = faiss.downcast_index(index.index)
        linear = faiss.downcast_VectorTransform(index.chain.at(0))
        turn = faiss.vector_to_array(linear.A).reshape(index.d, index.d).astype(np.float64)
    low, width = faiss.vector_to_array(inner.sq.trained).astype(np.float64).reshape(2, -1)
    codes = faiss.rev_swig_ptr(inner.codes.data(), inner.ntotal * inner.d).reshape(-1, inner.d).copy()
    return turn, low, width, codes


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_within_half_a_bin_or_their_row_is_an_exception(kind):
    rows = make_rows(kind)
    if len(rows) > 50:
        rows[11, 3], rows[40, 0], rows[41] = np.nan, -np.inf, 3e38
    files = compress(rows)
    index, exceptions = opened(files["faiss"]), load(files["exceptions"])
    turn, low, width, codes = parts_of(index)
    assert index.ntotal == len(rows) == len(codes)
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT
    outside = exceptions["ordinals"]
    assert exceptions["rows"].dtype == np.float32
    assert np.array_equal(exceptions["rows"], rows[outside], equal_nan=True)
    inside = np.setdiff1d(np.arange(len(rows)), outside)
    stands_for = low + width * (codes[inside] + 0.5) / 255
    turned = rows[inside].astype(np.float64) @ turn.T
    assert (np.abs(turned - stands_for) <= 0.5005 * width / 255).all()
    # Every row that is not finite is an exception, and of ordinary rows hardly one is.
    assert set(np.flatnonzero(~np.isfinite(rows).all(axis=1))) <= set(outside.tolist())
    assert len(outside) <= 3 + len(rows) * (0.03 if kind == "heavy" else 0.006)


@pytest.mark.parametrize("kind", ["plain", "correlated", "constant", "sparse"])
def test_the_turn_is_orthogonal_and_bins_follow_the_spread(kind):
    rows = make_rows(kind)
    turn, _, width, _ = parts_of(opened(compress(rows)["faiss"]))
    assert np.abs(turn @ turn.T - np.eye(len(turn))).max() < 1e-5
    spread = (rows.astype(np.float64) @ turn.T).std(axis=0)
    # Ranges of independent, bell-shaped numbers are some standard deviations wide; of others more.
    assert (width <= 40 * spread + 1e-4 * np.linalg.norm(rows, axis=1).max()).all()
    covariance = np.cov(rows.T.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)[:, None])
    found = np.sort((turn @ covariance * turn).sum(axis=1))
    wanted = np.linalg.eigvalsh(covariance)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4 * wanted[-1])


def test_rows_of_a_small_sample_are_not_turned():
    rows = make_rows("plain", n=200, d=24)  # fewer than 16 a dimension
    index = opened(compress(rows)["faiss"])
    assert isinstance(index, faiss.IndexScalarQuantizer)


def test_faiss_itself_finds_the_best_in_the_file():
    """The file is an ordinary index: without us, FAISS answers nearly right from it."""
    rows = make_rows("correlated", n=5000)
    index = opened(compress(rows)["faiss"])
    queries = np.random.default_rng(1).standard_normal((20, 24)).astype(np.float32)
    _, found = index.search(queries, 10)
    true = np.argsort(-(queries.astype(np.float64) @ rows.T.astype(np.float64)), axis=1)[:, :10]
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), true.tolist(), strict=True)]
    assert np.mean(hits) >= 8


def test_later_rows_that_a_sample_did_not_show_are_exceptions_and_few():
    rng = np.random.default_rng(2)
    sample, later = (
        rng.laplace(size=(4000, 16)).astype(np.float32),
        rng.laplace(size=(20_000, 16)).astype("f4"),
    )
    trained = ScanSq8().train(sample, n_rows=24_000, metric="ip", seed=0, params={})
    later[5] = 1000
    files = fill(trained, later)
    outside = load(files["exceptions"])["ordinals"]
    assert 5 in outside
    assert 1 <= len(outside) < 0.02 * len(later)


def test_attention_sinks_do_not_stretch_the_ranges():
    rows = make_rows("plain")
    sinks = rows.copy()
    sinks[::100] *= 500
    plain, with_sinks = fit_compression(rows, n_rows=len(rows)), fit_compression(sinks, n_rows=len(rows))
    assert with_sinks.width_d.max() < 1.2 * plain.width_d.max()
    limited = fit_compression(sinks, n_rows=len(rows), norm_limit=0.0)
    assert limited.width_d.max() < 1e-20  # nothing is left to learn from


def test_files_do_not_depend_on_the_blocks():
    rows = make_rows("heavy")
    assert compress(rows, block=10_000) == compress(rows, block=100)


def test_rows_that_cannot_be_compressed_are_refused():
    rows = make_rows("plain")
    trained = ScanSq8().train(rows, n_rows=10**6, metric="ip", seed=0, params={})
    with pytest.raises(InvalidInputError, match="of 3000 rows of a shard are outside") as caught:
        fill(trained, rows * 100)
    assert caught.value.kind == ErrorKind.TOO_LARGE


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_other_metrics_are_refused(metric):
    with pytest.raises(InvalidInputError, match=r"scan_sq8.*ip"):
        ScanSq8().train(make_rows("plain"), n_rows=3000, metric=metric, seed=0, params={})
