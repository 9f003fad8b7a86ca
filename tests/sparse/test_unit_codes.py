"""A unit's codes: what was encoded is read back by every way, with few requests, and damage is always an error."""

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.sparse import SparseRows, UnitCodes, encode_unit
from actstore.sparse.parts import clear_caches
from actstore.sparse.unit_format import PAGE_CODES, PAGE_ROWS
from tests.sparse.conftest import CountingStorage


def random_rows(seed, n_rows, n_latents, per_row, dtype="float16", *, fixed=False):
    """Codes with distinct latents per row; values are powers and mantissas of all kinds."""
    rng = np.random.default_rng([seed, n_rows, n_latents])
    counts = np.full(n_rows, per_row) if fixed else rng.poisson(per_row, n_rows)
    counts = np.minimum(counts, n_latents)
    rows = np.repeat(np.arange(n_rows), counts)
    keys = np.unique(rows.astype(np.int64) * n_latents + rng.integers(0, n_latents, len(rows)))
    rows, latents = np.divmod(keys, n_latents)
    values = np.exp(rng.normal(0, 2, len(rows))).astype(dtype)
    values = np.maximum(values, np.finfo(dtype).tiny)
    indptr = np.searchsorted(rows, np.arange(n_rows + 1))
    return SparseRows(indptr.astype(np.int64), latents.astype(np.uint32), values, n_latents).check()


def same(found, expected):
    assert found.n_latents == expected.n_latents
    assert found.indptr.tolist() == expected.indptr.tolist()
    assert found.latents.tobytes() == expected.latents.tobytes()
    assert found.values.dtype == expected.values.dtype
    assert found.values.tobytes() == expected.values.tobytes()


def stored(storage, rows, norms=None, key="codes/c/units/00000000-a.bin"):
    data, meta = encode_unit(rows, norms)
    return UnitCodes(storage, storage.put(key, data), meta)


def read_all(unit):
    return SparseRows.concat([rows for _, rows in unit.scan()])


def brute_take(rows, offsets):
    parts = [rows.slice(i, i + 1) for i in offsets]
    return SparseRows.concat(parts) if parts else rows.slice(0, 0)


@st.composite
def small_rows(draw):
    n_latents = draw(st.sampled_from([1, 2, 7, 300, 65_536, 65_537, 1 << 31]))
    dtype = draw(st.sampled_from(["float16", "float32"]))
    width = 16 if dtype == "float16" else 32
    one = st.dictionaries(st.integers(0, n_latents - 1), st.floats(2.0**-24, 60_000, width=width), max_size=6)
    rows = [sorted(row.items()) for row in draw(st.lists(one, max_size=12))]
    indptr = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    flat = [pair for row in rows for pair in row]
    latents = np.array([latent for latent, _ in flat], np.uint32)
    return SparseRows(indptr, latents, np.array([v for _, v in flat], dtype), n_latents)


@settings(max_examples=150, deadline=None)
@given(small_rows(), st.data())
def test_small_units_come_back(rows, data):
    storage = CountingStorage()
    norms = None
    if data.draw(st.booleans()):
        norms = np.array(
            data.draw(st.lists(st.floats(0, 2.0**100, width=32), min_size=len(rows), max_size=len(rows))),
            np.float32,
        )
    unit = stored(storage, rows, norms)
    assert (unit.n_rows, unit.nnz, unit.n_latents) == (rows.n_rows, rows.nnz, rows.n_latents)
    if rows.n_rows:
        same(read_all(unit), rows)
    same(unit.slice(0, rows.n_rows), rows)
    offsets = data.draw(st.lists(st.integers(0, rows.n_rows - 1), max_size=8)) if rows.n_rows else []
    same(unit.rows(offsets), brute_take(rows, offsets))
    latents, counts = unit.counts()
    expected = np.unique(rows.latents, return_counts=True)
    assert latents.tolist() == expected[0].tolist()
    assert counts.tolist() == expected[1].tolist()
    if norms is not None:
        assert unit.norms().tobytes() == norms.tobytes()
        assert unit.norms(offsets).tobytes() == norms[np.array(offsets, int)].tobytes()


