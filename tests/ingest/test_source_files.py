"""Are files found wherever they are, taken in one order, and read by their format?"""

import csv
import gzip
import io
import json
import random
from pathlib import Path

import botocore
import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError, StorageError
from actstore.ingest.importing import import_corpus
from actstore.ingest.sources import SourceList
from actstore.store import Store
from tests.s3_server import S3Server

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return actstore.open(tmp_path / "store", create=True)


def rows(store: Store, name: str = "c") -> list[dict]:
    corpus = store.refresh().corpus(name)
    return corpus.documents(range(corpus.n_documents)).to_pylist()


def content(store: Store, name: str) -> str:
    return store.corpus(name).collection.config["content_sha256"]


def parquet_bytes(texts: list[str], first: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "n": range(first, first + len(texts))}), sink, row_group_size=3)
    return sink.getvalue()


FILES = {
    "b/part-10.parquet": parquet_bytes([f"b10-{i}" for i in range(5)], 0),
    "b/part-9.parquet": parquet_bytes([f"b9-{i}" for i in range(5)], 5),
    "a/year=2024/part-0.parquet": parquet_bytes(["é", "🎉"], 10),
}
IN_ORDER = sorted(FILES)
TEXTS = [text for name in IN_ORDER for text in pq.read_table(io.BytesIO(FILES[name]))["text"].to_pylist()]


def test_globs_and_folders_read_the_same_from_every_file_system(store, tmp_path):
    with S3Server() as server:
        bucket = server.make_bucket()
        remote = fsspec.filesystem("s3", **server.storage_options)
        memory = fsspec.filesystem("memory")
        # Written in another order than they are read.
        for name in reversed(IN_ORDER):
            for fs, path in (
                (remote, f"{bucket}/in/{name}"),
                (memory, f"/glob-test/{name}"),
                (fsspec.filesystem("file"), f"{tmp_path}/in/{name}"),
            ):
                fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                fs.pipe(path, FILES[name])
        options = {"storage_options": server.storage_options}
        sources = {
            "local": (str(tmp_path / "in" / "**" / "*.parquet"), {}),
            "folder": (tmp_path / "in", {}),
            "memory": ("memory://glob-test/**/*.parquet", {}),
            "s3-glob": (f"s3://{bucket}/in/**/*.parquet", options),
            "s3-folder": (f"s3://{bucket}/in", options),
        }
        for name, (source, more) in sources.items():
            import_corpus(store, name, source, **more)
            assert [r["source_key"].rsplit(":")[0] for r in rows(store, name)] == [
                name for name in IN_ORDER for _ in range(pq.read_metadata(io.BytesIO(FILES[name])).num_rows)
            ]
        assert len({content(store, name) for name in sources}) == 1
        assert [r["text"] for r in rows(store, "s3-glob")] == TEXTS
        assert set(store.corpus("local").columns) == {
            "doc_id",
            "text",
            "source_key",
            "n",
        }  # no year: paths are no data
        import_corpus(store, "b", f"s3://{bucket}/in/b/*.parquet", **options)
        assert [r["source_key"] for r in rows(store, "b")][::5] == ["part-10.parquet:0", "part-9.parquet:0"]
        # Written by someone else after this process listed the folder.
        server_side = fsspec.filesystem("s3", **server.storage_options, skip_instance_cache=True)
        server_side.pipe(f"{bucket}/in/c.parquet", FILES["b/part-9.parquet"])
        assert import_corpus(store, "later", f"s3://{bucket}/in", **options).n_documents == len(TEXTS) + 5
        for missing in (f"s3://{bucket}/nothing/*.parquet", f"s3://{bucket}/none.parquet"):
            with pytest.raises(NotFoundError, match="no file at"):
                import_corpus(store, "x", missing, **options)
        lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5_000)).encode()
        remote.pipe(f"{bucket}/a.jsonl.gz", gzip.compress(lines))
        import_corpus(store, "lines", f"s3://{bucket}/a.jsonl.gz", **options)
        assert [r["text"] for r in rows(store, "lines")] == [f"line {i}" for i in range(5_000)]
        wrong = {**server.storage_options, "secret": "", "key": "", "endpoint_url": "http://127.0.0.1:9"}
        wrong["config_kwargs"] = {"retries": {"max_attempts": 1}}
        with pytest.raises(StorageError, match="cannot be listed") as caught:
            import_corpus(store, "x", f"s3://{bucket}/in", storage_options=wrong)
    assert server.storage_options["secret"] not in str(caught.value)
    assert server.storage_options["secret"] not in json.dumps(dict(store.corpus("s3-glob").collection.info))


