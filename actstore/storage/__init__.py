"""Write-once objects in folders and buckets: the only code of actstore that touches a file system or an object store."""

from actstore.storage.base import Buffer, PutOutcome, Storage
from actstore.storage.local import LocalStorage
from actstore.storage.memory import MemoryStorage
from actstore.storage.object_store import ObjectStorage
from actstore.storage.open import Location, open_storage, parse_location
from actstore.storage.probe import probe
from actstore.storage.readonly import HttpStorage, ReadOnlyStorage
from actstore.storage.retry import DEFAULT_RETRY, RetryPolicy
from actstore.storage.write import read_verified, write_new

__all__ = [
    "DEFAULT_RETRY",
    "Buffer",
    "HttpStorage",
    "LocalStorage",
    "Location",
    "MemoryStorage",
    "ObjectStorage",
    "PutOutcome",
    "ReadOnlyStorage",
    "RetryPolicy",
    "Storage",
    "open_storage",
    "parse_location",
    "probe",
    "read_verified",
    "write_new",
]
