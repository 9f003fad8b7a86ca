"""nearest() through an index, against the scan of the same store before it had one, and against numpy's brute force."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

import actstore
from actstore import ingest
from actstore.cli import main
from actstore.errors import FormatError, InvalidInputError, StorageError
from actstore.query.index_search import Found, LocalShards
from actstore.run import Run
from actstore.sampling import Sample
from actstore.vector_index import open_indexes
from tests.query.make_index import add_index
from tests.query.make_store import add_run, make_store, random_values
from tests.query.naive import context_key, same

H = "layers.0.resid_post"
D = 16
STEPS = ("centre", "standardise")


def tied_values(seed, width=D):
    """Rows around a few centres, in whole numbers, so that many are equal; NaN, infinite rows, zeros and sinks too."""
    centres = np.random.default_rng(seed).integers(-6, 7, (12, width))

    def values(hook_point, tokens):
        own = np.random.default_rng([seed, tokens[0].row])
        rows = centres[own.integers(0, len(centres), len(tokens))] + own.integers(-1, 2, (len(tokens), width))
        rows[own.random(len(tokens)) < 0.05] = centres[3]
        rows = rows.astype(np.float32)
        at = own.permutation(len(tokens))
        rows[at[:2]] = 0
        rows[at[2:4], 1] = [np.nan, np.inf]
        rows[at[4:6]] *= 200
        return rows

    return values


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run before it had indexes (`plain`) and with them (`run`): cosine over all but two units, l2, ip, and transformed."""
    made = make_store(
        str(tmp_path_factory.mktemp("nearest") / "a.store"), seed=7, n_documents=300, rows_per_unit=512
    )
    add_run(made, "run", {H: D}, tied_values(1))
    plain = made.store.at(made.store.version).run("run")
    n_units = len(plain.collection.units)
    assert n_units > 6
    run = made.run()
    cut = [[(0, 3)], [(3, n_units - 2)]]
    run = add_index(run, H, shards=cut, n_lists=64)
    run = add_index(run, H, shards=[[(0, 2), (4, n_units)], [(2, 4)]], metric="l2", n_lists=16, generation=1)
    run = add_index(run, H, shards=[[(0, n_units)]], metric="ip", kind="flat", generation=2)
    run = add_index(run, H, shards=cut, transform=STEPS, n_lists=16, generation=3)
    return made, plain, run


def searched(result):
    return [g["effort"] for g in result.meta.index["generations"]]


FILTERS = {
    "all rows": {},
    "a condition": {"where": "n % 3 = 0"},
    "few rows": {"where": "n % 41 = 0"},
    "one row": {"rows": [700]},
    "no row": {"where": "n < 0"},
    "rows": {"rows": slice(100, 1500)},
    "documents": {"docs": range(5, 200, 2)},
    "no masks": {"mask_special": False, "mask_sinks": False},
}


@pytest.mark.parametrize("fold", ["context", "doc", None])
@pytest.mark.parametrize("filtered", FILTERS)
def test_exact_answers_are_those_of_the_scan(made, filtered, fold):
    _, plain, run = made
    for i, metric in enumerate(("cosine", "l2", "ip")):
        query = 530 if filtered != "one row" else np.arange(D)
        options = {"metric": metric, "fold": fold, **FILTERS[filtered]}
        if isinstance(query, int):
            options["exclude_own_document"] = bool(i % 2)
        wanted = plain.nearest(H, query, 40, **options)
        found = run.nearest(H, query, 40, exact=True, **options)
        assert same(found.to_dicts(), wanted.to_dicts())
        assert (found.meta.exact, found.meta.recall) == (True, 1.0)
        assert found.meta.n_eligible == wanted.meta.n_eligible
        assert found.meta.mask["n_rows"] == wanted.meta.mask["n_rows"]
        reasons = {*found.meta.mask["removed"], *wanted.meta.mask["removed"]}
        for name in reasons:
            assert found.meta.mask["removed"].get(name, 0) == wanted.meta.mask["removed"].get(name, 0)


