"""Codes that an ingest makes of rows as they come are those of the rows it stores; run and codes live and end together."""

import threading

import numpy as np
import pytest

import actstore
from actstore.dictionary import make_dictionary
from actstore.errors import ConflictError, ErrorKind, InvalidInputError, NotFoundError, StorageError
from actstore.ingest import run as run_ingest
from actstore.ingest.committer import Committer
from actstore.ingest.dictionaries.save import save_dictionary
from actstore.ingest.encoding.encode import encode
from actstore.ingest.local_pool import LocalPool
from actstore.ingest.run_codes import take_over_run
from actstore.log import fsck
from tests.encoding.codes_host import make_writer
from tests.encoding.encoded import naive_codes
from tests.ingest import synthetic

POINTS = dict(synthetic.HOOK_POINTS)
RESID, MLP = POINTS


class CodesBackend(synthetic.SyntheticBackend):
    """The synthetic model, with dictionaries behind it as a real worker has them."""

    def start(self, store, plan):
        self._committer = Committer(store.log, store.objects, plan)
        writer = make_writer(store, plan, self.value)

        def run_unit(unit):
            self.fault(unit)
            return self.change(writer.run_unit(unit))

        self._pool = LocalPool(run_unit, threads=self.threads, interrupt=self.interrupt)
        return self._pool


def add_dictionary(store, name: str, hook_point: str, seed: int = 0, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    width = POINTS[hook_point]
    data = make_dictionary(
        {
            "W_enc": scale * rng.integers(-4, 5, (width, 30)) / 8,
            "b_enc": rng.integers(-400, 50, 30) / 8,
            "W_dec": rng.integers(-4, 5, (30, width)) / 8,
        },
        activation="topk",
        k=6,
        hook_point=hook_point,
    )
    return save_dictionary(store, name, data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keep-codes")
    url = str(folder / "store")
    tokenizer = synthetic.make_corpus(url, folder / "tokenizer")
    store = actstore.open(url)
    add_dictionary(store, "a", RESID)
    add_dictionary(store, "b", MLP, seed=1)
    add_dictionary(store, "huge", RESID, scale=1e5)
    add_dictionary(store, "huge-mlp", MLP, scale=1e5)
    return url, tokenizer


def ingest(made, run, *, backend=None, stop=None, progress=None, **changes):
    url, tokenizer = made
    settings = {"keep": ("codes",), "dictionary": ("a", "b"), **changes}
    asked = synthetic.config(tokenizer, run=run, **settings)
    return run_ingest(url, asked, backend=backend or CodesBackend(), stop=stop, progress=progress)


def units_of(url, codes):
    """Rows, meta and content of every unit, whatever the names."""
    collection = actstore.open(url).state.collection("codes", codes)
    assert collection.is_sealed
    return {
        u: (unit.rows, dict(unit.meta), tuple(o.sha256 for o in unit.objects))
        for u, unit in collection.units.items()
    }


def check_together(url, run):
    """Units of run and codes became live in the same versions, and all of them did."""
    store = actstore.open(url)
    units = store.run(run).collection.units
    assert sorted(units) == [u.unit for u in store.run(run).tokenization.units]
    for name in store.run(run).config["codes"]["dictionaries"]:
        codes = store.run(run).codes(name).collection
        assert {u: unit.version for u, unit in codes.units.items()} == {
            u: x.version for u, x in units.items()
        }
    assert not fsck(store.storage, deep=True).problems


def test_only_codes_are_stored_and_they_are_those_of_the_rows(made):
    url, _ = made
    report = ingest(made, "only")
    assert report.is_complete
    store = actstore.open(url)
    run = store.run("only")
    assert run.is_complete
    assert run.keep == ("codes",)
    assert not [o.key for unit in run.collection.units.values() for o in unit.objects if "/c/" in o.key]
    for name, hook_point in (("a", RESID), ("b", MLP)):
        codes = run.codes(name)
        assert codes.is_complete
        expected = []
        for unit in run.tokenization.units:
            token_ids = run.tokenization.unit_table(unit.unit)["token_id"].to_numpy()
            expected.append(
                naive_codes(store.dictionary(name), synthetic.numbers(token_ids, POINTS[hook_point]))
            )
        found = np.concatenate([part.to_dense() for _, part in codes.scan()])
        np.testing.assert_array_equal(found, np.concatenate(expected).astype(np.float32))
        assert codes.postings().n_postings == codes.counts().sum()
    assert run.stats(MLP).n_rows == run.n_rows == run.tokenization.n_rows
    with pytest.raises(InvalidInputError):
        run.activations(RESID)
    check_together(url, "only")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("f32", {}),
        ("bf16", {"dtype": "bf16", "codes_dtype": "float32"}),
        ("sampled", {"sample": 0.4, "pool_top_m": 3}),
        ("pooled", {"keep": ("dense", "pooled", "codes"), "pool_special": True}),
    ],
)
def test_codes_of_the_ingest_are_those_of_the_stored_rows(made, name, changes):
    url, _ = made
    ingest(made, name, **{"keep": ("dense", "codes"), **changes})
    check_together(url, name)
    dense = {k: v for k, v in changes.items() if k in ("dtype", "sample")}
    ingest(made, name + "-dense", keep=("dense",), dictionary=(), **dense)
    for dictionary in ("a", "b"):
        encode(
            url, dictionary, name + "-dense", value_dtype=changes.get("codes_dtype", "float16"),
            pool_top_m=changes.get("pool_top_m", 512), pool_special=changes.get("pool_special", False),
        )  # fmt: skip
        assert units_of(url, f"{dictionary}@{name}") == units_of(url, f"{dictionary}@{name}-dense")


