"""The job around the model: resuming, taking over, refusing, faults and kills, without torch."""

import os
import random
import signal
import sys
import threading
import time
import traceback

import numpy as np
import pytest
import zarr

import actstore
from actstore import ConflictError, ErrorKind, InvalidInputError, NotFoundError, StorageError
from actstore.codec.encode import encode_shard
from actstore.codec.spec import ShardSpec
from actstore.ingest import run as run_ingest
from actstore.log import fsck
from actstore.storage import open_storage
from tests.ingest import synthetic


@pytest.fixture
def made(tmp_path):
    url = str(tmp_path / "store")
    return url, synthetic.make_corpus(url, tmp_path / "tokenizer")


def ingest(url, tokenizer, backend=None, **changes):
    return run_ingest(
        url, synthetic.config(tokenizer, **changes), backend=backend or synthetic.SyntheticBackend()
    )


def test_every_row_is_stored_once_and_zarr_reads_the_same(made):
    url, tokenizer = made
    report = ingest(url, tokenizer)
    store = actstore.open(url)
    synthetic.check_complete(store)
    assert report.is_complete
    assert report.rows_this_job == report.n_rows == store.run("syn").n_rows
    assert report.version == store.version
    for name, width in synthetic.HOOK_POINTS:
        array = zarr.open_array(f"{url}/{store.run('syn').array_path(name)}", mode="r")
        tokenization = store.run("syn").tokenization
        assert array.shape == (len(tokenization.units) * 64, width)
        for unit in tokenization.units:
            table = tokenization.unit_table(unit.unit)
            np.testing.assert_array_equal(
                array[unit.unit * 64 : unit.unit * 64 + unit.rows],
                synthetic.numbers(table["token_id"].to_numpy(), width),
            )
    assert fsck(store.storage, deep=True).is_clean


def test_an_unfinished_run_has_no_array_for_plain_readers(made):
    url, tokenizer = made

    def fault(unit):
        if unit == 3:
            raise InvalidInputError(ErrorKind.NON_FINITE, "planted")

    with pytest.raises(InvalidInputError, match="planted"):
        ingest(url, tokenizer, synthetic.SyntheticBackend(fault=fault))
    store = actstore.open(url)
    run = store.run("syn")
    assert not run.is_complete
    with pytest.raises(FileNotFoundError):
        zarr.open_array(f"{url}/{run.array_path('layers.1.mlp_act')}", mode="r")
    done = sorted(run.collection.units)
    assert done
    assert 3 not in done
    # What is committed can be read before the run is complete.
    table = run.tokenization.unit_table(done[0])
    acts = run.activations("layers.0.resid_post")
    np.testing.assert_array_equal(
        acts[table["row"].to_numpy()], synthetic.numbers(table["token_id"].to_numpy(), 8)
    )
    with pytest.raises(NotFoundError) as caught:
        acts[3 * 64]
    assert caught.value.kind is ErrorKind.ROW_NOT_FOUND
    report = ingest(url, tokenizer)
    assert report.units_this_job == report.n_units - len(done)
    synthetic.check_complete(actstore.open(url))


