"""Codes in SQL: every query is asked of the store and of a plain DuckDB over the same numbers in memory."""

import os
import tracemalloc

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

import actstore
from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.query.code_relations import CODES_SCHEMA, Reads
from actstore.query.code_views import CodeRows, ranges_where
from actstore.query.match import fires
from actstore.query.view_docs import VIEWS
from actstore.sampling import Sample
from tests.query.make_codes import add_codes, naive_stats, random_codes, stored_rows
from tests.query.make_store import WORDS, add_run, make_store, random_values


def code_frame(codes) -> pd.DataFrame:
    found = codes.matrix.tocoo()
    return pd.DataFrame(
        {
            "dictionary": codes.dictionary,
            "run": codes.run,
            "row": codes.rows[found.row],
            "latent": found.col.astype(np.int32),
            "value": found.data.astype(np.float32),
            "tokenization": codes.made.store.run(codes.run).tokenization.id,
        }
    )


@pytest.fixture(scope="module")
def plain(coded):
    """The same relations as plain tables."""
    made = coded["sae"].made
    con = duckdb.connect()
    frames = {name: code_frame(codes) for name, codes in coded.items()}
    con.register("codes_frame", pd.concat(list(frames.values())))
    con.register("postings_frame", pd.concat([frames["sae"], frames["other"]]))
    tokens = pd.DataFrame([{f: getattr(t, f) for f in t.__dataclass_fields__} for t in made.tokens])
    con.register(
        "tokens_frame",
        tokens.assign(
            token=[WORDS[i] for i in tokens["token_id"]],
            corpus="docs",
            tokenization=made.run().tokenization.id,
        ),
    )
    stats = [
        naive_stats(coded[name], 0, coded[name].n_latents).to_pandas().assign(dictionary=name, run="run")
        for name in ("sae", "other")
    ]
    columns = ["dictionary", "run", "latent", "n_tokens", "density", "max", "is_dead"]
    con.register("latents_frame", pd.concat(stats)[columns])
    documents = pd.DataFrame(made.metadata).assign(doc_id=range(60), corpus="docs")
    con.register("documents_frame", documents[["corpus", "doc_id", "n"]])
    for name in ("codes", "postings", "tokens", "latents", "documents"):
        con.execute(f"CREATE TABLE {name} AS SELECT * FROM {name}_frame")
    yield con
    con.close()


def same(made, plain, query, params=None) -> int:
    told = made.store.sql(query, params).to_pandas()
    wanted = plain.execute(query, params or []).fetch_df()
    order = list(told.columns)
    assert order == list(wanted.columns)
    told = told.sort_values(order, ignore_index=True)
    wanted = wanted.sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(told, wanted, check_dtype=False, rtol=1e-9)
    return len(wanted)


@pytest.mark.parametrize("view", ["codes", "postings"])
def test_queries_that_look_things_up(coded, plain, view):
    made = coded["sae"].made
    rows = coded["sae"].rows
    for where in (
        "true",
        "latent = 7",
        "latent IN (7, 3, 59, 1000000)",
        "latent IN (7, NULL)",
        "latent NOT IN (1, 2, 3)",
        f"row = {rows[70]}",
        f"row BETWEEN {rows[70]} AND {rows[200]} AND latent < 5",
        f"row >= {rows[300]} OR latent = 2",
        "dictionary = 'sae' AND latent = 7 AND value > 1",
        "dictionary = 'other' AND run = 'run' AND value >= 0.5",
        "dictionary IN ('sae', 'absent') AND latent BETWEEN 5 AND 8",
        "run = 'part'",
        "run <> 'run'",
        "dictionary LIKE 's%' AND latent + 1 = 8",
        "latent = 3000000000",
        "latent = -1",
        "latent = 7.5",
        "row IN (SELECT row FROM tokens WHERE token = 'cat')",
        "latent IS NULL",
        "latent IS NOT NULL AND NOT (latent = 7 OR row < 100)",
        "value IN (1.0, 1.5)",
        "(latent = 4 AND row < 500) OR (latent = 9 AND row > 500)",
        "CASE WHEN latent = 4 THEN row < 500 ELSE row > 900 END",
        "coalesce(latent, 7) = 7",
        "hash(latent) % 3 = 0 AND latent % 2 = 1",
    ):
        n = same(made, plain, f"SELECT * FROM {view} WHERE {where}")
        nothing = ("latent IS NULL", "latent = 3000000000", "latent = -1", "latent = 7.5")
        assert n or view == "postings" or where in nothing
    for latent in (0, 7, 59):
        same(
            made, plain, f"SELECT row, value FROM {view} WHERE latent = ? AND dictionary = ?", [latent, "sae"]
        )


