"""Which model is it, exactly, that computes the activations?

A model is loaded without its head from a local folder or, at a pinned commit, from the Hugging Face hub; from safetensors
files only, and never with code that came along. Weights that the files lack are an error, not random numbers.
"""

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from actstore.errors import ErrorKind, InvalidInputError, MissingDependencyError

from .architectures import ModelMap, map_model
from .dropping import drop_unused_layers, runs_without_layers
from .weights import WeightFiles, config_sha256, find_weights, weights_sha256

if TYPE_CHECKING:
    import torch

COMPUTE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to compute: in evaluation mode, without gradients, cache or head."""

    model: Any
    """The base model, a `transformers.PreTrainedModel`."""
    config: Any
    """Its configuration, a `transformers.PretrainedConfig`."""
    map: ModelMap
    """Where its hook points lie."""
    fingerprint: dict[str, str]
    """What the numbers depend on: architecture, config and weight hashes (or the hub's commit), dtype, attention
    implementation. No paths and no names: the same model elsewhere has the same fingerprint."""
    dtype: str
    """Compute dtype, one of `COMPUTE_DTYPES`."""
    attn_implementation: str
    """`eager`, `sdpa`, ..."""
    revision: str | None
    """Commit hash on the hub; None for a local folder."""
    d_model: int
    """Width of the residual stream."""
    context_length: int | None
    """Most tokens in one window; None where positions are unlimited."""
    vocab_size: int
    """Token ids are below this."""
    compile: bool = False
    """Whether the parts between hooks go through torch.compile; results then differ in their last bits."""

    @property
    def device(self) -> "torch.device":
        """Where input ids go and, for a model on several devices, activations are brought together."""
        import torch

        placed = self._placed
        if not placed:
            device: torch.device = self.model.device
            return device
        return torch.device(next((place for place in placed if place not in ("cpu", "disk")), "cpu"))

    @property
    def is_spread(self) -> bool:
        """Whether weights lie on more than the one device that computes, so that they may come and go in a pass."""
        return len(self._placed) > 1 or "disk" in self._placed

    @property
    def _placed(self) -> list[str]:
        """Where accelerate put the parts of the model; empty where it was not asked."""
        places = (getattr(self.model, "hf_device_map", None) or {}).values()
        return list(dict.fromkeys(f"cuda:{p}" if isinstance(p, int) else str(p) for p in places))


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
    compile: bool = False,
    device_map: str | Mapping[str, int | str] | None = None,
    hook_points: Sequence[str] | None = None,
) -> LoadedModel:
    """Return the base model of `source`, ready to compute.

    Reads a local folder's weights twice: once to hash them, once to load them.

    Args:
        source: A folder with `config.json` and safetensors files, or a name on the hub (`owner/model`).
        revision: Branch, tag or commit on the hub; resolved to a commit, which the fingerprint holds.
        dtype: Compute dtype, `auto` for the one the weights were saved in.
        device: `auto` for the first of CUDA, MPS and CPU that is there.
        attn_implementation: `eager`, `sdpa`, ...; None for what transformers prefers. Recorded.
        cache_dir: Folder of the hub's cache; None for its default.
        offline: Whether to look in that cache only.
        compile: Whether the parts of the model between hook points go through torch.compile (`compiling.py`). The first
            batches take long. Not for models on several devices.
        device_map: Spreads the model over all devices, as accelerate does: `auto`, `balanced`, `balanced_low_0`, `sequential`,
            or module path to device (`cpu` and `disk` too). None for one device, `device`.
        hook_points: What will be captured, names or patterns: layers after the last one needed are left out, which saves their
            memory. None keeps all.

    Raises:
        NotFoundError: no such folder, a hub name that cannot be had, or no such hook point.
        InvalidInputError: not safetensors, weights missing, an unknown or unfit architecture, or a bad argument.
        MissingDependencyError: torch or transformers is not installed.
    """
    if dtype not in ("auto", *COMPUTE_DTYPES):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"compute dtype {dtype!r} is not one of auto, {', '.join(COMPUTE_DTYPES)}"
        )
    _check_placement(device, device_map)
    files = find_weights(source, revision=revision, cache_dir=cache_dir, offline=offline)
    target = pick_device(device)
    model = _from_pretrained(
        source, files, dtype=dtype, attn_implementation=attn_implementation, device_map=device_map
    )
    loaded = _describe(source, model, files, compile=compile)
    dropped = drop_unused_layers(model, loaded.map, hook_points)
    if device_map is None:
        model.to(target)
    if dropped is not None:
        if runs_without_layers(model, loaded.device):
            loaded = replace(loaded, map=loaded.map.without_layers_from(dropped.n_kept))
        else:
            dropped.put_back(model, loaded.device)
    _check_compile(loaded)
    return loaded


def _describe(source: str, model: Any, files: WeightFiles, *, compile: bool) -> LoadedModel:
    """Make the model ready to compute, and say what it is."""
    config = model.config
    compute_dtype = str(model.dtype).removeprefix("torch.")
    if compute_dtype not in COMPUTE_DTYPES:
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"model {source!r} computes in {compute_dtype}: name one of {', '.join(COMPUTE_DTYPES)} as its dtype",
        )
    model.eval().requires_grad_(False)
    text_config = config.get_text_config()
    config.use_cache = text_config.use_cache = False
    implementation = str(config._attn_implementation)
    identity = (
        {"revision": files.commit} if files.commit else {"weights_sha256": weights_sha256(files.weights)}
    )
    return LoadedModel(
        model=model,
        config=config,
        map=map_model(model),
        fingerprint={
            "architecture": type(model).__name__,
            "config_sha256": config_sha256(files.config),
            **identity,
            "dtype": compute_dtype,
            "attn_implementation": implementation,
        },
        dtype=compute_dtype,
        attn_implementation=implementation,
        revision=files.commit,
        d_model=int(text_config.hidden_size),
        context_length=_context_length(model, text_config),
        vocab_size=int(model.get_input_embeddings().num_embeddings),
        compile=compile,
    )


def _check_placement(device: str, device_map: str | Mapping[str, int | str] | None) -> None:
    if device_map is None:
        return
    if device != "auto":
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"device {device!r} and device_map {device_map!r} both say where the model goes: give one of them",
        )
    if find_spec("accelerate") is None:
        raise MissingDependencyError(
            ErrorKind.MISSING_DEPENDENCY,
            "load_model() with a device_map needs accelerate: pip install 'actstore[ingest]'",
        )


def _check_compile(loaded: LoadedModel) -> None:
    if not loaded.compile:
        return
    if loaded.is_spread or not loaded.map.n_layers:
        why = "its weights lie on several devices" if loaded.is_spread else "its layers were not recognised"
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"this {loaded.fingerprint['architecture']} cannot be compiled: {why}; leave compile out",
        )


def _from_pretrained(
    source: str,
    files: WeightFiles,
    *,
    dtype: str,
    attn_implementation: str | None,
    device_map: str | Mapping[str, int | str] | None,
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

    placement: dict[str, Any] = {}
    model = None
    if device_map is not None:
        # For weights that have to be rewritten before they can be read from disk; mostly it stays empty.
        folder = tempfile.mkdtemp(prefix="actstore-offload-")
        placement = {
            "device_map": device_map if isinstance(device_map, str) else dict(device_map),
            "offload_folder": folder,
        }
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True)
        if getattr(config, "is_encoder_decoder", False):
            raise InvalidInputError(
                ErrorKind.BAD_MODEL,
                f"model {source!r} ({config.model_type}) has an encoder and a decoder, and a row is one token of one"
                " stack: use a decoder-only or an encoder-only model",
            )
        with _quiet_transformers():
            model, loading = AutoModel.from_pretrained(
                files.folder,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **placement,
            )
    except InvalidInputError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"model {source!r} cannot be loaded: {error}. It must be of an architecture that the installed transformers"
            " has, with safetensors weights and no code of its own; check its files and the arguments",
        ) from error
    finally:
        if placement and model is None:
            shutil.rmtree(folder, ignore_errors=True)
        elif placement:
            weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    _check_complete(source, model, set(loading["missing_keys"]))
    return model


def _check_complete(source: str, model: Any, missing: set[str]) -> None:
    """Raise if weights were made up. A missing pooler, which language-model checkpoints of BERT lack, is taken off."""
    made_up = sorted(name for name in missing if not name.startswith("pooler."))
    if made_up:
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"the files of model {source!r} lack {len(made_up)} of its weights ({', '.join(made_up[:3])}, ...), which"
            " would be random numbers: its config.json and its safetensors files must belong together",
        )
    if missing:
        model.pooler = None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep progress bars and the report of unused head weights off the terminal; put back what was set."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def pick_device(device: str) -> "torch.device":
    """Return the torch device of a name; `auto` takes a GPU where there is one.

    Raises:
        InvalidInputError: it cannot be used here.
    """
    import torch

    if device == "auto":
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"device {device!r} cannot be used here ({error}): use auto, cpu, cuda, cuda:1 or mps",
        ) from error
    return target


def _context_length(model: Any, text_config: Any) -> int | None:
    length = getattr(text_config, "max_position_embeddings", None)
    if not length:
        return None
    # RoBERTa's positions start behind its padding index, so that many rows of the table are never used.
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return int(length) - (padding + 1 if padding is not None else 0)
