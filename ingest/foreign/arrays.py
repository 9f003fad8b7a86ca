"""How are activations read that lie in plain arrays, `.npy` or safetensors, with a table of tokens beside them?

Every array is `[rows, d_model]`, one row per row of the table, in its order. Arrays are memory-mapped; nothing is ever
unpickled.
"""

import hashlib
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .content import SourceFiles
from .safetensors_file import FLOATS, open_safetensors
from .source import Array, HookPointNames, SourceHookPoint, TokenBatch, copy_rows, refuse, resolve_names
from .token_table import SUFFIXES, TokenTable, open_token_table

_KINDS = (".npy", ".safetensors")
_BAD_NPY = (
    ValueError,
    OSError,
    EOFError,
    SyntaxError,
    TypeError,
    OverflowError,
    tokenize.TokenError,
    UserWarning,
)
"""What numpy raises on a damaged header, which it reads as a Python literal."""


@dataclass(frozen=True, slots=True)
class _Found:
    """One array."""

    name: str
    path: Path
    values: Array
    dtype: str


def is_arrays(source: Path) -> bool:
    """Return whether a file, or a folder's files, are arrays."""
    return bool(_array_files(source))


class ArraySource:
    """Arrays of one file or folder, and their table of tokens."""

    format = "arrays"

    def __init__(self, source: Path, *, tokens: Any, hook_points: HookPointNames, as_bfloat16: bool) -> None:
        """Map the arrays and check that their shapes agree.

        Args:
            source: A file, or a folder of them.
            tokens: See `open_token_table`; None for the file `tokens.parquet` (or .csv, .jsonl) beside the arrays.
            hook_points: What the arrays are: by the stem of an `.npy` file or a tensor's name.
            as_bfloat16: Whether 16-bit integers (numpy has no bfloat16) are the bits of bfloat16 numbers.

        Raises:
            InvalidInputError: no arrays, or not of one length, or of a type that cannot be stored.
        """
        paths = _array_files(source)
        self.description = str(source)
        if not paths:
            refuse(
                f"{source} has no .npy and no .safetensors file",
                "give a file of activations or a folder of them",
            )
        found = [array for path in paths for array in _open(path, as_bfloat16)]
        names = [array.name for array in found]
        if len(set(names)) < len(names):
            refuse(f"{source} has two arrays of one name among {', '.join(names)}", "rename one")
        chosen = resolve_names(names, hook_points, where=self.description)
        self._arrays = {name: found[i].values for i, name in chosen.items()}
        self.hook_points = tuple(
            SourceHookPoint(names[i], name, found[i].values.shape[1], found[i].dtype)
            for i, name in chosen.items()
        )
        used = sorted({found[i].path for i in chosen})
        self._files = SourceFiles(used[0].parent, [path.name for path in used])
        self._table = _find_tokens(source, tokens)
        self._table_files = self._table.files()
        self.has_words = "token" in self._table.columns
        self.has_spans = "char_start" in self._table.columns
        self._n_rows = self._check_rows()

    def fingerprint(self, *, full: bool) -> str:
        """Return the hash of the arrays' files and of the table of tokens."""
        parts = (
            self._files.fingerprint(full=full),
            self._table_files.fingerprint(full=full),
            self._table.memory_hash(),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Check the files' sizes and times."""
        self._files.check_unchanged()
        self._table_files.check_unchanged()

    def tokens(self, first_doc: int = 0) -> Iterator[TokenBatch]:
        """Yield the documents of the table; those before `first_doc` are read too, and left out a batch at a time."""
        n_rows = 0
        for batch in self._table.documents():
            n_rows += len(batch.ids)
            rest = batch if batch.first_doc >= first_doc else from_document(batch, first_doc)
            if rest is not None:
                yield rest
        if n_rows != self._n_rows:
            refuse(
                f"{self._table.description} has {n_rows} rows, {self.description} has {self._n_rows} activations",
                "each activation needs its row, in the same order",
            )

    def read(
        self,
        first_doc: int,
        first_row: int,
        token_ids: Array,
        starts: Array,
        out: Mapping[str, Array],
        dtype: str,
    ) -> None:
        """Copy rows."""
        del first_doc, starts
        for name, values in self._arrays.items():
            copy_rows(values[first_row : first_row + len(token_ids)], out[name], dtype)

    def _check_rows(self) -> int:
        lengths = {name: len(values) for name, values in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            refuse(
                f"{self.description} has arrays of different lengths, {lengths}",
                "give each hook point every row",
            )
        return next(iter(lengths.values()))


def from_document(batch: TokenBatch, first_doc: int) -> TokenBatch | None:
    """Return a batch from a document on; None if there is nothing left of it."""
    skip = first_doc - batch.first_doc
    if skip >= len(batch.keys):
        return None
    a = int(batch.offsets[skip])
    return TokenBatch(
        first_doc=first_doc,
        keys=batch.keys[skip:],
        lengths=batch.lengths[skip:],
        ids=batch.ids[a:],
        positions=None if batch.positions is None else batch.positions[a:],
        words=None if batch.words is None else batch.words[a:],
        spans=None if batch.spans is None else batch.spans[a:],
    )


def _array_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source] if source.suffix in _KINDS else []
    return sorted(p for p in source.glob("*") if p.suffix in _KINDS and p.is_file())


def _open(path: Path, as_bfloat16: bool) -> list[_Found]:
    """Return the arrays of a file: of a safetensors file, all matrices of floating-point numbers."""
    if path.suffix == ".npy":
        return [_open_npy(path, as_bfloat16)]
    file = open_safetensors(path)
    found = []
    for name, tensor in file.tensors.items():
        if len(tensor.shape) == 2 and tensor.dtype in FLOATS:
            found.append(_Found(name, path, file.map(name), FLOATS[tensor.dtype]))
    if not found:
        shown = ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in file.tensors.items())
        refuse(
            f"{path} has no matrix of floating-point numbers, only {shown or 'nothing'}",
            "store [rows, d_model]",
        )
    return found


