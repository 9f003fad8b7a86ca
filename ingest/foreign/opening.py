"""Which format does a place have, and what reads it?"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError

from .arrays import ArraySource, is_arrays
from .saelens import SaelensSource, is_saelens
from .settings import bad_argument
from .source import ActivationSource, HookPointNames
from .vllm import VllmSource, is_vllm, names_of_layer_ids

FORMATS = ("saelens", "vllm", "arrays")


def open_activations(
    source: str | os.PathLike[str],
    *,
    format: str | None,
    hook_points: HookPointNames,
    layer_ids: Sequence[int] | None,
    tokens: Any,
    dtype: str | None,
) -> ActivationSource:
    """Return a source; the arguments are those of `import_run`.

    Raises:
        NotFoundError: nothing is there.
        InvalidInputError: no format that is known, or arguments of another format.
    """
    path = Path(source)
    if not path.exists():
        raise NotFoundError(
            ErrorKind.SOURCE_NOT_FOUND, f"there is nothing at {os.fspath(source)!r}: check the path"
        )
    kind = format or _find_format(path)
    if kind not in FORMATS:
        raise bad_argument("format", format, f"one of {', '.join(FORMATS)}")
    if layer_ids is not None and (kind != "vllm" or hook_points is not None):
        raise bad_argument(
            "layer_ids", layer_ids, "left out where hook_points are given or the source is not vLLM's"
        )
    if tokens is not None and kind != "arrays":
        raise bad_argument("tokens", tokens, f"left out: a source of format {kind} has its own")
    if kind != "arrays" and not path.is_dir():
        raise bad_argument("source", os.fspath(source), f"a folder, as format {kind} has")
    if kind == "saelens":
        return SaelensSource(path, hook_points=hook_points)
    if kind == "vllm":
        named = names_of_layer_ids(layer_ids) if layer_ids is not None else hook_points
        return VllmSource(path, hook_points=named)
    return ArraySource(path, tokens=tokens, hook_points=hook_points, as_bfloat16=dtype == "bfloat16")


def _find_format(path: Path) -> str:
    if path.is_dir() and is_saelens(path):
        return "saelens"
    if path.is_dir() and is_vllm(path):
        return "vllm"
    if is_arrays(path):
        return "arrays"
    raise InvalidInputError(
        ErrorKind.BAD_ARGUMENT,
        f"{path} is neither a dataset that SAELens saved (state.json), nor a folder of vLLM's hidden states "
        "(*.safetensors), nor arrays (.npy, .safetensors): give the folder, or name the format",
    )
