"""How is a FAISS index file opened without trusting it, and without reading it whole?

The file's hash has been checked before it comes here: FAISS reads a damaged file as plausible numbers, or ends the process. What
is compared then is whether the file is the index that the manifest speaks of: its type, width, number of vectors and ids.
Files are mapped where FAISS can, so an index may be larger than memory; opened ones are kept for the next question.
"""

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore._lazy import missing
from actstore.codec.cache import BytesCache
from actstore.errors import ErrorKind, FormatError, InvalidInputError, MissingDependencyError

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

_OPEN_BYTES: Final = 4 << 30
"""Of opened indexes: what is not mapped counts whole, what is mapped a hundredth, as the system may drop its pages."""

_OPENED: BytesCache[Any] = BytesCache(_OPEN_BYTES)

_MAPPED: Final = frozenset({"flat", "ivf_sq8", "scan_sq8"})
"""Kinds whose vectors FAISS maps; FastScan's are laid out anew when they are read."""


def load_faiss() -> ModuleType:
    """Return the module `faiss`, imported now.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise missing("faiss", needed_for="an index", extra="cpu") from error
    module: ModuleType = faiss
    return module


def has_faiss() -> bool:
    """Return whether the module `faiss` is installed."""
    try:
        load_faiss()
    except MissingDependencyError:
        return False
    return True


@contextlib.contextmanager
def faiss_threads(n: int) -> Iterator[None]:
    """Have FAISS use `n` threads for what this thread asks of it; other threads keep their number.

    With one each, several searches run side by side; an OpenMP team that waits for a busy processor is 50 times slower.
    """
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(n)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def open_faiss(path: str, *, kind: str, d: int, n: int, n_indexed: int | None = None) -> Any:
    """Return the FAISS index in a file, mapped where that is possible; safe to search from many threads, not to change.

    Opened indexes are kept in the process, up to 4 GiB of what is not mapped.

    Args:
        path: A local file whose hash was checked.
        kind: One of `flat`, `ivf_sq8`, `ivf_rabitq`, `scan_sq8`.
        d: Width of its vectors.
        n: Every id is from 0 on and below this.
        n_indexed: Number of its vectors; any up to `n` if None.

    Raises:
        FormatError: FAISS cannot read the file, or it holds something else.
        MissingDependencyError: FAISS is not installed.
    """
    faiss = load_faiss()
    stat = os.stat(path)
    key = f"{path}\n{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n{kind} {d} {n} {n_indexed}"

    def load() -> tuple[Any, int]:
        flags = faiss.IO_FLAG_MMAP_IFC if kind in _MAPPED else 0
        try:
            index = faiss.read_index(path, flags)
        except (RuntimeError, MemoryError) as error:
            raise FormatError(
                ErrorKind.OBJECT_DAMAGED,
                f"{path!r} is no index that this FAISS reads ({str(error)[:200]}): its bytes are those that were stored, so it "
                "was written by a faulty program or another version of FAISS; build the index again",
            ) from error
        _check(faiss, index, path, kind=kind, d=d, n=n, n_indexed=n_indexed)
        return index, stat.st_size // (100 if kind in _MAPPED else 1) + 1

    return _OPENED.get(key, load)


def parameters(index: Any, *, effort: int, selector: Any = None) -> Any:
    """Return FAISS's search parameters for an index.

    Args:
        index: What `open_faiss` gave.
        effort: Lists to probe, of an index that has lists.
        selector: A FAISS `IDSelector`, or None for all.
    """
    faiss = load_faiss()
    if isinstance(index, faiss.IndexPreTransform):
        inner = parameters(faiss.downcast_index(index.index), effort=effort, selector=selector)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        # FastScan ends the process if it is asked for more lists than there are.
        return faiss.SearchParametersIVF(nprobe=max(1, min(effort, index.nlist)), sel=selector)
    return faiss.SearchParameters(sel=selector)


def check_vectors(vectors_qd: Any, d: int) -> Float32s:
    """Return query vectors as FAISS takes them: float32, C order, all finite.

    Raises:
        InvalidInputError: another shape, or a number that is NaN or infinite.
    """
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(vectors_qd, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != d:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"an index of vectors of {d} numbers was asked with an array of shape {vectors.shape}: give (queries, {d})",
        )
    if not np.isfinite(vectors).all():
        raise InvalidInputError(
            ErrorKind.NON_FINITE, "a query vector holds NaN or infinity: an index cannot be asked for it"
        )
    return vectors


def _check(
    faiss: ModuleType, index: Any, path: str, *, kind: str, d: int, n: int, n_indexed: int | None
) -> None:
    """Compare an opened index with what its collection says."""
    problem = _wrong_type(faiss, index, kind)
    if problem is None and index.d != d:
        problem = f"vectors of {index.d} numbers instead of {d}"
    if problem is None and n_indexed is not None and index.ntotal != n_indexed:
        problem = f"{index.ntotal} vectors instead of {n_indexed}"
    if problem is None and not index.is_trained:
        problem = "an index that was not trained"
    if problem is None:
        ids = _ids(faiss, index)
        if len(ids) != index.ntotal or (len(ids) and not 0 <= ids.min() <= ids.max() < n):
            problem = f"{len(ids)} ids that are not all in [0, {n}), of {index.ntotal} vectors"
    if problem is not None:
        raise FormatError(
            ErrorKind.INVARIANT_BROKEN,
            f"{path!r} holds {problem}: it was written by a faulty program; build the index again, and run fsck",
        )


def _wrong_type(faiss: ModuleType, index: Any, kind: str) -> str | None:
    """Return what an index is, if it is not of the kind."""
    is_right = False
    if kind == "flat":
        is_right = isinstance(index, faiss.IndexIDMap) and isinstance(
            faiss.downcast_index(index.index), faiss.IndexFlat
        )
    elif kind == "ivf_sq8":
        is_right = isinstance(index, faiss.IndexIVFScalarQuantizer) and _is_8bit(faiss, index)
    elif kind == "ivf_rabitq":
        is_right = isinstance(index, faiss.IndexPreTransform) and isinstance(
            faiss.downcast_index(index.index), faiss.IndexIVFRaBitQFastScan
        )
    elif kind == "scan_sq8":
        turned = isinstance(index, faiss.IndexPreTransform)
        inner = faiss.downcast_index(index.index) if turned else index
        is_right = isinstance(inner, faiss.IndexScalarQuantizer) and _is_8bit(faiss, inner)
        is_right = is_right and (not turned or _is_one_turn(faiss, index))
    else:
        return f"an index for a kind that this version does not know, {kind!r}"
    return None if is_right else f"a FAISS index of type {type(index).__name__}, which is not of kind {kind}"


def _is_one_turn(faiss: ModuleType, index: Any) -> bool:
    """Return whether the vectors of an index are multiplied with one square matrix first."""
    turn = faiss.downcast_VectorTransform(index.chain.at(0)) if index.chain.size() == 1 else None
    return isinstance(turn, faiss.LinearTransform) and turn.d_in == turn.d_out and not turn.have_bias


def _is_8bit(faiss: ModuleType, index: Any) -> bool:
    return bool(index.sq.qtype == faiss.ScalarQuantizer.QT_8bit)


def _ids(faiss: ModuleType, index: Any) -> Int64s:
    """Return the ids of all vectors of an index, in its own order."""
    if isinstance(index, faiss.IndexIDMap):
        found: Int64s = faiss.vector_to_array(index.id_map)
        return found
    if isinstance(index, faiss.IndexPreTransform):
        return _ids(faiss, faiss.downcast_index(index.index))
    if isinstance(index, faiss.IndexIVF):
        lists = index.invlists
        parts = [np.empty(0, np.int64)]
        for number in range(lists.nlist):
            size = lists.list_size(number)
            if size:
                parts.append(faiss.rev_swig_ptr(lists.get_ids(number), size).copy())
        return np.concatenate(parts)
    return np.arange(index.ntotal, dtype=np.int64)