def test_several_sources_are_joined_in_their_order(store, tmp_path):
    (tmp_path / "z.jsonl").write_text('{"text": "z", "n": 1}\n')
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.parquet").write_bytes(FILES["b/part-9.parquet"])
    names = ["z.jsonl", "a.txt", "b.parquet"]
    expected = ["z", "a", *(f"b9-{i}" for i in range(5))]
    import_corpus(store, "c", SourceList(str(tmp_path / name) for name in names))
    assert [r["text"] for r in rows(store)] == expected
    assert [r["n"] for r in rows(store)] == [1, None, 5, 6, 7, 8, 9]
    import_corpus(store, "paths", [tmp_path / name for name in names])
    assert content(store, "paths") == content(store, "c")
    assert store.corpus("c").collection.info["source"] == ", ".join(str(tmp_path / n) for n in names)
    import_corpus(store, "texts", ["z", "a"])  # strings are documents
    assert [r["text"] for r in rows(store, "texts")] == ["z", "a"]
    with pytest.raises(InvalidInputError, match="empty"):
        import_corpus(store, "none", SourceList())
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(InvalidInputError, match="no text column 'text'"):
        import_corpus(store, "d", SourceList([str(tmp_path / "z.jsonl"), str(tmp_path / "c.parquet")]))


@pytest.mark.parametrize(
    "layout", ["array", "indented array", "objects", "lines", "one object", "byte order mark"]
)
@settings(max_examples=12, deadline=None)
@given(
    values=st.lists(st.dictionaries(st.sampled_from("ab c"), JSON_VALUES, max_size=3), min_size=1, max_size=6)
)
def test_json_files_of_every_layout(tmp_path_factory, layout, values):
    folder = tmp_path_factory.mktemp("json")
    records = [{"text": f"d{i}", "meta": value} for i, value in enumerate(values)]
    if layout == "one object":
        records = records[:1]
    separator = "\n" if layout in ("objects", "lines") else None
    indent = 2 if layout in ("indented array", "objects", "one object") else None
    if separator:
        text = separator.join(json.dumps(r, indent=indent) for r in records)
    elif layout == "one object":
        text = json.dumps(records[0], indent=indent)
    else:
        text = json.dumps(records, indent=indent, ensure_ascii=False)
    mark = "\ufeff" if layout == "byte order mark" else ""
    (folder / "x.json").write_text(mark + text, encoding="utf-8")
    store = actstore.open(folder / "s", create=True)
    import_corpus(store, "c", folder / "x.json", stringify=["meta"])
    first = 1 if layout == "lines" else 0
    assert [(r["text"], json.loads(r["meta"]) if r["meta"] is not None else None) for r in rows(store)] == [
        (r["text"], r["meta"]) for r in records
    ]
    keys = [f"x.json:{i + first}" for i in range(len(records))]
    assert [r["source_key"] for r in rows(store)] == keys


def test_json_arrays_larger_than_a_buffer_are_streamed(store, tmp_path):
    rng = random.Random(3)
    texts = ['"\\é🎉\n' * rng.choice([1, 10, 1_000, 300_000]) + str(i) for i in range(40)]
    for ascii_only in (True, False):
        path = tmp_path / f"big-{ascii_only}.json"
        path.write_text(json.dumps([{"text": t} for t in texts], ensure_ascii=ascii_only), encoding="utf-8")
        import_corpus(store, f"c{ascii_only}", path)
        assert [r["text"] for r in rows(store, f"c{ascii_only}")] == texts


