"""Do WebDataset archives become one document per sample, and do hostile and broken ones do no harm?"""

import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.importing import import_corpus
from actstore.ingest.tar_members import TarError, read_members
from actstore.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return actstore.open(tmp_path / "store", create=True)


def rows(store: Store, name: str = "c") -> list[dict]:
    corpus = store.refresh().corpus(name)
    return corpus.documents(range(corpus.n_documents)).to_pylist()


def make_tar(members, *, tar_format=tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            if isinstance(name, tarfile.TarInfo):
                tar.addfile(name, io.BytesIO(data))
            else:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


SAMPLES = [(f"dir/{i:04}", {"text": f"document {i} é🎉", "n": i, "tags": [f"t{i}"]}) for i in range(50)]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
@pytest.mark.parametrize("style", ["json", "txt", "both"])
def test_samples_become_documents(store, tmp_path, suffix, style):
    def members(samples):
        for key, record in samples:
            rest = {k: v for k, v in record.items() if k != "text"}
            yield f"{key}.jpg", b"\xff\xd8 image"
            if style != "json":
                yield f"{key}.txt", record["text"].encode()
            if style != "txt":
                yield f"{key}.json", json.dumps(record if style == "json" else rest).encode()
            yield f"{key}.seg.png", b"image"

    for i, part in enumerate((SAMPLES[:20], SAMPLES[20:])):
        data = make_tar(members(part))
        codec = {".tar.gz": "gzip", ".tgz": "gzip", ".tar.zst": "zstd"}.get(suffix)
        path = str(tmp_path / f"shard-{i}{suffix}")
        with pa.CompressedOutputStream(path, codec) if codec else open(path, "wb") as file:
            file.write(data)
    report = import_corpus(store, "c", str(tmp_path / f"*{suffix}"))
    assert report.n_documents == len(SAMPLES)
    expected = [
        {"doc_id": i, "source_key": key, **({"text": record["text"]} if style == "txt" else record)}
        for i, (key, record) in enumerate(SAMPLES)
    ]
    assert rows(store) == expected


def test_a_text_member_beside_a_text_field_becomes_a_column(store, tmp_path):
    record = {"text": "field", "caption": "cap"}
    (tmp_path / "a.tar").write_bytes(
        make_tar([("0.json", json.dumps(record).encode()), ("0.txt", b"member")])
    )
    import_corpus(store, "c", tmp_path / "a.tar")
    assert rows(store) == [
        {"doc_id": 0, "source_key": "0", "text": "field", "caption": "cap", "txt": "member"}
    ]
    import_corpus(store, "d", tmp_path / "a.tar", text_column="caption", columns=["txt"])
    assert rows(store, "d") == [{"doc_id": 0, "source_key": "0", "text": "cap", "txt": "member"}]
    import_corpus(store, "e", tmp_path / "a.tar", id_column="caption", columns=[])
    assert rows(store, "e") == [{"doc_id": 0, "source_key": "cap", "text": "field"}]


BAD_SAMPLES = {
    "no text": ([("x.jpg", b"image")], "sample has no .txt and no .json"),
    "not UTF-8": ([("x.txt", b"caf\xe9")], "byte 0xe9 at offset 3 of the file is not UTF-8"),
    "large text": ([("x.txt", b"y" * 101)], "its .txt has 101 bytes"),
    "two texts": ([("x.txt", b"a"), ("x.txt", b"b")], "two .txt members"),
    "broken JSON": ([("x.json", b'{"text": ')], "not JSON"),
    "no object": ([("x.json", b"[]")], "holds a list, not an object"),
    "no field": ([("x.json", b'{"other": 1}')], "has no 'text', only 'other'"),
    "deep JSON": ([("x.json", b"[" * 100_000)], "not JSON"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_samples_are_named_or_skipped(store, tmp_path, case):
    members, problem = BAD_SAMPLES[case]
    good = [("a.json", b'{"text": "one"}')], [("z.txt", b"two")]
    (tmp_path / "s.tar").write_bytes(make_tar([*good[0], *members, *good[1]]))
    with pytest.raises(InvalidInputError, match=f"s.tar:x: .*{problem}"):
        import_corpus(store, "c", tmp_path / "s.tar", max_document_bytes=100)
    assert not store.refresh().corpora()
    report = import_corpus(store, "c", tmp_path / "s.tar", max_document_bytes=100, on_bad_document="skip")
    assert [(r["source_key"], r["text"]) for r in rows(store)] == [("a", "one"), ("z", "two")]
    assert report.n_skipped == 1


def test_links_devices_folders_and_paths_elsewhere_do_nothing(store, tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    members = [
        (special("x", tarfile.DIRTYPE), b""),
        (special("link.txt", tarfile.SYMTYPE, str(outside)), b""),
        (special("hard.txt", tarfile.LNKTYPE, str(outside)), b""),
        (special("dev.txt", tarfile.CHRTYPE), b""),
        (special("fifo.txt", tarfile.FIFOTYPE), b""),
        ("../../up.txt", b"up"),
        ("/etc/root.txt", b"root"),
        ("./here.txt", b"here"),
        (".hidden.txt", b"hidden"),
    ]
    (tmp_path / "h.tar").write_bytes(make_tar(members))
    before = sorted(p for p in tmp_path.rglob("*") if "store" not in p.parts)
    import_corpus(store, "c", tmp_path / "h.tar")
    assert [(r["source_key"], r["text"]) for r in rows(store)] == [
        ("../../up", "up"),
        ("/etc/root", "root"),
        ("here", "here"),
    ]
    assert sorted(p for p in tmp_path.rglob("*") if "store" not in p.parts) == before


def test_a_member_far_larger_than_any_document_is_not_read_into_memory(store, tmp_path):
    huge = tarfile.TarInfo("big.txt")
    huge.size = 1 << 28
    path = tmp_path / "bomb.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:

        class Zeros(io.RawIOBase):
            def read(self, n=-1):
                return bytes(n)

        tar.addfile(huge, Zeros())
        info = tarfile.TarInfo("ok.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"ok"))
    tracemalloc.start()
    try:
        import_corpus(store, "c", path, max_document_bytes=1 << 20, on_bad_document="skip")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [r["text"] for r in rows(store)] == ["ok"]
    assert peak < 64 << 20


NAMES = st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=150
).filter(lambda name: not name.endswith("/"))


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=1_500)), max_size=6))
def test_members_are_those_of_the_standard_library(tar_format, members):
    data = make_tar(members, tar_format=tar_format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]
    found = [(m.name, m.read() if i % 2 else None) for i, m in enumerate(read_members(io.BytesIO(data)))]
    # The library takes slashes off the end of names; those that would be left nameless are folders anyway.
    assert [name.rstrip("/") for name, _ in found] == [name for name, _ in expected]
    for (_, data), (_, true) in zip(found, expected, strict=True):
        assert data is None or data == true


