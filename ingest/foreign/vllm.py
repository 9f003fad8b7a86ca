"""How are the hidden states read that vLLM wrote, one file per request?

vLLM's `extract_hidden_states` with its `ExampleHiddenStatesConnector`, and `speculators` (`hs_<i>.safetensors`), write
`hidden_states` of shape [tokens, layers, d_model] and `token_ids` of shape [tokens]. The axis of layers has what
`eagle_aux_hidden_state_layer_ids` asked for, in ascending order: id 0 is the input of the first layer, id i the residual
stream behind layer i - 1, and the number of layers as an id the stream behind the last one, before the final norm.

Source: vLLM, documentation "Extracting hidden states" and `vllm/model_executor/models/llama.py` (how a model collects
auxiliary hidden states), as of 2026-08.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

from .content import SourceFiles
from .safetensors_file import FLOATS, SafetensorsFile, open_safetensors
from .source import (
    Array,
    HookPointNames,
    SourceHookPoint,
    TokenBatch,
    check_ids,
    copy_rows,
    refuse,
    resolve_names,
    same_tokens,
)

SUFFIX = ".safetensors"
HIDDEN_STATES = "hidden_states"
TOKENS = "token_ids"
_BATCH_TOKENS = 1 << 18
_BATCH_FILES = 4_096


def names_of_layer_ids(layer_ids: Sequence[int]) -> list[str]:
    """Return the hook points that vLLM's `eagle_aux_hidden_state_layer_ids` mean, in the order in which they are stored.

    Raises:
        InvalidInputError: ids that are not ascending, which vLLM would store in another order than given.

    >>> names_of_layer_ids([0, 2, 32])
    ['layers.0.resid_pre', 'layers.1.resid_post', 'layers.31.resid_post']
    """
    ids = list(layer_ids)
    if not ids or ids != sorted(set(ids)) or ids[0] < 0:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"layer ids must be different and ascending, got {ids}: vLLM stores layers in the model's order, whatever the order "
            "in which they are asked for; give them in that order",
        )
    return ["layers.0.resid_pre" if i == 0 else f"layers.{i - 1}.resid_post" for i in ids]


def is_vllm(folder: Path) -> bool:
    """Return whether a folder's first safetensors file holds one request's hidden states."""
    first = next(iter(_request_files(folder)), None)
    return first is not None and {HIDDEN_STATES, TOKENS} <= open_safetensors(folder / first).tensors.keys()


class VllmSource:
    """Requests of one folder, in natural order of their file names; every request is a document.

    The file names are kept in memory, about 150 bytes each.
    """

    format = "vllm"
    has_words = False
    has_spans = False

    def __init__(self, folder: Path, *, hook_points: HookPointNames) -> None:
        """Find the files, and take what all must share from the first.

        Raises:
            InvalidInputError: no such files, or the hook points do not fit the axis of layers.
        """
        names = _request_files(folder)
        self.description = str(folder)
        if not names:
            packed = any(folder.glob("*.zst"))
            refuse(
                f"{folder} has no {SUFFIX} file" + (", only compressed ones" if packed else ""),
                "unpack them (zstd -d)"
                if packed
                else "give the folder that vLLM wrote to (shared_storage_path)",
            )
        self._files = SourceFiles(folder, names)
        first = self._open(0)
        self._check_tensors(first)
        tensor = first.tensors[HIDDEN_STATES]
        self._dtype, self._tail = tensor.dtype, tensor.shape[1:]
        layers = [f"layer {i}" for i in range(tensor.shape[1] if len(tensor.shape) == 3 else 1)]
        if hook_points is None:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{folder} has hidden states of {len(layers)} layers and does not say which: give hook_points= (one "
                "--hook-point for each), or the ids that vLLM was given, layer_ids= (--layer-ids)",
            )
        chosen = resolve_names(layers, hook_points, where=self.description)
        self._axis = {name: i for i, name in chosen.items()}
        width, dtype = tensor.shape[-1], FLOATS[tensor.dtype]
        self.hook_points = tuple(SourceHookPoint(layers[i], name, width, dtype) for i, name in chosen.items())

    def fingerprint(self, *, full: bool) -> str:
        """Return the hash of the requests' files."""
        return self._files.fingerprint(full=full)

    def check_unchanged(self) -> None:
        """Check the files' sizes and times."""
        self._files.check_unchanged()

    def tokens(self, first_doc: int = 0) -> Iterator[TokenBatch]:
        """Yield the requests' tokens."""
        keys: list[str] = []
        parts: list[npt.NDArray[np.int32]] = []
        n_tokens = 0
        for doc in range(first_doc, len(self._files.names)):
            ids, _ = self._request(doc)
            keys.append(self._files.names[doc].removesuffix(SUFFIX))
            parts.append(ids)
            n_tokens += len(ids)
            if n_tokens >= _BATCH_TOKENS or len(keys) == _BATCH_FILES or doc + 1 == len(self._files.names):
                lengths = np.array([len(p) for p in parts], np.int64)
                yield TokenBatch(doc + 1 - len(keys), keys, lengths, np.concatenate(parts))
                keys, parts, n_tokens = [], [], 0

    def read(
        self,
        first_doc: int,
        first_row: int,
        token_ids: Array,
        starts: Array,
        out: Mapping[str, Array],
        dtype: str,
    ) -> None:
        """Copy requests, a file at a time."""
        del first_row
        for i in range(len(starts) - 1):
            a, b = int(starts[i]), int(starts[i + 1])
            ids, states = self._request(first_doc + i)
            same_tokens(str(self._path(first_doc + i)), ids, token_ids[a:b])
            values = states.map(HIDDEN_STATES)
            for name, axis in self._axis.items():
                copy_rows(values[:, axis] if values.ndim == 3 else values, out[name][a:b], dtype)

    def _request(self, doc: int) -> tuple[npt.NDArray[np.int32], SafetensorsFile]:
        """Return a request's tokens and its file, once the file fits the first one."""
        file = self._open(doc)
        self._check_tensors(file)
        tensor = file.tensors[HIDDEN_STATES]
        if (tensor.dtype, tensor.shape[1:]) != (self._dtype, self._tail):
            refuse(
                f"{file.path} has hidden states {tensor.dtype} {list(tensor.shape)}, the first file {self._dtype} "
                f"[tokens, {', '.join(map(str, self._tail))}]",
                "import what one model and one setting wrote",
            )
        ids = file.map(TOKENS)
        if not len(ids):
            refuse(f"{file.path} has no token", "leave such requests out")
        return check_ids(ids, place=lambda i: f"{file.path}, token {i}"), file

    def _check_tensors(self, file: SafetensorsFile) -> None:
        missing = {HIDDEN_STATES, TOKENS} - file.tensors.keys()
        if missing:
            refuse(
                f"{file.path} has no tensor {' and no tensor '.join(map(repr, sorted(missing)))}, only "
                f"{', '.join(sorted(file.tensors)) or 'none'}",
                "give the folder that vLLM wrote to, with nothing else in it",
            )
        states, ids = file.tensors[HIDDEN_STATES], file.tensors[TOKENS]
        if states.dtype not in FLOATS:
            refuse(f"{file.path}: hidden states are {states.dtype}", "store them as BF16, F16 or F32")
        if len(states.shape) not in (2, 3) or len(ids.shape) != 1:
            refuse(
                f"{file.path} has hidden states of shape {list(states.shape)} and token ids of shape {list(ids.shape)}",
                "they must be [tokens, layers, d_model] and [tokens]",
            )
        if states.shape[0] != ids.shape[0]:
            swapped = len(states.shape) == 3 and states.shape[1] == ids.shape[0]
            refuse(
                f"{file.path} has {ids.shape[0]} tokens and {states.shape[0]} hidden states",
                "swap its axes to [tokens, layers, d_model]"
                if swapped
                else "a prefix cache leaves out the states of tokens it has seen; run vLLM without prefix caching "
                "(enable_prefix_caching=False)",
            )

    def _path(self, doc: int) -> Path:
        return self._files.folder / self._files.names[doc]

    def _open(self, doc: int) -> SafetensorsFile:
        return open_safetensors(self._path(doc))


def _request_files(folder: Path) -> list[str]:
    return sorted((p.name for p in folder.glob(f"*{SUFFIX}") if p.is_file()), key=_natural)


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key in which `hs_10` comes after `hs_9`; the name itself decides between `hs_1` and `hs_01`."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name
