"""How is each kind of index trained and filled? FAISS indexes as bytes and files; nothing of a store here.

    flat        the vectors themselves, all compared: exact but for float32
    ivf_sq8     inverted lists of vectors of 8 bits a number; mapped from disk
    ivf_rabitq  inverted lists of vectors of 1 bit a number, randomly turned, compared by FastScan; held in memory
    scan_sq8    8 bits a number, all compared, with a bound on the error: `actstore.ingest.indexing.scan_sq8`

Inverted lists hold differences from their list's centroid, so vectors are centred where that matters.

Source: Jegou, Douze, Schmid (2011), "Product Quantization for Nearest Neighbor Search", IEEE TPAMI 33(1), section IV (inverted
lists of residuals); Gao, Long (2024), "RaBitQ", arXiv:2405.12497, section 3 (one bit a dimension of a randomly turned residual);
Douze et al. (2024), "The Faiss library", arXiv:2401.08281.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError, StorageError
from actstore.faiss_file import load_faiss

from .gpu import build_on_gpu, cluster_on_gpus

Float32s: TypeAlias = npt.NDArray[np.float32]
Int64s: TypeAlias = npt.NDArray[np.int64]
Blocks: TypeAlias = Iterator[tuple[Int64s, Float32s]]
Part: TypeAlias = bytes | bytearray | memoryview | Path
"""What becomes one object: its bytes, or a temporary file that the caller deletes."""

CLUSTERING_ROUNDS: Final = 10
"""Of k-means; recall at a given number of lists does not gain by more."""

RABITQ_BATCH: Final = 32
"""Vectors that FastScan compares at once: its default."""

_ROTATION_SEED: Final = 7
_HADAMARD_FROM: Final = 1025
"""From this width on vectors are turned by a Hadamard transform, n log n, unless its power of two is a quarter longer."""


class IndexKind(Protocol):
    """Trains and fills the FAISS indexes of one kind."""

    name: str
    """As collections name it."""

    takes_all: bool
    """Whether it is given rows too that are not finite, or zeros with the metric cosine; others are left out for it."""

    def train(
        self, sample_nd: Float32s, *, n_rows: int, metric: str, seed: int, params: Mapping[str, Any]
    ) -> bytes:
        """Return a trained FAISS index without vectors, serialised.

        Args:
            sample_nd: Prepared vectors, finite; may be none.
            n_rows: How many the index is for.
            metric: `cosine` (the vectors have length 1), `ip` or `l2`.
            seed: Of everything random.
            params: What the collection's configuration says of the kind.
        """

    def build_shard(self, trained: bytes, blocks: Blocks, n: int) -> dict[str, Part]:
        """Return the objects of a shard by name: `faiss`, and for some kinds `exceptions`.

        Args:
            trained: What `train` gave.
            blocks: Ordinals, ascending from block to block, and their vectors, (t,) and (t, d).
            n: Ordinals are below this.
        """


def index_kind(name: str, *, device: str = "cpu") -> IndexKind:
    """Return the kind of a name.

    Args:
        name: `flat`, `ivf_sq8`, `ivf_rabitq` or `scan_sq8`.
        device: `cpu`, or `cuda`: clustering, and lists of 8 bits, on this machine's GPUs.

    Raises:
        InvalidInputError: there is no such kind.
    """
    if name == "scan_sq8":
        from .scan_sq8 import ScanSq8

        return ScanSq8()
    kinds: dict[str, Callable[[], IndexKind]] = {
        "flat": Flat,
        "ivf_sq8": lambda: IvfSq8(device),
        "ivf_rabitq": lambda: IvfRabitq(device),
    }
    if name not in kinds:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"kind {name!r} is no kind of index: use auto, flat, ivf_sq8, ivf_rabitq or scan_sq8",
        )
    return kinds[name]()


class Flat:
    """All vectors as they are."""

    name = "flat"
    takes_all = False

    def train(
        self, sample_nd: Float32s, *, n_rows: int, metric: str, seed: int, params: Mapping[str, Any]
    ) -> bytes:
        """Return an empty index; nothing is learned."""
        del n_rows, seed, params
        faiss = load_faiss()
        return serialise(faiss.IndexIDMap(faiss.IndexFlat(sample_nd.shape[1], faiss_metric(metric))))

    def build_shard(self, trained: bytes, blocks: Blocks, n: int) -> dict[str, Part]:
        """Return the filled index; in memory once, and in a temporary file."""
        del n
        return {"faiss": to_file(fill(deserialise(trained), blocks))}


class IvfSq8:
    """Inverted lists of residuals of 8 bits a number."""

    name = "ivf_sq8"
    takes_all = False

    def __init__(self, device: str) -> None:
        self._device = device

    def train(
        self, sample_nd: Float32s, *, n_rows: int, metric: str, seed: int, params: Mapping[str, Any]
    ) -> bytes:
        """Return an index with `params["n_lists"]` centroids, fewer of a smaller sample, and the range of each dimension."""
        del n_rows
        faiss = load_faiss()
        sample = _at_least_one(sample_nd)
        d, n_lists, kind = sample.shape[1], min(int(params["n_lists"]), len(sample)), faiss_metric(metric)
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlat(d, kind), d, n_lists, faiss.ScalarQuantizer.QT_8bit, kind, True
        )
        _cluster(index, sample, seed=seed, device=self._device)
        return serialise(index)

    def build_shard(self, trained: bytes, blocks: Blocks, n: int) -> dict[str, Part]:
        """Return the filled index: `d` bytes a row in memory, twice that at times, and in a temporary file."""
        del n
        index = deserialise(trained)
        if self._device != "cpu":
            return {"faiss": to_file(build_on_gpu(index, lambda on_gpu: fill(on_gpu, blocks)))}
        return {"faiss": to_file(fill(index, blocks))}


class IvfRabitq:
    """Inverted lists of residuals of one bit a number (or `params["bits"]`); FAISS has no GPU form of them."""

    name = "ivf_rabitq"
    takes_all = False

    def __init__(self, device: str) -> None:
        self._device = device

    def train(
        self, sample_nd: Float32s, *, n_rows: int, metric: str, seed: int, params: Mapping[str, Any]
    ) -> bytes:
        """Return an index with a random turn and `params["n_lists"]` centroids, fewer of a smaller sample."""
        del n_rows
        faiss = load_faiss()
        sample = _at_least_one(sample_nd)
        turn = _turn(sample.shape[1])
        turned = np.ascontiguousarray(turn.apply(sample))
        d, n_lists, kind = turned.shape[1], min(int(params["n_lists"]), len(sample)), faiss_metric(metric)
        lists = faiss.IndexIVFRaBitQFastScan(
            faiss.IndexFlat(d, kind), d, n_lists, kind, RABITQ_BATCH, True, int(params["bits"])
        )
        _cluster(lists, turned, seed=seed, device=self._device)
        index = faiss.IndexPreTransform(turn, lists)
        index.is_trained = True
        return serialise(index)

    def build_shard(self, trained: bytes, blocks: Blocks, n: int) -> dict[str, Part]:
        """Return the filled index: `d * bits / 8` bytes and a few more a row, in memory and in a temporary file."""
        del n
        return {"faiss": to_file(fill(deserialise(trained), blocks))}


def turned_width(d: int) -> int:
    """Return how wide vectors are once `IvfRabitq` has turned them.

    >>> turned_width(768), turned_width(4096), turned_width(4000), turned_width(5120)
    (768, 4096, 4096, 5120)
    """
    power = 1 << (d - 1).bit_length()
    return power if d >= _HADAMARD_FROM and power <= 1.25 * d else d


def faiss_metric(metric: str) -> Any:
    """Return FAISS's number of a metric; the cosine is the inner product of vectors of length 1."""
    faiss = load_faiss()
    return faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT


def fill(index: Any, blocks: Blocks) -> Any:
    """Return the index with all vectors added under their ordinals."""
    for ordinals, vectors in blocks:
        if len(ordinals):
            index.add_with_ids(np.ascontiguousarray(vectors), np.ascontiguousarray(ordinals))
    return index


def to_file(index: Any) -> Path:
    """Return a new temporary file that holds the index; nothing is left of it where that fails.

    Raises:
        StorageError: the folder for temporary files is full, or fails.
    """
    handle, path = tempfile.mkstemp(prefix="actstore-index-", suffix=".faiss")
    os.close(handle)
    try:
        load_faiss().write_index(index, path)
    except BaseException as error:
        Path(path).unlink(missing_ok=True)
        if not isinstance(error, RuntimeError):
            raise
        raise scratch_failed(error) from error
    return Path(path)


def scratch_failed(error: Exception) -> StorageError:
    """Return the error of a temporary file that cannot be written."""
    return StorageError(
        ErrorKind.STORAGE_FULL,
        f"a shard's temporary file in {tempfile.gettempdir()} cannot be written ({str(error)[-200:]}): a worker needs twice a "
        "shard's bytes there; free some, name a larger folder with TMPDIR, or build with fewer shard_rows",
    )


def serialise(index: Any) -> bytes:
    """Return an index as bytes."""
    data: bytes = load_faiss().serialize_index(index).tobytes()
    return data


def deserialise(data: bytes) -> Any:
    """Return the index of `serialise`."""
    return load_faiss().deserialize_index(np.frombuffer(data, np.uint8))


def _cluster(index: Any, sample_nd: Float32s, *, seed: int, device: str) -> None:
    """Train an index with lists."""
    index.cp.seed = seed % (1 << 31)
    index.cp.niter = CLUSTERING_ROUNDS
    # The sample has the size that it should have: neither a warning nor a second sample.
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = 1 << 30
    # FAISS does not own what it clusters with: it is held here until it is not needed any more.
    on_gpus = None if device == "cpu" else cluster_on_gpus(index)
    index.train(np.ascontiguousarray(sample_nd))
    index.clustering_index = None
    del on_gpus


def _turn(d: int) -> Any:
    """Return a random turn of vectors of `d` numbers: full, or a Hadamard transform where that is cheaper."""
    faiss = load_faiss()
    if turned_width(d) >= _HADAMARD_FROM and turned_width(d).bit_count() == 1:
        return faiss.HadamardRotation(d, _ROTATION_SEED)
    turn = faiss.RandomRotationMatrix(d, d)
    turn.init(_ROTATION_SEED)
    return turn


def _at_least_one(sample_nd: Float32s) -> Float32s:
    """Return the sample, or a vector of zeros where there is none: an index of no vectors has a list too."""
    return sample_nd if len(sample_nd) else np.zeros((1, sample_nd.shape[1]), np.float32)
