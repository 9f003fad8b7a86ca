"""How are parts of a stored object read so that none is trusted unchecked, and none is read twice in a row?

Objects of codes and postings end with a *directory*, whose place and SHA-256 the manifest holds in the unit's `meta`. The
directory has the CRC-32C of every page, so a page that is damaged, cut, or swapped with another one is noticed when it is read.
Directories and decoded pages are kept in two caches of the process, bounded in bytes and named by the objects' hashes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from actstore.codec.cache import BytesCache
from actstore.codec.crc import crc32c
from actstore.errors import ErrorKind, FormatError
from actstore.log.values import StoredObject
from actstore.storage.base import Storage

DIRECTORY_CACHE_BYTES: Final = 128 << 20
"""Directories of about 1,000 units or 1,000 segments of 16,384 latents each."""

PAGE_CACHE_BYTES: Final = 64 << 20
"""Decoded pages: about 160 of 65,536 codes, or 200 of 32,768 postings."""

_REQUEST_BYTES: Final = 8 << 20
"""Pages that follow each other are read by one request up to this size."""

_BATCH_BYTES: Final = 32 << 20
"""Encoded pages in memory at once; their requests run side by side where the storage can."""

_DIRECTORIES: BytesCache[Any] = BytesCache(DIRECTORY_CACHE_BYTES)
_PAGES: BytesCache[Any] = BytesCache(PAGE_CACHE_BYTES)

T = TypeVar("T")
S = TypeVar("S", bound=np.generic)


@dataclass(frozen=True, slots=True)
class DirectoryRef:
    """Where an object's directory is, as the manifest says."""

    offset: int
    nbytes: int
    sha256: str
    """Of these bytes, hex."""

    def to_json(self) -> list[Any]:
        """Return what a unit's `meta` says of it."""
        return [self.offset, self.nbytes, self.sha256]

    @classmethod
    def of(cls, directory: bytes, offset: int) -> "DirectoryRef":
        """Return the place of a directory that begins at `offset`."""
        return cls(offset, len(directory), hashlib.sha256(directory).hexdigest())


@dataclass(frozen=True, slots=True)
class Promised:
    """What the manifest says of an object: nothing that is made of the object's bytes may be larger."""

    nnz: int
    """Codes or postings."""
    n_rows: int | None
    """Of codes; None where that is not known."""
    latents: range | None
    """All of the dictionary, or those of a segment; None where that is not known."""
    pages_end: int
    """Where the pages end: the directory's offset."""


@dataclass(frozen=True, slots=True)
class PageTable:
    """Where the pages of an object lie: one after another, without gaps."""

    offsets: npt.NDArray[np.int64]
    """Shape (n_pages + 1,): first byte of every page, and the end of the last."""

    crcs: npt.NDArray[np.uint32]
    """Shape (n_pages,): CRC-32C of every page."""