JOINS = """
SELECT count(*) AS n, sum(value::DOUBLE) AS s, max(row) AS m FROM codes;
SELECT dictionary, run, latent, count(*) AS n, max(value) AS m FROM codes GROUP BY ALL;
SELECT t.token, count(*) AS n FROM codes JOIN tokens t USING (tokenization, row) WHERE dictionary = 'sae' GROUP BY ALL;
SELECT token, count(*) AS n, avg(value::DOUBLE) AS v FROM codes JOIN tokens USING (row)
    WHERE dictionary = 'sae' AND latent = 7 GROUP BY token;
SELECT a.row, a.latent, b.latent AS other FROM codes a JOIN codes b USING (dictionary, run, row)
    WHERE a.latent = 7 AND b.latent <> 7 AND dictionary = 'sae';
SELECT c.row, c.value, d.value AS other FROM codes c LEFT JOIN codes d
    ON c.row = d.row AND d.latent = 9 AND d.dictionary = 'other' AND d.run = c.run
    WHERE c.latent = 5 AND c.dictionary = 'sae' AND c.run = 'run';
SELECT c.dictionary, c.run, c.latent, l.density, count(*) AS n FROM codes c JOIN latents l USING (dictionary, run, latent)
    WHERE l.density < 0.05 GROUP BY ALL;
SELECT l.latent, l.n_tokens, count(p.row) AS n FROM latents l LEFT JOIN postings p USING (dictionary, run, latent)
    WHERE dictionary = 'sae' GROUP BY ALL;
WITH top AS (SELECT latent FROM latents WHERE dictionary = 'sae' AND NOT is_dead ORDER BY density, latent LIMIT 3)
    SELECT * FROM codes WHERE latent IN (FROM top) AND dictionary = 'sae';
SELECT source.n, sum(c.value::DOUBLE) AS s FROM codes c JOIN tokens t USING (row) JOIN documents source USING (corpus, doc_id)
    WHERE c.latent = 3 AND c.run = 'run' GROUP BY ALL;
SELECT row FROM codes WHERE dictionary = 'sae' AND latent = 3
    INTERSECT SELECT row FROM codes WHERE dictionary = 'sae' AND latent = 5;
SELECT row, latent, row_number() OVER (PARTITION BY row ORDER BY value DESC, latent) AS r FROM codes
    WHERE dictionary = 'other' QUALIFY r <= 2;
SELECT (SELECT max(value) FROM codes c WHERE c.latent = l.latent AND c.dictionary = l.dictionary AND c.run = l.run) AS m,
    l.max::FLOAT AS n FROM latents l WHERE l.latent < 9;
SELECT * FROM codes SEMI JOIN postings USING (dictionary, run, row, latent) WHERE latent = 2;
SELECT * FROM codes ANTI JOIN postings USING (dictionary, run, row, latent);
FROM codes UNION ALL FROM postings"""


def test_joins_sets_and_aggregates(coded, plain):
    made = coded["sae"].made
    for query in JOINS.split(";"):
        assert same(made, plain, query) > 0, query


