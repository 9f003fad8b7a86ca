"""A bucket behind a network that loses requests, answers and halves of bodies."""

import json
import os
import pickle
import random
import traceback

import pytest

from actstore.errors import ConflictError, ErrorKind, NotFoundError, StorageError
from actstore.storage import (
    ObjectStorage,
    PutOutcome,
    RetryPolicy,
    open_storage,
    probe,
    read_verified,
    write_new,
)
from tests.s3_server import Fault, FaultyProxy
from tests.storage import children

pytestmark = pytest.mark.s3

FAST = RetryPolicy(attempts=4, base_s=0.001, cap_s=0.002)
CANARY = "canary-secret-of-the-emulator"


@pytest.fixture
def bucket(s3_server):
    return s3_server.make_bucket()


@pytest.fixture(scope="module")
def connected(s3_server):
    """One bucket, seen through a proxy and directly; connecting costs too much to do it for every test."""
    bucket = s3_server.make_bucket()
    with FaultyProxy(s3_server.endpoint_url) as proxy:
        options = {**s3_server.storage_options, "endpoint_url": proxy.endpoint_url}
        storage = ObjectStorage("s3", bucket, "test.store", options, retry=FAST)
        direct = ObjectStorage("s3", bucket, "test.store", s3_server.storage_options, retry=FAST)
        assert storage.check_bucket()
        yield proxy, storage, direct


@pytest.fixture
def proxy(connected):
    connected[0].clear()
    yield connected[0]
    connected[0].clear()


@pytest.fixture
def storage(connected, proxy):
    """The bucket as seen through the proxy."""
    return connected[1]


@pytest.fixture
def direct(connected, proxy):
    """The same bucket without the proxy: what is really stored. Emptied after each test."""
    yield connected[2]
    for key in connected[2].list(""):
        connected[2].delete(key)


def test_one_request_each(storage, proxy, direct):
    body = random.Random(1).randbytes(101 << 20)
    assert (
        storage.put_new("large", [memoryview(body)[: 1 << 20], memoryview(body)[1 << 20 :]])
        is PutOutcome.CREATED
    )
    assert direct.head("large") == len(body)
    assert storage.put_new("small", [b"x"]) is PutOutcome.CREATED
    assert storage.get("small") == b"x"
    assert storage.get_ranges("large", [(0, 10), (5 << 20, (5 << 20) + 10)]) == [
        body[:10],
        body[5 << 20 : (5 << 20) + 10],
    ]
    storage.delete("small")
    assert [method for method, _ in proxy.requests] == ["PUT", "PUT", "GET", "GET", "GET", "DELETE"]


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_lost_acknowledgements_are_no_conflicts(storage, proxy, direct, size):
    """15 puts whose answer is lost after the server did them, one or two in a row: 0 false conflicts, 0 duplicates."""
    for i in range(15 if size < 100 else 3):
        body = random.Random(i).randbytes(size)
        proxy.inject(*[Fault("PUT", "drop-response")] * (1 + i % 2))
        stored = write_new(storage, f"lost/{i:03}", [body], retry=FAST)
        assert proxy.pending() == 0
        assert direct.get(stored.key) == body
        assert read_verified(storage, stored) == body
    assert len(list(direct.list(""))) == (15 if size < 100 else 3)


def test_a_real_conflict_stays_one_when_the_answer_is_lost(storage, proxy, direct):
    direct.put_new("taken", [b"theirs"])
    proxy.inject(Fault("PUT", "drop-response"))
    with pytest.raises(ConflictError) as caught:
        write_new(storage, "taken", [b"ours!!"], retry=FAST)
    assert caught.value.kind is ErrorKind.ALREADY_EXISTS
    assert direct.get("taken") == b"theirs"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "drop-request"),
        Fault("PUT", "503"),
        Fault("PUT", "500", code="InternalError"),
        Fault("PUT", "409", code="ConditionalRequestConflict"),
        Fault("PUT", "409", code="SomethingNew"),
        Fault("PUT", "400", code="RequestTimeout"),
    ],
    ids=lambda f: f"{f.action}-{f.code}",
)
def test_passing_faults_of_writes(storage, proxy, direct, fault):
    proxy.inject(fault, fault)
    assert storage.put_new("a", [b"body"]) is PutOutcome.CREATED
    assert proxy.hits == 2
    assert direct.get("a") == b"body"


