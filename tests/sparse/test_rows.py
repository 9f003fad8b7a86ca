"""SparseRows against dense arrays and scipy."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actstore.errors import ErrorKind, InvalidInputError
from actstore.sparse import SparseRows, round_values

VALUES = st.one_of(st.just(0.0), st.floats(2.0**-14, 60000, width=16))
DENSE = hnp.arrays(np.float32, st.tuples(st.integers(0, 8), st.integers(1, 6)), elements=VALUES)


@settings(max_examples=150, deadline=None)
@given(DENSE, st.data())
def test_rows_are_those_of_the_dense_array(dense, data):
    codes = SparseRows.from_dense(dense).check()
    n = len(dense)
    assert codes.n_rows == len(codes) == n
    assert codes.nnz == np.count_nonzero(dense)
    assert (codes.to_dense() == dense).all()
    assert (codes.to_scipy().toarray() == dense).all()
    assert codes.counts.tolist() == (dense != 0).sum(axis=1).tolist()
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    assert (codes.slice(start, stop).to_dense() == dense[start:stop]).all()
    offsets = data.draw(st.lists(st.integers(0, n - 1), max_size=6)) if n else []
    assert (codes.take(offsets).check().to_dense() == dense[np.array(offsets, int)]).all()
    parts = [codes.slice(0, start), codes.slice(start, stop), codes.slice(stop, n)]
    assert (SparseRows.concat(parts).check().to_dense() == dense).all()


def test_scipy_gives_the_same_as_scipy():
    dense = np.array([[0, 2, 0], [0, 0, 0], [1, 0, 0.5]], np.float32)
    found = SparseRows.from_dense(dense, "float32").to_scipy()
    expected = sp.csr_array(dense)
    assert found.indptr.tolist() == expected.indptr.tolist()
    assert found.indices.tolist() == expected.indices.tolist()
    assert found.dtype == np.float32


def test_what_rounds_to_zero_is_left_out():
    codes = SparseRows.from_dense(np.array([[1e-9, 1.0]]), "float16")
    assert codes.latents.tolist() == [1]
    assert SparseRows.from_dense(np.array([[1e-9, 1.0]]), "float32").nnz == 2


def test_empty():
    none = SparseRows.empty(3, 5, "float32")
    assert (none.n_rows, none.nnz, none.value_dtype) == (3, 0, "float32")
    assert none.check().take([2, 2]).n_rows == 2


@pytest.mark.parametrize(
    ("values", "dtype", "kind"),
    [
        ([1.0, np.nan], "float16", ErrorKind.NON_FINITE),
        ([np.inf], "float32", ErrorKind.NON_FINITE),
        ([-1.0], "float16", ErrorKind.NON_FINITE),
        ([65_505.0], "float16", ErrorKind.OVERFLOW),
        ([1e39], "float32", ErrorKind.OVERFLOW),
        ([1.0], "bfloat16", ErrorKind.BAD_ARGUMENT),
    ],
)
def test_values_that_cannot_be_stored(values, dtype, kind):
    with pytest.raises(InvalidInputError) as error:
        round_values(np.array(values, np.float64), dtype)
    assert error.value.kind is kind
    if kind is ErrorKind.OVERFLOW and dtype == "float16":
        assert "float32" in error.value.message


def _codes(indptr, latents, values, n_latents=5):
    return SparseRows(
        np.array(indptr, np.int64), np.array(latents, np.uint32), np.array(values, np.float16), n_latents
    )


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (lambda: _codes([0, 2], [1, 1], [1, 1]).check(), "row 0"),
        (lambda: _codes([0, 1, 3], [4, 3, 2], [1, 1, 1]).check(), "row 1"),
        (lambda: _codes([0, 1], [5], [1]).check(), "latent 5"),
        (lambda: _codes([0, 1], [0], [0]).check(), "row 0"),
        (lambda: _codes([0, 2], [0, 1], [1, np.inf]).check(), "row 0 and latent 1"),
        (lambda: _codes([0, 2], [0, 1], [np.nan, 1]).check(), "row 0 and latent 0"),
        (lambda: _codes([0, 2, 1], [0], [1]).check(), "never decrease"),
        (lambda: _codes([0, 2], [0], [1]), "do not fit"),
        (
            lambda: SparseRows(np.zeros(1, np.int32), np.empty(0, np.uint32), np.empty(0, np.float16), 1),
            "int64",
        ),
        (
            lambda: SparseRows(np.zeros(1, np.int64), np.empty(0, np.uint32), np.empty(0, np.float64), 1),
            "float64",
        ),
        (lambda: _codes([0, 1], [0], [1]).slice(0, 2), "there are 1"),
        (lambda: _codes([0, 1], [0], [1]).slice(-1, 1), "there are 1"),
        (lambda: _codes([0, 1], [0], [1]).take([-1]), "there are 1"),
        (lambda: SparseRows.concat([]), "no parts"),
        (lambda: SparseRows.concat([SparseRows.empty(1, 2), SparseRows.empty(1, 3)]), "different"),
        (lambda: SparseRows.from_dense(np.zeros(3)), "shape"),
    ],
)
def test_what_is_wrong_is_said(codes, said):
    with pytest.raises(InvalidInputError, match=said):
        codes()


def test_latents_may_fall_between_rows():
    _codes([0, 1, 1, 2, 4], [4, 0, 0, 1], [1, 2, 3, 4]).check()
