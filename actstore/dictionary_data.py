"""What is a dictionary before it is stored: what makes codes out of rows, whatever library trained it? (FORMAT.md, section 9)

A `DictionaryData` is a `DictionarySpec` and weights in one layout, W_enc of shape (d_in, n_latents). For a row x:

    y    = normalise(x), minus b_dec where apply_b_dec_to_input
    pre  = y @ W_enc + b_enc, times the norm of each latent's row of W_dec where rescale_acts_by_decoder_norm
    code = by activation
           relu                 max(pre, 0)
           topk                 max(pre, 0) where pre is among the row's k largest
           groupmax             max(pre, 0) where pre is the largest of its group: k groups of neighbouring latents
           batchtopk, jumprelu  max(pre, 0) where pre > threshold
           gated                max(exp(r_mag) * (y @ W_enc) + b_mag, 0) where y @ W_enc + b_gate > 0

Of equal values the lowest latent comes first.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from actstore.checks import is_whole
from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.hook_points import parse_hook_point

FloatArray = npt.NDArray[np.float32]

FORMAT: Final = 1
KINDS: Final = ("sae", "transcoder")
ACTIVATIONS: Final = ("relu", "topk", "groupmax", "batchtopk", "jumprelu", "gated")
NORMALISATIONS: Final = ("none", "scale", "constant_norm", "layer_norm")
"""`scale`: x * factor; `constant_norm`: x * sqrt(d_in) / |x|; `layer_norm`: (x - mean) / (std + eps), std with n - 1."""

MAX_LATENTS: Final = 1 << 31
"""Latents are numbered with an int32 in tables."""

MAX_FLOAT: Final = float(np.finfo(np.float32).max)
"""Factors must be numbers that float32 has."""

_CHECKED_VALUES: Final = 1 << 22
"""Values looked at in one go: 4 MiB of flags."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DictionarySpec:
    """Everything about a dictionary but its weights; what is stored as the collection's configuration."""

    activation: str
    """One of `ACTIVATIONS`."""

    d_in: int
    """Width of the rows that are encoded."""

    d_out: int
    """Width of what is decoded: `d_in`, except in transcoders."""

    n_latents: int

    hook_point: str
    """Canonical name of where the rows come from."""

    kind: str = "sae"
    """`sae` decodes to its own hook point, `transcoder` to `hook_point_out`."""

    hook_point_out: str | None = None
    """Of a transcoder, if known."""

    k: int | float | None = None
    """Latents per row: of topk and groupmax exactly, of batchtopk on average in training. None for the others."""

    apply_b_dec_to_input: bool = False
    """Whether b_dec is subtracted before encoding."""

    rescale_acts_by_decoder_norm: bool = False
    """Whether codes are in units of decoder rows of norm 1."""

    normalize: Mapping[str, Any] = field(default_factory=lambda: {"kind": "none"})
    """`kind`, one of `NORMALISATIONS`; `factor` of scale; `eps` of layer_norm; `center`, true where the row's mean is taken
    from it first (models whose writing weights TransformerLens centred)."""

    skip: bool = False
    """Whether W_skip adds a linear map of the row to what is decoded."""

    prepend_bos: bool | None = None
    """Whether documents began with a BOS token where it was trained; None where unknown."""

    model: Mapping[str, Any] | None = None
    """What is known of the model it was trained on, such as `name`."""

    source: Mapping[str, Any] = field(default_factory=lambda: {"format": "actstore"})
    """`format` (`actstore`, `saelens`, `sparsify`, `dictionary_learning`) and what else identifies how it came about."""

    def config(self, weights_sha256: str) -> dict[str, Any]:
        """Return the configuration of the collection, which is fingerprinted."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"format": FORMAT, **plain, "weights_sha256": weights_sha256}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight of such a dictionary, by name."""
        f = (self.n_latents,)
        biases: tuple[str, ...] = ("b_gate", "r_mag", "b_mag") if self.activation == "gated" else ("b_enc",)
        if self.activation in ("batchtopk", "jumprelu"):
            biases += ("threshold",)
        return {
            "W_enc": (self.d_in, self.n_latents),
            "W_dec": (self.n_latents, self.d_out),
            "b_dec": (self.d_out,),
            **dict.fromkeys(biases, f),
            **({"W_skip": (self.d_in, self.d_out)} if self.skip else {}),
        }

    @property
    def needs_rows(self) -> bool:
        """Whether decoding needs the rows that were encoded: for a norm or a mean of their own, or for a skip."""
        by_row = self.normalize["kind"] in ("constant_norm", "layer_norm") or self.normalize.get(
            "center", False
        )
        return self.skip or (by_row and self.kind == "sae")