def read_all(data: bytes) -> list[bytes]:
    return [member.read() for member in read_members(io.BytesIO(data))]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_cut_archive_is_never_a_shorter_one(data):
    members = [(f"{'long' * 40}-{i}.txt", bytes([65 + i]) * 700) for i in range(4)]
    whole = make_tar(members)
    end = whole.rstrip(b"\0")
    first_zero_block = -(-len(end) // 512) * 512
    cut = data.draw(st.integers(0, first_zero_block + 511))
    with pytest.raises(TarError):
        read_all(whole[:cut])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_header_is_never_the_end(data):
    members = [(f"{i}.txt", bytes([65 + i]) * 600) for i in range(4)]
    whole = bytearray(make_tar(members, tar_format=tarfile.USTAR_FORMAT))
    header = 1_536 * data.draw(st.integers(0, 3))
    whole[header + data.draw(st.integers(0, 499))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(TarError):
        read_all(bytes(whole))


def test_archives_that_are_not_read_say_so(store, tmp_path):
    one = make_tar([("0.txt", b"one")])
    huge_header = tarfile.TarInfo("pax")
    huge_header.type, huge_header.size = tarfile.XHDTYPE, 1 << 40
    sparse = tarfile.TarInfo("s.txt")
    sparse.type = tarfile.GNUTYPE_SPARSE
    for content, problem in (
        (one + one, "data behind the end"),
        (huge_header.tobuf(tarfile.GNU_FORMAT), "a header of"),
        (sparse.tobuf(tarfile.GNU_FORMAT) + bytes(1024), "sparse"),
        (b"", "ends where a header"),
        (b"no tar at all" * 100, "damaged tar header"),
    ):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(
            InvalidInputError, match=rf"x.tar cannot be read to its end .*{problem}"
        ) as caught:
            import_corpus(store, "c", tmp_path / "x.tar", on_bad_document="skip")
        assert caught.value.kind is ErrorKind.BAD_DOCUMENT
    assert not store.refresh().corpora()
