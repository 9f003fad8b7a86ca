"""What does a run's own model compute on a text that is not in the store, and which token does it expect next?

The text is tokenized as the run's corpus was and goes through the same model, at the same dtype, alone and not in a batch,
so its activations can be compared with the stored rows. That it is the same model is checked by its fingerprint.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from actstore.errors import ConflictError, ErrorKind, InvalidInputError

from .capture import Capturer
from .models import LoadedModel, load_model, pick_device

if TYPE_CHECKING:
    from .training.language_model import LanguageModel


class EncodedText(NamedTuple):
    """One text's tokens and what the model computes on them; t is the number of tokens."""

    token_ids: npt.NDArray[np.int32]
    """Shape (t,)."""
    offsets: npt.NDArray[np.int32]
    """Characters of each token, Unicode code points of the text, half-open; shape (t, 2)."""
    is_special: npt.NDArray[np.bool_]
    """Whether the tokenizer added the token; shape (t,)."""
    activations: npt.NDArray[np.float32]
    """Shape (t, d_model)."""


@dataclass(slots=True)
class _LastModel:
    """The model that was asked for last: asking twice does not load it twice. One copy of its weights is kept."""

    lock: threading.Lock
    key: tuple[object, ...] | None = None
    loaded: LoadedModel | None = None
    head: "LanguageModel | None" = None
    """The same model with the head that predicts tokens, once that was asked for."""

    def ask(self, key: tuple[object, ...]) -> None:
        """Drop what was kept if it is not what `key` means: the old model goes before the new one comes, two may not fit."""
        if self.key != key:
            self.key, self.loaded, self.head = key, None, None

    def share(self) -> None:
        """Have both forms of the model use one copy of the weights."""
        if self.loaded is not None and self.head is not None and self.loaded.model is not self.head.base:
            config = self.head.base.config
            config.use_cache = config.get_text_config().use_cache = False
            self.loaded = replace(self.loaded, model=self.head.base, map=self.head.map)


_LAST = _LastModel(threading.Lock())


def encode_text(
    *,
    model_source: str,
    expected_model: Mapping[str, Any],
    compute_dtype: str,
    attn_implementation: str | None,
    hook_point: str,
    texts: Sequence[str],
    tokenizer_json: bytes,
    tokenizer_config: Mapping[str, Any],
    window: int,
    add_special_tokens: bool,
    device: str = "auto",
) -> list[EncodedText]:
    """Return each text's tokens and activations at a hook point.

    The model stays in memory until another is asked for. Calls from several threads take turns.

    Args:
        model_source: Folder or hub name of the model.
        expected_model: Fingerprint of the run's model; the model found must have it.
        compute_dtype: Dtype of the run's forward pass.
        attn_implementation: Attention implementation of the run.
        hook_point: Canonical name or alias of one place.
        texts: Texts of at least one token and at most `window`.
        tokenizer_json: The tokenization's `tokenizer.json`.
        tokenizer_config: What belongs to the tokenizer besides, as the tokenization keeps it: `special_ids`, ids that are special
            wherever they stand, and `split_special_tokens`, whether a special token's text in a text is text.
        window: Most tokens of a text, special ones included.
        add_special_tokens: Whether the tokenizer adds its special tokens.
        device: Where to compute, see `load_model`.

    Raises:
        ConflictError: CONFIG_DIFFERS: the model at `model_source` is not the run's.
        NotFoundError: no such model or hook point.
        InvalidInputError: a text without tokens or longer than the window, or a broken tokenizer.
    """
    encodings = _tokenize(
        texts,
        tokenizer_json,
        window=window,
        add_special_tokens=add_special_tokens,
        split_special_tokens=bool(tokenizer_config.get("split_special_tokens", False)),
    )
    special = np.array(sorted(tokenizer_config.get("special_ids", ())), np.int32)
    with _LAST.lock:
        loaded = _load(
            model_source,
            expected_model,
            dtype=compute_dtype,
            attn_implementation=attn_implementation,
            device=device,
        )
        capturer = Capturer(loaded, [hook_point], equal_lengths=True)
        (name, width) = next(iter(capturer.widths.items()))
        encoded = []
        for encoding in encodings:
            ids = np.array(encoding.ids, np.int32)
            acts_td = np.empty((len(ids), width), np.float32)
            starts = np.array([0, len(ids)], np.int64)
            capturer.capture_unit(ids, starts, {name: acts_td}, batch_tokens=window, stored_dtype="float32")
            added = np.array(encoding.special_tokens_mask, bool)
            offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
            encoded.append(EncodedText(ids, offsets, added | np.isin(ids, special), acts_td))
    return encoded


