"""Every statistic of a hook point against numpy on all rows at once, whole and in random pieces merged in random order."""

import itertools
import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import InvalidInputError
from actstore.int8 import Int8Error
from actstore.stats import (
    HookPointStats,
    RowTokens,
    block_stats,
    empty_stats,
    merge_stats,
    stats_from_table,
    stats_to_table,
)

WIDTHS = (1, 3, 64, 700, 1025, 3000)
EXACT = ("n_rows", "n_finite_rows", "nonfinite", "zero_norms")
EXACT_ARRAYS = ("min", "max", "norm_bins", "norm_counts", "outlier_counts")


def make_rows(rng, n, d):
    """Rows of every kind: large means, constants, sparse and huge and tiny values, rows of zeros, NaN and infinities."""
    acts = rng.normal(size=(n, d)) * 10.0 ** rng.uniform(-2, 1.5, d)
    acts += np.where(rng.random(d) < 0.3, 10.0 ** rng.uniform(0, 4, d), 0)
    acts[:, rng.random(d) < 0.1] = rng.normal()
    acts[rng.random((n, d)) < 0.1] = 0
    acts = acts.astype(np.float32)
    kind = rng.random(n)
    acts[kind < 0.05] = 0
    acts[(kind > 0.05) & (kind < 0.07)] *= np.float32(1e25)
    acts[(kind > 0.07) & (kind < 0.09)] *= np.float32(1e-30)
    acts[(kind > 0.09) & (kind < 0.1)] = np.float32(1e-44)
    bad = rng.random((n, d)) < 0.02 / d
    acts[bad] = rng.choice([np.nan, np.inf, -np.inf], int(bad.sum()))
    return acts


def make_tokens(rng, n):
    rows = np.sort(rng.choice(10 * n + 1, n, replace=False)) + int(rng.integers(1 << 40))
    return RowTokens(
        rows,
        rng.integers(0, 1 << 17, n).astype(np.int32),
        rng.integers(0, rng.choice([3, 12, 5000]), n).astype(np.int32),
    )


def cut(tokens, start, stop):
    return RowTokens(
        tokens.rows[start:stop], tokens.token_ids[start:stop], tokens.window_positions[start:stop]
    )


def mix(z):
    """One output of SplitMix64, with Python's own integers."""
    m = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m
    return z ^ (z >> 31)


def is_chosen(row):
    """What FORMAT.md 7.3 says: the hash of 6.8 with the seed "values" is below 2^60."""
    m, gamma, seed = (1 << 64) - 1, 0x9E3779B97F4A7C15, int.from_bytes(b"values")
    state = mix((seed + gamma) & m)
    return mix((state + (row + 1) * gamma) & m) < 1 << 60


def assert_same(a: HookPointStats, b: HookPointStats):
    """All counts equal, moments to rounding."""
    for name in EXACT:
        assert getattr(a, name) == getattr(b, name), name
    for name in EXACT_ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for part in ("value_sketch", "row_norms"):
        for name in type(getattr(a, part)).__slots__:
            x, y = (getattr(getattr(s, part), name) for s in (a, b))
            np.testing.assert_array_equal(x, y, err_msg=f"{part}.{name}")
            assert np.asarray(x).dtype == np.asarray(y).dtype
    size = np.maximum(np.abs(a.min), np.abs(a.max)).astype(np.float64) if a.n_finite_rows else 0.0
    assert (np.abs(a.mean - b.mean) <= 1e-13 * size).all()
    # A dimension that does not vary has squared deviations of the mean's rounding.
    assert (np.abs(a.m2 - b.m2) <= 1e-11 * b.m2 + a.n_rows * (1e-15 * size) ** 2).all()


