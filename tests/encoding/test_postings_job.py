"""Postings and statistics built from stored codes, against all codes read row by row."""

import threading
import tracemalloc
import uuid
import warnings

import numpy as np
import pytest

import actstore
from actstore.errors import ConflictError, ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.ingest.encoding import postings_job, postings_plan
from actstore.ingest.encoding.encode import encode
from actstore.ingest.encoding.latent_stats import RangePostings
from actstore.ingest.encoding.postings_gather import PostingsGatherer, UnitTokens
from actstore.ingest.encoding.postings_job import build_postings
from actstore.ingest.encoding.postings_plan import large_bytes, plan_ranges, ranges_bytes, task_bytes
from actstore.log import fsck
from actstore.sparse import SparseRows, encode_segment
from actstore.sparse.segment_grouped import encode_grouped
from tests.encoding.encoded import add_dictionary, make_run
from tests.encoding.naive_latents import assert_same, naive_statistics
from tests.ingest import kept

CODES = "sae@r"


@pytest.fixture
def store():
    return actstore.open(f"memory://postings-{uuid.uuid4().hex}", create=True)


@pytest.fixture
def tokenization(store, tmp_path):
    return kept.tokenized(store, tmp_path / "tokenizer")


def encoded(store, tokenization, *, run=None, dictionary=None, **settings):
    make_run(store, tokenization, **(run or {}))
    add_dictionary(store, **(dictionary or {}))
    encode(store, "sae", "r", postings=False, **settings)
    return store.refresh().run("r").codes("sae")


def all_codes(codes):
    """Row numbers, token ids, documents and dense codes of every stored row, from the codes and the tokens' tables."""
    tokens = {}
    for unit in codes.run.tokenization.units:
        for t in codes.run.tokenization.unit_table(unit.unit).to_pylist():
            tokens[t["row"]] = t["token_id"], t["doc_id"]
    rows, dense = zip(*[(numbers, part.to_dense()) for numbers, part in codes.scan()], strict=True)
    rows, dense = np.concatenate(rows), np.concatenate(dense)
    return rows, [tokens[r][0] for r in rows.tolist()], [tokens[r][1] for r in rows.tolist()], dense


def check_all(store, codes) -> None:
    """Postings and statistics are what all codes say."""
    rows, token_ids, doc_ids, dense = all_codes(codes)
    postings = codes.postings()
    parts = {"rows": [], "values": [], "tokens": [], "docs": []}
    for latent in range(codes.n_latents):
        fires = np.flatnonzero(dense[:, latent])
        found_rows, values = postings.latent(latent)
        assert found_rows.tolist() == rows[fires].tolist()
        assert values.tolist() == dense[fires, latent].tolist()
        best = sorted(zip(-dense[fires, latent], rows[fires], strict=True))[:7]
        top_rows, top_values = postings.top(latent, 7)
        assert list(zip(-top_values.astype(float), top_rows, strict=True)) == best
        parts["rows"].append(rows[fires])
        parts["values"].append(values)
        parts["tokens"].append(np.array(token_ids, np.int32)[fires])
        parts["docs"].append(len({doc_ids[i] for i in fires}))
    told = RangePostings(
        0,
        np.cumsum([0, *map(len, parts["rows"])]),
        np.concatenate(parts["rows"]),
        np.concatenate(parts["values"]),
        np.concatenate(parts["tokens"]),
        np.array(parts["docs"]),
    )
    norms = np.linalg.norm(store.dictionary("sae").weight("W_dec").astype(float), axis=1).astype(np.float32)
    table = codes.stats()
    assert table["promoted"].null_count == table["suppressed"].null_count == codes.n_latents
    assert_same(
        table.drop_columns(["promoted", "suppressed"]),
        naive_statistics(told, len(rows), len(set(doc_ids)), norms),
    )


@pytest.mark.parametrize(
    ("run", "dictionary", "settings"),
    [
        ({}, {}, {}),
        ({"rate": 0.4}, {"activation": "topk", "k": 5}, {"value_dtype": "float32"}),
        ({}, {"dead": True}, {}),
    ],
    ids=["dense", "sampled", "dead"],
)
@pytest.mark.parametrize("per_unit", [30, 1 << 30])
def test_postings_and_statistics_are_those_of_all_codes(
    store, tokenization, run, dictionary, settings, per_unit, monkeypatch
):
    monkeypatch.setattr(postings_plan, "MAX_POSTINGS", per_unit)
    codes = encoded(store, tokenization, run=run, dictionary=dictionary, **settings)
    report = build_postings(store, CODES)
    codes = store.run("r").codes("sae")
    assert report.is_complete
    assert report.n_units == report.n_units_planned == report.units_this_job == codes.postings().n_segments
    assert (report.n_units > 1) == (per_unit == 30 and not dictionary.get("dead", False))
    assert report.n_postings == codes.n_codes
    check_all(store, codes)
    assert not fsck(store.storage, deep=True).problems
    again = build_postings(store, CODES)
    assert (again.units_this_job, again.version, again.is_complete) == (0, report.version, True)


