"""How is an ingest's configuration written down, as a TOML file or as command-line words?

    store = "s3://bucket/my.store"        # optional: the command line may name it instead
    corpus = "news"
    model = "EleutherAI/pythia-70m"
    hook_points = ["layers.*.resid_post", "embed"]
    run = "pythia@news"
    workers = 8

The keys are the fields of `IngestConfig`, with the same meaning and defaults; `ray_address = "none"` runs without Ray. A key
that is not a field, or a value of another type, is an error: a setting that is misspelt must not be a setting that is ignored.
What is written is plain text without credentials: those belong to the environment.
"""

import dataclasses
import difflib
import json
import os
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError

from .config import IngestConfig

STORE = "store"
"""The one key that is no field of `IngestConfig`."""

NO_RAY = "none"
"""How a file or an option writes a `ray_address` of None."""

_MAX_FILE_BYTES = 1 << 20
"""A configuration is a page; something larger is another file."""

Kind = Literal["text", "whole", "number", "flag", "texts"]


@dataclass(frozen=True, slots=True)
class Field:
    """One setting: what a file or an option may give it."""

    name: str
    kind: Kind
    """A `whole` number is also a `number`."""
    is_optional: bool
    """Whether None is a value: leave the key out."""
    words: tuple[str, ...] = ()
    """Words that a whole number may be instead (`auto`)."""
    is_required: bool = False
    default: Any = None

    @property
    def option(self) -> str:
        """Its option on the command line.

        >>> config_fields()["batch_tokens"].option
        '--batch-tokens'
        """
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What a file says."""

    store: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    """By field of `IngestConfig`; only those in the file."""


def config_fields() -> dict[str, Field]:
    """Return every setting by name, in the order of `IngestConfig`, read from its type.

    >>> config_fields()["rows_per_unit"].words
    ('auto',)
    """
    hints = get_type_hints(IngestConfig)
    return {f.name: _field_of(f, hints[f.name]) for f in dataclasses.fields(IngestConfig)}


def _field_of(entry: "dataclasses.Field[Any]", hint: Any) -> Field:
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = tuple(w for a in alternatives if get_origin(a) is Literal for w in get_args(a))
    (plain,) = (a for a in alternatives if a is not type(None) and get_origin(a) is not Literal)
    kinds: dict[Any, Kind] = {str: "text", int: "whole", float: "number", bool: "flag"}
    is_required = entry.default is dataclasses.MISSING
    return Field(
        name=entry.name,
        kind="texts" if get_origin(plain) is Sequence else kinds[plain],
        is_optional=type(None) in alternatives,
        words=words,
        is_required=is_required,
        default=None if is_required else entry.default,
    )


def read_config_file(path: str | os.PathLike[str]) -> ConfigFile:
    """Return what the TOML file at `path` says, its types checked and its keys known.

    Raises:
        NotFoundError: no such file.
        InvalidInputError: not TOML, an unknown key (the nearest known one is named), or a value of another type.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            ErrorKind.SOURCE_NOT_FOUND,
            f"configuration file {os.fspath(path)!r} does not exist: give the path of a TOML file",
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"configuration file {os.fspath(path)!r} cannot be read: {error}"
        ) from error
    if len(data) > _MAX_FILE_BYTES:
        raise InvalidInputError(
            ErrorKind.TOO_LARGE,
            f"configuration file {os.fspath(path)!r} has more than {_MAX_FILE_BYTES} bytes: is it another file?",
        )
    return parse_config(data, name=os.fspath(path))


def parse_config(data: bytes, *, name: str) -> ConfigFile:
    """Return what TOML text says; see `read_config_file`.

    >>> parse_config(b'run = "a"', name="run.toml")
    ConfigFile(store=None, settings={'run': 'a'})
    """
    try:
        parsed = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"{name!r} is not a TOML file: {error}; write lines of key = value"
        ) from error
    fields = config_fields()
    for key in parsed:
        if key not in fields and key != STORE:
            raise _unknown(key, [*fields, STORE], name)
    store = parsed.pop(STORE, None)
    if store is not None and not isinstance(store, str):
        raise _mistyped(name, STORE, store, "text")
    return ConfigFile(store, {key: _checked(name, fields[key], value) for key, value in parsed.items()})


