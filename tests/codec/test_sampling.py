"""Which rows a sample keeps: the same ones everywhere and forever, the right share, and nothing but the row's number decides."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from actstore.codec.cache import BytesCache
from actstore.codec.spec import CODECS, MAX_SHARD_BYTES, TARGET_CHUNK_BYTES, plan_spec
from actstore.dtypes import STORED_DTYPES
from actstore.errors import InvalidInputError
from actstore.sampling import (
    KeptRows,
    Sample,
    kept_offsets,
    most_kept,
    parse_kept,
    plan_stored_rows,
    row_hashes,
)

R = 1 << 16


def splitmix64(state):
    """SplitMix64 as its authors' C code has it (splitmix64.c, public domain)."""
    mask = (1 << 64) - 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)


def test_the_oracle_gives_the_published_numbers():
    assert list(itertools.islice(splitmix64(1234567), 5)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("seed", [0, 1, 7, 2**63, 2**64 - 1])
def test_hashes_are_the_generators_outputs(seed):
    key = next(splitmix64(seed))
    expected = list(itertools.islice(splitmix64(key), 1000))
    assert row_hashes(np.arange(1000), seed).tolist() == expected
    assert row_hashes(np.array([999, 3]), seed).tolist() == [expected[999], expected[3]]


def test_the_same_rows_forever():
    """Stored runs depend on these."""
    assert row_hashes(np.array([0, 1, 65_536, 2**40, 2**62]), 0).tolist() == [
        12035550249420947055,
        12935080325729570654,
        14070872867125275418,
        2637596080532382015,
        12992853641157448585,
    ]
    assert kept_offsets(3, 200, rows_per_unit=R, rate=0.05, seed=1).tolist() == GOLDEN


GOLDEN = [42, 49, 63, 73, 112, 120]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 70_000),
    st.floats(1e-300, 1),
    st.integers(0, 2**64 - 1),
)
def test_a_row_is_kept_by_its_own_number_alone(unit, n_rows, rate, seed):
    offsets = kept_offsets(unit, n_rows, rows_per_unit=70_000, rate=rate, seed=seed)
    hashes = row_hashes(unit * 70_000 + np.arange(n_rows), seed).tolist()
    limit = Fraction(rate) * 2**64
    checked = range(0, n_rows, max(1, n_rows // 500))
    kept = set(offsets.tolist())
    assert [r for r in checked if r in kept] == [r for r in checked if hashes[r] < limit]
    assert np.all(np.diff(offsets) > 0)
    fewer = n_rows // 3
    shorter = kept_offsets(unit, fewer, rows_per_unit=70_000, rate=rate, seed=seed)
    assert shorter.tolist() == offsets[offsets < fewer].tolist()
    smaller = kept_offsets(unit, n_rows, rows_per_unit=70_000, rate=rate / 2, seed=seed)
    assert set(smaller.tolist()) <= kept


def test_units_do_not_matter():
    """The same rows, cut into units of different sizes."""
    whole = kept_offsets(0, 60_000, rows_per_unit=60_000, rate=0.1, seed=3)
    for size in (1000, 7500):
        parts = [
            unit * size + kept_offsets(unit, size, rows_per_unit=size, rate=0.1, seed=3)
            for unit in range(60_000 // size)
        ]
        assert np.concatenate(parts).tolist() == whole.tolist()


def test_rate_1_keeps_all_and_a_tiny_one_none():
    assert kept_offsets(5, R, rows_per_unit=R, rate=1.0, seed=9).tolist() == list(range(R))
    assert kept_offsets(5, R, rows_per_unit=R, rate=5e-324, seed=9).tolist() == []
    assert kept_offsets(5, 0, rows_per_unit=R, rate=0.5, seed=9).tolist() == []
    assert Sample(5e-324, 0).threshold == 1
    assert Sample(1.0, 0).threshold == 2**64
    assert Sample(1 - 2**-53, 0).threshold == 2**64 - 2**11


N_ROWS = 1 << 20
LEAST_P = 1e-4
"""Of each of about 40 tests; seeds are fixed, so that a pass is one forever."""


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_share_kept_is_the_rate(rate, seed):
    kept = kept_offsets(0, N_ROWS, rows_per_unit=N_ROWS, rate=rate, seed=seed)
    assert stats.binomtest(len(kept), N_ROWS, rate).pvalue > LEAST_P
    # Evenly over the rows, and over every residue that documents or chunks might have.
    for groups in (np.arange(N_ROWS) >> 14, np.arange(N_ROWS) % 64, np.arange(N_ROWS) % 1000):
        sizes = np.bincount(groups)
        found = np.bincount(groups[kept], minlength=len(sizes))
        observed = np.stack([found, sizes - found])
        expected = np.stack([sizes * rate, sizes * (1 - rate)])
        statistic = ((observed - expected) ** 2 / expected).sum()
        assert stats.chi2.sf(statistic, len(sizes)) > LEAST_P


@pytest.mark.parametrize("seed", [0, 1])
def test_neighbours_and_other_seeds_are_independent(seed):
    def kept(s):
        mask = np.zeros(N_ROWS, bool)
        mask[kept_offsets(0, N_ROWS, rows_per_unit=N_ROWS, rate=0.3, seed=s)] = True
        return mask

    mine = kept(seed)
    for other in (np.roll(mine, 1), np.roll(mine, 128), kept(seed + 1), kept(seed + 2**32)):
        table = np.array([[np.sum(a & b) for b in (other, ~other)] for a in (mine, ~mine)])
        assert stats.chi2_contingency(table).pvalue > LEAST_P


def test_gaps_are_geometric():
    kept = kept_offsets(0, N_ROWS, rows_per_unit=N_ROWS, rate=0.1, seed=2)
    gaps = np.minimum(np.diff(kept), 50)
    observed = np.bincount(gaps, minlength=51)[1:]
    p = stats.geom.pmf(np.arange(1, 51), 0.1)
    p[-1] = stats.geom.sf(49, 0.1)
    assert stats.chisquare(observed, p * len(gaps)).pvalue > LEAST_P


def test_the_fullest_unit():
    units = {0: 900, 1: 1000, 4: 17}
    counts = {
        unit: sum(h < 2**64 // 4 for h in row_hashes(unit * 1000 + np.arange(n), 8).tolist())
        for unit, n in units.items()
    }
    assert most_kept(units.items(), rows_per_unit=1000, rate=0.25, seed=8) == max(counts.values())
    assert most_kept([], rows_per_unit=1000, rate=0.25, seed=8) == 0


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 200_000),
    st.lists(st.integers(1, 20_000), min_size=1, max_size=3),
    st.sampled_from(STORED_DTYPES),
    st.sampled_from(tuple(CODECS)),
)
def test_planned_places_fit_and_can_be_cut_well(most, widths, dtype, codec):
    places = plan_stored_rows(most, widths=widths, dtype=dtype, codec=codec)
    assert max(1, most) <= places <= 2 * max(1, most)
    for width in widths:
        spec = plan_spec(rows_per_unit=places, d_model=width, dtype=dtype, codec=codec)
        assert spec.rows_per_shard * spec.row_bytes <= MAX_SHARD_BYTES
        assert spec.chunk_bytes <= max(TARGET_CHUNK_BYTES, spec.row_bytes)
        assert spec.rows_per_sum >= min(spec.wanted_rows_per_sum, spec.rows_per_chunk) / 2
    if most > 10_000 and max(widths) < 5000:
        assert places < 1.1 * most


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, float("nan"), "0.5", True, None])
def test_what_is_no_rate(rate):
    with pytest.raises(InvalidInputError, match="share above 0"):
        Sample(rate, 0)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, None, True])
