"""Which files are a model's configuration and weights, and what identifies their content?"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
"""Keys of config.json that say where, by which version and in which dtype it was saved, not what the model is."""

_READ_BYTES = 8 << 20
"""Bytes hashed at a time."""

_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format on its own header."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """A model's files on the local disk."""

    folder: str
    config: Path
    weights: tuple[Path, ...]
    commit: str | None
    """Commit on the hub; None for a local folder."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    label: str
    path: Path
    start: int
    nbytes: int


def find_weights(source: str, *, revision: str | None, cache_dir: str | None, offline: bool) -> WeightFiles:
    """Return the files of a local folder, or those of a hub model after fetching what is not in the cache.

    Raises:
        NotFoundError: neither a folder nor a model that can be had from the hub.
        InvalidInputError: a folder without config.json or safetensors, or with a revision.
    """
    if os.path.isdir(source):
        if revision is not None:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"revision {revision!r} was asked of {source!r}, which is a local folder and has none: leave it out",
            )
        return _local_files(source, commit=None)
    if os.path.isabs(source) or source.startswith((".", "~")) or source.count("/") > 1:
        raise NotFoundError(
            ErrorKind.MODEL_NOT_FOUND,
            f"model folder {source!r} does not exist: give a folder with config.json and safetensors files, or a hub name",
        )
    return _hub_files(source, revision=revision, cache_dir=cache_dir, offline=offline)


def _local_files(folder: str, *, commit: str | None) -> WeightFiles:
    root = Path(folder)
    config = root / "config.json"
    if not config.is_file():
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"folder {folder!r} has no config.json: give the folder that save_pretrained() wrote",
        )
    if (root / _SINGLE).is_file():
        names = [_SINGLE]
    elif (root / _INDEX).is_file():
        names = _indexed((root / _INDEX).read_bytes())
    else:
        pickled = sorted(p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"only {', '.join(pickled)}, which can run code when read" if pickled else "no weights"
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"folder {folder!r} must hold {_SINGLE} or {_INDEX} and has {found}: convert it where you trust it, with"
            " AutoModel.from_pretrained(folder).save_pretrained(new_folder)",
        )
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"{_INDEX} in folder {folder!r} names {', '.join(missing)}, which is not there: copy the missing files",
        )
    return WeightFiles(str(root), config, tuple(root / name for name in names), commit)


def _hub_files(source: str, *, revision: str | None, cache_dir: str | None, offline: bool) -> WeightFiles:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    def fetch(name: str, commit: str | None) -> Path:
        return Path(
            hf_hub_download(source, name, revision=commit, cache_dir=cache_dir, local_files_only=offline)
        )

    try:
        config = fetch("config.json", revision)
        # The cache keeps every file under its commit, so all others come from the one that config.json came from.
        commit = config.parent.name
        try:
            names = [fetch(_SINGLE, commit).name]
        except EntryNotFoundError:
            try:
                names = _indexed(fetch(_INDEX, commit).read_bytes())
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError as error:
                raise InvalidInputError(
                    ErrorKind.BAD_MODEL,
                    f"model {source!r} at {commit} has no safetensors weights: convert it where you trust it, with"
                    " AutoModel.from_pretrained(name).save_pretrained(folder), and give the folder",
                ) from error
            for name in names:
                fetch(name, commit)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        raise NotFoundError(
            ErrorKind.MODEL_NOT_FOUND,
            f"model {source!r} at revision {revision or 'main'!r} is neither a local folder nor to be had from the hub"
            f" ({type(error).__name__}: {str(error).splitlines()[0]}): check the name and revision, log in if it is gated,"
            " or, without a network, give a folder or fill the cache first (hf download)",
        ) from error
    return _local_files(str(config.parent), commit=commit)


def _indexed(index: bytes) -> list[str]:
    try:
        names = sorted(set(json.loads(index)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_MODEL, f"{_INDEX} is damaged ({error}): fetch the model again"
        ) from error
    if not names or not all(isinstance(n, str) and re.fullmatch(r"[\w.-]+\.safetensors", n) for n in names):
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"{_INDEX} must name safetensors files beside it, found {names[:3]}: fetch the model again",
        )
    return names


def config_sha256(config: Path) -> str:
    """Return the SHA-256 of a config.json's meaning: keys sorted, without those that say how it was saved.

    Raises:
        InvalidInputError: not a JSON object.
    """
    try:
        values = {k: v for k, v in json.loads(config.read_bytes()).items() if k not in _VOLATILE}
    except (ValueError, AttributeError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"{config.name} of the model is not a JSON object ({error}): fetch the model again",
        ) from error
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def weights_sha256(files: Sequence[Path]) -> str:
    """Return the SHA-256 of all tensors' names, dtypes, shapes and bytes, whatever files they are spread over.

    Reads all bytes once, several tensors at a time.

    Raises:
        InvalidInputError: not a safetensors file, or cut short.
    """
    tensors = sorted((t for path in files for t in _tensors(path)), key=lambda t: t.name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(_digest, tensors)
        lines = [f"{tensor.label} {digest}\n" for tensor, digest in zip(tensors, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tensors(path: Path) -> list[_Tensor]:
    """Read a safetensors header. Source: https://github.com/huggingface/safetensors, README, section "Format"."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        try:
            if header_bytes > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {header_bytes} bytes in a file of {size}")
            header = json.loads(file.read(header_bytes))
            tensors = [
                _Tensor(
                    name,
                    json.dumps([name, entry["dtype"], entry["shape"]]),
                    path,
                    8 + header_bytes + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
            if any(t.start + t.nbytes > size for t in tensors):
                raise ValueError(f"tensors end past its {size} bytes")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InvalidInputError(
                ErrorKind.BAD_MODEL,
                f"{path.name} of the model is not a whole safetensors file ({error}): fetch it again",
            ) from error
    return tensors


def _digest(tensor: _Tensor) -> str:
    digest, left = hashlib.sha256(), tensor.nbytes
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        while left and (block := file.read(min(left, _READ_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
