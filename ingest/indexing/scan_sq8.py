"""How are rows compressed for questions about directions? Every row, 8 bits a number, and exactly those that 8 bits do not hold.

The FAISS file is an `IndexScalarQuantizer` (QT_8bit, inner product) of the rows by ordinal, turned to their principal axes by a
`LinearTransform` before it. Turn and ranges are set from a sample here, not by FAISS: each number lies within half a bin of what
its byte stands for, or its row is an *exception*. Those are stored whole in a file of their own and compared one by one whenever
a direction is asked for, so that what `actstore.query.direction_scan` finds is the true answer. Attention sinks, and the few rows
that stretch the ranges most, are exceptions: narrower bins leave fewer rows to be verified.

Rows are turned so that bins are fine where rows differ little. Measured on 260,000 residual-stream rows of a small transformer,
the rows that may be among the best 20: of a random direction 90 to 640 instead of 1,500 to 16,000, of a linear discriminant 116
instead of all, of an axis of small variance 60 instead of all, and of a neuron 100 to 600 instead of 25.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError
from actstore.faiss_file import load_faiss
from actstore.row_norms import row_norms
from actstore.sq8 import LEAST_WIDTH, Compression, code_index, least_widths, read_compression
from actstore.stats import SINK_NORM_RATIO

from .kinds import Blocks, Part, deserialise, serialise, to_file

Float32s: TypeAlias = npt.NDArray[np.float32]
Float64s: TypeAlias = npt.NDArray[np.float64]
Int64s: TypeAlias = npt.NDArray[np.int64]

_STRETCHING: Final = 1 / 256
"""Share of the sample's rows that do not count for the ranges: those that are furthest out in some dimension."""

_EXPECTED_OUTSIDE: Final = 0.002
"""Share of the rows that may be beyond what the sample showed; ranges are widened by what an exponential tail asks for."""

_MOST_WIDENED: Final = 2.0
_MOST_EXCEPTIONS: Final = 0.25
"""Share of a shard's rows beyond which a compressed copy saves nothing: each takes as many bytes as four compressed rows."""

_MOST_TURNED: Final = 4096
"""Widest rows that are turned: each then takes about a millisecond of a processor, growing with the square."""

_ROWS_PER_AXIS: Final = 16
"""Rows of the sample for each axis: with fewer, spreads along the narrow ones would look a quarter too small."""

_MARGIN: Final = 2.0**-18
"""Of the length of rows, by which ranges along turned axes are wider: the sample is turned in float32."""

_BLOCK_VALUES: Final = 1 << 21
"""Numbers of the sample looked at at a time, in float64: 16 MiB."""

_LARGEST: Final = float(np.finfo(np.float32).max)


class ScanSq8:
    """All rows, 8 bits a number."""

    name = "scan_sq8"
    takes_all = True

    def train(
        self, sample_nd: Float32s, *, n_rows: int, metric: str, seed: int, params: Mapping[str, Any]
    ) -> bytes:
        """Return an empty index with the range of every dimension.

        Raises:
            InvalidInputError: another metric than `ip`: a direction is multiplied with rows as they are.
        """
        del seed
        if metric != "ip":
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"an index of kind 'scan_sq8' was asked for with metric {metric!r}: it is for inner products with directions, "
                "use metric='ip'",
            )
        compression = fit_compression(sample_nd, n_rows=n_rows, norm_limit=params.get("norm_limit"))
        return serialise(_empty_index(compression))

    def build_shard(self, trained: bytes, blocks: Blocks, n: int) -> dict[str, Part]:
        """Return the file of compressed rows and the file of exceptions.

        Memory: a few copies of a block, and 8 bytes for each exception. Both files are written twice, to temporary ones first.

        Raises:
            InvalidInputError: more than a quarter of the rows are outside of the ranges.
        """
        index = deserialise(trained)
        compression = read_compression(index)
        with _Scratch(n, index.d) as scratch:
            outside = [scratch.add(compression, ordinals, rows_td) for ordinals, rows_td in blocks]
            exceptions = np.concatenate([np.empty(0, np.int64), *outside])
            assert scratch.n_added == n, "every ordinal is given"
            if len(exceptions) > _MOST_EXCEPTIONS * n + 64:
                raise InvalidInputError(
                    ErrorKind.TOO_LARGE,
                    f"{len(exceptions)} of {n} rows of a shard are outside of the ranges that the sample showed, so 8 bits a "
                    "number do not compress them: rows are too unlike each other for this kind of index, scan them",
                )
            parts: dict[str, Part] = {"exceptions": scratch.exceptions_file(exceptions)}
            try:
                parts["faiss"] = _faiss_file(index, scratch, n)
            except BaseException:
                Path(str(parts["exceptions"])).unlink(missing_ok=True)
                raise
            return parts


