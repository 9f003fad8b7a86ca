"""What differs between the object stores that actstore can write to?

One `Backend` each: which package it needs, with which options its fsspec client is safe, how it creates an object only
if it is absent, and how to ask whether a bucket exists. Everything else is in `object_store.py`.

Known of the clients (fsspec family, 2026): `open(path, "xb")` must not be used, for s3fs overwrites an existing object
when the body is empty and leaves multipart uploads behind; `pipe_file(mode="create")` sends `If-None-Match: *` (S3),
`ifGenerationMatch=0` (GCS) or `overwrite=False` (Azure). gcsfs and adlfs retry on their own and cannot be told not to;
a repeated conditional create then says "exists", which every caller answers by reading back. So does aiohttp, below all
three, once, when a connection that it had used before is closed without an answer.
"""

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actstore.errors import ErrorKind, MissingDependencyError

_PUT_NBYTES = 128 << 20
"""Part size of uploads, in bytes. s3fs sends one PUT below twice this, so every shard (at most 128 MiB) is one request."""

_CONNECTIONS = 128
"""Per process and storage; botocore's default of 10 makes 100 small reads take twice as long."""

_COMMON = {"use_listings_cache": False, "skip_instance_cache": True}
"""fsspec's listing cache hides what others wrote, also from `exists()`; cached instances would share our settings."""


@dataclass(frozen=True, slots=True)
class Backend:
    """How one kind of object store is reached through fsspec."""

    protocol: str
    """The scheme of its URLs, as actstore writes it."""

    package: str
    """The importable package that fsspec needs for it."""

    extra: str
    """The extra of actstore that installs the package."""

    bucket_word: str
    """What the store calls a bucket."""

    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The client's options, made of the user's."""

    create: Mapping[str, Any]
    """Arguments of `pipe_file` for a conditional create."""

    get: Mapping[str, Any]
    """Arguments of `cat_file` for a whole object in one request."""

    check_bucket: Callable[[Any, str, str], None]
    """Called with (client, bucket, prefix): returns if the bucket exists, else raises FileNotFoundError."""

    def connect(self, options: Mapping[str, Any]) -> Any:
        """Return a new fsspec client with `options` of the user.

        Raises:
            MissingDependencyError: the package is not installed.
        """
        try:
            importlib.import_module(self.package)
        except ModuleNotFoundError as err:
            raise MissingDependencyError(
                ErrorKind.MISSING_DEPENDENCY,
                f"a store at {self.protocol}:// needs the package {self.package!r}, which is not installed: "
                f"pip install 'actstore[{self.extra}]'",
            ) from err
        fsspec = importlib.import_module("fsspec")
        client = fsspec.filesystem(self.protocol, **self.options(options))
        if self.protocol == "s3":
            client.retries = 1  # attempts, not repetitions
        return client


def _s3_options(user: Mapping[str, Any]) -> dict[str, Any]:
    """Return s3fs options: the user's, our timeouts and pool unless given, and never a retry by botocore."""
    options = {**copy.deepcopy(dict(user)), **_COMMON}
    given = options.get("config_kwargs", {})
    options["config_kwargs"] = {
        "max_pool_connections": _CONNECTIONS,
        "connect_timeout": 10,
        "read_timeout": 60,
        **given,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
    }
    return options


def _plain_options(user: Mapping[str, Any]) -> dict[str, Any]:
    return {**copy.deepcopy(dict(user)), **_COMMON}


def _check_s3_bucket(client: Any, bucket: str, prefix: str) -> None:
    # Asking for the store's own prefix needs no right beyond the one that listing needs anyway.
    client.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)


def _check_gcs_bucket(client: Any, bucket: str, prefix: str) -> None:
    client.call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=1, json_out=True)


def _check_azure_container(client: Any, bucket: str, _prefix: str) -> None:
    if not client.exists(bucket):
        raise FileNotFoundError(bucket)


S3 = Backend(
    protocol="s3",
    package="s3fs",
    extra="s3",
    bucket_word="bucket",
    options=_s3_options,
    create={"mode": "create", "chunksize": _PUT_NBYTES},
    get={"max_concurrency": 1},
    check_bucket=_check_s3_bucket,
)

GCS = Backend(
    protocol="gs",
    package="gcsfs",
    extra="gcs",
    bucket_word="bucket",
    options=_plain_options,
    create={"mode": "create", "chunksize": 2 * _PUT_NBYTES},
    get={},
    check_bucket=_check_gcs_bucket,
)

AZURE = Backend(
    protocol="az",
    package="adlfs",
    extra="azure",
    bucket_word="container",
    options=_plain_options,
    create={"mode": "create"},
    get={},
    check_bucket=_check_azure_container,
)

BACKENDS = {backend.protocol: backend for backend in (S3, GCS, AZURE)}
"""By protocol. Pickles carry the protocol, never the backend."""
