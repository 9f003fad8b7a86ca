"""What are the codes of rows in a dictionary? Those of the library that trained it, at the speed of the one matrix product.

The formulas are those of `actstore.dictionary_data`; products are rounded to float32 once, so codes agree with the library's
own to about 1e-6 of their size, before they are rounded to the stored dtype. Where two pre-activations lie as close together as
that, or one so close to its threshold, another order of additions may choose another latent, as it does between devices.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore._lazy import missing
from actstore.dictionary import Dictionary, row_norms
from actstore.dictionary_data import MAX_FLOAT, DictionaryData, DictionarySpec
from actstore.errors import ErrorKind, InvalidInputError
from actstore.sparse.rows import SparseRows, indptr_of, round_values, value_dtype_of

from .fits import check_fits
from .selection import Selected, select_above, select_group_max, select_top_k

if TYPE_CHECKING:
    import torch

__all__ = ["COMPUTE_DTYPES", "Encoder", "check_fits"]

COMPUTE_DTYPES = ("float32", "bfloat16")
"""Dtypes of the matrix product. bfloat16 is for accelerators and is not exact; float16 would overflow."""

_BATCH_VALUES = {"cpu": 1 << 23}
"""Pre-activations computed at a time: 32 MiB on a CPU, where they should stay near it."""
_BATCH_VALUES_ELSEWHERE = 1 << 26
_LEAST_ROWS = 64


class Encoder:
    """Encodes rows in one dictionary. Used from one thread at a time; read-only after it is made.

    Memory on the device: W_enc, a batch of pre-activations (32 MiB of float32 on a CPU, 256 MiB elsewhere, more for over 131,072
    latents) with up to twice that for choosing, and W_dec once something is decoded; and the codes of the rows given.
    """

    _decoder: "torch.Tensor | None"
    _buffer: "torch.Tensor"
    _flags: "torch.Tensor"

    def __init__(
        self,
        dictionary: Dictionary | DictionaryData,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        value_dtype: str = "float16",
    ) -> None:
        """Copy the encoder's weights to the device.

        Args:
            dictionary: Stored or not.
            device: A torch device.
            dtype: Of the matrix product, one of `COMPUTE_DTYPES`.
            value_dtype: Of the codes: `float16`, to which they are rounded at the very end, or `float32`.

        Raises:
            InvalidInputError: an unknown dtype.
            FormatError: the stored weights are missing or damaged.
            MissingDependencyError: torch is not installed.
        """
        torch = _torch()
        if dtype not in COMPUTE_DTYPES:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"codes cannot be computed in {dtype!r:.40}: use one of {', '.join(COMPUTE_DTYPES)}",
            )
        value_dtype_of(value_dtype)
        self.spec: DictionarySpec = dictionary.spec
        self.dtype, self.value_dtype = dtype, value_dtype
        self.device = torch.device(device)
        self._torch_dtype = getattr(torch, dtype)
        self._source = dictionary.weights if isinstance(dictionary, DictionaryData) else dictionary.weights()
        self._decoder = None
        self._weights = self._encoder_weights()
        low, high = self._weights["W_enc"].aminmax()
        self._most_weight = max(-float(low), float(high)) * self.spec.d_in
        per_batch = _BATCH_VALUES.get(self.device.type, _BATCH_VALUES_ELSEWHERE)
        self.batch_rows = max(_LEAST_ROWS, per_batch // max(self.spec.n_latents, self.spec.d_in))
        """Rows that are encoded at a time."""
        self._reserve(0)

    def encode(self, rows_nd: "npt.NDArray[np.floating[Any]] | torch.Tensor") -> SparseRows:
        """Return the codes of rows of shape (n, d_in), of any float type.

        A row with a value that is NaN or infinite has no codes.

        Raises:
            InvalidInputError: rows of another width; or a code too large for the stored dtype (OVERFLOW).
        """
        torch = _torch()
        self._check_rows(rows_nd)
        parts = []
        with torch.inference_mode():
            self._reserve(min(len(rows_nd), self.batch_rows))
            for start in range(0, len(rows_nd), self.batch_rows):
                batch = self._prepare(self._to_device(rows_nd[start : start + self.batch_rows]))
                parts.append(self._sparse(self._select(batch), len(batch)))
        return SparseRows.concat(parts or [SparseRows.empty(0, self.spec.n_latents, self.value_dtype)])

    def decode(
        self, codes: SparseRows, rows_nd: "npt.NDArray[np.floating[Any]] | torch.Tensor | None" = None
    ) -> npt.NDArray[np.float32]:
        """Return what codes stand for, shape (n, d_out), float32: the library's reconstruction, or transcoder's output.

        Args:
            codes: Of this dictionary.
            rows_nd: The rows that were encoded: needed only where `spec.needs_rows`, for a norm of their own or for a skip.

        Raises:
            InvalidInputError: codes of another dictionary, or rows that are missing.
        """
        torch = _torch()
        if codes.n_latents != self.spec.n_latents:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"codes of {codes.n_latents} latents cannot be decoded by a dictionary of {self.spec.n_latents}",
            )
        if self.spec.needs_rows and (rows_nd is None or len(rows_nd) != codes.n_rows):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                "this dictionary normalises each row by itself, or adds a map of the row: decode(codes, rows) needs as "
                f"many rows as codes, {codes.n_rows}",
            )
        if rows_nd is not None:
            self._check_rows(rows_nd)
        with torch.inference_mode():
            parts = [np.empty((0, self.spec.d_out), np.float32)]
            for start in range(0, codes.n_rows, self.batch_rows):
                stop = min(start + self.batch_rows, codes.n_rows)
                batch = None if rows_nd is None else self._to_device(rows_nd[start:stop])
                parts.append(self._decode(codes.slice(start, stop), batch).cpu().numpy())
        return np.concatenate(parts)

    def _encoder_weights(self) -> dict[str, "torch.Tensor"]:
        """Return what encoding needs, on the device; norms of decoder rows are multiplied into W_enc and b_enc."""
        names = [n for n in self.spec.shapes if n not in ("W_dec", "W_skip")]
        arrays = {name: np.array(self._source[name]) for name in names}
        if self.spec.rescale_acts_by_decoder_norm:
            norms = row_norms(self._source["W_dec"])
            arrays["W_enc"] *= norms
            arrays["b_enc"] *= norms
        if self.spec.activation == "gated":
            arrays["r_mag"] = np.exp(arrays["r_mag"])
        # What passes is above the threshold, and above 0.
        arrays["threshold"] = np.maximum(arrays.get("threshold", np.zeros(1, np.float32)), 0)
        torch = _torch()
        # Biases and thresholds stay float32: they cost nothing, and 8 bits of a threshold would move it.
        return {
            name: torch.from_numpy(array).to(self.device, self._torch_dtype if name == "W_enc" else None)
            for name, array in arrays.items()
        }

    def _reserve(self, n_rows: int) -> None:
        """Have memory for a batch's pre-activations and flags; that of the largest batch so far is kept."""
        torch = _torch()
        shape = (n_rows, self.spec.n_latents)
        known = getattr(self, "_buffer", None)
        if known is None or len(known) < n_rows:
            self._buffer = torch.empty(shape, device=self.device)
            self._flags = torch.empty(shape, dtype=torch.bool, device=self.device)

    def _check_rows(self, rows_nd: Any) -> None:
        if getattr(rows_nd, "ndim", None) != 2 or rows_nd.shape[1] != self.spec.d_in:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"rows of shape (n, {self.spec.d_in}) are encoded by this dictionary, got "
                f"{tuple(getattr(rows_nd, 'shape', ())) or type(rows_nd).__name__}",
            )

    def _to_device(self, rows_nd: Any) -> "torch.Tensor":
        torch = _torch()
        if not isinstance(rows_nd, torch.Tensor):
            rows = np.asarray(rows_nd)
            if not rows.flags.writeable or rows.dtype not in (np.float32, np.float16):
                rows = rows.astype(np.float32)
            rows_nd = torch.from_numpy(rows)
        return rows_nd.to(self.device, torch.float32)

    def _prepare(self, x: "torch.Tensor") -> "torch.Tensor":
        """Return what W_enc is multiplied with, float32; NaN all over where a row is not finite."""
        spec, how = self.spec, self.spec.normalize
        if how.get("center", False):
            x = x - x.mean(1, keepdim=True)
        if how["kind"] != "none":
            shift, scale = self._normalisation(x)
            x = (x - shift) / scale if how["kind"] == "layer_norm" else x * scale
        if spec.apply_b_dec_to_input:
            x = x - self._weights["b_dec"]
        return x

    def _normalisation(self, x: "torch.Tensor") -> tuple[Any, Any]:
        """Return what is taken from rows, and what they are then multiplied with (of `layer_norm`: divided by)."""
        how, d_in = self.spec.normalize, self.spec.d_in
        if how["kind"] == "scale":
            return 0.0, how["factor"]
        if how["kind"] == "constant_norm":
            return 0.0, d_in**0.5 / x.norm(dim=1, keepdim=True)
        mean = x.mean(1, keepdim=True)
        return mean, (x - mean).std(1, keepdim=True) + how["eps"]

    def _select(self, y: "torch.Tensor") -> Selected:
        """Return the codes of prepared rows."""
        torch = _torch()
        spec, weights = self.spec, self._weights
        broken = ~torch.isfinite(y).all(1)
        if bool(broken.any()):
            y = y.masked_fill(broken[:, None], 0)
        pre = self._product(y, None if spec.activation == "gated" else weights["b_enc"])
        # Infinities of both signs add up to NaN, which would be chosen as no code; only enormous rows can do that.
        low, high = y.aminmax()
        if max(-float(low), float(high)) * self._most_weight >= MAX_FLOAT and bool(pre.isnan().any()):
            raise InvalidInputError(
                ErrorKind.NON_FINITE,
                f"rows with values from {float(low):g} to {float(high):g} have codes that float32 cannot compute: check the "
                "activations and the dictionary",
            )
        if bool(broken.any()):
            pre[broken] = -torch.inf
        if spec.activation == "topk":
            return select_top_k(pre, int(spec.k or 1))
        if spec.activation == "groupmax":
            return select_group_max(pre, int(spec.k or 1))
        if spec.activation != "gated":
            return select_above(pre, weights["threshold"], self._flags[: len(pre)])
        # The sign of a sum is that of its rounding, so this is the library's sum above 0, without computing it.
        found = select_above(pre, -weights["b_gate"], self._flags[: len(pre)])
        values = found.values * weights["r_mag"][found.latents] + weights["b_mag"][found.latents]
        some = values > 0
        return Selected(found.rows[some], found.latents[some], values[some])

    def _product(self, y: "torch.Tensor", bias: "torch.Tensor | None") -> "torch.Tensor":
        """Return y @ W_enc (+ bias), float32, in a buffer that the next call uses again."""
        torch = _torch()
        if self._torch_dtype != torch.float32:
            pre = (y.to(self._torch_dtype) @ self._weights["W_enc"]).float()
            return pre if bias is None else pre.add_(bias)
        out = self._buffer[: len(y)]
        if bias is None:
            return torch.mm(y, self._weights["W_enc"], out=out)
        return torch.addmm(bias, y, self._weights["W_enc"], out=out)

    def _sparse(self, selected: Selected, n_rows: int) -> SparseRows:
        """Return chosen codes in the stored dtype, without those that round to zero."""
        rows, latents = selected.rows.cpu().numpy(), selected.latents.cpu().numpy()
        values = round_values(selected.values.cpu().numpy(), self.value_dtype)
        if not values.all():
            some = values > 0
            rows, latents, values = rows[some], latents[some], values[some]
        counts = np.bincount(rows, minlength=n_rows).astype(np.int64)
        return SparseRows(indptr_of(counts), latents.astype(np.uint32), values, self.spec.n_latents)

    def _decode(self, codes: SparseRows, rows: "torch.Tensor | None") -> "torch.Tensor":
        torch = _torch()
        spec, how = self.spec, self.spec.normalize
        if self._decoder is None:
            decoder = np.array(self._source["W_dec"])
            if spec.rescale_acts_by_decoder_norm:
                norms = row_norms(decoder)
                decoder /= np.where(norms > 0, norms, 1)[:, None]
            self._decoder = torch.from_numpy(decoder).to(self.device)
        latents = torch.from_numpy(codes.latents.astype(np.int64)).to(self.device)
        values = torch.from_numpy(codes.values.astype(np.float32)).to(self.device)
        offsets = torch.from_numpy(codes.indptr[:-1].astype(np.int64)).to(self.device)
        out = torch.nn.functional.embedding_bag(
            latents, self._decoder, offsets, mode="sum", per_sample_weights=values
        )
        out = out + self._weights["b_dec"]
        if how["kind"] == "scale":
            out = out / how["factor"]
        elif spec.kind == "sae" and rows is not None:
            out = self._unnormalise(out, rows)
        if spec.skip and rows is not None:
            out = out + rows @ torch.from_numpy(np.array(self._source["W_skip"])).to(self.device)
        return out

    def _unnormalise(self, out: "torch.Tensor", rows: "torch.Tensor") -> "torch.Tensor":
        """Return the decoded rows of an sae in the units of the rows that were encoded."""
        how = self.spec.normalize
        mean = rows.mean(1, keepdim=True) if how.get("center", False) else 0.0
        if how["kind"] == "layer_norm":
            # The library divides by std + eps, and multiplies by std.
            shift, scale = self._normalisation(rows - mean)
            out = out * (scale - how["eps"]) + shift
        elif how["kind"] == "constant_norm":
            out = out / self._normalisation(rows - mean)[1]
        return out + mean


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise missing("torch", needed_for="encoding", extra="ingest") from error
    return torch