def fit_compression(sample_nd: Float32s, *, n_rows: int, norm_limit: float | None = None) -> Compression:
    """Return a turn and ranges that hold nearly all rows, from a sample of them.

    Left out: rows that are not finite, rows over the norm limit, and of the rest the 1/256 that are furthest from the mean along
    some axis, in standard deviations. What is left is widened, the more the smaller the sample.

    Args:
        sample_nd: Shape (n, d).
        n_rows: Of the run; ranges of a sample of all of them are not widened.
        norm_limit: L2 norm over which a row counts as an attention sink; 10 times the median of those that are not 0 if None.
    """
    rows = _plain_rows(sample_nd, norm_limit)
    n_sample, d = sample_nd.shape
    if not rows.size:
        return Compression(np.zeros(d, np.float32), np.full(d, LEAST_WIDTH, np.float32), None)
    turn_dd = _fit_turn(sample_nd, rows) if d <= _MOST_TURNED and len(rows) >= _ROWS_PER_AXIS * d else None
    # How exactly is no matter here: the ranges are what they are, and each row is looked at again when it is compressed.
    turned_nd = sample_nd[rows]
    if turn_dd is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            turned_nd = turned_nd @ turn_dd.T
        np.nan_to_num(turned_nd, copy=False, nan=_LARGEST)
    centre_d = sum(block.sum(axis=0) for block in _float64s(turned_nd)) / len(rows)
    square_d = sum(((block - centre_d) ** 2).sum(axis=0) for block in _float64s(turned_nd)) / len(rows)
    spread_d = np.where(square_d > 0, np.sqrt(square_d), 1.0)
    furthest = [(np.abs(block - centre_d) / spread_d).max(axis=1) for block in _float64s(turned_nd)]
    order = np.argsort(np.concatenate(furthest), kind="stable")
    turned_nd = turned_nd[order[: len(rows) - int(len(rows) * _STRETCHING)]]
    more = _widening(len(turned_nd), d) if n_sample < n_rows else 1.0
    low_d, high_d = turned_nd.min(axis=0).astype(np.float64), turned_nd.max(axis=0).astype(np.float64)
    return _compression(
        centre_d + np.minimum(low_d - centre_d, 0) * more,
        centre_d + np.maximum(high_d - centre_d, 0) * more,
        turn_dd,
    )


def _plain_rows(sample_nd: Float32s, norm_limit: float | None) -> Int64s:
    """Return which rows of a sample are finite and no attention sinks."""
    norms, finite = row_norms(sample_nd)
    rows = np.flatnonzero(finite)
    if norm_limit is None and rows.size:
        some = norms[rows][norms[rows] > 0]
        norm_limit = SINK_NORM_RATIO * float(np.median(some)) if some.size else None
    return rows if norm_limit is None else rows[norms[rows] <= norm_limit]


