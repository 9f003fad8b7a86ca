"""Pooling of a unit's rows: against loops over tokens in float64, formulas written down elsewhere, and any cut into units."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.dtypes import to_float32, to_stored
from actstore.ingest.config import POOLINGS as CONFIG_POOLINGS
from actstore.ingest.pooling import finite_rows, plan_documents, pool_rows, repeated_rows
from actstore.ingest.windows import plan_rows, plan_windows
from actstore.pooled_tables import POOLINGS, PooledSums

NO_ROWS = pa.table(
    {name: pa.array([], pa.int64()) for name in ("doc_id", "position", "window", "window_position")}
)


@st.composite
def cuts(draw):
    """Template, window and overlap that fit together, and body lengths of some documents."""
    prefix, suffix = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    room = draw(st.integers(1, 7))
    overlap = draw(st.integers(0, room - 1))
    bodies = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    return prefix, suffix, prefix + room + suffix, overlap, bodies


def make_rows(prefix, suffix, window, overlap, bodies):
    """Tokens of whole documents, and for each row: its body index, None for a template's token, whether that is an outer one."""
    columns = {name: [] for name in ("doc_id", "position", "window", "window_position", "is_special")}
    truth = []
    for doc_id, body in enumerate(bodies):
        spans = plan_windows(body, prefix=prefix, suffix=suffix, window=window, overlap=overlap)
        if not spans:
            continue
        starts, stops = np.array(spans).T
        n = len(spans)
        plan = plan_rows(starts, stops, np.zeros(n, int), np.full(n, body), prefix=prefix, suffix=suffix)
        columns["doc_id"] += [doc_id] * len(plan.position)
        columns["position"] += plan.position.tolist()
        columns["window"] += np.repeat(np.arange(n), plan.lengths).tolist()
        columns["window_position"] += plan.window_position.tolist()
        columns["is_special"] += plan.is_template.tolist()
        for w, (start, stop) in enumerate(spans):
            truth += [("template", w == 0)] * prefix
            truth += [("body", (doc_id, i)) for i in range(start, stop)]
            truth += [("template", w == n - 1)] * suffix
    return pa.table(columns), truth


@settings(max_examples=300, deadline=None)
@given(cut=cuts(), data=st.data())
def test_each_position_counts_once(cut, data):
    prefix, suffix, window, overlap, bodies = cut
    tokens, truth = make_rows(*cut)
    seen = set()
    expected = []
    for kind, what in truth:
        if kind == "template":
            expected.append(not what)
        else:
            expected.append(what in seen)
            seen.add(what)
    if not truth:
        tokens = NO_ROWS
    found = repeated_rows(tokens, window=window, overlap=overlap)
    assert found.tolist() == expected
    # Wherever a unit begins, the same rows are repeats: nothing of the windows before is needed.
    begins = [i for i, at in enumerate(tokens["window_position"].to_pylist()) if at == 0]
    if begins:
        start = data.draw(st.sampled_from(begins))
        rest = repeated_rows(tokens.slice(start), window=window, overlap=overlap)
        assert rest.tolist() == expected[start:]
    # What is left are the positions of every document's whole sequence, each once.
    left = tokens.filter(pa.array(~found, pa.bool_()))
    by_document = {}
    for doc_id, position in zip(left["doc_id"].to_pylist(), left["position"].to_pylist(), strict=True):
        by_document.setdefault(doc_id, []).append(position)
    for doc_id, body in enumerate(bodies):
        assert by_document.get(doc_id, []) == list(
            range(prefix + body + suffix if body or prefix + suffix else 0)
        )


def naive(tokens, acts, *, pool_special, eligible):
    """One pass in Python floats over every token."""
    found = {}
    for i, row in enumerate(tokens.to_pylist()):
        document = found.setdefault(row["doc_id"], [])
        if eligible[i] and (pool_special or not row["is_special"]) and np.isfinite(acts[i]).all():
            document.append((row["position"], acts[i].astype(np.float64)))
    vectors = {}
    for doc_id, rows in found.items():
        if not rows:
            vectors[doc_id] = (0, None)
            continue
        weight = sum(p + 1 for p, _ in rows)
        vectors[doc_id] = (
            len(rows),
            {
                "mean": sum(x for _, x in rows) / len(rows),
                "weighted_mean": sum((p + 1) * x for p, x in rows) / weight,
                "max": np.max([x for _, x in rows], axis=0),
                "last": max(rows, key=lambda pair: pair[0])[1],
            },
        )
    return vectors


