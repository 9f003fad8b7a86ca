"""Do documents of every kind of source arrive whole, typed and in order, and is everything else refused?"""

import bz2
import dataclasses
import datetime as dt
import functools
import gzip
import http.server
import json
import lzma
import random
import threading
import uuid
from decimal import Decimal
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import actstore
from actstore.errors import ConflictError, ErrorKind, InvalidInputError, NotFoundError, StorageError
from actstore.ingest.importing import import_corpus
from actstore.log import fsck
from actstore.log.commit import CommitLog
from actstore.objects import ObjectReader
from actstore.store import Store
from actstore.testing.faults import Fault, FaultStorage, Killed

TEXTS = [
    "plain",
    "é combining e\u0301",
    "漢字 and 🎉👩‍👩‍👧",
    "line one\nline two\r\n",
    " ",
    "",
    "nul \0 inside",
    "last",
]
RECORDS = [
    {
        "text": text,
        "n": i,
        "score": i / 4,
        "flag": i % 2 == 0,
        "name": f"name-{i}" if i % 3 else None,
        "tags": [f"t{i}", "x"],
        "meta": {"a": i, "b": {"c": str(i)}},
    }
    for i, text in enumerate(TEXTS)
]
METADATA_TYPES = {
    "n": "int64",
    "score": "double",
    "flag": "bool",
    "name": "string",
    "tags": "list<item: string>",
    "meta": "struct<a: int64, b: struct<c: string>>",
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return actstore.open(tmp_path / "store", create=True)


def rows(store: Store, name: str = "c") -> list[dict]:
    corpus = store.refresh().corpus(name)
    return corpus.documents(range(corpus.n_documents)).to_pylist()


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def assert_records(store: Store, keys: list[str], records=RECORDS) -> None:
    found = rows(store)
    assert [r.pop("doc_id") for r in found] == list(range(len(records)))
    assert [r.pop("source_key") for r in found] == keys
    assert found == records
    columns = store.corpus("c").columns
    assert {name: columns[name] for name in METADATA_TYPES} == METADATA_TYPES
    assert columns["text"] == "large_string"
    assert columns["doc_id"] == "int64"


@pytest.mark.parametrize(
    ("suffix", "opener"),
    [("", open), (".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open), (".zst", None)],
)
def test_jsonl_file_plain_or_compressed(store, tmp_path, suffix, opener):
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n\n" for r in RECORDS).encode()
    path = tmp_path / f"docs.jsonl{suffix}"
    if opener is None:
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        with opener(path, "wb") as file:
            file.write(data)
    report = import_corpus(store, "c", path)
    assert_records(store, [f"docs.jsonl{suffix}:{2 * i + 1}" for i in range(len(RECORDS))])
    assert report.n_documents == len(TEXTS)
    assert report.n_bytes == sum(len(t.encode()) for t in TEXTS)
    assert (report.n_empty, report.n_duplicates, report.n_skipped, report.is_new) == (2, 0, 0, True)
    assert any("NUL" in w for w in report.warnings)
    assert fsck(store.storage, deep=True).is_clean


def test_jsonl_byte_order_mark_and_missing_last_line_feed(store, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\r\n{"text": "two"}')
    import_corpus(store, "c", path)
    assert [(r["text"], r["source_key"]) for r in rows(store)] == [("one", "a.jsonl:1"), ("two", "a.jsonl:2")]


def test_jsonl_folder_and_glob_are_read_in_path_order(store, tmp_path):
    for part in ("b/2", "a/10", "a/9"):
        write_jsonl(tmp_path / "in" / f"{part}.jsonl", [{"text": f"{part}-{i}"} for i in range(2)])
    (tmp_path / "in" / "README.md").write_text("about")
    (tmp_path / "in" / ".hidden.jsonl").write_text("not json")
    report = import_corpus(store, "c", tmp_path / "in")
    expected = ["a/10", "a/9", "b/2"]
    assert [r["source_key"] for r in rows(store)] == [f"{p}.jsonl:{i}" for p in expected for i in (1, 2)]
    assert [r["text"] for r in rows(store)] == [f"{p}-{i}" for p in expected for i in (0, 1)]
    assert any("README.md" in w for w in report.warnings)
    import_corpus(store, "g", str(tmp_path / "in" / "a" / "*.jsonl"))
    assert [r["source_key"] for r in rows(store, "g")] == [
        "10.jsonl:1",
        "10.jsonl:2",
        "9.jsonl:1",
        "9.jsonl:2",
    ]


def test_parquet_keeps_the_sources_own_types(store, tmp_path):
    n = len(TEXTS)
    day, moment = dt.date(2024, 2, 29), dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC)
    table = pa.table(
        {
            "body": pa.array(TEXTS, pa.string()),
            "small": pa.array(range(n), pa.int8()),
            "real": pa.array([i / 8 for i in range(n)], pa.float32()),
            "when": pa.array([moment] * n, pa.timestamp("us", tz="UTC")),
            "day": pa.array([day] * n, pa.date32()),
            "price": pa.array([Decimal("1.50")] * n, pa.decimal128(9, 2)),
            "kind": pa.array(["a", "b"] * (n // 2)).dictionary_encode(),
            "vector": pa.array([[float(i), 1.0] for i in range(n)], pa.list_(pa.float32(), 2)),
            "raw": pa.array([bytes([i]) for i in range(n)], pa.binary()),
            "pairs": pa.array([[("k", i)] for i in range(n)], pa.map_(pa.string(), pa.int64())),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=3)
    import_corpus(store, "c", tmp_path / "t.parquet", text_column="body")
    columns = store.corpus("c").columns
    for name in table.schema.names[1:]:
        expected = pa.string() if name == "kind" else table.schema.field(name).type
        assert columns[name] == str(expected), name
    expected_rows = [
        {"doc_id": i, "text": r.pop("body"), "source_key": f"t.parquet:{i}", **r}
        for i, r in enumerate(table.to_pylist())
    ]
    assert rows(store) == expected_rows


def test_parquet_folder_unifies_types_over_files(store, tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"], "x": pa.array([1], pa.int32())}), folder / "0.parquet")
    pq.write_table(pa.table({"text": ["b"], "x": pa.array([None], pa.null())}), folder / "1.parquet")
    pq.write_table(pa.table({"text": ["c"], "x": pa.array([2.5]), "new": ["n"]}), folder / "2.parquet")
    import_corpus(store, "c", folder)
    assert [(r["x"], r["new"]) for r in rows(store)] == [(1.0, None), (None, None), (2.5, "n")]
    assert store.corpus("c").columns["x"] == "double"


def test_text_folder_and_single_file(store, tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for name, text in {"b.txt": "B\r\n", "a.py": "print('é')\n", "sub/c.txt": ""}.items():
        (folder / name).write_bytes(text.encode())
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    import_corpus(store, "c", folder)
    assert [(r["source_key"], r["text"]) for r in rows(store)] == [
        ("a.py", "print('é')\n"),
        ("b.txt", "B\r\n"),
        ("bom.txt", "marked"),
        ("sub/c.txt", ""),
    ]
    import_corpus(store, "one", folder / "b.txt")
    assert [(r["source_key"], r["text"]) for r in rows(store, "one")] == [("b.txt", "B\r\n")]


def test_iterables_of_records_and_strings(store):
    import_corpus(store, "c", (dict(r) for r in RECORDS))
    assert_records(store, [str(i) for i in range(len(RECORDS))])
    import_corpus(store, "s", iter(TEXTS))
    assert [r["text"] for r in rows(store, "s")] == TEXTS


def test_tables_in_memory(store):
    table = pa.Table.from_pylist(RECORDS)
    keys = [str(i) for i in range(len(RECORDS))]
    import_corpus(store, "c", table)
    assert_records(store, keys)
    frame = pd.DataFrame(RECORDS)
    import_corpus(store, "frame", frame)
    assert [r["meta"] for r in rows(store, "frame")] == [r["meta"] for r in RECORDS]
    assert store.corpus("frame").columns["n"] == "int64"
    import_corpus(store, "polars", pl.DataFrame({"text": TEXTS, "n": range(len(TEXTS))}))
    assert [(r["text"], r["n"]) for r in rows(store, "polars")] == list(
        zip(TEXTS, range(len(TEXTS)), strict=True)
    )
    import_corpus(store, "batch", table.to_batches()[0])
    assert rows(store, "batch") == rows(store)


def test_datasets_objects_and_saved_folders(store, tmp_path):
    dataset = datasets.Dataset.from_list(RECORDS)
    keys = [str(i) for i in range(len(RECORDS))]
    import_corpus(store, "c", dataset)
    assert_records(store, keys)
    reversed_ = dataset.select(range(len(RECORDS) - 1, -1, -1))
    import_corpus(store, "reversed", reversed_)
    assert [r["n"] for r in rows(store, "reversed")] == list(range(len(RECORDS)))[::-1]
    import_corpus(store, "stream", dataset.to_iterable_dataset())
    assert rows(store, "stream") == rows(store)
    dataset.save_to_disk(tmp_path / "saved")
    import_corpus(store, "saved", tmp_path / "saved")
    assert rows(store, "saved") == rows(store)


def test_untyped_stream_of_datasets(store):
    def generate():
        yield {"text": "a", "x": 1}
        yield {"text": "b", "x": 2.5}

    import_corpus(store, "c", datasets.IterableDataset.from_generator(generate))
    assert [r["x"] for r in rows(store)] == [1.0, 2.5]


def test_dataset_dictionary_needs_a_split(store, tmp_path):
    both = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": ["a"]}),
            "test": datasets.Dataset.from_dict({"text": ["b"]}),
        }
    )
    both.save_to_disk(tmp_path / "both")
    for source in (both, tmp_path / "both"):
        with pytest.raises(InvalidInputError, match=r"train, test.*split='train'"):
            import_corpus(store, "c", source)
    with pytest.raises(InvalidInputError, match="no split 'valid'"):
        import_corpus(store, "c", both, split="valid")
    import_corpus(store, "c", tmp_path / "both", split="test")
    assert [r["text"] for r in rows(store)] == ["b"]


def test_types_are_unified_over_the_whole_stream(store, tmp_path):
    # More records than one batch holds, so that the first parts of the stream are spooled with narrower types.
    n = 10_000
    records = [{"text": f"d{i}", "x": i, "late": None, "s": {"a": 1}} for i in range(n)]
    records[9_000] |= {"x": 0.5, "late": "here", "s": {"a": 1.5, "b": "new"}, "extra": [1]}
    records.append({"text": "end", "x": None})
    import_corpus(store, "c", write_jsonl(tmp_path / "x.jsonl", records), part_bytes=10_000)
    found = rows(store)
    assert [r["x"] for r in found] == [float(i) if i != 9_000 else 0.5 for i in range(n)] + [None]
    assert found[0]["s"] == {"a": 1.0, "b": None}
    assert found[9_000]["s"] == {"a": 1.5, "b": "new"}
    assert [found[i]["late"] for i in (0, 9_000)] == [None, "here"]
    assert [found[i]["extra"] for i in (0, 9_000)] == [None, [1]]
    schemas = {pq.read_schema(path) for path in store.corpus("c").part_paths()}
    assert len(store.corpus("c").parts) > 3
    assert len(schemas) == 1
    assert store.corpus("c").columns["x"] == "double"


def test_columns_without_any_value_become_text(store):
    import_corpus(
        store, "c", [{"text": "a", "x": None, "e": {}, "l": []}, {"text": "b", "x": None, "e": {}, "l": []}]
    )
    columns = store.corpus("c").columns
    assert (columns["x"], columns["e"], columns["l"]) == ("string", "string", "list<item: string>")
    assert [r["l"] for r in rows(store)] == [[], []]


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (1, "a", "int64.*string"),
        (True, 2, "bool.*int64"),
        ([1], ["x"], "list.*int64.*list.*string"),
        ({"a": 1}, 3, "struct.*int64"),
    ],
)
@pytest.mark.parametrize("distance", [1, 9_000])
def test_mixed_types_are_refused_or_stringified(store, tmp_path, first, second, shown, distance):
    records = [{"text": f"d{i}", "x": first} for i in range(distance)] + [{"text": "z", "x": second}]
    path = write_jsonl(tmp_path / "m.jsonl", records)
    with pytest.raises(InvalidInputError, match=rf"'x'.*{shown}") as caught:
        import_corpus(store, "c", path)
    assert f"m.jsonl:{distance + 1}" in str(caught.value)
    assert store.refresh().version == 0
    import_corpus(store, "c", path, stringify=["x"])
    assert [r["x"] for r in rows(store)][-2:] == [
        v if isinstance(v, str) else json.dumps(v) for v in (first, second)
    ]


@pytest.mark.parametrize("value", [2**64, 1j, object()])
def test_values_that_no_column_holds(store, value):
    with pytest.raises(InvalidInputError, match="'x'"):
        import_corpus(store, "c", [{"text": "a", "x": value}])
    import_corpus(store, "c", [{"text": "a", "x": value}], columns=[])
    assert rows(store) == [{"doc_id": 0, "text": "a", "source_key": "0"}]


def test_integers_that_floats_cannot_hold(store):
    with pytest.raises(InvalidInputError, match="'x'"):
        import_corpus(
            store, "c", [{"text": f"{i}", "x": 2**53 + 1} for i in range(5_000)] + [{"text": "", "x": 0.5}]
        )


def test_names_that_would_clash(store):
    record = {
        "content": "t",
        "text": "other",
        "doc_id": 5,
        "Corpus": "x",
        "URL": 1,
        "url": 2,
        "": 3,
        "id": "key",
    }
    report = import_corpus(store, "c", [record], text_column="content", id_column="id")
    assert rows(store) == [
        {
            "doc_id": 0,
            "text": "t",
            "source_key": "key",
            "source_text": "other",
            "source_doc_id": 5,
            "source_Corpus": "x",
            "URL": 1,
            "url_2": 2,
            "source_": 3,
            "id": "key",
        }
    ]
    assert report.renamed["url"] == "url_2"
    renamed = import_corpus(
        store, "r", [record], text_column="content", rename={"text": "inner"}, columns=["text", "URL"]
    )
    assert rows(store, "r") == [{"doc_id": 0, "text": "t", "source_key": "0", "inner": "other", "URL": 1}]
    assert renamed.renamed == {"text": "inner"}
    for bad in ({"text": "doc_id"}, {"text": "same", "url": "SAME"}):
        with pytest.raises(InvalidInputError, match="taken"):
            import_corpus(store, "x", [record], text_column="content", rename=bad)


def test_id_columns_of_any_type_become_keys(store):
    import_corpus(store, "c", pa.table({"text": ["a", "b"], "k": [7, None]}), id_column="k")
    assert [r["source_key"] for r in rows(store)] == ["7", None]
    import_corpus(store, "d", [{"text": "a", "source_key": "mine"}], id_column="source_key")
    assert rows(store, "d") == [{"doc_id": 0, "text": "a", "source_key": "mine"}]


def test_missing_columns_are_named_before_any_work(store, tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "url": "u"}])
    pq.write_table(pa.table({"Text": ["x"], "url": ["u"]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidInputError, match=r"no text column 'text' among 'body', 'url'") as caught:
        import_corpus(store, "c", jsonl)
    assert caught.value.kind is ErrorKind.MISSING_COLUMN
    with pytest.raises(InvalidInputError, match=r"did you mean 'Text'"):
        import_corpus(store, "c", tmp_path / "a.parquet")
    with pytest.raises(InvalidInputError, match=r"id column 'uri'.*did you mean 'url'"):
        import_corpus(store, "c", jsonl, text_column="body", id_column="uri")
    for argument in ({"columns": ["nope"]}, {"rename": {"nope": "x"}}, {"stringify": ["nope"]}):
        with pytest.raises(InvalidInputError, match="'nope'"):
            import_corpus(store, "c", jsonl, text_column="body", **argument)
    assert store.refresh().version == 0


BAD_LINES = {
    b'{"text": 5}': "holds a int, not a string",
    b'{"text": null}': "is null",
    b'{"other": "x"}': "has no 'text', only 'other'",
    b'{"text": "a" "b"}': "not JSON",
    b'["text"]': "array, not an object",
    b'"text"': "str, not an object",
    b'{"text": "\\ud83c alone"}': r"lone surrogate U\+D83C at character 0",
    b'{"text": "ok", "x": "\\udfff"}': "column 'x' holds a lone surrogate",
    b'{"text": "caf\xe9"}': "byte 0xe9 at offset 34 of the file is not UTF-8",
    b'{"text": "' + b"y" * 200 + b'"}': "200 bytes, more than max_document_bytes=100",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_bad_lines_are_named_or_skipped(store, tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good one"}\n' + line + b'\n{"text": "good two"}\n')
    with pytest.raises(InvalidInputError, match=rf"bad.jsonl:2: .*{problem}"):
        import_corpus(store, "c", path, max_document_bytes=100)
    assert store.refresh().version == 0
    report = import_corpus(store, "c", path, max_document_bytes=100, on_bad_document="skip")
    assert [(r["doc_id"], r["text"]) for r in rows(store)] == [(0, "good one"), (1, "good two")]
    assert report.n_skipped == 1
    assert "bad.jsonl:2" in report.warnings[0]


def test_lines_longer_than_any_document(store, tmp_path):
    path = tmp_path / "long.jsonl"
    limit = 6 * 10 + (16 << 20)
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * (2 * limit) + b'"}\n{"text": "b"}\n')
    with pytest.raises(InvalidInputError, match=r"long.jsonl:2: the line is longer") as caught:
        import_corpus(store, "c", path, max_document_bytes=10)
    assert caught.value.kind is ErrorKind.TOO_LARGE
    import_corpus(store, "c", path, max_document_bytes=10, on_bad_document="skip")
    assert [(r["text"], r["source_key"]) for r in rows(store)] == [
        ("a", "long.jsonl:1"),
        ("b", "long.jsonl:3"),
    ]


def test_bad_text_files(store, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("fine")
    (tmp_path / "d" / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "d" / "large.txt").write_text("x" * 101)
    with pytest.raises(InvalidInputError, match="larger than max_document_bytes=100") as caught:
        import_corpus(store, "c", tmp_path / "d", max_document_bytes=100)
    assert caught.value.kind is ErrorKind.TOO_LARGE
    with pytest.raises(InvalidInputError, match=r"latin.txt: byte 0xef at offset 2"):
        import_corpus(store, "c", tmp_path / "d")
    report = import_corpus(store, "c", tmp_path / "d", max_document_bytes=100, on_bad_document="skip")
    assert [r["source_key"] for r in rows(store)] == ["a.txt"]
    assert report.n_skipped == 2


def test_bad_rows_of_typed_sources(store):
    bad = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 3, 4], np.int32)), pa.py_buffer(b"a\xff\xfeb")]
    )
    with pytest.raises(InvalidInputError, match="1: the text is not UTF-8"):
        import_corpus(store, "c", pa.table({"text": bad}))
    with pytest.raises(InvalidInputError, match=r"column 'x'.*damaged"):
        import_corpus(store, "c", pa.table({"text": ["a", "b", "c"], "x": bad}))
    import_corpus(store, "c", pa.table({"text": bad, "i": [0, 1, 2]}), on_bad_document="skip")
    assert [(r["text"], r["i"]) for r in rows(store)] == [("a", 0), ("b", 2)]
    with pytest.raises(InvalidInputError, match=r"type int64, not string.*'other'"):
        import_corpus(store, "d", pa.table({"text": [1], "other": ["x"]}))
    with pytest.raises(InvalidInputError, match="1: text column 'text' is null"):
        import_corpus(store, "d", pd.DataFrame({"text": ["a", None]}))
    with pytest.raises(InvalidInputError, match="cannot be read as Arrow"):
        import_corpus(store, "d", pd.DataFrame({"text": ["a", "b"], "x": [1, "mixed"]}))
    with pytest.raises(InvalidInputError, match="record 1: it is a int"):
        import_corpus(store, "d", ["a", 5])
    with pytest.raises(InvalidInputError, match="key 3 that is not a string"):
        import_corpus(store, "d", [{"text": "a", 3: 4}])


def test_sources_that_are_not_there_or_not_documents(store, tmp_path):
    for path in (tmp_path / "nothing.jsonl", str(tmp_path / "*.jsonl"), "nothing.parquet", "./no/such/dir"):
        with pytest.raises(NotFoundError, match="no file at") as caught:
            import_corpus(store, "c", path)
        assert caught.value.kind is ErrorKind.SOURCE_NOT_FOUND
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "emptydir").mkdir()
    for source in (tmp_path / "empty.jsonl", [], pa.table({"text": pa.array([], pa.string())})):
        with pytest.raises(InvalidInputError, match="no document"):
            import_corpus(store, "c", source)
    with pytest.raises(NotFoundError):
        import_corpus(store, "c", tmp_path / "emptydir")
    (tmp_path / "t.xlsx").write_text("no workbook")
    with pytest.raises(InvalidInputError, match="convert it"):
        import_corpus(store, "c", tmp_path / "t.xlsx")
    mixed = tmp_path / "mixed"
    write_jsonl(mixed / "a.jsonl", [{"text": "a"}])
    pq.write_table(pa.table({"text": ["b"]}), mixed / "b.parquet")
    with pytest.raises(InvalidInputError, match=r"several formats.*1 jsonl, 1 parquet"):
        import_corpus(store, "c", mixed)
    import_corpus(store, "c", mixed, source_format="parquet")
    assert [r["text"] for r in rows(store)] == ["b"]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet at all")
    with pytest.raises(InvalidInputError, match=r"broken.parquet cannot be read"):
        import_corpus(store, "d", tmp_path / "broken.parquet")
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInputError, match=r"cut.jsonl.gz cannot be read to its end"):
        import_corpus(store, "d", tmp_path / "cut.jsonl.gz")
    for source in (b"bytes", {"text": ["a"]}, 5):
        with pytest.raises(InvalidInputError, match="the source is a"):
            import_corpus(store, "d", source)


