"""What do all tokens of a source amount to, before anything is written?

One pass over the tokens. What is kept is one entry per different token id, at most a vocabulary.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from .source import ActivationSource, TokenBatch, refuse
from .spelling import id_word


@dataclass(slots=True)
class TokenScan:
    """Counts and hash of a source's tokens."""

    n_documents: int = 0
    n_rows: int = 0
    longest: int = 0
    """Tokens of the longest document."""
    words: dict[int, str] = field(default_factory=dict)
    """Every token id, with the first text that the source gives it, or `<id>`."""
    sha256: str = ""
    """Of keys, lengths, ids, positions, texts of tokens and characters, however they were cut into batches."""


def scan_tokens(source: ActivationSource) -> TokenScan:
    """Read all tokens once.

    Raises:
        InvalidInputError: the source is damaged, or its numbers do not agree.
    """
    scan = TokenScan()
    streams = [hashlib.sha256() for _ in range(6)]
    for batch in source.tokens():
        scan.n_documents += len(batch.keys)
        scan.n_rows += len(batch.ids)
        scan.longest = max(scan.longest, int(batch.lengths.max()))
        _add_words(scan.words, batch)
        _update(streams, batch)
    if not scan.n_rows:
        refuse(f"{source.description} has no token", "give a source with activations in it")
    total = hashlib.sha256()
    for stream in streams:
        total.update(stream.digest())
    scan.sha256 = total.hexdigest()
    return scan


def _add_words(words: dict[int, str], batch: TokenBatch) -> None:
    ids, first = np.unique(batch.ids, return_index=True)
    for token_id, i in zip(ids.tolist(), first.tolist(), strict=True):
        if token_id not in words:
            words[token_id] = id_word(token_id) if batch.words is None else batch.words[i]


def _update(streams: list["hashlib._Hash"], batch: TokenBatch) -> None:
    keys, lengths, ids, positions, words, spans = streams
    lengths.update(batch.lengths.astype("<i8").tobytes())
    ids.update(batch.ids.astype("<i4").tobytes())
    if batch.positions is not None:
        positions.update(batch.positions.astype("<i4").tobytes())
    if batch.spans is not None:
        spans.update(batch.spans.astype("<i4").tobytes())
    for stream, texts in ((keys, batch.keys), (words, batch.words or ())):
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            stream.update(len(data).to_bytes(8, "little") + data)