def test_running_again_changes_nothing(made):
    url, tokenizer = made
    first = ingest(url, tokenizer)
    again = ingest(url, tokenizer)
    assert again.version == first.version
    assert again.units_this_job == 0
    assert again.is_complete


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"dtype": "bf16"}, "dtype: 'float32' -> 'bfloat16'"),
        ({"codec": "lz4"}, "codec: 'hot' -> 'lz4'"),
        ({"batch_tokens": 77}, "batch_tokens: 8192 -> 77"),
        ({"window": 8}, "window: 16 -> 8"),
    ],
)
def test_another_configuration_under_the_same_name_is_refused_with_the_difference(made, change, shown):
    url, tokenizer = made
    ingest(url, tokenizer)
    before = actstore.open(url).state.collection("run", "syn")
    with pytest.raises(ConflictError) as caught:
        ingest(url, tokenizer, **change)
    assert caught.value.kind is ErrorKind.CONFIG_DIFFERS
    assert shown in str(caught.value)
    assert actstore.open(url).state.collection("run", "syn").units == before.units


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("codec", ["hot", "lz4", "cold"])
def test_dtypes_and_codecs_store_the_same_rows(made, dtype, codec):
    url, tokenizer = made
    if codec == "cold" and dtype != "bf16":
        with pytest.raises(InvalidInputError, match="cold"):
            ingest(url, tokenizer, dtype=dtype, codec=codec)
        return

    def small(token_ids, width):  # integers below 256 are exact in every type
        return (np.asarray(token_ids)[:, None] % 60 + np.arange(width)).astype(np.float32)

    ingest(url, tokenizer, synthetic.SyntheticBackend(value=small), dtype=dtype, codec=codec)
    run = actstore.open(url).run("syn")
    for unit in run.tokenization.units:
        table = run.tokenization.unit_table(unit.unit)
        got = run.activations("layers.1.mlp_act")[table["row"].to_numpy()]
        np.testing.assert_array_equal(got, small(table["token_id"].to_numpy(), 24))


def test_nonfinite_activations(made):
    url, tokenizer = made

    def poisoned(token_ids, width):
        values = synthetic.numbers(token_ids, width)
        values[5, 1] = np.nan
        values[7, 0] = np.inf
        return values

    with pytest.raises(InvalidInputError) as caught:
        ingest(url, tokenizer, synthetic.SyntheticBackend(value=poisoned))
    assert caught.value.kind is ErrorKind.NON_FINITE
    assert "2 activations of 'layers.0.resid_post'" in str(caught.value)
    report = ingest(
        url, tokenizer, synthetic.SyntheticBackend(value=poisoned), nonfinite="mask", run="masked"
    )
    run = actstore.open(url).run("masked")
    assert report.nonfinite == run.collection.nonfinite == 4 * report.n_units
    assert run.stats("layers.1.mlp_act").nonfinite == 2 * report.n_units
    assert run.stats("layers.1.mlp_act").n_finite_rows == run.n_rows - 2 * report.n_units


def test_a_refused_unit_leaves_no_shard_of_any_hook_point(made):
    url, tokenizer = made

    def poisoned(token_ids, width):
        values = synthetic.numbers(token_ids, width)
        if width == 24:  # the second hook point: the first one's rows are fine
            values[3, 2] = np.nan
        return values

    with pytest.raises(InvalidInputError, match=r"layers\.1\.mlp_act"):
        ingest(url, tokenizer, synthetic.SyntheticBackend(value=poisoned))
    assert list(open_storage(url).list("runs/")) == []


def test_an_adopted_shard_obeys_the_policy_too(made):
    url, tokenizer = made

    def fault(unit):
        raise StorageError(ErrorKind.STORAGE_FAILED, "planted")

    with pytest.raises(StorageError):
        ingest(url, tokenizer, synthetic.SyntheticBackend(fault=fault))
    run = actstore.open(url).run("syn")
    rows = np.full((run.tokenization.unit_table(0).num_rows, 8), np.inf, np.float32)
    name = "layers.0.resid_post"
    spec = ShardSpec(
        run.config["rows_per_shard"][name], run.config["rows_per_chunk"][name], 8, "float32", "hot"
    )
    open_storage(url).put_new(f"{run.array_path(name)}/c/0/0", encode_shard(spec, rows).buffers)
    with pytest.raises(InvalidInputError) as caught:
        ingest(url, tokenizer)
    assert caught.value.kind is ErrorKind.NON_FINITE
    assert 0 not in actstore.open(url).run("syn").collection.units