def make_config(settings: Mapping[str, Any]) -> IngestConfig:
    """Return the configuration with these fields set, and defaults for the rest.

    Raises:
        InvalidInputError: a field without default is left out.
    """
    missing = [f for f in config_fields().values() if f.is_required and f.name not in settings]
    if missing:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"an ingest needs {', '.join(f.name for f in missing)}: give {', '.join(f.option for f in missing)} on the "
            "command line or the keys in the configuration file",
        )
    return IngestConfig(**settings)


def config_toml(config: IngestConfig, *, store: str | None = None) -> str:
    """Return TOML that reads back as `config`: `store` if given, what is required, and what is not the default.

    Raises:
        InvalidInputError: text that no file can hold (half a character).
    """
    lines = [] if store is None else [f"{STORE} = {_toml_value(store)}"]
    lines += [f"{name} = {_toml_value(value)}" for name, value in changed_settings(config).items()]
    return "".join(f"{line}\n" for line in lines)


def config_arguments(config: IngestConfig) -> list[str]:
    """Return the command-line words that `actstore ingest` reads as `config`: one per setting that is not the default.

    >>> config_arguments(IngestConfig("news", "gpt2", ["embed"], "r", compile=True))
    ['--corpus=news', '--model=gpt2', '--hook-points=embed', '--run=r', '--compile']
    """
    words, fields = [], config_fields()
    for name, value in changed_settings(config).items():
        option = fields[name].option
        if fields[name].kind == "flag":
            words.append(option if value else "--no-" + option.removeprefix("--"))
        else:
            # Joined to its option, a value may begin with a dash.
            words += [f"{option}={v}" for v in (value if fields[name].kind == "texts" else [value])]
    return words


def changed_settings(config: IngestConfig) -> dict[str, Any]:
    """Return the fields that are required or not the default, as a file would hold them."""
    settings: dict[str, Any] = {}
    for name, known in config_fields().items():
        value = getattr(config, name)
        if known.kind == "texts":
            value = list(value)
        if known.is_required or value != (list(known.default) if known.kind == "texts" else known.default):
            settings[name] = NO_RAY if name == "ray_address" and value is None else value
    return settings


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        if any(0xD800 <= ord(c) < 0xE000 for c in value):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{value!r:.80} has half a character, which no file can hold: correct it",
            )
        # A JSON string is a TOML string but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(map(_toml_value, value))}]"


def _checked(name: str, known: Field, value: Any) -> Any:
    """Return a file's value if it is of the field's type. Sizes are `IngestConfig.check`'s to judge."""
    if known.name == "ray_address" and value == NO_RAY:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "text": isinstance(value, str),
        "whole": (is_number and isinstance(value, int)) or (isinstance(value, str) and value in known.words),
        "number": is_number,
        "flag": isinstance(value, bool),
        "texts": isinstance(value, list) and all(isinstance(v, str) for v in value),
    }
    if not fits[known.kind]:
        wanted = {
            "whole": "a whole number",
            "number": "a number",
            "flag": "true or false",
            "texts": "a list of texts",
        }
        expected = " or ".join([wanted.get(known.kind, "text"), *(repr(w) for w in known.words)])
        raise _mistyped(name, known.name, value, expected)
    return float(value) if known.kind == "number" else value


def _mistyped(file: str, key: str, value: Any, expected: str) -> InvalidInputError:
    return InvalidInputError(
        ErrorKind.BAD_ARGUMENT,
        f"{key} in {file!r} must be {expected}, got {value!r:.80} ({type(value).__name__})",
    )


def _unknown(key: str, known: Sequence[str], file: str) -> InvalidInputError:
    if key in ("no_ray", "no-ray"):
        return InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"{file!r} has the unknown key {key!r}: write ray_address = {NO_RAY!r}"
        )
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
    return InvalidInputError(ErrorKind.BAD_ARGUMENT, f"{file!r} has the unknown key {key!r:.80}: {hint}")