def test_hub_names_that_cannot_be_reached(store, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="is not a path here, and no dataset") as caught:
        import_corpus(store, "c", "no-such-org/no-such-dataset", split="train")
    assert caught.value.kind is ErrorKind.SOURCE_NOT_FOUND


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "../up"},
        {"name": "x" * 54},
        {"on_bad_document": "ignore"},
        {"duplicates": "keep"},
        {"max_document_bytes": 0},
        {"part_bytes": 0},
        {"source_format": "xlsx"},
    ],
)
def test_bad_arguments(store, arguments):
    with pytest.raises(InvalidInputError):
        import_corpus(store, **{"name": "c", "source": ["a"], **arguments})
    assert store.refresh().version == 0


def test_duplicates_are_counted_or_dropped(store):
    rng = random.Random(7)
    texts = [f"text {rng.randrange(300)}" for _ in range(10_000)]
    first = list(dict.fromkeys(texts))
    records = [{"text": t, "i": i} for i, t in enumerate(texts)]
    report = import_corpus(store, "c", records)
    assert report.n_duplicates == len(texts) - len(first)
    assert [r["text"] for r in rows(store)] == texts
    dropped = import_corpus(store, "d", records, duplicates="drop", part_bytes=1_000)
    assert (dropped.n_documents, dropped.n_duplicates) == (len(first), report.n_duplicates)
    assert [(r["doc_id"], r["text"], r["i"]) for r in rows(store, "d")] == [
        (i, t, texts.index(t)) for i, t in enumerate(first)
    ]
    assert store.corpus("d").parts[1].meta["first_doc"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_parts_hold_all_documents_once_within_their_size(store, seed):
    rng = random.Random(seed)
    texts = ["é" * rng.choice([0, 1, 10, 500, 20_000]) + f" {i}" for i in range(3_000)]
    import_corpus(store, "c", texts, part_bytes=100_000)
    corpus = store.corpus("c")
    tables = [pq.read_table(path) for path in corpus.part_paths()]
    assert pa.concat_tables(tables)["text"].to_pylist() == texts
    assert [p.unit for p in corpus.parts] == list(range(len(tables)))
    for part, table in zip(corpus.parts, tables, strict=True):
        assert part.meta["first_doc"] == table["doc_id"][0].as_py()
        assert part.meta["text_bytes"] == sum(len(t.encode()) for t in table["text"].to_pylist()) <= 100_000
    assert corpus.collection.config["text_bytes"] == sum(len(t.encode()) for t in texts)


def test_same_content_is_no_change_and_other_content_a_conflict(store, tmp_path):
    first = import_corpus(store, "c", [dict(r) for r in RECORDS], part_bytes=10)
    # The same documents from another kind of source, cut differently.
    again = import_corpus(store, "c", pa.Table.from_pylist(RECORDS))
    assert (first.is_new, again.is_new) == (True, False)
    assert (again.version, again.n_documents, again.n_bytes) == (
        first.version,
        first.n_documents,
        first.n_bytes,
    )
    assert store.refresh().version == 1
    changed = [dict(r) for r in RECORDS]
    for i, change in ((3, {"n": 9}), (0, {"text": "Plain"}), (2, {"name": "x"}), (5, {"tags": []})):
        with pytest.raises(ConflictError) as caught:
            import_corpus(store, "c", [*changed[:i], changed[i] | change, *changed[i + 1 :]])
        assert caught.value.kind is ErrorKind.CONFIG_DIFFERS
    with pytest.raises(ConflictError):
        import_corpus(store, "c", changed[:-1])
    assert len([*store.storage.list("corpora/")]) == first.n_parts


def faulty(store: Store, plan: dict[int, Fault]) -> tuple[Store, FaultStorage]:
    storage = FaultStorage(store.storage, plan)
    log = CommitLog(storage, sleep=lambda seconds: None)
    objects = ObjectReader(storage, cache_dir=None, cache_bytes=0)
    return Store(storage, store.state, log=log, objects=objects), storage


def test_an_import_that_dies_at_any_write_leaves_nothing_and_can_be_repeated(tmp_path):
    source = [{"text": f"document {i} " + "x" * 50, "i": i} for i in range(40)]
    counting, storage = faulty(actstore.open(tmp_path / "count", create=True), {})
    import_corpus(counting, "c", source, part_bytes=500)
    writes = [i for i, (name, _) in enumerate(storage.operations) if name == "put_new"]
    assert len(writes) >= 5
    for mode in (Fault.KILL_BEFORE, Fault.KILL_AFTER, Fault.DISK_FULL):
        for operation in writes:
            url = tmp_path / uuid.uuid4().hex
            store, _ = faulty(actstore.open(url, create=True), {operation: mode})
            with pytest.raises((Killed, StorageError)):
                import_corpus(store, "c", source, part_bytes=500)
            fresh = actstore.open(url)
            if fresh.version:  # the last write is the commit itself: it died after it
                assert (mode, operation) == (Fault.KILL_AFTER, writes[-1])
            assert [c.n_documents for c in fresh.corpora()] in ([], [40])
            report = import_corpus(fresh, "c", source, part_bytes=500)
            assert report.is_new == (
                not fresh.corpora() or (mode, operation) != (Fault.KILL_AFTER, writes[-1])
            )
            assert [r["i"] for r in rows(fresh)] == list(range(40))


def test_two_imports_of_one_name_at_once(tmp_path):
    # The second importer knows the store from before the first one's commit.
    store = actstore.open(tmp_path / "s", create=True)
    late = {"first": True}

    def source(text: str):
        yield {"text": text}
        if late.pop("first", None):
            import_corpus(actstore.open(tmp_path / "s"), "c", [{"text": "same"}])

    report = import_corpus(store, "c", source("same"))
    assert not report.is_new
    late["first"] = True
    with pytest.raises(ConflictError):
        import_corpus(store, "c", source("other"))


def test_progress_is_told_and_may_stop_the_import(store, tmp_path):
    told = []
    import_corpus(store, "c", [f"d{i}" for i in range(9_000)], part_bytes=8_000, progress=told.append)
    assert [(p.stage, p.done, p.total) for p in told if p.stage == "read"][-1] == ("read", 9_000, None)
    written = [p for p in told if p.stage == "write"]
    assert (written[-1].done, written[-1].total) == (9_000, 9_000)
    assert len(written) == len(store.corpus("c").parts) > 2
    assert [p.done for p in written] == sorted(p.done for p in written)

    def stop(progress):
        raise KeyboardInterrupt

    spool = tmp_path / "spool"
    spool.mkdir()
    with pytest.raises(KeyboardInterrupt):
        import_corpus(store, "d", ["a"], progress=stop, spool_dir=spool)
    assert not [*spool.iterdir()]
    assert [c.id for c in store.refresh().corpora()] == ["c"]


def test_real_text_with_its_names(store):
    records = [{"text": text, "topic": name, "chars": len(text)} for name, text in topics.items()]
    report = import_corpus(store, "topics", records, id_column="topic", part_bytes=100_000)
    assert report.n_bytes == sum(len(t.encode()) for t in topics.values())
    assert report.n_duplicates == len(topics) - len(set(topics.values()))
    found = rows(store, "topics")
    assert {r["source_key"]: (r["text"], r["chars"]) for r in found} == {
        k: (v, len(v)) for k, v in topics.items()
    }
    some = store.corpus("topics").documents([5, 2, 5], ["topic"]).to_pylist()
    assert [r["topic"] for r in some] == [list(topics)[i] for i in (5, 2, 5)]
    assert json.loads(json.dumps(dataclasses.asdict(report)))["n_documents"] == len(topics)


def test_a_web_address_is_kept_without_its_secrets(tmp_path):
    url = str(tmp_path / "s")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/a.jsonl"
            import_corpus(url, "c", f"{address}?X-Signature=canary")
            with pytest.raises(NotFoundError) as caught:
                import_corpus(url, "d", f"{address}.gone?X-Signature=canary")
        finally:
            server.shutdown()
            thread.join()
    assert "canary" not in str(caught.value)
    corpus = actstore.open(url).corpus("c")
    assert corpus.collection.info["source"] == address
    assert corpus.documents([0, 1])["source_key"].to_pylist() == ["a.jsonl:1", "a.jsonl:2"]
