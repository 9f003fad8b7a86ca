"""In which space are rows compared? Affine maps that make distances between activations mean something.

Activations of language models lie in a narrow cone: a large common mean and a few dimensions of huge values lead every cosine.
A transform is a list of steps, applied to rows and queries alike:

    drop_outliers   leave out dimensions whose mean or deviation is over 10 times the median of all dimensions'
    centre          subtract the mean
    standardise     subtract the mean and divide by the standard deviation of each dimension
    whiten          subtract the mean and make all directions vary alike: ZCA, the whitening that turns rows least; after
                    `standardise` it is ZCA-cor

Whatever the order they are given in, they are applied in this one. Means and deviations are those of all finite rows, special
tokens and attention sinks included: where a run has sinks, `drop_outliers` takes out the dimensions that they are huge in, whose
mean is no other row's. A dimension or direction in which rows do not vary tells none from another: `standardise` and `whiten`
make it 0, for queries too.

Source: Mu, Viswanath (2018), "All-but-the-Top", arXiv:1702.01417 (the common mean); Timkey, van Schijndel (2021), "All Bark and
No Bite: Rogue Dimensions in Transformer Language Models Obscure Representational Quality", arXiv:2109.04404 (few dimensions lead
the cosine, and standardising cures it); Su et al. (2021), "Whitening Sentence Representations for Better Semantics and Faster
Retrieval", arXiv:2103.15316; Kessy, Lewin, Strimmer (2018), "Optimal Whitening and Decorrelation", arXiv:1512.00809 (ZCA and
ZCA-cor are the whitenings nearest to the rows, and to the standardised rows).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from actstore.codec.cache import BytesCache
from actstore.covariance import covariance_of
from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.stats import HookPointStats, block_stats, empty_stats, merge_stats

if TYPE_CHECKING:
    from actstore.pooled import Pooled
    from actstore.run import Run

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

STEPS: Final = ("drop_outliers", "centre", "standardise", "whiten")
"""All steps, in the order in which they are applied."""

_SPELLINGS: Final = {"center": "centre", "standardize": "standardise"}

WHITEN_EPS: Final = 1e-8
"""Added to the eigenvalues of the covariance, as a part of their mean: a direction that varies ten thousand times less than
the others is not blown up further. Rounding to float32 blurs rows a thousand times less than that."""

_CONSTANT: Final = 2.0**-24
"""A dimension that deviates from its mean by no more than float32's rounding of it is constant."""

_BLOCK_VALUES: Final = 1 << 20
"""Values transformed at a time: 8 MiB as float64, of which about six copies are held."""

_CACHE: BytesCache["Transform"] = BytesCache(256 << 20)
"""Transforms fitted in this process: the eigenvectors of a covariance of 4,096 dimensions take half a minute."""