def test_random_conditions(coded, plain):
    rng = np.random.default_rng(5)
    made, n_found = coded["sae"].made, 0

    def condition(depth):
        kind = rng.integers(0, 8) if depth else rng.integers(0, 5)
        if kind == 0:
            return f"latent {rng.choice(['=', '<', '>', '<=', '>=', '<>'])} {rng.integers(-2, 62)}"
        if kind == 1:
            return f"row {rng.choice(['=', '<', '>', '<=', '>='])} {rng.integers(0, 1300)}"
        if kind == 2:
            return f"{rng.choice(['latent', 'row'])} IN ({', '.join(map(str, rng.integers(0, 64, 4)))})"
        if kind == 3:
            return f"dictionary = '{rng.choice(['sae', 'other', 'bare', 'half'])}'"
        if kind == 4:
            return f"value {rng.choice(['<', '>='])} {rng.choice([0.5, 1, 1.25])}"
        if kind == 5:
            return f"NOT ({condition(depth - 1)})"
        return f"({condition(depth - 1)} {rng.choice(['AND', 'OR'])} {condition(depth - 1)})"

    for _ in range(25):
        view = rng.choice(["codes", "postings"])
        n_found += same(made, plain, f"SELECT * FROM {view} WHERE {condition(3)}") > 0
    assert n_found > 8


def test_what_is_read(coded):
    """A lookup opens one segment or one unit; excluded dictionaries are not opened at all."""
    made = coded["sae"].made
    everything = made.store.sql("SELECT count(*) FROM codes").meta.bytes_read
    sae = made.store.sql(
        "SELECT count(*) FROM codes WHERE dictionary = 'sae' AND run = 'run'"
    ).meta.bytes_read
    row = made.store.sql(
        "SELECT * FROM codes WHERE dictionary = 'sae' AND run = 'run' AND row = 100"
    ).meta.bytes_read
    assert 0 < row < sae < everything
    assert made.store.sql("SELECT * FROM codes WHERE dictionary = 'absent'").meta.bytes_read == 0
    assert made.store.sql("DESCRIBE codes").meta.bytes_read == 0


class _Counting(CodeRows):
    """Notes the ranges that are read."""

    def __init__(self, codes):
        super().__init__(codes, Reads())
        self.paths = []

    def _by_latent(self, latents):
        self.paths.append(("latent", latents.tolist()))
        return super()._by_latent(latents)

    def _by_row(self, ranges):
        self.paths.append(("row", list(ranges)))
        return super()._by_row(ranges)


def test_conditions_choose_the_path(coded):
    codes = coded["sae"].codes
    latent, row, value = (ds.field(name) for name in ("latent", "row", "value"))
    for condition, path in (
        (None, "row"),
        (row == 70, ("row", [(70, 71)])),
        ((row >= 70) & (row < 90), ("row", [(70, 90)])),
        (row.isin([70, 300]), ("row", [(70, 71), (300, 301)])),
        ((row == 70) | (row == 71), ("row", [(70, 72)])),
        (value > 1, "row"),
        (~(row < 1400), ("row", [(1400, 23 * 64)])),
    ):
        source = _Counting(codes)
        told = source.scanner(columns=["row", "latent"], filter=condition).to_reader().read_all()
        [(kind, ranges)] = source.paths
        assert (kind, ranges) == path if isinstance(path, tuple) else kind == path
        whole = code_table(coded["sae"])
        wanted = whole if condition is None else whole.filter(condition)
        key = [("row", "ascending"), ("latent", "ascending")]
        assert told.sort_by(key).equals(wanted.select(["row", "latent"]).sort_by(key))
    assert source.scanner().to_reader().schema == CODES_SCHEMA
    assert str(latent) == "latent"


def code_table(codes):
    return pa.Table.from_pandas(
        code_frame(codes)[["row", "latent", "value"]], preserve_index=False, schema=CODES_SCHEMA
    )


