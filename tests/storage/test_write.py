"""Writing resolves every outcome, reading trusts nothing, and the probe finds stores that lie."""

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ActstoreError, ConflictError, ErrorKind, FormatError, StorageError
from actstore.log.values import StoredObject
from actstore.storage import (
    Buffer,
    MemoryStorage,
    PutOutcome,
    ReadOnlyStorage,
    RetryPolicy,
    Storage,
    open_storage,
    probe,
    read_verified,
    write_new,
)

NO_PAUSE = RetryPolicy(attempts=4, sleep=lambda seconds: None)


class Unreliable(MemoryStorage):
    """A memory store of which each put follows the next step of a script; after the script it is reliable.

    Steps: "lost" (done, answer lost), "dropped" (not done, answer lost), "taken" (done by us before, says EXISTS).
    """

    def __init__(self, *script: str, blind: bool = False) -> None:
        super().__init__(f"unreliable-{uuid.uuid4().hex}")
        self.script = list(script)
        self.blind = blind
        self.n_puts = 0

    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:
        self.n_puts += 1
        step = self.script.pop(0) if self.script else "ok"
        if step == "dropped":
            return PutOutcome.UNKNOWN
        outcome = super().put_new(key, data)
        return {"lost": PutOutcome.UNKNOWN, "taken": PutOutcome.EXISTS}.get(step, outcome)

    def head(self, key: str) -> int | None:
        if self.blind:
            raise StorageError(ErrorKind.STORAGE_FAILED, "cannot see")
        return super().head(key)


@given(
    steps=st.lists(st.sampled_from(["lost", "dropped", "taken"]), max_size=3),
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any),
)
@settings(deadline=None)
def test_write_new_ends_with_the_bytes_in_place(steps, sizes):
    parts = [bytes([i]) * size for i, size in enumerate(sizes)]
    storage = Unreliable(*steps)
    stored = write_new(storage, "a/b", parts, retry=NO_PAUSE)
    whole = b"".join(parts)
    assert stored == StoredObject("a/b", len(whole), hashlib.sha256(whole).hexdigest())
    assert storage.get("a/b") == whole
    assert write_new(storage, "a/b", [whole], retry=NO_PAUSE) == stored, "idempotent"
    assert read_verified(storage, stored) == whole


