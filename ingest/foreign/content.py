"""Is a source the same that it was when its import began?

The hash of a source covers the names, sizes and bytes of the files that are read, in their order. `full` is the SHA-256 of
every byte, at the cost of reading everything once more. `sampled` takes, of a file larger than 2 MiB, its first and last
512 KiB and 16 pieces of 64 KiB at even distances: a replaced, cut or regenerated file shows, a few altered bytes need not.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actstore.errors import ConflictError, ErrorKind, NotFoundError
from actstore.log import canonical_json

_SAMPLED_ABOVE = 2 << 20
_EDGE = 512 << 10
_PIECE = 64 << 10
_PIECES = 16


@dataclass(slots=True)
class SourceFiles:
    """The files of a source, in reading order."""

    folder: Path
    """Names are relative to it: a copy elsewhere is the same source."""
    names: Sequence[str]
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict)

    def paths(self) -> list[Path]:
        """Return where the files are."""
        return [self.folder / name for name in self.names]

    def fingerprint(self, *, full: bool) -> str:
        """Return the hash of the files, 64 hex digits, and remember their sizes and times.

        Raises:
            NotFoundError: a file is missing.
        """
        total = hashlib.sha256(b"full" if full else b"sampled")
        for name in self.names:
            path = self.folder / name
            self._seen[name] = _stamp(path)
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if full or size <= _SAMPLED_ABOVE:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                else:
                    pieces = hashlib.sha256()
                    for start, length in _samples(size):
                        file.seek(start)
                        pieces.update(file.read(length))
                    digest = pieces.hexdigest()
            total.update(canonical_json([name, size, digest]))
        return total.hexdigest()

    def check_unchanged(self) -> None:
        """Check that sizes and times are those of `fingerprint`.

        Raises:
            ConflictError: a file was written to meanwhile.
            NotFoundError: a file is missing.
        """
        for name, before in self._seen.items():
            if _stamp(self.folder / name) != before:
                raise ConflictError(
                    ErrorKind.CONFIG_DIFFERS,
                    f"{self.folder / name} was written to while it was imported: the run was not completed; let the file be, "
                    "and import it under another run name",
                )


def _samples(size: int) -> list[tuple[int, int]]:
    inner = [(size - _PIECE) * (i + 1) // (_PIECES + 1) for i in range(_PIECES)]
    return [(0, _EDGE), *((start, _PIECE) for start in inner), (size - _EDGE, _EDGE)]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise NotFoundError(
            ErrorKind.SOURCE_NOT_FOUND, f"{path} is missing: the source names it, or it was there before"
        ) from error
    return stat.st_size, stat.st_mtime_ns
