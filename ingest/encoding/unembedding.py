"""Through which matrix does a run's model turn its residual stream into logits, and where does it lie on disk?

A model that can be asked has one linear map, without layers of its own, behind its final norm. It is found by building the
model's architecture without memory for weights and looking for its output embeddings, which may be its input embeddings
again, and is read from the model's own safetensors files, whose fingerprint must be the run's. What the final norm does to a
direction, a gain for each dimension and maybe taking off the mean, is measured on the norm itself, whatever its class.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from actstore.errors import ConflictError, ErrorKind, InvalidInputError
from actstore.hook_points import parse_hook_point
from actstore.ingest.architectures import map_model
from actstore.ingest.weights import WeightFiles, config_sha256, find_weights, weights_sha256
from actstore.run import Run

if TYPE_CHECKING:
    from actstore.dictionary import Dictionary

RESIDUAL_PARTS: Final = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "final_norm")
"""Hook points whose rows are the residual stream, what is added to it, or (`final_norm`) what the unembedding reads."""

_OLD_HEADS: Final = ("embed_out",)
"""What files call a head that transformers calls otherwise once it is loaded: GPT-NeoX."""

_PROBE_SCALE: Final = 1e3
"""Size of the numbers that a norm is probed with: its epsilon, at most 1e-5, is then below float32's resolution."""

_PROBE_TOLERANCE: Final = 1e-3
"""Relative difference up to which a norm counts as a gain times a normalised vector: float32 rounds to 1e-6."""


@dataclass(frozen=True, slots=True, eq=False)
class Unembedding:
    """Where a model's unembedding lies, and what the final norm makes of a direction before it; pickles."""

    path: str
    """A safetensors file."""
    tensor: str
    """Name of the matrix in it, shape (n_tokens, d_model)."""
    n_tokens: int
    """Token ids that the matrix has rows for."""
    norm: str
    """`layer` (takes the mean off), `rms`, or `none` where nothing lies between the hook point and the matrix."""
    gain: npt.NDArray[np.float32]
    """What the norm multiplies each dimension by, shape (d_model,)."""

    def folded(self, directions: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return directions of the residual stream, shape (n, d_model), as the matrix meets them.

        The norm's division by the length of the whole stream is left out: it is a positive number that no direction decides.
        """
        if self.norm == "layer":
            directions = directions - directions.mean(axis=1, keepdims=True)
        return directions * self.gain

    def to_json(self) -> dict[str, Any]:
        """Return what a configuration says of it."""
        return {"tensor": self.tensor, "norm": self.norm, "n_tokens": self.n_tokens}


def find_unembedding(run: Run, dictionary: "Dictionary") -> Unembedding:
    """Return what turns the directions of a dictionary's decoder into logits of the run's model.

    Reads a local model's weights once, to hash them, and keeps none of them.

    Raises:
        InvalidInputError: there is no such thing: the run was imported, the decoder does not write to the residual stream, the
            architecture has no single linear head, or the files do not hold it.
        NotFoundError: the model cannot be had where the run's was.
        ConflictError: CONFIG_DIFFERS: the model that is there is not the run's.
        MissingDependencyError: torch or transformers is not installed.
    """
    model = run.model
    if "imported" in model:
        raise _no_logits(f"run {run.id!r} was imported from another program's activations and has no model")
    if not model.get("source"):
        raise _no_logits(f"run {run.id!r} does not say where its model is")
    if dictionary.kind != "sae" and dictionary.hook_point_out is None:
        raise _no_logits("it is not known where what it decodes to belongs")
    hook_point = dictionary.hook_point_out or dictionary.hook_point
    point = parse_hook_point(hook_point)
    if point.part not in RESIDUAL_PARTS:
        raise _no_logits(f"{hook_point!r} is not in the residual stream, which the unembedding reads")
    files = find_weights(str(model["source"]), revision=model.get("revision"), cache_dir=None, offline=False)
    _check_model(files, model)
    skeleton = _skeleton(files, str(model["source"]))
    tensors = _tensor_files(files)
    path, tensor, shape = _head(skeleton, tensors)
    if shape[1] != dictionary.d_out:
        raise _no_logits(
            f"the decoder has {dictionary.d_out} dimensions and the model's unembedding {tensor!r} {shape[1]}"
        )
    if point.part == "final_norm":
        norm, gain = "none", np.ones(shape[1], np.float32)
    else:
        norm, gain = _final_norm(skeleton, tensors, shape[1])
    return Unembedding(path, tensor, shape[0], norm, gain)


def _check_model(files: WeightFiles, expected: Mapping[str, Any]) -> None:
    found = {"config_sha256": config_sha256(files.config)}
    if files.commit:
        found["revision"] = files.commit
    else:
        found["weights_sha256"] = weights_sha256(files.weights)
    for name, value in found.items():
        if expected.get(name) != value:
            raise ConflictError(
                ErrorKind.CONFIG_DIFFERS,
                f"the model at {expected['source']!r} is not the one that the run's activations come from: {name} is {value!r}, "
                f"the run's {expected.get(name)!r}. Put the run's model there",
            )


def _skeleton(files: WeightFiles, source: str) -> Any:
    """Return the model with its head, without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True)
        with _quiet_transformers(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError, RuntimeError, OSError) as error:
        raise _no_logits(
            f"model {source!r} has no form that predicts the next token: {str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep advice on how such models should be used off the terminal."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _tensor_files(files: WeightFiles) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return file and shape of every stored tensor."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for path in files.weights:
        try:
            with safe_open(str(path), framework="np") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    found[name] = (str(path), tuple(file.get_slice(name).get_shape()))
        except SafetensorError as error:
            raise InvalidInputError(
                ErrorKind.BAD_MODEL, f"{path.name} of the model is not a whole safetensors file ({error})"
            ) from error
    return found


def _head(
    skeleton: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[str, str, tuple[int, ...]]:
    """Return file, name and shape of the output embeddings, or of the input embeddings that they are tied to."""
    head = skeleton.get_output_embeddings()
    weight = getattr(head, "weight", None)
    name = _path_of(skeleton, head)
    if name is None or weight is None or weight.ndim != 2:
        raise _no_logits(f"{type(skeleton).__name__} has no output embeddings")
    others = [
        part
        for part, child in skeleton.named_children()
        if part != name and any(True for _ in child.parameters())
    ]
    if "." in name or len(others) != 1:  # besides the base model, parts of the head
        raise _no_logits(f"the head of {type(skeleton).__name__} has layers of its own before {name!r}")
    tied = skeleton.get_input_embeddings()
    names = [name] + ([_path_of(skeleton, tied)] if tied is not None and tied.weight is weight else [])
    for candidate in (*names, *_OLD_HEADS):
        key = _stored_name(skeleton, f"{candidate}.weight", tensors)
        if key is not None and len(tensors[key][1]) == 2:
            return tensors[key][0], key, tensors[key][1]
    raise _no_logits(f"its files hold no {' and no '.join(f'{n}.weight' for n in names)}")


def _final_norm(
    skeleton: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]], d_model: int
) -> tuple[str, npt.NDArray[np.float32]]:
    """Return the kind of norm between the residual stream and the head, and its gains."""
    base = skeleton.base_model
    mapped = map_model(base)
    site = mapped.sites.get("final_norm")
    if site is None:
        if any(layer.kind == "post_norm" for layer in mapped.layers):
            return "none", np.ones(d_model, np.float32)
        raise _no_logits(f"{mapped.absent.get('final_norm', 'no final norm was recognised')}")
    norm = base.get_submodule(site.path)
    path = _path_of(skeleton, norm)
    assert path is not None
    norm.to_empty(device="cpu")
    weights = {}
    for name in norm.state_dict():
        key = _stored_name(skeleton, f"{path}.{name}", tensors)
        if key is None:
            raise _no_logits(f"its files hold no {path}.{name}")
        weights[name] = _read(tensors[key][0], key)
    norm.load_state_dict(weights)
    return measure_norm(norm.float().eval(), d_model, path)


