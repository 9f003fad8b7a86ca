"""Is the state that a reader gets the newest one, or an error, whatever became of manifests, hint and checkpoints?"""

import contextlib
import dataclasses
import random
import uuid

import pytest

from actstore.errors import ErrorKind, FormatError, NotFoundError
from actstore.log import CommitLog, fsck
from actstore.log.checkpoint import decode_checkpoint, encode_checkpoint, is_due, parse_checkpoint_key
from actstore.log.hint import Hint, decode_hint, encode_hint
from actstore.log.manifest import manifest_key
from actstore.log.tail import read_tail
from actstore.log.units import UnitMap
from actstore.log.values import Fence, StoredObject, Tomb
from actstore.storage import MemoryStorage
from actstore.testing.faults import FaultStorage
from tests.log.harness import ID, KIND, Acks, Client, Session, fresh_memory, new_log


def long_store(n_versions, *, checkpoint_every=64):
    """Return a store whose collection is fenced again and again, and what it was at every version."""
    storage = fresh_memory()
    Session(Client(), storage, Acks()).run()
    log = CommitLog(storage, checkpoint_every=checkpoint_every)
    states = {}
    for epoch in range(1, n_versions + 1):
        done = log.commit([Fence(KIND, ID, epoch)], txn=uuid.uuid4().hex)
        states[done.version] = done.state
    return storage, states


@pytest.fixture(scope="module")
def built():
    return long_store(300)


@pytest.fixture
def store(built):
    """Give each test its own copy of the objects."""
    storage, states = built
    copy = fresh_memory()
    for key in storage.list(""):
        copy.put_new(key, [storage.get(key)])
    return copy, states


def checkpoints(storage):
    return list(storage.list("checkpoints/"))


def newest(states):
    return states[max(states)]


def cut(storage, version):
    storage.delete(manifest_key(version))


def replaced(storage, key, data):
    storage.delete(key)
    storage.put_new(key, [data])


def test_every_version_from_any_checkpoint(store):
    storage, states = store
    rng = random.Random(0)
    assert len(checkpoints(storage)) >= 3
    for version in [*rng.sample(sorted(states), 25), max(states)]:
        assert CommitLog(storage).at(version) == states[version]


def test_versions_that_are_not_there(store):
    storage, states = store
    for version in (-1, max(states) + 1, 10**18):
        with pytest.raises(NotFoundError) as caught:
            CommitLog(storage).at(version)
        assert caught.value.kind is ErrorKind.VERSION_NOT_FOUND


def test_without_checkpoints_and_hint_the_same_state(store):
    storage, states = store
    for key in checkpoints(storage):
        storage.delete(key)
    assert CommitLog(storage).latest() == newest(states)
    storage.delete("_hint")
    assert CommitLog(storage).latest() == newest(states)


def test_opening_reads_little(store):
    storage, _ = store
    watched = FaultStorage(storage, {})
    CommitLog(watched).latest()
    assert all(op == "get" for op, _ in watched.operations)
    assert len(watched.operations) < 64 + 10


@pytest.mark.parametrize("which", ["newest", "middle of the tail", "first"])
def test_a_deleted_manifest_is_an_alarm(store, which):
    storage, states = store
    version = {"newest": max(states), "middle of the tail": max(states) - 3, "first": 0}[which]
    cut(storage, version)
    with pytest.raises(FormatError) as caught:
        CommitLog(storage).latest()
    assert caught.value.kind is ErrorKind.HISTORY_TRUNCATED
    assert manifest_key(version) in str(caught.value)
    assert any(manifest_key(version) in p.message for p in fsck(storage, deep=False).problems)


def test_a_manifest_deleted_before_the_checkpoint_is_found_by_fsck_and_by_time_travel(store):
    storage, states = store
    cut(storage, 10)
    assert CommitLog(storage).latest() == newest(states)
    with pytest.raises(FormatError):
        CommitLog(storage).at(12)
    assert any(p.key == manifest_key(10) for p in fsck(storage, deep=False).problems)


