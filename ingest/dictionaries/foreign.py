"""How are settings and tensors of unknown origin taken, so that what comes out is what it should be?"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from actstore.checks import is_whole
from actstore.errors import ActstoreError, ErrorKind, InvalidInputError
from actstore.hook_points import canonical_hook_point, parse_hook_point
from actstore.ingest.foreign.safetensors_file import FLOATS, SafetensorsFile, open_safetensors

FloatArray = npt.NDArray[np.float32]

_LAYER = re.compile(
    r"(?:[A-Za-z_]+\.)*?(?P<path>(?:layers|h|blocks?)\.(?P<layer>\d+)(?:\.(?P<rest>[A-Za-z0-9_.]+))?)"
)
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the caller says of a dictionary; None for what its files say."""

    hook_point: str | None = None
    hook_point_out: str | None = None
    norm_factor: float | None = None
    center: bool = False


@dataclass(slots=True)
class Notes:
    """Things about a dictionary that a person should know."""

    lines: list[str] = field(default_factory=list)


def refuse(problem: str, advice: str) -> NoReturn:
    """Raise the error for a dictionary that is damaged, or not what it should be."""
    raise InvalidInputError(ErrorKind.BAD_MODEL, f"{problem}: {advice}")


class Settings:
    """A library's own configuration; every value is checked when it is taken."""

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        self.values, self.what = values, what

    def whole(self, name: str) -> int:
        """Return a whole number above 0."""
        value = self.values.get(name)
        if not is_whole(value) or value < 1:  # type: ignore[operator]
            self._bad(name, value, "a whole number above 0")
        return int(value)  # type: ignore[arg-type]

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false; null is the default."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._bad(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        """Return text; null is the default."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > 1000:
            self._bad(name, value, "text")
        return value

    def part(self, name: str) -> "Settings":
        """Return settings within these; empty where there are none."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self._bad(name, value, "an object")
        return Settings(value or {}, f"{self.what}, {name}")

    def _bad(self, name: str, value: object, wanted: str) -> NoReturn:
        refuse(f"{name} of {self.what} is {value!r:.80}, not {wanted}", "export the dictionary again")


class Tensors:
    """Tensors of a safetensors file, taken by name and shape as float32; none may be left over."""

    def __init__(self, path: Path) -> None:
        self._file: SafetensorsFile = open_safetensors(path)
        self._taken: set[str] = set()
        self.what = str(path)

    def __contains__(self, name: str) -> bool:
        return name in self._file.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that must be there."""
        if name not in self._file.tensors:
            refuse(
                f"{self.what} has no tensor {name!r}, only {self._names()}",
                "export the dictionary again, or name its format",
            )
        return self._file.tensors[name].shape

    def take(self, name: str, shape: tuple[int, ...], *, transpose: bool = False) -> FloatArray:
        """Return a floating-point tensor of this shape as float32, transposed if asked; float64 is rounded."""
        found = self.shape(name)
        if found != shape:
            refuse(
                f"{name} of {self.what} has shape {list(found)}, and its configuration makes it {list(shape)}",
                "the two files do not belong together",
            )
        self._taken.add(name)
        kind = FLOATS.get(self._file.tensors[name].dtype)
        if kind is None:
            refuse(
                f"{name} of {self.what} is {self._file.tensors[name].dtype}, not floating-point numbers",
                "export it again",
            )
        array = self._file.map(name)
        if transpose:
            array = array.T
        if kind == "bfloat16":
            return (np.ascontiguousarray(array).astype(np.uint32) << np.uint32(16)).view(np.float32)
        with np.errstate(over="ignore"):  # an infinity is found when the dictionary is made
            return np.array(array, np.float32, order="C")

    def scalar(self, name: str) -> float:
        """Return the one number of a tensor, whatever its type."""
        shape = self.shape(name)
        if int(np.prod(shape)) != 1:
            refuse(
                f"{name} of {self.what} has shape {list(shape)}, not one number",
                "export the dictionary again",
            )
        self._taken.add(name)
        tensor = self._file.tensors[name]
        if tensor.dtype in FLOATS:
            return float(self.take(name, shape).reshape(-1)[0])
        return float(self._file.map(name).reshape(-1)[0])

    def ignore(self, names: Iterable[str]) -> None:
        """Leave tensors out that change no code."""
        self._taken.update(names)

    def check_all_taken(self, what: str) -> None:
        """Refuse a file with tensors that nobody asked for: they may mean something."""
        if left := sorted(set(self._file.tensors) - self._taken):
            refuse(
                f"{self.what} has tensors that {what} has no use for: {', '.join(left)[:200]}",
                "is it of that format?",
            )

    def _names(self) -> str:
        return ", ".join(sorted(self._file.tensors))[:200] or "none"


def place(name: object, wanted: str | None, *, what: str, option: str = "--hook-point") -> str:
    """Return the canonical hook point: the one that the caller wants, else the one that `name` means.

    >>> place("blocks.3.attn.hook_z", None, what="x"), place("model.layers.3", None, what="x")
    ('layers.3.attn_z', 'layers.3.resid_post')
    >>> place("transformer.h.2.attn", None, what="x"), place("anything", "layers.1.mlp_out", what="x")
    ('module:h.2.attn:output', 'layers.1.mlp_out')
    """
    if wanted is not None:
        return parse_hook_point(wanted).name
    if isinstance(name, str) and len(name) < 300:
        for candidate in _candidates(name.strip()):
            try:
                return parse_hook_point(candidate).name
            except ActstoreError:
                continue
    refuse(
        f"{what} names the place of its rows {name!r:.120}, which is no hook point that is known",
        f"say which it is ({option} layers.3.resid_post, or module:<path>)",
    )


def _candidates(name: str) -> list[str]:
    if name.rsplit(".", 1)[-1] in _EMBEDDINGS:
        return ["embed"]
    found = _LAYER.fullmatch(name)
    if found is None or (found["rest"] or "").startswith("hook_") or ".hook_" in name:
        return [name]
    if found["rest"] in (None, "mlp"):
        rest = f".{found['rest']}" if found["rest"] else ""
        return [name, canonical_hook_point(f"layers.{found['layer']}{rest}")]
    return [name, f"module:{found['path']}:output"]