@pytest.mark.parametrize("fold", ["context", "doc", None])
def test_few_eligible_rows_are_compared_one_by_one(made, fold):
    _, plain, run = made
    for where, k in itertools.product(("n % 41 = 0", "n = 12", "n = 3 OR n = 4"), (1, 7, 200)):
        wanted = plain.nearest(H, 530, k, where=where, fold=fold)
        found = run.nearest(H, 530, k, where=where, fold=fold)
        assert same(found.to_dicts(), wanted.to_dicts())
        assert found.meta.exact
        assert searched(found) == [None]
        assert found.meta.n_eligible == wanted.meta.n_eligible < 512


def test_all_lists_and_all_rows_give_the_true_answer(made):
    """A flat index loses nothing: its candidates, scored again and folded, are the scan's answer, ties and all."""
    _, plain, run = made
    for fold, k in itertools.product(("context", "doc", None), (1, 25, 120)):
        wanted = plain.nearest(H, 530, k, metric="ip", fold=fold)
        found = run.nearest(H, 530, k, metric="ip", fold=fold)
        assert searched(found) == [0]
        # Equal products may come in another order from float32, but no row that is better is missing.
        assert [r["value"] for r in found] == [r["value"] for r in wanted]
        assert not found.meta.exact


@pytest.mark.parametrize("seed", range(12))
def test_k_answers_come_back_where_k_exist(made, seed):
    """The index says that one list is enough, which it never is."""
    store, plain, run = made
    rng = np.random.default_rng(seed)
    rows, acts = store.matrix(H)
    row = int(rng.choice(rows[np.isfinite(acts).all(axis=1) & acts.any(axis=1)]))
    near = rows[np.argsort(-np.nan_to_num(brute(acts[rows == row][0], acts, "cosine"), nan=-9.0))]
    far = np.sort(near[rng.integers(200, 1500) :])
    options = [
        {"rows": far},
        {"where": f"hash(row) % {rng.integers(2, 6)} = 0"},
        {"docs": np.flatnonzero(rng.random(300) < rng.uniform(0.2, 0.9))},
        {"rows": far, "where": "n % 2 = 1"},
        {},
    ][seed % 5]
    for fold, k, metric in itertools.product(("context", "doc", None), (3, 90, 290), ("cosine", "l2")):
        asked = {"fold": fold, "metric": metric, "exclude_own_document": bool(rng.integers(2)), **options}
        wanted = plain.nearest(H, row, k, before=0, after=0, **asked)
        found = run.nearest(H, row, k, before=0, after=0, **asked)
        assert len(found) == len(wanted)
        assert found.meta.n_eligible == wanted.meta.n_eligible
        # What is there is right: true values, in order, of rows that count, none twice.
        mine, sign = found.to_dicts(), 1 if metric == "l2" else -1
        assert [(sign * r["value"], r["row"]) for r in mine] == sorted(
            (sign * r["value"], r["row"]) for r in mine
        )
        at = np.searchsorted(rows, [r["row"] for r in mine])
        scores = brute(acts[rows == row][0], acts[at], metric)
        values = np.sqrt(-scores) if metric == "l2" else scores / np.linalg.norm(acts[rows == row])
        np.testing.assert_allclose([r["value"] for r in mine], values, rtol=1e-12, atol=1e-12)
        tokens = [store.tokens[i] for i in np.searchsorted([t.row for t in store.tokens], rows[at])]
        keys = {None: lambda t: t.row, "doc": lambda t: t.doc_id, "context": lambda t: context_key(store, t)}
        assert len({keys[fold](t) for t in tokens}) == len(mine)
        assert not any(t.is_special or t.window_position == 0 or t.row == row for t in tokens)
        if "rows" in options:
            assert np.isin(rows[at], far).all()


