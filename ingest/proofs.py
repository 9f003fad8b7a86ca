"""Do the activations at a model's hook points hang together as their names say?

Each kind of place has its proof, on one pass over a few tokens, and what fails its proof is refused:

| places | proof |
|---|---|
| attn_out, mlp_out, resid_mid | the branches add up to resid_mid and resid_post, in post-norm layers through their norms |
| mlp_act, attn_z | through its projection (and the branch's norm) it is mlp_out, attn_out |
| mlp_in | it is the norm of resid_mid (of resid_pre in parallel blocks), or that itself where there is no norm |
| router | it is mlp_in times the router's weights, plus its bias |
| final_norm | it is the model's last_hidden_state, and the norm of the last resid_post |

`embed`, `resid_pre`, `resid_post` and `module:` places are what they are by definition. Sums must agree as rounding explains,
everything else within a tolerance per row; rows that are not finite are left out, since broken weights are the caller's to
report. The model runs eagerly here, whether it is to be compiled or not.
"""

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.errors import ErrorKind, InvalidInputError
from actstore.hook_points import parse_hook_point

from .capture import Capturer, probe_ids
from .models import LoadedModel

if TYPE_CHECKING:
    import torch

_PROBE_SHAPE = (2, 13)

_ADDITION_ROUNDINGS = 4
"""Half-units in the last place, per summed term: the model rounds after each of two or three additions."""

_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest difference of a row from what it should be, as a part of its norm. Rounding gives about 1e-6, 1e-3 and 1e-2, more
where the terms of a product cancel; another place, or a value after softmax, differs by about 1."""

_SUMS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
_NEEDS_SUMS = ("attn_out", "resid_mid", "mlp_out", "mlp_act", "attn_z")
"""Parts that are refused when the layer does not add up: what is proved of mlp_act and attn_z ends in mlp_out and attn_out."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One proof: how far the numbers were off, as a part of what is allowed (at most 1 where it holds)."""

    excess: float
    said: str
    """What should have been equal, for the error."""


def prove(loaded: LoadedModel, names: Sequence[str]) -> float | None:
    """Return the largest difference in the sums of the asked layers, as a part of what rounding explains.

    None where no asked layer adds up by design (post-norm) or its branches are unknown.

    Raises:
        InvalidInputError: SELF_TEST_FAILED: a place that was asked for is not what its name says.
    """
    points = [parse_hook_point(name) for name in names]
    asked = {i: {p.part for p in points if p.layer == i} for i in {p.layer for p in points} if i is not None}
    wants_final = any(p.part == "final_norm" for p in points)
    seen = _probe(loaded, _hooks(loaded, asked, wants_final))
    worst: float | None = None
    for i in sorted(asked):
        acts = {
            part: seen[f"layers.{i}.{part}"]
            for part in loaded.map.layers[i].places
            if f"layers.{i}.{part}" in seen
        }
        findings = _layer_findings(loaded, i, acts, asked[i])
        for part in sorted(asked[i] & findings.keys()):
            _refuse_if_wrong(loaded, i, part, findings[part])
        sums = findings.get("sums")
        if sums is not None and loaded.map.layers[i].kind != "post_norm":
            worst = max(worst or 0.0, sums.excess)
    if wants_final:
        _prove_final_norm(loaded, seen)
    return worst


def _hooks(loaded: LoadedModel, asked: Mapping[int, set[str]], wants_final: bool) -> list[str]:
    """Return the asked layers' places that the proofs read."""
    wanted = {f"layers.{i}.{part}" for i, parts in asked.items() for part in (*_SUMS, "mlp_in", *parts)}
    if wants_final:
        wanted |= {"final_norm", f"layers.{loaded.map.n_layers - 1}.resid_post"}
    return [name for name in loaded.map.sites if name in wanted]


