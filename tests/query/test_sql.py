"""SQL over the views against answers worked out from what the store was made of."""

import datetime as dt
import os
import tempfile
import time

import pandas as pd
import pyarrow as pa
import pytest

import actstore
from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.query.sql import sql
from actstore.query.view_docs import VIEWS
from tests.query.make_store import WORDS, add_corpus, add_run, add_tokenization, make_store, random_values


def frame(made) -> pd.DataFrame:
    return pd.DataFrame([vars_of(t) for t in made.tokens])


def vars_of(token):
    return {f: getattr(token, f) for f in token.__dataclass_fields__}


def test_tokens_are_what_was_stored(made):
    result = made.store.sql("SELECT * FROM tokens ORDER BY row")
    table = result.to_pandas()
    expected = frame(made)
    pd.testing.assert_frame_equal(table[expected.columns], expected, check_dtype=False)
    assert table["token"].tolist() == [WORDS[i] for i in expected["token_id"]]
    assert set(table["tokenization"]) == {made.tokenization}
    assert set(table["corpus"]) == {"docs"}
    assert result.table.column_names == [name for name, *_ in VIEWS["tokens"].columns]


def test_joins_and_aggregates_against_pandas(made):
    result = made.store.sql("""
        SELECT source, count(*) AS n_tokens, sum(row) AS total, count(DISTINCT doc_id) AS n_docs
        FROM tokens JOIN documents USING (corpus, doc_id) WHERE NOT is_special AND n >= ? GROUP BY source ORDER BY source
    """, [5])  # fmt: skip
    docs = pd.DataFrame(made.metadata).assign(doc_id=range(len(made.metadata)))
    joined = frame(made).merge(docs, on="doc_id")
    joined = joined[~joined["is_special"] & (joined["n"] >= 5)]
    expected = joined.groupby("source").agg(
        n_tokens=("row", "size"), total=("row", "sum"), n_docs=("doc_id", "nunique")
    )
    assert result.to_pandas().set_index("source").equals(expected)
    assert result.table.schema.field("total").type == pa.int64()  # a hugeint that fits
    assert result.meta.bytes_read > 0
    assert result.meta.version == made.store.version


def test_characters_give_back_the_words(made):
    """Offsets are code points: DuckDB's substring cuts out the token's own text."""
    result = made.store.sql("""
        SELECT token, trim(substring(text, char_start + 1, char_end - char_start)) AS cut
        FROM tokens JOIN documents USING (corpus, doc_id) WHERE NOT is_special
    """)
    assert len(result) > 500
    assert all(r["cut"] == r["token"] for r in result)


def test_state_views(made):
    runs = {r["run"]: r for r in made.store.sql("FROM runs")}
    assert set(runs) == {"run", "half", "part"}
    run = made.run("part")
    expected = {
        "n_rows": run.n_rows, "n_units": run.n_units, "n_units_planned": len(run.tokenization.units), "is_complete": False,
        "dtype": "float16", "model_source": "synthetic/model", "corpus": "docs", "n_hook_points": 2, "codec": "hot",
        "fingerprint": run.collection.fingerprint, "nbytes": run.collection.nbytes, "model": "Synthetic",
    }  # fmt: skip
    assert {key: runs["part"][key] for key in expected} == expected
    assert runs["run"]["is_complete"]
    assert runs["run"]["nonfinite"] > 0
    hooks = made.store.sql(
        "FROM hook_points WHERE run = $name ORDER BY hook_point", {"name": "run"}
    ).to_dicts()
    assert [(h["hook_point"], h["layer"], h["d_model"]) for h in hooks] == [
        ("layers.0.resid_post", 0, 12), ("layers.1.mlp_act", 1, 24),
    ]  # fmt: skip
    assert sum(h["nonfinite"] for h in hooks) == runs["run"]["nonfinite"]
    assert sum(h["nbytes"] for h in hooks) < runs["run"]["nbytes"]
    [corpus] = made.store.sql("FROM corpora")
    assert (corpus["n_documents"], corpus["corpus"]) == (40, "docs")
    [tokenization] = made.store.sql("FROM tokenizations")
    assert tokenization["n_rows"] == len(made.tokens)
    assert tokenization["is_complete"]
    units = made.store.sql(
        "SELECT kind, sum(rows) AS rows FROM units WHERE id IN ('docs', 'run') GROUP BY kind"
    ).to_dicts()
    assert {u["kind"]: u["rows"] for u in units} == {"corpus": 40, "run": len(made.tokens)}


