"""How is a dictionary of SAELens read? `cfg.json` and `sae_weights.safetensors`, of any version so far.

Conventions checked against sae-lens 6.54.12: what its classes' `encode` computes from the files is what the codes are. Rows are
normalised as the configuration says; of `expected_average_only_in` the factor is not in these files (exports have it in
their weights), and SAELens computes without it unless it is told. Configurations from before version 6 have other names for
some settings, and defaults of their own.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from actstore.dictionary_data import DictionaryData, make_dictionary

from .foreign import FloatArray, Notes, Settings, Tensors, Wanted, place, refuse
from .locate import SourceFiles, cfg_info

_ARCHITECTURES = {
    "standard": ("sae", "relu"),
    "gated": ("sae", "gated"),
    "topk": ("sae", "topk"),
    "jumprelu": ("sae", "jumprelu"),
    "batchtopk": ("sae", "batchtopk"),
    "matryoshka_batchtopk": ("sae", "batchtopk"),
    "transcoder": ("transcoder", "relu"),
    "skip_transcoder": ("transcoder", "relu"),
    "jumprelu_transcoder": ("transcoder", "jumprelu"),
    "jumprelu_skip_transcoder": ("transcoder", "jumprelu"),
}
"""Kind and activation. The batch variants occur in checkpoints only: what is exported of them is jumprelu."""

_NOT_CODES = {
    "abstopk": "its codes may be negative",
    "matching_pursuit": "it encodes by steps, not by one product",
    "temporal": "its codes depend on other rows",
}

_EPS = 1e-5
"""What SAELens adds to the standard deviation; its configuration does not have it."""


def read_saelens(files: SourceFiles, wanted: Wanted, notes: Notes) -> DictionaryData:
    """Return the dictionary that SAELens's files hold.

    Raises:
        InvalidInputError: an architecture or a setting that is not known, files that do not fit each other, or no hook point.
    """
    cfg = Settings(_modern(files.config), f"cfg.json of {files.folder}")
    metadata = cfg.part("metadata") if "metadata" in cfg.values else cfg
    architecture = cfg.text("architecture", "standard") or ""
    kind, activation = _kind_of(architecture)
    tensors = Tensors(files.weights)
    weights = _weights(tensors, cfg, architecture, kind, activation)
    options: dict[str, Any] = {"k": _k(cfg, activation)}
    if activation in ("topk", "batchtopk"):
        options["rescale_acts_by_decoder_norm"] = cfg.flag("rescale_acts_by_decoder_norm", False)
    subtracts = cfg.flag("apply_b_dec_to_input", kind == "sae")
    if subtracts and kind == "transcoder":
        refuse(
            "cfg.json says apply_b_dec_to_input of a transcoder", "SAELens has no such thing; export it again"
        )
    if metadata.values.get("hook_head_index") is not None:
        refuse(
            f"the dictionary was trained on head {metadata.values['hook_head_index']} of its hook point alone",
            "rows of one head are not stored; nothing can be encoded in it",
        )
    if (metadata.part("model_from_pretrained_kwargs")).values.get(
        "center_writing_weights"
    ) and not wanted.center:
        notes.lines.append(
            "it was trained on a model whose writing weights TransformerLens centred: the residual stream of the plain model "
            "differs by each row's mean; import it with --center (center=True) to have that taken away first"
        )
    if kind == "transcoder":
        options["hook_point_out"] = _place_out(metadata, wanted)
    name = metadata.text("model_name")
    return make_dictionary(
        weights,
        activation=activation,
        kind=kind,
        hook_point=place(metadata.text("hook_name"), wanted.hook_point, what="cfg.json"),
        apply_b_dec_to_input=subtracts,
        normalize=_normalize(cfg, files, wanted, notes),
        prepend_bos=metadata.flag("prepend_bos", True)
        if metadata.values.get("prepend_bos") is not None
        else None,
        model=None if name is None else {"name": name},
        source={"format": "saelens", "architecture": architecture},
        info=cfg_info(files.config),
        **options,
    )


def _modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the names and defaults of version 6, whichever it was written by."""
    metadata = config.get("metadata")
    version = config.get("sae_lens_version") or (
        metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    )
    if isinstance(version, str) and re.fullmatch(r"[6-9]|[1-9][0-9]+", version.split(".")[0]):
        return dict(config)
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    new = {renamed.get(name, name): value for name, value in config.items()}
    if isinstance(metadata, dict):
        new = {**new, **{k: v for k, v in metadata.items() if k not in new}}
        del new["metadata"]
    new.setdefault("prepend_bos", True)
    function = new.get("activation_fn") or "relu"
    if function == "topk":
        kwargs = new.get("activation_fn_kwargs")
        new["architecture"] = "topk"
        new["k"] = kwargs.get("k") if isinstance(kwargs, dict) else None
    elif function != "relu":
        refuse(f"activation_fn of cfg.json is {function!r:.80}", "only relu and topk are known")
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if new["normalize_activations"] else "none"
    return new


