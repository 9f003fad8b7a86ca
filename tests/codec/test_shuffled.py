import itertools
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.activations import Activations
from actstore.codec.spec import CODECS, ShardSpec
from actstore.errors import InvalidInputError
from actstore.shuffled import plan_shuffle
from actstore.storage.local import LocalStorage
from actstore.testing.runs import addressed_rows, make_run
from actstore.torch_dataset import make_torch_dataset

HOOK = "layers.0.resid_post"
SPEC = ShardSpec(64, 8, 12, "float16", "hot")
UNIT_ROWS = {0: 128, 1: 121, 2: 97, 4: 5}
EXISTING = np.concatenate([128 * unit + np.arange(n) for unit, n in UNIT_ROWS.items()])
OPTIONS = {"batch_rows": 30, "seed": 5, "buffer_bytes": 1500}


@pytest.fixture
def acts(storage):
    return Activations(storage, make_run(storage, spec=SPEC, rows_per_unit=128, unit_rows=UNIT_ROWS), HOOK)


def epoch(shuffled):
    """One epoch's batches of rows, every number checked."""
    batches = []
    for rows, values in shuffled:
        assert values.tobytes() == addressed_rows(rows, 12, "float16").astype(values.dtype).tobytes()
        batches.append(rows.tolist())
    return batches


@pytest.mark.parametrize("codec", CODECS)
def test_an_epoch_is_every_row_once_in_a_new_order(storage, codec):
    run = make_run(storage, spec=replace(SPEC, codec=codec), rows_per_unit=128, unit_rows=UNIT_ROWS)
    shuffled = Activations(storage, run, HOOK).shuffled(**OPTIONS)
    first, second = epoch(shuffled), epoch(shuffled)
    for batches in (first, second):
        assert [len(rows) for rows in batches] == [30] * 11 + [21]
        assert sorted(itertools.chain.from_iterable(batches)) == EXISTING.tolist()
    assert first != second
    assert shuffled.n_batches == 12


def test_rows_are_mixed_across_units_and_within_chunks(acts):
    first = epoch(acts.shuffled(**{**OPTIONS, "buffer_bytes": 10**6}))[0]
    assert len({row // 128 for row in first}) >= 3
    assert len({row // 8 for row in first}) > 12


def test_the_order_is_the_same_forever():
    """Philox and SeedSequence are specified streams: this order must never change."""
    plan = plan_shuffle(np.array([8, 8, 8, 3, 8, 1]), rows_per_group=12, seed=7, epoch=2)
    assert plan.chunk_order.tolist() == [5, 2, 3, 0, 4, 1]
    assert plan.chunk_cuts.tolist() == [0, 3, 5, 6]
    assert plan.row_cuts.tolist() == [0, 12, 28, 36]


def test_the_order_does_not_depend_on_readers_memory_or_dtype(acts):
    expected = epoch(acts.shuffled(**OPTIONS))
    for n_readers in (1, 2, 7):
        assert epoch(acts.shuffled(**OPTIONS, n_readers=n_readers)) == expected
    assert epoch(acts.shuffled(**OPTIONS, dtype="stored")) == expected
    storage, run, hook, _ = acts.__reduce__()[1]
    assert epoch(Activations(storage, run, hook, memory_bytes=1).shuffled(**OPTIONS)) == expected
    assert epoch(acts.shuffled(**{**OPTIONS, "seed": 6})) != expected


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 20])
def test_workers_share_an_epoch(acts, num_workers):
    expected = epoch(acts.shuffled(**OPTIONS))
    for worker in range(num_workers):
        mine = epoch(acts.shuffled(**OPTIONS, num_workers=num_workers, worker_index=worker))
        assert mine == expected[worker::num_workers]


def test_drop_last(acts):
    assert epoch(acts.shuffled(**OPTIONS, drop_last=True)) == epoch(acts.shuffled(**OPTIONS))[:-1]


def test_resuming_anywhere_is_as_if_never_stopped(acts):
    whole = acts.shuffled(**OPTIONS)
    expected = epoch(whole) + epoch(whole)
    for stop in range(len(expected) + 1):
        first = acts.shuffled(**OPTIONS)
        seen = []
        while len(seen) < stop:
            for rows, _ in first:
                seen.append(rows.tolist())
                if len(seen) == stop:
                    break
        second = acts.shuffled(**OPTIONS, n_readers=1)
        second.load_state(json.loads(json.dumps(first.state())))
        while len(seen) < len(expected):
            seen += epoch(second)
        assert seen == expected, stop


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"batch_rows": 31}, {"buffer_bytes": 9000}, {"drop_last": True}]
)
def test_a_state_of_other_arguments_is_refused(acts, change):
    state = acts.shuffled(**{**OPTIONS, **change}).state()
    with pytest.raises(InvalidInputError, match="belongs to another shuffle"):
        acts.shuffled(**OPTIONS).load_state(state)