@pytest.mark.parametrize(
    ("n_rows", "n_latents", "per_row", "dtype", "fixed"),
    [
        (3 * PAGE_ROWS + 5, 16_384, 8, "float16", False),
        (20_000, 70_000, 32, "float16", True),
        (9_000, 300, 60, "float32", False),
        (4, 1 << 20, 200_000, "float16", False),
    ],
)
def test_units_of_several_pages(storage, n_rows, n_latents, per_row, dtype, fixed):
    rows = random_rows(1, n_rows, n_latents, per_row, dtype, fixed=fixed)
    unit = stored(storage, rows)
    same(read_all(unit), rows)
    firsts = [first for first, _ in unit.scan()]
    assert len(firsts) > 1
    for _, page in unit.scan():
        assert page.n_rows <= PAGE_ROWS
        assert page.nnz <= PAGE_CODES or page.n_rows == 1
    rng = np.random.default_rng(0)
    offsets = rng.integers(0, n_rows, min(300, 2 * n_rows))
    same(unit.rows(offsets), rows.take(offsets))
    for cut in [*firsts[1:3], n_rows]:
        same(
            unit.slice(max(0, cut - 3), min(n_rows, cut + 3)),
            rows.slice(max(0, cut - 3), min(n_rows, cut + 3)),
        )


def test_one_latent_everywhere_with_equal_values_takes_nearly_nothing(storage):
    n = 20_000
    rows = SparseRows(np.arange(n + 1), np.full(n, 7, np.uint32), np.full(n, 1.5, np.float16), 16)
    data, meta = encode_unit(rows)
    assert len(data) < 1000
    same(read_all(UnitCodes(storage, storage.put("k", data), meta)), rows)


def test_all_rows_empty(storage):
    rows = SparseRows.empty(20_000, 8)
    data, meta = encode_unit(rows)
    assert len(data) < 400
    same(read_all(UnitCodes(storage, storage.put("k", data), meta)), rows)


def test_bytes_of_a_code():
    rows = random_rows(0, 8192, 16_384, 32)
    data, _ = encode_unit(rows)
    # Gaps of mean 512 have 10.4 bits; log-normal values of this width about 13.5.
    assert len(data) / rows.nnz < 3.25


def test_requests(storage):
    rows = random_rows(2, 3 * PAGE_ROWS, 1000, 4)
    unit = stored(storage, rows, np.ones(rows.n_rows, np.float32))
    assert storage.requests == []
    unit.counts()
    assert len(storage.requests) == 1
    unit.rows([5, 6, 7])
    assert len(storage.requests) == 2
    unit.rows([9])  # the same page
    assert len(storage.requests) == 2
    unit.slice(0, rows.n_rows)  # the other two, together
    assert len(storage.requests) == 3
    unit.norms([3])
    unit.norms()
    assert len(storage.requests) == 4
    storage.requests.clear()
    assert len(list(unit.scan())) == 3
    assert len(storage.requests) == 1


def test_a_pickled_reader_reads(storage):
    rows = random_rows(3, 50, 100, 5)
    data, meta = encode_unit(rows)
    unit = UnitCodes(storage.inner, storage.put("k", data), meta)
    same(pickle.loads(pickle.dumps(unit)).slice(0, 50), rows)


@pytest.mark.parametrize("bad", [[-1], [50], [0, 50]])
def test_rows_that_are_not_there(storage, bad):
    unit = stored(storage, random_rows(3, 50, 100, 5))
    with pytest.raises(InvalidInputError, match="has 50"):
        unit.rows(bad)
    with pytest.raises(InvalidInputError):
        unit.slice(0, 51)
    with pytest.raises(InvalidInputError, match="without"):
        unit.norms()


def test_norms_that_cannot_be_stored():
    rows = SparseRows.empty(2, 3)
    for norms in (
        np.ones(3, np.float32),
        np.ones(2),
        np.array([1, np.nan], np.float32),
        np.array([1, -1], np.float32),
    ):
        with pytest.raises(InvalidInputError):
            encode_unit(rows, norms)


def test_codes_that_cannot_be_stored():
    rows = SparseRows(np.array([0, 2]), np.array([1, 1], np.uint32), np.ones(2, np.float16), 3)
    with pytest.raises(InvalidInputError, match="ascend"):
        encode_unit(rows)


def ways(unit, n_rows):
    return [
        lambda: read_all(unit),
        lambda: unit.rows(np.arange(n_rows)),
        lambda: unit.slice(0, n_rows),
        lambda: (unit.counts(), unit.norms(), read_all(unit))[2],
    ]


@pytest.mark.parametrize("part", range(4))
def test_every_flipped_byte_is_noticed_or_harmless(storage, part):
    rows = random_rows(4, 60, 50, 4)
    norms = np.arange(60, dtype=np.float32)
    data, meta = encode_unit(rows, norms)
    obj = storage.put("k", data)
    errors = []
    for place in range(part, len(data), 4):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        storage.replace("k", bytes(damaged))
        clear_caches()
        unit = UnitCodes(storage, obj, meta)
        try:
            found = (unit.counts(), unit.norms(), read_all(unit))
        except FormatError as error:
            errors.append(error)
            continue
        same(found[2], rows)
        assert found[1].tobytes() == norms.tobytes()
        assert place < 8  # only the magic number is not read
    assert len(errors) >= (len(data) - 8) // 4 - 1
    assert all(error.kind is ErrorKind.OBJECT_DAMAGED and "'k'" in error.message for error in errors)


