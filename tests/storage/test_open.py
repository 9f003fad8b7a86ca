"""Which texts open which storage, and which open none."""

import os
import pickle
import random
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import (
    ActstoreError,
    ErrorKind,
    InvalidInputError,
    MissingDependencyError,
    NotFoundError,
    StorageError,
)
from actstore.storage import (
    HttpStorage,
    LocalStorage,
    Location,
    MemoryStorage,
    RetryPolicy,
    open_storage,
    parse_location,
    read_verified,
    write_new,
)
from tests.storage import children

NO_PAUSE = RetryPolicy(attempts=3, sleep=lambda seconds: None)


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("/data/my.store", Location("file", "", "/data/my.store")),
        (Path("/data/x y?#::"), Location("file", "", "/data/x y?#::")),
        ("my store", Location("file", "", os.path.abspath("my store"))),
        ("a/../b/./c/", Location("file", "", os.path.abspath("b/c"))),
        ("~/x", Location("file", "", os.path.expanduser("~/x"))),
        ("file:///data/x", Location("file", "", "/data/x")),
        ("FILE:///data/x", Location("file", "", "/data/x")),
        ("memory://scratch", Location("memory", "scratch", "")),
        ("s3://my-bucket", Location("s3", "my-bucket", "")),
        ("s3://my-bucket/", Location("s3", "my-bucket", "")),
        ("s3a://my-bucket/a/b.store/", Location("s3", "my-bucket", "a/b.store")),
        ("gs://b.c_d/x", Location("gs", "b.c_d", "x")),
        ("gcs://b.c_d/x", Location("gs", "b.c_d", "x")),
        ("az://container/x", Location("az", "container", "x")),
        ("abfs://container/x", Location("az", "container", "x")),
        ("http://localhost:8000/a/b", Location("http", "localhost:8000", "a/b")),
        ("https://[::1]:8000/a", None),
        ("https://host.example", Location("https", "host.example", "")),
    ],
)
def test_urls_that_mean_something(url, location):
    if location is None:
        with pytest.raises(InvalidInputError):
            parse_location(url)
    else:
        assert parse_location(url) == location


@pytest.mark.parametrize(
    "url",
    [
        "",
        "  ",
        "a\0b",
        "a\nb",
        "simplecache::s3://bucket/x",
        "zip://a::file:///x",
        "::",
        "ftp://host/x",
        "sftp://host/x",
        "hdfs://host/x",
        "data://x",
        "reference://x",
        "github://o:r@/x",
        "s3:bucket/x",
        "file:/x",
        "file://host/x",
        "file:///x?y",
        "memory://",
        "memory://a/b",
        "memory://../x",
        "s3://",
        "s3:///x",
        "s3://ab",
        "s3://bucket/../x",
        "s3://bucket//x",
        "s3://bucket/.hidden/x",
        "s3://bucket/x?versionId=1",
        "s3://bucket/x#y",
        "s3://bucket%2F/x",
        "abfss://container@account.dfs.core.windows.net/x",
        "http://user:pass@host/x",
        "http://host/x?token=1",
        "http:///x",
        "http://host:port/x",
    ],
)
def test_urls_that_mean_nothing(url):
    with pytest.raises(ActstoreError) as caught:
        open_storage(url, create=True)
    assert caught.value.kind in (ErrorKind.BAD_URL, ErrorKind.BAD_NAME)


def test_secrets_in_urls_are_not_repeated():
    for url in ("s3://AKIA:hunter22@bucket/x", "https://user:hunter22@host/x"):
        with pytest.raises(InvalidInputError, match="storage_options") as caught:
            open_storage(url)
        assert "hunter22" not in str(caught.value)
    for options in (
        {"endpoint_url": "http://user:hunter22@host"},
        {"client_kwargs": {"endpoint_url": "http://u:hunter22@h"}},
    ):
        with pytest.raises(InvalidInputError, match="endpoint_url") as caught:
            open_storage("s3://bucket/x", storage_options=options)
        assert "hunter22" not in str(caught.value)
    with pytest.raises(InvalidInputError, match="takes no storage_options") as caught:
        open_storage("memory://x", storage_options={"secret": "hunter22"})
    assert "hunter22" not in str(caught.value)


@given(st.text(max_size=30))
def test_any_text_is_a_location_or_a_known_error(text):
    kind = location = None
    try:
        location = parse_location(text)
    except ActstoreError as err:
        kind = err.kind
    if location is None:
        assert kind in (ErrorKind.BAD_URL, ErrorKind.BAD_NAME)
    else:
        assert location.protocol in ("file", "memory", "s3", "gs", "az", "http", "https")
        assert "::" not in location.path
        assert location.protocol != "file" or os.path.isabs(location.path)