def check_moments(stats, good):
    """Against two passes in float64 (which round themselves)."""
    wide = good.astype(np.float64)
    assert stats.n_finite_rows == len(good)
    if not len(good):
        assert np.isnan(stats.variance).all()
        return
    size = np.abs(wide).max(axis=0)
    np.testing.assert_allclose(stats.mean, wide.mean(axis=0), rtol=1e-12, atol=(1e-14 * size).max())
    assert (np.abs(stats.mean - wide.mean(axis=0)) <= 1e-13 * size).all()
    np.testing.assert_allclose(stats.variance, wide.var(axis=0), rtol=1e-10, atol=1e-300)
    np.testing.assert_array_equal(stats.min, good.min(axis=0))
    np.testing.assert_array_equal(stats.max, good.max(axis=0))
    np.testing.assert_array_equal(stats.outlier_counts, (np.abs(good) >= 6).sum(axis=0))


def check_values(stats, good, rows):
    chosen = good[[is_chosen(int(row)) for row in rows]]
    assert stats.value_sketch.n_rows == len(chosen)
    assert stats.value_sketch.n_values == chosen.size
    if not chosen.size:
        assert np.isnan(stats.value_quantile(0.5))
        return
    magnitudes = np.abs(chosen)
    for q in (0.0, 1e-4, 0.03, 0.5, 0.77, 0.999, 1.0):
        exact = float(np.quantile(chosen, q, method="lower"))
        assert abs(stats.value_quantile(q) - exact) <= abs(exact) / 129 * (1 + 1e-12) + 2.0**-133
        exact = float(np.quantile(magnitudes, q, method="lower"))
        got = stats.value_sketch.magnitude_quantile(q)
        assert abs(got - exact) <= exact / 129 * (1 + 1e-12) + 2.0**-133


def check_sinks(stats, good, tokens, ratio):
    norms = np.linalg.norm(good.astype(np.float64), axis=1)
    sinks = stats.sinks(ratio)
    assert (sinks.n_rows, sinks.ratio) == (len(good), ratio)
    if not len(good):
        assert (sinks.n_over, sinks.rows, sinks.largest, sinks.share) == (0, (), (), 0.0)
        return
    median = np.quantile(norms, 0.5, method="lower")
    if median > 0:
        assert 0.9895 * ratio * median <= sinks.limit <= 1.031 * ratio * median
    assert (norms > sinks.limit * 1.0003).sum() <= sinks.n_over <= (norms > sinks.limit * 0.9997).sum()
    order = np.lexsort((tokens.rows, -norms))[:64]
    assert [r.row for r in sinks.largest] == tokens.rows[order].tolist()
    assert [r.token_id for r in sinks.largest] == tokens.token_ids[order].tolist()
    assert [r.window_position for r in sinks.largest] == tokens.window_positions[order].tolist()
    np.testing.assert_allclose([r.norm for r in sinks.largest], norms[order], rtol=1e-14)
    assert sinks.rows == tuple(r for r in sinks.largest if r.norm > sinks.limit)
    assert sum(sinks.token_ids.values()) == len(sinks.rows)
    assert len(sinks.by_position) == 9
    for at in sinks.by_position:
        here = norms[np.minimum(tokens.window_positions, 8) == at.position]
        assert at.n_rows == len(here)
        assert (here > sinks.limit * 1.0003).sum() <= at.n_over <= (here > sinks.limit * 0.9997).sum()
        if len(here):
            assert at.median_norm == pytest.approx(np.quantile(here, 0.5, method="lower"), rel=0.0102)
            assert at.largest_norm == pytest.approx(here.max(), rel=0.0102)
        else:
            assert np.isnan([at.median_norm, at.largest_norm]).all()
    assert sum(at.n_over for at in sinks.by_position) == sinks.n_over


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 700), d=st.sampled_from(WIDTHS), ratio=st.floats(0.1, 20))
def test_all_statistics_equal_numpy(seed, n, d, ratio):
    rng = np.random.default_rng(seed)
    acts, tokens = make_rows(rng, n, d), make_tokens(rng, n)
    stats = block_stats("h", acts, tokens=tokens)
    finite = np.isfinite(acts)
    ok = finite.all(axis=1)
    assert (stats.n_rows, stats.nonfinite) == (n, int((~finite).sum()))
    assert stats.zero_norms == int((acts[ok] == 0).all(axis=1).sum())
    good = RowTokens(tokens.rows[ok], tokens.token_ids[ok], tokens.window_positions[ok])
    check_moments(stats, acts[ok])
    check_values(stats, acts[ok], good.rows)
    check_sinks(stats, acts[ok], good, ratio)


