"""Units of sampled and int8 runs: what is stored, what is said of it, and what an earlier attempt leaves to a later one."""

import itertools

import numpy as np
import pytest

import actstore
from actstore.codec.decode import decode_shard
from actstore.codec.encode import encode_shard
from actstore.codec.spec import ShardSpec
from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.shards import store_rows
from actstore.int8 import Int8Error, dequantise, fit_int8, quantise
from actstore.log import fsck
from actstore.sampling import kept_offsets
from actstore.storage import MemoryStorage
from tests.ingest import kept
from tests.ingest.kept import HOOK_POINTS, KeptRun

COUNT = itertools.count()


@pytest.fixture
def store(tmp_path):
    return actstore.open(f"memory://kinds-{next(COUNT)}", create=True, cache_dir=tmp_path / "cache")


@pytest.fixture
def tokenization(store, tmp_path):
    return kept.tokenized(store, tmp_path / "tokenizer", n=12)


def stored_numbers(run, kind, name):
    """Row numbers and float32 values of what a run should store, from the model's own numbers."""
    numbers, values = [], []
    plan = kind.plan
    for unit, rows in kind.captured(name).items():
        offsets = np.arange(len(rows))
        if plan.sample < 1:
            size = plan.rows_per_unit
            offsets = kept_offsets(unit, len(rows), rows_per_unit=size, rate=plan.sample, seed=plan.seed)
        numbers.append(offsets + unit * plan.rows_per_unit)
        values.append(rows[offsets])
    return np.concatenate(numbers), np.concatenate(values)


