"""How is the run's own model had with its head, so that it predicts tokens?

The same files, dtype and attention as the run's, checked by fingerprint; only models whose head is in those files (or tied to
the embedding) and that do not look ahead, which is tried.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.errors import ConflictError, ErrorKind, InvalidInputError
from actstore.ingest.architectures import ModelMap, map_model
from actstore.ingest.weights import config_sha256, find_weights, weights_sha256

if TYPE_CHECKING:
    import torch

_PROBE_TOKENS = 6
_PROBE_TOLERANCE = 1e-2
"""Of the logits' largest magnitude: what looks ahead changes them by far more, rounding in bfloat16 by less."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model that predicts the next token."""

    model: Any
    """With its head, a `transformers.PreTrainedModel`."""

    base: Any
    """Without it: what hook points are named in."""

    map: ModelMap
    device: "torch.device"

    def logits(self, ids_bt: "torch.Tensor") -> "torch.Tensor":
        """Return logits (b, t, vocabulary), in the model's dtype."""
        found: torch.Tensor = self.model(input_ids=ids_bt, use_cache=False).logits
        return found


def load_language_model(
    source: str,
    expected: Mapping[str, Any],
    *,
    compute_dtype: str,
    attn_implementation: str | None,
    device: "torch.device",
) -> LanguageModel:
    """Return the run's model with its head.

    Reads a local folder's weights twice: once to hash them, once to load them.

    Args:
        source: Folder or hub name.
        expected: Fingerprint of the run's model.
        compute_dtype: Dtype of the run's forward pass.
        attn_implementation: Of the run.
        device: Where to compute.

    Raises:
        NotFoundError: no such folder or hub model.
        ConflictError: CONFIG_DIFFERS: the model there is another one.
        InvalidInputError: the files have no head of a language model, or it looks ahead.
    """
    files = find_weights(source, revision=expected.get("revision"), cache_dir=None, offline=False)
    identity = (
        {"revision": files.commit} if files.commit else {"weights_sha256": weights_sha256(files.weights)}
    )
    found = {"config_sha256": config_sha256(files.config), **identity}
    differs = [key for key, value in found.items() if expected.get(key) != value]
    if differs:
        raise ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"the model at {source!r} is not the one that the run's activations come from ({', '.join(differs)} differ)",
        )
    model = _with_head(
        source, files.folder, compute_dtype=compute_dtype, attn_implementation=attn_implementation
    )
    base = model.base_model
    if base is model or type(base).__name__ != expected.get("architecture"):
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"the language model of {source!r} is built around a {type(base).__name__}, the run's model is a "
            f"{expected.get('architecture')}",
        )
    model.to(device).eval().requires_grad_(False)
    loaded = LanguageModel(model, base, map_model(base), device)
    _check_causal(loaded, source)
    return loaded


def _with_head(source: str, folder: str, *, compute_dtype: str, attn_implementation: str | None) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, compute_dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"model {source!r} cannot be loaded as a language model: {str(error).splitlines()[0]}",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if loading["missing_keys"]:
        names = ", ".join(sorted(loading["missing_keys"])[:3])
        raise InvalidInputError(
            ErrorKind.BAD_MODEL, f"the files of {source!r} have no head that predicts tokens (no {names})"
        )
    return model


def _check_causal(loaded: LanguageModel, source: str) -> None:
    """Raise if a later token changes what is predicted before it."""
    import torch

    n_tokens = int(loaded.base.get_input_embeddings().num_embeddings)
    ids = torch.arange(_PROBE_TOKENS, device=loaded.device)[None] * 7 % n_tokens
    other = ids.clone()
    other[0, -1] = (other[0, -1] + n_tokens // 2) % n_tokens
    with torch.inference_mode():
        a, b = (loaded.logits(x)[0, :-1].float() for x in (ids, other))
    if not float((a - b).abs().max()) <= _PROBE_TOLERANCE * float(a.abs().max()):
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"the model of {source!r} looks ahead: it is no decoder that predicts the next token",
        )