@pytest.mark.parametrize(("n", "d"), [(30_000, 256), (5000, 1025), (3, 300_000), (70_001, 1), (400_000, 13)])
def test_many_blocks_equal_numpy(n, d):
    """More values than a block and a group of blocks, widths that divide nothing, and a row longer than a block."""
    rng = np.random.default_rng(n)
    acts = rng.standard_normal((n, d), np.float32) * np.float32(3)
    acts[:, ::5] += 100
    acts[::1001, ::7] *= 1000
    tokens = RowTokens(np.arange(n), np.zeros(n, np.int32), (np.arange(n) % 128).astype(np.int32))
    stats = block_stats("h", acts, tokens=tokens)
    check_moments(stats, acts)
    check_sinks(stats, acts, tokens, 2.0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32), cuts=st.lists(st.integers(0, 600), max_size=6), d=st.sampled_from(WIDTHS[:4])
)
def test_pieces_merge_to_the_whole_in_any_order(seed, cuts, d):
    rng = np.random.default_rng(seed)
    acts, tokens = make_rows(rng, 600, d), make_tokens(rng, 600)
    edges = [0, *sorted(cuts), 600]
    if len(edges) > 2:
        acts[edges[1] : edges[2]] = np.nan  # a piece without any finite row
    whole = block_stats("h", acts, tokens=tokens)
    pieces = [empty_stats("h", d)]
    pieces += [block_stats("h", acts[a:b], tokens=cut(tokens, a, b)) for a, b in itertools.pairwise(edges)]
    while len(pieces) > 1:
        i, j = rng.choice(len(pieces), 2, replace=False)
        merged = merge_stats(pieces[i], pieces[j])
        pieces = [p for k, p in enumerate(pieces) if k not in (i, j)] + [merged]
    assert_same(pieces[0], whole)


def test_merging_with_nothing_changes_nothing():
    rng = np.random.default_rng(0)
    acts, tokens = make_rows(rng, 50, 4), make_tokens(rng, 50)
    stats = block_stats("h", acts, tokens=tokens)
    for merged in (merge_stats(stats, empty_stats("h", 4)), merge_stats(empty_stats("h", 4), stats)):
        assert_same(merged, stats)


def test_norms_that_float32_cannot_tell_apart_are_ranked_exactly():
    """Behind a norm layer all rows have nearly the same length."""
    rng = np.random.default_rng(1)
    acts = rng.normal(size=(3000, 512))
    acts = (acts / np.linalg.norm(acts, axis=1, keepdims=True)).astype(np.float32)
    tokens = RowTokens(np.arange(3000), np.arange(3000, dtype=np.int32), np.zeros(3000, np.int32))
    exact = np.linalg.norm(acts.astype(np.float64), axis=1)
    assert len(np.unique(exact.astype(np.float32))) < 100
    got = [r.row for r in block_stats("h", acts, tokens=tokens).sinks().largest]
    assert got == np.lexsort((np.arange(3000), -exact))[:64].tolist()


def test_statistics_without_tokens_do_not_claim_to_know_them():
    acts = np.ones((5, 2), np.float32)
    stats = block_stats("h", acts)
    sinks = stats.sinks()
    assert (stats.row_norms, sinks.rows, sinks.largest, sinks.by_position, sinks.token_ids) == (
        None, None, None, None, {},
    )  # fmt: skip
    assert (sinks.n_rows, sinks.n_over) == (5, 0)
    tokens = RowTokens(np.arange(5), np.zeros(5, np.int32), np.zeros(5, np.int32))
    assert merge_stats(stats, block_stats("h", acts, tokens=tokens)).row_norms is None


