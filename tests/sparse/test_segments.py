"""Segments of postings against brute force over all postings: order, ties, blocks, requests, damage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.sparse import Segment, encode_grouped, encode_segment
from actstore.sparse.parts import clear_caches
from actstore.sparse.segment_format import BLOCK_POSTINGS, PAGE_POSTINGS
from tests.sparse.conftest import CountingStorage


def brute(latents, rows, values, latent):
    """Rows by ascending number with their values, and ranks by falling value and then row, worked out by Python."""
    mine = [(int(r), float(v)) for f, r, v in zip(latents, rows, values, strict=True) if f == latent]
    return sorted(mine), sorted(mine, key=lambda p: (-p[1], p[0]))


def pairs(found):
    rows, values = found
    assert rows.dtype == np.int64
    return [(int(r), float(v)) for r, v in zip(rows, values, strict=True)]


def stored(storage, first, n, latents, rows, values, key="postings/p/000000-a.bin"):
    data, meta = encode_segment(first, n, latents, rows, values)
    return Segment(storage, storage.put(key, data), meta)


@st.composite
def postings(draw):
    first = draw(st.sampled_from([0, 3, 65_530, 1 << 30]))
    n = draw(st.sampled_from([1, 2, 9, 70_000]))
    top = draw(st.sampled_from([10, 1 << 17, 1 << 40, (1 << 62) - 1]))
    dtype = draw(st.sampled_from(["float16", "float32"]))
    values = st.sampled_from([0.5, 1.0, 1.5]) | st.floats(2.0**-24, 60_000, width=16)
    latent = st.integers(0, min(n, 5) - 1) | st.integers(0, n - 1)
    found = draw(st.dictionaries(st.tuples(latent, st.integers(0, top)), values, max_size=40))
    latents = np.array([first + f for f, _ in found], np.int64)
    rows = np.array([r for _, r in found], np.int64)
    return first, n, latents, rows, np.array(list(found.values()), dtype)


@settings(max_examples=150, deadline=None)
@given(postings(), st.integers(0, 12), st.integers(0, 40))
def test_small_segments(made, start, stop):
    first, n, latents, rows, values = made
    segment = stored(CountingStorage(), first, n, latents, rows, values)
    asked = sorted({*latents.tolist(), first, first + n - 1})
    for latent, found in zip(asked, segment.read_many(asked), strict=True):
        by_row, by_value = brute(latents, rows, values, latent)
        assert pairs(found) == by_row
        assert found[1].dtype == values.dtype
        assert pairs(segment.ranks(latent, start, stop)) == by_value[start:stop]
        blocks = segment.blocks(latent)
        assert sum(b.count for b in blocks) == len(by_row)
        assert [(b.low, b.high) for b in blocks] == ([(by_value[-1][1], by_value[0][1])] if by_row else [])
    counts = np.bincount(latents - first, minlength=n)
    assert segment.directory.counts.tolist() == counts.tolist()


def large_postings(*, ties, dtype="float16", seed=0):
    """A latent on every row, latents of several blocks, small ones, dead ones; rows beyond 32 bits."""
    rng = np.random.default_rng(seed)
    n_rows, base = 30_000, 1 << 41
    shares = [1, 0.6, 0.3, 0.0, *rng.uniform(0, 0.02, 60)]
    parts = []
    for latent, share in enumerate(shares):
        rows = np.flatnonzero(rng.random(n_rows) < share) + base
        values = rng.integers(1, 4, len(rows)) / 2 if ties else rng.exponential(1, len(rows)) + 1e-3
        parts.append((np.full(len(rows), latent), rows, values.astype(dtype)))
    latents, rows, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = rng.permutation(len(rows))
    return len(shares), latents[order].astype(np.uint32), rows[order], values[order]


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents_of_many_blocks(storage, ties, dtype):
    n, latents, rows, values = large_postings(ties=ties, dtype=dtype)
    segment = stored(storage, 0, n, latents, rows, values)
    for latent in range(n):
        mine = latents == latent
        order = np.lexsort((rows[mine], -values[mine].astype(np.float64)))
        expected = rows[mine][order], values[mine][order]
        found = segment.ranks(latent, 0, 1 << 40)
        assert found[0].tolist() == expected[0].tolist()
        assert found[1].tobytes() == expected[1].tobytes()
        for start, stop in [(0, 20), (4090, 4100), (4096, 4097), (8000, 13_000), (29_999, 30_001)]:
            part = segment.ranks(latent, start, stop)
            assert part[0].tolist() == expected[0][start:stop].tolist()
        [by_row] = segment.read_many([latent])
        order = np.argsort(rows[mine])
        assert by_row[0].tolist() == rows[mine][order].tolist()
        assert by_row[1].tobytes() == values[mine][order].tobytes()
        for place, block in enumerate(segment.blocks(latent)):
            inside = expected[1][place * BLOCK_POSTINGS : (place + 1) * BLOCK_POSTINGS]
            assert block.start == place * BLOCK_POSTINGS
            assert (block.count, block.high, block.low) == (len(inside), inside[0], inside[-1])


def test_the_order_given_does_not_matter():
    n, latents, rows, values = large_postings(ties=True)
    one = encode_segment(0, n, latents, rows, values)
    order = np.argsort(rows, kind="stable")
    assert encode_segment(0, n, latents[order], rows[order], values[order]) == one
    order = np.lexsort((rows, latents))
    indptr = np.searchsorted(latents[order], np.arange(n + 1)).astype(np.int64)
    assert encode_grouped(0, indptr, rows[order], values[order]) == one


def test_requests(storage):
    n, latents, rows, values = large_postings(ties=False)
    segment = stored(storage, 0, n, latents, rows, values)
    assert storage.requests == []
    segment.blocks(0)
    assert len(storage.requests) == 1  # the directory
    for latent in range(n):
        clear_caches()
        segment.blocks(latent)
        storage.requests.clear()
        segment.ranks(latent, 0, 20)
        assert len(storage.requests) == (latent != 3)
    clear_caches()
    segment.blocks(0)
    storage.requests.clear()
    segment.read_many([0])
    assert len(storage.requests) == 1  # pages that follow each other
    segment.ranks(0, 0, 20)
    segment.read_many([0])
    assert len(storage.requests) == 1


def test_pages_are_small(storage):
    n, latents, rows, values = large_postings(ties=False)
    directory = stored(storage, 0, n, latents, rows, values).directory
    per_page = np.diff(directory.block_starts[directory.page_blocks])
    assert per_page.max() <= PAGE_POSTINGS
    assert per_page[:-1].min() > PAGE_POSTINGS - BLOCK_POSTINGS
    assert directory.n_postings == len(rows)


def test_no_postings_at_all(storage):
    nothing = np.empty(0, np.int64)
    data, meta = encode_segment(5, 3, nothing, nothing, np.empty(0, np.float32))
    assert data
    segment = Segment(storage, storage.put("k", data), meta)
    assert segment.directory.counts.tolist() == [0, 0, 0]
    assert segment.blocks(6) == []
    assert [len(rows) for rows, _ in segment.read_many([5, 7])] == [0, 0]
    assert segment.read_many([5])[0][1].dtype == np.float32


def test_every_flipped_byte_is_noticed_or_harmless(storage):
    rng = np.random.default_rng(0)
    latents, rows = rng.integers(0, 9, 200), np.arange(200) * 977
    values = rng.exponential(1, 200).astype(np.float16) + np.float16(0.1)
    data, meta = encode_segment(0, 9, latents, rows, values)
    obj = storage.put("k", data)
    expected = [pairs(p) for p in Segment(storage, obj, meta).read_many(range(9))]
    errors = []
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        storage.replace("k", bytes(damaged))
        clear_caches()
        try:
            found = [pairs(p) for p in Segment(storage, obj, meta).read_many(range(9))]
        except FormatError as error:
            errors.append(error)
            continue
        assert place < 8  # only the magic number is not read
        assert found == expected
    assert len(errors) >= len(data) - 8
    assert all(error.kind is ErrorKind.OBJECT_DAMAGED and "'k'" in error.message for error in errors)


def test_cut_and_missing_objects(storage):
    n, latents, rows, values = large_postings(ties=False)
    data, meta = encode_segment(0, n, latents, rows, values)
    obj = storage.put("k", data)
    for size in [*range(1, len(data), len(data) // 30), len(data) - 1, 0]:
        storage.replace("k", data[:size])
        clear_caches()
        with pytest.raises(FormatError) as error:
            Segment(storage, obj, meta).read_many(range(n))
        assert error.value.kind is (ErrorKind.OBJECT_DAMAGED if size else ErrorKind.OBJECT_MISSING)


A = np.array
ONE = np.ones(1, np.float16)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 2, A([2]), A([0]), ONE), r"not in \[0, 2\)"),
        ((5, 2, A([4]), A([0]), ONE), r"not in \[5, 7\)"),
        ((0, 2, A([1]), A([-1]), ONE), "2\\^62"),
        ((0, 2, A([1]), A([1 << 62]), ONE), "2\\^62"),
        ((0, 2, A([1]), A([0, 1]), ONE), "equally long"),
        ((0, 2, A([1.0]), A([0]), ONE), "whole numbers"),
        ((0, 2, A([1]), A([0]), np.ones(1)), "float16"),
        ((0, 2, A([1]), A([0]), ONE * 0), "finite and positive"),
        ((0, 2, A([1]), A([0]), ONE * np.nan), "finite and positive"),
        ((0, 2, A([1]), A([0]), ONE * np.float16(np.inf)), "finite and positive"),
        ((0, 0, A([1]), A([0]), ONE), "n_latents"),
        ((-1, 2, A([0]), A([0]), ONE), "first_latent"),
        ((0, 2, A([1, 0, 1]), A([7, 3, 7]), np.ones(3, np.float16)), "row 7"),
    ],
)
def test_postings_that_cannot_be_stored(arguments, said):
    with pytest.raises(InvalidInputError, match=said):
        encode_segment(*arguments)


@pytest.mark.parametrize(
    ("indptr", "rows"),
    [
        ([0, 1], [1, 2]),
        ([1, 2], [1, 2]),
        ([0, 2, 1, 2], [1, 2]),
        ([0], []),
        ([0, 2], [2, 1]),
        ([0, 2], [1, 1]),
    ],
)
def test_groups_that_are_none(indptr, rows):
    with pytest.raises(InvalidInputError):
        encode_grouped(0, A(indptr), A(rows, np.int64), np.ones(len(rows), np.float16))
