"""What are the tokens of documents, as flat arrays?

The same whether computed here or in worker processes, and whatever the batches: a document is always encoded alone and
whole, as `tokenizer(text)` does. Light to import, since every worker process does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

from .token_alphabet import find_alphabet
from .token_roles import RoleSpans, TokenRoles, token_roles
from .tokenizers import FastTokenizer

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Consecutive documents' texts."""

    first_doc: int
    texts: list[str]
    roles: list[RoleSpans] | None = None
    """Who wrote which characters, of rendered conversations."""


@dataclass(frozen=True, slots=True)
class Template:
    """Special tokens that the tokenizer puts around every text."""

    prefix: int
    suffix: int


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The tokens of consecutive documents, one after the other; special tokens of the template included."""

    first_doc: int
    lengths: npt.NDArray[np.int64]
    """Tokens of each document, shape (n_documents,)."""
    ids: Ints
    starts: Ints
    """First character of each token; 0 for the template's tokens."""
    ends: Ints
    """End of each token's characters; 0 for the template's tokens."""
    roles: TokenRoles | None = None
    """Whose message each token is part of, of rendered conversations."""


class Encoder:
    """Encodes batches of texts; in worker processes there is one per process."""

    def __init__(
        self, tokenizer: FastTokenizer, *, add_special_tokens: bool, allow_special: bool = False
    ) -> None:
        """Build the tokenizer and find its template.

        Args:
            tokenizer: The tokenizer.
            add_special_tokens: Whether it puts its special tokens around texts.
            allow_special: Whether the messages of conversations may hold special tokens.

        Raises:
            InvalidInputError: special tokens are put inside of a text, where no window could keep them.
        """
        self._backend = tokenizer.backend()
        self._name = tokenizer.name
        self._alphabet = find_alphabet(tokenizer)
        self._add_special = add_special_tokens
        self._allow_special = allow_special
        self._special_ids = special_lookup(tokenizer.special_ids)
        self.template = self._find_template() if add_special_tokens else Template(0, 0)

    def __call__(self, batch: TextBatch) -> EncodedBatch:
        """Return the batch's tokens.

        Raises:
            InvalidInputError: the tokenizer cannot encode a text, or breaks its own rules on it.
        """
        self._check_spelling(batch)
        try:
            encodings = self._backend.encode_batch(batch.texts, add_special_tokens=self._add_special)
        except Exception as error:  # tokenizers raises bare Exception
            last = batch.first_doc + len(batch.texts) - 1
            raise self._error(
                f"cannot encode one of the documents {batch.first_doc} to {last} ({error})"
            ) from error
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        total = int(lengths.sum())
        ids = _flat((e.ids for e in encodings), total)
        offsets = _flat((chain.from_iterable(e.offsets) for e in encodings), 2 * total).reshape(-1, 2)
        special = _flat((e.special_tokens_mask for e in encodings), total)
        encoded = EncodedBatch(batch.first_doc, lengths, ids, offsets[:, 0].copy(), offsets[:, 1].copy())
        self._check(batch, encoded, special)
        return encoded if batch.roles is None else replace(encoded, roles=self._roles(batch, encoded))

    def _roles(self, batch: TextBatch, encoded: EncodedBatch) -> TokenRoles:
        assert batch.roles is not None
        return token_roles(
            batch.texts,
            batch.roles,
            encoded.lengths,
            encoded.starts,
            encoded.ends,
            is_special(encoded.ids, self._special_ids),
            first_doc=batch.first_doc,
            allow_special=self._allow_special,
        )

    def _find_template(self) -> Template:
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        for text in chain(("Probe a 1.", "a"), list(vocabulary)[:100]):
            try:
                mask = self._backend.encode(text).special_tokens_mask
            except Exception as error:  # tokenizers raises bare Exception
                raise self._error(f"cannot encode {text!r} ({error})") from error
            if 0 in mask:
                return Template(mask.index(0), mask[::-1].index(0))
        raise self._error(
            f"turns none of its first 100 tokens ({', '.join(list(vocabulary)[:3])}, ...) into a token"
        )

    def _check_spelling(self, batch: TextBatch) -> None:
        if self._alphabet is None:
            return
        normalizer = self._backend.normalizer
        for i, text in enumerate(batch.texts):
            gaps = self._alphabet.gaps(text if normalizer is None else normalizer.normalize_str(text))
            if gaps:
                raise self._error(
                    f"has no symbol for {', '.join(gaps[:5])} in document {batch.first_doc + i} and no unknown token: it would "
                    "drop them and then misplace the tokens behind them; train it with an unknown token or, if it is "
                    "byte-level, with all 256 bytes (initial_alphabet)"
                )

    def _check(self, batch: TextBatch, encoded: EncodedBatch, special: Ints) -> None:
        prefix, suffix = self.template.prefix, self.template.suffix
        stops = np.cumsum(encoded.lengths)
        doc = np.repeat(np.arange(len(batch.texts)), encoded.lengths)
        at = np.arange(len(doc)) - np.repeat(stops - encoded.lengths, encoded.lengths)
        outer = (at < prefix) | (at >= encoded.lengths[doc] - suffix)
        n_chars = np.fromiter(map(len, batch.texts), np.int64, len(batch.texts))
        wrong = special.astype(bool) != outer
        if wrong.any():
            where = batch.first_doc + int(doc[wrong.argmax()])
            raise self._error(f"puts special tokens inside the text of document {where}, not only around it")
        wrong = (encoded.starts < 0) | (encoded.starts > encoded.ends) | (encoded.ends > n_chars[doc])
        if wrong.any():
            where = batch.first_doc + int(doc[wrong.argmax()])
            raise self._error(f"gives a token characters outside of document {where}")

    def _error(self, problem: str) -> InvalidInputError:
        return InvalidInputError(
            ErrorKind.BAD_TOKENIZER,
            f"tokenizer {self._name!r} {problem}: use another tokenizer, or add_special_tokens=False",
        )


def _flat(parts: Iterable[Iterable[int]], total: int) -> Ints:
    return np.fromiter(chain.from_iterable(parts), np.int32, total)


_encoder: Encoder | None = None


def start_worker(tokenizer: FastTokenizer, add_special_tokens: bool, allow_special: bool) -> None:
    """Make this worker process's encoder."""
    global _encoder
    _encoder = Encoder(tokenizer, add_special_tokens=add_special_tokens, allow_special=allow_special)


def encode_in_worker(batch: TextBatch) -> EncodedBatch:
    """Encode a batch with this worker process's encoder."""
    assert _encoder is not None, "start_worker runs before any task"
    return _encoder(batch)


def check_worker_count(workers: int | None) -> int:
    """Return the number of worker processes, 0 for none.

    Raises:
        InvalidInputError: a negative number.
    """
    if workers is not None and workers < 0:
        raise InvalidInputError(ErrorKind.BAD_ARGUMENT, f"workers must be at least 0, got {workers}")
    return 0 if workers is None or workers == 1 else workers


def special_lookup(ids: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return a table that says of every id up to the largest special one whether it is special.

    >>> special_lookup([0, 2]).tolist()
    [True, False, True]
    """
    table = np.zeros(max(ids, default=-1) + 1, bool)
    table[list(ids)] = True
    return table


def is_special(ids: Ints, lookup: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which ids are special by a `special_lookup` table.

    >>> is_special(np.array([0, 1, 9], np.int32), special_lookup([0, 2])).tolist()
    [True, False, False]
    """
    found = np.zeros(len(ids), bool)
    known = ids < len(lookup)
    found[known] = lookup[ids[known]]
    return found
