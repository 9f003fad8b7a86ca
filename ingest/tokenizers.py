"""Which tokenizer is meant, what exactly does it do to text, and what are its tokens called?

A tokenization is shared by every run over it, so it must not depend on where the tokenizer came from: `FastTokenizer` is
the tokenizer's own serialised form (`tokenizer.json`) with everything that is not tokenizing taken out (truncation,
padding), and a hash of that. Only fast tokenizers tell where in the text a token stands; slow ones are refused.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from actstore._lazy import lazy_import
from actstore.errors import ErrorKind, InvalidInputError
from actstore.log import canonical_json

DEFAULT_WINDOW = 1_024
_SANE_WINDOW = 1_000_000
"""transformers gives `model_max_length` 1e30 when nobody knows."""

_PROBE = "Probe: naïve 🎉 text, 漢字."
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE_MARK = "▁"


@dataclass(frozen=True, slots=True)
class FastTokenizer:
    """A fast tokenizer as a value: what it does, its hash, and what a reader needs to do the same."""

    tokenizer_json: bytes
    """What `tokenizers.Tokenizer.from_str` reads; truncation and padding are off."""

    special_ids: tuple[int, ...]
    """Ids that are special wherever they occur, ascending."""

    config: Mapping[str, Any]
    """Settings that are not in `tokenizer_json` and shape tokens or their meaning."""

    name: str
    """Where it came from; for people."""

    max_length: int | None
    """Tokens that its model takes, None if it does not say."""

    @property
    def sha256(self) -> str:
        """SHA-256 over the canonical `tokenizer_json` and `config`, 64 hex digits."""
        parsed = json.loads(self.tokenizer_json)
        return hashlib.sha256(canonical_json({"tokenizer": parsed, "config": dict(self.config)})).hexdigest()

    @property
    def split_special(self) -> bool:
        """Whether special tokens written in a text are cut like any other text."""
        return bool(self.config["split_special_tokens"])

    def backend(self) -> Any:
        """Return a new `tokenizers.Tokenizer`."""
        module = lazy_import("tokenizers", needed_for="tokenizing", extra="ingest")
        backend = module.Tokenizer.from_str(self.tokenizer_json.decode())
        backend.encode_special_tokens = self.split_special
        return backend


def load_tokenizer(tokenizer: Any, *, revision: str | None = None) -> FastTokenizer:
    """Return a tokenizer as a value.

    Args:
        tokenizer: A folder or `tokenizer.json`, a hub name, a fast tokenizer of transformers, a `tokenizers.Tokenizer`, or
            a `FastTokenizer`.
        revision: Branch, tag or commit of a hub name.

    Raises:
        InvalidInputError: (BAD_TOKENIZER) nothing there, a slow tokenizer, or one that does not tell where tokens stand.
    """
    if isinstance(tokenizer, FastTokenizer):
        return tokenizer
    name = f"a {type(tokenizer).__name__}"
    if isinstance(tokenizer, str | os.PathLike):
        name = os.fspath(tokenizer)
        tokenizer = _load(name, revision)
    if type(tokenizer).__module__.partition(".")[0] == "tokenizers":
        return _checked(
            tokenizer, special_ids=_added_special(tokenizer), config={}, name=name, max_length=None
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or not hasattr(backend, "to_str"):
        raise InvalidInputError(
            ErrorKind.BAD_TOKENIZER,
            f"tokenizer {name!r} ({type(tokenizer).__name__}) is not a fast one, and only those tell which characters a token "
            "covers: use a model with a tokenizer.json, or save one with AutoTokenizer.from_pretrained(...).save_pretrained() "
            "where transformers can convert it",
        )
    length = getattr(tokenizer, "model_max_length", None)
    return _checked(
        backend,
        special_ids=tuple(sorted({int(i) for i in tokenizer.all_special_ids if i is not None})),
        config={
            "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
            "special_tokens": _special_tokens(tokenizer),
        },
        name=name,
        max_length=int(length) if length is not None and 0 < length <= _SANE_WINDOW else None,
    )


def _load(name: str, revision: str | None) -> Any:
    path = Path(name)
    if path.is_file():
        module = lazy_import("tokenizers", needed_for="tokenizing", extra="ingest")
        try:
            return module.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
            raise _unusable(name, error) from error
    return load_from_hub(name, revision)


def load_from_hub(name: str | os.PathLike[str], revision: str | None) -> Any:
    """Return the tokenizer object of transformers that a folder or hub name means.

    Raises:
        InvalidInputError: (BAD_TOKENIZER) there is none.
    """
    transformers = lazy_import("transformers", needed_for="loading a tokenizer", extra="ingest")
    name = os.fspath(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _unusable(name, error) from error


def _unusable(name: str, error: Exception) -> InvalidInputError:
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return InvalidInputError(
        ErrorKind.BAD_TOKENIZER,
        f"no tokenizer could be loaded from {name!r} ({reason}): give a folder with a tokenizer.json, a hub name, or a fast "
        "tokenizer object",
    )


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts that a tokenizer object of transformers reads as special tokens, longest first."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    added = (
        backend.get_added_tokens_decoder().values() if hasattr(backend, "get_added_tokens_decoder") else ()
    )
    texts = {str(token) for token in tokenizer.all_special_tokens} | {t.content for t in added if t.special}
    return tuple(sorted(filter(None, texts), key=lambda text: (-len(text), text)))


def reads_special(fast: FastTokenizer) -> FastTokenizer:
    """Return the tokenizer for rendered chat: every special token written in a text is read as one, and known as special."""
    special_ids = tuple(sorted({*fast.special_ids, *_added_special(fast.backend())}))
    config = {**fast.config, "split_special_tokens": False, "special_ids": list(special_ids)}
    return replace(fast, special_ids=special_ids, config=config)


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    """Return the roles of special tokens (bos_token, ...) as plain text."""
    roles = tokenizer.special_tokens_map
    return {
        str(role): [str(t) for t in token] if isinstance(token, list | tuple) else str(token)
        for role, token in sorted(roles.items())
    }


def _added_special(backend: Any) -> tuple[int, ...]:
    return tuple(sorted(i for i, token in backend.get_added_tokens_decoder().items() if token.special))


def _checked(
    backend: Any,
    *,
    special_ids: tuple[int, ...],
    config: Mapping[str, Any],
    name: str,
    max_length: int | None,
) -> FastTokenizer:
    try:
        parsed = json.loads(backend.to_str())
    except (
        Exception
    ) as error:  # tokenizers raises bare Exception for parts written in Python, which have no file form
        raise InvalidInputError(
            ErrorKind.BAD_TOKENIZER,
            f"tokenizer {name!r} cannot be written as a tokenizer.json ({error}): use one without custom Python parts",
        ) from error
    parsed["truncation"] = parsed["padding"] = None
    settings = {
        "split_special_tokens": False,
        "special_tokens": {},
        **config,
        "special_ids": list(special_ids),
    }
    fast = FastTokenizer(
        tokenizer_json=json.dumps(parsed, ensure_ascii=False, separators=(",", ":")).encode(),
        special_ids=special_ids,
        config=settings,
        name=name,
        max_length=max_length,
    )
    _check_offsets(fast)
    return fast


def _check_offsets(fast: FastTokenizer) -> None:
    """Check that offsets count characters: byte offsets of the probe would leave it."""
    try:
        offsets = fast.backend().encode(_PROBE, add_special_tokens=False).offsets
    except Exception as error:  # tokenizers raises bare Exception
        raise InvalidInputError(
            ErrorKind.BAD_TOKENIZER,
            f"tokenizer {fast.name!r} cannot encode {_PROBE!r} ({error}): give it an unknown token, or use another",
        ) from error
    if offsets and (max(end for _, end in offsets) > len(_PROBE) or not any(a < b for a, b in offsets)):
        raise InvalidInputError(
            ErrorKind.BAD_TOKENIZER,
            f"tokenizer {fast.name!r} does not tell which characters its tokens cover (the offsets of a text of {len(_PROBE)} "
            f"characters end at {max(end for _, end in offsets)}): use another tokenizer",
        )


def tokenizers_version() -> str:
    """Return the version of the library that tokenizes; another one may cut a text otherwise."""
    return str(lazy_import("tokenizers", needed_for="tokenizing", extra="ingest").__version__)


def default_window(fast: FastTokenizer) -> int:
    """Return the window when nobody gives one: what the tokenizer's model takes, else 1,024."""
    return fast.max_length or DEFAULT_WINDOW


