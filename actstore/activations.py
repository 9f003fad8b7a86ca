"""What are a run's activations at one hook point? They are rows of `d_model` numbers, read like an array.

`Activations` knows which rows exist (`row_ranges`, `rows`), gives any of them in any order, scans all of them at the speed of
the disk, and shuffles them for training. Every row it gives out was compared with the checksums that the manifest holds.
"""

from collections.abc import Collection as AbstractCollection
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.checks import check_whole
from actstore.codec.layout import RowLayout, UnitRows, parse_layout
from actstore.codec.read import RowReader
from actstore.codec.scan import scan_slabs
from actstore.dtypes import natural_dtype, stored_dtype
from actstore.errors import ErrorKind, InvalidInputError
from actstore.log.values import Collection
from actstore.row_requests import Rows, as_numbers, fit_answer, is_one_row, slice_bounds
from actstore.shuffled import Shuffled
from actstore.storage.base import Storage

DtypeName: TypeAlias = Literal["float32", "stored"]

DEFAULT_MEMORY_BYTES: Final = 256 << 20
MAX_IMPLICIT_BYTES: Final = 8 << 30
"""`np.asarray(activations)` refuses more than this: the whole of a hook point is rarely meant."""


class Activations:
    """The rows of one hook point of a run, at one version of the store; safe for use from many threads, and pickles.

    Row numbers are those of the run's tokenization: `unit * rows_per_unit + offset`. They have gaps, as units end early, and
    everywhere if the run keeps a sample of its rows. Rows stored as int8 are given as the float32 numbers they stand for.
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
            InvalidInputError: the run keeps no dense rows.
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
            f"{self.stored_dtype}, {len(self._layout.units)} units"
            f"{'' if self.sample_rate == 1 else f', a sample of {self.sample_rate:.3g}'}>"
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
        """Of what `activations[rows]` returns: the stored dtype, or float32 for int8 and for bfloat16, which numpy lacks."""
        return natural_dtype(self._layout.spec.dtype)

    @property
    def stored_dtype(self) -> str:
        """`float32`, `float16`, `bfloat16` or `int8`."""
        return self._layout.spec.dtype

    @property
    def rows_per_unit(self) -> int:
        """Distance between the first rows of neighbouring units."""
        return self._layout.rows_per_unit

    @property
    def sample_rate(self) -> float:
        """Share of the rows that the run keeps, each with this probability; 1 when all."""
        kept = self._layout.kept
        return 1.0 if kept is None else kept.sample.rate

    @property
    def row_ranges(self) -> list[tuple[int, int]]:
        """Half-open ranges `[start, stop)` that begin and end with an existing row and cover all of them, ascending.

        Every row in them exists. Of a run that keeps a sample there is one range for each unit, and rows in it are missing:
        `rows` gives the numbers of those that exist.
        """
        return self._layout.row_ranges()

    def rows(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Return the numbers of the rows from `start` on and before `stop` that exist, ascending; 8 bytes each.

        Raises:
            InvalidInputError: not whole numbers, or below 0.
        """
        start = check_whole(start, what="start", least=0)
        end = _end_of_rows(self._layout) if stop is None else check_whole(stop, what="stop", least=0)
        return self._layout.existing(start, end)

    def exist(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Return which rows of a list exist, shape (n,).

        Raises:
            InvalidInputError: something else than a list of ints.
        """
        return self._layout.exist(as_numbers(rows, what="rows"))

    def __len__(self) -> int:
        return self._layout.n_rows

    def __getitem__(self, rows: Rows) -> npt.NDArray[Any]:
        """Return one row `(d_model,)` for an int, else rows `(n, d_model)`, of dtype `self.dtype`.

        A slice gives the rows in it that exist, a list gives exactly the rows asked for, in that order.

        Raises:
            NotFoundError: a row that does not exist (negative ones never do), or that a sampled run did not keep.
            InvalidInputError: something else than rows, such as a boolean mask.
            FormatError: an object is missing or damaged.
        """
        found = self._read(rows, self.dtype, None)
        return found[0] if is_one_row(rows) else found

    def read(
        self, rows: Rows, *, dtype: DtypeName = "float32", out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Return rows `(n, d_model)` as float32, or as they are stored.

        Args:
            rows: As in `activations[rows]`; one int gives `n = 1`.
            dtype: "float32", or "stored": bfloat16 as its bits in uint16; int8 `(n, d_model + 4)`, the last 4 bytes of a row its
                scale.
            out: Filled and returned if given: C-contiguous, of the answer's shape and dtype.

        Raises:
            NotFoundError: a row that does not exist, or that a sampled run did not keep.
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

        A batch has at most `batch_rows` rows, all of one unit, with none left out that exists. The arrays are the caller's: their
        memory is used again only after every reference to them is gone, so a loop that keeps none runs in constant memory.

        Args:
            batch_rows: Rows of a batch; units are cut from their first row (or `start`) on.
            start: First row; from the beginning if None.
            stop: End of the rows; to the end if None.
            columns: Only these of `d_model` (of `d_model + 4` for int8 as stored), in this order.
            units: Only these units.
            dtype: "float32", or "stored" for the stored numbers, as in `read`.

        Yields:
            Row numbers `(n,)` int64 and values `(n, d_model)` or `(n, len(columns))`.

        Raises:
            InvalidInputError: `batch_rows` or `columns` out of range.
            FormatError: an object is missing or damaged.
        """
        batch_rows = check_whole(batch_rows, what="batch_rows", least=1)
        # No batch is larger than the largest unit, so buffers need not be either.
        batch_rows = min(batch_rows, max((unit.n_rows for unit in self._layout.units), default=1))
        answer_dtype = self._answer_dtype(dtype)
        slabs = scan_slabs(
            self._reader,
            batch_rows=batch_rows,
            start=0 if start is None else start,
            stop=np.iinfo(np.int64).max if stop is None else stop,
            dtype=answer_dtype,
            columns=None if columns is None else self._check_columns(columns, self._width(answer_dtype)),
            units=None if units is None else frozenset(units),
        )
        return _batches(self._layout, slabs, batch_rows)

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

    def _width(self, dtype: np.dtype[Any]) -> int:
        """Return the numbers of a row in an answer of `dtype`."""
        spec = self._layout.spec
        return spec.stored_width if dtype == stored_dtype(spec.dtype) else spec.d_model

    def _check_columns(
        self, columns: Sequence[int] | npt.NDArray[np.integer[Any]], width: int
    ) -> npt.NDArray[np.int64]:
        checked = as_numbers(columns, what="columns")
        if checked.size and not 0 <= checked.min() <= checked.max() < width:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"columns from {checked.min()} to {checked.max()} are not all in [0, {width}) of {self.hook_point!r}",
            )
        return checked

    def _read(self, rows: Rows, dtype: np.dtype[Any], out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        if isinstance(rows, slice):
            return self._read_slice(rows, dtype, out)
        wanted = as_numbers([rows] if is_one_row(rows) else rows, what="rows")
        places = self._layout.places(wanted)
        answer = fit_answer(out, (len(wanted), self._width(dtype)), dtype)
        if len(wanted):
            self._reader.gather(places, answer)
        return answer

    def _read_slice(
        self, rows: slice, dtype: np.dtype[Any], out: npt.NDArray[Any] | None
    ) -> npt.NDArray[Any]:
        start, stop, step = slice_bounds(rows, end=_end_of_rows(self._layout))
        if step > 1:
            return self._read(self._layout.existing(start, stop, step), dtype, out)
        spans = ((unit, *self._layout.span(unit, start, stop)) for unit in self._layout.units)
        runs = [(unit, first, end) for unit, first, end in spans if first < end]
        answer = fit_answer(out, (sum(end - first for _, first, end in runs), self._width(dtype)), dtype)
        if runs:
            self._reader.read_runs(runs, answer)
        return answer


def _reopen(storage: Storage, collection: Collection, hook_point: str, memory_bytes: int) -> Activations:
    return Activations(storage, collection, hook_point, memory_bytes=memory_bytes)


def _batches(
    layout: RowLayout, slabs: Iterator[tuple[UnitRows, int, npt.NDArray[Any]]], batch_rows: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
    """Cut slabs into batches; no name may keep a slab alive while the next one is made."""
    for unit, first, values in slabs:
        for low in range(0, len(values), batch_rows):
            high = min(low + batch_rows, len(values))
            yield layout.numbers(unit, first + low, first + high), values[low:high]
        del values


def _end_of_rows(layout: RowLayout) -> int:
    """Return a row number past all that exist, before the next unit's."""
    if not layout.units:
        return 0
    last = layout.units[-1]
    size = last.n_rows if layout.kept is None else layout.rows_per_unit
    return last.unit * layout.rows_per_unit + size