def test_without_a_hint_a_listing_finds_the_gap(store):
    storage, states = store
    storage.delete("_hint")
    cut(storage, max(states) - 3)
    with pytest.raises(FormatError) as caught:
        CommitLog(storage).latest()
    assert caught.value.kind is ErrorKind.HISTORY_TRUNCATED


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d + b"x", lambda d: d.replace(b'"v":', b'"v": '), lambda d: b"\0"]
)
def test_a_damaged_hint_is_no_hint(store, damage):
    storage, states = store
    data = storage.get("_hint")
    storage.put_hint("_hint", damage(data))
    assert CommitLog(storage).latest() == newest(states)
    report = fsck(storage, deep=False)
    assert report.is_clean
    assert [p.key for p in report.warnings] == ["_hint"]
    cut(storage, max(states) - 3)
    with pytest.raises(FormatError):
        CommitLog(storage).latest()


@pytest.mark.parametrize("ahead", [1, 10**18])
def test_a_hint_beyond_the_end_is_an_alarm(store, ahead):
    storage, states = store
    storage.put_hint("_hint", encode_hint(Hint(max(states) + ahead, "0" * 64, None)))
    with pytest.raises(FormatError) as caught:
        CommitLog(storage).latest()
    assert caught.value.kind is ErrorKind.HISTORY_TRUNCATED
    assert not fsck(storage, deep=False).is_clean


@pytest.mark.parametrize("back", [0, 1, 290])
def test_a_replaced_history_is_an_alarm(store, back):
    storage, states = store
    checkpoint = decode_hint(storage.get("_hint")).checkpoint
    storage.put_hint("_hint", encode_hint(Hint(max(states) - back, "0" * 64, checkpoint)))
    with pytest.raises(FormatError) as caught:
        CommitLog(storage).latest()
    assert caught.value.kind is ErrorKind.HISTORY_TRUNCATED


def test_an_old_hint_is_good_enough(store):
    storage, states = store
    version = max(states) - 200
    storage.put_hint("_hint", encode_hint(Hint(version, states[version].manifest_sha256, None)))
    assert CommitLog(storage).latest() == newest(states)


def test_a_hint_naming_a_missing_checkpoint(store):
    storage, states = store
    state = newest(states)
    key = f"checkpoints/{5:020}-{0:08x}.json.gz"
    storage.put_hint("_hint", encode_hint(Hint(state.version, state.manifest_sha256, key)))
    assert CommitLog(storage).latest() == state


def test_damaged_checkpoints_cost_nothing_but_time(store):
    storage, states = store
    rng = random.Random(1)
    for key in checkpoints(storage):
        data = bytearray(storage.get(key))
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        replaced(storage, key, bytes(data))
    assert CommitLog(storage).latest() == newest(states)
    report = fsck(storage, deep=True)
    assert report.is_clean
    assert sorted(p.key for p in report.warnings) == checkpoints(storage)


def test_a_plausible_checkpoint_that_lies_is_passed_over(store):
    """Right name, right packing, right form; only the content is another state's."""
    storage, states = store
    state = newest(states)
    collections = {
        name: dataclasses.replace(c, rows=c.rows, units={0: c.units[0]})
        for name, c in state.collections.items()
    }
    key, data = encode_checkpoint(dataclasses.replace(state, collections=collections))
    storage.put_new(key, [data])
    storage.put_hint("_hint", encode_hint(Hint(state.version, state.manifest_sha256, key)))
    assert CommitLog(storage).latest() == state
    assert [p.key for p in fsck(storage, deep=False).warnings] == [key]


def test_checkpoint_round_trip(store):
    storage, _ = store
    CommitLog(storage).commit([Tomb(("runs/gone/a", "runs/gone/b"), "2026-01-01T00:00:00Z")], txn="tomb")
    state = CommitLog(storage).latest()
    key, data = encode_checkpoint(state)
    again = decode_checkpoint(data, parse_checkpoint_key(key))
    assert again == state
    assert encode_checkpoint(again) == (key, data)
    assert again.tombs == dict.fromkeys(("runs/gone/a", "runs/gone/b"), "2026-01-01T00:00:00Z")


