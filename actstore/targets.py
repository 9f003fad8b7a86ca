"""What can fire? The things whose activation on a token is one number: a neuron, a direction, a latent."""

import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.checks import check_whole
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.hook_points import canonical_hook_point
from actstore.names import check_name

if TYPE_CHECKING:
    from actstore.patterns import Fires, Pattern

MAX_WIDTH = 1 << 20
"""Longest vector accepted; the widest hook points known are below 2^18."""

MAX_VALUE = 1e200
"""Largest component of a direction: its product with any stored row is a number."""

MAX_VALUES = 1 << 27
"""Most numbers in one array of vectors: 1 GiB as float64."""


@dataclass(frozen=True, slots=True)
class Neuron:
    """One dimension of a hook point; its activation is the stored value itself."""

    hook_point: str
    index: int

    @property
    def label(self) -> str:
        """The target as the command line writes it."""
        return f"neuron:{self.hook_point}:{self.index}"


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """A vector at a hook point; its activation is the inner product with the stored row."""

    hook_point: str
    vector: npt.NDArray[np.float64]
    """Shape (d_model,), read-only, finite, not all zeros. Not normalised: its length scales the activations."""

    name: str
    """What answers call it."""

    @property
    def label(self) -> str:
        """The target as answers name it."""
        return f"direction:{self.hook_point}:{self.name}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Direction):
            return NotImplemented
        return (self.hook_point, self.name) == (other.hook_point, other.name) and np.array_equal(
            self.vector, other.vector
        )

    def __hash__(self) -> int:
        return hash((self.hook_point, self.name, self.vector.tobytes()))


@dataclass(frozen=True, slots=True)
class Latent:
    """One latent of a dictionary (a sparse autoencoder or transcoder)."""

    dictionary: str
    index: int

    @property
    def label(self) -> str:
        """The target as the command line writes it."""
        return f"latent:{self.dictionary}:{self.index}"

    def __and__(self, other: "Pattern | Latent") -> "Pattern":
        """Return the pattern that both fire near each other; see `actstore.patterns`."""
        return self._fires() & other

    def __or__(self, other: "Pattern | Latent") -> "Pattern":
        """Return the pattern that one of the two fires."""
        return self._fires() | other

    def __invert__(self) -> "Pattern":
        """Return the pattern that it does not fire."""
        return ~self._fires()

    def __gt__(self, bound: float) -> "Fires":
        """Return the pattern that it fires above `bound`."""
        return self._fires() > bound

    def __lt__(self, bound: float) -> "Fires":
        """Return the pattern that it fires below `bound`."""
        return self._fires() < bound

    def __bool__(self) -> NoReturn:
        # `a and b` would be b alone.
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            "a latent is neither true nor false: join latents with & | ~ instead of and, or, not",
        )

    def _fires(self) -> "Fires":
        from actstore.patterns import Fires

        return Fires(self)


Target: TypeAlias = Neuron | Direction | Latent


def neuron(hook_point: str, index: int) -> Neuron:
    """Return the target that is dimension `index` of a hook point.

    Args:
        hook_point: Its name, or an alias as `actstore.hook_points` accepts it.
        index: Zero-based; negative numbers do not wrap.

    Raises:
        InvalidInputError: not a hook point's name, or an index that no hook point can have.

    >>> neuron("layers.3.mlp_act", 7).label
    'neuron:layers.3.mlp_act:7'
    """
    return Neuron(canonical_hook_point(hook_point), _check_index(index, what="neuron"))


def direction(hook_point: str, vector: npt.ArrayLike, name: str | None = None) -> Direction:
    """Return the target that is a vector at a hook point.

    Args:
        hook_point: Its name or an alias.
        vector: Shape (d_model,), finite, not all zeros; kept as float64 and not normalised.
        name: What answers call it; default: "vector".

    Raises:
        InvalidInputError: not a vector of finite numbers, all zeros, or beyond what can be computed with.

    >>> direction("layers.3.resid_post", [0.0, 1.0]).label
    'direction:layers.3.resid_post:vector'
    """
    values = check_vectors(vector, what="direction")
    if values.ndim != 1:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"a direction is one vector, got an array of shape {values.shape}: pass one target per row",
        )
    if not values.any():
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"direction of {values.size} zeros: every row projects to 0 on it; give a vector that points somewhere",
        )
    if np.abs(values).max() > MAX_VALUE:
        raise InvalidInputError(
            ErrorKind.OVERFLOW,
            f"direction has values beyond {MAX_VALUE:g}, onto which rows cannot be projected: scale it down",
        )
    values.setflags(write=False)
    return Direction(canonical_hook_point(hook_point), values, "vector" if name is None else str(name))