BROKEN_JSON = {
    "cut": ('[{"text": "a"}, {"text": "b"', "not JSON at character"),
    "cut between": ('[{"text": "a"},', "not JSON at character 15"),
    "no end": ('[{"text": "a"}', "',' or ']' expected"),
    "two arrays": ('[{"text": "a"}][]', "text after the array"),
    "no comma": ('[{"text": "a"} {"text": "b"}]', "character 15: ',' or ']' expected"),
    "no value": ('[{"text": "a"}, oops]' + " " * 100, "not JSON at character 16"),
    "comma at the end": ('[{"text": "a"},]' + " " * 100, "not JSON at character 15"),
    "not UTF-8": (b'[{"text": "caf\xe9"}]', "utf-8"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "second object cut": ('{\n"text": "a"}\n{"text": ', "not JSON at character"),
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_broken_json_files_are_never_shorter_ones(store, tmp_path, case):
    text, problem = BROKEN_JSON[case]
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for policy in ("error", "skip"):
        with pytest.raises(InvalidInputError, match=rf"x.json cannot be read to its end .*{problem}"):
            import_corpus(store, "c", tmp_path / "x.json", on_bad_document=policy)
    assert not store.refresh().corpora()


def test_items_that_are_no_objects_are_skipped(store, tmp_path):
    (tmp_path / "x.json").write_text('[{"text": "a"}, 5, ["b"], {"text": "c"}]')
    with pytest.raises(InvalidInputError, match=r"x.json:1: the item holds a JSON int"):
        import_corpus(store, "c", tmp_path / "x.json")
    assert import_corpus(store, "c", tmp_path / "x.json", on_bad_document="skip").n_skipped == 2
    assert [r["source_key"] for r in rows(store)] == ["x.json:0", "x.json:3"]


CELLS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=30)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
@settings(max_examples=15, deadline=None)
@given(table=st.lists(st.tuples(CELLS.filter(bool), CELLS, CELLS), min_size=1, max_size=8))
def test_csv_is_read_as_pythons_csv_reads_it(tmp_path_factory, suffix, table):
    folder = tmp_path_factory.mktemp("csv")
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter="\t" if "tsv" in suffix else ",")
    writer.writerow(["text", "num", "x y"])
    writer.writerows(table)
    data = b"\xef\xbb\xbf" + buffer.getvalue().encode()
    (folder / f"t{suffix}").write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    store = actstore.open(folder / "s", create=True)
    import_corpus(store, "c", folder / f"t{suffix}")
    assert [(r["text"], r["num"], r["x y"]) for r in rows(store)] == table
    assert rows(store)[0]["source_key"] == f"t{suffix}:2"


BAD_CSV = {
    "open quote": ('text,n\na,1\n"b,2\n', True, "row at line 3: unexpected end of data"),
    "quote inside": ('text,n\n"a"x,1\n', True, "row at line 2"),
    "two columns of one name": ("text,text\na,b\n", True, "two columns 'text'"),
    "too few": ("text,n\nx,1\n\na\ny,2\n", False, "x.csv:4: the row has 1 values, the header 2"),
    "not UTF-8": (b"text,n\nx,1\ncaf\xe9,2\ny,2\n", False, "x.csv:3: byte 0xe9 is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv_is_named_or_skipped(store, tmp_path, case):
    text, is_fatal, problem = BAD_CSV[case]
    (tmp_path / "x.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidInputError, match=problem):
        import_corpus(store, "c", tmp_path / "x.csv")
    if is_fatal:
        with pytest.raises(InvalidInputError, match=problem):
            import_corpus(store, "c", tmp_path / "x.csv", on_bad_document="skip")
    else:
        assert import_corpus(store, "c", tmp_path / "x.csv", on_bad_document="skip").n_skipped == 1
        assert [r["text"] for r in rows(store)] == ["x", "y"]


def test_formats_in_one_folder(store, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.csv").write_text("text\na\n")
    (folder / "meta.json").write_text('{"about": "the data"}')
    report = import_corpus(store, "c", folder)
    assert [r["text"] for r in rows(store)] == ["a"]
    assert any("meta.json" in warning for warning in report.warnings)
    (folder / "b.jsonl").write_text('{"text": "b"}')
    with pytest.raises(InvalidInputError, match="several formats"):
        import_corpus(store, "d", folder)
    import_corpus(store, "d", folder, source_format="csv")
    assert content(store, "d") == content(store, "c")


def test_real_service_models_as_compressed_json(store, tmp_path):
    models = sorted(Path(botocore.__file__).parent.glob("data/*/*/service-2.json.gz"))[::12]
    records = []
    for path in models:
        model = json.loads(gzip.decompress(path.read_bytes()))
        service = model["metadata"]["serviceId"]
        for kind in ("operations", "shapes"):
            for name, entry in model[kind].items():
                if text := entry.get("documentation"):
                    records.append({"text": text, "service": service, "kind": kind, "name": name})
    assert len(records) > 5_000
    half = len(records) // 2
    (tmp_path / "0.json.gz").write_bytes(gzip.compress(json.dumps(records[:half]).encode()))
    (tmp_path / "1.json.gz").write_bytes(gzip.compress(json.dumps(records[half:], indent=1).encode()))
    report = import_corpus(store, "c", tmp_path / "*.json.gz", id_column="name")
    found = rows(store)
    assert [{k: r[k] for k in ("text", "service", "kind")} for r in found] == [
        {k: r[k] for k in ("text", "service", "kind")} for r in records
    ]
    assert report.n_duplicates == len(records) - len({r["text"] for r in records})
    counted = store.sql("SELECT service, kind, count(*) AS n FROM documents GROUP BY ALL").to_dicts()
    expected: dict[tuple[str, str], int] = {}
    for r in records:
        expected[r["service"], r["kind"]] = expected.get((r["service"], r["kind"]), 0) + 1
    assert {(r["service"], r["kind"]): r["n"] for r in counted} == expected
    # A whole model is one object; its text is nowhere, and that is said.
    with pytest.raises(
        InvalidInputError, match="no text column 'text' among 'version', 'metadata'"
    ) as caught:
        import_corpus(store, "d", models[0])
    assert caught.value.kind is ErrorKind.MISSING_COLUMN


def write_dataset(folder: Path) -> None:
    """A dataset as the hub keeps it: files by split and configuration, described in its README."""
    for config, split, texts in (
        ("en", "train", ["one", "two"]),
        ("en", "test", ["three"]),
        ("de", "train", ["eins"]),
    ):
        path = folder / config / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts)))
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: en\n  data_files:\n  - split: train\n    path: en/train.jsonl\n  - split: test\n    path: en/test.jsonl\n"
        "- config_name: de\n  data_files:\n  - split: train\n    path: de/train.jsonl\n---\n"
    )


