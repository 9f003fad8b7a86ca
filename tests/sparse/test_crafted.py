"""Objects that somebody made to exhaust memory: each gives the project's error, before anything large is allocated."""

import hashlib
import struct
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from numcodecs import zstd

from actstore.codec.crc import crc32c
from actstore.errors import ErrorKind, FormatError
from actstore.sparse import Segment, SparseRows, UnitCodes, encode_segment, encode_unit
from actstore.sparse.ints import pack_ints, unpack_ints, unpack_values

MOST = 8 << 20
"""Bytes that reading some kilobytes may take, whatever they say."""

LARGE = [0, 1, 3, 255, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1]

CODES_HEADER, CODES_PAGE = struct.Struct("<QQQIIBB"), struct.Struct("<IIII")
POSTINGS_HEADER, POSTINGS_PAGE = struct.Struct("<QQQIIB"), struct.Struct("<III")
N_ROWS, N_LATENTS = 5000, 300


@contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def frame(size: int, n_bytes: int, content: bytes = b"hello") -> bytes:
    """A zstd frame of one raw block that says it holds `size` bytes, in a field of `n_bytes`; RFC 8878, 3.1.1."""
    descriptor = {0: 0x00, 2: 0x40, 4: 0x80, 8: 0xC0}[n_bytes]
    window = b"\x58"
    field = (size - (256 if n_bytes == 2 else 0)).to_bytes(n_bytes, "little") if n_bytes else b""
    block = (1 | len(content) << 3).to_bytes(3, "little") + content
    return struct.pack("<IB", 0xFD2FB528, descriptor) + window + field + block


def packed(piece: bytes, method: int = 1) -> bytes:
    """Packed numbers of one byte each, of one piece."""
    return struct.pack("<BB", 0, 1) + struct.pack("<BI", method, len(piece)) + piece


def test_a_frame_of_the_right_size_is_read():
    for made in (frame(5, 4), frame(5, 8), zstd.compress(b"hello", 1)):
        assert (
            unpack_ints(packed(made), 5)[0].tobytes()
            == np.frombuffer(b"hello", np.uint8).astype("u4").tobytes()
        )
    long = bytes(range(256)) * 2
    assert unpack_ints(packed(frame(512, 2, long)), 512)[0].tolist() == list(long)


@pytest.mark.parametrize(
    "piece",
    [
        frame(1 << 45, 8),
        frame((1 << 32) - 1, 4),
        frame(300, 2),
        frame(4, 4),
        frame(6, 8),
        frame(0, 0),  # says nothing of its size
        frame(5, 4, b"hello, you"),
        frame(5, 4) + frame(1 << 30, 4),
        zstd.compress(b"\0" * (1 << 26), 1)[:200],
        frame(5, 4)[:4],
        frame(5, 4)[:7],
        b"",
        b"hello world",
    ],
)
def test_frames_that_lie_are_refused(piece):
    with little_memory(), pytest.raises(FormatError) as error:
        unpack_ints(packed(piece), 5)
    assert error.value.kind is ErrorKind.OBJECT_DAMAGED


def test_values_beyond_their_dtype_are_refused():
    data = pack_ints(np.array([3], np.uint16))
    assert unpack_values(data, 0x3C03, 1, np.dtype("<f2"))[0].tolist() == [1.0]
    with pytest.raises(FormatError, match="0x10003"):
        unpack_values(data, 0x10003, 1, np.dtype("<f2"))


def sample():
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((N_ROWS, N_LATENTS)) < 0.02, rng.integers(1, 90, (N_ROWS, N_LATENTS)) / 8, 0)
    dense[:, 7] = 1  # more than one block
    return SparseRows.from_dense(dense)


def made_codes():
    rows = sample()
    return encode_unit(rows, np.ones(rows.n_rows, np.float32))


def made_postings():
    rows = sample()
    return encode_segment(0, N_LATENTS, rows.latents, rows.row_numbers(), rows.values)


def read_codes(storage, data, meta):
    unit = UnitCodes(storage, storage.put("k", data), meta, n_rows=N_ROWS, n_latents=N_LATENTS)
    return [page.to_dense() for _, page in unit.scan()], unit.norms(), unit.counts()


def read_postings(storage, data, meta):
    segment = Segment(storage, storage.put("k", data), meta, latents=range(N_LATENTS))
    return segment.read_many(range(N_LATENTS))


def with_directory(data: bytes, meta, directory: bytes):
    """The object with another directory that the manifest vouches for."""
    offset = meta["directory"][0]
    ref = [offset, len(directory), hashlib.sha256(directory).hexdigest()]
    return data[:offset] + directory, {**meta, "directory": ref}