@dataclass(frozen=True, slots=True)
class DictionaryData:
    """A dictionary that is not stored (yet). Checked when it is made."""

    spec: DictionarySpec
    weights: Mapping[str, FloatArray]
    """float32 in C order, by name; exactly those of `spec.shapes`."""

    info: Mapping[str, Any] = field(default_factory=dict)
    """What a person wants to know and nothing depends on: where it came from, its own configuration."""

    def __post_init__(self) -> None:
        check_spec(self.spec)
        check_weights(self.spec, self.weights)

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of all weights: names, shapes and numbers. Computed anew each time."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            array = self.weights[name]
            digest.update(json.dumps([name, "F32", list(array.shape)]).encode() + b"\n")
            digest.update(np.ascontiguousarray(array, "<f4").data)
        return digest.hexdigest()


def make_dictionary(
    weights: Mapping[str, npt.ArrayLike],
    *,
    activation: str,
    hook_point: str,
    kind: str = "sae",
    info: Mapping[str, Any] | None = None,
    **options: Any,
) -> DictionaryData:
    """Return a dictionary made of weights, with the widths read off them. Missing biases are zeros.

    Args:
        weights: At least W_enc (d_in, n_latents) and W_dec (n_latents, d_out); any float type, stored as float32. A scalar
            threshold is every latent's.
        activation: One of `ACTIVATIONS`.
        hook_point: Where its rows come from; aliases of other tools are translated.
        kind: `sae` or `transcoder`.
        info: For `DictionaryData.info`.
        options: Other fields of `DictionarySpec`.

    Raises:
        InvalidInputError: weights that are missing, of the wrong shape or not finite, or settings that cannot be.

    >>> data = make_dictionary(
    ...     {"W_enc": np.eye(2, 3), "W_dec": np.eye(3, 2)}, activation="topk", k=1, hook_point="blocks.3.hook_resid_post"
    ... )
    >>> data.spec.n_latents, data.spec.hook_point, data.weights["b_enc"].shape
    (3, 'layers.3.resid_post', (3,))
    """
    arrays = {name: np.asarray(value) for name, value in weights.items()}
    for name in ("W_enc", "W_dec"):
        if name not in arrays or arrays[name].ndim != 2:
            found = list(arrays[name].shape) if name in arrays else "none"
            raise _bad(
                f"{name} must be a matrix, found {found}",
                "give W_enc (d_in, n_latents) and W_dec (n_latents, d_out)",
            )
    d_in, n_latents = arrays["W_enc"].shape
    out = options.pop("hook_point_out", None)
    spec = DictionarySpec(
        activation=activation,
        d_in=d_in,
        d_out=arrays["W_dec"].shape[1],
        n_latents=n_latents,
        hook_point=parse_hook_point(hook_point).name,
        hook_point_out=None if out is None else parse_hook_point(out).name,
        kind=kind,
        skip="W_skip" in arrays,
        **options,
    )
    for name, shape in spec.shapes.items():
        if name not in arrays and name not in ("threshold", "W_skip"):
            arrays[name] = np.zeros(shape, np.float32)
    if "threshold" in spec.shapes and "threshold" in arrays and arrays["threshold"].ndim == 0:
        arrays["threshold"] = np.full(n_latents, arrays["threshold"])
    return DictionaryData(
        spec, {n: np.ascontiguousarray(a, np.float32) for n, a in arrays.items()}, dict(info or {})
    )


def parse_config(config: Mapping[str, Any]) -> DictionarySpec:
    """Return the spec that a collection's configuration holds.

    Raises:
        FormatError: it is of a newer format, or no dictionary's.
    """
    if config.get("format") != FORMAT:
        raise FormatError(
            ErrorKind.FORMAT_TOO_NEW,
            f"a dictionary of format {config.get('format')!r} was found, this version reads {FORMAT}: install a newer one",
        )
    try:
        spec = DictionarySpec(**{f.name: config[f.name] for f in fields(DictionarySpec)})
        check_spec(spec)
    except (KeyError, TypeError, InvalidInputError) as error:
        raise FormatError(
            ErrorKind.MANIFEST_DAMAGED, f"the configuration of a dictionary is damaged ({error}): run fsck"
        ) from error
    return spec


