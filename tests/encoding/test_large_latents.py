"""Latents whose postings do not fit into memory: sorted on disk, and the same object and statistics as any others."""

import tracemalloc
import uuid
from pathlib import Path

import numpy as np
import pytest

import actstore
from actstore.errors import ErrorKind, FormatError, InvalidInputError, StorageError
from actstore.ingest.encoding import postings_plan, sorted_runs
from actstore.ingest.encoding.encode import encode
from actstore.ingest.encoding.large_latent import LargeLatent
from actstore.ingest.encoding.latent_stats import RangePostings
from actstore.ingest.encoding.postings_gather import UnitTokens
from actstore.ingest.encoding.postings_job import build_postings
from actstore.ingest.encoding.postings_plan import large_bytes, plan_ranges, task_bytes
from actstore.ingest.encoding.sorted_runs import SortedRuns
from actstore.log import fsck
from actstore.sparse import SparseRows, encode_segment
from tests.encoding.encoded import add_dictionary, make_run
from tests.encoding.naive_latents import assert_same, naive_statistics
from tests.encoding.test_postings_job import check_all
from tests.ingest import kept


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sorted_runs, "PIECE_POSTINGS", 700)
    monkeypatch.setattr(sorted_runs, "MERGED_POSTINGS", 1500)
    monkeypatch.setattr(sorted_runs, "_LEAST_READ", 30)


def pages_of(rows, latent, values, n_rows, n_latents=40, seed=0):
    """Codes of all rows, page by page, with other latents beside; `rows` are those that fire."""
    rng = np.random.default_rng(seed)
    fires = np.zeros(n_rows, values.dtype)
    fires[rows] = values
    first = 0
    while first < n_rows:
        n = min(int(rng.integers(1, 3000)), n_rows - first)
        dense = np.zeros((n, n_latents), values.dtype)
        dense[rng.random((n, n_latents)) < 0.05] = 1
        dense[:, latent] = fires[first : first + n]
        yield first, SparseRows.from_dense(dense, values.dtype.name)
        first += n


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("n_values", [1, 40, 1 << 20], ids=["all equal", "ties", "few ties"])
@pytest.mark.parametrize("n", [1, 699, 4096, 5003])
def test_object_and_statistics_are_those_of_memory(small_pieces, dtype, n_values, n):
    rng = np.random.default_rng(n + n_values)
    n_rows = n + 500
    rows = np.sort(rng.choice(n_rows, n, replace=False))
    values = ((rng.integers(0, n_values, n) + 1) / 8 % 60_000 + 0.125).astype(dtype)
    ids = rng.integers(0, 90, n_rows).astype(np.int32)
    numbers = np.arange(n_rows) * 3 + 7
    doc_ids = np.arange(n_rows) // 20
    with LargeLatent(5, n, np.dtype(dtype)) as gatherer:
        for first, page in pages_of(rows, 5, values, n_rows):
            gatherer.add(page, first, UnitTokens(numbers, ids, doc_ids))
        parts, meta, table = gatherer.finish(
            n_rows=n_rows, n_documents=len(set(doc_ids)), decoder_norms=np.array([2.5])
        )
    # The object: as encoded from memory in any order. The statistics: one posting after the other.
    shuffled = rng.permutation(n)
    latents = np.full(n, 5)
    assert (b"".join(parts), meta) == encode_segment(5, 1, latents, numbers[rows][shuffled], values[shuffled])
    told = RangePostings(
        5, np.array([0, n]), numbers[rows], values, ids[rows], np.array([len(set(doc_ids[rows].tolist()))])
    )
    assert_same(table, naive_statistics(told, n_rows, len(set(doc_ids)), np.array([2.5])))


def test_merged_postings_are_in_the_order_of_their_values(small_pieces):
    rng = np.random.default_rng(1)
    rows = np.arange(30_000) * 2
    values = (rng.integers(1, 60, len(rows)) / 4).astype(np.float16)
    values[:9000] = 15  # the largest in the first pieces only
    with SortedRuns(values.dtype) as runs:
        for part in np.array_split(np.arange(len(rows)), 150):
            runs.append(rows[part], values[part], np.zeros(len(part), np.int32))
        assert len(runs) == len(rows)
        found = [(r, b.view(np.float16)) for r, b in runs.merged()]
        folder = Path(runs._folder.name)
        assert folder.exists()
    assert not folder.exists()
    order = sorted(range(len(rows)), key=lambda i: (-values[i], rows[i]))
    assert np.concatenate([r for r, _ in found]).tolist() == rows[order].tolist()
    assert np.concatenate([v for _, v in found]).tolist() == values[order].tolist()
    assert max(len(r) for r, _ in found) <= 2 * 1500


