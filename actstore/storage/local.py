"""How are write-once objects kept in a folder of a POSIX file system?

An object is one file, `<root>/<key>`. It is written under a unique name in `<root>/.tmp`, synced, and then linked to its
own name: `link()` is the one step that fails where the name exists, shows the file only whole, and works over NFS. A
crash leaves at most a file in `.tmp`, which nobody lists.

Reads never follow a symbolic link in place of an object; folders may be links, so a store can span disks.
"""

import errno
import io
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from actstore.errors import ErrorKind, StorageError
from actstore.names import check_key
from actstore.storage import durable, files
from actstore.storage.base import Buffer, PutOutcome
from actstore.storage.ranges import as_views, as_writable, check_prefix, check_ranges

_TMP = ".tmp"
_STALE_TMP_S = 86_400.0
"""Age in seconds from which a file in `.tmp` counts as left by a crash. A writer that is slower loses its attempt only."""

_UNCACHED_BYTES = 1 << 20
"""Objects of this size leave the page cache once they are durable: a harvest of terabytes would push out everything else, and
the kernel would look for fresh pages for every shard, which can cost more than writing it."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class LocalStorage:
    """The objects of a folder; see `actstore.storage.base.Storage` for what every method promises.

    Safe for threads, processes and, unlike storages with connections, across `fork()`.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(os.fspath(root))
        self._forget()

    def _forget(self) -> None:
        """Start without knowledge of the disk."""
        self._durable_folders: set[str] = set()
        self._root_identity: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, str]:
        return {"root": self._root}

    def __setstate__(self, state: dict[str, str]) -> None:
        self._root = state["root"]
        self._forget()

    def __repr__(self) -> str:
        return f"LocalStorage({self._root!r})"

    @property
    def url(self) -> str:
        """The folder, as an absolute path."""
        return self._root

    @property
    def writable(self) -> bool:
        """Whether this user may create files in the folder."""
        return os.access(self._root, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)

    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:
        """Create `key` with the concatenation of `data`, unless it exists. Durable, with its folders, when CREATED.

        EXISTS is durable too: its folder is synced, as the process that created it may have died before doing so.
        """
        path = self._path(key)
        views, nbytes = as_views(key, data)
        self._check_root(f"writing object {key!r} ({nbytes} bytes)")
        try:
            self._make_folder(os.path.dirname(path))
            if os.path.lexists(path):
                durable.sync_directory(os.path.dirname(path))
                return PutOutcome.EXISTS
            tmp = self._write_tmp(views, sync=True)
        except OSError as err:
            raise self._write_error(key, nbytes, err) from err
        try:
            outcome = self._link(tmp, path)
        except OSError as err:
            raise self._link_error(key, nbytes, err) from err
        finally:
            files.unlink_quietly(tmp)
        try:
            durable.sync_directory(os.path.dirname(path))
        except OSError as err:
            raise StorageError(
                ErrorKind.OUTCOME_UNKNOWN,
                f"object {key!r} ({nbytes} bytes) is in store {self._root!r}, but its folder could not be synced: "
                f"{files.reason(err)}; it may be gone after a power cut: check the disk, then run the same command again",
            ) from err
        return outcome

    def get(self, key: str) -> bytes | None:
        """Return the whole object, or None when it is certainly absent."""
        with self._open(key) as fd:
            return None if fd is None else io.FileIO(fd, closefd=False).readall()

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Return bytes `[start, stop)` of each range, shorter past the object's end; None when certainly absent."""
        check_ranges(key, ranges)
        with self._open(key) as fd:
            if fd is None:
                return None
            # A range far past the end must not become an allocation of its length.
            size = os.fstat(fd).st_size
            return [files.pread(fd, start, min(stop, size)) for start, stop in ranges]

    def read_into(self, key: str, start: int, out: memoryview) -> int | None:
        """Fill `out` with the bytes from `start` on and return how many there were; None when certainly absent."""
        check_ranges(key, [(start, start + out.nbytes)])
        out = as_writable(key, out)
        with self._open(key) as fd:
            return None if fd is None else files.pread_into(fd, start, out)

    def head(self, key: str) -> int | None:
        """Return the object's length in bytes, or None when it is certainly absent."""
        try:
            status = os.lstat(self._path(key))
        except OSError as err:
            self._check_absent(key, err)
            return None
        if stat.S_ISDIR(status.st_mode):
            return None
        self._check_regular(key, status)
        return status.st_size

    def list(self, prefix: str) -> Iterator[str]:
        """Yield every key that starts with `prefix`, in lexicographic order; foreign and hidden files are left out."""
        check_prefix(prefix)
        folder = os.path.join(self._root, *prefix.split("/")[:-1])
        try:
            yield from files.walk(folder, prefix, ancestors=frozenset())
        except OSError as err:
            raise self._read_error(f"listing {prefix!r}", err) from err
        self._check_root(f"listing {prefix!r}")

    def delete(self, key: str) -> None:
        """Remove the object, durably; no error when it is absent."""
        path = self._path(key)
        try:
            if self.head(key) is None:
                return
            os.unlink(path)
            durable.sync_directory(os.path.dirname(path))
        except FileNotFoundError:
            return
        except StorageError:
            raise
        except OSError as err:
            kind = ErrorKind.READ_ONLY if err.errno in _DENIED else ErrorKind.STORAGE_FAILED
            raise StorageError(
                kind, f"deleting object {key!r} from store {self._root!r} failed: {files.reason(err)}"
            ) from err

    def put_hint(self, key: str, data: bytes) -> None:
        """Write `key`, replacing it whole. Not durable, not exclusive."""
        path = self._path(key)
        views, nbytes = as_views(key, [data])
        self._check_root(f"writing object {key!r} ({nbytes} bytes)")
        try:
            self._make_folder(os.path.dirname(path))
            tmp = self._write_tmp(views, sync=False)
            try:
                os.replace(tmp, path)
            except OSError:
                files.unlink_quietly(tmp)
                raise
        except OSError as err:
            raise self._write_error(key, nbytes, err) from err

    def local_path(self, key: str) -> str:
        """Return the path of the object's file, whether or not it exists."""
        return self._path(key)

    def _path(self, key: str) -> str:
        return os.path.join(self._root, *check_key(key).split("/"))

    def _make_folder(self, folder: str) -> None:
        """Make `folder`, inside the root, exist durably: every name on its way is synced once by this instance."""
        if folder in self._durable_folders or folder == self._root:
            return
        parent = os.path.dirname(folder)
        self._make_folder(parent)
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise NotADirectoryError(
                    errno.ENOTDIR, "a file is where a folder is needed", folder
                ) from None
        durable.sync_directory(parent)
        self._durable_folders.add(folder)

    def _write_tmp(self, views: Sequence[memoryview], *, sync: bool) -> str:
        """Write a new file in `.tmp` and return its path; on any failure, an interrupt included, it is removed."""
        folder = os.path.join(self._root, _TMP)
        if folder not in self._durable_folders:
            self._make_folder(folder)
            files.remove_stale(folder, age_s=_STALE_TMP_S)
        tmp = os.path.join(folder, uuid.uuid4().hex)
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                durable.write_all(fd, views)
                if sync:
                    os.fsync(fd)
                    if sum(view.nbytes for view in views) >= _UNCACHED_BYTES and hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        except BaseException:
            files.unlink_quietly(tmp)
            raise
        return tmp

    def _link(self, tmp: str, path: str) -> PutOutcome:
        """Give the file `tmp` its final name unless that is taken."""
        for attempt in (0, 1):
            try:
                os.link(tmp, path)
            except OSError as err:
                # Over NFS the answer of a successful link can be lost; then the file has two names. Nobody else knows `tmp`.
                if os.stat(tmp).st_nlink >= 2:
                    return PutOutcome.CREATED
                if err.errno == errno.EEXIST:
                    return PutOutcome.EXISTS
                if err.errno != errno.ENOENT or attempt:
                    raise
                # Someone removed the folder since this instance made it.
                self._durable_folders.clear()
                self._make_folder(os.path.dirname(path))
            else:
                break
        return PutOutcome.CREATED

    @contextmanager
    def _open(self, key: str) -> Iterator[int | None]:
        """Give a descriptor for reading the object, or None when it is certainly absent; storage errors get their class."""
        path = self._path(key)
        fd = -1
        try:
            fd = os.open(path, _OPEN_FLAGS)
            status = os.fstat(fd)
        except OSError as err:
            if fd >= 0:
                os.close(fd)
            self._check_absent(key, err)
            yield None
            return
        try:
            if stat.S_ISDIR(status.st_mode):
                yield None
                return
            self._check_regular(key, status)
            yield fd
        except StorageError:
            raise
        except OSError as err:
            raise self._read_error(f"reading object {key!r}", err) from err
        finally:
            os.close(fd)

    def _check_regular(self, key: str, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            found = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
            raise StorageError(
                ErrorKind.STORAGE_FAILED,
                f"object {key!r} of store {self._root!r} is {found}, which actstore neither writes nor follows: remove it",
            )

    def _check_absent(self, key: str, err: OSError) -> None:
        """Raise unless `err` proves that the object is absent."""
        if err.errno == errno.ELOOP:
            raise StorageError(
                ErrorKind.STORAGE_FAILED,
                f"object {key!r} of store {self._root!r} is a symbolic link, which actstore does not follow: remove it",
            ) from err
        if err.errno not in _ABSENT:
            raise self._read_error(f"reading object {key!r}", err) from err
        self._check_root(f"reading object {key!r}")

    def _check_root(self, doing: str) -> None:
        """Raise if the root is not the folder it was: an unmounted disk must not look like an empty store."""
        try:
            status = os.stat(self._root)
        except OSError as err:
            raise self._read_error(doing, err) from err
        identity = (status.st_dev, status.st_ino)
        if self._root_identity is None:
            self._root_identity = identity
        if self._root_identity != identity:
            raise StorageError(
                ErrorKind.STORAGE_FAILED,
                f"{doing} failed: store {self._root!r} is no longer the folder that was opened "
                "(unmounted, or replaced): open the store again",
            )

    def _read_error(self, doing: str, err: OSError) -> StorageError:
        return StorageError(
            ErrorKind.STORAGE_FAILED,
            f"{doing} in store {self._root!r} failed: {files.reason(err)}; nothing is known about it",
        )

    def _write_error(self, key: str, nbytes: int, err: OSError) -> StorageError:
        """Return the error of a write that left nothing behind."""
        kind, advice = ErrorKind.STORAGE_FAILED, "check the disk, then run the same command again"
        if err.errno in _FULL:
            kind, advice = (
                ErrorKind.STORAGE_FULL,
                "free space or raise the limit, then run the same command again",
            )
        elif err.errno in _DENIED:
            kind, advice = (
                ErrorKind.READ_ONLY,
                "the folder may not be written by this user: change that, or copy the store",
            )
        return StorageError(
            kind,
            f"writing object {key!r} ({nbytes} bytes) to store {self._root!r} failed: {files.reason(err)}; "
            f"nothing of it is visible: {advice}",
        )

    def _link_error(self, key: str, nbytes: int, err: OSError) -> StorageError:
        """Return the error of a file that was written and could not be given its name."""
        if err.errno in _NO_LINKS:
            return StorageError(
                ErrorKind.UNSAFE_STORE,
                f"store {self._root!r} is on a file system without hard links ({files.reason(err)}), where two writers "
                f"could both create {key!r}: keep the store on a POSIX file system or in an object store",
            )
        return self._write_error(key, nbytes, err)