def test_ranges_never_lose_a_match():
    """Whatever a condition is, numbers outside of the ranges do not satisfy it."""
    rng = np.random.default_rng(6)
    n = 3000
    table = pa.table(
        {"row": np.arange(n), "latent": rng.integers(0, 50, n).astype(np.int32), "value": rng.random(n).astype(np.float32)},
        schema=CODES_SCHEMA,
    )  # fmt: skip
    row, latent, value = (ds.field(name) for name in CODES_SCHEMA.names)

    def condition(depth):
        kind = rng.integers(0, 8) if depth else rng.integers(0, 5)
        number = int(rng.integers(-5, n + 5))
        if kind == 0:
            return row == number
        if kind == 1:
            return [row < number, row >= number, row != number][rng.integers(0, 3)]
        if kind == 2:
            return row.isin(rng.integers(0, n, 3).tolist())
        if kind == 3:
            return latent == int(rng.integers(0, 50))
        if kind == 4:
            return (value > 0.5) & row.is_valid()
        if kind == 5:
            return ~condition(depth - 1)
        return (
            condition(depth - 1) & condition(depth - 1)
            if kind == 6
            else condition(depth - 1) | condition(depth - 1)
        )

    narrowed = 0
    for _ in range(80):
        asked = condition(3)
        ranges = ranges_where(asked, "row", CODES_SCHEMA, stop=n)
        inside = np.zeros(n, bool)
        for start, stop in ranges:
            assert not inside[start:stop].any()
            inside[start:stop] = True
        assert inside[table.filter(asked)["row"].to_numpy()].all(), asked
        narrowed += not inside.all()
    assert narrowed > 15
    assert ranges_where(None, "row", CODES_SCHEMA, stop=10) == [(0, 10)]
    assert ranges_where(None, "row", CODES_SCHEMA, stop=0) == []


def test_state_views(coded):
    made = coded["sae"].made
    dictionaries = {r["dictionary"]: r for r in made.store.sql("FROM dictionaries")}
    assert set(dictionaries) == {"sae", "other", "bare", "half"}
    assert (dictionaries["sae"]["n_latents"], dictionaries["sae"]["d_in"], dictionaries["sae"]["k"]) == (
        60,
        12,
        8,
    )
    assert dictionaries["other"]["hook_point"] == "layers.1.mlp_act"
    encodings = {(r["dictionary"], r["run"]): r for r in made.store.sql("FROM encodings")}
    told = {
        key: (r["n_rows"], r["n_codes"], r["is_complete"], r["has_postings"]) for key, r in encodings.items()
    }
    assert told == {
        (c.dictionary, c.run): (
            len(c.rows),
            c.matrix.nnz,
            name not in ("half", "part"),
            name in ("sae", "other"),
        )
        for name, c in coded.items()
    }


def test_a_sampled_run(tmp_path):
    """Row numbers of a run that keeps some of its rows are those of the tokenization."""
    made = make_store(str(tmp_path / "s"), n_documents=20)
    widths = {"layers.0.resid_post": 4}
    add_run(made, "run", widths, random_values(0, widths), sample=Sample(0.4, 3))
    codes = add_codes(made, random_codes(len(stored_rows(made, "run")), 20))
    assert 0 < len(codes.rows) < 0.6 * len(made.tokens)
    wanted = code_frame(codes)
    for where, kept in (("true", wanted), ("latent = 3", wanted[wanted["latent"] == 3]),
                        ("row BETWEEN 100 AND 300", wanted[wanted["row"].between(100, 300)])):  # fmt: skip
        told = made.store.sql(f"SELECT * FROM codes WHERE {where} ORDER BY row, latent").to_pandas()
        pd.testing.assert_frame_equal(
            told, kept.sort_values(["row", "latent"], ignore_index=True), check_dtype=False
        )
    run, density = made.run(), codes.matrix.getnnz(axis=0)
    a, b = (actstore.latent("sae", int(i)) for i in np.argsort(-density)[:2])
    result = run.match(
        fires(a) & fires(b), 1000, within=3, mask_sinks=False, mask_special=False, fold=None, rank="row"
    )
    windows = {t.row: (t.doc_id, t.window, t.window_position) for t in made.tokens}
    other = [windows[r] for r in codes.firing(b.index)[0].tolist()]
    assert [r["row"] for r in result] == [
        r for r in codes.firing(a.index)[0].tolist()
        if any(windows[r][:2] == o[:2] and abs(windows[r][2] - o[2]) <= 3 for o in other)
    ]  # fmt: skip
    assert any(None in r["context"]["values"] for r in result)
    assert (
        run.active(int(codes.rows[5]), "sae", mask_ultra_dense=False, k=100).meta.n_eligible
        == codes.matrix[5].nnz
    )


