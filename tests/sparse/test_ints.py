"""Packed numbers come back as they were, in about as few bits as their distribution allows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import FormatError
from actstore.sparse.ints import bits_of, pack_ints, pack_values, unpack_ints, unpack_values
from actstore.sparse.order import group_postings, stable_order

DTYPES = ["<u1", "<u2", "<u4", "<u8"]


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    n_bits = draw(st.integers(0, 8 * dtype.itemsize))
    numbers = draw(st.lists(st.integers(0, (1 << n_bits) - 1), max_size=50))
    repeats = draw(st.integers(1, 30))
    return np.array(numbers * repeats, dtype)


@settings(max_examples=300, deadline=None)
@given(arrays(), st.one_of(st.none(), st.integers(0, 63)), st.binary(max_size=3))
def test_numbers_come_back(numbers, shift, after):
    if shift is not None:
        shift %= 8 * numbers.itemsize
    data = pack_ints(numbers, shift) + after
    found, end = unpack_ints(b"??" + data, len(numbers), numbers.dtype, 2)
    assert found.dtype == numbers.dtype
    assert found.tolist() == numbers.tolist()
    assert end == 2 + len(data) - len(after)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(2.0**-24, 60000, width=16), min_size=1, max_size=80),
    st.sampled_from(["<f2", "<f4"]),
    st.integers(1, 40),
)
def test_values_come_back(values, dtype, repeats):
    values = np.array(values * repeats, dtype)
    for most in (int(bits_of(values.max())), np.maximum.accumulate(bits_of(values)[::-1])[::-1]):
        found, _ = unpack_values(pack_values(values, most), most, len(values), values.dtype)
        assert found.dtype == values.dtype
        assert found.tobytes() == values.tobytes()


def test_nothing_takes_nothing():
    assert pack_ints(np.empty(0, np.uint32)) == b""
    assert unpack_ints(b"", 0)[0].tolist() == []


def test_one_value_many_times_takes_a_few_bytes():
    assert len(pack_ints(np.full(100_000, 12_345, np.uint32))) < 64


@pytest.mark.parametrize(("mean", "factor"), [(3, 1.15), (12, 1.06), (40, 1.03), (500, 1.02), (9000, 1.02)])
def test_gaps_take_hardly_more_than_their_entropy(mean, factor):
    rng = np.random.default_rng(mean)
    gaps = rng.geometric(1 / mean, 100_000).astype(np.uint32) - 1
    p = 1 / mean
    entropy = (-p * np.log2(p) - (1 - p) * np.log2(1 - p)) / p
    assert 8 * len(pack_ints(gaps)) / len(gaps) < factor * entropy


def test_float16_values_take_hardly_more_than_their_entropy():
    values = np.random.default_rng(0).exponential(1, 200_000).astype(np.float16)
    values = np.maximum(values, np.float16(1e-3))
    counts = np.unique(values, return_counts=True)[1] / len(values)
    entropy = -(counts * np.log2(counts)).sum()
    assert 8 * len(pack_values(values, bits_of(values.max()))) / len(values) < 1.02 * entropy


def test_numbers_too_wide_are_refused():
    data = pack_ints(np.array([1 << 40], np.uint64))
    with pytest.raises(FormatError):
        unpack_ints(data, 1, np.uint32)


@settings(max_examples=300, deadline=None)
@given(arrays(), st.data())
def test_damaged_bytes_give_an_error_or_numbers_never_a_crash(numbers, data):
    packed = bytearray(pack_ints(numbers))
    if not packed:
        return
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(packed)))
    for damaged in (bytes(packed), bytes(packed[:cut])):
        try:
            found, _ = unpack_ints(damaged, len(numbers), numbers.dtype)
        except FormatError:
            continue
        assert len(found) == len(numbers)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.integers(1, 2**32))
def test_stable_order_is_that_of_a_stable_sort(keys, modulus):
    keys = np.array(keys, np.uint32) % np.uint32(min(modulus, 2**32 - 1))
    assert stable_order(keys).tolist() == sorted(range(len(keys)), key=keys.tolist().__getitem__)


@pytest.mark.parametrize("n_latents", [7, 300_000])
@pytest.mark.parametrize("ascending", [True, False])
def test_grouping_more_than_one_stretch(n_latents, ascending):
    rng = np.random.default_rng(n_latents)
    n = 1_200_000
    latents = rng.integers(0, n_latents, n).astype(np.uint32)
    rows = np.arange(n) // 3 if ascending else rng.permutation(n)
    values = rng.random(n).astype(np.float16)
    indptr, found_rows, found_values = group_postings(latents, rows, values, n_latents)
    order = np.lexsort((rows, latents))
    assert (np.diff(indptr) == np.bincount(latents, minlength=n_latents)).all()
    assert (found_rows == rows[order]).all()
    if not ascending:  # equal rows of a latent, which stored codes never have, may stand in any order
        assert (found_values == values[order]).all()