def test_a_state_of_other_rows_is_refused(acts, memory):
    storage = memory()
    other = make_run(storage, spec=SPEC, rows_per_unit=128, unit_rows={**UNIT_ROWS, 5: 1})
    state = Activations(storage, other, HOOK).shuffled(**OPTIONS).state()
    with pytest.raises(InvalidInputError, match="its rows is"):
        acts.shuffled(**OPTIONS).load_state(state)


@pytest.mark.parametrize(
    "change", [{"next_batch": 13}, {"next_batch": -1}, {"epoch": "0"}, {"epoch": True}, {"format": 2}]
)
def test_what_is_no_state(acts, change):
    shuffled = acts.shuffled(**OPTIONS)
    with pytest.raises(InvalidInputError):
        shuffled.load_state({**shuffled.state(), **change})
    with pytest.raises(InvalidInputError):
        shuffled.load_state({})


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_rows": 0},
        {"buffer_bytes": 0},
        {"n_readers": 0},
        {"num_workers": 0},
        {"worker_index": 1},
        {"worker_index": -1},
        {"seed": -1},
        {"seed": 1 << 63},
        {"dtype": "int8"},
    ],
)
def test_bad_arguments(acts, bad):
    with pytest.raises(InvalidInputError):
        acts.shuffled(**{**OPTIONS, **bad})


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=40),
    st.integers(1, 60),
    st.integers(0, 2**63 - 1),
    st.integers(0, 10**6),
)
def test_a_plan_is_a_partition(chunk_rows, rows_per_group, seed, epoch):
    plan = plan_shuffle(np.array(chunk_rows, np.int64), rows_per_group=rows_per_group, seed=seed, epoch=epoch)
    assert sorted(plan.chunk_order.tolist()) == list(range(len(chunk_rows)))
    assert plan.chunk_cuts[-1] == len(chunk_rows)
    sizes = np.diff(plan.row_cuts)
    groups = [
        plan.chunk_order[low:high]
        for low, high in zip(plan.chunk_cuts[:-1], plan.chunk_cuts[1:], strict=True)
    ]
    assert [sum(chunk_rows[chunk] for chunk in group) for group in groups] == sizes.tolist()
    assert all(rows_per_group <= size < rows_per_group + 9 for size in sizes[:-1])


def loaded(dataset, num_workers):
    from torch.utils.data import DataLoader

    context = "spawn" if num_workers else None
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, multiprocessing_context=context)
    batches = []
    for rows, values in loader:
        assert (
            values.numpy().tobytes()
            == addressed_rows(rows.numpy(), 12, "float16").astype(np.float32).tobytes()
        )
        batches.append(rows.tolist())
    return batches


def test_a_torch_loader_gives_the_same_batches_for_any_number_of_workers(tmp_path):
    storage = LocalStorage(tmp_path)
    acts = Activations(storage, make_run(storage, spec=SPEC, rows_per_unit=128, unit_rows=UNIT_ROWS), HOOK)
    shuffled = acts.shuffled(**OPTIONS)
    expected = epoch(shuffled)
    assert loaded(make_torch_dataset(acts, **OPTIONS), 0) == expected
    assert loaded(make_torch_dataset(acts, **OPTIONS), 2) == expected
    assert loaded(make_torch_dataset(acts, **OPTIONS, start_batch=5), 2) == expected[5:]
    assert loaded(make_torch_dataset(acts, **OPTIONS, epoch=1), 0) == epoch(shuffled)
    with pytest.raises(InvalidInputError):
        make_torch_dataset(acts, batch_rows=0)


def test_two_groups_are_held_and_no_third(storage):
    spec = ShardSpec(4096, 256, 512, "float32", "hot")
    run = make_run(storage, spec=spec, rows_per_unit=4096, unit_rows={0: 4096, 1: 4096})
    group_bytes = 1 << 20
    # Groups have 512 rows: every fifth batch spans two.
    shuffled = Activations(storage, run, HOOK).shuffled(100, seed=1, buffer_bytes=group_bytes, n_readers=1)
    for _ in shuffled:  # caches and threads' buffers exist from here on
        pass
    tracemalloc.start()
    try:
        for _ in shuffled:
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    batches = 4 * 100 * spec.row_bytes  # the caller's last one, the next one and its pieces
    assert peak < 2 * group_bytes + batches, peak
