import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actstore.dtypes import (
    FLOAT_DTYPES,
    STORED_DTYPES,
    count_nonfinite,
    natural_dtype,
    stored_dtype,
    to_float32,
    to_stored,
)
from actstore.errors import ErrorKind, InvalidInputError

ALL_16 = np.arange(2**16, dtype=np.uint16)


def torch_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def test_every_bfloat16_widens_as_in_torch():
    ours = to_float32(ALL_16, "bfloat16").view(np.uint32)
    theirs = torch.from_numpy(ALL_16.view(np.int16)).view(torch.bfloat16).float().numpy().view(np.uint32)
    assert np.array_equal(ours, theirs)


def test_every_bfloat16_comes_back_but_for_signalling_nans():
    back = to_stored(to_float32(ALL_16, "bfloat16"), "bfloat16")
    nan = np.isnan(to_float32(ALL_16, "bfloat16"))
    assert np.array_equal(back[~nan], ALL_16[~nan])
    assert np.array_equal(back[nan], ALL_16[nan] | 0x0040)


def test_rounding_is_torchs_around_every_bfloat16():
    """The float32 on, just below and just above every halfway point between neighbours."""
    halves = (ALL_16.astype(np.uint32) << 16) | 0x8000
    for bits in (halves - 1, halves, halves + 1):
        values = bits.view(np.float32)
        number = ~np.isnan(values)
        assert np.array_equal(to_stored(values, "bfloat16")[number], torch_bits(values)[number])
        assert np.isnan(to_float32(to_stored(values, "bfloat16"), "bfloat16"))[~number].all()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_rounding_is_torchs_on_any_bits(bits):
    values = np.array(bits, np.uint32).view(np.float32)
    number = ~np.isnan(values)
    assert np.array_equal(to_stored(values, "bfloat16")[number], torch_bits(values)[number])


def test_float16_rounds_as_torch_and_overflows_to_infinity():
    values = np.array([1e-8, 65519.0, 65520.0, -1e9, 0.1, -0.0, np.nan], np.float32)
    theirs = torch.from_numpy(values).to(torch.float16).numpy()
    assert np.array_equal(to_stored(values, "float16").view(np.uint16)[:-1], theirs.view(np.uint16)[:-1])
    assert count_nonfinite(to_stored(values, "float16"), "float16") == 3


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_nonfinite_are_counted(dtype):
    values = np.array([[0.0, np.nan, np.inf], [-np.inf, 1.0, -0.0]], np.float32)
    assert count_nonfinite(to_stored(values, dtype), dtype) == 3


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_widening_into_strided_memory(dtype):
    stored = to_stored(np.arange(12, dtype=np.float32).reshape(3, 4), dtype)
    out = np.zeros((3, 8), np.float32)
    assert to_float32(stored[:, ::2], dtype, out=out[:, ::4]) is not None
    assert np.array_equal(out[:, ::4], [[0, 2], [4, 6], [8, 10]])
    assert not out[:, 1::4].any()


def test_a_dtype_that_is_not_stored():
    with pytest.raises(InvalidInputError, match="float64") as error:
        stored_dtype("float64")
    assert error.value.kind is ErrorKind.BAD_ARGUMENT
    assert natural_dtype("float32") == np.float32


def test_int8_rows_are_no_plain_numbers():
    assert [*FLOAT_DTYPES, "int8"] == list(STORED_DTYPES)
    assert natural_dtype("int8") == np.float32
    with pytest.raises(InvalidInputError, match=r"actstore\.int8"):
        to_float32(np.zeros((1, 5), np.int8), "int8")
    with pytest.raises(InvalidInputError, match=r"actstore\.int8"):
        to_stored(np.zeros((1, 5), np.float32), "int8")
