"""What sparse tests share: a storage in memory that counts what is asked of it."""

import hashlib
import uuid

import pytest

from actstore.log.values import StoredObject
from actstore.sparse.parts import clear_caches
from actstore.storage.memory import MemoryStorage


class CountingStorage:
    """A memory storage that notes every read."""

    def __init__(self):
        self.inner = MemoryStorage(uuid.uuid4().hex)
        self.requests = []

    def put(self, key, data):
        """Store bytes and return the object as a manifest would promise it."""
        self.inner.put_new(key, [data])
        return StoredObject(key, len(data), hashlib.sha256(data).hexdigest())

    def replace(self, key, data):
        """Damage an object; an empty one is gone."""
        self.inner.delete(key)
        if data:
            self.inner.put_new(key, [data])

    def get_ranges(self, key, ranges):
        self.requests += [(key, *r) for r in ranges]
        return self.inner.get_ranges(key, ranges)

    def get(self, key):
        return self.inner.get(key)


@pytest.fixture
def storage():
    clear_caches()
    return CountingStorage()
