"""Any request of runs that keep a sample, of int8 runs and of both gives what a plain computation gives."""

import itertools
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.activations import Activations
from actstore.codec.spec import CODECS, ShardSpec
from actstore.dtypes import STORED_DTYPES, to_float32
from actstore.errors import ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.int8 import Int8Transform
from actstore.sampling import Sample, row_hashes
from actstore.storage.local import LocalStorage
from actstore.storage.memory import MemoryStorage
from actstore.testing.runs import addressed_rows, addressed_transform, make_run
from actstore.torch_dataset import make_torch_dataset

HOOK = "layers.0.resid_post"
HOOKS = ("embed", HOOK)
SAMPLE = Sample(0.3, 11)
UNIT_ROWS = {0: 128, 1: 121, 2: 97, 4: 5, 5: 1}
SPEC = ShardSpec(16, 8, 12, "int8", "hot")


def kept(unit_rows, rows_per_unit, sample):
    """Row numbers that exist, by the rule of FORMAT.md and nothing else."""
    rows = np.concatenate(
        [np.empty(0, np.int64), *(rows_per_unit * u + np.arange(unit_rows[u]) for u in sorted(unit_rows))]
    )
    if sample is None:
        return rows
    hashes = row_hashes(rows, sample.seed).tolist()
    return rows[[h < sample.rate * 2.0**64 for h in hashes]]


def stored_truth(rows, spec, salt=0):
    return addressed_rows(np.asarray(rows), spec.d_model, spec.dtype, salt=salt)


def truth(rows, spec, salt=0):
    stored = stored_truth(rows, spec, salt)
    if spec.dtype != "int8":
        return to_float32(stored, spec.dtype)
    transform = addressed_transform(spec.d_model, salt=salt)
    scales = np.frombuffer(stored[:, spec.d_model :].tobytes(), "<f4").astype(np.float64)
    steps = (stored[:, : spec.d_model] * scales[:, None]).astype(np.float32).astype(np.float64)
    grown = (steps * 2.0 ** transform.exponent.astype(np.float64)).astype(np.float32).astype(np.float64)
    return (grown + transform.mean.astype(np.float64)).astype(np.float32)


def joined(batches):
    """Rows and values of batches, in order."""
    parts = [(np.array(rows), np.array(values)) for rows, values in batches]
    return [np.concatenate(part) for part in zip(*parts, strict=True)] if parts else [np.empty(0, int)] * 2


@st.composite
def runs(draw):
    rows_per_chunk = draw(st.sampled_from([1, 2, 3, 4, 8]))
    rows_per_shard = rows_per_chunk * draw(st.integers(1, 4))
    d_model = draw(st.sampled_from([1, 5, 16, 300]))
    dtype = draw(st.sampled_from(["int8", "int8", "int8", *STORED_DTYPES]))
    spec = ShardSpec(rows_per_shard, rows_per_chunk, d_model, dtype, draw(st.sampled_from(tuple(CODECS))))
    sample = None
    rows_per_unit = rows_per_shard * draw(st.integers(1, 3))
    if draw(st.booleans()):
        sample = Sample(draw(st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0])), draw(st.integers(0, 2**64 - 1)))
        rows_per_unit = draw(st.integers(1, 60))
    units = st.dictionaries(st.integers(0, 5), st.integers(1, rows_per_unit), min_size=1, max_size=4)
    return spec, rows_per_unit, draw(units), sample, draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(run=runs(), data=st.data())
