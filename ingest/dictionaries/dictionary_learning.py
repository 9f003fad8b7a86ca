"""How is a dictionary of dictionary_learning read? `config.json` and, instead of the pickled `ae.pt`, `ae.safetensors`.

Conventions checked against dictionary-learning 0.1.0, its `load_dictionary` and each class's `encode` as it is called without
options: AutoEncoder's decoder is normalised when it is loaded, which scales codes by the decoder's norms; AutoEncoderTopK takes
the k largest, BatchTopKSAE and MatryoshkaBatchTopKSAE what is above one threshold.
"""

import re
from typing import Any

import numpy as np

from actstore.dictionary import row_norms
from actstore.dictionary_data import DictionaryData, make_dictionary

from .foreign import FloatArray, Notes, Settings, Tensors, Wanted, place, refuse
from .locate import SourceFiles, cfg_info

_SUBMODULE = re.compile(
    r"(resid_pre|resid_mid|resid_post|attn_out|attention_out|mlp_out|mlp_in)_layer_?(\d+)"
)
_ACTIVATIONS = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
}
_NAMES = {
    "W_enc": ("W_enc", "encoder.weight"),
    "W_dec": ("W_dec", "decoder.weight"),
    "b_enc": ("b_enc", "encoder.bias"),
    "b_dec": ("b_dec", "bias", "decoder_bias", "decoder.bias"),
}
"""What the classes call their weights; matrices of `nn.Linear` are the other way round."""


def read_dictionary_learning(files: SourceFiles, wanted: Wanted, notes: Notes) -> DictionaryData:
    """Return the dictionary that dictionary_learning's files hold.

    Raises:
        InvalidInputError: a class that is not known, files that do not fit each other, or no hook point.
    """
    trainer = Settings(files.config, f"config.json of {files.folder}").part("trainer")
    if wanted.norm_factor is not None:
        refuse(
            "a factor was given, and dictionary_learning saves its weights for plain rows",
            "leave the factor out",
        )
    name = trainer.text("dict_class", "") or ""
    if name not in _ACTIVATIONS:
        refuse(f"dict_class {name!r:.80} of config.json is not known", f"known are {', '.join(_ACTIVATIONS)}")
    activation = _ACTIVATIONS[name]
    tensors = Tensors(files.weights)
    weights = _weights(tensors, trainer, activation)
    # Its loader leaves a decoder alone that is normalised up to numpy's tolerance.
    rescale = name == "AutoEncoder" and not np.allclose(row_norms(weights["W_dec"]), 1)
    k = None
    if activation in ("topk", "batchtopk"):
        k = trainer.whole("k")
        if "k" in tensors and tensors.scalar("k") != k:
            refuse(
                f"k is {k} in config.json and {tensors.scalar('k'):g} in the weights",
                "the files do not belong together",
            )
        if activation == "batchtopk" and weights["threshold"] < 0:
            notes.lines.append("its threshold was never set in training: every latent above 0 is a code")
    tensors.check_all_taken(name)
    model = trainer.text("lm_name")
    return make_dictionary(
        weights,
        activation=activation,
        hook_point=_place(trainer, wanted),
        k=k,
        apply_b_dec_to_input=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        rescale_acts_by_decoder_norm=rescale,
        normalize={"kind": "none", **({"center": True} if wanted.center else {})},
        model=None if model is None else {"name": model},
        source={"format": "dictionary_learning", "dict_class": name},
        info=cfg_info(files.config),
    )


def _weights(tensors: Tensors, trainer: Settings, activation: str) -> dict[str, FloatArray]:
    d_in, n_latents = _widths(tensors, trainer)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, n_latents),
        "W_dec": (n_latents, d_in),
        "b_dec": (d_in,),
    }
    if activation != "gated":
        shapes["b_enc"] = (n_latents,)
    weights: dict[str, Any] = {}
    for name, shape in shapes.items():
        found = next((n for n in _NAMES[name] if n in tensors), _NAMES[name][0])
        turned = found.endswith(".weight")
        weights[name] = tensors.take(found, shape[::-1] if turned else shape, transpose=turned)
    if activation == "gated":
        for name, found in (("b_gate", "gate_bias"), ("r_mag", "r_mag"), ("b_mag", "mag_bias")):
            weights[name] = tensors.take(found, (n_latents,))
    elif activation == "batchtopk":
        weights["threshold"] = np.array(tensors.scalar("threshold"), np.float32)
    elif activation == "jumprelu":
        weights["threshold"] = tensors.take("threshold", (n_latents,))
    else:
        tensors.ignore(["threshold"])  # that of AutoEncoderTopK is for another way to encode
    tensors.ignore(["group_sizes"])
    return weights


def _widths(tensors: Tensors, trainer: Settings) -> tuple[int, int]:
    """Return d_in and n_latents: those of the configuration where it has them, else the weights'."""
    shape = tensors.shape("W_enc") if "W_enc" in tensors else tensors.shape("encoder.weight")[::-1]
    if len(shape) != 2:
        refuse(
            f"the encoder of {tensors.what} has shape {list(shape)}, not that of a matrix", "export it again"
        )
    names = ("activation_dim", "dict_size")
    d_in, n_latents = (
        trainer.whole(n) if trainer.values.get(n) is not None else s
        for n, s in zip(names, shape, strict=True)
    )
    return d_in, n_latents


def _place(trainer: Settings, wanted: Wanted) -> str:
    name = trainer.text("submodule_name")
    known = None if name is None else _SUBMODULE.fullmatch(name)
    if known is not None:
        name = f"layers.{known[2]}.{known[1].replace('attention', 'attn')}"
    return place(name, wanted.hook_point, what="config.json (trainer.submodule_name)")
