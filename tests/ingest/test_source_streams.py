"""Is a compressed file read whole or refused, whatever was cut off, damaged or added?"""

import bz2
import gzip
import io
import json
import lzma
import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.importing import import_corpus
from actstore.ingest.source_streams import READ_ERRORS, SourceFile, opened, read_lines


def with_pyarrow(codec):
    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return compress


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": with_pyarrow("zstd"),
    ".lz4": with_pyarrow("lz4"),
}
HAS_CHECKSUM = (".gz", ".bz2", ".xz")


def read_all(folder: Path, suffix: str, data: bytes) -> bytes:
    path = folder / f"x{suffix}"
    path.write_bytes(data)
    with opened(SourceFile(fsspec.filesystem("file"), str(path), path.name)) as stream:
        return stream.read()


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("n_streams", [1, 2, 5])
def test_all_streams_of_a_file_are_read(tmp_path, suffix, n_streams):
    rng = random.Random(n_streams)
    pieces = [rng.randbytes(rng.choice([0, 1, 300_000])) + bytes(100_000) for _ in range(n_streams)]
    assert read_all(tmp_path, suffix, b"".join(map(COMPRESS[suffix], pieces))) == b"".join(pieces)


@pytest.mark.parametrize("suffix", COMPRESS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cut_file_is_never_a_shorter_one(tmp_path_factory, suffix, data):
    folder = tmp_path_factory.mktemp("cut")
    first = COMPRESS[suffix](random.Random(1).randbytes(2_000))
    whole = first + COMPRESS[suffix](b"second " * 1_000)
    cut = data.draw(st.integers(0, len(whole) - 1))
    if cut == len(first):
        return  # a whole stream: nothing tells that another should follow
    with pytest.raises(READ_ERRORS):
        read_all(folder, suffix, whole[:cut])


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("garbage", [b"garbage" * 20, b"{}\n", b"\x1f", b"\xff" * 600])
def test_what_follows_the_last_stream_is_an_error(tmp_path, suffix, garbage):
    with pytest.raises(READ_ERRORS):
        read_all(tmp_path, suffix, COMPRESS[suffix](b"text" * 1_000) + garbage)


@pytest.mark.parametrize("suffix", HAS_CHECKSUM)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path_factory, suffix, data):
    folder = tmp_path_factory.mktemp("flip")
    content = random.Random(2).randbytes(3_000)
    whole = bytearray(COMPRESS[suffix](content))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = read_all(folder, suffix, bytes(whole))
    except READ_ERRORS:
        return
    assert found == content  # a bit of the header that says nothing: time stamp, system


def test_xz_streams_may_be_padded_with_zeros(tmp_path):
    data = lzma.compress(b"a") + bytes(8) + lzma.compress(b"b") + bytes(4)
    assert read_all(tmp_path, ".xz", data) == b"ab"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_import_of_a_damaged_archive_names_the_file_and_leaves_no_corpus(tmp_path, suffix):
    store = actstore.open(tmp_path / "s", create=True)
    lines = "".join(json.dumps({"text": f"document {i}", "i": i}) + "\n" for i in range(20_000)).encode()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](lines))
    whole = COMPRESS[suffix](lines)
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", whole + b"more"):
        (folder / f"b.jsonl{suffix}").write_bytes(damaged)
        for policy in ("error", "skip"):
            with pytest.raises(
                InvalidInputError, match=rf"b\.jsonl\{suffix} cannot be read to its end"
            ) as caught:
                import_corpus(store, "c", folder, on_bad_document=policy)
            assert caught.value.kind is ErrorKind.BAD_DOCUMENT
    assert not store.refresh().corpora()
    (folder / f"b.jsonl{suffix}").write_bytes(whole)
    assert import_corpus(store, "c", folder).n_documents == 40_000


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=12).filter(lambda b: b"\n" not in b), max_size=12),
    ends=st.booleans(),
    limit=st.integers(2, 14),
)
def test_lines_are_those_of_the_file_and_long_ones_are_told(tmp_path_factory, lines, ends, limit):
    path = tmp_path_factory.mktemp("lines") / "x"
    data = b"\n".join(lines) + (b"\n" if ends else b"")
    path.write_bytes(data)
    expected = list(io.BytesIO(data))
    found = list(read_lines(SourceFile(fsspec.filesystem("file"), str(path), "x"), limit, skip_blank=False))
    assert [number for number, _, _ in found] == list(range(1, len(expected) + 1))
    assert [offset for _, offset, _ in found] == [sum(map(len, expected[:i])) for i in range(len(expected))]
    for (_, _, line), true in zip(found, expected, strict=True):
        # A line that just fills the limit without its end could go on: only then may a line that fits be called long.
        assert line == true if line is not None else len(true) >= limit
