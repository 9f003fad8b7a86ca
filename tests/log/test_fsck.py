"""Does fsck find every damage, name the object, and stay silent about a sound store?"""

import random

import pytest

from actstore.errors import ErrorKind, StorageError
from actstore.log import CommitLog, fsck
from actstore.log.fsck import describe
from actstore.log.manifest import manifest_key
from actstore.log.values import Tomb
from actstore.storage import write_new
from actstore.testing.faults import Fault, FaultStorage
from tests.log.harness import Acks, Client, Session, fresh_memory, new_log


@pytest.fixture
def storage():
    storage = fresh_memory()
    Session(Client(), storage, Acks()).run()
    return storage


def live(storage):
    return list(CommitLog(storage).latest().objects())


def rewrite(storage, key, data):
    storage.delete(key)
    storage.put_new(key, [data])


def test_a_sound_store(storage):
    report = fsck(storage, deep=True)
    objects = live(storage)
    assert report.is_clean
    assert report.warnings == ()
    assert (report.version, report.n_units, report.n_objects, report.n_orphans) == (5, 3, 7, 0)
    assert report.nbytes == report.nbytes_hashed == sum(obj.nbytes for obj in objects)
    assert describe(report)[-1] == "clean"
    assert fsck(storage, deep=False).nbytes_hashed == 0


def test_a_missing_object(storage):
    for obj in live(storage):
        body = storage.get(obj.key)
        storage.delete(obj.key)
        (problem,) = fsck(storage, deep=False).problems
        assert (problem.kind, problem.key) == (ErrorKind.OBJECT_MISSING, obj.key)
        assert obj.key in problem.message
        storage.put_new(obj.key, [body])


def test_damaged_objects(storage):
    rng = random.Random(0)
    for obj in live(storage):
        body = storage.get(obj.key)
        flipped = bytearray(body)
        flipped[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        for data, deep in (
            (body[:-1], False),
            (body + b"x", False),
            (bytes(flipped), True),
            (body[::-1], True),
        ):
            rewrite(storage, obj.key, data)
            (problem,) = fsck(storage, deep=deep).problems
            assert (problem.kind, problem.key) == (ErrorKind.OBJECT_DAMAGED, obj.key)
        rewrite(storage, obj.key, body)
    assert fsck(storage, deep=True).is_clean


def test_large_objects_are_hashed_in_ranges(storage):
    body = random.Random(1).randbytes((8 << 20) + 12345)
    log = new_log(storage)
    from actstore.log.values import Create, Seal

    obj = write_new(storage, "runs/big/x", [body])
    log.commit([Create("run", "big", {}, {}), Seal("run", "big", 0, 0, 0, (obj,), {})], txn="big")
    watched = FaultStorage(storage, {})
    report = fsck(watched, deep=True)
    assert report.is_clean
    assert report.nbytes_hashed == report.nbytes
    assert [op for op, key in watched.operations if key == "runs/big/x"] == ["head", "read_into", "read_into"]
    rewrite(storage, "runs/big/x", body[:-1] + bytes([body[-1] ^ 1]))
    assert [p.key for p in fsck(storage, deep=True).problems] == ["runs/big/x"]


@pytest.mark.parametrize("version", range(6))
def test_any_manifest_damaged_or_missing(storage, version):
    key = manifest_key(version)
    body = storage.get(key)
    rewrite(storage, key, body[:-20] + bytes([body[-20] ^ 1]) + body[-19:])
    report = fsck(storage, deep=False)
    assert report.version == version - 1
    assert report.problems[0].key == key
    storage.delete(key)
    report = fsck(storage, deep=False)
    assert report.problems[0].key == key
    assert report.problems[0].kind is ErrorKind.HISTORY_TRUNCATED


def test_orphans_and_announced_deletions_are_information(storage):
    storage.put_new("runs/r/part0/0000-left-over", [b"x"])
    storage.put_new("runs/r/part0/0001-left-over", [b"x"])
    new_log(storage).commit([Tomb(("runs/r/part0/0001-left-over",), "2026-01-01T00:00:00Z")], txn="t")
    report = fsck(storage, deep=True)
    assert report.is_clean
    assert (report.orphans, report.n_orphans, report.n_tombstoned) == (("runs/r/part0/0000-left-over",), 1, 1)


def test_foreign_objects_in_the_log_are_warned_about(storage):
    storage.put_new("manifests/notes.txt", [b"x"])
    storage.put_new("checkpoints/notes.txt", [b"x"])
    storage.delete("_hint")
    report = fsck(storage, deep=False)
    assert report.is_clean
    assert sorted(p.key for p in report.warnings) == ["_hint", "checkpoints/notes.txt", "manifests/notes.txt"]


def test_no_store():
    report = fsck(fresh_memory(), deep=False)
    assert [p.kind for p in report.problems] == [ErrorKind.STORE_NOT_FOUND]
    assert report.version == -1


def test_a_failing_storage_is_not_a_damaged_store(storage):
    n = FaultStorage(storage, {})
    fsck(n, deep=True)
    for k in range(n.n_operations):
        with pytest.raises(StorageError):
            fsck(FaultStorage(storage, {k: Fault.ERROR_BEFORE}), deep=True)