def fields(header, page, n_pages):
    """Place and size of every number in the header and in the first and last page's entry."""

    def of(form, start):
        at = start
        for code in form.format.lstrip("<"):
            size = struct.calcsize(f"<{code}")
            yield at, size
            at += size

    found = list(of(header, 0))
    for number in {0, n_pages - 1}:
        found += of(page, header.size + number * page.size)
    return found


@pytest.mark.parametrize(
    ("make", "read", "header", "page"),
    [
        (made_codes, read_codes, CODES_HEADER, CODES_PAGE),
        (made_postings, read_postings, POSTINGS_HEADER, POSTINGS_PAGE),
    ],
    ids=["codes", "postings"],
)
def test_directories_that_lie_are_refused(storage, make, read, header, page):
    data, meta = make()
    directory = data[meta["directory"][0] :]
    n_pages = header.unpack_from(directory)[3 if header is CODES_HEADER else 4]
    assert n_pages > 1
    read(storage, data, meta)
    n_tried = 0
    for at, size in fields(header, page, n_pages):
        for number in LARGE:
            if number >> 8 * size or int.from_bytes(directory[at : at + size], "little") == number:
                continue
            crafted = directory[:at] + number.to_bytes(size, "little") + directory[at + size :]
            storage.replace("k", b"")
            n_tried += 1
            with little_memory():
                is_flag = header is CODES_HEADER and at == header.size - 1
                if is_flag and number:  # a flag is true or not
                    read(storage, *with_directory(data, meta, crafted))
                    continue
                with pytest.raises(FormatError, match="'k'"):
                    read(storage, *with_directory(data, meta, crafted))
    assert n_tried > 60


@pytest.mark.parametrize("which", ["codes", "postings"])
def test_packed_parts_of_directories_that_lie_are_refused(storage, which):
    """Numbers of latents, blocks and firing rows that add up to anything else, and constant pieces of any length."""
    make, read, header, page = (
        (made_codes, read_codes, CODES_HEADER, CODES_PAGE)
        if which == "codes"
        else (made_postings, read_postings, POSTINGS_HEADER, POSTINGS_PAGE)
    )
    data, meta = make()
    directory = data[meta["directory"][0] :]
    head = header.unpack_from(directory)
    n_pages = head[3] if which == "codes" else head[4]
    start = header.size + n_pages * page.size + (8 if which == "codes" else 0)
    n = head[4] if which == "codes" else head[1]
    for numbers in (
        np.full(n, (1 << 63) - 1, np.uint64),
        np.full(n, 0, np.uint64),
        np.full(n, 1 << 31, np.uint64),
        np.array([1 << 62] * 4 + [0] * (n - 4), np.uint64),  # whose sum goes round
    ):
        crafted = directory[:start] + pack_ints(numbers) + directory[start:]
        storage.replace("k", b"")
        with little_memory(), pytest.raises(FormatError, match="'k'"):
            read(storage, *with_directory(data, meta, crafted))


@pytest.mark.parametrize(
    ("make", "read", "entry"), [(made_codes, read_codes, 2), (made_postings, read_postings, 1)]
)
def test_pages_that_lie_are_refused(storage, make, read, entry):
    """The first page's first piece says that it holds a terabyte; every checksum is right."""
    data, meta = make()
    offset = meta["directory"][0]
    directory = data[offset:]
    header, page = (CODES_HEADER, CODES_PAGE) if make is made_codes else (POSTINGS_HEADER, POSTINGS_PAGE)
    at = list(page.unpack_from(directory, header.size))
    length = at[entry]
    forged = packed(frame(1 << 40, 8)).ljust(length, b"\0")
    assert len(forged) == length
    at[entry + 1] = crc32c(forged)
    crafted = directory[: header.size] + page.pack(*at) + directory[header.size + page.size :]
    with little_memory(), pytest.raises(FormatError, match="said to have 1099511627776 bytes"):
        read(storage, *with_directory(data[:8] + forged + data[8 + length :], meta, crafted))


def test_what_the_manifest_has_decides(storage):
    data, meta = made_codes()
    obj = storage.put("k", data)
    with pytest.raises(FormatError, match="the manifest has"):
        list(UnitCodes(storage, obj, meta, n_rows=N_ROWS - 1).scan())
    with pytest.raises(FormatError, match="the manifest has"):
        list(UnitCodes(storage, obj, {**meta, "nnz": meta["nnz"] - 1}).scan())
    for nnz in (None, -1, "9", 2.5):
        with pytest.raises(FormatError) as error:
            UnitCodes(storage, obj, {**meta, "nnz": nnz})
        assert error.value.kind is ErrorKind.INVARIANT_BROKEN
    data, meta = made_postings()
    obj = storage.put("p", data)
    with pytest.raises(FormatError, match="the manifest has"):
        Segment(storage, obj, meta, latents=range(N_LATENTS - 1)).read_many([0])
