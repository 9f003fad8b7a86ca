"""Which characters would a tokenizer drop without a word?

A BPE model without an unknown token leaves out what its vocabulary has no symbol for, and `tokenizers` (seen in 0.23) then
counts the offsets of all later tokens of the same word as if nothing had been left out. Rows would point to the wrong
characters, so texts that meet such a gap are refused. Models with an unknown token, byte fallback or all 256 bytes have none.
"""

import json
from dataclasses import dataclass
from typing import Any

from .tokenizers import SPACE_MARK, FastTokenizer, byte_alphabet, component_types

_SPLITTERS = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}


@dataclass(frozen=True, slots=True)
class Alphabet:
    """What a model without an unknown token can spell."""

    symbols: frozenset[str]
    """Characters, after normalization; of a byte-level tokenizer the characters that stand for bytes."""

    is_byte_level: bool
    marks_spaces: bool
    """Whether a space becomes SentencePiece's mark."""

    splits_at_spaces: bool
    """Whether white space separates words and is no part of them, so that nothing of it can be missing."""

    def gaps(self, text: str) -> list[str]:
        """Return what of a normalized text has no symbol, in a readable form.

        >>> alphabet = Alphabet(frozenset("ab"), is_byte_level=False, marks_spaces=False, splits_at_spaces=True)
        >>> alphabet.gaps("abba cd")
        ["'c'", "'d'"]
        """
        if self.is_byte_level:
            known = {b for c, b in byte_alphabet().items() if c in self.symbols}
            return [f"byte 0x{b:02x}" for b in sorted(set(text.encode()) - known)]
        found = set(text)
        if self.marks_spaces and " " in found:
            found = (found - {" "}) | {SPACE_MARK}
        return [repr(c) for c in sorted(found - self.symbols) if not (self.splits_at_spaces and c.isspace())]


def find_alphabet(tokenizer: FastTokenizer) -> Alphabet | None:
    """Return what the tokenizer can spell, None if it can spell everything."""
    parsed: dict[str, Any] = json.loads(tokenizer.tokenizer_json)
    model = parsed["model"]
    if model.get("type") != "BPE" or model.get("unk_token") is not None or model.get("byte_fallback"):
        return None
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    symbols = {token.removeprefix(prefix).removesuffix(suffix) for token in model["vocab"]}
    kinds = component_types(parsed)
    is_byte_level = "ByteLevel" in kinds
    symbols = {s for s in symbols if len(s) == 1}
    if is_byte_level and symbols.issuperset(byte_alphabet()):
        return None
    return Alphabet(
        symbols=frozenset(symbols),
        is_byte_level=is_byte_level,
        marks_spaces=bool(kinds & {"Metaspace", SPACE_MARK}),
        splits_at_spaces=bool(kinds & _SPLITTERS),
    )