@pytest.mark.parametrize("value_dtype", ["float16", "float32"])
def test_a_job_with_hardly_any_memory_builds_the_same(tmp_path, small_pieces, monkeypatch, value_dtype):
    store = actstore.open(f"memory://large-{uuid.uuid4().hex}", create=True)
    make_run(store, kept.tokenized(store, tmp_path / "tokenizer"))
    add_dictionary(store)
    encode(store, "sae", "r", postings=False, value_dtype=value_dtype)
    counts = store.refresh().run("r").codes("sae").counts()
    monkeypatch.setattr(postings_plan, "FIXED_BYTES", 0)
    monkeypatch.setattr(postings_plan, "LATENT_BYTES", 8)
    memory_bytes = large_bytes(int(counts.max()))
    size = 2 if value_dtype == "float16" else 4
    n_large = sum(task_bytes(n, 1, n, value_bytes=size) > memory_bytes for n in counts.tolist())
    assert n_large > 3
    with pytest.raises(InvalidInputError, match=f"memory_bytes={memory_bytes} or more") as error:
        build_postings(store, "sae@r", memory_bytes=memory_bytes - 1)
    assert error.value.kind is ErrorKind.TOO_LARGE
    made = []

    class Watched(LargeLatent):
        def finish(self, **options):
            made.append(self._latent)
            return super().finish(**options)

    monkeypatch.setattr("actstore.ingest.encoding.postings_job.LargeLatent", Watched)
    report = build_postings(store, "sae@r", memory_bytes=memory_bytes)
    assert report.is_complete
    assert len(made) == n_large
    check_all(store, store.run("r").codes("sae"))
    assert not fsck(store.storage, deep=True).problems


def test_a_large_latent_has_a_range_of_its_own(monkeypatch):
    monkeypatch.setattr(postings_plan, "FIXED_BYTES", 0)
    monkeypatch.setattr(postings_plan, "LATENT_BYTES", 0)
    counts = np.array([0, 10, 500, 0, 7, 600, 0])
    assert plan_ranges(counts, memory_bytes=600 * postings_plan.ENCODED_BYTES) == [0, 2, 3, 5, 6, 7]


def test_memory_is_that_of_the_object_and_some_pieces():
    n, per_page = 3_000_000, 65_536
    rng = np.random.default_rng(0)
    values = rng.gamma(2, 1, n).astype(np.float16) + np.float16(0.01)
    tokens = UnitTokens(np.arange(n) * 2, (np.arange(n) % 50_000).astype(np.int32), np.arange(n) // 300)
    tracemalloc.start()
    try:
        with LargeLatent(0, n, np.dtype(np.float16)) as gatherer:
            for first in range(0, n, per_page):
                part = values[first : first + per_page]
                indptr = np.arange(len(part) + 1)
                gatherer.add(SparseRows(indptr, np.zeros(len(part), np.uint32), part, 9), first, tokens)
            parts, _, table = gatherer.finish(n_rows=n, n_documents=n, decoder_norms=np.ones(1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert table["n_tokens"].to_pylist() == [n]
    assert sum(map(len, parts)) < n * postings_plan.ENCODED_BYTES / 2
    assert peak < n * postings_plan.ENCODED_BYTES + 64 * 2**20
    assert peak < n * postings_plan.LARGEST_BYTES


def test_what_cannot_be_is_refused():
    tokens = UnitTokens(np.arange(3), np.zeros(3, np.int32), np.zeros(3, np.int64))
    page = SparseRows.from_dense(np.eye(3))
    with LargeLatent(1, 2, np.dtype(np.float16)) as gatherer:
        gatherer.add(page, 0, tokens)
        with pytest.raises(FormatError, match="row 1 of codes follows row 1"):
            gatherer.add(page, 0, tokens)
        with pytest.raises(FormatError, match="has 1 codes, the directories of their units say 2"):
            gatherer.finish(n_rows=3, n_documents=1, decoder_norms=np.ones(1))
    with SortedRuns(np.dtype(np.float16)) as runs:
        runs._paths = dict.fromkeys(runs._paths, Path("/dev/full"))
        runs.append(np.arange(3), np.ones(3, np.float16), np.zeros(3, np.int32))
        with pytest.raises(StorageError, match="TMPDIR") as error:
            list(runs.merged())
    assert error.value.kind is ErrorKind.STORAGE_FULL