@pytest.mark.parametrize("nbytes", [1, (1 << 20) - 1, 1 << 20, 5_000_001])
def test_hash_is_of_what_is_stored_at_every_size(storage: Storage, nbytes):
    body = bytes(range(256)) * (nbytes // 256 + 1)
    parts = [memoryview(body)[: nbytes // 3], memoryview(body)[nbytes // 3 : nbytes]]
    stored = write_new(storage, "a", parts)
    assert stored == StoredObject("a", nbytes, hashlib.sha256(body[:nbytes]).hexdigest())
    assert read_verified(storage, stored) == body[:nbytes]
    assert not [t for t in threading.enumerate() if t.name == "actstore-sha256"]


@pytest.mark.parametrize("theirs", [b"other", b"longer than ours"])
def test_other_bytes_are_a_conflict_and_stay(storage: Storage, theirs):
    storage.put_new("a", [theirs])
    with pytest.raises(ConflictError, match="never overwritten") as caught:
        write_new(storage, "a", [b"ours!"], retry=NO_PAUSE)
    assert caught.value.kind is ErrorKind.ALREADY_EXISTS
    assert storage.get("a") == theirs


def test_no_answer_at_all():
    storage = Unreliable(*["dropped"] * 9)
    with pytest.raises(StorageError, match="4 attempts were not answered") as caught:
        write_new(storage, "a", [b"x"], retry=NO_PAUSE)
    assert caught.value.kind is ErrorKind.STORAGE_FAILED
    assert storage.n_puts == 4
    assert storage.get("a") is None


@pytest.mark.parametrize("step", ["lost", "dropped", "taken"])
def test_what_cannot_be_read_back_is_unknown(step):
    storage = Unreliable(step, blind=True)
    with pytest.raises(StorageError, match="may or may not be") as caught:
        write_new(storage, "a", [b"x"], retry=NO_PAUSE)
    assert caught.value.kind is ErrorKind.OUTCOME_UNKNOWN
    assert storage.n_puts == 1, "nothing is decided while the outcome is unknown"


def test_empty_objects_are_refused():
    with pytest.raises(ActstoreError, match="empty"):
        write_new(MemoryStorage("empty"), "a", [])


def damage(body: bytes) -> Iterator[bytes]:
    for bit in (0, 7, len(body) * 4, len(body) * 8 - 1):
        yield bytes(b ^ (1 << bit % 8) if i == bit // 8 else b for i, b in enumerate(body))
    yield from (body[:-1], body[1:], b"", body + b"\0", body + body, body[::-1], bytes(len(body)))


@pytest.mark.parametrize("size", [3, 1000, (16 << 20) + 3])
def test_damage_is_never_returned(storage: Storage, size):
    body = bytes(range(251)) * (size // 251 + 1)
    body = body[:size]
    stored = write_new(storage, "whole", [body])
    variants = damage(body) if size < 1 << 20 else (body[:-1], body + b"\0", body[:-1] + b"\xff")
    for i, wrong in enumerate(variants):
        if not wrong:
            continue
        storage.put_hint(f"wrong/{i}", wrong)
        with pytest.raises(FormatError, match=f"wrong/{i}'") as caught:
            read_verified(storage, StoredObject(f"wrong/{i}", stored.nbytes, stored.sha256))
        assert caught.value.kind is ErrorKind.OBJECT_DAMAGED
    with pytest.raises(FormatError, match="absent") as missing:
        read_verified(storage, StoredObject("gone", stored.nbytes, stored.sha256))
    assert missing.value.kind is ErrorKind.OBJECT_MISSING
    with pytest.raises(FormatError) as lied:
        read_verified(storage, StoredObject("whole", 10**15, stored.sha256))
    assert lied.value.kind is ErrorKind.OBJECT_DAMAGED


def test_empty_file_in_place_of_an_object(tmp_path):
    storage = open_storage(tmp_path)
    stored = write_new(storage, "a", [b"content"])
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(FormatError, match="only 0 bytes instead of 7"):
        read_verified(storage, stored)


def test_probe_passes_and_leaves_nothing(storage: Storage):
    probe(storage)
    assert list(storage.list("")) == []
    probe(storage)


class Overwrites(MemoryStorage):
    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:
        self.delete(key)
        return super().put_new(key, data)


class OverwritesAndDenies(Overwrites):
    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:
        known = self.get(key) is not None
        outcome = super().put_new(key, data)
        return PutOutcome.EXISTS if known else outcome


class ListsThePast(MemoryStorage):
    def list(self, prefix: str) -> Iterator[str]:
        return iter([])


class KeepsTheDeleted(MemoryStorage):
    def delete(self, key: str) -> None:
        """Say yes and do nothing."""


class CountsWrong(MemoryStorage):
    def head(self, key: str) -> int | None:
        nbytes = super().head(key)
        return None if nbytes is None else nbytes + 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Overwrites, "ignores the condition"),
        (OverwritesAndDenies, "gave back"),
        (ListsThePast, "stale"),
        (KeepsTheDeleted, "just deleted"),
        (CountsWrong, "wrong length"),
    ],
)
def test_probe_refuses_unsafe_stores(make: Callable[[str], MemoryStorage], says):
    storage = make(f"unsafe-{uuid.uuid4().hex}")
    for _ in range(2):
        with pytest.raises(StorageError, match=says) as caught:
            probe(storage)
        assert caught.value.kind is ErrorKind.UNSAFE_STORE, "a failed probe is not remembered as passed"


def test_probe_refuses_read_only_stores():
    with pytest.raises(StorageError, match="read-only") as caught:
        probe(ReadOnlyStorage(MemoryStorage("frozen"), why="of a test"))
    assert caught.value.kind is ErrorKind.READ_ONLY


def test_read_only_wrapper_reads_and_never_writes(storage: Storage):
    storage.put_new("a/b", [b"content"])
    frozen = ReadOnlyStorage(storage, why="it belongs to someone else")
    assert frozen.get("a/b") == b"content"
    assert frozen.get_ranges("a/b", [(1, 3)]) == [b"on"]
    out = bytearray(3)
    assert frozen.read_into("a/b", 4, memoryview(out)) == 3
    assert out == b"ent"
    assert frozen.head("a/b") == 7
    assert list(frozen.list("")) == ["a/b"]
    assert frozen.local_path("a/b") == storage.local_path("a/b")
    assert not frozen.writable
    for operation in (
        lambda: frozen.put_new("a/b", [b"x"]),
        lambda: frozen.put_hint("a/b", b"x"),
        lambda: frozen.delete("a/b"),
    ):
        with pytest.raises(StorageError, match="belongs to someone else") as caught:
            operation()
        assert caught.value.kind is ErrorKind.READ_ONLY
    assert storage.get("a/b") == b"content"