def test_outlier_dimensions_by_each_criterion():
    rng = np.random.default_rng(2)
    acts = rng.normal(size=(4000, 100)).astype(np.float32)
    acts[:, 7] = 30 * rng.normal(size=4000)  # deviates
    acts[:, 20] += 50  # is far from 0
    sign = np.where(np.arange(4000) % 2, 1, -1)
    acts[: 4000 * 5 // 100, 33] = 6.5 * sign[:200]  # is large, but too seldom
    acts[: 4000 * 7 // 100, 34] = 6 * sign[:280]  # is large often enough
    acts[3, 50] = 900  # is massive once
    acts[4, 51] = 99
    stats = block_stats("h", acts)
    assert stats.outlier_dims().tolist() == [7, 20, 34]
    assert stats.outlier_dims(share=0.05).tolist() == [7, 20, 33, 34]
    assert stats.outlier_dims("robust").tolist() == [7, 20, 50]
    assert stats.outlier_dims("robust", times=100).tolist() == [20]
    assert stats.outlier_dims("massive").tolist() == [50]
    assert [stats.outlier_dims(c).dtype for c in ("magnitude", "massive", "robust")] == [np.int64] * 3
    scaled = block_stats("h", acts * np.float32(1e-3))
    assert scaled.outlier_dims("massive").tolist() == scaled.outlier_dims().tolist() == []
    assert scaled.outlier_dims("robust").tolist() == [7, 20, 50]


def test_dimensions_that_are_mostly_dead_are_no_measure():
    acts = np.zeros((100, 10), np.float32)
    acts[:, :2] = np.random.default_rng(0).normal(size=(100, 2))
    assert block_stats("h", acts).outlier_dims("robust").tolist() == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda s: s.outlier_dims("large"),
        lambda s: s.outlier_dims(share=1.5),
        lambda s: s.norm_quantile(1.01),
        lambda s: s.value_quantile(-0.1),
        lambda s: s.value_quantile(float("nan")),
        lambda s: s.sinks(0),
        lambda s: s.sinks(float("nan")),
    ],
)
def test_arguments_that_make_no_sense(ask):
    with pytest.raises(InvalidInputError, match="got"):
        ask(block_stats("h", np.ones((20, 2), np.float32)))


OLD_SCHEMA = pa.schema(
    [
        pa.field("hook_point", pa.string(), nullable=False),
        pa.field("n_rows", pa.int64(), nullable=False),
        pa.field("n_finite_rows", pa.int64(), nullable=False),
        pa.field("nonfinite", pa.int64(), nullable=False),
        pa.field("mean", pa.list_(pa.float64()), nullable=False),
        pa.field("m2", pa.list_(pa.float64()), nullable=False),
        pa.field("min", pa.list_(pa.float32()), nullable=False),
        pa.field("max", pa.list_(pa.float32()), nullable=False),
        pa.field("zero_norms", pa.int64(), nullable=False),
        pa.field("norm_bins", pa.list_(pa.int32()), nullable=False),
        pa.field("norm_counts", pa.list_(pa.int64()), nullable=False),
    ]
)
"""Of the first released version."""


