"""What are the bytes of a whole state, and when are they worth writing? (FORMAT.md, section 4.6)

A checkpoint is derived: a gzip file of a header line and the state's entries, one a line. It is believed only after
the sum of its entries' hashes was found in the manifest of its version, so that a damaged one costs time and nothing
else. It may be deleted at any time.
"""

import gc
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from actstore.errors import FormatError
from actstore.log.actions import check_fields, damaged, parse_hex, parse_int
from actstore.log.canonical import canonical_json, parse_json_object
from actstore.log.entries import (
    MODULUS,
    entry_hash,
    entry_name,
    parse_collection,
    parse_epoch,
    parse_format,
    parse_seal,
    parse_tomb,
    parse_txn_entry,
)
from actstore.log.manifest import sha256_hex
from actstore.log.state import State
from actstore.log.txns import RecentTxns
from actstore.log.units import UnitMap
from actstore.log.values import Collection, Format, Seal

CHECKPOINTS = "checkpoints/"
FMT = "AC-1"
MIN_VERSIONS = 64
"""Fewer versions than that are read as fast as a checkpoint."""

BYTES_RATIO = 4
"""A new checkpoint waits until the manifests since the last one have a quarter of its size: then all checkpoints
together take at most four times the bytes of the manifests, and a reader opens with few of them."""

_KEY = re.compile(r"checkpoints/(\d{20})-([0-9a-f]{8})\.json\.gz")
_HEADER_FIELDS = frozenset({"fmt", "v", "manifest_sha256"})
_GZIP = 31
_MAX_RATIO, _MIN_BOUND = 64, 1 << 20
"""Entries hold hashes and UUIDs and compress about sevenfold; what unpacks to much more is a bomb."""


@dataclass(frozen=True, slots=True)
class CheckpointKey:
    """What the key of a checkpoint says."""

    key: str
    version: int
    sha8: str
    """First 8 hex digits of the SHA-256 of its bytes."""


def parse_checkpoint_key(key: str) -> CheckpointKey | None:
    """Return what a key under `checkpoints/` says, or None for a foreign key."""
    match = _KEY.fullmatch(key)
    return CheckpointKey(key, int(match[1]), match[2]) if match else None


def is_due(*, versions: int, every: int, manifest_bytes: int, checkpoint_bytes: int) -> bool:
    """Return whether a checkpoint is worth writing.

    Args:
        versions: Since the last checkpoint.
        every: At least so many.
        manifest_bytes: Of these versions' manifests.
        checkpoint_bytes: Size of the last checkpoint, 0 when there is none.
    """
    return versions >= every and manifest_bytes * BYTES_RATIO >= checkpoint_bytes


def encode_checkpoint(state: State) -> tuple[str, bytes]:
    """Return the key and the bytes of a state's checkpoint; the same ones whenever zlib packs the same."""
    header = {"fmt": FMT, "v": state.version, "manifest_sha256": state.manifest_sha256}
    packer = zlib.compressobj(level=1, wbits=_GZIP)
    parts = [packer.compress(canonical_json(header) + b"\n")]
    parts += [packer.compress(entry + b"\n") for entry in state.entries()]
    data = b"".join([*parts, packer.flush()])
    return f"{CHECKPOINTS}{state.version:020}-{sha256_hex(data)[:8]}.json.gz", data


def decode_checkpoint(data: bytes, name: CheckpointKey) -> State:
    """Return the state in a checkpoint, its hash computed from the bytes of the entries.

    The caller compares `manifest_sha256` and `after` with the manifest of that version before it uses the state.

    Raises:
        FormatError: it is damaged.
    """
    try:
        if sha256_hex(data)[:8] != name.sha8:
            raise damaged("its bytes do not have the hash in its name")
        lines = _unpack(data).split(b"\n")
        if lines.pop() != b"":
            raise damaged("its last line is cut short")
        header = parse_json_object(lines.pop(0))
        check_fields(header, _HEADER_FIELDS, "a checkpoint header")
        if (header["fmt"], header["v"]) != (FMT, name.version):
            raise damaged(f"its header is {header}")
        with _collector_paused():
            hash_sum = sum(map(entry_hash, lines)) % MODULUS
            sha256 = parse_hex(header["manifest_sha256"], 64, "sha256")
            return _build(name.version, sha256, lines, _parse_lines(lines), hash_sum)
    except FormatError as error:
        raise FormatError(error.kind, f"{name.key}: {error.message}") from error


