"""What is the name of a place in a model, and which places does a user's pattern mean?

One grammar for all architectures (FORMAT.md, section 6.6):

    embed                                    output of the token embedding module, before positions or norms are added
    layers.{i}.resid_pre                     input of layer i, counted from 0
    layers.{i}.attn_z                        input of attention's output projection: what the heads computed, one after the other
    layers.{i}.attn_out                      what attention adds to the residual stream (after a post-norm, if any)
    layers.{i}.resid_mid                     the residual stream between attention and MLP; not where both read the same stream
    layers.{i}.mlp_in                        what the MLP receives (after its norm, if any)
    layers.{i}.router                        logits of a mixture's router, one per expert, before softmax and choice
    layers.{i}.mlp_act                       input of the MLP's output projection: its neurons
    layers.{i}.mlp_out                       what the MLP adds to the residual stream (after a post-norm, if any)
    layers.{i}.resid_post                    output of layer i; of the last layer too, so before the final norm
    final_norm                               output of the norm after the last layer, which heads read
    module:<path>[:input|:output]            any module of the model by its path; `:output` where no side is named

The names of TransformerLens (`blocks.3.hook_resid_post`) and sparsify (`layers.3`, `layers.3.mlp`) mean the same places.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError

LAYER_PARTS = (
    "resid_pre",
    "attn_z",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "router",
    "mlp_act",
    "mlp_out",
    "resid_post",
)
"""Parts of a layer, in the order in which a pre-norm layer computes them. No model has all: few have a router."""

_OUTSIDE = ("embed", "final_norm")
"""Named places outside the layers."""

_LAYER_NAME = re.compile(r"layers\.(0|[1-9][0-9]*)\.([a-z_]+)")
_MODULE_PATH = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_MODULE_PATTERN = re.compile(r"[A-Za-z0-9_.*?\[\]!{},-]+")
_MAX_MODULE_PATH = 180
"""Characters: a hook point is one part of an object key, which FORMAT.md limits to 200."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_MAX_EXPANSION = 10_000
"""Patterns that braces may expand to: over a hundred times the layers of any model, so only a typo passes it."""

# A layer in an alias may itself be a pattern: 3, *, [0-3], {4..8}.
_LAYER = r"(?P<layer>\{[^{}]*\}|[^.{}]+)"
# `hook_mlp_in` is meant as its version 3 means it, after the norm; before version 3 it lay before the norm, as hook_resid_mid.
_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_in": "resid_pre",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "ln2.hook_in": "resid_mid",
    "hook_mlp_in": "mlp_in",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_act",
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "resid_post",
    "hook_out": "resid_post",
}
_TRANSFORMER_LENS_OUTSIDE = {
    "hook_embed": "embed",
    "embed.hook_out": "embed",
    "ln_final.hook_normalized": "final_norm",
    "ln_final.hook_out": "final_norm",
}
_BLOCK_ALIAS = re.compile(rf"blocks\.{_LAYER}\.(?P<part>.+)")
_SPARSIFY_ALIAS = re.compile(rf"(?:layers|h)\.{_LAYER}(?P<mlp>\.mlp)?")


@dataclass(frozen=True, slots=True)
class HookPoint:
    """One place in a model, by its canonical name."""

    name: str
    """Canonical name: what stores, manifests and results call it."""

    layer: int | None
    """Layer counted from 0; None for `embed`, `final_norm` and `module:` places."""

    part: str
    """`embed`, one of `LAYER_PARTS`, `final_norm`, or `module`."""

    module: str | None = None
    """Path of the module, for `module:` places."""

    side: Literal["input", "output"] = "output"
    """Which side of that module."""


def canonical_hook_point(name: str) -> str:
    """Return `name` with aliases of other tools translated; a name of no known tool comes back as it is.

    Layers may be patterns, which are kept.

    Raises:
        InvalidInputError: no text, or a `module:` name whose path or side could not be one.

    >>> canonical_hook_point("blocks.3.hook_resid_post"), canonical_hook_point("layers.{4..8}.mlp")
    ('layers.3.resid_post', 'layers.{4..8}.mlp_out')
    >>> canonical_hook_point("module:layers.0.mlp.gate")
    'module:layers.0.mlp.gate:output'
    """
    if not isinstance(name, str):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"a hook point's name is text like 'layers.3.resid_post', got {name!r:.80}",
        )
    name = name.strip()
    if name.startswith("module:"):
        return _canonical_module(name)
    if name in _TRANSFORMER_LENS_OUTSIDE:
        return _TRANSFORMER_LENS_OUTSIDE[name]
    if block := _BLOCK_ALIAS.fullmatch(name):
        part = _TRANSFORMER_LENS.get(block["part"])
        return f"layers.{block['layer']}.{part}" if part else name
    if layer := _SPARSIFY_ALIAS.fullmatch(name):
        return f"layers.{layer['layer']}.{'mlp_out' if layer['mlp'] else 'resid_post'}"
    return name


