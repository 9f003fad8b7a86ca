"""Attacks on `sql()`: each must be refused, leak nothing and leave every file as it was.

Canaries: a secret file beside the store, a secret in the environment, a Python variable, and the stored files themselves.
The positive control runs the same attacks on a bare DuckDB, where a fair part of them works.
"""

import hashlib
import os
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from actstore.errors import ErrorKind, InvalidInputError
from actstore.query.duck import Limits, open_locked, run_query
from actstore.query.sql import sql
from tests.query.make_store import make_store

SECRET = "canary-7f3a9c"
_GATE_ALONE = {"sleep", "deep brackets", "arrow_scan", "pandas_scan", "python_map"}
"""Attacks that only the gate stops, like writing over an allowed file: raw pointers can end the process."""

LIMITS = Limits(memory_bytes=64 << 20, max_result_bytes=64 << 20, timeout_s=10, threads=1)

ATTACKS = {
    "read_csv": "SELECT * FROM read_csv('{secret}')",
    "read_csv_auto": "SELECT * FROM read_csv_auto('{secret}', header = false)",
    "read_text": "SELECT * FROM read_text('{secret}')",
    "read_blob": "SELECT * FROM read_blob('{secret}')",
    "read_json": "SELECT * FROM read_json('{secret}')",
    "read_ndjson": "SELECT * FROM read_ndjson_objects('{secret}')",
    "read_parquet of the store": "SELECT * FROM read_parquet('{stored}')",
    "parquet_scan": "SELECT * FROM parquet_scan('{stored}')",
    "parquet_metadata": "SELECT * FROM parquet_metadata('{stored}')",
    "parquet_schema": "SELECT * FROM parquet_schema('{stored}')",
    "parquet_kv_metadata": "SELECT * FROM parquet_kv_metadata('{stored}')",
    "sniff_csv": "SELECT * FROM sniff_csv('{secret}')",
    "glob": "SELECT * FROM glob('{folder}/*')",
    "file as table": "SELECT * FROM '{secret}'",
    "file as quoted table": 'SELECT * FROM "{stored}"',
    "environ": "SELECT * FROM read_text('/proc/self/environ')",
    "passwd": "FROM '/etc/passwd'",
    "s3": "FROM 's3://bucket/x.parquet'",
    "metadata service": "SELECT * FROM read_csv('http://169.254.169.254/latest/meta-data')",
    "file url": "FROM read_csv('file://{secret}')",
    "python variable": "SELECT * FROM canary_table",
    "copy to": "COPY (SELECT 1) TO '{out}'",
    "copy over the store": "COPY (SELECT 1) TO '{stored}' (FORMAT parquet, USE_TMP_FILE false)",
    "copy in with": "WITH x AS (COPY (SELECT 1) TO '{out}') SELECT * FROM x",
    "copy over the store in with": "WITH x AS (COPY (SELECT 1) TO '{stored}' (USE_TMP_FILE false)) FROM x",
    "nested copy in with": "SELECT * FROM (WITH x AS (COPY (SELECT 1) TO '{out}') FROM x)",
    "insert in with": "WITH x AS (INSERT INTO runs VALUES (1) RETURNING *) FROM x",
    "delete in with": "WITH x AS (DELETE FROM runs RETURNING *) FROM x",
    "update in with": "WITH x AS (UPDATE runs SET run = 'x' RETURNING *) FROM x",
    "export": "EXPORT DATABASE '{out}'",
    "import": "IMPORT DATABASE '{folder}'",
    "attach": "ATTACH '{out}' AS x",
    "attach memory": "ATTACH ':memory:' AS x",
    "install": "INSTALL httpfs",
    "load": "LOAD httpfs",
    "secret": "CREATE SECRET s (TYPE s3, KEY_ID 'x')",
    "secrets": "FROM duckdb_secrets()",
    "settings": "FROM duckdb_settings()",
    "one setting": "SELECT current_setting('temp_directory')",
    "views with paths": "SELECT sql FROM duckdb_views()",
    "views table": "SELECT sql FROM sqlite_master",
    "information schema": "FROM information_schema.tables",
    "pg catalog": "FROM pg_catalog.pg_views",
    "view definition": "SELECT pg_get_viewdef(1)",
    "external settings": "SET enable_external_access = true",
    "reset": "RESET lock_configuration",
    "pragma": "PRAGMA database_list",
    "profiling file": "PRAGMA profiling_output = '{out}'",
    "logging": "CALL enable_logging(storage = 'file', storage_path = '{out}')",
    "write_log": "SELECT write_log('x')",
    "two statements": "SELECT 1; COPY (SELECT 1) TO '{out}'",
    "comment": "SELECT 1 /* ; */; DROP VIEW runs",
    "prepare": "PREPARE p AS SELECT 1",
    "execute": "EXECUTE p",
    "query function": "FROM query('SELECT * FROM read_text(''{secret}'')')",
    "query_table": "FROM query_table('runs')",
    "serialized": "FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "plan": "SELECT json_serialize_plan('SELECT * FROM read_text(''{secret}'')')",
    "macro": "CREATE MACRO f() AS 1",
    "temp view": "CREATE TEMP VIEW runs AS SELECT 1",
    "drop": "DROP VIEW runs",
    "checkpoint": "FROM checkpoint()",
    "explain analyze": "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
    "variable": "SET VARIABLE x = 1",
    "getvariable": "SELECT getvariable('x')",
    "sequence": "SELECT nextval('s')",
    "sleep": "SELECT sleep_ms(1000)",
    "arrow_scan": "FROM arrow_scan(1, 2, 3)",
    "python_map": "FROM python_map_function(1)",
    "pandas_scan": "FROM pandas_scan(1)",
    "schema in front": "FROM main.runs",
    "other catalog": "FROM system.information_schema.tables",
    "time travel": "SELECT * FROM runs AT (VERSION => 1)",
    "cte named like a file": """WITH "{secret}" AS (SELECT 1) SELECT * FROM (SELECT * FROM "{secret}")""",
    "cte out of scope": "SELECT * FROM canary_table, (WITH canary_table AS (SELECT 1) FROM canary_table)",
    "lateral": "SELECT * FROM runs, LATERAL (SELECT * FROM read_text('{secret}'))",
    "subquery": "SELECT (SELECT content FROM read_text('{secret}'))",
    "in list": "SELECT * FROM runs WHERE run IN (SELECT content FROM read_text('{secret}'))",
    "in a lambda": "SELECT list_transform([1], lambda x: (SELECT content FROM read_text('{secret}')))",
    "vocabulary behind the view": 'FROM "vocabulary docs"',
    "deep brackets": "SELECT " + "(" * 20_000 + "1" + ")" * 20_000,
    "5 MB of text": "SELECT '" + "x" * 5_000_000 + "'",
    "nul": "SELECT 1 \x00 FROM read_text('{secret}')",
    "lone surrogate": "SELECT '\ud800'",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "secret.txt").write_text(f"name\n{SECRET}\nother\n")
    made = make_store(str(folder / "store"), n_documents=6)
    unit = made.store.tokenization(made.tokenization).units[0]
    return {
        "made": made, "folder": str(folder), "secret": str(folder / "secret.txt"), "out": str(folder / "out"),
        "stored": str(folder / "store" / unit.objects[0].key),
    }  # fmt: skip