class ObjectParts:
    """The parts of one promised object; safe for use from many threads, pickles."""

    def __init__(self, storage: Storage, obj: StoredObject, directory: Any) -> None:
        """Take an object; reads nothing yet.

        Args:
            storage: Where it is.
            obj: As the manifest promises it.
            directory: What its unit's `meta` says of its directory, `DirectoryRef.to_json()`.

        Raises:
            FormatError: `directory` is something else.
        """
        self.storage = storage
        self.object = obj
        self.ref = _parse_ref(obj, directory)

    def directory(self, parse: Callable[[bytes], tuple[T, int]]) -> T:
        """Return the parsed directory, from the cache or by one request.

        Args:
            parse: Gives the value and its size in memory; raises FormatError without naming the object.

        Raises:
            FormatError: the object is missing or damaged.
        """

        def load() -> tuple[T, int]:
            data = self._ranges([(self.ref.offset, self.ref.offset + self.ref.nbytes)])[0]
            if hashlib.sha256(data).hexdigest() != self.ref.sha256:
                raise self.damaged("its directory does not match the SHA-256 in the manifest")
            return self._named(parse, data)

        found: T = _DIRECTORIES.get(f"{self.ref.sha256}/{self.object.key}", load)
        return found

    def page(self, table: PageTable, number: int, decode: Callable[[int, bytes], tuple[T, int]]) -> T:
        """Return one decoded page, from the cache or by one request; see `pages`."""
        return self.pages(table, [number], decode)[0]

    def pages(
        self, table: PageTable, numbers: Sequence[int], decode: Callable[[int, bytes], tuple[T, int]]
    ) -> list[T]:
        """Return decoded pages, from the cache or read together: those that follow each other by one request.

        Args:
            table: Of the object.
            numbers: Ascending, without repeats.
            decode: Gives a page's value and its size in memory from its number and bytes; raises FormatError without
                naming the object.

        Raises:
            FormatError: the object is missing or damaged.
        """
        found: dict[int, T | None] = {n: _PAGES.find(self._page_key(n)) for n in numbers}
        for number, value, nbytes in self.scan(table, [n for n in numbers if found[n] is None], decode):
            _PAGES.put(self._page_key(number), value, nbytes)
            found[number] = value
        return [value for value in found.values() if value is not None]

    def scan(
        self, table: PageTable, numbers: Iterable[int], decode: Callable[[int, bytes], tuple[T, int]]
    ) -> Iterator[tuple[int, T, int]]:
        """Yield number, value and size of pages that are read, checked and decoded, past the cache.

        Holds the bytes of `_BATCH_BYTES` or one page at a time. Arguments are those of `pages`.
        """
        for number, data in self._raw_pages(table, list(numbers)):
            value, nbytes = self._named(partial(decode, number), data)
            yield number, value, nbytes

    def _raw_pages(self, table: PageTable, numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        for runs in _batches(table, numbers):
            ranges = [(int(table.offsets[run[0]]), int(table.offsets[run[-1] + 1])) for run in runs]
            for run, (start, _), data in zip(runs, ranges, self._ranges(ranges), strict=True):
                for number in run:
                    low, high = (int(table.offsets[n]) - start for n in (number, number + 1))
                    page = data if len(run) == 1 else data[low:high]
                    if crc32c(page) != int(table.crcs[number]):
                        raise self.damaged(f"page {number} of {len(table.crcs)} does not match its checksum")
                    yield number, page

    def _page_key(self, number: int) -> str:
        return f"{self.ref.sha256}/{self.object.key}/{number}"

    def damaged(self, found: str) -> FormatError:
        """Return the error for an object whose bytes are not what was written."""
        return FormatError(
            ErrorKind.OBJECT_DAMAGED,
            f"object {self.object.key!r} is damaged: {found}; restore it or write its unit again (see fsck)",
        )

    def _named(self, parse: Callable[[bytes], T], data: bytes) -> T:
        try:
            return parse(data)
        except FormatError as error:
            raise self.damaged(error.message) from error

    def _ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        found = self.storage.get_ranges(self.object.key, ranges)
        if found is None:
            raise FormatError(
                ErrorKind.OBJECT_MISSING,
                f"object {self.object.key!r} is in the manifest and not in the storage: restore it (see fsck)",
            )
        for (start, stop), data in zip(ranges, found, strict=True):
            if len(data) != stop - start:
                raise self.damaged(f"it ends before byte {stop} of {self.object.nbytes}")
        return found


def clear_caches() -> None:
    """Forget all directories and decoded pages: the next reads go to the storage."""
    _DIRECTORIES.clear()
    _PAGES.clear()


def checked_entry(obj: StoredObject, meta: Any) -> Any:
    """Return where the directory is from what an encoder returned with an object.

    Raises:
        FormatError: it is something else (INVARIANT_BROKEN), or of a newer format (FORMAT_TOO_NEW).
    """
    if not isinstance(meta, Mapping) or not isinstance(meta.get("format"), int):
        raise _broken(obj, f"its unit says {meta!r:.80} of it")
    if meta["format"] != 1:
        raise FormatError(
            ErrorKind.FORMAT_TOO_NEW,
            f"object {obj.key!r} has format {meta['format']}, this version of actstore reads 1: use a newer one",
        )
    return meta.get("directory")


def promised(obj: StoredObject, meta: Any, *, n_rows: int | None, latents: range | None) -> Promised:
    """Return what the manifest says of an object; `checked_entry` holds of `meta`.

    Args:
        obj: As the manifest promises it.
        meta: What an encoder returned with it.
        n_rows: Of codes; None if that is not known.
        latents: Of the dictionary, or of a segment; None if that is not known.

    Raises:
        FormatError: `meta` is something else.
    """
    ref, nnz = _parse_ref(obj, meta.get("directory")), meta.get("nnz")
    if not isinstance(nnz, int) or nnz < 0:
        raise _broken(obj, f"it is said to have {nnz!r:.80} codes")
    return Promised(nnz, n_rows, latents, ref.offset)


def frozen(array: npt.NDArray[S]) -> npt.NDArray[S]:
    """Return an array that a cache may share: nobody can write to it."""
    array.flags.writeable = False
    return array


def page_table(nbytes: npt.NDArray[np.int64], crcs: npt.NDArray[np.uint32], first: int) -> PageTable:
    """Return the table of pages of some lengths that follow each other from byte `first` on."""
    offsets = np.full(len(nbytes) + 1, first, np.int64)
    offsets[1:] += np.cumsum(nbytes)
    return PageTable(offsets, crcs)


def _batches(table: PageTable, numbers: Sequence[int]) -> Iterator[list[list[int]]]:
    """Yield runs of pages that follow each other, one request each, as many at a time as are held in memory together."""
    runs: list[list[int]] = []
    held = in_run = 0
    for number in numbers:
        nbytes = int(table.offsets[number + 1] - table.offsets[number])
        if runs and held + nbytes > _BATCH_BYTES:
            yield runs
            runs, held = [], 0
        if runs and number == runs[-1][-1] + 1 and in_run + nbytes <= _REQUEST_BYTES:
            runs[-1].append(number)
            in_run += nbytes
        else:
            runs.append([number])
            in_run = nbytes
        held += nbytes
    if runs:
        yield runs


def _parse_ref(obj: StoredObject, directory: Any) -> DirectoryRef:
    try:
        offset, nbytes, sha256 = directory
        ref = DirectoryRef(int(offset), int(nbytes), str(sha256))
    except (TypeError, ValueError) as error:
        raise _broken(obj, f"its directory is said to be at {directory!r:.80}") from error
    if not 0 <= ref.offset < ref.offset + ref.nbytes <= obj.nbytes:
        raise _broken(obj, f"its directory is said to be at {directory!r:.80}, and it has {obj.nbytes} bytes")
    return ref


def _broken(obj: StoredObject, found: str) -> FormatError:
    return FormatError(
        ErrorKind.INVARIANT_BROKEN,
        f"object {obj.key!r} cannot be read: {found}: its unit was written by a faulty program (see fsck)",
    )