def test_documents_are_the_union_of_all_metadata(tmp_path):
    store = actstore.open(str(tmp_path / "s"), create=True)
    add_corpus(
        store,
        "a",
        ["x", "y"],
        {"lang": pa.array(["en", None]), "n": pa.array([1, 2], pa.int32()), "mixed": pa.array([1, 2])},
    )
    add_corpus(
        store,
        "b",
        ["z"],
        {"n": pa.array([3.5]), "mixed": pa.array([{"k": 1}]), 'odd "name"; --': pa.array([True])},
    )
    rows = store.sql("SELECT * FROM documents ORDER BY corpus, doc_id").to_dicts()
    assert [(r["corpus"], r["doc_id"], r["text"], r["lang"], r["n"]) for r in rows] == [
        ("a", 0, "x", "en", 1.0), ("a", 1, "y", None, 2.0), ("b", 0, "z", None, 3.5),
    ]  # fmt: skip
    assert [r["mixed"] for r in rows] == ["1", "2", "{'k': 1}"]
    assert store.sql('SELECT "odd ""name""; --" AS odd FROM documents WHERE corpus = \'b\'').to_dicts() == [
        {"odd": True}
    ]
    meanings = {
        r["column_name"]: r["meaning"] for r in store.sql("FROM view_columns WHERE view = 'documents'")
    }
    assert {"lang", "n", "mixed", 'odd "name"; --', "text"} <= set(meanings)


def test_an_empty_store_answers(tmp_path):
    store = actstore.open(str(tmp_path / "s"), create=True)
    for view in VIEWS:
        result = store.sql(f"SELECT * FROM {view}")
        if view != "view_columns":
            assert len(result) == 0
            assert result.table.column_names == [name for name, *_ in VIEWS[view].columns]


def test_an_unfinished_tokenization_has_no_words_yet(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=4)
    from actstore.log.values import Create
    from tests.query.make_store import commit

    config = dict(made.store.tokenization(made.tokenization).config) | {"window": 8}
    commit(made.store, Create("tokenization", "docs.0123456789", config, {}))
    assert made.store.sql("SELECT count(*) AS n FROM tokens WHERE token IS NOT NULL").to_dicts() == [
        {"n": len(made.tokens)}
    ]
    rows = made.store.sql("SELECT is_complete, n_documents FROM tokenizations ORDER BY n_rows").to_dicts()
    assert rows == [{"is_complete": False, "n_documents": None}, {"is_complete": True, "n_documents": 4}]


def test_describing(made):
    names = [r["name"] for r in made.store.sql("SHOW TABLES")]
    assert names == list(VIEWS)
    for statement in ("DESCRIBE tokens", "DESC tokens", "SHOW tokens", "DESCRIBE SELECT * FROM tokens"):
        result = made.store.sql(statement)
        assert [r["column_name"] for r in result] == [name for name, *_ in VIEWS["tokens"].columns]
        assert result.meta.bytes_read == 0
    types = {r["column_name"]: r["column_type"] for r in made.store.sql("DESCRIBE documents")}
    assert types["score"] == "DOUBLE"
    assert types["source"] == "VARCHAR"
    [row] = [r for r in made.store.sql("SUMMARIZE tokens") if r["column_name"] == "row"]
    assert row["count"] == len(made.tokens)
    for view, described in VIEWS.items():
        found = {r["column_name"]: r["column_type"] for r in made.store.sql(f"DESCRIBE {view}")}
        assert {name: type_ for name, type_, *_ in described.columns}.items() <= found.items(), view


def test_every_kind_of_select(made):
    for query, expected in {
        "WITH a AS (SELECT 1 AS x), b AS (SELECT x + 1 AS x FROM a) SELECT * FROM a UNION ALL FROM b ORDER BY x": [
            1,
            2,
        ],
        "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t WHERE x < 3) SELECT x FROM t ORDER BY x": [
            1,
            2,
            3,
        ],
        "SELECT x FROM range(3) r(x) EXCEPT SELECT 1 ORDER BY ALL": [0, 2],
        "WITH runs AS (SELECT 7 AS x) SELECT x FROM runs": [7],
        "SELECT unnest([3, 4]) AS x": [3, 4],
        "VALUES (5)": [5],
        "SELECT max(row) OVER () AS x FROM tokens LIMIT 1;": [max(t.row for t in made.tokens)],
        "SELECT list_sum(list_transform([1, 2], lambda v: v * 10)) AS x": [30],
        "SELECT count(*) FROM RUNS AS r ASOF JOIN Runs AS s ON r.run = s.run AND r.n_rows >= s.n_rows": [3],
    }.items():
        table = made.store.sql(query).table
        assert table.column(0).to_pylist() == expected, query


