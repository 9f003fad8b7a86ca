"""What does a place with activations that somebody else harvested hand over, whatever its format?

A source is an ordered list of documents (contexts, requests), each a sequence of token ids with one activation per token
at every hook point. Readers of the formats implement `ActivationSource`; nothing else knows how files look.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from actstore.dtypes import stored_dtype
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.hook_points import canonical_hook_point, layer_order, parse_hook_point

Array = npt.NDArray[Any]

MAX_TOKEN_ID = (1 << 31) - 1
"""FORMAT.md, section 7.2: a token id is an int32."""

HookPointNames = Mapping[str | int, str] | Sequence[str] | str | None
"""What a user says of names: by the source's own name or index, one for each in order, the only one, or nothing."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The tokens of consecutive documents, one document after the other; no document is empty."""

    first_doc: int
    keys: list[str]
    """What the source calls each document."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each document, shape (n_documents,)."""
    ids: npt.NDArray[np.int32]
    """Shape (n_tokens,)."""
    positions: npt.NDArray[np.int32] | None = None
    """Index of each token in its whole document, ascending; None for 0, 1, 2, ..."""
    words: list[str] | None = None
    """Text of each token, where the source knows it."""
    spans: npt.NDArray[np.int32] | None = None
    """First character and end of each token in the document's text, shape (n_tokens, 2), where the source knows them."""

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each document begins, and the number of tokens: shape (n_documents + 1,)."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])


@dataclass(frozen=True, slots=True)
class SourceHookPoint:
    """One hook point of a source."""

    source: str
    """What the source calls it."""
    name: str
    """Canonical name."""
    d_model: int
    dtype: str
    """As found: `float64`, or one of those that a store can hold."""


class ActivationSource(Protocol):
    """Activations to import. Reading is repeatable: the same calls give the same values."""

    @property
    def format(self) -> str:
        """`saelens`, `vllm` or `arrays`."""

    @property
    def description(self) -> str:
        """Where it is, for messages and for the run's record of where it came from."""

    @property
    def hook_points(self) -> tuple[SourceHookPoint, ...]:
        """What is imported, in layer order."""

    @property
    def has_words(self) -> bool:
        """Whether batches have `words`."""

    @property
    def has_spans(self) -> bool:
        """Whether batches have `spans`; then the keys are numbers of documents of an existing corpus."""

    def fingerprint(self, *, full: bool) -> str:
        """Return the hash of everything that is read, 64 hex digits; see `actstore.ingest.foreign.content`."""

    def check_unchanged(self) -> None:
        """Check that no file has changed since `fingerprint`.

        Raises:
            ConflictError: one has.
        """

    def tokens(self, first_doc: int = 0) -> Iterator[TokenBatch]:
        """Yield the tokens of all documents from one on, a few megabytes at a time.

        Raises:
            InvalidInputError: tokens or activations that are damaged, or whose numbers do not agree.
        """

    def read(
        self,
        first_doc: int,
        first_row: int,
        token_ids: Array,
        starts: Array,
        out: Mapping[str, Array],
        dtype: str,
    ) -> None:
        """Fill `out` with the activations of consecutive whole documents.

        Args:
            first_doc: The first of them.
            first_row: Tokens of all documents before it.
            token_ids: What its tokens, and those after, should be, shape (n,).
            starts: Where each document begins in `token_ids`, and n: shape (n_documents + 1,).
            out: By canonical name, shape (n, d_model) of the stored form of `dtype`.
            dtype: Name of the stored dtype.

        Raises:
            InvalidInputError: the source is damaged, or has other tokens.
        """


def refuse(problem: str, advice: str) -> NoReturn:
    """Raise the error for a source that is damaged, or not what it should be."""
    raise InvalidInputError(ErrorKind.BAD_ACTIVATIONS, f"{problem}: {advice}")