def test_unanswered_writes_are_unknown_and_resolved_by_reading(storage, proxy, direct):
    proxy.inject(
        *[Fault("PUT", "drop-request")] * 8
    )  # aiohttp repeats once on a connection that it had before
    assert storage.put_new("a", [b"body"]) is PutOutcome.UNKNOWN
    proxy.clear()
    assert direct.get("a") is None
    proxy.inject(*[Fault("PUT", "503")] * 9)
    assert write_new(storage, "a", [b"body"], retry=FAST).nbytes == 4
    assert direct.get("a") == b"body"
    proxy.inject(*[Fault("PUT", "503")] * 16)
    with pytest.raises(StorageError) as caught:
        write_new(storage, "b", [b"body"], retry=FAST)
    assert caught.value.kind is ErrorKind.STORAGE_FAILED
    assert direct.get("b") is None


def test_writes_that_cannot_be_read_back_are_unknown(storage, proxy, direct):
    """The bytes are there, every answer is lost, and so is every question about them."""
    proxy.inject(*[Fault("PUT", "drop-response")] * 4, *[Fault("HEAD", "503")] * 4)
    with pytest.raises(StorageError) as caught:
        write_new(storage, "a", [b"body"], retry=RetryPolicy(attempts=1))
    assert caught.value.kind is ErrorKind.OUTCOME_UNKNOWN
    assert direct.get("a") == b"body"
    assert write_new(storage, "a", [b"body"], retry=FAST).nbytes == 4


@pytest.mark.parametrize("action", ["drop-request", "drop-response", "cut-body", "503"])
def test_passing_faults_of_reads(storage, proxy, direct, action):
    body = random.Random(2).randbytes(500_000)
    direct.put_new("a", [body])
    proxy.inject(*[Fault("GET", action)] * 3)
    assert storage.get("a") == body
    proxy.inject(*[Fault("GET", action)] * 3)
    out = bytearray(len(body))
    assert storage.read_into("a", 0, memoryview(out)) == len(body)
    assert out == body
    if action != "cut-body":
        proxy.inject(*[Fault("HEAD", action)] * 3)
        assert storage.head("a") == len(body)
        proxy.inject(*[Fault("GET", action, part="list-type=2")] * 3)
        assert list(storage.list("")) == ["a"]
    assert proxy.pending() == 0


@pytest.mark.parametrize("action", ["drop-response", "cut-body", "503"])
def test_lasting_faults_of_reads_are_never_absence(storage, proxy, direct, action):
    direct.put_new("a", [b"body" * 1000])
    operations = [
        lambda: storage.get("a"),
        lambda: storage.get_ranges("a", [(0, 400)]),
        lambda: storage.read_into("a", 0, memoryview(bytearray(400))),
    ]
    if action != "cut-body":
        operations += [lambda: list(storage.list("")), lambda: storage.get("b")]
    for operation in operations:
        proxy.inject(*[Fault("GET", action)] * 8)
        with pytest.raises(StorageError, match="gave up after 4 attempts") as caught:
            operation()
        assert caught.value.kind is ErrorKind.STORAGE_FAILED
        proxy.clear()


def test_only_failed_ranges_are_asked_again(storage, proxy, direct):
    body = bytes(range(256)) * 40
    direct.put_new("a", [body])
    ranges = [(i * 100, i * 100 + 50) for i in range(40)]
    proxy.inject(Fault("GET", "503"), Fault("GET", "drop-response"), Fault("GET", "cut-body"))
    assert storage.get_ranges("a", ranges) == [body[a:b] for a, b in ranges]
    assert proxy.pending() == 0
    assert [method for method, _ in proxy.requests] == ["GET"] * 43


def test_what_not_found_means(storage, proxy, direct):
    direct.put_new("a", [b"body"])
    proxy.inject(Fault("GET", "404", code="NoSuchKey"))
    assert storage.get("a") is None
    proxy.inject(Fault("GET", "404", code="NoSuchBucket"))
    with pytest.raises(StorageError, match="does not exist") as caught:
        storage.get("a")
    assert caught.value.kind is ErrorKind.STORAGE_FAILED
    proxy.requests.clear()
    proxy.inject(Fault("GET", "404", code="404"))
    assert storage.get("a") is None
    assert "list-type=2" in proxy.requests[-1][1], "an unclear 404 needs a look at the bucket"
    proxy.inject(
        Fault("GET", "404", code="404"), Fault("GET", "404", part="list-type=2", code="NoSuchBucket")
    )
    with pytest.raises(StorageError, match="does not exist"):
        storage.get("a")


def test_refusals_are_not_repeated(storage, proxy, direct):
    direct.put_new("a", [b"body"])
    for code in ("AccessDenied", "ExpiredToken", "InvalidAccessKeyId"):
        proxy.requests.clear()
        proxy.inject(
            Fault("PUT", "403", code=code), Fault("DELETE", "403", code=code), Fault("GET", "403", code=code)
        )
        for operation in (lambda: storage.put_new("b", [b"x"]), lambda: storage.delete("a")):
            with pytest.raises(StorageError, match="credentials") as caught:
                operation()
            assert caught.value.kind is ErrorKind.READ_ONLY
        with pytest.raises(StorageError, match="credentials") as caught:
            storage.get("a")
        assert caught.value.kind is ErrorKind.STORAGE_FAILED
        assert len(proxy.requests) == 3
    assert direct.get("a") == b"body"


