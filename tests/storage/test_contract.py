"""Every storage keeps the promises of `Storage`, whatever it is made of."""

import itertools
import pickle
import random
import threading
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.storage import PutOutcome, Storage

PER_TEST = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def addressed(nbytes: int) -> bytes:
    """Bytes of which every four tell their own position."""
    return b"".join(i.to_bytes(4, "big") for i in range((nbytes + 3) // 4))[:nbytes]


def test_create_read_delete(storage: Storage):
    body = addressed(1000)
    assert storage.get("a/b") is None
    assert storage.head("a/b") is None
    assert storage.put_new("a/b", [body]) is PutOutcome.CREATED
    assert storage.get("a/b") == body
    assert storage.head("a/b") == 1000
    assert storage.put_new("a/b", [b"other"]) is PutOutcome.EXISTS
    assert storage.put_new("a/b", [body]) is PutOutcome.EXISTS
    assert storage.get("a/b") == body
    storage.delete("a/b")
    assert storage.get("a/b") is None
    storage.delete("a/b")
    storage.delete("never/was")
    assert storage.put_new("a/b", [b"second life"]) is PutOutcome.CREATED
    assert storage.get("a/b") == b"second life"


def test_absent_is_none_everywhere(storage: Storage):
    storage.put_new("a/b/c", [b"x"])
    for key in ("a", "a/b", "a/b/c/d", "a/b/cc", "zzz", "a/b/d"):
        assert storage.get(key) is None, key
        assert storage.head(key) is None, key
        assert storage.get_ranges(key, [(0, 1), (3, 9)]) is None, key
        assert storage.get_ranges(key, []) is None, key
        assert storage.read_into(key, 0, memoryview(bytearray(3))) is None, key
    assert storage.get_ranges("a/b/c", []) == []


def test_buffers_of_all_sorts_are_concatenated(storage: Storage):
    whole = addressed(4096)
    numbers = memoryview(bytearray(whole[1000:2000])).cast("I")
    parts = [whole[:10], b"", bytearray(whole[10:1000]), numbers, memoryview(whole)[2000:4096]]
    assert storage.put_new("parts", parts) is PutOutcome.CREATED
    assert storage.get("parts") == whole


def test_empty_objects_are_refused(storage: Storage):
    for parts in ([], [b""], [b"", bytearray()]):
        with pytest.raises(InvalidInputError, match="empty") as caught:
            storage.put_new("a", parts)
        assert caught.value.kind is ErrorKind.BAD_ARGUMENT
    assert storage.head("a") is None
    with pytest.raises(InvalidInputError):
        storage.put_hint("a", b"")


def test_many_buffers_larger_than_one_batch(storage: Storage):
    rng = random.Random(7)
    whole = rng.randbytes(10_000_019)
    cuts = [0, *sorted(rng.sample(range(1, len(whole)), 1999)), len(whole)]
    parts = [memoryview(whole)[a:b] for a, b in itertools.pairwise(cuts)]
    assert storage.put_new("many", parts) is PutOutcome.CREATED
    assert storage.get("many") == whole


@PER_TEST
@given(data=st.data())
def test_ranges_equal_slices(storage: Storage, data):
    body = addressed(data.draw(st.integers(1, 300)))
    key = f"ranges/{uuid.uuid4().hex}"
    assert storage.put_new(key, [body]) is PutOutcome.CREATED
    position = st.integers(0, 400)
    ranges = [tuple(sorted(pair)) for pair in data.draw(st.lists(st.tuples(position, position), max_size=8))]
    assert storage.get_ranges(key, ranges) == [body[a:b] for a, b in ranges]
    start, length = data.draw(position), data.draw(st.integers(0, 300))
    out = bytearray(b"\xff" * length)
    count = storage.read_into(key, start, memoryview(out))
    expected = body[start : start + length]
    assert count == len(expected)
    assert out == expected + b"\xff" * (length - len(expected))


def test_long_reads_are_whole(storage: Storage):
    body = random.Random(11).randbytes((33 << 20) + 5)
    storage.put_new("long", [body])
    out = memoryview(bytearray(len(body) + 100))
    assert storage.read_into("long", 0, out) == len(body)
    assert out[: len(body)] == body
    assert storage.read_into("long", 3, out[:-200].cast("B")) == len(body) - 100
    assert out[: len(body) - 100] == body[3 : len(body) - 97]
    pieces = storage.get_ranges("long", [(1, len(body) + 7), (17 << 20, 18 << 20)])
    assert pieces == [body[1:], body[17 << 20 : 18 << 20]]


def test_reading_into_foreign_memory(storage: Storage):
    storage.put_new("a", [addressed(64)])
    with pytest.raises(InvalidInputError, match="read-only"):
        storage.read_into("a", 0, memoryview(bytes(8)))
    words = memoryview(bytearray(16)).cast("I")
    assert storage.read_into("a", 4, words) == 16
    assert bytes(words) == addressed(64)[4:20]


def test_reversed_and_negative_ranges_are_refused(storage: Storage):
    for pair in ((3, 2), (-1, 2), (-3, -1)):
        with pytest.raises(InvalidInputError, match="0 <= start <= stop"):
            storage.get_ranges("a", [(0, 1), pair])


def test_listing_is_sorted_complete_and_fresh(storage: Storage):
    keys = [
        "a/b",
        "a/b-c/d",
        "a/b.d/e",
        "a/b0",
        "a/c/d/e/f",
        "a=1/x",
        "ab/x",
        "b",
        "runs/a/m~x/c/0/0",
        "runs/ab/1",
    ]
    assert list(storage.list("")) == []
    for key in random.Random(3).sample(keys, len(keys)):
        storage.put_new(key, [key.encode()])
        assert key in storage.list("")
    assert list(storage.list("")) == sorted(keys)
    for prefix in ("a/", "a/b/", "a/b-c/", "runs/", "runs/a/", "none/", "b/"):
        assert list(storage.list(prefix)) == sorted(k for k in keys if k.startswith(prefix)), prefix
    storage.delete("a/b0")
    assert "a/b0" not in storage.list("a/")


def test_prefixes_that_are_no_folders_are_refused(storage: Storage):
    for prefix in ("a", "/", "a//", "../", "a/../b/", "/a/", "a/b"):
        with pytest.raises(InvalidInputError, match="folder"):
            list(storage.list(prefix))


HOSTILE = [
    "",
    "/abs",
    "../up",
    "a/../b",
    "a//b",
    "a/",
    ".tmp/x",
    "a/.hidden",
    "a\\b",
    "a\0b",
    "a b",
    "é",
    "x" * 201,
    "a\n",
]


def test_hostile_keys_are_refused_by_every_operation(storage: Storage):
    operations = [
        lambda key: storage.put_new(key, [b"x"]),
        lambda key: storage.get(key),
        lambda key: storage.get_ranges(key, [(0, 1)]),
        lambda key: storage.read_into(key, 0, memoryview(bytearray(1))),
        lambda key: storage.head(key),
        lambda key: storage.delete(key),
        lambda key: storage.put_hint(key, b"x"),
        lambda key: storage.local_path(key),
    ]
    for key in HOSTILE:
        for operation in operations:
            with pytest.raises(FormatError, match="object key"):
                operation(key)
    assert list(storage.list("")) == []


def test_hints_replace(storage: Storage):
    storage.put_hint("_hint", b"one")
    storage.put_hint("_hint", b"twotwo")
    assert storage.get("_hint") == b"twotwo"


def test_pickled_storage_sees_the_same_objects(storage: Storage):
    storage.put_new("a", [b"before"])
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.url == storage.url
    assert copy.get("a") == b"before"
    copy.put_new("b", [b"after"])
    assert storage.get("b") == b"after"


def test_one_winner_among_threads(storage: Storage):
    n_threads, n_rounds = 8, 10
    barrier = threading.Barrier(n_threads)
    outcomes: list[list[PutOutcome | None]] = [[None] * n_threads for _ in range(n_rounds)]

    def work(me: int) -> None:
        for turn in range(n_rounds):
            barrier.wait(timeout=60)
            outcomes[turn][me] = storage.put_new(f"race/{turn}", [bytes([me]) * 10_000])

    threads = [threading.Thread(target=work, args=(me,)) for me in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for turn, row in enumerate(outcomes):
        assert sorted(row) == [PutOutcome.CREATED] + [PutOutcome.EXISTS] * (n_threads - 1)
        winner = row.index(PutOutcome.CREATED)
        assert storage.get(f"race/{turn}") == bytes([winner]) * 10_000


def test_local_path_reads_the_same_bytes(storage: Storage):
    storage.put_new("a/b", [b"content"])
    path = storage.local_path("a/b")
    if path is None:
        assert not storage.url.startswith("/")
    else:
        with open(path, "rb") as file:
            assert file.read() == b"content"


def test_it_says_where_it_is(storage: Storage):
    assert storage.writable
    assert storage.url
    assert storage.url in repr(storage) or storage.url.split("//")[-1] in repr(storage)