def test_any_request_of_any_run(run, data):
    spec, rows_per_unit, unit_rows, sample, with_sums = run
    storage = MemoryStorage("any-sampled-request")
    for key in list(storage.list("")):
        storage.delete(key)
    collection = make_run(
        storage, spec=spec, rows_per_unit=rows_per_unit, unit_rows=unit_rows, hook_points=HOOKS, with_sums=with_sums,
        sample=sample,
    )  # fmt: skip
    existing = kept(unit_rows, rows_per_unit, sample)
    assert collection.rows == len(existing)
    memory = data.draw(st.sampled_from([1, 10_000, 1 << 20]))
    bound = rows_per_unit * 6 + 3
    for salt, hook in enumerate(HOOKS):
        acts = Activations(storage, collection, hook, memory_bytes=memory)
        assert acts.shape == (len(existing), spec.d_model)
        assert acts.rows().tolist() == existing.tolist()
        everything = np.arange(-2, bound)
        assert acts.exist(everything).tolist() == np.isin(everything, existing).tolist()
        for dtype, true in (("float32", truth), ("stored", stored_truth)):
            values = true(existing, spec, salt)
            at = data.draw(st.lists(st.integers(0, len(existing) - 1), max_size=30)) if len(existing) else []
            assert acts.read(existing[at], dtype=dtype).tobytes() == values[at].tobytes()
            low, high = sorted(data.draw(st.tuples(*[st.integers(0, bound)] * 2)))
            step = data.draw(st.integers(1, 4))
            inside = np.isin(existing, np.arange(low, high, step))
            assert acts.read(slice(low, high, step), dtype=dtype).tobytes() == values[inside].tobytes()
            between = (existing >= low) & (existing < high)
            assert acts.rows(low, high).tolist() == existing[between].tolist()
            columns = data.draw(st.none() | st.lists(st.integers(0, values.shape[1] - 1), max_size=4))
            batch_rows = data.draw(st.integers(1, 2 * spec.rows_per_shard))
            batches = list(acts.scan(batch_rows, start=low, stop=high, dtype=dtype, columns=columns))
            assert all(len(rows) <= batch_rows for rows, _ in batches)
            rows, found = joined(batches)
            assert rows.tolist() == existing[between].tolist()
            wanted = values[between] if columns is None else values[between][:, columns]
            assert found.tobytes() == wanted.tobytes()


def make(storage, **changes):
    options = {"spec": SPEC, "rows_per_unit": 128, "unit_rows": UNIT_ROWS, "sample": SAMPLE, **changes}
    return make_run(storage, **options)


@pytest.fixture
def acts(storage):
    return Activations(storage, make(storage), HOOK)


EXISTING = kept(UNIT_ROWS, 128, SAMPLE)