def test_codes_beside_int8_are_of_what_the_model_computed(made):
    class Calibrated(CodesBackend):
        def call(self, method, *_):
            assert method == "calibrate"
            return {name: (np.full(width, 200.0), np.full(width, 100.0)) for name, width in POINTS.items()}

    url, _ = made
    ingest(made, "plain")
    ingest(made, "i8", keep=("dense", "codes"), dtype="int8", backend=Calibrated())
    for dictionary in ("a", "b"):
        assert units_of(url, f"{dictionary}@i8") == units_of(url, f"{dictionary}@plain")
    check_together(url, "i8")
    assert encode(url, "a", "i8").units_this_job == 0


def test_a_stopped_ingest_goes_on_with_both(made):
    url, _ = made
    stop = threading.Event()
    done = []

    def after_two(progress):
        done.append(progress.units_done)
        stop.set()

    report = ingest(made, "stopped", stop=stop, progress=after_two, commit_units=2)
    assert not report.is_complete
    store = actstore.open(url)
    n = report.n_units
    assert 0 < n < report.n_units_planned
    for name in "ab":
        assert sorted(store.run("stopped").codes(name).collection.units) == sorted(
            store.run("stopped").collection.units
        )
    assert ingest(made, "stopped").is_complete
    check_together(url, "stopped")
    assert units_of(url, "a@stopped") == units_of(url, "a@only")


def test_a_job_that_lost_its_run_can_commit_to_neither(made):
    url, _ = made
    written = []

    def keep(unit):
        written.append(unit)
        return unit

    first = CodesBackend(change=keep)
    ingest(made, "fenced", backend=first, stop=_stop_after(written))
    ingest(made, "fenced")
    before = actstore.open(url).version
    with pytest.raises(ConflictError) as error:
        first.commit(written)
    assert error.value.kind is ErrorKind.FENCED
    assert actstore.open(url).version == before
    check_together(url, "fenced")