def _kind_of(architecture: str) -> tuple[str, str]:
    if architecture in _NOT_CODES:
        refuse(f"architecture {architecture!r} is not supported", _NOT_CODES[architecture])
    if architecture not in _ARCHITECTURES:
        refuse(
            f"architecture {architecture!r:.80} of cfg.json is not known",
            f"known are {', '.join(_ARCHITECTURES)}",
        )
    return _ARCHITECTURES[architecture]


def _k(cfg: Settings, activation: str) -> int | float | None:
    if activation == "topk":
        return cfg.whole("k")
    value = cfg.values.get("k") if activation == "batchtopk" else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _weights(
    tensors: Tensors, cfg: Settings, architecture: str, kind: str, activation: str
) -> dict[str, FloatArray]:
    d_in, n_latents = cfg.whole("d_in"), cfg.whole("d_sae")
    d_out = cfg.whole("d_out") if kind == "transcoder" else d_in
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, n_latents),
        "W_dec": (n_latents, d_out),
        "b_dec": (d_out,),
    }
    names = ("b_gate", "r_mag", "b_mag") if activation == "gated" else ("b_enc",)
    shapes |= dict.fromkeys(names, (n_latents,))
    weights = {name: tensors.take(name, shape) for name, shape in shapes.items()}
    if activation == "jumprelu":
        weights["threshold"] = _threshold(tensors, n_latents)
    elif activation == "batchtopk":
        weights["threshold"] = np.array(tensors.scalar("topk_threshold"), np.float32)
    if "skip" in architecture:
        weights["W_skip"] = tensors.take("W_skip", (d_out, d_in), transpose=True)
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors and not np.allclose(tensors.take(name, (n_latents,)), 1):
            refuse(
                f"the weights have a {name}", "fold it into W_dec with the version of SAELens that trained it"
            )
    tensors.check_all_taken(f"architecture {architecture!r}")
    return weights


def _threshold(tensors: Tensors, n_latents: int) -> FloatArray:
    if "threshold" not in tensors and "log_threshold" in tensors:
        return np.exp(tensors.take("log_threshold", (n_latents,)))
    return tensors.take("threshold", (n_latents,))


def _normalize(cfg: Settings, files: SourceFiles, wanted: Wanted, notes: Notes) -> dict[str, Any]:
    how = cfg.text("normalize_activations", "none")
    factor = wanted.norm_factor
    center = {"center": True} if wanted.center else {}
    if factor is not None and how not in ("expected_average_only_in", "constant_scalar_rescale"):
        refuse(f"a factor was given, and cfg.json normalises activations by {how!r}", "leave the factor out")
    if how == "constant_norm_rescale":
        return {"kind": "constant_norm", **center}
    if how == "layer_norm":
        return {"kind": "layer_norm", "eps": _EPS, **center}
    if how == "expected_average_only_in":
        if factor is None and files.scaler is not None:
            factor = files.scaler.get("scaling_factor")
        if factor is None:
            notes.lines.append(
                "cfg.json says expected_average_only_in, and its factor is not there: codes are computed of plain rows, as "
                "SAELens computes them; give --norm-factor if training scaled rows by one"
            )
            return {"kind": "none", **center}
        return {"kind": "scale", "factor": factor, **center}
    if how == "constant_scalar_rescale":
        factor = cfg.values.get("activation_normalization_factor") if factor is None else factor
        return {"kind": "scale", "factor": factor, **center}
    if how != "none":
        refuse(
            f"activations are normalised by {how!r:.80}, which is not in these files",
            "export it with save_inference_model(), which folds it into the weights",
        )
    return {"kind": "none", **center}


def _place_out(metadata: Settings, wanted: Wanted) -> str | None:
    name = metadata.text("hook_name_out")
    if name is None and wanted.hook_point_out is None:
        return None
    return place(name, wanted.hook_point_out, what="cfg.json", option="--hook-point-out")