def parse_steps(steps: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the steps under their own names and in the order in which they are applied.

    Args:
        steps: Names, or one text with commas between them; American spellings and hyphens are accepted. None or empty: no steps.

    Raises:
        InvalidInputError: something that is no step, or a step twice.

    >>> parse_steps(["standardize", "drop-outliers"]), parse_steps("center,whiten")
    (('drop_outliers', 'standardise'), ('centre', 'whiten'))
    """
    if steps is None:
        return ()
    given = steps.split(",") if isinstance(steps, str) else steps
    try:
        names = [_SPELLINGS.get(name, name) for name in (s.strip().lower().replace("-", "_") for s in given)]
    except (AttributeError, TypeError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"transform must be a list of the names {', '.join(STEPS)}, got {steps!r:.80}",
        ) from error
    names = [name for name in names if name or not isinstance(steps, str)]
    unknown = [name for name in names if name not in STEPS]
    if unknown or len(set(names)) != len(names):
        found = f"has the unknown step {unknown[0]!r}" if unknown else "has a step twice"
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"transform={steps!r:.80} {found}: give each of {', '.join(STEPS)} at most once",
        )
    return tuple(name for name in STEPS if name in names)


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """The affine map `y = ((x[keep] - mean) * scale) @ matrix.T`; what is None is left out of it."""

    steps: tuple[str, ...]
    """Of `STEPS`, as applied."""

    d_in: int
    """Dimensions of a row."""

    keep: Int64s | None = None
    """Dimensions that are kept, ascending, shape (m,); None for all."""

    mean: Float64s | None = None
    """Shape (m,)."""

    scale: Float64s | None = None
    """Shape (m,); 0 for a dimension that is constant."""

    matrix: Float64s | None = None
    """Shape (d_out, m), C-contiguous."""

    @property
    def d_out(self) -> int:
        """Dimensions of a transformed row."""
        if self.matrix is not None:
            return len(self.matrix)
        return self.d_in if self.keep is None else len(self.keep)

    @property
    def is_identity(self) -> bool:
        """Whether there is no step."""
        return not self.steps

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return sum(array.nbytes for array in self._arrays().values())

    def apply(self, rows_td: npt.NDArray[np.floating[Any]]) -> Float32s:
        """Return transformed rows, shape (t, d_out); computed in float64 and rounded once, to float32.

        Equal rows give bitwise equal results whatever rows are around them, and however many threads or which processor
        compute them. A row that is not finite becomes NaN throughout. Memory: the answer and about 50 MiB.

        Args:
            rows_td: Shape (t, d_in), float32 or float64.

        Raises:
            InvalidInputError: rows of another width.
        """
        if rows_td.ndim != 2 or rows_td.shape[1] != self.d_in:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"rows of shape {rows_td.shape} were given to a transform of {self.d_in} dimensions",
            )
        if self.is_identity:
            return rows_td.astype(np.float32, copy=False)
        transformed = np.empty((len(rows_td), self.d_out), np.float32)
        size = max(1, _BLOCK_VALUES // max(1, self.d_in))
        for start in range(0, len(rows_td), size):
            transformed[start : start + size] = self._apply_block(rows_td[start : start + size])
        return transformed

    def to_bytes(self) -> bytes:
        """Return a safetensors file: float64 `mean`, `scale`, `matrix` int64 `keep`; its metadata has `steps`, `d_in`."""
        from safetensors.numpy import save

        data: bytes = save(self._arrays(), {"steps": json.dumps(self.steps), "d_in": str(self.d_in)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Transform":
        """Return what `to_bytes` wrote.

        Raises:
            FormatError: it is something else.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            steps, d_in = tuple(json.loads(metadata["steps"])), int(metadata["d_in"])
            if parse_steps(steps) != steps or not set(arrays) <= {"keep", "mean", "scale", "matrix"}:
                raise ValueError(f"steps {steps} with {sorted(arrays)}")
            transform = cls(steps, d_in, **arrays)
            transform._check()
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                ErrorKind.OBJECT_DAMAGED, f"{len(data)} bytes are not a stored transform ({error}): run fsck"
            ) from error
        return transform

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        arrays = {"keep": self.keep, "mean": self.mean, "scale": self.scale, "matrix": self.matrix}
        return {name: array for name, array in arrays.items() if array is not None}

    def _check(self) -> None:
        """Raise ValueError if the parts do not fit each other."""
        m = self.d_in if self.keep is None else len(self.keep)
        shapes = {"keep": (m,), "mean": (m,), "scale": (m,), "matrix": (self.d_out, m)}
        for name, array in self._arrays().items():
            kind = np.dtype(np.int64 if name == "keep" else np.float64)
            if array.shape != shapes[name] or array.dtype != kind or not np.isfinite(array).all():
                raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
        if self.keep is not None and m and not (0 <= self.keep.min() <= self.keep.max() < self.d_in):
            raise ValueError(f"dimensions beyond {self.d_in} are kept")

    def _apply_block(self, rows_td: npt.NDArray[np.floating[Any]]) -> Float32s:
        with np.errstate(all="ignore"):
            wide = (rows_td if self.keep is None else rows_td[:, self.keep]).astype(np.float64)
            if self.mean is not None:
                wide -= self.mean
            if self.scale is not None:
                wide *= self.scale
            # -0.0 + 0.0 is 0.0: zeros have one sign.
            narrow = (
                wide.astype(np.float32) + np.float32(0) if self.matrix is None else _times(wide, self.matrix)
            )
        narrow[~np.isfinite(rows_td).all(axis=1)] = np.nan
        return narrow


