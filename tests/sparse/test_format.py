"""Objects read by a second, slow reader that follows FORMAT.md, section 8, and nothing else; and bytes that never change."""

import base64
import struct

import numpy as np
import pytest
from numcodecs import zstd

from actstore.sparse import SparseRows, UnitCodes, encode_segment, encode_unit
from actstore.sparse.segment import Segment
from tests.sparse.test_unit_codes import random_rows, same


class Reader:
    """A place in some bytes."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, layout):
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def piece(self, n):
        method, nbytes = self.take("BI")
        body = self.data[self.at : self.at + nbytes]
        self.at += nbytes
        return {0: lambda: body, 1: lambda: zstd.decompress(body), 2: lambda: body * n}[method]()

    def packed(self, n):
        if n == 0:
            return []
        shift, n_planes = self.take("BB")
        widths = [8] * (shift // 8) + [w for w in (4, 2, 1) if shift & w]
        numbers, at = [0] * n, 0
        for width in widths:
            piece = self.piece(-(-n * width // 8))
            for i in range(n):
                bit = i * width
                numbers[i] |= (piece[bit // 8] >> bit % 8 & (1 << width) - 1) << at
            at += width
        for _ in range(n_planes):
            piece = self.piece(n)
            for i in range(n):
                numbers[i] |= piece[i] << at
            at += 8
        return numbers

    def values(self, most, itemsize):
        bits = [m - below for m, below in zip(most, self.packed(len(most)), strict=True)]
        return np.array(bits, f"<u{itemsize}").view(f"<f{itemsize}").tolist()


def directory_of(data, meta):
    offset, nbytes, _ = meta["directory"]
    assert offset + nbytes == len(data)
    return Reader(data[offset:])


def read_codes(data, meta):
    """Rows as dicts of latent to value, norms if there are any, and counts by latent."""
    assert data[:8] == b"ACTCODE1"
    directory = directory_of(data, meta)
    n_rows, nnz, n_latents = directory.take("QQQ")
    n_pages, n_firing = directory.take("II")
    itemsize, has_norms = directory.take("BB")
    pages = [directory.take("IIII") for _ in range(n_pages)]
    if has_norms:
        directory.take("II")
    firing = np.cumsum(directory.packed(n_firing)).tolist()
    counts = dict(zip(firing, (c + 1 for c in directory.packed(n_firing)), strict=True))
    rows, at = [], 8
    for n, n_codes, nbytes, _ in pages:
        page = Reader(data[at : at + nbytes])
        at += nbytes
        lengths = page.packed(n)
        gaps = iter(page.packed(n_codes))
        values = iter(page.values([page.take("I")[0]] * n_codes, itemsize) if n_codes else [])
        for length in lengths:
            row, latent = {}, -1
            for _ in range(length):
                latent += next(gaps) + 1
                row[latent] = next(values)
            rows.append(row)
        assert page.at == nbytes
    assert len(rows) == n_rows
    assert sum(map(len, rows)) == nnz == meta["nnz"]
    norms = np.array(Reader(data[at:]).packed(n_rows), "<u4").view("<f4").tolist() if has_norms else None
    return n_latents, rows, norms, counts


def read_postings(data, meta):
    """For each latent its postings in stored order, block by block."""
    assert data[:8] == b"ACTPOST1"
    directory = directory_of(data, meta)
    first, n_latents, n_postings = directory.take("QQQ")
    n_blocks, n_pages, itemsize = directory.take("IIB")
    pages = [directory.take("III") for _ in range(n_pages)]
    counts = directory.packed(n_latents)
    high = directory.packed(n_blocks)
    low = [h - span for h, span in zip(high, directory.packed(n_blocks), strict=True)]
    blocks = [
        (latent, min(4096, counts[latent] - start))
        for latent in sorted(range(n_latents), key=lambda f: (-counts[f], f))
        for start in range(0, counts[latent], 4096)
    ]
    assert len(blocks) == n_blocks
    found = {first + latent: [] for latent in range(n_latents)}
    at, block = 8, 0
    for n, nbytes, _ in pages:
        page = Reader(data[at : at + nbytes])
        at += nbytes
        here = blocks[block : block + n]
        firsts = iter(page.packed(n))
        gaps = iter(page.packed(sum(count - 1 for _, count in here)))
        rows = []
        for _, count in here:
            row = next(firsts)
            rows.append([row, *(row := row + next(gaps) + 1 for _ in range(count - 1))])
        values = iter(
            page.values(
                [h for h, (_, c) in zip(high[block:], here, strict=False) for _ in range(c)], itemsize
            )
        )
        for (latent, count), of_block in zip(here, rows, strict=True):
            stored = [(row, next(values)) for row in of_block]
            bits = np.array([v for _, v in stored], f"<f{itemsize}").view(f"<u{itemsize}")
            assert (bits.min(), bits.max()) == (low[block], high[block])
            found[first + latent].append(stored)
            assert len(stored) == count
            block += 1
        assert page.at == nbytes
    assert sum(counts) == n_postings == meta["nnz"]
    return found


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("with_norms", [True, False])
def test_codes_are_as_the_format_says(dtype, with_norms):
    rows = random_rows(1, 3000, 70_000, 3, dtype)
    norms = np.random.default_rng(0).random(3000).astype(np.float32) if with_norms else None
    n_latents, found, found_norms, counts = read_codes(*encode_unit(rows, norms))
    assert n_latents == 70_000
    assert found_norms == (None if norms is None else norms.tolist())
    for i, row in enumerate(found):
        here = slice(rows.indptr[i], rows.indptr[i + 1])
        assert list(row) == rows.latents[here].tolist()
        assert list(row.values()) == rows.values[here].tolist()
    expected = np.unique(rows.latents, return_counts=True)
    assert counts == dict(zip(*(column.tolist() for column in expected), strict=True))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_postings_are_as_the_format_says(dtype):
    rng = np.random.default_rng(3)
    parts = [
        (f, np.flatnonzero(rng.random(9000) < p) + (1 << 40)) for f, p in enumerate([0, 1, 0.01, 0.5, 0.01])
    ]
    latents = np.concatenate([np.full(len(r), f + 7) for f, r in parts])
    rows = np.concatenate([r for _, r in parts])
    values = (rng.integers(1, 200, len(rows)) / 64).astype(dtype)
    found = read_postings(*encode_segment(7, 5, latents, rows, values))
    for f, _ in parts:
        mine = [
            (int(r), float(v)) for r, v in zip(rows[latents == f + 7], values[latents == f + 7], strict=True)
        ]
        by_value = sorted(mine, key=lambda p: (-p[1], p[0]))
        assert found[f + 7] == [sorted(by_value[i : i + 4096]) for i in range(0, len(by_value), 4096)]


def golden_rows():
    return SparseRows(
        np.array([0, 2, 2, 5]), np.array([1, 300, 0, 2, 70_001], np.uint32),
        np.array([1.5, 0.25, 8.0, 3.0, 0.0078125], np.float16), 70_002,
    )  # fmt: skip


CODES = (
    "QUNUQ09ERTEAAQADAAAAAgADCgEABQAAAAEqAAFuAAIAAAAEAQAFAAAAAAAAAEQASAAACAECAQAAAAAABQAAAAoUAAYoFAIC"
    "AQAAAAACAQAAAAACAQAAAAAAAwAAAPgAAgADAAAAAwAEAwAAAAAAAAAFAAAAAAAAAHIRAQAAAAAAAQAAAAUAAAACAQMAAAAF"
    "AAAAPQAAAPRV69okAAAAWHKhRwoBAAUAAAAAAQEqRQACAAAAQAAABQAAAAAAAABEAAA="
)
POSTINGS = (
    "QUNUUE9TVDEeAQAFAAAABgAGAAYCAQAAAAACAQAAAAACAQAAAAACAQAAAAACAQAAAAgAAAAAAAAAAAAAchEBAAAAAAAFAAAA"
    "AAAAAAUAAAABAAAAAgUAAAAsAAAACQOJEAABAR4AAAAotS/9oHIRAQCVAAA4AQEBAAEAAQIAQBAgxyUqIAIKAQIBAAAAAAAC"
    "AAAAKAAABQAAABIPEA0IAAA="
)


def test_codes_written_by_the_first_version_are_read(storage):
    data = base64.b64decode(CODES)
    made, meta = encode_unit(golden_rows(), np.array([1.0, 0.0, 2.5], np.float32))
    assert base64.b64encode(made).decode() == CODES
    unit = UnitCodes(storage, storage.put("k", data), meta)
    same(unit.slice(0, 3), golden_rows())
    assert unit.norms().tolist() == [1.0, 0.0, 2.5]


def test_postings_written_by_the_first_version_are_read(storage):
    rows = golden_rows()
    numbers = rows.row_numbers() * 3 + (1 << 33)
    made, meta = encode_segment(0, 70_002, rows.latents, numbers, rows.values)
    assert base64.b64encode(made).decode() == POSTINGS
    segment = Segment(storage, storage.put("k", base64.b64decode(POSTINGS)), meta)
    found = segment.read_many([0, 1, 2, 3, 300, 70_001])
    assert [(r.tolist(), v.tolist()) for r, v in found] == [
        ([(1 << 33) + 6], [8.0]), ([1 << 33], [1.5]), ([(1 << 33) + 6], [3.0]), ([], []),
        ([1 << 33], [0.25]), ([(1 << 33) + 6], [0.0078125]),
    ]  # fmt: skip