def vocabulary_table(fast: FastTokenizer) -> pa.Table:
    """Return `token_id` (int32) and `token` (readable text) of the whole vocabulary, by id.

    Byte-level tokens are shown as the text that their bytes are (U+FFFD where they are no whole character), the space mark
    of SentencePiece as a space; WordPiece tokens stay as they are.
    """
    parsed = json.loads(fast.tokenizer_json)
    kinds = component_types(parsed)
    added = {int(t["id"]) for t in parsed.get("added_tokens", [])}
    entries = sorted((i, t) for t, i in fast.backend().get_vocab(with_added_tokens=True).items())
    bytes_of = byte_alphabet()
    tokens = []
    for i, token in entries:
        if i in added:
            tokens.append(token)
        elif "ByteLevel" in kinds:
            tokens.append(_readable_bytes(token, bytes_of))
        elif kinds & {"Metaspace", SPACE_MARK}:
            tokens.append(_readable_piece(token))
        else:
            tokens.append(token)
    ids = pa.array([i for i, _ in entries], pa.int32())
    schema = pa.schema([pa.field("token_id", pa.int32(), False), pa.field("token", pa.string(), False)])
    return pa.Table.from_arrays([ids, pa.array(tokens, pa.string())], schema=schema)


def component_types(parsed: Mapping[str, Any]) -> set[str]:
    """Return the types of all parts around the model, and the space mark if one of them replaces it."""
    found: set[str] = set()
    stack = [parsed.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            found.add(str(part.get("type")))
            stack.extend(part.values())
        elif isinstance(part, list):
            stack.extend(part)
        elif part == SPACE_MARK:
            found.add(SPACE_MARK)
    return found


def _readable_bytes(token: str, bytes_of: Mapping[str, int]) -> str:
    if any(c not in bytes_of for c in token):
        return token
    return bytes(bytes_of[c] for c in token).decode("utf-8", errors="replace")


def _readable_piece(token: str) -> str:
    byte = _BYTE_TOKEN.fullmatch(token)
    if byte and int(byte[1], 16) < 0x80:
        return chr(int(byte[1], 16))
    return token.replace(SPACE_MARK, " ")


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of GPT-2's byte-level alphabet stands for.

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on, in order.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), the released `encoder.py`.

    >>> alphabet = byte_alphabet()
    >>> alphabet["a"], alphabet["Ġ"], len(alphabet)
    (97, 32, 256)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(0x100 + i): b for i, b in enumerate(others)}}