def _unpack(data: bytes) -> bytes:
    bound = max(_MIN_BOUND, len(data) * _MAX_RATIO)
    unpacker = zlib.decompressobj(wbits=_GZIP)
    try:
        plain = unpacker.decompress(data, bound)
    except zlib.error as error:
        raise damaged(f"it cannot be unpacked: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise damaged(f"it is cut short, has trailing bytes, or unpacks to more than {bound} bytes")
    return plain


def _parse_lines(lines: list[bytes]) -> list[Any]:
    try:
        entries = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError) as error:
        raise damaged(f"an entry is not JSON: {error}") from error
    if not isinstance(entries, list) or len(entries) != len(lines):
        raise damaged("an entry is not one JSON value")
    return entries


@contextmanager
def _collector_paused() -> Iterator[None]:
    # A hundred thousand new values without cycles make the cyclic collector walk them all again and again:
    # measured, a fifth of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(slots=True)
class _Parts:
    collection: Collection
    epoch: int = 0
    seal: Seal | None = None
    units: dict[int, bytes] = field(default_factory=dict)
    rows: int = 0
    nbytes: int = 0
    nonfinite: int = 0


def _build(
    version: int, manifest_sha256: str, lines: list[bytes], entries: list[Any], hash_sum: int
) -> State:
    named = [(entry_name(plain), plain) for plain in entries]
    parts: dict[tuple[str, str], _Parts] = {}
    formats: list[Format] = []
    tombs: dict[str, str] = {}
    txns: dict[int, str] = {}
    for name, plain in named:
        if name == "collection":
            collection = parse_collection(plain)
            parts[collection.kind, collection.id] = _Parts(collection)
    for line, (name, plain) in zip(lines, named, strict=True):
        if name == "unit":
            _put_unit(_part(parts, plain), plain, line)
        elif name == "epoch":
            _part(parts, plain).epoch = parse_epoch(plain)
        elif name == "seal":
            part = _part(parts, plain)
            part.seal = parse_seal(plain)
            part.nbytes += sum(obj.nbytes for obj in part.seal.objects)
        elif name == "format":
            formats.append(parse_format(plain))
        elif name == "tomb":
            tombs.update([parse_tomb(plain)])
        elif name == "txn":
            txns.update([parse_txn_entry(plain)])
    if len(formats) != 1:
        raise damaged(f"it has {len(formats)} format entries instead of one")
    return State(
        version=version,
        manifest_sha256=manifest_sha256,
        format=formats[0],
        collections={key: _collection(part) for key, part in parts.items()},
        txns=RecentTxns.of(txns),
        tombs=tombs,
        hash_sum=hash_sum,
        n_units=sum(len(part.units) for part in parts.values()),
        n_rows=sum(part.rows for part in parts.values()),
        nbytes=sum(part.nbytes for part in parts.values()),
    )


def _part(parts: dict[tuple[str, str], _Parts], plain: dict[str, Any]) -> _Parts:
    part = parts.get((str(plain.get("kind")), str(plain.get("id"))))
    if part is None:
        raise damaged("an entry belongs to no collection")
    return part


def _put_unit(part: _Parts, plain: dict[str, Any], line: bytes) -> None:
    # The numbers are needed now; the rest of the line is taken apart when the unit is asked for.
    try:
        unit = parse_int(plain["unit"], "unit")
        part.units[unit] = line
        part.rows += plain["rows"]
        part.nonfinite += plain["nonfinite"]
        for obj in plain["objects"]:
            part.nbytes += obj["nbytes"]
    except (KeyError, TypeError) as error:
        raise damaged(f"a unit entry lacks a number: {error}") from error


def _collection(part: _Parts) -> Collection:
    if not (type(part.rows) is type(part.nbytes) is type(part.nonfinite) is int):
        raise damaged("a unit entry holds something else than an integer")
    return replace(
        part.collection,
        epoch=part.epoch,
        units=UnitMap.of_entries(part.units),
        seal=part.seal,
        rows=part.rows,
        nbytes=part.nbytes,
        nonfinite=part.nonfinite,
    )