def fill(attack: str, place) -> str:
    for name in ("secret", "stored", "folder", "out"):
        attack = attack.replace("{" + name + "}", place[name])
    return attack


def snapshot(folder: str) -> dict[str, str]:
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_without_a_trace(place, name, monkeypatch, capfd):
    monkeypatch.setenv("CANARY_ENV", SECRET)
    canary_table = pa.table({"secret": [SECRET]})
    before = snapshot(place["folder"])
    home = set(os.listdir(Path.home()))
    try:
        answer = sql(place["made"].store, fill(ATTACKS[name], place), timeout_s=10).to_json()
    except InvalidInputError as error:
        kind = error.kind
        answer = str(error)
    else:
        pytest.fail(f"{name} was answered: {answer[:200]}")
    assert kind is ErrorKind.BAD_SQL
    assert SECRET not in answer + "".join(capfd.readouterr())
    if "{" not in ATTACKS[name]:
        assert place["folder"] not in answer
    assert "actstore-sql-" not in answer
    assert snapshot(place["folder"]) == before
    assert set(os.listdir(Path.home())) == home
    assert canary_table.num_rows == 1


def test_the_connection_holds_without_the_gate(place):
    """Second wall: on a locked connection itself, no attack reads the secret or writes anything new."""
    before = snapshot(place["folder"])
    for name, attack in ATTACKS.items():
        if "USE_TMP_FILE" in attack or name in _GATE_ALONE:
            continue
        tables = {"runs": pa.table({"run": ["a"]})}
        with open_locked([place["stored"]], tables, [], LIMITS) as con:
            try:
                table = run_query(con, fill(attack, place), None, LIMITS, hide=lambda message: message)
            except (InvalidInputError, UnicodeError, duckdb.Error):
                continue
        assert SECRET not in str(table.to_pylist()), name
    assert snapshot(place["folder"]) == before


