"""CRC-32C of pieces put together, against that of all the bytes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.codec.crc import crc32c, crc32c_joined, crc32c_pieces


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 3),
    n_pieces=st.integers(1, 40),
    piece_bytes=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_joined(n, n_pieces, piece_bytes, seed):
    data = np.random.default_rng(seed).integers(0, 256, (n * n_pieces, piece_bytes), np.uint8)
    sums = crc32c_pieces(data).reshape(n, n_pieces)
    before = sums.copy()
    found = crc32c_joined(sums, piece_bytes)
    assert found.dtype == np.uint32
    assert found.tolist() == [crc32c(whole) for whole in data.reshape(n, -1)]
    np.testing.assert_array_equal(sums, before)