def test_latents(coded):
    made = coded["sae"].made
    told = made.store.sql("SELECT * FROM latents ORDER BY dictionary, latent").table
    assert told.column_names == [name for name, *_ in VIEWS["latents"].columns]
    wanted = pa.concat_tables(
        [naive_stats(coded[name], 0, coded[name].n_latents) for name in ("other", "sae")]
    )
    for name in wanted.column_names:
        assert told[name].to_pylist() == wanted[name].to_pylist(), name
    [row] = made.store.sql("""
        SELECT t.token_id, count(*) AS n
        FROM (SELECT unnest(top_tokens_by_count) AS t FROM latents WHERE dictionary = 'sae')
        GROUP BY ALL ORDER BY n DESC, 1 LIMIT 1
    """)
    assert row["n"] > 1


def test_damage_is_told_as_damage(tmp_path):
    """A broken object is no SQL error and no shorter answer."""
    made = make_store(str(tmp_path / "s"), n_documents=12)
    widths = {"layers.0.resid_post": 4}
    add_run(made, "run", widths, random_values(0, widths))
    codes = add_codes(made, random_codes(len(stored_rows(made, "run")), 20))
    add_codes(made, random_codes(len(stored_rows(made, "run")), 20, seed=1), dictionary="other")
    path = tmp_path / "s" / codes.codes.collection.units[1].objects[0].key
    os.chmod(path, 0o644)
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    with pytest.raises(FormatError) as caught:
        made.store.sql("SELECT sum(value) FROM codes WHERE dictionary = 'sae'")
    assert caught.value.kind == ErrorKind.OBJECT_DAMAGED
    assert made.store.sql("SELECT count(*) AS n FROM codes WHERE dictionary = 'other'").to_dicts()[0]["n"] > 0


def test_limits_hold(coded):
    made = coded["sae"].made
    endless = "SELECT count(*) FROM codes a, codes b, codes c, codes d WHERE a.value + b.value + c.value + d.value > 1"
    with pytest.raises(InvalidInputError) as caught:
        made.store.sql(endless, timeout_s=0.5)
    assert caught.value.kind == ErrorKind.TIMED_OUT
    for query in (
        'SELECT * FROM "codes sae@run"',
        "SELECT * FROM codes_frame",
        "INSERT INTO codes VALUES (1)",
    ):
        with pytest.raises(InvalidInputError) as caught:
            made.store.sql(query)
        assert caught.value.kind == ErrorKind.BAD_SQL


@pytest.mark.slow
def test_memory_does_not_grow_with_the_codes(tmp_path):
    """A scan holds a page, however many codes there are."""
    widths = {"layers.0.resid_post": 4}
    peaks = []
    for n in (200, 1600):
        made = make_store(str(tmp_path / f"{n}.store"), n_documents=n, rows_per_unit=512)
        add_run(made, "run", widths, random_values(0, widths))
        add_codes(made, random_codes(len(stored_rows(made, "run")), 64, per_row=20), postings=False)
        query = "SELECT latent, count(*) FROM codes GROUP BY latent"
        made.store.sql(query)
        tracemalloc.start()
        made.store.sql(query)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + (1 << 20)
