"""Statistics of stored rows are those of the numbers that the rows stand for, in every dtype."""

import numpy as np
import pyarrow as pa
import pytest

from actstore.codec.spec import plan_spec
from actstore.covariance import merge_covariances, parse_covariance
from actstore.dtypes import to_float32, to_stored
from actstore.ingest.unit_stats import unit_covariance, unit_stats
from actstore.int8 import dequantise, fit_int8, int8_error, quantise
from actstore.stats import merge_stats

N, D = 3000, 150


def make(dtype, n=N, bad=False):
    """Return a spec, stored rows, the float32 numbers that they stand for, the transform and its error."""
    rng = np.random.default_rng(7)
    acts = (rng.normal(size=(n, D)) * 10.0 ** rng.uniform(-2, 1, D) + rng.normal(size=D)).astype(np.float32)
    acts[::128] *= 40
    mean, std = acts.mean(axis=0, dtype=np.float64), acts.std(axis=0, dtype=np.float64)
    if bad:
        acts[5, 3], acts[n - 1, 0] = np.nan, np.inf
    spec = plan_spec(rows_per_unit=4096, d_model=D, dtype=dtype, codec="hot")
    if dtype != "int8":
        stored = to_stored(acts, dtype)
        return spec, stored, to_float32(stored, dtype), None, None
    transform = fit_int8(mean, std)
    stored = quantise(acts, transform)
    return spec, stored, dequantise(stored, transform), transform, int8_error(acts, stored, transform)


def tokens(n):
    rng = np.random.default_rng(8)
    return pa.table(
        {
            "row": np.arange(n) * 3 + (1 << 33),
            "token_id": rng.integers(0, 50_000, n).astype(np.int32),
            "doc_id": np.arange(n) // 1000,
            "window": np.zeros(n, np.int32),
            "window_position": (np.arange(n) % 128).astype(np.int32),
            "is_special": np.zeros(n, np.bool_),
        }
    )


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_stored_rows_count_as_the_numbers_they_stand_for(dtype, bad):
    spec, stored, acts, transform, error = make(dtype, bad=bad)
    table = tokens(N)
    stats = unit_stats("h", spec, stored, table, int8=transform, error=error)
    ok = np.isfinite(acts).all(axis=1)
    good = acts[ok].astype(np.float64)
    assert (stats.n_rows, stats.n_finite_rows) == (N, len(good)) == (N, N - 2 * bad)
    assert stats.nonfinite == (~np.isfinite(acts)).sum()
    np.testing.assert_allclose(stats.mean, good.mean(axis=0), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(stats.std, good.std(axis=0), rtol=1e-11)
    np.testing.assert_array_equal(stats.max, acts[ok].max(axis=0))
    np.testing.assert_array_equal(stats.outlier_counts, (np.abs(good) >= 6).sum(axis=0))
    norms = np.linalg.norm(acts.astype(np.float64), axis=1)
    norms[~ok] = 0
    order = np.argsort(-norms, kind="stable")[:64]
    largest = stats.sinks().largest
    assert [r.row for r in largest] == (order * 3 + (1 << 33)).tolist()
    assert [r.token_id for r in largest] == table["token_id"].to_numpy()[order].tolist()
    assert {r.window_position for r in stats.sinks(5).rows} == {0}
    assert stats.int8_error == error
    assert (error is None) == (dtype != "int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_units_merge_to_the_run(dtype):
    spec, stored, _, transform, error = make(dtype)
    table = tokens(N)
    whole = unit_stats("h", spec, stored, table, int8=transform, error=error)
    parts = [
        unit_stats("h", spec, stored[a:b], table[a:b], int8=transform)
        for a, b in ((0, 0), (0, 1111), (1111, N))
    ]
    merged = merge_stats(merge_stats(parts[0], parts[2]), parts[1])
    np.testing.assert_array_equal(merged.value_sketch.counts, whole.value_sketch.counts)
    assert merged.sinks() == whole.sinks()
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12)
    assert merged.value_quantile(0.99) == whole.value_quantile(0.99)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_covariances_of_stored_rows(dtype, bad):
    spec, stored, acts, transform, _ = make(dtype, bad=bad)
    good = acts[np.isfinite(acts).all(axis=1)].astype(np.float64)
    exact = np.cov(good.T, bias=True)
    parts = [
        unit_covariance(spec, stored[a:b], int8=transform) for a, b in ((0, 1000), (1000, 1000), (1000, N))
    ]
    for data in (unit_covariance(spec, stored, int8=transform), merge_covariances(parts)):
        covariance = parse_covariance(data)
        assert covariance.n == len(good)
        deviation = np.sqrt(np.diag(exact))
        assert (np.abs(covariance.covariance - exact) <= 1e-12 * np.outer(deviation, deviation)).all()
