"""Columns to arrays and back, compared with what Arrow itself makes of them."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from actstore.arrow_arrays import NUMPY_TYPES, from_numbers, from_texts, take_texts, to_array

KINDS = [kind for kind in NUMPY_TYPES if kind != pa.bool_()]


@pytest.mark.parametrize("kind", list(NUMPY_TYPES), ids=str)
@pytest.mark.parametrize("cut", [slice(0, 21), slice(3, 20), slice(9, 10), slice(5, 5), slice(8, 17)])
def test_a_column_is_what_arrow_says(kind, cut):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2 if kind == pa.bool_() else 100, 21).astype(NUMPY_TYPES[kind])
    column = pa.array(values, kind)[cut]
    found = to_array(column)
    assert found.dtype == NUMPY_TYPES[kind]
    assert found.tolist() == column.to_pylist() == values[cut].tolist()
    chunks = pa.chunked_array([column, column, column[:0]], type=kind)
    assert to_array(chunks).tolist() == chunks.to_pylist()
    assert to_array(pa.chunked_array([], type=kind)).dtype == NUMPY_TYPES[kind]


def test_other_columns_are_as_arrow_makes_them():
    assert np.isnan(to_array(pa.array([1.0, None]))).tolist() == [False, True]
    assert to_array(pa.array(["a", "b"])).tolist() == ["a", "b"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_numbers_become_columns(kind):
    values = np.arange(40)[::2]
    missing = np.arange(20) % 3 == 1
    assert from_numbers(values, kind).equals(pa.array(values.astype(NUMPY_TYPES[kind]), kind))
    found = from_numbers(values, kind, missing=missing)
    found.validate(full=True)
    assert found.equals(pa.array(values.astype(NUMPY_TYPES[kind]), kind, mask=missing))
    assert found.null_count == missing.sum()


def test_texts_become_columns():
    for texts in ([], ["a"], ["", "漢字", "🙂" * 3, "", "x"]):
        found = from_texts(texts)
        found.validate(full=True)
        assert found.equals(pa.array(texts, pa.string()))


def test_pandas_is_not_imported():
    code = (
        "import sys, numpy as np, pyarrow as pa; from actstore.arrow_arrays import *;"
        "column = from_numbers(np.arange(3), pa.int64(), missing=np.arange(3) == 1); to_array(column[2:]); from_texts(['a']);"
        "print('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("with_nulls", [False, True])
@pytest.mark.parametrize("cut", [slice(0, 40), slice(3, 40), slice(9, 33), slice(8, 17)])
def test_texts_are_taken_as_arrow_takes_them(with_nulls, cut):
    rng = np.random.default_rng(2)
    words = ["", "a", "naïve", "漢字", "🙂", "\n", "long " * 9]
    told = [words[i] for i in rng.integers(0, len(words), 40)]
    column = pa.array([None if with_nulls and i % 3 == 0 else t for i, t in enumerate(told)], pa.string())[
        cut
    ]
    for n in (0, 1, 7, 100):
        places = rng.integers(0, len(column), n)
        found = take_texts(column, places)
        found.validate(full=True)
        assert found.to_pylist() == column.take(pa.array(places, pa.int64())).to_pylist()
    empty = pa.array(["", "", None], pa.string())
    assert take_texts(empty, np.array([2, 0])).to_pylist() == [None, ""]