def test_a_range_can_be_smaller_than_a_latent_and_an_object_only_so_large(monkeypatch):
    monkeypatch.setattr(postings_plan, "MAX_POSTINGS", 10)
    counts = np.array([0, 3, 12, 0, 9, 1, 5, 5, 1])
    assert plan_ranges(counts, memory_bytes=1 << 40) == [0, 2, 3, 6, 8, 9]
    assert plan_ranges(np.zeros(5, np.int64), memory_bytes=1 << 40) == [0, 5]


def test_ranges_fit_into_memory_and_no_two_neighbours_would(monkeypatch):
    monkeypatch.setattr(postings_plan, "MAX_POSTINGS", 1 << 60)  # memory alone decides
    limits = {"value_bytes": 4, "worker_postings": 1 << 60}
    rng = np.random.default_rng(0)
    counts = (rng.pareto(0.7, 3000) * 1000).astype(np.int64)
    for memory in (1 << 28, 1 << 29, 1 << 31):
        largest = int(counts.max())
        if large_bytes(largest) > memory:
            with pytest.raises(
                InvalidInputError, match=rf"latent {counts.argmax()} fires on {largest:,}"
            ) as caught:
                plan_ranges(counts, memory_bytes=memory, **limits)
            assert caught.value.kind is ErrorKind.TOO_LARGE
            needed = int(str(caught.value).split("memory_bytes=")[1].split(" ")[0])
            assert len(plan_ranges(counts, memory_bytes=needed, **limits)) > 1
            continue
        bounds = plan_ranges(counts, memory_bytes=memory, **limits)
        assert bounds[0] == 0
        assert bounds[-1] == 3000
        assert ranges_bytes(counts, bounds, value_bytes=4) <= memory
        for i in range(len(bounds) - 2):
            assert (
                ranges_bytes(counts[bounds[i] : bounds[i + 2]], [0, bounds[i + 2] - bounds[i]], value_bytes=4)
                > memory
            )


def test_what_cannot_be_built_is_refused_before_any_work(store, tokenization):
    with pytest.raises(NotFoundError, match="sae@r"):
        build_postings(store, CODES)
    codes = encoded(store, tokenization)
    version = store.version
    with pytest.raises(InvalidInputError, match="memory_bytes=") as caught:
        build_postings(store, CODES, memory_bytes=1000)
    assert caught.value.kind is ErrorKind.TOO_LARGE
    with pytest.raises(InvalidInputError, match="does not say where its model is"):
        build_postings(store, CODES, promoted=True)
    with pytest.raises(NotFoundError, match="build them"):
        codes.stats()
    assert store.refresh().version == version


def test_incomplete_codes_are_refused(store, tokenization):
    make_run(store, tokenization, finish=False).finish(without=(1,), seal=False)
    add_dictionary(store)
    encode(store, "sae", "r", postings=False)
    with pytest.raises(InvalidInputError, match="not complete"):
        build_postings(store, CODES)


def test_a_stopped_job_is_finished_by_the_next_one(store, tokenization, monkeypatch):
    monkeypatch.setattr(postings_plan, "MAX_POSTINGS", 40)
    codes = encoded(store, tokenization)
    stop = threading.Event()
    seen = []

    def progress(done):
        seen.append(done.units_done)
        stop.set()

    report = build_postings(store, CODES, stop=stop, progress=progress)
    assert not report.is_complete
    assert 0 < report.n_units < report.n_units_planned
    with pytest.raises(InvalidInputError, match=f"have {report.n_units} of {report.n_units_planned}"):
        store.run("r").codes("sae").stats()
    # Ranges stay as they were begun, whatever would be planned now; too little memory for them is refused.
    needed = ranges_bytes(
        codes.counts(), store.state.collection("postings", CODES).config["boundaries"], value_bytes=2
    )
    with pytest.raises(InvalidInputError, match=f"memory_bytes={needed}"):
        build_postings(store, CODES, memory_bytes=needed - 1)
    with pytest.raises(ConflictError, match="without promoted vocabulary"):
        build_postings(store, CODES, promoted=True)
    monkeypatch.setattr(postings_plan, "MAX_POSTINGS", 1 << 30)
    rest = build_postings(store, CODES, memory_bytes=needed)
    assert rest.is_complete
    assert rest.units_this_job == report.n_units_planned - report.n_units
    check_all(store, store.run("r").codes("sae"))


