"""What are the bytes of a JSON value, the same ones every time? (FORMAT.md, section 4.1)

Canonical JSON is what this module writes: UTF-8, keys sorted by code point, no spaces, no escapes but the necessary,
integers as integers, floats as the shortest decimal that reads back to the same double, and neither NaN nor
infinities. Whatever is hashed or must be reproduced byte by byte is written so. A *framed* object is one line of it,
a line feed, and a line with the CRC-32 of what stands before: enough to tell damage from a foreign writer before
anything is believed.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

from actstore.errors import ErrorKind, FormatError, InvalidInputError

_INT_MIN, _INT_END = -(1 << 63), 1 << 64
"""Integers that JSON readers in other languages can hold, signed or unsigned."""

_MAX_DEPTH = 64

_TRAILER = 9
"""Bytes of `<8 hex digits>\\n`."""

_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False
)


def canonical_json(value: object) -> bytes:
    r"""Return the canonical JSON of `value` in UTF-8.

    Mappings become objects, lists and tuples arrays; subclasses of str, int and float are written as those.

    Raises:
        InvalidInputError: a value that JSON cannot hold exactly: NaN, an infinity, an integer outside
            `[-2**63, 2**64)`, a key that is not a string, a lone surrogate, or another type.

    >>> canonical_json({"b": [1, 2.5, None], "a": "é"})
    b'{"a":"\xc3\xa9","b":[1,2.5,null]}'
    """
    try:
        return dump_plain(_plain(value, "", 0))
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"text with a lone surrogate cannot be stored: {error}"
        ) from error


def dump_plain(value: object) -> bytes:
    """Return the canonical JSON of a value made of plain dicts, lists, str, int, float, bool and None only."""
    return _ENCODER.encode(value).encode()


def fingerprint(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON of a configuration, as 64 hex digits.

    >>> fingerprint({"window": 128, "overlap": 0}) == fingerprint({"overlap": 0, "window": 128})
    True
    """
    return hashlib.sha256(canonical_json(config)).hexdigest()


def frame(value: object) -> bytes:
    r"""Return `value` as a line of canonical JSON and a line with its CRC-32.

    >>> frame({"v": 1})
    b'{"v":1}\n6a3b9165\n'
    """
    line = canonical_json(value) + b"\n"
    return line + f"{zlib.crc32(line):08x}\n".encode()


def unframe(data: bytes) -> dict[str, Any]:
    """Return the JSON object that `frame` wrote, its bytes not yet compared with a re-encoding.

    Raises:
        FormatError: (MANIFEST_DAMAGED) the checksum differs, or the line is not a JSON object.
    """
    line = data[:-_TRAILER]
    if line[-1:] != b"\n" or data[-_TRAILER:] != f"{zlib.crc32(line):08x}\n".encode():
        raise FormatError(
            ErrorKind.MANIFEST_DAMAGED, "the CRC-32 in its last line is not that of its content"
        )
    return parse_json_object(line[:-1])


def parse_json_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object in `line`, with nothing that canonical JSON cannot hold.

    Raises:
        FormatError: (MANIFEST_DAMAGED) it is not one.
    """
    try:
        value = json.loads(line.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(ErrorKind.MANIFEST_DAMAGED, f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(ErrorKind.MANIFEST_DAMAGED, "it is JSON but not an object")
    return value


def check_exact(value: dict[str, Any], line: bytes) -> None:
    """Accept `value` only if writing it canonically gives exactly `line`.

    Raises:
        FormatError: (MANIFEST_DAMAGED) reordered or doubled keys, spaces, another spelling of a number, trailing bytes.
    """
    try:
        again = dump_plain(value)
    except (ValueError, RecursionError) as error:
        raise FormatError(ErrorKind.MANIFEST_DAMAGED, f"its JSON cannot be written again: {error}") from error
    if again != line:
        raise FormatError(ErrorKind.MANIFEST_DAMAGED, "its JSON is not in canonical form")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _plain(value: object, where: str, depth: int) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        if not _INT_MIN <= value < _INT_END:
            raise _unfit(where, f"integer {int(value)} is outside [-2**63, 2**64)")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _unfit(where, f"{float(value)} is not a finite number")
        return float(value)
    if depth >= _MAX_DEPTH:
        raise _unfit(where, f"it is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise _unfit(where, f"key {key!r} is not a string")
        return {str.__str__(k): _plain(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    raise _unfit(where, f"a {type(value).__name__} has no JSON form")


def _unfit(where: str, problem: str) -> InvalidInputError:
    place = where.lstrip(".") or "the value itself"
    return InvalidInputError(ErrorKind.BAD_ARGUMENT, f"cannot write {place} as JSON: {problem}; change it")