def resolve_names(found: Sequence[str], asked: HookPointNames, *, where: str) -> dict[int, str]:
    """Return the canonical name of each array that is to be imported, by its index in `found`.

    Args:
        found: What the source calls its arrays, in its order.
        asked: A mapping from those names (or indexes) selects and names; a list names all in order; nothing means that the
            source's own names are hook points.
        where: The source, for messages.

    Raises:
        InvalidInputError: names that do not fit the source, or that name one place twice.
        NotFoundError: a name of no hook point.

    >>> resolve_names(["blocks.3.hook_resid_post"], None, where="x")
    {0: 'layers.3.resid_post'}
    >>> resolve_names(["a", "b"], {"b": "layers.1.mlp_out"}, where="x")
    {1: 'layers.1.mlp_out'}
    """
    asked = [asked] if isinstance(asked, str) else asked
    if isinstance(asked, Mapping):
        chosen = {_index_of(key, found, where): name for key, name in asked.items()}
    elif asked is not None:
        if len(asked) != len(found):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{len(asked)} hook points were named, {where} has {len(found)} arrays ({', '.join(found)}): name each, or "
                "choose some by 'array=hook point'",
            )
        chosen = dict(enumerate(asked))
    else:
        chosen = {i: _own_name(name, where) for i, name in enumerate(found)}
    names = {i: parse_hook_point(name).name for i, name in chosen.items()}
    for name in names.values():
        if list(names.values()).count(name) > 1:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"hook point {name!r} was named for two arrays of {where}: name different ones",
            )
    if not names:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"no array of {where} was chosen: name at least one hook point"
        )
    return dict(sorted(names.items(), key=lambda item: layer_order(item[1])))


def _index_of(key: str | int, found: Sequence[str], where: str) -> int:
    if key in found:
        return found.index(str(key))
    if (isinstance(key, int) or key.isdecimal()) and 0 <= int(key) < len(found):
        return int(key)
    raise InvalidInputError(
        ErrorKind.BAD_ARGUMENT, f"array {key!r} was asked for, {where} has: {', '.join(found)}"
    )


def _own_name(name: str, where: str) -> str:
    try:
        return parse_hook_point(canonical_hook_point(name)).name
    except (NotFoundError, InvalidInputError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"array {name!r} of {where} is named like no hook point: say which place of the model it is, such as "
            f"{{{name!r}: 'layers.3.resid_post'}} (--hook-point {name}=layers.3.resid_post), or 'module:<path>' for a module",
        ) from error


def check_ids(ids: Array, *, place: Callable[[int], str]) -> npt.NDArray[np.int32]:
    """Return token ids as int32.

    Args:
        ids: Integers of any width, shape (n,).
        place: Says where the i-th stands.

    Raises:
        InvalidInputError: no integers, or one that no token id can be.
    """
    if ids.dtype.kind not in "iu":
        refuse(f"{place(0)}: token ids are {ids.dtype}, not integers", "store the numbers of the tokens")
    bad = (ids < 0) | (ids > MAX_TOKEN_ID)
    if bad.any():
        i = int(bad.argmax())
        refuse(f"{place(i)}: token id {int(ids[i])} is outside [0, 2**31)", "remove padding before importing")
    return np.ascontiguousarray(ids, np.int32)


def copy_rows(values: Array, out: Array, dtype: str) -> None:
    """Copy numbers into their stored form: bit for bit, or widened or rounded to `float32`.

    Args:
        values: Shape (n, d_model); `uint16` holds the bits of bfloat16.
        out: Same shape, of dtype `stored_dtype(dtype)`.
        dtype: Name of the stored dtype.
    """
    if values.dtype.kind == "u" and dtype == "float32":
        out.view(np.uint32)[...] = values.astype(np.uint32) << 16
    elif values.dtype == np.float64:
        # What is too large for float32 becomes infinite, and is met by the policy for numbers that are not finite.
        with np.errstate(over="ignore"):
            out[...] = values
    else:
        assert dtype == "float32" or values.dtype.newbyteorder("<") == stored_dtype(dtype)
        out[...] = values


def differing_token(place: str, i: int, found: int, expected: int) -> NoReturn:
    """Raise the error for a source whose tokens are not those that the tokenization was made from."""
    refuse(
        f"{place}: token {i} has id {found}, and id {expected} when the tokens were read",
        "the source changed while it was imported; import it again under another run name",
    )


def same_tokens(place: str, found: Array, expected: Array) -> None:
    """Check that the tokens of one document are those of the tokenization.

    Raises:
        InvalidInputError: they are not.
    """
    if len(found) != len(expected):
        refuse(
            f"{place} has {len(found)} tokens, and had {len(expected)} when the tokens were read",
            "the source changed while it was imported; import it again under another run name",
        )
    wrong = np.flatnonzero(found != expected)
    if wrong.size:
        i = int(wrong[0])
        differing_token(place, i, int(found[i]), int(expected[i]))