def check(sums, expected):
    n, vectors = expected
    assert sums.n_tokens == n
    for pooling in POOLINGS:
        found = sums.vector(pooling)
        if vectors is None:
            assert found is None
        else:
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, vectors[pooling], rtol=1e-6, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    cut=cuts(),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    pool_special=st.booleans(),
    broken=st.booleans(),
    data=st.data(),
)
def test_like_a_loop_over_tokens_in_any_cut(cut, seed, dtype, pool_special, broken, data):
    _, _, window, overlap, _ = cut
    tokens, truth = make_rows(*cut)
    if not truth:
        return
    rng = np.random.default_rng(seed)
    acts = rng.standard_normal((len(truth), 5)).astype(np.float32) * 10
    if broken:
        acts[rng.random(acts.shape) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
    stored = to_stored(acts, dtype)
    acts = to_float32(stored, dtype)
    seen, eligible = set(), []
    for kind, what in truth:
        eligible.append(what if kind == "template" else what not in seen)
        seen.add(what)
    expected = naive(tokens, acts, pool_special=pool_special, eligible=eligible)

    begins = [i for i, at in enumerate(tokens["window_position"].to_pylist()) if at == 0]
    edges = sorted({0, len(truth), *data.draw(st.lists(st.sampled_from(begins), max_size=4))})
    merged, n_whole = {}, 0
    for start, stop in itertools.pairwise(edges):
        part = tokens.slice(start, stop - start)
        goes_on = stop < len(truth) and tokens["doc_id"][stop] == tokens["doc_id"][stop - 1]
        documents = plan_documents(
            part, window=window, overlap=overlap, pool_special=pool_special, goes_on=goes_on
        )
        rows = stored[start:stop]
        sums = pool_rows(rows, dtype, documents, poolings=POOLINGS, finite=finite_rows(rows, dtype))
        for doc_id, is_piece, one in zip(documents.doc_ids.tolist(), documents.is_piece, sums, strict=True):
            assert is_piece or doc_id not in merged
            n_whole += not is_piece
            merged[doc_id] = merged[doc_id] + one if doc_id in merged else one
    assert merged.keys() == expected.keys()
    for doc_id, sums in merged.items():
        check(sums, expected[doc_id])
    if len(edges) == 2:
        assert n_whole == len(expected)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 40), edges=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 2**32 - 1))
def test_pieces_merge_to_the_very_same_bits(n, edges, seed):
    """With whole numbers float64 adds without rounding, so that only wrong merging could differ."""
    rng = np.random.default_rng(seed)
    acts = rng.integers(-1000, 1000, (n, 3)).astype(np.float32)

    def sums(start, stop):
        tokens = pa.table(
            {
                "doc_id": [7] * (stop - start),
                "position": range(start, stop),
                "window": [start] * (stop - start),
                "window_position": range(stop - start),
                "is_special": [False] * (stop - start),
            }
        )
        documents = plan_documents(tokens, window=64, overlap=0, pool_special=False, goes_on=True)
        return next(pool_rows(acts[start:stop], "float32", documents, poolings=POOLINGS))

    whole = sums(0, n)
    cuts = sorted({0, n, *(e for e in edges if e < n)})
    pieces = [sums(a, b) for a, b in itertools.pairwise(cuts)]
    rng.shuffle(pieces)  # and in any order
    total = PooledSums.empty(3, POOLINGS)
    for piece in pieces:
        total = total + piece
    for pooling in POOLINGS:
        np.testing.assert_array_equal(total.vector(pooling), whole.vector(pooling))


def test_blocks_make_no_difference():
    """A document of more rows than are widened at once, with holes in it."""
    rng = np.random.default_rng(3)
    n, width = 1500, 200  # 655 rows a block
    acts = rng.standard_normal((n, width)).astype(np.float32)
    special = rng.random(n) < 0.3
    tokens = pa.table(
        {
            "doc_id": [0] * n,
            "position": range(n),
            "window": [0] * n,
            "window_position": range(n),
            "is_special": special,
        }
    )
    for pool_special in (False, True):
        documents = plan_documents(tokens, window=n, overlap=0, pool_special=pool_special, goes_on=False)
        (found,) = pool_rows(acts, "float32", documents, poolings=POOLINGS)
        check(found, naive(tokens, acts, pool_special=pool_special, eligible=[True] * n)[0])


def test_weighted_mean_is_that_of_sentence_transformers():
    """`weightedmean` as its paper and the library state it: weights 1, 2, ... times the attention mask, over their sum."""
    rng = np.random.default_rng(5)
    lengths = [1, 7, 12]
    states = rng.standard_normal((len(lengths), 12, 16)).astype(np.float32)
    mask = (np.arange(12) < np.array(lengths)[:, None]).astype(np.float64)
    weights = (np.arange(12) + 1.0)[None, :] * mask
    expected = (states * weights[:, :, None]).sum(1) / weights.sum(1, keepdims=True)

    total = sum(lengths)
    at = np.concatenate([np.arange(n) for n in lengths])
    tokens = pa.table(
        {
            "doc_id": np.repeat(np.arange(len(lengths)), lengths),
            "position": at,
            "window": np.zeros(total, int),
            "window_position": at,
            "is_special": at == 0,
        }
    )
    acts = np.concatenate([states[i, :n] for i, n in enumerate(lengths)])
    documents = plan_documents(tokens, window=12, overlap=0, pool_special=True, goes_on=False)
    found = [
        one.vector("weighted_mean")
        for one in pool_rows(acts, "float32", documents, poolings=["weighted_mean"])
    ]
    np.testing.assert_array_equal(np.stack(found), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_finite_rows(dtype):
    rng = np.random.default_rng(9)
    acts = rng.standard_normal((70_000, 4)).astype(np.float32)
    assert finite_rows(to_stored(acts, dtype), dtype) is None
    bad = rng.choice(len(acts), 50, replace=False)
    acts[bad, rng.integers(0, 4, 50)] = rng.choice([np.nan, np.inf, -np.inf], 50)
    expected = np.ones(len(acts), bool)
    expected[bad] = False
    np.testing.assert_array_equal(finite_rows(to_stored(acts, dtype), dtype), expected)


def test_the_same_poolings_everywhere():
    assert CONFIG_POOLINGS == POOLINGS