def test_values_of_every_type():
    store = actstore.open("memory://types-of-sql", create=True)
    result = store.sql("""SELECT 170141183460469231731687303715884105727::HUGEINT AS big, 5::HUGEINT AS small,
        '0b4ce2c7-5fb8-4b2c-8d3b-5f6f4d6b9a01'::UUID AS id, TIMESTAMP '2024-05-01 12:00:00' AS t,
        TIMESTAMPTZ '2024-05-01 12:00:00+00' AS tz, 1.50::DECIMAL(9, 2) AS d, 'NaN'::DOUBLE AS nan, '\\xAA'::BLOB AS b,
        {'a': [1, NULL]} AS s, NULL AS n, 1 AS "x", 2 AS "x" """)  # fmt: skip
    [row] = result.to_dicts()
    assert row["small"] == 5
    assert int(row["big"]) == 2**127 - 1
    assert row["t"] == dt.datetime(2024, 5, 1, 12)
    assert row["tz"].utcoffset() == dt.timedelta(0)
    assert (row["x"], row["x_1"], row["b"], row["s"]) == (1, 2, b"\xaa", {"a": [1, None]})
    assert '"nan": null' in result.to_json()
    assert '"nonfinite": 1' in result.to_json()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT * FROM token", "did you mean tokens"),
        ("SELEC 1", "syntax error at or near"),
        ("SELECT nope FROM runs", 'Referenced column "nope" not found'),
        ("SELECT nofunction(1)", "nofunction"),
        ("SELECT 1; SELECT 2", "one statement is accepted, got 2"),
        ("", "SQL text"),
        ("SELECT 'a'::INTEGER", "Could not convert"),
        ("SELECT $1", "parameter"),
    ],
)
def test_mistakes_are_explained(made, query, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        made.store.sql(query)
    assert caught.value.kind is ErrorKind.BAD_SQL


def test_parameters_are_bound(made):
    hostile = "x' OR 1=1; DROP VIEW runs; --"
    assert made.store.sql("SELECT ? AS a", [hostile]).to_dicts() == [{"a": hostile}]
    assert len(made.store.sql("FROM runs WHERE run = ?", [hostile])) == 0
    assert made.store.sql("SELECT $x + $y AS s", {"x": 1, "y": 2.5}).to_dicts() == [{"s": 3.5}]


def test_time_is_limited(made):
    start = time.monotonic()
    for query in ("SELECT count(*) FROM range(100000000000) a, range(1000) b", "FROM range(100000000000)"):
        with pytest.raises(InvalidInputError, match=r"timeout_s=0\.3") as caught:
            sql(made.store, query, timeout_s=0.3, max_result_bytes=1 << 40)
        assert caught.value.kind is ErrorKind.TIMED_OUT
    assert time.monotonic() - start < 20
    assert len(sql(made.store, "FROM runs", timeout_s=60)) == 3


def test_sizes_are_limited(made):
    with pytest.raises(InvalidInputError, match="max_result_bytes") as caught:
        sql(made.store, "SELECT repeat('x', 1000) FROM range(100000)", max_result_bytes=1 << 20)
    assert caught.value.kind is ErrorKind.TOO_LARGE
    with pytest.raises(InvalidInputError, match=r"memory_bytes|max_temp") as caught:
        sql(made.store, "SELECT list(a) FROM range(30000000) t(a)", memory_bytes=32 << 20, threads=1)
    assert caught.value.kind is ErrorKind.TOO_LARGE
    for bad in (
        {"memory_bytes": 5},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"threads": 0},
        {"max_result_bytes": 0},
    ):
        with pytest.raises(InvalidInputError):
            sql(made.store, "FROM runs", **bad)


def test_nothing_is_left_behind(made, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sql(made.store, "SELECT count(*) FROM tokens")
    with pytest.raises(InvalidInputError):
        sql(made.store, "SELECT nope")
    assert os.listdir(tmp_path) == []


def test_versions_are_pinned(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=4)
    before = made.store.version
    widths = {"embed": 4}
    add_run(made, "run", widths, random_values(0, widths))
    assert len(made.store.sql("FROM runs")) == 1
    assert len(made.store.at(before).sql("FROM runs")) == 0


def test_damage_is_an_error_not_an_answer(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=4)
    unit = made.store.tokenization(made.tokenization).units[0]
    path = tmp_path / "s" / unit.objects[0].key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    os.chmod(path, 0o600)
    path.write_bytes(bytes(data))
    with pytest.raises(FormatError) as caught:
        made.store.sql("SELECT count(*) FROM tokens")
    assert caught.value.kind is ErrorKind.OBJECT_DAMAGED
    assert len(made.store.sql("FROM documents")) == 4
    path.unlink()
    with pytest.raises(FormatError) as caught:
        made.store.sql("FROM tokens")
    assert caught.value.kind is ErrorKind.OBJECT_MISSING


def test_two_tokenizations_of_one_corpus(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=6)
    ids = [[WORDS.index(w) for w in text.split(" ")] for text in made.texts]
    other, tokens = add_tokenization(
        made.store, "docs", ids, made.texts, window=8, overlap=2, bos=False, rows_per_unit=32
    )
    counts = {
        r["tokenization"]: r["n"]
        for r in made.store.sql("SELECT tokenization, count(*) AS n FROM tokens GROUP BY 1")
    }
    assert counts == {made.tokenization: len(made.tokens), other: len(tokens)}
