"""Which kind suits how many rows, and what is cut into which shards: small arithmetic, by hand."""

import pytest

from actstore.errors import InvalidInputError
from actstore.index_pieces import Piece, rows_of_shards
from actstore.ingest.indexing.choose import choose_kind, lists_for, row_bytes, rows_per_shard, sample_rows
from actstore.ingest.indexing.plan import cut_shards
from actstore.vector_index import index_id

GIB = 1 << 30


def choose(kind="auto", *, n_rows, d=768, memory_bytes=GIB, n_lists=None):
    return choose_kind(
        kind, n_rows=n_rows, d=d, memory_bytes=memory_bytes, n_lists=n_lists, norm_limit=float("inf")
    )


@pytest.mark.parametrize(
    ("n_rows", "d", "memory_bytes", "kind"),
    [
        (1, 768, GIB, "flat"),
        (20_000, 768, 1, "flat"),
        (20_001, 768, GIB, "ivf_sq8"),
        (1_300_000, 768, GIB, "ivf_sq8"),
        (1_400_000, 768, GIB, "ivf_rabitq"),
        (10**9, 4096, 100 * GIB, "ivf_rabitq"),
        (10**6, 4096, 8 * GIB, "ivf_sq8"),
    ],
)
def test_auto(n_rows, d, memory_bytes, kind):
    choice = choose(n_rows=n_rows, d=d, memory_bytes=memory_bytes)
    assert choice.kind == kind
    assert f"{n_rows:,} rows" in choice.why[0]
    assert f"{d:,} numbers" in choice.why[0]
    assert choice.why[1].startswith(kind)
    assert ("n_lists" in choice.params) == (kind != "flat")


def test_what_was_asked_for_is_taken():
    assert choose("ivf_rabitq", n_rows=10).params == {"n_lists": 16, "bits": 1}
    assert choose("ivf_sq8", n_rows=10**6, n_lists=77).params == {"n_lists": 77}
    assert choose("scan_sq8", n_rows=10).params == {"norm_limit": None}
    with pytest.raises(InvalidInputError, match="no lists"):
        choose("auto", n_rows=10, n_lists=4)


def test_lists_grow_with_the_root_of_the_rows():
    counts = [lists_for(n) for n in (1, 100, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9, 10**12)]
    assert counts == [4, 32, 512, 1024, 4096, 16384, 32768, 65536, 65536]


def test_a_sample_fits_the_memory_that_it_may_take():
    params = {"n_lists": 65536}
    assert sample_rows("ivf_sq8", params, n_rows=10**9, d=768, memory_bytes=64 * GIB) == 64 * 65536
    assert sample_rows("ivf_sq8", params, n_rows=10**9, d=4096, memory_bytes=GIB) == GIB // (8 * 4096)
    assert sample_rows("ivf_sq8", params, n_rows=1000, d=768, memory_bytes=GIB) == 1000
    assert sample_rows("flat", {}, n_rows=1000, d=768, memory_bytes=GIB) == 0


def test_a_shard_is_at_most_a_gibibyte():
    for kind in ("flat", "ivf_sq8", "ivf_rabitq", "scan_sq8"):
        for d in (16, 768, 4096, 16384):
            rows = rows_per_shard(kind, d, 1 << 20)
            assert 1 <= rows <= 1 << 20
            assert rows * row_bytes(kind, d) <= GIB
            assert rows == 1 << 20 or (rows + 1) * row_bytes(kind, d) > GIB


def test_shards_are_whole_pieces_in_order():
    pieces = [Piece(u, u + 1, n) for u, n in [(0, 5), (1, 5), (2, 1), (5, 30), (6, 2), (8, 2)]]
    shards = cut_shards(pieces, shard_rows=10)
    assert shards == [[[0, 2]], [[2, 3]], [[5, 6]], [[6, 7], [8, 9]]]
    assert rows_of_shards(pieces, shards) == [10, 1, 30, 4]
    assert cut_shards([], shard_rows=10) == []


def test_ids_are_names_and_differ_where_anything_does():
    parts = [
        (run, hook_point, of, purpose, generation)
        for run in ("r", "R@x", "r" * 64, "a.b")
        for hook_point in ("embed", "module:a.b:output", "module:A.b:output", "layers.3.resid_post")
        for of in ("tokens", "documents")
        for purpose in ("nearest", "directions")
        for generation in (0, 1, 10**6)
    ]
    ids = [index_id(*part) for part in parts]  # checked to be names where they are made
    assert len({id.lower() for id in ids}) == len(ids)
    assert max(map(len, ids)) <= 64
