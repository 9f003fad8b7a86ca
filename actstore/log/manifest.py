"""What are the bytes of one version, and which bytes are accepted as one? (FORMAT.md, section 4.2)

A manifest is one framed line of canonical JSON. Reading is exact: what decodes also re-encodes to the same bytes, so there
is one spelling of every version, its SHA-256 can stand for it in the chain, and no byte of it can change unnoticed.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.log.actions import (
    check_fields,
    damaged,
    dump_action,
    parse_action,
    parse_hex,
    parse_int,
    parse_txn,
    parse_utc,
    too_new,
)
from actstore.log.canonical import check_exact, frame, parse_json_object, unframe
from actstore.log.values import Action, Format

FMT = "AM-1"
FORMAT_VERSION = 1
"""What this code reads and writes, to be compared with a store's `reader_min` and `writer_min`."""

FEATURES: frozenset[str] = frozenset()
"""Optional parts of the format that this code knows."""

MAX_MANIFEST_BYTES = 64 << 20
"""About 150,000 objects in one commit; more than that is to be cut into several."""

MANIFESTS = "manifests/"
_KEY = re.compile(r"manifests/(\d{20})\.json")
_FIELDS = frozenset({"fmt", "v", "parent", "txn", "writer", "t", "acts", "after"})
_WRITER_FIELDS = frozenset({"host", "pid", "version"})
_AFTER_FIELDS = frozenset({"collections", "units", "rows", "bytes", "state"})
_MAX_HOST = 256


@dataclass(frozen=True, slots=True)
class Writer:
    """Who wrote a manifest; information only."""

    host: str
    pid: int
    version: str
    """Of actstore."""


@dataclass(frozen=True, slots=True)
class After:
    """What the state must be once a manifest is applied: a check on every reader's arithmetic."""

    collections: int
    units: int
    rows: int
    nbytes: int
    state: str
    """The state hash, 64 hex digits."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version."""

    version: int
    parent: str | None
    """SHA-256 of the bytes of the version before; None for version 0."""

    txn: str
    """Chosen by the writer, so that a retry finds out whether its first try counted."""

    writer: Writer
    time: str
    """RFC 3339, UTC; information only."""

    actions: tuple[Action, ...]
    after: After


def manifest_key(version: int) -> str:
    """Return the key of a version.

    >>> manifest_key(17)
    'manifests/00000000000000000017.json'
    """
    return f"{MANIFESTS}{version:020}.json"


def parse_manifest_key(key: str) -> int | None:
    """Return the version that a key under `manifests/` stands for, or None for a foreign key."""
    match = _KEY.fullmatch(key)
    return int(match[1]) if match else None


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of `data`, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest.

    Raises:
        InvalidInputError: a value that canonical JSON cannot hold, or more than 64 MiB in all (TOO_LARGE).
    """
    data = frame(
        {
            "fmt": FMT,
            "v": manifest.version,
            "parent": manifest.parent,
            "txn": manifest.txn,
            "writer": {
                "host": manifest.writer.host,
                "pid": manifest.writer.pid,
                "version": manifest.writer.version,
            },
            "t": manifest.time,
            "acts": [dump_action(action) for action in manifest.actions],
            "after": {
                "collections": manifest.after.collections,
                "units": manifest.after.units,
                "rows": manifest.after.rows,
                "bytes": manifest.after.nbytes,
                "state": manifest.after.state,
            },
        }
    )
    if len(data) > MAX_MANIFEST_BYTES:
        raise InvalidInputError(
            ErrorKind.TOO_LARGE,
            f"a commit of {len(manifest.actions)} actions takes {len(data)} bytes and at most {MAX_MANIFEST_BYTES} may be "
            "written at once: commit in smaller groups",
        )
    return data


def decode(data: bytes, *, version: int) -> Manifest:
    """Return the manifest in `data`, which was read from the key of `version`.

    Raises:
        FormatError: FORMAT_TOO_NEW for a format, feature, operation or field that this code does not know;
            MANIFEST_DAMAGED for bytes that no writer writes. The message names the key.
    """
    try:
        if len(data) > MAX_MANIFEST_BYTES:
            raise damaged(f"it has {len(data)} bytes and at most {MAX_MANIFEST_BYTES} are allowed")
        plain = unframe(data)
        _check_fmt(plain.get("fmt"))
        check_exact(plain, data[:-10])
        manifest = _parse(plain)
        if manifest.version != version:
            raise damaged(f"it says that it is version {manifest.version}")
        return manifest
    except FormatError as error:
        remedy = "" if error.kind is ErrorKind.FORMAT_TOO_NEW else ": restore the object from a backup"
        raise FormatError(error.kind, f"{manifest_key(version)}: {error.message}{remedy}") from error


def parse_actions(plain: Sequence[Any]) -> tuple[Action, ...]:
    """Return the actions that a list of plain JSON stands for; raises FormatError as `decode` does."""
    return tuple(parse_action(action) for action in plain)


def normalise(actions: Sequence[Action]) -> tuple[Action, ...]:
    """Return the actions as a reader will see them: checked, and with plain JSON inside.

    Raises:
        InvalidInputError: an action that no reader would accept.
    """
    data = frame({"acts": [dump_action(action) for action in actions]})
    try:
        return parse_actions(parse_json_object(data[:-10])["acts"])
    except FormatError as error:
        kind = (
            ErrorKind.BAD_NAME if isinstance(error.__cause__, InvalidInputError) else ErrorKind.BAD_ARGUMENT
        )
        raise InvalidInputError(kind, f"cannot commit: {error.message}") from error


def check_readable(fmt: Format) -> None:
    """Accept a store's `Format` only if this code knows how to read everything in the store."""
    if fmt.reader_min > FORMAT_VERSION:
        raise too_new(f"store format {fmt.reader_min} (this version reads {FORMAT_VERSION})")
    unknown = sorted(set(fmt.features) - FEATURES)
    if unknown:
        raise too_new(f"a store with the features {unknown}")