@pytest.mark.ray
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_workers_on_ray_build_the_same(tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(postings_plan, "MAX_POSTINGS", 3000)
    store = actstore.open(str(tmp_path / "store"), create=True)
    encoded(store, kept.tokenized(store, tmp_path / "tokenizer"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        report = build_postings(store, CODES, ray_address="local", workers=2)
    finally:
        ray.shutdown()
    assert report.is_complete
    assert report.n_units > 2
    check_all(store, store.run("r").codes("sae"))


def test_statistics_of_some_latents_in_the_order_asked(store, tokenization, monkeypatch):
    monkeypatch.setattr(postings_plan, "MAX_POSTINGS", 60)
    monkeypatch.setattr("actstore.latent_stats.LATENTS_PER_GROUP", 4)
    encoded(store, tokenization)
    build_postings(store, CODES)
    codes = store.run("r").codes("sae")
    everything = codes.stats().to_pylist()
    assert [row["latent"] for row in everything] == list(range(codes.n_latents))
    wanted = [39, 0, 17, 17, 3]
    assert codes.stats(wanted).to_pylist() == [everything[i] for i in wanted]
    some = codes.stats(wanted, columns=["max", "n_tokens"])
    assert some.column_names == ["max", "n_tokens"]
    assert some.to_pylist() == [{n: everything[i][n] for n in ("max", "n_tokens")} for i in wanted]
    assert codes.stats([], columns=["quantiles"]).num_rows == 0
    with pytest.raises(NotFoundError, match=r"latent 40 .* \[0, 40\)"):
        codes.stats([1, 40])
    with pytest.raises(InvalidInputError, match="no column 'densty'"):
        codes.stats(columns=["densty"])
    with pytest.raises(InvalidInputError, match=r"\['density'\]"):
        codes.stats(columns="density")


def test_counts_that_are_wrong_are_seen():
    page = SparseRows.from_dense(np.eye(3))
    tokens = UnitTokens(np.arange(3), np.zeros(3, np.int32), np.zeros(3, np.int64))
    short = PostingsGatherer(0, np.array([1, 0, 1]), np.dtype(np.float16))
    with pytest.raises(FormatError, match="more or fewer"):
        short.add(page, 0, tokens)
    long = PostingsGatherer(0, np.array([1, 2, 1]), np.dtype(np.float16))
    long.add(page, 0, tokens)
    with pytest.raises(FormatError, match="more or fewer"):
        long.finish()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_grouped_postings_are_encoded_as_any_others(dtype):
    rng = np.random.default_rng(3)
    for _ in range(8):
        sizes = rng.choice([0, 1, 5, 4095, 4096, 4097, 9000, 40_000], rng.integers(1, 12))
        indptr = np.cumsum([0, *sizes])
        rows = np.concatenate([np.sort(rng.choice(90_000, n, replace=False)) for n in sizes]).astype(np.int64)
        values = (rng.integers(1, 50, len(rows)) / 8).astype(dtype)
        latents = np.repeat(np.arange(len(sizes)), sizes) + 70_000
        shuffled = rng.permutation(len(rows))
        expected = encode_segment(70_000, len(sizes), latents[shuffled], rows[shuffled], values[shuffled])
        assert encode_grouped(70_000, indptr, rows, values) == expected
    with pytest.raises(InvalidInputError, match="finite and positive"):
        encode_grouped(0, np.array([0, 1]), np.array([1]), np.zeros(1, dtype))


def random_pages(n_rows, n_latents, per_row, seed=0):
    """Codes of rows, page by page."""
    rng = np.random.default_rng(seed)
    for first in range(0, n_rows, 8192):
        n = min(8192, n_rows - first)
        latents = np.sort(
            np.minimum(rng.pareto(0.5, (n, per_row)) * 20, n_latents - 1).astype(np.uint32), axis=1
        )
        keep = np.concatenate([np.ones((n, 1), bool), latents[:, 1:] != latents[:, :-1]], axis=1)
        indptr = np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int64)
        values = (rng.gamma(1, 2, int(indptr[-1])) + 0.01).astype(np.float16)
        yield first, SparseRows(indptr, latents[keep], values, n_latents)


def test_memory_of_a_task_is_within_what_the_plan_says():
    """State, statistics and encoding of 4 million postings; of the fixed part only what a block of statistics takes."""
    n_rows, n_latents = 160_000, 5000
    counts = np.zeros(n_latents, np.int64)
    for _, page in random_pages(n_rows, n_latents, 30):
        counts += np.bincount(page.latents, minlength=n_latents)
    ids = (np.arange(n_rows) * 7919 % 50_000).astype(np.int32)
    tokens = UnitTokens(np.arange(n_rows), ids, np.arange(n_rows) // 100)
    planned = (
        task_bytes(int(counts.sum()), n_latents, int(counts.max()), value_bytes=2)
        - postings_plan.FIXED_BYTES
        + 64 * 2**20
    )
    tracemalloc.start()
    try:
        gatherer = PostingsGatherer(0, counts, np.dtype(np.float16))
        for first, page in random_pages(n_rows, n_latents, 30):
            gatherer.add(page, first, tokens)
        postings = gatherer.finish()
        table = postings_job.latent_statistics(
            postings, n_rows=n_rows, n_documents=1600, decoder_norms=np.ones(n_latents)
        )
        postings_job.stats_bytes(table)
        encode_grouped(0, postings.indptr, postings.rows, postings.values)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < planned
