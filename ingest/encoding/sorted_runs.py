"""How are the postings of one latent put in the order of their values where they do not fit into memory?

Postings come by ascending row. Pieces of them are sorted by descending value and written to temporary files on local disk; at
the end all pieces are merged: every round takes what is certainly first of all that is left. Source: the external merge sort
of Knuth, The Art of Computer Programming, volume 3, section 5.4.
"""

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, StorageError
from actstore.sparse.order import stable_order

Int64s = npt.NDArray[np.int64]
Keys = npt.NDArray[np.unsignedinteger[Any]]

PIECE_POSTINGS: Final = 1 << 19
"""Postings of a piece: with their order and a sorted copy they take about 30 MiB."""

MERGED_POSTINGS: Final = 1 << 19
"""Postings read ahead of all pieces together while they are merged: about 30 MiB with what is made of them."""

_LEAST_READ: Final = 256
"""Postings read ahead of one piece, at least, however many pieces there are."""


class SortedRuns:
    """Postings of one latent on local disk, 14 bytes each (16 with float32 values). A context manager: files end with it.

    Memory: one piece while postings come, later `MERGED_POSTINGS`.
    """

    def __init__(self, value_dtype: np.dtype[Any], *, folder: str | None = None) -> None:
        """Make temporary files below `folder`, by default where the system keeps them."""
        self._bits = np.dtype(f"<u{value_dtype.itemsize}")
        self._kinds = {"keys": self._bits, "rows": np.dtype(np.int64), "tokens": np.dtype(np.int32)}
        self._held: list[tuple[Int64s, npt.NDArray[Any], npt.NDArray[np.int32]]] = []
        self._n_held = 0
        self._lengths: list[int] = []
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="actstore-postings-")
        self._paths = {name: Path(self._folder.name) / name for name in self._kinds}

    def __enter__(self) -> "SortedRuns":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # an error that ends the job is already on its way
            self._folder.cleanup()

    def __len__(self) -> int:
        return sum(self._lengths) + self._n_held

    def append(
        self, rows: Int64s, values: npt.NDArray[np.floating[Any]], token_ids: npt.NDArray[np.int32]
    ) -> None:
        """Take postings whose rows ascend and follow all rows before; values are positive and finite.

        Raises:
            StorageError: STORAGE_FULL: the temporary folder has no room.
        """
        self._held.append((rows, values, token_ids))
        self._n_held += len(rows)
        if self._n_held >= PIECE_POSTINGS:
            self._write_piece()

    def merged(self) -> Iterator[tuple[Int64s, Keys]]:
        """Yield rows and bits of the values of all postings, by descending value, of equal values by row, a stretch at a time."""
        self._write_piece()
        starts = np.cumsum([0, *self._lengths])
        share = max(_LEAST_READ, MERGED_POSTINGS // max(1, len(self._lengths)))
        pieces = [
            _Piece(self._paths, self._kinds, int(start), int(start) + n)
            for start, n in zip(starts[:-1], self._lengths, strict=True)
        ]
        while pieces:
            for piece in pieces:
                piece.read_ahead(share)
            last = min((piece.last for piece in pieces if not piece.is_read), default=None)
            # Pieces follow each other by row, so a stable sort of what they give keeps equal values in order.
            rows, keys = (
                np.concatenate(column) for column in zip(*[piece.take(last) for piece in pieces], strict=True)
            )
            order = stable_order(keys)
            yield rows[order], np.iinfo(self._bits).max - keys[order]
            pieces = [piece for piece in pieces if len(piece.rows) or not piece.is_read]

    def tokens(self) -> Iterator[tuple[npt.NDArray[np.int32], Keys]]:
        """Yield tokens and bits of the values of all postings, a piece at a time, in no order to rely on."""
        self._write_piece()
        start = 0
        for n in self._lengths:
            keys, tokens = (
                _read(self._paths[name], self._kinds[name], start, n) for name in ("keys", "tokens")
            )
            yield tokens, np.iinfo(self._bits).max - keys
            start += n

    def _write_piece(self) -> None:
        if not self._n_held:
            return
        rows, values, tokens = (np.concatenate(column) for column in zip(*self._held, strict=True))
        self._held, self._n_held = [], 0
        keys = np.iinfo(self._bits).max - values.view(self._bits)
        order = stable_order(keys)
        try:
            for name, column in (("keys", keys), ("rows", rows), ("tokens", tokens)):
                with self._paths[name].open("ab") as file:
                    file.write(column[order].astype(self._kinds[name], copy=False).data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageError(
                ErrorKind.STORAGE_FULL,
                f"the temporary folder {self._folder.name} is full after {sum(self._lengths):,} postings of one latent, at "
                "about 16 bytes each: set TMPDIR to a larger disk, or give more memory for building postings",
            ) from error
        self._lengths.append(len(rows))


@dataclass(slots=True)
class _Piece:
    """What is left of one sorted piece: some of it read ahead."""

    paths: dict[str, Path]
    kinds: dict[str, np.dtype[Any]]
    at: int
    """Of the files: the first posting that is not read yet."""
    stop: int
    rows: Int64s
    keys: Keys

    def __init__(
        self, paths: dict[str, Path], kinds: dict[str, np.dtype[Any]], start: int, stop: int
    ) -> None:
        self.paths, self.kinds, self.at, self.stop = paths, kinds, start, stop
        self.rows, self.keys = np.empty(0, np.int64), np.empty(0, kinds["keys"])

    @property
    def is_read(self) -> bool:
        """Whether nothing is left in the files."""
        return self.at == self.stop

    @property
    def last(self) -> tuple[int, int]:
        """Key and row of the last posting that is read ahead."""
        return int(self.keys[-1]), int(self.rows[-1])

    def read_ahead(self, n: int) -> None:
        """Have n postings read ahead, or all that are left."""
        n = min(n - len(self.rows), self.stop - self.at)
        if n > 0:
            self.rows = np.append(self.rows, _read(self.paths["rows"], self.kinds["rows"], self.at, n))
            self.keys = np.append(self.keys, _read(self.paths["keys"], self.kinds["keys"], self.at, n))
            self.at += n

    def take(self, last: tuple[int, int] | None) -> tuple[Int64s, Keys]:
        """Return what is read ahead up to the posting `last`, it included; all of it if None."""
        n = len(self.rows)
        if last is not None:
            key = self.keys.dtype.type(last[0])
            low, high = (int(np.searchsorted(self.keys, key, side)) for side in ("left", "right"))
            n = low + int(np.searchsorted(self.rows[low:high], last[1], side="right"))
        taken = self.rows[:n], self.keys[:n]
        self.rows, self.keys = self.rows[n:], self.keys[n:]
        return taken


def _read(path: Path, kind: np.dtype[Any], start: int, n: int) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = np.fromfile(path, kind, n, offset=start * kind.itemsize)
    if len(found) != n:
        raise StorageError(
            ErrorKind.STORAGE_FAILED, f"the temporary file {path} lost its end: run the same again"
        )
    return found
