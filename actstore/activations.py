"""What are a run's activations at one hook point? They are rows of `d_model` numbers, read like an array.

`Activations` knows which rows exist (`row_ranges`), gives any of them in any order, scans all of them at the speed of the
disk, and shuffles them for training. Every row it gives out was compared with the checksums that the manifest holds.
"""

import operator
from collections.abc import Collection as AbstractCollection
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.checks import check_whole
from actstore.codec.layout import RowLayout, parse_layout
from actstore.codec.read import RowReader
from actstore.codec.scan import scan_slabs
from actstore.dtypes import StoredArray, natural_dtype, stored_dtype
from actstore.errors import ErrorKind, InvalidInputError
from actstore.log.values import Collection
from actstore.shuffled import Shuffled
from actstore.storage.base import Storage

Rows: TypeAlias = int | slice | Sequence[int] | npt.NDArray[np.integer[Any]]
"""Row numbers: one, those of a slice that exist, or a list in the order wanted."""

DtypeName: TypeAlias = Literal["float32", "stored"]

DEFAULT_MEMORY_BYTES: Final = 256 << 20
MAX_IMPLICIT_BYTES: Final = 8 << 30
"""`np.asarray(activations)` refuses more than this: the whole of a hook point is rarely meant."""


class Activations:
    """The rows of one hook point of a run, at one version of the store; safe for use from many threads, and pickles.

    Row numbers are those of the run's tokenization: `unit * rows_per_unit + offset`. They have gaps, as units end early.
    """

    def __init__(
        self,
        storage: Storage,
        collection: Collection,
        hook_point: str,
        *,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        """Read a hook point of a run.

        Args:
            storage: Where the store is.
            collection: The run at the version to read.
            hook_point: Canonical name, such as `layers.3.resid_post`.
            memory_bytes: Limit for buffers in use by one call, its answer not counted.

        Raises:
            NotFoundError: the run has no such hook point.
            FormatError: the manifest's entry of the run is damaged.
        """
        self._storage = storage
        self._collection = collection
        self._layout = parse_layout(collection, hook_point)
        self._memory_bytes = memory_bytes
        self._reader = RowReader(storage, self._layout, memory_bytes=memory_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self._storage, self._collection, self.hook_point, self._memory_bytes))

    def __repr__(self) -> str:
        return (
            f"<Activations {self._collection.id}/{self.hook_point}: {self.shape[0]} rows of {self.shape[1]} "
            f"{self.stored_dtype}, {len(self._layout.units)} units>"
        )

    @property
    def hook_point(self) -> str:
        """Canonical name of the hook point."""
        return self._layout.hook_point

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return self._collection.id

    @property
    def layout(self) -> RowLayout:
        """Which rows exist, and in which objects they are."""
        return self._layout

    @property
    def reader(self) -> RowReader:
        """What reads planned rows; for `actstore`'s own modules."""
        return self._reader

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the run's configuration, hex."""
        return self._collection.fingerprint

    @property
    def shape(self) -> tuple[int, int]:
        """Rows that exist, and `d_model`."""
        return self._layout.n_rows, self._layout.spec.d_model

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what `activations[rows]` returns: the stored dtype, or float32 for bfloat16, which numpy lacks."""
        return natural_dtype(self._layout.spec.dtype)

    @property
    def stored_dtype(self) -> str:
        """`float32`, `float16` or `bfloat16`."""
        return self._layout.spec.dtype

    @property
    def rows_per_unit(self) -> int:
        """Distance between the first rows of neighbouring units."""
        return self._layout.rows_per_unit

    @property
    def row_ranges(self) -> list[tuple[int, int]]:
        """Half-open ranges `[start, stop)` of the rows that exist, ascending."""
        return self._layout.row_ranges()

    def __len__(self) -> int:
        return self._layout.n_rows

    def __getitem__(self, rows: Rows) -> npt.NDArray[Any]:
        """Return one row `(d_model,)` for an int, else rows `(n, d_model)`, of dtype `self.dtype`.

        A slice gives the rows in it that exist, a list gives exactly the rows asked for, in that order.

        Raises:
            NotFoundError: a row that does not exist (negative ones never do).
            InvalidInputError: something else than rows, such as a boolean mask.
            FormatError: an object is missing or damaged.
        """
        found = self._read(rows, self.dtype, None)
        return found[0] if _is_int(rows) else found

    def read(
        self, rows: Rows, *, dtype: DtypeName = "float32", out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Return rows `(n, d_model)` as float32, or as they are stored (bfloat16 as its bits in uint16).

        Args:
            rows: As in `activations[rows]`; one int gives `n = 1`.
            dtype: "float32" or "stored".
            out: Filled and returned if given: C-contiguous, of the answer's shape and dtype.

        Raises:
            NotFoundError: a row that does not exist.
            InvalidInputError: something else than rows, or an unfit `out`.
            FormatError: an object is missing or damaged; `out` then holds anything.
        """
        return self._read(rows, self._answer_dtype(dtype), out)

    def scan(
        self,
        batch_rows: int = 4096,
        *,
        start: int | None = None,
        stop: int | None = None,
        columns: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
        units: AbstractCollection[int] | None = None,
        dtype: DtypeName = "float32",
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
        """Yield all existing rows in ascending order as `(rows, values)`, reading ahead within `memory_bytes`.

        A batch has at most `batch_rows` rows, all of one unit and without gaps. The arrays are the caller's: their memory is
        used again only after every reference to them is gone, so a loop that keeps none runs in constant memory.

        Args:
            batch_rows: Rows of a batch; units are cut from their first row (or `start`) on.
            start: First row; from the beginning if None.
            stop: End of the rows; to the end if None.
            columns: Only these of `d_model`, in this order.
            units: Only these units.
            dtype: "float32", or "stored" for the stored numbers (bfloat16 as its bits in uint16).

        Yields:
            Row numbers `(n,)` int64 and values `(n, d_model)` or `(n, len(columns))`.

        Raises:
            InvalidInputError: `batch_rows` or `columns` out of range.
            FormatError: an object is missing or damaged.
        """
        batch_rows = check_whole(batch_rows, what="batch_rows", least=1)
        # No batch is larger than the largest unit, so buffers need not be either.
        batch_rows = min(batch_rows, max((unit.n_rows for unit in self._layout.units), default=1))
        slabs = scan_slabs(
            self._reader,
            batch_rows=batch_rows,
            start=0 if start is None else start,
            stop=np.iinfo(np.int64).max if stop is None else stop,
            dtype=self._answer_dtype(dtype),
            columns=None if columns is None else self._check_columns(columns),
            units=None if units is None else frozenset(units),
        )
        return _batches(slabs, batch_rows)

    def shuffled(
        self,
        batch_rows: int = 4096,
        *,
        seed: int = 0,
        buffer_bytes: int = 256 << 20,
        drop_last: bool = False,
        n_readers: int | None = None,
        worker_index: int = 0,
        num_workers: int = 1,
        dtype: DtypeName = "float32",
    ) -> Shuffled:
        """Return a resumable iterator over all rows in a random order, `(rows, values)` per batch.

        The order depends on the arguments up to `drop_last` and on the rows of this version alone, never on threads or
        workers. See `actstore.shuffled.Shuffled`.

        Args:
            batch_rows: Rows of a batch; the last one of an epoch has fewer unless `drop_last`.
            seed: Of the order.
            buffer_bytes: Stored bytes of the chunks that are mixed with each other; two such buffers are held.
            drop_last: Leave out a last batch that is not full.
            n_readers: Threads that read ahead; chosen by the storage if None.
            worker_index: This worker takes the batches `i` with `i % num_workers == worker_index`.
            num_workers: Workers that share an epoch.
            dtype: "float32", or "stored".
        """
        return Shuffled(
            self._reader,
            version=self.fingerprint,
            batch_rows=batch_rows,
            seed=seed,
            buffer_bytes=buffer_bytes,
            drop_last=drop_last,
            n_readers=n_readers,
            worker_index=worker_index,
            num_workers=num_workers,
            dtype=self._answer_dtype(dtype),
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return all existing rows, if they are not too many for that to be meant.

        Raises:
            InvalidInputError: more than 8 GiB, or a copy was forbidden.
        """
        nbytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        if nbytes > MAX_IMPLICIT_BYTES:
            raise InvalidInputError(
                ErrorKind.TOO_LARGE,
                f"all rows of hook point {self.hook_point!r} as one array are {nbytes} bytes, more than "
                f"{MAX_IMPLICIT_BYTES}: use activations[rows], .scan() or .read(slice(None))",
            )
        if copy is False:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, "stored rows cannot become an array without a copy"
            )
        values = self[:]
        return values if dtype is None else values.astype(dtype, copy=False)

    def _answer_dtype(self, dtype: str) -> np.dtype[Any]:
        if dtype == "float32":
            return np.dtype(np.float32)
        if dtype == "stored":
            return stored_dtype(self._layout.spec.dtype)
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"dtype {dtype!r} cannot be read: use 'float32' or 'stored'"
        )

    def _check_columns(self, columns: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        checked = _as_int64(columns, what="columns")
        if checked.size and not 0 <= checked.min() <= checked.max() < self.shape[1]:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"columns from {checked.min()} to {checked.max()} are not all in [0, {self.shape[1]}) of {self.hook_point!r}",
            )
        return checked

    def _read(self, rows: Rows, dtype: np.dtype[Any], out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        if isinstance(rows, slice):
            return self._read_slice(rows, dtype, out)
        wanted = _as_int64([rows] if _is_int(rows) else rows, what="rows")
        self._layout.check_rows(wanted)
        answer = _fit(out, (len(wanted), self.shape[1]), dtype)
        if len(wanted):
            self._reader.gather(wanted, answer)
        return answer

    def _read_slice(
        self, rows: slice, dtype: np.dtype[Any], out: npt.NDArray[Any] | None
    ) -> npt.NDArray[Any]:
        ranges = self.row_ranges
        start, stop, step = _slice_bounds(rows, end=ranges[-1][1] if ranges else 0)
        if step > 1:
            return self._read(self._layout.existing(start, stop, step), dtype, out)
        runs = []
        for unit in self._layout.units:
            base = unit.unit * self.rows_per_unit
            first, end = max(start, base), min(stop, base + unit.n_rows)
            if first < end:
                runs.append((first, end))
        answer = _fit(out, (sum(end - first for first, end in runs), self.shape[1]), dtype)
        if runs:
            self._reader.read_runs(runs, answer)
        return answer


def _reopen(storage: Storage, collection: Collection, hook_point: str, memory_bytes: int) -> Activations:
    return Activations(storage, collection, hook_point, memory_bytes=memory_bytes)


def _batches(
    slabs: Iterator[tuple[int, npt.NDArray[Any]]], batch_rows: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
    """Cut slabs into batches; no name may keep a slab alive while the next one is made."""
    for first, values in slabs:
        for low in range(0, len(values), batch_rows):
            high = min(low + batch_rows, len(values))
            yield np.arange(first + low, first + high, dtype=np.int64), values[low:high]
        del values


def _is_int(rows: object) -> bool:
    return not isinstance(rows, bool | np.bool_) and hasattr(rows, "__index__") and np.ndim(rows) == 0  # type: ignore[arg-type]


def _as_int64(values: Any, *, what: str) -> npt.NDArray[np.int64]:
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if (
        array.ndim != 1
        or array.dtype.kind not in "iu"
        or (array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max)
    ):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{what} must be an int below 2^63, a slice or a flat list of such ints, not an array of shape {array.shape} and "
            f"dtype {array.dtype} (np.flatnonzero turns a boolean mask into one)",
        )
    return array.astype(np.int64, copy=False)


def _slice_bounds(rows: slice, *, end: int) -> tuple[int, int, int]:
    try:
        start = 0 if rows.start is None else operator.index(rows.start)
        stop = end if rows.stop is None else operator.index(rows.stop)
        step = 1 if rows.step is None else operator.index(rows.step)
    except TypeError as error:
        raise InvalidInputError(ErrorKind.BAD_ARGUMENT, f"{rows!r} is no slice of rows: use ints") from error
    if start < 0 or stop < 0 or step < 1:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{rows!r} is no slice of rows: bounds never count from the end, and the step must be positive",
        )
    return start, min(stop, end), step


def _fit(out: npt.NDArray[Any] | None, shape: tuple[int, int], dtype: np.dtype[Any]) -> StoredArray:
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"out has shape {out.shape} and dtype {out.dtype}; the answer needs a writable, C-contiguous array of shape "
            f"{shape} and dtype {dtype}",
        )
    return out