def test_rows_that_no_index_has_are_compared(made):
    _, plain, run = made
    units = sorted(run.collection.units)[-2:]
    late = [r for u in units for r in run.activations(H).rows(u * 512, (u + 1) * 512).tolist()]
    query = np.random.default_rng(1).standard_normal(D)
    found = run.nearest(H, query, 30, rows=late)
    assert same(found.to_dicts(), plain.nearest(H, query, 30, rows=late).to_dicts())
    assert found.meta.exact
    everything = run.nearest(H, query, 30)
    assert everything.meta.index["n_scanned"] == len(late)
    assert any(f"{len(late)} rows are in no index" in w for w in everything.meta.warnings)
    wanted = [r for r in plain.nearest(H, query, 30, fold=None).table["row"].to_pylist() if r in set(late)]
    assert set(wanted) <= set(run.nearest(H, query, 30, fold=None).table["row"].to_pylist())


def test_two_generations_answer_together(tmp_path):
    made = make_store(str(tmp_path / "s"), seed=3, n_documents=200, rows_per_unit=512)
    add_run(made, "run", {H: D}, tied_values(2))
    plain = made.store.at(made.store.version).run("run")
    n = len(plain.collection.units)
    run = add_index(made.run(), H, shards=[[(0, 3)]], kind="flat", metric="ip")
    run = add_index(run, H, shards=[[(3, 5)], [(5, n)]], n_lists=4, metric="ip", generation=1)
    for k, where in itertools.product((10, 100), (None, "n % 2 = 0")):
        found = run.nearest(H, 77, k, metric="ip", where=where, fold=None, before=0, after=0)
        wanted = plain.nearest(H, 77, k, metric="ip", where=where, fold=None, before=0, after=0)
        assert [g["generation"] for g in found.meta.index["generations"]] == [1, 0]
        assert found.meta.index["n_scanned"] == 0
        assert found.meta.n_eligible == wanted.meta.n_eligible
        # n_lists of 4, and 8 bits: all lists of the first index and one of the second.
        assert len(found) == k
        assert found.table["value"].to_pylist()[0] == wanted.table["value"].to_pylist()[0]
        exact = run.nearest(H, 77, k, metric="ip", where=where, fold=None, before=0, after=0, exact=True)
        assert same(exact.to_dicts(), wanted.to_dicts())


def test_many_queries_answer_as_alone(made):
    _, _, run = made
    rows = [t.row for t in made[0].tokens if not t.is_special][5:400:40]
    vectors = run.activations(H).read(rows)
    good = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    vectors = vectors[good]
    for metric, k in itertools.product(("cosine", "l2", "ip"), (5, 60)):
        together = run.nearest(H, vectors, k, metric=metric).to_dicts()
        for q, vector in enumerate(vectors):
            alone = run.nearest(H, vector, k, metric=metric).to_dicts()
            mine = [{key: v for key, v in r.items() if key != "query"} for r in together if r["query"] == q]
            assert same(mine, alone)


def test_a_transform_is_the_index_s_own(made):
    _, plain, run = made
    for exact in (True, None):
        found = run.nearest(H, 530, 15, transform=["standardize", "center"], exact=exact, before=0, after=0)
        wanted = plain.nearest(H, 530, 15, transform=STEPS, before=0, after=0)
        assert found.meta.request["transform"] == list(STEPS)
        assert found.meta.exact is (exact is True)
        if exact:
            assert same(found.to_dicts(), wanted.to_dicts())
    rows, acts = made[0].matrix(H)
    good = np.isfinite(acts).all(axis=1)
    spread = acts[good].std(axis=0)
    moved = (acts - acts[good].mean(axis=0)) / spread
    own = moved[rows.tolist().index(530)]
    for r in found:
        x = moved[rows.tolist().index(r["row"])]
        assert r["value"] == pytest.approx(x @ own / np.linalg.norm(x) / np.linalg.norm(own), abs=1e-6)


def test_another_metric_or_transform_than_the_index_has(made):
    _, plain, run = made
    found = run.nearest(H, 530, 5, metric="l2", transform=["centre"])
    assert same(found.to_dicts(), plain.nearest(H, 530, 5, metric="l2", transform=["centre"]).to_dicts())
    assert (found.meta.exact, found.meta.index) == (True, None)
    assert any("the index of this hook point is for metric='cosine'" in w for w in found.meta.warnings)
    exact = run.nearest(H, 530, 5, metric="l2", transform=["centre"], exact=True)
    assert not any("index" in w for w in exact.meta.warnings)