def _open_npy(path: Path, as_bfloat16: bool) -> _Found:
    try:
        # Refuses arrays of Python objects, which only pickle could read, and files shorter than their header says.
        values = np.lib.format.open_memmap(path, mode="r")
    except _BAD_NPY as error:
        refuse(f"{path} is no whole .npy file of numbers ({error})", "write it with numpy.save")
    if values.offset + values.nbytes != path.stat().st_size:
        refuse(f"{path} goes on behind its array", "store one array in a file")
    if values.ndim != 2 or not values.size:
        refuse(f"{path} has shape {list(values.shape)}", "store [rows, d_model]")
    if as_bfloat16 and values.dtype.itemsize == 2 and values.dtype.kind in "uV":
        return _Found(path.stem, path, values.view("<u2"), "bfloat16")
    if values.dtype.kind != "f" or values.dtype.itemsize not in (2, 4, 8):
        refuse(
            f"{path} holds {values.dtype}",
            "store float16, float32 or float64, or the bits of bfloat16 as uint16 and say dtype='bfloat16'",
        )
    return _Found(path.stem, path, values, values.dtype.newbyteorder("=").name)


def _find_tokens(source: Path, tokens: Any) -> TokenTable:
    if tokens is None:
        folder = source if source.is_dir() else source.parent
        beside = [folder / f"tokens{suffix}" for suffix in SUFFIXES if (folder / f"tokens{suffix}").is_file()]
        if len(beside) != 1:
            refuse(
                f"{source} has {'no' if not beside else 'more than one'} table of tokens beside it",
                "name one with tokens= (--tokens): Parquet, CSV or JSONL with the columns doc_id and token_id",
            )
        tokens = beside[0]
    return open_token_table(tokens)