def test_what_a_sampled_int8_run_says_of_itself(acts):
    assert acts.sample_rate == 0.3
    assert "a sample of 0.3" in repr(acts)
    assert (acts.dtype, acts.stored_dtype) == (np.float32, "int8")
    assert acts.shape == (len(EXISTING), 12)
    assert acts.read([EXISTING[3]], dtype="stored").shape == (1, 16)
    assert acts[int(EXISTING[3])].tobytes() == truth(EXISTING[3:4], SPEC).tobytes()
    assert np.asarray(acts).tobytes() == truth(EXISTING, SPEC).tobytes()
    units = [EXISTING[unit == EXISTING // 128] for unit in np.unique(EXISTING // 128)]
    assert acts.row_ranges == [(rows[0], rows[-1] + 1) for rows in units]
    assert all(acts.exist([low, high - 1]).all() for low, high in acts.row_ranges)
    assert acts.layout.stored_rows_per_unit == 48


def test_rows_that_were_not_sampled_are_named(acts):
    absent = sorted(set(range(128)) - set(EXISTING.tolist()))
    row = absent[3]
    with pytest.raises(
        NotFoundError, match=rf"row {row} was not sampled: .* stores 0.3 of all rows"
    ) as error:
        acts[[int(EXISTING[0]), row, -1]]
    assert error.value.kind is ErrorKind.ROW_NOT_FOUND
    with pytest.raises(KeyError):
        acts[row]
    # Whether a row past a unit's end would have been kept or not: it is not there.
    for row in [*range(249, 256), 384, 500, -1, 10**9]:
        with pytest.raises(NotFoundError, match=rf"row {row} "):
            acts[row]
    with pytest.raises(NotFoundError, match=r"sample is stored of the rows \[0, 384\), \[512, 768\)"):
        acts[400]


def test_only_the_units_asked_for_are_hashed(memory):
    """A run of 100,000 units, of which only the manifest exists."""
    storage = memory()
    run = make(storage, unit_rows={0: 128})
    acts = Activations(storage, run, HOOK)
    layout = acts.layout
    unit = layout.units[0]
    many = tuple(replace(unit, unit=number, n_rows=20) for number in range(100_000))
    huge = replace(layout, units=many)
    tracemalloc.start()
    found = huge.existing(128 * 77_777, 128 * 77_779)
    assert found[0] >= 128 * 77_777
    assert huge.exist(found).sum() == len(found) > 20
    assert huge.places(found[:1]).tolist() == [77_777 * layout.stored_rows_per_unit]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A few bytes a unit for a moment, and the offsets of no unit that was not asked for.
    assert peak < 10 << 20


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sample", [None, SAMPLE])
def test_shuffled_rows_are_every_row_once(storage, codec, sample):
    spec = replace(SPEC, codec=codec, rows_per_shard=64)
    acts = Activations(storage, make(storage, spec=spec, sample=sample), HOOK)
    existing = kept(UNIT_ROWS, 128, sample)
    shuffled = acts.shuffled(20, seed=3, buffer_bytes=400)
    orders = []
    for dtype, expected in (("float32", truth), ("stored", stored_truth)):
        rows, values = joined(acts.shuffled(20, seed=3, buffer_bytes=400, dtype=dtype))
        assert values.tobytes() == expected(rows, spec).tobytes()
        assert sorted(rows.tolist()) == existing.tolist()
        orders.append(rows.tolist())
    assert orders[0] == orders[1] != existing.tolist()
    first = [rows.tolist() for rows, _ in itertools.islice(shuffled, 2)]
    again = acts.shuffled(20, seed=3, buffer_bytes=400)
    again.load_state(shuffled.state())
    rest = [rows.tolist() for rows, _ in again]
    assert list(itertools.chain(*first, *rest)) == orders[0]


def test_a_torch_dataset_gives_dequantised_rows(tmp_path):
    storage = LocalStorage(tmp_path)
    acts = Activations(storage, make(storage), HOOK)
    dataset = make_torch_dataset(acts, batch_rows=25, seed=1)
    seen = []
    for rows, values in dataset:
        assert values.numpy().tobytes() == truth(rows.numpy(), SPEC).tobytes()
        seen += rows.tolist()
    assert sorted(seen) == EXISTING.tolist()


def test_it_pickles(acts):
    again = pickle.loads(pickle.dumps(acts))
    assert again[EXISTING[::9]].tobytes() == truth(EXISTING[::9], SPEC).tobytes()


def test_out_has_the_width_of_what_is_asked(acts):
    out = np.empty((2, 12), np.float32)
    assert acts.read(EXISTING[:2], out=out) is out
    assert out.tobytes() == truth(EXISTING[:2], SPEC).tobytes()
    stored = np.empty((len(EXISTING), 16), np.int8)
    assert acts.read(slice(None), dtype="stored", out=stored) is stored
    assert stored.tobytes() == stored_truth(EXISTING, SPEC).tobytes()
    with pytest.raises(InvalidInputError, match="out has"):
        acts.read(EXISTING[:2], dtype="stored", out=np.empty((2, 12), np.int8))
    with pytest.raises(InvalidInputError, match="columns"):
        acts.scan(columns=[12])
    assert next(iter(acts.scan(columns=[15], dtype="stored")))[1].shape[1] == 1


def read_all_ways(acts, only):
    ways = {
        "slice": lambda: [(EXISTING, acts.read(slice(None)))],
        "rows": lambda: [(EXISTING[::-1], acts.read(EXISTING[::-1]))],
        "scan": lambda: [(rows, values.copy()) for rows, values in acts.scan(3)],
        "shuffled": lambda: list(acts.shuffled(5, buffer_bytes=60)),
    }
    rows, values = joined(list(ways.values())[only % 4]())
    assert sorted(rows.tolist()) == EXISTING.tolist()
    assert values.tobytes() == truth(rows, SPEC).tobytes()


def error_of(call):
    """The FormatError that a call ends with, None if it gave the right rows."""
    try:
        call()
    except FormatError as error:
        return error
    return None


@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("codec", ["hot", "lz4"])
def test_every_flipped_bit_of_an_int8_shard_is_noticed_or_harmless(memory, codec, with_sums):
    storage = memory()
    spec = replace(SPEC, codec=codec)
    run = make(storage, spec=spec, with_sums=with_sums)
    key = f"runs/r/{HOOK}/c/1/0"
    good = storage.get(key)
    for only in range(4):
        read_all_ways(Activations(storage, run, HOOK), only)
    noticed = 0
    for bit in range(0, 8 * len(good), 3):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        storage.put_hint(key, bytes(bad))
        error = error_of(lambda: read_all_ways(Activations(storage, run, HOOK), bit))  # noqa: B023
        if error is not None:
            assert error.kind is ErrorKind.OBJECT_DAMAGED
            assert key in error.message
            noticed += 1
    # The checksums between hot chunks need not be looked at: the sums say more.
    assert noticed > 0.9 * len(range(0, 8 * len(good), 3))


GOOD = addressed_transform(12).to_json()


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"int8": None},
        {"int8": {}},
        {"int8": {HOOK: None}},
        {"int8": {HOOK: {"mean": GOOD["mean"]}}},
        {"int8": {HOOK: {**GOOD, "mean": GOOD["mean"][:-8]}}},
        {"int8": {HOOK: {**GOOD, "exponent": "!"}}},
        {"int8": {HOOK: addressed_transform(11).to_json()}},
        {"int8": {HOOK: Int8Transform(np.full(12, np.nan, np.float32), np.zeros(12, np.int8)).to_json()}},
        {"int8": {HOOK: Int8Transform(np.zeros(12, np.float32), np.full(12, 127, np.int8)).to_json()}},
    ],
)
def test_a_missing_or_bad_transform(memory, info):
    storage = memory()
    run = make(storage)
    with pytest.raises(FormatError, match="does not describe hook point") as error:
        Activations(storage, replace(run, info=info), HOOK)
    assert error.value.kind is ErrorKind.INVARIANT_BROKEN


