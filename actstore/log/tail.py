"""How are the newest versions found and fetched without trusting a listing? (FORMAT.md, section 4.8)

Versions are probed by key: the first that is absent ends the history. Several are fetched at a time, which hides the
latency of an object store; how far ahead depends on what is known to exist, so that a reader with nothing new to read
makes one request.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from actstore.errors import ErrorKind, FormatError
from actstore.log.manifest import MANIFESTS, manifest_key, parse_manifest_key
from actstore.storage.base import Storage

_MAX_AHEAD = 256
"""Versions fetched at a time: 8 for each of 32 connections, and about 256 KiB of memory with usual manifests."""

_THREADS = 32


def read_tail(storage: Storage, start: int, *, known: int) -> Iterator[tuple[int, bytes]]:
    """Yield `(version, bytes)` of the versions from `start` on until one is absent.

    Costs one read per version and one for the end; a few more when there are many versions beyond `known`.

    Args:
        storage: Where the store is.
        start: First version to fetch.
        known: A version that certainly was committed, or -1.

    Raises:
        FormatError: (HISTORY_TRUNCATED) a version is absent although `known` or a later one says that it was committed.
    """
    version, ahead = start, 1
    while True:
        count = min(_MAX_AHEAD, max(ahead, known - version + 1))
        for data in _fetch(storage, version, count):
            if data is None:
                if version <= known:
                    raise truncated(version, f"version {known} was committed")
                return
            yield version, data
            version += 1
        ahead = min(_MAX_AHEAD, 2 * ahead)


def check_listing(storage: Storage) -> int:
    """Return the newest version that a listing shows, or -1 when it shows none.

    Raises:
        FormatError: (HISTORY_TRUNCATED) the listing has a gap.
    """
    expected = 0
    for key in storage.list(MANIFESTS):
        version = parse_manifest_key(key)
        if version is None:
            continue
        if version != expected:
            # It may have been created after the listing went past its place, but before a later version that is listed.
            for missing in range(expected, version):
                if storage.head(manifest_key(missing)) is None:
                    raise truncated(missing, f"version {version} is there")
        expected = version + 1
    return expected - 1


def truncated(version: int, evidence: str) -> FormatError:
    """Return the error for a version that is gone."""
    return FormatError(
        ErrorKind.HISTORY_TRUNCATED,
        f"{manifest_key(version)} is missing although {evidence}: restore it from a backup; an older state is not "
        "served in its place (if the evidence is known to be wrong, remove the object _hint)",
    )


def _fetch(storage: Storage, start: int, count: int) -> list[bytes | None]:
    """Return `count` versions from `start` on, cut after the first absent one."""
    if count == 1 or storage.local_path(manifest_key(start)) is not None:
        # On a local disk threads would only wait for the interpreter.
        return _fetch_slice(storage, start, start + count)
    n_slices = min(_THREADS, count)
    bounds = [start + count * i // n_slices for i in range(n_slices + 1)]
    with ThreadPoolExecutor(n_slices) as pool:
        futures = [pool.submit(_fetch_slice, storage, a, b) for a, b in pairwise(bounds)]
        slices = [future.result() for future in futures]
    found: list[bytes | None] = []
    for i, part in enumerate(slices):
        if part[-1] is None and any(later[0] is not None for later in slices[i + 1 :]):
            part = _close_gap(storage, bounds[i], bounds[i + 1], part)
        found += part
        if part[-1] is None:
            break
    return found


def _fetch_slice(storage: Storage, start: int, stop: int) -> list[bytes | None]:
    found: list[bytes | None] = []
    for version in range(start, stop):
        found.append(storage.get(manifest_key(version)))
        if found[-1] is None:
            break
    return found


def _close_gap(storage: Storage, start: int, stop: int, part: list[bytes | None]) -> list[bytes | None]:
    # A later version was seen, so this one existed by then: absence was a race, unless it is still absent.
    again = _fetch_slice(storage, start + len(part) - 1, stop)
    if again[-1] is None:
        raise truncated(start + len(part) + len(again) - 2, "a later version is there")
    return part[:-1] + again
