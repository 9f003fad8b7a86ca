"""Which options does `actstore ingest` have, and which configuration do they mean?

There is one option for every field of `IngestConfig`, made from the field itself; a file given by `--config` is the ground
that they are laid over.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.cli.bars import auto_or_int
from actstore.ingest.config import CODE_DTYPES, CODECS, KEEPS, POLICIES, POOLINGS, IngestConfig
from actstore.ingest.config_file import (
    NO_RAY,
    ConfigFile,
    Field,
    config_fields,
    make_config,
    read_config_file,
)

HELP = {
    "corpus": "name of an imported corpus",
    "model": "local folder or hub name; safetensors only",
    "hook_points": "e.g. 'layers.*.resid_post' embed",
    "run": "name of the run, new or to be resumed",
    "revision": "branch, tag or commit of a hub model",
    "tokenizer": "folder or hub name; default: the model's own",
    "window": "tokens per window; default: the model's context",
    "overlap": "tokens shared by neighbouring windows",
    "rows_per_unit": "rows per unit of work",
    "keep": f"what is stored: {', '.join(KEEPS)}",
    "poolings": f"which document vectors: {', '.join(POOLINGS)}",
    "pool_special": "special tokens enter document vectors and codes",
    "dictionary": "with codes: dictionaries in the store, one or more of each hook point",
    "codes_dtype": "stored type of codes",
    "pool_top_m": "latents whose codes are kept of each document",
    "postings_memory_mb": "MiB for building the codes' postings",
    "sample": "share of the token rows that is stored",
    "seed": "of what is drawn: sampled rows, documents checked",
    "covariance": "keep each hook point's full covariance",
    "dtype": "stored type: fp32, fp16, bf16, int8; default: as computed",
    "compute_dtype": "type the model computes in; default: as its weights are stored",
    "device": "cpu, cuda, cuda:N, mps",
    "attn_implementation": "eager, sdpa, flash_attention_2, ...",
    "compile": "run the model through torch.compile",
    "device_map": "auto, balanced, ...: spread one model over a worker's devices",
    "gpus_per_worker": "GPUs each worker reserves",
    "batch_tokens": "padded tokens per forward pass",
    "codec": "hot: raw rows; lz4, cold: smaller, slower",
    "nonfinite": "what NaN and infinity do",
    "workers": "actors at most, each with its own model",
    "min_workers": "actors that must be ready before the first unit",
    "ray_address": f"local, auto or ray://host:port; {NO_RAY}: run in this process",
    "max_attempts": "times a unit is tried",
    "allow_failed": "units that may be left out of the run",
    "straggler_factor": "times the median after which a unit is given to a second worker too; 0: never",
    "self_check": "share of the documents to run again alone, and compare",
    "commit_units": "units per commit at most",
    "commit_interval_s": "seconds that finished units wait at most for their commit",
    "retry_s": "seconds that a store that does not answer is asked again",
    "start_timeout_s": "seconds to wait for min_workers workers",
}
"""One line for every field of `IngestConfig`."""

_CHOICES: dict[str, Sequence[str]] = {"codec": CODECS, "codes_dtype": CODE_DTYPES, "nonfinite": POLICIES}
_PREFIX = "config_"
"""`run` is the name of a setting and of every command's function."""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the store, `--config` and an option for every setting."""
    parser.add_argument("store", metavar="STORE", nargs="?", help="folder or URL of the store")
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file of these settings; options come before it"
    )
    group = parser.add_argument_group("settings (keys of the file, with _ for -)")
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--no-ray", action="store_true", help=f'run in this process; in the file: ray_address = "{NO_RAY}"'
    )
    for known in config_fields().values():
        _add_option(where if known.name == "ray_address" else group, known)


def parse_config_arguments(args: argparse.Namespace) -> tuple[str, IngestConfig]:
    """Return where the store is and the configuration: options, then the file, then defaults.

    Raises:
        NotFoundError: the file does not exist.
        InvalidInputError: it cannot be used, or something that is needed is in neither.
    """
    file = ConfigFile(None) if args.config is None else read_config_file(args.config)
    store = args.store if args.store is not None else file.store
    if store is None:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            'no store was named: give its folder or URL on the command line, or as store = "..." in the file',
        )
    given: dict[str, Any] = {
        name: getattr(args, _PREFIX + name) for name in config_fields() if hasattr(args, _PREFIX + name)
    }
    for name, known in config_fields().items():
        if known.kind == "texts" and name in given:
            given[name] = [part for text in given[name] for part in split_names(text)]
    if args.no_ray or given.get("ray_address") == NO_RAY:
        given["ray_address"] = None
    return store, make_config({**file.settings, **given}).check()


def split_names(text: str) -> list[str]:
    """Split at commas outside braces.

    >>> split_names("layers.{1..2}.mlp_out,embed")
    ['layers.{1..2}.mlp_out', 'embed']
    """
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p for p in [*parts, text[start:]] if p]


def _add_option(group: Any, known: Field) -> None:
    text = HELP[known.name]
    if known.default not in (None, False, "auto", ()) and not known.is_required:
        text += f" (default: {_shown(known)})"
    # Absent unless given: what is given wins over the file.
    options: dict[str, Any] = {
        "dest": _PREFIX + known.name,
        "default": argparse.SUPPRESS,
        "help": text.replace("%", "%%"),
    }
    metavar = {"whole": "N", "number": "X", "texts": "NAME"}.get(
        known.kind, known.name.rpartition("_")[2].upper()
    )
    if known.kind == "flag":
        group.add_argument(known.option, action=argparse.BooleanOptionalAction, **options)
        return
    if known.name in _CHOICES:
        options["choices"] = _CHOICES[known.name]
    else:
        options["metavar"] = metavar
    if known.kind == "texts":
        options |= {"nargs": "+", "action": "extend"}
    elif known.kind != "text":
        options["type"] = float if known.kind == "number" else auto_or_int if known.words else int
    group.add_argument(known.option, **options)


def _shown(known: Field) -> str:
    """Return a default as the command line writes it."""
    if known.kind == "texts":
        return ",".join(known.default)
    return f"{known.default:,}" if known.kind == "whole" else str(known.default)
