"""Storages of every kind that actstore writes to, empty and new for each test."""

import uuid
from collections.abc import Iterator

import pytest

from actstore.storage import LocalStorage, MemoryStorage, Storage, open_storage
from tests.s3_server import S3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(scope="session")
def s3_connected(s3_server: S3Server) -> Storage:
    url = f"s3://{s3_server.make_bucket()}/team/test.store"
    return open_storage(url, storage_options=s3_server.storage_options)


@pytest.fixture
def s3_storage(s3_connected: Storage) -> Iterator[Storage]:
    yield s3_connected
    for key in s3_connected.list(""):
        s3_connected.delete(key)


@pytest.fixture
def local_storage(tmp_path) -> LocalStorage:
    storage = open_storage(tmp_path / "test.store", create=True)
    assert isinstance(storage, LocalStorage)
    return storage


@pytest.fixture(params=["memory", "local", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request) -> Storage:
    if request.param == "memory":
        return MemoryStorage(f"test-{uuid.uuid4().hex}")
    return request.getfixturevalue(f"{request.param}_storage")