def _fit_turn(sample_nd: Float32s, rows: Int64s) -> Float32s:
    """Return the axes along which rows vary independently, those of least variance first; shape (d, d)."""
    d = sample_nd.shape[1]
    few = rows[:: max(1, len(rows) // (4 * _ROWS_PER_AXIS * d))]
    largest = np.abs(sample_nd[few]).max(initial=0.0)
    covariance_dd = np.zeros((d, d))
    if largest > 0:
        mean_d = sample_nd[few].mean(axis=0, dtype=np.float64).astype(np.float32)
        for block in _float64s(sample_nd[few]):
            scaled = ((block - mean_d) / largest).astype(np.float32)
            covariance_dd += scaled.T @ scaled
    _, axes_dd = np.linalg.eigh(covariance_dd)
    return np.ascontiguousarray(axes_dd.T, np.float32)


def _compression(low_d: Float64s, high_d: Float64s, turn_dd: Float32s | None) -> Compression:
    if turn_dd is not None:
        longest = float(np.linalg.norm(np.maximum(np.abs(low_d), np.abs(high_d))))
        low_d, high_d = low_d - _MARGIN * longest, high_d + _MARGIN * longest
    low32_d = np.clip(low_d, -_LARGEST, _LARGEST).astype(np.float32)
    low32_d = np.where(low32_d > low_d, np.nextafter(low32_d, np.float32(-np.inf)), low32_d)
    # Half a bin is left above the highest number, so that rounding does not put it outside.
    width_d = np.maximum((high_d - low32_d) * (255 / 255.5), LEAST_WIDTH)
    if turn_dd is not None:
        longest = Compression(low32_d, _to_float32(width_d), turn_dd).longest
        width_d = np.maximum(width_d, 2 * least_widths(turn_dd, longest))
    return Compression(low32_d, _to_float32(width_d), turn_dd)


def _to_float32(width_d: Float64s) -> Float32s:
    return np.minimum(width_d, _LARGEST).astype(np.float32)


def _widening(n_sample: int, d: int) -> float:
    """Return how many times further from the mean than the outermost of a sample the rare ones are, of an exponential tail."""
    wanted = math.log(2 * d / _EXPECTED_OUTSIDE) / math.log(max(3, n_sample))
    return min(max(wanted, 1.0), _MOST_WIDENED)


def _float64s(rows_nd: Float32s) -> Iterator[Float64s]:
    size = max(1, _BLOCK_VALUES // rows_nd.shape[1])
    for start in range(0, len(rows_nd), size):
        yield rows_nd[start : start + size].astype(np.float64)


def _empty_index(compression: Compression) -> Any:
    faiss = load_faiss()
    d = len(compression.low_d)
    index = faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(np.concatenate([compression.low_d, compression.width_d]), index.sq.trained)
    index.is_trained = True
    if compression.turn_dd is None:
        return index
    turn = faiss.LinearTransform(d, d, False)
    faiss.copy_array_to_vector(compression.turn_dd.reshape(-1), turn.A)
    turn.is_trained = True
    turned = faiss.IndexPreTransform(turn, index)
    turned.is_trained = True
    return turned


def _faiss_file(index: Any, scratch: "_Scratch", n: int) -> Path:
    """Return the file of an empty index filled with bytes that stay on disk meanwhile."""
    faiss = load_faiss()
    quantizer = code_index(index)
    if n:
        codes = np.memmap(scratch.codes_path, np.uint8, "r", shape=(n * quantizer.d,))
        owner = quantizer.codes.owner
        quantizer.codes = faiss.MaybeOwnedVectorUInt8.create_view(faiss.swig_ptr(codes), codes.size, owner)
        quantizer.ntotal = index.ntotal = n
    return to_file(index)


class _Scratch:
    """Files that a shard's bytes and exceptions are gathered in. Close it after use."""

    def __init__(self, n: int, d: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="actstore-index-")
        self.codes_path = os.path.join(self._folder, "codes")
        self._codes: BinaryIO = open(self.codes_path, "wb")  # noqa: SIM115 - closed by `close`
        self._rows: BinaryIO = open(os.path.join(self._folder, "rows"), "w+b")  # noqa: SIM115
        self._n, self._d = n, d
        self.n_added = 0

    def __enter__(self) -> "_Scratch":
        return self

    def __exit__(self, *caught: object) -> None:
        self._codes.close()
        self._rows.close()
        shutil.rmtree(self._folder)

    def add(self, compression: Compression, ordinals: Int64s, rows_td: Float32s) -> Int64s:
        """Take a block of rows, and return the ordinals of its exceptions."""
        assert np.array_equal(ordinals, np.arange(self.n_added, self.n_added + len(rows_td)))
        codes, fits = compression.encode(rows_td)
        self._codes.write(codes.reshape(-1).data)
        outside = np.flatnonzero(~fits)
        self._rows.write(np.ascontiguousarray(rows_td[outside], "<f4").reshape(-1).data)
        self.n_added += len(rows_td)
        if self.n_added == self._n:
            self._codes.flush()
        return ordinals[outside]

    def exceptions_file(self, ordinals: Int64s) -> Path:
        """Return a safetensors file of `ordinals` (m,) int64 and `rows` (m, d) float32."""
        first = 8 * len(ordinals)
        header = {
            "ordinals": {"dtype": "I64", "shape": [len(ordinals)], "data_offsets": [0, first]},
            "rows": {
                "dtype": "F32",
                "shape": [len(ordinals), self._d],
                "data_offsets": [first, first + 4 * len(ordinals) * self._d],
            },
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # numbers start at a multiple of 8
        handle, path = tempfile.mkstemp(prefix="actstore-index-", suffix=".safetensors")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                out.write(ordinals.astype("<i8").data)
                self._rows.seek(0)
                shutil.copyfileobj(self._rows, out)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(path)
            raise
        return Path(path)
