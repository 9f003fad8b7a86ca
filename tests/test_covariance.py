"""Covariances against np.cov in float64, whole and merged; what is no covariance is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.covariance import (
    MAX_D_MODEL,
    Covariance,
    covariance_key,
    covariance_of,
    is_covariance_key,
    merge_covariances,
    pack_covariance,
    parse_covariance,
)
from actstore.errors import FormatError, InvalidInputError
from actstore.stats import block_stats


def of(acts) -> Covariance:
    return covariance_of(lambda rows, _: acts[rows], n_rows=len(acts), d_model=acts.shape[1])


def check(covariance, acts):
    """Every entry to 5e-12 of the standard deviations it belongs to, and to the rounding of the means that are merged."""
    good = acts[np.isfinite(acts).all(axis=1)].astype(np.float64)
    assert covariance.n == len(good)
    if not len(good):
        assert np.isnan(covariance.covariance).all()
        return
    exact = np.cov(good.T, bias=True).reshape(acts.shape[1], -1)
    got = covariance.covariance
    np.testing.assert_array_equal(got, got.T)
    deviation, rounding = np.sqrt(np.diag(exact)), 1e-15 * np.abs(good).max(axis=0)
    both = np.outer(deviation, rounding) + np.outer(rounding, deviation) + np.outer(rounding, rounding)
    assert (np.abs(got - exact) <= 5e-12 * np.outer(deviation, deviation) + both).all()
    np.testing.assert_allclose(
        covariance.mean, good.mean(axis=0), rtol=1e-12, atol=1e-13 * np.abs(good).max()
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 400),
    d=st.sampled_from([1, 2, 17, 255, 257, 300]),
    cuts=st.lists(st.integers(0, 400), max_size=4),
)
def test_whole_and_merged_equal_numpy(seed, n, d, cuts):
    rng = np.random.default_rng(seed)
    acts = rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) * 10.0 ** rng.uniform(-3, 3, d))
    acts = (acts + 10.0 ** rng.uniform(-1, 5, d)).astype(np.float32)
    bad = rng.random((n, d)) < 0.05 / d
    acts[bad] = rng.choice([np.nan, np.inf, -np.inf], int(bad.sum()))
    check(of(acts), acts)
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    parts = [pack_covariance(of(acts[edges[i] : edges[i + 1]])) for i in range(len(edges) - 1)]
    check(parse_covariance(merge_covariances(parts)), acts)
    check(parse_covariance(merge_covariances(reversed(parts))), acts)


@pytest.mark.parametrize("n_first", [4000, 2])
def test_many_blocks_and_first_rows_unlike_the_others(n_first):
    """Sums around a mean that is far from the others' must not cancel, however few rows made that mean."""
    rng = np.random.default_rng(0)
    acts = (rng.normal(size=(45_000, 260)) + 1e4).astype(np.float32)
    acts[:4000] -= 3e4
    acts[n_first:4100, 7] = np.nan
    check(of(acts), acts)


def test_the_diagonal_is_the_variance_of_the_statistics():
    acts = (np.random.default_rng(1).normal(size=(500, 20)) * 3 - 40).astype(np.float32)
    covariance, stats = of(acts), block_stats("h", acts)
    np.testing.assert_allclose(np.diag(covariance.covariance), stats.variance, rtol=1e-12)
    np.testing.assert_allclose(covariance.mean, stats.mean, rtol=1e-13)


def test_stored_bytes_are_as_the_format_says():
    acts = np.array([[1, 2], [3, 6]], np.float32)
    expected = b"ACTCOV1\n" + np.array([2, 2], "<u8").tobytes() + np.array([2, 4, 2, 4, 8], "<f8").tobytes()
    assert pack_covariance(of(acts)) == expected
    again = parse_covariance(expected)
    assert (again.n, again.mean.tolist(), again.covariance.tolist()) == (2, [2, 4], [[1, 2], [2, 4]])


@pytest.mark.parametrize("cut", [0, 5, 23, 24, 60, -1, -8])
def test_cut_or_foreign_bytes_are_refused(cut):
    data = pack_covariance(of(np.ones((3, 3), np.float32)))
    for wrong in (data[:cut], data + b"\0" * 8, b"ACTCOV2\n" + data[8:], b"\x80\x04" + data):
        with pytest.raises(FormatError, match="run fsck"):
            parse_covariance(wrong)


def test_parts_that_do_not_fit_together():
    two, three = (pack_covariance(of(np.ones((3, d), np.float32))) for d in (2, 3))
    with pytest.raises(FormatError, match="2 and of 3"):
        merge_covariances([two, three])
    with pytest.raises(InvalidInputError, match="at least one"):
        merge_covariances([])


def test_a_hook_point_that_is_too_wide_is_refused_before_any_row_is_read():
    def read(rows, out):
        raise AssertionError

    with pytest.raises(InvalidInputError, match=f"at most {MAX_D_MODEL}"):
        covariance_of(read, n_rows=10, d_model=MAX_D_MODEL + 1)


def test_keys_belong_to_one_hook_point():
    key = covariance_key("r", "module:a:output", "all-00")
    assert key == "runs/r/covariance/module~a~output/all-00.bin"
    assert is_covariance_key("r", "module:a:output", key)
    assert not is_covariance_key("r", "module:a", key)
    assert not is_covariance_key("r", "a", "runs/r/covariance/aa/all-00.bin")
    assert not is_covariance_key("s", "module:a:output", key)