@pytest.mark.parametrize("streaming", [True, False])
def test_split_and_subset_of_a_downloaded_dataset(store, tmp_path, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_dataset(tmp_path / "data")
    import_corpus(store, "c", tmp_path / "data", subset="en", split="test", streaming=streaming)
    assert [(r["text"], r["n"]) for r in rows(store)] == [("three", 0)]
    assert store.corpus("c").collection.info["source"] == "data:en[test]"
    import_corpus(store, "d", tmp_path / "data", subset="de", streaming=streaming)
    assert [r["text"] for r in rows(store, "d")] == ["eins"]
    with pytest.raises(InvalidInputError, match=r"2 splits \(train, test\)"):
        import_corpus(store, "e", tmp_path / "data", subset="en", streaming=streaming)
    for wrong in ({"subset": "fr"}, {"subset": "en", "split": "valid"}):
        with pytest.raises((NotFoundError, InvalidInputError)):
            import_corpus(store, "e", tmp_path / "data", streaming=streaming, **wrong)


def test_a_stream_is_read_once_and_its_failure_is_told(store):
    pulled = []

    def generate(fails_at):
        for i in range(3_000):
            if i == fails_at:
                raise ConnectionError("the network went away")
            pulled.append(i)
            yield {"text": f"document {i}", "n": i}

    features = datasets.Features({"text": datasets.Value("string"), "n": datasets.Value("int32")})
    for known in (None, features):
        stream = datasets.IterableDataset.from_generator(
            generate, gen_kwargs={"fails_at": -1}, features=known
        )
        name = "typed" if known else "untyped"
        pulled.clear()
        import_corpus(store, name, stream.shuffle(seed=1, buffer_size=100))
        assert sorted(pulled) == list(range(3_000))
        assert sorted(r["n"] for r in rows(store, name)) == list(range(3_000))
        assert [r["text"] for r in rows(store, name)] == [f"document {r['n']}" for r in rows(store, name)]
        broken = datasets.IterableDataset.from_generator(
            generate, gen_kwargs={"fails_at": 1_000}, features=known
        )
        with pytest.raises(StorageError, match=r"cannot be read beyond row \d+ .*the network went away"):
            import_corpus(store, "broken", broken)
    assert store.corpus("typed").columns["n"] == "int32"
    assert {c.id for c in store.refresh().corpora()} == {"typed", "untyped"}