def test_cut_swapped_and_missing_objects(storage):
    rows = random_rows(5, 2 * PAGE_ROWS, 50, 1)
    data, meta = encode_unit(rows, np.ones(rows.n_rows, np.float32))
    obj = storage.put("k", data)
    for size in [*range(1, len(data), len(data) // 40), len(data) - 1]:
        storage.replace("k", data[:size])
        for way in range(4):
            clear_caches()
            with pytest.raises(FormatError) as error:
                ways(UnitCodes(storage, obj, meta), rows.n_rows)[way]()
            assert error.value.kind is ErrorKind.OBJECT_DAMAGED
    storage.replace("k", b"")
    for way in range(4):
        clear_caches()
        with pytest.raises(FormatError) as error:
            ways(UnitCodes(storage, obj, meta), rows.n_rows)[way]()
        assert error.value.kind is ErrorKind.OBJECT_MISSING
    other, _ = encode_unit(random_rows(6, 2 * PAGE_ROWS, 50, 1), np.ones(rows.n_rows, np.float32))
    storage.replace("k", other)
    for way in range(4):
        clear_caches()
        with pytest.raises(FormatError, match="'k'"):
            ways(UnitCodes(storage, obj, meta), rows.n_rows)[way]()


def test_pages_of_one_object_swapped(storage):
    """Equal pages but for their place: the directory says which is which."""
    n = 2 * PAGE_ROWS
    latents = np.repeat([3, 4], PAGE_ROWS).astype(np.uint32)
    rows = SparseRows(np.arange(n + 1), latents, np.ones(n, np.float16), 8)
    data, meta = encode_unit(rows)
    table = UnitCodes(storage, storage.put("k", data), meta)._directory.table
    a, b, c = table.offsets.tolist()
    assert b - a == c - b
    storage.replace("k", data[:a] + data[b:c] + data[a:b] + data[c:])
    unit = UnitCodes(storage, replace(storage.put("k2", data), key="k"), meta)
    with pytest.raises(FormatError, match="page 0"):
        read_all(unit)


@pytest.mark.parametrize(
    ("meta", "kind"),
    [
        ({}, ErrorKind.INVARIANT_BROKEN),
        (None, ErrorKind.INVARIANT_BROKEN),
        ({"format": 1}, ErrorKind.INVARIANT_BROKEN),
        ({"format": 2, "directory": [0, 1, "a"]}, ErrorKind.FORMAT_TOO_NEW),
        ({"format": 1, "directory": [0, 1 << 60, "a"]}, ErrorKind.INVARIANT_BROKEN),
        ({"format": 1, "directory": [-5, 10, "a"]}, ErrorKind.INVARIANT_BROKEN),
        ({"format": 1, "directory": [0, 10, "a", 4]}, ErrorKind.INVARIANT_BROKEN),
    ],
)
def test_meta_of_a_faulty_or_newer_writer(storage, meta, kind):
    with pytest.raises(FormatError) as error:
        UnitCodes(storage, storage.put("k", b"x" * 100), meta)
    assert error.value.kind is kind
    assert "'k'" in error.value.message


def test_what_is_given_out_may_be_changed(storage):
    rows = random_rows(8, 100, 60, 5)
    unit = stored(storage, rows, np.ones(100, np.float32))
    for found in (unit.slice(3, 50), unit.rows([7, 7, 1])):
        found.values[:] = 9
        found.latents[:] = 0
    unit.norms()[:] = 5
    unit.norms([3])[:] = 5
    for array in unit.counts():
        array[:] = 0
    same(unit.slice(0, 100), rows)
    assert (unit.norms() == 1).all()
    assert unit.counts()[1].sum() == rows.nnz


def test_latents_that_a_faulty_writer_stored(storage):
    rows = SparseRows(np.array([0, 1]), np.array([9], np.uint32), np.ones(1, np.float16), 10)
    data, _ = encode_unit(rows)
    header = data.index((10).to_bytes(8, "little"))
    data = data[:header] + (9).to_bytes(8, "little") + data[header + 8 :]
    start = header - 16
    meta = {
        "format": 1,
        "nnz": 1,
        "directory": [start, len(data) - start, hashlib.sha256(data[start:]).hexdigest()],
    }
    with pytest.raises(FormatError, match="latent 9"):
        read_all(UnitCodes(storage, storage.put("k", data), meta))