def _canonical_module(name: str) -> str:
    path, _, side = name.removeprefix("module:").partition(":")
    side = side or "output"
    if not _MODULE_PATTERN.fullmatch(path) or len(path) > _MAX_MODULE_PATH or side not in ("input", "output"):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"hook point {name!r} is not of the form module:<path>[:input|:output] with a path of letters, digits, _ and"
            f" dots of at most {_MAX_MODULE_PATH} characters: give the module's path as model.named_modules() shows it",
        )
    return f"module:{path}:{side}"


def parse_hook_point(name: str) -> HookPoint:
    """Return the place that one name (no pattern) means, aliases translated.

    Raises:
        NotFoundError: a name of no place.
        InvalidInputError: a malformed `module:` name.

    >>> parse_hook_point("blocks.3.mlp.hook_post")
    HookPoint(name='layers.3.mlp_act', layer=3, part='mlp_act', module=None, side='output')
    """
    canonical = canonical_hook_point(name)
    if canonical in _OUTSIDE:
        return HookPoint(canonical, None, canonical)
    if canonical.startswith("module:"):
        path, _, side = canonical.removeprefix("module:").partition(":")
        if _MODULE_PATH.fullmatch(path):
            return HookPoint(canonical, None, "module", path, "input" if side == "input" else "output")
    found = _LAYER_NAME.fullmatch(canonical)
    if found and found[2] in LAYER_PARTS:
        return HookPoint(canonical, int(found[1]), found[2])
    raise NotFoundError(
        ErrorKind.HOOK_POINT_NOT_FOUND,
        f"hook point {name!r} is none: the names are embed, layers.<i>.<part> with part one of {', '.join(LAYER_PARTS)},"
        " final_norm, and module:<path>[:input|:output]",
    )


def expand_hook_points(
    patterns: str | Iterable[str],
    available: Sequence[str],
    *,
    modules: Iterable[str] = (),
    module_prefix: str = "",
) -> tuple[str, ...]:
    """Return the canonical names that `patterns` mean, each once, in layer order.

    Args:
        patterns: Names, aliases or patterns, comma-separated or several: globs match within a dotted part
            (`layers.*.resid_post`; `*` alone is everything), `{4..8}` is a range with both ends, `{0,3}` a choice.
        available: Canonical names that exist, as a model or a stored run lists them.
        modules: Paths of the model's modules, which `module:` patterns may name besides those in `available`.
        module_prefix: What a checkpoint may put before those paths (`model`, `transformer`): accepted and dropped.

    Raises:
        NotFoundError: a pattern matches nothing; says what is close and what there is.
        InvalidInputError: no pattern, or a malformed one.

    >>> expand_hook_points("layers.{0..1}.resid_post, hook_embed", ["embed", "layers.0.resid_post", "layers.1.resid_post"])
    ('embed', 'layers.0.resid_post', 'layers.1.resid_post')
    """
    wanted = [p for text in ([patterns] if isinstance(patterns, str) else patterns) for p in _split(text)]
    if not wanted:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"no hook point was named; there are: {describe_hook_points(available)}"
        )
    module_names = [f"module:{path}:{side}" for path in modules for side in ("input", "output")]
    found: set[str] = set()
    for pattern in wanted:
        canonical = canonical_hook_point(pattern)
        if canonical.startswith(f"module:{module_prefix}.") and module_prefix:
            canonical = "module:" + canonical.removeprefix(f"module:{module_prefix}.")
        names = [*available, *module_names] if canonical.startswith("module:") else available
        # Each alternative must exist: a range past the last layer is a mistake, not a wish for fewer layers.
        for alternative in _braces(canonical):
            matched = [name for name in names if _matches(alternative, name)]
            if not matched:
                raise _not_found(pattern, alternative, names, available)
            found.update(matched)
    return tuple(sorted(found, key=layer_order))