def test_the_attacks_are_real(place):
    """Positive control: a bare DuckDB gives the secret away, writes files and overwrites a stored one."""
    canary_table = pa.table({"secret": [SECRET]})
    keep = Path(place["stored"]).read_bytes()
    before = snapshot(place["folder"])
    for name in (
        "read_csv",
        "read_text",
        "read_blob",
        "read_csv_auto",
        "python variable",
        "subquery",
        "lateral",
    ):
        with duckdb.connect(":memory:") as con:
            con.execute("CREATE TABLE runs AS SELECT 'a' AS run")
            assert SECRET in str(con.sql(fill(ATTACKS[name], place)).to_arrow_table().to_pylist()), name
    for name in ("views with paths", "settings", "glob", "parquet_metadata", "one setting", "query function"):
        with duckdb.connect(":memory:") as con:
            con.sql(fill(ATTACKS[name], place)).to_arrow_table()
    assert canary_table.num_rows == 1
    with duckdb.connect(":memory:") as con:
        con.execute(fill(ATTACKS["copy to"], place))
    written = set(snapshot(place["folder"])) - set(before)
    assert place["out"] in written
    for path in written:
        os.unlink(path)
    os.chmod(place["stored"], 0o600)
    with duckdb.connect(":memory:") as con:
        con.execute(fill(ATTACKS["copy over the store"], place))
    assert Path(place["stored"]).read_bytes() != keep
    Path(place["stored"]).write_bytes(keep)


def test_slow_and_large_queries_are_stopped(place):
    store = place["made"].store
    for query in (
        "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT count(*) FROM t",
        "SELECT count(*) FROM range(1000000) a, range(1000000) b, range(1000000) c",
        "SELECT count(*) FROM tokens a, tokens b, tokens c, tokens d, tokens e, tokens f WHERE a.token <> f.token",
    ):
        with pytest.raises(InvalidInputError) as caught:
            sql(store, query, timeout_s=0.5, threads=1)
        assert caught.value.kind in (ErrorKind.TIMED_OUT, ErrorKind.TOO_LARGE)
    with pytest.raises(InvalidInputError) as caught:
        sql(store, "FROM range(1000000000)", max_result_bytes=1 << 20)
    assert caught.value.kind is ErrorKind.TOO_LARGE
    pattern = "SELECT regexp_matches(repeat('a', 50000) || '!', '(a+)+$') AS m"
    assert sql(store, pattern, timeout_s=10).to_dicts() == [{"m": False}]
