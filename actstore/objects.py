"""How are stored tables read without ever trusting their bytes?

Every object a reader opens was promised by a manifest with its length and SHA-256. `ObjectReader` hands out bytes, Arrow
tables, or the path of a file for libraries that read files themselves (DuckDB, pyarrow), and in each case the object has
been checked first. On a local disk the object itself is the file; elsewhere it is a copy in a bounded cache, named by its
hash. A checked file is remembered by its path, size, times and inode, so a later change means a new check.
"""

import contextlib
import hashlib
import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import ErrorKind, FormatError
from actstore.log.values import StoredObject
from actstore.storage import Storage, read_verified

_REMEMBERED_FILES = 65_536

_SMALL_BYTES = 4 << 20
"""Objects up to this size are read once, into memory, to be checked and decoded there."""

_COPY = re.compile(r"[0-9a-f]{64}|\.fetch-.+")
"""Names that copies and half-fetched ones have: nothing else in the folder is ever deleted."""

_FETCHES = 3
"""Times a copy is fetched that another process drops, or damages, before it was checked."""


class ObjectReader:
    """Reads promised objects of one storage. Safe for use from many threads."""

    def __init__(self, storage: Storage, *, cache_dir: Path | None, cache_bytes: int) -> None:
        """Make a reader; touches nothing yet.

        Args:
            storage: Where the objects are.
            cache_dir: Folder for copies of remote objects; None for the user's cache folder.
            cache_bytes: Bound of the copies' total size, kept by dropping the oldest; those of one call always stay.
        """
        self.storage = storage
        self._cache_dir = cache_dir
        self._cache_bytes = cache_bytes
        self._checked: OrderedDict[tuple[object, ...], None] = OrderedDict()
        self._room = 0
        """Bytes of new copies before the folder must be looked at again."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.storage, self._cache_dir, self._cache_bytes))

    def read(self, obj: StoredObject) -> bytes:
        """Return the whole object, checked.

        Raises:
            FormatError: it is missing, or its length or hash is not the promised one.
        """
        return read_verified(self.storage, obj)

    def file(self, obj: StoredObject) -> str:
        """Return the path of a local file that holds exactly the promised bytes.

        Raises:
            FormatError: the object is missing or damaged.
        """
        return self.files([obj])[0]

    def files(self, objects: Sequence[StoredObject]) -> list[str]:
        """Return the paths of local files that hold exactly the promised bytes, in order.

        Copies that one call returns do not push each other out, whatever their size.

        Raises:
            FormatError: an object is missing or damaged.
        """
        keep = {obj.sha256 for obj in objects}
        paths = []
        for obj in objects:
            local = self.storage.local_path(obj.key)
            if local is None:
                local = self._cached_copy(obj, keep)
            else:
                self._check_file(local, obj)
            paths.append(local)
        return paths

    def table(self, obj: StoredObject, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a Parquet object as an Arrow table, checked, with only `columns` read."""
        # Not pq.read_table: its dataset layer costs milliseconds for each small table.
        with self.parquet(obj) as file:
            # Threads are for large tables: for others they cost more than they save.
            large = obj.nbytes > _SMALL_BYTES
            return file.read(columns=None if columns is None else list(columns), use_threads=large)

    @contextlib.contextmanager
    def parquet(self, obj: StoredObject) -> Iterator[pq.ParquetFile]:
        """Open a Parquet object, checked; its pages are compared with their checksums as they are read.

        Raises:
            FormatError: the object is missing or damaged.
        """
        local = self.storage.local_path(obj.key)
        path, data = (local, self._check_file(local, obj)) if local is not None else (self.file(obj), None)
        # Not by path: pyarrow then looks for a file system first, which costs as much as a small table.
        source = pa.OSFile(path) if data is None else pa.BufferReader(data)
        with source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            yield file

    def _check_file(self, path: str, obj: StoredObject) -> bytes | None:
        """Check a file, unless that was done before; a small one's bytes are returned that were read for it."""
        data = None
        try:
            with open(path, "rb", buffering=0) as file:
                stat = os.fstat(file.fileno())
                identity = (path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, obj.sha256)
                with self._lock:
                    if identity in self._checked:
                        return None
                if stat.st_size <= _SMALL_BYTES:
                    data = file.readall()
                    digest = hashlib.sha256(data).hexdigest()
                else:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise FormatError(
                ErrorKind.OBJECT_MISSING,
                f"object {obj.key!r} ({obj.nbytes} bytes) is missing: restore it from a backup, or run fsck for all damage",
            ) from error
        if stat.st_size != obj.nbytes or digest != obj.sha256:
            raise FormatError(
                ErrorKind.OBJECT_DAMAGED,
                f"object {obj.key!r} should be {obj.nbytes} bytes with SHA-256 {obj.sha256}, found {stat.st_size} bytes "
                f"with {digest}: restore it from a backup, or run fsck for all damage",
            )
        with self._lock:
            self._checked[identity] = None
            while len(self._checked) > _REMEMBERED_FILES:
                self._checked.popitem(last=False)
        return data

    def _cached_copy(self, obj: StoredObject, keep: AbstractSet[str]) -> str:
        folder = self._folder()
        path = str(folder / obj.sha256)
        for _ in range(_FETCHES):
            with contextlib.suppress(FormatError):  # no copy yet, or a damaged one: it is simply fetched
                self._check_file(path, obj)
                return path
            self._fetch(obj, folder, path)
            self._make_room(folder, obj.nbytes, keep)
        self._check_file(path, obj)
        return path

    def _fetch(self, obj: StoredObject, folder: Path, path: str) -> None:
        handle, tmp = tempfile.mkstemp(dir=folder, prefix=".fetch-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self.read(obj))
            os.replace(tmp, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(tmp)
            raise

    def _folder(self) -> Path:
        if self._cache_dir is None:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            self._cache_dir = base / "actstore" / "objects"
        self._cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._cache_dir

    def _make_room(self, folder: Path, nbytes: int, keep: AbstractSet[str]) -> None:
        """Count a new copy, and now and then look at the folder: its copies may be many, and others write there too."""
        with self._lock:
            self._room -= nbytes
            if self._room >= 0:
                return
        total = self._evict(folder, keep)
        with self._lock:
            self._room = max(0, self._cache_bytes - total) // 2

    def _evict(self, folder: Path, keep: AbstractSet[str]) -> int:
        """Drop the oldest copies but those to keep if there are too many, and return the size of what is left."""
        entries = []
        for entry in os.scandir(folder):
            if _COPY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat(follow_symlinks=False)
                    entries.append((stat.st_mtime_ns, stat.st_size, entry.name))
        total = sum(size for _, size, _ in entries)
        if total <= self._cache_bytes:
            return total
        for _, size, name in sorted(entries):
            if total <= self._cache_bytes * 7 // 8:  # not at the bound: the next copies need no other look
                break
            if name not in keep:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(folder / name)
                total -= size
        return total


def _reopen(storage: Storage, cache_dir: Path | None, cache_bytes: int) -> ObjectReader:
    return ObjectReader(storage, cache_dir=cache_dir, cache_bytes=cache_bytes)
