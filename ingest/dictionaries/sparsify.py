"""How is a dictionary of EleutherAI's sparsify read? `cfg.json` and `sae.safetensors` in a folder named after the module.

Conventions checked against eai-sparsify 1.3.3: codes are max(W x' + b, 0) of the k largest latents, or of the largest of each of
k groups (`groupmax`); x' is x - b_dec, of a transcoder x itself. An autoencoder reads and writes the module's output, a
transcoder reads the module's input and writes its output.
"""

import re
from typing import Any

from actstore.dictionary_data import DictionaryData, make_dictionary

from .foreign import Notes, Settings, Tensors, Wanted, place, refuse
from .locate import SourceFiles, cfg_info

_LAYER = re.compile(r"(?:layers|h)\.(\d+)(\.mlp)?")


def read_sparsify(files: SourceFiles, wanted: Wanted, _notes: Notes) -> DictionaryData:
    """Return the dictionary that sparsify's files hold.

    Raises:
        InvalidInputError: a setting that is not known, files that do not fit each other, or no hook point.
    """
    cfg = Settings(files.config, f"cfg.json of {files.folder}")
    if cfg.flag("signed", False):
        refuse("cfg.json says signed", "codes that may be negative cannot be stored")
    if wanted.norm_factor is not None:
        refuse("a factor was given, and sparsify does not normalise activations", "leave the factor out")
    activation = cfg.text("activation", "topk") or ""
    if activation not in ("topk", "groupmax"):
        refuse(f"activation {activation!r:.80} of cfg.json is not known", "known are topk and groupmax")
    transcode = cfg.flag("transcode", False)
    d_in = cfg.whole("d_in")
    n_latents = (
        cfg.whole("num_latents") if cfg.values.get("num_latents") else d_in * cfg.whole("expansion_factor")
    )
    weights = _weights(Tensors(files.weights), d_in, n_latents, skip=cfg.flag("skip_connection", False))
    source, out = _places(files.folder, wanted, transcode=transcode)
    return make_dictionary(
        weights,
        activation=activation,
        kind="transcoder" if transcode else "sae",
        hook_point=source,
        hook_point_out=out,
        k=cfg.whole("k"),
        apply_b_dec_to_input=not transcode,
        normalize={"kind": "none", **({"center": True} if wanted.center else {})},
        source={"format": "sparsify", "hookpoint": files.folder},
        info=cfg_info(files.config),
    )


def _weights(tensors: Tensors, d_in: int, n_latents: int, *, skip: bool) -> dict[str, Any]:
    # Two matrices decide what comes out; rows of both are latents, so that the encoder must be turned.
    weights = {
        "W_enc": tensors.take("encoder.weight", (n_latents, d_in), transpose=True),
        "b_enc": tensors.take("encoder.bias", (n_latents,)),
        "W_dec": tensors.take("W_dec", (n_latents, d_in)),
        "b_dec": tensors.take("b_dec", (d_in,)),
    }
    if skip:
        weights["W_skip"] = tensors.take("W_skip", (d_in, d_in), transpose=True)
    tensors.ignore(["fired"])
    tensors.check_all_taken("sparsify")
    return weights


def _places(folder: str, wanted: Wanted, *, transcode: bool) -> tuple[str, str | None]:
    """Return where the rows come from, and where a transcoder's output belongs."""
    if not transcode:
        return place(folder, wanted.hook_point, what="sparsify's folder"), None
    source, out = folder, folder
    if layer := _LAYER.fullmatch(folder):
        source, out = (
            f"layers.{layer[1]}.{p}"
            for p in (("mlp_in", "mlp_out") if layer[2] else ("resid_pre", "resid_post"))
        )
    reads = place(source, wanted.hook_point, what="sparsify's folder")
    if reads.endswith(":output") and wanted.hook_point is None:
        reads = reads.removesuffix("output") + "input"
    if wanted.hook_point_out is None and wanted.hook_point is not None and not layer:
        return reads, None
    return reads, place(out, wanted.hook_point_out, what="sparsify's folder", option="--hook-point-out")