def measure_norm(norm: Any, d_model: int, path: str) -> tuple[str, npt.NDArray[np.float32]]:
    """Return what a norm is, `layer` or `rms`, and its gain for each dimension, from what it makes of four vectors.

    Raises:
        InvalidInputError: it is neither.
    """
    import torch

    signs = torch.ones(d_model)
    signs[1::2] = -1
    signs -= signs.mean()
    random = torch.randn(d_model, generator=torch.Generator().manual_seed(0))
    probes = torch.stack([torch.zeros(d_model), signs, signs + 0.5, random]) * _PROBE_SCALE
    with torch.inference_mode():
        out = norm(probes).float()
    out = out - out[0]

    def normalised(vector: Any, centre: bool) -> Any:
        vector = vector - vector.mean() if centre else vector
        return vector / vector.square().mean().sqrt()

    gain = out[1] / normalised(probes[1], centre=False)
    for kind, centre in (("layer", True), ("rms", False)):
        expected = torch.stack([gain * normalised(vector, centre) for vector in probes[2:]])
        if torch.allclose(
            out[2:], expected, rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE * float(gain.abs().max())
        ):
            return kind, gain.numpy().astype(np.float32)
    raise _no_logits(f"its final norm {path!r} is neither a LayerNorm nor an RMSNorm")


def _stored_name(skeleton: Any, name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """Return the name of a parameter in the files: checkpoints are saved with and without the base model's prefix."""
    prefix = f"{skeleton.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in tensors:
            return candidate
    tail = "." + ".".join(name.split(".")[-2:])
    alike = [key for key in tensors if key.endswith(tail)]
    return alike[0] if len(alike) == 1 else None


def _path_of(model: Any, wanted: Any) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None)


def _read(path: str, tensor: str) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(tensor)


def _no_logits(reason: str) -> InvalidInputError:
    return InvalidInputError(
        ErrorKind.BAD_MODEL, f"there are no logits for this dictionary's decoder: {reason}"
    )
