"""Whose message does each token of a rendered conversation belong to? (FORMAT.md, section 7.2)

A token has the role of the message that it shares most characters with, and none if it shares none: the template's markers
have none. Special tokens inside of a message are forged markers and are refused unless the corpus allows them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RoleSpans:
    """Role and characters `[start, end)` of each message of one document."""

    roles: tuple[str, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenRoles:
    """The role of each token of a batch."""

    names: tuple[str, ...]
    codes: npt.NDArray[np.int16]
    """Index into `names`, -1 for none, shape (n_tokens,)."""


def token_roles(
    texts: Sequence[str],
    spans: Sequence[RoleSpans],
    lengths: Ints,
    starts: npt.NDArray[np.int32],
    ends: npt.NDArray[np.int32],
    is_special: npt.NDArray[np.bool_],
    *,
    first_doc: int,
    allow_special: bool,
) -> TokenRoles:
    """Return the role of each token.

    Args:
        texts: The batch's documents.
        spans: Their messages, shape (n_documents,); ranges do not overlap.
        lengths: Tokens of each document.
        starts: First character of each token in its document, shape (n_tokens,).
        ends: End of each token's characters.
        is_special: Whether the token is a special one.
        first_doc: Number of the first document, for messages.
        allow_special: Whether special tokens may stand in messages.

    Raises:
        InvalidInputError: a special token in a message.
    """
    names, codes, span_starts, span_ends, bases = _flat_spans(texts, spans)
    doc = np.repeat(np.arange(len(texts)), lengths)
    a, b = bases[doc] + starts, bases[doc] + np.maximum(ends, starts + 1)
    found = _most_shared(a, b, span_starts, span_ends)
    for t in np.flatnonzero(is_special & (found >= 0)):
        # Markers may take white space around them along (rstrip, lstrip): that forges nothing and is nobody's.
        text, base, span = texts[doc[t]], bases[doc[t]], found[t]
        inside = text[max(a[t], span_starts[span]) - base : min(b[t], span_ends[span]) - base]
        if not inside.strip():
            found[t] = -1
        elif not allow_special:
            raise InvalidInputError(
                ErrorKind.BAD_DOCUMENT,
                f"document {first_doc + doc[t]}: a message of {names[codes[span]]!r} holds {text[starts[t] : ends[t]]!r}, which "
                "is a special token of this tokenizer: it would forge the chat template's own; import the corpus without such "
                "messages, or with allow_special_tokens=True",
            )
    role = np.full(len(found), -1, np.int16)
    role[found >= 0] = codes[found[found >= 0]]
    return TokenRoles(names, role)


def _flat_spans(
    texts: Sequence[str], spans: Sequence[RoleSpans]
) -> tuple[tuple[str, ...], npt.NDArray[np.int16], Ints, Ints, Ints]:
    """Return names, and code, start and end of every message that is not empty, in order of their place in all texts."""
    sizes = np.fromiter((len(text) + 1 for text in texts), np.int64, len(texts))
    bases = np.cumsum(sizes) - sizes
    index: dict[str, int] = {}
    rows = [
        (int(base) + start, int(base) + end, index.setdefault(role, len(index)))
        for base, document in zip(bases, spans, strict=True)
        for role, start, end in zip(document.roles, document.starts, document.ends, strict=True)
        if end > start
    ]
    flat = np.array(sorted(rows), np.int64).reshape(-1, 3)
    return tuple(index), flat[:, 2].astype(np.int16), flat[:, 0], flat[:, 1], bases


def _most_shared(a: Ints, b: Ints, span_starts: Ints, span_ends: Ints) -> Ints:
    """Return the span that shares most characters with each range `[a, b)`, the first of equals; -1 for none."""
    found = np.full(len(a), -1, np.int64)
    best = np.zeros(len(a), np.int64)
    span = np.searchsorted(span_ends, a, side="right")
    while True:
        live = np.flatnonzero(span < len(span_starts))
        live = live[span_starts[span[live]] < b[live]]
        if not live.size:
            return found
        s = span[live]
        shared = np.minimum(b[live], span_ends[s]) - np.maximum(a[live], span_starts[s])
        is_better = shared > best[live]
        best[live[is_better]], found[live[is_better]] = shared[is_better], s[is_better]
        following = np.full(len(span), len(span_starts))
        following[live] = s + 1
        span = following
