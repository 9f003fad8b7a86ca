"""What does the user ask of an import of activations, besides where they are?"""

from dataclasses import dataclass
from typing import Literal

from actstore.checks import check_whole
from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.config import CODECS, POLICIES
from actstore.ingest.importing import check_corpus_name
from actstore.names import check_name

from .source import ActivationSource

DTYPES_KEPT = ("float32", "float16", "bfloat16")
"""Stored bit for bit as found."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments that shape what is stored."""

    run: str
    corpus: str
    model: str | None
    dtype: str | None
    codec: str
    nonfinite: str
    rows_per_unit: int | Literal["auto"]
    full: bool
    """Whether every byte of the source is hashed."""
    special_ids: tuple[int, ...]


def check_settings(settings: Settings, fingerprint_files: str) -> Settings:
    """Return the settings if they can work, whatever the source.

    Raises:
        InvalidInputError: they cannot.
    """
    check_name(settings.run, what="run name")
    check_corpus_name(settings.corpus)
    for name, value, known in (
        ("codec", settings.codec, CODECS),
        ("nonfinite", settings.nonfinite, POLICIES),
        ("fingerprint_files", fingerprint_files, ("full", "sampled")),
        ("dtype", settings.dtype, (None, *DTYPES_KEPT)),
    ):
        if value not in known:
            raise bad_argument(name, value, f"one of {', '.join(map(str, known))}")
    if settings.rows_per_unit != "auto":
        check_whole(settings.rows_per_unit, what="rows_per_unit", least=1, most=1 << 24)
    return settings


def bad_argument(argument: str, value: object, expected: str) -> InvalidInputError:
    """Return the error for an argument that is not what it must be."""
    return InvalidInputError(ErrorKind.BAD_ARGUMENT, f"{argument} must be {expected}, got {value!r:.80}")


def dtype_to_store(source: ActivationSource, settings: Settings) -> str:
    """Return the type that the run stores: that of the arrays, or float32 where it was asked for.

    Raises:
        InvalidInputError: the arrays' types cannot be stored as they are, and no conversion was asked for.
    """
    found = {point.dtype for point in source.hook_points}
    shown = ", ".join(f"{point.source} {point.dtype}" for point in source.hook_points)
    stored = settings.dtype
    if stored is None:
        if len(found) > 1 or not found <= set(DTYPES_KEPT):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{source.description} holds {shown}, which one run cannot store as they are: say dtype='float32' "
                "(--dtype float32) to convert, which rounds float64 and keeps the others exactly",
            )
        stored = found.pop()
    elif stored != "float32" and found != {stored}:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"dtype={stored!r} was asked for, {source.description} holds {shown}: only float32 is converted to; leave dtype out "
            "to store what is there",
        )
    if settings.codec == "cold" and stored != "bfloat16":
        raise bad_argument("codec", settings.codec, f"hot or lz4 for {stored}: cold is for bfloat16")
    return stored