def layer_order(name: str) -> tuple[int, int, int, list[tuple[int, str]]]:
    """Return the sort key of a canonical name: embed, layers by number and part, final_norm, then modules by path.

    >>> sorted(["layers.10.resid_pre", "layers.2.resid_post", "layers.2.attn_out", "embed"], key=layer_order)
    ['embed', 'layers.2.attn_out', 'layers.2.resid_post', 'layers.10.resid_pre']
    """
    numbered = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
    found = _LAYER_NAME.fullmatch(name)
    if not found:
        return ({"embed": 0, "final_norm": 2}.get(name, 3), 0, 0, numbered)
    part = LAYER_PARTS.index(found[2]) if found[2] in LAYER_PARTS else len(LAYER_PARTS)
    return (1, int(found[1]), part, numbered)


def describe_hook_points(names: Sequence[str]) -> str:
    """Return a short list of names, with layers that have the same parts drawn together.

    >>> describe_hook_points(["embed", "layers.0.resid_pre", "layers.0.resid_post", "layers.1.resid_pre"])
    'embed, layers.0.{resid_pre,resid_post}, layers.1.resid_pre'
    >>> describe_hook_points([f"layers.{i}.resid_post" for i in range(12)])
    'layers.{0..11}.resid_post'
    """
    others, parts_of_layer = [], dict[int, list[str]]()
    for name in sorted(names, key=layer_order):
        if found := _LAYER_NAME.fullmatch(name):
            parts_of_layer.setdefault(int(found[1]), []).append(found[2])
        else:
            others.append(name)
    groups: list[tuple[list[int], list[str]]] = []
    for layer, parts in parts_of_layer.items():
        if groups and groups[-1][1] == parts and groups[-1][0][-1] == layer - 1:
            groups[-1][0].append(layer)
        else:
            groups.append(([layer], parts))
    texts = [f"layers.{_span(layers)}.{_choice(parts)}" for layers, parts in groups]
    embed = [o for o in others if o == "embed"]
    return ", ".join([*embed, *texts, *(o for o in others if o != "embed")]) or "none"


def _span(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{{{layers[0]}..{layers[-1]}}}"


def _choice(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else "{" + ",".join(parts) + "}"


def _split(text: str) -> list[str]:
    """Split at commas that no brace encloses."""
    return [part.strip() for part in re.split(r",(?![^{]*\})", text) if part.strip()]


def _braces(pattern: str) -> list[str]:
    """Return the patterns that `{4..8}` and `{a,b}` stand for."""
    done, todo = list[str](), [pattern]
    while todo:
        text = todo.pop(0)
        if found := _RANGE.search(text):
            start, stop = int(found[1]), int(found[2])
            if start > stop or stop - start >= _MAX_EXPANSION:
                raise InvalidInputError(
                    ErrorKind.BAD_ARGUMENT,
                    f"range {found[0]} in hook point {pattern!r} must run from the lower layer to the higher, both included",
                )
            choices = [str(i) for i in range(start, stop + 1)]
        elif found := _CHOICE.search(text):
            choices = [choice.strip() for choice in found[1].split(",")]
        else:
            done.append(text)
            continue
        todo += [text[: found.start()] + choice + text[found.end() :] for choice in choices]
        if len(todo) + len(done) > _MAX_EXPANSION:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"hook point {pattern!r} stands for over {_MAX_EXPANSION} names: name fewer",
            )
    return done


def _matches(pattern: str, name: str) -> bool:
    if pattern == name:
        return True
    if pattern == "*":
        return not name.startswith("module:")
    parts, of_name = pattern.split("."), name.split(".")
    return len(parts) == len(of_name) and all(map(fnmatchcase, of_name, parts))


def _not_found(pattern: str, canonical: str, names: Sequence[str], available: Sequence[str]) -> NotFoundError:
    near = difflib.get_close_matches(canonical, names, n=3, cutoff=0.6)
    hint = f" did you mean {' or '.join(near)}?" if near else ""
    return NotFoundError(
        ErrorKind.HOOK_POINT_NOT_FOUND,
        f"hook point {pattern!r} matches nothing here;{hint} there are: {describe_hook_points(available)}",
    )