def _probe(loaded: LoadedModel, names: Sequence[str]) -> dict[str, "torch.Tensor"]:
    """Return the hook points' activations as the model makes them, and `last_hidden_state`."""
    seen = dict[str, "torch.Tensor"]()
    if not names:
        return seen

    def keep_result(_module: Any, _args: Any, output: Any) -> None:
        seen["last_hidden_state"] = output[0].clone()

    n_tokens = min(_PROBE_SHAPE[1], loaded.context_length or _PROBE_SHAPE[1])
    capturer = Capturer(loaded, names)
    handle = loaded.model.register_forward_hook(keep_result)
    try:
        # Copied at once: models change some of them in place.
        with capturer.hooked(
            lambda name, x: seen.update({name: x.clone()}), to_the_end="final_norm" in names, eager=True
        ) as run:
            run(probe_ids(loaded, (_PROBE_SHAPE[0], n_tokens)), None)
    finally:
        handle.remove()
    return seen


def _layer_findings(
    loaded: LoadedModel, layer: int, acts: Mapping[str, "torch.Tensor"], asked: set[str]
) -> dict[str, Finding]:
    """Return part -> the proof that it rests on and that failed, or the last one; and `sums`."""
    sums = _sum_finding(loaded, layer, acts)
    if sums is None:
        return {}
    findings = dict.fromkeys((*_NEEDS_SUMS, "sums"), sums)
    checks = {
        "mlp_act": ("mlp_projection", "mlp_out_norm", "mlp_out"),
        "attn_z": ("attn_projection", "attn_norm", "attn_out"),
    }
    for part, (projection, norm, result) in checks.items():
        if part not in asked or findings[part].excess > 1:
            continue
        through = _through(loaded, layer, norm, _through(loaded, layer, projection, acts[part]))
        findings[part] = _same(loaded, through, acts[result], f"{part} through {projection} is not {result}")
    if "mlp_in" in asked or "router" in asked:
        before = "resid_pre" if loaded.map.layers[layer].kind == "parallel" else "resid_mid"
        # Where the norm is not known, mlp_in is the input of the module that the sums prove to be the MLP.
        findings["mlp_in"] = sums
        if before in acts:
            normed = _through(loaded, layer, "mlp_norm", acts[before])
            findings["mlp_in"] = _same(loaded, normed, acts["mlp_in"], f"the norm of {before} is not mlp_in")
    if "router" in asked:
        logits = _router_logits(loaded, layer, acts["mlp_in"])
        said = "mlp_in times the router's weights is not what the router returns"
        findings["router"] = Finding(float("inf"), said)
        if logits is not None:
            findings["router"] = _same(loaded, logits, acts["router"], said)
    return findings