def fit_transform(
    run: "Run",
    hook_point: str,
    steps: str | Iterable[str] | None,
    *,
    of: str = "tokens",
    pooling: str = "mean",
) -> Transform:
    """Return the transform of these steps, fitted to a hook point of a run.

    For tokens it is made of stored statistics: one object when the run is complete, one per unit before. For documents their
    pooled vectors are read, once. Kept in the process. Whitening takes 32 bytes for each of d_model^2 numbers.

    Args:
        run: The run.
        hook_point: One of its hook points, or an alias.
        steps: See `parse_steps`.
        of: "tokens": fitted to the stored rows; "documents": to the documents' pooled vectors.
        pooling: Of documents.

    Raises:
        NotFoundError: the run has no such hook point.
        InvalidInputError: an unknown step, no covariance (or pooled vectors) in the run, or rows of which nothing is left.
        FormatError: a stored object is missing or damaged.
    """
    parsed = parse_steps(steps)
    d_model = run.d_model(hook_point)
    if not parsed:
        return Transform((), d_model)

    def fit() -> tuple[Transform, int]:
        found = (
            _of_documents(run, hook_point, pooling, parsed)
            if of == "documents"
            else _of_rows(run, hook_point, parsed)
        )
        transform = _make(parsed, found, what=f"{of} of {hook_point!r} in run {run.id!r}")
        return transform, transform.nbytes

    return _CACHE.get(f"{_sources(run)}:{hook_point}:{of}:{pooling}:{parsed}", fit)


