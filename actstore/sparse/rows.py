"""What are the codes of some rows in memory: which latents fire at each row, and how strongly?

`SparseRows` is a compressed sparse row matrix without zeros. A code that is zero, or that becomes zero in the stored dtype, is
not there: `round_values` and `SparseRows.from_dense` leave it out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore._lazy import lazy_import
from actstore.checks import check_whole
from actstore.errors import ErrorKind, InvalidInputError

Values: TypeAlias = npt.NDArray[np.floating[Any]]
"""float16 or float32."""

VALUE_DTYPES: Final[dict[str, np.dtype[Any]]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
"""Dtypes in which codes can be stored, by name."""

MAX_LATENTS: Final = 1 << 31
"""Latents of a dictionary: their numbers are int32 in tables."""

_FLOAT16_MAX: Final = 65504.0


@dataclass(frozen=True, slots=True, eq=False)
class SparseRows:
    """The codes of some rows; immutable by convention: arrays may be shared with others.

    >>> codes = SparseRows.from_dense(np.array([[0, 2.5, 0], [1, 0, 3]]), "float16")
    >>> codes.indptr.tolist(), codes.latents.tolist(), codes.values.tolist()
    ([0, 1, 3], [1, 0, 2], [2.5, 1.0, 3.0])
    """

    indptr: npt.NDArray[np.int64]
    """Shape (n_rows + 1,): the codes of row i are those from `indptr[i]` on and before `indptr[i + 1]`; `indptr[0]` is 0."""

    latents: npt.NDArray[np.uint32]
    """Shape (nnz,): strictly ascending within a row, below `n_latents`."""

    values: Values
    """Shape (nnz,), float16 or float32: finite and positive."""

    n_latents: int
    """Latents of the dictionary."""

    def __post_init__(self) -> None:
        if self.indptr.dtype != np.int64 or self.latents.dtype != np.uint32 or self.values.dtype.kind != "f":
            raise _bad(
                f"indptr, latents and values must be int64, uint32 and float16 or float32, got {self.indptr.dtype}, "
                f"{self.latents.dtype} and {self.values.dtype}"
            )
        if self.values.dtype not in VALUE_DTYPES.values():
            raise _bad(f"values must be float16 or float32, got {self.values.dtype}")
        shapes = self.indptr.shape, self.latents.shape, self.values.shape
        if not len(self.indptr) or self.indptr.ndim != 1 or shapes[1:] != ((self.nnz,), (self.nnz,)):
            raise _bad(f"indptr, latents and values of shapes {shapes} do not fit each other")

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        return f"<SparseRows: {self.nnz} codes of {self.n_rows} rows, {self.n_latents} latents, {self.value_dtype}>"

    @property
    def n_rows(self) -> int:
        """Number of rows, those without codes included."""
        return len(self.indptr) - 1

    @property
    def nnz(self) -> int:
        """Number of codes."""
        return int(self.indptr[-1])

    @property
    def value_dtype(self) -> str:
        """`float16` or `float32`."""
        return self.values.dtype.name

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Codes of each row, shape (n_rows,), new memory."""
        return np.diff(self.indptr)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.indptr.nbytes + self.latents.nbytes + self.values.nbytes

    def check(self) -> "SparseRows":
        """Return this, if it is all that the fields' descriptions say.

        Costs about 3 ns for each code.

        Raises:
            InvalidInputError: rows that shrink, latents that do not ascend or are too large, values that are zero, negative, NaN
                or infinite (NON_FINITE); the message names the first one.
        """
        if self.indptr[0] != 0 or (np.diff(self.indptr) < 0).any():
            raise _bad("indptr must begin with 0 and never decrease")
        if not self.nnz:
            return self
        if int(self.latents.max()) >= self.n_latents:
            raise _bad(
                f"latent {int(self.latents.max())} is not one of a dictionary with {self.n_latents} latents"
            )
        falls = self.latents[1:] <= self.latents[:-1]
        starts = self.indptr[1:-1]
        falls[starts[(starts > 0) & (starts < self.nnz)] - 1] = False
        if falls.any():
            row = int(np.searchsorted(self.indptr, int(falls.argmax()), side="right")) - 1
            raise _bad(
                f"the latents of row {row} do not ascend strictly: sort them, and add up what is there twice"
            )
        if not are_codes(self.values):
            at = int((~(np.isfinite(self.values) & (self.values > 0))).argmax())
            row = int(np.searchsorted(self.indptr, at, side="right")) - 1
            raise InvalidInputError(
                ErrorKind.NON_FINITE,
                f"the code of row {row} and latent {self.latents[at]} is {self.values[at]}, and codes are finite and positive: "
                "leave out zeros (SparseRows.from_dense does), and check the encoder",
            )
        return self

    def copy(self) -> "SparseRows":
        """Return the same in new memory."""
        return SparseRows(self.indptr.copy(), self.latents.copy(), self.values.copy(), self.n_latents)

    def slice(self, start: int, stop: int) -> "SparseRows":
        """Return the rows `[start, stop)`; latents and values are views.

        Raises:
            InvalidInputError: not `0 <= start <= stop <= n_rows`.
        """
        if not 0 <= start <= stop <= self.n_rows:
            raise _bad(f"rows [{start}, {stop}) were asked for, there are {self.n_rows}")
        low, high = int(self.indptr[start]), int(self.indptr[stop])
        return SparseRows(
            self.indptr[start : stop + 1] - low, self.latents[low:high], self.values[low:high], self.n_latents
        )

    def take(self, offsets: npt.ArrayLike) -> "SparseRows":
        """Return the rows at some offsets, in the order asked, repeats allowed; new memory.

        Raises:
            InvalidInputError: an offset that is not in `[0, n_rows)`.
        """
        wanted = np.asarray(offsets, np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.n_rows:
            raise _bad(
                f"rows from {wanted.min()} to {wanted.max()} were asked for, there are {self.n_rows} from 0 on"
            )
        counts = self.indptr[wanted + 1] - self.indptr[wanted]
        indptr = indptr_of(counts)
        places = np.arange(int(indptr[-1])) + np.repeat(self.indptr[wanted] - indptr[:-1], counts)
        return SparseRows(indptr, self.latents[places], self.values[places], self.n_latents)

    def row_numbers(self) -> npt.NDArray[np.int64]:
        """Return the row of every code, shape (nnz,), new memory."""
        return np.repeat(np.arange(self.n_rows), self.counts)

    def to_dense(self) -> npt.NDArray[np.float32]:
        """Return a dense array `[n_rows, n_latents]`; only sensible for few rows."""
        dense = np.zeros((self.n_rows, self.n_latents), np.float32)
        dense[self.row_numbers(), self.latents] = self.values
        return dense

    def to_scipy(self) -> Any:
        """Return the codes as a `scipy.sparse.csr_array` of float32; values are copied.

        Raises:
            MissingDependencyError: scipy is not installed.
        """
        sparse = lazy_import("scipy.sparse", needed_for="SparseRows.to_scipy()", extra="query")
        index = np.int32 if self.nnz < 1 << 31 else np.int64
        latents = self.latents.astype(index)
        return sparse.csr_array(
            (self.values.astype(np.float32), latents, self.indptr.astype(index)),
            shape=(self.n_rows, self.n_latents),
        )

    @classmethod
    def from_dense(cls, codes: npt.ArrayLike, dtype: str = "float16") -> "SparseRows":
        """Return the codes of a dense array `[n_rows, n_latents]`; zeros, and what becomes zero in `dtype`, are left out.

        Raises:
            InvalidInputError: an array of another shape; a value that is negative, NaN or infinite, or too large for `dtype`.
        """
        dense = np.asarray(codes)
        if dense.ndim != 2:
            raise _bad(f"codes must have the shape (n_rows, n_latents), got {dense.shape}")
        rows, latents = np.nonzero(dense)
        values = round_values(dense[rows, latents], dtype)
        some = values > 0
        counts = np.bincount(rows[some], minlength=len(dense)).astype(np.int64)
        return cls(indptr_of(counts), latents[some].astype(np.uint32), values[some], dense.shape[1])

    @classmethod
    def empty(cls, n_rows: int, n_latents: int, dtype: str = "float16") -> "SparseRows":
        """Return rows without codes."""
        nothing = np.empty(0, np.uint32)
        return cls(np.zeros(n_rows + 1, np.int64), nothing, np.empty(0, value_dtype_of(dtype)), n_latents)

    @classmethod
    def concat(cls, parts: Sequence["SparseRows"]) -> "SparseRows":
        """Return the rows of all parts one after another; new memory, unless there is one part.

        Raises:
            InvalidInputError: no parts, or parts of different dictionaries or dtypes.
        """
        if not parts:
            raise _bad("no parts were given: use SparseRows.empty for no rows")
        if len(parts) == 1:
            return parts[0]
        kinds = {(part.n_latents, part.value_dtype) for part in parts}
        if len(kinds) > 1:
            raise _bad(f"codes of different (n_latents, dtype) cannot be put together: {sorted(kinds)}")
        starts = np.cumsum([0, *(part.nnz for part in parts[:-1])])
        indptr = [part.indptr[1:] + start for part, start in zip(parts, starts, strict=True)]
        return cls(
            np.concatenate([np.zeros(1, np.int64), *indptr]),
            np.concatenate([part.latents for part in parts]),
            np.concatenate([part.values for part in parts]),
            parts[0].n_latents,
        )


def round_values(values: npt.NDArray[Any], dtype: str) -> Values:
    """Return codes in a stored dtype, rounded to the nearest, ties to even; some may become zero.

    Raises:
        InvalidInputError: a value is negative, NaN or infinite (NON_FINITE), or too large for the dtype (OVERFLOW).

    >>> round_values(np.array([1e-9, 0.1]), "float16")
    array([0. , 0.1], dtype=float16)
    """
    stored = value_dtype_of(dtype)
    if values.size:
        low, high = values.min(), values.max()
        if not (low >= 0 and np.isfinite(high)):
            raise InvalidInputError(
                ErrorKind.NON_FINITE,
                f"codes are finite and not negative, found values from {low} to {high}: check the activations and the dictionary",
            )
        if high > (_FLOAT16_MAX if dtype == "float16" else np.finfo(np.float32).max):
            advice = "store them as float32 (value_dtype='float32')" if dtype == "float16" else "scale them"
            raise InvalidInputError(
                ErrorKind.OVERFLOW,
                f"a code of {high} does not fit into {dtype}: {advice}",
            )
    return values.astype(stored)


def are_codes(values: Values) -> bool:
    """Return whether all of some values are finite and positive.

    Looks at their bits, which is faster for float16: those of infinity are above those of all finite positive numbers, and below
    those of NaN and of all negative numbers.

    >>> are_codes(np.array([1, 2], np.float16)), are_codes(np.array([1, 0], np.float16))
    (True, False)
    """
    if not len(values):
        return True
    bits = values.view(f"<u{values.itemsize}")
    infinity = int(np.array(np.inf, values.dtype).view(bits.dtype))
    return int(bits.min()) > 0 and int(bits.max()) < infinity


def value_dtype_of(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of stored values.

    Raises:
        InvalidInputError: `name` is none of `VALUE_DTYPES`.
    """
    if name not in VALUE_DTYPES:
        raise _bad(f"codes cannot be stored as {name!r}: use one of {sorted(VALUE_DTYPES)}")
    return VALUE_DTYPES[name]


def check_n_latents(n_latents: Any) -> int:
    """Return `n_latents` if a dictionary can have so many.

    Raises:
        InvalidInputError: it is no whole number from 1 to 2^31.
    """
    return check_whole(n_latents, what="n_latents", least=1, most=MAX_LATENTS)


def indptr_of(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where each of some stretches of `counts` begins when they follow each other, and where the last ends."""
    indptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return indptr


def _bad(message: str) -> InvalidInputError:
    return InvalidInputError(ErrorKind.BAD_ARGUMENT, message)
