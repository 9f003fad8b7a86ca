"""Where are a dictionary's files? In a folder, or in a repository of the Hugging Face hub at one commit.

Only JSON and safetensors are ever opened. Pickled weights can run code when they are read, and are refused by name.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.log import canonical_json

LAYOUTS: Final = {
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.safetensors"),
}
"""Names of the configuration and of the weights, by format."""

FORMATS: Final = ("auto", *LAYOUTS)

_SCALER = "activation_scaler.json"
"""Beside SAELens's checkpoints: the factor that makes rows as long as training had them."""

_MAX_CONFIG: Final = 16 << 20
_MAX_INFO: Final = 64 << 10
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npz")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The files of one dictionary on the local disk."""

    format: str
    """One of `LAYOUTS`."""
    folder: str
    """Name of the folder: sparsify's says which module it was trained on."""
    config: dict[str, Any]
    """The parsed JSON."""
    weights: Path
    scaler: dict[str, Any] | None
    """SAELens's activation scaler, where there is one."""
    commit: str | None
    """Commit on the hub; None for a local folder."""


def find_dictionary(
    source: str | os.PathLike[str],
    *,
    format: str = "auto",
    revision: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
) -> SourceFiles:
    """Return the files of a local folder, or of a folder on the hub after fetching what is not in the cache.

    Args:
        source: A folder, or `owner/repository[/folder/in/it]`.
        format: One of `FORMATS`; `auto` goes by the names of the files.
        revision: Branch, tag or commit on the hub; all files come from the commit that it is now.
        cache_dir: Folder of the hub's cache; None for its default.
        offline: Whether to look in that cache only.

    Raises:
        NotFoundError: neither a folder nor to be had from the hub.
        InvalidInputError: an unknown format, a folder without the files, pickled weights, or a damaged configuration.
    """
    if format not in FORMATS:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"format {format!r:.80} is none of {', '.join(FORMATS)}"
        )
    layouts = [(name, files) for name, files in LAYOUTS.items() if format in ("auto", name)]
    source = os.fspath(source)
    if os.path.isdir(source):
        if revision is not None:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"revision {revision!r} was asked of {source!r}, which is a local folder and has none: leave it out",
            )
        return _in_folder(Path(source), layouts)
    if os.path.isabs(source) or source.startswith((".", "~")) or not _is_hub_name(source):
        raise NotFoundError(
            ErrorKind.SOURCE_NOT_FOUND,
            f"{source!r} is no folder, and no name on the hub, which is owner/repository or owner/repository/folder: check it",
        )
    return _on_hub(source, layouts, revision=revision, cache_dir=cache_dir, offline=offline)


def _is_hub_name(source: str) -> bool:
    parts = source.split("/")
    return len(parts) >= 2 and all(_PART.fullmatch(part) and ".." not in part for part in parts)


def _in_folder(folder: Path, layouts: Sequence[tuple[str, tuple[str, str]]]) -> SourceFiles:
    for name, (config, weights) in layouts:
        if (folder / config).is_file() and (folder / weights).is_file():
            scaler = folder / _SCALER
            return _files(name, folder / config, folder / weights, scaler if scaler.is_file() else None, None)
    expected = ", or ".join(" and ".join(files) for _, files in layouts)
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    if pickled:
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"folder {os.fspath(folder)!r} has {', '.join(pickled[:3])}, which can run code when read, and not {expected}: "
            "convert it where you trust it, with safetensors.torch.save_file(torch.load(old, weights_only=True), new)",
        )
    raise InvalidInputError(
        ErrorKind.BAD_MODEL,
        f"folder {os.fspath(folder)!r} holds no dictionary: expected {expected}; give the folder of one dictionary",
    )


def _on_hub(
    source: str,
    layouts: Sequence[tuple[str, tuple[str, str]]],
    *,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
) -> SourceFiles:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    owner, repository, *folders = source.split("/")
    failures: list[str] = []

    def fetch(name: str, commit: str | None) -> Path | None:
        """Return a file of the repository, None where it (or, offline, its copy) is not there."""
        nonlocal offline
        try:
            path = hf_hub_download(
                f"{owner}/{repository}",
                "/".join([*folders, name]),
                revision=commit or revision,
                cache_dir=cache_dir,
                local_files_only=offline,
            )
        except EntryNotFoundError as error:
            failures.append(f"{name}: {str(error).splitlines()[0]}")
            # The hub did not answer, after many tries: for the files that follow, only the cache is asked.
            offline = offline or isinstance(error, LocalEntryNotFoundError)
            return None
        return Path(path)

    try:
        found = _first_layout(layouts, fetch, depth=len(folders))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        found, failures = None, [f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"]
    if found is None:
        expected = ", or ".join(" and ".join(files) for _, files in layouts)
        raise NotFoundError(
            ErrorKind.SOURCE_NOT_FOUND,
            f"{source!r} at revision {revision or 'main'!r} is neither a local folder nor a dictionary to be had from the hub, "
            f"which is {expected} ({failures[-1] if failures else 'nothing found'}): check the name, the folder behind it and "
            "the revision, log in if it is gated, or, without a network, fill the cache first (hf download)",
        )
    return found


def _first_layout(
    layouts: Sequence[tuple[str, tuple[str, str]]],
    fetch: Callable[[str, str | None], Path | None],
    *,
    depth: int,
) -> SourceFiles | None:
    """Return the files of the first layout that is there whole; all come from one commit."""
    configs: dict[str, Path | None] = {}
    for name, (config_name, weights_name) in layouts:
        if config_name not in configs:
            configs[config_name] = fetch(config_name, None)
        config = configs[config_name]
        if config is None:
            continue
        # The cache keeps every file under its commit, so all others come from the one that this came from.
        commit = config.parents[depth].name
        weights = fetch(weights_name, commit)
        if weights is not None:
            scaler = fetch(_SCALER, commit) if name == "saelens" else None
            return _files(name, config, weights, scaler, commit)
    return None


def _files(format: str, config: Path, weights: Path, scaler: Path | None, commit: str | None) -> SourceFiles:
    parsed = _read_json(config)
    extra = None if scaler is None else _read_json(scaler)
    return SourceFiles(format, config.parent.name, parsed, weights, extra, commit)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"it has over {_MAX_CONFIG} bytes")
        parsed = json.loads(path.read_bytes(), parse_constant=_no_constant)
        if not isinstance(parsed, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"{path} cannot be read ({type(error).__name__}: {error}): copy or export the dictionary again",
        ) from error
    return parsed


def _no_constant(name: str) -> None:
    raise ValueError(f"it has the number {name}, which JSON does not know")


def cfg_info(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a library's configuration as `info` keeps it; nothing if it is too long for a manifest, or cannot be one's."""
    try:
        nbytes = len(canonical_json(config))
    except InvalidInputError:
        return {}
    return {"cfg": dict(config)} if nbytes <= _MAX_INFO else {}