def latent(dictionary: str, index: int) -> Latent:
    """Return the target that is latent `index` of a dictionary.

    Raises:
        InvalidInputError: not a dictionary's name, or a negative index.

    >>> latent("sae", 12).label
    'latent:sae:12'
    """
    return Latent(check_name(dictionary, what="dictionary name"), _check_index(index, what="latent"))


@dataclass(frozen=True, slots=True)
class Document:
    """A document of the run's corpus, as the subject of a question."""

    doc_id: int


def document(doc_id: int) -> Document:
    """Return the subject that is a whole document: of `run.active(..., "sae")`, or the query of `run.nearest(hook_point, ...)`.

    Raises:
        InvalidInputError: not a whole number of 0 or more.

    >>> document(7)
    Document(doc_id=7)
    """
    return Document(check_whole(doc_id, what="document number", least=0))


def parse_target(text: str) -> Target:
    """Return the target that a command line names.

    Args:
        text: `neuron:HOOK_POINT:INDEX`, `direction:HOOK_POINT:FILE.npy` (with one vector) or `latent:DICTIONARY:INDEX`.

    Raises:
        InvalidInputError: none of the three forms.
        NotFoundError: the file of a direction does not exist.

    >>> parse_target("neuron:module:model.layers.0.mlp:output:7")
    Neuron(hook_point='module:model.layers.0.mlp:output', index=7)
    """
    if not isinstance(text, str):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"a target's text is like 'neuron:layers.3.mlp_act:7', got {text!r:.80}"
        )
    kind, _, rest = text.partition(":")
    # A hook point may hold colons (`module:<path>:output`), an index or file name may not.
    where, _, what = rest.rpartition(":")
    if where and what and kind == "neuron":
        return neuron(where, _parse_index(what, text))
    if where and what and kind == "direction":
        return direction(where, load_vectors(what), name=Path(what).stem)
    if where and what and kind == "latent":
        return latent(where, _parse_index(what, text))
    raise InvalidInputError(
        ErrorKind.BAD_ARGUMENT,
        f"target {text!r} is none of neuron:HOOK_POINT:INDEX, direction:HOOK_POINT:FILE.npy, latent:DICTIONARY:INDEX",
    )


def load_vectors(path: str | os.PathLike[str]) -> npt.NDArray[np.float64]:
    """Return the finite vector or vectors of a .npy file, shape (d,) or (q, d); never unpickles.

    Raises:
        NotFoundError: there is no such file.
        InvalidInputError: not a .npy file of numbers.
    """
    try:
        values = np.load(path, allow_pickle=False, mmap_mode="r")
    except FileNotFoundError as error:
        raise NotFoundError(
            ErrorKind.SOURCE_NOT_FOUND, f"vector file {os.fspath(path)!r} does not exist"
        ) from error
    except (OSError, ValueError, EOFError) as error:
        # What numpy cannot read it takes for a pickle, and says how to load one: advice for nobody.
        why = f" ({error})" if "pickle" not in str(error) else ""
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{os.fspath(path)!r} is no .npy file of numbers{why}: write it with numpy.save(path, vector)",
        ) from error
    if not isinstance(values, np.ndarray):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{os.fspath(path)!r} holds several arrays: write one with numpy.save(path, vector)",
        )
    return check_vectors(values, what=f"vector file {os.fspath(path)!r}")


def check_vectors(values: npt.ArrayLike, *, what: str) -> npt.NDArray[np.float64]:
    """Return a float64 copy of one vector (d,) or several (q, d), all finite.

    Raises:
        InvalidInputError: not numbers, of another shape, empty, too wide, or not finite.
    """
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"{what} is not an array of numbers: {error}"
        ) from error
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or not array.size:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{what} must be numbers of shape (d_model,) or (n, d_model), got {array.dtype} of shape {array.shape}",
        )
    if array.shape[-1] > MAX_WIDTH or array.size > MAX_VALUES:
        raise InvalidInputError(
            ErrorKind.TOO_LARGE,
            f"{what} of shape {array.shape} is too large: at most {MAX_WIDTH} dimensions and {MAX_VALUES} numbers",
        )
    copy = np.array(array, dtype=np.float64, order="C")
    bad = int(copy.size - np.isfinite(copy).sum())
    if bad:
        raise InvalidInputError(
            ErrorKind.NON_FINITE, f"{what} has {bad} NaN or infinite values of {copy.size}: remove them first"
        )
    return copy


def _check_index(index: int, *, what: str) -> int:
    try:
        value = -1 if isinstance(index, (bool, np.bool_)) else operator.index(index)
    except TypeError:
        value = -1
    if not 0 <= value < 1 << 31:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"{what} index must be a whole number of 0 or more, got {index!r}"
        )
    return value


def _parse_index(text: str, whole: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"target {whole!r}: {text!r} is not an index (0, 1, 2, ...)"
        )
    return int(text)
