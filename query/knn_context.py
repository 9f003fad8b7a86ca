"""What is the context whose next token is asked for? A stored row, or a text that the run's model has gone through now."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.activations import Activations
from actstore.checks import is_whole
from actstore.errors import ErrorKind, InvalidInputError
from actstore.run import Run
from actstore.targets import check_vectors

from .eligible import goes_on
from .unit_tables import read_unit

Float64s = npt.NDArray[np.float64]

VERBATIM_TOKENS = 16
"""Last tokens of a text by which the documents it was cut from are known; fewer stand in many documents by chance."""


@dataclass(frozen=True, slots=True)
class Context:
    """A context, what the model makes of it, and what is known of where it came from."""

    vector: Float64s
    """Its last token's activation, shape (d_model,)."""

    token_ids: npt.NDArray[np.int32]
    """The model's input up to that token, from the start of its window."""

    echo: dict[str, Any]
    """The query as it is reported."""

    row: int | None = None
    doc_id: int | None = None
    next_token: int | None = None
    """The token that follows a stored row in its window."""

    tail: str | None = None
    """The end of a text, which the documents it may have been cut from hold; None where it is too short to tell."""


def read_context(run: Run, acts: Activations, query: Any, token: int | None) -> Context:
    """Return the context that a row number or a text is.

    Raises:
        NotFoundError: no such row, or a sampled run did not keep it.
        InvalidInputError: neither a row number nor a text, a text without tokens or longer than the window, or numbers that are
            not finite.
    """
    if isinstance(query, str):
        return _read_text(run, acts, query, token)
    if token is not None:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, "token= says which token of a text is meant: give a text"
        )
    if not is_whole(query):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"knn_lm() is asked about a text or a row number, got {type(query).__name__} {query!r:.80}",
        )
    return _read_row(run, acts, int(query))


def _read_row(run: Run, acts: Activations, row: int) -> Context:
    vector = check_vectors(acts.read([row])[0], what=f"stored row {row}")
    unit, offset = divmod(row, run.tokenization.rows_per_unit)
    tokens = read_unit(run.tokenization, unit)
    first = offset - int(tokens.window_position[offset])
    pair = slice(offset, offset + 2)
    follows = bool(goes_on(tokens.doc_id[pair], tokens.window_position[pair])[0])
    return Context(
        vector=vector,
        token_ids=tokens.token_id[first : offset + 1],
        echo={"query": "row", "row": row},
        row=row,
        doc_id=int(tokens.doc_id[offset]),
        next_token=int(tokens.token_id[offset + 1]) if follows else None,
    )


def _read_text(run: Run, acts: Activations, text: str, token: int | None) -> Context:
    [encoded] = run.encode_text([text], acts.hook_point)
    index = _pick_token(text, encoded.is_special, token)
    body = np.flatnonzero(~encoded.is_special[: index + 1])
    tail = None
    if len(body) >= VERBATIM_TOKENS:
        # A token may stand for a part of a character, or for none.
        tail = text[int(encoded.offsets[body[-VERBATIM_TOKENS], 0]) : int(encoded.offsets[body[-1], 1])]
    return Context(
        vector=check_vectors(encoded.activations[index], what="the text's activation"),
        token_ids=encoded.token_ids[: index + 1],
        echo={"query": "text", "text": text, "token": index},
        tail=tail or None,
    )


def _pick_token(text: str, is_special: npt.NDArray[np.bool_], token: int | None) -> int:
    """Return the index of the token asked about: of those that are not special the last one, unless one is named."""
    n = len(is_special)
    if token is None:
        body = np.flatnonzero(~is_special)
        if not body.size:
            raise InvalidInputError(ErrorKind.BAD_ARGUMENT, f"text {text!r} has no token that is not special")
        return int(body[-1])
    if not is_whole(token) or not -n <= token < n:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"token={token!r} was asked for, the text has {n} tokens, special ones included",
        )
    return int(token) % n