def check_spec(spec: DictionarySpec) -> None:
    """Check that there can be such a dictionary.

    Raises:
        InvalidInputError: a setting that is unknown or contradicts another.
    """
    if spec.kind not in KINDS:
        raise _bad(f"kind is {spec.kind!r}", f"it is one of {', '.join(KINDS)}")
    if spec.activation not in ACTIVATIONS:
        raise _bad(f"activation is {spec.activation!r}", f"it is one of {', '.join(ACTIVATIONS)}")
    for name in ("d_in", "d_out", "n_latents"):
        value = getattr(spec, name)
        if not is_whole(value) or not 0 < value < MAX_LATENTS:
            raise _bad(f"{name} is {value!r:.80}", f"it is a whole number from 1 to {MAX_LATENTS - 1}")
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "skip"):
        if not isinstance(getattr(spec, name), bool):
            raise _bad(f"{name} is {getattr(spec, name)!r:.80}", "it is true or false")
    if spec.kind == "sae" and spec.d_out != spec.d_in:
        raise _bad(f"an sae of d_in {spec.d_in} has d_out {spec.d_out}", "only a transcoder's may differ")
    if spec.apply_b_dec_to_input and spec.d_out != spec.d_in:
        raise _bad(
            f"b_dec of width {spec.d_out} cannot be subtracted from rows of {spec.d_in}",
            "unset apply_b_dec_to_input",
        )
    if spec.rescale_acts_by_decoder_norm and spec.activation == "gated":
        raise _bad(
            "a gated dictionary rescales its codes", "no library has that: fold the norms into its weights"
        )
    _check_k(spec)
    _check_normalize(spec.normalize)


def _check_k(spec: DictionarySpec) -> None:
    k, n = spec.k, spec.n_latents
    if spec.activation in ("topk", "groupmax"):
        if not is_whole(k) or not 0 < k <= n:  # type: ignore[operator]
            raise _bad(f"k is {k!r:.80} of {n} latents", "it is a whole number from 1 to n_latents")
        if spec.activation == "groupmax" and n % int(k or 1):
            raise _bad(f"{n} latents do not make {k} groups of one size", "k must divide n_latents")
    elif k is not None and (isinstance(k, bool) or not isinstance(k, (int, float)) or not 0 < k <= n):
        raise _bad(f"k is {k!r:.80} of {n} latents", "it is a number above 0, or null")


def _check_normalize(normalize: Mapping[str, Any]) -> None:
    kind = normalize.get("kind") if isinstance(normalize, Mapping) else None
    if kind not in NORMALISATIONS:
        raise _bad(f"normalize is {normalize!r:.80}", f"its kind is one of {', '.join(NORMALISATIONS)}")
    number = {"scale": "factor", "layer_norm": "eps"}.get(str(kind))
    if extra := sorted(set(normalize) - {"kind", "center", number}):
        raise _bad(f"normalize of kind {kind!r} has {extra}", "leave that out")
    value = normalize.get(number, 0.0) if number else 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_FLOAT:
        raise _bad(f"{number} of normalize is {value!r:.80}", "it is a finite number above 0")
    if not isinstance(normalize.get("center", False), bool):
        raise _bad(f"center of normalize is {normalize['center']!r:.80}", "it is true or false")


def check_weights(spec: DictionarySpec, weights: Mapping[str, FloatArray]) -> None:
    """Check that the weights are those of `spec`: names, shapes, float32 in C order, finite.

    Raises:
        InvalidInputError: they are not; the message names the first that is wrong.
    """
    shapes = spec.shapes
    if missing := sorted(shapes.keys() - weights.keys()):
        raise _bad(
            f"weights {', '.join(missing)} of a {spec.activation} dictionary are missing", "give them too"
        )
    if extra := sorted(weights.keys() - shapes.keys()):
        raise _bad(f"a {spec.activation} dictionary has no weights {', '.join(extra)}", "leave them out")
    for name, shape in shapes.items():
        array = weights[name]
        if array.shape != shape or array.dtype != np.float32 or not array.flags.c_contiguous:
            raise _bad(
                f"{name} should be float32 of shape {list(shape)}, found {array.dtype} of {list(array.shape)}",
                "W_enc is (d_in, n_latents), W_dec (n_latents, d_out)",
            )
        flat = array.reshape(-1)
        for start in range(0, flat.size, _CHECKED_VALUES):
            if not np.isfinite(flat[start : start + _CHECKED_VALUES]).all():
                raise InvalidInputError(
                    ErrorKind.NON_FINITE,
                    f"{name} of the dictionary has values that are NaN or infinite (as float32): train or export it again",
                )


def _bad(problem: str, advice: str) -> InvalidInputError:
    return InvalidInputError(ErrorKind.BAD_ARGUMENT, f"no such dictionary can be: {problem}; {advice}")