def test_missing_bucket(s3_server, bucket):
    url = f"s3://{bucket}/test.store"
    storage = open_storage(url, storage_options=s3_server.storage_options)
    s3_server.delete_bucket(bucket)
    operations = [
        lambda: storage.get("x"),
        lambda: storage.head("x"),
        lambda: storage.get_ranges("x", [(0, 2)]),
        lambda: storage.read_into("x", 0, memoryview(bytearray(3))),
        lambda: list(storage.list("a/")),
        lambda: list(storage.list("")),
        lambda: storage.put_new("x", [b"1"]),
        lambda: storage.put_hint("x", b"1"),
        lambda: storage.delete("x"),
        lambda: probe(storage),
    ]
    for operation in operations:
        with pytest.raises(StorageError, match=f"bucket '{bucket}' does not exist"):
            operation()
    for create in (False, True):
        with pytest.raises(NotFoundError, match="does not exist") as caught:
            open_storage(url, create=create, storage_options=s3_server.storage_options)
        assert caught.value.kind is ErrorKind.STORE_NOT_FOUND


def test_no_secret_in_anything_shown(storage, proxy, direct, s3_server, bucket):
    shown = [repr(storage), str(storage), storage.url, storage.probe_scope, f"{storage!r:>80}"]
    proxy.inject(
        Fault("GET", "403", code=CANARY),
        Fault("PUT", "403", code=CANARY),
        *[Fault("GET", "503", code=CANARY)] * 4,
    )
    for operation in (
        lambda: storage.get("a"),
        lambda: storage.put_new("a", [b"x"]),
        lambda: list(storage.list("")),
    ):
        with pytest.raises(StorageError) as caught:
            operation()
        shown += traceback.format_exception(caught.value)
        shown += [repr(caught.value), str(pickle.loads(pickle.dumps(caught.value)))]
    with pytest.raises(NotFoundError) as missing:
        open_storage("s3://no-such-bucket-here", storage_options=s3_server.storage_options)
    shown += traceback.format_exception(missing.value)
    assert not [text for text in shown if CANARY in text or s3_server.storage_options["key"] in text]
    assert CANARY.encode() in pickle.dumps(storage), "or the search above proves nothing"


def test_forks_are_refused(s3_server, bucket):
    code = """
import json
storage = open_storage(sys.argv[1], storage_options=json.loads(sys.argv[2]))
storage.put_new("a", [b"parent"])
child = os.fork()
if child == 0:
    try:
        storage.get("a")
    except ActstoreError as err:
        print(err.kind, "open the store in the new process" in str(err), flush=True)
        fresh = open_storage(sys.argv[1], storage_options=json.loads(sys.argv[2]))
        print(fresh.get("a"), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    told = children.run(code, f"s3://{bucket}/x", json.dumps(s3_server.storage_options))
    assert told == "storage-failed True\nb'parent'\n"


def test_credentials_from_the_environment(s3_server, bucket, monkeypatch):
    options = s3_server.storage_options
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", options.pop("key"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", options.pop("secret"))
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    storage = open_storage(f"s3://{bucket}", storage_options=options)
    assert storage.put_new("a", [b"x"]) is PutOutcome.CREATED
    assert list(storage.list("")) == ["a"]
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in pickle.dumps(storage)


def test_wrong_port_is_an_error_in_bounded_time(bucket):
    storage = ObjectStorage(
        "s3", bucket, "", {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"}, retry=FAST
    )
    with pytest.raises(StorageError, match="gave up after 4 attempts"):
        storage.get("a")
    assert storage.put_new("a", [b"x"]) is PutOutcome.UNKNOWN


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousand_faults(storage, proxy, direct):
    """Random faults, half of them lost acknowledgements, under writes and reads: nothing lost, doubled or misreported."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    patient = RetryPolicy(attempts=20, base_s=0.001, cap_s=0.002)
    n_written = 0
    while proxy.hits < 1000:
        actions = ["drop-response", "drop-response", "drop-request", "503"]
        proxy.inject(*[Fault("PUT", rng.choice(actions)) for _ in range(rng.randrange(4))])
        proxy.inject(*[Fault("GET", rng.choice([*actions, "cut-body"])) for _ in range(rng.randrange(3))])
        body = rng.randbytes(rng.choice([1, 100, 70_000]))
        stored = write_new(storage, f"many/{n_written:05}", [body], retry=patient)
        n_written += 1
        assert read_verified(storage, stored) == body
        assert direct.get(stored.key) == body
    assert len(list(direct.list("many/"))) == n_written