@pytest.mark.parametrize(
    "settings",
    [
        {"rate": 0.4, "seed": 3},
        {"rate": 0.02, "seed": 1},
        {"rate": 0.4, "seed": 3, "dtype": "bfloat16", "compute_dtype": "bfloat16", "codec": "lz4"},
        {"rate": 0.5, "dtype": "int8", "compute_dtype": "bfloat16"},
        {"dtype": "int8"},
    ],
    ids=str,
)
def test_what_is_stored(store, tokenization, settings):
    kind = KeptRun(store, "r", tokenization, **settings)
    run = kind.finish()
    for name in HOOK_POINTS:
        numbers, values = stored_numbers(run, kind, name)
        assert run.n_rows == len(numbers) < tokenization.n_rows or "rate" not in settings
        acts = run.activations(name)
        found = acts[numbers]
        assert len(acts) == len(numbers)
        if kind.plan.int8 is None:
            np.testing.assert_array_equal(found, values)
        else:
            transform = kind.plan.int8[name]
            np.testing.assert_array_equal(found, dequantise(quantise(values, transform), transform))
            assert np.abs(found - values).max() < 0.1
        stats = run.stats(name)
        assert stats.n_rows == len(numbers)
        np.testing.assert_allclose(stats.mean, found.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(stats.max, found.max(axis=0))
    if settings.get("rate") == 0.02:
        assert min(u.rows for u in run.collection.units.values()) == 0
    assert fsck(store.storage, deep=True).is_clean


def test_counts_and_times(store, tokenization):
    """What a job's balance is made of: rows read and computed are the tokenization's, rows stored are those kept."""
    kind = KeptRun(store, "r", tokenization, rate=0.4, keep=("dense", "pooled"))
    for unit in tokenization.units:
        written = kind.write(unit.unit)
        assert written.rows_read == written.rows_forwarded == unit.rows
        offsets = kept_offsets(unit.unit, unit.rows, rows_per_unit=kind.plan.rows_per_unit, rate=0.4, seed=0)
        assert written.rows == len(offsets)
        assert written.nbytes == sum(o.nbytes for o in written.objects)
        assert written.timings_s.keys() == {"read", "forward", "pool", "statistics", "encode", "write"}
        assert all(seconds >= 0 for seconds in written.timings_s.values())
        assert written.timings_s["write"] > 0


@pytest.mark.parametrize(
    "settings", [{}, {"rate": 0.5}, {"dtype": "int8"}, {"rate": 0.5, "dtype": "int8"}], ids=str
)
def test_adopted_shards(store, tokenization, settings):
    """What an earlier attempt left behind is kept, and described as what it is: error and statistics are of its rows."""
    off = 0.25

    def value(tokens, width):
        return kept.activations(tokens, width) + np.float32(off)

    earlier = KeptRun(store, "r", tokenization, value=value, **settings)
    for unit in tokenization.units:
        earlier.write(unit.unit)  # its commit never came
    off = 0.0
    kind = KeptRun(store, "r", tokenization, **settings)
    run = kind.finish()
    for name in HOOK_POINTS:
        numbers, fresh = stored_numbers(run, kind, name)
        found = run.activations(name)[numbers]
        assert np.abs(found - fresh - 0.25).max() < 0.1
        stats = run.stats(name)
        np.testing.assert_allclose(stats.mean, found.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-6)
        if "dtype" in settings:
            error = stats.int8_error
            difference = found.astype(np.float64) - fresh
            assert error.n_values == fresh.size
            np.testing.assert_allclose(error.squared_error, (difference**2).sum(), rtol=1e-9)
            np.testing.assert_allclose(error.largest, np.abs(difference).max(), rtol=1e-9)
    assert fsck(store.storage, deep=True).is_clean


@pytest.mark.parametrize("was_finite", [True, False])
def test_adopted_int8_rows_of_which_others_are_finite(store, tokenization, was_finite):
    """The error of int8 compares what is finite on both sides, and is a number."""
    is_broken = not was_finite

    def value(tokens, width):
        rows = kept.activations(tokens, width)
        if is_broken:
            rows[3, 2] = np.nan
        return rows

    earlier = KeptRun(store, "r", tokenization, value=value, dtype="int8", nonfinite="mask")
    for unit in tokenization.units:
        earlier.write(unit.unit)
    is_broken = was_finite
    run = KeptRun(store, "r", tokenization, value=value, dtype="int8", nonfinite="mask").finish()
    for name, width in HOOK_POINTS.items():
        stats = run.stats(name)
        n_broken = len(tokenization.units)
        assert stats.nonfinite == (0 if was_finite else n_broken * width)
        assert stats.int8_error.n_values == (tokenization.n_rows - n_broken) * width
        assert stats.int8_error.largest < 0.1
        assert stats.int8_error.relative < 0.01


def test_adopted_int8_rows_that_overflow_are_refused(store, tokenization):
    """A foreign row may have a finite scale and still be read with an infinity."""
    kind = KeptRun(store, "r", tokenization, dtype="int8")
    unit = kind.write(0)
    (shard,) = [o for o in unit.objects if "/embed/c/" in o.key]
    spec, transform = kind.plan.specs["embed"], kind.plan.int8["embed"]
    rows = decode_shard(spec, store.storage.get(shard.key), n_rows=unit.rows, key=shard.key)
    rows[5, 1] = 127
    rows[5, -4:] = np.array([3e38], "<f4").view(np.int8)
    assert np.isinf(dequantise(rows[5:6], transform)).any()
    store.storage.delete(shard.key)
    store.storage.put_new(shard.key, encode_shard(spec, rows).buffers)
    with pytest.raises(InvalidInputError, match="activations of 'embed' in 1 rows") as caught:
        kind.write(0)
    assert caught.value.kind is ErrorKind.NON_FINITE


@pytest.mark.parametrize("settings", [{"rate": 0.1}, {"dtype": "int8"}, {"keep": ("pooled",)}, {}], ids=str)
def test_nothing_is_written_of_a_refused_unit(store, tokenization, settings):
    """The policy is about what the model computes: also of rows that a sample would not keep."""

    def value(tokens, width):
        rows = kept.activations(tokens, width)
        if width == 20:
            rows[-1, 3] = np.inf
        return rows

    kind = KeptRun(store, "r", tokenization, value=value, **settings)
    unit = tokenization.units[1]
    with pytest.raises(
        InvalidInputError, match=r"1 activations of 'layers.0.resid_post' in 1 rows"
    ) as caught:
        kind.write(unit.unit)
    assert caught.value.kind is ErrorKind.NON_FINITE
    assert f"documents {unit.meta['last_doc']})" in str(caught.value)
    assert list(store.storage.list("runs/")) == []


def test_several_shards_of_which_one_is_adopted():
    """Within a hook point too: own rows and adopted ones are told apart shard by shard."""
    spec = ShardSpec(rows_per_shard=16, rows_per_chunk=8, d_model=8, dtype="int8", codec="hot")
    transform = fit_int8(np.zeros(8), np.ones(8))
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((50, 8)).astype(np.float32)
    storage = MemoryStorage(f"kinds-{next(COUNT)}")

    def store(captured):
        return store_rows(
            storage, spec, captured, "float32", key=lambda j: f"runs/r/embed/c/{j}/0", kept=None,
            transform=transform, spent={"encode": 0.0, "write": 0.0},
        )  # fmt: skip

    first = store(rows)
    assert store(rows).objects == first.objects
    storage.delete("runs/r/embed/c/0/0")
    storage.delete("runs/r/embed/c/3/0")
    moved = rows + np.float32(0.5)
    second = store(moved)
    expected = quantise(rows, transform)
    expected[:16], expected[48:] = quantise(moved[:16], transform), quantise(moved[48:], transform)
    np.testing.assert_array_equal(second.rows, expected)
    assert [o.sha256 == f.sha256 for o, f in zip(second.objects, first.objects, strict=True)] == [
        False,
        True,
        True,
        False,
    ]
    assert isinstance(second.error, Int8Error)
    difference = dequantise(expected, transform).astype(np.float64) - moved
    np.testing.assert_allclose(second.error.squared_error, (difference**2).sum(), rtol=1e-9)


def test_covariance(store, tokenization):
    """Of every unit, merged at the seal; before that a reader merges."""
    kind = KeptRun(store, "c", tokenization, covariance=True, rate=0.6, dtype="int8")
    for sealed in (False, True):
        run = kind.finish(seal=sealed)
        for name, width in HOOK_POINTS.items():
            numbers, _ = stored_numbers(run, kind, name)
            found = run.covariance(name)
            assert found.n == len(numbers)
            acts = run.activations(name)[numbers].astype(np.float64)
            np.testing.assert_allclose(found.covariance, np.cov(acts.T, bias=True), rtol=1e-9, atol=1e-9)
            assert found.covariance.shape == (width, width)
    seal = [o.key for o in run.collection.seal.objects if "/covariance/" in o.key]
    assert len(seal) == len(HOOK_POINTS)
