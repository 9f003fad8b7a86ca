"""Which tokens of a vocabulary does a pattern match? Regular expressions that cannot run away (RE2)."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.arrow_arrays import to_array
from actstore.errors import ErrorKind, InvalidInputError
from actstore.tokenization import Tokenization

from .unit_tables import read_words


def check_pattern(pattern: object, name: str = "regex") -> str:
    """Return `pattern` if it is a regular expression.

    Raises:
        InvalidInputError: it is not; the message says where it fails.

    >>> check_pattern("^ (cat|dog)$")
    '^ (cat|dog)$'
    """
    if not isinstance(pattern, str):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"{name}= is a pattern as text, such as r'^\\s*cat', got {pattern!r:.80}"
        )
    import pyarrow.compute as pc

    try:
        pc.match_substring_regex(pa.array([""]), pattern)
    except (pa.ArrowInvalid, UnicodeEncodeError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{name}={pattern!r:.120} is no regular expression of RE2: {error}; look-around and back-references do not exist",
        ) from error
    return pattern


def match_tokens(pattern: str, tokenization: Tokenization) -> npt.NDArray[np.bool_]:
    """Return which token numbers have a text with a part that the pattern matches.

    Shape (v,), for a vocabulary of v numbers; those without a text match nothing.

    Raises:
        InvalidInputError: not a regular expression.
    """
    import pyarrow.compute as pc

    texts = read_words(tokenization).texts
    found = pc.match_substring_regex(texts, check_pattern(pattern)).fill_null(False)
    matches: npt.NDArray[np.bool_] = to_array(found)
    return matches


def read_matches(
    matches: npt.NDArray[np.bool_], token_ids: npt.NDArray[np.integer[Any]]
) -> npt.NDArray[np.bool_]:
    """Return the entry of every token; one that the vocabulary lacks matches nothing."""
    known = (token_ids >= 0) & (token_ids < len(matches))
    found = np.zeros(len(token_ids), np.bool_)
    found[known] = matches[token_ids[known]]
    return found
