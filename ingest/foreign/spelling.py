"""What text do token ids spell, and which characters of it does each token cover?

The text of a document is what the tokenizer decodes its ids to, special tokens included as they are written. A token's
characters are those that its own bytes are part of: of a character that several tokens make up, each covers the whole
character, as the offsets of `tokenizers` do. This is computed from the bytes of single tokens and compared with the
tokenizer's own decoding of the whole document; where the two differ (decoders that look at neighbours), the document is
decoded token by token, its text is what that gives, and tokens that give text only together share its characters.

Always `0 <= start <= end <= len(text)`, and starts and ends never decrease.
"""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.tokenizers import FastTokenizer, byte_alphabet, component_types

from .source import TokenBatch

SPANS_VERSION = 1
"""Of these rules; part of the tokenization's fingerprint."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOST_PENDING = 8
"""Tokens that may wait for each other to become text: twice the bytes of the longest character."""

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Spelled:
    """Documents' texts, and the characters of each of their tokens."""

    texts: list[str]
    starts: Ints
    """Shape (n_tokens,)."""
    ends: Ints
    """Shape (n_tokens,)."""


class Speller(Protocol):
    """Turns tokens into text; the same tokens always into the same."""

    def __call__(self, batch: TokenBatch) -> Spelled:
        """Return texts and characters of a batch of documents."""