def test_scale_of_the_query_does_not_matter_to_cosine(made):
    _, _, run = made
    q = np.random.default_rng(8).standard_normal(D)
    rows = run.nearest(H, q, 10).table["row"].to_pylist()
    for scale in (1e-200, 1e-30, 1e30, 1e200):
        assert run.nearest(H, q * scale, 10).table["row"].to_pylist() == rows


@pytest.mark.parametrize("scale", [1e16, 1e30, 1e60])
def test_a_query_too_large_for_float32_is_compared_with_all(made, scale):
    _, plain, run = made
    q = scale * np.random.default_rng(3).standard_normal(D)
    for metric in ("l2", "ip"):
        found = run.nearest(H, q, 10, metric=metric)
        assert same(found.to_dicts(), plain.nearest(H, q, 10, metric=metric).to_dicts())
        assert found.meta.exact
        assert any("too large to search an index" in w for w in found.meta.warnings)


@pytest.mark.parametrize("scale", [1e-30, 1e-44, 1e-60, 1e-300])
def test_a_query_too_small_for_float32_is_searched_by_its_direction(made, scale):
    _, _, run = made
    q = np.random.default_rng(4).standard_normal(D)
    rows = run.nearest(H, q, 10, metric="ip")
    found = run.nearest(H, q * scale, 10, metric="ip")
    assert found.table["row"].to_pylist() == rows.table["row"].to_pylist()
    assert [r["value"] / scale for r in found] == pytest.approx([r["value"] for r in rows], rel=1e-9)


def test_to_a_query_of_zeros_all_rows_are_alike(made):
    """An index would return any of them, and say that it is sure."""
    _, plain, run = made
    for queries in (np.zeros(D), np.stack([np.zeros(D), np.ones(D)])):
        found = run.nearest(H, queries, 10, metric="ip")
        assert same(found.to_dicts(), plain.nearest(H, queries, 10, metric="ip").to_dicts())
        assert (found.meta.exact, searched(found)) == (True, [None])
        assert any("all zeros where the index compares" in w for w in found.meta.warnings)


def test_a_run_opened_before_it_had_all_units(made):
    """Its store has moved on to an index of rows that it lacks."""
    _, _, run = made
    units = {u: run.collection.units[u] for u in range(5)}
    older = Run(run.store, replace(run.collection, units=units, seal=None))
    found = older.nearest(H, 530, 10)
    assert (found.meta.exact, found.meta.index) == (True, None)
    assert same(found.to_dicts(), run.nearest(H, 530, 10, exact=True, rows=slice(0, 5 * 512)).to_dicts())