def test_folders(tmp_path, monkeypatch):
    missing = tmp_path / "a" / "b"
    with pytest.raises(NotFoundError, match="create=True") as caught:
        open_storage(missing)
    assert caught.value.kind is ErrorKind.STORE_NOT_FOUND
    assert not missing.parent.exists()
    made = open_storage(str(missing), create=True)
    assert isinstance(made, LocalStorage)
    made.put_new("x", [b"1"])
    assert open_storage(f"file://{missing}").get("x") == b"1"
    assert open_storage(missing, create=True).get("x") == b"1"
    monkeypatch.chdir(tmp_path)
    relative = open_storage("a/b")
    monkeypatch.chdir("/")
    assert relative.get("x") == b"1", "a relative path is of the folder where it was opened"
    assert relative.url == str(missing)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_storage("~/a/b").get("x") == b"1"


@pytest.mark.parametrize("create", [False, True])
def test_a_file_is_no_store(tmp_path, create):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(InvalidInputError):
        open_storage(tmp_path / "file", create=create)
    if create:
        with pytest.raises(InvalidInputError):
            open_storage(tmp_path / "file" / "below", create=True)


def test_memory_is_shared_by_name_and_bound_to_the_process():
    first, second = open_storage("memory://shared"), open_storage("memory://shared")
    first.put_new("a", [b"x"])
    assert second.get("a") == b"x"
    assert open_storage("memory://other").get("a") is None
    code = """
import pickle
storage = pickle.loads(bytes.fromhex(sys.argv[1]))
try:
    storage.get("a")
except ActstoreError as err:
    print(err.kind, "exists only in process" in str(err))
"""
    assert children.run(code, pickle.dumps(first).hex()) == "storage-failed True\n"
    elsewhere = MemoryStorage("elsewhere")
    elsewhere.__setstate__({"name": "elsewhere", "pid": os.getpid() + 1})
    with pytest.raises(StorageError, match="exists only in process"):
        list(elsewhere.list(""))


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://bucket/x", "s3fs", "s3"), ("gs://bucket/x", "gcsfs", "gcs"), ("az://bucket/x", "adlfs", "azure")],
)
def test_missing_packages_name_the_extra(monkeypatch, url, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'actstore\[{extra}\]'"):
        open_storage(url)


def test_importing_storage_imports_no_client():
    code = "print([m for m in ('fsspec', 's3fs', 'aiohttp', 'botocore') if m in sys.modules])"
    assert children.run(code) == "[]\n"


class Ranged(BaseHTTPRequestHandler):
    """Serves one object, honours ranges, and counts what it is asked; fails the first `n_failures` requests."""

    body = random.Random(5).randbytes(5000)
    n_failures = 0

    def do_GET(self) -> None:
        if type(self).n_failures > 0:
            type(self).n_failures -= 1
            self.send_error(503)
            return
        if self.path != "/my.store/a/b":
            self.send_error(404 if "missing" in self.path else 403)
            return
        part, status = self.body, 200
        if given := self.headers.get("Range"):
            start, _, last = given.removeprefix("bytes=").partition("-")
            part, status = self.body[int(start) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


class Quiet(SimpleHTTPRequestHandler):
    """Python's own file server, which ignores ranges."""

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@pytest.fixture
def serve():
    servers = []

    def start(handler) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("with_ranges", [True, False])
def test_http_with_and_without_ranges(serve, tmp_path, with_ranges):
    source = open_storage(tmp_path / "my.store", create=True)
    stored = write_new(source, "a/b", [Ranged.body])
    handler = Ranged if with_ranges else partial(Quiet, directory=str(tmp_path))
    storage = open_storage(f"{serve(handler)}/my.store/")
    assert storage.get("a/b") == Ranged.body
    assert storage.head("a/b") == 5000
    ranges = [(0, 10), (10, 20), (4990, 6000), (5000, 5001), (0, 5000), (7, 7)]
    assert storage.get_ranges("a/b", ranges) == [Ranged.body[a:b] for a, b in ranges]
    out = bytearray(100)
    assert storage.read_into("a/b", 4950, memoryview(out)) == 50
    assert out == Ranged.body[4950:] + bytes(50)
    assert read_verified(storage, stored) == Ranged.body
    assert read_verified(pickle.loads(pickle.dumps(storage)), stored) == Ranged.body
    assert storage.get("missing") is None
    assert storage.head("missing") is None
    assert storage.get_ranges("missing", [(0, 1)]) is None
    assert not storage.writable
    for operation in (
        lambda: storage.put_new("x", [b"1"]),
        lambda: storage.put_hint("x", b"1"),
        lambda: storage.delete("a/b"),
    ):
        with pytest.raises(StorageError) as caught:
            operation()
        assert caught.value.kind is ErrorKind.READ_ONLY
    with pytest.raises(StorageError, match="cannot list"):
        storage.list("")


def test_http_failures_are_not_absence(serve):
    storage = HttpStorage(f"{serve(Ranged)}/my.store", retry=NO_PAUSE)
    with pytest.raises(StorageError):
        storage.get("forbidden")
    with pytest.raises(StorageError):
        storage.head("forbidden")
    Ranged.n_failures = 2
    assert storage.get("a/b") == Ranged.body
    Ranged.n_failures = 100
    for operation in (storage.get, storage.head):
        with pytest.raises(StorageError):
            operation("a/b")
    Ranged.n_failures = 0