def _times(wide_tm: Float64s, matrix_dm: Float64s) -> Float32s:
    """Return `wide_tm @ matrix_dm.T` as float32, each number the same whatever is computed with it.

    BLAS adds up in an order that depends on the block's shape and on threads. That changes the last bits of the float64 sum,
    which rounding to float32 hides, but for sums so near to the middle of two float32 numbers that the error may carry them
    across: these, a few in a million, are added up again in an order that is always the same.
    """
    gamma = (wide_tm.shape[1] + 2) * 2.0**-53
    products = wide_tm @ matrix_dm.T
    lengths_t, lengths_d = np.sqrt((wide_tm**2).sum(axis=1)), np.sqrt((matrix_dm**2).sum(axis=1))
    # Both orders are within gamma |x| |w| of the truth; doubled, as these lengths are rounded themselves.
    margin = (4 * gamma) * lengths_t[:, None] * lengths_d + 1e-300
    narrow = products.astype(np.float32)
    rows, columns = np.nonzero(
        (products - margin).astype(np.float32) != (products + margin).astype(np.float32)
    )
    size = max(1, _BLOCK_VALUES // max(1, wide_tm.shape[1]))
    for start in range(0, len(rows), size):
        some = slice(start, start + size)
        again = (wide_tm[rows[some]] * matrix_dm[columns[some]]).sum(axis=1)
        narrow[rows[some], columns[some]] = again.astype(np.float32)
    return narrow + np.float32(0)


@dataclass(frozen=True, slots=True, eq=False)
class _Moments:
    """What steps are made of."""

    stats: HookPointStats
    mean: Float64s
    covariance: Float64s | None
    """Shape (d, d); None if no step needs it."""


def _of_rows(run: "Run", hook_point: str, steps: Sequence[str]) -> _Moments:
    stats = run.stats(hook_point)
    if "whiten" not in steps:
        return _Moments(stats, stats.mean, None)
    found = run.covariance(hook_point)
    return _Moments(stats, found.mean, found.covariance)


def _of_documents(run: "Run", hook_point: str, pooling: str, steps: Sequence[str]) -> _Moments:
    pooled = run.pooled(hook_point, pooling)
    vectors = _PooledStream(pooled)
    if "whiten" not in steps:
        for _ in vectors.parts():
            pass
        return _Moments(vectors.stats, vectors.stats.mean, None)
    found = covariance_of(vectors.read, n_rows=pooled.n_documents, d_model=pooled.d_model)
    return _Moments(vectors.stats, found.mean, found.covariance)


class _PooledStream:
    """The vectors of all documents, given out in blocks of any size; documents without one are rows of NaN."""

    def __init__(self, pooled: "Pooled") -> None:
        self.stats = empty_stats(pooled.hook_point, pooled.d_model)
        """Of what was given out."""
        self._pooled = pooled
        self._parts = self.parts()
        self._rest = np.empty((0, pooled.d_model), np.float32)

    def parts(self) -> Iterator[Float32s]:
        """Yield all vectors, about a unit's at a time."""
        for part in self._pooled.scan(include_empty=True):
            vectors = np.ascontiguousarray(part.vectors)
            some = vectors[part.n_tokens > 0]
            self.stats = merge_stats(self.stats, block_stats(self._pooled.hook_point, some))
            yield vectors

    def read(self, _: slice, out: Float32s) -> Float32s:
        """Return `out`, filled with the next vectors: NaN behind the last."""
        filled = 0
        while filled < len(out):
            if not len(self._rest):
                self._rest = next(self._parts, np.full((len(out), out.shape[1]), np.nan, np.float32))
            n = min(len(out) - filled, len(self._rest))
            out[filled : filled + n] = self._rest[:n]
            self._rest, filled = self._rest[n:], filled + n
        return out


def _make(steps: Sequence[str], moments: _Moments, *, what: str) -> Transform:
    """Return the transform of canonical steps; `what` it is fitted to is for errors."""
    stats = moments.stats
    if not stats.n_finite_rows:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"transform={list(steps)} of {what}: there are no finite rows to fit it to",
        )
    d_in = len(stats.mean)
    keep, some = None, np.arange(d_in)
    if "drop_outliers" in steps:
        outliers = stats.outlier_dims("robust")
        assert outliers is not None, "means and deviations are always known"
        some = np.setdiff1d(some, outliers)
        keep = some if len(outliers) else None
    mean, std = moments.mean[some], stats.std[some]
    scale = matrix = None
    is_constant = std <= _CONSTANT * np.abs(mean)
    if "standardise" in steps:
        scale = np.where(is_constant, 0.0, 1.0 / np.where(is_constant, 1.0, std))
    if "whiten" in steps:
        assert moments.covariance is not None, "read because of this step"
        matrix = _whitening(moments.covariance[np.ix_(some, some)], scale)
    if not len(some) or ((scale is not None or matrix is not None) and is_constant.all()):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"transform={list(steps)} of {what} leaves nothing to compare: no dimension that it keeps varies between the "
            f"{stats.n_finite_rows} rows; ask without it",
        )
    return Transform(
        tuple(steps), d_in, keep, None if tuple(steps) == ("drop_outliers",) else mean, scale, matrix
    )


def _whitening(covariance: Float64s, scale: Float64s | None) -> Float64s:
    """Return the symmetric root of the inverse of the covariance of scaled rows; 0 for directions that do not vary."""
    if scale is not None:
        covariance = covariance * scale * scale[:, None]
    values, vectors = np.linalg.eigh(covariance)
    # What the eigenvalues of a matrix of lower rank come to by rounding: numpy.linalg.matrix_rank's tolerance.
    varies = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    eps = WHITEN_EPS * float(np.maximum(values, 0.0).mean())
    roots = np.where(varies, 1.0 / np.sqrt(np.where(varies, values + eps, 1.0)), 0.0)
    matrix = (vectors * roots) @ vectors.T
    return np.ascontiguousarray((matrix + matrix.T) / 2)


def _sources(run: "Run") -> str:
    """Return a text that is the same for the same stored units of the same run."""
    units = run.collection.units
    attempts = hashlib.sha256("".join(f"{u}{units[u].attempt}" for u in sorted(units)).encode()).hexdigest()
    return f"{run.id}:{run.collection.fingerprint}:{attempts}"