@pytest.mark.parametrize("name", ["stats", "sums", "c"])
def test_a_run_may_be_named_as_a_folder_of_runs(made, name):
    url, tokenizer = made
    ingest(url, tokenizer, run=name)
    store = actstore.open(url)
    synthetic.check_complete(store, name)
    tokenization = store.run(name).tokenization
    ids = np.concatenate([tokenization.unit_table(u.unit)["token_id"].to_numpy() for u in tokenization.units])
    assert store.run(name).stats("layers.0.resid_post").n_rows == len(ids)


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT: a shell that runs this in the background has the process ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_before_any_unit_runs_ends_the_job_at_once(made, interruptible):
    url, tokenizer = made

    class Interrupted(synthetic.SyntheticBackend):
        def describe(self):
            signal.raise_signal(signal.SIGINT)
            return super().describe()

    with pytest.raises(KeyboardInterrupt):
        ingest(url, tokenizer, Interrupted())
    assert actstore.open(url).runs() == []


def test_an_interrupt_while_units_run_commits_them_and_stops(made):
    url, tokenizer = made
    before = signal.getsignal(signal.SIGINT)

    def interrupt(unit):
        if unit == 1:
            os.kill(os.getpid(), signal.SIGINT)

    report = ingest(url, tokenizer, synthetic.SyntheticBackend(fault=interrupt, threads=1))
    assert not report.is_complete
    assert 1 <= report.n_units < report.n_units_planned
    assert signal.getsignal(signal.SIGINT) is before
    assert ingest(url, tokenizer).is_complete


def test_a_name_that_differs_in_case_only_is_refused_with_the_reason(made):
    url, tokenizer = made
    ingest(url, tokenizer)
    with pytest.raises(ConflictError, match="case") as caught:
        ingest(url, tokenizer, run="SYN")
    assert caught.value.kind is ErrorKind.ALREADY_EXISTS


def test_a_run_that_lacks_units_is_not_sealed(made):
    url, tokenizer = made

    class Forgetful(synthetic.SyntheticBackend):
        def commit(self, units):
            super().commit([u for u in units if u.unit != 2])

    with pytest.raises(ConflictError) as caught:
        ingest(url, tokenizer, Forgetful())
    assert caught.value.kind is ErrorKind.COUNT_DIFFERS
    run = actstore.open(url).run("syn")
    assert not run.is_complete
    with pytest.raises(FileNotFoundError):
        zarr.open_array(f"{url}/{run.array_path('layers.1.mlp_act')}", mode="r")
    assert ingest(url, tokenizer).units_this_job == 1
    synthetic.check_complete(actstore.open(url))


def test_an_older_job_is_fenced_off(made):
    url, tokenizer = made
    release, reached = threading.Event(), threading.Event()

    def stall(unit):
        if unit == 2:
            reached.set()
            release.wait(60)

    errors = []

    def old_job():
        try:
            ingest(url, tokenizer, synthetic.SyntheticBackend(fault=stall))
        except ConflictError as error:
            errors.append(error)

    old = threading.Thread(target=old_job)
    old.start()
    assert reached.wait(60)
    ingest(url, tokenizer)
    before = synthetic.content(actstore.open(url))
    release.set()
    old.join(60)
    assert [e.kind for e in errors] == [ErrorKind.FENCED]
    assert synthetic.content(actstore.open(url)) == before
    synthetic.check_complete(actstore.open(url))


def test_a_shard_left_by_an_earlier_attempt_is_adopted_or_refused(made):
    url, tokenizer = made

    def fault(unit):
        if unit == 1:
            raise StorageError(ErrorKind.STORAGE_FAILED, "planted")

    with pytest.raises(StorageError):
        ingest(url, tokenizer, synthetic.SyntheticBackend(fault=fault))
    # The same unit as another attempt might have left it: valid, with other numbers (bf16 on another GPU, say).
    run = actstore.open(url).run("syn")
    spec_rows = run.tokenization.unit_table(1).num_rows
    config = run.config
    name = "layers.0.resid_post"
    spec = ShardSpec(config["rows_per_shard"][name], config["rows_per_chunk"][name], 8, "float32", "hot")
    other = np.full((spec_rows, 8), 3.25, np.float32)
    storage = open_storage(url)
    storage.put_new(f"{run.array_path(name)}/c/1/0", encode_shard(spec, other).buffers)
    storage.put_new(f"{run.array_path('layers.1.mlp_act')}/c/1/0", [b"not a shard"])
    with pytest.raises(actstore.FormatError) as caught:
        ingest(url, tokenizer)
    assert f"{run.array_path('layers.1.mlp_act')}/c/1/0" in str(caught.value)
    storage.delete(f"{run.array_path('layers.1.mlp_act')}/c/1/0")
    ingest(url, tokenizer)
    run = actstore.open(url).run("syn")
    np.testing.assert_array_equal(run.activations(name)[64 : 64 + spec_rows], other)
    assert fsck(storage, deep=True).is_clean
    values = [run.activations(name)[s:e] for s, e in run.activations(name).row_ranges]
    np.testing.assert_allclose(
        run.stats(name).mean, np.concatenate(values).astype(np.float64).mean(axis=0), rtol=1e-12
    )