def test_a_table_of_an_earlier_version_is_read_and_says_what_it_lacks():
    row = {
        "hook_point": "h", "n_rows": 3, "n_finite_rows": 2, "nonfinite": 1, "mean": [1.0, 2.0], "m2": [2.0, 8.0],
        "min": [0.0, 0.0], "max": [2.0, 4.0], "zero_norms": 1, "norm_bins": [76], "norm_counts": [1],
    }  # fmt: skip
    old = stats_from_table(pa.Table.from_pylist([row], schema=OLD_SCHEMA))["h"]
    assert (old.n_rows, old.n_finite_rows, old.nonfinite, old.zero_norms) == (3, 2, 1, 1)
    assert (old.mean.tolist(), old.variance.tolist(), old.max.tolist()) == ([1, 2], [1, 4], [2, 4])
    assert old.norm_quantile(1.0) == pytest.approx(20**0.5, rel=0.0101)
    new = block_stats("h", np.full((4, 2), 7, np.float32), tokens=make_tokens(np.random.default_rng(0), 4))
    for stats in (old, merge_stats(old, new), merge_stats(new, old), merge_stats(old, empty_stats("h", 2))):
        again = stats_from_table(stats_to_table([stats]))["h"]
        for one in (stats, again):
            assert (one.outlier_counts, one.value_sketch, one.row_norms, one.int8_error) == (
                None, None, None, None,
            )  # fmt: skip
            assert one.value_quantile(0.5) is None
            assert one.outlier_dims() is one.outlier_dims("massive") is None
            assert one.outlier_dims("robust") is not None
            assert (one.sinks().rows, one.sinks().by_position) == (None, None)
            assert one.sinks().n_rows == one.n_finite_rows
    assert merge_stats(old, new).n_rows == 7


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(0, 90))
def test_tables_keep_everything(seed, n):
    rng = np.random.default_rng(seed)
    made = [
        block_stats("a", make_rows(rng, n, 5), tokens=make_tokens(rng, n)),
        block_stats("b:x", make_rows(rng, n, 2)),
        merge_stats(empty_stats("c", 1), block_stats("c", np.full((n, 1), np.nan, np.float32))),
    ]
    table = stats_to_table(made)
    assert table.column_names[: len(OLD_SCHEMA)] == OLD_SCHEMA.names
    assert [table.schema.field(f.name) for f in OLD_SCHEMA] == list(OLD_SCHEMA)
    again = stats_from_table(table)
    assert list(again) == ["a", "b:x", "c"]
    for stats in made:
        other = again[stats.hook_point]
        assert (other.row_norms is None) == (stats.row_norms is None)
        if stats.row_norms is not None:
            assert_same(other, stats)
        np.testing.assert_array_equal(other.mean, stats.mean)
        np.testing.assert_array_equal(other.m2, stats.m2)
    assert list(stats_from_table(table, ["c", "nobody"])) == ["c"]
    assert stats_from_table(stats_to_table([])) == {}


def test_errors_of_int8_rows_add_up_and_are_stored():
    a, b = Int8Error(10, 0.5, 4.0, 0.25), Int8Error(5, 0.25, 2.0, 0.5)
    rows = np.ones((1, 2), np.float32)
    stats = [block_stats("h", rows), block_stats("h", rows)]
    made = [
        HookPointStats(**{f: getattr(s, f) for f in HookPointStats.__slots__} | {"int8_error": e})
        for s, e in zip(stats, (a, b), strict=True)
    ]
    total = merge_stats(merge_stats(empty_stats("h", 2), made[0]), made[1])
    assert total.int8_error == Int8Error(15, 0.75, 6.0, 0.5)
    assert stats_from_table(stats_to_table([total]))["h"].int8_error == total.int8_error


def test_threads_do_not_disturb_each_other():
    rng = np.random.default_rng(3)
    inputs = [make_rows(rng, 500, d) for d in (2, 64, 700, 3000)]
    alone = [block_stats("h", acts) for acts in inputs]
    found: list[list[HookPointStats]] = [[] for _ in inputs]

    def work(i: int) -> None:
        for _ in range(5):
            found[i].append(block_stats("h", inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert len(found[i]) == 5
        for stats in found[i]:
            np.testing.assert_array_equal(stats.m2, expected.m2)
            np.testing.assert_array_equal(stats.norm_counts, expected.norm_counts)
            np.testing.assert_array_equal(stats.value_sketch.counts, expected.value_sketch.counts)
