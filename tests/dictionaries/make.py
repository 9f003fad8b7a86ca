"""Random dictionaries, and an encoder in float64 that follows their definition word for word."""

from typing import Any

import numpy as np

from actstore.ingest.dictionaries import DictionaryData, make_dictionary

HOOK = "layers.3.resid_post"


def random_dictionary(
    seed: int = 0, *, activation: str = "topk", d_in: int = 16, n_latents: int = 96, **options: Any
) -> DictionaryData:
    rng = np.random.default_rng(seed)
    weights = {
        "W_enc": rng.normal(size=(d_in, n_latents)),
        "W_dec": rng.normal(size=(n_latents, d_in)),
        "b_dec": rng.normal(size=d_in),
        "b_enc": rng.normal(size=n_latents),
    }
    if activation == "gated":
        del weights["b_enc"]
        weights |= {name: rng.normal(size=n_latents) / 2 for name in ("b_gate", "r_mag", "b_mag")}
    if activation in ("jumprelu", "batchtopk"):
        weights["threshold"] = rng.normal(size=n_latents) * 2
    if activation in ("topk", "groupmax"):
        options.setdefault("k", 8)
    return make_dictionary(weights, activation=activation, hook_point=HOOK, **options)


def encode64(data: DictionaryData, rows: np.ndarray) -> np.ndarray:
    """Dense codes, float64. Only for rows without normalisation."""
    spec, w = data.spec, {name: array.astype(np.float64) for name, array in data.weights.items()}
    y = rows.astype(np.float64) - (w["b_dec"] if spec.apply_b_dec_to_input else 0)
    pre = y @ w["W_enc"]
    if spec.activation == "gated":
        return np.where(pre + w["b_gate"] > 0, np.maximum(np.exp(w["r_mag"]) * pre + w["b_mag"], 0), 0)
    pre = pre + w["b_enc"]
    if spec.rescale_acts_by_decoder_norm:
        pre = pre * np.linalg.norm(w["W_dec"], axis=1)
    if spec.activation in ("jumprelu", "batchtopk"):
        return np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
    if spec.activation == "topk":
        return top_k(pre, int(spec.k or 0))
    if spec.activation == "groupmax":
        groups = pre.reshape(len(pre), int(spec.k or 1), -1)
        first = np.arange(groups.shape[2]) == groups.argmax(2)[:, :, None]
        return np.where(first, np.maximum(groups, 0), 0).reshape(pre.shape)
    return np.maximum(pre, 0)


def top_k(pre: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row above 0, of equal ones those of lower index, by sorting."""
    order = np.argsort(-pre, axis=1, kind="stable")[:, :k]
    codes = np.zeros_like(pre)
    np.put_along_axis(codes, order, np.maximum(np.take_along_axis(pre, order, 1), 0), 1)
    return codes