@pytest.mark.parametrize(
    "changes",
    [
        {"sample": None},
        {"sample": {"rate": 0.3}},
        {"sample": {"rate": 0, "seed": 1}},
        {"sample": {"rate": 0.3, "seed": -1}},
        {"stored_rows_per_unit": 0},
        {"stored_rows_per_unit": 24},
        {"stored_rows_per_unit": "x"},
    ],
)
def test_a_manifest_that_contradicts_itself(memory, changes):
    storage = memory()
    run = make(storage)
    with pytest.raises(FormatError) as error:
        Activations(storage, replace(run, config={**run.config, **changes}), HOOK)
    assert error.value.kind is ErrorKind.INVARIANT_BROKEN


def test_more_rows_than_places(memory):
    storage = memory()
    run = make(storage)
    with pytest.raises(FormatError, match="units have at most"):
        Activations(storage, replace(run, config={**run.config, "stored_rows_per_unit": 16}), HOOK)


def test_more_rows_than_a_full_unit_keeps(memory):
    """Then row numbers and stored rows would not go together: no answer is given."""
    storage = memory()
    run = make_run(storage, spec=SPEC, rows_per_unit=128, unit_rows={0: 128}, sample=SAMPLE)
    stored = run.units[0].rows
    run = replace(run, config={**run.config, "sample": {**run.config["sample"], "rate": 0.29}})
    acts = Activations(storage, run, HOOK)
    assert len(kept({0: 128}, 128, Sample(0.29, 11))) < stored == len(acts)
    for call in (
        lambda: acts.rows(5),
        lambda: acts.row_ranges,
        lambda: list(acts.scan()),
        lambda: list(acts.shuffled()),
    ):
        with pytest.raises(FormatError, match="of a full unit") as caught:
            call()
        assert caught.value.kind is ErrorKind.INVARIANT_BROKEN


def test_a_run_of_pooled_vectors_has_no_rows(memory):
    storage = memory()
    run = make(storage)
    for keep, found in ((["pooled"], "pooled vectors only"), (["codes"], "codes only"), ([], "nothing")):
        with pytest.raises(InvalidInputError, match=f"keeps {found}") as error:
            Activations(storage, replace(run, config={**run.config, "keep": keep}), HOOK)
        assert error.value.kind is ErrorKind.BAD_ARGUMENT
    assert len(Activations(storage, replace(run, config={**run.config, "keep": ["dense", "pooled"]}), HOOK))