def test_what_is_no_seed(seed):
    with pytest.raises(InvalidInputError, match="seed"):
        kept_offsets(0, 5, rows_per_unit=5, rate=0.5, seed=seed)


def test_a_cache_holds_no_more_than_it_may():
    cache, loaded = BytesCache(100), []

    def get(key, nbytes):
        return cache.get(key, lambda: (loaded.append(key) or key, nbytes))

    assert [get(key, 40) for key in "abab"] == list("abab")
    assert loaded == ["a", "b"]
    assert get("c", 40) == "c"  # drops a, the one used longest ago
    assert get("b", 40) == "b"
    assert get("a", 40) == "a"
    assert loaded == ["a", "b", "c", "a"]
    assert get("huge", 1000) == get("huge", 1000) == "huge"
    assert loaded[4:] == ["huge"]


def test_offsets_are_kept_and_cannot_be_changed():
    assert parse_kept({"rows_per_unit": R}) is None
    kept = parse_kept({"rows_per_unit": R, "sample": Sample(0.01, 4).to_json()})
    assert isinstance(kept, KeptRows)
    expected = kept_offsets(2, R, rows_per_unit=R, rate=0.01, seed=4)
    first = kept.offsets(2, 100)
    assert first.tolist() == expected[:100].tolist()
    assert np.shares_memory(first, kept.offsets(2, 200))
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