def test_the_last_of_jobs_that_begin_at_once_holds_all_that_they_commit_to(made):
    """Whoever has the newest epoch of one collection has it of all; else each could shut the other out."""
    url, _ = made
    ingest(made, "epochs")
    run = actstore.open(url).run("epochs").collection
    for _ in range(4):
        start, plans = threading.Barrier(3), []

        def begin(start=start, plans=plans):
            store = actstore.open(url)
            codes = [store.run("epochs").codes(name).collection for name in "ab"]
            start.wait()
            plans.append(take_over_run(store, run, codes))

        threads = [threading.Thread(target=begin) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        epochs = [(plan.epoch, *(c.epoch for c in plan.codes)) for plan in plans]
        assert len(epochs) == 3
        assert all(len(set(column)) == 3 for column in zip(*epochs, strict=True))
        assert all(sorted(epochs) == sorted(epochs, key=lambda e, i=i: e[i]) for i in range(3))
        store = actstore.open(url)
        newest = (
            store.run("epochs").collection.epoch,
            *(store.run("epochs").codes(name).collection.epoch for name in "ab"),
        )
        assert max(epochs) == newest


@pytest.mark.parametrize("attempt", range(3))
def test_of_two_jobs_at_once_one_ends_the_run_and_its_codes(made, attempt):
    url, _ = made
    ingest(made, "only")
    start = threading.Barrier(2)
    ended = []

    class Together(CodesBackend):
        def describe(self):
            start.wait()
            return super().describe()

    def job():
        try:
            ended.append(ingest(made, f"race{attempt}", backend=Together(), commit_units=1).is_complete)
        except ConflictError as error:
            ended.append(error.kind)

    threads = [threading.Thread(target=job) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert True in ended
    assert set(ended) <= {True, ErrorKind.FENCED}
    assert actstore.open(url).run(f"race{attempt}").codes("b").postings().n_postings > 0
    check_together(url, f"race{attempt}")
    assert units_of(url, f"a@race{attempt}") == units_of(url, "a@only")


def _stop_after(written):
    class Stop(threading.Event):
        def is_set(self):
            return len(written) > 1

    return Stop()


@pytest.mark.parametrize("where", ["sealed", "codes-sealed"])
def test_what_is_left_behind_the_last_unit_is_done_by_the_next_job(made, monkeypatch, where):
    url, _ = made

    def fail(*_args, **_options):
        raise StorageError(ErrorKind.STORAGE_FAILED, "the test's storage")

    target = "seal_collection" if where == "sealed" else "has_postings"
    with monkeypatch.context() as patch:
        patch.setattr(f"actstore.ingest.encoding.encode.{target}", fail)
        with pytest.raises(StorageError):
            ingest(made, where)
    store = actstore.open(url)
    assert store.run(where).is_complete
    assert store.run(where).codes("a").is_complete == (where != "sealed")
    assert ingest(made, where).is_complete
    assert ingest(made, where).units_this_job == 0
    check_together(url, where)


def test_postings_are_built_within_the_memory_that_is_given(made):
    url, _ = made
    with pytest.raises(InvalidInputError, match="--postings-memory-mb") as error:
        ingest(made, "narrow", postings_memory_mb=1)
    assert error.value.kind is ErrorKind.TOO_LARGE
    store = actstore.open(url)
    assert store.run("narrow").codes("a").is_complete
    assert ("postings", "a@narrow") not in store.state.collections
    assert ingest(made, "narrow", postings_memory_mb=200).is_complete
    check_together(url, "narrow")


def test_codes_too_large_refuse_their_unit_and_say_what_to_do(made):
    with pytest.raises(InvalidInputError, match="float32") as error:
        ingest(made, "huge", keep=("dense", "codes"), dictionary=("huge", "b"))
    assert error.value.kind is ErrorKind.OVERFLOW
    assert ingest(
        made, "large", keep=("dense", "codes"), dictionary=("huge", "b"), codes_dtype="float32"
    ).is_complete


@pytest.mark.parametrize(("huge", "other"), [("huge", "b"), ("huge-mlp", "a")])
def test_a_unit_whose_codes_are_too_large_leaves_nothing_behind(made, huge, other):
    url, _ = made
    run = f"refused-{huge}"
    with pytest.raises(InvalidInputError, match="float32") as error:
        ingest(made, run, keep=("dense", "pooled", "codes"), dictionary=(huge, other))
    assert error.value.kind is ErrorKind.OVERFLOW
    store = actstore.open(url)
    assert not store.run(run).collection.units
    keys = list(store.storage.list(f"runs/{run}/"))
    keys += [key for name in (huge, other) for key in store.storage.list(f"codes/{name}@{run}/")]
    assert keys == []


@pytest.mark.parametrize("sample", [1.0, 0.4])
def test_codes_beside_adopted_shards_are_those_of_the_stored_rows(made, sample):
    """An earlier attempt left shards of other rows: they stay, and what is encoded is what is stored."""
    url, _ = made
    run = f"adopted-{sample}"

    def earlier(token_ids, width):
        return synthetic.numbers(token_ids, width) + 3

    class Dies(CodesBackend):
        def commit(self, units):
            raise ConflictError(ErrorKind.FENCED, "the test's earlier job commits nothing")

    with pytest.raises(ConflictError):
        ingest(made, run, keep=("dense", "codes"), sample=sample, backend=Dies(value=earlier))
    assert not actstore.open(url).run(run).collection.units
    assert ingest(made, run, keep=("dense", "codes"), sample=sample).is_complete
    store = actstore.open(url)
    for name, hook_point in (("a", RESID), ("b", MLP)):
        acts = store.run(run).activations(hook_point)
        rows = acts.rows()
        stored = acts.read(rows)
        expected = naive_codes(store.dictionary(name), stored).astype(np.float32)
        np.testing.assert_array_equal(store.run(run).codes(name).rows(rows).to_dense(), expected)
        if sample == 1:
            units = [store.run(run).tokenization.unit_table(u.unit)["token_id"].to_numpy()
                     for u in store.run(run).tokenization.units]  # fmt: skip
            fresh = np.concatenate([synthetic.numbers(ids, POINTS[hook_point]) for ids in units])
            is_earlier = (stored == fresh + 3).all(1)
            assert (is_earlier | (stored == fresh).all(1)).all()
            assert is_earlier.any()
    check_together(url, run)


def test_other_dictionaries_under_the_same_name_are_refused(made):
    ingest(made, "same", keep=("dense", "codes"))
    with pytest.raises(ConflictError, match="dictionaries"):
        ingest(made, "same", keep=("dense", "codes"), dictionary=("a",))
    with pytest.raises(ConflictError, match="value_dtype"):
        ingest(made, "same", keep=("dense", "codes"), codes_dtype="float32")


def test_what_cannot_be_is_refused_before_anything_is_made(made):
    url, _ = made
    before = actstore.open(url).version
    with pytest.raises(NotFoundError, match="nothing"):
        ingest(made, "refused", dictionary=("nothing",))
    with pytest.raises(InvalidInputError, match=f"nothing would be stored of {MLP}"):
        ingest(made, "refused", dictionary=("a",))
    with pytest.raises(InvalidInputError, match=r"encodes layers\.0\.resid_post"):
        ingest(made, "refused", hook_points=[MLP], backend=_Narrow())
    for changes in (
        {"dictionary": ()},
        {"keep": ("dense",)},
        {"keep": ("dense",), "dictionary": (), "codes_dtype": "float32"},
        {"dictionary": ("a", "a")},
        {"dictionary": "a"},
        {"codes_dtype": "int8"},
        {"pool_top_m": 0},
        {"postings_memory_mb": 0},
        {"postings_memory_mb": 64.0},
        {"keep": ("dense",), "dictionary": (), "postings_memory_mb": 64},
        {"sample": 0.5},
        {"self_check": 0.5},
    ):
        with pytest.raises(InvalidInputError):
            ingest(made, "refused", **changes)
    assert actstore.open(url).version == before


class _Narrow(CodesBackend):
    def describe(self):
        from dataclasses import replace

        return replace(synthetic.DESCRIPTION, hook_points=synthetic.HOOK_POINTS[1:])


def test_encoding_after_such_an_ingest_changes_nothing(made):
    url, _ = made
    ingest(made, "again")
    before = actstore.open(url).version
    report = encode(url, "a", "again")
    assert report.is_complete
    assert report.units_this_job == 0
    assert actstore.open(url).version == before
