"""How is a page or a picture for a person written, so that its file is whole or not there?"""

import os
import tempfile
from pathlib import Path

from actstore.errors import ErrorKind, NotFoundError, StorageError


def save_file(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a local file, taking the place of one that is there, and return its path.

    Written beside it first and then renamed: a reader sees the old file or the new one. No part of a store is written so.

    Raises:
        NotFoundError: the folder does not exist.
        StorageError: it cannot be written, or `path` is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise NotFoundError(
            ErrorKind.SOURCE_NOT_FOUND,
            f"{str(target)!r} cannot be written: the folder {str(target.parent)!r} does not exist; make it first",
        )
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:64]}-")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise StorageError(
            ErrorKind.STORAGE_FAILED,
            f"{str(target)!r} cannot be written: {error.strerror or error}; give a file name in a folder you may write",
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return target


def _umask() -> int:
    """Return the process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
