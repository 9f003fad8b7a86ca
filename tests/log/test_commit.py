"""Does a commit do what it says, once, and say no where it must?"""

import pickle
import threading
import uuid

import pytest

from actstore.errors import (
    ConflictError,
    ErrorKind,
    FormatError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from actstore.log import CommitLog
from actstore.log.values import Add, Create, Fence, Format, Seal, StoredObject, Tomb
from actstore.storage import LocalStorage, MemoryStorage
from actstore.testing.faults import Fault, FaultStorage
from tests.log.harness import (
    CONFIG,
    FINGERPRINT,
    ID,
    KIND,
    Acks,
    Client,
    Session,
    fresh_memory,
    new_log,
    prepared,
)


def txn():
    return uuid.uuid4().hex


def add(storage, unit, *, epoch=0, rows=5, attempt=None, n=2, kind=KIND, id=ID, fp=FINGERPRINT, write=True):
    attempt = attempt or uuid.uuid4().hex
    objects = []
    for j in range(n):
        key = f"runs/{id}/{unit}-{j}-{attempt}"
        body = f"{unit}/{j}/{attempt}".encode()
        if write:
            storage.put_new(key, [body])
        objects.append(StoredObject(key, len(body), "0" * 64))
    return Add(kind, id, epoch, fp, unit, rows, 0, attempt, tuple(objects), {"u": unit})


@pytest.fixture
def storage():
    return prepared()


@pytest.fixture
def log(storage):
    return new_log(storage)


def test_what_is_committed_is_what_another_reader_loads(storage, log):
    first = log.commit([add(storage, 7, rows=3)], txn=txn())
    second = log.commit([add(storage, 2, rows=4), Fence(KIND, ID, 5)], txn=txn())
    state = CommitLog(storage).latest()
    assert state == second.state
    assert (first.version, second.version, state.version) == (2, 3, 3)
    run = state.collection(KIND, ID)
    assert list(run.units) == [2, 7]
    assert (run.rows, run.epoch, run.fingerprint, run.is_sealed) == (7, 5, FINGERPRINT, False)
    assert (run.units[7].version, run.units[2].version) == (2, 3)
    assert run.nbytes == sum(o.nbytes for u in run.units.values() for o in u.objects) == state.nbytes


def test_states_are_snapshots(storage, log):
    states = [log.latest()]
    for unit in range(20):
        states.append(log.commit([add(storage, unit)], txn=txn()).state)
    for n, state in enumerate(states):
        assert sorted(state.collection(KIND, ID).units) == list(range(n))
        assert state.n_units == n
        assert CommitLog(storage).at(state.version) == state
        assert log.refresh(state) == states[-1]


def test_corpus_in_one_commit(storage, log):
    config = {"n_documents": 10}
    from actstore.log import fingerprint

    adds = [add(storage, u, rows=5, kind="corpus", id="c", fp=fingerprint(config)) for u in range(2)]
    log.commit([Create("corpus", "c", config, {}), *adds, Seal("corpus", "c", 0, 2, 10, (), {})], txn=txn())
    corpus = CommitLog(storage).latest().collection("corpus", "c")
    assert corpus.is_sealed
    assert corpus.rows == 10


def test_first_committed_attempt_wins(storage, log):
    first, second = add(storage, 1), add(storage, 1)
    log.commit([first], txn=txn())
    before = log.latest()
    done = log.commit([second], txn=txn())
    assert done.dropped == (second,)
    assert done.version == before.version
    assert CommitLog(storage).latest() == before
    mixed = log.commit([add(storage, 1), add(storage, 2)], txn=txn())
    assert [a.unit for a in mixed.dropped] == [1]
    assert log.latest().collection(KIND, ID).units[1].attempt == first.attempt


def test_same_unit_twice_in_one_commit(storage, log):
    first, second = add(storage, 1), add(storage, 1)
    done = log.commit([first, second], txn=txn())
    assert done.dropped == (second,)


def test_unit_is_dropped_after_the_seal_too(storage, log):
    log.commit([add(storage, 0), Seal(KIND, ID, 0, 1, 5, (), {})], txn=txn())
    again = add(storage, 0)
    assert log.commit([again], txn=txn()).dropped == (again,)


def test_a_transaction_counts_once(storage, log):
    action, name = add(storage, 1), txn()
    first = log.commit([action], txn=name)
    log.commit([add(storage, 2)], txn=txn())
    again = CommitLog(storage).commit([action], txn=name)
    assert (again.version, again.dropped) == (first.version, ())
    assert again.state.version == 3
    with pytest.raises(InvalidInputError, match="other actions"):
        log.commit([add(storage, 3)], txn=name)


@pytest.mark.parametrize(
    ("actions", "kind"),
    [
        (lambda s: [Create(KIND, ID, CONFIG, {})], ErrorKind.ALREADY_EXISTS),
        (lambda s: [Create(KIND, ID.upper(), CONFIG, {})], ErrorKind.ALREADY_EXISTS),
        (lambda s: [Create(KIND, ID, {**CONFIG, "x": 1}, {})], ErrorKind.CONFIG_DIFFERS),
        (lambda s: [Create(KIND, "n", {}, {}), Create(KIND, "N", {}, {})], ErrorKind.ALREADY_EXISTS),
        (lambda s: [add(s, 1, fp="0" * 64)], ErrorKind.CONFIG_DIFFERS),
        (lambda s: [Fence(KIND, ID, 0)], ErrorKind.FENCED),
        (lambda s: [Fence(KIND, ID, 2), Fence(KIND, ID, 2)], ErrorKind.FENCED),
        (lambda s: [Fence(KIND, ID, 2), add(s, 1, epoch=1)], ErrorKind.FENCED),
        (lambda s: [Seal(KIND, ID, 0, 1, 0, (), {})], ErrorKind.COUNT_DIFFERS),
        (lambda s: [add(s, 1), Seal(KIND, ID, 0, 1, 6, (), {})], ErrorKind.COUNT_DIFFERS),
        (lambda s: [Seal(KIND, ID, 0, 0, 0, (), {}), add(s, 1)], ErrorKind.SEALED),
        (lambda s: [Seal(KIND, ID, 0, 0, 0, (), {}), Seal(KIND, ID, 0, 0, 0, (), {})], ErrorKind.SEALED),
        (
            lambda s: [(a := add(s, 1)), Tomb((a.objects[0].key,), "2026-01-01T00:00:00Z")],
            ErrorKind.TOMBSTONED,
        ),
        (
            lambda s: [Tomb(((a := add(s, 1)).objects[0].key,), "2026-01-01T00:00:00Z"), a],
            ErrorKind.TOMBSTONED,
        ),
        (lambda s: [Tomb(("runs/x",), "2026-01-01T00:00:00Z")] * 2, ErrorKind.TOMBSTONED),
    ],
)
def test_conflicts_change_nothing(storage, log, actions, kind):
    before = log.latest()
    with pytest.raises(ConflictError) as caught:
        log.commit(actions(storage), txn=txn())
    assert caught.value.kind is kind
    assert CommitLog(storage).latest() == before


def test_differing_configurations_are_both_shown(log):
    with pytest.raises(ConflictError) as caught:
        log.commit([Create(KIND, ID, {"model": {"layers": 3}, "extra": None}, {})], txn=txn())
    message = str(caught.value)
    assert "model.layers: 2 in the store, 3 asked for" in message
    assert "rows_per_unit: 4 in the store, absent" in message
    assert "extra: absent in the store, None asked for" in message


@pytest.mark.parametrize(
    ("actions", "error"),
    [
        (lambda s: [], InvalidInputError),
        (lambda s: [Format(1, 1)], InvalidInputError),
        (lambda s: [add(s, 1, epoch=1)], InvalidInputError),
        (lambda s: [Create(KIND, "../x", {}, {})], InvalidInputError),
        (lambda s: [Create(KIND, "x", {"a": float("nan")}, {})], InvalidInputError),
        (lambda s: [add(s, 1, id="other")], NotFoundError),
        (lambda s: [Fence("corpus", ID, 1)], NotFoundError),
        (lambda s: [add(s, 1, write=False)], FormatError),
    ],
)
def test_bad_commits_change_nothing(storage, log, actions, error):
    before = log.latest()
    with pytest.raises(error):
        log.commit(actions(storage), txn=txn())
    assert CommitLog(storage).latest() == before


def test_bad_txn(storage, log):
    for name in ("", "a b", "é", "x" * 201):
        with pytest.raises(InvalidInputError):
            log.commit([add(storage, 1)], txn=name)


def test_promised_objects_are_looked_at(storage, log):
    action = add(storage, 1, n=9)
    short = action.objects[4]
    storage.delete(short.key)
    with pytest.raises(FormatError, match=short.key) as caught:
        log.commit([action], txn=txn())
    assert caught.value.kind is ErrorKind.OBJECT_MISSING
    storage.put_new(short.key, [b"x"])
    with pytest.raises(FormatError, match=short.key) as caught:
        log.commit([action], txn=txn())
    assert caught.value.kind is ErrorKind.OBJECT_DAMAGED


def test_not_found_names_what_is_near(log):
    log.commit([Create(KIND, "pythia-70m", {}, {}), Create(KIND, "gpt2", {}, {})], txn=txn())
    with pytest.raises(NotFoundError, match="pythia-70m"):
        log.latest().collection(KIND, "pythia-7m")
    with pytest.raises(NotFoundError, match="no corpus yet"):
        log.latest().collection("corpus", "c")


def test_create_is_idempotent_and_never_begins_anew():
    storage = fresh_memory()
    first = new_log(storage).create()
    assert new_log(storage).create() == first
    assert first.version == 0
    storage.delete("manifests/00000000000000000000.json")
    with pytest.raises(FormatError) as caught:
        new_log(storage).create()
    assert caught.value.kind is ErrorKind.HISTORY_TRUNCATED


def test_no_store():
    with pytest.raises(NotFoundError) as caught:
        new_log(fresh_memory()).latest()
    assert caught.value.kind is ErrorKind.STORE_NOT_FOUND


def test_log_pickles(storage, log):
    again = pickle.loads(pickle.dumps(log))
    assert again.latest() == log.latest()


class LosesManifest(FaultStorage):
    """The first manifest that is put meets `fault`, and what is asked next fails."""

    def __init__(self, inner, fault):
        super().__init__(inner, {})
        self._fault = fault

    def _next(self, name, key):
        if name == "put_new" and not self._plan:
            self._plan = {self.n_operations: self._fault, self.n_operations + 1: Fault.ERROR_BEFORE}
        return super()._next(name, key)


def test_outcome_unknown_when_the_read_back_fails(storage):
    log = new_log(storage)
    action, name = add(storage, 1), txn()
    for fault, landed in ((Fault.LOST_ANSWER, True), (Fault.TIMEOUT, False)):
        version = log.latest().version
        faulty = new_log(LosesManifest(storage, fault))
        with pytest.raises(StorageError) as caught:
            faulty.commit([action], txn=name)
        assert caught.value.kind is ErrorKind.OUTCOME_UNKNOWN
        assert log.latest().version == version + landed
        assert all(storage.get(obj.key) is not None for obj in action.objects)
        done = log.commit([action], txn=name)
        assert done.version == version + 1
        assert done.dropped == ()
        action, name = add(storage, 2), txn()


def test_storage_full_is_said_and_nothing_is_committed(storage):
    before = new_log(storage).latest()
    action = add(storage, 1)
    k = next(
        i
        for i, (op, key) in enumerate(_operations_of_one_commit())
        if op == "put_new" and key.startswith("manifests/")
    )
    with pytest.raises(StorageError) as caught:
        new_log(FaultStorage(storage, {k: Fault.DISK_FULL})).commit([action], txn=txn())
    assert caught.value.kind is ErrorKind.STORAGE_FULL
    assert new_log(storage).latest() == before


def _operations_of_one_commit():
    storage = prepared()
    watched = FaultStorage(storage, {})
    new_log(watched).commit([add(storage, 1)], txn=txn())
    return watched.operations


def test_cost_of_a_commit_and_of_a_refresh(storage):
    watched = FaultStorage(storage, {})
    log = CommitLog(watched)
    state = log.latest()
    watched.operations.clear()
    assert log.refresh(state) is state
    assert [op for op, _ in watched.operations] == ["get"]
    watched.operations.clear()
    log.commit([add(storage, 1)], txn=txn())
    assert [op for op, _ in watched.operations] == ["get", "head", "head", "put_new", "get", "put_hint"]


def _race(logs, n_commits, storage):
    """Commit `n_commits` units with each log at once; return what each was told."""
    acks, errors = [], []

    def work(writer, log):
        try:
            for n in range(n_commits):
                action = add(storage, writer * n_commits + n)
                acks.append((action, log.commit([action], txn=txn())))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=item) for item in enumerate(logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return acks


@pytest.mark.parametrize("shared", [False, True])
def test_threads_race(shared):
    storage = prepared()
    logs = [CommitLog(storage)] * 4 if shared else [CommitLog(storage) for _ in range(4)]
    acks = _race(logs, 10, storage)
    state = CommitLog(storage).latest()
    assert sorted(done.version for _, done in acks) == list(range(2, 42))
    for action, done in acks:
        unit = state.collection(KIND, ID).units[action.unit]
        assert (unit.attempt, unit.version, done.dropped) == (action.attempt, done.version, ())


def test_contention_gives_up_after_twenty_rebases(storage):
    class AlwaysBeaten(FaultStorage):
        def put_new(self, key, data):
            if key.startswith("manifests/"):
                rival.commit([Fence(KIND, ID, rival.latest().collection(KIND, ID).epoch + 1)], txn=txn())
            return super().put_new(key, data)

    rival = new_log(storage)
    pauses = []
    log = CommitLog(AlwaysBeaten(storage, {}), sleep=pauses.append)
    with pytest.raises(ConflictError) as caught:
        log.commit([Create(KIND, "new", {}, {})], txn=txn())
    assert caught.value.kind is ErrorKind.COMMIT_CONTENTION
    assert len(pauses) == 19
    assert all(0 <= pause <= 2 for pause in pauses)


def test_read_only_store(tmp_path):
    class ReadOnly(LocalStorage):
        writable = False

    Session(Client(), LocalStorage(tmp_path), Acks()).run()
    log = CommitLog(ReadOnly(tmp_path))
    with pytest.raises(StorageError) as caught:
        log.commit([Fence(KIND, ID, 1)], txn=txn())
    assert caught.value.kind is ErrorKind.READ_ONLY
    assert log.latest().collection(KIND, ID).is_sealed
    with pytest.raises(StorageError):
        CommitLog(_read_only_empty()).create()


def _read_only_empty():
    class ReadOnly(MemoryStorage):
        writable = False

    return ReadOnly(f"ro-{uuid.uuid4().hex[:8]}")
