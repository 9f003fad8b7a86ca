"""How do the dimensions of a hook point vary together? A full covariance that is added up unit by unit.

A `Covariance` holds the number of rows, their mean and the centred cross products, all in float64, and merges exactly (up to
rounding). Stored, it is a few bytes of header and plain numbers (FORMAT.md, section 7.5).

Source: Chan, Golub, LeVeque (1983), "Algorithms for computing the sample variance", eq. 2.1; for cross products the square of
the difference of means becomes their outer product (Schubert, Gertz (2018), "Numerically stable parallel computation of
(co-)variance", SSDBM, eq. 21).
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.names import hook_point_folder

if TYPE_CHECKING:
    from actstore.run import Run

Float64Array = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.float32]

MAGIC: Final = b"ACTCOV1\n"
_HEADER: Final = struct.Struct("<8sQQ")

MAX_D_MODEL: Final = 8192
"""Widest hook point: 256 MiB for every unit, and twice that in memory while it is computed."""

_BLOCK_VALUES: Final = 1 << 20
"""Values of a block of rows as float64: 8 MiB."""

_LEAST_ROWS: Final = 256
"""Rows of a block at least: a product of fewer spends its time on reading the sums."""

_PANEL: Final = 256
"""Rows of the cross products that are computed at once. Only what is right of the diagonal is needed, so narrow panels save
up to half of the work, and wide ones are faster for their size."""

_TIMES_FIRST: Final = 64
"""Rows that are centred on the mean of a first block, as a multiple of its own. The mean of a part of 1/64 differs from the mean
of all by at most the root of 63 times the variance, so no more than 6 of float64's 53 bits cancel."""


@dataclass(frozen=True, slots=True)
class Covariance:
    """Second moments of a hook point's finite rows, all dimensions with all."""

    n: int
    """Rows without NaN or infinity: only these count."""

    mean: Float64Array
    """Shape (d_model,)."""

    packed: Float64Array
    """Sums over rows of (x_i - mean_i)(x_j - mean_j) for i <= j, row by row of the upper triangle: d_model (d_model + 1) / 2."""

    @property
    def d_model(self) -> int:
        """Number of dimensions."""
        return len(self.mean)

    @property
    def covariance(self) -> Float64Array:
        """Population covariance, divided by `n`: symmetric, shape (d_model, d_model), new memory; NaN without rows.

        Its diagonal is `HookPointStats.variance`.
        """
        d_model, packed = self.d_model, self.packed
        full = np.empty((d_model, d_model))
        for i, row in _triangle_rows(d_model):
            full[i, i:] = packed[row]
            full[i:, i] = packed[row]
        full /= self.n or np.nan
        return full


ReadBlock = Callable[[slice, FloatArray], FloatArray]
"""Returns the rows of a slice as float32, in the array given, which has as many, or in memory that is only read."""