def test_units_of_a_checkpoint_are_checked_when_they_are_used(store):
    """A checkpoint may even be one that its manifest vouches for: a key that leaves the store is refused all the same."""
    storage, _ = store
    state = CommitLog(storage).latest()
    ((name, run),) = state.collections.items()
    hostile = dataclasses.replace(run.units[0], objects=(StoredObject("../../etc/passwd", 1, "0" * 64),))
    units = UnitMap.of({**run.units, 0: hostile})
    key, data = encode_checkpoint(
        dataclasses.replace(state, collections={name: dataclasses.replace(run, units=units)})
    )
    read = decode_checkpoint(data, parse_checkpoint_key(key)).collection(*name)
    assert read.units[1] == run.units[1]
    with pytest.raises(FormatError, match="passwd"):
        read.units[0]


def test_a_checkpoint_that_unpacks_without_end_is_refused():
    import hashlib
    import zlib

    packer = zlib.compressobj(9, wbits=31)
    data = packer.compress(b"0" * (50 << 20)) + packer.flush()
    name = parse_checkpoint_key(f"checkpoints/{3:020}-{hashlib.sha256(data).hexdigest()[:8]}.json.gz")
    with pytest.raises(FormatError, match="unpacks to more"):
        decode_checkpoint(data, name)


def test_checkpoints_stay_in_proportion():
    assert not is_due(versions=63, every=64, manifest_bytes=10**9, checkpoint_bytes=0)
    assert is_due(versions=64, every=64, manifest_bytes=1, checkpoint_bytes=0)
    assert not is_due(versions=1000, every=64, manifest_bytes=249, checkpoint_bytes=1000)
    assert is_due(versions=1000, every=64, manifest_bytes=250, checkpoint_bytes=1000)
    storage, _ = long_store(200, checkpoint_every=1)
    manifests = sum(storage.head(key) for key in storage.list("manifests/"))
    packed = sum(storage.head(key) for key in checkpoints(storage))
    assert packed <= 4 * manifests + max(storage.head(key) for key in checkpoints(storage))


def test_the_tail_is_fetched_in_order_and_ends_at_the_first_absent():
    storage = fresh_memory()
    for version in range(1000):
        storage.put_new(manifest_key(version), [f"{version}".encode()])
    for start in (0, 1, 500, 999, 1000):
        for known in (-1, 500, 999):
            found = list(read_tail(storage, start, known=known))
            assert found == [(v, f"{v}".encode()) for v in range(start, 1000)]
    with pytest.raises(FormatError):
        list(read_tail(storage, 0, known=1000))
    cut(storage, 700)
    with pytest.raises(FormatError) as caught:
        list(read_tail(storage, 0, known=999))
    assert manifest_key(700) in str(caught.value)


def test_a_version_that_appears_while_others_are_fetched_is_no_gap():
    class Appearing(MemoryStorage):
        """The first look at version 5 comes before anything is there, every other look after all was committed."""

        looked = False

        def get(self, key):
            if key == manifest_key(5) and not self.looked:
                self.looked = True
                return None
            return super().get(key)

    storage = Appearing(f"appearing-{uuid.uuid4().hex[:8]}")
    for version in range(40):
        storage.put_new(manifest_key(version), [b"x"])
    assert [v for v, _ in read_tail(storage, 0, known=-1)] in (list(range(40)), list(range(5)))


def test_a_flipped_bit_anywhere_in_the_log_is_noticed_or_harmless(store):
    storage, states = store
    rng = random.Random(2)
    keys = [key for key in storage.list("") if not key.startswith("runs/")]
    for _ in range(80):
        key = rng.choice(keys)
        good = storage.get(key)
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        storage.put_hint(key, bytes(bad))
        with contextlib.suppress(FormatError):
            assert CommitLog(storage).latest() == newest(states)
        storage.put_hint(key, good)


def test_refresh_goes_on_from_any_state(store):
    storage, states = store
    rng = random.Random(3)
    for version in rng.sample(sorted(states), 10):
        assert CommitLog(storage).refresh(states[version]) == newest(states)
    assert new_log(storage).refresh(newest(states)) is newest(states)