def test_a_shard_without_rows(tmp_path):
    """Of a unit of which a sample keeps nothing."""
    made = make_store(str(tmp_path / "s"), seed=7, n_documents=100, rows_per_unit=64)
    add_run(made, "run", {H: D}, random_values(3, {H: D}), sample=Sample(0.02, 3))
    units = made.run().collection.units
    empty = next(u for u in sorted(units) if not units[u].rows)
    others = [(a, b) for a, b in ((0, empty), (empty + 1, len(units))) if a < b]
    run = add_index(made.run(), H, shards=[[(empty, empty + 1)], others], kind="flat")
    [index] = open_indexes(run, H)
    assert index.shards[0].n == 0
    query = index.prepare(np.ones((2, D), np.float32))
    found = LocalShards(index).search(query, 5, effort=0)
    bits = {1: np.full(-(-index.shards[1].n // 8), 255, np.uint8)}
    alone = LocalShards(index).search(query, 5, effort=0, bits=bits)
    assert (found.rows == alone.rows).all()
    assert (found.rows >= 0).all()


def test_what_the_answer_says_of_itself(made):
    _, _, run = made
    found = run.nearest(H, 530, 10)
    assert (found.meta.exact, found.meta.recall) == (False, 1.0)
    [generation] = found.meta.index["generations"]
    assert generation["effort"] == 1
    assert generation["kind"] == "ivf_sq8"
    assert generation["n_candidates"] > 0
    assert found.meta.n_eligible > generation["n_eligible"] > 512
    assert not any("filter" in w or "queries" in w for w in found.meta.warnings)
    assert any("filters that know nothing" in w for w in run.nearest(H, 530, 10, where="n > 9").meta.warnings)
    assert any("of others it may be lower" in w for w in run.nearest(H, np.ones(D), 10).meta.warnings)
    assert any("for k=150 it may be lower" in w for w in run.nearest(H, 530, 150, metric="ip").meta.warnings)
    assert found.meta.to_dict()["index"]["n_scanned"] == found.meta.index["n_scanned"]
    assert run.nearest(H, 530, 10, recall=0.5).meta.request["recall"] == 0.5
    assert '"index"' in found.to_json()


def test_a_recall_that_no_effort_reaches(tmp_path):
    made = make_store(str(tmp_path / "s"), seed=3, n_documents=120, rows_per_unit=512)
    add_run(made, "run", {H: D}, tied_values(2))
    plain = made.store.at(made.store.version).run("run")
    told = {1: 0.4, 2: 0.7, 4: 0.9, 8: 0.97}
    units = [[(0, len(plain.collection.units))]]

    def recall(effort, k, share):
        return told[effort] - (share < 0.5) * 0.1 - (k > 10) * 0.01

    run = add_index(made.run(), H, shards=units, recall=recall)
    wanted = plain.nearest(H, 77, 10, fold=None)
    for asked, effort, stated in ((0.3, 1, 0.4), (0.71, 4, 0.9), (0.95, 8, 0.97)):
        found = run.nearest(H, 77, 10, recall=asked, fold=None)
        assert searched(found) == [effort]
        assert (found.meta.exact, found.meta.recall) == (False, stated)
    found = run.nearest(H, 77, 10, recall=0.99, fold=None)
    assert searched(found) == [None]
    assert same(found.to_dicts(), wanted.to_dicts())
    assert (found.meta.exact, found.meta.recall) == (True, 1.0)
    assert run.nearest(H, 77, 100, recall=0.965).meta.exact
    assert run.nearest(H, 77, 10, recall=0.95, where="hash(row) % 10 < 4").meta.exact


class Deaf:
    """Shards of an index of which one never answers."""

    def __init__(self, index, number):
        self.index = index
        self.number = number

    def search(self, vectors_qd, k, *, effort, bits=None):
        others = {n: b for n, b in (bits or {}).items() if n != self.number}
        found = LocalShards(self.index).search(vectors_qd, k, effort=effort, bits=others)
        return Found(found.scores, found.rows, (self.number,))


def test_a_shard_that_does_not_answer(made):
    _, _, run = made
    [index] = open_indexes(run, H, metric="cosine", transform_steps=())
    for k, fold in ((10, "context"), (200, "doc")):
        found = run.nearest(H, 530, k, shards=Deaf(index, 1), fold=fold)
        assert (found.meta.exact, found.meta.recall) == (False, None)
        assert any(f"{index.shards[1].n} rows were not compared" in w for w in found.meta.warnings)
        assert found.meta.index["generations"][0]["lost_shards"] == [1]
        lost = {u for u, _, _ in index.shards[1].unit_ranges()}
        assert not lost & {r // 512 for r in found.table["row"].to_pylist()}
        assert len(found) > 0


def test_shards_elsewhere_answer_like_those_here(made):
    _, _, run = made
    [index] = open_indexes(run, H, metric="cosine", transform_steps=())
    here, there = run.nearest(H, 530, 30), run.nearest(H, 530, 30, shards=LocalShards(index))
    assert same(here.to_dicts(), there.to_dicts())
    with pytest.raises(InvalidInputError, match="shards= has shards of index"):
        run.nearest(H, 530, 30, shards=LocalShards(index), metric="l2")


def test_shards_of_another_store(made, tmp_path):
    """Its index has the same name, and other rows."""
    _, _, run = made
    other = make_store(str(tmp_path / "s"), seed=7, n_documents=300, rows_per_unit=512)
    add_run(other, "run", {H: D}, tied_values(2))
    n = len(other.run().collection.units)
    [theirs] = open_indexes(add_index(other.run(), H, shards=[[(0, 3)], [(3, n - 2)]], n_lists=64), H)
    [ours] = open_indexes(run, H, metric="cosine", transform_steps=())
    assert (theirs.id, theirs.unit_ranges) == (ours.id, ours.unit_ranges)
    with pytest.raises(InvalidInputError, match="another one of that name"):
        run.nearest(H, 530, 5, shards=LocalShards(theirs))
    again = actstore.open(run.store.url).run("run")
    [same_index] = open_indexes(again, H, metric="cosine", transform_steps=())
    found = run.nearest(H, 530, 5, shards=LocalShards(same_index))
    assert same(found.to_dicts(), run.nearest(H, 530, 5).to_dicts())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall": 0}, "recall must be"),
        ({"recall": 1.5}, "recall must be"),
        ({"recall": "high"}, "recall must be"),
        ({"recall": float("nan")}, "recall must be"),
        ({"recall": True}, "recall must be"),
        ({"exact": "yes"}, "exact must be"),
        ({"of": "latents"}, "of must be"),
        ({"metric": np.array(["ip", "l2"])}, "metric must be"),
        ({"fold": np.array(["doc", "doc"])}, "fold must be"),
        ({"where": 5}, "where= must be an SQL condition"),
        ({"shards": 3}, "shards= takes what searches"),
        ({"of": "documents", "rows": [1]}, "docs="),
        ({"transform": ["rotate"]}, "rotate"),
        ({"metric": "dot"}, "metric must be"),
        ({"fold": "all"}, "fold must be"),
        ({"k": 0}, "k must be"),
        ({"k": 10**8}, "k must be"),
        ({"where": "nope = 1"}, "nope"),
    ],
)
def test_bad_options(made, options, message):
    with pytest.raises(InvalidInputError, match=message):
        made[2].nearest(H, 530, **options)


def test_a_damaged_index_file(tmp_path):
    made = make_store(str(tmp_path / "s"), seed=3, n_documents=80, rows_per_unit=512)
    add_run(made, "run", {H: D}, tied_values(2))
    run = add_index(made.run(), H, shards=[[(0, len(made.run().collection.units))]])
    [path] = (tmp_path / "s" / "indexes").glob("*/shards/0*.faiss")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises((FormatError, StorageError), match="SHA-256"):
        run.nearest(H, 77, 5)
    assert len(run.nearest(H, 77, 5, exact=True)) == 5


@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        ("ivf_sq8", "cosine"),
        pytest.param("ivf_sq8", "l2", marks=pytest.mark.slow),
        pytest.param("flat", "ip", marks=pytest.mark.slow),
    ],
)
def test_the_stated_recall_is_the_true_one(tmp_path, kind, metric):
    """Against numpy's brute force, with queries and filters that were not used to measure it."""
    made = make_store(str(tmp_path / "s"), seed=5, n_documents=500, rows_per_unit=2048)
    centres = np.random.default_rng(1).standard_normal((300, 32))

    def values(hook_point, tokens):
        own = np.random.default_rng([9, tokens[0].row])
        return (
            centres[own.integers(0, 300, len(tokens))] + 0.6 * own.standard_normal((len(tokens), 32))
        ).astype(np.float32)

    add_run(made, "run", {H: 32}, values)
    ingest.build_index(
        actstore.open(made.url), "run", H, kind=kind, metric=metric, n_lists=None if kind == "flat" else 128, recall_floor=0.5
    )  # fmt: skip
    run = actstore.open(made.url).run("run")
    rows, acts = made.matrix(H)
    rng = np.random.default_rng(3)
    asked = np.sort(rng.choice(len(rows), 1000, replace=False))
    plain = {"fold": None, "mask_special": False, "mask_sinks": False, "before": 0, "after": 0}
    for recall, share, k in ((0.97, 1.0, 10), (0.95, 1.0, 20), (0.95, 0.2, 10)):
        keep = np.ones(len(rows), bool)
        if share < 1:  # just so many, the queries among them
            keep[:] = False
            others = np.setdiff1d(np.arange(len(rows)), asked)
            keep[rng.choice(others, int(share * len(rows)) + 1 - len(asked), replace=False)] = True
            keep[asked] = True
        options = plain if share == 1.0 else plain | {"rows": rows[keep]}
        found = run.nearest(H, acts[asked], k, metric=metric, recall=recall, **options)
        assert found.meta.recall >= recall
        assert not found.meta.exact
        queries = found.table["query"].to_numpy()
        of_query = np.split(found.table["row"].to_numpy(), np.flatnonzero(np.diff(queries)) + 1)
        hits = []
        for at, mine in zip(asked, of_query, strict=True):
            score = brute(acts[at], acts, metric)
            score[~keep | (np.arange(len(rows)) == at)] = -np.inf
            true = set(rows[np.argsort(-score, kind="stable")[: k - 1]].tolist())
            hits.append(len(true & set(mine.tolist())) / (k - 1))
        # Both are means over a thousand queries, whose standard deviations are below 0.005.
        assert np.mean(hits) == pytest.approx(found.meta.recall, abs=0.01)