def covariance_of(read: ReadBlock, *, n_rows: int, d_model: int) -> Covariance:
    """Return the covariance of rows that are read a block at a time, each once; rows with NaN or infinity are left out.

    Products are BLAS calls in float64, on as many threads as the process allows BLAS. Memory: 24 MiB, and 8 bytes for each of
    d_model^2 numbers.

    Raises:
        InvalidInputError: `d_model` is over `MAX_D_MODEL`.
    """
    check_width(d_model)
    block_rows = max(_LEAST_ROWS, _BLOCK_VALUES // d_model)
    scratch = np.empty((min(block_rows, n_rows), d_model), np.float32)
    blocks = _finite_blocks(read, scratch, n_rows)
    total = Covariance(0, np.zeros(d_model), np.zeros(d_model * (d_model + 1) // 2))
    block = next(blocks, None)
    while block is not None:
        part, block = _shifted(block, blocks)
        total = _merge_into(total, part)
    return total


def check_width(d_model: int) -> None:
    """Check that a hook point's covariance can be kept.

    Raises:
        InvalidInputError: it is wider than `MAX_D_MODEL`.
    """
    if d_model > MAX_D_MODEL:
        raise InvalidInputError(
            ErrorKind.TOO_LARGE,
            f"a covariance of {d_model} dimensions was asked for, at most {MAX_D_MODEL} are kept: each unit would take "
            f"{covariance_bytes(d_model):,} bytes; leave out covariance for hook points as wide as this",
        )


def pack_covariance(covariance: Covariance) -> bytes:
    """Return the bytes that are stored (FORMAT.md, section 7.5)."""
    header = _HEADER.pack(MAGIC, covariance.d_model, covariance.n)
    return b"".join([header, covariance.mean.astype("<f8").data, covariance.packed.astype("<f8").data])


def covariance_bytes(d_model: int) -> int:
    """Return how many bytes `pack_covariance` gives for a hook point of this width.

    >>> covariance_bytes(2)
    64
    """
    return _HEADER.size + 8 * (d_model + d_model * (d_model + 1) // 2)


def parse_covariance(data: bytes) -> Covariance:
    """Return what `pack_covariance` wrote; its arrays are read-only views of `data`.

    Raises:
        FormatError: it is something else.
    """
    fits = len(data) >= _HEADER.size
    magic, d_model, n = _HEADER.unpack_from(data) if fits else (b"", 0, 0)
    if magic != MAGIC or n >= 1 << 63 or len(data) != covariance_bytes(d_model):
        raise FormatError(
            ErrorKind.OBJECT_DAMAGED,
            f"a covariance was expected, found {len(data)} bytes that begin with {bytes(data[:24])!r}: run fsck",
        )
    numbers = np.frombuffer(data, "<f8", offset=_HEADER.size).astype(np.float64, copy=False)
    return Covariance(n, numbers[:d_model], numbers[d_model:])


def merge_covariances(parts: Iterable[bytes]) -> bytes:
    """Return the stored form of all parts' rows together. Holds one part and the sum at a time.

    Raises:
        InvalidInputError: there are no parts.
        FormatError: one is no covariance, or of another width.
    """
    total: Covariance | None = None
    for data in parts:
        part = parse_covariance(data)
        # The first is copied, for it is a view of read-only bytes.
        total = _merge_into(total, part) if total else Covariance(part.n, part.mean, part.packed.copy())
    if total is None:
        raise InvalidInputError(ErrorKind.BAD_ARGUMENT, "no covariances were given, at least one is needed")
    return pack_covariance(total)


def covariance_key(run: str, hook_point: str, part: str) -> str:
    """Return where the covariance of a hook point is stored.

    Args:
        run: Id of the run.
        hook_point: Its name.
        part: `<unit:08>-<attempt>`, or `all-<attempt>` for the whole run.

    >>> covariance_key("r", "layers.0.resid_post", "00000003-ab")
    'runs/r/covariance/layers.0.resid_post/00000003-ab.bin'
    """
    return f"runs/{run}/covariance/{hook_point_folder(hook_point)}/{part}.bin"


def is_covariance_key(run: str, hook_point: str, key: str) -> bool:
    """Return whether `key` is where the covariance of a hook point is stored, of a unit or of the whole run."""
    return key.startswith(covariance_key(run, hook_point, "").removesuffix(".bin"))


def run_covariance(run: "Run", hook_point: str) -> Covariance:
    """Return the covariance of a hook point over all stored rows of a run.

    Reads one object when the run is complete, one per unit before.

    Args:
        run: The run.
        hook_point: Canonical name of one of its hook points.

    Raises:
        InvalidInputError: the run was made without covariances.
        FormatError: an object is missing or damaged.
    """
    collection = run.collection
    if not collection.config.get("covariance", False):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"the covariance of {hook_point!r} was asked for, and run {run.id!r} keeps none: ingest with covariance=True "
            "(--covariance); run.stats(hook_point).variance has the variance of each dimension",
        )
    seal = collection.seal
    objects = seal.objects if seal is not None else [o for u in collection.units.values() for o in u.objects]
    found = [o for o in objects if is_covariance_key(run.id, hook_point, o.key)]
    if not found:
        d_model = run.d_model(hook_point)
        return Covariance(0, np.zeros(d_model), np.zeros(d_model * (d_model + 1) // 2))
    return parse_covariance(merge_covariances(run.store.objects.read(o) for o in found))


def _merge_into(total: Covariance, part: Covariance) -> Covariance:
    """Return both together; `total` is used up."""
    if total.d_model != part.d_model:
        raise FormatError(
            ErrorKind.OBJECT_DAMAGED,
            f"covariances of {total.d_model} and of {part.d_model} dimensions cannot be one hook point's: run fsck",
        )
    n = total.n + part.n
    if not total.n or not part.n:
        mean, delta = (total.mean if total.n else part.mean), np.zeros(total.d_model)
    else:
        delta = part.mean - total.mean
        mean = total.mean + delta * (part.n / n)
    packed = total.packed
    weight = total.n * part.n / n if n else 0.0
    for i, row in _triangle_rows(total.d_model):
        packed[row] += part.packed[row]
        packed[row] += (weight * delta[i]) * delta[i:]
    return Covariance(n, mean, packed)


def _triangle_rows(d_model: int) -> Iterator[tuple[int, slice]]:
    """Yield each row of the upper triangle: its number, and where it is among the packed numbers."""
    start = 0
    for i in range(d_model):
        yield i, slice(start, start + d_model - i)
        start += d_model - i


def _finite_blocks(read: ReadBlock, scratch: FloatArray, n_rows: int) -> Iterator[FloatArray]:
    for start in range(0, n_rows, len(scratch) or 1):
        stop = min(start + len(scratch), n_rows)
        acts_td = read(slice(start, stop), scratch[: stop - start])
        is_finite = np.isfinite(acts_td).all(axis=1)
        acts_td = acts_td if is_finite.all() else acts_td[is_finite]
        if len(acts_td):
            yield acts_td


def _shifted(first: FloatArray, blocks: Iterator[FloatArray]) -> tuple[Covariance, FloatArray | None]:
    """Return the covariance of a block and what follows, summed around the block's mean, and the block where that ends."""
    d_model = first.shape[1]
    shift, n = first.mean(axis=0, dtype=np.float64), 0
    total = np.zeros(d_model)
    starts = range(0, d_model, _PANEL)
    panels = [np.zeros((min(_PANEL, d_model - start), d_model - start)) for start in starts]
    block: FloatArray | None = first
    most = _TIMES_FIRST * len(first)
    while block is not None and n + len(block) <= most:
        wide = block - shift
        n += len(wide)
        total += wide.sum(axis=0)
        for start, panel in zip(starts, panels, strict=True):
            panel += wide[:, start : start + _PANEL].T @ wide[:, start:]
        block = next(blocks, None)
    packed = np.empty(d_model * (d_model + 1) // 2)
    for i, row in _triangle_rows(d_model):
        start = i % _PANEL
        np.subtract(panels[i // _PANEL][start, start:], (total[i] / n) * total[i:], out=packed[row])
    return Covariance(n, shift + total / n, packed), block