def test_store_at_an_earlier_version(made):
    url, tokenizer = made
    ingest(url, tokenizer)
    store = actstore.open(url)
    old = store.at(0)
    assert old.version == 0
    assert old.runs() == []
    assert store.at(store.version).run("syn").is_complete
    with pytest.raises(NotFoundError):
        store.at(store.version + 1)


def test_bad_requests_do_no_work(made):
    url, tokenizer = made
    version = actstore.open(url).version
    with pytest.raises(InvalidInputError, match="run name"):
        ingest(url, tokenizer, run="../x")
    with pytest.raises(NotFoundError, match="corpus"):
        ingest(url, tokenizer, corpus="nothing")
    for bad in (
        {"codec": "gzip"},
        {"dtype": "int3"},
        {"workers": 0},
        {"workers": 2},
        {"hook_points": []},
        {"window": 17},
    ):
        with pytest.raises(InvalidInputError):
            ingest(url, tokenizer, **bad)
    assert actstore.open(url).version == version


def child_ingest(url: str, tokenizer: str, seed: int) -> None:
    """Ingest in a forked process, slowly enough to be killed anywhere."""
    rng = random.Random(seed)
    backend = synthetic.SyntheticBackend(fault=lambda unit: time.sleep(rng.random() * 0.004))
    ingest(url, tokenizer, backend, commit_units=2, commit_interval_s=0.01)


def test_200_kills_lose_and_double_nothing(made, tmp_path):
    """SIGKILL at random times, resume, until 200 kills are done; every finished store equals the undisturbed one."""
    url, tokenizer = made
    ingest(url, tokenizer)
    undisturbed = synthetic.content(actstore.open(url))
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    kills = finished = 0
    seen: dict[int, str] = {}
    victim = ""
    while kills < 200:
        if not victim:
            victim = str(tmp_path / f"victim-{finished}")
            synthetic.make_corpus(victim, tmp_path / "tokenizer")
            seen = {}
        pid = os.fork()
        if pid == 0:
            try:
                child_ingest(victim, tokenizer, rng.randrange(2**32))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        deadline = time.monotonic() + rng.uniform(0.01, 0.25)
        status = None
        while time.monotonic() < deadline and status is None:
            done, code = os.waitpid(pid, os.WNOHANG)
            status = code if done else None
            time.sleep(0.002)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        else:
            assert os.waitstatus_to_exitcode(status) == 0
        store = actstore.open(victim)
        if ("run", "syn") in store.state.collections:
            units = store.run("syn").collection.units
            assert {u: units[u].attempt for u in seen} == seen, "a committed unit changed or vanished"
            seen = {u: unit.attempt for u, unit in units.items()}
            if store.run("syn").is_complete:
                assert synthetic.content(store) == undisturbed
                synthetic.check_complete(store)
                assert fsck(store.storage, deep=True).is_clean
                victim, finished = "", finished + 1
    if victim:
        ingest(victim, tokenizer)
        assert synthetic.content(actstore.open(victim)) == undisturbed
        assert fsck(open_storage(victim), deep=True).is_clean
    print(f"{kills} kills, {finished} stores finished under fire")