def _sum_finding(loaded: LoadedModel, layer: int, acts: Mapping[str, "torch.Tensor"]) -> Finding | None:
    """Return how well the layer's branches add up; None where not all of them are known."""
    kind = loaded.map.layers[layer].kind
    if not {"resid_pre", "attn_out", "mlp_out", "resid_post"} <= acts.keys():
        return None
    pre, attn, mlp, post = (acts[part] for part in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
    if kind == "post_norm":
        mid = acts["resid_mid"]
        first = _through(loaded, layer, "attn_sum_norm", pre + attn.view_as(pre))
        second = _through(loaded, layer, "mlp_sum_norm", mid + mlp.view_as(mid))
        said = "the norm of resid_pre + attn_out is not resid_mid, or that of resid_mid + mlp_out not resid_post,"
        return max(_same(loaded, first, mid, said), _same(loaded, second, post, said), key=lambda f: f.excess)
    whole = Finding(
        _rounding([pre, attn, mlp], post, loaded.dtype),
        "resid_pre + attn_out + mlp_out differs from resid_post",
    )
    if kind != "sequential":
        return whole
    mid = acts["resid_mid"]
    half = Finding(_rounding([pre, attn], mid, loaded.dtype), "resid_pre + attn_out differs from resid_mid")
    return max(whole, half, key=lambda f: f.excess)


def _rounding(terms: Sequence["torch.Tensor"], total: "torch.Tensor", dtype: str) -> float:
    """Return the largest |sum of terms - total| as a part of what rounding each sum can make of it."""
    import torch

    parts, result = [_wide(term).reshape(-1) for term in terms], _wide(total).reshape(-1)
    unit = torch.finfo(getattr(torch, dtype)).eps / 2
    added, absolute = torch.zeros_like(result), result.abs()
    for part in parts:
        added, absolute = added + part, absolute + part.abs()
    error = (added - result).abs()
    ratio = torch.where(error == 0, 0.0, error / (_ADDITION_ROUNDINGS * unit * absolute))
    # Not finite: a NaN or an infinity in the terms, or 0 / 0.
    return float(ratio[ratio.isfinite()].max()) if bool(ratio.isfinite().any()) else 0.0


def _same(loaded: LoadedModel, got: "torch.Tensor", wanted: "torch.Tensor", said: str) -> Finding:
    """Compare row by row, relative to the row's norm."""
    if got.numel() != wanted.numel():
        return Finding(float("inf"), f"{said} (shapes {tuple(got.shape)}, {tuple(wanted.shape)})")
    width = wanted.shape[-1]
    a, b = _wide(got).reshape(-1, width), _wide(wanted).reshape(-1, width)
    finite = a.isfinite().all(dim=1) & b.isfinite().all(dim=1) & (b.norm(dim=1) > 0)
    if not bool(finite.any()):
        return Finding(0.0, said)
    error = ((a - b).norm(dim=1) / b.norm(dim=1))[finite].max()
    return Finding(float(error) / _TOLERANCE[loaded.dtype], said)


def _through(loaded: LoadedModel, layer: int, what: str, x: "torch.Tensor") -> "torch.Tensor":
    """Return what one of the layer's modules makes of `x`; `x` where the layer has no such module."""
    import torch

    path = loaded.map.module(layer, what)
    if path is None:
        return x
    with torch.inference_mode():
        y: torch.Tensor = loaded.model.get_submodule(path)(x)
    return y


def _router_logits(loaded: LoadedModel, layer: int, mlp_in: "torch.Tensor") -> "torch.Tensor | None":
    """Return the product with the router's weights in double precision; None where it has no such weights."""
    import torch

    router = loaded.model.get_submodule(loaded.map.module(layer, "router"))
    with _weights_in_place(router):
        weight, bias = getattr(router, "weight", None), getattr(router, "bias", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.shape[1] != mlp_in.shape[-1]:
            return None
        offset = _wide(bias) if isinstance(bias, torch.Tensor) else 0.0
        return _wide(mlp_in).reshape(-1, mlp_in.shape[-1]) @ _wide(weight).T + offset


def _weights_in_place(module: Any) -> "contextlib.AbstractContextManager[Any]":
    """Bring in what accelerate keeps elsewhere while the module does not run."""
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    # Not an import statement: the package is optional, and has no types.
    align = importlib.import_module("accelerate.utils").align_module_device
    aligned: contextlib.AbstractContextManager[Any] = align(module)
    return aligned


def _prove_final_norm(loaded: LoadedModel, seen: Mapping[str, "torch.Tensor"]) -> None:
    import torch

    last = seen[f"layers.{loaded.map.n_layers - 1}.resid_post"]
    with torch.inference_mode():
        normed = loaded.model.get_submodule(loaded.map.site("final_norm").path)(last)
    for got, said in (
        (normed, "the norm of the last resid_post is not final_norm"),
        (seen["last_hidden_state"], "the model's last_hidden_state is not final_norm"),
    ):
        _refuse_if_wrong(loaded, None, "final_norm", _same(loaded, got, seen["final_norm"], said))


def _wide(x: "torch.Tensor") -> "torch.Tensor":
    """Return the values on the host in double precision, which not all devices have."""
    return x.detach().cpu().double()


def _refuse_if_wrong(loaded: LoadedModel, layer: int | None, part: str, finding: Finding) -> None:
    if finding.excess <= 1.0:
        return
    where = "" if layer is None else f" in layer {layer}"
    raise InvalidInputError(
        ErrorKind.SELF_TEST_FAILED,
        f"{finding.said}{where} of this {loaded.fingerprint['architecture']}, by {finding.excess:.3g} times what"
        f" {loaded.dtype} rounding explains: {part} is not where this version looks. Ask for resid_pre, resid_post and"
        f" module:<path>[:input|:output] places instead, of:\n{loaded.map.tree}",
    )
