"""Reading any rows of any run in any way gives the rows that were written."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.activations import Activations
from actstore.codec.spec import CODECS, ShardSpec
from actstore.dtypes import STORED_DTYPES, to_float32
from actstore.errors import ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.log.values import StoredObject, Unit
from actstore.storage.memory import MemoryStorage
from actstore.testing.runs import addressed_rows, make_run

HOOKS = ("embed", "layers.0.resid_post")
SPEC = ShardSpec(32, 8, 24, "bfloat16", "hot")
UNIT_ROWS = {0: 64, 1: 33, 3: 61, 4: 5}
EXISTING = np.concatenate([64 * unit + np.arange(n) for unit, n in UNIT_ROWS.items()])


@pytest.fixture
def acts(storage):
    run = make_run(storage, spec=SPEC, rows_per_unit=64, unit_rows=UNIT_ROWS, hook_points=HOOKS)
    return Activations(storage, run, HOOKS[1])


def stored_truth(rows, spec=SPEC, salt=1):
    return addressed_rows(np.asarray(rows), spec.d_model, spec.dtype, salt=salt)


def truth(rows):
    return to_float32(stored_truth(rows), "bfloat16")


@st.composite
def runs(draw):
    rows_per_chunk = draw(st.sampled_from([1, 2, 3, 4, 8]))
    rows_per_shard = rows_per_chunk * draw(st.integers(1, 4))
    rows_per_unit = rows_per_shard * draw(st.integers(1, 3))
    d_model = draw(st.sampled_from([1, 5, 16, 600]))
    spec = ShardSpec(
        rows_per_shard,
        rows_per_chunk,
        d_model,
        draw(st.sampled_from(STORED_DTYPES)),
        draw(st.sampled_from(tuple(CODECS))),
    )
    unit_rows = draw(
        st.dictionaries(st.integers(0, 5), st.integers(1, rows_per_unit), min_size=1, max_size=4)
    )
    return spec, rows_per_unit, unit_rows, draw(st.booleans())


@settings(max_examples=120, deadline=None)
@given(run=runs(), data=st.data())
def test_any_request_of_any_run(run, data):
    spec, rows_per_unit, unit_rows, with_sums = run
    storage = MemoryStorage("any-request")
    for key in list(storage.list("")):
        storage.delete(key)
    collection = make_run(
        storage,
        spec=spec,
        rows_per_unit=rows_per_unit,
        unit_rows=unit_rows,
        hook_points=HOOKS,
        with_sums=with_sums,
    )
    existing = np.concatenate(
        [rows_per_unit * unit + np.arange(unit_rows[unit]) for unit in sorted(unit_rows)]
    )
    memory = data.draw(st.sampled_from([1, 10_000, 1 << 20]))
    for salt, hook in enumerate(HOOKS):
        acts = Activations(storage, collection, hook, memory_bytes=memory)

        def check(found, rows, salt=salt):
            assert found.tobytes() == stored_truth(rows, spec, salt).tobytes()

        assert acts.shape == (len(existing), spec.d_model)
        assert [row for low, high in acts.row_ranges for row in range(low, high)] == existing.tolist()
        wanted = existing[data.draw(st.lists(st.integers(0, len(existing) - 1), max_size=40))]
        check(acts.read(wanted, dtype="stored"), wanted)
        low, high = sorted(data.draw(st.tuples(*[st.integers(0, int(existing[-1]) + 3)] * 2)))
        step = data.draw(st.integers(1, 4))
        inside = np.intersect1d(existing, np.arange(low, high, step))
        check(acts.read(slice(low, high, step), dtype="stored"), inside)
        batch_rows = data.draw(st.integers(1, 2 * spec.rows_per_shard))
        scanned = [
            (rows.copy(), values.copy())
            for rows, values in acts.scan(batch_rows, start=low, stop=high, dtype="stored")
        ]
        inside = existing[(existing >= low) & (existing < high)]
        assert np.concatenate([np.empty(0, int), *(rows for rows, _ in scanned)]).tolist() == inside.tolist()
        assert all(len(rows) <= batch_rows for rows, _ in scanned)
        for rows, values in scanned:
            check(values, rows)


def test_what_an_int_a_slice_and_a_list_give(acts):
    assert acts.dtype == np.float32
    assert acts.stored_dtype == "bfloat16"
    assert acts[70].shape == (24,)
    assert np.array_equal(acts[70], truth([70])[0])
    assert np.array_equal(acts[np.int32(70)], acts[70])
    assert np.array_equal(acts[90:200], truth([*range(90, 97), *range(192, 200)]))
    assert np.array_equal(acts[60:200:9], truth([60, 69, 78, 87, 96, 195]))
    assert np.array_equal(acts[[260, 3, 3, 192]], truth([260, 3, 3, 192]))
    assert acts[[]].shape == (0, 24)
    assert acts[100:150].shape == (0, 24)
    assert acts[1000:].shape == (0, 24)
    assert np.array_equal(np.asarray(acts), truth(EXISTING))
    assert len(acts) == 163
    assert acts.row_ranges == [(0, 97), (192, 253), (256, 261)]


@pytest.mark.parametrize("row", [-1, 97, 128, 191, 253, 261, 10**9])
def test_rows_that_do_not_exist_are_named(acts, row):
    with pytest.raises(NotFoundError, match=rf"row {row} .*\[0, 97\), \[192, 253\), \[256, 261\)") as error:
        acts[[3, row, -7]]
    assert error.value.kind is ErrorKind.ROW_NOT_FOUND
    with pytest.raises(KeyError):
        acts[row]


@pytest.mark.parametrize(
    "rows",
    [
        slice(-3, None),
        slice(None, -1),
        slice(None, None, -1),
        slice(0, 5, 0),
        slice(0.5, 2),
        1.5,
        [0.5],
        [[1]],
        "a",
        None,
    ],
)
def test_what_is_no_rows(acts, rows):
    with pytest.raises(InvalidInputError):
        acts[rows]


def test_a_boolean_mask_is_not_rows(acts):
    with pytest.raises(InvalidInputError, match="flatnonzero"):
        acts[np.ones(163, bool)]
    with pytest.raises(InvalidInputError):
        acts[True]


def test_out_is_filled(acts):
    out = np.empty((2, 24), np.float32)
    assert acts.read([5, 4], out=out) is out
    assert np.array_equal(out, truth([5, 4]))
    stored = np.empty((64, 24), np.uint16)
    assert acts.read(slice(0, 64), dtype="stored", out=stored) is stored
    assert np.array_equal(stored, stored_truth(range(64)))
    for bad in (np.empty((3, 24), np.float32), np.empty((2, 24)), np.empty((24, 2), np.float32).T):
        with pytest.raises(InvalidInputError, match="out has"):
            acts.read([5, 4], out=bad)


@pytest.mark.parametrize("codec", CODECS)
def test_columns_and_units_of_a_scan(storage, codec):
    spec = ShardSpec(32, 8, 24, "float16", codec)
    acts = Activations(
        storage, make_run(storage, spec=spec, rows_per_unit=64, unit_rows=UNIT_ROWS), "layers.0.resid_post"
    )
    rows, values = (
        np.concatenate(part) for part in zip(*acts.scan(10, columns=[7, 0, 7], units={1, 3, 9}), strict=True)
    )
    assert rows.tolist() == [*range(64, 97), *range(192, 253)]
    assert values.dtype == np.float32
    assert np.array_equal(values, stored_truth(rows, spec, 0)[:, [7, 0, 7]].astype(np.float32))


@pytest.mark.parametrize(
    "bad", [{"batch_rows": 0}, {"columns": [24]}, {"columns": [-1]}, {"columns": [True]}, {"dtype": "f8"}]
)
def test_bad_scans_are_refused_at_once(acts, bad):
    with pytest.raises(InvalidInputError):
        acts.scan(**bad)


def test_batches_that_are_kept_keep_their_values(acts):
    kept = list(acts.scan(4))
    for rows, values in kept:
        assert np.array_equal(values, truth(rows))


def test_it_pickles(acts):
    again = pickle.loads(pickle.dumps(acts))
    assert np.array_equal(again[[3, 260]], truth([3, 260]))


def test_a_hook_point_that_was_not_captured(storage):
    run = make_run(storage, spec=SPEC, rows_per_unit=64, unit_rows={0: 3})
    with pytest.raises(NotFoundError, match=r"'final_norm'.*layers\.0\.resid_post") as error:
        Activations(storage, run, "final_norm")
    assert error.value.kind is ErrorKind.HOOK_POINT_NOT_FOUND


def test_a_run_without_units(storage):
    acts = Activations(
        storage, make_run(storage, spec=SPEC, rows_per_unit=64, unit_rows={}), "layers.0.resid_post"
    )
    assert acts.shape == (0, 24)
    assert list(acts.scan()) == []
    assert list(acts.shuffled()) == []
    assert acts[:].shape == (0, 24)
    with pytest.raises(NotFoundError, match="none yet"):
        acts[0]


def test_all_rows_are_not_an_array_by_accident(memory):
    """A run of 16 GiB, of which only the manifest exists."""
    spec = ShardSpec(2**20, 64, 4096, "float32", "hot")
    run = make_run(memory(), spec=spec, rows_per_unit=2**20, unit_rows={})
    shard = StoredObject("runs/r/layers.0.resid_post/c/0/0", 2**34, "0" * 64)
    acts = Activations(
        memory(), replace(run, units={0: Unit(0, 2**20, 0, "a" * 32, (shard,), {}, 1)}), "layers.0.resid_post"
    )
    with pytest.raises(InvalidInputError, match="scan") as error:
        np.asarray(acts)
    assert error.value.kind is ErrorKind.TOO_LARGE


def broken(storage, **changes):
    run = make_run(storage, spec=SPEC, rows_per_unit=64, unit_rows={0: 40})
    return replace(run, config={**run.config, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"rows_per_unit": 48},
        {"rows_per_unit": 32},
        {"rows_per_unit": "x"},
        {"dtype": "float64"},
        {"codec": "pickle"},
        {"rows_per_shard": {}},
        {"rows_per_chunk": {"layers.0.resid_post": 5}},
        {"hook_points": [{"name": "layers.0.resid_post"}]},
    ],
)
def test_a_manifest_that_contradicts_itself(storage, changes):
    with pytest.raises(FormatError) as error:
        Activations(storage, broken(storage, **changes), "layers.0.resid_post")
    assert error.value.kind is ErrorKind.INVARIANT_BROKEN
