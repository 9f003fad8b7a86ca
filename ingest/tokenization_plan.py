"""What will a tokenization be: its id and everything that shapes its rows, before any document is read?"""

from dataclasses import dataclass
from typing import Any, Literal

from actstore.checks import check_whole
from actstore.corpus import Corpus
from actstore.errors import ErrorKind, InvalidInputError
from actstore.log import fingerprint
from actstore.store import Store

from .token_encoding import Encoder, Template
from .tokenizers import FastTokenizer, default_window, load_tokenizer, reads_special
from .windows import auto_rows_per_unit, check_window

FORMAT = 1
"""Version of the rules that cut documents into rows; part of the fingerprint."""

_MOST_ROWS_PER_UNIT = 1 << 24
"""A unit is computed, and lost in a crash, as a whole."""


@dataclass(frozen=True, slots=True)
class TokenizationPlan:
    """What a tokenization will be, before any work."""

    id: str
    corpus: Corpus
    tokenizer: FastTokenizer
    template: Template
    config: dict[str, Any]

    def encoder(self) -> Encoder:
        """Return what encodes the corpus's texts in this process."""
        return Encoder(
            self.tokenizer,
            add_special_tokens=bool(self.config["add_special_tokens"]),
            allow_special=self.corpus.allows_special_tokens,
        )


def plan_tokenization(
    store: Store,
    corpus: str,
    tokenizer: Any,
    *,
    window: int | None = None,
    overlap: int = 0,
    add_special_tokens: bool = True,
    rows_per_unit: int | Literal["auto"] = "auto",
    revision: str | None = None,
) -> TokenizationPlan:
    """Return the id and configuration that `tokenize_corpus` with these arguments has; reads no document.

    Raises:
        NotFoundError: no such corpus.
        InvalidInputError: a tokenizer that cannot be used, or settings that cannot work.
    """
    found = store.refresh().corpus(corpus)
    fast = load_tokenizer(tokenizer, revision=revision)
    if found.is_chat:
        # The chat template has written all special tokens that the model expects.
        fast, add_special_tokens = reads_special(fast), False
    template = Encoder(fast, add_special_tokens=add_special_tokens).template
    window = default_window(fast) if window is None else check_whole(window, what="window", least=0)
    check_whole(overlap, what="overlap", least=0)
    check_window(window=window, overlap=overlap, prefix=template.prefix, suffix=template.suffix)
    text_bytes = int(found.collection.config["text_bytes"])
    rows = auto_rows_per_unit(text_bytes, window=window) if rows_per_unit == "auto" else rows_per_unit
    check_whole(rows, what="rows_per_unit", least=1, most=_MOST_ROWS_PER_UNIT)
    if rows < window:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"rows_per_unit={rows} must be at least window={window}: a window is never split",
        )
    config = {
        "corpus": corpus,
        "corpus_fingerprint": found.collection.fingerprint,
        "tokenizer_sha256": fast.sha256,
        "window": window,
        "overlap": overlap,
        "add_special_tokens": add_special_tokens,
        "rows_per_unit": rows,
        "format": FORMAT,
        **({"roles": True} if found.is_chat else {}),
    }
    return TokenizationPlan(f"{corpus}.{fingerprint(config)[:10]}", found, fast, template, config)
