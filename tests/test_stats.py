"""Statistics against numpy and scipy on the whole data at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.stats import block_stats, empty_stats, merge_stats, stats_from_table, stats_to_table


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    cuts=st.lists(st.integers(0, 5000), max_size=4),
    scale=st.sampled_from([1e-3, 1, 1e4]),
)
def test_merged_blocks_equal_numpy_on_all_rows(seed, cuts, scale):
    rng = np.random.default_rng(seed)
    acts = (rng.normal(3.0, 1.0, (5000, 7)) * scale).astype(np.float32)
    acts[rng.integers(0, 5000, 20)] = 0
    total = empty_stats("h", 7)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 5000], strict=True):
        total = merge_stats(total, block_stats("h", acts[start:stop]))
    wide = acts.astype(np.float64)
    assert total.n_rows == total.n_finite_rows == 5000
    np.testing.assert_allclose(total.mean, wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(total.variance, wide.var(axis=0), rtol=1e-10)
    np.testing.assert_allclose(total.second_moment, (wide**2).mean(axis=0), rtol=1e-10)
    np.testing.assert_array_equal(total.min, acts.min(axis=0))
    np.testing.assert_array_equal(total.max, acts.max(axis=0))
    norms = np.linalg.norm(wide, axis=1)
    for q in (0.0, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0):
        exact = np.quantile(norms, q, method="lower")
        assert total.norm_quantile(q) == pytest.approx(exact, rel=0.0101)
    assert total.zero_norms == int((norms == 0).sum())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_nonfinite_rows_are_counted_and_left_out(seed):
    rng = np.random.default_rng(seed)
    acts = rng.normal(size=(300, 5)).astype(np.float32)
    bad = rng.random((300, 5)) < 0.02
    acts[bad] = rng.choice([np.nan, np.inf, -np.inf], int(bad.sum()))
    stats = block_stats("h", acts)
    good = acts[~bad.any(axis=1)].astype(np.float64)
    assert (stats.n_rows, stats.n_finite_rows, stats.nonfinite) == (300, len(good), int(bad.sum()))
    np.testing.assert_allclose(stats.mean, good.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(stats.std, good.std(axis=0), rtol=1e-10)


def test_no_rows_and_only_bad_rows():
    assert np.isnan(empty_stats("h", 3).variance).all()
    assert np.isnan(empty_stats("h", 3).norm_quantile(0.5))
    stats = block_stats("h", np.full((4, 3), np.nan, np.float32))
    assert (stats.n_rows, stats.n_finite_rows, stats.nonfinite) == (4, 0, 12)


def test_table_round_trip():
    rng = np.random.default_rng(0)
    stats = {name: block_stats(name, rng.normal(size=(50, 4)).astype(np.float32)) for name in ("a", "b")}
    again = stats_from_table(stats_to_table(stats.values()))
    for name in stats:
        for field in ("mean", "m2", "min", "max", "norm_bins", "norm_counts"):
            np.testing.assert_array_equal(getattr(again[name], field), getattr(stats[name], field))
            assert getattr(again[name], field).dtype == getattr(stats[name], field).dtype
        assert again[name].n_rows == 50