def check_writable(fmt: Format) -> None:
    """Accept a store's `Format` only if this code may add versions to it."""
    check_readable(fmt)
    if fmt.writer_min > FORMAT_VERSION:
        raise too_new(f"writing to a store of format {fmt.writer_min} (this version writes {FORMAT_VERSION})")


def _check_fmt(fmt: object) -> None:
    if fmt == FMT:
        return
    if isinstance(fmt, str) and re.fullmatch(r"AM-[1-9]\d{0,8}", fmt):
        raise too_new(f"manifest format {fmt!r}")
    raise damaged(f"its format is {fmt!r} instead of {FMT!r}")


def _parse(plain: dict[str, Any]) -> Manifest:
    # Newer operations are refused before anything else in the manifest is judged.
    acts = plain.get("acts")
    if not isinstance(acts, list) or not acts:
        raise damaged("it has no list of actions")
    actions = parse_actions(acts)
    for action in actions:
        if isinstance(action, Format):
            check_readable(action)
    check_fields(plain, _FIELDS, "a manifest")
    version = parse_int(plain["v"], "v")
    if (version == 0) != (plain["parent"] is None):
        raise damaged(f"version {version} has the parent {plain['parent']!r}")
    parent = None if plain["parent"] is None else parse_hex(plain["parent"], 64, "parent")
    return Manifest(
        version=version,
        parent=parent,
        txn=parse_txn(plain["txn"]),
        writer=_parse_writer(plain["writer"]),
        time=parse_utc(plain["t"], "t"),
        actions=actions,
        after=_parse_after(plain["after"]),
    )


def _parse_writer(plain: object) -> Writer:
    if not isinstance(plain, dict):
        raise damaged("writer is not a JSON object")
    check_fields(plain, _WRITER_FIELDS, "a writer")
    host, version = plain["host"], plain["version"]
    if not (isinstance(host, str) and isinstance(version, str)) or max(len(host), len(version)) > _MAX_HOST:
        raise damaged("writer has no proper host and version")
    return Writer(host, parse_int(plain["pid"], "pid"), version)


def _parse_after(plain: object) -> After:
    if not isinstance(plain, dict):
        raise damaged("after is not a JSON object")
    check_fields(plain, _AFTER_FIELDS, "an after")
    return After(
        collections=parse_int(plain["collections"], "collections"),
        units=parse_int(plain["units"], "units"),
        rows=parse_int(plain["rows"], "rows"),
        nbytes=parse_int(plain["bytes"], "bytes"),
        state=parse_hex(plain["state"], 64, "state"),
    )
