"""What can be asked of a stored dictionary: a sparse autoencoder or transcoder, by name? (FORMAT.md, section 9)

Its settings are in the store's state. Its weights lie in one safetensors object, which is fetched and checked when the first
weight is asked for, and then mapped: what is not looked at takes no memory.
"""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.dictionary_data import DictionaryData, DictionarySpec, make_dictionary, parse_config
from actstore.dictionary_file import map_weights
from actstore.errors import ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.log.values import Collection
from actstore.objects import ObjectReader

__all__ = ["Dictionary", "DictionaryData", "DictionarySpec", "make_dictionary"]

FloatArray = npt.NDArray[np.float32]

_NORM_BLOCK = 1 << 22
"""Values of the decoder whose squares are added up at a time: 32 MiB as float64."""


class Dictionary:
    """A stored dictionary, as of the store's version. Safe for use from many threads."""

    def __init__(self, collection: Collection, objects: ObjectReader) -> None:
        self.collection = collection
        self._objects = objects
        self.spec: DictionarySpec = parse_config(collection.config)
        self._lock = threading.Lock()
        self._weights: dict[str, FloatArray] | None = None
        self._norms: FloatArray | None = None

    def __repr__(self) -> str:
        spec = self.spec
        return f"Dictionary({self.id!r}, {spec.activation} {spec.kind}, {spec.n_latents} latents, {spec.hook_point})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Dictionary, (self.collection, self._objects))

    @property
    def id(self) -> str:
        """The dictionary's name."""
        return self.collection.id

    @property
    def name(self) -> str:
        """The dictionary's name."""
        return self.collection.id

    @property
    def config(self) -> dict[str, Any]:
        """Everything that shapes codes; its fingerprint is the dictionary's identity."""
        return dict(self.collection.config)

    @property
    def info(self) -> dict[str, Any]:
        """Where it came from; nothing depends on it."""
        return dict(self.collection.info)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration, which holds the hash of the weights."""
        return self.collection.fingerprint

    @property
    def kind(self) -> str:
        """`sae` or `transcoder`."""
        return self.spec.kind

    @property
    def activation(self) -> str:
        """`relu`, `topk`, `groupmax`, `batchtopk`, `jumprelu` or `gated`."""
        return self.spec.activation

    @property
    def d_in(self) -> int:
        """Width of the rows that it encodes."""
        return self.spec.d_in

    @property
    def d_out(self) -> int:
        """Width of what it decodes to."""
        return self.spec.d_out

    @property
    def n_latents(self) -> int:
        """Number of latents; they are numbered from 0."""
        return self.spec.n_latents

    @property
    def k(self) -> int | float | None:
        """Latents per row: exactly of topk and groupmax, on average of batchtopk; None of others."""
        return self.spec.k

    @property
    def hook_point(self) -> str:
        """Where its rows come from."""
        return self.spec.hook_point

    @property
    def hook_point_out(self) -> str | None:
        """Where a transcoder's output belongs; None of an sae, or where it is not known."""
        return self.spec.hook_point_out

    def weights(self) -> Mapping[str, FloatArray]:
        """Return all weights by name, float32, read-only, mapped from the object; the first call reads it whole to check it.

        Raises:
            FormatError: the object is missing, damaged, or not what the configuration says.
        """
        with self._lock:
            if self._weights is None:
                unit = self.collection.units.get(0)
                if unit is None or len(unit.objects) != 1 or not self.collection.is_sealed:
                    raise FormatError(
                        ErrorKind.INVARIANT_BROKEN,
                        f"dictionary {self.id!r} has no single object of weights: run fsck for all damage",
                    )
                path = self._objects.file(unit.objects[0])
                self._weights = map_weights(path, self.spec.shapes, what=f"dictionary {self.id!r}")
            return self._weights

    def weight(self, name: str) -> FloatArray:
        """Return one weight, float32, read-only: W_enc (d_in, n_latents), W_dec (n_latents, d_out), b_enc, b_dec, ...

        Raises:
            NotFoundError: this dictionary has none of that name.
        """
        weights = self.weights()
        if name not in weights:
            raise NotFoundError(
                ErrorKind.COLLECTION_NOT_FOUND,
                f"dictionary {self.id!r} ({self.activation}) has no weight {name!r}: there are {', '.join(weights)}",
            )
        return weights[name]

    def decoder(self, latents: npt.ArrayLike | None = None) -> FloatArray:
        """Return what a code of 1 adds to the decoded row, one row for each latent asked for, shape (n, d_out), float32.

        That is W_dec, divided by its rows' norms where codes are rescaled by them, and by the factor of `scale`. Where rows
        are normalised one by one, it is in normalised units.

        Raises:
            InvalidInputError: a latent that does not exist.
        """
        index = self._latents(latents)
        rows = np.array(self.weight("W_dec")[index], np.float32)
        if self.spec.rescale_acts_by_decoder_norm:
            norms = row_norms(rows)
            rows /= np.where(norms > 0, norms, 1)[:, None]
        if self.spec.normalize["kind"] == "scale":
            rows /= np.float32(self.spec.normalize["factor"])
        return rows

    def encoder(self, latents: npt.ArrayLike | None = None) -> FloatArray:
        """Return the columns of W_enc as rows, one for each latent asked for, shape (n, d_in), float32.

        Raises:
            InvalidInputError: a latent that does not exist.
        """
        index = self._latents(latents)
        return np.ascontiguousarray(self.weight("W_enc")[:, index].T)

    def decoder_norms(self) -> FloatArray:
        """Return the Euclidean norm of every row of `decoder()`, shape (n_latents,), float32, read-only; computed once."""
        with self._lock:
            known = self._norms
        if known is None:
            step = max(1, _NORM_BLOCK // self.d_out)
            blocks = (slice(i, i + step) for i in range(0, self.n_latents, step))
            parts = [row_norms(self.decoder(np.arange(self.n_latents)[block])) for block in blocks]
            known = np.concatenate(parts)
            known.flags.writeable = False
            with self._lock:
                self._norms = known
        return known

    def _latents(self, latents: npt.ArrayLike | None) -> Any:
        if latents is None:
            return slice(None)
        index = np.atleast_1d(np.asarray(latents))
        if index.size and (index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= self.n_latents):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"latents of dictionary {self.id!r} are whole numbers from 0 to {self.n_latents - 1}, got {latents!r:.80}",
            )
        return index.astype(np.int64)


def row_norms(rows: FloatArray) -> FloatArray:
    """Return the Euclidean norm of every row, summed in float64.

    >>> row_norms(np.array([[3, 4]], np.float32))
    array([5.], dtype=float32)
    """
    wide = rows.astype(np.float64)
    norms: FloatArray = np.sqrt(np.einsum("nd,nd->n", wide, wide)).astype(np.float32)
    return norms