def next_token_probabilities(
    *,
    model_source: str,
    expected_model: Mapping[str, Any],
    compute_dtype: str,
    attn_implementation: str | None,
    token_ids: npt.NDArray[np.integer[Any]],
    device: str = "auto",
) -> npt.NDArray[np.float64]:
    """Return the probability that the model gives every token of its vocabulary to come next, shape (vocabulary,), float64.

    The softmax of its logits behind the last of `token_ids`. The model with its head stays in memory until another is asked
    for, in place of the one without that `encode_text` keeps. Calls from several threads take turns.

    Args:
        model_source: Folder or hub name of the model.
        expected_model: Fingerprint of the run's model; the model found must have it.
        compute_dtype: Dtype of the run's forward pass.
        attn_implementation: Attention implementation of the run.
        token_ids: The tokens so far, from the start of their window, at least one; shape (t,).
        device: Where to compute, see `load_model`.

    Raises:
        ConflictError: CONFIG_DIFFERS: the model at `model_source` is not the run's.
        NotFoundError: no such model.
        InvalidInputError: its files have no head that predicts tokens, it looks ahead, or its logits are not finite.
    """
    import torch

    from .training.language_model import load_language_model

    with _LAST.lock:
        _LAST.ask(_model_key(model_source, expected_model, compute_dtype, attn_implementation, device))
        if _LAST.head is None:
            _LAST.head = load_language_model(
                model_source,
                expected_model,
                compute_dtype=compute_dtype,
                attn_implementation=attn_implementation,
                device=pick_device(device),
            )
            _LAST.share()
        ids = torch.as_tensor(np.asarray(token_ids, np.int64)[None], device=_LAST.head.device)
        with torch.inference_mode():
            logits = _LAST.head.logits(ids)[0, -1].float().cpu()  # not every device has float64
            probabilities: npt.NDArray[np.float64] = torch.softmax(logits.double(), dim=0).numpy()
    if not np.isfinite(probabilities).all():
        raise InvalidInputError(
            ErrorKind.NON_FINITE,
            f"the model at {model_source!r} gives logits that are not finite in {compute_dtype} for these "
            f"{len(token_ids)} tokens: there is no distribution over the next one",
        )
    return probabilities


def _tokenize(
    texts: Sequence[str],
    tokenizer_json: bytes,
    *,
    window: int,
    add_special_tokens: bool,
    split_special_tokens: bool,
) -> list[Any]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    except Exception as error:
        # The package raises nothing narrower than Exception.
        raise InvalidInputError(
            ErrorKind.BAD_TOKENIZER,
            f"the tokenization's tokenizer.json cannot be read: {error}; check the store with fsck",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Not part of tokenizer.json.
    tokenizer.encode_special_tokens = split_special_tokens
    _check_texts(texts)
    encodings: list[Any] = tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
    for text, encoding in zip(texts, encodings, strict=True):
        if not 1 <= len(encoding.ids) <= window:
            kind = ErrorKind.TOO_LARGE if encoding.ids else ErrorKind.BAD_ARGUMENT
            raise InvalidInputError(
                kind,
                f"text {text[:60]!r} has {len(encoding.ids)} tokens, and a text must have from 1 to the run's window of"
                f" {window}: {'shorten it' if encoding.ids else 'write something'}",
            )
    return encodings


def _check_texts(texts: Sequence[str]) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"a text to run the model on must be a string, got {text!r:.80}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                ErrorKind.BAD_DOCUMENT,
                f"text {text[:60]!r} has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which "
                "is half a character: write it as UTF-8",
            ) from error


def _load(
    source: str, expected: Mapping[str, Any], *, dtype: str, attn_implementation: str | None, device: str
) -> LoadedModel:
    """Return the model, kept from the last call if that asked for the same; the caller holds the lock."""
    _LAST.ask(_model_key(source, expected, dtype, attn_implementation, device))
    if _LAST.loaded is not None:
        return _LAST.loaded
    loaded = load_model(
        source,
        revision=expected.get("revision"),
        dtype=dtype,
        attn_implementation=attn_implementation,
        device=device,
    )
    if loaded.fingerprint != dict(expected):
        names = sorted(loaded.fingerprint.keys() | expected.keys())
        lines = [
            f"{name} is {loaded.fingerprint.get(name)!r}, the run's {expected.get(name)!r}"
            for name in names
            if loaded.fingerprint.get(name) != expected.get(name)
        ]
        raise ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"the model at {source!r} is not the one that the run's activations come from: {'; '.join(lines)}. Put the run's"
            " model there, or make a new run",
        )
    _LAST.loaded = loaded
    _LAST.share()
    return _LAST.loaded


def _model_key(
    source: str, expected: Mapping[str, Any], dtype: str, attn_implementation: str | None, device: str
) -> tuple[object, ...]:
    """Return what tells one model from another."""
    return (source, tuple(sorted(expected.items())), dtype, attn_implementation, device)
