import itertools

import pytest

from actstore.storage.local import LocalStorage
from actstore.storage.memory import MemoryStorage

_NUMBERS = itertools.count()


@pytest.fixture(params=["memory", "local"])
def storage(request, tmp_path):
    """A new, empty storage: one that reads by requests, one that reads files."""
    return new_memory() if request.param == "memory" else LocalStorage(tmp_path)


@pytest.fixture
def memory():
    return new_memory


def new_memory():
    return MemoryStorage(f"codec-{next(_NUMBERS)}")