class DecodingSpeller:
    """Spells with a tokenizer."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._name = tokenizer.name
        self._backend = tokenizer.backend()
        parsed = json.loads(tokenizer.tokenizer_json)
        kinds = component_types({"decoder": parsed.get("decoder")})
        self._alphabet = byte_alphabet() if "ByteLevel" in kinds else None
        self._has_byte_tokens = "ByteFallback" in kinds
        self._byte_ids: set[int] = set()
        """Tokens that are single bytes, out of those met so far."""
        self._pieces: dict[int, bytes] = {}
        self._anchor, self._anchor_text = self._find_anchor()

    def __call__(self, batch: TokenBatch) -> Spelled:
        """Return texts and characters.

        Raises:
            InvalidInputError: an id that the tokenizer has no token for.
        """
        offsets = batch.offsets.tolist()
        documents = [batch.ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        for token_id in np.unique(batch.ids).tolist():
            if token_id not in self._pieces:
                self._pieces[token_id] = self._piece(token_id)
        decoded = self._backend.decode_batch(documents, skip_special_tokens=False)
        found = [self._spell(ids, text) for ids, text in zip(documents, decoded, strict=True)]
        return _joined(found)

    def _spell(self, ids: list[int], decoded: str) -> tuple[str, Ints, Ints]:
        pieces = [self._pieces[i] for i in ids]
        if self._byte_ids:
            _spell_broken_bytes(pieces, [i in self._byte_ids for i in ids])
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        text, char_at = decode_bytes(b"".join(pieces))
        shift = 0
        if text != decoded:
            # Decoders of SentencePiece and WordPiece drop the space before the first token.
            if text[:1] != " " or text[1:] != decoded:
                return self._spell_stepwise(ids)
            shift = 1
        stops = np.cumsum(sizes)
        starts = char_at[stops - sizes]
        ends = np.where(sizes > 0, char_at[np.maximum(stops, 1) - 1] + 1, starts)
        return decoded, *(np.maximum(x - shift, 0).astype(np.int32) for x in (starts, ends))

    def _spell_stepwise(self, ids: list[int]) -> tuple[str, Ints, Ints]:
        """Decode token by token: each step decodes the tokens of the last text and those that still wait."""
        texts: list[str] = []
        starts = np.zeros(len(ids), np.int32)
        ends = np.zeros(len(ids), np.int32)
        context = read = n_chars = 0
        for i in range(len(ids)):
            before = self._decode(ids[context:read])
            now = self._decode(ids[context : i + 1])
            waits = now.endswith("�") or len(now) < len(before)
            if waits and i + 1 < len(ids) and i + 1 - read < _MOST_PENDING:
                continue
            texts.append(now[len(before) :])
            starts[read : i + 1] = n_chars
            n_chars += len(texts[-1])
            ends[read : i + 1] = n_chars
            context, read = read, i + 1
        return "".join(texts), starts, ends

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def _piece(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for, behind other tokens."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            raise InvalidInputError(
                ErrorKind.BAD_TOKENIZER,
                f"tokenizer {self._name!r} has no token {token_id}, which the activations have: give the tokenizer of the "
                "model that they come from",
            )
        if self._alphabet is not None:
            known = [self._alphabet[c] for c in token if c in self._alphabet]
            return bytes(known) if len(known) == len(token) else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte and self._has_byte_tokens:
            self._byte_ids.add(token_id)
            return bytes([int(byte[1], 16)])
        behind = self._decode([self._anchor, token_id])
        return behind.removeprefix(self._anchor_text).encode()

    def _find_anchor(self) -> tuple[int, str]:
        """Return a token that decodes to the same text whatever follows it."""
        for token_id in sorted(self._backend.get_vocab(with_added_tokens=False).values()):
            text = self._decode([token_id])
            if text.strip() and "�" not in text and self._decode([token_id, token_id]).startswith(text):
                return token_id, text
        return 0, ""


def _spell_broken_bytes(pieces: list[bytes], is_byte: Sequence[bool]) -> None:
    """Put U+FFFD for each byte of a row of byte tokens that together are no UTF-8, as the decoder `ByteFallback` does."""
    for wanted, group in itertools.groupby(range(len(pieces)), key=is_byte.__getitem__):
        run = list(group)
        if not wanted:
            continue
        try:
            b"".join(pieces[run[0] : run[-1] + 1]).decode()
        except UnicodeDecodeError:
            pieces[run[0] : run[-1] + 1] = ["\ufffd".encode()] * len(run)


class WordSpeller:
    """Spells with the texts that the source gives its tokens: a document is all of them, one behind the other."""

    def __call__(self, batch: TokenBatch) -> Spelled:
        """Return texts and characters."""
        assert batch.words is not None
        offsets = batch.offsets.tolist()
        return _joined(_side_by_side(batch.words[a:b], gap="") for a, b in itertools.pairwise(offsets))


class IdSpeller:
    """Spells where nobody knows what the tokens are called: `<17> <4>`."""

    def __call__(self, batch: TokenBatch) -> Spelled:
        """Return texts and characters."""
        words = [id_word(i) for i in batch.ids.tolist()]
        offsets = batch.offsets.tolist()
        return _joined(_side_by_side(words[a:b], gap=" ") for a, b in itertools.pairwise(offsets))


def id_word(token_id: int) -> str:
    """Return what a token without a name is called.

    >>> id_word(17)
    '<17>'
    """
    return f"<{token_id}>"


def decode_bytes(data: bytes) -> tuple[str, npt.NDArray[np.int64]]:
    """Return bytes as text, and the index of the character that each byte is part of; its end has the text's length.

    What is no UTF-8 becomes U+FFFD, one for each longest piece that could begin a character.

    >>> text, char_at = decode_bytes("aé".encode() + bytes([0xF0, 0x9F]))
    >>> text, char_at.tolist()
    ('aé�', [0, 1, 1, 2, 2, 3])
    """
    raw = np.frombuffer(data, np.uint8)
    leads = (raw & 0xC0) != 0x80
    at = 0
    view = memoryview(data)
    while at < len(data):
        try:
            str(view[at:], "utf-8")
            break
        except UnicodeDecodeError as error:
            leads[at + error.start] = True
            leads[at + error.start + 1 : at + error.end] = False
            at += error.end
    text = data.decode("utf-8", errors="replace")
    char_at = np.empty(len(data) + 1, np.int64)
    np.cumsum(leads, out=char_at[:-1])
    char_at[:-1] -= 1
    char_at[-1] = len(text)
    return text, char_at


def _side_by_side(words: Sequence[str], *, gap: str) -> tuple[str, Ints, Ints]:
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.cumsum(lengths + len(gap)) - len(gap)
    return gap.join(words), (ends - lengths).astype(np.int32), ends.astype(np.int32)


def _joined(found: Iterable[tuple[str, Ints, Ints]]) -> Spelled:
    texts, starts, ends = zip(*found, strict=True)
    return Spelled(list(texts), np.concatenate(starts), np.concatenate(ends))