def brute(query, acts, metric):
    if metric == "l2":
        return -((acts - query) ** 2).sum(axis=1)
    with np.errstate(all="ignore"):
        return acts @ query / (np.linalg.norm(acts, axis=1) if metric == "cosine" else 1.0)


@pytest.mark.parametrize("sample", [Sample(0.5, 3), None])
def test_a_sampled_run_and_one_that_is_not_complete(tmp_path, sample):
    made = make_store(str(tmp_path / "s"), seed=3, n_documents=200, rows_per_unit=512)
    skipped = () if sample else (2,)
    add_run(made, "run", {H: D}, tied_values(2), sample=sample, skip_units=skipped, seal=sample is not None)
    plain = made.store.at(made.store.version).run("run")
    n = len(made.store.tokenization(made.tokenization).units)
    cut = [[(0, 2), (3, 5)], [(5, n)]] if skipped else [[(0, 5)], [(5, n)]]
    run = add_index(made.run(), H, shards=cut, kind="flat", metric="l2")
    query = np.random.default_rng(1).integers(-3, 4, D)
    for where, fold, k in itertools.product((None, "n % 2 = 0", "n < 9"), ("context", "doc"), (5, 60)):
        wanted = plain.nearest(H, query, k, metric="l2", where=where, fold=fold)
        exact = run.nearest(H, query, k, metric="l2", where=where, fold=fold, exact=True)
        assert same(exact.to_dicts(), wanted.to_dicts())
        found = run.nearest(H, query, k, metric="l2", where=where, fold=fold)
        assert [r["value"] for r in found] == [r["value"] for r in wanted]
        assert found.meta.n_eligible == wanted.meta.n_eligible
        assert searched(found) == [None if where == "n < 9" else 0]


def test_the_command(made, capsys):
    command = ["nearest", made[0].url, "run", H, "--json", "-k", "4", "--transform", "center,standardize"]
    assert main([*command, "--row", "530", "--recall", "0.9"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["rows"] == made[2].nearest(H, 530, 4, transform=STEPS, recall=0.9).to_dicts()
    assert answer["meta"]["index"]["generations"][0]["generation"] == 3
    assert main([*command, "--document", "7", "--exact"]) == 0
    answer = json.loads(capsys.readouterr().out)
    found = made[2].nearest(H, actstore.document(7), 4, transform=STEPS, exact=True)
    assert answer["rows"] == found.to_dicts()
    assert answer["meta"]["exact"] is True
    assert main([*command, "--row", "530", "--recall", "2"]) == 2
