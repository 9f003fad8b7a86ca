"""Which storage does a path or URL mean?

Only protocols on a list are opened, because fsspec would follow many more, chained ones included, to files and hosts that
nobody meant. A URL carries no credentials: these go into `storage_options` or the environment.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from actstore.errors import ErrorKind, FormatError, InvalidInputError, NotFoundError, StorageError
from actstore.names import check_key, check_name
from actstore.storage import durable
from actstore.storage.backends import BACKENDS
from actstore.storage.base import Storage
from actstore.storage.local import LocalStorage
from actstore.storage.memory import MemoryStorage
from actstore.storage.object_store import ObjectStorage
from actstore.storage.readonly import HttpStorage

_ALIASES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "local": "file"}
_PROTOCOLS = ("file", "memory", "s3", "gs", "az", "http", "https")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_LOOKS_LIKE_URL = re.compile(rf"(?:{'|'.join((*_PROTOCOLS, *_ALIASES))}):", re.IGNORECASE)
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]{1,220}[A-Za-z0-9]")
_HOST = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class Location:
    """Where a store is."""

    protocol: str
    """One of file, memory, s3, gs, az, http, https."""

    place: str
    """Bucket, container, host or name of a memory store; empty for a folder."""

    path: str
    """Absolute path of a folder; prefix in a bucket or path on a host, without slashes around it."""


def parse_location(url: str | os.PathLike[str]) -> Location:
    """Return what `url` means.

    Args:
        url: A path (`~` is expanded), `file:///folder`, `memory://name`, `s3://bucket/prefix`, `gs://bucket/prefix`,
            `az://container/prefix`, or `http(s)://host/path`.

    Raises:
        InvalidInputError: anything else; a chain (`::`), credentials, a query or a fragment in a URL.

    >>> parse_location("s3://bucket/team/my.store/")
    Location(protocol='s3', place='bucket', path='team/my.store')
    """
    if not isinstance(url, str):
        return Location("file", "", _folder(os.fspath(url), expand_user=False))
    if not url.strip() or any(ord(char) < 32 or ord(char) == 127 for char in url):
        _bad_url(url, "it is empty or has control characters")
    if "::" in url:
        _bad_url(url, "'::' chains file systems, which actstore does not follow")
    match = _SCHEME.fullmatch(url)
    if match is None:
        if _LOOKS_LIKE_URL.match(url):
            _bad_url(url, "after the protocol there must be '://'")
        return Location("file", "", _folder(url, expand_user=True))
    protocol = _ALIASES.get(match[1].lower(), match[1].lower())
    if protocol not in _PROTOCOLS:
        _bad_url(f"{match[1]}://...", f"the protocol is not one of {', '.join(_PROTOCOLS)}")
    return _parse_rest(url, protocol, match[2])


def _parse_rest(url: str, protocol: str, rest: str) -> Location:
    """Return the location of a URL with an allowed protocol; `rest` is what follows `://`."""
    place, _, path = rest.partition("/")
    if "@" in place:
        # The URL is not repeated: it may hold a password.
        _bad_url(
            f"{protocol}://...", "it has user information before '@': give credentials as storage_options"
        )
    if "?" in rest or "#" in rest:
        _bad_url(f"{protocol}://{place}...", "it has a query or a fragment")
    if protocol == "file":
        if place:
            _bad_url(url, "a file URL is file:///absolute/folder")
        return Location("file", "", _folder(f"/{path}", expand_user=False))
    path = path.removesuffix("/")
    if protocol == "memory":
        if path:
            _bad_url(url, "a memory store is memory://name")
        return Location("memory", check_name(place, what="name of a memory store"), "")
    pattern, what = (_HOST, "host") if protocol in ("http", "https") else (_BUCKET, "bucket")
    if not pattern.fullmatch(place):
        _bad_url(url, f"{place!r} is not the name of a {what}")
    if path:
        try:
            check_key(path)
        except FormatError:
            _bad_url(
                url, f"its path {path!r} has parts other than A-Z a-z 0-9 _ . @ ~ = - or starting with a dot"
            )
    return Location(protocol, place, path)


def _folder(path: str, *, expand_user: bool) -> str:
    if "\0" in path:
        _bad_url(path, "it has control characters")
    return os.path.abspath(os.path.expanduser(path) if expand_user else path)


def _bad_url(url: str, problem: str) -> None:
    raise InvalidInputError(
        ErrorKind.BAD_URL,
        f"cannot open a store at {url!r}: {problem}; use a path, s3://bucket/prefix, gs://bucket/prefix, "
        "az://container/prefix, or http(s)://host/path to read",
    )


def open_storage(
    url: str | os.PathLike[str], *, create: bool = False, storage_options: Mapping[str, Any] | None = None
) -> Storage:
    """Return the storage at `url`; see `parse_location` for what it may be.

    Stores at http(s) URLs are read-only. Nothing is asked of a bucket but whether it exists.

    Args:
        url: A path or URL.
        create: Make the folder if it is missing. Buckets are never made.
        storage_options: Options of the fsspec client, such as `key`, `secret` and `endpoint_url` of s3fs. They are kept in
            memory (and in pickles), and never in a store, message or log.

    Raises:
        InvalidInputError: `url` is not one of these, or options are given for a place that takes none.
        NotFoundError: the folder or the bucket does not exist.
        MissingDependencyError: the client for this protocol is not installed.
        StorageError: the store did not answer.

    >>> open_storage("memory://doctest").put_new("a", [b"bytes"]).value
    'created'
    """
    location = parse_location(url)
    options = dict(storage_options or {})
    if location.protocol in BACKENDS:
        return _open_bucket(location, options)
    if options:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"a store at {location.protocol}:// takes no storage_options, got {sorted(options)}",
        )
    if location.protocol == "memory":
        return MemoryStorage(location.place)
    if location.protocol in ("http", "https"):
        return HttpStorage(f"{location.protocol}://{location.place}/{location.path}")
    return _open_folder(location.path, create=create)


def _open_folder(path: str, *, create: bool) -> LocalStorage:
    if create:
        try:
            durable.make_directories(path)
        except (FileExistsError, NotADirectoryError) as err:
            raise InvalidInputError(
                ErrorKind.BAD_URL,
                f"cannot make a store at {path!r}: a file is in the way: choose another path",
            ) from err
        except OSError as err:
            raise StorageError(
                ErrorKind.STORAGE_FAILED,
                f"cannot make the folder {path!r} of a store: {err.strerror}: choose another path",
            ) from err
    elif not os.path.isdir(path):
        if os.path.lexists(path):
            raise InvalidInputError(
                ErrorKind.BAD_URL, f"{path!r} is not a folder, and a store is one: check the path"
            )
        raise NotFoundError(
            ErrorKind.STORE_NOT_FOUND,
            f"there is no store at {path!r}: check the path, or make a store with create=True",
        )
    return LocalStorage(path)


def _open_bucket(location: Location, options: Mapping[str, Any]) -> ObjectStorage:
    _check_endpoint(options)
    storage = ObjectStorage(location.protocol, location.place, location.path, options)
    if not storage.check_bucket():
        word = BACKENDS[location.protocol].bucket_word
        raise NotFoundError(
            ErrorKind.STORE_NOT_FOUND,
            f"there is no store at {storage.url!r}: {word} {location.place!r} does not exist: check the name and the "
            f"endpoint, or create the {word}",
        )
    return storage


def _check_endpoint(options: Mapping[str, Any]) -> None:
    """Raise if an endpoint carries credentials: endpoints are shown in messages."""
    client = options.get("client_kwargs")
    for given in (
        options.get("endpoint_url"),
        client.get("endpoint_url") if isinstance(client, Mapping) else None,
    ):
        if given is not None and ("@" in urlsplit(str(given)).netloc or urlsplit(str(given)).query):
            raise InvalidInputError(
                ErrorKind.BAD_URL,
                "endpoint_url has user information or a query: give credentials as key and secret",
            )
